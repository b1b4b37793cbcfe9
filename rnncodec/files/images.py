"""Reads photographs as 8-bit RGB and writes images; files are written completely or not at all."""

import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image

from rnncodec.files.errors import ImageError, one_line
from rnncodec.files.metadata import ORIENTATION, quiet, read_metadata, save_options

MAX_PIXELS = 2**28

# Formats of photographs. Pillow's other plugins are left out: some run external programs, some accept any bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")

# A decoded image should not lose quality a second time, so lossy formats are used at (nearly) their best.
SAVE_OPTIONS = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}

ORIENTATIONS = {  # by EXIF tag 274: the operation that turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Read = TypeVar("Read")


def load_image(source: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads an image file as 8-bit RGB, of an animation the first frame; see `to_rgb` for the conversion.

    Args:
        source: a path, or a binary file, which may be a pipe.
        max_pixels: images of more pixels are refused before their pixels are decoded.

    Returns:
        uint8 [H, W, 3], upright.

    Raises:
        ImageError: the file is missing, truncated, corrupt, too large or not an image.
    """
    return _load(source, max_pixels, to_rgb)


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
    return _load(source, max_pixels, lambda image: (to_rgb(image), read_metadata(image)))


def to_rgb(image: Image.Image) -> np.ndarray:
    """Converts an image of any mode to upright 8-bit RGB; embedded color profiles are ignored.

    EXIF rotation is applied and transparency is composited on white. 16-bit gray is scaled to 8 bits and rounded
    (Pillow itself reduces 16-bit color, by dropping the low byte).

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: the pixels cannot be decoded, are floats, or are integers beyond 16 bits.
    """
    try:
        with quiet() if image.format == "TIFF" else nullcontext():  # Pillow reads metadata while it loads
            image.load()
        rgb = _convert(image)
        orientation = _orientation(image)
        if orientation in ORIENTATIONS:
            rgb = rgb.transpose(ORIENTATIONS[orientation])
        return np.array(rgb)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"not enough memory for {image.width}x{image.height} pixels") from error
    except Exception as error:  # decoders raise nearly any exception on malicious input
        raise ImageError(one_line(error)) from error


def save_image(
    array: np.ndarray,
    target: str | os.PathLike[str] | BinaryIO,
    format: str | None = None,
    records: Mapping[str, bytes] | None = None,
) -> None:
    """Writes 8-bit RGB to an image file, completely or, if anything fails, not at all.

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
    suffix = "." + format.lower().removeprefix(".")
    name = Image.registered_extensions().get(suffix, format.upper())
    if name not in FORMATS or name not in Image.SAVE:
        raise ImageError(f"{path or 'image'}: cannot write the format {format!r}; .png always works")
    options = SAVE_OPTIONS.get(name, {}) | save_options(name, records or {})
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


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Lists the given files, and the image files in the given folders, recursively and in order of path.

    In folders, images are found by suffix, and hidden files and folders are skipped. Symbolic links to folders are
    followed; each folder is entered once.

    Raises:
        ImageError: a path does not exist or a folder cannot be read.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(_walk(path))
        elif path.exists():
            files.append(path)
        else:
            raise ImageError(f"{path}: {os.strerror(errno.ENOENT)}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Every image file below a folder."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    seen = set()

    def fail(error: OSError) -> None:
        raise ImageError(f"{error.filename}: {error.strerror}") from error

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link to a parent folder would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.suffix.lower() in suffixes and path.is_file():
                yield path


def _load(source: str | os.PathLike[str] | BinaryIO, max_pixels: int, read: Callable[[Image.Image], Read]) -> Read:
    """What a function reads from an image file; arguments and errors as in `load_image`."""
    if not isinstance(source, (str, os.PathLike)):
        return _load_open(source, str(getattr(source, "name", "image")), max_pixels, read)
    name = os.fspath(source)
    try:
        with open(source, "rb") as file:
            return _load_open(file, name, max_pixels, read)
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or error}") from error


def _load_open(file: BinaryIO, name: str, max_pixels: int, read: Callable[[Image.Image], Read]) -> Read:
    """What a function reads from an open file."""
    try:
        image = _open(file, max_pixels)
        with image:
            return read(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # as in to_rgb
        raise ImageError(f"{name}: {one_line(error)}") from error


def _open(file: BinaryIO, max_pixels: int) -> Image.Image:
    """Opens an image of an allowed format and size, without decoding its pixels.

    Image.open is not used, because its limit of pixels is a global variable, which belongs to the calling program.
    """
    Image.init()
    if file.seekable():
        file.seek(0)
    prefix = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if isinstance(accepted, str):
            raise ImageError(accepted)  # this build of Pillow lacks the format
        if not accepted:
            continue
        if file.seekable():
            file.seek(0)
        else:
            file = _read_pipe(file, prefix, 8 * max_pixels + 2**24)  # all pixels in 16-bit RGBA, and ample metadata
        try:
            with quiet():
                image = factory(file, "")
        except SyntaxError:  # Pillow's sign that the file is of another format after all
            continue
        width, height = image.size
        if width < 1 or height < 1:
            raise ImageError(f"an image of {width}x{height} pixels")
        if width * height > max_pixels:
            raise ImageError(
                f"{width}x{height} pixels are above the limit of {max_pixels}; raise max_pixels to read it"
            )
        return image
    raise ImageError("not an image file, or of a format that is not supported" if prefix else "the file is empty")


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


def _convert(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB, without turning it upright."""
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined white; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise ImageError("integer pixels beyond 16 bits; convert the image to 8 or 16 bits")
        tags = getattr(image, "tag_v2", {})  # of TIFF, whose samples Pillow gives here as they are stored
        white = 4095 if tags.get(258) == (12,) else 65535
        gray = samples.astype(np.uint32)
        if tags.get(262) == 0:  # white is zero
            gray = white - gray
        gray = ((gray * 255 + white // 2) // white).astype(np.uint8)
        if "transparency" in image.info:
            gray[samples == image.info["transparency"]] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, 1 (upright) where there is none or the EXIF data is corrupt."""
    try:
        with quiet():
            return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # corrupt EXIF data must not make an image unreadable
        return 1
