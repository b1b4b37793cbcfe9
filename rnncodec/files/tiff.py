"""Prepares TIFF images of Pillow for reading: which of several pictures, and how samples are unpacked."""

import io
import struct
import sys
from typing import BinaryIO

import PIL
from PIL import Image, ImagePalette
from PIL.TiffImagePlugin import TiffImageFile

from rnncodec.files.errors import ImageError

WIDTH, HEIGHT = 256, 257
COLOR_MAP, SAMPLE_FORMAT, PROFILE = 320, 339, 34675
BITS, PHOTOMETRIC, PLANAR, EXTRA, NEW_SUBFILE, OLD_SUBFILE, DNG_VERSION = 258, 262, 284, 338, 254, 255, 50706
REDUCED, MASK = 1, 4  # bits of NEW_SUBFILE
REDUCED_OLD = 2
RGB, CMYK, YCBCR = 2, 5, 6  # kinds of PHOTOMETRIC
SIGNED = 2  # a kind of SAMPLE_FORMAT
ASSOCIATED, SEPARATE = 1, 2  # a kind of EXTRA, and of PLANAR
MAX_PAGES = 100  # that are looked through for a picture that is no thumbnail
TILE_OFFSETS, TILE_COUNTS, STRIP_OFFSETS, STRIP_COUNTS = 324, 325, 273, 279
SAMPLES, BLACK_IS_ZERO, CLASSIC, LONG = 277, 1, 42, 4
# Tags that say where samples lie: sides, compression, orientation, rows of strips, predictor, sides of tiles.
GEOMETRY = {256, 257, 259, 274, 278, 317, 322, 323}
OWN_COMPRESSION = int(PIL.__version__.partition(".")[0]) >= 13  # libtiff's decoder in Pillow reads it from the file
RAW = "a raw file of a camera, of which only a thumbnail can be read; develop it with a raw converter"


