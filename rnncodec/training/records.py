"""What every training records in checkpoints and W&B: what it depends on, and the results of its validations."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import lightning as L
import torch
import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from wandb.sdk.wandb_run import Run

from rnncodec.data import PatchDataModule
from rnncodec.data.manifest import manifest_of
from rnncodec.metrics.curves import DRAWN, Point, area
from rnncodec.training import tracking
from rnncodec.training.artifacts import checkpoints_artifact, images_artifact, use, weights_artifact
from rnncodec.training.provenance import (
    data_facts,
    global_seed,
    macs_per_pixel,
    parameters,
    source,
    trainer_facts,
    versions,
)
from rnncodec.weights import load_weights

if TYPE_CHECKING:
    from rnncodec.training.base import Training

VALIDATED = ("psnr", "ms_ssim")  # metrics of the validation of codecs
PROGRESS = ("psnr", "bpp", "loss")  # validation means that the progress bar shows


class Validated(TypedDict):
    """The results of `validation_step` for one image, or a batch of images of equal size.

    Attributes:
        values: metrics, by the name under which their means over all images are logged; nan does not count.
        points: the rate-distortion curve of the image, for a W&B table; names of image and codec may be empty.
        reconstructions: the original and the reconstruction of each point, uint8 [3, H, W]; of the first image only.
        maps: more pictures of the first image, by name.
    """

    values: dict[str, float]
    points: list[Point]
    reconstructions: list[Tensor]
    maps: dict[str, Tensor]


class TrainingRecord(L.Callback):
    """Records what a training depends on, in its checkpoints and, when it starts, in W&B."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}  # for checkpoints, from which weights may be shared: without paths
        self.starts: list[dict[str, Any]] = []  # source and images of all starts of the run that differ in them

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data = getattr(trainer, "datamodule", None)
        manifest = manifest_of(data) if isinstance(data, PatchDataModule) else None
        drawn = data_facts(data, manifest) if isinstance(data, PatchDataModule) and manifest else {}
        start = {"source": source(), "images": drawn.get("fingerprint")}
        self.starts = [*(each for each in self.starts if each != start), start]
        network = getattr(pl_module, "network", None)
        runs = wandb_runs(trainer)
        self.facts = {
            **({"run": {"id": runs[0].id, "name": runs[0].name}} if runs else {}),
            "source": start["source"],
            "images": drawn,
            "trainer": trainer_facts(trainer),
            "starts": self.starts,
        }
        with tracking.outlived():
            for run in runs:
                path = Path(trainer.default_root_dir) / "config.yaml"
                tracking.describe(
                    run,
                    {
                        **{key: value for key, value in self.facts.items() if key not in ("run", "images")},
                        "data": drawn | ({"root": manifest.root} if manifest else {}),
                        "seed": global_seed(),
                        "versions": versions(),
                        "parameters": parameters(pl_module),
                        "macs_per_pixel": macs_per_pixel(network.config) if network else {},
                        "config": yaml.safe_load(path.read_text()) if path.exists() else {},
                        **pl_module.hparams,
                    },
                    manifest,
                )
                if manifest is not None:
                    use(run, images_artifact(manifest))
                given = (pl_module.hparams.get(key) for key in ("weights", "codec"))
                use(run, *(weights_artifact(load_weights(name)) for name in given if name))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["provenance"] = self.facts

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.starts = checkpoint.get("provenance", {}).get("starts", [])  # missing in those of earlier versions


class ValidationRecord(L.Callback):
    """Logs the results of validation: means as metrics, and curves, tables and pictures to W&B."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Validated]] = []  # image names and results on this rank, of the current validation
        self.pictures: list[tuple[str, Validated]] = []  # those of the first image, which stay on this rank
        self.curve: list[Point] = []  # of the last validation

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found, self.pictures = [], []  # an earlier validation may have been interrupted

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
        if found["reconstructions"]:
            self.pictures.append((name, found))
        self.found.append((name, {**found, "reconstructions": [], "maps": {}}))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        training = cast("Training", pl_module)
        shares: list[list[tuple[str, Validated]]] = [self.found] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(shares, self.found)
        images = sorted((image for share in shares for image in share), key=lambda image: image[0])
        means = {key: _mean([found["values"][key] for _, found in images]) for key in images[0][1]["values"]}
        self.curve = training.curve(means)
        areas = {f"area_{metric}": area(self.curve, metric, None, _end(self.curve)) for metric in DRAWN}
        means |= {key: value for key, value in areas.items() if not math.isnan(value)}
        for key, mean in means.items():  # equal on all ranks
            training.log(f"val/{key}", mean, prog_bar=key in PROGRESS)
        with tracking.outlived():
            for run in wandb_runs(trainer):
                name = run.name or ""
                charts = training.charts(means)
                shown: dict[tuple[str, float], wandb.Image] = {}
                for image, found in self.pictures:
                    strip = torch.cat(found["reconstructions"], -1)
                    charts["val/reconstructions"] = [_picture(strip, "original, then its reconstructions")]
                    charts |= {f"val/{key}": [_picture(pixels, image)] for key, pixels in found["maps"].items()}
                    decoded = zip(found["points"], found["reconstructions"][1:], strict=True)
                    shown |= {(image, point.setting): _picture(pixels) for point, pixels in decoded}
                if self.curve:
                    points = [replace(p, image=image, codec=name) for image, found in images for p in found["points"]]
                    charts |= {
                        "val/images": tracking.points_table(points, shown),
                        **tracking.curve_charts({name: self.curve}),
                    }
                run.log(charts)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Checkpoints are logged only at the end, because W&B keeps a copy of each on disk.
        folder = Path(trainer.default_root_dir)
        with tracking.outlived():
            for run in wandb_runs(trainer):
                if self.curve:
                    tracking.log_rates(run, self.curve)
                if list(folder.glob("*.ckpt")):
                    run.log_artifact(checkpoints_artifact(folder, {"steps": trainer.global_step}))


def wandb_runs(trainer: L.Trainer) -> list[Run]:
    """The W&B runs that this process logs to; none on ranks above zero, or if W&B is disabled or its process ended."""
    if not trainer.is_global_zero:
        return []
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    runs = [logger.experiment for logger in loggers if not (isinstance(logger, tracking.Tracker) and logger.lost)]
    return [run for run in runs if not run.disabled]


def _picture(pixels: Tensor, caption: str | None = None) -> wandb.Image:
    """A picture, from uint8 [3, H, W]."""
    return wandb.Image(pixels.permute(1, 2, 0).cpu().numpy(), caption=caption)


def _end(curve: Sequence[Point]) -> float:
    """The highest rate of a curve."""
    return max((point.bpp for point in curve), default=0.0)


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are not nan; nan if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
