"""Chooses after which iteration each location of an image stops.

A survey encodes the image once, without stops, and notes for each iteration and location the bits spent and the error
that is left. From it follows, for every *effort* from 0 to 1, the last iteration of each location. There are two ways,
named after the metric that they serve:

    psnr     A location stops where squared error + multiplier * bits is smallest; the multiplier falls with the effort.
    ms-ssim  All locations get as many iterations, but in the last one only some go on: those where a bit saves the most
             of what MS-SSIM sees. For this metric, to spread bits evenly is nearly the best.

The squared error is estimated in the latent space, with what a squared error of each channel is worth in pixels (see
`rnncodec.training.calibration`). What MS-SSIM sees, the lost contrast and structure at each of its scales, is measured
on two reconstructions, in gray and without the finest scale, which counts 4 % and costs most of the time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TuneName = Literal["ms-ssim", "psnr"]

SCALES = (0.2856, 0.3001, 0.2363, 0.1333)  # weights of the scales of MS-SSIM from the second on (Wang et al. 2003)
WINDOW, SPREAD = 11, 1.5  # side and standard deviation of its Gaussian window, in pixels
CONTRAST = (2 * 0.03) ** 2  # its constant C2, for values in [-1, 1]
HALO = 5  # blocks around a block on which its lost contrast depends
QUALITIES = 1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100  # whose efforts weights have; those between follow
PATIENCE = 2  # iterations without use after which a location is no longer surveyed
FEW = 0.005  # share of locations that are not worth another iteration of the survey
FLAGS = 3.0  # bits that say when a location stops before the others; but a map takes at most a bit for each location
INTEREST = 16.0  # how much more errors count where a region of interest is white
MULTIPLIERS = 10 * INTEREST, 1e-6  # squared error per bit, at efforts 0, where no error is worth a bit, and 1
CLOSE = 1e-4  # difference of efforts that are not worth telling apart

Wish = Callable[["Survey"], float]
"""Gives the effort that meets a target, as far as a survey has come."""


class Allocation(NamedTuple):
    """What an encoder knows of its weights, to choose iterations.

    Attributes:
        worth: squared error of the image, in [-1, 1], for a squared error of 1 in each latent channel, [C].
        quality: efforts of the `QUALITIES` for each way to allocate.
    """

    worth: tuple[float, ...]
    quality: Mapping[str, Sequence[float]]


class Plan(NamedTuple):
    """What a survey is to find out.

    Attributes:
        kind: of the survey.
        wish: gives the effort that the encoder will use.
        price: takes rows and columns, and gives a function from the bits of the next iteration to their cost at each
            location.
        worth: of `Allocation`, [C].
        reconstructions: how many of the last iterations are reconstructed, to measure what errors they leave.
        overhead: bits of an iteration beside those of locations.
        weight: how much the error of each location counts, [rows, cols]; None counts all alike.
        least: iterations before the wish matters.
    """

    kind: "type[Survey]"
    wish: Wish
    price: Callable[[int, int], Callable[[np.ndarray], np.ndarray]]
    worth: Tensor
    reconstructions: int
    overhead: float = 0.0
    weight: np.ndarray | None = None
    least: int = 0


class Survey(ABC):
    """The bits spent on each location and the errors left after each iteration.

    Args:
        rows, cols: of locations.
        most: iterations of the network.
        overhead: bits of an iteration beside those of locations: headers, checksums and the ends of codes.
        weight: how much the error of each location counts, [rows, cols]; None counts all alike.

    Attributes:
        rate: bits, float [iterations, rows, cols].
        latent: squared error of values in [-1, 1], estimated in the latent space, likewise.
        errors: what was measured on reconstructions after the last iterations, each [rows, cols].
    """

    measure: ClassVar[TuneName]
    reconstructions: ClassVar[int]  # of the last iterations, from whose errors it chooses
    checked: ClassVar[int]  # iterations from one look at what is needed to the next
    crowd: ClassVar[float]  # share of locations that make a survey short if they want all that was surveyed of them

    def __init__(self, rows: int, cols: int, most: int, overhead: float, weight: np.ndarray | None = None) -> None:
        self.most, self.overhead = most, overhead
        self.weight = np.ones((rows, cols)) if weight is None else weight
        self.rate, self.latent = np.empty((0, rows, cols)), np.empty((0, rows, cols))
        self.errors: list[np.ndarray] = []

    def add(self, rate: np.ndarray, latent: np.ndarray) -> None:
        """Adds an iteration: the bits that it has cost, and what is left after it in the latent space."""
        spent = self.rate[-1] + rate if len(self.rate) else rate
        self.rate, self.latent = (
            np.concatenate([known, found[None]]) for known, found in ((self.rate, spent), (self.latent, latent))
        )

    @classmethod
    def joined(cls, surveys: "Sequence[Survey]") -> "Survey":
        """The survey of bands of rows, one below the other, each of as many iterations."""
        weight = np.concatenate([survey.weight for survey in surveys])
        joined = cls(0, 0, surveys[0].most, surveys[0].overhead, weight)
        joined.rate, joined.latent = (
            np.concatenate([getattr(survey, name) for survey in surveys], 1) for name in ("rate", "latent")
        )
        joined.errors = [np.concatenate(parts) for parts in zip(*(survey.errors for survey in surveys), strict=True)]
        return joined

    @abstractmethod
    def choose(self, effort: float) -> np.ndarray:
        """The last iteration of each location, from 1, int [rows, cols]; efforts above 1 are as 1."""

    @abstractmethod
    def done(self, last: np.ndarray) -> bool:
        """Whether more iterations would hardly change a choice."""

    def short(self, last: np.ndarray) -> bool:
        """Whether a choice seems to ask for more iterations than were surveyed."""
        ends = (self.rate < self.rate[-1]).sum(0) + 1
        return bool(((last == ends) & (ends < self.most)).mean() >= self.crowd)

    @abstractmethod
    def squares(self) -> np.ndarray:
        """The squared error of each location after each iteration, [iterations, rows, cols]."""

    def for_rate(self, bits: float) -> float:
        """The largest effort that spends at most so many bits."""
        return self._search(lambda last: total(self.rate, last) + self._beside(last) <= bits)

    def _beside(self, last: np.ndarray) -> float:
        """Estimates the bits of a file beside those of the locations: overhead, and where locations stop."""
        stops = np.bincount(last.ravel())[1:-1]
        living = last.size - np.cumsum(stops) + stops
        return self.overhead * last.max() + float(np.minimum(FLAGS * stops, living).sum())

    def for_squared(self, error: float) -> float:
        """The largest effort that leaves at least such a squared error."""
        squares = self.squares()
        return self._search(lambda last: total(squares, last) >= error)

    def _search(self, fits: Callable[[np.ndarray], bool]) -> float:
        low, high = 0.0, 1.0
        if fits(self.choose(high)):
            return high
        while high - low > CLOSE:
            middle = (low + high) / 2
            low, high = (middle, high) if fits(self.choose(middle)) else (low, middle)
        return low


class ErrorSurvey(Survey):
    """A survey for `psnr`; `errors` holds the squared error after the last iteration, or nothing."""

    measure, reconstructions, checked, crowd = "psnr", 0, 2, 0.05

    def choose(self, effort: float) -> np.ndarray:
        multiplier = math.exp(np.interp(effort, (0, 1), np.log(MULTIPLIERS)))
        return (self.weight * self.latent + multiplier * self.rate).argmin(0) + 1

    def done(self, last: np.ndarray) -> bool:
        return bool((last == len(self.rate)).mean() < FEW)

    def squares(self) -> np.ndarray:
        if not self.errors:
            return self.latent
        return np.maximum(self.latent + self.errors[-1] - self.latent[-1], 0)


class EvenSurvey(Survey):
    """A survey for `ms-ssim`; `errors` holds what the metric sees after the last two iterations."""

    measure, reconstructions, checked, crowd = "ms-ssim", 2, 1, 1.0

    def choose(self, effort: float) -> np.ndarray:
        level = 1 + min(effort, 1.0) * (self.most - 1)
        count = min(int(level), len(self.rate))
        last = np.full(self.weight.shape, count)
        if count < len(self.rate):
            pair = self.errors if self.errors and count + 1 == len(self.rate) else self.latent[count - 1 : count + 1]
            saved = self.weight * (pair[0] - pair[1]) / (self.rate[count] - self.rate[count - 1] + 1)
            some = round((level - count) * saved.size)
            last.flat[np.argsort(-saved, axis=None, kind="stable")[:some]] += 1
        return last

    def done(self, last: np.ndarray) -> bool:
        return bool((last < len(self.rate)).any())

    def squares(self) -> np.ndarray:
        return self.latent


SURVEYS: dict[TuneName, type[Survey]] = {"psnr": ErrorSurvey, "ms-ssim": EvenSurvey}


def total(values: np.ndarray, last: np.ndarray) -> float:
    """The sum of values [iterations, rows, cols] after the last iteration of each location."""
    return float(np.take_along_axis(values, last[None] - 1, 0).sum())


def region_weights(roi: np.ndarray | None, side: int) -> np.ndarray | None:
    """How much the error of each location, `side` pixels wide, counts, from a region of interest, uint8 [H, W].

    It is 1 where the region has 0, and `INTEREST` where it has 255; between them it grows by equal factors.
    """
    if roi is None:
        return None
    height, width = roi.shape
    padded = np.pad(roi / 255, ((0, -height % side), (0, -width % side)), mode="edge")
    rows, cols = padded.shape[0] // side, padded.shape[1] // side
    return INTEREST ** padded.reshape(rows, side, cols, side).mean((1, 3))


def block_errors(x: Tensor, x_hat: Tensor, side: int, measure: TuneName) -> Tensor:
    """The error of each block, [H / side, W / side]: squared, or what MS-SSIM sees, summed over the block's values.

    Args:
        x: an image [1, 3, H, W] in [-1, 1], sides multiples of 16.
        x_hat: its reconstruction.
        side: of the blocks, a multiple of 16.
        measure: of the error.
    """
    values = 3 * side**2
    if measure == "psnr":
        return F.avg_pool2d((x - x_hat).square().mean(1, keepdim=True), side)[0, 0] * values
    error = x.new_zeros(x.shape[2] // side, x.shape[3] // side)
    pair = torch.cat([x, x_hat]).mean(1, keepdim=True)
    for scale, weight in enumerate(SCALES, 1):
        pair = F.avg_pool2d(pair, 2)
        means, squares = _blur(pair), _blur(pair.square())
        common = _blur(pair[:1] * pair[1:]) - means[:1] * means[1:]
        spread = (squares - means.square()).sum(0, keepdim=True)
        lost = 1 - (2 * common + CONTRAST) / (spread + CONTRAST)  # 1 - contrast and structure
        error = error + weight * values * F.avg_pool2d(lost, side >> scale)[0, 0]
    return error


def _blur(planes: Tensor) -> Tensor:
    """Planes [N, 1, H, W] seen through MS-SSIM's window; the border is repeated."""
    line = torch.exp(-(torch.arange(WINDOW, device=planes.device) - WINDOW // 2).square() / (2 * SPREAD**2))
    line = line / line.sum()
    padded = F.pad(planes, (WINDOW // 2,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
