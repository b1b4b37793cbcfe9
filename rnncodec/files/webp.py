"""Sees how large WebP files are, before Pillow, which has a limit of its own, does."""

import io
from typing import BinaryIO

from rnncodec.files.errors import ImageError

MAX_HEADER = 30  # bytes among which the sides are
KIND = 16  # bytes, up to the type of the first chunk


def webp_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height that the first chunk of a seekable WebP file states.

    Raises:
        ImageError: it states none.
    """
    file.seek(0)
    header = file.read(MAX_HEADER).ljust(MAX_HEADER, b"\0")
    kind, body = header[12:KIND], header[KIND + 4 :]
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L" and body[0] == 0x2F:
        sides = int.from_bytes(body[1:5], "little")
        return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise ImageError("the header of the WebP file is missing")


class ShortReads(io.BytesIO):
    """A file that gives few bytes at once, unless all are wanted.

    Pillow's plugin reads the header first, and refuses sides above a limit which is a global variable. In a header that
    ends before the sides it finds none to refuse.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, KIND))
