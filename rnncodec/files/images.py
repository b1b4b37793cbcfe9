"""Photographs of any kind: reading, writing and finding them."""

from rnncodec.files.errors import ImageError, ImageWarning, one_line
from rnncodec.files.finding import find_images, find_unreadable, readable_suffixes
from rnncodec.files.opening import FORMATS
from rnncodec.files.pixels import ON_WHITE, orientation_of
from rnncodec.files.reading import MAX_PIXELS, load_image, load_photograph, read_photograph, to_rgb
from rnncodec.files.writing import atomic_folder, atomic_write, format_name, save_image

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "ON_WHITE",
    "ImageError",
    "ImageWarning",
    "atomic_folder",
    "atomic_write",
    "find_images",
    "find_unreadable",
    "format_name",
    "load_image",
    "load_photograph",
    "one_line",
    "orientation_of",
    "read_photograph",
    "readable_suffixes",
    "save_image",
    "to_rgb",
]
