"""Does the jobs of a command one after the other, and says what was done, lost, left out and not possible."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rnncodec.console import Report, complain, progress, say
from rnncodec.files.errors import ImageWarning, one_line
from rnncodec.jobs import Job

FAILURES = (ValueError, OSError, MemoryError, RuntimeError)  # torch reports exhausted memory as RuntimeError
NAMED = 5  # files of a kind that are named where they may be many


def do_each(jobs: Sequence[Job], work: Callable[[str, str, Report], str | None], quiet: bool = False) -> int:
    """Does all jobs, even if some of them fail, and gives the exit status.

    Args:
        jobs: inputs and outputs.
        work: does one of them, and gives what is said of it.
        quiet: whether only errors are shown.
    """
    failed = before = after = 0
    lost: dict[str, list[str]] = {}  # inputs by what was lost of them
    with progress(len(jobs), quiet) as start:
        for job in jobs:
            try:
                if not job.overwrite and os.path.lexists(job.target):
                    raise ValueError(f"{job.target} exists; --force replaces it")
                if job.target not in ("", "-"):
                    Path(job.target).parent.mkdir(parents=True, exist_ok=True)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    summary = work(job.source, job.target, start(job.source))
            except BrokenPipeError:
                raise
            except FAILURES as error:
                message = one_line(error)
                complain(f"error: {message}" if job.source in message else f"error: {job.source}: {message}")
                failed += 1
                continue
            before, after = before + _size(job.source), after + _size(job.target)
            if quiet:
                continue
            for text, category in dict.fromkeys((str(warning.message), warning.category) for warning in caught):
                if issubclass(category, ImageWarning):
                    lost.setdefault(text, []).append(job.source)
                else:
                    complain(f"warning: {job.source}: {text}")
            if summary and job.target != "-":
                say(f"{job.target}: {summary}")
    for text, sources in lost.items():
        example = sources[0] if len(sources) == 1 else f"{len(sources)} files, such as {sources[0]}"
        complain(f"warning: {example}: {text}")
    if len(jobs) > 1 and any(job.target for job in jobs) and not quiet:
        failures = f"; {failed} failed" if failed else ""
        say(f"{len(jobs) - failed} of {len(jobs)} files: {before} bytes became {after}{failures}")
    return int(failed > 0)


def report_skipped(skipped: Sequence[Path]) -> int:
    """Names the files that were left out, a line for each kind, and gives the exit status."""
    kinds: dict[str, list[str]] = {}
    for path in skipped:
        kinds.setdefault(path.suffix.lower(), []).append(str(path))
    for suffix, names in kinds.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        complain(f"skipped {len(names)} {suffix} files: {', '.join(names[:NAMED])}{more}")
    return int(bool(skipped))


def _size(path: str) -> int:
    """The bytes of a file, 0 for a pipe."""
    with suppress(OSError):
        return os.path.getsize(path) if path not in ("", "-") else 0
    return 0
