"""The command line: the commands of `rnncodec`, and the rooms that have commands with their own parsers."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rnncodec import __version__
from rnncodec.arguments import command_line
from rnncodec.batch import FAILURES, Done, do_each
from rnncodec.console import Report, complain, listed, prepare, printable, silence, stdin, stdout
from rnncodec.display import show_file, show_scores
from rnncodec.files import format, images
from rnncodec.files.errors import ImageError, ImageWarning, one_line
from rnncodec.files.format import FormatError, Header
from rnncodec.jobs import Job, UsageError, exists, find_files, find_jobs, read, refuse_terminal, write
from rnncodec.threads import use_threads

if TYPE_CHECKING:
    from rnncodec.imagecodec import (
        ImageCodec,  # elsewhere imported only where it is used, because importing torch takes seconds
    )


TURNED = "turned upright, as the file says"
# Commands with their own parsers: the module with their `main`, and the extra that installs what they need.
ROOMS = {"train": ("rnncodec.training.cli", "train"), "evaluate": ("rnncodec.evaluation.evaluate", "eval")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 if all went well, 1 if something could not be done, 130 if interrupted.

    Raises:
        SystemExit: with status 2 for wrong usage, 0 after `--help` and `--version`.
    """
    prepare()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ROOMS:
        room = _room(arguments[0], *ROOMS[arguments[0]])
        return room.main(arguments[1:], program=f"rnncodec {arguments[0]}") if room else 1
    parser = command_line(__version__)
    if not arguments:
        parser.print_help()
        return 0
    try:
        args = parser.parse_args(arguments)
        status = COMMANDS[args.command](args)
        if sys.stdout:
            sys.stdout.flush()
        return status
    except UsageError as error:
        parser.error(one_line(error))
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except FAILURES as error:
        if isinstance(error, OSError):
            silence("stdout")  # which may be what failed
        if not isinstance(error, BrokenPipeError):  # the reader of the output has stopped and needs no message
            complain(f"error: {one_line(error)}")
        return 1


