"""Runs trainings as separate processes, reports their errors in one line, and checks that settings stay the same."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rnncodec.files.images import atomic_write

FREE = {  # settings that may change, because they do not affect what is learned
    "name",
    "checkpoint_minutes",
    "data.cache_dir",
    "data.num_workers",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
}


def rank() -> int:
    """The number of this process among those that srun started, or 0."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def error_line(text: str, status: int) -> str:
    """The last line of a program's output that names an error, else its last line, else its exit status."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror: " in line]
    return (errors or lines or [f"train.py ended with status {status}"])[-1]


def flat(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to dotted names."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def check_settings(settings: dict[str, Any], output: Path) -> None:
    """Checks that a folder has no trainings with other settings; in a new folder, stores the settings.

    Raises:
        ValueError: the settings differ, or the stored settings cannot be read.
        OSError: the settings cannot be written.
    """
    path = output / "settings.yaml"
    if not path.exists():
        if rank() == 0:
            output.mkdir(parents=True, exist_ok=True)
            atomic_write(path, yaml.safe_dump(settings).encode())
        return
    try:
        old = flat(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read") from error
    new = flat(settings)
    changed = [key for key in sorted(old.keys() | new.keys()) if key not in FREE and old.get(key) != new.get(key)]
    if changed:
        differences = ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed)
        raise ValueError(f"{output} holds trainings with other settings ({differences}): choose another --output")


def environment(index: int) -> dict[str, str]:
    """The environment variables of the training with this index."""
    values = dict(os.environ)
    if int(values.get("SLURM_NTASKS", "1")) > 1:
        # Each training has its own port, because an early rank must not connect to the server of the previous training.
        values["MASTER_PORT"] = str(15000 + 16 * int(values.get("SLURM_JOB_ID", "0")[-3:]) + index)
    return values


def run(command: list[str], log: Path, variables: dict[str, str]) -> str:
    """Runs a training to its end; returns an error message, which is empty if there was no error.

    Its progress is shown, and its messages go to the log. If this program ends, it ends the training and its children.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=2, stderr=file, env=variables, start_new_session=True
        )
        # SLURM sends this signal before a job's time ends, and the training then saves a checkpoint and ends.
        before = signal.signal(signal.SIGUSR1, lambda *_: process.send_signal(signal.SIGUSR1))
        try:
            status = process.wait()
        finally:
            signal.signal(signal.SIGUSR1, before)
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)
                os.killpg(process.pid, signal.SIGKILL)  # remaining workers and ranks
            process.wait()
    if not status:
        return ""
    with open(log, "rb") as file:
        file.seek(start)
        return error_line(file.read().decode(errors="replace"), status)
