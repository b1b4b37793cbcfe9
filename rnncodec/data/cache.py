"""Finds images and their splits, and decodes them into a memory-mapped cache."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from rich.progress import track

from rnncodec.console import losses
from rnncodec.files.images import FORMATS, find_images
from rnncodec.files.reading import Photograph, read_photograph

CACHE_VERSION = 2
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by name of folder

Item = TypeVar("Item")
Result = TypeVar("Result")


class DataError(ValueError):
    """Raised for data that is missing, refused, or other than what was asked for; the message is one line."""


# Images and their splits


def split_images(
    roots: Sequence[Path], val_root: Path | None = None, manifest: Path | None = None, val_images: int = 16
) -> tuple[dict[str, Path], dict[str, str]]:
    """Finds the images of `PatchDataModule`'s arguments and gives each a split.

    Returns:
        The path of each image by its name (the path relative to its root, of several roots with the number of the root
        before it), and its split, `train` or `val`.

    Raises:
        DataError: no image, none left to train on, or a bad manifest.
        ImageError: a folder is missing or cannot be read.
    """
    files: dict[str, Path] = {}
    splits: dict[str, str | None] = {}
    for number, root in enumerate(roots if manifest is None else [manifest.parent]):
        prefix = f"{number}/" if len(roots) > 1 and manifest is None else ""
        listed = read_manifest(manifest or root / "manifest.json", required=manifest is not None)
        if listed is not None:
            found = {name: root / name for name in listed}
        else:
            found = {path.relative_to(root).as_posix(): path for path in find_images([root])}
            by_folder = {name: _split_of(name) for name in found}
            rest = None if "train" in by_folder.values() else "train"
            listed = {name: split or rest for name, split in by_folder.items()}
        files |= {prefix + name: path for name, path in found.items()}
        splits |= {prefix + name: split for name, split in listed.items()}
    splits = {name: split for name, split in splits.items() if split in ("train", "val")}
    if val_root is not None:
        val_files = val_images_of(val_root)
        seen = {path.resolve() for path in val_files.values()}  # val_root may lie within root
        splits = {name: "train" for name, s in splits.items() if s == "train" and files[name].resolve() not in seen}
        splits |= dict.fromkeys(val_files, "val")
        files |= val_files
    elif "val" not in splits.values():
        splits |= dict.fromkeys(held_out(splits, val_images, str(roots[0])), "val")
    if "train" not in splits.values():
        raise DataError(f"{roots[0]}: no images to train on")
    return {name: files[name] for name in splits}, {name: str(split) for name, split in splits.items()}


def val_images_of(folder: Path) -> dict[str, Path]:
    """The images of a folder that is for validation alone, by their names.

    Raises:
        DataError: there are none, or it is no folder.
        ImageError: the folder is missing or cannot be read.
    """
    if folder.is_file():
        raise DataError(f"{folder}: val_root is a folder of images")
    found = {f"val_root:{path.relative_to(folder).as_posix()}": path for path in find_images([folder])}
    if not found:
        raise DataError(f"{folder}: no images to validate on")
    return found


def held_out(names: Iterable[str], count: int, root: str) -> list[str]:
    """The names of images to validate on, where nothing says which.

    By a hash of the name, so that the choice depends on no order, and little on which other images there are.

    Raises:
        DataError: none would be left to train on.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    if ordered and count >= len(ordered):
        raise DataError(f"{root}: to hold out {count} of {len(ordered)} images leaves none to train on")
    return ordered[:count]


def _split_of(name: str) -> str | None:
    """The split of the innermost folder of a relative path that names one, or None."""
    folders = [part.lower() for part in PurePosixPath(name).parts[-2::-1]]
    return next((SPLITS[folder] for folder in folders if folder in SPLITS), None)


