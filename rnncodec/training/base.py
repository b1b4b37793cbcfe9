"""What every training shares: schedule, seeds, the guard against divergence, and the record of validation."""

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

PROGRESS = ("psnr", "bpp", "loss")  # means of validation that the progress bar shows


def global_seed() -> int:
    """The seed that `lightning.seed_everything` has set."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class Validated(TypedDict):
    """What `validation_step` finds of an image, or of a batch of equal size.

    Attributes:
        values: by the name under which their means over all images are logged; nan does not count.
        points: of the rate-distortion curve of the image, for W&B's table; neither image nor codec need a name.
        pictures: the image and its reconstructions in a row, uint8 [3, H, W]; None if there are none.
    """

    values: dict[str, float]
    points: list[Point]
    pictures: Tensor | None


class Training(L.LightningModule):
    """What every training shares: schedule, seeds, and a guard against gradients that are not finite.

    Attributes:
        monitor: what decides on the best checkpoint, and whether its `min` or `max` is best.

    Args:
        learning_rate: of Adam or AdamW.
        weight_decay: decoupled, of every optimizer.
        warmup_steps: of the linear rise of all rates.
        decay_steps: of the linear fall of all rates to zero that ends with `trainer.max_steps`; a number below 1 is a
            share of them, 0 is for none.
        max_bad_steps: how many steps in a row with gradients that are not finite are skipped before training stops.
    """

    monitor: ClassVar[tuple[str, str]]

    def __init__(
        self, learning_rate: float, weight_decay: float, warmup_steps: int, decay_steps: float, max_bad_steps: int
    ) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.decay_steps = warmup_steps, decay_steps
        self.max_bad_steps = max_bad_steps
        self.started_from = ""  # the fingerprint of given weights, whose name may stand for others one day
        self.bad_steps = self.bad_steps_in_a_row = 0

    def plain_hyperparameters(self, **values: Any) -> None:
        """Makes the saved hyperparameters what the constructor takes: plain values, nothing of the command line's."""
        for key in ("_instantiator", "_class_path"):
            self.hparams.pop(key, None)
        self.hparams.update(values)

    def configure_model(self) -> None:
        # Constant buffers need no broadcast, which ranks with unequal shares of images would not all take part in.
        constants = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, constants)

    def scheduled(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer with its schedule, as Lightning takes it."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def learning_rate_factor(self, step: int) -> float:
        """Factor of the learning rates: a linear rise, a plateau, a linear fall that ends at `max_steps`."""
        factor = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay_steps and self.trainer.max_steps > 0:
            decay = self.decay_steps * (self.trainer.max_steps if self.decay_steps < 1 else 1)
            factor = min(factor, max(0.0, (self.trainer.max_steps - step) / decay))
        return factor

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The random state is a function of the batch, so that a resumed run draws the same bits.
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx * self.trainer.world_size + self.global_rank
        torch.manual_seed(global_seed() * 2**32 + number)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore[reportPrivateImportUsage]
        if torch.isfinite(norm):
            self.bad_steps_in_a_row = 0
        else:
            # Without gradients an optimizer leaves weights and moments as they are.
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
        self.started_from = checkpoint.get("started_from", "")  # not in those of former versions

    def configure_callbacks(self) -> list[L.Callback]:
        return [ValidationRecord()]

    def curve(self, means: Mapping[str, float]) -> list[Point]:
        """The mean rate-distortion curve, of the means of what `validation_step` finds; empty if there is none."""
        return []

    def charts(self, means: Mapping[str, float]) -> dict[str, Any]:
        """Further charts for W&B, of the same means."""
        return {}


class ValidationRecord(L.Callback):
    """Records what validation finds, in one place: means as metrics, and in W&B curves, tables and pictures."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Validated]] = []  # of the validation that runs, on this rank, by the images' names
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
        if batch_idx == 0 and found["pictures"] is not None:
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
        for key, mean in means.items():  # every rank has the same
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
        # Checkpoints only now: each of those on the way would stay on disk as a copy.
        folder = Path(trainer.default_root_dir)
        files = [path for name in ("last", "best") if (path := folder / f"{name}.ckpt").exists()]
        for run in wandb_runs(trainer):
            if self.curve:
                log_rates(run, self.curve)
            if files:
                log_files(run, "checkpoints", files)


def wandb_runs(trainer: L.Trainer) -> list[Run]:
    """The runs of W&B that this process logs to; none on ranks above zero."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are not nan; nan if there are none."""
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan
