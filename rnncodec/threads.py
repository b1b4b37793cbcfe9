"""How many threads compute: as many as there are processors that nothing else keeps busy, and one in a forked process.

Threads that share a processor with other work make all others wait. By default, those of GNU OpenMP wait by running in
circles, which takes the processor from what they wait for.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MOST = 8  # threads by default; images have too little work for more
MOMENT = 0.1  # seconds in which the machine is watched
STAT = Path("/proc/stat")
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
VARIABLES = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"  # how threads wait


def use_threads(count: int | None) -> None:
    """Sets how many threads PyTorch computes with, and lets them sleep while they wait if it is not loaded yet.

    Args:
        count: of threads; None leaves it to OMP_NUM_THREADS, or takes `free_processors`, at most `MOST`.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    if count is None and "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    torch.set_num_threads(min(free_processors(), MOST) if count is None else count)


def free_processors() -> int:
    """How many processors this process may use and others leave idle, at least 1."""
    counts: list[float] = [os.cpu_count() or 1]
    if sys.platform == "linux":
        counts += [len(os.sched_getaffinity(0)), *_quotas()]
        with suppress(OSError, ValueError):
            idle, start = _idle(), time.monotonic()
            time.sleep(MOMENT)
            counts.append((_idle() - idle) / (time.monotonic() - start))
    return max(1, round(min(counts)))


def _idle() -> float:
    """The seconds that all processors together have been idle since the machine was started."""
    name, *ticks = STAT.read_text().split("\n", 1)[0].split()
    if name != "cpu" or len(ticks) < 5:
        raise ValueError(f"unknown content of {STAT}")
    return (int(ticks[3]) + int(ticks[4])) / os.sysconf("SC_CLK_TCK")  # idle, and waiting for a disk


def _quotas() -> Iterator[float]:
    """The processors that each control group of this process may use, where it is limited."""
    with suppress(OSError, ValueError):
        for group in (line[3:] for line in CGROUP.read_text().splitlines() if line.startswith("0::")):
            inner = CGROUPS / group.strip("/")
            for folder in (inner, *inner.parents):
                if folder.is_relative_to(CGROUPS) and (limit := folder / "cpu.max").exists():
                    quota, period = limit.read_text().split()
                    if quota != "max":
                        yield int(quota) / int(period)


def _after_fork() -> None:
    """OpenMP would wait for the threads of the parent process, which a forked process does not have."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
