"""Does the jobs of a command one after the other, and says what was done, lost, left out and not possible."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from rnncodec.console import Report, complain, listed, losses, progress, say
from rnncodec.files.errors import ImageWarning, one_line
from rnncodec.jobs import Job, exists

FAILURES = (ValueError, OSError, MemoryError, RuntimeError)  # torch reports exhausted memory as RuntimeError
NAMED = 10  # of the files that are skipped for one reason


class Done(NamedTuple):
    """What is said of a job that is done, and the pixels of the image that it coded."""

    summary: str
    pixels: int = 0


def do_each(
    jobs: Sequence[Job],
    work: Callable[[str, str, Report], Done | None],
    quiet: bool = False,
    skipped: Mapping[Path, str] | None = None,
    skip_existing: bool = False,
) -> int:
    """Does all jobs, even if some of them fail, and gives the exit status, 1 if a file failed or was skipped.

    Args:
        jobs: inputs and outputs.
        work: does one of them.
        quiet: whether only errors are shown.
        skipped: files that were left out, and why.
        skip_existing: whether an output that exists means that its job is done, instead of that it fails.
    """
    skipped = skipped or {}
    failed = existed = before = after = pixels = 0
    lost: dict[str, list[str]] = {}  # inputs by what was lost of them
    begun = monotonic()
    with progress(len(jobs), quiet) as bars:
        for job in jobs:
            done = None
            try:
                if exists(job):
                    if skip_existing:
                        existed += 1
                        continue
                    raise ValueError(f"{job.target} exists; --force replaces it")
                if job.target not in ("", "-"):
                    Path(job.target).parent.mkdir(parents=True, exist_ok=True)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    done = work(job.source, job.target, bars.start(job.source))
            except BrokenPipeError:
                raise
            except FAILURES as error:
                message = one_line(error)
                complain(f"error: {message}" if job.source in message else f"error: {job.source}: {message}")
                failed += 1
                continue
            finally:
                bars.end(done.pixels if done else 0)
            before, after = before + _size(job.source), after + _size(job.target)
            pixels += done.pixels if done else 0
            if quiet:
                continue
            for text, category in dict.fromkeys((str(warning.message), warning.category) for warning in caught):
                if issubclass(category, ImageWarning):
                    lost.setdefault(text, []).append(job.source)
                else:
                    complain(f"warning: {job.source}: {text}")
            if done and job.target != "-":
                say(f"{job.target}: {done.summary}")
    seconds = monotonic() - begun
    for line in losses(lost):
        complain(line)
    reasons: dict[tuple[str, str], list[str]] = {}
    for path, why in skipped.items():
        reasons.setdefault((path.suffix.lower(), why), []).append(str(path))
    for (_, why), paths in reasons.items():
        complain(f"skipped: {listed(paths, NAMED)}: {why}")
    total = len(jobs) + len(skipped)
    if total > 1 and any(job.target for job in jobs) and not quiet:
        made = f"{len(jobs) - failed - existed} of {total} files: {before} bytes became {after}"
        if pixels:
            taken = timedelta(seconds=round(seconds))
            made += f"; {pixels / 1e6:.1f} megapixels in {taken}, {pixels / 1e6 / seconds:.3g} a second"
        numbers = (existed, "existed"), (failed, "failed"), (len(skipped), "skipped")
        say("; ".join([made, *(f"{count} {what}" for count, what in numbers if count)]))
    return int(bool(failed or skipped))


def _size(path: str) -> int:
    """The bytes of a file, or of the files in a folder; 0 for a pipe."""
    if path in ("", "-"):
        return 0
    with suppress(OSError):
        return sum(map(os.path.getsize, Path(path).iterdir())) if os.path.isdir(path) else os.path.getsize(path)
    return 0
