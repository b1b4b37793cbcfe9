"""The stream of training patches from images in tar files, which are read as they are needed, not decoded before."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rnncodec.data.cache import DataError
from rnncodec.data.patches import Epochs, draw_crops
from rnncodec.data.shards import Shards
from rnncodec.files.images import ImageError

LANES = 8  # windows that batches come from in turn
TILES = 16  # that an image gives each time it is read
WINDOW = 256  # samples of a window; at least one batch
THREADS = 8  # that read the images of a window
SHARDS = 8  # whose images are shuffled together


class WindowStream(Dataset):
    """An endless stream of batches of tiles from `Shards`; item b is batch b of this rank.

    Samples come in windows: some images are read, and each gives the same number of tiles at random places. An epoch
    visits every image once, in an order drawn from (seed, epoch), in which files are mixed only with some others. So
    what a window holds depends only on (seed, its number), the position in the data is one integer, and no two ranks
    share a sample. A rank's batches come from several windows in turn, so that the images of many are mixed. If their
    number is a multiple of that of the workers, each of these reads only some of the windows.

    Args:
        images: to draw from.
        chosen: the numbers of those to train on, in ascending order.
        batch_size: B, for each rank.
        tile_size: side T of a tile.
        patch_size: side of the patch that is cropped from it.
        flips: whether half of the patches are mirrored left to right.
        seed: of the order, the places, the crops and the flips.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(
        self,
        images: Shards,
        chosen: np.ndarray,
        *,
        batch_size: int,
        tile_size: int,
        patch_size: int,
        flips: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.chosen, self.seed, self.flips = images, chosen, seed, flips
        self.batch_size, self.tile_size, self.patch_size = batch_size, tile_size, patch_size
        self.rank, self.world_size = rank, world_size
        self.batches = max(WINDOW // batch_size, 1)  # of a window
        self.count = -(-self.batches * batch_size // TILES)  # images of a window
        self._warned = False
        self._windows: dict[int, tuple[int, np.ndarray]] = {}
        self._epochs = Epochs(self._draw)

    def __getitem__(self, batch: int) -> dict[str, Any]:
        """Tiles uint8 [B, T, T, 3]; corners int64 [B, 2], (y, x) of the crops; flips bool [B]; next_sample, an int."""
        turn, lane = divmod(batch, LANES)
        # Lanes begin at different places of their windows, or all would need another window at the same time.
        turn, place = divmod(turn + lane * self.batches // LANES, self.batches)
        number = (turn * LANES + lane) * self.world_size + self.rank
        if self._windows.get(lane, (-1,))[0] != number:
            self._windows[lane] = number, self.window(number)
        size = self.batch_size
        first = (batch * self.world_size + self.rank) * size
        return {
            "tiles": torch.from_numpy(self._windows[lane][1][place * size : (place + 1) * size]),
            **draw_crops(self.seed, first, size, self.tile_size - self.patch_size, self.flips),
            "next_sample": (batch + 1) * self.world_size * size,
        }

    def window(self, number: int) -> np.ndarray:
        """The tiles of a window, uint8 [samples, T, T, 3], in random order.

        Images that cannot be read or are smaller than a tile are replaced by others of the window.

        Raises:
            DataError: there are no others.
        """
        first, tile = number * self.count, self.tile_size
        rng = np.random.Generator(np.random.Philox(key=[self.seed, 1], counter=[0, 0, 0, number]))
        places = rng.random((self.count, TILES, 2))
        order = rng.permutation(self.count * TILES)[: self.batches * self.batch_size]
        numbers = [self.at(first + i) for i in range(self.count)]

        def cut(i: int) -> np.ndarray | None:
            try:
                pixels = self.images.read(numbers[i])
            except ImageError:
                return None
            ends = np.array(pixels.shape[:2]) - tile + 1
            if ends.min() < 1:
                return None
            return np.stack([pixels[y : y + tile, x : x + tile] for y, x in (places[i] * ends).astype(int)])

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(cut, range(self.count)))
        usable = [tiles for tiles in found if tiles is not None]
        if not usable:
            raise DataError(f"none of {self.count} images, such as {self.images.names[numbers[0]]}, has a tile")
        missing = [self.images.names[number] for number, tiles in zip(numbers, found, strict=True) if tiles is None]
        if missing and not self._warned:
            self._warned = True  # one line for each process, rather than one for each window
            warnings.warn(f"{missing[0]} and perhaps others have no tile, or cannot be read: left out", stacklevel=2)
        filled = [tiles if tiles is not None else usable[i % len(usable)] for i, tiles in enumerate(found)]
        return np.concatenate(filled)[order]

    def at(self, position: int) -> int:
        """The number of the image at a position of the endless order."""
        epoch, place = divmod(position, len(self.chosen))
        return int(self.chosen[self._epochs[epoch][place]])

    def _draw(self, epoch: int) -> np.ndarray:
        """The order of the images in an epoch."""
        return shuffled(self.images.groups[self.chosen], self.seed, epoch)


def shuffled(groups: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An order of images, int64 [N], in which only those of some files are mixed at a time.

    Args:
        groups: the number of the file of each image, int64 [N].
        seed: of the order.
        epoch: likewise.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch + 3]))
    rank = rng.permutation(int(groups.max()) + 1)[groups] // SHARDS  # each image's place in the order of the files
    return np.lexsort((rng.random(len(groups)), rank))
