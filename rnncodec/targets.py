"""What a compressed file is to have: a quality, a number of bytes or a PSNR; and how an encoder comes near it."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from rnncodec.allocation import QUALITIES, Survey
from rnncodec.files.format import truncate

MARGIN = 0.003  # of the bytes of a target that are left over, so that it is rarely missed
HEADER = 64  # bytes of a header, as far as they are known beforehand
TOLERANCE = 0.03  # dB


class Target(ABC):
    """What a file is to have: it gives efforts to try, and takes the files that follow.

    Attributes:
        judges: whether it needs the PSNR of the files.
    """

    judges = False

    @abstractmethod
    def effort(self, survey: Survey) -> float:
        """The effort to try next."""

    @abstractmethod
    def met(self, data: bytes, reached: float) -> bool:
        """Takes a file and its PSNR in dB; says whether it is near enough."""

    @abstractmethod
    def best(self) -> bytes:
        """The best of the files."""


class EffortTarget(Target):
    """A given effort.

    Args:
        effort: from 0 to 1.
    """

    def __init__(self, effort: float) -> None:
        self.value = effort

    def effort(self, survey: Survey) -> float:
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

    def effort(self, survey: Survey) -> float:
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

    def effort(self, survey: Survey) -> float:
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


def effort_of(quality: float, scale: Sequence[float]) -> float:
    """The effort of a quality from 1 to 100, from those of `QUALITIES`."""
    return float(np.interp(quality, QUALITIES, scale))
