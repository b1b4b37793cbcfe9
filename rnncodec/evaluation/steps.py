"""Measures files that end within an iteration, for the slider of the report."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rnncodec.codec import Codec
from rnncodec.evaluation.measure import Coded, measure
from rnncodec.evaluation.report import STEPS, embedded
from rnncodec.files.format import read_header
from rnncodec.files.images import atomic_write, load_image
from rnncodec.metrics.curves import Point, to_csv

LARGEST = 2**21  # pixels; a page with so many pictures of larger images would be too large
QUALITY = 92  # of WebP, in which the many pictures of steps take a fifth of the space


def steps(codec: Codec, x: np.ndarray, iterations: int) -> Iterator[Coded]:
    """The steps between whole iterations, whose settings are 0.25, 0.5, 0.75, 1.25, ... if an iteration has four parts.

    Args:
        codec: the codec.
        x: an image, uint8 [H, W, 3].
        iterations: of the file.
    """
    data = codec.encode(x, iterations)
    header = read_header(data)
    if header.parts > 1 and x[..., 0].size <= LARGEST:
        for i, (size, x_hat) in enumerate(
            zip(header.sizes, codec.decode_progressive(data, parts=True), strict=True), 1
        ):
            if i % header.parts:
                yield Coded(i / header.parts, size, x_hat)


def write_steps(
    folder: Path,
    points: Sequence[Point],
    name: str,
    codec: Codec,
    iterations: int,
    images: Mapping[str, Path],
    device: torch.device,
    tell: Callable[[str], None],
) -> None:
    """Measures the steps of the images that the report embeds, and writes their pictures and points.

    Args:
        folder: of the results.
        points: of the evaluation.
        name: of the codec in the results.
        codec: the codec.
        iterations: of the files.
        images: the files of images, by their names in the results.
        device: device that computes the metrics.
        tell: is called with the name of each image, as it takes time.
    """
    found = []
    for image in embedded(points, name):
        tell(image)
        x = load_image(images[image])
        for coded in steps(codec, x, iterations):
            picture = f"pictures/{image}/{name}-{coded.setting:g}.webp"
            Image.fromarray(coded.x_hat).save(folder / picture, quality=QUALITY)
            found.append(measure(image, name, x, coded, device, picture))
    (folder / STEPS).unlink(missing_ok=True)
    if found:
        atomic_write(folder / STEPS, to_csv(found).encode())
