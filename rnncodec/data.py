"""The data: each image decoded once into a memory-mapped cache, patches drawn from it as one endless, resumable stream.

files ──decode──► cache ──tiles, crops, flips──► uint8 batch ──► device ──crop, flip, normalize──► x in [-1, 1]
       (once)    (mmap)      (workers)                                      (one gather)
"""

import errno
import hashlib
import http.client
import io
import json
import os
import shutil
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

import lightning as L
import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from rich.progress import DownloadColumn, Progress, TaskID, TransferSpeedColumn, track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from rnncodec.files.images import FORMATS, MAX_PIXELS, find_images, load_image

CACHE_VERSION = 1
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by name of folder

CLIC_URL = "https://data.vision.ee.ethz.ch/cvl/clic/"
CLIC_ARCHIVES = {  # folder: archive and, where it is known, its MD5
    "professional/train": ("professional_train_2020.zip", "a6845cac88c3dd882246575f7a2fc5f9"),
    "professional/valid": ("professional_valid_2020.zip", "7111ee240435911db04dbc5f40d50272"),
    "mobile/train": ("mobile_train_2020.zip", None),
    "mobile/valid": ("mobile_valid_2020.zip", None),
}
MAX_MEMBER, MAX_UNPACKED = 2**28, 2**35  # bytes of one image of an archive, and of all
RETRIES, RETRY_SECONDS, TIMEOUT_SECONDS = 5, 1.0, 60.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class DataError(ValueError):
    """Data that is missing, refused, or other than what was asked for; the message is one line."""


# Which images there are, and what for


def split_images(
    root: Path, val_root: Path | None = None, manifest: Path | None = None, val_images: int = 16
) -> tuple[dict[str, Path], dict[str, str]]:
    """Finds the images of `PatchDataModule`'s arguments and gives each a split.

    Returns:
        The path of each image by its name (the path relative to its root), and its split, `train` or `val`.

    Raises:
        DataError: no image, none left to train on, or a bad manifest.
        ImageError: a folder is missing or cannot be read.
    """
    listed = read_manifest(manifest or root / "manifest.json", required=manifest is not None)
    if listed is not None:
        splits = listed
        files = {name: (manifest.parent if manifest else root) / name for name in splits}
    else:
        files = {path.relative_to(root).as_posix(): path for path in find_images([root])}
        by_folder = {name: _split_of(name) for name in files}
        rest = None if "train" in by_folder.values() else "train"
        splits = {name: split or rest for name, split in by_folder.items()}
    splits = {name: split for name, split in splits.items() if split in ("train", "val")}
    if val_root is not None:
        val_files = {f"val_root:{path.relative_to(val_root).as_posix()}": path for path in find_images([val_root])}
        seen = {path.resolve() for path in val_files.values()}  # val_root may lie within root
        splits = {name: "train" for name, s in splits.items() if s == "train" and files[name].resolve() not in seen}
        splits |= dict.fromkeys(val_files, "val")
        files |= val_files
    elif "val" not in splits.values():
        # By a hash of the name: the choice depends neither on the order nor on which other images there are.
        names = sorted(splits, key=lambda name: hashlib.sha256(name.encode()).digest())
        if names and val_images >= len(names):
            raise DataError(f"{root}: to hold out {val_images} of {len(names)} images leaves none to train on")
        splits |= dict.fromkeys(names[:val_images], "val")
    if "train" not in splits.values():
        raise DataError(f"{root}: no images to train on")
    return {name: files[name] for name in splits}, {name: str(split) for name, split in splits.items()}


def _split_of(name: str) -> str | None:
    """The split that the innermost telling folder of a relative path names."""
    folders = [part.lower() for part in PurePosixPath(name).parts[-2::-1]]
    return next((SPLITS[folder] for folder in folders if folder in SPLITS), None)


