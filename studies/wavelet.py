r"""Compares the entropy coders on wavelet images, for which Song 2007 describes them.

    pip install 'rnncodec[eval,studies]'
    python studies/wavelet.py KODAK                          # a quarter of an hour of processor time
    python studies/wavelet.py PHOTO --steps 16 --output photo.csv

A small codec of its own, of the three stages of the paper: decomposition, quantization, entropy coding.

1. The image becomes gray (luma of BT.601), as coders treat all components alike, and three take three times as long.
   The biorthogonal wavelet 4.4 (CDF 9/7), of PyWavelets, decomposes it five times, small images as often as the filters
   fit in. Borders are periodized, so that there are as many coefficients as pixels if its sides are multiples of 32.
2. All subbands have one quantizer with the same step, a whole number. The interval around 0 is twice as wide as all
   others (a dead zone), and coefficients are put back into the middle of theirs.
3. Each subband of each level is coded by itself with one of the coders without a context model: `none` (16 bits for
   each coefficient), `huffman`, `static` (arithmetic coding) or `adaptive`. The first three take a subband for one
   channel with one book. `adaptive`, a loop in Python, would need minutes for an image. It takes tiles of about 32x32
   coefficients as channels that are coded side by side, each with probabilities and neighbors of its own.

Rates are of whole files: with code books, the length of each payload (a variable number of bytes), the header, and a
checksum. Every file is decoded; the study ends with an error if a coefficient differs. PSNR is that of the decoded gray
image. Entropy is of the first order: that of the values of each subband, regardless of their order.

The table has means of all images. --output gets the numbers of each image, and is written anew after each.
"""

import argparse
import csv
import io
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pywt
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from rnncodec.entropy import CLASSICAL, INTEGERS, EntropyName, Session
from rnncodec.files.codings import CODINGS, least_of_integers
from rnncodec.files.errors import FormatError
from rnncodec.files.fields import take_varint, taker, varint
from rnncodec.files.images import MAX_PIXELS, atomic_write, find_images, load_image, one_line
from rnncodec.metrics.distortion import psnr

WAVELET, BORDERS, LEVELS = "bior4.4", "periodization", 5
MAGIC = b"rwv1"
LARGEST_STEP = 2**16
TILE = 32  # most rows and columns of a channel of the adaptive coder
CHECKSUM = 4  # bytes of CRC-32 at the end of a file


@dataclass(frozen=True)
class Quantized:
    """A quantized wavelet image.

    Attributes:
        height, width: of the image.
        step: of the quantizer.
        bands: int16 [rows, cols] each; the approximation, then from the coarsest level on the horizontal, vertical and
            diagonal details.
    """

    height: int
    width: int
    step: int
    bands: list[np.ndarray]


def analyze(image: np.ndarray, step: int) -> Quantized:
    """Decomposes and quantizes a gray image, uint8 [H, W].

    Raises:
        ValueError: the image is not of this kind, or the step is out of range.
    """
    if image.ndim != 2 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"an image is uint8 [H, W], not {image.dtype} {list(image.shape)}")
    if not 1 <= step <= LARGEST_STEP:
        raise ValueError(f"a step is a whole number from 1 to {LARGEST_STEP}, not {step}")
    approximation, *details = pywt.wavedec2(image - 128.0, WAVELET, BORDERS, levels(*image.shape))
    bands = [approximation, *(band for level in details for band in level)]
    # No coefficient exceeds 6924, as sums of absolute filter weights show.
    return Quantized(image.shape[0], image.shape[1], step, [np.trunc(band / step).astype(np.int16) for band in bands])


def synthesize(quantized: Quantized) -> np.ndarray:
    """The gray image of quantized coefficients, uint8 [H, W]."""
    approximation, *details = ((band + np.sign(band) * 0.5) * quantized.step for band in quantized.bands)
    triples = [tuple(details[i : i + 3]) for i in range(0, len(details), 3)]
    image = pywt.waverec2([approximation, *triples], WAVELET, BORDERS) + 128
    return np.clip(np.round(image), 0, 255).astype(np.uint8)[: quantized.height, : quantized.width]


