"""Chooses after which iteration each location of an image stops: bits go where they reduce the error the most.

A survey encodes the image once, without stops, and notes for each iteration and location the bits spent and the error
that is left. A location then stops where error + multiplier * bits is smallest. The larger the multiplier, the smaller
the file; each target of an encoder is met by the right one.

There are two measures of the error:

    psnr     the squared error
    ms-ssim  what MS-SSIM sees: the lost contrast and structure at each of its scales; and a share of the squared error

The squared error is estimated in the latent space, with what a squared error of each channel is worth in pixels (see
`rnncodec.training.calibration`). What MS-SSIM sees is measured on reconstructions after a few iterations; in between it
is taken to fall as the squared error does.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rnncodec.files.format import truncate

TuneName = Literal["ms-ssim", "psnr"]

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of the scales of MS-SSIM (Wang et al. 2003)
WINDOW, SPREAD = 11, 1.5  # side and standard deviation of its Gaussian window, in pixels
CONTRAST = (2 * 0.03) ** 2  # its constant C2, for values in [-1, 1]
SQUARED = 2.0  # how much a squared error counts in the measure `ms-ssim`
# Iterations after which a survey reconstructs the image, beside its last one, which tells the PSNR.
ANCHORS: dict[TuneName, tuple[int, ...]] = {"psnr": (), "ms-ssim": (1, 3, 6, 10, 16)}
FIRST = 3  # fewest iterations of a survey
PATIENCE = 2  # iterations without use after which a location is no longer surveyed
FEW = 0.005  # share of locations that are not worth another iteration of the survey
MARGIN = 0.003  # of the bytes of a target that are left over, so that it is rarely missed
HEADER = 64  # bytes of a header, as far as they are known beforehand
TOLERANCE = 0.03  # dB
INTEREST = 16.0  # how much more errors count where a region of interest is white
CLOSE = 1.001  # quotient of multipliers that are not worth telling apart
HALO = 5  # blocks around a block on which its lost contrast depends

QUALITIES = 1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100  # whose multipliers weights have; those between follow

Wish = Callable[["Survey"], float]
"""Gives the multiplier that meets a target, as far as a survey has come."""


class Allocation(NamedTuple):
    """What an encoder knows of its weights, to choose iterations.

    Attributes:
        worth: squared error of the image, in [-1, 1], for a squared error of 1 in each latent channel, [C].
        quality: multipliers of the `QUALITIES` for each measure.
    """

    worth: tuple[float, ...]
    quality: Mapping[str, Sequence[float]]


class Survey:
    """The bits spent on each location and the errors left after each iteration.

    Attributes:
        rate: bits, float [iterations, rows, cols].
        latent: squared error of values in [-1, 1], estimated in the latent space, likewise.
        anchors: the iterations, from 0, after which the image was reconstructed.
        errors: in the measure, after each of these, [rows, cols].
        squares: squared errors of values in [-1, 1], likewise.
    """

    def __init__(self, rows: int, cols: int) -> None:
        self.rate, self.latent = np.empty((0, rows, cols)), np.empty((0, rows, cols))
        self.anchors: list[int] = []
        self.errors: list[np.ndarray] = []
        self.squares: list[np.ndarray] = []

    def add(self, rate: np.ndarray, latent: np.ndarray) -> None:
        """Adds an iteration: the bits that it has cost, and what is left after it in the latent space."""
        spent = self.rate[-1] + rate if len(self.rate) else rate
        self.rate, self.latent = (
            np.concatenate([known, found[None]]) for known, found in ((self.rate, spent), (self.latent, latent))
        )

    def measured(self, error: np.ndarray, squared: np.ndarray) -> None:
        """Adds the errors of the reconstruction after the last iteration."""
        self.anchors.append(len(self.rate) - 1)
        self.errors.append(error)
        self.squares.append(squared)

    @classmethod
    def joined(cls, surveys: "Sequence[Survey]") -> "Survey":
        """The survey of bands of rows, one below the other, each of as many iterations."""
        joined = cls(0, 0)
        joined.rate, joined.latent = (
            np.concatenate([getattr(survey, name) for survey in surveys], 1) for name in ("rate", "latent")
        )
        joined.anchors = surveys[0].anchors
        joined.errors, joined.squares = (
            [np.concatenate(parts) for parts in zip(*(getattr(survey, name) for survey in surveys), strict=True)]
            for name in ("errors", "squares")
        )
        return joined

    def between(self, values: list[np.ndarray]) -> np.ndarray:
        """Estimates `errors` or `squares` after every iteration, [iterations, rows, cols]."""
        latent = self.latent
        if not values:
            return latent
        estimate = np.empty_like(latent)
        # How much they fall with the latent error: alike everywhere, but between anchors as is known of each location.
        falls = np.full(values[0].shape, values[0].sum() / max(latent[self.anchors[0]].sum(), 1e-12))
        estimate[: self.anchors[0]] = values[0] + falls * (latent[: self.anchors[0]] - latent[self.anchors[0]])
        for i, (start, found) in enumerate(zip(self.anchors, values, strict=True)):
            end = len(latent)
            if i + 1 < len(self.anchors):
                end = self.anchors[i + 1]
                span = latent[start] - latent[end]
                falls = np.divide(found - values[i + 1], span, out=np.zeros_like(falls), where=span > 1e-9)
            estimate[start:end] = found - falls * (latent[start] - latent[start:end])
        return np.maximum(estimate, 0.0)

    def choose(self, multiplier: float, error: np.ndarray | None = None) -> np.ndarray:
        """The last iteration of each location, from 1, int [rows, cols]."""
        error = self.between(self.errors) if error is None else error
        return (error + multiplier * self.rate).argmin(0) + 1

    def for_rate(self, bits: float) -> float:
        """The smallest multiplier that spends at most so many bits."""
        return self._search(lambda last: _total(self.rate, last) <= bits)

    def for_squared(self, error: float) -> float:
        """The smallest multiplier that leaves at least such a squared error."""
        squares = self.between(self.squares)
        return self._search(lambda last: _total(squares, last) >= error)

    def _search(self, enough: Callable[[np.ndarray], bool]) -> float:
        error = self.between(self.errors)
        spent, saved = np.diff(self.rate, axis=0), -np.diff(error, axis=0)
        high = 2 * max(float((saved[spent > 1] / spent[spent > 1]).max(initial=0.0)), 1e-9)
        low = 1e-9 * high
        if enough(self.choose(low, error)):
            return low
        while high > CLOSE * low:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(self.choose(middle, error)) else (middle, high)
        return high


def _total(values: np.ndarray, last: np.ndarray) -> float:
    """The sum of values [iterations, rows, cols] after the last iteration of each location."""
    return float(np.take_along_axis(values, last[None] - 1, 0).sum())


class Target(ABC):
    """What a file is to have: it gives multipliers to try, and takes the files that follow.

    Attributes:
        judges: whether it needs the PSNR of the files.
    """

    judges = False

    @abstractmethod
    def multiplier(self, survey: Survey) -> float:
        """The multiplier to try next."""

    @abstractmethod
    def met(self, data: bytes, reached: float) -> bool:
        """Takes a file and its PSNR in dB; says whether it is near enough."""

    @abstractmethod
    def best(self) -> bytes:
        """The best of the files."""


class QualityTarget(Target):
    """A quality from 1 to 100, which stands for a multiplier.

    Args:
        quality: from 1 to 100.
        scale: multipliers of the `QUALITIES`, for each measure.
        tune: the measure.

    Raises:
        ValueError: there is no scale.
    """

    def __init__(self, quality: float, scale: Mapping[str, Sequence[float]], tune: TuneName) -> None:
        if tune not in scale:
            raise ValueError("the weights have no scale of quality; give another target")
        self.value = math.exp(np.interp(quality, QUALITIES, np.log(scale[tune])))

    def multiplier(self, survey: Survey) -> float:
        return self.value

    def met(self, data: bytes, reached: float) -> bool:
        self.data = data
        return True

    def best(self) -> bytes:
        return self.data


class BytesTarget(Target):
    """At most a number of bytes, and nearly as many.

    Args:
        limit: the number of bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.goal = limit, limit * (1 - MARGIN)
        self.bits = 8 * (self.goal - HEADER)
        self.files: list[bytes] = []

    def multiplier(self, survey: Survey) -> float:
        return survey.for_rate(self.bits)

    def met(self, data: bytes, reached: float) -> bool:
        self.files.append(data)
        self.bits += 8 * (self.goal - len(data))
        return (1 - 3 * MARGIN) * self.limit <= len(data) <= self.limit

    def best(self) -> bytes:
        """The largest file that is small enough; a larger one is cut.

        Raises:
            FormatError: not even the first payload fits.
        """
        small = max((data for data in self.files if len(data) <= self.limit), key=len, default=b"")
        if len(small) >= (1 - 3 * MARGIN) * self.limit:
            return small
        cut = [truncate(data, max_bytes=self.limit) for data in self.files if len(data) > self.limit]
        return max([small, *cut], key=len)


