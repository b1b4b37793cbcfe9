"""The range coder, and `Session`, the interface of all coders.

A session codes the iterations of one image in order. The payload of an iteration, bits [bits, rows, cols], depends only
on this and earlier iterations, so that a file can be cut after any of them.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]

from rnncodec.entropy.exact import SCALE
from rnncodec.files.format import RAW, FormatError, length_size, pack_bits, unpack_bits

BERNOULLI = stream.model.Bernoulli(perfect=False)


class RangeEncoder:
    """Collects bits with their probabilities and codes them all at the end; `RangeDecoder` decodes them."""

    def __init__(self) -> None:
        self.bits: list[np.ndarray] = []
        self.probabilities: list[np.ndarray] = []

    def write(self, probabilities: np.ndarray, bits: np.ndarray) -> None:
        """Adds bits, bool [n], and P(1) * SCALE of each, int [n] between 0 and SCALE, exclusive."""
        self.bits.append(bits)
        self.probabilities.append(probabilities)

    def finish(self) -> bytes:
        """Codes all bits."""
        coder = stream.queue.RangeEncoder()
        coder.encode(np.concatenate(self.bits).astype(np.int32), BERNOULLI, np.concatenate(self.probabilities) / SCALE)
        return coder.get_compressed().astype("<u4").tobytes()


class RangeDecoder:
    """Decodes the bits, in groups of any size, given the same probabilities."""

    def __init__(self, payload: bytes) -> None:
        if len(payload) % 4:
            raise FormatError("an entropy-coded payload is cut short")
        self._coder = stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))

    def read(self, probabilities: np.ndarray) -> np.ndarray:
        """The next bits, bool [n], given P(1) * SCALE of each.

        Raises:
            FormatError: the payload is corrupt.
        """
        try:
            return self._coder.decode(BERNOULLI, probabilities / SCALE).astype(bool)
        except AssertionError as error:
            raise FormatError("an entropy-coded payload is corrupt") from error

    def finish(self) -> None:
        """Checks that the whole payload has been read.

        Raises:
            FormatError: something is left.
        """
        if not self._coder.maybe_exhausted():
            raise FormatError("an entropy-coded payload is corrupt")


class Session(ABC):
    """Codes the iterations of one image in order.

    Args:
        bits, rows, cols: shape of the bits of an iteration.
    """

    coding: ClassVar[int]  # number of the coder in files, see FORMAT.md

    def __init__(self, bits: int, rows: int, cols: int) -> None:
        self.shape = bits, rows, cols

    def encode(self, plane: np.ndarray) -> tuple[int, bytes]:
        """Codes the next iteration, bool [bits, rows, cols]; gives coding and payload, raw if coding saves nothing."""
        raw, coded = pack_bits(plane), self._encode(plane)
        self._advance(plane)
        # A coded payload takes a length field in the header, too.
        return (self.coding, coded) if 0 < len(coded) < len(raw) - length_size(len(raw)) else (RAW, raw)

    def decode(self, coding: int, payload: bytes) -> np.ndarray:
        """Decodes the next iteration to bool [bits, rows, cols].

        Raises:
            FormatError: the payload is corrupt, or of another coder.
        """
        if coding not in (RAW, self.coding):
            raise FormatError(f"coding {coding} where {self.coding} was expected")
        plane = unpack_bits(payload, *self.shape) if coding == RAW else self._decode(payload)
        self._advance(plane)
        return plane

    @abstractmethod
    def _encode(self, plane: np.ndarray) -> bytes:
        """The payload of a plane."""

    @abstractmethod
    def _decode(self, payload: bytes) -> np.ndarray:
        """The plane of a payload."""

    def _advance(self, plane: np.ndarray) -> None:  # noqa: B027 - most coders have no state
        """Updates the state with an iteration."""
