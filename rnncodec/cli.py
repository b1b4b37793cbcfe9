"""The command line: `rnncodec encode`, `decode`, `info`, `truncate`, `export`, `rate`, `train` and `evaluate`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rnncodec import __version__
from rnncodec.arguments import port, positive, positive_int, quality
from rnncodec.files import format, images
from rnncodec.files.format import Header
from rnncodec.files.images import one_line
from rnncodec.files.records import unpack
from rnncodec.jobs import (
    FAILURES,
    PATHS,
    Job,
    Report,
    UsageError,
    complain,
    do_each,
    find_files,
    find_jobs,
    printable,
    read,
    stdin,
    stdout,
    write,
)

if TYPE_CHECKING:
    from rnncodec.codec import Codec  # elsewhere imported only where it is used, because importing torch takes seconds
    from rnncodec.rating import Summary


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
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ROOMS:
        return _enter(arguments[0], arguments[1:])
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        status = args.command(args)
        if sys.stdout:
            sys.stdout.flush()
        return status
    except UsageError as error:
        parser.error(one_line(error))
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except FAILURES as error:
        if isinstance(error, OSError) and sys.stdout is sys.__stdout__:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or flushing it would fail again at exit
        if not isinstance(error, BrokenPipeError):  # the reader of the output has stopped and needs no message
            complain(f"error: {one_line(error)}")
        return 1


def _enter(command: str, arguments: list[str]) -> int:
    """Runs a command of ROOMS, or names the package that it lacks."""
    module, extra = ROOMS[command]
    try:
        run = import_module(module).main
    except ModuleNotFoundError as error:
        if str(error.name).startswith("rnncodec"):
            raise
        complain(f"error: {command} needs {error.name}, which is not installed: pip install 'rnncodec[{extra}]'")
        return 1
    return run(arguments, program=f"rnncodec {command}")


def encode(args: argparse.Namespace) -> int:
    """Compresses images."""
    jobs = find_jobs(args, ".rnc", {".rnc"}, lambda folder: images.find_images([folder]))
    if args.roi and len(jobs) > 1:
        raise UsageError("--roi goes with one image")
    codec = _codec(args.weights or "small", args)
    _check_iterations(args, codec.max_iterations)
    roi = images.load_image(args.roi, args.max_pixels).mean(2).round().astype(np.uint8) if args.roi else None

    def work(source: str, target: str, report: Report) -> str:
        file, records = stdin() if source == "-" else source, None
        if args.strip:
            image = images.load_image(file, args.max_pixels)
        else:
            image, records = images.load_photograph(file, args.max_pixels)
        target_of = {"quality": args.quality, "bpp": args.bpp, "max_bytes": args.bytes, "psnr": args.psnr}
        how = {"tune": args.tune, "roi": roi, "entropy": args.entropy, "records": records}
        data = codec.encode(image, args.iterations, **target_of, **how, progress=report)
        write(target, data)
        header = format.read_header(data)
        return f"{len(header.entries) / header.parts:g} iterations, {len(data)} bytes, {header.bpp[-1]:.4f} bpp"

    return do_each(jobs, work)


def decode(args: argparse.Namespace) -> int:
    """Decompresses files."""
    Image.init()
    suffixes = {s for s, name in Image.registered_extensions().items() if name in images.FORMATS and name in Image.SAVE}
    suffix = f".{args.format or 'png'}".lower()
    if suffix not in suffixes:
        raise UsageError(f"unknown --format {args.format!r}")
    jobs = find_jobs(args, suffix, suffixes, find_files)
    _check_iterations(args, format.MAX_ITERATIONS)
    codecs: dict[bytes, Codec] = {}
    if args.weights:
        given = _codec(args.weights, args)
        codecs[given.fingerprint] = given

    def work(source: str, target: str, report: Report) -> str:
        header, data = read(source)
        if header.fingerprint not in codecs:
            codecs[header.fingerprint] = _codec_for(header, args)
        codec = codecs[header.fingerprint]
        records = None if args.strip else format.read_records(data)
        image = codec.decode(data, args.iterations, max_pixels=args.max_pixels, progress=report)
        images.save_image(np.asarray(image), stdout() if target == "-" else target, args.format, records)
        return f"{image.width}x{image.height}"

    return do_each(jobs, work)


def info(args: argparse.Namespace) -> int:
    """Shows the headers of files, and which iterations are complete."""

    def work(source: str, target: str, report: Report) -> None:
        header, data = read(source)
        file = format.read(data, max_pixels=2**32)
        found, records = len(file.payloads), unpack(file.records)
        complete = found // header.parts
        sizes, bpp = header.sizes, header.bpp
        rows = [(end, sizes[end - 1], bpp[end - 1]) for end in header.ends]
        entries = [header.entries[start:end] for start, end in pairwise((0, *header.ends))]
        codings = [max(entry.coding for entry in own) for own in entries]
        if args.json:
            document = {
                "file": source,
                "version": header.version,
                "bytes": len(data),
                "width": header.width,
                "height": header.height,
                "weights": header.weights,
                "fingerprint": header.fingerprint.hex(),
                "complete": complete,
                "context": header.context.hex(),
                "parts": header.parts,
                "maps": header.maps,
                "records": {kind: len(value) for kind, value in records.items()},
                "records_bytes": header.records.length if header.records else 0,
                "iterations": [
                    {"iteration": t, "bytes": size, "bpp": rate, "coding": coding}
                    for t, ((_, size, rate), coding) in enumerate(zip(rows, codings, strict=True), 1)
                ],
                "sizes": sizes,
            }
            print(json.dumps(document))
            return
        print(f"{printable(source)}: {header.width}x{header.height}, {len(data)} bytes, version {header.version}")
        print(f"weights {header.weights} ({header.fingerprint.hex()}), {complete} of {len(rows)} iterations complete")
        if header.parts > 1 or header.maps:
            maps = ", locations stop where the picture needs no more" if header.maps else ""
            print(f"can be cut after {len(header.entries)} payloads, {header.parts} of each iteration{maps}")
        if header.records:
            listed = ", ".join(f"{kind.strip()} {len(value)} bytes" for kind, value in records.items()) or "missing"
            print(f"records {listed}; {header.records.length} bytes in the file")
        table = Table("iteration", "bytes", "bpp", "payload", "")
        for column in table.columns[:4]:
            column.justify = "right"
        for t, ((end, size, rate), coding, own) in enumerate(zip(rows, codings, entries, strict=True), 1):
            length = sum(entry.length for entry in own)
            payload = "raw" if coding == format.RAW else f"{length / (header.raw_length * header.parts):.1%}"
            missing = "" if end <= found else "missing" if end - len(own) >= found else "cut"
            table.add_row(str(t), str(size), f"{rate:.4f}", payload, missing)
        Console(highlight=False).print(table)

    return do_each([Job(file, "", True) for file in args.paths], work)


def truncate(args: argparse.Namespace) -> int:
    """Shortens a file."""

    def work(source: str, target: str, report: Report) -> str:
        data = format.truncate(read(source)[1], iterations=args.iterations, max_bytes=args.bytes, strip=args.strip)
        write(target, data)
        header = format.read_header(data)
        return f"{len(header.entries) / header.parts:g} iterations, {len(data)} bytes"

    return do_each([Job(args.input, args.output, True)], work)


def export(args: argparse.Namespace) -> int:
    """Exports a checkpoint as weights."""
    from rnncodec.training.export import add_allocation, add_context, load_checkpoint
    from rnncodec.weights import load_weights, save_weights

    def work(source: str, target: str, report: Report) -> str:
        if args.context is not None:
            add_context(source, target, args.context)
        elif args.allocation is not None:
            add_allocation(source, target, args.allocation)
        else:
            network, provenance = load_checkpoint(source)
            save_weights(target, network, args.name, provenance)
        weights = load_weights(target)
        context = f", context model {weights.context_fingerprint.hex()}" if weights.context else ""
        return f"weights {weights.name} ({weights.fingerprint.hex()}){context}"

    return do_each([Job(args.checkpoint, args.output, True)], work)


def rate(args: argparse.Namespace) -> int:
    """Serves pictures for people to rate, or shows the scores from their votes."""
    from rnncodec.rating import Server, Study, Votes, summarize

    if args.json and not args.scores:
        raise UsageError("--json goes with --scores")
    path = args.votes or args.results / "votes.sqlite"
    if args.scores:
        summary = summarize(Votes(path, create=False).all())
        if args.json:
            print(json.dumps(asdict(summary)))
        else:
            _print_scores(summary)
        return 0
    study = Study(args.results, args.rates)
    votes = Votes(path)
    with Server(study, votes, args.host, args.port) as server, suppress(KeyboardInterrupt):
        comparisons, images = len(study.comparisons), len(study.checks)
        print(f"{server.url} serves {comparisons} comparisons of {images} images; Ctrl-C ends it", flush=True)
        server.serve_forever()
    print(f"{printable(str(path))}: {sum(vote.undone is None for vote in votes.all())} votes")
    return 0


def _print_scores(summary: "Summary") -> None:
    table = Table("bpp", "codec", "score", "95 % interval", "beats the average", "votes")
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for score in summary.scores:
        interval = f"{score.low:+.2f} to {score.high:+.2f}"
        numbers = f"{score.score:+.2f}", interval, f"{score.probability:.1%}", str(score.votes)
        table.add_row(f"{score.rate:g}", Text(printable(score.codec)), *numbers)
    Console(highlight=False).print(table)

    def share(part: int, total: int) -> str:
        return f"{part} of {total}" + (f" ({part / total:.0%})" if total else "")

    print(f"{summary.votes} votes of {summary.raters} raters; excluded for wrong checks: {summary.excluded}")
    print(f"checks right: {share(summary.right, summary.checks)}; undone votes: {summary.undone}")
    print(f"repeats answered as the first time: {share(summary.consistent, summary.repeats)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("rnncodec", description="A recurrent progressive image codec.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(command: Callable[[argparse.Namespace], int], help: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            command.__name__,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    def add_coding(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("paths", nargs="+", metavar="PATH", help="inputs, or one input and its output; see below")
        sub.add_argument("--output-dir", metavar="DIR", type=Path, help="folder for outputs, made if it does not exist")
        sub.add_argument("--force", action="store_true", help="replace existing outputs whose names were not given")
        sub.add_argument("--weights", metavar="W", help="name of shipped weights, or path of a .safetensors file")
        sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to compute on")
        sub.add_argument(
            "--bfloat16",
            action="store_true",
            help="compute less precisely where encoder and decoder need not agree: faster on some machines",
        )
        sub.add_argument(
            "--max-pixels",
            metavar="N",
            type=positive_int,
            default=images.MAX_PIXELS,
            help="refuse larger images (default: %(default)s)",
        )

    sub = add(encode, "compress images to .rnc files", PATHS.format(suffix=".rnc", kind="images"))
    add_coding(sub)
    target = sub.add_mutually_exclusive_group()
    target.add_argument(
        "--iterations", metavar="N", type=positive_int, help="how many (default: 16, or all if there are fewer)"
    )
    target.add_argument("--quality", metavar="Q", type=quality, help="from 1, the smallest file, to 100, the best")
    target.add_argument(
        "--bpp", metavar="B", type=positive, help="at most this many bits per pixel, for the whole file"
    )
    target.add_argument("--bytes", metavar="N", type=positive_int, help="at most this many bytes, for the whole file")
    target.add_argument("--psnr", metavar="DB", type=positive, help="the PSNR of the decoded image in dB")
    sub.add_argument(
        "--tune",
        choices=("ms-ssim", "psnr"),
        default="ms-ssim",
        help="where weights allow different numbers of iterations in an image: what the bits of a target are spent for "
        "(default: %(default)s)",
    )
    sub.add_argument(
        "--roi",
        metavar="MASK",
        help="for a target: an image of the same size, white where the picture matters most, black where least",
    )
    coder = sub.add_mutually_exclusive_group()
    coder.add_argument(
        "--entropy",
        choices=get_args(format.EntropyName)[1:],
        help="entropy coder (default: the context model of the weights)",
    )
    coder.add_argument(
        "--no-entropy", dest="entropy", action="store_const", const="none", help="store raw bits, which is faster"
    )

    sub.add_argument("--strip", action="store_true", help="leave out EXIF and XMP")

    sub = add(decode, "decompress .rnc files", PATHS.format(suffix="the suffix of an image format", kind=".rnc files"))
    add_coding(sub)
    sub.add_argument("--iterations", metavar="K", type=positive_int, help="decode only this many (default: all)")
    sub.add_argument("--format", metavar="F", help="image format, as a suffix (default: that of the output, or png)")
    sub.add_argument("--strip", action="store_true", help="leave out EXIF and XMP")

    sub = add(info, "show size, weights, and bytes and bits per pixel of each iteration")
    sub.add_argument("paths", nargs="+", metavar="FILE", help=".rnc files, or '-'")
    sub.add_argument("--json", action="store_true", help="one line with a JSON object for each file")

    sub = add(truncate, "shorten a file to its first iterations; without a limit, to those that are complete")
    sub.add_argument("input", metavar="IN", help="an .rnc file, or '-'")
    sub.add_argument("output", metavar="OUT", help="the file to write, overwritten if it exists, or '-'")
    limit = sub.add_mutually_exclusive_group()
    limit.add_argument("--iterations", metavar="K", type=positive_int, help="how many to keep")
    limit.add_argument("--bytes", metavar="N", type=positive_int, help="keep as many as fit in this many bytes")
    sub.add_argument("--strip", action="store_true", help="leave out all records, such as EXIF and XMP")

    sub = add(export, "export a checkpoint of a training as weights for --weights, in half precision")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file")
    sub.add_argument("output", metavar="OUT", help="the .safetensors file to write, overwritten if it exists")
    kind = sub.add_mutually_exclusive_group(required=True)
    kind.add_argument("--name", help="name of the weights, which files made with them contain")
    kind.add_argument(
        "--context", metavar="MODEL", help="add this context model of the checkpoint to the weights in OUT"
    )
    kind.add_argument(
        "--allocation",
        metavar="PHOTOS",
        type=Path,
        help="calibrate the weights in CHECKPOINT, of a latent network, on a folder of photographs, so that an encoder "
        "can choose how many iterations each location gets",
    )

    sub = add(rate, "serve a page where people say which of two reconstructions is closer to the original")
    sub.add_argument(
        "results", metavar="RESULTS", type=Path, help="the folder that `rnncodec evaluate --save-images` wrote"
    )
    sub.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s, this computer only)")
    sub.add_argument("--port", metavar="N", type=port, default=8000, help="0 for any free port (default: %(default)s)")
    sub.add_argument(
        "--votes", metavar="FILE", type=Path, help="file that keeps the votes (default: votes.sqlite in RESULTS)"
    )
    sub.add_argument(
        "--rates",
        metavar="B",
        nargs="+",
        type=positive,
        default=[0.25, 0.5, 1.0],
        help="bits per pixel near which codecs are compared, at matched bytes (default: 0.25 0.5 1.0)",
    )
    sub.add_argument("--scores", action="store_true", help="show the scores from the votes, serve nothing")
    sub.add_argument("--json", action="store_true", help="show the scores as one JSON object")

    commands.add_parser("train", help="train a codec or a context model: `rnncodec train fit --config small ...`")
    commands.add_parser("evaluate", help="measure codecs on images: tables, curves, pictures, a report")
    return parser


def _codec(weights: str, args: argparse.Namespace) -> "Codec":
    import torch

    import rnncodec

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return rnncodec.load(weights, device, bfloat16=args.bfloat16)


def _codec_for(header: Header, args: argparse.Namespace) -> "Codec":
    """Loads the shipped weights that a file names."""
    from rnncodec.weights import WeightsError, known_weights

    known = known_weights()
    for name, fingerprint in known.items():
        if fingerprint == header.fingerprint.hex():
            return _codec(name, args)
    names = ", ".join(f"{name} ({fingerprint})" for name, fingerprint in known.items()) or "none"
    raise WeightsError(
        f"the file needs the weights {header.weights} ({header.fingerprint.hex()}); known are: {names}"
        + (f"; {args.weights} are others" if args.weights else "; --weights gives others")
    )


def _check_iterations(args: argparse.Namespace, most: int) -> None:
    if (args.iterations or 1) > most:
        raise UsageError(f"--iterations must be in 1..{most}, not {args.iterations}")
