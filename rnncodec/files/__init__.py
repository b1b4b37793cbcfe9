"""Files: the .rnc container and photographs of any kind.

Nothing here depends on torch or on networks.
"""

from rnncodec.files.errors import FormatError, ImageError, ImageWarning
from rnncodec.files.format import Header, read_header, read_records, truncate
from rnncodec.files.images import find_images, load_image, load_photograph, save_image

__all__ = [
    "FormatError",
    "Header",
    "ImageError",
    "ImageWarning",
    "find_images",
    "load_image",
    "load_photograph",
    "read_header",
    "read_records",
    "save_image",
    "truncate",
]
