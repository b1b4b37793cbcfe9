"""A callback for the tests of training, which writes each rank's patches and final weights to files."""

import hashlib
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
