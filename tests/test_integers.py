"""Integers in payloads and files: their decisions, coders and headers, against values computed by hand."""

import struct
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from reference import IntegersReference

from rnncodec.entropy import CLASSICAL, INTEGERS, LARGEST, SCALE, PriorSession
from rnncodec.entropy.classical import LONGEST, from_huffman, huffman, huffman_lengths
from rnncodec.files import format
from rnncodec.files.codings import ADAPTIVE, CONTEXT, DECISIONS, HUFFMAN, PRIOR, RAW, STATIC
from rnncodec.files.errors import FormatError
from rnncodec.files.format import Container, Entry, Header

SHAPE = 6, 9, 7
CODERS = [name for name in CLASSICAL if name != "none"]


def plane(seed=0, shape=SHAPE):
    """Integers of very different sizes in each channel, one of them always 0."""
    generator = np.random.default_rng(seed)
    widths = np.array([0, 0.2, 1, 4, 20, 300])[: shape[0], None, None]
    return np.round(generator.laplace(0, 1, shape) * widths).astype(np.int16)


def decisions_of(value):
    """The decisions of an integer as (number, answer), written out from FORMAT.md."""
    found = [(0, value != 0)]
    if value:
        size = abs(value)
        found.append((1, value < 0))
        for least in range(2, DECISIONS):
            found.append((least, size >= least))
            if size < least:
                break
        if size >= DECISIONS - 1:
            digits = f"{size - DECISIONS + 2:b}"
            found += [(DECISIONS, True)] * (len(digits) - 1) + [(DECISIONS, False)] * (len(digits) < 16)
            found += [(DECISIONS, digit == "1") for digit in digits[1:]]
    return found


@pytest.mark.parametrize(
    "value", [0, 1, -1, 2, -2, 13, 14, -14, 15, 16, -17, 18, 29, 30, 100, -1000, 16398, 16399, -32767]
)
def test_decisions_of_an_integer(value):
    asked = []

    def ask(number, places, answers):
        asked.extend((number, bool(answer)) for answer in answers)
        return answers

    assert INTEGERS.walk(ask, 1, np.array([value])) == [value]
    assert asked == decisions_of(value)
    answers = iter(decisions_of(value))

    def tell(number, places, _):
        found = [next(answers) for _ in places]
        assert [which for which, _ in found] == [number] * len(places)
        return np.array([answer for _, answer in found], bool)

    assert INTEGERS.walk(tell, 1) == [value]
    assert next(answers, None) is None


def test_payloads_decode_by_the_text_of_the_format():
    """FORMAT.md's decoder, one decision after another, reads what each coder writes; in two pieces of locations."""
    values = plane(11, (4, 27, 20))
    values[1, 5, 6] = -32767
    small = np.clip(values, -30, 30)
    table = np.random.default_rng(1).integers(1000, SCALE - 1000, (4, DECISIONS))
    sessions = {name: CLASSICAL[name](*values.shape, alphabet=INTEGERS) for name in CLASSICAL}
    sessions["prior"] = PriorSession(*values.shape, prior=table)
    for name, session in sessions.items():
        given = small if name == "huffman" else values
        ((coding, payload),) = session.encode(given)
        assert name in ("none", "prior") or coding != RAW
        reference = IntegersReference(*values.shape)
        coding, payload = session.coding, payload if coding != RAW or name == "none" else session._encode(given)
        np.testing.assert_array_equal(reference.decode(coding, payload, table), given)


