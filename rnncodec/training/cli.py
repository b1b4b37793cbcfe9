"""The command line of training: LightningCLI with the callbacks and loggers that every run has."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import wandb
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger

import rnncodec
from rnncodec.data import PatchDataModule
from rnncodec.files.errors import one_line
from rnncodec.training import (
    compressive,  # noqa: F401 - its class may be named in a config
    context,  # noqa: F401 - its classes may be named in a config
    tracking,
)
from rnncodec.training.base import Training
from rnncodec.training.checkpoints import AtomicCheckpointIO, LastCheckpoint, check_checkpoint
from rnncodec.training.flags import check_trainer
from rnncodec.training.folder import RunFolder, run_name
from rnncodec.training.help import Help, help_asked
from rnncodec.training.messages import UNION, innermost, messages
from rnncodec.training.optim import bfloat16_pays
from rnncodec.training.progress import TrainingProgress
from rnncodec.training.stopping import StopOnSignal


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
    "enable_model_summary": False,  # of one row
}


# What is told in one line: bad values, files and hardware. PyTorch reports much of this as RuntimeError.
FAILURES = (
    ValueError,
    OSError,
    ArithmeticError,
    ImportError,
    MemoryError,
    RuntimeError,
    MisconfigurationException,
    wandb.Error,
)


class RunConfig(SaveConfigCallback):
    """Writes the complete config beside the checkpoints of its run; a resumed run replaces it."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        if stage == "fit" and trainer.is_global_zero:
            self.parser.save(self.config, folder / "config.yaml", overwrite=True, multifile=self.multifile)


class Parser(LightningArgumentParser):
    """Lightning's parser, with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # it tries one of several types
            super().error(message, ex)
        print(f"{self.prog.partition(' ')[0]}: error: {innermost(message)}", file=sys.stderr)
        sys.exit(2)


class CodecCLI(LightningCLI):
    """Lightning's command line with a name for the run, and the callbacks and loggers that every run has.

    Args:
        claims: what a training claims, for as long as it needs it.
        asked: the help that the arguments ask for, if they do.
        options: of `LightningCLI`.
    """

    def __init__(self, claims: ExitStack, asked: Help | None, **options: Any) -> None:
        self.claims, self.asked = claims, asked
        super().__init__(model_class=asked.model if asked else Training, subclass_mode_model=asked is None, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="codec", help="name of the run and of its folder in runs/")
        parser.add_argument("--checkpoint_minutes", type=NonNegativeFloat, default=5.0, help="time between checkpoints")
        parser.add_lightning_class_args(EMAWeightAveraging, "ema")
        # Buffers are constants, or averages themselves, and are taken as they are.
        parser.set_defaults({"ema.decay": 0.999, "ema.use_buffers": False, "seed_everything": 0})
        if self.asked is None:
            # Configs name other trainings by their class_path.
            parser.set_defaults({"model": {"class_path": "rnncodec.training.module.CodecTraining"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments, or shows the help that they ask for."""
        if self.asked is not None:
            try:
                self._parser(self.asked.subcommand).set_defaults(self.asked.defaults)
            except KeyError as error:
                raise ValueError(f"--config: {error.args[0]}") from error
            args = [self.asked.subcommand, "--help"]
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Keeps the settings of a resumed run's config and command line; Lightning would take the checkpoint's."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, of which Lightning has more, and the arguments of the Trainer's methods to leave out."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config: Namespace = self.config[str(self.subcommand)]
        trainer: Namespace = self._get(self.config_init, "trainer")
        check_trainer(config.trainer)
        config.name = run_name(config.name)
        self.folder = RunFolder(Path(config.trainer.default_root_dir or "runs"), config.name)
        path = config.get("ckpt_path")
        if path == "last":  # a job that is requeued says the same at every start
            path = str(self.folder.last) if self.subcommand != "fit" or self.folder.last.exists() else None
            self.config_init[str(self.subcommand)].ckpt_path = path
        if path and Path(path).exists():
            check_checkpoint(Path(path), self.model)
        callbacks = _listed(trainer.callbacks)
        if trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(TrainingProgress())
        if self.subcommand == "fit":
            if not trainer.fast_dev_run:
                self.claims.enter_context(self.folder.claim(resumed=bool(path)))
            callbacks = [*self.run_callbacks(config), *callbacks]
            if trainer.logger is None or trainer.logger is True:
                kwargs["logger"] = self.run_loggers(config.name)
        elif trainer.logger is None or trainer.logger is True:
            kwargs["logger"] = False  # the results are printed, and the run stays as it is
        kwargs |= {
            "callbacks": callbacks,
            "plugins": [AtomicCheckpointIO(), *_listed(trainer.plugins)],
            "default_root_dir": self.folder.path,
        }
        try:
            return super().instantiate_trainer(**kwargs)
        except TypeError as error:  # of a value that is not for this accelerator
            raise ValueError(one_line(error)) from error

    def run_loggers(self, name: str) -> list[Logger]:
        """The loggers of every training."""
        folder = self.folder.path
        wandb_logger = tracking.Tracker(
            name=os.environ.get("WANDB_NAME") or name,
            save_dir=folder,
            id=self.folder.run_id,
            resume="allow",
            job_type="training",
            **tracking.settings(folder),
        )
        wandb_logger._wandb_init.pop("anonymous", None)  # of which W&B warns, although it is None
        # The other makes a new version for each start, so nothing is overwritten.
        return [CSVLogger(folder, name="metrics"), wandb_logger]

    def run_callbacks(self, config: Namespace) -> list[L.Callback]:
        """The callbacks of every training, but for those that its arguments turn off."""
        callbacks: list[L.Callback] = []
        if config.trainer.enable_checkpointing is not False:
            monitor, mode = self.model.monitor
            callbacks += [
                LastCheckpoint(
                    self.folder.path,
                    filename="last",
                    train_time_interval=timedelta(minutes=config.checkpoint_minutes),
                    enable_version_counter=False,
                ),
                ModelCheckpoint(
                    self.folder.path,
                    filename="best",
                    monitor=monitor,
                    mode=mode,
                    enable_version_counter=False,
                    save_on_train_epoch_end=False,
                ),
            ]
        if config.trainer.logger is not False:
            callbacks.append(LearningRateMonitor("step"))
        return callbacks


