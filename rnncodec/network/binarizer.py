"""The binarizer turns features into bits; its three methods differ only in training, where they need a gradient."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rnncodec.network.cells import conv

BinarizerName = Literal["stochastic", "sign", "noise"]


def binarize(y: Tensor, training: bool, method: BinarizerName = "stochastic") -> Tensor:
    """Quantizes features in (-1, 1) to bits, with a straight-through gradient.

    Toderici et al. 2016, sec. 3.1; Theis et al. 2017, sec. 2.1.

    Args:
        y: features of any shape.
        training: if false, every method gives the sign, with sign(0) = +1.
        method: `stochastic` draws +1 with probability (1 + y) / 2; `sign` is deterministic; `noise` adds
            uniform noise as wide as the quantization step, so that its values in training are not bits.

    Returns:
        A tensor of y's shape holding -1 and +1 (any value in (-2, 2) for `noise` in training).
    """
    if training and method == "noise":
        return y + (2 * torch.rand_like(y) - 1)
    threshold = 1 - 2 * torch.rand_like(y, dtype=torch.float32) if training and method == "stochastic" else 0.0
    bits = torch.where(y >= threshold, 1.0, -1.0).to(y.dtype)
    return bits + (y - y.detach())  # the difference is exactly zero and carries the gradient


class Coded(NamedTuple):
    """Bits [B, bits, H, W], the decoder's input that follows from them, and the binarizer's state after them.

    Latent networks add the case of each bit, uint8 [B, bits, H, W], see `Questions`.
    """

    bits: Tensor
    values: Any
    state: Any = None
    case: Tensor | None = None


class Binarizer(nn.Module):
    """A 1x1 convolution, tanh and `binarize`: [B, in, H, W] to [B, bits, H, W] of -1 and +1.

    Toderici et al. 2017, sec. 3.
    """

    def __init__(self, in_channels: int, bits: int, method: BinarizerName = "stochastic") -> None:
        super().__init__()
        self.method: BinarizerName = method
        self.features = conv(in_channels, bits, 1)

    def forward(self, x: Tensor, *_: Any) -> Coded:
        return self.values(binarize(torch.tanh(self.features(x)), self.training, self.method))

    def values(self, bits: Tensor, state: None = None) -> Coded:
        """The decoder's input, which is the bits themselves."""
        return Coded(bits, bits)
