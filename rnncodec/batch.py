"""Does the jobs of a command one after the other, and says what was done, lost, left out and not possible."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rnncodec.console import Report, complain, listed, losses, progress, say
from rnncodec.files.errors import ImageWarning, one_line
from rnncodec.jobs import Job

FAILURES = (ValueError, OSError, MemoryError, RuntimeError)  # torch reports exhausted memory as RuntimeError
NAMED = 10  # of the files that are skipped for one reason


def do_each(
    jobs: Sequence[Job],
    work: Callable[[str, str, Report], str | None],
    quiet: bool = False,
    skipped: Mapping[Path, str] | None = None,
    keep: bool = False,
) -> int:
    """Does all jobs, even if some of them fail, and gives the exit status, 1 if a file failed or was skipped.

    Args:
        jobs: inputs and outputs.
        work: does one of them, and gives what is said of it.
        quiet: whether only errors are shown.
        skipped: files that were left out, and why.
        keep: whether an existing output means that its job is done, instead of that it fails.
    """
    skipped = skipped or {}
    failed = kept = before = after = 0
    lost: dict[str, list[str]] = {}  # inputs by what was lost of them
    with progress(len(jobs), quiet) as start:
        for job in jobs:
            try:
                if not job.overwrite and os.path.lexists(job.target):
                    if keep:
                        kept += 1
                        continue
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
    for line in losses(lost):
        complain(line)
    reasons: dict[tuple[str, str], list[str]] = {}
    for path, why in skipped.items():
        reasons.setdefault((path.suffix.lower(), why), []).append(str(path))
    for (_, why), paths in reasons.items():
        complain(f"skipped: {listed(paths, NAMED)}: {why}")
    total = len(jobs) + len(skipped)
    if total > 1 and any(job.target for job in jobs) and not quiet:
        numbers = (kept, "existed"), (failed, "failed"), (len(skipped), "skipped")
        counts = [f"{count} {what}" for count, what in numbers if count]
        say("; ".join([f"{len(jobs) - failed - kept} of {total} files: {before} bytes became {after}", *counts]))
    return int(bool(failed or skipped))


def _size(path: str) -> int:
    """The bytes of a file, 0 for a pipe."""
    with suppress(OSError):
        return os.path.getsize(path) if path not in ("", "-") else 0
    return 0
