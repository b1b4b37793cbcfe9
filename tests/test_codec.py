"""Tests of the codec: agreement of encoder and decoder, image sizes, tiles, targets, and faulty files."""

import dataclasses
import io
import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from rnncodec import tiling
from rnncodec.codec import Codec
from rnncodec.files import format
from rnncodec.files.fields import unpack_bits
from rnncodec.files.format import Container, Entry, FormatError
from rnncodec.loop import Loop, exact
from rnncodec.network import CELLS, NetworkConfig, RecurrentCodec, to_uint8
from rnncodec.tiling import activation_bytes, receptive_field
from rnncodec.weights import Weights, WeightsError, load_weights, save_weights

CONFIG = NetworkConfig(bits=4, encoder_channels=(4, 6, 6, 8), decoder_channels=(12, 12, 12, 8, 8))
CONFIGS = {
    "additive": CONFIG,
    "one_shot_gru": dataclasses.replace(CONFIG, encoder_cell="gru", decoder_cell="gru", reconstruction="one_shot"),
    "residual_scaling": dataclasses.replace(CONFIG, reconstruction="residual_scaling", gain_channels=(2, 2, 2, 2)),
    "associative": dataclasses.replace(CONFIG, decoder_cell="associative_lstm", reconstruction="one_shot"),
    "patches": NetworkConfig("lstm", "lstm", "additive", "sign", 5, (8, 8), (1,), (8, 8), (1,), patch_size=8),
}
for cell in CELLS:  # those that are in none of the above
    if not any(cell in (config.encoder_cell, config.decoder_cell) for config in CONFIGS.values()):
        CONFIGS[cell] = dataclasses.replace(CONFIG, encoder_cell=cell, decoder_cell=cell)
SIZES = [(1, 1), (1, 500), (17, 33), (49, 67)]


def make_network(config):
    torch.manual_seed(1)
    network = RecurrentCodec(config)
    gain, std = (4, 1) if config.decoder_cell == "associative_lstm" else (1.5, 0.3)
    with torch.no_grad():  # strong enough for reconstructions that fill the range of pixels
        for parameter in network.decoder.parameters():
            parameter *= gain
        network.decoder.output.weight.normal_(std=std)
        network.binarizer.features.weight *= 5
    return network


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    made = {}
    for name, config in CONFIGS.items():
        save_weights(folder / f"{name}.safetensors", make_network(config), name, {})
        made[name] = Codec(load_weights(folder / f"{name}.safetensors"))
    return made


@pytest.fixture(scope="module")
def codec(codecs):
    return codecs["additive"]


@pytest.fixture(scope="module")
def data(codec):
    return codec.encode(noise(40, 50))


