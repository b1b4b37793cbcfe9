"""Writes images, and any files, completely or not at all."""

import errno
import io
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rnncodec.files.errors import ImageError, one_line
from rnncodec.files.metadata import save_options
from rnncodec.files.profiles import SRGB, profile_of

SRGB_PROFILE = profile_of(SRGB)
# A decoded image should not lose quality a second time, so lossy formats are used at (nearly) their best. Every file
# says that it is sRGB, where its format has a place: AVIF and JPEG 2000 do so by themselves, PNG in a chunk.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0, "icc_profile": SRGB_PROFILE},
    "WEBP": {"lossless": True, "icc_profile": SRGB_PROFILE},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "TIFF": {"icc_profile": SRGB_PROFILE},
    "BMP": {},
    "PPM": {},
    "JPEG2000": {},
}
LESS_THAN_RGB = {".gif", ".pgm", ".pbm", ".pfm"}


def save_image(
    array: np.ndarray,
    target: str | os.PathLike[str] | BinaryIO,
    format: str | None = None,
    records: Mapping[str, bytes] | None = None,
) -> None:
    """Writes 8-bit sRGB to an image file, which says so, completely or, if anything fails, not at all.

    Args:
        array: uint8 [H, W, 3].
        target: a path, or a binary file, which may be a pipe.
        format: a suffix (`png`) or Pillow's name (`JPEG2000`); None takes the path's suffix, or PNG for a binary file.
        records: EXIF and XMP as `load_photograph` gives them, left out with a warning where the format cannot hold
            them; others are ignored.

    Raises:
        ImageError: the format is unknown or cannot hold the image.
        OSError: the file cannot be written.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ImageError(f"an image is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    path = Path(target) if isinstance(target, (str, os.PathLike)) else None
    if format is None:
        format = path.suffix if path else "png"
    try:
        name = format_name(format)
    except ImageError as error:
        raise ImageError(f"{path or 'image'}: {error}") from None
    options = SAVE_OPTIONS[name] | save_options(name, records or {})
    if name == "PNG":
        chunks = options.setdefault("pnginfo", PngInfo())
        chunks.add(b"sRGB", b"\0")  # perceptual, as photographs are
        chunks.add(b"gAMA", struct.pack(">I", 45455))  # for readers that do not know the chunk before
    buffer = io.BytesIO()
    try:
        Image.fromarray(array).save(buffer, name, **options)
    except Exception as error:  # encoders too raise nearly any exception, for example if a side is too long
        raise ImageError(f"{path or 'image'}: {one_line(error)}") from error
    if isinstance(target, (str, os.PathLike)):
        atomic_write(target, buffer.getvalue())
    else:
        target.write(buffer.getvalue())
        target.flush()


def format_name(format: str) -> str:
    """Pillow's name of a format in which images can be written, by that name or a suffix.

    Raises:
        ImageError: the format is unknown or cannot hold all colors.
    """
    suffix = "." + format.lower().removeprefix(".")
    if suffix in LESS_THAN_RGB:
        raise ImageError(f"{suffix} files cannot hold all colors; .png always works")
    name = Image.registered_extensions().get(suffix, format.upper())
    if name not in SAVE_OPTIONS or name not in Image.SAVE:
        raise ImageError(f"cannot write the format {format!r}; .png always works")
    return name


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file completely or not at all, as a temporary file in the same folder that then replaces the old one.

    The permissions are those of the old file, or of any new file. A symbolic link stays and the file it points to is
    replaced. Devices and pipes are written directly.

    Raises:
        OSError: the file cannot be written; an existing file stays as it was.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        stream = path.is_symlink() and path.is_relative_to("/dev")  # /dev/stdout, wherever it is redirected
        if stream or (path.exists() and not path.is_file()):
            path.write_bytes(data)
            return
        target = Path(os.path.realpath(path))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:  # the message should name the target, not the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder to write files into, which come to a path together or, if anything fails, not at all.

    A folder that is there keeps its other files.

    Raises:
        OSError: the files cannot be put there.
    """
    folder = Path(os.path.realpath(path))  # which a link may name
    temporary = folder.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            temporary.mkdir()
            yield temporary
            if folder.exists():
                for file in sorted(temporary.iterdir()):
                    os.replace(file, folder / file.name)
            else:
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # of what was to be written
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