class PsnrTarget(Target):
    """A PSNR of the decoded image.

    Args:
        psnr: in dB.
        values: number of values of the image.

    Raises:
        ValueError: the PSNR is not a positive number of dB.
    """

    judges = True

    def __init__(self, psnr: float, values: int) -> None:
        if not 0 < psnr < math.inf:
            raise ValueError(f"psnr must be a positive number of dB, not {psnr}")
        self.psnr = psnr
        self.squared = 4 * values * 10 ** (-psnr / 10)  # of values in [-1, 1]
        self.files: list[tuple[float, bytes]] = []

    def multiplier(self, survey: Survey) -> float:
        return survey.for_squared(self.squared)

    def met(self, data: bytes, reached: float) -> bool:
        self.files.append((reached, data))
        self.squared *= 10 ** ((reached - self.psnr) / 10)
        return abs(reached - self.psnr) <= TOLERANCE

    def best(self) -> bytes:
        """The file whose PSNR is nearest; warns if it is not near."""
        reached, data = min(self.files, key=lambda file: abs(file[0] - self.psnr))
        if reached < self.psnr - 2 * TOLERANCE:
            warnings.warn(f"{self.psnr:g} dB are out of reach, the image has {reached:.2f} dB", stacklevel=4)
        return data


def region_weights(roi: np.ndarray | None, rows: int, cols: int) -> np.ndarray | None:
    """How much the error of each location counts, float [rows, cols], from a region of interest, uint8 [H, W].

    It is 1 where the region has 0, and `INTEREST` where it has 255; between them it grows by equal factors.
    """
    if roi is None:
        return None
    height, width = roi.shape
    side = -(-max(height, width) // max(rows, cols))
    padded = np.pad(roi / 255, ((0, rows * side - height), (0, cols * side - width)), mode="edge")
    return INTEREST ** padded.reshape(rows, side, cols, side).mean((1, 3))


def block_errors(x: Tensor, x_hat: Tensor, side: int, tune: TuneName) -> tuple[Tensor, Tensor]:
    """The error of each block in a measure, and its squared error, each summed over the values of the block.

    Args:
        x: an image [1, 3, H, W] in [-1, 1], sides multiples of 16.
        x_hat: its reconstruction.
        side: of the blocks, a multiple of 16.
        tune: the measure.
    """
    values = 3 * side**2
    squared = F.avg_pool2d((x - x_hat).square().mean(1, keepdim=True), side)[0, 0] * values
    if tune == "psnr":
        return squared, squared
    error, planes = SQUARED * squared, (x.transpose(0, 1), x_hat.transpose(0, 1))
    for scale, weight in enumerate(SCALES):
        if scale:
            planes = F.avg_pool2d(planes[0], 2), F.avg_pool2d(planes[1], 2)
        means = [_blur(plane) for plane in planes]
        spread = _blur(planes[0].square()) + _blur(planes[1].square()) - means[0].square() - means[1].square()
        common = _blur(planes[0] * planes[1]) - means[0] * means[1]
        lost = 1 - (2 * common + CONTRAST) / (spread + CONTRAST)  # 1 - contrast and structure
        error = error + weight * values * F.avg_pool2d(lost.mean(0, keepdim=True), side >> scale)[0, 0]
    return error, squared


def _blur(planes: Tensor) -> Tensor:
    """Planes [N, 1, H, W] seen through MS-SSIM's window; the border is repeated."""
    line = torch.exp(-(torch.arange(WINDOW, device=planes.device) - WINDOW // 2).square() / (2 * SPREAD**2))
    line = line / line.sum()
    padded = F.pad(planes, (WINDOW // 2,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
