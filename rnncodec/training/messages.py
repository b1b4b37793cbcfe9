"""What a training says besides its progress: warnings in one line each, and little of what its libraries say."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rnncodec.console import printable, warnings_told

# Warnings of libraries that are right in general, but not here.
NEEDLESS_WARNINGS = (
    # Lightning 2.6 calls what PyTorch 2.13 deprecates.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Who trains with one process on a machine that has SLURM needs none of it.
    r"The `srun` command is available on your system but is not used",
    # It is the folder of the run, which has its config already; that of another run is refused.
    r"Checkpoint directory .* exists and is not empty",
    # What validation logs are means over all processes already.
    r"It is recommended to use `self\.log\('val/.*', \.\.\., sync_dist=True\)`",
    # Patches take less time to read than to send from another process.
    r"The '\w+_dataloader' does not have many workers",
    # Validation saves no checkpoints, and the weights in a checkpoint are the averaged ones.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    r"You're using the WeightAveraging callback, but loading a checkpoint outside the 'fit' stage",
)

# Lines that Lightning prints.
NEEDLESS_LINES = re.compile(
    "|".join(
        (
            "💡 Tip: ",  # of its other products
            # The first line of progress says on what a training computes, and config.yaml what the seed is.
            "GPU available: ",
            "TPU available: ",
            r"LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES",
            "Using .* Automatic Mixed Precision",
            r"(\[rank: \d+\] )?Seed set to ",
            "-+\ndistributed_backend=",
            # "Restoring states from the checkpoint" has said so.
            "Restored all states from the checkpoint",
            "Loaded model weights from the checkpoint",
            "Found current_model_state in the checkpoint",
            # Its handlers are replaced by those of `StopOnSignal`.
            "SLURM auto-requeueing enabled",
        )
    )
)

UNION = "Does not validate against any of the Union subtypes"


class Lines(logging.Handler):
    """Prints what Lightning's loggers are told, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not NEEDLESS_LINES.match(message):
            print(message, file=sys.stderr, flush=True)  # as it is now, because a progress bar replaces it


def innermost(text: str) -> str:
    """The reason in an error of jsonargparse, which tells of each type that an option may have, in a single line."""
    if UNION not in text:
        return " ".join(text.split())
    keys = list[str]()
    for line in (line.strip().removeprefix("- ") for line in text.splitlines()):
        if key := re.fullmatch(r'Parser key "(.+)":', line):
            keys.append(key[1])
        elif not line.startswith((UNION, "Subtypes:", "Errors:", "Problem with given class_path")):
            return f"{'.'.join(keys)}: {line}" if keys else line  # the first type that it tells of is the one meant
    return " ".join(text.split())


@contextmanager
def messages(program: str) -> Iterator[None]:
    """Meanwhile, warnings are lines that begin with the program's name, and what helps nobody is left out."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("fabric", "pytorch")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [Lines()], False

    def tell(line: str) -> None:
        print(f"{program}: {printable(line)}", file=sys.stderr, flush=True)

    try:
        with warnings_told(tell):
            for message in NEEDLESS_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
