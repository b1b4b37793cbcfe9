"""The console: lines and progress bars, whatever it can show, and standard input and output as binary files."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

Report = Callable[[int, int], None]
"""Is told the number of steps done and the number of all steps."""


def prepare() -> None:
    """Lets a program run with any console: one that is closed, or that lacks the characters of a file's name."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened would take the number, and what libraries print
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """Prints a line on standard output, as long as somebody reads it."""
    try:
        print(printable(message), flush=True)
    except OSError:
        silence("stdout")


def complain(message: str) -> None:
    """Prints one line on standard error, if that is possible."""
    if sys.stderr is None:  # print would take standard output
        return
    try:
        print(f"rnncodec: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:
        silence("stderr")


def silence(stream: Literal["stdout", "stderr"]) -> None:
    """Discards what a stream could not write, and all that follows; or Python would try again at its end, and fail."""
    if getattr(sys, stream) is getattr(sys, f"__{stream}__"):
        setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115


def printable(text: str) -> str:
    """Escapes characters that would move the cursor or cannot be encoded, as names of files may contain any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def columns() -> tuple[ProgressColumn, ...]:
    """The columns of a progress bar: description, bar, count and remaining time."""
    return TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()


@contextmanager
def progress(jobs: int, quiet: bool = False) -> Iterator[Callable[[str], Report]]:
    """Shows progress bars on standard error if it is a terminal; gives a function that starts the bar of a job."""
    if quiet or not (sys.stderr and sys.stderr.isatty()):
        yield lambda source: lambda done, total: None
        return
    with Progress(*columns(), console=Console(stderr=True), transient=True, redirect_stdout=is_terminal()) as bars:
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


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return bool(sys.stdout and sys.stdout.isatty())


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
