"""Evaluates codecs on photographs, as a function and as a command line."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.progress import Progress

import rnncodec
from rnncodec.allocation import TuneName
from rnncodec.arguments import positive_int
from rnncodec.codec import MAX_ITERATIONS, Codec
from rnncodec.compressive import CompressiveCodec
from rnncodec.console import columns, warnings_told
from rnncodec.evaluation.baselines import BASELINES
from rnncodec.evaluation.measure import (
    Coded,
    Memory,
    Source,
    allocated,
    baseline,
    coded_sizes,
    entropy_coders,
    levels,
    measured_points,
    ours,
    unique_names,
)
from rnncodec.evaluation.pictures import compared, save_picture, shown_pictures
from rnncodec.evaluation.report import write_report
from rnncodec.evaluation.results import Results
from rnncodec.evaluation.steps import write_steps
from rnncodec.files.format import NAME_PATTERN
from rnncodec.files.images import find_images, load_image, one_line, save_image
from rnncodec.home import cache_folder
from rnncodec.imagecodec import ImageCodec
from rnncodec.metrics.curves import Point, from_json
from rnncodec.threads import use_threads

PUBLISHED = Path(__file__).with_name("published")


def evaluate(
    codecs: ImageCodec | Mapping[str, ImageCodec],
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    iterations: int | None = None,
    baselines: Sequence[str] = (),
    overlays: Iterable[str | os.PathLike[str]] = (),
    tunes: Iterable[TuneName] = (),
    coders: Iterable[ImageCodec] | None = None,
    output: str | os.PathLike[str] | None = None,
    save_images: bool = False,
    wandb: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    tables: Console | None = None,
    progress: Console | None = None,
    skip: Callable[[str], None] | None = None,
) -> list[Point]:
    """Measures codecs on images, and other codecs on the same images.

    Rates are those of whole files, in bits per pixel of the image. Files are written only to the given folders.

    Args:
        codecs: a codec, or several by name; the others are compared with the first. In the results, `rnncodec-`
            precedes this name, or that of the weights.
        images: image files and folders.
        iterations: number of iterations to measure; None takes all of each codec, but at most 16.
        baselines: names from `rnncodec.evaluation.baselines.BASELINES`, to measure on the same images.
        overlays: curves of other codecs to draw: JSON files in CompressAI's format, or names of published curves.
        tunes: metrics for which each codec, beside files with the same iterations everywhere, makes files of as many
            bytes with a number of iterations for each location.
        coders: codecs of the same network as the first, whose context models are compared with the other entropy coders
            on its bits; may be empty. None skips this comparison.
        output: folder for tables, curves and figures.
        save_images: whether to write decoded images, comparisons and the report too, which needs an output folder.
        wandb: name of a W&B run to which the results are logged, which needs an output folder.
        cache: folder that keeps measurements, for later evaluations to use.
        device: device that computes the metrics; None takes that of the first codec.
        tables: console on which the tables are printed.
        progress: console on which progress is shown.
        skip: called with a message of one line for each image that cannot be measured and is left out; None raises the
            error.

    Returns:
        The points of every image, codec and setting, as in points.csv.

    Raises:
        ValueError: an argument is invalid, or no image could be measured.
        RuntimeError: a codec does not decode its own files correctly, or W&B refuses or cannot be reached.
        OSError: a folder cannot be written.
    """
    named = {codecs.name: codecs} if isinstance(codecs, ImageCodec) else dict(codecs)
    folder, memory_folder = (None if path is None else Path(path) for path in (output, cache))
    if folder is None and (save_images or wandb):
        raise ValueError("saved images and runs of W&B need an output folder")
    log = _logger() if wandb else None
    counts = _iterations_of(named, iterations)
    missing = [name for name in baselines if name not in BASELINES or not BASELINES[name].available]
    if missing:
        raise ValueError(f"this Pillow cannot write {', '.join(missing)}")
    sources = [_source(codec, counts[name], name) for name, codec in named.items()]
    sources += [allocated(codec, counts[name], tune, name) for tune in tunes for name, codec in named.items()]
    sources += [baseline(BASELINES[name]) for name in baselines]
    codec, count = next(iter(named.values())), next(iter(counts.values()))
    curves = _overlays(overlays, [source.title for source in sources])
    compared_coders = {} if coders is None else entropy_coders(codec, coders)
    sizes: dict[str, list[list[int]]] = {name: [] for name in compared_coders}
    where = codec.device if device is None else torch.device(device)
    devices = dict.fromkeys(map(str, (where, *(each.device for each in named.values()))))
    memory = Memory(memory_folder, ", ".join(devices))

    def fail(path: str | os.PathLike[str], error: ValueError) -> None:
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        if skip is None:
            raise ValueError(message) from error
        skip(message)

    paths: list[Path] = []
    for path in [images] if isinstance(images, str | os.PathLike) else images:
        try:
            paths += find_images([path])
        except ValueError as error:
            fail(path, error)
    for place in (folder, memory_folder):  # before the work, so that a failure comes early
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    files_of: dict[str, Path] = {}
    sheets: dict[str, Path] = {}
    with Progress(*columns(), console=progress or Console(quiet=True)) as bar:
        task = bar.add_task("", total=len(paths))
        for i, (path, name) in enumerate(zip(paths, unique_names(paths), strict=True)):
            pictures = folder / "pictures" / name if folder is not None and save_images else None
            measured: list[Point] = []
            image_sizes: dict[str, list[int]] = {}
            try:
                x = load_image(path)
                save = _saver(pictures)
                for source in sources:
                    bar.update(task, description=f"{name}: {source.title}")
                    settings = source.settings
                    if pictures is not None and source.name in BASELINES:
                        own = measured[: len(sources[0].settings)]
                        matched = BASELINES[source.name].matched(x, [point.bytes for point in own])
                        settings = tuple(sorted({*settings, *matched}))
                    measured += measured_points(name, source, settings, x, where, memory, save)
                    bar.advance(task, 1 / len(sources))
                if compared_coders and isinstance(codec, Codec):
                    bar.update(task, description=f"{name}: entropy coders")
                    bits = codec.read_bits(codec.encode(x, count, entropy="none"))
                    image_sizes = coded_sizes(compared_coders, bits, *x.shape[:2])
                if folder is not None and pictures is not None:
                    save_image(x, pictures / "original.png")
                    sheet = compared(sources[0].name, next(iter(baselines), ""), x, measured, folder)
                    if sheet is not None:
                        sheets[name] = folder / f"{name}_comparison.png"
                        save_image(sheet, sheets[name])
            except ValueError as error:
                fail(path, error)
                continue
            finally:
                bar.update(task, completed=i + 1)
            points += measured
            files_of[name] = path
            for coder, each in image_sizes.items():
                sizes[coder].append(each)
        if folder is not None and save_images and isinstance(codec, Codec):

            def tell(image: str) -> None:
                bar.update(task, description=f"{image}: steps within iterations")

            write_steps(folder, points, sources[0].name, codec, count, files_of, where, tell)
    if not points:
        raise ValueError("no image could be measured")
    results = Results(points, sources, len(named), curves, sizes)
    if folder is not None:
        results.write(folder)
    if tables is not None:
        results.show(tables)
    if folder is not None and save_images:
        write_report(folder)
    if folder is not None and wandb and log is not None:
        files = [folder / file for file in (*results.files, *["report.html"] * save_images)]
        pictures = shown_pictures(points, sources[0].name, next(iter(baselines), ""), folder)
        config = _config(codec, count, results)
        log(folder, wandb, codec, config, results.curves, points, results.numbers, files_of, files, pictures, sheets)
    return points


def _iterations_of(codecs: Mapping[str, ImageCodec], iterations: int | None) -> dict[str, int]:
    """The number of iterations to measure of each codec.

    Raises:
        ValueError: there is no codec, a name is not allowed, or a codec has fewer iterations.
    """
    if not codecs:
        raise ValueError("there is no codec to evaluate")
    result = {}
    for name, codec in codecs.items():
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(f"the name of a codec is up to 32 letters, digits, '.', '_' and '-', not {name!r}")
        result[name] = min(MAX_ITERATIONS, codec.max_iterations) if iterations is None else iterations
        if not 1 <= result[name] <= codec.max_iterations:
            raise ValueError(f"iterations must be in 1..{codec.max_iterations}, not {iterations}")
    return result


def _source(codec: ImageCodec, iterations: int, name: str) -> Source:
    """A codec of this package as a source."""
    if isinstance(codec, CompressiveCodec):
        return levels(codec, name)
    assert isinstance(codec, Codec)
    return ours(codec, iterations, name)


def _overlays(overlays: Iterable[str | os.PathLike[str]], taken: Iterable[str]) -> dict[str, list[Point]]:
    """Loads curves of other codecs by name; if a name is taken, the argument that named the curve is added."""
    curves: dict[str, list[Point]] = {}
    for text in overlays:
        shipped = PUBLISHED / f"{text}.json"
        name, points = from_json(shipped if shipped.is_file() else Path(text))
        curves[f"{name} ({text})" if name in (*taken, *curves) else name] = points
    return curves


def _saver(folder: Path | None) -> Callable[[Source, Coded], str] | None:
    """A function that saves pictures in a folder and gives their paths in the output folder; None without a folder."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return lambda source, coded: f"pictures/{folder.name}/{save_picture(source, coded, folder)}"


