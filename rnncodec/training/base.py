"""The base class of all trainings: learning rate schedule, seeds, guard against divergence, and what is recorded."""

import random
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from torch.nn.parallel import DistributedDataParallel

from rnncodec.metrics.curves import Point
from rnncodec.training.provenance import global_seed
from rnncodec.training.records import TrainingRecord, ValidationRecord


class Training(L.LightningModule):
    """The base class of trainings, with a learning rate schedule, seeds, and a guard against non-finite gradients.

    Attributes:
        monitor: the metric that selects the best checkpoint, and whether its `min` or `max` is best.

    Args:
        learning_rate: of Adam or AdamW.
        weight_decay: decoupled weight decay of every optimizer.
        warmup_steps: steps in which all learning rates rise linearly.
        decay_steps: steps in which all learning rates fall linearly to zero, up to `trainer.max_steps`; a number below
            1 is a fraction of `trainer.max_steps`, and 0 means no fall.
        max_bad_steps: how many steps in a row with non-finite gradients are skipped before training stops.
    """

    monitor: ClassVar[tuple[str, str]]

    def __init__(
        self, learning_rate: float, weight_decay: float, warmup_steps: int, decay_steps: float, max_bad_steps: int
    ) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.decay_steps = warmup_steps, decay_steps
        self.max_bad_steps = max_bad_steps
        self.started_from = ""  # fingerprint of the given weights, whose name may later refer to others
        self.bad_steps = self.bad_steps_in_a_row = 0

    def plain_hyperparameters(self, **values: Any) -> None:
        """Updates the saved hyperparameters with plain values, and removes what the command line added."""
        for key in ("_instantiator", "_class_path"):
            self.hparams.pop(key, None)
        self.hparams.update(values)

    def setup(self, stage: str) -> None:
        # Buffers are constant and need no broadcast, which would hang on ranks with unequal numbers of images.
        constants = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, constants)

    def scheduled(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer and its learning rate schedule, as Lightning expects them."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def learning_rate_factor(self, step: int) -> float:
        """The factor of all learning rates: a linear rise, a plateau, and a linear fall that ends at `max_steps`."""
        factor = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay_steps and self.trainer.max_steps > 0:
            decay = self.decay_steps * (self.trainer.max_steps if self.decay_steps < 1 else 1)
            factor = min(factor, max(0.0, (self.trainer.max_steps - step) / decay))
        return factor

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The random state depends on the batch alone, so that a resumed run draws the same bits.
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx * self.trainer.world_size + self.global_rank
        # It has 32 bits, as the generators of processors ignore all others.
        torch.manual_seed(random.Random(f"{global_seed()} {number} noise").getrandbits(32))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Before they are clipped, which Lightning does afterwards.
        owners = [(_part(name), p.grad) for name, p in self.named_parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([gradient for _, gradient in owners]))  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.linalg.vector_norm(norms)
        for part in dict.fromkeys(part for part, _ in owners):
            own = norms[[i for i, (owner, _) in enumerate(owners) if owner == part]]
            self.log(f"train/gradient_norm_{part}", torch.linalg.vector_norm(own))
        if torch.isfinite(norm):
            self.bad_steps_in_a_row = 0
        else:
            # Without gradients, the optimizers change neither weights nor moments.
            for parameter in self.parameters():
                parameter.grad = None
            self.bad_steps += 1
            self.bad_steps_in_a_row += 1
            if self.bad_steps_in_a_row > self.max_bad_steps:
                raise FloatingPointError(f"gradients were not finite in {self.bad_steps_in_a_row} steps in a row")
        self.log("train/gradient_norm", norm)
        self.log("train/skipped_steps", float(self.bad_steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bad_steps"], checkpoint["seed"] = self.bad_steps, global_seed()
        checkpoint["started_from"] = self.started_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.bad_steps = checkpoint["bad_steps"]
        self.started_from = checkpoint.get("started_from", "")  # missing in checkpoints of earlier versions
        before: dict[str, Any] = checkpoint.get("hyper_parameters", {})
        rates = [name for name in before if name.endswith("learning_rate") or name == "weight_decay"]
        kept = [name for name in rates if before[name] != self.hparams.get(name, before[name])]
        if kept:  # they are in the state of the optimizer
            warnings.warn(f"a resumed run keeps its {' and '.join(kept)}; what is given has no effect", stacklevel=1)

    def configure_callbacks(self) -> list[L.Callback]:
        return [TrainingRecord(), ValidationRecord()]

    def curve(self, means: Mapping[str, float]) -> list[Point]:
        """The mean rate-distortion curve, from the means of all validation values; empty if there is none."""
        return []

    def charts(self, means: Mapping[str, float]) -> dict[str, Any]:
        """More charts for W&B, from the same means."""
        return {}


def _part(name: str) -> str:
    """The part of a training that a parameter belongs to, such as `encoder`, `decoder` or `context`."""
    first, *rest = name.split(".")
    return rest[0] if rest and first in ("network", "contexts") else first
