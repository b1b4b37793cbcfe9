"""Measures a codec on an image: file sizes, reconstructions and all metrics, which are kept in a cache."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rnncodec.allocation import TuneName
from rnncodec.codec import Codec
from rnncodec.compressive import CompressiveCodec
from rnncodec.entropy import CLASSICAL, ContextSession, EntropyName
from rnncodec.evaluation.baselines import Baseline
from rnncodec.evaluation.report import TYPES
from rnncodec.files.format import read_header, truncate
from rnncodec.files.images import atomic_write
from rnncodec.imagecodec import ImageCodec
from rnncodec.metrics.curves import NAN, Point, from_csv, to_csv
from rnncodec.metrics.distortion import DISTORTIONS, REPORTED_ITERATIONS
from rnncodec.network import FINE

NAME_BYTES = 200  # longest name of an image, which leaves room for suffixes
CACHE_VERSION = 1  # measurements of other versions are not used


class Coded(NamedTuple):
    """The size of a file and its reconstruction.

    Attributes:
        setting: iterations, or what the codec calls quality.
        size: bytes of the whole file.
        x_hat: the reconstruction, uint8 [H, W, 3].
        file: the file itself, if browsers can show it.
        ideal_bytes: bytes of an ideal coder with the context model's probabilities.
        encode_seconds: time of encoding the whole file; nan if it is a part of a larger one.
        decode_seconds: likewise for decoding.
        spent: gives the bits per pixel of the block of each pixel, float [H, W]; None where they are not known.
    """

    setting: float
    size: int
    x_hat: np.ndarray
    file: bytes | None = None
    ideal_bytes: float = NAN
    encode_seconds: float = NAN
    decode_seconds: float = NAN
    spent: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class Source:
    """A codec to measure.

    Attributes:
        name: name in files and tables.
        title: name in plots.
        description: what one needs to repeat the measurement.
        suffix: suffix of saved pictures.
        settings: settings at which every image is measured.
        run: codes an image, uint8 [H, W, 3], at given settings.
        saturates: whether the codec makes no larger files than at the last setting.
    """

    name: str
    title: str
    description: str
    suffix: str
    settings: tuple[float, ...]
    run: Callable[[np.ndarray, Sequence[float]], Iterator[Coded]]
    saturates: bool = False


def ours(codec: Codec, iterations: int, name: str = "") -> Source:
    """A codec of this package as a source; it has the name of its weights unless another is given."""
    checked = False

    def run(x: np.ndarray, settings: Sequence[float]) -> Iterator[Coded]:
        nonlocal checked
        start = time.perf_counter()
        session = codec.session(None, *codec.loop.grid(*x.shape[:2]))
        data = codec.encode(x, iterations, entropy=session)
        middle = time.perf_counter()
        pictures = list(codec.decode_progressive(data))
        end = time.perf_counter()
        if not checked:  # only once, because the tests check this too
            check_truncated(codec, data, pictures)
            checked = True
        bits = session.ideal_bits if isinstance(session, ContextSession) else [NAN] * iterations
        ideal = np.cumsum(bits) / 8
        sizes = _sizes(data)
        rates = cache(lambda: spent(codec, data))
        for k, (x_hat, size, least) in enumerate(zip(pictures, sizes, ideal, strict=True), 1):
            times = (middle - start, end - middle) if k == iterations else (NAN, NAN)
            if k in settings:
                yield Coded(k, size, x_hat, None, float(least), *times, spent=lambda k=k: rates()[k - 1])

    name = f"rnncodec-{name or codec.name}"
    settings = tuple(range(1, iterations + 1))
    description = f"{_described(codec)}, 1 to {iterations} iterations"
    return Source(name, name, description, ".png", settings, run, saturates=iterations == codec.max_iterations)


def allocated(codec: ImageCodec, iterations: int, tune: TuneName, name: str = "") -> Source:
    """The same codec with a number of iterations for each location, at the bytes of 2, 3, ... iterations everywhere.

    Raises:
        ValueError: the codec cannot choose them, or there is only one iteration.
    """
    if not isinstance(codec, Codec) or codec.allocator is None or iterations < 2:
        raise ValueError(f"the weights {codec.name!r} cannot choose {iterations} iterations at each location")

    def run(x: np.ndarray, settings: Sequence[float]) -> Iterator[Coded]:
        sizes = _sizes(codec.encode(x, iterations))
        for k in settings:
            start = time.perf_counter()
            data = codec.encode(x, max_bytes=sizes[int(k) - 1], tune=tune)
            middle = time.perf_counter()
            x_hat = np.asarray(codec.decode(data))
            times = middle - start, time.perf_counter() - middle
            yield Coded(k, len(data), x_hat, None, NAN, *times, spent=lambda data=data: spent(codec, data)[-1])

    name = f"rnncodec-{name or codec.name}-{tune}"
    settings = tuple(range(2, iterations + 1))
    # Its files depend on the allocation, which no fingerprint covers.
    digest = hashlib.sha256(repr(codec.allocator.allocation).encode()).hexdigest()[:16]
    description = f"{_described(codec)}, at the bytes of 2 to {iterations} iterations, allocated for {tune} ({digest})"
    return Source(name, name, description, ".png", settings, run)


def levels(codec: CompressiveCodec, name: str = "") -> Source:
    """A compressive autoencoder as a source, with its rates and one between each two of them."""

    def run(x: np.ndarray, settings: Sequence[float]) -> Iterator[Coded]:
        for level in settings:
            start = time.perf_counter()
            data = codec.encode(x, level=int(level))
            middle = time.perf_counter()
            x_hat = np.asarray(codec.decode(data))
            yield Coded(level, len(data), x_hat, None, NAN, middle - start, time.perf_counter() - middle)

    name = f"rnncodec-{name or codec.name}"
    settings = tuple(range(0, codec.config.levels, FINE // 2))
    description = f"weights {codec.name} ({codec.fingerprint.hex()}), levels 0 to {codec.config.levels - 1}"
    return Source(name, name, description, ".png", settings, run)


def spent(codec: Codec, data: bytes) -> np.ndarray:
    """The bits per pixel of the block of each pixel of a file after each iteration, float [iterations, H, W].

    They are what the context model takes for the bits of the block; without one, their number.
    """
    planes, header, stride = codec.read_bits(data), read_header(data), codec.config.stride
    session = codec.session(None, header.rows, header.cols)
    price = session.price if isinstance(session, ContextSession) else lambda plane: (plane != 0).sum(0)
    bits = [price(plane) for plane in planes]
    rates = np.cumsum(bits, axis=0) / stride**2
    return rates.repeat(stride, 1).repeat(stride, 2)[:, : header.height, : header.width]


def _described(codec: Codec) -> str:
    """What identifies the files and pictures of a codec."""
    description = f"weights {codec.name} ({codec.fingerprint.hex()})"
    if codec.context is not None:
        description += f", {codec.context.config.kind} context model ({codec.context_fingerprint.hex()})"
    # Both change the bits, so the cache must distinguish them.
    if codec.network.in_bfloat16:
        description += ", in bfloat16"
    if codec.loop.tile is not None:
        description += f", in tiles of {codec.loop.tile} pixels"
    return description


def baseline(codec: Baseline) -> Source:
    """A codec to compare with, as a source."""
    shown = codec.suffix in TYPES

    def run(x: np.ndarray, settings: Sequence[float]) -> Iterator[Coded]:
        for setting in settings:
            start = time.perf_counter()
            data = codec.encode(x, setting)
            middle = time.perf_counter()
            x_hat = codec.decode(data)
            times = middle - start, time.perf_counter() - middle
            yield Coded(setting, len(data), x_hat, data if shown else None, NAN, *times)

    description = f"{codec.description} ({codec.version})"
    suffix = codec.suffix if shown else ".png"
    return Source(codec.name, codec.title, description, suffix, codec.settings, run)


class Memory:
    """A cache of measurements in a folder, by the pixels of the image and the exact codec.

    Args:
        folder: the folder; None keeps nothing.
        device: the device of the computations, which is part of the key.
    """

    def __init__(self, folder: Path | None, device: str) -> None:
        self.folder, self.device = folder, device

    def name(self, x: np.ndarray, source: Source) -> str:
        """The name of the file with the points of an image and a codec."""
        about = [CACHE_VERSION, source.name, source.description, x.shape, torch.__version__, self.device]
        key = hashlib.sha256(json.dumps(about).encode() + np.ascontiguousarray(x).tobytes()).hexdigest()
        return f"{key[:32]}.csv"

    def recall(self, x: np.ndarray, source: Source) -> dict[float, Point]:
        """The points in the cache, by setting."""
        if self.folder is None:
            return {}
        try:
            return {point.setting: point for point in from_csv((self.folder / self.name(x, source)).read_text())}
        except (OSError, ValueError):  # missing or damaged files are measured again
            return {}

    def keep(self, x: np.ndarray, source: Source, points: Iterable[Point]) -> None:
        """Writes points to the cache."""
        if self.folder is not None:
            atomic_write(self.folder / self.name(x, source), to_csv(points).encode())


def measure(
    image: str, codec: str, x: np.ndarray, coded: Coded, device: torch.device | str = "cpu", picture: str = ""
) -> Point:
    """Computes all metrics of one reconstruction, saved as `picture`, of an image x, uint8 [H, W, 3]."""
    original, x_hat = (torch.tensor(a, device=device).permute(2, 0, 1)[None] for a in (x, coded.x_hat))
    scale = 8 / (x.shape[0] * x.shape[1])
    metrics: dict[str, Any] = {name: distortion(original, x_hat).item() for name, distortion in DISTORTIONS.items()}
    return Point(
        image,
        codec,
        coded.setting,
        coded.size,
        bpp=scale * coded.size,
        ideal_bpp=scale * coded.ideal_bytes,
        encode_seconds=coded.encode_seconds,
        decode_seconds=coded.decode_seconds,
        picture=picture,
        **metrics,
    )


def measured_points(
    image: str,
    source: Source,
    settings: Sequence[float],
    x: np.ndarray,
    device: torch.device,
    memory: Memory,
    save: Callable[[Source, Coded], str] | None = None,
) -> list[Point]:
    """The points of an image and a codec, from the cache if possible.

    Args:
        image: name of the image.
        source: the codec.
        settings: settings to measure.
        x: the image, uint8 [H, W, 3].
        device: device that computes the metrics.
        memory: the cache.
        save: saves a picture and gives its path; None saves none.
    """
    known = memory.recall(x, source)
    missing = [setting for setting in settings if setting not in known]
    pictures = {}
    if needed := missing if save is None else settings:
        for coded in source.run(x, needed):
            if coded.setting in missing:
                known[coded.setting] = measure(image, source.name, x, coded, device)
            if save is not None:
                pictures[coded.setting] = save(source, coded)
    if missing:
        memory.keep(x, source, known.values())
    return [replace(known[setting], image=image, picture=pictures.get(setting, "")) for setting in settings]


def check_truncated(codec: Codec, data: bytes, pictures: Sequence[np.ndarray]) -> None:
    """Checks that a file cut to each of the reported iterations decodes to the same picture as the whole file.

    Raises:
        RuntimeError: a picture differs.
    """
    for k, x_hat in enumerate(pictures, 1):
        if k in REPORTED_ITERATIONS and not np.array_equal(
            np.asarray(codec.decode(truncate(data, iterations=k))), x_hat
        ):
            raise RuntimeError(f"the file cut to {k} iterations decodes to another picture than the whole file")


def entropy_coders(codec: ImageCodec, others: Iterable[ImageCodec]) -> dict[str, tuple[Codec, EntropyName]]:
    """The entropy coders to compare, by name, each with its codec.

    Args:
        codec: the codec whose bits are coded.
        others: more codecs of the same network, whose context models are compared too.

    Raises:
        ValueError: one of the others has another network, or it is not a recurrent one.
    """
    if not isinstance(codec, Codec):
        raise ValueError("entropy coders are compared on the bits of recurrent networks")
    coders: dict[str, tuple[Codec, EntropyName]] = {name: (codec, name) for name in CLASSICAL}
    for another in (codec, *others):
        if another.fingerprint != codec.fingerprint or not isinstance(another, Codec):
            raise ValueError(f"the weights {another.name} ({another.fingerprint.hex()}) are not those of {codec.name}")
        if another.context is not None:
            name = another.context.config.kind
            if name in coders and coders[name][0].context_fingerprint != another.context_fingerprint:
                name += f" {another.context_fingerprint.hex()}"
            coders[name] = (another, "context")
    return coders


def coded_sizes(
    codecs: dict[str, tuple[Codec, EntropyName]], bits: np.ndarray, height: int, width: int
) -> dict[str, list[int]]:
    """Bytes of the whole file up to every iteration, for the same bits and each entropy coder.

    Args:
        codecs: a codec and the name of its entropy coder, by the name of the coder in the result.
        bits: int8 [iterations, bits, rows, columns] of -1 and +1.
        height: of the image in pixels.
        width: of the image in pixels.

    Raises:
        RuntimeError: the bits that a coder decodes differ.
    """
    sizes = {}
    for name, (codec, entropy) in codecs.items():
        file = codec.write_bits(bits, height, width, entropy)
        if not np.array_equal(codec.read_bits(file), bits):
            raise RuntimeError(f"the entropy coder {name} decodes other bits than it has encoded")
        sizes[name] = _sizes(file)
    return sizes


def _sizes(data: bytes) -> list[int]:
    """Bytes of a file up to the end of every iteration, which may have several payloads."""
    header = read_header(data)
    return [header.sizes[end - 1] for end in header.ends]


def unique_names(paths: Iterable[Path]) -> list[str]:
    """The names of files without suffix, made printable and valid for folders, and numbered if they repeat."""
    names: dict[str, None] = {}
    for path in paths:
        printable = "".join(c if c.isprintable() else "_" for c in path.stem).lstrip(".") or "_"
        stem = printable.encode()[:NAME_BYTES].decode(errors="ignore")
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names[name] = None
    return list(names)