def read_manifest(path: Path, required: bool = True) -> dict[str, str | None] | None:
    """Reads a JSON list of objects with `file` (relative to the manifest) and `split`: the split by file.

    A manifest that is not required and says nothing of this kind is None.
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
    """Where an image lies in the cache."""

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
        skipped: why an image is missing, by name.

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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # pickled, a memory map becomes a copy of all pixels

    def __getitem__(self, index: int) -> np.ndarray:
        """The pixels of one image, uint8 [H, W, 3], read from disk where they are used."""
        if self._pixels is None:
            self._pixels = np.memmap(self.folder / "pixels.raw", np.uint8, "r")
        entry = self.entries[index]
        end = entry.offset + 3 * entry.height * entry.width
        return self._pixels[entry.offset : end].reshape(entry.height, entry.width, 3)


def build_cache(folder: Path, files: dict[str, Path], max_pixels: int) -> None:
    """Decodes images into a new cache; images that cannot be read are skipped. The folder appears when it is complete.

    Raises:
        DataError: the disk is full.
    """
    names = sorted(files)
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    _check_space(folder.parent, sum(_decoded_bytes(path, max_pixels) for path in files.values()), "the decoded images")

    def load(name: str) -> np.ndarray | str:
        try:
            return load_image(files[name], max_pixels)
        except ValueError as error:
            return str(error).removeprefix(f"{files[name]}: ")

    entries, skipped, offset = [], {}, 0
    try:
        temporary.mkdir()
        with open(temporary / "pixels.raw", "wb") as pixels:
            for name, image in zip(names, _in_threads(load, names, "decoding images"), strict=True):
                if isinstance(image, str):
                    skipped[name] = image
                else:
                    height, width, _ = image.shape
                    entries.append(Entry(name, height, width, offset))
                    pixels.write(np.ascontiguousarray(image).data)
                    offset += image.nbytes
            pixels.flush()
            os.fsync(pixels.fileno())
        (temporary / "index.json").write_text(json.dumps({"entries": entries, "skipped": skipped}))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decoded_bytes(path: Path, max_pixels: int) -> int:
    """Bytes of the pixels of an image, by its header; 0 if it will be skipped."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            return 3 * pixels if pixels <= max_pixels else 0
    except Exception:  # whatever is wrong with the file, load_image will say so
        return 0


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"{folder}: {what} need {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item], description: str) -> Iterator[Result]:
    """Maps in threads, in order and with a progress bar; only a few results at a time wait to be taken."""
    workers = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(workers) as pool:
        for start in track(range(0, len(items), workers), description, disable=not items):
            yield from pool.map(function, items[start : start + workers])


# The stream of patches


