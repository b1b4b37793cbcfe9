"""Opens image files of any kind, without decoding their pixels where the format allows it."""

import io
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import BinaryIO

from PIL import Image, PngImagePlugin

from rnncodec.files import tiff
from rnncodec.files.bmp import bmp_space
from rnncodec.files.boxes import jp2_bits, jp2_space, jxl_header
from rnncodec.files.errors import ImageError, one_line
from rnncodec.files.heif import heif_has, heif_is_turned, heif_space
from rnncodec.files.jpeg import is_adobe_rgb, late_profile
from rnncodec.files.metadata import ORIENTATION, quiet
from rnncodec.files.png import read_png
from rnncodec.files.profiles import ADOBE_RGB, Space
from rnncodec.files.webp import ShortReads, webp_size

# Formats of photographs. Pillow's other plugins are left out: some run external programs, some accept any bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
# Formats that another package reads: its module, the class of its images, and the extra that installs it.
PACKAGES = {
    "HEIF": ("pillow_heif", "HeifImageFile", "heic"),
    "JXL": ("pillow_jxl.JpegXLImagePlugin", "JXLImageFile", "jxl"),
}
WHOLE = ("WEBP", "AVIF", *PACKAGES)  # read into memory as a whole
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
EXIF_ITEM, NO_ITEM = b"\0\0Exif", b"\0\0none"  # the end of an entry in an AVIF file's list of items
JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")

Factory = Callable[[BinaryIO, str], Image.Image]


@dataclass
class Picture:
    """An image whose pixels Pillow will decode, and what Pillow does not say of them.

    Args:
        image: opened; its pixels may be loaded or not.
        space: the ICC profile or the color space of the pixels; None for sRGB.
        low: an image of the lower bytes of 16-bit samples, of which `image` has the upper ones.
        planes: of 16-bit samples, where each is an image of its own, and `image` has only the upper bytes.
        key: the samples of the color that is transparent.
        premultiplied: whether the colors are multiplied by alpha.
        interleaved: whether the image is gray with alpha, of 16 bits each, as four bytes per pixel.
        bits: of each sample; Pillow shifts fewer than 8 to the left.
        frame: left, top, right and bottom of the pixels; the others are transparent. None for all.
        orientation: how the pixels are turned, by EXIF's numbers; None takes what the EXIF of the image says.
        turned: whether the decoder turns the stored pixels upright; None if it leaves that to us, as EXIF says.
        lost: what was not kept or is corrupt, each in one line.
    """

    image: Image.Image
    space: bytes | Space | None = None
    low: Image.Image | None = None
    planes: Sequence[Image.Image] = ()
    key: tuple[int, ...] | None = None
    premultiplied: bool = False
    interleaved: bool = False
    bits: int = 8
    frame: tuple[int, int, int, int] | None = None
    orientation: int | None = None
    turned: bool | None = None
    lost: list[str] = field(default_factory=list)


def open_picture(file: BinaryIO, max_pixels: int) -> Picture:
    """Opens an image of an allowed format and size.

    Image.open is not used, because its limit of pixels is a global variable, which belongs to the calling program.

    Raises:
        ImageError: the file is not an image, too large, or of colors that are not supported.
    """
    Image.init()
    if file.seekable():
        file.seek(0)
    prefix = file.read(32)
    reason = "not an image file, or of a format that is not supported" if prefix else "the file is empty"
    for name in (*FORMATS, *PACKAGES):
        accepted = _accepts(name, prefix)
        if isinstance(accepted, str):
            raise ImageError(accepted)  # this build of Pillow lacks the format
        if not accepted:
            continue
        if not file.seekable():
            file = _read_pipe(file, prefix, _most_bytes(max_pixels))
        if name in WHOLE and file.seek(0, io.SEEK_END) > _most_bytes(max_pixels):
            raise ImageError(f"more than {_most_bytes(max_pixels)} bytes")
        file.seek(0)
        try:
            picture = _OPEN.get(name, _open_plain)(file, name, max_pixels)
        except SyntaxError as error:  # Pillow's sign that the file is of another format after all
            detail = one_line(error)
            detail = f"compression {detail}" if detail.isdigit() else detail  # of TIFF; Pillow gives the bare number
            reason = f"the {name} file cannot be read: {detail}"
            continue
        return picture
    raise ImageError(reason)


