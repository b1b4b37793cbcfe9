"""Measures a codec on photographs, beside other codecs: whole files, five metrics, curves, tables and pictures.

    python evaluate.py PHOTOS --weights small --output results
    python evaluate.py PHOTOS --save-images                 with the decoded pictures, and a page to look at them
    python evaluate.py PHOTOS --baselines jpeg webp         beside these codecs only
    python evaluate.py KODAK --overlay toderici2017 mine/rnncodec-small.json      with curves of others
    python evaluate.py PHOTOS --coders                      the entropy coders on the same bits
    python evaluate.py PHOTOS --wandb NAME                  as a run of W&B as well, offline unless logged in

Each image is encoded once and its file decoded iteration by iteration; the bytes of iteration k are those of the file
cut to k iterations, bpp counts them over the true pixels, and curves are means over the images at equal setting. What
has been measured is remembered by the pixels of the image and the exact codec, so that a run that was stopped goes on.
With --save-images the other codecs are also measured at the settings that come closest to the bytes of each iteration.

The output folder gets points.csv (every image, codec and setting), mean.csv and summary.csv (areas under the curves and
BD-rate), a JSON for each codec in CompressAI's shape, rate_distortion.png and .svg, and if asked for coders.csv, the
pictures, comparisons and report.html.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import rnncodec
from rnncodec.codec import MAX_ITERATIONS, Codec
from rnncodec.entropy import CLASSICAL, ContextSession, EntropyName
from rnncodec.evaluation.baselines import BASELINES, Baseline
from rnncodec.evaluation.report import TYPES, write_report
from rnncodec.files.format import read_header, truncate
from rnncodec.files.images import atomic_write, find_images, load_image, one_line, save_image
from rnncodec.metrics.curves import (
    NAN,
    Point,
    area,
    bd_rate,
    from_csv,
    from_json,
    interpolate,
    largest_within,
    mean_curve,
    samples,
    to_csv,
    to_json,
)
from rnncodec.metrics.distortion import MS_SSIM_MIN_SIDE, RATES, l1, ms_ssim, psnr, psnr_hvs
from rnncodec.training.tracking import log_evaluation

PANEL = (224, 224)  # pixels of a picture in a comparison, six beside each other
PUBLISHED = Path(rnncodec.__file__).parent / "evaluation" / "published"
WINDOW = (0.25, 1.875)  # bits per pixel between which the area under a curve favours nobody
COMMON = 0.75  # share of a curve's range of quality below which a BD-rate over it says little
SPANS = {"to 2": (None, 2.0), f"{WINDOW[0]} to\n{WINDOW[1]}": WINDOW}  # bits per pixel; the first as in T17
AREAS = {"ms_ssim": "MS-SSIM", "psnr_hvs": "PSNR-HVS", "psnr": "PSNR"}  # the first two are those of T17
BD_RATES = {"psnr": "PSNR", "ms_ssim_db": "MS-SSIM", "psnr_hvs_m": "PSNR-HVS-M"}
METRICS = (("psnr", 2), ("ms_ssim", 4))  # of the tables, with their digits
NAME_BYTES = 200  # of an image's name, which leaves room for what is appended
CACHE_VERSION = 1  # of what is remembered: another one forgets it all


class Coded(NamedTuple):
    """A file and what it decodes to.

    Attributes:
        setting: iterations, or what the codec calls quality.
        size: bytes of the whole file.
        x_hat: the reconstruction, uint8 [H, W, 3].
        file: the file itself, if it is one that browsers show.
        ideal_bytes: what the context model's probabilities alone would take.
        encode_seconds: for the whole file.
        decode_seconds: likewise.
    """

    setting: float
    size: int
    x_hat: np.ndarray
    file: bytes | None = None
    ideal_bytes: float = NAN
    encode_seconds: float = NAN
    decode_seconds: float = NAN


@dataclass(frozen=True)
class Source:
    """A codec to measure.

    Attributes:
        name: in files and tables.
        title: in plots.
        description: what a reader must know to repeat it.
        suffix: of its pictures.
        settings: at which every image is measured.
        run: an image, uint8 [H, W, 3], and settings to its files at these settings.
    """

    name: str
    title: str
    description: str
    suffix: str
    settings: tuple[float, ...]
    run: Callable[[np.ndarray, Sequence[float]], Iterator[Coded]]


def own(codec: Codec, iterations: int) -> Source:
    """The codec whose evaluation this is."""

    def run(x: np.ndarray, settings: Sequence[float]) -> Iterator[Coded]:
        start = time.perf_counter()
        data = codec.encode(x, iterations)
        middle = time.perf_counter()
        pictures = list(codec.decode_progressive(data))
        end = time.perf_counter()
        sizes = read_header(data).sizes
        ideal = ideal_bytes(codec, data)
        for k, (x_hat, size, least) in enumerate(zip(pictures, sizes, ideal, strict=True), 1):
            times = (middle - start, end - middle) if k == iterations else (NAN, NAN)
            if k in settings:
                yield Coded(k, size, x_hat, None, least, *times)

    description = f"weights {codec.name} ({codec.fingerprint.hex()}), "
    if codec.context is not None:
        description += f"{codec.context.config.kind} context model ({codec.context_fingerprint.hex()}), "
    description += f"1 to {iterations} iterations"
    name = f"rnncodec-{codec.name}"
    return Source(name, name, description, ".png", tuple(range(1, iterations + 1)), run)


def ideal_bytes(codec: Codec, data: bytes) -> Iterator[float]:
    """What the context model's probabilities take for the first 1, 2, ... iterations of a file; nan without a model."""
    planes = codec.read_bits(data)
    if codec.context is None:
        yield from [NAN] * len(planes)
        return
    session, total = codec.session("context", *planes.shape[2:]), 0.0
    assert isinstance(session, ContextSession)
    for plane in planes:
        total += session.ideal_bits(plane) / 8
        yield total


