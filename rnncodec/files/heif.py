"""What AVIF and HEIC files say of their main picture: its colors, and whether it is stored turned."""

import io
from collections.abc import Iterator
from typing import BinaryIO

from rnncodec.files.av1 import code_points
from rnncodec.files.boxes import Box, boxes, top_box
from rnncodec.files.profiles import SRGB, Space, space_of_code_points

MAX_START = 1024  # bytes of a coded picture among which the header of its stream is
IN_FILE, IN_BOX = 0, 1  # where a coded picture is: in the file, or in the box `idat`


class _Numbers(io.BytesIO):
    """Whole numbers one after the other."""

    def take(self, size: int) -> int:
        """The number in the next bytes.

        Raises:
            EOFError: there are not so many.
        """
        data = self.read(size)
        if len(data) < size:
            raise EOFError
        return int.from_bytes(data)


def heif_space(file: BinaryIO) -> Space:
    """The color space that a file states by code points, in a box (`nclx`) or in its AV1 stream; sRGB if in neither.

    Raises:
        ImageError: the space is not supported, for example because it is HDR.
    """
    try:
        found = _code_points(file, _meta(file))
    except EOFError:
        found = None
    return space_of_code_points(*found) if found else SRGB


def heif_is_turned(file: BinaryIO) -> bool:
    """Whether decoders turn or mirror the main picture."""
    return any(kind == b"imir" or (kind == b"irot" and value[:1] > b"\0") for kind, value in _main(file))


def heif_has(file: BinaryIO, wanted: bytes) -> bool:
    """Whether the main picture has a property of a kind."""
    return any(kind == wanted for kind, _ in _main(file))


def _main(file: BinaryIO) -> list[Box]:
    """The properties of the main picture, none if they are corrupt."""
    try:
        meta = _meta(file)
        return list(_properties(meta, _items(meta)[0]))
    except EOFError:
        return []


def _meta(file: BinaryIO) -> dict[bytes, bytes]:
    """The boxes that describe what a file holds, by type."""
    return dict(boxes((top_box(file, b"meta") or b"")[4:]))


def _items(meta: dict[bytes, bytes]) -> list[int]:
    """The number of the main item, then that of the first of which it is made if it is, for example, a grid."""
    pitm, iref = _Numbers(meta.get(b"pitm", b"")), meta.get(b"iref", b"")
    found = [pitm.take(4 if pitm.take(4) >> 24 else 2)]
    for kind, body in boxes(iref[4:]):
        reference, size = _Numbers(body), 4 if iref[0] else 2
        if kind == b"dimg" and reference.take(size) == found[0] and reference.take(2):
            found.append(reference.take(size))
            break
    return found


def _properties(meta: dict[bytes, bytes], item: int) -> Iterator[Box]:
    """The properties of an item."""
    parts = list(boxes(meta.get(b"iprp", b"")))
    container = [box for kind, body in parts if kind == b"ipco" for box in boxes(body)]
    for body in (body for kind, body in parts if kind == b"ipma"):
        numbers = _Numbers(body)
        head = numbers.take(4)  # version and flags
        long, wide = head >> 24, head & 1
        for _ in range(numbers.take(4)):
            owner = numbers.take(4 if long else 2)
            for _ in range(numbers.take(1)):
                index = numbers.take(2) & 0x7FFF if wide else numbers.take(1) & 0x7F
                if owner == item and 0 < index <= len(container):
                    yield container[index - 1]


def _code_points(file: BinaryIO, meta: dict[bytes, bytes]) -> tuple[int, int] | None:
    """Primaries and transfer of the main picture."""
    properties = {item: list(_properties(meta, item)) for item in _items(meta)}
    for kind, value in (box for found in properties.values() for box in found):
        if kind == b"colr" and value[:4] == b"nclx":
            numbers = _Numbers(value[4:])
            return numbers.take(2), numbers.take(2)
    for item, found in properties.items():
        for kind, value in found:
            if kind == b"av1C":
                return code_points(value[4:]) or code_points(_start(file, meta, item))
    return None


def _start(file: BinaryIO, meta: dict[bytes, bytes], wanted: int) -> bytes:
    """The first bytes of a coded picture, none if it is not in the file."""
    numbers = _Numbers(meta.get(b"iloc", b""))
    version, sizes = numbers.take(4) >> 24, numbers.take(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    index_size = index_size if version else 0
    for _ in range(numbers.take(2 if version < 2 else 4)):
        item = numbers.take(2 if version < 2 else 4)
        method = numbers.take(2) & 15 if version else IN_FILE
        elsewhere, base, extents = numbers.take(2), numbers.take(base_size), numbers.take(2)
        if item == wanted and extents and not elsewhere and method in (IN_FILE, IN_BOX):
            numbers.take(index_size)
            place = base + numbers.take(offset_size)
            length = min(numbers.take(length_size) or MAX_START, MAX_START)  # 0 stands for the whole
            if method == IN_BOX:
                return meta.get(b"idat", b"")[place : place + length]
            if place < 2**63:
                file.seek(place)
                return file.read(length)
        numbers.seek(extents * (index_size + offset_size + length_size), io.SEEK_CUR)
    return b""