@pytest.mark.parametrize("coder", CLASSICAL)
@pytest.mark.parametrize("values", [plane(), plane(1, (6, 1, 1)), np.zeros(SHAPE, np.int16), plane() // 50])
def test_what_is_coded_is_decoded(coder, values):
    ((coding, payload),) = CLASSICAL[coder](*values.shape, alphabet=INTEGERS).encode(values)
    found = CLASSICAL[coder](*values.shape, alphabet=INTEGERS).decode([(coding, payload)])
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.int16
    assert len(payload) <= 2 * values.size


def test_raw_integers_are_big_endian_location_by_location():
    values = plane()
    ((coding, payload),) = CLASSICAL["none"](*SHAPE, alphabet=INTEGERS).encode(values)
    expected = b"".join(
        struct.pack(">h", values[c, y, x]) for y in range(SHAPE[1]) for x in range(SHAPE[2]) for c in range(SHAPE[0])
    )
    assert (coding, payload) == (RAW, expected)


@pytest.mark.parametrize("coder", CODERS)
def test_coders_come_near_the_entropy(coder):
    """Each channel's own entropy for the range coders, that of all values together for the one code book."""
    shape = 6, 64, 64
    values = plane(3, shape)[:4]  # whose integers are rarely beyond 15
    ((_, payload),) = CLASSICAL[coder](*values.shape, alphabet=INTEGERS).encode(values)

    def entropy(found):
        counts = np.unique(found, return_counts=True)[1]
        return -(counts * np.log2(counts / counts.sum())).sum() / 8

    if coder == "huffman":
        book = 2 + np.abs(values).max() + 1
        assert entropy(values) < len(payload) < entropy(values) + 0.09 * values.size / 8 + book + 1
    else:
        least = sum(entropy(channel) for channel in values)
        assert len(payload) < 1.03 * least + 4 * (DECISIONS + 1) + 4


def test_a_static_payload_by_hand():
    """Two channels: one of zeros, whose share of yes is at least 1 / 256; one of 0, 1, 1, -2."""
    values = np.array([[[0, 0, 0, 0]], [[0, 1, 1, -2]]], np.int16)
    ((coding, payload),) = CLASSICAL["static"](2, 30, 4, alphabet=INTEGERS).encode(np.tile(values, (1, 30, 1)))
    assert coding == STATIC
    # A channel's number of decisions and their shares of yes: 3/4 are not 0, 1/3 of them negative, 1/3 at least 2, ...
    assert payload[:2] == bytes([1, 1])
    assert payload[2:7] == bytes([4, 192, round(256 / 3), round(256 / 3), 1])
    never, third = -np.log2(255 / 256), 85 / 256
    bits = 120 * never  # of the zeros
    bits += -90 * np.log2(3 / 4) - 30 * np.log2(1 / 4)
    bits += 2 * (-30 * np.log2(third) - 60 * np.log2(1 - third)) + 30 * never
    assert len(payload) - 7 == pytest.approx(bits / 8, abs=5)


def test_huffman_codes_have_at_most_fifteen_bits():
    """Counts like Fibonacci's numbers would have codes of as many bits as there are symbols."""
    counts = [1, 1]
    while len(counts) < 22:
        counts.append(counts[-1] + counts[-2])
    symbols = np.repeat(np.arange(22), counts)
    assert huffman_lengths(np.array(counts)).max() == 21
    coded = huffman(symbols, 22)
    lengths = np.unpackbits(np.frombuffer(coded[:11], np.uint8)).reshape(-1, 4) @ [8, 4, 2, 1]
    assert lengths.max() <= LONGEST
    assert lengths @ counts < 1.01 * (huffman_lengths(np.array(counts)) @ counts)
    assert (2.0**-lengths).sum() <= 1
    np.testing.assert_array_equal(from_huffman(coded, 22, len(symbols)), symbols)


def test_too_many_symbols_are_not_coded():
    values = np.arange(-LARGEST, LARGEST + 1, dtype=np.int16)[None, None, : 2**15 + 2]
    ((coding, payload),) = CLASSICAL["huffman"](*values.shape, alphabet=INTEGERS).encode(values)
    assert (coding, len(payload)) == (RAW, 2 * values.size)


@pytest.mark.parametrize("values", [np.full(SHAPE, -(2**15), np.int16), plane().astype(np.int32)])
def test_other_integers_are_refused(values):
    with pytest.raises(ValueError, match="integers are int16 from -32767 to 32767"):
        CLASSICAL["static"](*SHAPE, alphabet=INTEGERS).encode(values)


def test_a_prior_gives_each_decision_its_probability():
    """The length of the code is the information of the decisions, by the table."""
    values = plane(5, (6, 32, 32))
    table = np.random.default_rng(0).integers(1, SCALE, (6, DECISIONS))
    ((coding, payload),) = PriorSession(*values.shape, prior=table).encode(values)
    bits = 0.0
    for channel, found in zip(table, values, strict=True):
        chances = np.append(channel / SCALE, 0.5)
        for value in found.ravel():
            bits -= sum(np.log2(chances[n] if yes else 1 - chances[n]) for n, yes in decisions_of(int(value)))
    if coding == PRIOR:
        assert len(payload) == pytest.approx(bits / 8, abs=8)
    else:
        assert bits / 8 > 2 * values.size - 8
    np.testing.assert_array_equal(PriorSession(*values.shape, prior=table).decode([(coding, payload)]), values)


def header(coding=PRIOR, length=100, **changes):
    fields: dict[str, Any] = {
        "width": 64,
        "height": 40,
        "fingerprint": bytes(8),
        "weights": "w",
        "stride": 8,
        "bits": 6,
    }
    fields |= {"level": 3, "entries": (Entry(coding, length, 0),)}
    fields |= changes
    return Header(**fields)


def test_a_header_of_integers_by_hand():
    payload = bytes(100)
    data = format.write(Container(header(entries=(Entry.of(payload, PRIOR, 3),)), (payload,)))
    expected = b"\x8fRNC\x03" + struct.pack(">HH", 64, 40) + bytes(16) + bytes([8, 6, 1]) + b"w"
    expected += bytes([PRIOR, 1, 4]) + struct.pack(">H", 1) + bytes([3])
    assert data.startswith(expected)
    assert len(data) == header().sizes[0] == len(expected) + 2 + 2 + 4 + 100
    assert format.read_header(data).level == 3
    assert format.read(data, max_pixels=2**20).payloads == (payload,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": None}, "not for bits"),
        ({"coding": CONTEXT, "context": b"12345678"}, "not for integers"),
        ({"level": 256}, "a level up to 255"),
        ({"parts": 2}, "one payload"),
        ({"maps": True}, "one payload"),
        ({"entries": (Entry(PRIOR, 9, 0),) * 2}, "one payload"),
        ({"coding": RAW, "length": 479}, "takes 479 bytes, not 480 to 480"),
        ({"coding": HUFFMAN, "length": 32}, "not 33 to 480"),  # a book of 3 bytes, and a bit for each of 240
        ({"coding": STATIC, "length": 12}, "not 13 to 480"),  # two bytes for each channel, and 240 / 1417
        ({"coding": ADAPTIVE, "length": 0}, "not 1 to 480"),
        ({"length": 481}, "not 1 to 480"),
    ],
)
def test_impossible_headers_of_integers_are_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        header(**changes)


@pytest.mark.parametrize("coder", CODERS)
def test_damaged_payloads_give_an_error_or_integers(coder):
    values = np.clip(plane(7), -20, 20)
    ((coding, payload),) = CLASSICAL[coder](*SHAPE, alphabet=INTEGERS).encode(values)
    assert coding != RAW
    generator = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(payload)
        damaged[generator.integers(len(damaged))] ^= 1 << generator.integers(8)
        cut = bytes(damaged[: generator.integers(len(damaged) + 1)] if generator.random() < 0.3 else damaged)
        try:
            found = CLASSICAL[coder](*SHAPE, alphabet=INTEGERS).decode([(coding, cut)])
        except FormatError:
            continue
        assert found.shape == SHAPE
        assert found.dtype == np.int16


def test_the_unary_part_of_a_hostile_integer_ends():
    """All answers yes: a decoder stops before an integer could be too large for its type."""
    with pytest.raises(FormatError, match="out of range"):
        INTEGERS.walk(lambda number, places, _: np.ones(len(places), bool), 3)


def test_least_lengths_grow_with_the_image():
    sizes = [header(width=width, height=width, length=700).least_length(0) for width in (64, 512, 4096)]
    assert all(before < after for before, after in pairwise(sizes[1:]))
