"""The command `rnncodec budget`: compresses images so that all files together keep to a rate, and measures them."""

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rnncodec.allocation import TuneName
from rnncodec.batch import Done, do_each
from rnncodec.console import Report, complain
from rnncodec.evaluation.baselines import BASELINES
from rnncodec.evaluation.contenders import Contender, Measure, Option, baseline, ours
from rnncodec.evaluation.sharing import share
from rnncodec.files import images
from rnncodec.files.errors import ImageWarning
from rnncodec.imagecodec import ImageCodec
from rnncodec.jobs import Job, UsageError, find_jobs, write
from rnncodec.metrics.distortion import MS_SSIM_MIN_SIDE, ms_ssim

AMPLE = 4  # times the bytes of an equal share, up to which the files of an image are known at first
USED = 0.998  # of the budget, the least that all files are to take together
FILLED = 3  # images that may get a file which takes what is left


@dataclass
class Picture:
    """An image, and the files that it may become.

    Attributes:
        pixels: how many it has.
        size: bytes up to which its files are known.
        options: these files.
        chosen: the place of the chosen one.
    """

    pixels: int
    size: float
    options: list[Option]
    chosen: int = 0


@dataclass(frozen=True)
class Measured:
    """What was measured of a file.

    Attributes:
        pixels: of the image.
        size: bytes of the file.
        squared: the sum of the squared errors of all values, 8 bits each.
        ms_ssim: nan if the image is too small for it.
        seconds: that decoding took.
    """

    pixels: int
    size: int
    squared: int
    ms_ssim: float
    seconds: float


def run(args: argparse.Namespace, load: Callable[[], ImageCodec]) -> int:
    """Runs the command.

    Args:
        args: as `rnncodec.arguments` says.
        load: loads the weights.

    Returns:
        The exit status, 1 if a file failed or was skipped.

    Raises:
        ValueError: the arguments are invalid, an output exists, or not even the smallest files of the codec fit.
    """
    missing = [name for name in args.baselines if not BASELINES[name].available]
    if missing:
        raise UsageError(f"this Pillow cannot write {', '.join(missing)}")
    skipped: dict[Path, str] = {}
    for folder in filter(Path.is_dir, map(Path, args.paths)):
        skipped |= images.find_unreadable(folder)
    error = ERRORS[args.tune]
    jobs = _jobs(args, ".rnc", args.output_dir, skipped)
    others = [baseline(BASELINES[name], error) for name in args.baselines]
    jobs_of = [(other, _jobs(args, other.suffix, args.output_dir / other.name, skipped)) for other in others]
    for job in (job for each in (jobs, *(each for _, each in jobs_of)) for job in each):
        if not job.overwrite and os.path.lexists(job.target):
            raise ValueError(f"{job.target} exists; --force replaces it")
    first = ours(load(), error, args.tune)
    status, read, files = compress(first, jobs, args, skipped)
    rows = {first.name: files}
    for other, each in jobs_of:
        try:
            failed, _, files = compress(other, [job for job in each if job.source in read], args)
        except ValueError as impossible:
            complain(f"warning: {other.name}: {impossible}")
            continue
        status |= failed
        rows[other.name] = files
    if not args.quiet:
        show(rows)
    return status


def _jobs(args: argparse.Namespace, suffix: str, folder: Path, skipped: dict[Path, str]) -> list[Job]:
    """The images, and the files that they become in a folder."""
    there = argparse.Namespace(paths=args.paths, output_dir=folder, force=args.force)
    return find_jobs(there, suffix, set(), lambda found: images.find_images([found]), skipped)


