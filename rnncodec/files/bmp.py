"""What the header of a BMP file says of its colors."""

import struct
from typing import BinaryIO

from rnncodec.files.profiles import SRGB, Chromaticities, Curve, Space

HEADER, V4, V5 = 14, 108, 124  # bytes of the file's header, and of those of versions 4 and 5
CALIBRATED, EMBEDDED = 0, int.from_bytes(b"MBED")
MAX_PROFILE = 2**24


def bmp_space(file: BinaryIO) -> bytes | Space:
    """The ICC profile or the calibrated color space of a seekable BMP file, sRGB if it states none that is possible."""
    file.seek(HEADER)
    header = file.read(V5)
    size = int.from_bytes(header[:4], "little")
    if len(header) < V4 or size < V4:
        return SRGB
    kind = int.from_bytes(header[56:60], "little")
    if kind == CALIBRATED:
        points = struct.unpack("<9I", header[60:96])
        gammas = [gamma / 2**16 for gamma in struct.unpack("<3I", header[96:108])]
        primaries = [points[start : start + 3] for start in (0, 3, 6)]
        white = [sum(column) for column in zip(*primaries, strict=True)]
        if all(map(sum, [*primaries, white])) and min(gammas) > 0:  # most files have zeros here
            x_y = [(x / (x + y + z), y / (x + y + z)) for x, y, z in [*primaries, white]]
            return Space(Chromaticities(*x_y), Curve(sum(gammas) / 3))
    if kind == EMBEDDED and size >= V5:
        start, length = struct.unpack("<II", header[112:120])
        if length <= MAX_PROFILE:
            file.seek(HEADER + start)
            return file.read(length)
    return SRGB
