"""Layers with exact arithmetic, whose results are the same on every machine.

Encoder and decoder need identical probabilities, but a floating-point sum depends on the order of its terms. An exact
layer therefore has weights and activations on a grid of powers of two, so coarse that no sum needs more than the 24
bits of a float32. All sums are then exact, so that order, batch, threads and device no longer matter. Everything else
is rounded to the grid or looked up in a table.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEP = 2.0**-8  # grid of activations and of the sums that go into a table
MEMORY_STEP = 2.0**-12  # grid of LSTM memories, finer because they accumulate
SPAN = 8.0  # limit of tables and memories: there, tanh and sigmoid have reached their limits on the grid
MANTISSA = 24  # bits that a float32 holds exactly
WEIGHT = 2**11  # largest weight in units of its grid, which even TF32 represents exactly
SCALE = 2**16  # probabilities are integers over this
BAND = 2**20  # values of the unfolded input of a convolution at once, which bounds its memory


def table(function: Callable[[np.ndarray], np.ndarray], scale: float) -> Tensor:
    """The values of a function from -SPAN to SPAN in steps of STEP, rounded to multiples of 1 / scale."""
    x = np.arange(-SPAN, SPAN + STEP, STEP)
    return torch.from_numpy(np.round(function(x) * scale) / scale)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


TANH = table(np.tanh, 1 / STEP)
SIGMOID = table(_sigmoid, 1 / STEP)
PROBABILITY = table(lambda x: np.round(_sigmoid(x) * SCALE), 1).to(torch.int32)  # 22 to SCALE - 22


def blank(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the type and on the device of a tensor; on a CPU they take no memory before something is written."""
    return torch.from_numpy(np.zeros(shape, like.new_empty(0, device="cpu").numpy().dtype)).to(like.device)


def checkerboard(height: int, width: int) -> Tensor:
    """The colors of squares: 0 for black and 1 for white, int16 [height, width]; the first is black."""
    return ((torch.arange(height)[:, None] + torch.arange(width)) % 2).short()


def halves(whole: Tensor) -> Tensor:
    """Splits whole numbers within +-2^8 into int8 [2, ...]: a fourth of them, rounded down, and the remainder."""
    high = (whole / 4).floor_()
    return torch.stack([high, whole - 4 * high]).to(torch.int8)


def product(factors: Tensor, weights: Tensor) -> Tensor:
    """The matrix product of whole numbers, [n, outputs], exact while sums stay below 2^24.

    Args:
        factors: `halves` of the left matrix, one below the other, int8 [2 n, inputs].
        weights: int8 [inputs, outputs].
    """
    if _int8_is_exact(factors.device):  # several times as fast as in floats
        high, low = torch._int_mm(factors, weights).chunk(2)  # pyright: ignore[reportPrivateImportUsage]
    else:
        high, low = (factors.float() @ weights.float()).chunk(2)
    return torch.add(low, high, alpha=4)


