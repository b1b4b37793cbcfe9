"""Says exactly which images a data set has: names, sizes and hashes of the files, and a fingerprint of them all."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rnncodec.data.cache import in_threads
from rnncodec.data.datamodule import PatchDataModule
from rnncodec.data.shards import Place
from rnncodec.files.images import atomic_write


@dataclass(frozen=True)
class Manifest:
    """The files of a data set, without their content.

    Attributes:
        files: size in bytes and SHA-256 by name; of a tar file whose images are read as they are needed, size of the
            images and SHA-256 of their names and sizes.
        splits: what each is for, by name.
        root: path or address of the innermost folder that has them all, or all tar files.
        images: number of images with each split.
    """

    files: Mapping[str, tuple[int, str]]
    splits: Mapping[str, str]
    root: str
    images: Mapping[str, int]

    @cached_property
    def rows(self) -> list[dict[str, str | int]]:
        """A row for each file, in the order of their names."""
        return [
            {"file": name, "split": self.splits[name], "bytes": size, "sha256": digest}
            for name, (size, digest) in sorted(self.files.items())
        ]

    @cached_property
    def text(self) -> str:
        """The rows as JSON, one a line."""
        return "[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n"

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 digits of the SHA-256 of the text: other names, splits or contents have another one."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def manifest_of(data: PatchDataModule) -> Manifest:
    """The manifest of the images that a data module uses, after its `setup`.

    Hashes are kept beside the decoded images, whose folder changes if a file does.

    Raises:
        OSError: a file cannot be read.
    """
    paths = {entry.name: data.files[entry.name] for entry in data.cache.entries}
    path = data.cache.folder / "hashes.json"
    files: dict[str, tuple[int, str]] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError):  # damaged, or not there yet
        files = {name: (int(size), str(digest)) for name, (size, digest) in json.loads(path.read_bytes()).items()}
    if files.keys() != paths.keys():
        files = hashed(paths)
        with suppress(OSError):  # of a folder that may only be read
            atomic_write(path, json.dumps(files).encode())
    splits = {name: data.splits[name] for name in paths}
    if not data.sharded:
        return Manifest(files, splits, common_folder(paths), Counter(splits.values()))
    shards = {url: described(places) for url, places in data.images.by_shard.items()}
    counts = Counter(splits.values()) + Counter(train=len(data.chosen))
    return Manifest(files | shards, splits | dict.fromkeys(shards, "train"), data.images.root, counts)


def described(places: Sequence[Place]) -> tuple[int, str]:
    """The size of the images in a tar file, and the SHA-256 of their names and sizes, which are in its index."""
    text = json.dumps([[place.name, place.size] for place in places])
    return sum(place.size for place in places), hashlib.sha256(text.encode()).hexdigest()


def manifest_of_files(paths: Mapping[str, Path], split: str) -> Manifest:
    """The manifest of files by name, which are all for the same.

    Raises:
        OSError: a file cannot be read.
    """
    return Manifest(hashed(paths), dict.fromkeys(paths, split), common_folder(paths), {split: len(paths)})


def common_folder(paths: Mapping[str, Path]) -> str:
    """The innermost folder that has all files."""
    return os.path.commonpath([path.resolve().parent for path in paths.values()])


def hashed(files: Mapping[str, Path]) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of files, by name.

    Raises:
        OSError: a file cannot be read.
    """

    def read(path: Path) -> tuple[int, str]:
        with open(path, "rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()

    return dict(zip(files, in_threads(read, list(files.values()), "hashing images"), strict=True))