def other(baseline: Baseline) -> Source:
    """A codec to compare with."""
    shown = baseline.suffix in TYPES

    def run(x: np.ndarray, settings: Sequence[float]) -> Iterator[Coded]:
        for setting in settings:
            start = time.perf_counter()
            data = baseline.encode(x, setting)
            middle = time.perf_counter()
            x_hat = baseline.decode(data)
            times = middle - start, time.perf_counter() - middle
            yield Coded(setting, len(data), x_hat, data if shown else None, NAN, *times)

    description = f"{baseline.description} ({baseline.version})"
    suffix = baseline.suffix if shown else ".png"
    return Source(baseline.name, baseline.title, description, suffix, baseline.settings, run)


class Panel(NamedTuple):
    """A picture of a comparison, uint8 [H, W, 3] or None, and what is written above it."""

    caption: str
    picture: np.ndarray | None


class Memory:
    """What has been measured, in a folder, by the pixels of the image and the exact codec."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device

    def path(self, x: np.ndarray, source: Source) -> Path:
        """Where the points of an image and a codec are."""
        about = [CACHE_VERSION, source.name, source.description, x.shape, torch.__version__, self.device]
        key = hashlib.sha256(json.dumps(about).encode() + np.ascontiguousarray(x).tobytes()).hexdigest()
        return self.folder / f"{key[:32]}.csv"

    def recall(self, x: np.ndarray, source: Source) -> dict[float, Point]:
        """The known points by setting."""
        try:
            return {point.setting: point for point in from_csv(self.path(x, source).read_text())}
        except (OSError, ValueError):  # not there, or not what it was: it is measured again
            return {}

    def keep(self, x: np.ndarray, source: Source, points: Iterable[Point]) -> None:
        """Remembers points."""
        atomic_write(self.path(x, source), to_csv(points).encode())


def measure(image: str, codec: str, x: np.ndarray, coded: Coded, device: torch.device | str = "cpu") -> Point:
    """All metrics of one reconstruction of an image x, uint8 [H, W, 3]."""
    original, x_hat = (torch.tensor(a, device=device).permute(2, 0, 1)[None] for a in (x, coded.x_hat))
    scale = 8 / (x.shape[0] * x.shape[1])
    return Point(
        image,
        codec,
        coded.setting,
        coded.size,
        bpp=scale * coded.size,
        ideal_bpp=scale * coded.ideal_bytes,
        l1=l1(original, x_hat).item(),
        psnr=psnr(original, x_hat).item(),
        ms_ssim=ms_ssim(original, x_hat).item(),
        psnr_hvs=psnr_hvs(original, x_hat).item(),
        psnr_hvs_m=psnr_hvs(original, x_hat, masking=True).item(),
        encode_seconds=coded.encode_seconds,
        decode_seconds=coded.decode_seconds,
    )


def coded_sizes(
    codecs: dict[str, tuple[Codec, EntropyName]], bits: np.ndarray, height: int, width: int
) -> dict[str, list[int]]:
    """Bytes of the whole file at every iteration, for the same bits and each entropy coder.

    Args:
        codecs: a codec and the name of its entropy coder, by the name of the coder in the result.
        bits: bool [iterations, bits, rows, columns].
        height: of the image in pixels.
        width: of the image in pixels.

    Raises:
        RuntimeError: a coder does not give the bits back.
    """
    sizes = {}
    for name, (codec, entropy) in codecs.items():
        file = codec.write_bits(bits, height, width, entropy)
        if not np.array_equal(codec.read_bits(file), bits):
            raise RuntimeError(f"the entropy coder {name} does not give the bits back")
        sizes[name] = list(read_header(file).sizes)
    return sizes


def coder_table(mean: dict[str, np.ndarray]) -> Table:
    """Mean bytes [T] of raw files, and what share of them each coder saves."""
    names = [name for name in mean if name != "none"]
    result = Table(title="bytes of the whole file, and how many less with each entropy coder")
    for column in ("iteration", "raw", *names):
        result.add_column(column, justify="right")
    for t, raw in enumerate(mean["none"]):
        result.add_row(str(t + 1), f"{raw:.0f}", *(f"{1 - mean[name][t] / raw:.1%}" for name in names))
    return result


def check_truncated(codec: Codec, x: np.ndarray, iterations: int) -> None:
    """Raises RuntimeError if a cut file decodes to another picture than the whole file does on its way."""
    data = codec.encode(x, iterations)
    for k, x_hat in enumerate(codec.decode_progressive(data), 1):
        if k in RATES and not np.array_equal(np.asarray(codec.decode(truncate(data, iterations=k))), x_hat):
            raise RuntimeError(f"the file cut to {k} iterations decodes to another picture than the whole file")


def save_picture(source: Source, coded: Coded, folder: Path) -> str:
    """Saves what a codec made of an image, in a form that browsers show; gives its name."""
    path = folder / f"{source.name}-{coded.setting:g}{source.suffix}"
    if coded.file is None:
        save_image(coded.x_hat, path)
    else:
        atomic_write(path, coded.file)
    return path.name


def figure(curves: dict[str, list[Point]], overlays: Sequence[str] = ()) -> Figure:
    """Mean curves over bpp, each labelled on the right; the first sets the range, overlays are dashed."""
    end = next(iter(curves.values()))[-1].bpp
    drawing = Figure(figsize=(15, 4.8), dpi=110, layout="constrained")
    panels = {"PSNR (dB)": "psnr", "MS-SSIM (dB)": "ms_ssim_db", "PSNR-HVS-M (dB)": "psnr_hvs_m"}
    for axes, (title, metric) in zip(drawing.subplots(1, 3), panels.items(), strict=True):
        labels = []
        for i, (name, curve) in enumerate(curves.items()):
            x, y = samples(curve, metric)
            if not len(x) or x[0] > end:
                continue
            last = min(end, x[-1])
            visible = x <= last
            # A curve that goes on beyond the range ends on its edge.
            x_visible, y_visible = np.append(x[visible], last), np.append(y[visible], np.interp(last, x, y))
            style = "--" if name in overlays else "-"
            axes.plot(x_visible, y_visible, style, color=f"C{i}", linewidth=2.2 if i == 0 else 1.4)
            axes.plot(x[visible], y[visible], "o" if i == 0 else ".", color=f"C{i}", markersize=4)
            labels.append([y_visible[-1], name, f"C{i}"])
        axes.set_xlim(0, end * 1.02)
        axes.set_xlabel("bits per pixel, whole files")
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        low, high = axes.get_ylim()
        labels.sort()
        heights = spread([value for value, *_ in labels], (high - low) / 22, high)
        for (_, name, color), height in zip(labels, heights, strict=True):
            place = end, height
            text = axes.annotate(name, place, (6, 0), textcoords="offset points", va="center", color=color, fontsize=9)
            text.set_parse_math(False)  # a name may hold dollars
    return drawing


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Rising heights, moved until no two are closer than the gap and, if there is room, none is above the top."""
    result: list[float] = []
    for height in heights:
        result.append(max(height, result[-1] + gap) if result else height)
    for i in reversed(range(len(result))):
        top = result[i] = min(result[i], top)
        top -= gap
    return result