@lru_cache(maxsize=8)
def _int8_is_exact(device: torch.device) -> bool:
    """Whether a device multiplies int8 matrices exactly: without instructions for it, sums of two products saturate."""
    if device.type != "cpu":
        return False
    largest = torch.tensor([127, -128, 127, -127], dtype=torch.int8)
    for rows, inputs in ((2, 144), (34, 576), (1024, 576)):
        factors = largest.repeat_interleave(rows * inputs // 4).view(inputs, rows).T.contiguous()
        weights = torch.where(torch.arange(inputs * 64).view(inputs, 64) % 7 < 4, 127, -127).to(torch.int8)
        try:
            found = torch._int_mm(factors, weights)  # pyright: ignore[reportPrivateImportUsage]
        except RuntimeError:
            return False
        if not torch.equal(found.double(), factors.double() @ weights.double()):
            return False
    return True


class Layer(nn.Module):
    """A module that computes in floats until it is quantized, and exactly afterwards."""

    exact = False

    def quantize(self) -> None:
        """Rounds the layer's own weights to their grid."""

    def integers(self) -> dict[str, Tensor]:
        """The layer's own weights, once quantized, as integers."""
        return {}

    def load_integers(self, integers: Mapping[str, Tensor]) -> None:
        """Sets the layer's own weights to what `integers` gave."""

    def _lookup(self, values: Tensor, x: Tensor) -> Tensor:
        index = (x.clamp(-SPAN, SPAN) / STEP).long() + int(SPAN / STEP)
        return values.to(x.device)[index].to(x.dtype)

    def tanh(self, x: Tensor) -> Tensor:
        return self._lookup(TANH, x) if self.exact else torch.tanh(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return self._lookup(SIGMOID, x) if self.exact else torch.sigmoid(x)

    def lstm(self, gates: Tensor, memory: Tensor | None, dim: int = 1) -> tuple[Tensor, Tensor]:
        """Computes hidden state and memory from gates (input, forget, output, candidate) and the previous memory."""
        i, f, o, j = gates.chunk(4, dim)
        new = self.sigmoid(i) * self.tanh(j)
        if memory is not None:
            new = new + self.sigmoid(f) * memory
        if self.exact:
            # f has 8 bits and the memory 15: their product is below 2^3 on a grid of 2^-20. The sum with i j takes 24.
            new = snap(new, MEMORY_STEP).clamp(-SPAN, SPAN)
        hidden = self.sigmoid(o) * self.tanh(snap(new, STEP) if self.exact else new)
        return (snap(hidden, STEP) if self.exact else hidden), new


def snap(x: Tensor, step: float) -> Tensor:
    """Rounds to the nearest multiple of a power of two, halves to even; this is exact on every machine."""
    return (x / step).round() * step


class Conv(Layer):
    """A convolution whose output has its input's size; a mask may hide part of its kernel.

    Args:
        in_channels, out_channels: of the convolution.
        kernel: odd height and width.
        visible: bool of the kernel's size, the weights that the mask keeps; None for all.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int] = (1, 1),
        visible: Tensor | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        like = nn.Conv2d(in_channels, out_channels, kernel, bias=bias)
        self.weight, self.bias = like.weight, like.bias
        self.padding = (kernel[0] // 2, kernel[1] // 2)
        mask = torch.ones(kernel) if visible is None else visible.float()
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():  # keeps the variance that the sum has without a mask
            self.weight.mul_(mask * (mask.numel() / mask.sum()).sqrt())

    mask: Tensor
    exponent: int  # of the grid of the weights, once they are quantized

    def forward(self, x: Tensor) -> Tensor:
        """Convolves [B, in, H, W] to [B, out, H, W]; an exact layer takes missing last input channels as zeros."""
        if not self.exact:
            return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)
        # As a matrix product, because libraries may convolve by transforms that are not exact; in bands of rows,
        # because the unfolded input takes much more memory than x.
        (batch, _, height, width), (down, across) = x.shape, self.padding
        x = F.pad(x, (across, across, down, down))
        rows = max(1, BAND // (batch * width * self.weight[0].numel()))
        bands = []
        for top in range(0, height, rows):
            band = x[:, :, top : min(top + rows, height) + 2 * down]
            bands.append(self.at(F.unfold(band, self.weight.shape[2:])).unflatten(2, (-1, width)))
        return torch.cat(bands, dim=2)

    def at(self, columns: Tensor) -> Tensor:
        """The exact output [..., out, N] at N locations from the unfolded input around them, [..., in * kernel, N]."""
        out = self.weight.flatten(1)[:, : columns.shape[-2]] @ columns
        return snap(out if self.bias is None else out + self.bias[:, None], STEP)

    @torch.no_grad()
    def quantize(self) -> None:
        """Rounds the weights to the finest grid on which no sum needs more than the 24 bits of a float32."""
        self.weight.mul_(self.mask)
        total = self.weight.flatten(1).abs().sum(1) + (0 if self.bias is None else self.bias.abs())
        # Rounding may add n / 2 steps to the sum of n weights; one bit of margin covers that.
        room = math.log2(2.0**MANTISSA * STEP / max(total.max().item(), STEP)) - 1
        largest = max(self.weight.abs().max().item(), STEP)
        self.exponent = math.floor(min(room, math.log2(WEIGHT / largest), 16))
        self.weight.copy_(snap(self.weight, 2.0**-self.exponent))
        if self.bias is not None:
            self.bias.copy_(snap(self.bias, 2.0**-self.exponent))
        self._check()

    @torch.no_grad()
    def integers(self) -> dict[str, Tensor]:
        """The quantized weights as integers, and the exponent of their grid: a weight is its integer * 2^-exponent."""
        scale = 2.0**self.exponent
        integers = {"weight": (self.weight * scale).short(), "exponent": torch.tensor(self.exponent, dtype=torch.int8)}
        return integers if self.bias is None else integers | {"bias": (self.bias * scale).int()}

    @torch.no_grad()
    def load_integers(self, integers: Mapping[str, Tensor]) -> None:
        """Sets the weights to given integers, which may come from any source.

        Raises:
            ValueError: sums would not be exact.
        """
        self.exponent = int(integers["exponent"])
        scale = 2.0**-self.exponent
        self.weight.copy_(integers["weight"] * self.mask * scale)
        if self.bias is not None:
            self.bias.copy_(integers["bias"] * scale)
        self._check()

    def _check(self) -> None:
        """Raises ValueError if sums would not be exact."""
        total = self.weight.flatten(1).abs().sum(1) + (0 if self.bias is None else self.bias.abs())
        grid = 2.0**-self.exponent
        exact = self.weight.abs().max() <= WEIGHT * grid and total.max() <= 2.0**MANTISSA * STEP * grid
        if not (exact and 0 <= self.exponent <= 16):
            raise ValueError("sums of a layer would need more bits than a float32 has")


def probability(logits: Tensor) -> Tensor:
    """P(+1) * SCALE of logits on the grid, int32 between 0 and SCALE, exclusive."""
    index = (logits / STEP).add_(SPAN / STEP).clamp_(0, 2 * SPAN / STEP).int()
    return PROBABILITY.to(logits.device).index_select(0, index.flatten()).view(logits.shape)