def _accepts(name: str, prefix: bytes) -> bool | str:
    """Whether the first bytes of a file may be of a format, or why this format cannot be read."""
    if name == "HEIF":
        return prefix[4:8] == b"ftyp" and prefix[8:12] in HEIF_BRANDS
    if name == "JXL":
        return prefix.startswith(JXL_STARTS)
    accept = Image.OPEN[name][1]
    return accept is None or accept(prefix)


def _open_plain(file: BinaryIO, name: str, max_pixels: int) -> Picture:
    """Opens an image of a format that Pillow reads as it is."""
    image = _checked(Image.OPEN[name][0], file, max_pixels)
    picture = Picture(image, image.info.get("icc_profile"))
    if name == "JPEG" and picture.space is None:
        picture.space = late_profile(image) or (ADOBE_RGB if is_adobe_rgb(image) else None)
    tiles = getattr(image, "tile", ())
    if name == "GIF" and tiles and tiles[0].extents != (0, 0, *image.size):
        picture.frame = tiles[0].extents
    if "icc_profile" in image.info and picture.space is None:
        picture.lost.append("color profile ignored: it is corrupt")
    if name != "JPEG2000" and getattr(image, "is_animated", False):
        picture.lost.append("only the first of several images is kept")
    if name == "JPEG2000":
        picture.space, picture.bits = jp2_space(file), jp2_bits(file)
        if picture.bits > 8 and (image.mode != "I;16" or picture.bits == 9):  # Pillow turns white to black
            raise ImageError(f"JPEG 2000 colors of {picture.bits} bits are not supported; convert the image to 8 bits")
        if picture.bits < 8 and image.mode in ("P", "PA"):  # and shifts numbers of colors
            raise ImageError(f"JPEG 2000 palettes of {picture.bits} bits are not supported")
    elif name == "BMP":
        picture.space = bmp_space(file)
    return picture


def _open_avif(file: BinaryIO, name: str, max_pixels: int) -> Picture:
    try:
        picture = _open_plain(file, name, max_pixels)
    except ImageError:
        raise
    except (SyntaxError, ValueError):
        file.seek(0)
        data = file.read()
        if EXIF_ITEM not in data:
            raise
        # EXIF that is corrupt is not a reason to refuse the picture: it becomes an item of no known kind.
        picture = _open_plain(io.BytesIO(data.replace(EXIF_ITEM, NO_ITEM, 1)), name, max_pixels)
        picture.lost.append("EXIF left out: it is corrupt")
    picture.space = picture.space or heif_space(file)
    if heif_has(file, b"clap"):
        picture.lost.append("its crop (clap) is ignored: the whole picture is kept")
    return picture


def _open_webp(file: BinaryIO, name: str, max_pixels: int) -> Picture:
    _check_size(*webp_size(file), max_pixels)
    file.seek(0)
    return _open_plain(ShortReads(file.read()), name, max_pixels)