def grid_cells(sizes: np.ndarray, tile_size: int) -> np.ndarray:
    """The non-overlapping squares of images' grids: sizes int [N, 2] (H, W) to cells int [C, 3] (image, y, x)."""
    rows, columns = (sizes // tile_size).T
    image = np.repeat(np.arange(len(sizes)), rows * columns)
    within = np.arange(len(image)) - np.repeat(np.cumsum(rows * columns) - rows * columns, rows * columns)
    y, x = np.divmod(within, columns[image])
    return np.stack([image, y * tile_size, x * tile_size], axis=1).astype(np.int32)


def high_entropy_cells(cache: ImageCache, patch_size: int, count: int) -> np.ndarray:
    """Each image's `count` grid patches that PNG compresses worst (T17 sec. 5), worst first: int [C, 3], as above."""

    def choose(index: int) -> np.ndarray:
        pixels = cache[index]
        cells = grid_cells(np.array([pixels.shape[:2]]), patch_size)
        sizes = [png_bytes(pixels[y : y + patch_size, x : x + patch_size]) for _, y, x in cells]
        cells[:, 0] = index
        return cells[np.argsort(-np.array(sizes, np.int64), kind="stable")[:count]]

    chosen = list(_in_threads(choose, range(len(cache.entries)), "choosing high-entropy patches"))
    return np.concatenate([np.empty((0, 3), np.int32), *chosen])


def png_bytes(pixels: np.ndarray) -> int:
    """Length of the PNG file of uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.tell()


class PatchStream(Dataset):
    """An endless stream of batches of tiles; item b is batch b of this rank.

    An epoch visits every cell once, in an order drawn from (seed, epoch). Sample n of the stream depends on (seed, n)
    alone, and batch b of rank r of w holds the B samples from (b w + r) B on: the position in the data is one integer,
    no two ranks or workers share a sample, and together they see what a single process would.

    Args:
        cache: of the images.
        cells: int [C, 3] (image, y, x), places of the tiles.
        margins: int [N, 2], how far down and right an image's cells may be shifted together; drawn in every epoch.
        batch_size: B, for each rank.
        tile_size: side of a tile.
        patch_size: side of the patch that is cropped from it.
        flips: whether half of the patches are mirrored left to right.
        seed: of the order, the shifts, the crops and the flips.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(
        self,
        cache: ImageCache,
        cells: np.ndarray,
        margins: np.ndarray,
        *,
        batch_size: int,
        tile_size: int,
        patch_size: int,
        flips: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.cache, self.cells, self.margins, self.seed, self.flips = cache, cells, margins, seed, flips
        self.batch_size, self.tile_size, self.patch_size = batch_size, tile_size, patch_size
        self.rank, self.world_size = rank, world_size
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the cells [C] and the images' shifts [N, 2] in an epoch."""
        if epoch not in self._epochs:
            # Two epochs are kept because batches at their border, of several ranks or workers, need both.
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch + 1]))
            self._epochs[epoch] = rng.permutation(len(self.cells)), rng.integers(0, self.margins + 1)
        return self._epochs[epoch]

    def __getitem__(self, batch: int) -> dict[str, Any]:
        """Tiles uint8 [B, T, T, 3]; corners int64 [B, 2], (y, x) of the crops; flips bool [B]; next_sample, an int."""
        size, tile = self.batch_size, self.tile_size
        first = (batch * self.world_size + self.rank) * size
        # A count of Philox's counter is four words, so that sample n has words of its own, whatever the batches.
        words = np.random.Philox(key=[self.seed, 0], counter=first).random_raw(4 * size).reshape(size, 4)
        fractions = words >> np.uint64(32)  # of 2^32
        corners = (fractions[:, :2] * np.uint64(tile - self.patch_size + 1)) >> np.uint64(32)
        flips = (fractions[:, 2] < 2**31) & self.flips
        tiles = np.empty((size, tile, tile, 3), np.uint8)
        for i in range(size):
            epoch, place = divmod(first + i, len(self.cells))
            order, shifts = self._epoch(epoch)
            image, y, x = self.cells[order[place]]
            down, right = shifts[image]
            tiles[i] = self.cache[image][y + down : y + down + tile, x + right : x + right + tile]
        return {
            "tiles": torch.from_numpy(tiles),
            "corners": torch.from_numpy(corners.astype(np.int64)),
            "flips": torch.from_numpy(flips),
            "next_sample": (batch + 1) * self.world_size * size,
        }


class WholeImages(Dataset):
    """Whole images of the cache, uint8 [1, 3, H, W] each."""

    def __init__(self, cache: ImageCache, images: Sequence[int]) -> None:
        self.cache, self.images = cache, images

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.cache[self.images[index]])).permute(2, 0, 1)[None]


# Lightning replaces a sampler that is not a DistributedSampler by its own, which knows neither where the stream
# stands nor how to share images without showing some of them twice.


class StreamSampler(DistributedSampler):
    """Counts batches without end, from where the data module stands when the counting starts."""

    def __init__(self, first_batch: Callable[[], int]) -> None:
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[int]:
        batch = self.first_batch()
        while True:
            yield batch
            batch += 1

    def __len__(self) -> int:
        raise TypeError("the stream of batches has no end")


