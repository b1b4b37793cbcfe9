"""The base class of all trainings: learning rate schedule, seeds, guard against divergence, and logged validation."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import lightning as L
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from wandb.sdk.wandb_run import Run

from rnncodec.data import PatchDataModule
from rnncodec.metrics.curves import Point
from rnncodec.training.tracking import curve_charts, log_files, log_rates, points_table

PROGRESS = ("psnr", "bpp", "loss")  # validation means that the progress bar shows


def global_seed() -> int:
    """The seed that `lightning.seed_everything` has set, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class Validated(TypedDict):
    """The results of `validation_step` for one image, or a batch of images of equal size.

    Attributes:
        values: metrics, by the name under which their means over all images are logged; nan does not count.
        points: the rate-distortion curve of the image, for a W&B table; names of image and codec may be empty.
        pictures: the image and its reconstructions side by side, uint8 [3, H, W], for W&B; of the first image only.
    """

    values: dict[str, float]
    points: list[Point]
    pictures: Tensor | None


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
        torch.manual_seed(global_seed() * 2**32 + number)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore[reportPrivateImportUsage]
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

    def configure_callbacks(self) -> list[L.Callback]:
        return [ValidationRecord()]

    def curve(self, means: Mapping[str, float]) -> list[Point]:
        """The mean rate-distortion curve, from the means of all validation values; empty if there is none."""
        return []

    def charts(self, means: Mapping[str, float]) -> dict[str, Any]:
        """More charts for W&B, from the same means."""
        return {}


class ValidationRecord(L.Callback):
    """Logs the results of validation: means as metrics, and curves, tables and pictures to W&B."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Validated]] = []  # image names and results on this rank, of the current validation
        self.curve: list[Point] = []  # of the last validation

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = []  # an earlier validation may have been interrupted

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        found: Validated = outputs
        number = batch_idx * trainer.world_size + trainer.global_rank
        data = getattr(trainer, "datamodule", None)
        name = data.val_names[number] if isinstance(data, PatchDataModule) else str(number)
        if found["pictures"] is not None:
            strip = found["pictures"].permute(1, 2, 0).cpu().numpy()
            for run in wandb_runs(trainer):
                run.log({"val/reconstructions": [wandb.Image(strip, caption="original, then its reconstructions")]})
        self.found.append((name, {**found, "pictures": None}))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Training)
        shares: list[list[tuple[str, Validated]]] = [self.found] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(shares, self.found)
        images = sorted((image for share in shares for image in share), key=lambda image: image[0])
        means = {key: _mean([found["values"][key] for _, found in images]) for key in images[0][1]["values"]}
        for key, mean in means.items():  # equal on all ranks
            pl_module.log(f"val/{key}", mean, prog_bar=key in PROGRESS)
        self.curve = pl_module.curve(means)
        for run in wandb_runs(trainer):
            name = run.name or ""
            charts = pl_module.charts(means)
            if self.curve:
                points = [replace(p, image=image, codec=name) for image, found in images for p in found["points"]]
                charts |= {"val/images": points_table(points), **curve_charts({name: self.curve})}
            run.log(charts)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Checkpoints are logged only at the end, because W&B keeps a copy of each on disk.
        folder = Path(trainer.default_root_dir)
        files = [path for name in ("last", "best") if (path := folder / f"{name}.ckpt").exists()]
        for run in wandb_runs(trainer):
            if self.curve:
                log_rates(run, self.curve)
            if files:
                log_files(run, "checkpoints", files)


def wandb_runs(trainer: L.Trainer) -> list[Run]:
    """The W&B runs that this process logs to; none on ranks above zero."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are not nan; nan if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
