import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate1d
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from rnncodec.metrics import ms_ssim, psnr


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


@pytest.mark.parametrize("metric", [psnr, ms_ssim])
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


def test_mixed_precision_changes_nothing():
    x = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None]
    x_hat = (x // 16) * 16 + 8
    expected = ms_ssim(x, x_hat)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ms_ssim(x, x_hat), expected)
