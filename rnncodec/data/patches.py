"""The stream of training patches: tiles, their order, crops and flips, and the share of each rank."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from rnncodec.data.cache import ImageCache, in_threads

Drawn = TypeVar("Drawn")


def grid_cells(sizes: np.ndarray, tile_size: int) -> np.ndarray:
    """Divides images into non-overlapping squares: sizes int [N, 2] (H, W) to cells int [C, 3] (image, y, x)."""
    rows, columns = (sizes // tile_size).T
    image = np.repeat(np.arange(len(sizes)), rows * columns)
    within = np.arange(len(image)) - np.repeat(np.cumsum(rows * columns) - rows * columns, rows * columns)
    y, x = np.divmod(within, columns[image])
    return np.stack([image, y * tile_size, x * tile_size], axis=1).astype(np.int32)


def high_entropy_cells(cache: ImageCache, patch_size: int, count: int) -> np.ndarray:
    """The `count` cells of each image that PNG compresses worst, worst first, as in `grid_cells`.

    These are the high-entropy patches of Toderici et al. 2017, sec. 5.
    """

    def choose(index: int) -> np.ndarray:
        pixels = cache[index]
        cells = grid_cells(np.array([pixels.shape[:2]]), patch_size)
        sizes = [png_bytes(pixels[y : y + patch_size, x : x + patch_size]) for _, y, x in cells]
        cells[:, 0] = index
        return cells[np.argsort(-np.array(sizes, np.int64), kind="stable")[:count]]

    chosen = list(in_threads(choose, range(len(cache.entries)), "choosing high-entropy patches"))
    return np.concatenate([np.empty((0, 3), np.int32), *chosen])


def png_bytes(pixels: np.ndarray) -> int:
    """Bytes of the PNG file of uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.tell()


class Epochs(dict[int, Drawn]):
    """What is drawn for each epoch, when it is asked for.

    Two are kept, because ranks and workers need both at their border.

    Args:
        draw: draws an epoch.
    """

    def __init__(self, draw: Callable[[int], Drawn]) -> None:
        self.draw = draw

    def __missing__(self, epoch: int) -> Drawn:
        for other in self.keys() - {epoch - 1}:
            del self[other]
        self[epoch] = self.draw(epoch)
        return self[epoch]


def draw_crops(seed: int, first: int, count: int, spare: int, flips: bool) -> dict[str, Tensor]:
    """Where samples are cropped from their tiles, corners int64 [count, 2], (y, x); which are mirrored, bool [count].

    Args:
        seed: of the draws.
        first: number of the first sample, each of which has its own draws.
        count: of samples.
        spare: how many pixels tiles are larger than patches.
        flips: whether half of the samples are mirrored.
    """
    # Each count of Philox's counter gives four words, so that sample n has its own words in any batch.
    words = np.random.Philox(key=[seed, 0], counter=first).random_raw(4 * count).reshape(count, 4)
    fractions = words >> np.uint64(32)  # of 2^32
    corners = (fractions[:, :2] * np.uint64(spare + 1)) >> np.uint64(32)
    return {
        "corners": torch.from_numpy(corners.astype(np.int64)),
        "flips": torch.from_numpy((fractions[:, 2] < 2**31) & flips),
    }


class PatchStream(Dataset):
    """An endless stream of batches of tiles; item b is batch b of this rank.

    An epoch visits every cell once, in an order drawn from (seed, epoch). Sample n of the stream depends only on (seed,
    n), and batch b of rank r of w has the B samples from (b w + r) B on. So the position in the data is one integer, no
    two ranks or workers share a sample, and together they see what a single process would.

    Args:
        cache: of the images.
        cells: int [C, 3] (image, y, x), places of the tiles.
        margins: int [N, 2], the most that an image's cells are shifted together, down and right, anew in every epoch.
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
        self._epochs = Epochs(self._draw)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the cells [C] and the images' shifts [N, 2] in an epoch."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch + 1]))
        return rng.permutation(len(self.cells)), rng.integers(0, self.margins + 1)

    def __getitem__(self, batch: int) -> dict[str, Any]:
        """Tiles uint8 [B, T, T, 3]; corners int64 [B, 2], (y, x) of the crops; flips bool [B]; next_sample, an int."""
        size, tile = self.batch_size, self.tile_size
        first = (batch * self.world_size + self.rank) * size
        tiles = np.empty((size, tile, tile, 3), np.uint8)
        for i in range(size):
            epoch, place = divmod(first + i, len(self.cells))
            order, shifts = self._epochs[epoch]
            image, y, x = self.cells[order[place]]
            down, right = shifts[image]
            tiles[i] = self.cache[image][y + down : y + down + tile, x + right : x + right + tile]
        return {
            "tiles": torch.from_numpy(tiles),
            **draw_crops(self.seed, first, size, tile - self.patch_size, self.flips),
            "next_sample": (batch + 1) * self.world_size * size,
        }


class WholeImages(Dataset):
    """Whole images of the cache, uint8 [1, 3, H, W] each."""

    def __init__(self, cache: ImageCache, images: Sequence[int]) -> None:
        self.cache, self.images = cache, images

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.cache[self.images[index]])).permute(2, 0, 1)[None]


# Lightning replaces a sampler that is not a DistributedSampler by its own, which neither starts at the position of the
# stream nor shares images without showing some of them twice.


class StreamSampler(DistributedSampler):
    """Counts batches without end, from the position of the data module when the iteration starts."""

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
    """Every world_size-th index, starting with the rank; shares may differ by one."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


# On the device


def normalize(x: Tensor) -> Tensor:
    """Converts uint8 to float32 in [-1, 1]."""
    return x.float().div_(127.5).sub_(1)


def cut_patches(tiles: Tensor, corners: Tensor, flips: Tensor, patch_size: int) -> Tensor:
    """Crops, flips and normalizes a batch in one gather operation.

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
