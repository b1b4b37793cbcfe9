"""Reads photographs of any kind as 8-bit sRGB."""

import os
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from rnncodec.files import tiff
from rnncodec.files.errors import ImageError, ImageWarning, one_line
from rnncodec.files.metadata import quiet, read_metadata, warnings_lock
from rnncodec.files.opening import Picture, open_picture
from rnncodec.files.pixels import upright_rgb

MAX_PIXELS = 2**28

Source = str | os.PathLike[str] | BinaryIO


class Photograph(NamedTuple):
    """What was read from an image file.

    Attributes:
        pixels: uint8 [H, W, 3], upright.
        records: what the file says of the photograph, see `load_photograph`.
        lost: what was not kept or is corrupt, each in one line.
        turned: whether the file stores the pixels in another orientation.
    """

    pixels: np.ndarray
    records: dict[str, bytes]
    lost: list[str]
    turned: bool


def load_image(source: Source, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads an image file as 8-bit sRGB, of several images the first; see `to_rgb` for the conversion.

    What is lost (transparency, further images, a profile that is corrupt) is named by an ImageWarning.

    Args:
        source: a path, or a binary file, which may be a pipe.
        max_pixels: images of more pixels are refused before their pixels are decoded.

    Returns:
        uint8 [H, W, 3], upright.

    Raises:
        ImageError: the file is missing, truncated, corrupt, too large or not an image, or its colors are HDR.
    """
    photograph = read_photograph(source, max_pixels, strip=True)
    _warn(photograph.lost, _name(source))
    return photograph.pixels


def load_photograph(source: Source, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, dict[str, bytes]]:
    """Reads an image file as `load_image` does, and what it says of the photograph.

    Returns:
        uint8 [H, W, 3], and records for `Codec.encode`: `EXIF`, which starts like a TIFF file, without thumbnail, and
        `XMP `, both without an orientation other than 1, because the image is upright. What is corrupt, or too large
        for a file, is left out with a warning.

    Raises:
        ImageError: as in `load_image`.
    """
    photograph = read_photograph(source, max_pixels)
    _warn(photograph.lost, _name(source))
    return photograph.pixels, photograph.records


def read_photograph(source: Source, max_pixels: int = MAX_PIXELS, strip: bool = False) -> Photograph:
    """Reads an image file as `load_photograph` does, and returns what was lost or turned instead of a warning.

    Args:
        source: as in `load_image`.
        max_pixels: likewise.
        strip: whether to leave out the records.

    Raises:
        ImageError: as in `load_image`.
    """
    name = _name(source)
    try:
        with nullcontext(source) if not isinstance(source, str | os.PathLike) else open(source, "rb") as file:
            picture = open_picture(file, max_pixels)
            with picture.image:
                pixels = _convert(picture)
                records = {} if strip else read_metadata(picture.image, picture.lost)
                return Photograph(pixels, records, picture.lost, bool(picture.turned))
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # decoders raise nearly any exception on malicious input
        raise ImageError(f"{name}: {one_line(error)}") from error


def to_rgb(image: Image.Image, orientation: int | None = None) -> np.ndarray:
    """Converts an image of any mode to upright 8-bit sRGB.

    An image that comes from a file is turned as its EXIF says; others, which may have been turned already, are taken as
    they are. An ICC profile is converted, and transparency is composited on white. Of what Pillow does not tell, such
    as the color chunks of PNG and the lower bytes of 16-bit colors, only `load_image` knows.

    Args:
        image: to convert.
        orientation: how it is turned, by EXIF's numbers, whatever its own EXIF says.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: the pixels cannot be decoded, are floats, or are integers beyond 16 bits, or there are none.
    """
    if not image.width or not image.height:
        raise ImageError(f"an image of {image.width}x{image.height} pixels")
    if orientation is None and not isinstance(image, ImageFile.ImageFile):
        orientation = 1
    picture = Picture(image, image.info.get("icc_profile"), orientation=orientation)
    if isinstance(image, TiffImageFile):
        picture.space = tiff.profile(image)
        if tiff.has_planes(image) or not tiff.is_premultiplied(image):
            tiff.unpack(image)  # which leaves premultiplied colors as they are, and the image is the caller's
    pixels = _convert(picture)
    _warn(picture.lost)
    return pixels


def _convert(picture: Picture) -> np.ndarray:
    """Loads and converts an image, with errors in one line."""
    image = picture.image
    try:
        with quiet() if image.format == "TIFF" else nullcontext():  # Pillow reads metadata while it loads
            image.load()
        return upright_rgb(picture)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"not enough memory for {image.width}x{image.height} pixels") from error
    except Exception as error:  # decoders raise nearly any exception on malicious input
        raise ImageError(one_line(error)) from error


def _name(source: Source) -> str:
    """What messages call an image file."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "image"))


def _warn(lost: Iterable[str], name: str = "") -> None:
    """Warns the caller of a public function of what was lost."""
    for line in dict.fromkeys(lost):
        with warnings_lock:  # or another thread might keep Pillow's warnings at the moment, and this one with them
            warnings.warn(ImageWarning(line, name), stacklevel=3)
