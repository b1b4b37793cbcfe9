"""The boxes of JPEG 2000, JPEG XL, AVIF and HEIC files, and what the first two say in them of their picture."""

import io
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from rnncodec.files.errors import ImageError
from rnncodec.files.profiles import SRGB, Chromaticities, Curve, Space

J2K, MAX_SIZ = b"\xff\x4f\xff\x51", 1024  # the start of a codestream of JPEG 2000, and of its header
MAX_BOX = 2**24  # of a box of metadata; a longer one is not read
ROMM = Space(Chromaticities((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585)), Curve(1.8))
MAX_JXL = 64  # bytes of the header of JPEG XL
JXL_RATIOS = (None, (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # of width to height
# The enumerated color spaces of JPEG 2000 that its decoder hands on as sRGB, gray or CMYK, and those that it does not.
PLAIN_JP2, SYCC, ROMM_JP2 = {0, 12, 15, 16, 17}, 18, 21


class Box(NamedTuple):
    """The type and the content of a box."""

    kind: bytes
    body: bytes


def boxes(data: bytes) -> Iterator[Box]:
    """The boxes that follow on one another in the content of a box, up to the first that is not whole."""
    file = io.BytesIO(data)
    while (head := _head(file)) is not None:
        kind, length = head
        body = file.read(len(data) if length is None else length)
        if length is not None and len(body) < length:
            return
        yield Box(kind, body)


def top_box(file: BinaryIO, wanted: bytes, start: int | None = None) -> bytes | None:
    """The content of the first box of a kind in a seekable file, or the start of it.

    Without a number of bytes for the start, the whole; None if there is no such box or it is too long.
    """
    file.seek(0)
    for _ in range(1000):
        if (head := _head(file)) is None:
            return None
        kind, length = head
        if kind == wanted and start is not None:
            return file.read(start)
        if kind == wanted:
            return file.read(length) if length is not None and length <= MAX_BOX else None
        if length is None:
            return None
        file.seek(length, io.SEEK_CUR)
    return None


def _head(file: BinaryIO) -> tuple[bytes, int | None] | None:
    """The type of the next box and the length of its content, None to the end of the file; None after the last one."""
    head = file.read(8)
    if len(head) < 8:
        return None
    length, kind = struct.unpack(">I4s", head)
    if length == 0:
        return kind, None
    if length == 1:
        long = file.read(8)
        length = int.from_bytes(long) - 8 if len(long) == 8 else 0
    return (kind, length - 8) if 8 <= length < 2**63 else None


def jp2_space(file: BinaryIO) -> bytes | Space:
    """The ICC profile or the color space that a JPEG 2000 file states, sRGB if it states none.

    Raises:
        ImageError: the space is not supported.
    """
    for kind, body in boxes(top_box(file, b"jp2h") or b""):
        if kind == b"colr" and len(body) >= 7:
            if body[0] in (2, 3):
                return body[3:]
            if body[0] == 1:
                number = int.from_bytes(body[3:7])
                if number == ROMM_JP2:
                    return ROMM
                if number not in PLAIN_JP2 | {SYCC}:
                    raise ImageError(f"the color space {number} of JPEG 2000 is not supported")
                return SRGB
    return SRGB


def jp2_bits(file: BinaryIO) -> int:
    """Bits of the samples of a seekable JPEG 2000 file, by the header of its codestream.

    Raises:
        ImageError: the header is missing, or its samples are signed or of several sizes.
    """
    file.seek(0)
    start = file.read(MAX_SIZ)
    if not start.startswith(J2K):
        start = top_box(file, b"jp2c", MAX_SIZ) or b""
    count = int.from_bytes(start[40:42])
    kinds = set(start[42 : 42 + 3 * count : 3])
    if not start.startswith(J2K) or len(kinds) != 1 or max(kinds) > 0x7F:
        raise ImageError("the samples of the JPEG 2000 file are signed or of several sizes, which is not supported")
    return kinds.pop() + 1


def jxl_header(file: BinaryIO) -> tuple[int, int, int]:
    """Width, height and orientation, numbered as in EXIF, that the header of a seekable JPEG XL file states.

    Raises:
        ImageError: there is no such header, or it is of an animation.
    """
    file.seek(0)
    start = file.read(MAX_JXL)
    if not start.startswith(b"\xff\x0a"):
        whole, part = top_box(file, b"jxlc", MAX_JXL), top_box(file, b"jxlp", MAX_JXL + 4)
        start = whole if whole is not None else (part or b"")[4:]
    if not start.startswith(b"\xff\x0a"):
        raise ImageError("the header of the JPEG XL file is missing")
    bits = int.from_bytes(start[2:], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    def size(small: Callable[[], int], large: Callable[[], int]) -> tuple[int, int]:
        side = small if take(1) else large
        height = side()
        ratio = JXL_RATIOS[take(3)]
        return height * ratio[0] // ratio[1] if ratio else side(), height

    def whole_size() -> tuple[int, int]:
        return size(lambda: 8 * (take(5) + 1), lambda: take((9, 13, 18, 30)[take(2)]) + 1)

    width, height = whole_size()
    orientation = 1
    if not take(1) and take(1):  # not everything is usual, and there is more
        orientation += take(3)
        if take(1):  # the size for which the picture is meant
            whole_size()
        if take(1):  # a preview
            size(lambda: take((0, 0, 5, 9)[take(2)]), lambda: take((6, 8, 10, 12)[take(2)]))
        if take(1):  # its decoder gives the last picture
            raise ImageError("an animation in JPEG XL, of which the first picture cannot be read")
    return width, height, orientation
