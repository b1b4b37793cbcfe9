"""The header of an .rnc file: what it says, how long the file is by it, and its bytes; see FORMAT.md."""

import binascii
import io
import itertools
import operator
import re
import struct
import zlib
from dataclasses import dataclass, replace

from rnncodec.files.codings import (
    CONTEXT,
    INTEGER_BITS,
    PRIOR,
    RAW,
    ceil_div,
    least_length,
    least_of_integers,
    length_size,
    raw_length,
)
from rnncodec.files.errors import FormatError
from rnncodec.files.fields import take_varint, taker, varint
from rnncodec.files.records import MAX_BLOCK

MAGIC = b"\x8fRNC"  # a first byte above 0x7f is neither ASCII nor the start of UTF-8: no text editor claims the file
# Of files whose payloads are all raw, of others with one payload for each iteration, and of all that can hold more.
RAW_VERSION, CODED_VERSION, PARTS_VERSION = 1, 2, 3
MAX_ITERATIONS = 255  # a byte in the header
MAX_PARTS = 16  # payloads of one iteration
MAPS, RECORDS, INTEGERS = 1, 2, 4  # flags of files with stop maps, with a block of records, and of integers
MAX_LENGTH = 2**34 - 1  # of a payload in version 3, which five bytes of an entry hold
SIZES = struct.Struct(">HH8s")  # width, height, fingerprint
SHAPE = struct.Struct(">BBB")  # stride, bits, length of the name
PARTS = struct.Struct(">BBBH")  # coding of coded payloads, parts of an iteration, flags, number of payloads
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")  # safe to print and to look up, whatever the source


@dataclass(frozen=True)
class Entry:
    """The header's entry for one payload.

    Attributes:
        coding: `RAW`, or the entropy coder's number in 1..255.
        length: of the payload, in bytes.
        checksum: of the payload: CRC-32, or CRC-16 from version 3 on, which has many small payloads.
    """

    coding: int
    length: int
    checksum: int

    @classmethod
    def of(cls, payload: bytes, coding: int = RAW, version: int = RAW_VERSION) -> "Entry":
        """The entry that describes a payload in a file of a version."""
        checksum = zlib.crc32(payload) if version < PARTS_VERSION else binascii.crc_hqx(payload, 0xFFFF)
        return cls(coding, len(payload), checksum)


