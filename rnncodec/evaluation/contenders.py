"""The files that an image may become, with a codec of this package or with another one."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from rnncodec.allocation import TuneName
from rnncodec.codec import Codec
from rnncodec.compressive import CompressiveCodec
from rnncodec.evaluation.baselines import Baseline
from rnncodec.files.format import read_header, truncate
from rnncodec.imagecodec import ImageCodec
from rnncodec.loop import Progress
from rnncodec.network import FINE

MORE = 1.02  # times the bytes of a file, for one in which locations stop: it is cut to what is left for it

Measure = Callable[[np.ndarray, np.ndarray], float]
"""Gives the error of a reconstruction of an image, both uint8 [H, W, 3]."""


class Option(NamedTuple):
    """A file that an image may become.

    Attributes:
        size: its bytes.
        error: of its reconstruction.
        setting: iterations, or what the codec calls quality.
        write: gives the file of the image.
    """

    size: int
    error: float
    setting: float
    write: Callable[[np.ndarray], bytes]


class Contender(ABC):
    """A codec that compresses images within a budget.

    Attributes:
        name: in tables, and of folders.
        suffix: of files, with the dot.
        unit: what a setting counts.
    """

    name: str
    suffix: str
    unit: str

    @abstractmethod
    def options(self, x: np.ndarray, size: float, progress: Progress | None = None) -> list[Option]:
        """The files of an image up to about a size in bytes, with rising settings."""

    @abstractmethod
    def last(self, options: Sequence[Option]) -> bool:
        """Whether there are no options beyond these."""

    @abstractmethod
    def near(self, x: np.ndarray, options: Sequence[Option], chosen: int) -> list[Option]:
        """More files of an image, of about the size of a chosen one."""

    def fill(self, x: np.ndarray, size: int) -> list[Option]:
        """More files of an image, of nearly so many bytes, if the codec can aim at them."""
        return []

    @abstractmethod
    def decode(self, data: bytes) -> np.ndarray:
        """Decodes a file to an image, uint8 [H, W, 3]."""


class Prefixes(Contender):
    """A recurrent codec, whose files can be cut after each iteration, or part of one.

    If the weights allow it, `near` and `fill` give files in which locations stop.

    Args:
        codec: the codec.
        error: of reconstructions.
        tune: what the bits of files in which locations stop are spent for.
    """

    suffix, unit = ".rnc", "iterations"

    def __init__(self, codec: Codec, error: Measure, tune: TuneName) -> None:
        self.codec, self.error = codec, error
        self.tune: TuneName = tune
        self.name = f"rnncodec-{codec.name}"

    def options(self, x: np.ndarray, size: float, progress: Progress | None = None) -> list[Option]:
        rows, cols = self.codec.loop.grid(*x.shape[:2])
        count = math.ceil(min(8 * size / (self.codec.config.bits * rows * cols), self.codec.max_iterations))
        return self._cuts(x, self.codec.encode(x, count, records={}, progress=progress))

    def last(self, options: Sequence[Option]) -> bool:
        return options[-1].setting >= self.codec.max_iterations

    def near(self, x: np.ndarray, options: Sequence[Option], chosen: int) -> list[Option]:
        if options[chosen].setting <= 1:  # every location has the first iteration
            return []
        return self.fill(x, math.floor(MORE * options[chosen].size))

    def fill(self, x: np.ndarray, size: int) -> list[Option]:
        if self.codec.allocator is None:
            return []
        return self._cuts(x, self.codec.encode(x, max_bytes=size, tune=self.tune, records={}))

    def decode(self, data: bytes) -> np.ndarray:
        return np.asarray(self.codec.decode(data))

    def _cuts(self, x: np.ndarray, data: bytes) -> list[Option]:
        """The files that a file can be cut to, and itself."""
        header = read_header(data)
        pictures = self.codec.decode_progressive(data, parts=True)
        return [
            Option(size, self.error(x, x_hat), number / header.parts, partial(_cut, data, size))
            for number, (size, x_hat) in enumerate(zip(header.sizes, pictures, strict=True), 1)
        ]


def _cut(data: bytes, size: int, x: np.ndarray) -> bytes:
    return truncate(data, max_bytes=size)


class Settings(Contender):
    """A codec that encodes an image at one of many settings.

    Args:
        name: as in `Contender`.
        suffix: as in `Contender`.
        unit: as in `Contender`.
        coarse: settings that are tried first, rising.
        scale: all settings, rising.
        encode: encodes an image at a setting.
        decode: decodes a file.
        error: of reconstructions.
    """

    def __init__(
        self,
        name: str,
        suffix: str,
        unit: str,
        coarse: Sequence[float],
        scale: Sequence[float],
        encode: Callable[[np.ndarray, float], bytes],
        decode: Callable[[bytes], np.ndarray],
        error: Measure,
    ) -> None:
        self.name, self.suffix, self.unit = name, suffix, unit
        self.coarse, self.scale = sorted({scale[0], *coarse}), scale
        self.encode, self.decoded, self.error = encode, decode, error

    def options(self, x: np.ndarray, size: float, progress: Progress | None = None) -> list[Option]:
        found: list[Option] = []
        for setting in self.coarse:
            found.append(self._option(x, setting))
            if found[-1].size > size:
                break
        return found

    def last(self, options: Sequence[Option]) -> bool:
        return options[-1].setting >= self.coarse[-1]

    def near(self, x: np.ndarray, options: Sequence[Option], chosen: int) -> list[Option]:
        known = [option.setting for option in options]
        first = bisect_right(self.scale, known[max(chosen - 1, 0)])
        end = bisect_left(self.scale, known[min(chosen + 1, len(known) - 1)])
        return [self._option(x, setting) for setting in self.scale[first:end] if setting != known[chosen]]

    def decode(self, data: bytes) -> np.ndarray:
        return self.decoded(data)

    def _option(self, x: np.ndarray, setting: float) -> Option:
        data = self.encode(x, setting)
        return Option(len(data), self.error(x, self.decoded(data)), setting, lambda x: self.encode(x, setting))


def ours(codec: ImageCodec, error: Measure, tune: TuneName) -> Contender:
    """A codec of this package as a contender."""
    if isinstance(codec, CompressiveCodec):
        levels = range(codec.config.levels)
        return Settings(
            f"rnncodec-{codec.name}",
            ".rnc",
            "level",
            levels[:: FINE // 2],
            levels,
            lambda x, level: codec.encode(x, level=int(level), records={}),
            lambda data: np.asarray(codec.decode(data)),
            error,
        )
    assert isinstance(codec, Codec)
    return Prefixes(codec, error, tune)


def baseline(codec: Baseline, error: Measure) -> Contender:
    """A codec to compare with as a contender."""
    return Settings(
        codec.name,
        codec.suffix,
        codec.setting,
        codec.settings,
        codec.scale,
        codec.encode,
        codec.decode,
        error,
    )