def _open_png(file: BinaryIO, name: str, max_pixels: int) -> Picture:
    header = file.read(24)
    if header[12:16] == b"IHDR":
        _check_size(*struct.unpack(">II", header[16:24]), max_pixels)
    file.seek(0)
    lost = list[str]()
    png = read_png(file, _most_bytes(max_pixels), lost)
    with quiet():
        image = PngImagePlugin.PngImageFile(png.file, "")
    image.info.update(png.info)
    picture = Picture(image, png.space, key=png.key, lost=lost)
    if png.depth == 16 and png.color == 4:
        picture.interleaved = True
        image.tile = [tile._replace(args="RGBA") for tile in image.tile]
    elif png.depth == 16 and png.color in (2, 6):
        picture.low = PngImagePlugin.PngImageFile(io.BytesIO(png.file.getvalue()), "")
        picture.low.tile = [tile._replace(args=str(tile.args).replace("16B", "16L")) for tile in picture.low.tile]
    elif png.key and png.color == 0:  # Pillow stretches gray to 8 bits
        picture.key = (png.key[0] % 2**png.depth * 255 // (2**png.depth - 1),) if png.depth < 16 else png.key
    return picture


def _open_tiff(file: BinaryIO, name: str, max_pixels: int) -> Picture:
    if file.read(10)[8:] == b"CR":
        raise ImageError(tiff.RAW)
    lost = list[str]()

    def opened(low: bool) -> tiff.Tiff:
        file.seek(0)
        image = tiff.Tiff(file, "")
        tiff.choose_page(image, [] if low else lost)
        if tiff.has_signed_bytes(image):
            raise ImageError("samples of 8 bits with a sign have no defined white; convert the image to 8 or 16 bits")
        _check_size(*image.size, max_pixels)
        tiff.unpack(image, low)
        return image

    with quiet():
        image = opened(low=False)
        picture = Picture(image, tiff.profile(image), lost=lost)
        picture.turned = image.tag_v2.get(ORIENTATION) in range(2, 9)  # the others are upright
        picture.premultiplied = tiff.is_premultiplied(image)
        if tiff.has_wide_samples(image) and image.mode in ("RGB", "RGBA", "CMYK"):
            if tiff.has_planes(image):
                picture.planes = tiff.planes(image, file)
            else:
                picture.low = opened(low=True)
    return picture


def _open_package(file: BinaryIO, name: str, max_pixels: int) -> Picture:
    module, kind, extra = PACKAGES[name]
    try:
        factory = getattr(import_module(module), kind)
    except ImportError as error:
        raise ImageError(f"{extra.upper()} files need another package: pip install 'rnncodec[{extra}]'") from error
    orientation = 1
    if name == "JXL":  # whose pixels are decoded at once
        width, height, orientation = jxl_header(file)
        _check_size(width, height, max_pixels)
        file.seek(0)
    image = _checked(factory, file, max_pixels)
    data = getattr(image, "_data", b"")
    if name == "JXL" and image.mode == "LA" and len(data) == 4 * image.width * image.height:
        vars(image)["_data"] = data[sys.byteorder == "little" :: 2]  # 16 bits, which the package takes for 8
    picture = Picture(image, image.info.get("icc_profile"))
    if getattr(image, "n_frames", 1) > 1:
        picture.lost.append("only the first of several images is kept")
    if name == "HEIF":
        picture.space, picture.turned = picture.space or heif_space(file), heif_is_turned(file)
    elif not getattr(image, "jpeg", False):  # or the JPEG file inside is decoded as it is
        picture.turned = orientation != 1
    return picture


_OPEN = {
    "AVIF": _open_avif,
    "PNG": _open_png,
    "TIFF": _open_tiff,
    "WEBP": _open_webp,
    "HEIF": _open_package,
    "JXL": _open_package,
}


def _checked(factory: Factory, file: BinaryIO, max_pixels: int) -> Image.Image:
    """Opens an image and checks its size."""
    with quiet():
        image = factory(file, "")
    _check_size(*image.size, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width}x{height} pixels")
    if width * height > max_pixels:
        raise ImageError(f"{width}x{height} pixels are above the limit of {max_pixels}; raise max_pixels to read it")


def _most_bytes(max_pixels: int) -> int:
    """Bytes of all pixels in 16-bit RGBA, and ample metadata."""
    return 8 * max_pixels + 2**24


def _read_pipe(pipe: BinaryIO, prefix: bytes, limit: int) -> BinaryIO:
    """Reads the rest of a pipe into memory, after a prefix that was read before; refuses more than `limit` bytes."""
    file = io.BytesIO()
    file.write(prefix)
    while chunk := pipe.read(2**20):
        file.write(chunk)
        if file.tell() > limit:
            raise ImageError(f"more than {limit} bytes")
    file.seek(0)
    return file
