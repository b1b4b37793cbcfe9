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
    """Payloads of maps, bool [T, rows, cols], and all pairs of k and digit or flag in the order of coding."""
    made, payloads, told = StopMap(*maps.shape[1:]), [], []
    for going in maps:
        coder = RangeEncoder()

        def code(probabilities, flags, coder=coder):
            coder.write(probabilities, flags)
            told.extend(zip(probabilities.tolist(), flags.tolist(), strict=True))
            return flags

        np.testing.assert_array_equal(made.advance(code, going), going)
        payloads.append(coder.finish())
    return payloads, told


def decode(payloads, rows, cols):
    """The maps of payloads."""
    made, found = StopMap(rows, cols), []
    for payload in payloads:
        coder = RangeDecoder(payload)
        found.append(made.advance(lambda probabilities, _, coder=coder: coder.read(probabilities)).copy())
        coder.finish()
    return np.array(found)


def at_level(level, going, seen=None):
    """A decoder's side of a map that is coded at a level; `seen` takes the k of each turn."""
    left = [np.array([digit == "1" for digit in f"{level:04b}"])]
    left += [going[row::2, col::2] for row, col in ((0, 0), (1, 1), (0, 1), (1, 0))]

    def code(probabilities, flags):
        assert flags is None
        if seen is not None:
            seen.append(set(probabilities.tolist()))
        return left.pop(0).ravel()

    return code


def nested(last):
    """The maps of locations that get so many iterations each."""
    return np.arange(last.max())[:, None, None] < last


def test_probabilities_of_a_small_map_by_hand():
    """2x3 locations; the right one above stops after the first iteration, the left one below after the second.

    New counts of 1 and 4 take 3.77 and 3.45 bits; kept ones, from 1 and 8 on, would take 3.97 and 3.80.
    """
    last = np.array([[3, 3, 1], [2, 3, 3]])
    payloads, told = encode(nested(last))
    level_7 = [(32768, digit) for digit in (False, True, True, True)]
    second = [
        (65536 * 4 // 5, True),  # above left, context 0: nothing is known
        (65536 * 4 // 5, False),  # above right
        (65536 * 4 // 5, True),  # below in the middle, context 4: one has stopped, one goes on
        (65536 * 5 // 6, True),  # above in the middle: one has stopped, two go on: 4 again, which has seen one go on
        (65536 * 4 // 5, True),  # below left, context 2: three go on
        (65536 * 6 // 7, True),  # below right, context 4
    ]
    third = [
        (65536 * 4 // 5, True),  # above left, context 0
        (65536 * 4 // 5, True),  # below in the middle, context 4: one has stopped, one goes on
        (65536 * 5 // 6, True),  # above in the middle
        (65536 * 4 // 5, False),  # below left, context 2
        (65536 * 6 // 7, True),  # below right, context 4
    ]
    assert told == level_7 + second + level_7 + third
    assert payloads[0] == b""
    np.testing.assert_array_equal(decode(payloads, 2, 3), nested(last))


def test_counts_of_level_0_are_kept_and_halved():
    """FORMAT.md's example: 60 of 100 locations of the first turn stop."""
    going = np.ones((20, 20), bool)
    going[::2, ::2] = np.arange(100).reshape(10, 10) >= 60
    made, seen = StopMap(20, 20), []
    made.advance(at_level(0, going))
    np.testing.assert_array_equal(made.advance(at_level(0, going, seen)), going)
    assert made.counts[0].tolist() == [31, 24]
    assert seen[:2] == [{32768}, {58254}]
    made.living = np.ones_like(going)  # all are asked anew
    made.advance(at_level(6, going, seen))
    assert seen[6] == {58254}  # 8 / 9 again, by new counts
    assert made.counts[0].tolist() == [31, 24]
    made.living = np.ones_like(going)
    made.advance(at_level(0, going, seen))
    assert seen[11] == {28597}


@pytest.mark.parametrize(("level", "k"), [(1, 65280), (3, 64527), (8, 43690), (9, 32768), (10, 21845), (15, 1008)])
def test_new_counts_by_level(level, k):
    """65536 * 256 / 257, 64 / 65, 2 / 3, 1 / 2, 1 / 3 and 1 / 65."""
    going, seen = np.ones((4, 4), bool), []
    made = StopMap(4, 4)
    made.advance(at_level(level, going))
    made.advance(at_level(level, going, seen))
    assert seen[1] == {k}


@pytest.mark.parametrize("level", [0, 1, 5, 9, 15])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_counts_stay_small_and_chances_possible(share, level):
    """However large a map, P is 256 / 257 at most, and never 0."""
    rng = np.random.default_rng(0)
    made = StopMap(150, 150)
    made.advance(at_level(0, made.living))
    while made.living.sum() > 1:
        digits = [np.array([digit == "1" for digit in f"{level:04b}"])]

        def code(probabilities, _, digits=digits):
            if digits:
                return digits.pop()
            assert ((probabilities >= SCALE // 66) & (probabilities <= SCALE * 256 // 257)).all()
            return rng.random(len(probabilities)) < share

        made.advance(code)
        assert made.counts.min() >= 1
        assert made.counts.sum(1).max() <= 64


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 1])
def test_a_map_unlike_those_before_costs_little_more_than_its_entropy(share):
    """Of 1536 locations, which all have gone on for eight iterations."""
    going = np.random.default_rng(0).random((32, 48)) < share
    told = encode(np.concatenate([np.ones((9, 32, 48), bool), going[None]]))[1]
    ideal = np.cumsum([-np.log2(k / SCALE if flag else 1 - k / SCALE) for k, flag in told])
    before = 8 * (4 + 1536)  # digits and flags
    assert ideal[before - 1] < 8 * 17
    chances = [p for p in (going.mean(), 1 - going.mean()) if p > 0]
    entropy = -1536 * sum(p * np.log2(p) for p in chances)
    assert ideal[-1] - ideal[before - 1] < entropy + 20


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_any_nested_maps_are_the_documented_ones(rows, cols, iterations, seed):
    """They come back, with flags and probabilities of the reference."""
    maps = nested(np.random.default_rng(seed).integers(1, iterations + 1, (rows, cols)))
    payloads, told = encode(maps)
    np.testing.assert_array_equal(decode(payloads, rows, cols), maps)
    reference = StopReference(rows, cols)

    def take(k):
        expected, value = told.pop(0)
        assert k == expected
        return value

    for going in maps:

        def digit(_, k):
            return take(k)

        def flag(y, x, k, going=going):
            assert take(k) == going[y, x]
            return bool(going[y, x])

        assert reference.read(digit, flag) == set(zip(*np.nonzero(going), strict=True))
    assert not told


def test_who_has_stopped_is_not_asked_again():
    going = np.zeros((4, 5), bool)
    going[1:3, 2] = True
    made, asked = StopMap(4, 5), []
    for _ in range(3):

        def code(probabilities, flags):
            asked.append(len(probabilities))
            return flags

        made.advance(code, going)
    assert asked[0] == asked[5] == 4
    assert sum(asked[1:5]) == 20
    assert sum(asked[6:]) == 2


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
        ideal = sum(-np.log2(k / SCALE if flag else 1 - k / SCALE) for k, flag in told) / 8
        assert ideal - 1 < sizes[-1] < ideal + 8 * 8
    assert 8 * sizes[0] < 0.45 * nested(last)[:-1].sum()
    assert sizes[0] < 0.65 * sizes[1]
