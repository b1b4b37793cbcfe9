"""What the coders without a context model code: bits, or integers, as values and as sequences of decisions.

A decision is answered with yes or no. A bit is one decision. An integer begins with up to `DECISIONS` of them, which a
coder gives probabilities: is it not 0, is it negative, is it at least 2 away from 0, at least 3, ... 15? All others are
as likely as not. They say what is left beyond 15, plus 1, as a binary number (Elias gamma code): has it more than one
digit, more than two, ... and what are its digits, but for the first, from the top?
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from rnncodec.entropy.exact import SCALE
from rnncodec.files.codings import DECISIONS, INTEGER_BITS, huffman_group
from rnncodec.files.errors import FormatError
from rnncodec.files.fields import pack_bits, unpack_bits

Ask = Callable[[int, np.ndarray, np.ndarray | None], np.ndarray]
"""Codes a decision, by its number, of the values at places [n]: answers, bool [n], or None to decode, to answers."""

LARGEST = 2 ** (INTEGER_BITS - 1) - 1  # integer, and the negative of the smallest


class Alphabet(ABC):
    """The values of a plane [channels, rows, cols], as coders see them.

    Attributes:
        decisions: how many have a probability of their own in each channel.
    """

    decisions: ClassVar[int]

    @abstractmethod
    def values(self, plane: np.ndarray) -> np.ndarray:
        """The values of a plane. Raises ValueError if it has others."""

    @abstractmethod
    def plane(self, values: np.ndarray) -> np.ndarray:
        """The plane of values."""

    @abstractmethod
    def pack(self, values: np.ndarray) -> bytes:
        """The raw payload of values."""

    @abstractmethod
    def unpack(self, payload: bytes, channels: int, rows: int, cols: int) -> np.ndarray:
        """Undoes `pack`. Raises FormatError if the payload is not of this shape."""

    @abstractmethod
    def symbols(self, values: np.ndarray) -> tuple[bytes, int, np.ndarray]:
        """What Huffman's coder codes, [n], how many symbols there are, and what a decoder must know of them."""

    @abstractmethod
    def from_symbols(
        self, payload: bytes, shape: tuple[int, int, int]
    ) -> tuple[bytes, int, int, Callable[[np.ndarray], np.ndarray]]:
        """Prepares to undo `symbols`: the rest of the payload, the numbers of symbols and of those that are coded, and
        a function from these to values.
        """

    @abstractmethod
    def walk(self, ask: Ask, count: int, values: np.ndarray | None = None) -> np.ndarray:
        """Codes values [count], decision by decision; gives them. None decodes."""


class Bits(Alphabet):
    """Bits, in planes of -1 and +1."""

    decisions = 1

    def values(self, plane: np.ndarray) -> np.ndarray:
        if not plane.all():
            raise ValueError("bits are left out, which needs a file with stop maps")
        return plane > 0

    def plane(self, values: np.ndarray) -> np.ndarray:
        return signs(values)

    def pack(self, values: np.ndarray) -> bytes:
        return pack_bits(values)

    def unpack(self, payload: bytes, channels: int, rows: int, cols: int) -> np.ndarray:
        return unpack_bits(payload, channels, rows, cols)

    def symbols(self, values: np.ndarray) -> tuple[bytes, int, np.ndarray]:
        group = huffman_group(len(values))
        return b"", 1 << group, values.transpose(1, 2, 0).reshape(-1, group) @ (1 << np.arange(group)[::-1])

    def from_symbols(
        self, payload: bytes, shape: tuple[int, int, int]
    ) -> tuple[bytes, int, int, Callable[[np.ndarray], np.ndarray]]:
        bits, rows, cols = shape
        group = huffman_group(bits)

        def values(symbols: np.ndarray) -> np.ndarray:
            groups = (symbols[:, None] >> np.arange(group)[::-1]) & 1
            return groups.astype(bool).reshape(rows, cols, bits).transpose(2, 0, 1)

        return payload, 1 << group, rows * cols * bits // group, values

    def walk(self, ask: Ask, count: int, values: np.ndarray | None = None) -> np.ndarray:
        return ask(0, np.arange(count), values)


