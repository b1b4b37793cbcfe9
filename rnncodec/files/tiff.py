"""Prepares TIFF images of Pillow for reading: which of several pictures, and how samples are unpacked."""

import sys

from PIL.TiffImagePlugin import TiffImageFile

from rnncodec.files.errors import ImageError

BITS, PHOTOMETRIC, PLANAR, EXTRA, NEW_SUBFILE, OLD_SUBFILE, DNG_VERSION = 258, 262, 284, 338, 254, 255, 50706
REDUCED, MASK = 1, 4  # bits of NEW_SUBFILE
REDUCED_OLD = 2
RGB, CMYK, YCBCR = 2, 5, 6  # kinds of PHOTOMETRIC
ASSOCIATED, SEPARATE = 1, 2  # a kind of EXTRA, and of PLANAR
MAX_PAGES = 100  # that are looked through for a picture that is no thumbnail
RAW = "a raw file of a camera, of which only a thumbnail can be read; develop it with a raw converter"


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
        if has_wide_samples(image) and has_planes(image) and image.mode == "RGBA":
            raise ImageError("16-bit planes with transparency are not supported; save it without planes")
    image.use_load_libtiff = True
    width, height = image._tile_size
    whole = image.tile[0]._replace(codec_name="libtiff", extents=(0, 0, width, height), offset=0)
    image.tile = [whole._replace(args=(raw, False, image.tag_v2.offset))]


def has_wide_samples(image: TiffImageFile) -> bool:
    """Whether all samples have 16 bits."""
    return set(image.tag_v2.get(BITS, (1,))) == {16}


def has_planes(image: TiffImageFile) -> bool:
    """Whether each sample has a plane of its own."""
    return image.tag_v2.get(PLANAR, 1) == SEPARATE


def is_premultiplied(image: TiffImageFile) -> bool:
    """Whether the colors are multiplied by alpha, and stay so: libtiff divides them where they have planes."""
    return image.mode == "RGBA" and not has_planes(image) and image.tag_v2.get(EXTRA, ())[:1] == (ASSOCIATED,)


def _is_small(image: TiffImageFile) -> bool:
    """Whether a page says that it is not a picture in full size."""
    flags = int(image.tag_v2.get(NEW_SUBFILE, 0))
    return bool(flags & (REDUCED | MASK)) or image.tag_v2.get(OLD_SUBFILE) == REDUCED_OLD
