"""Tests of the entropy coders: payloads, their lengths, and damage, which is an error or leaves a correct prefix."""

import math
import re
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Reference, chance, damaged, damaged_files, least_bytes, order, range_decode
from skimage import data

from rnncodec.codec import Codec
from rnncodec.entropy import (
    CLASSICAL,
    ContextConfig,
    ContextModel,
    ContextSession,
    RangeEncoder,
    Session,
    signs,
)
from rnncodec.entropy.classical import AdaptiveSession, HuffmanSession, StaticSession, huffman_lengths
from rnncodec.entropy.context import Parallel
from rnncodec.files import format
from rnncodec.files.codings import ADAPTIVE, CODINGS, CONTEXT, HUFFMAN, PRIOR, RAW, STATIC
from rnncodec.files.errors import FormatError
from rnncodec.files.fields import pack_bits
from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.weights import WeightsError, load_weights, save_weights

SHAPE = (8, 7, 9)
NUMBERS = {name: coding for coding, name in CODINGS.items() if coding != PRIOR}  # which bits can have
CODERS = [*(name for name in CLASSICAL if name != "none"), "sequential", "parallel"]


def context_model(kind, seed=0):
    torch.manual_seed(seed)
    context = ContextModel(ContextConfig(kind=kind, bits=8, channels=8, groups=2))
    with torch.no_grad():
        bias = context.predictor(0).output.bias
        assert bias is not None
        bias.add_(torch.linspace(-3, 3, 8))  # channels that are mostly 0 or mostly 1
    return context.quantize()


def test_strips_of_rows_do_not_change_the_first_pass(monkeypatch):
    """In strips of 8 rows, of which the last has 3, bits come back that were coded with the whole plane at once."""
    shape = 8, 35, 9
    bits = planes(3, shape)
    encoder = ContextSession(context_model("parallel"), *shape)
    pieces = [encoder.encode(plane) for plane in bits]
    monkeypatch.setattr(Parallel, "STRIP", 1)
    decoder = ContextSession(context_model("parallel"), *shape)
    for plane, each in zip(bits, pieces, strict=True):
        np.testing.assert_array_equal(decoder.decode(each), plane)


def session(coder, shape=SHAPE) -> Session:
    if coder in CLASSICAL:
        return CLASSICAL[coder](*shape)
    return ContextSession(context_model(coder), *shape)


def planes(count=3, shape=SHAPE, seed=0):
    """Bits that all coders can shorten, -1 and +1: channel c is +1 with probability 0.05 to 0.95."""
    rng = np.random.default_rng(seed)
    share = np.linspace(0.05, 0.95, shape[0])[:, None, None]
    return signs(rng.random((count, *shape)) < share)


