"""Tests of the distortion metrics against other implementations."""

import io
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from psnr_hvsm import psnr_hvs_hvsm
from scipy.ndimage import correlate1d
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from rnncodec.metrics.curves import CURVES, METRICS, Point
from rnncodec.metrics.distortion import DISTORTIONS, LUMA, PeakSignalNoiseRatioHVS, l1, ms_ssim, psnr, psnr_hvs


def to_tensor(*images):
    return torch.stack([torch.tensor(image).permute(2, 0, 1) for image in images])


def jpeg(x, quality):
    file = io.BytesIO()
    Image.fromarray(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def wang(x, y, border=False):
    """MS-SSIM of Wang, Simoncelli and Bovik 2003, the mean of three channels.

    Windows lie wholly inside the picture; with `border`, those of the last scale reach over its mirrored border.
    """
    tap = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    tap /= tap.sum()

    def window(a, border):
        a = correlate1d(correlate1d(a, tap, axis=0, mode="mirror"), tap, axis=1, mode="mirror")
        return a if border else a[5:-5, 5:-5]

    def halve(a):
        a = a[: a.shape[0] // 2 * 2, : a.shape[1] // 2 * 2]
        return (a[::2, ::2] + a[::2, 1::2] + a[1::2, ::2] + a[1::2, 1::2]) / 4

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    channels = []
    for a, b in zip(np.moveaxis(x.astype(float), 2, 0), np.moveaxis(y.astype(float), 2, 0), strict=True):
        value = 1.0
        for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            mean_a, mean_b, square_a, square_b, product = (
                window(signal, border and scale == 4) for signal in (a, b, a * a, b * b, a * b)
            )
            variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
            covariance = product - mean_a * mean_b
            similarity = (2 * covariance + c2) / (variance_a + variance_b + c2)
            if scale == 4:
                similarity = similarity * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            value *= similarity.mean() ** exponent
            a, b = halve(a), halve(b)
        channels.append(value)
    return np.mean(channels)


def test_psnr_of_each_image_agrees_with_skimage():
    x = data.astronaut()[:101, :83]
    reconstructions = [jpeg(x, quality) for quality in (5, 50, 95)]
    expected = [peak_signal_noise_ratio(x, y) for y in reconstructions]
    torch.testing.assert_close(psnr(to_tensor(x, x, x), to_tensor(*reconstructions)), torch.tensor(expected).float())


def test_psnr_at_its_ends():
    x = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    x_hat = torch.stack([x[0], torch.full_like(x[0], 255)])
    assert psnr(x, x_hat).tolist() == [float("inf"), 0.0]


# In the last scale torchmetrics keeps the mirrored border, which the paper leaves out: hence no closer than 1e-3.
@pytest.mark.parametrize(("name", "quality"), [("astronaut", 5), ("astronaut", 50), ("chelsea", 20), ("coffee", 90)])
def test_ms_ssim_agrees_with_the_paper(name, quality):
    x = getattr(data, name)()[:, :397]
    y = jpeg(x, quality)
    assert ms_ssim(to_tensor(x), to_tensor(y)).item() == pytest.approx(wang(x, y), abs=1e-3)


def test_ms_ssim_is_of_each_image():
    x, y = data.astronaut()[:200, :200], data.chelsea()[:200, :200]
    originals, reconstructions = [x, y, x], [jpeg(x, 10), jpeg(y, 30), x]
    values = ms_ssim(to_tensor(*originals), to_tensor(*reconstructions))
    expected = [wang(a, b, border=True) for a, b in zip(originals, reconstructions, strict=True)]
    np.testing.assert_allclose(values.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("height", "width", "defined"), [(176, 176, True), (175, 400, False), (400, 175, False), (1, 1, False)]
)
def test_ms_ssim_needs_five_scales(height, width, defined):
    x = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = ms_ssim(x, x)
    assert values.shape == (2,)
    assert torch.isfinite(values).all() if defined else torch.isnan(values).all()


def distorted(count=25):
    """Natural pictures and noise, each with a distortion: as many pairs of each."""
    rng = np.random.default_rng(0)
    photographs = [data.astronaut(), data.coffee(), data.chelsea()]
    for i in range(count):
        photograph = photographs[i % 3]
        y, x = rng.integers(0, 150, 2)
        crop = photograph[y : y + rng.integers(16, 140), x : x + rng.integers(16, 140)]
        yield crop, jpeg(crop, int(rng.integers(5, 96)))
        noise = rng.integers(0, 256, (rng.integers(8, 60), rng.integers(8, 60), 3), np.uint8)
        yield noise, np.clip(noise + rng.integers(-40, 41, noise.shape), 0, 255).astype(np.uint8)


def test_psnr_hvs_agrees_with_the_reference_package():
    pairs = list(distorted())
    assert len(pairs) == 50
    for x, x_hat in pairs:
        tensors = to_tensor(x), to_tensor(x_hat)
        found = [psnr_hvs(*tensors, masking=masking).item() for masking in (False, True)]
        height, width = (side // 8 * 8 for side in x.shape[:2])
        luma = (a[:height, :width] @ np.array(LUMA) / 255 for a in (x, x_hat))
        with np.errstate(invalid="ignore"):  # of blocks without any variance
            expected = [float(value) for value in psnr_hvs_hvsm(*luma)]
        assert found == pytest.approx(expected, abs=1e-3)


def test_psnr_hvs_at_its_ends():
    x = torch.full((1, 3, 16, 24), 100, dtype=torch.uint8)
    assert psnr_hvs(x, x, masking=True).item() == np.inf
    # A difference of 10 in all pixels is 80 in the DC coefficient; its weight is 25.735 / 16; nothing masks it.
    expected = 10 * np.log10(255**2 / ((80 * 25.73509 / 16) ** 2 / 64))
    for masking in (False, True):
        assert psnr_hvs(x, x + 10, masking).item() == pytest.approx(expected, abs=1e-4)
    assert psnr_hvs(x[..., :7, :], x[..., :7, :]).isnan().all()


@pytest.mark.parametrize("masking", [False, True])
def test_the_metric_is_the_mean_of_images_whatever_the_batches(masking):
    x = to_tensor(*(data.astronaut()[i : i + 40, i : i + 48] for i in (0, 50, 100, 150, 200)))
    x_hat = x // 8 * 8
    metric = PeakSignalNoiseRatioHVS(masking)
    for batch in (slice(0, 2), slice(2, 5)):
        metric.update(x[batch], x_hat[batch])
    each = [psnr_hvs(x[i : i + 1], x_hat[i : i + 1], masking).item() for i in range(5)]
    assert metric.compute().item() == pytest.approx(np.mean(each), rel=1e-6)
    metric.reset()
    metric.update(x[:1], x_hat[:1])
    assert metric.compute().item() == pytest.approx(each[0], rel=1e-6)


def test_l1_is_the_mean_of_absolute_differences():
    x, x_hat = (torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8) for _ in range(2))
    expected = np.abs(x.numpy().astype(int) - x_hat.numpy()).mean((1, 2, 3))
    assert l1(x, x_hat).tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("metric", DISTORTIONS.values(), ids=DISTORTIONS)
@pytest.mark.parametrize(
    ("x", "x_hat"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 9, dtype=torch.uint8)),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
    ],
)
def test_other_tensors_are_refused(metric, x, x_hat):
    with pytest.raises(ValueError, match=r"different shapes|expected uint8"):
        metric(x, x_hat)


def test_every_metric_has_a_column_and_a_way_to_be_shown():
    columns = [field.name for field in fields(Point)]
    assert columns[columns.index("ideal_bpp") + 1 : columns.index("encode_seconds")] == list(METRICS)
    assert list(DISTORTIONS) == list(METRICS)
    assert all(isinstance(getattr(Point("a", "codec", 1, 1, 1), name), float) for name in CURVES)


def test_mixed_precision_changes_nothing():
    x = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None]
    x_hat = (x // 16) * 16 + 8
    expected = ms_ssim(x, x_hat)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ms_ssim(x, x_hat), expected)
