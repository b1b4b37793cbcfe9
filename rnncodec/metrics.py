"""How close a reconstruction is to the original: PSNR and MS-SSIM of 8-bit RGB images, one value per image."""

import torch
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

RATES = (1, 2, 4, 8, 16)  # iterations at which pictures are judged and shown

# Five scales halve a side four times, and the last one must still hold the 11-tap window.
MS_SSIM_MIN_SIDE = 11 * 2**4


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
                image_hat[None].float(), image[None].float(), data_range=255.0, reduction="none", normalize="relu"
            )
            for image, image_hat in zip(x, x_hat, strict=True)
        ]
    return torch.cat(values)


def _check(x: Tensor, x_hat: Tensor) -> None:
    if x.shape != x_hat.shape:
        raise ValueError(f"images of different shapes: {list(x.shape)} and {list(x_hat.shape)}")
    if x.ndim != 4 or x.shape[1] != 3 or x.numel() == 0 or x.dtype != torch.uint8 or x_hat.dtype != torch.uint8:
        raise ValueError(f"expected uint8 [B, 3, H, W], not {x.dtype} and {x_hat.dtype} {list(x.shape)}")
