"""Tests of files whose locations stop, by a small latent network: decoded by FORMAT.md alone, cut, damaged, hostile."""

import copy
import time
import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import GroupedReference, PartsReference, damaged_files, parts_file
from test_latent import TINY, images, started

from rnncodec.allocation import QUALITIES, Allocation
from rnncodec.codec import Codec
from rnncodec.entropy import ContextConfig, ContextModel, PartsSession
from rnncodec.evaluation import measure
from rnncodec.files import format
from rnncodec.files.format import CONTEXT, RAW, Container, Entry, FormatError
from rnncodec.files.images import load_image
from rnncodec.network import to_uint8
from rnncodec.targets import Allocator
from rnncodec.training.context import start_context
from rnncodec.weights import WeightsError, load_weights, save_weights

HEIGHT, WIDTH = 100, 140
ROWS, COLS = 7, 9
ITERATIONS = 4


@pytest.fixture(scope="module")
def codec(photos, tmp_path_factory):
    network = started(photos, TINY).eval()
    context = ContextModel(ContextConfig(kind="grouped", bits=16, groups=4, channels=8, iterations=4))
    start_context(context, network)
    torch.manual_seed(0)
    with torch.no_grad():
        context.grouped.output.map.normal_(std=0.05)
    path = tmp_path_factory.mktemp("weights") / "latent.safetensors"
    save_weights(path, network, "latent", context=context.quantize())
    return Codec(load_weights(path))


@pytest.fixture(scope="module")
def steps(codec, photos):
    """The steps of an encoder that stops at most locations before the last iteration."""
    last = np.random.default_rng(0).integers(1, ITERATIONS + 1, (ROWS, COLS))
    last[2:4, 3:6] = ITERATIONS
    with torch.inference_mode():
        y = codec.network.analyse(images(photos)[5:6, :, :112].repeat(1, 1, 1, 2)[..., :144])
        return list(codec.network.unroll(y, ITERATIONS, 4 * torch.from_numpy(last)[None]))


def session(codec, parts, maps=True):
    return PartsSession(codec.context, 16, ROWS, COLS, codec.network.binarizer.questions, parts, maps)


@pytest.fixture(scope="module", params=[1, 4])
def data(request, codec, steps):
    planes = [step.bits[0].to(torch.int8).numpy() for step in steps]
    return codec.write_bits(planes, HEIGHT, WIDTH, session(codec, request.param))


