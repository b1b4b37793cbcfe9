"""The console: lines and progress bars, whatever it can show, and standard input and output as binary files."""

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rnncodec.files.errors import ImageWarning

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


@contextmanager
def warnings_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Tells each warning that comes meanwhile in one line; what images lost at the end, once for each kind."""
    lost: dict[str, dict[str, None]] = {}

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        if isinstance(message, ImageWarning):
            lost.setdefault(str(message), {})[message.source] = None
        else:
            tell(f"warning: {(str(message).strip() or category.__name__).splitlines()[0]}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", ImageWarning)
        warnings.showwarning = show
        try:
            yield
        finally:
            for line in losses({text: list(sources) for text, sources in lost.items()}):
                tell(line)


def losses(lost: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Lines that warn of what images lost, one for each kind, from the files by what was lost."""
    for text, sources in lost.items():
        yield f"warning: {listed(sources, 1)}: {text}"


def listed(paths: Sequence[str], most: int) -> str:
    """Names of files, only some examples of many."""
    if len(paths) <= most:
        return ", ".join(paths)
    return f"{len(paths)} files, such as {', '.join(paths[:most])}"


def silence(stream: Literal["stdout", "stderr"]) -> None:
    """Discards what a stream could not write, and all that follows; or Python would try again at its end, and fail."""
    if getattr(sys, stream) is getattr(sys, f"__{stream}__"):
        setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115


def printable(text: str) -> str:
    """Escapes characters that would move the cursor or cannot be encoded, as names of files may contain any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def columns() -> tuple[ProgressColumn, ...]:
    """The columns of a progress bar: description, bar, count, time taken and time left."""
    description = TextColumn("{task.description}", markup=False)
    return description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()


class Speed(ProgressColumn):
    """A column with the megapixels per second of a task that has `pixels`."""

    def render(self, task: Task) -> Text:
        pixels = task.fields.get("pixels")
        return Text(f"{pixels / 1e6 / task.elapsed:.3g} MP/s" if pixels and task.elapsed else "")


class Bars:
    """A progress bar of jobs, if there are several, and one of the steps of the current job.

    Args:
        display: where they are; None shows nothing.
        jobs: how many there are.
    """

    def __init__(self, display: Progress | None, jobs: int) -> None:
        self._display = display
        if display:
            self._jobs = display.add_task("files", total=jobs, visible=jobs > 1, pixels=0)
            self._steps = display.add_task("", total=None)

    def start(self, source: str) -> Report:
        """Begins the bar of a job's steps; gives what is told of them."""
        display = self._display
        if not display:
            return lambda done, total: None
        display.reset(self._steps, description=printable(source), total=None)
        return lambda done, total: display.update(self._steps, completed=done, total=total)

    def end(self, pixels: int) -> None:
        """Counts a job that ended, and the pixels of its image."""
        if self._display:
            before = self._display.tasks[self._jobs].fields["pixels"]
            self._display.update(self._jobs, advance=1, pixels=before + pixels)


@contextmanager
def progress(jobs: int, quiet: bool = False) -> Iterator[Bars]:
    """Shows progress bars on standard error if it is a terminal."""
    if quiet or not (sys.stderr and sys.stderr.isatty()):
        yield Bars(None, jobs)
        return
    console = Console(stderr=True)
    with Progress(*columns(), Speed(), console=console, transient=True, redirect_stdout=is_terminal()) as display:
        yield Bars(display, jobs)


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
