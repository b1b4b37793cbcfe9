"""The arguments of the command line: their types, whose errors say what was expected, and the parser of commands."""

import argparse
import math
from contextlib import suppress
from pathlib import Path
from typing import get_args

import shtab

from rnncodec.files import images
from rnncodec.files.codings import EntropyName

BASELINES = ("jpeg", "jpeg444", "jpeg2000", "webp", "avif", "jxl")  # of `rnncodec.evaluation.baselines`, with settings

FILES = {"CHECKPOINT", "DIR", "FILE", "IN", "MASK", "OUT", "PAGE", "PATH", "PHOTOS", "RESULTS", "W"}  # what are files

PATHS = """\
Exactly two paths, the second of which is '-' or ends in {suffix}, are one input and its output, which is
overwritten if it exists. Otherwise every path is an input, and a folder stands for all {kind} below it.
Outputs are written beside their inputs or, with --output-dir, to that folder and the same folders below it;
existing files are replaced only with --force, and left as they are with --skip-existing. '-' is standard
input or output; alone, it is both.{more}

The exit status is 0 if all is done, 1 if a file failed{skipped}, 2 for wrong usage, 130 if interrupted."""

ENCODE = PATHS.format(
    suffix=".rnc",
    kind="images",
    more="""
Images that differ only in their suffixes keep them: a.jpg and a.png become a.jpg.rnc and a.png.rnc.""",
    skipped=" or a picture in a folder was skipped,\nbecause it is of a format that is not supported or not installed",
)
BUDGET = """\
The bytes of all files together, headers included, are at most so many bits per pixel of all images, and nearly as many
where the files allow it. Each image gets the bytes that make the error of the whole set small. Files leave out EXIF and
XMP. Each is decoded again and measured: the PSNR is that of all pixels of all images together, MS-SSIM the mean over
the images. The files of other codecs go to folders of their names below that of the outputs.

The exit status is 0 if all is done, 1 if a file failed or was skipped, 2 for wrong usage, 130 if interrupted."""
DECODE = PATHS.format(
    suffix="the suffix of an image format",
    kind=".rnc files",
    more="""
With --all-iterations DIR every input is a folder of its own: photo.rnc becomes DIR/photo/01.png, 02.png, ...""",
    skipped="",
)
VIEW = """\
The page needs no other files. It has a slider for the iterations, and shows the bytes and bits per pixel of each. Its
pictures are those that decode gives, up to a megapixel without loss, larger ones as JPEG of quality 95."""


