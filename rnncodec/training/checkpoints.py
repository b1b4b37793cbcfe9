"""Checkpoints of a training: written completely or not at all, at intervals, and checked before a run is resumed."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from rnncodec.files.errors import one_line
from rnncodec.training.export import UNREADABLE


def last_checkpoint(trainer: L.Trainer) -> Path | None:
    """The path of last.ckpt, which resumes the run; None if checkpoints are turned off."""
    saves = trainer.checkpoint_callbacks and not getattr(trainer, "fast_dev_run", False)
    return Path(trainer.default_root_dir) / "last.ckpt" if saves else None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it, so that a killed run leaves a complete one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        part = Path(f"{path}.part")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # of the full disk, which PyTorch may report as RuntimeError
            raise OSError(f"{path}: cannot be written: {one_line(error)}") from error
        finally:
            part.unlink(missing_ok=True)


class LastCheckpoint(ModelCheckpoint):
    """Saves a checkpoint at intervals, before validation, and at the end, before averaged weights replace the current.

    Its file is that of `last_checkpoint`.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:  # else gradients would be lost
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Within a validation there is nothing to resume from, because the averaged weights replace the current ones.
        path = last_checkpoint(trainer)
        if path is not None and not self._should_skip_saving_checkpoint(trainer):
            trainer.save_checkpoint(path, weights_only=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = last_checkpoint(trainer)
        if path is not None:
            trainer.save_checkpoint(path, weights_only=False)


def check_checkpoint(path: Path, module: L.LightningModule) -> None:
    """Checks that a file is a checkpoint of a training of the same networks.

    Raises:
        ValueError: it is not, or it is cut; the message is one line.
        OSError: the file cannot be read.
    """
    with open(path, "rb"):  # whose errors name the file, unlike PyTorch's
        pass
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if not {"optimizer_states", "loops", "bad_steps", "PatchDataModule"} <= checkpoint.keys():
            raise ValueError("not of a training")
    except (*UNREADABLE, OSError) as error:
        raise ValueError(f"{path}: not a complete checkpoint of a training ({type(error).__name__})") from error
    expected = {name: value.shape for name, value in module.state_dict().items()}
    other = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if other:
        raise ValueError(f"{path}: a checkpoint of another network, which differs in {other[0]}")