def _room(command: str, module: str, extra: str) -> ModuleType | None:
    """Imports what a command needs of an extra, or names the package that is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("rnncodec"):
            raise
        complain(f"error: {command} needs {error.name}, which is not installed: pip install 'rnncodec[{extra}]'")
        return None


def encode(args: argparse.Namespace) -> int:
    """Compresses images."""
    skipped: dict[Path, str] = {}
    for folder in filter(Path.is_dir, map(Path, args.paths)):
        skipped |= images.find_unreadable(folder)
    jobs = find_jobs(args, ".rnc", {".rnc"}, lambda folder: images.find_images([folder]), skipped)
    if args.roi and len(jobs) > 1:
        raise UsageError("--roi goes with one image")
    use_threads(args.threads)

    @cache
    def codec() -> "ImageCodec":
        return _codec(args.weights, args)

    if not (args.skip_existing and all(map(exists, jobs))):  # or loading it would take most of the time
        _check_iterations(args, codec().max_iterations)
    roi = None
    if args.roi:
        mask = images.read_photograph(args.roi, args.max_pixels, strip=True)
        if images.ON_WHITE in mask.lost:
            raise ValueError(f"{args.roi} has transparency, of which --roi cannot tell how much it counts")
        roi = mask.pixels.mean(2).round().astype(np.uint8)

    def work(source: str, target: str, report: Report) -> Done:
        file = stdin() if source == "-" else source
        photograph = images.read_photograph(file, args.max_pixels, args.strip)
        for line in photograph.lost + [TURNED] * photograph.turned:
            warnings.warn(line, ImageWarning, stacklevel=2)
        target_of = {"quality": args.quality, "bpp": args.bpp, "max_bytes": args.bytes, "psnr": args.psnr}
        how = {"tune": args.tune, "roi": roi, "entropy": args.entropy, "records": photograph.records}
        data = codec().encode(photograph.pixels, args.iterations, **target_of, **how, progress=report)
        write(target, data)
        header = format.read_header(data)
        made = f"{len(header.entries) / header.parts:g} iterations, {len(data)} bytes, {header.bpp[-1]:.4f} bpp"
        return Done(made, header.width * header.height)

    return do_each(jobs, work, args.quiet, skipped, args.skip_existing)


def decode(args: argparse.Namespace) -> int:
    """Decompresses files, each to a picture, or to a folder with the pictures of all iterations."""
    Image.init()
    suffixes = {s for s, name in Image.registered_extensions().items() if name in images.FORMATS and name in Image.SAVE}
    suffix = f".{'png' if args.format is None else args.format}".lower()
    if suffix not in suffixes:
        raise UsageError(f"unknown --format {args.format!r}")
    each = args.all_iterations is not None
    if each:  # every input becomes a folder
        args.output_dir = args.all_iterations
    jobs = find_jobs(args, "" if each else suffix, suffixes, find_files)
    named = {Path(job.target).suffix for job in jobs} - {""}
    try:
        for written in named if args.format is None and not each else {suffix}:
            images.format_name(written)
    except ImageError as error:
        raise UsageError(str(error)) from error
    _check_iterations(args, format.MAX_ITERATIONS)
    use_threads(args.threads)
    codec_for = _Codecs(args)

    def work(source: str, target: str, report: Report) -> Done:
        header, data = read(source)
        codec = codec_for(header)
        records = None if args.strip else _records(data)
        what = f"{header.width}x{header.height}"
        if each:
            number = 0
            pictures = codec.decode_progressive(data, args.iterations, max_pixels=args.max_pixels)
            with images.atomic_folder(target) as folder:
                for number, picture in enumerate(pictures, 1):
                    images.save_image(picture, folder / f"{number:02}{suffix}", None, records)
                    report(number, args.iterations or header.iterations)
            others = [p.name for p in sorted(Path(target).glob(f"[0-9][0-9]{suffix}")) if int(p.stem) > number]
            if others:
                warnings.warn(f"not of this file, but in {target} before: {listed(others, 3)}", stacklevel=1)
            what = f"{number} pictures, {what}"
        else:
            image = codec.decode(data, args.iterations, max_pixels=args.max_pixels, progress=report)
            images.save_image(np.asarray(image), stdout() if target == "-" else target, args.format, records)
        return Done(what, header.width * header.height)

    return do_each(jobs, work, args.quiet, skip_existing=args.skip_existing)


def view(args: argparse.Namespace) -> int:
    """Writes a page that shows all iterations of a file, and opens it."""
    from rnncodec.view import open_page, page_path, write_page

    use_threads(args.threads)
    codec_for = _Codecs(args)

    def work(source: str, target: str, report: Report) -> Done:
        header, data = read(source)
        count = write_page(target, Path(source).name, codec_for(header), data, args.max_pixels, report)
        if not (args.no_open or open_page(target)):
            warnings.warn("no browser can be started; open the page in one", stacklevel=2)
        return Done(f"{count} iterations, {Path(target).stat().st_size} bytes")

    if args.page is not None and os.path.realpath(args.page) == os.path.realpath(args.input):
        raise UsageError(f"{args.page} would overwrite the input")
    with page_path(args.page, args.input) as page:
        return do_each([Job(args.input, page, True)], work)


def budget(args: argparse.Namespace) -> int:
    """Compresses images so that all files together keep to a rate, and measures them."""
    use_threads(args.threads)
    room = _room("budget", "rnncodec.budget", "eval")
    return room.run(args, lambda: _codec(args.weights, args)) if room else 1


def info(args: argparse.Namespace) -> int:
    """Shows the headers of files, and which iterations are complete."""

    def work(source: str, target: str, report: Report) -> None:
        show_file(source, read(source)[1], args.json)

    return do_each([Job(file, "", True) for file in args.paths], work)


def truncate(args: argparse.Namespace) -> int:
    """Shortens a file."""

    def work(source: str, target: str, report: Report) -> Done:
        data = format.truncate(read(source)[1], iterations=args.iterations, max_bytes=args.bytes, strip=args.strip)
        write(target, data)
        header = format.read_header(data)
        return Done(f"{len(header.entries) / header.parts:g} iterations, {len(data)} bytes")

    refuse_terminal(args.output)
    if Path(args.output).suffix.lower() in images.readable_suffixes():
        raise UsageError(f"{args.output} would not be an image; name a file that ends in .rnc")
    return do_each([Job(args.input, args.output, True)], work)


def export(args: argparse.Namespace) -> int:
    """Exports a checkpoint as weights, or weights as graphs."""
    if args.graphs:
        if args.wandb:
            raise UsageError("--wandb goes with --name, --context and --allocation")
        return _export_graphs(args)
    if Path(args.output).suffix != ".safetensors":  # weights are found again by it
        raise UsageError(f"OUT must end in .safetensors, not {args.output}")
    from rnncodec.training.export import add_allocation, add_context, load_checkpoint
    from rnncodec.weights import load_weights, save_weights

    tracking = _room("--wandb", "rnncodec.training.tracking", "train") if args.wandb else None
    if args.wandb and tracking is None:
        return 1

    def work(source: str, target: str, report: Report) -> Done:
        if args.context is not None:
            add_context(source, target, args.context)
        elif args.allocation is not None:
            add_allocation(source, target, args.allocation)
        else:
            network, provenance = load_checkpoint(source)
            save_weights(target, network, args.name, provenance)
        weights = load_weights(Path(target).absolute())
        if tracking is not None:
            tracking.log_export(Path(target).parent, args.wandb, Path(source), weights)
        context = f", context model {weights.context_fingerprint.hex()}" if weights.context else ""
        return Done(f"weights {weights.name} ({weights.fingerprint.hex()}){context}")

    return do_each([Job(args.checkpoint, args.output, True)], work)


def _export_graphs(args: argparse.Namespace) -> int:
    if args.graphs == "onnx" and not _room("export --onnx", "onnxscript", "onnx"):
        return 1
    from rnncodec import graphs
    from rnncodec.weights import load_weights

    def work(source: str, target: str, report: Report) -> Done:
        return Done(", ".join(graphs.export(load_weights(source), Path(target), args.graphs)))

    return do_each([Job(args.checkpoint, args.output, True)], work)


def rate(args: argparse.Namespace) -> int:
    """Serves pictures for people to rate, or shows the scores from their votes."""
    from rnncodec.rating import Server, Study, Votes, summarize

    if args.json and not args.scores:
        raise UsageError("--json goes with --scores")
    path = args.votes or args.results / "votes.sqlite"
    if args.scores:
        summary = summarize(Votes(path, create=False).all())
        show_scores(summary, args.json)
        return 0
    study = Study(args.results, args.rates)
    votes = Votes(path)
    with Server(study, votes, args.host, args.port) as server, suppress(KeyboardInterrupt):
        comparisons, images = len(study.comparisons), len(study.checks)
        print(f"{server.url} serves {comparisons} comparisons of {images} images; Ctrl-C ends it", flush=True)
        server.serve_forever()
    print(f"{printable(str(path))}: {sum(vote.undone is None for vote in votes.all())} votes")
    return 0


COMMANDS = {command.__name__: command for command in (encode, decode, view, budget, info, truncate, export, rate)}


def _codec(weights: str | None, args: argparse.Namespace) -> "ImageCodec":
    import torch

    import rnncodec

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return rnncodec.load(weights, device, bfloat16=args.bfloat16)


def _records(data: bytes) -> dict[str, bytes]:
    """The records of a file; an error says how to decode it without them."""
    try:
        return format.read_records(data)
    except FormatError as error:
        raise FormatError(f"{error}; --strip decodes without EXIF and XMP") from error


class _Codecs:
    """Gives the codec for a file: of the weights that the user names, or of the shipped ones that the file names."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._known: dict[bytes, ImageCodec] = {}

    def __call__(self, header: Header) -> "ImageCodec":
        """The codec for a file with this header.

        Raises:
            WeightsError: there are no such weights.
        """
        from rnncodec.weights import WeightsError, shipped_name

        if self._args.weights and not self._known:
            given = _codec(self._args.weights, self._args)
            self._known[given.fingerprint] = given
        if header.fingerprint not in self._known:
            try:
                self._known[header.fingerprint] = _codec(shipped_name(header), self._args)
            except WeightsError as error:
                named = self._args.weights
                others = f"{named} are others" if named else "--weights gives others"
                raise WeightsError(f"{error}; {others}") from error
        return self._known[header.fingerprint]


def _check_iterations(args: argparse.Namespace, most: int) -> None:
    if (args.iterations or 1) > most:
        raise UsageError(f"--iterations must be in 1..{most}, not {args.iterations}")
