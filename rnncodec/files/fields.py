"""Bits and whole numbers as they are in an .rnc file."""

from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from rnncodec.files.errors import FormatError


def pack_bits(bits: np.ndarray) -> bytes:
    """Packs bool [bits, rows, cols] location by location, row by row; the first bit is the highest of a byte.

    The last byte is filled up with zeros.
    """
    return np.packbits(bits.transpose(1, 2, 0)).tobytes()


def unpack_bits(payload: bytes, bits: int, rows: int, cols: int) -> np.ndarray:
    """Undoes `pack_bits`.

    Returns:
        bool [bits, rows, cols].

    Raises:
        FormatError: the payload is of another length, or its last byte is not filled up with zeros.
    """
    count = bits * rows * cols
    if len(payload) != -(-count // 8):
        raise FormatError(f"{len(payload)} bytes cannot hold exactly {bits} bits at {rows}x{cols} locations")
    flat = np.unpackbits(np.frombuffer(payload, np.uint8)).view(bool)
    if flat[count:].any():
        raise FormatError("the bits after the last location are not zero")
    return flat[:count].reshape(rows, cols, bits).transpose(2, 0, 1)


def taker(file: BinaryIO, what: str) -> Callable[[int], bytes]:
    """A function that reads exactly so many bytes, or raises a FormatError that says what is cut short."""

    def take(size: int) -> bytes:
        taken = file.read(size)
        if len(taken) < size:
            raise FormatError(f"{what} cut short")
        return taken

    return take


def varint(value: int) -> bytes:
    """A whole number in bytes of 7 bits each, the lowest first; all but the last have 128 added."""
    data = bytearray()
    while value > 127:
        data.append(value % 128 + 128)
        value //= 128
    return bytes([*data, value])


def take_varint(take: Callable[[int], bytes]) -> int:
    """Reads what `varint` wrote, from at most five bytes.

    Raises:
        FormatError: there are more bytes than the number needs.
    """
    value = 0
    for place in range(5):
        byte = take(1)[0]
        value += byte % 128 << 7 * place
        if byte < 128:
            if place and not byte:
                break
            return value
    raise FormatError("a number has more bytes than it needs")
