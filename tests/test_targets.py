"""Tests of targets: bytes, PSNR, quality and regions, met by a small latent network and by networks without choice."""

import copy
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from test_calibration import save_latent

import rnncodec
from rnncodec import tiling
from rnncodec.allocation import Allocation
from rnncodec.codec import Codec
from rnncodec.evaluation.evaluate import evaluate
from rnncodec.files import format
from rnncodec.files.images import load_image, save_image
from rnncodec.loop import Start
from rnncodec.targets import Allocator, BytesTarget, PsnrTarget
from rnncodec.training.calibration import calibrate
from rnncodec.weights import Weights, load_weights, save_weights

TUNES = ("ms-ssim", "psnr")


@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
    """A codec whose weights do not know how to allocate."""
    path = tmp_path_factory.mktemp("weights") / "latent.safetensors"
    save_latent(photos, path)
    return Codec(load_weights(path))


@pytest.fixture(scope="module")
def codec(plain, photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "latent.safetensors"
    allocation = calibrate(plain, [load_image(photo) for photo in sorted(photos.iterdir())])
    save_weights(path, plain.network, "latent", {}, plain.context, allocation)
    return Codec(load_weights(path))


@pytest.fixture(scope="module")
def x(photos):
    return load_image(photos / "coffee.png")[:256, :384]


def psnr(x, data, codec, part: Any = np.s_[:]):
    error = (np.asarray(codec.decode(data)).astype(float) - x)[part]
    return 10 * np.log10(255**2 / np.mean(error**2))


def test_bytes_are_met_and_never_exceeded(codec, photos, x):
    """Files for `psnr` use at least 99.1 % of the bytes.

    For `ms-ssim`, the first location that goes on brings a map of a bit for each location: fewer bytes are left over.
    """
    larger = load_image(photos / "astronaut.png")[:360, :400]  # with two payloads an iteration
    for image, parts, count in ((x, 1, 6), (larger, 2, 3)):
        first, everything = (len(codec.encode(image, iterations)) for iterations in (1, 4))
        for tune in TUNES:
            for limit in np.linspace(1.15 * first, 0.99 * everything, count).astype(int):
                data = codec.encode(image, max_bytes=int(limit), tune=tune)
                assert format.read_header(data).parts == parts
                rows, cols = codec.loop.grid(*image.shape[:2])
                gap = rows * cols / 8 + 16 if tune == "ms-ssim" else 0
                assert len(data) <= limit
                assert len(data) >= 0.97 * limit or limit - len(data) < gap
                assert codec.decode(data).size == (image.shape[1], image.shape[0])


@pytest.mark.parametrize("tune", TUNES)
def test_bytes_near_the_ends(codec, x, tune):
    largest = codec.encode(x, max_bytes=10**9, tune=tune)
    first, everything = len(codec.encode(x, 1)), len(largest)
    assert abs(everything - len(codec.encode(x, 4))) < 20
    for limit in (first, first + 1, first + 40, everything - 1, everything, everything + 1, 2 * everything):
        data = codec.encode(x, max_bytes=limit, tune=tune)
        assert first <= len(data) <= limit
        codec.decode(data)
    for limit in (first - 1, 50, 1, 0):
        with pytest.raises(ValueError, match=f"^iteration 1 takes {first} bytes, more than {limit}$"):
            codec.encode(x, max_bytes=limit, tune=tune)


@pytest.mark.parametrize("tune", TUNES)
def test_where_no_location_stops_a_file_has_no_maps(codec, x, tune):
    first = codec.encode(x, 1)
    assert codec.encode(x, max_bytes=len(first), tune=tune) == first
    assert codec.encode(x, max_bytes=10**400, tune=tune) == codec.encode(x, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": float("nan")}, "max_bytes must be a whole number, not nan"),
        ({"max_bytes": 99.5}, "max_bytes must be a whole number, not 99.5"),
        ({"max_bytes": 900, "tune": "ssim"}, "tune is one of ms-ssim, psnr, not 'ssim'"),
        ({"iterations": 1, "tune": "ssim"}, "tune is one of ms-ssim, psnr, not 'ssim'"),
        ({"max_bytes": 900, "roi": [[0]]}, "the region of interest of this image is uint8 [256, 384], not list"),
    ],
)
def test_wrong_targets(codec, x, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        codec.encode(x, **options)


class OneBlock:
    """A loop whose images have one location, what is left of them in the latent space, and the PSNR of each iteration.

    Args:
        left: squared errors that a survey estimates.
        reached: in dB.
    """

    device = torch.device("cpu")

    def __init__(self, left, reached):
        self.left, self.reached, self.max_iterations = left, reached, len(reached)
        self.encoded = []

    def inputs(self, pixels):
        return []

    def survey(self, pixels, inputs, plan, progress):
        survey = plan.kind(1, 1, self.max_iterations, plan.overhead)
        for error in self.left:
            survey.add(np.full((1, 1), 64.0), np.full((1, 1), error))
        return survey, Start([], {})

    def encode_stopped(self, pixels, inputs, last, start, progress, judge):
        self.encoded.append(int(last.item()))
        return self.encoded[-1:], self.reached[self.encoded[-1] - 1]


def allocated(loop, target):
    """The iterations of the file that an allocator makes of an image of one location: 64 bytes, and 15 for each."""

    def write(planes: Any) -> bytes:
        return bytes(64 + 15 * planes[0])

    unused: Any = None
    allocator = Allocator(loop, unused, Allocation((1.0,), {}))
    return (len(allocator.encode(torch.zeros(1), target, "psnr", None, write, 1, None)) - 64) // 15


# By an estimate, the last of four iterations saves nothing.
WRONG = [4 * 3 * 10 ** (-psnr / 10) for psnr in (20, 25, 30)] + [4 * 3 * 10**-3]


@pytest.mark.parametrize("asked", [38, 39.9, 40])
def test_all_iterations_are_tried_before_a_psnr_is_out_of_reach(asked):
    loop = OneBlock(WRONG, [20.0, 25.0, 30.0, 40.0])
    assert allocated(loop, PsnrTarget(asked, 3)) == 4
    assert loop.encoded[-1] == 4


def test_a_psnr_is_out_of_reach_or_not_met():
    loop = OneBlock(WRONG, [20.0, 25.0, 30.0, 40.0])
    with pytest.warns(UserWarning, match=r"^50 dB are out of reach, the image has 40.00 dB$"):
        assert allocated(loop, PsnrTarget(50, 3)) == 4
    with pytest.warns(UserWarning, match=r"^27.4 dB are not met, the image has 25.00 dB$"):
        assert allocated(loop, PsnrTarget(27.4, 3)) == 2


def test_all_iterations_are_tried_where_bytes_are_left():
    for limit, iterations in ((10**6, 4), (124, 4), (123, 3), (109, 3), (108, 2), (79, 1)):
        assert allocated(OneBlock(WRONG, [20.0, 25.0, 30.0, 40.0]), BytesTarget(limit)) == iterations


@pytest.mark.gpu
@pytest.mark.parametrize("tune", TUNES)
def test_a_gpu_meets_targets(codec, x, tune):
    allocation, known = codec.allocator.allocation, (codec.name, codec.fingerprint, {})
    context = copy.deepcopy(codec.context), codec.context_fingerprint
    on_gpu = Codec(Weights(copy.deepcopy(codec.network), *known, *context, allocation), "cuda")
    data = on_gpu.encode(x, max_bytes=900, tune=tune)
    assert 800 < len(data) <= 900
    assert abs(psnr(x, data, codec) - psnr(x, codec.encode(x, max_bytes=900, tune=tune), codec)) < 0.2


class Elsewhere:
    """A loop on another device, up to the survey."""

    device = torch.device("meta")

    def inputs(self, pixels):
        return []

    def survey(self, pixels, inputs, plan, progress):
        raise InterruptedError(plan.worth.device.type)


def test_latents_are_weighed_where_they_are():
    """Images are on the processor; what an error of latents is worth must be where these are."""
    unused: Any = None
    loop: Any = Elsewhere()
    with pytest.raises(InterruptedError, match=r"^meta$"):
        Allocator(loop, unused, Allocation((1.0,), {})).encode(
            torch.zeros(1), PsnrTarget(30, 3), "psnr", None, unused, 1, None
        )


def test_bits_per_pixel_are_bytes(codec, x):
    for tune in TUNES:
        assert codec.encode(x, bpp=8 * 900 / x[..., 0].size, tune=tune) == codec.encode(x, max_bytes=900, tune=tune)


def test_a_psnr_is_met(codec, x):
    """Within 0.1 dB where it is in reach, and without a warning, which comes where more is asked than there is."""
    least, most = (psnr(x, codec.encode(x, iterations), codec) for iterations in (1, 4))
    for target in np.linspace(least + 0.05, most - 0.05, 8):
        assert abs(psnr(x, codec.encode(x, psnr=target), codec) - target) < 0.1
    for target in (most + 0.2, most + 2, 50, 99):
        with pytest.warns(UserWarning, match=rf"^{target:g} dB are out of reach, the image has [\d.]+ dB$"):
            data = codec.encode(x, psnr=target)
        assert psnr(x, data, codec) > most - 0.05
    assert psnr(x, codec.encode(x, psnr=1), codec) == pytest.approx(least, abs=0.01)
    for target in (0, -3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^psnr must be a positive number of dB, not [^\n]*$"):
            codec.encode(x, psnr=target)


@pytest.mark.parametrize("tune", TUNES)
def test_quality_rises(codec, x, tune):
    files = [codec.encode(x, quality=quality, tune=tune) for quality in (1, 1.5, *range(5, 96, 9), 100)]
    sizes, reached = [len(data) for data in files], [psnr(x, data, codec) for data in files]
    assert (np.diff(sizes) >= 0).all()
    assert (np.diff(reached) > -0.05).all()
    least, most = (psnr(x, codec.encode(x, iterations), codec) for iterations in (1, 4))
    assert abs(reached[0] - least) < 0.1
    assert abs(reached[-1] - most) < 0.1
    assert len(set(sizes)) >= (4 if tune == "ms-ssim" else 10)


def test_qualities_divide_the_range_of_psnr(codec, photos):
    """On the photographs of the calibration, as nearly as errors are known in the latent space."""
    images = [load_image(photo) for photo in sorted(photos.iterdir())]
    reached = [np.mean([psnr(y, codec.encode(y, quality=q, tune="psnr"), codec) for y in images]) for q in (1, 50, 100)]
    assert 0.3 < (reached[1] - reached[0]) / (reached[2] - reached[0]) < 0.7


@pytest.mark.parametrize("quality", [0, 0.99, 100.5, -1, float("nan")])
def test_qualities_beyond_the_range(codec, plain, x, quality):
    for each in (codec, plain):
        with pytest.raises(ValueError, match=r"^quality must be in 1\.\.100, not [^\n]*$"):
            each.encode(x, quality=quality)


def test_the_choice_for_psnr_is_no_worse_than_none(codec, x):
    for iterations in (1, 2, 3, 4):
        uniform = codec.encode(x, iterations)
        data = codec.encode(x, max_bytes=len(uniform) + 5, tune="psnr")  # what version 3 takes
        assert psnr(x, data, codec) > psnr(x, uniform, codec) - 0.05


def test_each_way_serves_its_metric(codec, photos):
    """At equal bytes, the choice for `psnr` has a higher PSNR; that for `ms-ssim` gives all as many iterations."""
    y = load_image(photos / "rocket.jpg")[:256, :384]
    limit = (len(codec.encode(y, 2)) + len(codec.encode(y, 3))) // 2
    files = {tune: codec.encode(y, max_bytes=limit, tune=tune) for tune in TUNES}
    assert psnr(y, files["psnr"], codec) > psnr(y, files["ms-ssim"], codec)
    counts = {tune: (codec.read_bits(data)[:, 0] != 0).sum(0) for tune, data in files.items()}
    assert np.ptp(counts["ms-ssim"]) == 1
    assert np.ptp(counts["psnr"]) > 1


def test_regions_of_interest(codec, x):
    """A white half gains, and a black one loses; all gray is as none."""
    roi = np.zeros(x.shape[:2], np.uint8)
    roi[:, 192:] = 255
    right, left = np.s_[:, 192:], np.s_[:, :192]
    for limit in (700, 900, 1100):
        without, data = codec.encode(x, max_bytes=limit, tune="psnr"), codec.encode(x, max_bytes=limit, roi=roi)
        assert 0.97 * limit <= len(data) <= limit
        assert psnr(x, data, codec, right) > psnr(x, without, codec, right) + 0.1
        assert psnr(x, data, codec, left) < psnr(x, without, codec, left) - 0.1
        assert codec.encode(x, max_bytes=limit, roi=np.zeros_like(roi)) == without
        assert codec.encode(x, max_bytes=limit, roi=roi, tune="psnr") == data
    assert codec.encode(x, quality=50, roi=roi) != codec.encode(x, quality=50, tune="psnr")
    target = psnr(x, codec.encode(x, 2), codec)
    assert abs(psnr(x, codec.encode(x, psnr=target, roi=roi), codec) - target) < 0.1
    for height, width in ((33, 32), (17, 250)):  # no whole blocks
        data = codec.encode(x[:height, :width], max_bytes=10**6, roi=roi[:height, :width])
        assert codec.decode(data).size == (width, height)


def test_regions_that_cannot_be(codec, plain, x):
    roi = np.zeros(x.shape[:2], np.uint8)
    for wrong in (roi[:-1], roi.T, np.zeros_like(x), roi > 0, roi / 255):
        with pytest.raises(
            ValueError, match=r"^the region of interest of this image is uint8 \[256, 384\], not [^\n]*$"
        ):
            codec.encode(x, quality=50, roi=wrong)
    for each, options in (
        (codec, {}),
        (codec, {"iterations": 2}),
        (codec, {"quality": 50, "entropy": "none"}),
        (plain, {"quality": 50}),
        (plain, {"max_bytes": 1000}),
        (plain, {"psnr": 20}),
    ):
        with pytest.raises(ValueError, match=r"^a region of interest needs a target[^\n]*$"):
            each.encode(x, roi=roi, **options)


@pytest.mark.parametrize("options", [{"max_bytes": 963}, {"max_bytes": 1227}, {"psnr": 20}, {"psnr": 20.8}])
@pytest.mark.parametrize("tune", TUNES)
def test_progress_never_falls(codec, x, options, tune):
    seen = []
    codec.encode(x, **options, tune=tune, progress=lambda done, total: seen.append((done, total)))
    assert len({total for _, total in seen}) == 1
    assert (np.diff([done for done, _ in seen]) >= 0).all()
    assert seen[0][0] >= 0
    assert seen[-1][0] == seen[-1][1]
    assert len({done for done, _ in seen}) > 4


@pytest.mark.parametrize("tune", TUNES)
def test_images_in_bands(codec, x, tune, monkeypatch):
    """The loop of large images runs on bands of rows, whose surveys are joined."""
    monkeypatch.setattr(tiling, "MAP", 7 * 24)
    assert len(codec.loop.tiles(256, 384)) == 3
    for limit in (700, 1000, 1300):
        seen = []
        data = codec.encode(x, max_bytes=limit, tune=tune, progress=lambda *step, seen=seen: seen.append(step))
        assert 0.9 * limit <= len(data) <= limit
        assert (np.diff([done for done, _ in seen]) >= 0).all()
        codec.decode(data)
    assert abs(psnr(x, codec.encode(x, psnr=20.3), codec) - 20.3) < 0.1


@pytest.mark.parametrize("tune", TUNES)
def test_tiny_and_flat_images(codec, x, tune):
    flat = np.full((70, 50, 3), 77, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a PSNR out of reach
        for image in (x[:1, :1], x[:16, :16], x[:5, :60], flat):
            for target in ({"quality": 1}, {"quality": 60}, {"max_bytes": 200}, {"max_bytes": 10**6}, {"psnr": 25}):
                data = codec.encode(image, **target, tune=tune)
                assert len(data) <= target.get("max_bytes", 10**6)
                assert codec.decode(data).size == (image.shape[1], image.shape[0])


@pytest.mark.parametrize("entropy", [None, "adaptive"])
def test_latent_networks_without_allocation_choose_for_the_whole_image(codec, plain, x, entropy):
    coder = plain if entropy is None else codec  # other coders than the context model know no stops
    whole = [coder.encode(x, iterations, entropy=entropy) for iterations in (1, 2, 3, 4)]
    sizes, reached = [len(data) for data in whole], [psnr(x, data, coder) for data in whole]
    for tune in TUNES:
        files = [coder.encode(x, quality=q, tune=tune, entropy=entropy) for q in (1, 20, 40, 60, 80, 100)]
        assert files[0] == whole[0]
        assert files[-1] == whole[-1]
        assert (np.diff([len(data) for data in files]) >= 0).all()
        assert coder.encode(x, max_bytes=sizes[2], tune=tune, entropy=entropy) == whole[2]
        assert coder.encode(x, max_bytes=sizes[2] - 1, tune=tune, entropy=entropy) == whole[1]
        assert coder.encode(x, bpp=8 * sizes[1] / x[..., 0].size, tune=tune, entropy=entropy) == whole[1]
        assert coder.encode(x, psnr=reached[1] - 0.01, tune=tune, entropy=entropy) == whole[1]
    with pytest.raises(ValueError, match=f"^iteration 1 takes {sizes[0]} bytes, more than 99$"):
        coder.encode(x, max_bytes=99, entropy=entropy)
    with pytest.warns(UserWarning, match="^60 dB are out of reach, 4 iterations reach"):
        assert coder.encode(x, psnr=60, entropy=entropy) == whole[-1]


def test_the_shipped_network_chooses_for_the_whole_image(x):
    small, y = rnncodec.load(), x[60:92, 200:232]
    whole = small.encode(y, 16)
    files = [format.truncate(whole, iterations=t) for t in range(1, 17)]
    reached = [psnr(y, data, small) for data in files]
    found = [small.encode(y, quality=q) for q in (1, 30, 60, 100)]
    counts = [files.index(data) for data in found]
    assert counts[0] == 0
    assert counts[-1] == 15
    assert counts == sorted(set(counts))
    assert small.encode(y, max_bytes=len(files[4])) == files[4]
    assert small.encode(y, bpp=8 * len(files[4]) / y[..., 0].size) == files[4]
    assert small.encode(y, psnr=reached[3]) == files[3]
    with pytest.raises(ValueError, match=r"^a region of interest needs"):
        small.encode(y, quality=30, roi=np.zeros(y.shape[:2], np.uint8))


def test_evaluation_measures_files_of_the_same_bytes(codec, x, tmp_path):
    """Beside those with the same iterations everywhere, which are at most as large as theirs."""
    save_image(x, tmp_path / "x.png")
    points = evaluate(codec, tmp_path / "x.png", iterations=3, tunes=["psnr"])
    even = [point for point in points if point.codec == f"rnncodec-{codec.name}"]
    chosen = [point for point in points if point.codec == f"rnncodec-{codec.name}-psnr"]
    assert [point.setting for point in chosen] == [point.setting for point in even[1:]] == [2, 3]
    for own, other in zip(chosen, even[1:], strict=True):
        data = codec.encode(x, max_bytes=other.bytes, tune="psnr")
        assert own.bytes == len(data) <= other.bytes == len(codec.encode(x, int(other.setting)))
        assert own.psnr == pytest.approx(psnr(x, data, codec), abs=1e-3)
    first = evaluate(codec, tmp_path / "x.png", iterations=2, tunes=["psnr"], cache=tmp_path / "cache")
    other, known = copy.copy(codec), codec.allocator.allocation
    other.allocator = Allocator(codec.loop, codec.context, known._replace(worth=known.worth[::-1]))
    again, alone = (
        evaluate(other, tmp_path / "x.png", iterations=2, tunes=["psnr"], cache=cache)
        for cache in (tmp_path / "cache", None)
    )
    assert [point.psnr for point in again] == [point.psnr for point in alone] != [point.psnr for point in first]
    with pytest.raises(ValueError, match="cannot choose"):
        evaluate(rnncodec.load(), tmp_path / "x.png", iterations=2, tunes=["psnr"])
