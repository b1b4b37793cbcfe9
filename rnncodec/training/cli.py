"""The command line of training: LightningCLI with the callbacks and loggers that every run has."""

import os
import sys
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from jsonargparse import Namespace
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

import rnncodec
from rnncodec.data import PatchDataModule
from rnncodec.training import (
    context,  # noqa: F401 - its classes may be named in a config
    tracking,
)
from rnncodec.training.base import Training
from rnncodec.training.optim import bfloat16_pays


def default_precision() -> str:
    """The default precision: `bf16-mixed`, or `32-true` without a GPU on a processor where bfloat16 is slow."""
    return "bf16-mixed" if torch.accelerator.is_available() or bfloat16_pays(torch.device("cpu")) else "32-true"


PACKAGE = Path(rnncodec.__file__).parent
CONFIGS = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())

DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "precision": default_precision(),
    "gradient_clip_val": 1.0,
    "max_epochs": -1,  # no limit, as the stream of patches is endless; max_steps or max_time stops the training
    "max_steps": 1_000_000,
    "val_check_interval": 5000,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 50,
    "num_sanity_val_steps": 0,
}


class RunConfig(SaveConfigCallback):
    """Writes the complete config beside the checkpoints of its run; a resumed run replaces it."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / "config.yaml", overwrite=True, multifile=self.multifile)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it, so that a killed run leaves a complete one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        super().save_checkpoint(checkpoint, f"{path}.part", storage_options)
        os.replace(f"{path}.part", path)


class LastCheckpoint(ModelCheckpoint):
    """Saves a checkpoint at intervals and at the end of training, before averaged weights replace the current ones."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.dirpath is not None
        trainer.save_checkpoint(Path(self.dirpath) / f"{self.filename}.ckpt")


class CodecCLI(LightningCLI):
    """Lightning's command line with a name for the run, and the callbacks and loggers that every run has."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="codec", help="name of the run and of its folder in runs/")
        parser.add_argument("--checkpoint_minutes", type=float, default=5.0, help="time between checkpoints")
        parser.add_lightning_class_args(EMAWeightAveraging, "ema")
        # All buffers are constants, so averages need not include them.
        parser.set_defaults({"ema.decay": 0.999, "ema.use_buffers": False, "seed_everything": 0})
        # Configs name other trainings by their class_path.
        parser.set_defaults({"model": {"class_path": "rnncodec.training.module.CodecTraining"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments, in which names of shipped configs are allowed."""
        self.config = parser.parse_args(with_subcommand(with_configs(sys.argv[1:] if args is None else args)))

    def _parse_ckpt_path(self) -> None:
        """Keeps the settings of a resumed run's config and command line; Lightning would take the checkpoint's."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config: Namespace = self.config[str(self.subcommand)] if self.subcommand else self.config
        folder = Path(config.trainer.default_root_dir or "runs") / config.name
        last = folder / "last.ckpt"
        resumed = config.get("ckpt_path") or list(folder.glob("hpc_ckpt_*.ckpt"))  # these are left by a SLURM requeue
        if self.subcommand == "fit" and last.exists() and not resumed:
            raise FileExistsError(f"{last} is of an earlier run: resume it with --ckpt_path or choose another --name")
        run_id = folder / "wandb-id.txt"
        if getattr(rank_zero_only, "rank", 0) == 0 and not (resumed and run_id.exists()):
            folder.mkdir(parents=True, exist_ok=True)
            run_id.write_text(uuid.uuid4().hex[:8])
        if not config.trainer.logger and config.trainer.logger is not False:
            kwargs["logger"] = [
                CSVLogger(folder, name="metrics"),  # makes a new version for each start, so nothing is overwritten
                WandbLogger(
                    name=config.name,
                    save_dir=folder,
                    id=run_id.read_text() if run_id.exists() else None,
                    resume="allow",
                    job_type="training",
                    **tracking.settings(folder),
                ),
            ]
        monitor, mode = self.model.monitor
        callbacks: list[L.Callback] = [
            LastCheckpoint(
                folder,
                filename="last",
                train_time_interval=timedelta(minutes=config.checkpoint_minutes),
                enable_version_counter=False,
            ),
            ModelCheckpoint(
                folder,
                filename="best",
                monitor=monitor,
                mode=mode,
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            ),
        ]
        if config.trainer.logger is not False:
            callbacks.append(LearningRateMonitor("step"))
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(RichProgressBar())
        kwargs["callbacks"] = [*callbacks, *(self._get(self.config_init, "trainer").get("callbacks") or [])]
        plugins = self._get(self.config_init, "trainer").get("plugins") or []
        kwargs["plugins"] = [AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])]
        kwargs["default_root_dir"] = folder
        return super().instantiate_trainer(**kwargs)


def with_configs(args: Sequence[str]) -> list[str]:
    """Replaces the names of shipped configs in the arguments by their paths."""
    found = []
    for before, arg in zip(["", *args], args, strict=False):
        option, _, value = arg.partition("=")
        if before in ("-c", "--config"):
            found.append(config_path(arg))
        elif option == "--config" and value:
            found.append(f"{option}={config_path(value)}")
        else:
            found.append(arg)
    return found


def with_subcommand(args: Sequence[str]) -> list[str]:
    """Puts `fit` in front of arguments that name no subcommand."""
    bare = bool(args) and args[0] not in ("-h", "--help") and not set(args) & set(CodecCLI.subcommands())
    return ["fit", *args] if bare else list(args)


def config_path(name: str) -> str:
    """The path of a config, given its path or the bare name of a shipped one, with or without `.yaml`."""
    shipped = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    return str(shipped) if not Path(name).exists() and Path(name).name == name and shipped.is_file() else name


def main(args: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Runs the command line with given arguments, or those of the process; returns the exit status."""
    try:
        CodecCLI(
            Training,
            PatchDataModule,
            subclass_mode_model=True,
            trainer_defaults=DEFAULTS,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            args=args,
            parser_kwargs={"prog": program},
        )
    except (ValueError, OSError, FloatingPointError, wandb.Error) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    return 0