class Tiff(TiffImageFile):
    """A TIFF file of any size; Pillow has a limit, a global variable, for those of which it makes the image itself."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.new(self.mode, self._tile_size, None).im
        super().load_prepare()


def choose_page(image: TiffImageFile, lost: list[str]) -> None:
    """Turns to the first page that is neither a thumbnail nor a mask; if there are others, `lost` says so.

    Raises:
        ImageError: the pages are thumbnails, or belong to a raw file.
    """
    if DNG_VERSION in image.tag_v2:
        raise ImageError(RAW)
    found = list[int]()
    for page in range(MAX_PAGES):
        try:
            image.seek(page)
            small = _is_small(image)
        except EOFError:
            break
        except Exception:  # a page that cannot be read is not a reason to refuse the others
            small = False
        if not small:
            found.append(page)
            if len(found) == 2:
                lost.append("only the first of several images is kept")
                break
    if not found:
        raise ImageError(RAW)
    image.seek(found[0])


def unpack(image: TiffImageFile, low: bool = False) -> None:
    """Has libtiff decode colors that Pillow's own decoder gets wrong: 16 bits, planes, subsampling, associated alpha.

    Colors that are multiplied by alpha stay so.

    Args:
        image: before its pixels are loaded.
        low: take the lower bytes of 16-bit samples; otherwise the upper ones.
    """
    kind, extra = image.tag_v2.get(PHOTOMETRIC), image.tag_v2.get(EXTRA, ())
    palette = image.tag_v2.get(COLOR_MAP, ())
    if image.mode in ("P", "PA") and palette and max(palette) < 256:  # of 8 bits, as old programs wrote it, not of 16
        image.palette = ImagePalette.raw("RGB;L", bytes(palette))
    if not image.tile or image.mode not in ("RGB", "RGBA", "CMYK", "YCbCr"):
        return
    if kind == YCBCR or image.mode == "YCbCr":
        image._mode = "RGB"
        raw = "RGB" if image._compression == "jpeg" and not has_planes(image) else "RGBX"
    else:
        raw = "RGB" if kind == RGB else "CMYK" if kind == CMYK else None
        if not raw:
            return
        if image.mode == "RGBA":
            raw, extra = "RGBA", extra[1:]
        if not has_planes(image):
            raw += "X" * len(extra)
        if has_wide_samples(image):
            raw += ";16" + ("B" if (sys.byteorder == "little") == low else "L")
    image.use_load_libtiff = True
    extents = (0, 0, image.tag_v2[WIDTH], image.tag_v2[HEIGHT])  # as stored, not upright
    whole = image.tile[0]._replace(codec_name="libtiff", extents=extents, offset=0)
    compression = () if OWN_COMPRESSION else (image._compression,)
    image.tile = [whole._replace(args=(raw, *compression, False, image.tag_v2.offset))]


def planes(image: TiffImageFile, file: BinaryIO) -> list[Tiff]:
    """The planes of 16-bit samples, each as a gray image of its own: Pillow and libtiff give only the upper bytes.

    Args:
        image: opened from the file.
        file: seekable.
    """
    file.seek(0)
    data = file.read()
    tags, order = image.tag_v2, "little" if image.tag_v2.prefix == b"II" else "big"
    if int.from_bytes(data[2:4], order) != CLASSIC:
        raise ImageError("16-bit planes in BigTIFF files are not supported; save it without planes")
    offsets, counts = (TILE_OFFSETS, TILE_COUNTS) if TILE_OFFSETS in tags else (STRIP_OFFSETS, STRIP_COUNTS)
    samples = len(image.getbands())
    each = len(tags[offsets]) // tags.get(SAMPLES, samples)
    found, place = list[Tiff](), len(data) + len(data) % 2
    for sample in range(samples):
        own = {tag: (tags[tag],) for tag in GEOMETRY & set(tags)}
        own |= {BITS: (16,), PHOTOMETRIC: (BLACK_IS_ZERO,), SAMPLES: (1,)}
        own |= {tag: tags[tag][sample * each : (sample + 1) * each] for tag in (offsets, counts)}
        head = data[:4] + place.to_bytes(4, order) + data[8:].ljust(place - 8, b"\0")
        plane = Tiff(io.BytesIO(head + _directory(own, place, "<" if order == "little" else ">")), "")
        plane.load()
        found.append(plane)
    return found


def _directory(tags: dict[int, tuple[int, ...]], start: int, order: str) -> bytes:
    """A directory of tags, as long integers, that starts at a place in its file and ends the list of directories."""
    values, entries = b"", struct.pack(f"{order}H", len(tags))
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            place = start + 2 + 12 * len(tags) + 4 + len(values)
            values, packed = values + packed, struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, LONG, len(numbers)) + packed
    return entries + bytes(4) + values


def profile(image: TiffImageFile) -> bytes | None:
    """The ICC profile of the page; Pillow also gives that of a page that was looked at before."""
    return image.tag_v2.get(PROFILE)


def has_wide_samples(image: TiffImageFile) -> bool:
    """Whether all samples have 16 bits."""
    return set(image.tag_v2.get(BITS, (1,))) == {16}


def has_signed_bytes(image: TiffImageFile) -> bool:
    """Whether all samples have 8 bits, some of them with a sign."""
    return SIGNED in image.tag_v2.get(SAMPLE_FORMAT, ()) and set(image.tag_v2.get(BITS, ())) == {8}


def has_planes(image: TiffImageFile) -> bool:
    """Whether each sample has a plane of its own."""
    return image.tag_v2.get(PLANAR, 1) == SEPARATE


def is_premultiplied(image: TiffImageFile) -> bool:
    """Whether the colors are multiplied by alpha, and stay so: Pillow divides planes of 8 bits."""
    stay = has_wide_samples(image) or not has_planes(image)
    return image.mode == "RGBA" and stay and image.tag_v2.get(EXTRA, ())[:1] == (ASSOCIATED,)


def _is_small(image: TiffImageFile) -> bool:
    """Whether a page says that it is not a picture in full size."""
    flags = int(image.tag_v2.get(NEW_SUBFILE, 0))
    return bool(flags & (REDUCED | MASK)) or image.tag_v2.get(OLD_SUBFILE) == REDUCED_OLD
