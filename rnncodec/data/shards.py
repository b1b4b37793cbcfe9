"""Images in tar files, on disk or in an object store: an index of where they are, and reads of single images."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from braceexpand import braceexpand
from fsspec.core import url_to_fs

from rnncodec.data.cache import DataError, in_threads
from rnncodec.files.errors import one_line
from rnncodec.files.images import atomic_write, load_image, readable_suffixes

INDEX_VERSION = 1
THREADS = 16  # that ask about files
MARKS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "Content-MD5", "Digest")


class Place(NamedTuple):
    """Where an image is: the number of its shard, its name there, and its offset and size in bytes."""

    shard: int
    name: str
    offset: int
    size: int


class Shards:
    """Images in tar files, such as webdataset writes; members that are no images are left out.

    Args:
        urls: of the tar files, paths or addresses that fsspec opens, such as s3://bucket/train-000.tar.
        versions: of the tar files, see `version`.
        places: of the images, in the order of the shards and within them.
        max_pixels: images of more pixels are refused.
    """

    def __init__(self, urls: Sequence[str], versions: Sequence[str], places: Sequence[Place], max_pixels: int) -> None:
        self.urls, self.versions, self.places, self.max_pixels = list(urls), list(versions), list(places), max_pixels

    @cached_property
    def root(self) -> str:
        """The address of the innermost folder that has all tar files."""
        levels = zip(*(url.split("/")[:-1] for url in self.urls), strict=False)
        return "/".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))

    @cached_property
    def shard_names(self) -> list[str]:
        """The paths of the tar files from the root on, which stay when all of them move."""
        return [url.removeprefix(self.root).removeprefix("/") for url in self.urls]

    @cached_property
    def names(self) -> list[str]:
        """A name for each image."""
        return [f"{self.shard_names[place.shard]}/{place.name}" for place in self.places]

    @cached_property
    def groups(self) -> np.ndarray:
        """The number of the shard of each image, int64 [N]."""
        return np.array([place.shard for place in self.places], np.int64)

    @property
    def by_shard(self) -> dict[str, list[Place]]:
        """The places of the images of each tar file, by its name."""
        found: dict[str, list[Place]] = {name: [] for name in self.shard_names}
        for place in self.places:
            found[self.shard_names[place.shard]].append(place)
        return found

    def read(self, index: int) -> np.ndarray:
        """The pixels of an image, uint8 [H, W, 3].

        Raises:
            ImageError: it cannot be read as an image.
            DataError: the shard cannot be read.
        """
        return load_image(io.BytesIO(self.content(index)), self.max_pixels)

    def content(self, index: int) -> bytes:
        """The bytes of an image file.

        Raises:
            DataError: the shard cannot be read, or is shorter than when it was indexed.
        """
        place = self.places[index]
        url = self.urls[place.shard]
        with told(url):
            files, path = url_to_fs(url)
            data = files.cat_file(path, start=place.offset, end=place.offset + place.size)
        if len(data) != place.size:
            raise DataError(f"{url}: shorter than when it was indexed")
        return data


def find_shards(roots: Sequence[str]) -> list[str]:
    """The addresses of the tar files that are meant, in order.

    Args:
        roots: addresses, each of one tar file or, with braces ({000..099}) or wildcards (*), of several.

    Raises:
        DataError: there are none where a pattern says, or a place cannot be listed.
    """
    found: list[str] = []
    for url in (url for root in roots for url in ([root] if os.path.exists(root) else braceexpand(root, escape=False))):
        with told(url):
            files, path = url_to_fs(url)
            literal = os.path.exists(url) or not any(c in path for c in "*?[")
            listed = [path] if literal else sorted(files.glob(path))
            found += [files.unstrip_protocol(each) for each in listed]
        if not listed:
            raise DataError(f"{url}: no such tar file")
    return list(dict.fromkeys(found))


def index_shards(urls: Sequence[str], folder: Path, max_pixels: int) -> Shards:
    """Finds the images in tar files, without reading them; the index is kept in a folder until a file changes.

    Where nothing says whether a file has changed, they are found anew.

    Raises:
        DataError: a file cannot be read, is compressed, or is no tar file, or there are no images.
        OSError: the index cannot be written.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        versions = list(pool.map(version, urls))
    key = hashlib.sha256(json.dumps([INDEX_VERSION, urls, versions, sorted(readable_suffixes())]).encode()).hexdigest()
    path = folder / f"shards-{key[:24]}.json"
    try:
        listed = [[Place(*row) for row in rows] for rows in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError):
        listed = list(in_threads(members, urls, "indexing shards"))
        listed = [[place._replace(shard=i) for place in places] for i, places in enumerate(listed)]
        if all(versions):
            atomic_write(path, json.dumps(listed).encode())
    places = [place for rows in listed for place in rows]
    if not places:
        raise DataError(f"{urls[0]}: no images in the {len(urls)} tar files")
    return Shards(urls, versions, places, max_pixels)


def version(url: str) -> str:
    """What changes when a file changes; empty if its file system does not tell.

    Raises:
        DataError: it is missing, or its place cannot be reached.
    """
    with told(url):
        files, path = url_to_fs(url)
        facts = files.info(path)
        marks = {mark: str(facts[mark]) for mark in MARKS if facts.get(mark)}
        return json.dumps([facts["size"], marks]) if marks else ""


def unpack_images(images: Shards, numbers: Sequence[int], folder: Path) -> dict[str, Path]:
    """Copies single images to files, as far as these versions are not there; gives the paths by name.

    Raises:
        DataError: a shard cannot be read.
        OSError: a file cannot be written.
    """
    files: dict[str, Path] = {}
    for number in numbers:
        name, place = images.names[number], images.places[number]
        version = images.versions[place.shard]
        key = json.dumps([name, version, place.offset, place.size])
        files[name] = path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{Path(place.name).suffix}"
        if not (version and path.exists()):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, images.content(number))
    return files


def are_shards(roots: Sequence[str]) -> bool:
    """Whether roots are tar files, such as `find_shards` finds, rather than folders.

    Raises:
        DataError: some are and some are not.
    """
    for root in roots:
        if root.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise DataError(f"{root}: of a compressed tar file single images cannot be read; uncompress it")
    kinds = {"://" in root or root.endswith(".tar") for root in roots}
    if len(kinds) > 1:
        raise DataError("give either folders or tar files, not both")
    return kinds == {True}


def members(url: str) -> list[Place]:
    """The places of the images in one tar file, whose shard is 0.

    Raises:
        DataError: it cannot be read, is compressed, or is no tar file.
    """
    suffixes = readable_suffixes()
    # Only the headers are fetched, each with the byte before it, that tarfile reads to see whether the file goes on.
    with told(url):
        files, path = url_to_fs(url)
        with (
            files.open(path, "rb", cache_type="readahead", block_size=512) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            found = [
                Place(0, member.name, member.offset_data, member.size)
                for member in tar
                if member.isreg() and Path(member.name).suffix.lower() in suffixes and not hidden(member.name)
            ]
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                raise DataError(f"{url}: damaged after {len(found)} images")
            return found


def hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden."""
    return any(part.startswith(".") and part not in (".", "..") for part in Path(name).parts)


@contextmanager
def told(url: str) -> Iterator[None]:
    """Turns what goes wrong at an address into an error of one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # file systems raise nearly any exception
        text = one_line(error)
        if isinstance(error, FileNotFoundError):
            text = "no such tar file"
        raise DataError(f"{url}: {text}") from error
