"""Measures a codec on photographs: whole-file bytes, PSNR and MS-SSIM at every iteration, beside optimized JPEG.

    python evaluate.py PHOTOS --weights small --output results --save-images
    python evaluate.py PHOTOS --coders      the entropy coders beside it, on the same bits

Each image is encoded once and its file decoded iteration by iteration; the bytes of iteration k are those of the file
cut to k iterations, bpp counts them over the true pixels, and curves are means over the images at equal iteration (or
JPEG quality). The output folder gets one JSON for each codec in CompressAI's shape, points.csv, mean.csv,
rate_distortion.png and, if asked for, coders.csv and the decoded images.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import rnncodec
from rnncodec.codec import MAX_ITERATIONS, Codec
from rnncodec.entropy import CLASSICAL, EntropyName
from rnncodec.format import read_header, truncate
from rnncodec.images import atomic_write, find_images, load_image, save_image
from rnncodec.metrics import MS_SSIM_MIN_SIDE, RATES, ms_ssim, psnr

QUALITIES = (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)  # about 0.2 to 2.7 bpp on photographs
PANEL = (320, 240)  # pixels of a picture in a comparison, three beside each other


class Coded(NamedTuple):
    """A file and what it decodes to: the codec's setting, bytes of the whole file, reconstruction uint8 [H, W, 3]."""

    setting: int
    bytes: int
    x_hat: np.ndarray


@dataclass(frozen=True)
class Point:
    """A point of a rate-distortion curve, of one image or the mean of several.

    Attributes:
        image: name of the image, or `mean`.
        codec: name of the codec.
        setting: iterations, or JPEG's quality.
        bytes: of the whole file.
        bpp: bits per pixel of the image.
        psnr: in dB.
        ms_ssim: up to 1; nan for an image too small for it.
    """

    image: str
    codec: str
    setting: int
    bytes: float
    bpp: float
    psnr: float
    ms_ssim: float


def decode_every_iteration(codec: Codec, data: bytes) -> Iterator[Coded]:
    """The file cut to 1, 2, ... iterations, for the cost of decoding it once."""
    for k, x_hat in enumerate(codec.decode_progressive(data), start=1):
        yield Coded(k, len(truncate(data, iterations=k)), x_hat)


def jpeg(x: np.ndarray) -> Iterator[Coded]:
    """JPEG 4:2:0 with optimized Huffman tables, at every quality of the grid."""
    for quality in QUALITIES:
        file = io.BytesIO()
        Image.fromarray(x).save(file, "JPEG", quality=quality, optimize=True, subsampling=2)
        yield Coded(quality, file.tell(), np.asarray(Image.open(file)))


BASELINES: dict[str, Callable[[np.ndarray], Iterator[Coded]]] = {"jpeg": jpeg}


def rate_point(image: str, codec: str, x: np.ndarray, coded: Coded, device: torch.device | str = "cpu") -> Point:
    """Measures one reconstruction of an image x, uint8 [H, W, 3]."""
    original, x_hat = (torch.tensor(a, device=device).permute(2, 0, 1)[None] for a in (x, coded.x_hat))
    bpp = 8 * coded.bytes / (x.shape[0] * x.shape[1])
    return Point(
        image, codec, coded.setting, coded.bytes, bpp, psnr(original, x_hat).item(), ms_ssim(original, x_hat).item()
    )


def rate_points(
    image: str, codec: str, x: np.ndarray, coded: Iterable[Coded], device: torch.device | str = "cpu"
) -> Iterator[Point]:
    """Measures every reconstruction of an image x, uint8 [H, W, 3]."""
    return (rate_point(image, codec, x, each, device) for each in coded)


