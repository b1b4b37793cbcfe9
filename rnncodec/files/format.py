"""Reads and writes the .rnc file that FORMAT.md specifies: a header, then one payload for each iteration."""

import io
import itertools
import re
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

MAGIC = b"\x8fRNC"  # a first byte above 0x7f is neither ASCII nor the start of UTF-8: no text editor claims the file
RAW_VERSION, CODED_VERSION = 1, 2  # of files whose payloads are all raw, and of others
EntropyName = Literal["none", "context", "huffman", "static", "adaptive"]
CODINGS: dict[int, EntropyName] = dict(enumerate(get_args(EntropyName)))  # of payloads, raw or by an entropy coder
RAW, CONTEXT, HUFFMAN, STATIC, ADAPTIVE = CODINGS
MAX_ITERATIONS = 255  # a byte in the header
SIZES = struct.Struct(">HH8s")  # width, height, fingerprint
SHAPE = struct.Struct(">BBB")  # stride, bits, length of the name
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")  # safe to print and to look up, whatever the source


class FormatError(ValueError):
    """Raised for bytes that are not a valid .rnc file, or values that it cannot hold; the message is one line."""


@dataclass(frozen=True)
class Iteration:
    """The header's entry for one payload.

    Attributes:
        coding: `RAW`, or the entropy coder's number in 1..255.
        length: of the payload, in bytes.
        checksum: CRC-32 of the payload.
    """

    coding: int
    length: int
    checksum: int

    @classmethod
    def of(cls, payload: bytes, coding: int = RAW) -> "Iteration":
        """The entry that describes a payload."""
        return cls(coding, len(payload), zlib.crc32(payload))


