"""Tests of the choice of iterations: errors of blocks against NumPy, choices against brute force, regions by hand."""

import math

import numpy as np
import pytest
import torch

from rnncodec.allocation import ErrorSurvey, EvenSurvey, block_errors, region_weights

ROWS, COLS, MOST = 6, 7, 5
EFFORTS = np.linspace(0, 1, 101)


def averaged(x, side):
    """The means of the squares that an image [H, W] is made of."""
    height, width = x.shape
    return x.reshape(height // side, side, width // side, side).mean((1, 3))


def blurred(x):
    """An image [H, W] seen through the Gaussian window of MS-SSIM, 11 pixels wide; the border is repeated."""
    line = np.array([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)])
    line /= line.sum()
    padded = np.pad(x, 5, mode="edge")
    rows = np.array([np.convolve(row, line, "valid") for row in padded])
    return np.array([np.convolve(column, line, "valid") for column in rows.T]).T


def lost_structure(x, y, side):
    """What MS-SSIM sees without its finest scale and without luminance, for images [3, H, W] in [-1, 1]."""
    x, y, found = x.mean(0), y.mean(0), 0
    for scale, weight in ((2, 0.2856), (3, 0.3001), (4, 0.2363), (5, 0.1333)):
        x, y = averaged(x, 2), averaged(y, 2)
        variances = blurred(x * x) - blurred(x) ** 2 + blurred(y * y) - blurred(y) ** 2
        covariance = blurred(x * y) - blurred(x) * blurred(y)
        constant = (0.03 * 2) ** 2
        lost = 1 - (2 * covariance + constant) / (variances + constant)
        found = found + weight * averaged(lost, side // 2 ** (scale - 1))
    return 3 * side**2 * found


@pytest.mark.parametrize("side", [16, 32])
def test_errors_of_blocks_are_those_of_the_definition(side):
    rng = np.random.default_rng(0)
    x = np.kron(rng.uniform(-1, 1, (3, 12, 16)), np.ones((8, 8))) + rng.normal(0, 0.1, (3, 96, 128))
    y = 0.7 * x + rng.normal(0, 0.2, x.shape)
    squared = 3 * side**2 * averaged(((x - y) ** 2).mean(0), side)
    first, second = (torch.from_numpy(image).float()[None] for image in (x, y))
    np.testing.assert_allclose(block_errors(first, second, side, "psnr").numpy(), squared, rtol=1e-5)
    found = block_errors(first, second, side, "ms-ssim").numpy()
    assert found.shape == (96 // side, 128 // side)
    np.testing.assert_allclose(found, lost_structure(x, y, side), rtol=1e-3)
    np.testing.assert_allclose(block_errors(first, first, side, "ms-ssim").numpy(), 0, atol=0.02)


def surveyed(kind, seed=0, count=MOST, weight=None, rows=ROWS):
    """A survey with random bits, and errors that mostly fall."""
    rng = np.random.default_rng(seed)
    survey = kind(rows, COLS, MOST, 40.0, weight)
    for t in range(count):
        survey.add(rng.uniform(5, 60, (rows, COLS)), rng.uniform(0.2, 1, (rows, COLS)) * 30 / 2**t)
    survey.errors = [rng.uniform(2, 4, (rows, COLS)), rng.uniform(0, 2, (rows, COLS))][
        -1 if kind is ErrorSurvey else -2 :
    ]
    return survey


def spent(survey, last):
    """The bits and the errors left of a choice, summed in a loop."""
    squares, places = survey.squares(), list(np.ndindex(last.shape))
    rate = sum(survey.rate[last[place] - 1][place] for place in places)
    return rate, sum(squares[last[place] - 1][place] for place in places)


def beside(survey, last):
    """Bits of iterations and of their maps: 3 for each location that stops, at most 1 for each that has not yet."""
    maps = (min(3 * np.sum(last == t), np.sum(last >= t)) for t in range(1, last.max()))
    return survey.overhead * last.max() + sum(maps)


@pytest.mark.parametrize("weighted", [False, True])
def test_locations_stop_where_error_and_rate_are_smallest(weighted):
    weight = np.random.default_rng(9).uniform(1, 16, (ROWS, COLS)) if weighted else None
    survey = surveyed(ErrorSurvey, weight=weight)
    for effort in EFFORTS:
        multiplier = 160 ** (1 - effort) * 1e-6**effort
        last = survey.choose(effort)
        for place in np.ndindex(ROWS, COLS):
            costs = [
                (1 if weight is None else weight[place]) * survey.latent[t][place] + multiplier * survey.rate[t][place]
                for t in range(MOST)
            ]
            assert last[place] == 1 + min(range(MOST), key=costs.__getitem__)


def test_the_rate_grows_with_iterations():
    rng = np.random.default_rng(1)
    costs, survey = rng.uniform(1, 9, (3, ROWS, COLS)), ErrorSurvey(ROWS, COLS, MOST, 0)
    for cost in costs:
        survey.add(cost, cost)
    np.testing.assert_allclose(survey.rate[2], costs[0] + costs[1] + costs[2])
    np.testing.assert_array_equal(survey.latent, costs)


@pytest.mark.parametrize("kind", [ErrorSurvey, EvenSurvey])
def test_more_effort_never_spends_less_or_leaves_more(kind):
    survey = surveyed(kind)
    if kind is EvenSurvey:  # its locations go on even where that does harm
        survey.latent = np.sort(survey.latent, 0)[::-1]
    found = np.array([spent(survey, survey.choose(effort)) for effort in EFFORTS])
    assert (np.diff(found[:, 0]) >= -1e-9).all()
    assert (np.diff(found[:, 1]) <= 1e-9).all()
    assert len(np.unique(found[:, 0])) > 20
    np.testing.assert_array_equal(survey.choose(0), 1)


@pytest.mark.parametrize("kind", [ErrorSurvey, EvenSurvey])
def test_the_effort_for_a_rate_is_the_largest_that_fits(kind):
    survey = surveyed(kind)
    most = survey.choose(1)
    everything = spent(survey, most)[0] + beside(survey, most)
    for bits in np.linspace(0.3, 0.99, 12) * everything:
        effort = survey.for_rate(bits)
        now, more = survey.choose(effort), survey.choose(min(effort + 2e-4, 1))
        assert spent(survey, now)[0] + beside(survey, now) <= bits
        assert spent(survey, more)[0] + beside(survey, more) > bits
    assert survey.for_rate(everything + 1) == 1
    np.testing.assert_array_equal(survey.choose(survey.for_rate(1)), 1)


@pytest.mark.parametrize("kind", [ErrorSurvey, EvenSurvey])
def test_the_effort_for_an_error_is_the_largest_that_leaves_it(kind):
    survey = surveyed(kind)
    least, most = spent(survey, survey.choose(1))[1], spent(survey, survey.choose(0))[1]
    for error in np.linspace(1.05 * least, 0.95 * most, 12):
        effort = survey.for_squared(error)
        assert effort < 1
        assert spent(survey, survey.choose(effort))[1] >= error
        assert spent(survey, survey.choose(effort + 2e-4))[1] < error
    assert survey.for_squared(0.99 * least) == 1
    np.testing.assert_array_equal(survey.choose(survey.for_squared(1.01 * most)), 1)


def test_squared_errors_are_corrected_by_what_was_measured():
    survey = surveyed(ErrorSurvey)
    for t in range(MOST):
        expected = survey.latent[t] + (survey.errors[0] - survey.latent[-1])
        np.testing.assert_allclose(survey.squares()[t], np.where(expected < 0, 0, expected))
    survey.errors = []
    np.testing.assert_array_equal(survey.squares(), survey.latent)


@pytest.mark.parametrize("kind", [ErrorSurvey, EvenSurvey])
def test_bands_are_joined_to_the_survey_of_the_whole(kind):
    weight = np.random.default_rng(5).uniform(1, 3, (ROWS, COLS))
    whole = surveyed(kind, weight=weight)
    parts = []
    for cut in (slice(0, 2), slice(2, ROWS)):
        part = kind(cut.stop - cut.start, COLS, MOST, 40.0, weight[cut])
        for t in range(MOST):
            part.add(whole.rate[t][cut] - (whole.rate[t - 1][cut] if t else 0), whole.latent[t][cut])
        part.errors = [errors[cut] for errors in whole.errors]
        parts.append(part)
    joined = kind.joined(parts)
    assert type(joined) is kind
    assert (joined.most, joined.overhead) == (MOST, 40)
    for name in ("weight", "latent"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    np.testing.assert_allclose(joined.rate, whole.rate)
    np.testing.assert_array_equal(joined.errors, whole.errors)
    np.testing.assert_array_equal(joined.choose(0.4), whole.choose(0.4))


@pytest.mark.parametrize("measured", [False, True])
def test_all_locations_get_as_many_iterations_or_one_more(measured):
    """Those go on that save the most for a bit, by the reconstructions if these are of the two iterations in question.

    One bit is added to the cost of each.
    """
    count = 3
    weight = np.random.default_rng(7).uniform(1, 4, (ROWS, COLS))
    survey = surveyed(EvenSurvey, count=count, weight=weight)
    if not measured:
        survey.errors = []
    for effort in EFFORTS:
        level = 1 + effort * (MOST - 1)
        last = survey.choose(effort)
        if level >= count:
            np.testing.assert_array_equal(last, count)
            continue
        base = math.floor(level)
        assert set(last.flat) <= {base, base + 1}
        going = last == base + 1
        assert going.sum() == round((level - base) * ROWS * COLS)
        by_errors = measured and base == count - 1
        before, after = survey.errors if by_errors else (survey.latent[base - 1], survey.latent[base])
        saving = {
            place: weight[place]
            * (before[place] - after[place])
            / (survey.rate[base][place] - survey.rate[base - 1][place] + 1)
            for place in np.ndindex(ROWS, COLS)
        }
        best = sorted(saving, key=saving.__getitem__, reverse=True)[: going.sum()]
        assert set(best) == set(zip(*map(list, np.nonzero(going)), strict=True))


def test_surveys_know_when_they_are_done_or_too_short():
    even = surveyed(EvenSurvey, count=3)
    assert not even.done(np.full((ROWS, COLS), 3))
    assert even.short(np.full((ROWS, COLS), 3))
    some = np.full((ROWS, COLS), 3)
    some[2, 3] = 2
    assert even.done(some)
    assert not even.short(some)
    assert not surveyed(EvenSurvey).short(np.full((ROWS, COLS), MOST))

    error = surveyed(ErrorSurvey, count=3, rows=100)  # of 700 locations
    last = np.full((100, COLS), 2)
    last.flat[:3] = 3
    assert error.done(last)
    last.flat[:4] = 3
    assert not error.done(last)
    assert not error.short(last)
    last.flat[:35] = 3
    assert error.short(last)
    frozen = surveyed(ErrorSurvey, count=3, rows=100)  # nothing was surveyed after 2 iterations
    frozen.rate[2], frozen.latent[2] = frozen.rate[1], frozen.latent[1]
    assert frozen.short(np.full((100, COLS), 2))
    assert not frozen.short(np.full((100, COLS), 1))
    assert not surveyed(ErrorSurvey, rows=100).short(np.full((100, COLS), MOST))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (33, 32), (17, 17), (100, 140), (1, 50)])
def test_regions_count_by_equal_factors(height, width):
    """Black 1, white 16, and the mean of a block in between; the border is repeated up to whole blocks."""
    rows, cols = -(-height // 16), -(-width // 16)
    for gray, weight in ((0, 1), (255, 16), (51, 16**0.2), (102, 16**0.4), (204, 16**0.8)):
        found = region_weights(np.full((height, width), gray, np.uint8), 16)
        assert found is not None
        np.testing.assert_allclose(found, np.full((rows, cols), weight))
    roi = np.random.default_rng(3).integers(0, 256, (height, width), dtype=np.uint8)
    found = region_weights(roi, 16)
    assert found is not None
    for row, col in np.ndindex(rows, cols):
        values = [
            roi[min(y, height - 1), min(x, width - 1)] / 255
            for y in range(16 * row, 16 * row + 16)
            for x in range(16 * col, 16 * col + 16)
        ]
        assert found[row, col] == pytest.approx(16 ** (sum(values) / 256))
    assert region_weights(None, 16) is None