def levels(height: int, width: int) -> int:
    """How often an image is decomposed."""
    return min(LEVELS, pywt.dwtn_max_level((height, width), WAVELET))


def band_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """The shapes of the subbands of an image, in the order of `Quantized`."""
    shapes, shape = [], (height, width)
    for _ in range(levels(height, width)):
        shape = -(-shape[0] // 2), -(-shape[1] // 2)
        shapes = [shape] * 3 + shapes
    return [shape, *shapes]


@dataclass(frozen=True)
class Grid:
    """How a subband is divided into tiles, the channels of a coder.

    Attributes:
        shape: of the subband.
        tile: most rows and columns of a tile.
    """

    shape: tuple[int, int]
    tile: int

    @property
    def counts(self) -> tuple[int, int]:
        """Tiles in a column and in a row."""
        return -(-self.shape[0] // self.tile), -(-self.shape[1] // self.tile)

    @property
    def plane_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the plane that is coded."""
        down, across = self.counts
        return down * across, -(-self.shape[0] // down), -(-self.shape[1] // across)

    def plane(self, band: np.ndarray) -> np.ndarray:
        """The tiles of a subband, filled up with zeros to the same size, [channels, rows, cols]."""
        (down, across), (channels, rows, cols) = self.counts, self.plane_shape
        padded = np.pad(band, ((0, down * rows - self.shape[0]), (0, across * cols - self.shape[1])))
        return padded.reshape(down, rows, across, cols).swapaxes(1, 2).reshape(channels, rows, cols)

    def band(self, plane: np.ndarray) -> np.ndarray:
        """Undoes `plane`."""
        (down, across), (_, rows, cols) = self.counts, self.plane_shape
        padded = plane.reshape(down, across, rows, cols).swapaxes(1, 2).reshape(down * rows, across * cols)
        return padded[: self.shape[0], : self.shape[1]]


def session_of(coder: EntropyName, shape: tuple[int, int]) -> tuple[Grid, Session]:
    """How a coder takes a subband, and its session for it."""
    grid = Grid(shape, TILE if coder == "adaptive" else max(shape))
    return grid, CLASSICAL[coder](*grid.plane_shape, INTEGERS)


def write(quantized: Quantized, coder: EntropyName) -> bytes:
    """The file of a quantized image: header, subbands, checksum.

    The header is `MAGIC`, the number of the coder in one byte, height, width and step. Each subband is the number of
    its coding in one byte, which is 0 where coding saves nothing, the length of the payload, and the payload.
    """
    numbers = quantized.height, quantized.width, quantized.step
    parts = [MAGIC, bytes([CLASSICAL[coder].coding]), *map(varint, numbers)]
    for band in quantized.bands:
        grid, session = session_of(coder, band.shape)
        ((coding, payload),) = session.encode(grid.plane(band))
        parts += [bytes([coding]), varint(len(payload)), payload]
    data = b"".join(parts)
    return data + zlib.crc32(data).to_bytes(CHECKSUM)


def read(data: bytes) -> Quantized:
    """Undoes `write`.

    Raises:
        FormatError: the file is not of this kind, or damaged.
    """
    if not data.startswith(MAGIC):
        raise FormatError("not a wavelet image")
    if zlib.crc32(data[:-CHECKSUM]).to_bytes(CHECKSUM) != data[-CHECKSUM:]:
        raise FormatError("the file is damaged: its checksum is wrong")
    file = io.BytesIO(data[len(MAGIC) : -CHECKSUM])
    take = taker(file, "the file is")
    coder = CODINGS.get(take(1)[0])
    if coder not in CLASSICAL:
        raise FormatError("the file has an unknown coder")
    height, width, step = (take_varint(take) for _ in range(3))
    if not 1 <= height * width <= MAX_PIXELS or not 1 <= step <= LARGEST_STEP:
        raise FormatError(f"an image of {width}x{height} pixels with a step of {step} is out of range")
    bands = []
    for shape in band_shapes(height, width):
        grid, session = session_of(coder, shape)
        coding, payload = take(1)[0], take(take_varint(take))
        channels, rows, cols = grid.plane_shape
        if len(payload) < least_of_integers(coding, rows * cols, channels):
            raise FormatError("a payload is too short for its subband")
        bands.append(grid.band(session.decode([(coding, payload)])))
    if file.read(1):
        raise FormatError("the file is longer than its subbands")
    return Quantized(height, width, step, bands)


def encode(image: np.ndarray, step: int, coder: EntropyName) -> bytes:
    """Encodes a gray image, uint8 [H, W].

    Raises:
        ValueError: the image is not of this kind, or the step is out of range.
    """
    return write(analyze(image, step), coder)


def decode(data: bytes) -> np.ndarray:
    """Decodes to a gray image, uint8 [H, W].

    Raises:
        FormatError: the file is not of this kind, or damaged.
    """
    return synthesize(read(data))


def entropy(quantized: Quantized) -> float:
    """The first-order entropy of all coefficients, in bits, given the distribution of each subband."""
    counts = (np.unique(band, return_counts=True)[1] for band in quantized.bands)
    return float(sum((count * np.log2(count.sum() / count)).sum() for count in counts))


@dataclass(frozen=True)
class Row:
    """What was measured of a file; rates are in bits per pixel."""

    image: str
    step: int
    coder: EntropyName
    psnr: float
    entropy: float
    bytes: int
    bpp: float


def measure(path: Path, steps: Sequence[int]) -> list[Row]:
    """Codes an image with all steps and coders.

    Raises:
        ValueError: it cannot be read.
        RuntimeError: a file does not decode to the coefficients that it was made of.
    """
    image = np.array(Image.fromarray(load_image(path)).convert("L"))
    rows = []
    for step in steps:
        quantized = analyze(image, step)
        for coder in CLASSICAL:
            file = write(quantized, coder)
            found = read(file)
            if not all(map(np.array_equal, found.bands, quantized.bands)):
                raise RuntimeError(f"{path}: {coder} coding with step {step} is not decoded to the same coefficients")
            pair = (torch.from_numpy(each).expand(1, 3, -1, -1) for each in (image, synthesize(found)))
            bpp, least = 8 * len(file) / image.size, entropy(quantized) / image.size
            rows.append(Row(path.name, step, coder, psnr(*pair).item(), least, len(file), bpp))
    return rows


def save(rows: Sequence[Row], path: Path) -> None:
    """Writes the numbers of each file as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    atomic_write(path, file.getvalue().encode())


def table(rows: Sequence[Row], count: int) -> Table:
    """The means of so many images, a line for each step."""
    result = Table(title=f"bits per pixel of gray wavelet images, mean of {count}")
    for column in ("step", "PSNR, dB", "entropy", *CLASSICAL):
        result.add_column(column, justify="right")
    for step in dict.fromkeys(row.step for row in rows):
        those = [row for row in rows if row.step == step]
        rates = (np.mean([row.bpp for row in those if row.coder == coder]) for coder in CLASSICAL)
        quality, least = (np.mean([getattr(row, name) for row in those]) for name in ("psnr", "entropy"))
        result.add_row(str(step), f"{quality:.2f}", *(f"{rate:.4f}" for rate in (least, *rates)))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="wavelet.py", description="Compares the entropy coders on wavelet images.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files and folders")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[4, 8, 16, 32, 64], help="of the quantizer (default: 4 8 16 32 64)"
    )
    parser.add_argument("--output", type=Path, default=Path("wavelet.csv"), help="CSV file (default: wavelet.csv)")
    args = parser.parse_args(argv)
    try:
        paths = find_images(args.images)
        if not paths:
            raise ValueError("no images to measure")
        rows: list[Row] = []
        for i, path in enumerate(paths, 1):
            print(f"wavelet: {i} of {len(paths)}: {path.name}", file=sys.stderr)
            rows += measure(path, args.steps)
            save(rows, args.output)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"wavelet: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("wavelet: interrupted", file=sys.stderr)
        return 130
    Console().print(table(rows, len(paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
