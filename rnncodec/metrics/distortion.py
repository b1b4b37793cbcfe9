"""Metrics of distortion between 8-bit RGB images, one value per image.

L1, PSNR and MS-SSIM are of RGB. PSNR-HVS and PSNR-HVS-M are of luma; they weight errors in the frequencies of 8x8
blocks by their visibility.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

REPORTED_ITERATIONS = (1, 2, 4, 8, 16)  # iterations whose images are measured and shown

# Five scales halve a side four times, and the last one must still hold the 11-tap window.
MS_SSIM_MIN_SIDE = 11 * 2**4

LUMA = (0.299, 0.587, 0.114)  # of R, G, B (ITU-R BT.601)

# The luminance table of JPEG (ITU-T T.81, table K.1), from which PSNR-HVS derives how well each frequency is seen.
VISIBILITY = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CONTRAST = 25.73509  # scales its inverse to contrast sensitivity (Egiazarian et al. 2006)


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, its error averaged over channels and pixels.

    Args:
        x: originals, uint8 [B, 3, H, W].
        x_hat: reconstructions, uint8 [B, 3, H, W].

    Returns:
        Float32 [B] in dB; infinite where the two are equal.

    Raises:
        ValueError: if the tensors are not of this kind or differ in shape.
    """
    _check(x, x_hat)
    squared_error = (x.to(torch.int32) - x_hat.to(torch.int32)).square().sum((1, 2, 3))  # int64, exact
    mse = squared_error.double() / x[0].numel()
    return (10 * torch.log10(255**2 / mse)).float()


