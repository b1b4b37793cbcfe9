"""The compressive autoencoder of Theis et al. 2017: one transform, rounded coefficients, and a model of their rate.

    x ──► analysis ──► y ──(* scale of a rate)──► round ──► integers ──(/ scale)──► synthesis ──► x_hat
                                                     │
                                                     └──► prior: the probability of each integer

Unlike the recurrent networks it codes an image once. One network has several rates, which differ in the scale of every
coefficient before it is rounded (Theis et al. 2017, sec. 2.5), and finer rates between them.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RoundingName = Literal["identity", "noise", "stochastic"]

STRIDE = 8
KERNEL = 5  # of the strided convolutions
SLOPE = 0.2  # of the leaky rectification
FINE = 4  # levels from one rate to the next
# Mean and standard deviation of photographs (those of ImageNet), for values in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECISIONS, SCALE = 16, 2**16  # of an integer and of probabilities, as entropy coders expect them
TAIL = 1e-12  # of a prior, beyond any integer: no decision is certain
START = 10.0  # scale at which training starts: if all coefficients were rounded to 0, nothing would be learned
NARROWEST, WIDEST = 0.1, 100.0  # standard deviations at which the mixtures start, in steps of the rounding


@dataclass(frozen=True)
class CompressiveConfig:
    """Architecture of a compressive autoencoder; the defaults are those of Theis et al. 2017, sec. 3.

    Attributes:
        coefficients: integers for each block of 8x8 pixels.
        channels: of the first two convolutions; the residual blocks have those of the second.
        blocks: residual blocks, on each side.
        mixtures: Gaussians of each coefficient's prior.
        rates: scales of the coefficients.
        rounding: what replaces the gradient of rounding in training: `identity` (rounds, with a gradient of 1), `noise`
            (adds uniform noise instead) or `stochastic` (rounds up or down at random, with a gradient of 1).
    """

    coefficients: int = 96
    channels: tuple[int, ...] = (64, 128)
    blocks: int = 3
    mixtures: int = 6
    rates: int = 6
    rounding: RoundingName = "identity"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # configs and checkpoints contain lists
        if self.rounding not in get_args(RoundingName):
            raise ValueError(f"rounding is one of {', '.join(get_args(RoundingName))}, not {self.rounding!r}")
        numbers = [getattr(self, field.name) for field in fields(self) if field.name not in ("channels", "rounding")]
        if len(self.channels) != 2 or min(*numbers, *self.channels) < 1:
            raise ValueError("a compressive autoencoder has two widths, and every number is at least 1")
        if self.rates > 64:
            raise ValueError(f"{self.rates} rates are too many")
        if self.coefficients > 255:
            raise ValueError(f"a file has room for 255 coefficients of a block, not {self.coefficients}")

    @property
    def stride(self) -> int:
        """Side in pixels of the block that one location stands for."""
        return STRIDE

    @property
    def bits(self) -> int:
        """Integers of a location: the field of a file's header that counts bits with other networks."""
        return self.coefficients

    @property
    def levels(self) -> int:
        """The number of rates with those between them."""
        return (self.rates - 1) * FINE + 1