def rendered(drawing: Figure, format: str) -> bytes:
    """A figure as png or svg."""
    file = io.BytesIO()
    drawing.savefig(file, format=format, metadata={"Date": None} if format == "svg" else None)
    return file.getvalue()


def comparison(x: np.ndarray, columns: Sequence[tuple[Panel | None, Panel | None]]) -> np.ndarray:
    """The middle of an image, unscaled, and of what two codecs make of it: one above the other at the same bytes."""
    (width, height), margin, caption = PANEL, 8, 40
    sheet = Image.new("RGB", ((width + margin) * (len(columns) + 1) + margin, 2 * (height + caption) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, column in enumerate([(Panel("original", x), None), *columns]):
        for j, panel in enumerate(column):
            if panel is None:
                continue
            corner = margin + i * (width + margin), j * (height + caption)
            draw.text((corner[0], corner[1] + 4), panel.caption, "black", font)
            if panel.picture is not None:
                top, left = (
                    max(0, (a - b) // 2) for a, b in zip(panel.picture.shape[:2], (height, width), strict=True)
                )
                crop = Image.fromarray(panel.picture[top : top + height, left : left + width])
                sheet.paste(crop, (corner[0], corner[1] + caption))
    return np.asarray(sheet)


def compared(name: str, baseline: str, x: np.ndarray, points: Sequence[Point], folder: Path) -> np.ndarray | None:
    """The comparison of a codec's saved pictures at 1, 2, 4, 8 and 16 iterations with a baseline at the same bytes."""
    rivals = [point for point in points if point.codec == baseline and point.picture]
    columns: list[tuple[Panel | None, Panel | None]] = []
    for point in points:
        if point.codec != name or point.setting not in RATES or not point.picture:
            continue
        plural = "" if point.setting == 1 else "s"
        mine = f"{point.setting:g} iteration{plural}, {point.bpp:.3f} bpp\n{point.psnr:.2f} dB"
        theirs = Panel(f"{baseline}: no file is as small", None) if rivals else None
        if best := largest_within(rivals, point.bytes):
            caption = f"{baseline} {best.setting:g}, {best.bpp:.3f} bpp\n{best.psnr:.2f} dB"
            theirs = Panel(caption, load_image(folder / best.picture))
        columns.append((Panel(mine, load_image(folder / point.picture)), theirs))
    return comparison(x, columns) if columns else None


def curve_table(curve: Sequence[Point], images: str) -> Table:
    """All metrics of a mean curve."""
    result = Table(title=f"{curve[0].codec}, mean of {images}")
    for column in ("", "bytes", "bpp", "L1", "PSNR", "MS-SSIM", "PSNR-HVS", "PSNR-HVS-M"):
        result.add_column(column, justify="right", no_wrap=True)
    for point in curve:
        values = [(point.bpp, 4), (point.l1, 2), (point.psnr, 2), (point.ms_ssim, 4)]
        values += [(point.psnr_hvs, 2), (point.psnr_hvs_m, 2)]
        cells = [number(value, digits) for value, digits in values]
        result.add_row(f"{point.setting:g}", number(point.bytes, 0), *cells)
    return result


def rivals_table(curves: dict[str, list[Point]]) -> Table:
    """PSNR and MS-SSIM of all mean curves at the bits per pixel of the first after 1, 2, 4, 8 and 16 iterations."""
    rates = [(point.setting, point.bpp) for point in next(iter(curves.values())) if point.setting in RATES]
    result = Table(title="PSNR and MS-SSIM at the same bits per pixel")
    result.add_column("iterations\nbpp", overflow="fold")
    for setting, bpp in rates:
        result.add_column(f"{setting:g}\n{bpp:.3f}", justify="right", no_wrap=True)
    for name, curve in curves.items():
        cells = [
            "\n".join(number(interpolate(curve, metric, bpp), digits) for metric, digits in METRICS) for _, bpp in rates
        ]
        result.add_row(Text(name), *cells, end_section=True)
    return result


@dataclass(frozen=True)
class Summary:
    """A curve in a few numbers.

    Attributes:
        codec: name of its codec.
        areas: under the curve of each metric of `AREAS`, over each of `SPANS`.
        bd_rates: percent more bits that the evaluated codec takes for the same value of each metric of `BD_RATES`,
            and the share of its values that the other has too; None for that codec itself.
    """

    codec: str
    areas: list[list[float]]
    bd_rates: list[tuple[float, float]] | None


def summaries(curves: dict[str, list[Point]]) -> list[Summary]:
    """The areas under all curves, and the BD-rate of the first against each."""
    mine = next(iter(curves.values()))
    result = []
    for name, curve in curves.items():
        # Of others nobody knows here whether the last point measured is the last there is.
        saturates = curve is mine and curve[-1].setting == MAX_ITERATIONS
        areas = [[area(curve, metric, *span, saturates=saturates) for span in SPANS.values()] for metric in AREAS]
        bd_rates = None if curve is mine else [bd_rate(curve, mine, metric) for metric in BD_RATES]
        result.append(Summary(name, areas, bd_rates))
    return result


def summary_csv(summaries: Sequence[Summary]) -> str:
    """One row for each curve; what does not exist is left empty."""
    names = [f"auc_{metric}_{name}" for metric in AREAS for name in ("to_2", "window")]
    names += [f"bd_rate_{metric}{end}" for metric in BD_RATES for end in ("", "_overlap")]
    rows = [["codec", *names]]
    for each in summaries:
        values = [value for pair in each.areas for value in pair]
        values += [value for pair in each.bd_rates or [(NAN, NAN)] * len(BD_RATES) for value in pair]
        rows.append([each.codec, *("" if np.isnan(value) else repr(float(value)) for value in values)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def area_table(summaries: Sequence[Summary]) -> Table:
    """The areas under all curves."""
    result = Table(title="area under the curves, over bits per pixel")
    names = [f"{title}\n{span}" for title in AREAS.values() for span in SPANS]
    for column in ("codec", *names):
        result.add_column(column, justify="left" if column == "codec" else "right", overflow="fold")
    for each in summaries:
        result.add_row(Text(each.codec), *(number(value, 3) for pair in each.areas for value in pair))
    return result


def bd_rate_table(summaries: Sequence[Summary]) -> Table:
    """How many more bits the first codec takes than each other."""
    first, *others = summaries
    result = Table(title=f"BD-rate: bits that {first.codec} takes more for the same quality")
    for column in ("than", *BD_RATES.values()):
        result.add_column(column, justify="left" if column == "than" else "right")
    partial = False
    for each in others:
        cells = []
        for difference, overlap in each.bd_rates or ():
            doubtful = not np.isnan(difference) and overlap < COMMON
            partial |= doubtful
            cells.append("-" if np.isnan(difference) else f"{difference:+.1f} %" + "*" * doubtful)
        result.add_row(Text(each.codec), *cells)
    if partial:
        result.caption = f"* over less than {COMMON:.0%} of the range of quality of {first.codec}"
    return result


def number(value: float, digits: int) -> str:
    """A value, or what stands for none."""
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def unique_names(paths: Iterable[Path]) -> list[str]:
    """The files' names without suffix, as text and folders can have them, numbered where one comes again."""
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


def entropy_coders(codec: Codec, args: argparse.Namespace) -> dict[str, tuple[Codec, EntropyName]]:
    """The entropy coders to compare, by name: each with a codec of the same network."""
    coders: dict[str, tuple[Codec, EntropyName]] = {}
    if args.coders is None:
        return coders
    coders |= {name: (codec, name) for name in CLASSICAL}
    for another in (codec, *(rnncodec.load(path, device=args.device) for path in args.coders)):
        if another.fingerprint != codec.fingerprint:
            raise ValueError(f"the weights {another.name} ({another.fingerprint.hex()}) are not those of {codec.name}")
        if another.context is not None:
            name = another.context.config.kind
            if name in coders and coders[name][0].context_fingerprint != another.context_fingerprint:
                name += f" {another.context_fingerprint.hex()}"
            coders[name] = (another, "context")
    return coders


def overlays_of(args: argparse.Namespace, taken: Iterable[str]) -> dict[str, list[Point]]:
    """The curves of others that are to be drawn; those whose names are taken also bear that of their file."""
    curves: dict[str, list[Point]] = {}
    for text in args.overlay:
        shipped = PUBLISHED / f"{text}.json"
        name, points = from_json(shipped if shipped.is_file() else Path(text))
        curves[f"{name} ({text})" if name in (*taken, *curves) else name] = points
    return curves


def evaluate(args: argparse.Namespace, console: Console) -> int:
    """Does what the command line asks for; returns the number of images that could not be measured."""
    codec = rnncodec.load(args.weights, device=args.device)
    if args.iterations > codec.max_iterations:
        raise ValueError(f"--iterations must be in 1..{codec.max_iterations}, not {args.iterations}")
    missing = [name for name in args.baselines if not BASELINES[name].available]
    if missing:
        raise ValueError(f"this Pillow cannot write {', '.join(missing)}")
    sources = [own(codec, args.iterations), *(other(BASELINES[name]) for name in args.baselines)]
    overlays = overlays_of(args, [source.title for source in sources])
    coders = entropy_coders(codec, args)
    sizes: dict[str, list[list[int]]] = {name: [] for name in coders}
    memory = Memory(args.cache_dir, str(codec.device))
    failures = 0

    def fail(path: Path, error: ValueError) -> None:
        nonlocal failures
        failures += 1
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        console.print(f"evaluate: skipped: {message}", markup=False, highlight=False, soft_wrap=True)

    paths = []
    for path in args.images:
        try:
            paths += find_images([path])
        except ValueError as error:
            fail(path, error)
    for folder in (args.output, args.cache_dir):  # if this fails, then before the work
        folder.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    sheets: dict[str, Path] = {}
    checked = False
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(paths))
        for i, (path, name) in enumerate(zip(paths, unique_names(paths), strict=True)):
            folder = args.output / "pictures" / name
            measured: list[Point] = []
            image_sizes: dict[str, list[int]] = {}
            try:
                x = load_image(path)
                for source in sources:
                    progress.update(task, description=f"{name}: {source.title}")
                    settings = source.settings
                    if args.save_images and source.name in BASELINES:
                        matched = BASELINES[source.name].matched(x, [p.bytes for p in measured[: args.iterations]])
                        settings = tuple(sorted({*settings, *matched}))
                    measured += measured_points(name, source, settings, x, codec.device, memory, args)
                    progress.advance(task, 1 / len(sources))
                if not checked:
                    check_truncated(codec, x, args.iterations)
                    checked = True
                if coders:
                    progress.update(task, description=f"{name}: entropy coders")
                    bits = codec.read_bits(codec.encode(x, args.iterations, entropy="none"))
                    image_sizes = coded_sizes(coders, bits, *x.shape[:2])
                if args.save_images:
                    save_image(x, folder / "original.png")
                    rival = next(iter(args.baselines), "")
                    sheet = compared(sources[0].name, rival, x, measured, args.output)
                    if sheet is not None:
                        sheets[name] = args.output / f"{name}_comparison.png"
                        save_image(sheet, sheets[name])
            except ValueError as error:
                fail(path, error)
                continue
            finally:
                progress.update(task, completed=i + 1)
            points += measured
            for coder, each in image_sizes.items():
                sizes[coder].append(each)
    if not points:
        raise ValueError("no image could be measured")
    # Not of the settings that match single files: a codec's curve does not depend on what it is compared with.
    curves = {
        source.name: mean_curve(p for p in points if p.codec == source.name and p.setting in source.settings)
        for source in sources
    }
    summarize(points, curves, sources, overlays, sizes, args)
    if args.save_images:
        write_report(args.output)
    if args.wandb:
        names = ["points.csv", "mean.csv", "summary.csv", "rate_distortion.png", "rate_distortion.svg"]
        names += [f"{source.name}.json" for source in sources]
        names += ["coders.csv"] * bool(sizes) + ["report.html"] * args.save_images
        config = {
            "weights": codec.name,
            "fingerprint": codec.fingerprint.hex(),
            "context_fingerprint": codec.context_fingerprint.hex(),
            "iterations": args.iterations,
            "images": len({point.image for point in points}),
            "device": str(codec.device),
            "codecs": {source.name: source.description for source in sources},
            "versions": {"rnncodec": rnncodec.__version__, "torch": torch.__version__},
        }
        log_evaluation(args.output, args.wandb, config, curves, points, [args.output / n for n in names], sheets)
    return failures


def measured_points(
    image: str,
    source: Source,
    settings: Sequence[float],
    x: np.ndarray,
    device: torch.device,
    memory: Memory,
    args: argparse.Namespace,
) -> list[Point]:
    """The points of an image and a codec, remembered if possible, with its pictures saved if asked for."""
    known = memory.recall(x, source)
    missing = [setting for setting in settings if setting not in known]
    folder = args.output / "pictures" / image
    pictures = {}
    if args.save_images:
        folder.mkdir(parents=True, exist_ok=True)
    if needed := settings if args.save_images else missing:
        for coded in source.run(x, needed):
            if coded.setting in missing:
                known[coded.setting] = measure(image, source.name, x, coded, device)
            if args.save_images:
                pictures[coded.setting] = f"pictures/{image}/{save_picture(source, coded, folder)}"
    if missing:
        memory.keep(x, source, known.values())
    return [replace(known[setting], image=image, picture=pictures.get(setting, "")) for setting in settings]


def summarize(
    points: Sequence[Point],
    curves: dict[str, list[Point]],
    sources: Sequence[Source],
    overlays: dict[str, list[Point]],
    sizes: dict[str, list[list[int]]],
    args: argparse.Namespace,
) -> None:
    """Writes tables, curves and plots, and prints the tables."""
    mine = [point for point in points if point.codec == sources[0].name]
    count = len({point.image for point in mine})
    large = len({point.image for point in mine if not np.isnan(point.ms_ssim)})
    exception = f", MS-SSIM of the {large} with sides of at least {MS_SSIM_MIN_SIDE}" if large < count else ""
    for source in sources:
        description = f"{source.description}; whole files, mean of {count} images{exception}"
        text = to_json(curves[source.name], source.name, description)
        atomic_write(args.output / f"{source.name}.json", text.encode())
    atomic_write(args.output / "points.csv", to_csv(points).encode())
    atomic_write(args.output / "mean.csv", to_csv(point for curve in curves.values() for point in curve).encode())
    # A codec without settings is a point beyond the range.
    drawable = [source for i, source in enumerate(sources) if i == 0 or len(source.settings) > 1]
    drawn = {source.title: curves[source.name] for source in drawable} | overlays
    drawing = figure(drawn, list(overlays))
    for format in ("png", "svg"):
        atomic_write(args.output / f"rate_distortion.{format}", rendered(drawing, format))
    summary = summaries(drawn)
    atomic_write(args.output / "summary.csv", summary_csv(summary).encode())
    console = Console()
    if sizes:
        mean = {name: np.mean(each, axis=0) for name, each in sizes.items()}
        text = "coder,iteration,bytes\n"
        text += "".join(f"{name},{t},{size}\n" for name, each in mean.items() for t, size in enumerate(each, 1))
        atomic_write(args.output / "coders.csv", text.encode())
        console.print(coder_table(mean))
    first, *rest = drawn
    console.print(curve_table(drawn[first], f"{count} image{'s' * (count > 1)}{exception}"))
    if rest:
        console.print(rivals_table(drawn))
        console.print(area_table(summary))
        console.print(bd_rate_table(summary))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Measures a codec on photographs, beside others.")
    parser.add_argument("images", nargs="+", type=Path, help="image files and folders")
    parser.add_argument("--weights", default="small", help="name of shipped weights, or a file (default: small)")
    parser.add_argument(
        "--iterations", type=int, default=MAX_ITERATIONS, help="iterations to measure (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write to (default: results)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=BASELINES,
        default=["jpeg", "jpeg2000", "webp", "avif"],
        help="codecs to measure beside it (default: jpeg, jpeg2000, webp, avif)",
    )
    shipped = ", ".join(sorted(path.stem for path in PUBLISHED.glob("*.json")))
    parser.add_argument(
        "--overlay",
        nargs="*",
        metavar="CURVE",
        default=[],
        help=f"curves of others: JSON files as this program writes them, or of those for Kodak: {shipped}",
    )
    parser.add_argument(
        "--coders",
        nargs="*",
        metavar="WEIGHTS",
        help="compare the entropy coders; weights of the same codec add their context models",
    )
    parser.add_argument("--save-images", action="store_true", help="write the decoded images and comparisons")
    parser.add_argument("--wandb", metavar="NAME", help="log the results to W&B, as a run of this name")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=user_cache / "rnncodec" / "results",
        help="folder that remembers what has been measured (default: rnncodec/results in the user's cache folder)",
    )
    args = parser.parse_args(argv)
    if args.iterations < 1:
        parser.error(f"--iterations must be at least 1, not {args.iterations}")
    console = Console(stderr=True)
    try:
        failures = evaluate(args, console)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        console.print(f"evaluate: error: {one_line(error)}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    if failures:
        console.print(f"evaluate: could not be measured: {failures}", highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
