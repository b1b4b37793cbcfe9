"""Pairs inputs with outputs, and reads and writes .rnc files."""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from rnncodec.console import is_terminal, stdin, stdout
from rnncodec.files import format, images
from rnncodec.files.format import FormatError, Header

HEADER_BYTES = 2**15  # no header is longer
MAX_FILE_BYTES = 2**31  # twice the size of 16 iterations of the largest image


class UsageError(ValueError):
    """Raised for arguments that are invalid or cannot be combined."""


class Job(NamedTuple):
    """An input and its output (each '-' for a pipe), and whether an existing output may be replaced."""

    source: str
    target: str
    overwrite: bool


def find_jobs(
    args: argparse.Namespace,
    suffix: str,
    output_suffixes: set[str],
    search: Callable[[Path], list[Path]],
    skipped: Collection[Path] = (),
) -> list[Job]:
    """Pairs inputs with outputs by the rules of `rnncodec.arguments.PATHS`.

    Args:
        args: with `paths`, `output_dir` and `force`.
        suffix: of outputs whose names are not given.
        output_suffixes: those by which a path is known as an output.
        search: gives the inputs in a folder.
        skipped: files that are left out, so that a folder with one of them is not empty.

    Raises:
        UsageError: the arguments cannot be combined.
        ValueError: a folder has no inputs, or an output would overwrite an input or another output.
    """
    paths: list[str] = args.paths
    if paths == ["-"]:
        paths = ["-", "-"]
    if len(paths) == 2 and (paths[1] == "-" or Path(paths[1]).suffix.lower() in output_suffixes):
        if args.output_dir is not None:
            raise UsageError("give an output or a folder for outputs, not both")
        if Path(paths[0]).is_dir():
            raise UsageError(f"{paths[0]} is a folder and cannot become one output")
        refuse_terminal(paths[1])
        jobs = [Job(paths[0], paths[1], True)]
    elif len(paths) == 2 and args.output_dir is None and _is_new_kind(*map(Path, paths)):
        endings = ", ".join(sorted(output_suffixes))
        raise UsageError(f"{paths[1]}: no such input, and no output, whose names end in {endings}")
    elif "-" in paths:
        raise UsageError("'-' cannot be one of several inputs")
    else:
        places: dict[tuple[Path, Path], None] = {}  # inputs, and the same names where their outputs are to be
        for path in map(Path, paths):
            files = search(path) if path.is_dir() else [path]
            if not files and not any(file.is_relative_to(path) for file in skipped):
                raise ValueError(f"nothing to do in {path}")
            for file in files:
                places[file, file if args.output_dir is None else args.output_dir / _below(file, path)] = None
        targets = _outputs([place for _, place in places], suffix)
        jobs = [Job(str(file), str(target), args.force) for (file, _), target in zip(places, targets, strict=True)]
    sources = {os.path.realpath(job.source): job.source for job in jobs if job.source != "-"}
    taken: dict[str, str] = {}
    for job in jobs:
        if job.target == "-":
            continue
        target = os.path.realpath(job.target)
        if target in sources:
            raise ValueError(f"{job.target} would overwrite the input {sources[target]}")
        if target in taken:
            raise ValueError(f"{taken[target]} and {job.source} would both become {job.target}")
        taken[target] = job.source
    for target, source in taken.items():
        for parent in map(str, Path(target).parents):
            if parent in taken:
                raise ValueError(f"{taken[parent]} would become a folder that {source} is to be in: give them apart")
    return jobs


def exists(job: Job) -> bool:
    """Whether a job has an output that must not be replaced."""
    return not job.overwrite and os.path.lexists(job.target)


def refuse_terminal(target: str) -> None:
    """Refuses an output that is a terminal, which would take its bytes for commands.

    Raises:
        UsageError: it is.
    """
    if target == "-" and is_terminal():
        raise UsageError("standard output is a terminal; name a file, or redirect the output")


def find_files(folder: Path) -> list[Path]:
    """The .rnc files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".rnc" and path.is_file())


def _is_new_kind(first: Path, second: Path) -> bool:
    """Whether the second of two paths, the first of which exists, is no input of the same kind that is missing."""
    kinds = first.suffix.lower(), second.suffix.lower()
    return first.is_file() and not os.path.lexists(second) and "" not in kinds and kinds[0] != kinds[1]


def _below(file: Path, root: Path) -> Path:
    """The path of a file relative to the folder in which it was found, or its bare name."""
    return Path(file.name) if file == root else file.relative_to(root)


def _outputs(places: Sequence[Path], suffix: str) -> list[Path]:
    """Names of outputs: a suffix in place of that of each input, or behind it where two would have the same name."""
    found = [place.with_suffix(suffix) for place in places]
    while True:
        count = Counter(found)
        longer = [
            place.with_name(place.name + suffix) if count[name] > 1 else name
            for place, name in zip(places, found, strict=True)
        ]
        if longer == found:
            return found
        found = longer  # which may be the name of another


def read(source: str) -> tuple[Header, bytes]:
    """Reads the header and the bytes of an .rnc file, or of standard input for '-'; see `read_open`."""
    if source == "-":
        return read_open(stdin())
    with open(source, "rb") as file:
        return read_open(file)


def read_open(file: IO[bytes]) -> tuple[Header, bytes]:
    """Reads the header and the bytes of an open .rnc file, at most one byte more than the header announces.

    Raises:
        FormatError: it is no such file, or announces too many bytes.
    """
    data = bytearray(file.read(HEADER_BYTES))
    header = format.read_header(bytes(data))
    size = header.sizes[-1]
    if size > MAX_FILE_BYTES:
        raise FormatError(f"the header announces {size} bytes, more than the limit of {MAX_FILE_BYTES}")
    # In pieces, because read(size) would allocate all bytes announced, even if the file is shorter.
    while len(data) <= size and (piece := file.read(min(size + 1 - len(data), 2**20))):
        data += piece
    return header, bytes(data)


def write(target: str, data: bytes) -> None:
    """Writes a file completely or not at all, or to standard output for '-'."""
    if target == "-":
        stdout().write(data)
    else:
        images.atomic_write(target, data)
