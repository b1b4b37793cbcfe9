"""Tests of the stop maps: by hand, against the reference that follows FORMAT.md, and what they cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import StopReference
from skimage import data

from rnncodec.entropy import SCALE, RangeDecoder, RangeEncoder
from rnncodec.entropy.stops import StopMap


def encode(maps):
    """Payloads of maps, bool [T, rows, cols], and all flags in the order of coding: row, column, k, flag."""
    made, payloads, told = StopMap(*maps.shape[1:]), [], []
    for going in maps:
        coder = RangeEncoder()

        def code(turn, probabilities, going=going, coder=coder):
            coder.write(probabilities, going[turn])
            told.extend(zip(*np.nonzero(turn), probabilities.tolist(), going[turn].tolist(), strict=True))
            return going[turn]

        np.testing.assert_array_equal(made.advance(code), going)
        payloads.append(coder.finish())
    return payloads, told


def decode(payloads, rows, cols):
    """The maps of payloads."""
    made, found = StopMap(rows, cols), []
    for payload in payloads:
        coder = RangeDecoder(payload)
        found.append(made.advance(lambda _, probabilities, coder=coder: coder.read(probabilities)).copy())
        coder.finish()
    return np.array(found)


def nested(last):
    """The maps of locations that get so many iterations each."""
    return np.arange(last.max())[:, None, None] < last


def test_probabilities_of_a_small_map_by_hand():
    """2x3 locations; the right one above stops after the first iteration, the left one below after the second."""
    last = np.array([[3, 3, 1], [2, 3, 3]])
    payloads, told = encode(nested(last))
    second = [
        (0, 0, 65536 * 8 // 9, True),  # context 0: nothing is known
        (0, 2, 65536 * 8 // 9, False),
        (1, 1, 65536 * 8 // 9, True),  # context 4: one has stopped, one goes on
        (0, 1, 65536 * 9 // 10, True),  # one has stopped, two go on: context 4 again, which has seen one that goes on
        (1, 0, 65536 * 8 // 9, True),  # context 2: three go on
        (1, 2, 65536 * 10 // 11, True),  # context 4
    ]
    third = [
        (0, 0, 65536 * 9 // 11, True),  # context 0, which has seen one of each
        (1, 1, 65536 * 11 // 12, True),  # context 4: one has stopped, one goes on
        (0, 1, 65536 * 12 // 13, True),
        (1, 0, 65536 * 9 // 10, False),  # context 2
        (1, 2, 65536 * 13 // 14, True),  # context 4
    ]
    assert told == second + third
    assert payloads[0] == b""
    np.testing.assert_array_equal(decode(payloads, 2, 3), nested(last))


def test_counts_are_halved():
    """FORMAT.md's example: 60 of 100 locations of the first turn stop."""
    going = np.ones((20, 20), bool)
    going[::2, ::2] = np.arange(100).reshape(10, 10) >= 60
    made = StopMap(20, 20)
    made.advance(lambda turn, _: going[turn])
    seen = []

    def code(turn, probabilities):
        seen.append(set(probabilities.tolist()))
        return going[turn]

    made.advance(code)
    assert made.counts[0].tolist() == [31, 24]
    assert seen[0] == {58254}
    made.advance(code)
    assert 28597 in seen[4]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_counts_stay_small_and_chances_possible(share):
    """However large a map, counts are at least 1 and together at most 64."""
    rng = np.random.default_rng(0)
    made = StopMap(150, 150)
    made.advance(lambda turn, _: np.ones(turn.sum(), bool))
    while made.living.sum() > 1:

        def code(turn, probabilities):
            assert ((probabilities >= SCALE // 65) & (probabilities < SCALE)).all()
            return rng.random(turn.sum()) < share

        made.advance(code)
        assert made.counts.min() >= 1
        assert made.counts.sum(1).max() <= 64


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_any_nested_maps_are_the_documented_ones(rows, cols, iterations, seed):
    """They come back, with flags and probabilities of the reference."""
    maps = nested(np.random.default_rng(seed).integers(1, iterations + 1, (rows, cols)))
    payloads, told = encode(maps)
    np.testing.assert_array_equal(decode(payloads, rows, cols), maps)
    reference, expected = StopReference(rows, cols), []
    for going in maps:

        def flag(y, x, k, going=going):
            expected.append((y, x, k, bool(going[y, x])))
            return bool(going[y, x])

        assert reference.read(flag) == set(zip(*np.nonzero(going), strict=True))
    assert told == expected


def test_who_has_stopped_is_not_asked_again():
    going = np.zeros((4, 5), bool)
    going[1:3, 2] = True
    made, asked = StopMap(4, 5), []
    for _ in range(3):

        def code(turn, _):
            asked.append(turn.sum())
            return going[turn]

        made.advance(code)
    assert sum(asked[:4]) == 20
    assert sum(asked[4:]) == 2


def test_a_realistic_map_costs_a_fraction_of_a_bit_for_each_location():
    """Locations stop the later, the busier the photograph is around them; any other order costs much more."""
    photo = data.coffee().astype(float).mean(2)[:400]
    blocks = photo.reshape(50, 8, 75, 8).std((1, 3))
    activity = sum(np.roll(blocks, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1))
    last = 1 + np.digitize(activity, np.quantile(activity, np.linspace(0, 1, 9)[1:-1]))
    shuffled = np.random.default_rng(0).permutation(last.ravel()).reshape(last.shape)
    sizes = []
    for of in (last, shuffled):
        payloads, told = encode(nested(of))
        sizes.append(sum(map(len, payloads)))
        ideal = sum(-np.log2(k / SCALE if flag else 1 - k / SCALE) for *_, k, flag in told) / 8
        assert ideal - 1 < sizes[-1] < ideal + 8 * 8
    assert 8 * sizes[0] < 0.45 * nested(last)[:-1].sum()
    assert sizes[0] < 0.65 * sizes[1]
