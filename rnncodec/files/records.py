"""Packs what a photograph says of itself, such as EXIF and XMP, into the block of records of an .rnc file, and back."""

import io
import re
import zlib
from collections.abc import Mapping

from rnncodec.files.errors import FormatError
from rnncodec.files.fields import take_varint, taker, varint

EXIF, XMP = "EXIF", "XMP "  # the types that programs know; others are kept, but not used
TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ]{3}")
MAX_BLOCK = 2**20  # of a block, deflated and inflated
MAX_RECORDS = 255


def pack(records: Mapping[str, bytes]) -> bytes:
    """Packs records by type, four letters, digits or spaces, in the order of the types; without records it is empty.

    Raises:
        FormatError: a type is not as above, a record is not bytes, or they are too many or too large.
    """
    if not records:
        return b""
    if len(records) > MAX_RECORDS:
        raise FormatError(f"{len(records)} records are above the limit of {MAX_RECORDS}")
    parts = list[bytes]()
    for kind, value in sorted(records.items(), key=lambda record: str(record[0])):
        _check(kind)
        if not isinstance(value, bytes):
            raise FormatError(f"a record is bytes, not {type(value).__name__}")
        parts += kind.encode("ascii"), varint(len(value)), value
    size = sum(map(len, parts))
    if size <= MAX_BLOCK:
        block = zlib.compress(b"".join(parts), 9)
        size = len(block)
        if size <= MAX_BLOCK:
            return block
    raise FormatError(f"{size} bytes of records are above the limit of {MAX_BLOCK}")


def unpack(block: bytes) -> dict[str, bytes]:
    """Undoes `pack`, for blocks from anywhere, and never inflates more than `MAX_BLOCK`.

    Raises:
        FormatError: the block is too large or is not what `pack` writes.
    """
    records = dict[str, bytes]()
    if not block:
        return records
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(block, MAX_BLOCK + 1)
    except zlib.error as error:
        raise FormatError("the records cannot be inflated") from error
    if max(len(plain), len(block)) > MAX_BLOCK:
        raise FormatError(f"the records take more than {MAX_BLOCK} bytes")
    if not plain or not inflate.eof or inflate.unused_data:
        raise FormatError("the records do not end where they must")
    file = io.BytesIO(plain)
    take = taker(file, "a record is")
    while file.tell() < len(plain):
        kind = take(4).decode("latin-1")
        _check(kind)
        if kind in records:
            raise FormatError(f"there are two records {kind!r}")
        if len(records) == MAX_RECORDS:
            raise FormatError(f"there are more than {MAX_RECORDS} records")
        records[kind] = take(take_varint(take))
    return records


def _check(kind: object) -> None:
    if not (isinstance(kind, str) and TYPE.fullmatch(kind)):
        raise FormatError(f"the type of a record is four letters, digits or spaces, not {kind!a}")
