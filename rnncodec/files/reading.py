"""Reads photographs of any kind as 8-bit sRGB."""

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from rnncodec.files import tiff
from rnncodec.files.errors import ImageError, ImageWarning, one_line
from rnncodec.files.metadata import quiet, read_metadata, warnings_lock
from rnncodec.files.opening import Picture, open_picture
from rnncodec.files.pixels import upright_rgb

MAX_PIXELS = 2**28

Read = TypeVar("Read")


def load_image(source: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> np.ndarray:
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
    pixels, lost = _load(source, max_pixels, _convert)
    _tell(lost)
    return pixels


def load_photograph(
    source: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, dict[str, bytes]]:
    """Reads an image file as `load_image` does, and what it says of the photograph.

    Returns:
        uint8 [H, W, 3], and records for `Codec.encode`: `EXIF`, which starts like a TIFF file, without thumbnail, and
        `XMP `, both without an orientation other than 1, because the image is upright. What is corrupt, or too large
        for a file, is left out with a warning.

    Raises:
        ImageError: as in `load_image`.
    """
    photograph, lost = _load(
        source, max_pixels, lambda picture: (_convert(picture), read_metadata(picture.image, picture.lost))
    )
    _tell(lost)
    return photograph


def to_rgb(image: Image.Image) -> np.ndarray:
    """Converts an image of any mode to upright 8-bit sRGB.

    EXIF rotation is applied, an ICC profile is converted, and transparency is composited on white. Of what Pillow does
    not tell, such as the color chunks of PNG and the lower bytes of 16-bit colors, only `load_image` knows.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: the pixels cannot be decoded, are floats, or are integers beyond 16 bits.
    """
    picture = Picture(image, image.info.get("icc_profile"))
    if isinstance(image, TiffImageFile) and (tiff.has_planes(image) or not tiff.is_premultiplied(image)):
        tiff.unpack(image)  # which leaves premultiplied colors as they are, and the image is the caller's
    pixels = _convert(picture)
    _tell(picture.lost)
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


def _tell(lost: list[str]) -> None:
    """Warns the caller of a public function of what was lost."""
    for line in dict.fromkeys(lost):
        with warnings_lock:  # or another thread might keep Pillow's warnings at the moment, and this one with them
            warnings.warn(line, ImageWarning, stacklevel=3)


def _load(
    source: str | os.PathLike[str] | BinaryIO, max_pixels: int, read: Callable[[Picture], Read]
) -> tuple[Read, list[str]]:
    """What a function reads from an image file, and what was lost; arguments and errors as in `load_image`."""
    if not isinstance(source, (str, os.PathLike)):
        return _load_open(source, str(getattr(source, "name", "image")), max_pixels, read)
    name = os.fspath(source)
    try:
        with open(source, "rb") as file:
            return _load_open(file, name, max_pixels, read)
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or error}") from error


def _load_open(file: BinaryIO, name: str, max_pixels: int, read: Callable[[Picture], Read]) -> tuple[Read, list[str]]:
    """What a function reads from an open file."""
    try:
        picture = open_picture(file, max_pixels)
        with picture.image:
            return read(picture), picture.lost
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise nearly any exception on malicious input
        raise ImageError(f"{name}: {one_line(error)}") from error