def l1(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean absolute error of each image over channels and pixels.

    Args:
        x: originals, uint8 [B, 3, H, W].
        x_hat: reconstructions, uint8 [B, 3, H, W].

    Returns:
        Float32 [B], 0 to 255.

    Raises:
        ValueError: if the tensors are not of this kind or differ in shape.
    """
    _check(x, x_hat)
    return ((x.to(torch.int32) - x_hat.to(torch.int32)).abs().sum((1, 2, 3)).double() / x[0].numel()).float()


def psnr_hvs(x: Tensor, x_hat: Tensor, masking: bool = False) -> Tensor:
    """PSNR of luma in the DCT of 8x8 blocks, weighted by the eye's contrast sensitivity (Egiazarian et al. 2006).

    Args:
        x: originals, uint8 [B, 3, H, W]; rows and columns beyond the last whole block do not count.
        x_hat: reconstructions, uint8 [B, 3, H, W].
        masking: PSNR-HVS-M (Ponomarenko et al. 2007): what a block's own texture hides of an error does not count.

    Returns:
        Float32 [B] in dB; infinite where no difference is visible; nan if a side is below 8 pixels.

    Raises:
        ValueError: if the tensors are not of this kind or differ in shape.
    """
    _check(x, x_hat)
    if min(x.shape[-2:]) < 8:
        return torch.full((x.shape[0],), torch.nan, device=x.device)
    table = torch.tensor(VISIBILITY, dtype=torch.float64, device=x.device)
    # One image at a time, because the blocks take several times eight bytes per pixel.
    errors = torch.stack(
        [_visible_error(image, image_hat, table, masking) for image, image_hat in zip(x, x_hat, strict=True)]
    )
    return (10 * torch.log10(255**2 / errors)).float()


class PeakSignalNoiseRatioHVS(Metric):
    """PSNR-HVS, or PSNR-HVS-M with masking, as the mean over images; see `psnr_hvs`.

    Args:
        masking: whether texture hides errors.
        kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, masking: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.masking = masking
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Adds a batch of originals and reconstructions, uint8 [B, 3, H, W]."""
        values = psnr_hvs(x, x_hat, self.masking)
        self.total += values.double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean in dB."""
        return (self.total / self.count).float()


def _visible_error(x: Tensor, x_hat: Tensor, table: Tensor, masking: bool) -> Tensor:
    """Mean squared weighted error over the DCT coefficients of an image [3, H, W]."""
    k = torch.arange(8, dtype=torch.float64, device=x.device)
    dct = torch.cos(torch.pi / 8 * k[:, None] * (k + 0.5)) / 2
    dct[0] /= 2**0.5

    def blocks(image: Tensor) -> Tensor:  # [rows, columns, 8, 8]
        luma = torch.tensordot(image.new_tensor(LUMA, dtype=torch.float64), image.double(), dims=1)
        return luma.unfold(0, 8, 8).unfold(1, 8, 8)

    block, block_hat = blocks(x), blocks(x_hat)
    frequencies, frequencies_hat = dct @ block @ dct.T, dct @ block_hat @ dct.T
    error = (frequencies - frequencies_hat).abs()
    if masking:
        weight = (10 / table) ** 2
        strength = torch.maximum(_masking(block, frequencies, weight), _masking(block_hat, frequencies_hat, weight))
        hidden = strength[..., None, None] / weight
        hidden[..., 0, 0] = 0  # a difference of means is never hidden
        error = (error - hidden).clamp(min=0)
    return (error * CONTRAST / table).square().mean()


def _masking(block: Tensor, frequencies: Tensor, weight: Tensor) -> Tensor:
    """How much blocks [..., 8, 8] hide: the energy of their texture, less if it is an edge between flat quarters."""

    def spread(values: Tensor) -> Tensor:  # the unbiased variance times the number of values
        return values.flatten(-2).var(-1) * values[0, 0].numel()

    quarters = sum(spread(block[..., i : i + 4, j : j + 4]) for i in (0, 4) for j in (0, 4))
    whole = spread(block)
    energy = (frequencies.square() * weight).sum((-2, -1)) - frequencies[..., 0, 0].square() * weight[0, 0]
    ratio = torch.where(whole > 0, quarters / whole, 0)
    return (energy.clamp(min=0) * ratio).sqrt() / 32


def ms_ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Multi-scale structural similarity of each image (Wang et al. 2003; five scales, 11-tap Gaussian window).

    Args:
        x: originals, uint8 [B, 3, H, W].
        x_hat: reconstructions, uint8 [B, 3, H, W].

    Returns:
        Float32 [B], 1 where the two are equal; nan if a side is below 176 pixels, too few for five scales.

    Raises:
        ValueError: if the tensors are not of this kind or differ in shape.
    """
    _check(x, x_hat)
    if min(x.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return torch.full((x.shape[0],), torch.nan, device=x.device)
    # One image at a time: the filters hold about fifteen float32 copies of what they are given.
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for variances of 8-bit values
        values = [
            multiscale_structural_similarity_index_measure(
                _channels_last(image_hat), _channels_last(image), data_range=255.0, reduction="none", normalize="relu"
            )
            for image, image_hat in zip(x, x_hat, strict=True)
        ]
    return torch.cat(values)


# By the attribute of `rnncodec.metrics.curves.Point`, where `METRICS` says how each is shown.
DISTORTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1,
    "psnr": psnr,
    "ms_ssim": ms_ssim,
    "psnr_hvs": psnr_hvs,
    "psnr_hvs_m": partial(psnr_hvs, masking=True),
}


def _channels_last(image: Tensor) -> Tensor:
    """An image [3, H, W] as float32 [1, 3, H, W], in the memory format whose convolutions are fastest on a CPU."""
    return image[None].float().contiguous(memory_format=torch.channels_last)


def _check(x: Tensor, x_hat: Tensor) -> None:
    if x.shape != x_hat.shape:
        raise ValueError(f"images of different shapes: {list(x.shape)} and {list(x_hat.shape)}")
    if x.ndim != 4 or x.shape[1] != 3 or x.numel() == 0 or x.dtype != torch.uint8 or x_hat.dtype != torch.uint8:
        raise ValueError(f"expected uint8 [B, 3, H, W], not {x.dtype} and {x_hat.dtype} {list(x.shape)}")