@dataclass(frozen=True)
class Header:
    """The header of a file, which can be read without a model.

    Attributes:
        width, height: of the image in pixels, 1..65535.
        fingerprint: 8 bytes that identify the weights that made the file.
        weights: their name, for error messages; up to 32 of A-Z, a-z, 0-9, '.', '_', '-', the first a letter or digit.
        stride: side in pixels of the block that one location stands for, 1..255.
        bits: of one location in one iteration, 1..255.
        entries: one for each payload, of 1 to 255 iterations; the last iteration may lack some of its parts.
        context: 8 bytes that identify the context model; zeros if no payload is coded with one.
        parts: payloads of an iteration, 1..16, a divisor of `bits`; above 1 only in version 3.
        maps: whether the file says for each location which iteration is its last; only in version 3.
        records: the length and CRC-32 of the block of records, None if there is none; only in version 3.
        level: the rate of a file of integers instead of bits, 0..255, None for bits; only in version 3. Such a file has
            one payload, and `bits` is the number of integers of a location.

    Raises:
        FormatError: a value is out of range, or the length of a payload contradicts the geometry.
    """

    width: int
    height: int
    fingerprint: bytes
    weights: str
    stride: int
    bits: int
    entries: tuple[Entry, ...]
    context: bytes = bytes(8)
    parts: int = 1
    maps: bool = False
    records: Entry | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        for name, largest in (("width", 65535), ("height", 65535), ("stride", 255), ("bits", 255)):
            if not 1 <= getattr(self, name) <= largest:
                raise FormatError(f"{name} must be in 1..{largest}, not {getattr(self, name)}")
        if not (1 <= self.parts <= MAX_PARTS and self.bits % self.parts == 0):
            raise FormatError(f"{self.bits} bits cannot be divided into {self.parts} parts")
        for fingerprint in self.fingerprint, self.context:
            if len(fingerprint) != 8:
                raise FormatError(f"a fingerprint has 8 bytes, not {len(fingerprint)}")
        if not NAME_PATTERN.fullmatch(self.weights):
            raise FormatError(f"a name of weights is up to 32 letters, digits, '.', '_' and '-', not {self.weights!a}")
        if not 1 <= self.iterations <= MAX_ITERATIONS:
            raise FormatError(f"a file holds 1 to {MAX_ITERATIONS} iterations, not {self.iterations}")
        codings = {entry.coding for entry in self.entries} - {RAW}
        if len(codings) > 1:
            raise FormatError(f"codings {min(codings)} and {max(codings)} in one file")
        if (self.context != bytes(8)) != (codings == {CONTEXT}):
            raise FormatError("a context model must be named if, and only if, a payload is coded with one")
        if self.records is not None and not 1 <= self.records.length <= MAX_BLOCK:
            raise FormatError(f"records take 1 to {MAX_BLOCK} bytes, not {self.records.length}")
        if (codings == {PRIOR}) > (self.level is not None) or (codings == {CONTEXT}) > (self.level is None):
            raise FormatError(f"coding {min(codings)} is not for {'bits' if self.level is None else 'integers'}")
        if self.level is not None and (self.parts > 1 or self.maps or len(self.entries) > 1 or self.level > 255):
            raise FormatError("a file of integers has one payload, no stop maps, and a level up to 255")
        later = self.version >= PARTS_VERSION
        most = min(self.raw_length, MAX_LENGTH) if later else self.raw_length
        for number, entry in enumerate(self.entries):
            if not (0 <= entry.coding <= 255 and 0 <= entry.checksum < (2**16 if later else 2**32)):
                raise FormatError(f"{self.place(number)}: coding {entry.coding} or its checksum is out of range")
            least = self.least_length(number)
            if not least <= entry.length <= most:
                raise FormatError(f"{self.place(number)} takes {entry.length} bytes, not {least} to {most}")

    @property
    def version(self) -> int:
        """The lowest version of the format that can hold this file."""
        if self.parts > 1 or self.maps or self.records is not None or self.level is not None:
            return PARTS_VERSION
        return RAW_VERSION if all(entry.coding == RAW for entry in self.entries) else CODED_VERSION

    @property
    def iterations(self) -> int:
        """Number of iterations, of which the last may lack some of its parts."""
        return ceil_div(len(self.entries), self.parts)

    @property
    def ends(self) -> tuple[int, ...]:
        """Number of payloads up to the end of iteration 1, 2, ..."""
        return tuple(
            min(end, len(self.entries)) for end in range(self.parts, len(self.entries) + self.parts, self.parts)
        )

    @property
    def rows(self) -> int:
        """Rows of locations: height / stride, rounded up."""
        return ceil_div(self.height, self.stride)

    @property
    def cols(self) -> int:
        """Columns of locations: width / stride, rounded up."""
        return ceil_div(self.width, self.stride)

    @property
    def raw_length(self) -> int:
        """Bytes of a raw payload, the most bytes of one if there are parts or maps; no payload exceeds it."""
        each = self.bits // self.parts if self.level is None else self.bits * INTEGER_BITS
        return raw_length(self.width, self.height, self.stride, each, self.maps)

    def least_length(self, number: int) -> int:
        """The fewest bytes that the payload of a number from 0 can have, by its coding and the geometry."""
        (iteration, part), locations = divmod(number, self.parts), self.rows * self.cols
        asked = locations if iteration == 1 else 1  # who has stopped before the third iteration is not known
        flags = asked if self.maps and iteration and not part else 0
        sent = 1 if self.maps and iteration else locations
        coding, each = self.entries[number].coding, self.bits // self.parts
        return least_length(coding, sent, each, flags) if self.level is None else least_of_integers(coding, sent, each)

    @property
    def size(self) -> int:
        """Bytes before the first payload: of this header and the block of records."""
        return self._fixed_size(self.version) + sum(self._entry_sizes())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of the whole file when truncated after payload 1, 2, ..."""
        pairs = zip(self._entry_sizes(), self.entries, strict=True)
        ends = itertools.accumulate(size + entry.length for size, entry in pairs)
        # A file that was truncated before its first coded payload has a lower version.
        own = self.version
        versions = itertools.accumulate(
            (own if own >= PARTS_VERSION or entry.coding != RAW else RAW_VERSION for entry in self.entries), max
        )
        return tuple(map(operator.add, map(self._fixed_size, versions), ends))

    def shortened(self, count: int) -> "Header":
        """The header of a file of the first `count` payloads."""
        entries = self.entries[:count]
        coded = any(entry.coding == CONTEXT for entry in entries)
        return replace(self, entries=entries, context=self.context if coded else bytes(8))

    @property
    def bpp(self) -> tuple[float, ...]:
        """Bits per pixel of the image, for each of `sizes`."""
        return tuple(8 * size / (self.width * self.height) for size in self.sizes)

    def above(self, max_bytes: int) -> str:
        """Says that not even the first payload fits into so many bytes."""
        records = f" with {self.records.length} bytes of records" if self.records else ""
        return f"{self.place(0)}{records} takes {self.sizes[0]} bytes, more than {max_bytes}"

    def place(self, number: int) -> str:
        """Where the payload of a number from 0 belongs, for messages."""
        iteration, part = divmod(number, self.parts)
        return f"iteration {iteration + 1}" + (f", part {part + 1}" if self.parts > 1 else "")

    def _fixed_size(self, version: int) -> int:
        """Bytes before the first payload without the entries of payloads, in a version."""
        own = {RAW_VERSION: 1, CODED_VERSION: len(self.context) + 1, PARTS_VERSION: len(self.context) + PARTS.size}
        records = len(varint(self.records.length)) + 4 + self.records.length if self.records else 0
        level = int(self.level is not None)
        return len(MAGIC) + 1 + SIZES.size + SHAPE.size + len(self.weights) + own[version] + level + records + 4

    def _entry_sizes(self) -> list[int]:
        """Bytes of each entry in this header."""
        if self.version >= PARTS_VERSION:
            return [len(varint(2 * entry.length)) + 2 for entry in self.entries]
        width = length_size(self.raw_length)
        return [5 + (width if entry.coding != RAW else 0) for entry in self.entries]


def write_header(header: Header) -> bytes:
    """Serializes a header to bytes."""
    name = header.weights.encode("ascii")
    data = MAGIC + bytes([header.version]) + SIZES.pack(header.width, header.height, header.fingerprint)
    if header.version >= CODED_VERSION:
        data += header.context
    data += SHAPE.pack(header.stride, header.bits, len(name)) + name
    if header.version >= PARTS_VERSION:
        coding = max(entry.coding for entry in header.entries)
        flags = MAPS * header.maps + RECORDS * (header.records is not None) + INTEGERS * (header.level is not None)
        data += PARTS.pack(coding, header.parts, flags, len(header.entries))
        if header.level is not None:
            data += bytes([header.level])
        for entry in header.entries:
            data += varint(2 * entry.length + (entry.coding != RAW)) + entry.checksum.to_bytes(2)
        if header.records:
            data += varint(header.records.length) + header.records.checksum.to_bytes(4)
        return data + zlib.crc32(data).to_bytes(4)
    data += bytes([len(header.entries)])
    for entry in header.entries:
        data += bytes([entry.coding])
        if entry.coding != RAW:  # the geometry gives the length of raw bits
            data += entry.length.to_bytes(length_size(header.raw_length))
        data += entry.checksum.to_bytes(4)
    return data + zlib.crc32(data).to_bytes(4)


def read_header(data: bytes) -> Header:
    """Reads the header of a file, of an image of any size, and ignores what follows.

    Raises:
        FormatError: not an .rnc file, of a later version, or the header is cut short or corrupt.
    """
    if not data or data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise FormatError("not an rnc file")
    file = io.BytesIO(data)
    take = taker(file, "the header is")
    version = take(len(MAGIC) + 1)[-1]
    # Checked first, because only the first five bytes are the same in every version.
    if not RAW_VERSION <= version <= PARTS_VERSION:
        raise FormatError(f"version {version} of the format needs a newer version of this program")
    width, height, fingerprint = SIZES.unpack(take(SIZES.size))
    context = take(8) if version >= CODED_VERSION else bytes(8)
    stride, bits, name_length = SHAPE.unpack(take(SHAPE.size))
    name = take(name_length)
    # The width of the lengths follows from the geometry, so zeros are refused before the checksum is known.
    if 0 in (width, height, stride, bits):
        raise FormatError("the header is corrupt")
    coding, parts, flags, entries, records, level = RAW, 1, 0, list[Entry](), None, None
    if version >= PARTS_VERSION:
        coding, parts, flags, count = PARTS.unpack(take(PARTS.size))
        if count > MAX_ITERATIONS * MAX_PARTS:
            raise FormatError("the header is corrupt")
        level = take(1)[0] if flags & INTEGERS else None
        for _ in range(count):
            coded = take_varint(take)
            entries.append(Entry(coding if coded % 2 else RAW, coded // 2, int.from_bytes(take(2))))
        if flags & RECORDS:
            records = Entry(RAW, take_varint(take), int.from_bytes(take(4)))
    else:
        raw = raw_length(width, height, stride, bits)
        for _ in range(take(1)[0]):
            own = take(1)[0]
            length = raw if own == RAW else int.from_bytes(take(length_size(raw)))
            entries.append(Entry(own, length, int.from_bytes(take(4))))
    checksum = zlib.crc32(data[: file.tell()])
    if int.from_bytes(take(4)) != checksum:
        raise FormatError("the header is corrupt")
    if flags > MAPS + RECORDS + INTEGERS:
        raise FormatError(f"flags {flags} in the header need a newer version of this program")
    header = Header(
        width,
        height,
        fingerprint,
        name.decode("latin-1"),
        stride,
        bits,
        tuple(entries),
        context,
        parts,
        bool(flags & MAPS),
        records,
        level,
    )
    if header.version != version or write_header(header) != data[: file.tell()]:  # each file has only one valid header
        raise FormatError(f"the header is not as it must be in version {version} of the format")
    return header