def outcome(decode):
    """What a decoder gives, or its error of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that were cut
            return np.asarray(decode())
    except (FormatError, WeightsError) as error:
        return str(error)


def prefixes(data):
    """The file as it is after each payload."""
    return [format.truncate(data, max_bytes=size) for size in format.read_header(data).sizes]


def test_files_are_the_documented_ones(codec, steps, data):
    """The reference reads headers, maps and bits, also of a file that lacks parts of its last iteration."""
    questions, parts = codec.network.binarizer.questions, parts_file(data)[0]["parts"]
    cost = questions.cost.numpy().reshape(4, 4, 4, 75, 2)
    model = GroupedReference(codec.context, 24, questions.channel.numpy(), cost, questions.edges.numpy())
    for kept, file in enumerate(prefixes(data), 1):
        if kept not in (1, 3 * parts + 1, 4 * parts):
            continue
        fields, payloads = parts_file(file)
        assert fields == {
            "width": WIDTH,
            "height": HEIGHT,
            "fingerprint": codec.fingerprint,
            "context": codec.context_fingerprint,
            "stride": 16,
            "bits": 16,
            "name": "latent",
            "coding": 1,
            "parts": parts,
            "flags": 1,
        }
        assert len(payloads) == kept
        plain = PartsReference(model, ROWS, COLS, ROWS, parts, True)
        found = [plain.decode(payloads[t : t + parts]) for t in range(0, kept, parts)]
        np.testing.assert_array_equal(codec.read_bits(file), found)
        for t, plane in enumerate(found):
            sent = 16 // parts * (min(kept, (t + 1) * parts) - t * parts)
            np.testing.assert_array_equal(plane[:sent], steps[t].bits[0, :sent].numpy())
            assert not plane[sent:].any()


def test_every_iteration_gives_the_picture_of_the_encoder(codec, steps, data):
    shown = list(codec.decode_progressive(data))
    assert len(shown) == ITERATIONS
    for t, (step, picture) in enumerate(zip(steps, shown, strict=True), 1):
        with torch.inference_mode():
            expected = to_uint8(codec.network.picture(step.state))[0].permute(1, 2, 0)[:HEIGHT, :WIDTH]
        np.testing.assert_array_equal(picture, expected.numpy())
        np.testing.assert_array_equal(np.asarray(codec.decode(data, t)), picture)
        np.testing.assert_array_equal(np.asarray(codec.decode(format.truncate(data, iterations=t))), picture)


def test_every_part_gives_the_picture_of_a_file_that_ends_with_it(codec, data):
    sizes = format.read_header(data).sizes
    for count in (1, len(sizes) // 2 + 1, len(sizes)):
        shown = list(codec.decode_progressive(format.truncate(data, max_bytes=sizes[count - 1]), parts=True))
        assert len(shown) == count
        for size, picture in zip(sizes, shown, strict=False):
            np.testing.assert_array_equal(np.asarray(codec.decode(format.truncate(data, max_bytes=size))), picture)


def test_a_shorter_file_is_that_of_fewer_payloads(codec, steps, data):
    planes = [step.bits[0].to(torch.int8).numpy() for step in steps]
    parts = format.read_header(data).parts
    for t in range(1, ITERATIONS + 1):
        assert format.truncate(data, iterations=t) == codec.write_bits(planes[:t], HEIGHT, WIDTH, session(codec, parts))


def test_measurements_are_of_whole_iterations(codec, photos):
    """Images of 512 locations and more have several payloads for each of them."""
    x = load_image(photos / "coffee.png")[:352, :400]
    data = codec.encode(x, 3)
    parts = format.read_header(data).parts
    assert parts > 1
    coded = list(measure.ours(codec, 3).run(x, (1, 2, 3)))
    expected = [len(format.truncate(data, iterations=t)) for t in (1, 2, 3)]
    assert [each.size for each in coded] == expected
    for each, picture in zip(coded, codec.decode_progressive(data), strict=True):
        np.testing.assert_array_equal(each.x_hat, picture)
        assert 0 < each.size - each.ideal_bytes < 100 + 15 * each.setting * parts  # header, entries, ends of codes
    sizes = measure.coded_sizes({"context": (codec, "context")}, codec.read_bits(data), 352, 400)
    assert sizes == {"context": expected}


def test_damaged_files_give_an_error_or_the_right_prefix(codec, data):
    whole = [np.asarray(codec.decode(file)) for file in prefixes(data)]
    assert len({image.tobytes() for image in whole}) == len(whole)
    found = []
    for damaged in damaged_files(data):
        image = outcome(lambda damaged=damaged: codec.decode(damaged))
        assert not isinstance(image, str) or image.isprintable()
        found.append(-1 if isinstance(image, str) else [np.array_equal(image, each) for each in whole].index(True))
    assert found[::2] == [-1] * 100
    assert sum(count >= 0 for count in found) > 20
    assert len(set(found)) > len(whole) // 2


def test_damage_is_met_by_the_prefix_before_it(codec, data):
    """A changed byte of a payload is found by its CRC-16; the iterations before it can still be decoded."""
    header, rng = format.read_header(data), np.random.default_rng(3)
    pictures = [np.asarray(codec.decode(data, t)) for t in range(1, ITERATIONS + 1)]
    for place in rng.integers(header.size, len(data), 40):
        changed = bytearray(data)
        changed[place] ^= int(rng.integers(1, 256))
        number = int(
            np.searchsorted(np.cumsum([entry.length for entry in header.entries]), place - header.size, "right")
        )
        assert outcome(lambda data=bytes(changed): codec.decode(data)) == f"{header.place(number)} is corrupt"
        if whole := number // header.parts:
            np.testing.assert_array_equal(np.asarray(codec.decode(bytes(changed), whole)), pictures[whole - 1])


def forged(data, start, pieces):
    """A file with other payloads from the iteration `start` on, with right checksums."""
    file = format.read(data, max_pixels=10**6)
    kept = start * file.header.parts
    entries = [*file.header.entries[:kept], *(Entry.of(payload, coding, 3) for coding, payload in pieces)]
    payloads = [*file.payloads[:kept], *(payload for _, payload in pieces)]
    return format.write(Container(replace(file.header, entries=tuple(entries)), tuple(payloads)))


def random_payloads(data, rng):
    """A file whose later payloads are random bytes."""
    header, start = format.read_header(data), int(rng.integers(1, ITERATIONS))
    pieces = []
    for _ in range((ITERATIONS - start) * header.parts):
        words = rng.bytes(4 * int(rng.integers(3, header.raw_length // 4 + 1)))  # room for 63 raw flags and 16 bits
        pieces.append([(CONTEXT, words), (CONTEXT, bytes(len(words))), (RAW, words)][rng.choice(3, p=[0.7, 0.1, 0.2])])
    return forged(data, start, pieces)


def random_maps(data, rng):
    """A file whose later payloads have random levels, random flags and as many random bits as these ask for."""
    parts, living, pieces = format.read_header(data).parts, ROWS * COLS, []
    for _ in range(1, ITERATIONS):
        flags = rng.random(living) < rng.choice([0.05, 0.5, 0.95])
        flags[rng.integers(living)] = True
        living = int(flags.sum())
        for part in range(parts):
            bits = rng.random(16 // parts * living) < 0.5
            pieces.append(
                (RAW, np.packbits(np.concatenate([rng.random(4) < 0.5, flags, bits]) if part == 0 else bits).tobytes())
            )
    return forged(data, 1, pieces)


def measured(codec, files):
    """How each file ends, the seconds of all, and the most memory that one of them takes."""
    found, peak = [], 0
    tracemalloc.start()
    start = time.perf_counter()
    for file in files:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        found.append(outcome(lambda file=file: codec.decode(file)))
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    seconds = time.perf_counter() - start
    tracemalloc.stop()
    return found, seconds, peak


def test_hostile_maps_are_an_error_or_some_image_and_take_no_longer(codec, data):
    rng = np.random.default_rng(5)
    honest, seconds, peak = measured(codec, [data] * 10)
    assert not any(isinstance(image, str) for image in honest)
    for make in (random_payloads, random_maps):
        found, longest, most = measured(codec, [make(data, rng) for _ in range(40)])
        for image in found:
            assert image.isprintable() if isinstance(image, str) else image.shape == (HEIGHT, WIDTH, 3)
        errors = sum(isinstance(image, str) for image in found)
        assert errors == 0 if make == random_maps else errors > 30
        assert longest < 3 * 4 * seconds
        assert most < 2 * peak


def test_records_beside_parts_and_maps(codec, photos):
    """They change neither the payloads nor the picture, and all targets count their bytes."""
    x = load_image(photos / "coffee.png")[:352, :400]
    records = {"EXIF": np.random.default_rng(6).bytes(1000), "XMP ": b"<x/>"}
    for picture in (x, x[:100, :100]):  # in several parts, and in one
        plain, data = codec.encode(picture, 2), codec.encode(picture, 2, records=records)
        fields, payloads = parts_file(data)
        assert fields["records"] == records
        assert tuple(payload for _, payload in payloads) == format.read(plain, max_pixels=10**6).payloads
        assert format.truncate(data, strip=True) == plain
        assert format.truncate(data, iterations=1) == codec.encode(picture, 1, records=records)
        np.testing.assert_array_equal(np.asarray(codec.decode(data)), np.asarray(codec.decode(plain)))
    chooser = copy.copy(codec)
    allocation = Allocation((1.0,) * codec.config.latents, {"ms-ssim": (0.1,) * len(QUALITIES)})
    chooser.allocator = Allocator(codec.loop, codec.context, allocation)
    target = len(codec.encode(x, 2, records=records))
    data = chooser.encode(x, max_bytes=target, records=records)
    assert 0.9 * target < len(data) <= target
    assert format.read_header(data).maps
    assert format.read_records(data) == records
    for options in ({"quality": 50}, {"psnr": 18}):
        data = chooser.encode(x, records=records, **options)
        assert format.truncate(data, strip=True) == chooser.encode(x, **options)