def _listed(value: Any) -> list[Any]:
    """A list of what may be one thing, a list of them, or None."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


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


def reason(error: BaseException) -> str:
    """What an error says in one line; of one in a process that reads data, which comes as pages, the last line."""
    text = str(error).strip()
    if text.startswith("Caught ") and "DataLoader worker" in text:
        return text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return innermost(text) if text.startswith(UNION) else one_line(error)


def main(args: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Runs the command line with given arguments, or those of the process.

    Returns:
        The exit status: 1 after a failure, 128 and the number of the signal that ended the training.
    """
    stop = StopOnSignal()
    try:
        arguments = with_subcommand(with_configs(sys.argv[1:] if args is None else args))
        asked = help_asked(arguments, CodecCLI.subcommands())
        with messages(program), stop, ExitStack() as claims:
            CodecCLI(
                claims,
                asked,
                datamodule_class=PatchDataModule,
                trainer_defaults={**DEFAULTS, "callbacks": stop},
                save_config_callback=RunConfig,
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                args=arguments,
                parser_kwargs={"prog": program, **(asked.parser_options if asked else {})},
            )
        status = stop.status
    except FAILURES as error:
        print(f"{program}: error: {reason(error)}", file=sys.stderr)
        status = 1
    except (KeyboardInterrupt, SystemExit) as end:
        if stop.signal is None or (isinstance(end, SystemExit) and end.code == 0):  # of the parser, or another process
            raise
        resume = f"--ckpt_path {stop.saved} resumes it" if stop.saved else "nothing is saved"
        print(f"{program}: stopped by {signal.Signals(stop.signal).name}; {resume}", file=sys.stderr)
        status = stop.status
    for end in wandb.finish, wandb.teardown:
        with suppress(ConnectionError, SystemExit):  # W&B's process may have ended by the same signal, as under SLURM
            end(status)
    return status
