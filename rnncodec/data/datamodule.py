"""The data module, which decodes each image once into a cache and draws patches as an endless, resumable stream.

files ──decode──► cache ──tiles, crops, flips──► uint8 batch ──► device ──crop, flip, normalize──► x in [-1, 1]
       (once)    (mmap)      (workers)                                      (one gather)

Tar files are not decoded into the cache, but read as the stream needs them:

shards ──index──► places ──reads──► windows ──tiles, crops, flips──► uint8 batch ──► ...
       (once)            (workers)
"""

import hashlib
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.filesize import decimal
from torch import Tensor
from torch.utils.data import DataLoader

from rnncodec.data.cache import CACHE_VERSION, DataError, ImageCache, build_cache, held_out, split_images, val_images_of
from rnncodec.data.clic import CLIC_URL, download_clic
from rnncodec.data.patches import (
    PatchStream,
    ShareSampler,
    StreamSampler,
    WholeImages,
    cut_patches,
    grid_cells,
    high_entropy_cells,
    normalize,
)
from rnncodec.data.shards import are_shards, find_shards, index_shards, unpack_images
from rnncodec.data.windows import LANES, WindowStream
from rnncodec.files.images import MAX_PIXELS
from rnncodec.home import cache_folder

READERS = 4  # processes that read tar files, if a GPU waits for them


