"""Reads and writes the .rnc file that FORMAT.md specifies: a header, then payloads, one or more for each iteration."""

import itertools
from dataclasses import dataclass, replace

from rnncodec.files.codings import CODINGS, CONTEXT, RAW
from rnncodec.files.errors import FormatError
from rnncodec.files.header import (
    MAGIC,
    MAX_ITERATIONS,
    MAX_PARTS,
    NAME_PATTERN,
    PARTS_VERSION,
    RAW_VERSION,
    Entry,
    Header,
    read_header,
    write_header,
)
from rnncodec.files.records import unpack

__all__ = [
    "CODINGS",
    "CONTEXT",
    "MAGIC",
    "MAX_ITERATIONS",
    "MAX_PARTS",
    "NAME_PATTERN",
    "PARTS_VERSION",
    "RAW",
    "RAW_VERSION",
    "Container",
    "Entry",
    "FormatError",
    "Header",
    "read",
    "read_header",
    "read_records",
    "truncate",
    "write",
    "write_header",
]


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
