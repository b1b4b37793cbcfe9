"""The folder of a run, runs/NAME: which runs may use it, and what lets W&B continue a run."""

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only


class RunFolder:
    """The folder of a run, which belongs to one training at a time.

    Args:
        root: the folder of all runs.
        name: of the run.

    Attributes:
        path: the folder.

    Raises:
        ValueError: the name is not that of a folder below the root.
    """

    def __init__(self, root: Path, name: str) -> None:
        parts = PurePath(name).parts
        if not parts or ".." in parts or PurePath(name).is_absolute():
            raise ValueError(f"--name must be that of a folder below {root}, not {name!r}")
        self.path = root / name

    @property
    def last(self) -> Path:
        """The checkpoint that resumes the run."""
        return self.path / "last.ckpt"

    @property
    def run_id(self) -> str | None:
        """The ID of the W&B run, if there is one."""
        file = self.path / "wandb-id.txt"
        return file.read_text() if file.exists() else None

    @contextmanager
    def claim(self, resumed: bool) -> Iterator[None]:
        """Takes the folder for a training; a lock of a process that has ended does not count.

        Args:
            resumed: whether the training goes on from a checkpoint, or starts.

        Raises:
            FileExistsError: another training uses the folder, or one that starts would replace an earlier one.
            OSError: the folder cannot be written.
        """
        # Only the first of the processes of a training, on any machine, which these variables number.
        first = getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"
        with ExitStack() as held:
            if first:
                self.path.mkdir(parents=True, exist_ok=True)
                try:
                    with suppress(NotImplementedError):  # of a file system without locks
                        held.enter_context(FileLock(self.path / ".lock", timeout=0))
                except Timeout as error:
                    raise FileExistsError(f"{self.path}: another training with this name is running") from error
            if self.last.exists() and not resumed:
                raise FileExistsError(
                    f"{self.last} is of an earlier run: resume it with --ckpt_path or choose another --name"
                )
            given = os.environ.get("WANDB_RUN_ID")
            if first and (given or not (resumed and self.run_id)):
                (self.path / "wandb-id.txt").write_text(given or uuid.uuid4().hex[:8])
            yield


def run_name(name: str) -> str:
    """The name of a run: in a W&B sweep with the ID of the run, so that each has a folder of its own."""
    run_id = os.environ.get("WANDB_RUN_ID")
    return f"{name}-{run_id}" if run_id and os.environ.get("WANDB_SWEEP_ID") else name
