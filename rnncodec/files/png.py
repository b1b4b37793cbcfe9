"""What a PNG file says besides its pixels: color, EXIF, XMP, and whether it is animated."""

import io
import struct
import zlib
from typing import BinaryIO, NamedTuple

from rnncodec.files.errors import ImageError
from rnncodec.files.metadata import PREFIX
from rnncodec.files.profiles import SRGB, Chromaticities, Curve, Space, space_of_code_points

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
COLOR = {b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM"}
READ = {b"tRNS", b"eXIf", b"acTL", b"tEXt", b"zTXt", b"iTXt"} | COLOR
MAX_CHUNK = 2**24  # of a chunk other than pixels, stored or inflated; longer ones are not read
KEY_SIZES = {0: 2, 2: 6}  # bytes of a transparent gray or color, by type of color
RAW_EXIF = "Raw profile type exif"  # a text that ImageMagick writes, and Pillow reads
XMP_KEYWORD = b"XML:com.adobe.xmp"


class Png(NamedTuple):
    """A PNG file of nothing but pixels, and what was left out of it.

    Attributes:
        file: all that a decoder of pixels needs.
        depth: bits per sample.
        color: the type of color, as in the header.
        key: the samples of the transparent gray or color, as stored.
        space: the ICC profile or the space of the colors.
        info: EXIF and XMP by the names that Pillow gives them.
    """

    file: io.BytesIO
    depth: int
    color: int
    key: tuple[int, ...] | None
    space: bytes | Space
    info: dict[str, bytes | str]


def read_png(file: BinaryIO, limit: int, lost: list[str]) -> Png:
    """Reads a PNG file; what is corrupt besides the pixels is named in `lost`.

    Args:
        file: seekable, at its start.
        limit: the largest number of bytes that may be kept.
        lost: what could not be read or is not kept.

    Raises:
        ImageError: the file has more bytes than that, is no PNG file, or has colors that are not supported.
    """
    kept, chunks = io.BytesIO(), dict[bytes, bytes]()
    texts = dict[bytes, tuple[bytes, bytes]]()
    kept.write(file.read(len(SIGNATURE)))
    header = b""
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in PIXELS:
            if kept.tell() + length > limit:
                raise ImageError(f"more than {limit} bytes")
            body = file.read(length + 4)
            kept.write(head + body)
            if kind == b"IHDR":
                header = header or body
            if kind == b"IEND":
                break
        elif kind not in READ:
            file.seek(length + 4, io.SEEK_CUR)
        elif (body := _checked(file, kind, length, lost)) is not None:
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                keyword, _, rest = body.partition(b"\0")
                if keyword in (XMP_KEYWORD, RAW_EXIF.encode()):
                    texts.setdefault(keyword, (kind, rest))
            elif kind == b"tRNS" and len(header) >= 13 and header[9] == 3:
                kept.write(head + body + struct.pack(">I", zlib.crc32(kind + body)))
            else:
                chunks.setdefault(kind, body)
    if len(header) < 13:
        raise ImageError("the header of the PNG file is missing")
    kept.seek(0)
    depth, color = header[8], header[9]
    key = None
    if color in KEY_SIZES and b"tRNS" in chunks:
        if len(chunks[b"tRNS"]) == KEY_SIZES[color]:
            key = struct.unpack(f">{KEY_SIZES[color] // 2}H", chunks[b"tRNS"])
        else:
            lost.append("transparency ignored: it is corrupt")
    info = _metadata(texts, lost)
    if b"eXIf" in chunks:
        info["exif"] = PREFIX + chunks[b"eXIf"].removeprefix(PREFIX)
    if len(frames := chunks.get(b"acTL", b"")) == 8 and struct.unpack(">I4x", frames)[0] > 1:
        lost.append("only the first of several images is kept")
    return Png(kept, depth, color, key, _color(chunks, lost), info)


def _checked(file: BinaryIO, kind: bytes, length: int, lost: list[str]) -> bytes | None:
    """The content of a chunk, None if it is corrupt or too long."""
    name = kind.decode()
    if length > MAX_CHUNK:
        file.seek(length + 4, io.SEEK_CUR)
        lost.append(f"the chunk {name} is ignored: {length} bytes are above the limit of {MAX_CHUNK}")
        return None
    body, check = file.read(length), file.read(4)
    if check != struct.pack(">I", zlib.crc32(kind + body)):
        lost.append(f"the chunk {name} is ignored: its checksum is wrong")
        return None
    return body


def _metadata(texts: dict[bytes, tuple[bytes, bytes]], lost: list[str]) -> dict[str, bytes | str]:
    """EXIF and XMP among chunks of text, by keyword; other texts are not for us."""
    info = dict[str, bytes | str]()
    if XMP_KEYWORD in texts:
        kind, rest = texts[XMP_KEYWORD]
        parts = rest[2:].split(b"\0", 2)  # language, keyword in that language, text
        text = parts[2] if kind == b"iTXt" and len(parts) == 3 else None
        if text is not None and rest[0]:
            text = inflate(text)
        if text:
            info["xmp"] = text
        else:
            lost.append("XMP left out: it is corrupt")
    if RAW_EXIF.encode() in texts:
        kind, rest = texts[RAW_EXIF.encode()]
        text = inflate(rest[1:]) if kind == b"zTXt" else rest if kind == b"tEXt" else None
        if text is None:
            lost.append("EXIF left out: it is corrupt")
        else:
            info[RAW_EXIF] = text.decode("latin-1")
    return info


def inflate(data: bytes) -> bytes | None:
    """Undoes zlib's compression, None if the data is corrupt or would become larger than `MAX_CHUNK`."""
    decompress = zlib.decompressobj()
    try:
        plain = decompress.decompress(data, MAX_CHUNK)
    except zlib.error:
        return None
    return plain if decompress.eof else None


def _color(chunks: dict[bytes, bytes], lost: list[str]) -> bytes | Space:
    """The color, by the precedence of the specification: cICP, iCCP, sRGB, then gAMA with cHRM."""
    if len(code := chunks.get(b"cICP", b"")) == 4:
        primaries, transfer, matrix, full_range = code
        if matrix or not full_range:
            raise ImageError("its colors (cICP) are not RGB of full range")
        return space_of_code_points(primaries, transfer)
    if b"iCCP" in chunks:
        profile = inflate(chunks[b"iCCP"].partition(b"\0")[2][1:])
        if profile is not None:
            return profile
        lost.append("color profile ignored: it is corrupt")
        return SRGB
    if b"sRGB" in chunks:
        return SRGB
    chromaticities, curve = SRGB
    if len(gamma := chunks.get(b"gAMA", b"")) == 4:
        exponent = int.from_bytes(gamma) / 100_000
        # 1 / 2.2 is how files without the chunk sRGB say that they are sRGB.
        if exponent and abs(exponent * 2.2 - 1) >= 0.05:
            curve = Curve(1 / exponent)
    if len(points := chunks.get(b"cHRM", b"")) == 32:
        white, red, green, blue = ((x / 100_000, y / 100_000) for x, y in struct.iter_unpack(">II", points))
        chromaticities = Chromaticities(red, green, blue, white)
    return Space(chromaticities, curve)