class ShareSampler(DistributedSampler):
    """Every world_size-th index from the rank on; the shares differ by one if need be."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


# On the device


def normalize(x: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return x.float().div_(127.5).sub_(1)


def cut_patches(tiles: Tensor, corners: Tensor, flips: Tensor, patch_size: int) -> Tensor:
    """Crops, flips and normalizes a batch by one gather.

    Args:
        tiles: uint8 [B, T, T, 3].
        corners: int64 [B, 2], (y, x) of the patch in its tile.
        flips: bool [B], which patches are mirrored left to right.
        patch_size: P.

    Returns:
        float32 [B, 3, P, P] in [-1, 1], channels last in memory.
    """
    steps = torch.arange(patch_size, device=tiles.device)
    batch = torch.arange(len(tiles), device=tiles.device)
    rows = corners[:, :1] + steps  # [B, P]
    columns = corners[:, 1:] + torch.where(flips[:, None], patch_size - 1 - steps, steps)
    patches = tiles[batch[:, None, None], rows[:, :, None], columns[:, None, :]]  # [B, P, P, 3]
    return normalize(patches.permute(0, 3, 1, 2))


class PatchDataModule(L.LightningDataModule):
    """Patches to train on and whole images to validate on, from a folder of photographs.

    Which images validate is told by, in this order: `val_root`; the manifest; folders named `train` and `valid` (the
    layout of CLIC: professional/train, mobile/valid ...; images in `test` are left out); else some are held out.

    Args:
        root: folder of images, searched recursively.
        val_root: folder of validation images.
        manifest: JSON list of objects with `file` (relative to it) and `split`; by default `manifest.json` in `root`.
        val_images: how many images to hold out, by a hash of the name, where nothing tells which.
        batch_size: patches for each rank and step.
        patch_size: side of a patch in pixels.
        tile_size: side of the squares, each visited once an epoch, from which patches are cropped at random.
        selection: `uniform`, or `high_entropy`: only the grid patches that PNG compresses worst, uncropped (T17).
        patches_per_image: how many patches `high_entropy` takes of each image.
        flips: whether half of the patches, at random, are mirrored left to right.
        num_workers: processes that read the data, for each rank; by default one beside a GPU and none on a CPU, where
            to pass a batch on takes longer than to read it.
        seed: of the order of the data, the crops and the flips.
        cache_dir: folder for decoded images, 3 bytes a pixel; by default rnncodec in the user's cache folder.
        max_pixels: images of more pixels are skipped.
        download: whether to fetch the CLIC 2020 training and validation sets (several GB) into `root` first.
        clic_url: where from.
    """

    def __init__(
        self,
        root: str | Path,
        val_root: str | Path | None = None,
        manifest: str | Path | None = None,
        val_images: int = 16,
        batch_size: int = 32,
        patch_size: int = 32,
        tile_size: int = 64,
        selection: Literal["uniform", "high_entropy"] = "uniform",
        patches_per_image: int = 100,
        flips: bool = True,
        num_workers: int | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        max_pixels: int = MAX_PIXELS,
        download: bool = False,
        clic_url: str = CLIC_URL,
    ) -> None:
        super().__init__()
        positive = {"batch_size": batch_size, "patch_size": patch_size, "patches_per_image": patches_per_image}
        for name, value in positive.items():
            if value < 1:
                raise DataError(f"{name} must be at least 1, not {value}")
        for name, value in {"val_images": val_images, "num_workers": num_workers or 0, "seed": seed}.items():
            if value < 0:
                raise DataError(f"{name} must not be negative, not {value}")
        if selection == "uniform" and tile_size < patch_size:
            raise DataError(f"tile_size {tile_size} must be at least patch_size {patch_size}")
        self.root, self.val_images = Path(root), val_images
        self.val_root = Path(val_root) if val_root else None
        self.manifest = Path(manifest) if manifest else None
        self.batch_size, self.patch_size = batch_size, patch_size
        self.tile_size = patch_size if selection == "high_entropy" else tile_size
        self.selection, self.patches_per_image, self.flips = selection, patches_per_image, flips
        self.num_workers, self.seed, self.max_pixels = num_workers, seed, max_pixels
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache_dir = Path(cache_dir) if cache_dir else user_cache / "rnncodec"
        self.download, self.clic_url = download, clic_url
        self.position = 0
        self._ready = False

    def _folder(self, files: dict[str, Path]) -> Path:
        """The cache of these files: another one if any of them changes, or becomes readable."""
        facts = []
        for name, path in sorted(files.items()):
            try:
                stat = path.stat()
                facts.append((name, stat.st_size, stat.st_mtime_ns, os.access(path, os.R_OK)))
            except OSError:
                facts.append((name, None))
        key = hashlib.sha256(json.dumps([CACHE_VERSION, self.max_pixels, facts]).encode()).hexdigest()
        return self.cache_dir / key[:24]

    def _patches_file(self, folder: Path) -> Path:
        return folder / f"patches-{self.patch_size}-{self.patches_per_image}.npy"

    def _load_patches(self, folder: Path, cache: ImageCache) -> np.ndarray:
        """The high-entropy cells that `prepare_data` chose."""
        try:
            cells = np.load(self._patches_file(folder), allow_pickle=False)
            ends = _sizes(cache)[cells[:, 0]] - self.patch_size
            if cells.dtype != np.int32 or cells.shape[1:] != (3,) or (cells < 0).any() or (cells[:, 1:] > ends).any():
                raise ValueError("not cells of these images")
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise DataError(f"{self._patches_file(folder)}: not a complete choice of patches") from error
        return cells

    def prepare_data(self) -> None:
        """Downloads and decodes what is not there yet, in one process of each machine; others that come to it wait."""
        if self.download:
            download_clic(self.root, self.clic_url)
        files, _ = split_images(self.root, self.val_root, self.manifest, self.val_images)
        folder = self._folder(files)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            try:
                held = lock.acquire(timeout=0)
            except Timeout:
                rank_zero_info(f"waiting for another process that decodes the images into {folder}")
                held = lock.acquire()
            with held:
                self._build(folder, files)
        except OSError as error:
            reason = f"{error.filename or folder}: {error.strerror or error}"
            raise DataError(f"{reason}; choose another folder with cache_dir") from error

    def _build(self, folder: Path, files: dict[str, Path]) -> None:
        try:
            cache = ImageCache(folder)
        except DataError:
            shutil.rmtree(folder, ignore_errors=True)
            build_cache(folder, files, self.max_pixels)
            cache = ImageCache(folder)
        if self.selection == "high_entropy":
            try:
                self._load_patches(folder, cache)
            except DataError:
                temporary = self._patches_file(folder).with_suffix(".tmp.npy")
                np.save(temporary, high_entropy_cells(cache, self.patch_size, self.patches_per_image))
                os.replace(temporary, self._patches_file(folder))

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache, in every process, and reports once what was skipped."""
        if self._ready:
            return
        files, splits = split_images(self.root, self.val_root, self.manifest, self.val_images)
        folder = self._folder(files)
        self.cache = ImageCache(folder)
        names = [entry.name for entry in self.cache.entries]
        train = np.array([splits[name] == "train" for name in names], bool)
        sizes = _sizes(self.cache)
        if self.selection == "high_entropy":
            cells = self._load_patches(folder, self.cache)
            self.margins = np.zeros_like(sizes)
        else:
            cells = grid_cells(sizes, self.tile_size)
            self.margins = sizes % self.tile_size
        self.cells = cells[train[cells[:, 0]]]
        self.val_indices = [i for i, name in enumerate(names) if splits[name] == "val"]
        small = [name for i, name in enumerate(names) if train[i] and sizes[i].min() < self.tile_size]
        message = f"{train.sum() - len(small)} images to train on, {len(self.val_indices)} to validate on"
        unreadable = [f"{name} ({reason})" for name, reason in self.cache.skipped.items()]
        for what, which in ("unreadable", unreadable), (f"below {self.tile_size}x{self.tile_size} pixels", small):
            if which:
                message += f"; skipped {len(which)} {what}: {', '.join(which[:3])}{', ...' * (len(which) > 3)}"
        if not len(self.cells):
            raise DataError(f"{self.root}: no usable image; {message}")
        rank_zero_info(message)
        self._ready = True

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def next_batch(self) -> int:
        """The batch, counted on each rank, that follows what has been trained on.

        Raises:
            DataError: a checkpoint of another batch size or number of ranks stands within a batch.
        """
        world_size = self._rank()[1]
        batch, within = divmod(self.position, self.batch_size * world_size)
        if within:
            raise DataError(
                f"the checkpoint stands at sample {self.position}, which steps of {self.batch_size} samples on each of "
                f"{world_size} ranks do not meet; choose a batch_size so that their product divides it"
            )
        return batch

    def train_dataloader(self) -> DataLoader:
        """The endless stream of this rank, from the position that was trained up to."""
        rank, world_size = self._rank()
        stream = PatchStream(
            self.cache,
            self.cells,
            self.margins,
            batch_size=self.batch_size,
            tile_size=self.tile_size,
            patch_size=self.patch_size,
            flips=self.flips,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        self.next_batch()  # a position that does not fit is reported here rather than in a worker
        workers = self.num_workers
        if workers is None:
            workers = int(self.trainer is not None and self.trainer.strategy.root_device.type == "cuda")
        return DataLoader(
            stream,
            batch_size=None,
            sampler=StreamSampler(self.next_batch),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def sample(self, pixels: int) -> Tensor:
        """At least so many pixels of training images, if they have them, in tiles float32 [N, 3, T, T] in [-1, 1].

        The same on every rank. T is `tile_size`, reduced to a multiple of 16 if it is above.
        """
        side = max(self.tile_size // 16, 1) * 16
        count = min(-(-pixels // side**2), len(self.cells))
        stream = PatchStream(
            self.cache,
            self.cells,
            self.margins,
            batch_size=count,
            tile_size=self.tile_size,
            patch_size=self.patch_size,
            flips=False,
            seed=self.seed,
        )
        return normalize(stream[0]["tiles"][:, :side, :side].permute(0, 3, 1, 2))

    def val_dataloader(self) -> DataLoader:
        """This rank's share of the whole validation images.

        Raises:
            DataError: there are some, but fewer than ranks.
        """
        rank, world_size = self._rank()
        if 0 < len(self.val_indices) < world_size:
            # Lightning skips validation on a rank without images, and the others would wait for its metrics for ever.
            raise DataError(f"{world_size} ranks need as many validation images, not {len(self.val_indices)}, or none")
        sampler = ShareSampler(len(self.val_indices), rank, world_size)
        images = WholeImages(self.cache, self.val_indices)
        return DataLoader(images, batch_size=None, sampler=sampler, pin_memory=torch.cuda.is_available())

    @property
    def val_names(self) -> list[str]:
        """Names of all validation images, of which a rank has every world_size-th from its own number on."""
        return [self.cache.entries[i].name for i in self.val_indices]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Tensor:
        """Patches float32 [B, 3, P, P] or a whole image [1, 3, H, W], in [-1, 1], channels last in memory."""
        if isinstance(batch, Tensor):
            return normalize(batch)
        # Counted here, where a batch goes into training: workers are some batches ahead.
        self.position = batch["next_sample"]
        return cut_patches(batch["tiles"], batch["corners"], batch["flips"], self.patch_size)

    def state_dict(self) -> dict[str, int]:
        return {
            "position": self.position,
            "seed": self.seed,
            "cells": len(self.cells),
            "batch_size": self.batch_size,
            "world_size": self._rank()[1],
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if state_dict["seed"] != self.seed:
            raise DataError(f"the checkpoint's data was drawn with seed {state_dict['seed']}, not {self.seed}")
        if state_dict["cells"] != len(self.cells):
            rank_zero_warn("the images, or what is drawn from them, are not those that the checkpoint was trained on")
        self.position = state_dict["position"]


def _sizes(cache: ImageCache) -> np.ndarray:
    """(H, W) of the images, int64 [N, 2]."""
    return np.array([(entry.height, entry.width) for entry in cache.entries], np.int64).reshape(-1, 2)


# The download of CLIC


def download_clic(root: Path, url: str = CLIC_URL) -> None:
    """Fetches the CLIC 2020 archives that are not there yet and unpacks them to professional/train, mobile/valid ...

    A download that was interrupted goes on where it was. A folder appears when it is complete.

    Raises:
        DataError: the server cannot be reached or lacks a file, or an archive is corrupt or refused.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".clic.lock"), Progress(
            *Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn()
        ) as progress:  # fmt: skip
            for name, (archive, md5) in CLIC_ARCHIVES.items():
                if (root / name).is_dir():
                    continue
                path = root / archive
                if not path.exists():
                    fetch(f"{url.rstrip('/')}/{archive}", path, md5, progress)
                unpack(path, root / name, progress)
                path.unlink()
    except OSError as error:
        raise DataError(f"{error.filename or root}: {error.strerror or error}") from error


def fetch(url: str, path: Path, md5: str | None, progress: Progress) -> None:
    """Downloads a file, which appears at its path when it is complete and its MD5, if known, is right.

    Raises:
        DataError: the server cannot be reached or lacks the file, the disk is full, or the MD5 is wrong.
    """
    if not url.startswith(("https://", "http://")):
        raise DataError(f"{url}: not an http address")
    part = path.with_name(f"{path.name}.part")
    task = progress.add_task(path.name, total=None)
    failures = most = 0
    while True:
        try:
            complete, reason = _receive(url, part, progress, task)
            if complete:
                break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(f"{url}: {error.code} {error.reason}") from error
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EDQUOT):
                raise
            reason = str(error) or type(error).__name__
        have = part.stat().st_size if part.exists() else 0
        failures, most = (0, have) if have > most else (failures + 1, most)
        if failures > RETRIES:
            raise DataError(f"{url}: {reason}; the next download goes on from here")
        time.sleep(RETRY_SECONDS * 2**failures)

    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "md5" if md5 else "sha256").hexdigest()
    if md5 is None:
        rank_zero_info(f"{path.name}: no checksum is known; its SHA-256 is {digest}")
    elif digest != md5:
        part.unlink()
        raise DataError(f"{url}: the MD5 is {digest} where {md5} was expected; the file was deleted")
    os.replace(part, path)


def _receive(url: str, part: Path, progress: Progress, task: TaskID) -> tuple[bool, str]:
    """Appends to a partial file what a server has beyond it: whether the file is complete, and if not, why."""
    with open(part, "ab") as file:
        have = file.tell()
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return True, ""
            file.truncate(0)
            return False, "the partial file is longer than the server's"
        with response:
            if have and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
                file.truncate(0)
                have = 0
                if response.status == 206:
                    return False, "the server sent another range than it was asked for"
            length = response.headers.get("Content-Length")
            total = have + int(length) if length and length.isdecimal() else None
            if total is not None:
                _check_space(part.parent, total - have, part.name)
            while chunk := response.read(2**18):
                file.write(chunk)
                have += len(chunk)
                progress.update(task, completed=have, total=total)
        return total in (None, have), f"the connection closed after {have} of {total} bytes"


def unpack(archive: Path, folder: Path, progress: Progress) -> None:
    """Unpacks the images of a zip archive, whose outermost folder becomes `folder`, which appears when it is complete.

    Raises:
        DataError: the archive is corrupt or has paths or sizes that no archive of photographs has; it is deleted.
    """
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = []
            for info in file.infolist():
                path = PurePosixPath(info.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in info.filename:
                    raise zipfile.BadZipFile(f"{info.filename!r} leads out of the folder")
                hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
                if not info.is_dir() and not hidden and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
                    members.append((info, Path(*path.parts[1:] or path.parts)))
            total = sum(info.file_size for info, _ in members)
            if total > MAX_UNPACKED or any(info.file_size > MAX_MEMBER for info, _ in members):
                raise zipfile.BadZipFile("it unpacks to more than photographs do")
            if not members:
                raise zipfile.BadZipFile("no images in it")
            _check_space(archive.parent, total, f"the images of {archive.name}")
            for info, path in progress.track(members, description=f"unpacking {archive.name}"):
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                with file.open(info) as source, open(temporary / path, "wb") as target:
                    shutil.copyfileobj(source, target)
        temporary.rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        archive.unlink()
        raise DataError(f"{archive}: refused and deleted: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
