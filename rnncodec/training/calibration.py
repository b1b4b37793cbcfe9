"""Learns from photographs what an encoder needs to choose iterations: the worth of latent errors, and qualities."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rnncodec.allocation import QUALITIES, Allocation, Survey, block_errors, total
from rnncodec.codec import Codec
from rnncodec.loop import exact
from rnncodec.network import RecurrentCodec, to_uint8
from rnncodec.targets import Allocator

CROP = 256  # pixels, side of the middle of each photograph from which the worth is learned
RIDGE = 0.03  # added to the correlations of channels, to learn little from few blocks
DESCENTS = 3000  # steps of the descent that keeps all values from falling below zero
EFFORTS = np.linspace(0, 1, 101)
NOTHING = 0.02  # dB


def calibrate(
    codec: Codec, images: Sequence[np.ndarray], progress: Callable[[int, int], None] | None = None
) -> Allocation:
    """Learns the allocation of a latent network with a context model.

    Qualities divide the range of the mean PSNR, from one iteration to all, into equal parts.

    Args:
        codec: the network.
        images: photographs, uint8 [H, W, 3].
        progress: is called with the number of steps done and the number of all steps.

    Raises:
        ValueError: the codec is another one, there are no images of at least 64 pixels a side, or more iterations do
            not improve them.
    """
    images = [x for x in images if min(x.shape[:2]) >= 64]
    if codec.context is None or codec.context.config.kind != "grouped":
        raise ValueError("only a latent network with its context model can be calibrated")
    if not images:
        raise ValueError("a calibration needs photographs of at least 64 pixels a side")
    steps = 2 * len(images)

    def report(done: int) -> None:
        if progress:
            progress(done, steps)

    blocks = []
    for i, x in enumerate(images):
        blocks.append(_falls(codec.network, _middle(x).to(codec.device), codec.max_iterations))
        report(i + 1)
    worth = fit_worth(torch.cat([latent for latent, _ in blocks], 1), torch.cat([pixel for _, pixel in blocks], 1))
    allocator, surveys = Allocator(codec.loop, codec.context, None), []
    for i, x in enumerate(images):
        surveys.append(allocator.survey(torch.tensor(x).permute(2, 0, 1)[None], worth.to(codec.device)))
        report(len(images) + i + 1)
    return Allocation(tuple(worth.tolist()), {"psnr": _scale(surveys), "ms-ssim": _even_scale(surveys)})


def _middle(x: np.ndarray) -> Tensor:
    """The middle of a photograph, [1, 3, H, W] in [-1, 1], sides multiples of 16."""
    height, width = (min(CROP, side // 16 * 16) for side in x.shape[:2])
    top, left = (x.shape[0] - height) // 2, (x.shape[1] - width) // 2
    crop = torch.tensor(x[top : top + height, left : left + width])
    return crop.permute(2, 0, 1)[None].float() / 127.5 - 1


def _falls(network: RecurrentCodec, x: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """How much each iteration lessens the squared errors of blocks: of latents [T, N, C], of pixels [T, N]."""
    side, latents, pixels = network.config.stride, [], []
    with exact():
        y = network.analyse(x.contiguous(memory_format=torch.channels_last))
        for step in network.unroll(y, iterations):
            latents.append((y - step.state.y_hat)[0].square().flatten(1).T)
            x_hat = to_uint8(network.picture(step.state)).float() / 127.5 - 1
            pixels.append(block_errors(x, x_hat, side, "psnr").flatten())
    return -torch.stack(latents).diff(dim=0).cpu(), -torch.stack(pixels).diff(dim=0).cpu()


def fit_worth(latents: Tensor, pixels: Tensor) -> Tensor:
    """The worth of squared errors in each channel: least squares, no value below zero, all iterations alike.

    Args:
        latents: by how much squared errors fell, [iterations, blocks, C].
        pixels: likewise for the squared error in pixels, [iterations, blocks].
    """
    scale = 1 / pixels.abs().mean(1, keepdim=True).clamp(min=1e-12)
    latents, pixels = (latents * scale[..., None]).flatten(0, 1).double(), (pixels * scale).flatten().double()
    products, aims = latents.T @ latents, latents.T @ pixels
    spread = products.diagonal().sqrt().clamp(min=1e-12)
    products = products / spread / spread[:, None] + RIDGE * torch.eye(len(spread), dtype=torch.double)
    aims = aims / spread
    step = 1 / torch.linalg.eigvalsh(products)[-1]
    worth = torch.linalg.solve(products, aims).clamp(min=0)
    for _ in range(DESCENTS):
        worth = (worth - step * (products @ worth - aims)).clamp(min=0)
    return (worth / spread).float()


def _scale(surveys: Sequence[Survey]) -> list[float]:
    """The efforts of the qualities for `psnr`."""
    chosen = [[survey.choose(effort) for effort in EFFORTS] for survey in surveys]
    pairs = zip(surveys, chosen, strict=True)
    left = [[total(survey.squares(), last) for last in each] for survey, each in pairs]
    return _equal_parts(EFFORTS, np.array(left))


def _even_scale(surveys: Sequence[Survey]) -> list[float]:
    """The efforts of the qualities for `ms-ssim`."""
    left = np.array([survey.squares().sum((1, 2)) for survey in surveys])
    return _equal_parts(np.linspace(0, 1, left.shape[1]), left)


def _equal_parts(efforts: np.ndarray, left: np.ndarray) -> list[float]:
    """The efforts at which the mean PSNR rises by equal parts, from the squared errors [images, efforts]."""
    psnr = np.maximum.accumulate(-10 * np.log10(np.maximum(left, 1e-9)).mean(0))
    parts = (np.array(QUALITIES) - 1) / 99
    if psnr[-1] <= psnr[0] + NOTHING:
        raise ValueError("a calibration needs photographs that more iterations improve")
    # The ends, where efforts change next to nothing, are left out.
    start = int(np.argmax(psnr > psnr[0] + NOTHING)) - 1
    end = int(np.argmax(psnr >= psnr[-1] - NOTHING)) + 1
    psnr, efforts = psnr[start:end], efforts[start:end]
    return [float(effort) for effort in np.interp(psnr[0] + parts * (psnr[-1] - psnr[0]), psnr, efforts)]