def read_manifest(path: Path, required: bool = True) -> dict[str, str | None] | None:
    """Reads a JSON list of objects with `file` (relative to the manifest) and `split`; gives the split by file.

    Where a manifest is not required, a missing file or other JSON gives None.
    """
    if not required and not path.is_file():
        return None
    try:
        rows = json.loads(path.read_bytes())
        listed = [(str(row["file"]), SPLITS.get(str(row["split"]).lower())) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if not required:
            return None
        reason = error.strerror if isinstance(error, OSError) else "not a JSON list of objects with `file` and `split`"
        raise DataError(f"{path}: {reason}") from error
    splits = dict(listed)
    if conflict := next((name for name, split in listed if splits[name] != split), None):
        raise DataError(f"{path}: {conflict} is in two splits")
    return splits


# The cache of decoded images


class Entry(NamedTuple):
    """The name and size of an image, and its offset in the cache in bytes."""

    name: str
    height: int
    width: int
    offset: int


class ImageCache:
    """Decoded images in one raw file, uint8 [H, W, 3] each, memory-mapped by every process that reads it.

    Args:
        folder: written by `build_cache`.

    Attributes:
        entries: of the images, in the order of their names.
        skipped: by name, why an image was left out.

    Raises:
        DataError: the folder does not hold a complete cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pixels: np.ndarray | None = None
        try:
            index = json.loads((folder / "index.json").read_bytes())
            self.entries = [Entry(*entry) for entry in index["entries"]]
            self.skipped: dict[str, str] = dict(index["skipped"])
            end = 0
            for entry in self.entries:
                complete = entry.offset == end and min(entry.height, entry.width) > 0
                end += 3 * entry.height * entry.width
                if not complete:
                    raise ValueError("entries do not follow on one another")
            if end != (folder / "pixels.raw").stat().st_size:
                raise ValueError("size of the pixels")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{folder}: not a complete image cache") from error

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return sum(3 * entry.height * entry.width for entry in self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # pickling a memory map would copy all pixels

    def __getitem__(self, index: int) -> np.ndarray:
        """The pixels of one image, uint8 [H, W, 3], read from disk only where they are used."""
        if self._pixels is None:
            self._pixels = np.memmap(self.folder / "pixels.raw", np.uint8, "r")
        entry = self.entries[index]
        end = entry.offset + 3 * entry.height * entry.width
        return self._pixels[entry.offset : end].reshape(entry.height, entry.width, 3)


def build_cache(folder: Path, files: dict[str, Path], max_pixels: int) -> None:
    """Decodes images into a new cache, which appears when it is complete; images that cannot be read are skipped.

    What others lose, such as transparency, is told once for each kind.

    Raises:
        DataError: the disk is full.
    """
    names = sorted(files)
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    check_space(folder.parent, sum(_decoded_bytes(path, max_pixels) for path in files.values()), "the decoded images")

    lost: dict[str, list[str]] = {}

    def load(name: str) -> Photograph | str:
        try:
            return read_photograph(files[name], max_pixels, strip=True)
        except ValueError as error:
            return str(error).removeprefix(f"{files[name]}: ")

    entries, skipped, offset = [], {}, 0
    try:
        temporary.mkdir()
        with open(temporary / "pixels.raw", "wb") as pixels:
            for name, image in zip(names, in_threads(load, names, "decoding images"), strict=True):
                if isinstance(image, str):
                    skipped[name] = image
                else:
                    height, width, _ = image.pixels.shape
                    entries.append(Entry(name, height, width, offset))
                    pixels.write(np.ascontiguousarray(image.pixels).data)
                    offset += image.pixels.nbytes
                    for text in dict.fromkeys(image.lost):
                        lost.setdefault(text, []).append(name)
            pixels.flush()
            os.fsync(pixels.fileno())
        (temporary / "index.json").write_text(json.dumps({"entries": entries, "skipped": skipped}))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for line in losses(lost):
        rank_zero_warn(line.removeprefix("warning: "))


def _decoded_bytes(path: Path, max_pixels: int) -> int:
    """Bytes of the pixels of an image, by its header; 0 if it will be skipped."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            return 3 * pixels if pixels <= max_pixels else 0
    except Exception:  # `load_image` reports what is wrong with the file
        return 0


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises a DataError if the disk of a folder has fewer bytes free than needed."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"{folder}: {what} need {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], description: str) -> Iterator[Result]:
    """Maps a function in threads, in order, with a progress bar, and with only a few results in memory at a time."""
    workers = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(workers) as pool:
        for start in track(range(0, len(items), workers), description, disable=not items):
            yield from pool.map(function, items[start : start + workers])