def compress(
    contender: Contender, jobs: Sequence[Job], args: argparse.Namespace, skipped: dict[Path, str] | None = None
) -> tuple[int, set[str], list[Measured]]:
    """Compresses images with one codec so that all files together keep to the budget, and measures the files.

    Args:
        contender: the codec.
        jobs: images and files.
        args: with `bpp`, `max_pixels` and `quiet`.
        skipped: files that were left out, and why, to be told together with what images lose; None tells neither.

    Returns:
        The exit status, the images that could be read, and what was measured of the file of each.

    Raises:
        ValueError: not even the smallest files fit, or no image could be read.
    """
    pictures: dict[str, Picture] = {}

    def load(source: str) -> np.ndarray:
        return images.read_photograph(source, args.max_pixels, strip=True).pixels

    def survey(source: str, target: str, report: Report) -> None:
        photograph = images.read_photograph(source, args.max_pixels, strip=True)
        for line in photograph.lost if skipped is not None else ():
            warnings.warn(line, ImageWarning, stacklevel=2)
        height, width = photograph.pixels.shape[:2]
        size = AMPLE * args.bpp * height * width / 8
        pictures[source] = Picture(height * width, size, contender.options(photograph.pixels, size, report))

    def lengthen(source: str, target: str, report: Report) -> None:
        picture = pictures[source]
        picture.size *= 1.5
        picture.options = contender.options(load(source), picture.size, report)

    def refine(source: str, target: str, report: Report) -> None:
        picture = pictures[source]
        picture.options += contender.near(load(source), picture.options, picture.chosen)

    def each(work: Callable[[str, str, Report], None], sources: Sequence[str]) -> int:
        return do_each([Job(source, "", True) for source in sources], work, args.quiet)

    status = do_each([Job(job.source, "", True) for job in jobs], survey, args.quiet, skipped)
    if not pictures:
        raise ValueError("there is no image to compress")
    limit = int(min(args.bpp * sum(picture.pixels for picture in pictures.values()) / 8 * (1 + 1e-12), 2**62))

    def choose(least: int = 0) -> None:
        tables = [[(option.size, option.error) for option in picture.options] for picture in pictures.values()]
        for picture, place in zip(pictures.values(), share(tables, limit, least), strict=True):
            picture.chosen = place

    def short() -> list[str]:
        """The images of which larger files than those that are known may be better."""
        return [
            source
            for source, picture in pictures.items()
            if picture.chosen == len(picture.options) - 1 and not contender.last(picture.options)
        ]

    choose()
    while sources := short():
        if each(lengthen, sources):
            return 1, set(pictures), []
        choose()

    def fill(source: str, target: str, report: Report) -> None:
        picture = pictures[source]
        picture.options += contender.fill(load(source), picture.options[picture.chosen].size + left())

    def left() -> int:
        return limit - sum(picture.options[picture.chosen].size for picture in pictures.values())

    least = math.ceil(USED * limit)
    status |= each(refine, list(pictures))
    choose(least)
    # Of a few images, no combination may come near the limit: then one of them gets what is left.
    for source in sorted(pictures, key=lambda source: -pictures[source].pixels)[:FILLED]:
        if limit - left() < least:
            status |= each(fill, [source])
            choose(least)
    measured: list[Measured] = []

    def finish(source: str, target: str, report: Report) -> Done:
        x, option = load(source), pictures[source].options[pictures[source].chosen]
        write(target, option.write(x))
        found = measure(x, Path(target).read_bytes(), contender)
        measured.append(found)
        rate, decibels = 8 * found.size / found.pixels, psnr([found])
        return Done(f"{contender.unit} {option.setting:g}, {found.size} bytes, {rate:.4f} bpp, {decibels:.2f} dB")

    status |= do_each([job for job in jobs if job.source in pictures], finish, args.quiet)
    return status, set(pictures), measured


def measure(x: np.ndarray, data: bytes, contender: Contender) -> Measured:
    """Decodes the file of an image, uint8 [H, W, 3], and measures it."""
    start = time.perf_counter()
    x_hat = contender.decode(data)
    seconds = time.perf_counter() - start
    return Measured(x.shape[0] * x.shape[1], len(data), squared_error(x, x_hat), similarity(x, x_hat), seconds)


def squared_error(x: np.ndarray, x_hat: np.ndarray) -> int:
    """The sum of the squared errors of all values."""
    return int(np.square(x.astype(np.int32) - x_hat).sum(dtype=np.int64))


def similarity(x: np.ndarray, x_hat: np.ndarray) -> float:
    """MS-SSIM, nan if the image is too small for it."""
    planes = (torch.tensor(array).permute(2, 0, 1)[None] for array in (x, x_hat))
    return ms_ssim(*planes).item()


def _dissimilarity(x: np.ndarray, x_hat: np.ndarray) -> float:
    if min(x.shape[:2]) < MS_SSIM_MIN_SIDE:
        raise ValueError(f"--tune ms-ssim needs images of at least {MS_SSIM_MIN_SIDE} pixels a side")
    return 1 - similarity(x, x_hat)


ERRORS: dict[TuneName, Measure] = {"psnr": squared_error, "ms-ssim": _dissimilarity}  # what each tune makes small


def psnr(files: Sequence[Measured]) -> float:
    """The PSNR in dB over the pixels of all images together."""
    squared, values = sum(file.squared for file in files), 3 * sum(file.pixels for file in files)
    return 10 * math.log10(255**2 * values / squared) if squared else math.inf


def show(rows: dict[str, list[Measured]]) -> None:
    """Prints a table of what was measured, with a row for each codec."""
    table = Table("codec", "files", "bytes", "bpp", "PSNR, dB", "MS-SSIM", "decoding, s")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, files in rows.items():
        if not files:
            continue
        size = sum(file.size for file in files)
        known = [file.ms_ssim for file in files if not math.isnan(file.ms_ssim)]
        mean = f"{sum(known) / len(known):.4f}" if known else "-"
        table.add_row(
            name,
            str(len(files)),
            str(size),
            f"{8 * size / sum(file.pixels for file in files):.5f}",
            f"{psnr(files):.3f}",
            mean if len(known) in (0, len(files)) else f"{mean} of {len(known)}",
            f"{sum(file.seconds for file in files):.2f}",
        )
    Console(highlight=False).print(table)
