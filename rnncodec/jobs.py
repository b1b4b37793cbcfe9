"""Runs a command file by file: pairs inputs with outputs, shows progress and reports failures."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from rnncodec.files import format, images
from rnncodec.files.format import FormatError, Header
from rnncodec.files.images import one_line

HEADER_BYTES = 2**15  # no header is longer
MAX_FILE_BYTES = 2**31  # twice the size of 16 iterations of the largest image
FAILURES = (ValueError, OSError, MemoryError, RuntimeError)  # torch reports exhausted memory as RuntimeError

PATHS = """\
Exactly two paths, the second of which is '-' or ends in {suffix}, are one input and its output, which is
overwritten if it exists. Otherwise every path is an input, and a folder stands for all {kind} below it.
Outputs are written beside their inputs or, with --output-dir, to that folder and the same folders below it;
existing files are replaced only with --force. '-' is standard input or output; alone, it is both."""

Report = Callable[[int, int], None]


class UsageError(ValueError):
    """Raised for arguments that are invalid or cannot be combined."""


class Job(NamedTuple):
    """An input and its output (each '-' for a pipe), and whether an existing output may be replaced."""

    source: str
    target: str
    overwrite: bool


def find_jobs(
    args: argparse.Namespace, suffix: str, output_suffixes: set[str], search: Callable[[Path], list[Path]]
) -> list[Job]:
    """Pairs inputs with outputs by the rules of `PATHS`.

    Raises:
        UsageError: the arguments cannot be combined.
        ValueError: a folder has no inputs, or an output would overwrite an input or another output.
    """
    paths: list[str] = args.paths
    if paths == ["-"]:
        paths = ["-", "-"]
    if len(paths) == 2 and (paths[1] == "-" or Path(paths[1]).suffix.lower() in output_suffixes):
        if args.output_dir is not None:
            raise UsageError("give an output or --output-dir, not both")
        if Path(paths[0]).is_dir():
            raise UsageError(f"{paths[0]} is a folder and cannot become one output")
        jobs = [Job(paths[0], paths[1], True)]
    elif "-" in paths:
        raise UsageError("'-' cannot be one of several inputs")
    else:
        jobs = []
        for path in map(Path, paths):
            files = search(path) if path.is_dir() else [path]
            if not files:
                raise ValueError(f"nothing to do in {path}")
            for file in files:
                place = file if args.output_dir is None else args.output_dir / _below(file, path)
                jobs.append(Job(str(file), str(place.with_suffix(suffix)), args.force))
        jobs = list(dict.fromkeys(jobs))
    sources = {os.path.realpath(job.source): job.source for job in jobs if job.source != "-"}
    targets: dict[str, str] = {}
    for job in jobs:
        if job.target == "-":
            continue
        target = os.path.realpath(job.target)
        if target in sources:
            raise ValueError(f"{job.target} would overwrite the input {sources[target]}")
        if target in targets:
            raise ValueError(f"{targets[target]} and {job.source} would both become {job.target}")
        targets[target] = job.source
    return jobs


def find_files(folder: Path) -> list[Path]:
    """The .rnc files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".rnc" and path.is_file())


def _below(file: Path, root: Path) -> Path:
    """The path of a file relative to the folder in which it was found, or its bare name."""
    return Path(file.name) if file == root else file.relative_to(root)


def do_each(jobs: Sequence[Job], work: Callable[[str, str, Report], str | None]) -> int:
    """Does all jobs, even if some of them fail, and gives the exit status."""
    failed = False
    with _progress(len(jobs)) as start:
        for job in jobs:
            try:
                if not job.overwrite and os.path.lexists(job.target):
                    raise ValueError(f"{job.target} exists; --force replaces it")
                if job.target not in ("", "-"):
                    Path(job.target).parent.mkdir(parents=True, exist_ok=True)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    summary = work(job.source, job.target, start(job.source))
                for warning in caught:
                    complain(f"warning: {job.source}: {warning.message}")
                if summary and job.target != "-":
                    print(f"{printable(job.target)}: {summary}")
            except BrokenPipeError:
                raise
            except FAILURES as error:
                message = one_line(error)
                complain(f"error: {message}" if job.source in message else f"error: {job.source}: {message}")
                failed = True
    return int(failed)


def columns() -> tuple[ProgressColumn, ...]:
    """The columns of a progress bar: description, bar, count and remaining time."""
    return TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()


@contextmanager
def _progress(jobs: int) -> Iterator[Callable[[str], Report]]:
    """Shows progress bars on standard error if it is a terminal; gives a function that starts the bar of a job."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield lambda source: lambda done, total: None
        return
    on_terminal = bool(sys.stdout and sys.stdout.isatty())
    with Progress(*columns(), console=Console(stderr=True), transient=True, redirect_stdout=on_terminal) as bars:
        files = bars.add_task("files", total=jobs, visible=jobs > 1)
        steps = bars.add_task("", total=None)
        begun = 0

        def start(source: str) -> Report:
            nonlocal begun
            bars.update(files, completed=begun)
            begun += 1
            bars.reset(steps, description=printable(source), total=None)
            return lambda done, total: bars.update(steps, completed=done, total=total)

        yield start


def read(source: str) -> tuple[Header, bytes]:
    """Reads the header and the bytes of an .rnc file, at most one byte more than the header announces."""

    def take(file: BinaryIO) -> tuple[Header, bytes]:
        data = bytearray(file.read(HEADER_BYTES))
        header = format.read_header(bytes(data))
        size = header.sizes[-1]
        if size > MAX_FILE_BYTES:
            raise FormatError(f"the header announces {size} bytes, more than the limit of {MAX_FILE_BYTES}")
        # In pieces, because read(size) would allocate all bytes announced, even if the file is shorter.
        while len(data) <= size and (piece := file.read(min(size + 1 - len(data), 2**20))):
            data += piece
        return header, bytes(data)

    if source == "-":
        return take(stdin())
    with open(source, "rb") as file:
        return take(file)


def write(target: str, data: bytes) -> None:
    """Writes a file completely or not at all, or to standard output for '-'."""
    if target == "-":
        stdout().write(data)
    else:
        images.atomic_write(target, data)


def stdin() -> BinaryIO:
    """Standard input as a binary file."""
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return sys.stdin.buffer


def stdout() -> BinaryIO:
    """Standard output as a binary file."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    return sys.stdout.buffer


def complain(message: str) -> None:
    """Prints one line on standard error."""
    print(f"rnncodec: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """Escapes characters that would move the cursor or cannot be encoded, as names of files may contain any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
