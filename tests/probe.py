"""Callbacks for the tests of training: what each rank saw and learned, and signals at known times."""

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path

import lightning as L
import torch


class Probe(L.Callback):
    """Writes the hashes of all patches and, at the end, the current weights of this rank into a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.patches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.patches += [hashlib.sha256(patch.numpy().tobytes()).hexdigest() for patch in batch.cpu()]

    def on_train_epoch_end(self, trainer, pl_module):  # before the averaged weights replace the current ones
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"patches-{trainer.global_rank}.txt").write_text("\n".join(self.patches))
        torch.save(pl_module.state_dict(), self.folder / f"weights-{trainer.global_rank}.pt")


class Sender(L.Callback):
    """Sends signals to this process, once, when a hook is called at a step."""

    def __init__(self, hook: str, step: int, signals: list[int]) -> None:
        self.step, self.signals = step, signals
        setattr(self, hook, self.send)

    def send(self, trainer, *args, **kwargs):
        while trainer.global_step == self.step and self.signals:
            signal.raise_signal(self.signals.pop(0))


class Killer(L.Callback):
    """Ends W&B's process when a hook is called at a step, as SLURM does with all processes of a job."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.kill)

    def kill(self, trainer, *args, **kwargs):
        if trainer.global_step == self.step:
            subprocess.run(["pkill", "-TERM", "-P", str(os.getpid()), "wandb-core"], check=True)
            time.sleep(0.5)  # until its end is known