def positive(text: str) -> float:
    """A positive number."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")


def positive_int(text: str) -> int:
    """A positive whole number."""
    with suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")


def quality(text: str) -> float:
    """A number from 1 to 100."""
    with suppress(ValueError):
        if 1 <= (value := float(text)) <= 100:
            return value
    raise argparse.ArgumentTypeError(f"must be a number from 1 to 100, not {text}")


def port(text: str) -> int:
    """A port."""
    with suppress(ValueError):
        if 0 <= (value := int(text)) < 2**16:
            return value
    raise argparse.ArgumentTypeError(f"must be a port from 0 to {2**16 - 1}, not {text}")


def page_file(text: str) -> str:
    """A path that a browser opens as a page."""
    if Path(text).suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"must end in .html, not {text}")
    return text


def command_line(version: str) -> argparse.ArgumentParser:
    """The parser of the command line, which gives the name of a command as `command`, and its arguments."""
    parser = argparse.ArgumentParser("rnncodec", description="A recurrent progressive image codec.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    shtab.add_argument_to(parser, help="print a script that lets a shell complete commands, options and files")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(command: str, help: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            command,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    def add_machine(sub: argparse.ArgumentParser) -> None:
        """Adds the arguments of a command that runs a network."""
        sub.add_argument("--weights", metavar="W", help="name of shipped weights, or path of a .safetensors file")
        sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to compute on")
        sub.add_argument(
            "--threads",
            metavar="N",
            type=positive_int,
            help="processors to compute on (default: OMP_NUM_THREADS, or those without other work, at most 8)",
        )
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

    def add_coding(
        sub: argparse.ArgumentParser, paths: str = "", apart: bool = False
    ) -> argparse._MutuallyExclusiveGroup:
        """Adds the arguments of a command that codes files, whose outputs may have to be in a folder apart."""
        paths = paths or "inputs, or one input and its output; see below"
        sub.add_argument("paths", nargs="+", metavar="PATH", help=paths)
        folders = sub.add_mutually_exclusive_group(required=apart)
        folders.add_argument(
            "--output-dir", metavar="DIR", type=Path, help="folder for outputs, made if it does not exist"
        )
        existing = sub.add_mutually_exclusive_group()
        existing.add_argument(
            "--force", action="store_true", help="replace existing outputs whose names were not given"
        )
        if not apart:  # files that share a budget are made together
            existing.add_argument(
                "--skip-existing",
                action="store_true",
                help="do nothing where such an output exists, instead of failing",
            )
        sub.add_argument("--quiet", action="store_true", help="show only errors")
        add_machine(sub)
        return folders

    sub = add("encode", "compress images to .rnc files", ENCODE)
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
        choices=get_args(EntropyName)[1:],
        help="entropy coder (default: the context model of the weights)",
    )
    coder.add_argument(
        "--no-entropy", dest="entropy", action="store_const", const="none", help="store raw bits, which is faster"
    )

    sub.add_argument("--strip", action="store_true", help="leave out EXIF and XMP")

    sub = add("decode", "decompress .rnc files", DECODE)
    folders = add_coding(sub)
    folders.add_argument(
        "--all-iterations", metavar="DIR", type=Path, help="the pictures after 1, 2, ... iterations, in folders here"
    )
    sub.add_argument("--iterations", metavar="K", type=positive_int, help="decode only this many (default: all)")
    sub.add_argument("--format", metavar="F", help="image format, as a suffix (default: that of the output, or png)")
    sub.add_argument("--strip", action="store_true", help="leave out EXIF and XMP")

    sub = add("view", "write a page with a slider through the iterations of a file, and open it", VIEW)
    sub.add_argument("input", metavar="FILE", help="an .rnc file, or '-'")
    sub.add_argument(
        "page",
        metavar="PAGE",
        nargs="?",
        type=page_file,
        help="the page, overwritten if it exists (default: a new one)",
    )
    sub.add_argument("--no-open", action="store_true", help="only write the page")
    add_machine(sub)

    sub = add("budget", "compress images so that all files together keep to a rate, and measure them", BUDGET)
    add_coding(sub, "image files and folders", apart=True)
    sub.add_argument(
        "--bpp", metavar="B", type=positive, default=0.15, help="bits per pixel of all images (default: %(default)s)"
    )
    sub.add_argument(
        "--tune",
        choices=("psnr", "ms-ssim"),
        default="psnr",
        help="what is to be high: the PSNR of all pixels, or the mean MS-SSIM (default: %(default)s)",
    )
    sub.add_argument(
        "--baselines",
        nargs="+",
        choices=BASELINES,
        default=[],
        metavar="CODEC",
        help=f"codecs that do the same on the same images: {', '.join(BASELINES)}",
    )

    sub = add("info", "show size, weights, and bytes and bits per pixel of each iteration")
    sub.add_argument("paths", nargs="+", metavar="FILE", help=".rnc files, or '-'")
    sub.add_argument("--json", action="store_true", help="one line with a JSON object for each file")

    sub = add("truncate", "shorten a file to its first iterations; without a limit, to those that are complete")
    sub.add_argument("input", metavar="IN", help="an .rnc file, or '-'")
    sub.add_argument("output", metavar="OUT", help="the file to write, overwritten if it exists, or '-'")
    limit = sub.add_mutually_exclusive_group()
    limit.add_argument("--iterations", metavar="K", type=positive_int, help="how many to keep")
    limit.add_argument("--bytes", metavar="N", type=positive_int, help="keep as many as fit in this many bytes")
    sub.add_argument("--strip", action="store_true", help="leave out all records, such as EXIF and XMP")

    sub = add("export", "export a checkpoint of a training as weights, in half precision, or weights as graphs")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, or weights, see below")
    sub.add_argument(
        "output",
        metavar="OUT",
        help="the .safetensors file to write, or the folder of graphs; what exists is overwritten",
    )
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
    kind.add_argument(
        "--onnx",
        dest="graphs",
        action="store_const",
        const="onnx",
        help="write encoder and decoder of weights, by name or path, as graphs of one step to the folder OUT, for "
        "other programs",
    )
    kind.add_argument(
        "--torch-export", dest="graphs", action="store_const", const="pt2", help="likewise, as files of torch.export"
    )
    sub.add_argument(
        "--wandb", metavar="RUN", help="log to W&B, as a run of this name, which checkpoint became weights"
    )

    sub = add("rate", "serve a page where people say which of two reconstructions is closer to the original")
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

    train = commands.add_parser(
        "train", help="train a codec or a context model: `rnncodec train fit --config small ...`"
    )
    evaluate = commands.add_parser("evaluate", help="measure codecs on images: tables, curves, pictures, a report")
    for sub in (train, evaluate):  # which parse their arguments themselves: so that a shell completes files
        sub.add_argument("paths", nargs="*", metavar="PATH")
    for sub in commands.choices.values():
        for action in sub._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return parser
