"""Reads and writes the .rnc file that FORMAT.md specifies: a header, then payloads, one or more for each iteration."""

import binascii
import io
import itertools
import operator
import re
import struct
import zlib
from dataclasses import dataclass, replace

from rnncodec.files.codings import CODINGS, CONTEXT, RAW, least_length, length_size, raw_length
from rnncodec.files.errors import FormatError
from rnncodec.files.fields import take_varint, taker, varint
from rnncodec.files.records import MAX_BLOCK, unpack

MAGIC = b"\x8fRNC"  # a first byte above 0x7f is neither ASCII nor the start of UTF-8: no text editor claims the file
# Of files whose payloads are all raw, of others with one payload for each iteration, and of all that can hold more.
RAW_VERSION, CODED_VERSION, PARTS_VERSION = 1, 2, 3
MAX_ITERATIONS = 255  # a byte in the header
MAX_PARTS = 16  # payloads of one iteration
MAPS, RECORDS = 1, 2  # flags of files with stop maps, and with a block of records
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
        if self.parts > 1 or self.maps or self.records is not None:
            return PARTS_VERSION
        return RAW_VERSION if all(entry.coding == RAW for entry in self.entries) else CODED_VERSION

    @property
    def iterations(self) -> int:
        """Number of iterations, of which the last may lack some of its parts."""
        return _ceil(len(self.entries), self.parts)

    @property
    def ends(self) -> tuple[int, ...]:
        """Number of payloads up to the end of iteration 1, 2, ..."""
        return tuple(
            min(end, len(self.entries)) for end in range(self.parts, len(self.entries) + self.parts, self.parts)
        )

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
        """Bytes of a raw payload, the most bytes of one if there are parts or maps; no payload exceeds it."""
        return raw_length(self.width, self.height, self.stride, self.bits // self.parts, self.maps)

    def least_length(self, number: int) -> int:
        """The fewest bytes that the payload of a number from 0 can have, by its coding and the geometry."""
        (iteration, part), locations = divmod(number, self.parts), self.rows * self.cols
        asked = locations if iteration == 1 else 1  # who has stopped before the third iteration is not known
        flags = asked if self.maps and iteration and not part else 0
        sent = 1 if self.maps and iteration else locations
        return least_length(self.entries[number].coding, sent, self.bits // self.parts, flags)

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
        return len(MAGIC) + 1 + SIZES.size + SHAPE.size + len(self.weights) + own[version] + records + 4

    def _entry_sizes(self) -> list[int]:
        """Bytes of each entry in this header."""
        if self.version >= PARTS_VERSION:
            return [len(varint(2 * entry.length)) + 2 for entry in self.entries]
        width = length_size(self.raw_length)
        return [5 + (width if entry.coding != RAW else 0) for entry in self.entries]


@dataclass(frozen=True)
class Container:
    """A header and its payloads, fewer than its entries if the file was cut or fewer were asked for.

    `records` is the block as it is in the file, empty if there is none or the file was cut within it.
    """

    header: Header
    payloads: tuple[bytes, ...]
    records: bytes = b""


def write(container: Container) -> bytes:
    """Serializes a file to bytes.

    Raises:
        FormatError: the payloads or the records are not those that the header describes.
    """
    header, payloads, block = container.header, container.payloads, container.records
    if header.records != (Entry.of(block) if block else None):
        raise FormatError("the records are not those that the header describes")
    if len(payloads) != len(header.entries) or any(
        Entry.of(payload, entry.coding, header.version) != entry
        for payload, entry in zip(payloads, header.entries, strict=True)
    ):
        raise FormatError("the payloads are not those that the header describes")
    return write_header(header) + block + b"".join(payloads)


def write_header(header: Header) -> bytes:
    """Serializes a header to bytes."""
    name = header.weights.encode("ascii")
    data = MAGIC + bytes([header.version]) + SIZES.pack(header.width, header.height, header.fingerprint)
    if header.version >= CODED_VERSION:
        data += header.context
    data += SHAPE.pack(header.stride, header.bits, len(name)) + name
    if header.version >= PARTS_VERSION:
        coding = max(entry.coding for entry in header.entries)
        flags = MAPS * header.maps + RECORDS * (header.records is not None)
        data += PARTS.pack(coding, header.parts, flags, len(header.entries))
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
    coding, parts, flags, entries, records = RAW, 1, 0, list[Entry](), None
    if version >= PARTS_VERSION:
        coding, parts, flags, count = PARTS.unpack(take(PARTS.size))
        if count > MAX_ITERATIONS * MAX_PARTS:
            raise FormatError("the header is corrupt")
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
    if flags > MAPS + RECORDS:
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
    )
    if header.version != version or write_header(header) != data[: file.tell()]:  # each file has only one valid header
        raise FormatError(f"the header is not as it must be in version {version} of the format")
    return header


def read(data: bytes, *, max_pixels: int, iterations: int | None = None) -> Container:
    """Reads a file; one that was cut after its header gives its complete payloads.

    Nothing is allocated from the lengths in the header, which are only compared with the bytes that are there.

    Args:
        data: the file.
        max_pixels: files of larger images are refused.
        iterations: read and check the payloads of at most so many, and ignore what follows; None reads all.

    Returns:
        The header as it is, and the payloads, each with the right checksum; possibly none.

    Raises:
        FormatError: as in `read_header`; or a payload or the block of records is corrupt, a payload needs a newer
            version of this program, the image is too large, or bytes follow the last payload.
        ValueError: iterations is less than 1.
    """
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    header = read_header(data)
    if header.width * header.height > max_pixels:
        size = f"{header.width}x{header.height}"
        raise FormatError(f"{size} pixels are above the limit of {max_pixels}; raise max_pixels to decode it")
    block = _block(data, header)
    payloads = _payloads(data, header, None if iterations is None else iterations * header.parts)
    for number, entry in enumerate(header.entries[: len(payloads)]):
        if entry.coding not in CODINGS:
            place = header.place(number)
            raise FormatError(f"coding {entry.coding} of {place} needs a newer version of this program")
    return Container(header, payloads, block)


def read_records(data: bytes) -> dict[str, bytes]:
    """The records of a file by type, such as `EXIF` (without the prefix of JPEG) and `XMP `; often there are none.

    Raises:
        FormatError: as in `read_header`; or the file is cut within the records, or they are corrupt or too large.
    """
    header = read_header(data)
    block = _block(data, header)
    if header.records and not block:
        raise FormatError("the file is cut within its records and has no complete iteration")
    return unpack(block)


def truncate(data: bytes, *, iterations: int | None = None, max_bytes: int | None = None, strip: bool = False) -> bytes:
    """Shortens a file to its first iterations or parts of them, byte for byte the file that encoding so much gives.

    Works on cut files, and on codings that this version cannot decode. With neither limit, all complete payloads are
    kept, which makes a whole file of a cut one.

    Args:
        data: the file.
        iterations: how many to keep.
        max_bytes: or keep as many payloads as fit in so many bytes, header and records included.
        strip: whether to leave out the records.

    Raises:
        FormatError: as in `read_header`; or what is to be kept is corrupt, there are not enough complete iterations, or
            not even one payload fits.
        ValueError: both limits are given.
    """
    if iterations is not None and max_bytes is not None:
        raise ValueError("give iterations or max_bytes, not both")
    header = read_header(data)
    ends = itertools.accumulate((entry.length for entry in header.entries), initial=header.size)
    keep = complete = sum(end <= len(data) for end in ends) - 1
    if complete < 1:
        raise FormatError(f"no complete {'part of an ' if header.parts > 1 else ''}iteration")
    if iterations is not None:
        whole = complete // header.parts
        if not 1 <= iterations <= whole:
            raise FormatError(f"cannot keep {iterations} iterations of {whole} complete ones")
        keep = iterations * header.parts
    kept = replace(header, records=None) if strip else header
    if max_bytes is not None:
        keep = sum(size <= max_bytes for size in kept.sizes[:complete])
        if keep < 1:
            raise FormatError(kept.above(max_bytes))
    block = b"" if strip else _block(data, header)
    payloads = _payloads(data, header, keep)
    kept = kept.shortened(keep)
    # Without records, the version may be another one, with other checksums.
    entries = (
        Entry.of(payload, entry.coding, kept.version) for payload, entry in zip(payloads, kept.entries, strict=True)
    )
    return write(Container(replace(kept, entries=tuple(entries)), payloads, block))


def _block(data: bytes, header: Header) -> bytes:
    """The block of records with a checked checksum, empty if there is none or the file is cut within it."""
    if header.records is None:
        return b""
    block = data[header.size - header.records.length : header.size]
    if len(block) < header.records.length:
        return b""
    if Entry.of(block) != header.records:
        raise FormatError("the records are corrupt")
    return block


def _payloads(data: bytes, header: Header, count: int | None) -> tuple[bytes, ...]:
    """At most `count` complete payloads of any coding, with checked checksums."""
    payloads = []
    end = header.size
    for number, entry in enumerate(header.entries[:count]):
        start, end = end, end + entry.length
        if end > len(data):
            break
        payload = data[start:end]
        if Entry.of(payload, entry.coding, header.version) != entry:
            raise FormatError(f"{header.place(number)} is corrupt")
        payloads.append(payload)
    if len(payloads) == len(header.entries) and end < len(data):
        raise FormatError(f"{len(data) - end} bytes follow the last iteration")
    return tuple(payloads)


def _ceil(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)