def _logger() -> Callable[..., None]:
    """Imports the function that logs to W&B; other evaluations work without it.

    Raises:
        ValueError: W&B is not installed.
    """
    try:
        from rnncodec.training.tracking import log_evaluation
    except ModuleNotFoundError as error:
        raise ValueError(f"W&B needs {error.name}, which is not installed: pip install 'rnncodec[train]'") from error
    return log_evaluation


def _config(codec: ImageCodec, iterations: int, results: Results) -> dict[str, object]:
    """The settings on which the results depend, for W&B, beside codec and images."""
    return {
        "iterations": iterations,
        "device": str(codec.device),
        "codecs": {source.name: source.description for source in results.sources},
    }


def main(argv: Sequence[str] | None = None, program: str = "evaluate.py") -> int:
    """Runs the command line; returns the exit status, 1 if anything failed."""
    parser = argparse.ArgumentParser(prog=program, description="Measures a codec on photographs, beside others.")
    parser.add_argument("images", nargs="+", type=Path, help="image files and folders")
    parser.add_argument("--weights", help="name of shipped weights, or a file (default: the default weights)")
    parser.add_argument(
        "--iterations", type=positive_int, help=f"iterations to measure (default: all, but at most {MAX_ITERATIONS})"
    )
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write to (default: results)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=positive_int, help="processors to compute on (default: as for `rnncodec encode`)"
    )
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
        help=f"curves of other codecs: JSON files as this program writes them, or published ones for Kodak: {shipped}",
    )
    parser.add_argument(
        "--tunes",
        nargs="*",
        choices=get_args(TuneName),
        default=[],
        help="also measure files whose locations get their own number of iterations, at the same bytes",
    )
    parser.add_argument(
        "--coders",
        nargs="*",
        metavar="WEIGHTS",
        help="compare the entropy coders; weights of the same codec add their context models",
    )
    parser.add_argument("--save-images", action="store_true", help="write the decoded images and comparisons")
    parser.add_argument("--wandb", metavar="NAME", help="log the results to W&B, as a run of this name")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        help="folder that keeps measurements for later runs (default: rnncodec/results in the user's cache folder)",
    )
    args = parser.parse_args(argv)
    console, title = Console(stderr=True), program.removesuffix(".py")
    failures = 0

    def tell(message: str) -> None:
        console.print(f"{title}: {message}", markup=False, highlight=False, soft_wrap=True)

    def skip(message: str) -> None:
        nonlocal failures
        failures += 1
        tell(f"skipped: {message}")

    use_threads(args.threads)
    try:
        with warnings_told(tell):
            codec = rnncodec.load(args.weights, device=args.device)
            coders = None
            if args.coders is not None:
                coders = [rnncodec.load(path, device=args.device) for path in args.coders]
            evaluate(
                codec,
                args.images,
                iterations=args.iterations,
                baselines=args.baselines,
                overlays=args.overlay,
                tunes=args.tunes,
                coders=coders,
                output=args.output,
                save_images=args.save_images,
                wandb=args.wandb,
                cache=args.cache_dir or cache_folder("--cache-dir") / "results",
                tables=Console(),
                progress=console,
                skip=skip,
            )
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        tell(f"error: {one_line(error)}")
        return 1
    except KeyboardInterrupt:
        return 130
    if failures:
        tell(f"could not be measured: {failures}")
    return 1 if failures else 0
