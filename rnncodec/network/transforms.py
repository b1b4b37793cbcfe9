"""Transforms between pixels and the latent space: principal components plus nonlinear branches.

Both transforms start as linear ones, with the largest principal components of 16x16 blocks, because the last layers of
their branches are zero. A network that starts as a decent codec needs much less training.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnncodec.network.cells import GateConv, conv

if TYPE_CHECKING:
    from rnncodec.network.latent import DecoderState

STRIDE = 16  # side in pixels of the block of one location
SHUFFLE = 4  # the branches work at 1/4 of the resolution and below

Window = tuple[slice, slice]
WHOLE = slice(None), slice(None)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is off on the device of a tensor."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def zero_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """A convolution that starts at zero, so that a branch which ends in it adds nothing at first."""
    layer = conv(in_channels, out_channels, kernel_size)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


class Residual(nn.Module):
    """Two 3x3 convolutions whose output is added to their input, [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = GateConv(channels, channels, 3)
        self.second = GateConv(channels, channels, 3)
        with torch.no_grad():
            self.second.weight.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class Analysis(nn.Module):
    """Transforms images [B, 3, H, W] to latents [B, C, H / 16, W / 16].

    Args:
        latents: C.
        channels: of the branch at 1/4, 1/8 and 1/16 of the resolution.
        blocks: residual blocks at each resolution.
    """

    def __init__(self, latents: int, channels: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3, latents, STRIDE, STRIDE)
        self.stem = GateConv(3 * SHUFFLE**2, channels[0], 3)
        self.scales = nn.ModuleList(
            nn.Sequential(
                *(Residual(before) for _ in range(blocks)),
                *([GateConv(before, after, 3, 2)] if after else []),
            )
            for before, after in pairwise([*channels, 0])
        )
        self.output = zero_conv(channels[-1], latents, 1)
        # Its 3x3 convolutions see 1 pixel at their resolution: in stem, residual blocks and strided layers.
        self.halo = -(-(4 + 4 + 8 + 2 * (4 + 8 + 16) * blocks) // STRIDE)

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):  # bfloat16 is too coarse for an image
            y = self.linear(x.float())
        branch = self.stem(F.pixel_unshuffle(x, SHUFFLE))
        for scale in self.scales:
            branch = scale(branch)
        return y + self.output(branch).float()


class Synthesis(nn.Module):
    """Transforms latents [B, C, H, W] and the decoder's hidden state to images [B, 3, 16 H, 16 W].

    Args:
        latents: C.
        hidden: channels of the decoder's hidden state.
        counts: the most groups of bits that a location can have received.
        channels: of the branch at 1/16, 1/8 and 1/4 of the resolution.
        blocks: residual blocks at each resolution.
    """

    def __init__(self, latents: int, hidden: int, counts: int, channels: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.linear = nn.ConvTranspose2d(latents, 3, STRIDE, STRIDE)
        self.stem = GateConv(latents, channels[0], 1)
        self.hidden = zero_conv(hidden, channels[0], 1)
        self.received = nn.Embedding(counts + 1, channels[0])
        nn.init.zeros_(self.received.weight)
        self.scales = nn.ModuleList(
            nn.Sequential(
                *(Residual(before) for _ in range(blocks)),
                *([GateConv(before, 4 * after, 1), nn.PixelShuffle(2)] if after else []),
            )
            for before, after in pairwise([*channels, 0])
        )
        self.output = zero_conv(channels[-1], 3 * SHUFFLE**2, 3)
        self.halo = -(-(4 + 2 * (4 + 8 + 16) * blocks) // STRIDE)  # likewise, of residual blocks and output

    def forward(self, y_hat: Tensor, hidden: Tensor, received: Tensor) -> Tensor:
        """Images, not limited to [-1, 1]; `received` is the number of groups of bits received, long [B, H, W]."""
        with full_precision(y_hat):
            x_hat = self.linear(y_hat.float())
        branch = self.stem(y_hat) + self.hidden(hidden) + self.received(received).permute(0, 3, 1, 2)
        for scale in self.scales:
            branch = scale(branch)
        return x_hat + F.pixel_shuffle(self.output(branch), SHUFFLE).float()


class Pixels(nn.Module):
    """The identity, for networks whose loop runs on pixels; it ignores `window`, which always covers all of `y_hat`."""

    halos = 0, 0

    def analyse(self, x: Tensor) -> Tensor:
        return x

    def synthesise(self, y_hat: Tensor, decoder: Any, window: Window) -> Tensor:
        return y_hat


class LatentTransforms(nn.Module):
    """Analysis and synthesis around a loop in the latent space.

    Args:
        analysis: `Analysis`, or another module of its shapes. It has a `linear` part, which `start` sets, and a `halo`:
            how many blocks beyond a block it sees on each side.
        synthesis: `Synthesis`, likewise.
    """

    def __init__(self, analysis: Any, synthesis: Any) -> None:
        super().__init__()
        self.analysis, self.synthesis = analysis, synthesis
        self.halos = analysis.halo, synthesis.halo

    def analyse(self, x: Tensor) -> Tensor:
        return self.analysis(x)

    def synthesise(self, y_hat: Tensor, decoder: "DecoderState", window: Window) -> Tensor:
        return self.synthesis(*(tensor[..., *window] for tensor in (y_hat, decoder.cell[0], decoder.received)))

    def start(self, x: Tensor) -> Tensor:
        return start_linear(self.analysis, self.synthesis, x)


@torch.no_grad()
def start_linear(analysis: Any, synthesis: Any, x: Tensor) -> Tensor:
    """Sets both linear transforms to the principal components of the blocks of images.

    A component with standard deviation s is multiplied by s ** -1/2, halfway between preserving distances (1) and
    whitening (1 / s).

    Args:
        analysis: its linear part is set.
        synthesis: likewise.
        x: images [N, 3, H, W] in [-1, 1], sides multiples of 16; at least a few ten thousand blocks.

    Returns:
        Squared error of the image for a squared error of 1 in each component, [C].
    """
    latents = analysis.linear.weight.shape[0]
    size = 3 * STRIDE**2
    total, square, count = torch.zeros(size, dtype=torch.double), torch.zeros(size, size, dtype=torch.double), 0
    for images in x.split(64):
        blocks = F.pixel_unshuffle(images, STRIDE).permute(0, 2, 3, 1).reshape(-1, size)
        total += blocks.sum(0).double().cpu()
        square += (blocks.mT @ blocks).double().cpu()
        count += len(blocks)
    mean = total / count
    variances, vectors = torch.linalg.eigh(square / count - mean.outer(mean))
    components = vectors.flip(1)[:, :latents].mT  # in order of decreasing variance
    # The sign of an eigenvector is arbitrary; a positive largest value makes it the same on every machine.
    components = components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    spread = variances.flip(0)[:latents].clamp(min=1e-12) ** 0.25
    kernels = components.view(latents, 3, STRIDE, STRIDE)
    analysis.linear.weight.copy_(kernels / spread.view(-1, 1, 1, 1))
    synthesis.linear.weight.copy_(kernels * spread.view(-1, 1, 1, 1))
    # The mean of each color, because the means of the single pixels of a block would be visible as a pattern.
    color = mean.view(3, -1).mean(1)
    cast(Tensor, synthesis.linear.bias).copy_(color)
    cast(Tensor, analysis.linear.bias).copy_(-(kernels.sum((2, 3)) @ color) / spread)
    return spread.square().float().to(x.device)
