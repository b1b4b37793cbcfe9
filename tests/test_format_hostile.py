"""Tests of small files that announce much: shortest payloads by hand, and what the others cost."""

import json
import math
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import RangeReader, least_bytes
from test_entropy import context_model, make_weights, picture
from test_format import crc, fixed, forge
from test_grouped import asked, model

import rnncodec
from rnncodec import cli
from rnncodec.codec import Codec
from rnncodec.entropy import CLASSICAL, ContextSession, PartsSession, RangeDecoder, RangeEncoder, signs
from rnncodec.files import format
from rnncodec.files.codings import ADAPTIVE, CONTEXT, HUFFMAN, RAW, STATIC
from rnncodec.files.format import Entry, FormatError, Header
from rnncodec.weights import PRETRAINED, load_weights

# Coding, rows and columns of locations, bits, iterations, parts, stop maps, and the least of the last payload.
LEAST = [
    (CONTEXT, 256, 256, 32, 1, 1, False, 127),  # 2097152 / 16516 = 126.98
    (CONTEXT, 1, 1, 32, 1, 1, False, 1),
    (CONTEXT, 256, 256, 32, 1, 4, False, 32),  # 524288 / 16516 = 31.7
    (CONTEXT, 256, 256, 32, 5, 4, True, 4),  # 8 bits, 65536 flags and 4 digits: 65548 / 16516 = 3.97
    (CONTEXT, 256, 256, 32, 6, 4, True, 1),
    (RAW, 256, 256, 32, 1, 4, False, 65536),
    (RAW, 256, 256, 32, 5, 4, True, 8194),  # 65548 / 8 = 8193.5
    (RAW, 256, 256, 32, 6, 4, True, 1),
    (RAW, 256, 256, 32, 9, 4, True, 2),  # 8 bits, a flag and 4 digits
    (HUFFMAN, 256, 256, 32, 1, 1, False, 65544),  # 8 and 2097152 / 32
    (HUFFMAN, 100, 100, 6, 1, 1, False, 3752),  # 2 and 60000 / 16
    (STATIC, 256, 256, 32, 1, 1, False, 1512),  # 32 and 2097152 / 1417 = 1479.99
    (ADAPTIVE, 256, 256, 32, 1, 1, False, 6),  # 2097152 / 363406 = 5.8
    (7, 256, 256, 32, 1, 1, False, 1),
]


