"""Finds the image files in folders, and those that cannot be read."""

import errno
import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from rnncodec.files.errors import ImageError
from rnncodec.files.opening import FORMATS, PACKAGES

PACKAGE_SUFFIXES = {".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF", ".jxl": "JXL"}
RAW = ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srw"
OTHER = ".ai .dds .eps .exr .hdr .ico .jxr .pcx .psb .psd .svg .svgz .tga .wdp .xcf"
UNREADABLE: dict[str, str] = dict.fromkeys(RAW.split(), "a raw file of a camera; develop it with a raw converter")
UNREADABLE |= dict.fromkeys(OTHER.split(), "a format that is not supported; convert it, for example to PNG")


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Lists the given files, and the image files in the given folders, recursively and in order of path.

    In folders, images are found by suffix, and hidden files and folders are skipped. Symbolic links to folders are
    followed; each folder is entered once.

    Raises:
        ImageError: a path does not exist or a folder cannot be read.
    """
    files, suffixes = [], readable_suffixes()
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in _walk(path) if file.suffix.lower() in suffixes)
        elif path.exists():
            files.append(path)
        else:
            raise ImageError(f"{path}: {os.strerror(errno.ENOENT)}")
    return files


def find_unreadable(folder: str | os.PathLike[str]) -> dict[Path, str]:
    """The files below a folder that are pictures, by their suffix, but cannot be read, in order of path, each with why.

    Raises:
        ImageError: a folder cannot be read.
    """
    reasons, suffixes = dict(UNREADABLE), readable_suffixes()
    for suffix, name in PACKAGE_SUFFIXES.items():
        reasons[suffix] = f"needs another package: pip install 'rnncodec[{PACKAGES[name][2]}]'"
    return {
        file: reasons[file.suffix.lower()]
        for file in sorted(_walk(Path(folder)))
        if file.suffix.lower() in reasons.keys() - suffixes
    }


def readable_suffixes() -> set[str]:
    """The suffixes, in lower case, of files that can be read with what is installed."""
    Image.init()
    plain = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
    installed = {name for name, (module, _, _) in PACKAGES.items() if find_spec(module.partition(".")[0])}
    return plain | {suffix for suffix, name in PACKAGE_SUFFIXES.items() if name in installed}


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden."""
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
            if not name.startswith(".") and path.is_file():
                yield path