class Integers(Alphabet):
    """Integers from -`LARGEST` to `LARGEST`, int16."""

    decisions = DECISIONS

    def values(self, plane: np.ndarray) -> np.ndarray:
        if plane.dtype != np.int16 or plane.min() < -LARGEST:
            raise ValueError(f"integers are int16 from {-LARGEST} to {LARGEST}")
        return plane

    def plane(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.int16)

    def pack(self, values: np.ndarray) -> bytes:
        return values.transpose(1, 2, 0).astype(">i2").tobytes()

    def unpack(self, payload: bytes, channels: int, rows: int, cols: int) -> np.ndarray:
        if len(payload) != 2 * channels * rows * cols:
            raise FormatError(f"{len(payload)} bytes cannot hold {channels} integers at {rows}x{cols} locations")
        values = np.frombuffer(payload, ">i2").astype(np.int16).reshape(rows, cols, channels).transpose(2, 0, 1)
        if values.min() < -LARGEST:
            raise FormatError("an integer is out of range")
        return values

    def symbols(self, values: np.ndarray) -> tuple[bytes, int, np.ndarray]:
        largest = int(np.abs(values).max())
        flat = values.transpose(1, 2, 0).ravel().astype(np.int64)
        return largest.to_bytes(2), 2 * largest + 1, flat + largest

    def from_symbols(
        self, payload: bytes, shape: tuple[int, int, int]
    ) -> tuple[bytes, int, int, Callable[[np.ndarray], np.ndarray]]:
        channels, rows, cols = shape
        largest = int.from_bytes(payload[:2])
        if len(payload) < 2 or largest > LARGEST:
            raise FormatError("an entropy-coded payload is corrupt")

        def values(symbols: np.ndarray) -> np.ndarray:
            return (
                (symbols.astype(np.int64) - largest).astype(np.int16).reshape(rows, cols, channels).transpose(2, 0, 1)
            )

        return payload[2:], 2 * largest + 1, rows * cols * channels, values

    def walk(self, ask: Ask, count: int, values: np.ndarray | None = None) -> np.ndarray:
        given = np.zeros(count, np.int64) if values is None else values.astype(np.int64)
        size = np.abs(given)
        beyond = size - (DECISIONS - 2)  # what is left, plus 1

        def those(number: int, places: np.ndarray, answers: np.ndarray) -> np.ndarray:
            """The places whose answer is yes."""
            if not len(places):  # of few values, most decisions have none, and asking takes its time
                return places
            return places[ask(number, places, None if values is None else answers[places])]

        found, negative = np.zeros(count, np.int64), np.zeros(count, bool)
        far = those(0, np.arange(count), size > 0)
        found[far] = 1
        negative[those(1, far, given < 0)] = True
        for least in range(2, DECISIONS):
            far = those(least, far, size >= least)
            found[far] = least
        digits, longer = np.zeros(count, np.int64), far
        for more in range(1, INTEGER_BITS):
            longer = those(DECISIONS, longer, beyond >= 1 << more)
            digits[longer] = more
        number = np.zeros(count, np.int64)
        number[far] = 1
        for digit in range(int(digits.max(initial=0)), 0, -1):
            places = far[digits[far] >= digit]
            number[places] *= 2
            number[those(DECISIONS, places, beyond >> (digit - 1) & 1 > 0)] += 1
        found[far] += number[far] - 1
        if found.max(initial=0) > LARGEST:
            raise FormatError("an integer is out of range")
        return np.where(negative, -found, found).astype(np.int16)


BITS, INTEGERS = Bits(), Integers()


def signs(bits: np.ndarray) -> np.ndarray:
    """Bits that are true or false as int8 of +1 and -1."""
    return 2 * bits.astype(np.int8) - 1


def even(count: int) -> np.ndarray:
    """P(yes) * SCALE of decisions that are as likely as not."""
    return np.full(count, SCALE // 2, np.int64)
