"""Cuts large images to save memory: tiles for the loop, windows for the transforms, with halos for what they see.

Tiles depend only on the size of an image and on the network, so that every prefix of a file decodes alike.
"""

import math
from typing import NamedTuple

from rnncodec.network import CELLS, AnyConfig, LatentConfig, NetworkConfig, Window

MAX_ITERATIONS = 16  # of a network whose loop runs on pixels; the default of all networks
MAX_SIDE = 65535  # pixels of an image, two bytes in the header of a file
MEMORY = 2 * 2**30  # bytes of activations above which an image is cut, on every machine, because tiles affect results
MIN_CORE = 256  # pixels; smaller tiles would spend nearly all their time on halos
MAP = 2**18  # blocks (67 megapixels) above which the loop of a latent network runs on bands of rows

Box = Window


class Tile(NamedTuple):
    """Rows and columns of the code that are computed together (`area`), and those of them that are kept (`core`)."""

    area: Box
    core: Box


def tiles(config: AnyConfig, rows: int, columns: int, side: int | None = None) -> list[Tile]:
    """The tiles of an image of `rows` x `columns` blocks.

    Args:
        config: of the network. The states of a latent one are small: its tiles are bands of rows, without halos.
        rows: of blocks of the image.
        columns: of blocks of the image.
        side: of a tile in pixels; None cuts only images whose activations would take more than MEMORY. Latent networks
            ignore it.
    """
    if isinstance(config, LatentConfig):
        height = max(1, MAP // columns)
        bands = [slice(top, min(top + height, rows)) for top in range(0, rows, height)]
        return [Tile((band, slice(0, columns)), (band, slice(0, columns))) for band in bands]
    halo, block = receptive_field(config)
    if side is None:
        affordable = int(MEMORY / activation_bytes(config))
        if rows * columns * config.stride**2 <= affordable:
            side = max(rows, columns) * config.stride
        else:
            side = max(math.isqrt(affordable) - 2 * halo, MIN_CORE)
    side = math.ceil(side / block) * block // config.stride
    whole = slice(0, rows), slice(0, columns)
    return [Tile(*window) for window in windows(*whole, halo // config.stride, side)]


def activation_bytes(config: NetworkConfig) -> float:
    """Estimates the bytes that one pixel takes while its tile is coded: states, and activations of the largest cell."""
    layers = len(config.decoder_hidden_kernels)
    patches = config.patch_size > 1
    cells = []  # channels for each pixel, of each cell
    for side, widths, cell in (
        ("encoder", config.encoder_channels[1:], config.encoder_cell),
        ("decoder", config.decoder_channels[1:], config.decoder_cell),
    ):
        for i, width in enumerate(widths):
            scale = config.stride if patches else 2 ** (i + 2 if side == "encoder" else layers - i)
            cells.append(CELLS[cell].footprint * width / scale**2)
    return 4 * (4 * sum(cells) + 16 * max(cells, default=0) + 32)


def receptive_field(config: NetworkConfig) -> tuple[int, int]:
    """The receptive field of the decoder: the halo that makes a tile independent of its surroundings, and its blocks.

    A cell at a scale of s pixels sees one location further, s pixels, through its 3x3 input kernel. All cells do so
    once between the bits and the image. For each earlier run, a hidden kernel k sees (k - 1) / 2 locations further (as
    many times as the `reach` of the cell says): hop = max(reach s (k - 1) / 2). For each earlier iteration, the gain
    network of residual scaling sees one of its own blocks further. Each step back in time takes one of these paths, and
    the longest takes the wider one 15 times, and then goes back through the extra runs of the first iteration:

        halo = sum of s + (16 - 1) max((1 + diffusion) hop, gain block) + priming hop, rounded up to whole blocks

    Returns:
        In pixels: the halo, and the side of the blocks (of code and gain network) that tiles must not divide.
    """
    patches = config.patch_size > 1
    layers = len(config.decoder_hidden_kernels)
    scales = [config.stride if patches else 2 ** (layers - i) for i in range(layers)]
    reach = CELLS[config.decoder_cell].reach
    hops = [
        reach * scale * (kernel - 1) // 2 for scale, kernel in zip(scales, config.decoder_hidden_kernels, strict=True)
    ]
    hop = max(hops, default=0)
    back, block = (1 + config.diffusion) * hop, config.stride
    if config.reconstruction == "residual_scaling":
        gain = 2 ** (len(config.gain_channels) + 1)
        back, block = max(back, gain), math.lcm(block, gain)
    halo = (0 if patches else sum(scales)) + (MAX_ITERATIONS - 1) * back + config.priming * hop
    return math.ceil(halo / block) * block, block


def windows(
    rows: slice, columns: slice, halo: int, side: int, grid: tuple[int, int] | None = None
) -> list[tuple[Box, Box]]:
    """Squares of `side` blocks that cover an area: each with a halo, and without.

    Halos end at the border of the area, or of the grid if one is given.
    """

    def cuts(whole: slice, first: int, last: int) -> list[tuple[slice, slice]]:
        starts = range(whole.start, whole.stop, side)
        cores = [slice(start, min(start + side, whole.stop)) for start in starts]
        return [(slice(max(c.start - halo, first), min(c.stop + halo, last)), c) for c in cores]

    ends = [(0, size) for size in grid] if grid else [(cut.start, cut.stop) for cut in (rows, columns)]
    return [((y[0], x[0]), (y[1], x[1])) for y in cuts(rows, *ends[0]) for x in cuts(columns, *ends[1])]


def inside(tile: Tile) -> Box:
    """The core of a tile, relative to the corner of its area."""
    y, x = (
        slice(core.start - area.start, core.stop - area.start) for core, area in zip(tile.core, tile.area, strict=True)
    )
    return y, x
