"""Files: the .rnc container and photographs of any kind.

Nothing here depends on torch or on networks.
"""

from rnncodec.files.format import FormatError, Header, read_header, truncate
from rnncodec.files.images import ImageError, find_images, load_image, save_image

__all__ = ["FormatError", "Header", "ImageError", "find_images", "load_image", "read_header", "save_image", "truncate"]