def mean_curve(points: Iterable[Point]) -> list[Point]:
    """The mean over images of one codec's points at each setting, in order of setting.

    MS-SSIM is the mean over the images that have one.
    """
    groups: dict[int, list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting, []).append(point)
    curve = []
    for _, group in sorted(groups.items()):
        similarities = [point.ms_ssim for point in group if not np.isnan(point.ms_ssim)]
        mean = Point(
            "mean",
            group[0].codec,
            group[0].setting,
            float(np.mean([point.bytes for point in group])),
            float(np.mean([point.bpp for point in group])),
            float(np.mean([point.psnr for point in group])),
            float(np.mean(similarities)) if similarities else float("nan"),
        )
        curve.append(mean)
    return curve


def interpolate(curve: Sequence[Point], bpp: float) -> tuple[float, float]:
    """PSNR and MS-SSIM of a curve at a rate, linear between its points and nan outside them."""
    rates = [point.bpp for point in curve]
    psnrs, similarities = [point.psnr for point in curve], [point.ms_ssim for point in curve]
    nan = float("nan")
    return (
        float(np.interp(bpp, rates, psnrs, left=nan, right=nan)),
        float(np.interp(bpp, rates, similarities, left=nan, right=nan)),
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


def check_truncated(codec: Codec, data: bytes, coded: Coded) -> None:
    """Raises RuntimeError if the cut file decodes to another picture than the whole file does on its way."""
    x_hat = np.asarray(codec.decode(truncate(data, iterations=coded.setting)))
    if not np.array_equal(x_hat, coded.x_hat):
        raise RuntimeError(f"the file cut to {coded.setting} iterations decodes to another picture than the whole file")


def to_json(curve: Sequence[Point], description: str) -> str:
    """A mean curve in CompressAI's shape; what is not finite becomes null."""

    def finite(values: Iterable[float]) -> list[float | None]:
        return [value if np.isfinite(value) else None for value in values]

    results = {
        "bpp": finite(point.bpp for point in curve),
        "psnr-rgb": finite(point.psnr for point in curve),
        "ms-ssim-rgb": finite(point.ms_ssim for point in curve),
    }
    return json.dumps({"name": curve[0].codec, "description": description, "results": results}, indent=2) + "\n"


def to_csv(points: Iterable[Point]) -> str:
    """One row for each point; an MS-SSIM that does not exist is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Point))
    for point in points:
        writer.writerow("" if value != value else value for value in astuple(point))
    return text.getvalue()


def plot(curves: dict[str, list[Point]]) -> bytes:
    """PSNR and MS-SSIM over bpp of mean curves, each labelled at its right end, as PNG; the first sets the range."""
    first = next(iter(curves.values()))
    end = first[-1].bpp
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    panels = {"PSNR (dB)": lambda p: p.psnr, "MS-SSIM (dB)": lambda p: -10 * np.log10(max(1 - p.ms_ssim, 1e-10))}
    for axes, (title, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            x, y = np.array([(p.bpp, value(p)) for p in curve if np.isfinite(value(p))]).reshape(-1, 2).T
            if not x.size:
                continue
            last = min(end, x[-1])
            visible = x <= last
            # A curve that goes on beyond the range ends on its edge.
            x_visible, y_visible = np.append(x[visible], last), np.append(y[visible], np.interp(last, x, y))
            axes.plot(x_visible, y_visible, color=f"C{i}", linewidth=1.8)
            axes.plot(x[visible], y[visible], "o" if i == 0 else ".", color=f"C{i}", markersize=5)
            axes.annotate(name, (last, y_visible[-1]), (8, 0), textcoords="offset points", va="center", color=f"C{i}")
        axes.set_xlim(0, end * 1.02)
        axes.set_xlabel("bits per pixel, whole files")
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def comparison(x: np.ndarray, reconstructions: Sequence[tuple[np.ndarray, Point]]) -> np.ndarray:
    """The middle of an image and of its reconstructions, unscaled, three in a row, each with iterations, bpp and dB."""
    panels = [("original", x)]
    for x_hat, point in reconstructions:
        plural = "" if point.setting == 1 else "s"
        panels.append((f"{point.setting} iteration{plural}: {point.bpp:.3f} bpp, {point.psnr:.2f} dB", x_hat))
    (width, height), margin, caption = PANEL, 8, 26
    height = min(height, x.shape[0])
    rows = -(-len(panels) // 3)
    sheet = Image.new("RGB", (3 * (width + margin) + margin, rows * (height + caption) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for i, (text, picture) in enumerate(panels):
        top, left = max(0, (x.shape[0] - height) // 2), max(0, (x.shape[1] - width) // 2)
        corner = margin + i % 3 * (width + margin), i // 3 * (height + caption)
        draw.text((corner[0], corner[1] + 4), text, "black", font)
        crop = Image.fromarray(picture[top : top + height, left : left + width])
        sheet.paste(crop, (corner[0], corner[1] + caption))
    return np.asarray(sheet)


def table(curve: Sequence[Point], baselines: dict[str, list[Point]], images: str) -> Table:
    """The mean curve, with each baseline's PSNR and MS-SSIM at the same bpp."""
    result = Table(title=f"{curve[0].codec}, mean of {images}")
    names = [f"{name.upper()} {metric}" for name in baselines for metric in ("PSNR", "MS-SSIM")]
    for column in ("iteration", "bytes", "bpp", "PSNR", "MS-SSIM", *names):
        result.add_column(column, justify="right")

    def cell(value: float, digits: int) -> str:
        return "-" if np.isnan(value) else f"{value:.{digits}f}"

    for point in curve:
        cells = [str(point.setting), f"{point.bytes:.0f}", f"{point.bpp:.4f}", cell(point.psnr, 2)]
        cells.append(cell(point.ms_ssim, 4))
        for baseline in baselines.values():
            baseline_psnr, baseline_ms_ssim = interpolate(baseline, point.bpp)
            cells += [cell(baseline_psnr, 2), cell(baseline_ms_ssim, 4)]
        result.add_row(*cells)
    return result


def unique_names(paths: Iterable[Path]) -> list[str]:
    """The files' names without suffix, numbered where one comes again."""
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 1
        while name in names:
            number += 1
            name = f"{path.stem}-{number}"
        names.append(name)
    return names


def evaluate(args: argparse.Namespace, console: Console) -> int:
    """Does what the command line asks for; returns the number of images that could not be measured."""
    codec = rnncodec.load(args.weights, device=args.device)
    label = f"rnncodec-{codec.name}"
    coders: dict[str, tuple[Codec, EntropyName]] = {}
    if args.coders is not None:
        coders = {name: (codec, name) for name in CLASSICAL}
        for other in (codec, *(rnncodec.load(path, device=args.device) for path in args.coders)):
            if other.fingerprint != codec.fingerprint:
                raise ValueError(f"the weights {other.name} ({other.fingerprint.hex()}) are not those of {codec.name}")
            if other.context is not None:
                name = other.context.config.kind
                if name in coders and coders[name][0].context_fingerprint != other.context_fingerprint:
                    name += f" {other.context_fingerprint.hex()}"
                coders[name] = (other, "context")
    sizes: dict[str, list[list[int]]] = {name: [] for name in coders}
    failures = 0

    def fail(message: object) -> None:
        nonlocal failures
        failures += 1
        console.print(f"evaluate: skipped: {message}", markup=False, highlight=False, soft_wrap=True)

    paths = []
    for path in args.images:
        try:
            paths += find_images([path])
        except ValueError as error:
            fail(error)
    args.output.mkdir(parents=True, exist_ok=True)
    points: dict[str, list[Point]] = {label: [], **{name: [] for name in args.baselines}}
    steps = 2 * args.iterations + len(QUALITIES) * len(args.baselines)
    checked = False
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps * len(paths))
        for i, (path, name) in enumerate(zip(paths, unique_names(paths), strict=True)):
            progress.update(task, description=name)
            measured: dict[str, list[Point]] = {codec_name: [] for codec_name in points}
            pictures = []
            try:
                x = load_image(path)
                data = codec.encode(x, iterations=args.iterations)
                progress.advance(task, args.iterations)
                for coded in decode_every_iteration(codec, data):
                    point = rate_point(name, label, x, coded, codec.device)
                    measured[label].append(point)
                    if coded.setting in RATES:
                        if not checked:
                            check_truncated(codec, data, coded)
                        if args.save_images:
                            pictures.append((coded.x_hat, point))
                    progress.advance(task)
                checked = True
                image_sizes = coded_sizes(coders, codec.read_bits(data), *x.shape[:2]) if coders else {}
                for baseline in args.baselines:
                    for point in rate_points(name, baseline, x, BASELINES[baseline](x), codec.device):
                        measured[baseline].append(point)
                        progress.advance(task)
            except ValueError as error:
                fail(error)
                continue
            finally:
                progress.update(task, completed=steps * (i + 1))
            for codec_name, curve in measured.items():
                points[codec_name] += curve
            for coder, each in image_sizes.items():
                sizes[coder].append(each)
            for x_hat, point in pictures:
                save_image(x_hat, args.output / f"{name}_{point.setting:02d}.png")
            if pictures:
                save_image(comparison(x, pictures), args.output / f"{name}_comparison.png")
    if not points[label]:
        raise ValueError("no image could be measured")

    curves = {codec_name: mean_curve(curve) for codec_name, curve in points.items()}
    count = len({point.image for point in points[label]})
    large = len({point.image for point in points[label] if not np.isnan(point.ms_ssim)})
    exception = f", MS-SSIM of the {large} with sides of at least {MS_SSIM_MIN_SIDE}" if large < count else ""
    descriptions = {label: f"weights {codec.name} ({codec.fingerprint.hex()}), 1 to {args.iterations} iterations"}
    descriptions["jpeg"] = f"JPEG 4:2:0, optimized Huffman tables, quality {QUALITIES[0]} to {QUALITIES[-1]}"
    for codec_name, curve in curves.items():
        description = f"{descriptions[codec_name]}; whole files, mean of {count} images{exception}"
        atomic_write(args.output / f"{codec_name}.json", to_json(curve, description).encode())
    for file, rows in (("points.csv", points), ("mean.csv", curves)):
        atomic_write(args.output / file, to_csv(point for curve in rows.values() for point in curve).encode())
    drawn = {label: curves[label], **{name.upper(): curves[name] for name in args.baselines}}
    atomic_write(args.output / "rate_distortion.png", plot(drawn))
    if coders:
        mean = {name: np.mean(each, axis=0) for name, each in sizes.items()}
        text = "coder,iteration,bytes\n"
        text += "".join(f"{name},{t},{size}\n" for name, each in mean.items() for t, size in enumerate(each, 1))
        atomic_write(args.output / "coders.csv", text.encode())
        Console().print(coder_table(mean))
    Console().print(table(curves[label], {name: curves[name] for name in args.baselines}, f"{count} images{exception}"))
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Measures a codec on photographs, beside JPEG.")
    parser.add_argument("images", nargs="+", type=Path, help="image files and folders")
    parser.add_argument("--weights", default="small", help="name of shipped weights, or a file (default: small)")
    parser.add_argument("--iterations", type=int, default=MAX_ITERATIONS, help="iterations to measure (default: all)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write to (default: results)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=BASELINES,
        default=["jpeg"],
        help="codecs to measure beside it (default: jpeg)",
    )
    parser.add_argument(
        "--coders",
        nargs="*",
        metavar="WEIGHTS",
        help="compare the entropy coders; weights of the same codec add their context models",
    )
    parser.add_argument("--save-images", action="store_true", help="write the decoded images and comparisons")
    args = parser.parse_args(argv)
    if not 1 <= args.iterations <= MAX_ITERATIONS:
        parser.error(f"--iterations must be in 1..{MAX_ITERATIONS}")
    console = Console(stderr=True)
    try:
        failures = evaluate(args, console)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        message = str(error).strip().splitlines() or [type(error).__name__]
        console.print(f"evaluate: error: {message[0]}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    if failures:
        console.print(f"evaluate: could not be measured: {failures}", highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