@pytest.mark.parametrize(("coding", "rows", "cols", "bits", "count", "parts", "maps", "least"), LEAST)
def test_shortest_payloads_by_hand(coding, rows, cols, bits, count, parts, maps, least):
    assert least_bytes(coding, rows * cols, bits, count - 1, parts, maps) == least
    raw = math.ceil((rows * cols * (bits // parts + maps) + 4 * maps) / 8)
    context = b"contexts" if coding == CONTEXT else bytes(8)
    sizes = [least_bytes(coding, rows * cols, bits, n, parts, maps) for n in range(count)]

    def header(last):
        entries = tuple(Entry(coding, min(size, raw), 0) for size in [*sizes[:-1], last])
        return Header(cols, rows, bytes(8), "small", 1, bits, entries, context, parts, maps)

    assert header(least).entries[-1].length == least
    with pytest.raises(FormatError, match=f"takes {least - 1} bytes, not {least} to {raw}"):
        header(least - 1)


def chances(k):
    """The probabilities of a 0 and a 1 in the range coder of FORMAT.md, times 2^24."""
    zero = (65536 - k) * (2**24 - 2) // 65536 + 1
    return zero, 2**24 - zero


def test_the_numbers_of_the_table_are_those_of_the_likeliest_bits():
    """Of all k that a coder may have: 22 to 65514, multiples of 256, and 1 to 65535."""
    for numbers, most in ((range(22, 65515), 16516), (range(256, 65536, 256), 1417), (range(1, 65536), 363406)):
        largest = max(max(chances(k)) for k in numbers) / 2**24
        assert math.ceil(8 / -math.log2(largest)) == most
    assert round(65536 / (1 + math.exp(8))) == 22  # the limit of logits


# Honest payloads are never refused


def flat(shape, seed):
    """Planes that are easy to predict: all alike, and with one bit, one line or one channel that differs."""
    yield np.zeros(shape, bool)
    yield np.ones(shape, bool)
    rng = np.random.default_rng(seed)
    place = tuple(rng.integers(size) for size in shape)
    for where in (place, place[:1], (slice(None), place[1]), (slice(None), slice(None), place[2])):
        for value in (False, True):
            plane = np.full(shape, not value)
            plane[where] = value
            yield plane


@pytest.mark.parametrize("name", CLASSICAL)
@pytest.mark.parametrize("shape", [(8, 1, 1), (8, 1, 3), (5, 9, 7), (6, 1, 200), (32, 9, 10), (1, 20, 30)])
def test_flat_planes_are_never_refused(name, shape):
    bits, rows, cols = shape
    for plane in flat(shape, 0):
        session = CLASSICAL[name](*shape)
        ((coding, payload),) = session.encode(signs(plane))
        Header(cols, rows, bytes(8), "w", 1, bits, (Entry.of(payload, coding, 2 if coding else 1),))
        np.testing.assert_array_equal(CLASSICAL[name](*shape).decode([(coding, payload)]) > 0, plane)
        if coding not in (RAW, HUFFMAN):
            words = payload[bits:] if coding == STATIC else payload
            assert len(words) >= 4


def certain(kind, yes):
    """A context model that gives every bit of the value `yes` the largest probability, 65514 / 65536."""
    if kind == "grouped":
        made = model(groups=4, gain=0)
        with torch.no_grad():
            made.grouped.odds.fill_(8 if yes else -8)
        return made.quantize()
    made = context_model(kind)
    with torch.no_grad():
        for layer in made.layers().values():
            for parameter in layer.parameters():
                parameter.zero_()
        bias = made.predictor(0).output.bias
        assert bias is not None
        bias.fill_(8 if yes else -8)
    return made


@pytest.mark.parametrize("kind", ["sequential", "parallel", "grouped"])
@pytest.mark.parametrize("yes", [False, True])
def test_certain_models_reach_the_least_length_and_are_not_refused(kind, yes):
    """65514 / 65536 for every bit: 8 bits at 4096 locations carry 15.9 bits of information."""
    shape = 8, 64, 64
    questions = asked(groups=4) if kind == "grouped" else None

    def new():
        return ContextSession(certain(kind, yes), *shape, questions)

    plane = np.full(shape, 2 * yes - 1, np.int8)
    ((coding, payload),) = new().encode(plane)
    assert (coding, len(payload)) == (CONTEXT, 4)
    assert least_bytes(CONTEXT, 64 * 64, 8) == 2
    Header(64, 64, bytes(8), "w", 1, 8, (Entry.of(payload, coding, 2),), b"contexts")
    np.testing.assert_array_equal(new().decode([(coding, payload)]), plane)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_certain_models_with_maps_are_not_refused(parts, share):
    """Few stop, or nearly all; the bits cost nothing."""
    shape, rng = (8, 40, 50), np.random.default_rng(0)
    exact, questions = certain("grouped", True), asked(groups=4)
    encoder = PartsSession(exact, *shape, questions, parts, True)
    decoder = PartsSession(exact, *shape, questions, parts, True)
    living, entries = np.ones(shape[1:], bool), []
    for _ in range(4):
        plane = np.ones(shape, np.int8) * living
        pieces = encoder.encode(plane)
        np.testing.assert_array_equal(decoder.decode(pieces), plane)
        entries += [Entry.of(payload, coding, 3) for coding, payload in pieces]
        living = living & (rng.random(living.shape) >= share)
        living[0, 0] = True
    assert {entry.coding for entry in entries[:parts]} == {CONTEXT}
    Header(50, 40, bytes(8), "w", 1, 8, tuple(entries), b"contexts", parts, True)


def test_codes_hold_what_their_words_can():
    """Bits of any probabilities, likely and unlikely ones: the reference needs at most one word that is not there."""
    rng = np.random.default_rng(1)
    for trial in range(300):
        count = int(rng.integers(1, 400))
        k = rng.choice([[1, 65535], [22, 65514], [32768, 32769], [1, 32768]][trial % 4], count)
        likely = k > 32768
        bits = [likely, ~likely, rng.random(count) < 0.5][trial % 3]
        coder = RangeEncoder()
        coder.write(k, bits)
        payload = coder.finish()
        reader, decoder = RangeReader(payload), RangeDecoder(payload)
        assert [reader.read(int(each)) for each in k] == bits.tolist()  # and no second word that is not there
        np.testing.assert_array_equal(decoder.read(k), bits)
        decoder.finish()
        information = sum(24 - math.log2(chances(int(each))[int(bit)]) for each, bit in zip(k, bits, strict=True))
        assert information <= 8 * len(payload)


@pytest.mark.parametrize(("words", "fits"), [(1, 31), (100, 3190)])
def test_a_word_holds_no_more_than_32_even_bits(words, fits):
    """The decoder notices it at the end of a piece or a code, the reference at the second word that is not there."""
    payload = b"\x55" * 4 * words
    reader, decoder = RangeReader(payload), RangeDecoder(payload)
    expected = [reader.read(32768) for _ in range(fits)]
    np.testing.assert_array_equal(decoder.read(np.full(fits, 32768)), expected)
    decoder.read(np.full(RangeDecoder.PIECE - fits - 1, 32768))
    with pytest.raises(FormatError, match="too short for what it says"):
        decoder.read(np.full(1, 32768))
    with pytest.raises(AssertionError):
        [reader.read(32768) for _ in range(64)]


# What hostile files cost

# The most memory of a process in KiB. What `resource` gives begins with that of the process which has started it.
MOST = """
def most():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""

WORKER = (
    MOST
    + """
import json, os, sys, time, warnings
import torch
from rnncodec.codec import Codec
from rnncodec.weights import load_weights
warnings.simplefilter("ignore")
torch.set_num_threads(1)
codec = Codec(load_weights(sys.argv[1]))
codec.decode(open(sys.argv[2], "rb").read())
start = most()
for path in sys.argv[2:]:
    data, begun = open(path, "rb").read(), time.process_time()
    try:
        found = list(codec.decode(data).size)
    except Exception as error:
        found = type(error).__name__ + ": " + str(error)
    peak = most() - start
    print(json.dumps([found, time.process_time() - begun, peak / 1024]), flush=True)
"""
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", "parallel")


@pytest.fixture(scope="module")
def codec(weights):
    return Codec(load_weights(weights))


def file(codec, rows, cols, coding, payloads):
    """A file of version 2, made by hand."""
    raw = rows * cols
    width = math.ceil(raw.bit_length() / 8)
    context = codec.context_fingerprint if coding == CONTEXT else bytes(8)
    head = fixed(min(65535, cols * 16), min(65535, rows * 16), 16, 8, b"w", 2, context)
    head = head.replace(bytes.fromhex("0123456789ABCDEF"), codec.fingerprint) + bytes([len(payloads)])
    for payload in payloads:
        head += bytes([coding]) + len(payload).to_bytes(width, "big") + zlib.crc32(payload).to_bytes(4, "big")
    return forge(head, b"".join(payloads))


def relatives(codec, count, seed):
    """Files of up to 268 megapixels and 3,000 bytes: a third have payloads that are too short by the header."""
    rng = np.random.default_rng(seed)
    for trial in range(count):
        cols = int(2 ** rng.uniform(6, 12))
        rows = int(2 ** rng.uniform(6, 20 - math.log2(cols)))
        coding = int(rng.choice([CONTEXT, CONTEXT, ADAPTIVE, STATIC, HUFFMAN]))
        least = least_bytes(coding, rows * cols, 8)
        if coding == STATIC:
            least = 8 + 4 * math.ceil((least - 8) / 4)
        elif coding != HUFFMAN:
            least = 4 * math.ceil(least / 4)
        if trial % 3 == 0:
            least = max(4, int(least * rng.uniform(0, 0.8)))
        elif coding == HUFFMAN or (coding == STATIC and least > 3000):
            least, coding = 4 * math.ceil(least_bytes(CONTEXT, rows * cols, 8) / 4), CONTEXT
        payloads = []
        for _ in range(int(rng.integers(1, 17))):
            body = bytearray(rng.bytes(least))
            if coding == STATIC:
                body[:8] = bytes(rng.integers(1, 256, 8).tolist())
            elif coding == HUFFMAN:
                body[:8] = bytes(7) + b"\1"
            payloads.append(bytes(body))
        yield file(codec, rows, cols, coding, payloads)


def costs(weights, honest, hostile, folder):
    """What decoding gives, CPU seconds, and the largest memory so far above that of the first file in MiB."""
    paths = []
    for number, data in enumerate([honest, *hostile]):
        paths.append(folder / f"{number}.rnc")
        paths[-1].write_bytes(data)
    script = [sys.executable, "-c", WORKER, str(weights), *map(str, paths)]
    lines = subprocess.run(script, capture_output=True, text=True, check=True, timeout=1200).stdout.splitlines()
    assert len(lines) == len(paths)
    return [json.loads(line) for line in lines]


def check_costs(codec, weights, folder, count, seed):
    honest = codec.encode(picture(400, 600), 16)  # a file of some size, which decodes in a second
    hostile = [
        file(codec, 256, 256, CONTEXT, [bytes(4)]),
        file(codec, 256, 4096, CONTEXT, [bytes(4)] * 16),
        file(codec, 256, 4096, ADAPTIVE, [b"\xff" * 12] * 16),
        file(codec, 256, 4096, HUFFMAN, [bytes(7) + b"\1\0"] * 16),
        *relatives(codec, count, seed),
    ]
    first, *found = costs(weights, honest, hostile, folder)
    assert first[0] == [600, 400]
    for outcome, seconds, peak in found:
        assert isinstance(outcome, str)
        assert outcome.startswith("FormatError: ")
        assert outcome.isprintable()
        assert seconds < max(1.0, first[1])
        assert peak < 100
    reasons = {outcome.split(":")[1].split(" takes")[0].split(" 1")[0] for outcome, *_ in found}
    assert {" iteration", " an entropy-coded payload is too short for what it says"} <= reasons


def test_hostile_files_cost_little(codec, weights, tmp_path):
    check_costs(codec, weights, tmp_path, 24, 1)


@pytest.mark.slow
def test_a_thousand_hostile_files_cost_little(codec, weights, tmp_path):
    check_costs(codec, weights, tmp_path, 1000, 2)


def announced(codec, rows, cols, payload):
    """A file of one iteration, which is as large as its header says only if its payload says nothing."""
    size = min(65535, rows * 16), min(65535, cols * 16)
    header = codec.header(*size, [Entry.of(payload, CONTEXT, 2)], b"", parts=1, maps=False)
    return format.write(format.Container(header, (payload,)))


def test_large_bands_of_the_shipped_weights_cost_little(tmp_path):
    """33 and 268 megapixels in the fewest bytes that their headers allow, at random."""
    shipped, rng = rnncodec.load("small"), np.random.default_rng(0)
    hostile = [announced(shipped, 256, 512, rng.bytes(256)), announced(shipped, 256, 4096, rng.bytes(2032))]
    first, *found = costs(PRETRAINED / "small.safetensors", shipped.encode(picture(64, 64), 2), hostile, tmp_path)
    for outcome, seconds, peak in found:
        assert outcome.startswith("FormatError: an entropy-coded payload is")
        assert seconds < max(1.0, first[1])
        assert peak < 100


GROUPED = (
    MOST
    + """
import sys, time
import numpy as np
import torch
from rnncodec.entropy import ContextConfig, ContextModel, new_session
from rnncodec.files.errors import FormatError
from rnncodec.network import Questions
torch.set_num_threads(1)
bits, groups, channels = 64, 16, 384  # as in configs/latent.yaml
torch.manual_seed(0)
model = ContextModel(ContextConfig("grouped", bits, 64, 2, groups)).quantize()
questions = Questions(channels, 2, bits, groups)
for group in range(groups):
    questions.channel[0, group] = torch.randperm(channels)[: bits // groups]
rng = np.random.default_rng(0)
start = None
for rows, cols, size in ((16, 16, 2048), (256, 512, 512), (256, 4096, 4064)):
    begun = time.process_time()
    try:
        new_session("context", (bits, rows, cols), model, questions).decode([(1, rng.bytes(size))])
    except FormatError:
        pass
    peak = most()
    start = start or peak
    print((peak - start) / 1024, time.process_time() - begun, flush=True)
"""
)


@pytest.mark.slow
def test_large_bands_of_latent_networks_cost_little():
    found = subprocess.run([sys.executable, "-c", GROUPED], capture_output=True, text=True, check=True).stdout.split()
    for peak, seconds in zip(found[2::2], found[3::2], strict=True):
        assert float(peak) < 100
        assert float(seconds) < 1


def test_short_payloads_are_refused_before_weights_are_loaded(codec, tmp_path, capsys, monkeypatch):
    path, target = tmp_path / "a.rnc", tmp_path / "a.png"
    path.write_bytes(file(codec, 256, 256, CONTEXT, [bytes(4)]))
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # nothing is built
    cut = tmp_path / "b.rnc"
    for command in (["decode", str(path), str(target)], ["info", str(path)], ["truncate", str(path), str(cut)]):
        assert cli.main(command) == 1
        assert "iteration 1 takes 4 bytes, not 32 to 65536" in capsys.readouterr().err
    assert not target.exists()
    assert not cut.exists()


def test_the_python_interface_takes_the_same_path(codec):
    data = file(codec, 64, 64, CONTEXT, [bytes(8)] * 2)
    for call in (codec.decode, codec.decode_tensor, codec.read_bits, lambda data: list(codec.decode_progressive(data))):
        with pytest.raises(FormatError, match="too short for what it says"):
            call(data)
        with pytest.raises(FormatError, match="takes 1 bytes, not 2 to 4096"):
            call(file(codec, 64, 64, CONTEXT, [bytes(1)] * 2))


def test_an_iteration_that_is_too_short_leaves_those_before(codec):
    """It is refused only when it is decoded; the header allows its length."""
    header = format.read_header(codec.encode(picture(300, 300), 2))
    container = format.read(codec.encode(picture(300, 300), 2), max_pixels=10**6)
    payloads = container.payloads[0], b"\x55" * 4
    entries = container.header.entries[0], Entry.of(payloads[1], CONTEXT, 2)
    data = format.write(format.Container(replace(header, entries=entries), payloads))
    np.testing.assert_array_equal(np.asarray(codec.decode(data, 1)), np.asarray(codec.decode(data[: len(data) - 4], 1)))
    shown = codec.decode_progressive(data)
    next(shown)
    with pytest.raises(FormatError, match="too short"):
        next(shown)


def test_checksums_of_these_files_are_right(codec):
    data = file(codec, 64, 64, CONTEXT, [bytes(8)])
    assert crc(data[:-12]) == data[-12:-8]
    assert format.read(data, max_pixels=10**7).payloads == (bytes(8),)