class PatchDataModule(L.LightningDataModule):
    """Patches to train on and whole images to validate on, from a folder of photographs.

    Validation images are, in this order of precedence: those in `val_root`; those that the manifest names; those in
    folders named `valid`, beside `train` (as in CLIC: professional/train, mobile/valid ...; images in `test` are left
    out); or some that are held out.

    Args:
        root: folder of images, searched recursively, or a list of such folders; or tar files with images, such as
            webdataset writes, by their paths or by addresses that fsspec opens, with braces or wildcards for several.
        val_root: folder of validation images.
        manifest: JSON list of objects with `file` (relative to it) and `split`; by default `manifest.json` in `root`.
        val_images: how many images to hold out, by a hash of the name, where nothing else says which.
        batch_size: patches for each rank and step.
        patch_size: side of a patch in pixels.
        tile_size: side of the squares, each visited once an epoch, from which patches are cropped at random. Of tar
            files, each image gives 16 of them an epoch, at random places.
        selection: `uniform`, or `high_entropy`: only the grid patches that PNG compresses worst, uncropped (Toderici et
            al. 2017).
        patches_per_image: how many patches `high_entropy` takes of each image.
        flips: whether half of the patches, at random, are mirrored left to right.
        num_workers: processes that read the data, for each rank; by default one for a GPU (of tar files, four), and
            none for a CPU, where passing a batch between processes takes longer than reading it.
        seed: of the order of the data, the crops and the flips.
        cache_dir: folder for decoded images, 3 bytes a pixel; by default rnncodec in the user's cache folder.
        max_pixels: images of more pixels are skipped.
        download: whether to fetch the CLIC 2020 training and validation sets (several GB) into `root` first.
        clic_url: address of the archives.
    """

    def __init__(
        self,
        root: str | Path | list[str],
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
        self.roots = [str(each) for each in root] if isinstance(root, list) else [str(root)]
        if not self.roots:
            raise DataError("root names no folder")
        self.sharded, self.val_images = are_shards(self.roots), val_images
        for what, given in {
            "manifest": manifest,
            "download": download,
            "selection high_entropy": selection == "high_entropy",
        }.items():
            if self.sharded and given:
                raise DataError(f"{what} goes with a folder of images, not with tar files")
        if download and len(self.roots) > 1:
            raise DataError("download goes with one folder")
        self.val_root = Path(val_root) if val_root else None
        self.manifest = Path(manifest) if manifest else None
        self.batch_size, self.patch_size = batch_size, patch_size
        self.tile_size = patch_size if selection == "high_entropy" else tile_size
        self.selection, self.patches_per_image, self.flips = selection, patches_per_image, flips
        self.num_workers, self.seed, self.max_pixels = num_workers, seed, max_pixels
        self.cache_dir = Path(cache_dir) if cache_dir else cache_folder("cache_dir")
        self.download, self.clic_url = download, clic_url
        self.position = 0
        self._ready = False

    def _folder(self, files: dict[str, Path]) -> Path:
        """The folder of the cache of these files, which changes if one of them changes or becomes readable."""
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

    def _find(self) -> tuple[dict[str, Path], dict[str, str]]:
        """The image files to decode into the cache, and their splits; of tar files only those to validate on.

        Finds the images in tar files, too.
        """
        if not self.sharded:
            return split_images([Path(root) for root in self.roots], self.val_root, self.manifest, self.val_images)
        self.images = index_shards(find_shards(self.roots), self.cache_dir, self.max_pixels)
        names = self.images.names
        held = set() if self.val_root else set(held_out(names, self.val_images, self.roots[0]))
        self.chosen = np.array([i for i, name in enumerate(names) if name not in held])
        if self.val_root:
            files = val_images_of(self.val_root)
        else:
            numbers = [i for i, name in enumerate(names) if name in held]
            files = unpack_images(self.images, numbers, self.cache_dir / "held-out")
        return files, dict.fromkeys(files, "val")

    def prepare_data(self) -> None:
        """Downloads and decodes what is not there yet, in one process of each machine, for which others wait."""
        if self.download:
            download_clic(Path(self.roots[0]), self.clic_url)
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with self._lock(self.cache_dir / "shards.lock") if self.sharded else nullcontext():
                files, _ = self._find()
            folder = self._folder(files)
            with self._lock(folder.with_suffix(".lock")):
                self._build(folder, files)
        except OSError as error:
            reason = f"{error.filename or self.cache_dir}: {error.strerror or error}"
            raise DataError(f"{reason}; choose another folder with cache_dir") from error

    def _lock(self, path: Path) -> AcquireReturnProxy:
        """A lock that is held until the context ends, and is waited for."""
        lock = FileLock(path)
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            rank_zero_info(f"waiting for another process that prepares {path.with_suffix('')}")
            return lock.acquire()

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
        """Opens the cache in every process, and reports once which images were skipped."""
        if self._ready:
            return
        self.files, self.splits = self._find()
        folder = self._folder(self.files)
        self.cache = ImageCache(folder)
        names = [entry.name for entry in self.cache.entries]
        train = np.array([self.splits[name] == "train" for name in names], bool)
        sizes = _sizes(self.cache)
        if self.selection == "high_entropy":
            cells = self._load_patches(folder, self.cache)
            self.margins = np.zeros_like(sizes)
        else:
            cells = grid_cells(sizes, self.tile_size)
            self.margins = sizes % self.tile_size
        self.cells = cells[train[cells[:, 0]]]
        self.val_indices = [i for i, name in enumerate(names) if self.splits[name] == "val"]
        small = [name for i, name in enumerate(names) if train[i] and sizes[i].min() < self.tile_size]
        count = len(self.chosen) if self.sharded else train.sum() - len(small)
        message = f"{count} images to train on, {len(self.val_indices)} to validate on"
        unreadable = [f"{name} ({reason})" for name, reason in self.cache.skipped.items()]
        for what, which in ("unreadable", unreadable), (f"below {self.tile_size}x{self.tile_size} pixels", small):
            if which:
                message += f"; skipped {len(which)} {what}: {', '.join(which[:3])}{', ...' * (len(which) > 3)}"
        if not count or not (self.sharded or len(self.cells)):
            raise DataError(f"{self.roots[0]}: no usable image; {message}")
        rank_zero_info(message)
        rank_zero_info(f"decoded images: {folder}, {decimal(self.cache.nbytes)}")
        self._ready = True

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def next_batch(self) -> int:
        """The number of the batch of this rank that follows those trained on.

        Raises:
            DataError: the position, from a checkpoint of another batch size or number of ranks, is within a batch.
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
        """The endless stream of this rank, from the position that training has reached."""
        stream = self._stream(self.batch_size, self.flips, *self._rank())
        self.next_batch()  # a position that does not fit is reported here rather than in a worker
        workers = self.num_workers
        if workers is None:
            cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
            workers = cuda * (READERS if self.sharded else 1)
        if self.sharded and workers:
            workers = max(count for count in range(1, LANES + 1) if LANES % count == 0 and count <= workers)
        return DataLoader(
            stream,
            batch_size=None,
            sampler=StreamSampler(self.next_batch),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _stream(self, batch_size: int, flips: bool, rank: int = 0, world_size: int = 1) -> PatchStream | WindowStream:
        sizes = {"batch_size": batch_size, "tile_size": self.tile_size, "patch_size": self.patch_size}
        place = {"seed": self.seed, "rank": rank, "world_size": world_size}
        if self.sharded:
            return WindowStream(self.images, self.chosen, **sizes, flips=flips, **place)
        return PatchStream(self.cache, self.cells, self.margins, **sizes, flips=flips, **place)

    def sample(self, pixels: int) -> Tensor:
        """Tiles of training images, float32 [N, 3, T, T] in [-1, 1], with at least `pixels` pixels if there are enough.

        They are the same on every rank. T is `tile_size`, rounded down to a multiple of 16 unless it is below 16.
        """
        side = max(self.tile_size // 16, 1) * 16
        count = -(-pixels // side**2)
        stream = self._stream(count if self.sharded else min(count, len(self.cells)), flips=False)
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
        """Names of all validation images; a rank has every world_size-th, starting with its own number."""
        return [self.cache.entries[i].name for i in self.val_indices]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Tensor:
        """Patches float32 [B, 3, P, P] or a whole image [1, 3, H, W], in [-1, 1], channels last in memory."""
        if isinstance(batch, Tensor):
            return normalize(batch)
        # Counted here, where a batch goes into training, because workers are some batches ahead.
        self.position = batch["next_sample"]
        return cut_patches(batch["tiles"], batch["corners"], batch["flips"], self.patch_size)

    @property
    def _count(self) -> int:
        """The number of images in tar files, or of cells, by which a checkpoint knows the data."""
        return len(self.chosen) if self.sharded else len(self.cells)

    def state_dict(self) -> dict[str, int]:
        return {
            "position": self.position,
            "seed": self.seed,
            "cells": self._count,
            "batch_size": self.batch_size,
            "world_size": self._rank()[1],
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if state_dict["seed"] != self.seed:
            raise DataError(f"the checkpoint's data was drawn with seed {state_dict['seed']}, not {self.seed}")
        if state_dict["cells"] != self._count:
            rank_zero_warn("the images, or what is drawn from them, are not those that the checkpoint was trained on")
        self.position = state_dict["position"]


def _sizes(cache: ImageCache) -> np.ndarray:
    """(H, W) of the images, int64 [N, 2]."""
    return np.array([(entry.height, entry.width) for entry in cache.entries], np.int64).reshape(-1, 2)