def noise(height, width, seed=0):
    """A smooth random image with fine noise on it, uint8 [H, W, 3]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(y / 7 + k) * np.cos(x / (5 + k)) for k in range(3)]
    return np.clip(np.stack(waves, -1) + generator.normal(0, 15, (height, width, 3)), 0, 255).astype(np.uint8)


def unroll(codec, image, iterations):
    """Bits and cropped 8-bit reconstructions of the network itself, on an image padded by NumPy."""
    height, width = image.shape[:2]
    stride = codec.config.stride
    padded = np.pad(image, ((0, -height % stride), (0, -width % stride), (0, 0)), mode="edge")
    x = 2 * torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255 - 1
    with torch.no_grad():
        steps = list(codec.network.unroll(x.contiguous(memory_format=torch.channels_last), iterations))
    pixels = [((s.state.y_hat.clamp(-1, 1) + 1) * 127.5).round().byte()[0, :, :height, :width] for s in steps]
    return [s.bits[0] for s in steps], pixels


def tensor_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def psnr_of(image, decoded):
    error = np.mean((image.astype(np.float64) - np.asarray(decoded).astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / error)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_decoder_and_network_agree(codecs, name, size):
    codec = codecs[name]
    image = noise(*size)
    bits, pixels = unroll(codec, image, 16)
    assert pixels[-1].float().std() > 5 or size == (1, 1), "a flat reconstruction would prove little"
    data = codec.encode(image)
    rows, columns = bits[0].shape[1:]
    for t, payload in enumerate(format.read(data, max_pixels=10**6).payloads):
        unpacked = torch.from_numpy(unpack_bits(payload, codec.config.bits, rows, columns).copy())
        assert torch.equal(unpacked, bits[t] == 1)
    for t in (1, 2, 7, 16):
        decoded = codec.decode(data, iterations=t)
        assert torch.equal(tensor_of(decoded), pixels[t - 1])
        prefix = codec.encode(image, t)
        assert prefix == format.truncate(data, iterations=t)
        assert torch.equal(tensor_of(codec.decode(prefix)), pixels[t - 1])


@pytest.mark.parametrize("size", SIZES)
def test_file_size(codec, size):
    data = codec.encode(noise(*size), 3)
    locations = math.ceil(size[0] / 16) * math.ceil(size[1] / 16)
    assert len(data) == format.read_header(data).size + 3 * math.ceil(4 * locations / 8)


def test_kinds_of_images(codec):
    array = noise(20, 30)
    expected = codec.encode(array, 2)
    assert codec.encode(Image.fromarray(array), 2) == expected
    assert codec.encode(torch.from_numpy(array).permute(2, 0, 1) / 255, 2) == expected
    array.flags.writeable = False
    assert codec.encode(array, 2) == expected
    assert codec.encode(array[:, ::-1][:, ::-1], 2) == expected
    gray = Image.fromarray(array[..., 0])
    assert codec.encode(gray, 2) == codec.encode(np.repeat(array[..., :1], 3, axis=2), 2)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 65536, 3), np.uint8),
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.full((3, 4, 4), 1.5),
        torch.full((3, 4, 4), math.nan),
    ],
)
def test_wrong_images(codec, image):
    with pytest.raises(ValueError, match=r"image|width"):
        codec.encode(image, 1)


def test_bpp(codec):
    image = noise(40, 50)
    sizes = [len(codec.encode(image, t)) for t in range(1, 17)]
    for t, size in enumerate(sizes, 1):
        rate = 8 * size / (40 * 50)
        assert len(codec.encode(image, bpp=rate)) == size
        if t > 1:
            assert len(codec.encode(image, bpp=rate * (1 - 1e-9))) == sizes[t - 2]
    assert len(codec.encode(image, bpp=1000)) == sizes[-1]
    with pytest.raises(ValueError, match=f"iteration 1 takes {sizes[0]} bytes, more than"):
        codec.encode(image, bpp=8 * sizes[0] / 2000 * 0.999)


@pytest.mark.parametrize("tile", [None, 64])
def test_psnr(codecs, tile):
    codec = Codec(Weights(codecs["additive"].network, "additive", bytes(8), {}), tile=tile)
    image = noise(33, 90)
    data = codec.encode(image)
    reached = [psnr_of(image, codec.decode(data, t)) for t in range(1, 17)]
    best = int(np.argmax(reached))
    for target in (min(reached), sum(reached) / 16, reached[best]):
        fewest = next(t for t, value in enumerate(reached, 1) if value >= target - 1e-9)
        assert codec.encode(image, psnr=target - 1e-9) == format.truncate(data, iterations=fewest)
    with pytest.warns(UserWarning, match=f"out of reach, 16 iterations reach {reached[best]:.2f} dB"):
        assert codec.encode(image, psnr=reached[best] + 0.01) == data


@pytest.mark.parametrize(
    "target",
    [
        {"iterations": 0},
        {"iterations": 17},
        {"bpp": 0},
        {"bpp": -1.0},
        {"bpp": math.nan},
        {"psnr": 0},
        {"psnr": math.inf},
        {"psnr": math.nan},
        {"iterations": 1, "bpp": 1.0},
        {"bpp": 1.0, "psnr": 20.0},
    ],
)
def test_wrong_targets(codec, target):
    with pytest.raises(ValueError, match=r"iterations|bpp|psnr"):
        codec.encode(noise(4, 4), **target)


@pytest.mark.parametrize("name", CONFIGS)
def test_halo_is_the_receptive_field(codecs, name):
    """Bits beyond the halo of a block do not change its pixels, but some bits within it do."""
    codec = codecs[name]
    stride = codec.config.stride
    halo, block = receptive_field(codec.config)
    around, core = halo // stride, block // stride
    side = 2 * around + core + 4
    generator = np.random.default_rng(0)
    planes = generator.random((16, 1, codec.config.bits, core, side)) < 0.5
    inner = slice(side // 2 // core * core, side // 2 // core * core + core)

    def pixels(planes):
        *_, (_, _, x_hat) = codec.loop.decode(planes, len(planes), core * stride, side * stride, None)
        return x_hat[..., inner.start * stride : inner.stop * stride]

    expected = pixels(planes)
    beyond = planes.copy()
    beyond[..., : max(0, inner.start - around)] ^= True
    beyond[..., inner.stop + around :] ^= True
    assert not np.array_equal(beyond, planes)
    assert torch.allclose(pixels(beyond), expected, atol=1e-6, rtol=0)
    within = planes ^ True
    within[..., inner] = planes[..., inner]
    assert torch.equal(pixels(within), expected) == (halo == 0)


def test_halo_by_hand():
    # 3x3 kernels at 16, 8, 4, 2 px reach 30 px; the hidden 3x3 kernel at 4 px reaches 4 px in each of 15 iterations.
    assert receptive_field(NetworkConfig()) == (96, 16)
    # The reset gate of a GRU doubles the 60 px: 150, in whole blocks.
    assert receptive_field(NetworkConfig(decoder_cell="gru")) == (160, 16)
    # Without state there are no earlier iterations.
    assert receptive_field(NetworkConfig(decoder_cell="none")) == (32, 16)
    # The gain network adds a block of 32 px in each of 15 iterations: 510, in whole blocks.
    assert receptive_field(NetworkConfig(reconstruction="residual_scaling")) == (512, 32)
    assert receptive_field(CONFIGS["patches"]) == (0, 8)


@pytest.mark.parametrize(
    ("name", "size", "tile"),
    [
        ("additive", (77, 453), 128),
        ("patches", (33, 97), 16),
        ("residual_scaling", (16, 1101), 256),
        *((name, (33, 453), 96) for name in CONFIGS if name not in ("additive", "patches", "residual_scaling")),
    ],
)
def test_tiles_leave_no_seams(codecs, name, size, tile):
    whole = codecs[name]
    tiled = Codec(Weights(whole.network, name, whole.fingerprint, {}), tile=tile)
    image = noise(*size)
    tiles = tiled.loop.tiles(*size)
    assert len(tiles) > 3
    assert any(t.area[1].stop - t.area[1].start < max(size) // whole.config.stride for t in tiles)
    data = whole.encode(image)
    difference = np.abs(np.asarray(tiled.decode(data)).astype(int) - np.asarray(whole.decode(data)))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3
    coded_in_tiles = tiled.encode(image)
    assert len(coded_in_tiles) == len(data)
    # The choice of bits near borders may differ; the error of the reconstruction must not be larger there.
    error = np.abs(np.asarray(whole.decode(coded_in_tiles)).astype(int) - image).mean((0, 2))
    at_borders = np.concatenate([error[x - 4 : x + 4] for x in range(tile, size[1] - 4, tile)]).mean()
    assert at_borders <= 1.25 * error.mean()


def test_tiles_do_not_depend_on_iterations(codecs):
    whole = codecs["additive"]
    codec = Codec(Weights(whole.network, "additive", whole.fingerprint, {}), tile=32)
    data = codec.encode(noise(77, 131))
    for t in (1, 3, 15):
        assert codec.decode(format.truncate(data, iterations=t)).tobytes() == codec.decode(data, t).tobytes()


@pytest.mark.parametrize("config", [NetworkConfig(), *CONFIGS.values()])
def test_tiles_cover_the_image_within_memory(config):
    with torch.device("meta"):
        network = RecurrentCodec(config)
    loop = Loop(network)
    halo, block = receptive_field(config)
    for height, width in ((1, 1), (400, 600), (5000, 7001), (1, 65535)):
        tiles = loop.tiles(height, width)
        rows, columns = loop.grid(height, width)
        covered = np.zeros((rows, columns), int)
        for tile in tiles:
            covered[tile.core] += 1
            pixels = math.prod(s.stop - s.start for s in tile.area) * config.stride**2
            smallest = (tiling.MIN_CORE + 2 * halo + 2 * block) ** 2
            assert pixels <= max(1.1 * tiling.MEMORY / activation_bytes(config), smallest)
            for area, core, length in zip(tile.area, tile.core, (rows, columns), strict=True):
                assert area.start == max(0, core.start - halo // config.stride)
                assert area.stop == min(length, core.stop + halo // config.stride)
                assert core.start * config.stride % block == area.start * config.stride % block == 0
        assert (covered == 1).all()
    assert len(loop.tiles(400, 600)) == 1


def test_progress(codec):
    image = noise(70, 70)
    tiled = Codec(Weights(codec.network, "additive", codec.fingerprint, {}), tile=32)

    def reports(call):
        seen = []
        call(lambda done, total: seen.append((done, total)))
        dones, totals = zip(*seen, strict=True)
        assert len(set(totals)) == 1
        assert list(dones) == sorted(set(dones))
        assert dones[-1] == totals[-1]
        return totals[-1]

    assert reports(lambda report: codec.encode(image, 3, progress=report)) == 3
    assert reports(lambda report: tiled.encode(image, 3, progress=report)) == 27
    assert reports(lambda report: codec.encode(image, psnr=1, progress=report)) == 16
    assert reports(lambda report: tiled.encode(image, psnr=1, progress=report)) == 2 * 9 * 16
    data = codec.encode(image, 3)
    assert reports(lambda report: tiled.decode(data, 2, progress=report)) == 18


def test_other_weights(codecs, data):
    other = codecs["associative"]
    with pytest.raises(WeightsError) as error:
        other.decode(data)
    for part in ("'additive'", codecs["additive"].fingerprint.hex(), "'associative'", other.fingerprint.hex()):
        assert part in str(error.value)


@pytest.mark.parametrize("change", [{"stride": 8}, {"bits": 8}, {"iterations": 17}])
def test_headers_that_contradict_the_weights(codec, data, change):
    header = format.read_header(data)
    change = dict(change)
    count = change.pop("iterations", 1)
    locations = math.prod(math.ceil(side / change.get("stride", 16)) for side in (header.width, header.height))
    payloads = (bytes(math.ceil(locations * change.get("bits", 4) / 8)),) * count
    header = dataclasses.replace(header, **change, entries=tuple(map(Entry.of, payloads)))
    with pytest.raises(FormatError, match=r"its weights have|17 iterations"):
        codec.decode(format.write(Container(header, payloads)))


def test_cut_files(codec, data):
    header = format.read_header(data)
    payload = len(data) - header.size
    half = data[: header.size + payload // 2 + 1]
    with pytest.warns(UserWarning, match="decoded 8 of 16 iterations"):
        image = codec.decode(half)
    assert image.tobytes() == codec.decode(data, 8).tobytes()
    assert codec.decode(half, 8).tobytes() == image.tobytes()  # asked for, so no warning
    with pytest.raises(ValueError, match="8 complete iterations, not 9"):
        codec.decode(half, 9)
    with pytest.raises(FormatError, match="no complete iteration"):
        codec.decode(data[: header.size])
    with pytest.raises(ValueError, match=r"1\.\.16"):
        codec.decode(data, 17)


def test_max_pixels(codec, data):
    assert codec.decode(data, 1, max_pixels=2000).size == (50, 40)
    with pytest.raises(FormatError, match="limit of 1999"):
        codec.decode(data, 1, max_pixels=1999)


def test_corrupt_files(codec, data):
    """Every changed, inserted or removed byte raises an error."""
    generator = random.Random(0)
    for _ in range(500):
        broken = bytearray(data)
        position = generator.randrange(len(data))
        match generator.randrange(3):
            case 0:
                broken[position] ^= generator.randrange(1, 256)
            case 1:
                broken.insert(position, data[position] ^ 0x55)
            case 2:
                broken[position : position + generator.randrange(1, 20)] = generator.randbytes(
                    generator.randrange(30, 50)
                )
        with pytest.raises((FormatError, WeightsError)) as error:
            codec.decode(bytes(broken))
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:the file is cut")
def test_truncated_files(codec, data):
    header = format.read_header(data)
    expected = [codec.decode(data, t).tobytes() for t in range(1, 17)]
    generator = random.Random(0)
    for length in sorted(generator.choices(range(len(data)), k=500)):
        complete = sum(end <= length for end in ends(header))
        if complete == 0:
            with pytest.raises(FormatError):
                codec.decode(data[:length])
        else:
            assert codec.decode(data[:length]).tobytes() == expected[complete - 1]


def test_a_file_that_claims_more_than_it_has_allocates_nothing(codec, data):
    """The header is that of the largest image, with the right fingerprint and checksum, but without payloads."""
    small = format.read_header(data)
    entries = (Entry(format.RAW, 4096 * 4096 * small.bits // 8, 0),) * 16
    header = dataclasses.replace(small, width=65535, height=65535, entries=entries)
    forged = format.write_header(header)
    tracemalloc.start()
    with pytest.raises(FormatError):
        codec.decode(forged + bytes(1000), max_pixels=2**32)
    with pytest.raises(FormatError, match="limit"):
        codec.decode(forged + bytes(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_too_long_sides_are_refused_before_any_work(codec):
    started = []
    with pytest.raises(ValueError, match="65535"):
        codec.encode(np.zeros((1, 65536, 3), np.uint8), progress=lambda *steps: started.append(steps))
    assert not started


def test_decode_tensor_is_the_decoded_image(codec, data):
    tensor = codec.decode_tensor(data, 3)
    assert tensor.shape == (3, 40, 50)
    assert np.array_equal((tensor * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(codec.decode(data, 3)))


def ends(header):
    """Where each payload ends in a file."""
    return list(header.size + np.cumsum([iteration.length for iteration in header.entries]))


def batch_of(*images):
    return torch.stack([tensor_of(image) for image in images]) / 255


@pytest.mark.parametrize("name", CONFIGS)
def test_batches_are_files(codecs, name):
    """As CompressAI has it: strings[t][i] is of image i, and the first k strings are its first k iterations."""
    codec = codecs[name]
    images = [noise(20, 35, seed) for seed in range(3)]
    compressed = codec.compress(batch_of(*images), iterations=4)
    strings, shape = compressed["strings"], compressed["shape"]
    assert (len(strings), {len(own) for own in strings}, shape) == (4, {3}, (20, 35))
    for i, image in enumerate(images):
        data = codec.encode(image, 4)
        assert b"".join(own[i] for own in strings) == data
        assert [own[i] for own in strings[1:]] == list(format.read(data, max_pixels=10**6).payloads[1:])
    for count in (1, 3, 4):
        (x_hat,) = codec.decompress(strings[:count], shape).values()
        expected = np.stack([np.asarray(codec.decode(codec.encode(image, count))) for image in images])
        assert x_hat.dtype == torch.float
        assert np.array_equal((x_hat * 255).round().permute(0, 2, 3, 1).numpy(), expected)


def test_images_of_a_batch_may_differ_in_iterations(codec):
    images = [np.full((32, 32, 3), color, np.uint8) for color in ((128, 128, 128), (255, 0, 0))]
    how = {"psnr": 7}
    files = [codec.encode(image, **how) for image in images]
    counts = [len(format.read(data, max_pixels=10**6).payloads) for data in files]
    assert counts[0] != counts[1]
    compressed = codec.compress(batch_of(*images), **how)
    assert [b"".join(own) for own in zip(*compressed["strings"], strict=True)] == files
    assert len(compressed["strings"]) == max(counts)
    x_hat = codec.decompress(**compressed)["x_hat"]
    assert torch.equal((x_hat * 255).round().byte(), torch.stack([tensor_of(codec.decode(data)) for data in files]))


def test_wrong_batches(codec):
    strings = codec.compress(torch.rand(2, 3, 16, 16), iterations=2)["strings"]
    for wrong, shape, message in (
        ([], (16, 16), "at least one"),
        ([[], []], (16, 16), "at least one"),
        ([strings[0], strings[1][:1]], (16, 16), "shorter"),
        (strings, (16, 33), "16x16 in a batch of 33x16"),
        (strings[1:], (16, 16), "not an rnc file"),
        ([strings[0], [b"", strings[1][1]]], (16, 16), "1 complete iterations, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decompress(wrong, shape)
    for x in (torch.rand(3, 16, 16), torch.rand(0, 3, 16, 16), torch.rand(1, 1, 16, 16), torch.rand(1, 3, 0, 16)):
        with pytest.raises(ValueError, match=r"is (floating-point|uint8) \["):
            codec.compress(x)
    with pytest.raises(ValueError, match="floating-point"):
        codec.compress(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="0, 1"):
            codec.compress(torch.full((1, 3, 16, 16), value))


def test_arguments_of_the_codec(codec):
    weights = Weights(codec.network, "additive", codec.fingerprint, {})
    with pytest.raises(ValueError, match="tile"):
        Codec(weights, tile=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            Codec(weights, "cuda")


def test_package_interface(codec, tmp_path):
    import rnncodec

    save_weights(tmp_path / "w.safetensors", codec.network, "mine", {})
    loaded = rnncodec.load(tmp_path / "w.safetensors")
    assert isinstance(loaded, rnncodec.Codec)
    image = loaded.decode(loaded.encode(noise(9, 9), 1))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    with pytest.raises(AttributeError, match="has no attribute"):
        rnncodec.nothing  # noqa: B018


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_and_decoder_agree_on_a_gpu(codecs, name):
    weights = Weights(make_network(CONFIGS[name]), name, bytes(8), {})
    codec = Codec(weights, "cuda")
    image = noise(64, 96)
    x = tensor_of(image)[None].cuda()
    with torch.no_grad(), exact():
        steps = list(codec.network.unroll((2 * x / 255 - 1).contiguous(memory_format=torch.channels_last), 16))
    assert torch.equal(tensor_of(codec.decode(codec.encode(image))), to_uint8(steps[-1].state.y_hat)[0].cpu())


@pytest.mark.parametrize("count", [2.5, "2", 0, 17])
def test_iterations_are_a_number_in_range(codec, data, count):
    for call in (lambda: codec.encode(noise(8, 8), count), lambda: codec.decode(data, count)):
        with pytest.raises(ValueError, match=rf"^iterations must be in 1\.\.16, not {count}$"):
            call()


@pytest.mark.parametrize("device", ["mps", "xpu:0", "nonsense", torch.device("meta")])
def test_devices_that_do_not_work_are_refused_by_name(codecs, device):
    codec = codecs["additive"]
    with pytest.raises(ValueError, match=f"cpu or cuda, not on {device}"):
        Codec(Weights(codec.network, "additive", codec.fingerprint, {}), device)