@dataclass(frozen=True)
class Header:
    """The header of a file, which can be read without a model.

    Attributes:
        width, height: of the image in pixels, 1..65535.
        fingerprint: 8 bytes that identify the weights that made the file.
        weights: their name, for error messages; up to 32 of A-Z, a-z, 0-9, '.', '_', '-', the first a letter or digit.
        stride: side in pixels of the block that one location stands for, 1..255.
        bits: of one location in one iteration, 1..255.
        iterations: 1 to 255 entries.
        context: 8 bytes that identify the context model; zeros if no payload is coded with one.

    Raises:
        FormatError: a value is out of range, or the length of a payload contradicts the geometry.
    """

    width: int
    height: int
    fingerprint: bytes
    weights: str
    stride: int
    bits: int
    iterations: tuple[Iteration, ...]
    context: bytes = bytes(8)

    def __post_init__(self) -> None:
        for name, largest in (("width", 65535), ("height", 65535), ("stride", 255), ("bits", 255)):
            if not 1 <= getattr(self, name) <= largest:
                raise FormatError(f"{name} must be in 1..{largest}, not {getattr(self, name)}")
        for fingerprint in self.fingerprint, self.context:
            if len(fingerprint) != 8:
                raise FormatError(f"a fingerprint has 8 bytes, not {len(fingerprint)}")
        if not NAME_PATTERN.fullmatch(self.weights):
            raise FormatError(f"a name of weights is up to 32 letters, digits, '.', '_' and '-', not {self.weights!a}")
        if not 1 <= len(self.iterations) <= MAX_ITERATIONS:
            raise FormatError(f"a file holds 1 to {MAX_ITERATIONS} iterations, not {len(self.iterations)}")
        codings = {it.coding for it in self.iterations} - {RAW}
        if len(codings) > 1:
            raise FormatError(f"codings {min(codings)} and {max(codings)} in one file")
        if (self.context != bytes(8)) != (codings == {CONTEXT}):
            raise FormatError("a context model must be named if, and only if, a payload is coded with one")
        for number, it in enumerate(self.iterations, 1):
            if not (0 <= it.coding <= 255 and 0 <= it.checksum < 2**32):
                raise FormatError(f"iteration {number}: coding {it.coding} or checksum {it.checksum} is out of range")
            if not (self.raw_length if it.coding == RAW else 1) <= it.length <= self.raw_length:
                raise FormatError(f"iteration {number} takes {it.length} bytes, where raw bits take {self.raw_length}")

    @property
    def version(self) -> int:
        """The lowest version of the format that can hold this file."""
        return RAW_VERSION if all(it.coding == RAW for it in self.iterations) else CODED_VERSION

    @property
    def rows(self) -> int:
        """Rows of locations: height / stride, rounded up."""
        return _ceil(self.height, self.stride)

    @property
    def cols(self) -> int:
        """Columns of locations: width / stride, rounded up."""
        return _ceil(self.width, self.stride)

    @property
    def raw_length(self) -> int:
        """Bytes of a raw payload, which no payload exceeds."""
        return _raw_length(self.width, self.height, self.stride, self.bits)

    @property
    def size(self) -> int:
        """Bytes of this header."""
        entries = sum(5 + (length_size(self.raw_length) if it.coding != RAW else 0) for it in self.iterations)
        context = len(self.context) if self.version >= CODED_VERSION else 0
        return len(MAGIC) + 1 + SIZES.size + context + SHAPE.size + len(self.weights) + 1 + entries + 4

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of the whole file when truncated after iteration 1, 2, ..."""
        payloads = itertools.accumulate(it.length for it in self.iterations)
        return tuple(self.shortened(count).size + length for count, length in enumerate(payloads, 1))

    def shortened(self, count: int) -> "Header":
        """The header of a file of the first `count` iterations."""
        iterations = self.iterations[:count]
        coded = any(it.coding == CONTEXT for it in iterations)
        return replace(self, iterations=iterations, context=self.context if coded else bytes(8))

    @property
    def bpp(self) -> tuple[float, ...]:
        """Bits per pixel of the image, for each of `sizes`."""
        return tuple(8 * size / (self.width * self.height) for size in self.sizes)


@dataclass(frozen=True)
class Container:
    """A header and its payloads, fewer than its iterations if the file was cut or fewer were asked for."""

    header: Header
    payloads: tuple[bytes, ...]


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
    if len(payload) != _ceil(count, 8):
        raise FormatError(f"{len(payload)} bytes cannot hold exactly {bits} bits at {rows}x{cols} locations")
    flat = np.unpackbits(np.frombuffer(payload, np.uint8)).view(bool)
    if flat[count:].any():
        raise FormatError("the bits after the last location are not zero")
    return flat[:count].reshape(rows, cols, bits).transpose(2, 0, 1)


def write(container: Container) -> bytes:
    """Serializes a file to bytes.

    Raises:
        FormatError: the payloads are not those that the header describes.
    """
    header, payloads = container.header, container.payloads
    if len(payloads) != len(header.iterations) or any(
        Iteration.of(payload, it.coding) != it for payload, it in zip(payloads, header.iterations, strict=True)
    ):
        raise FormatError("the payloads are not those that the header describes")
    return write_header(header) + b"".join(payloads)


def write_header(header: Header) -> bytes:
    """Serializes a header to bytes."""
    name = header.weights.encode("ascii")
    data = MAGIC + bytes([header.version]) + SIZES.pack(header.width, header.height, header.fingerprint)
    if header.version >= CODED_VERSION:
        data += header.context
    data += SHAPE.pack(header.stride, header.bits, len(name))
    data += name + bytes([len(header.iterations)])
    for it in header.iterations:
        data += bytes([it.coding])
        if it.coding != RAW:  # the geometry gives the length of raw bits
            data += it.length.to_bytes(length_size(header.raw_length))
        data += it.checksum.to_bytes(4)
    return data + zlib.crc32(data).to_bytes(4)


def read_header(data: bytes) -> Header:
    """Reads the header of a file, of an image of any size, and ignores what follows.

    Raises:
        FormatError: not an .rnc file, of a later version, or the header is cut short or corrupt.
    """
    if not data or data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise FormatError("not an rnc file")
    file = io.BytesIO(data)

    def take(size: int) -> bytes:
        taken = file.read(size)
        if len(taken) < size:
            raise FormatError("the header is cut short")
        return taken

    version = take(len(MAGIC) + 1)[-1]
    # Checked first, because only the first five bytes are the same in every version.
    if version not in (RAW_VERSION, CODED_VERSION):
        raise FormatError(f"version {version} of the format needs a newer version of this program")
    width, height, fingerprint = SIZES.unpack(take(SIZES.size))
    context = take(8) if version >= CODED_VERSION else bytes(8)
    stride, bits, name_length = SHAPE.unpack(take(SHAPE.size))
    name = take(name_length)
    # The width of the lengths follows from the geometry, so zeros are refused before the checksum is known.
    if 0 in (width, height, stride, bits):
        raise FormatError("the header is corrupt")
    raw_length = _raw_length(width, height, stride, bits)
    iterations = []
    for _ in range(take(1)[0]):
        coding = take(1)[0]
        length = raw_length if coding == RAW else int.from_bytes(take(length_size(raw_length)))
        iterations.append(Iteration(coding, length, int.from_bytes(take(4))))
    checksum = zlib.crc32(data[: file.tell()])
    if int.from_bytes(take(4)) != checksum:
        raise FormatError("the header is corrupt")
    header = Header(width, height, fingerprint, name.decode("latin-1"), stride, bits, tuple(iterations), context)
    if header.version != version:  # so that each file has only one valid header
        raise FormatError(f"the codings of the payloads are not those of version {version} of the format")
    return header


def read(data: bytes, *, max_pixels: int, iterations: int | None = None) -> Container:
    """Reads a file; one that was cut after its header gives its complete iterations.

    Nothing is allocated from the lengths in the header, which are only compared with the bytes that are there.

    Args:
        data: the file.
        max_pixels: files of larger images are refused.
        iterations: read and check at most so many, and ignore what follows; None reads all.

    Returns:
        The header as it is, and the payloads, each with the right checksum; possibly none.

    Raises:
        FormatError: as in `read_header`; or a payload is corrupt or needs a newer version of this program, the image is
            too large, or bytes follow the last payload.
        ValueError: iterations is less than 1.
    """
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    header = read_header(data)
    if header.width * header.height > max_pixels:
        size = f"{header.width}x{header.height}"
        raise FormatError(f"{size} pixels are above the limit of {max_pixels}; raise max_pixels to decode it")
    payloads = _payloads(data, header, iterations)
    for number, it in enumerate(header.iterations[: len(payloads)], 1):
        if it.coding not in CODINGS:
            raise FormatError(f"coding {it.coding} of iteration {number} needs a newer version of this program")
    return Container(header, payloads)


def truncate(data: bytes, *, iterations: int | None = None, max_bytes: int | None = None) -> bytes:
    """Shortens a file to its first iterations, byte for byte the file that encoding so many gives.

    Works on cut files, and on codings that this version cannot decode. With neither limit, all complete iterations
    are kept, which makes a whole file of a cut one.

    Args:
        data: the file.
        iterations: how many to keep.
        max_bytes: or keep as many as fit in so many bytes, header included.

    Raises:
        FormatError: as in `read_header`; or a payload to keep is corrupt, there are not enough complete iterations, or
            not even one fits.
        ValueError: both limits are given.
    """
    if iterations is not None and max_bytes is not None:
        raise ValueError("give iterations or max_bytes, not both")
    header = read_header(data)
    ends = itertools.accumulate((it.length for it in header.iterations), initial=header.size)
    complete = sum(end <= len(data) for end in ends) - 1
    if complete < 1:
        raise FormatError("no complete iteration")
    keep = complete
    if iterations is not None:
        keep = iterations
        if not 1 <= keep <= complete:
            raise FormatError(f"cannot keep {keep} iterations of {complete} complete ones")
    elif max_bytes is not None:
        keep = sum(size <= max_bytes for size in header.sizes[:complete])
        if keep < 1:
            raise FormatError(f"one iteration takes {header.sizes[0]} bytes, more than {max_bytes}")
    payloads = _payloads(data, header, keep)
    return write(Container(header.shortened(keep), payloads))


def _payloads(data: bytes, header: Header, count: int | None) -> tuple[bytes, ...]:
    """At most `count` complete payloads of any coding, with checked CRC-32."""
    payloads = []
    end = header.size
    for number, iteration in enumerate(header.iterations[:count], 1):
        start, end = end, end + iteration.length
        if end > len(data):
            break
        payload = data[start:end]
        if Iteration.of(payload, iteration.coding) != iteration:
            raise FormatError(f"iteration {number} is corrupt")
        payloads.append(payload)
    if len(payloads) == len(header.iterations) and end < len(data):
        raise FormatError(f"{len(data) - end} bytes follow the last iteration")
    return tuple(payloads)


def _raw_length(width: int, height: int, stride: int, bits: int) -> int:
    """Bytes of a payload of raw bits."""
    return _ceil(_ceil(height, stride) * _ceil(width, stride) * bits, 8)


def length_size(raw_length: int) -> int:
    """Bytes of a length field, which holds any length up to that of the raw bits."""
    return _ceil(raw_length.bit_length(), 8)


def _ceil(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)
