"""The range coder, and `Session`, the interface of all coders.

A session codes the iterations of one image in order. The payloads of an iteration, bits [bits, rows, cols], depend only
on this and earlier iterations, so that a file can be cut after any of them. Bits are -1 and +1, and 0 if not sent.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]

from rnncodec.entropy.alphabets import BITS, Alphabet
from rnncodec.entropy.exact import SCALE
from rnncodec.files.codings import RAW, length_size
from rnncodec.files.errors import FormatError

BERNOULLI = stream.model.Bernoulli(perfect=False)

Piece = tuple[int, bytes]
"""A coding and a payload."""


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
        if self.bits:
            bits = np.concatenate(self.bits).astype(np.int32)
            coder.encode(bits, BERNOULLI, np.concatenate(self.probabilities) / SCALE)
        return coder.get_compressed().astype("<u4").tobytes()

    def raw(self) -> bytes:
        """All bits without coding, the first is the highest of a byte; the last byte is filled up with zeros."""
        return np.packbits(np.concatenate([np.empty(0, bool), *self.bits])).tobytes()

    def ideal_bits(self) -> float:
        """The code length of all bits under their probabilities."""
        pairs = zip(self.probabilities, self.bits, strict=True)
        return sum(information(p / SCALE, bits) for p, bits in pairs)


class RangeDecoder:
    """Decodes the bits, in groups of any size, given the same probabilities.

    A payload that is shorter than its bits goes on with zeros, see FORMAT.md. So that nobody decodes an image of these,
    the information of the bits is counted, and may not be more than the words of the payload have.
    """

    PIECE = 2**12  # bits whose information is counted at once
    WORD = 32.1  # bits of information in a word, with some more for what the coder and the sum round

    def __init__(self, payload: bytes) -> None:
        if len(payload) % 4:
            raise FormatError("an entropy-coded payload is cut short")
        words = np.frombuffer(payload, "<u4").astype(np.uint32)
        self._coder = stream.queue.RangeDecoder(words)
        self._left = self.WORD * len(words)
        self._uncounted: list[tuple[np.ndarray, np.ndarray]] = []  # P(1) and bits
        self._count = 0  # of these bits

    def read(self, probabilities: np.ndarray) -> np.ndarray:
        """The next bits, bool [n], given P(1) * SCALE of each.

        Raises:
            FormatError: the payload is corrupt.
        """
        chances = probabilities / SCALE
        try:
            bits = self._coder.decode(BERNOULLI, chances).astype(bool)
        except AssertionError as error:
            raise FormatError("an entropy-coded payload is corrupt") from error
        self._uncounted.append((chances, bits))
        self._count += len(bits)
        if self._count >= self.PIECE:
            self._spend()
        return bits

    def finish(self) -> None:
        """Checks that the whole payload has been read.

        Raises:
            FormatError: something is left, or missing.
        """
        self._spend()
        if not self._coder.maybe_exhausted():
            raise FormatError("an entropy-coded payload is corrupt")

    def _spend(self) -> None:
        """Counts the information of the bits that have been read."""
        if self._uncounted:
            self._left -= information(*map(np.concatenate, zip(*self._uncounted, strict=True)))
            self._uncounted, self._count = [], 0
        if self._left < 0:
            raise FormatError("an entropy-coded payload is too short for what it says")


def information(chances: np.ndarray, bits: np.ndarray) -> float:
    """The information of bits, bool [n], given P(1) of each, in bits."""
    found = chances - ~bits  # the sign does not matter
    whole = len(found) // 32 * 32
    products = found[:whole].reshape(32, -1).prod(0)  # at least 2^-512; logarithms take longer
    return float(-np.log2(np.abs(products)).sum() - np.log2(np.abs(found[whole:])).sum())


class RawDecoder:
    """Reads what `RangeEncoder.raw` gave; probabilities only count the bits."""

    def __init__(self, payload: bytes) -> None:
        self._bits = np.unpackbits(np.frombuffer(payload, np.uint8)).view(bool)
        self._place = 0

    def read(self, probabilities: np.ndarray) -> np.ndarray:
        """The next bits, bool [n].

        Raises:
            FormatError: the payload is too short.
        """
        start, self._place = self._place, self._place + len(probabilities)
        if self._place > len(self._bits):
            raise FormatError("a raw payload is too short")
        return self._bits[start : self._place]

    def finish(self) -> None:
        """Checks that the whole payload has been read.

        Raises:
            FormatError: something is left, or the last byte is not filled up with zeros.
        """
        if len(self._bits) - self._place > 7 or self._bits[self._place :].any():
            raise FormatError("a raw payload is too long")


class Session(ABC):
    """Codes the iterations of one image in order, each in one payload; `ContextSession` may divide them into parts.

    Args:
        bits, rows, cols: shape of the bits of an iteration.
        alphabet: integers, if these are coded instead of bits: int16 [bits, rows, cols], in one iteration.
    """

    coding: ClassVar[int]  # number of the coder in files, see FORMAT.md
    parts = 1  # payloads of an iteration
    maps = False  # whether locations may stop

    def __init__(self, bits: int, rows: int, cols: int, alphabet: Alphabet = BITS) -> None:
        self.shape, self.alphabet = (bits, rows, cols), alphabet

    def encode(self, plane: np.ndarray) -> list[Piece]:
        """Codes the next iteration, [bits, rows, cols]; a payload is raw if coding saves nothing.

        Raises:
            ValueError: some bits are not sent, which this coder cannot tell, or values are not of the alphabet.
        """
        values = self.alphabet.values(plane)
        raw, coded = self.alphabet.pack(values), self._encode(values)
        self._advance(plane)
        # A coded payload takes a length field in the header, too.
        return [(self.coding, coded) if 0 < len(coded) < len(raw) - length_size(len(raw)) else (RAW, raw)]

    def decode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Decodes the next iteration to int8 [bits, rows, cols]; bits of parts that are missing are 0.

        Raises:
            FormatError: a payload is corrupt, or of another coder.
        """
        for coding, _ in pieces:
            if coding not in (RAW, self.coding):
                raise FormatError(f"coding {coding} where {self.coding} was expected")
        plane = self._decode(pieces)
        self._advance(plane)
        return plane

    def _decode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Decodes like `decode`, without a change of the state."""
        ((coding, payload),) = pieces
        found = self.alphabet.unpack(payload, *self.shape) if coding == RAW else self._decode_whole(payload)
        return self.alphabet.plane(found)

    @abstractmethod
    def _encode(self, values: np.ndarray) -> bytes:
        """The payload of the values of a plane."""

    @abstractmethod
    def _decode_whole(self, payload: bytes) -> np.ndarray:
        """The values of the plane of a payload."""

    def _advance(self, plane: np.ndarray) -> None:  # noqa: B027 - most coders have no state
        """Updates the state with an iteration, int8."""