class Residual(nn.Module):
    """Two 3x3 convolutions beside an identity; `padding` is 0 for those that see only what there is."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.first = nn.Conv2d(channels, channels, 3, padding=padding)
        self.second = nn.Conv2d(channels, channels, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        found = self.second(F.leaky_relu(self.first(x), SLOPE))
        kept = x if self.padding else x[..., 2:-2, 2:-2]
        return kept + found


class CompressiveAutoencoder(nn.Module):
    """Analysis, synthesis, scales and priors.

    Attributes:
        table: whole numbers from which every machine decodes alike: for each level, coefficient and decision of an
            integer, 65536 P(yes), see `rnncodec.entropy.alphabets`; zeros before `tabulate`.
    """

    table: Tensor

    def __init__(self, config: CompressiveConfig) -> None:
        super().__init__()
        self.config = config
        first, width = config.channels
        self.analysis = nn.Sequential(
            nn.Conv2d(3, first, KERNEL, 2),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(first, width, KERNEL, 2),
            nn.LeakyReLU(SLOPE),
            *(Residual(width, 0) for _ in range(config.blocks)),
            nn.Conv2d(width, config.coefficients, KERNEL, 2),
        )
        self.synthesis = nn.Sequential(
            nn.Conv2d(config.coefficients, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            *(Residual(width, 1) for _ in range(config.blocks)),
            nn.Conv2d(width, 4 * first, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.PixelShuffle(2),
            nn.Conv2d(first, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        shape = config.rates, config.coefficients, config.mixtures
        self.scale = nn.Parameter(torch.full((config.rates, config.coefficients), math.log(START)))  # logarithms
        deviations = torch.linspace(math.log(NARROWEST), math.log(WIDEST), config.mixtures)
        self.deviation = nn.Parameter(deviations.expand(shape).clone())  # logarithms
        self.weight = nn.Parameter(torch.zeros(shape))  # of the Gaussians; logits
        self.register_buffer("table", torch.zeros(config.levels, config.coefficients, DECISIONS, dtype=torch.int32))

    @property
    def margins(self) -> tuple[int, int]:
        """How many pixels the analysis sees before the first pixel of an area of blocks, and beyond its last."""
        seen = (KERNEL - 2) * (1 + 2 + 4) + 4 * 4 * self.config.blocks
        return seen // 2, seen - seen // 2

    @property
    def halo(self) -> int:
        """How many blocks beyond a block the synthesis sees on each side."""
        return math.ceil(1 + 2 * self.config.blocks / 2 + 1 / 2 + 1 / 4)

    def analyse(self, x: Tensor, rows: slice, columns: slice) -> Tensor:
        """The coefficients of an area of blocks, [B, coefficients, rows, columns], before they are scaled.

        Args:
            x: whole images [B, 3, H, W], in [-1, 1] or uint8; they go on in their mirror image, on all sides.
            rows: of blocks.
            columns: of blocks.
        """
        before, after = self.margins
        for dim, cut in ((-2, rows), (-1, columns)):
            places = torch.arange(cut.start * STRIDE - before, cut.stop * STRIDE + after, device=x.device)
            x = x.index_select(dim, mirrored(places, x.shape[dim]))
        x = 2 * x.float() / 255 - 1 if x.dtype == torch.uint8 else x
        mean, deviation = _normal(x)
        return self.analysis((x - mean) / deviation)

    def synthesise(self, y_hat: Tensor) -> Tensor:
        """Images [B, 3, H, W] of whole blocks, in about [-1, 1], from coefficients."""
        mean, deviation = _normal(y_hat)
        return self.synthesis(y_hat) * deviation + mean

    def scales(self, level: int) -> Tensor:
        """What the coefficients are multiplied by at a level from 0, [coefficients, 1, 1]."""
        return self._between(self.scale, level).exp().view(-1, 1, 1)

    def _between(self, values: Tensor, level: int) -> Tensor:
        """Values [rates, ...] interpolated at a level."""
        rate, part = divmod(level, FINE)
        return torch.lerp(values[rate], values[min(rate + 1, len(values) - 1)], part / FINE)

    def forward(self, x: Tensor, rate: int, active: int | None = None) -> tuple[Tensor, Tensor]:
        """Codes images as in training, rounding as the config says.

        Args:
            x: [B, 3, H, W] in [-1, 1].
            rate: number of a rate, from 0.
            active: how many coefficients there are so far, the others being zeros (Theis et al. 2017, sec. 2.4).

        Returns:
            The reconstruction, and the code length of every integer in nats, [B, coefficients, H / 8, W / 8].
        """
        height, width = x.shape[-2:]
        scale = self.scales(rate * FINE)
        y = self.analyse(x, *(slice(0, math.ceil(side / STRIDE)) for side in (height, width)))
        found = rounded(y * scale, self.config.rounding, self.training)
        nats = self.nats(found, rate)
        if active is not None:
            kept = (torch.arange(found.shape[1], device=x.device) < active).view(-1, 1, 1)
            found, nats = found * kept, nats * kept
        return self.synthesise(found / scale)[..., :height, :width], nats

    def nats(self, values: Tensor, rate: int) -> Tensor:
        """The code length of integers [B, coefficients, H, W]: -log of what the prior has from -1/2 to 1/2 around each.

        The prior of a coefficient is a mixture of Gaussians around zero (Theis et al. 2017, sec. 2.3).
        """
        deviation, weight = self.deviation[rate].float(), self.weight[rate].float().log_softmax(-1)
        size = values.float().abs()[..., None]  # the prior is even; this side of it keeps the precision of its tail
        deviation, weight = deviation.exp()[:, None, None], weight.exp()[:, None, None]
        near, far = ((bound - size) / deviation for bound in (0.5, -0.5))
        return -(weight * (normal_below(near) - normal_below(far))).sum(-1).clamp(min=1e-9).log()

    @torch.no_grad()
    def tabulate(self) -> None:
        """Computes `table` from the priors; those between the rates are interpolated."""
        for level in range(self.config.levels):
            deviation = self._between(self.deviation, level).double().exp()
            weight = self._between(self.weight, level).double().softmax(-1)
            # How much of a prior is at least k - 1/2 away from zero, for k = 0, 1, ...; at 0 everything.
            bounds = (torch.arange(DECISIONS, dtype=torch.double, device=weight.device) - 0.5).view(-1, 1, 1)
            beyond = 2 * (weight * normal_below(-bounds / deviation)).sum(-1) + TAIL
            beyond[0] = 1
            chances = beyond[1:] / beyond[:-1]  # that an integer is k or more away from zero, if it is k - 1 away
            chances = torch.stack([chances[0], torch.full_like(chances[0], 0.5), *chances[1:]], 1)
            self.table[level] = (chances * SCALE).round().clamp(1, SCALE - 1).int()


def _normal(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels of photographs in [-1, 1], [3, 1, 1]."""
    mean, deviation = (like.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return 2 * mean - 1, 2 * deviation


def normal_below(x: Tensor) -> Tensor:
    """P(a standard normal value is below x)."""
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def rounded(y: Tensor, rounding: RoundingName, training: bool) -> Tensor:
    """Rounds coefficients: as the config says in training, to the nearest integer otherwise.

    Theis et al. 2017, sec. 2.1. The gradient is 1 everywhere.
    """
    if not training:
        return y.round()
    if rounding == "noise":
        return y + torch.rand_like(y) - 0.5
    whole = y.round() if rounding == "identity" else (y + torch.rand_like(y)).floor()
    return y + (whole - y).detach()


def mirrored(places: Tensor, size: int) -> Tensor:
    """Places on a line of so many pixels, which goes on in its mirror image without repeating its ends."""
    if size == 1:
        return torch.zeros_like(places)
    return (size - 1) - ((size - 1) - places.remainder(2 * (size - 1))).abs()
