"""Image codecs to compare with, encoded and decoded by Pillow."""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

from rnncodec.files.images import one_line

QUALITIES = (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)


@dataclass(frozen=True)
class Baseline:
    """A codec and the settings at which it is measured.

    Attributes:
        name: name in tables and files.
        title: name in plots.
        format: Pillow's name of the file format.
        suffix: suffix of its files, with the dot.
        options: gives Pillow's options for saving at a setting.
        settings: settings at which every image is measured, in order of rising quality.
        scale: all settings, in order of rising size, among which `matched` searches.
        description: what one needs to repeat the measurement, without versions.
        plugin: module that adds the format to Pillow, if one is needed.
        library: otherwise, Pillow's name of the library that encodes and decodes.
        label: name on the page of an evaluation; empty for the title.
        setting: what that page calls a setting.
    """

    name: str
    title: str
    format: str
    suffix: str
    options: Callable[[float], dict[str, Any]]
    settings: tuple[float, ...]
    scale: Sequence[float]
    description: str
    plugin: str = ""
    library: str = ""
    label: str = ""
    setting: str = "quality"

    @property
    def available(self) -> bool:
        """Whether this installation can write such files."""
        if self.plugin:
            return find_spec(self.plugin) is not None
        return bool(features.check(self.library))

    @property
    def version(self) -> str:
        """The versions of the library or plugin, and of Pillow."""
        if self.plugin:
            name, version = self.plugin, getattr(import_module(self.plugin), "__version__", "")
        else:
            turbo = self.library == "jpg" and features.check("libjpeg_turbo")
            name = "libjpeg_turbo" if turbo else self.library
            version = features.version(name)
        return f"{name} {version}, Pillow {PIL.__version__}"

    def encode(self, x: np.ndarray, setting: float) -> bytes:
        """Encodes an image, uint8 [H, W, 3], to the bytes of a file.

        Raises:
            ValueError: the format cannot hold the image, for example because of its size; the message is one line.
        """
        if self.plugin:
            import_module(self.plugin)
        file = io.BytesIO()
        try:
            Image.fromarray(x).save(file, self.format, **self.options(setting))
        except Exception as error:  # its type depends on the encoder
            raise ValueError(f"{self.title}: {one_line(error)}") from error
        return file.getvalue()

    def matched(self, x: np.ndarray, sizes: Iterable[float]) -> list[float]:
        """For each size in bytes, the setting with the largest file that is not larger, and the next setting.

        Where sizes do not always rise with the setting, these are near the best settings.
        """
        size = cache(lambda setting: len(self.encode(x, setting)))
        places = {bisect_right(self.scale, limit, key=size) for limit in sizes}
        return sorted({self.scale[i] for place in places for i in (place - 1, place) if 0 <= i < len(self.scale)})

    def decode(self, data: bytes) -> np.ndarray:
        """Decodes the bytes of a file to an image, uint8 [H, W, 3]."""
        if self.plugin:
            import_module(self.plugin)
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))


def _jpeg(name: str, subsampling: str, label: str = "") -> Baseline:
    return Baseline(
        name,
        f"JPEG {subsampling}",
        "JPEG",
        ".jpg",
        lambda quality: {"quality": int(quality), "optimize": True, "subsampling": subsampling},
        QUALITIES,
        range(1, 96),
        f"JPEG {subsampling}, optimized Huffman tables",
        library="jpg",
        label=label,
    )


BASELINES = {
    baseline.name: baseline
    for baseline in (
        _jpeg("jpeg", "4:2:0", label="JPEG"),
        _jpeg("jpeg444", "4:4:4"),
        Baseline(
            "jpeg2000",
            "JPEG 2000",
            "JPEG2000",
            ".jp2",
            lambda bpp: {"irreversible": True, "mct": 1, "quality_mode": "rates", "quality_layers": [24 / bpp]},
            (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0),
            [i / 250 for i in range(8, 1001)],  # exact in the six digits of a printed setting
            "JPEG 2000, 9/7 wavelet, color transform, settings are target bits per pixel",
            library="jpg_2000",
            setting="target bpp",
        ),
        Baseline(
            "webp",
            "WebP",
            "WEBP",
            ".webp",
            lambda quality: {"quality": int(quality), "method": 6},
            (0, *QUALITIES, 98),
            range(101),
            "WebP, lossy, method 6",
            library="webp",
        ),
        Baseline(
            "avif",
            "AVIF 4:4:4",
            "AVIF",
            ".avif",
            lambda quality: {"quality": int(quality), "speed": 6, "subsampling": "4:4:4"},
            (5, *range(10, 96, 5)),
            range(101),
            "AVIF 4:4:4, speed 6",
            library="avif",
            label="AVIF",
        ),
        Baseline(
            "jxl",
            "JPEG XL",
            "JXL",
            ".jxl",
            lambda quality: {"quality": int(quality), "effort": 7},
            (5, *range(10, 96, 5)),
            range(101),
            "JPEG XL, effort 7",
            plugin="pillow_jxl",
        ),
        Baseline(
            "png",
            "PNG",
            "PNG",
            ".png",
            lambda _: {"optimize": True},
            (0,),
            (),
            "PNG, optimized, lossless",
            library="zlib",
        ),
    )
}