def outcome(decode):
    """What a decoder gives, or its error of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that were cut
            return decode()
    except (FormatError, WeightsError) as error:
        return str(error)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("shape", [SHAPE, (8, 1, 1), (8, 1, 40), (8, 40, 1), (8, 17, 33)])
def test_payloads_decode_to_the_bits(coder, shape):
    bits = planes(shape=shape)
    encoder, decoder = session(coder, shape), session(coder, shape)
    coded = [piece for plane in bits for piece in encoder.encode(plane)]
    assert len(coded) == len(bits)
    raw = math.ceil(np.prod(shape) / 8)
    assert all(len(payload) <= raw for _, payload in coded)
    if np.prod(shape) > 2000:
        assert {coding for coding, _ in coded} == {encoder.coding}
    for piece, plane in zip(coded, bits, strict=True):
        found = decoder.decode([piece])
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, plane)


@pytest.mark.parametrize("coder", CODERS)
def test_what_does_not_shrink_is_stored_raw_and_remembered(coder):
    rng = np.random.default_rng(0)
    noise, easy = rng.random(SHAPE) < 0.5, planes(1, (8, 40, 40))[0]
    encoder = session(coder)
    assert encoder.encode(signs(noise)) == [(RAW, pack_bits(noise))]
    big = (8, 40, 40)
    encoder, decoder = session(coder, big), session(coder, big)
    sequence = [signs(rng.random(big) < 0.5), easy, signs(rng.random(big) < 0.5), easy]
    coded = [piece for plane in sequence for piece in encoder.encode(plane)]
    assert [coding for coding, _ in coded] == [RAW, encoder.coding, RAW, encoder.coding]
    for plane, piece in zip(sequence, coded, strict=True):
        np.testing.assert_array_equal(decoder.decode([piece]), plane)


@pytest.mark.parametrize("coder", [*CLASSICAL, "sequential", "parallel"])
def test_bits_that_are_left_out_are_refused(coder):
    (plane,) = planes(1)
    plane[:, 2, 3] = 0
    with pytest.raises(ValueError, match="stop maps"):
        session(coder).encode(plane)


def test_range_coder_is_the_documented_one():
    rng = np.random.default_rng(4)
    probabilities = np.concatenate([[1, 65535, 1, 65535, 32768], rng.integers(1, 65536, 3000)])
    bits = rng.random(len(probabilities)) < probabilities / 65536
    bits[:4] = [False, True, True, False]  # the last two against all odds
    coder = RangeEncoder()
    coder.write(probabilities[:7], bits[:7])
    coder.write(probabilities[7:], bits[7:])
    assert range_decode(coder.finish(), probabilities.tolist()) == bits.tolist()


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
@pytest.mark.parametrize("iterations", [0, 2])
def test_context_payloads_are_the_documented_ones(kind, iterations, monkeypatch):
    """The reference decodes three iterations in bands, of which the second is raw."""
    torch.manual_seed(0)
    config = ContextConfig(kind=kind, bits=8, channels=6, groups=2, iterations=iterations)
    exact = ContextModel(config).quantize()
    bits, shape = planes(), (8, 7, 9)
    bands = [slice(0, 3), slice(3, 6), slice(6, 7)]
    monkeypatch.setattr(ContextSession, "BAND", 3 * 9 + 4)
    encoder, decoder = ContextSession(exact, *shape), ContextSession(exact, *shape)
    logits = [Reference(exact).logits(bits[:, :, band]) for band in bands]
    for t, plane in enumerate(bits):
        if t == 1:
            for coder in encoder, decoder:
                coder.decode([(RAW, pack_bits(plane > 0))])
            continue
        _, payload = encoder._encode(plane > 0), encoder._encode(plane > 0)  # nothing changes before the end
        encoder._advance(plane)
        np.testing.assert_array_equal(decoder.decode([(CONTEXT, payload)]), plane)
        probabilities, expected = [], []
        for band, found in zip(bands, logits, strict=True):
            part = plane[:, band]
            for place in order(kind, 2, part.shape):
                probabilities.append(chance(found[t][place]))
                expected.append(bool(part[place] > 0))
        assert range_decode(payload, probabilities) == expected


def test_static_and_adaptive_payloads_are_the_documented_ones():
    for plane in planes() > 0:
        expected = [bool(plane[c, y, x]) for y, x in np.ndindex(7, 9) for c in range(8)]
        payload = StaticSession(*SHAPE)._encode(plane)
        assert range_decode(payload[8:], [256 * share for share in payload[:8]] * 63) == expected
        counts: dict[tuple[int, bool, bool], list[int]] = {}
        probabilities = []
        for y, x in np.ndindex(7, 9):
            for c in range(8):
                above, left = bool(y and plane[c, y - 1, x]), bool(x and plane[c, y, x - 1])
                n = counts.setdefault((c, above, left), [0, 0])
                probabilities.append(min(65535, max(1, 65536 * (2 * n[1] + 1) // (2 * sum(n) + 2))))
                n[int(plane[c, y, x])] += 1
        assert range_decode(AdaptiveSession(*SHAPE)._encode(plane), probabilities) == expected


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_context_payloads_have_the_ideal_length(kind):
    bits = planes(shape=(8, 24, 32))
    encoder = ContextSession(context_model(kind), 8, 24, 32)
    for plane in bits:
        p = encoder.probabilities(plane) / 65536
        ideal = -np.log2(np.where(plane > 0, p, 1 - p)).sum() / 8
        ((_, payload),) = encoder.encode(plane)
        assert ideal - 1 < len(payload) < 1.01 * ideal + 16


def test_static_payload_is_a_byte_for_each_channel_and_the_ideal_length():
    plane = planes(1, (8, 24, 32))[0]
    ((coding, payload),) = StaticSession(8, 24, 32).encode(plane)
    ones = (plane > 0).sum((1, 2))
    shares = np.clip(np.rint(ones / 768 * 256), 1, 255)
    assert coding == STATIC
    assert list(payload[:8]) == shares.tolist()
    p = shares / 256
    ideal = -(ones * np.log2(p) + (768 - ones) * np.log2(1 - p)).sum() / 8
    assert ideal - 1 < len(payload) - 8 < 1.01 * ideal + 8


def test_adaptive_payload_has_the_length_of_the_counts():
    plane = planes(1, (8, 24, 32))[0] > 0
    ((coding, payload),) = AdaptiveSession(8, 24, 32).encode(signs(plane))
    ideal = 0.0
    counts: dict[tuple[int, bool, bool], list[int]] = {}
    for y in range(24):
        for x in range(32):
            for c in range(8):
                above = bool(plane[c, y - 1, x]) if y else False
                left = bool(plane[c, y, x - 1]) if x else False
                n = counts.setdefault((c, above, left), [0, 0])
                bit = int(plane[c, y, x])
                ideal -= math.log2((n[bit] + 0.5) / (sum(n) + 1)) / 8
                n[bit] += 1
    assert coding == ADAPTIVE
    assert ideal - 1 < len(payload) < 1.01 * ideal + 8


def test_huffman_payload_is_the_one_made_by_hand():
    # Groups 1010 (three times), 0000 (twice) and 1111, 0001 (once): codes 0, 10, 110, 111 by length, then value.
    groups = ["1010", "0000", "1010", "1111", "1010", "0000", "0001"]
    plane = np.array([[char == "1" for char in group] for group in groups]).T[:, None]
    payload = HuffmanSession(4, 1, 7)._encode(plane)
    lengths = {0b1010: 1, 0b0000: 2, 0b0001: 3, 0b1111: 3}
    book = "".join(f"{lengths.get(symbol, 0):04b}" for symbol in range(16))
    code = "0" + "10" + "0" + "111" + "0" + "10" + "110"
    expected = book + code.ljust(16, "0")
    assert payload == int(expected, 2).to_bytes(10, "big")
    np.testing.assert_array_equal(HuffmanSession(4, 1, 7)._decode_whole(payload), plane)


@pytest.mark.parametrize("counts", [[1], [5, 0, 3], [1, 1, 2, 3, 5, 8, 13, 21], [7] * 16, [2**n for n in range(16)]])
def test_huffman_lengths_are_optimal(counts):
    lengths = huffman_lengths(np.array(counts))
    used = [n for n in counts if n]
    assert [bool(n) for n in counts] == [bool(length) for length in lengths]
    assert sum(2.0 ** -int(length) for length in lengths if length) == (1 if len(used) > 1 else 0.5)
    # The cost of an optimal code is the sum of all inner nodes of the tree.
    heap, cost = sorted(used), 0 if len(used) > 1 else used[0]
    while len(heap) > 1:
        cost += heap[0] + heap[1]
        heap = sorted([heap[0] + heap[1], *heap[2:]])
    assert sum(int(n) * int(length) for n, length in zip(counts, lengths, strict=True)) == cost


def test_bands_are_planes_of_their_own(monkeypatch):
    bits = planes(2, (8, 10, 9))
    model = context_model("sequential")
    parts = [ContextSession(model, 8, rows, 9) for rows in (4, 4, 2)]
    monkeypatch.setattr(ContextSession, "BAND", 4 * 9 + 5)
    encoder, decoder = ContextSession(model, 8, 10, 9), ContextSession(model, 8, 10, 9)
    for plane in bits:
        bands = [plane[:, :4], plane[:, 4:8], plane[:, 8:]]
        expected = np.concatenate([part.probabilities(band) for part, band in zip(parts, bands, strict=True)], axis=1)
        for part, band in zip(parts, bands, strict=True):
            part.encode(band)
        np.testing.assert_array_equal(encoder.probabilities(plane), expected)
        np.testing.assert_array_equal(decoder.decode(encoder.encode(plane)), plane)


@pytest.mark.parametrize("coder", CODERS)
def test_damaged_payloads_are_an_error_or_other_bits(coder):
    shape = (8, 12, 12)
    (plane,) = planes(1, shape)
    ((coding, payload),) = session(coder, shape).encode(plane)
    assert coding != RAW
    errors = 0
    for changed in damaged(payload):
        found = outcome(lambda changed=changed: session(coder, shape).decode([(coding, changed)]))
        if isinstance(found, str):
            errors += 1
            assert "\n" not in found
        else:
            assert found.shape == shape
    assert errors > 0
    for hostile in (b"", bytes(200), b"\xff" * 200):
        found = outcome(lambda hostile=hostile: session(coder, shape).decode([(coding, hostile)]))
        assert isinstance(found, str) or found.shape == shape


def test_payload_of_another_coder_is_refused():
    with pytest.raises(FormatError, match="coding 2"):
        session("static").decode([(HUFFMAN, b"")])


# In files


def test_the_document_lists_the_codings():
    text = (Path(__file__).parent.parent / "FORMAT.md").read_text("utf-8")
    _, _, section = text.partition("## Coded payloads")
    section, _, _ = section.partition("## Integers")
    rows = re.findall(r"^\| (\d+) \| (\w+)", section, re.MULTILINE)
    assert {int(number): name.lower() for number, name in rows} == {k: name for k, name in CODINGS.items() if k != RAW}
    assert [RAW, CONTEXT, HUFFMAN, STATIC, ADAPTIVE, PRIOR] == [0, 1, 2, 3, 4, 5]  # numbers in files never change


def make_weights(path, kind):
    """Random weights with a context model that shortens their bits."""
    torch.manual_seed(0)
    network = RecurrentCodec(NetworkConfig(bits=8, encoder_channels=(8,) * 4, decoder_channels=(8,) * 5))
    bias = network.binarizer.features.bias
    assert bias is not None
    bias.data = torch.linspace(-1, 1, 8)
    save_weights(path, network, "w", {}, context_model(kind))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", "parallel")


@pytest.fixture
def codec(weights):
    return Codec(load_weights(weights))


def picture(height=200, width=300):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("entropy", [None, *NUMBERS])
def test_files_decode_alike_whatever_the_coder(codec, entropy):
    x = picture()
    data, raw = codec.encode(x, 4, entropy=entropy), codec.encode(x, 4, entropy="none")
    header = format.read_header(data)
    coded = {it.coding for it in header.entries} - {RAW}
    assert coded == {NUMBERS[entropy or "context"]} - {RAW}
    assert header.version == (2 if coded else 1)
    assert header.context == (codec.context_fingerprint if CONTEXT in coded else bytes(8))
    assert len(data) == header.size + sum(it.length for it in header.entries)
    assert len(data) <= len(raw) + 8
    for k in (1, 3, 4):
        image = np.asarray(codec.decode(raw, k))
        np.testing.assert_array_equal(np.asarray(codec.decode(data, k)), image)
        short = format.truncate(data, iterations=k)
        assert short == codec.encode(x, k, entropy=entropy)
        np.testing.assert_array_equal(np.asarray(codec.decode(short)), image)


def test_entropy_coding_fits_more_iterations_into_a_rate(codec):
    x = picture()
    raw = codec.encode(x, 4, entropy="none")
    limit = 8 * len(raw) / (200 * 300)
    data = codec.encode(x, bpp=limit)
    header = format.read_header(data)
    assert header.bpp[-1] <= limit
    assert header.iterations > 4
    longer = codec.encode(x, header.iterations + 1)
    assert 8 * len(longer) / (200 * 300) > limit


def test_another_context_model_is_refused(codec, weights, tmp_path):
    data = codec.encode(picture(), 2)
    other = tmp_path / "other.safetensors"
    save_weights(other, load_weights(weights).network, "w", {}, context_model("parallel", seed=1))
    without = tmp_path / "without.safetensors"
    save_weights(without, load_weights(weights).network, "w")
    for path, message in ((other, "needs the weights 'w' with the context model"), (without, "have none")):
        loaded = Codec(load_weights(path))
        assert loaded.fingerprint == codec.fingerprint
        with pytest.raises(WeightsError, match=message):
            loaded.decode(data)
        raw = codec.encode(picture(), 2, entropy="none")
        assert loaded.decode(raw).tobytes() == codec.decode(raw).tobytes()


def test_damaged_context_model_is_refused(weights, tmp_path):
    path = tmp_path / "w.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="damaged"):
        load_weights(path)


@pytest.mark.parametrize("coder", CODERS)  # 1,000 trials in all
def test_damaged_files_give_an_error_or_the_right_prefix(coder, tmp_path):
    x = picture(96, 128)
    entropy = coder if coder in CLASSICAL else "context"
    codec = Codec(load_weights(make_weights(tmp_path / "w.safetensors", coder if entropy == "context" else "parallel")))
    data = codec.encode(x, 4, entropy=entropy)
    assert {it.coding for it in format.read_header(data).entries} == {session(coder).coding}
    whole = [np.asarray(codec.decode(data, k)) for k in range(1, 5)]
    prefixes = 0
    for file in damaged_files(data):
        found = outcome(lambda file=file: np.asarray(codec.decode(file)))
        if isinstance(found, str):
            assert "\n" not in found
        else:
            prefixes += 1
            assert any(np.array_equal(found, image) for image in whole)
    assert prefixes > 20


@pytest.mark.parametrize("entropy", [name for name in NUMBERS if name != "none"])
def test_hostile_payloads_with_right_checksums_are_an_error_or_some_image(codec, entropy):
    container = format.read(codec.encode(picture(96, 128), 2, entropy=entropy), max_pixels=10**6)
    coding = max(it.coding for it in container.header.entries)
    least = least_bytes(coding, 48, 8)
    rng = np.random.default_rng(3)
    for _ in range(60):
        payload = rng.bytes(int(rng.integers(least, container.header.raw_length + 1)))
        entry = format.Entry(coding, len(payload), zlib.crc32(payload))
        header = container.header.shortened(1)
        header = replace(header, entries=(entry,))
        data = format.write_header(header) + payload
        found = outcome(lambda data=data: codec.decode(data))
        assert "\n" not in found if isinstance(found, str) else found.size == (128, 96)


def test_the_shipped_context_model_shrinks_photographs():
    codec = Codec(load_weights())
    x = data.coffee()[:176, 100:356]
    raw = format.read(codec.encode(x, 4, entropy="none"), max_pixels=10**6)
    file = codec.encode(x, 4)
    coded = format.read(file, max_pixels=10**6)
    assert {it.coding for it in coded.header.entries} == {CONTEXT}
    np.testing.assert_array_equal(np.asarray(codec.decode(file)), np.asarray(codec.decode(format.write(raw))))
    assert codec.context is not None
    counter = ContextSession(codec.context, codec.config.bits, raw.header.rows, raw.header.cols)
    for plane, payload in zip(codec.read_bits(file), coded.payloads, strict=True):
        p = counter.probabilities(plane) / 65536
        ideal = -np.log2(np.where(plane > 0, p, 1 - p)).sum() / 8
        assert ideal - 1 < len(payload) < 1.01 * ideal + 64
        counter._advance(plane)
    assert sum(map(len, coded.payloads[:2])) < 0.8 * sum(map(len, raw.payloads[:2]))
