"""Tests of iterations in parts and of locations that stop, against the reference that decodes by FORMAT.md alone."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import GroupedReference, PartsReference, damaged, parts_file
from test_grouped import asked, model

from rnncodec.entropy import ContextConfig, ContextModel, ContextSession, PartsSession, grouped
from rnncodec.files.format import CONTEXT, RAW, FormatError
from rnncodec.network.questions import Questions

BITS, GROUPS, PASSES, CHANNELS = 8, 4, 3, 14
SHAPE = 7, 9


@cache
def expects_zeros() -> ContextModel:
    """A model that expects few ones, so that bits that are mostly zeros get shorter."""
    made = model(groups=GROUPS, gain=1)
    with torch.no_grad():
        made.grouped.odds.mul_(0.3).sub_(2)
    return made.quantize()


@pytest.fixture(scope="module")
def exact():
    return expects_zeros()


@pytest.fixture(scope="module")
def questions():
    return asked(groups=GROUPS)


@pytest.fixture(scope="module")
def reference(exact, questions):
    shape = PASSES, GROUPS, BITS // GROUPS, grouped.CASES, 2
    cost = questions.cost.numpy().reshape(shape)
    return GroupedReference(exact, CHANNELS, questions.channel.numpy(), cost, questions.edges.numpy())


def outcome(decode):
    """What a decoder gives, or its error."""
    try:
        return decode()
    except FormatError as error:
        return str(error)


def bits(shape=SHAPE, maps=True, iterations=PASSES + 1, seed=0):
    """Bits of locations that stop, if they may; int8 [T, bits, rows, cols]."""
    rng = np.random.default_rng(seed)
    signs = np.where(rng.random((iterations, BITS, *shape)) < 0.1, 1, -1).astype(np.int8)
    last = rng.integers(1, iterations + 1, shape) if maps else np.full(shape, iterations)
    last[rng.integers(shape[0]), rng.integers(shape[1])] = iterations
    return signs * (np.arange(iterations)[:, None, None] < last)[:, None]


@pytest.mark.parametrize(("parts", "maps"), [(1, True), (2, False), (2, True), (4, False), (4, True)])
def test_payloads_are_the_documented_ones(parts, maps, exact, questions, reference, monkeypatch):
    """Three bands; the third iteration is noise, which is stored raw."""
    monkeypatch.setattr(ContextSession, "BAND", 3 * 9 + 4)
    x = bits(maps=maps)
    noise = np.where(np.random.default_rng(1).random(x[2].shape) < 0.5, 1, -1).astype(np.int8)
    x[2] *= noise
    encoder = PartsSession(exact, BITS, *SHAPE, questions, parts, maps)
    assert len(encoder.bands) == 3
    decoder = PartsSession(exact, BITS, *SHAPE, questions, parts, maps)
    plain = PartsReference(reference, *SHAPE, 3, parts, maps)
    codings = []
    for plane in x:
        pieces = encoder.encode(plane)
        assert len(pieces) == parts
        found = decoder.decode(pieces)
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, plane)
        np.testing.assert_array_equal(plain.decode([(coding == CONTEXT, payload) for coding, payload in pieces]), plane)
        codings.append({coding for coding, _ in pieces})
    assert codings[2] == {RAW}
    assert CONTEXT in codings[0]


def test_the_example_of_the_document():
    """Its payloads are raw, so that any model of two groups reads them."""
    text = (Path(__file__).parents[1] / "FORMAT.md").read_text("utf-8").partition("## Example of version 3")[2]
    block = re.findall(r"```hex\n(.*?)```", text, re.S)[0]
    data = bytes.fromhex("".join(re.split(r" {2,}", line)[0] for line in block.splitlines()))
    fields, payloads = parts_file(data)
    assert fields == {
        "width": 40,
        "height": 10,
        "fingerprint": bytes.fromhex("0123456789ABCDEF"),
        "context": bytes(8),
        "stride": 16,
        "bits": 4,
        "name": "small",
        "coding": 0,
        "parts": 2,
        "flags": 1,
    }
    x = np.zeros((2, 4, 1, 3), np.int8)
    x[0, :, 0] = np.transpose([[1, -1, 1, 1], [-1, 1, 1, -1], [1, 1, -1, 1]])
    x[1, :, 0] = np.transpose([[-1, 1, 1, 1], [0, 0, 0, 0], [-1, -1, 1, -1]])
    model = ContextModel(ContextConfig("grouped", 4, 4, 1, 2)).quantize()
    nothing = Questions(2, 1, 4, 2)
    nothing.channel += torch.arange(2)
    reference = GroupedReference(
        model, 2, nothing.channel.numpy(), np.zeros((1, 2, 2, grouped.CASES, 2)), nothing.edges.numpy()
    )
    plain, session = PartsReference(reference, 1, 3, 1, 2, True), PartsSession(model, 4, 1, 3, nothing, 2, True)
    for t, plane in enumerate(x):
        pieces = payloads[2 * t : 2 * t + 2]
        np.testing.assert_array_equal(plain.decode(pieces), plane)
        np.testing.assert_array_equal(session.decode([(RAW, payload) for _, payload in pieces]), plane)


@pytest.mark.parametrize("maps", [False, True])
def test_missing_parts_of_the_last_iteration_are_zeros(maps, exact, questions, reference):
    x = bits(maps=maps)
    encoder = PartsSession(exact, BITS, *SHAPE, questions, 4, maps)
    coded = [encoder.encode(plane) for plane in x]
    for iteration in range(len(x)):
        for kept in range(1, 5):
            decoder = PartsSession(exact, BITS, *SHAPE, questions, 4, maps)
            for pieces, plane in zip(coded[:iteration], x, strict=False):
                np.testing.assert_array_equal(decoder.decode(pieces), plane)
            found = decoder.decode(coded[iteration][:kept])
            np.testing.assert_array_equal(found[: 2 * kept], x[iteration, : 2 * kept])
            assert not found[2 * kept :].any()
    plain = PartsReference(reference, *SHAPE, 7, 4, maps)
    given = [[(coding == CONTEXT, payload) for coding, payload in pieces] for pieces in coded[:3]]
    plain.decode(given[0])
    plain.decode(given[1])
    np.testing.assert_array_equal(plain.decode(given[2][:3]), x[2] * (np.arange(BITS) < 6)[:, None, None])


def test_parts_cost_little_more_than_one_payload(exact, questions):
    """All parts know what earlier ones say, so that only the ends of the codes add bytes."""
    x = bits((24, 32), maps=False)
    coders = [ContextSession(exact, BITS, 24, 32, questions), PartsSession(exact, BITS, 24, 32, questions, 4, False)]
    whole, divided = ([sum(len(payload) for _, payload in coder.encode(plane)) for plane in x] for coder in coders)
    assert coders[1].ideal_bits == pytest.approx(coders[0].ideal_bits)
    assert all(0 <= more - less <= 4 * 8 for less, more in zip(whole, divided, strict=True))


def test_only_flags_and_locations_that_go_on_cost_bits(exact, questions):
    x = bits((24, 32))
    coder, other = (PartsSession(exact, BITS, 24, 32, questions, 1, True) for _ in range(2))
    for t, plane in enumerate(x):
        p = other.probabilities(plane) / 65536
        other._advance(plane)
        sent = -np.log2(np.where(plane > 0, p, 1 - p))[:, plane[0] != 0].sum()
        ((_, payload),) = coder.encode(plane)
        flags = coder.ideal_bits[-1] - sent
        assert flags == pytest.approx(0, abs=1e-6) if t == 0 else 0 < flags < 1.1 * (x[t - 1, 0] != 0).sum()
        assert coder.ideal_bits[-1] / 8 - 1 < len(payload) < coder.ideal_bits[-1] / 8 + 8


@given(st.sampled_from([1, 2, 4]), st.integers(1, 8), st.integers(1, 8), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_any_nested_maps_come_back(parts, rows, cols, iterations, seed):
    exact, questions = expects_zeros(), asked(groups=GROUPS)
    x = bits((rows, cols), True, iterations, seed)
    encoder, decoder = (PartsSession(exact, BITS, rows, cols, questions, parts, True) for _ in range(2))
    for plane in x:
        pieces = encoder.encode(plane)
        assert all(payload for _, payload in pieces)
        np.testing.assert_array_equal(decoder.decode(pieces), plane)


def test_what_no_map_can_say_is_refused(exact, questions):
    x = bits()
    some, none, halved, revived = x[1], np.zeros_like(x[0]), x[0].copy(), x[2].copy()
    halved[4:, 3, 3] = 0
    revived[:, x[1, 0] == 0] = 1
    assert (x[1, 0] == 0).any()

    def coder(maps, *before):
        made = PartsSession(exact, BITS, *SHAPE, questions, 2, maps)
        for plane in before:
            made.encode(plane)
        return made

    for made, plane in (
        (coder(True), some),  # all locations get the first iteration
        (coder(True), none),
        (coder(True), halved),
        (coder(True, x[0]), none),
        (coder(True, x[0]), halved),
        (coder(True, x[0], x[1]), revived),
        (coder(False, x[0]), some),
    ):
        with pytest.raises(ValueError, match=r"or none from there on|all locations get"):
            made.encode(plane)
    with pytest.raises(FormatError, match="4 groups cannot be divided into 3 parts"):
        PartsSession(exact, BITS, *SHAPE, questions, 3, True)


def test_a_map_by_which_nobody_goes_on_is_an_error(exact, questions):
    encoder, decoder = (PartsSession(exact, BITS, *SHAPE, questions, 2, True) for _ in range(2))
    decoder.decode(encoder.encode(bits()[0]))
    with pytest.raises(FormatError, match="no location goes on"):
        decoder.decode([(RAW, bytes(9)), (RAW, b"")])  # four digits and 63 flags


@pytest.mark.parametrize("parts", [1, 4])
def test_damaged_payloads_are_an_error_or_other_bits(parts, exact, questions):
    """Whatever the payloads of the second iteration say, who has no bits there has none at all."""
    first, second = bits((12, 12))[:2]
    encoder = PartsSession(exact, BITS, 12, 12, questions, parts, True)
    before, pieces = encoder.encode(first), encoder.encode(second)
    cases = [(number, changed) for number, (_, payload) in enumerate(pieces) for changed in damaged(payload)]
    errors = 0
    for number, changed in cases:
        decoder = PartsSession(exact, BITS, 12, 12, questions, parts, True)
        decoder.decode(before)
        given = [*pieces[:number], (pieces[number][0], changed), *pieces[number + 1 :]]
        found = outcome(lambda decoder=decoder, given=given: decoder.decode(given))
        if isinstance(found, str):
            errors += 1
            assert "\n" not in found
        else:
            assert found.shape == first.shape
            assert ((found != 0) == (found[0] != 0)).all()
    assert errors > 0
    for hostile in (b"", bytes(200), b"\xff" * 200, b"\xff" * 3):
        for coding in (RAW, CONTEXT):
            decoder = PartsSession(exact, BITS, 12, 12, questions, parts, True)
            found = outcome(lambda decoder=decoder, given=[(coding, hostile)] * parts: decoder.decode(given))
            assert isinstance(found, str) or found.all()
    with pytest.raises(FormatError, match="coding 2"):
        PartsSession(exact, BITS, 12, 12, questions, parts, True).decode([(2, b"1234")] * parts)
