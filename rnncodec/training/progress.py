"""The progress of a training: a bar on a terminal, elsewhere a line now and then."""

import sys
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

SECONDS = 60  # between two lines at least
RECENT = 50  # steps over which speed is measured


class Pace:
    """How fast a training is, and how long the rest takes.

    Args:
        step: at which the training starts.
        clock: gives seconds.
    """

    def __init__(self, step: int, clock: Callable[[], float] = monotonic) -> None:
        self._clock, self._begun = clock, clock()
        self._pixels, self._paused = 0, 0.0
        self._recent = deque([(0.0, step, 0)], RECENT + 1)  # seconds without validations, steps and pixels so far

    def advance(self, step: int, pixels: int) -> None:
        """Notes that a batch of so many pixels has been trained on, and the step that training has reached."""
        self._pixels += pixels
        self._recent.append((self._clock() - self._begun - self._paused, step, self._pixels))

    def pause(self, seconds: float) -> None:
        """Notes how long a validation took."""
        self._paused += seconds

    @property
    def speed(self) -> float:
        """Pixels per second, without validations."""
        (begin, _, before), (end, _, after) = self._recent[0], self._recent[-1]
        return (after - before) / (end - begin) if end > begin else 0.0

    def left(self, steps: int) -> float | None:
        """The seconds that more steps take, with the share of validations so far; None before the first step."""
        (begin, first, _), (end, last, _) = self._recent[0], self._recent[-1]
        return steps * (end - begin) / (last - first) * (1 + self._paused / end) if last > first and end else None


class TrainingProgress(ProgressBar):
    """Shows steps, pixels per second, the time left, and metrics, of which a line follows each validation.

    Lines come at most once in each logging interval, and at most once a minute.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._steps = self._images = TaskID(0)
        self._pace: Pace | None = None
        self._metrics: dict[str, Any] = {}
        self._validates_since = self._said = 0.0
        self._said_step = -1

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        where = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
        self._say(f"{type(pl_module).__name__}: {parameters:,} parameters, on {where}, {trainer.precision}")
        self._pace = Pace(trainer.global_step)
        self._open()
        if self._bar:
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._steps = self._bar.add_task("", what="training", total=total, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._pace
        step = trainer.global_step
        self._pace.advance(step, batch.shape[0] * batch.shape[-2] * batch.shape[-1] * trainer.world_size)
        interval = getattr(trainer, "log_every_n_steps")  # noqa: B009 - set by a connector, which pyright does not see
        logs = bool(interval) and step % interval == 0
        if logs:  # on a GPU, reading metrics waits for all steps before
            self._metrics = self.get_metrics(trainer, pl_module)
        if self._bar:
            self._bar.update(self._steps, completed=step, description=self._state(trainer))
        elif logs and monotonic() - self._said >= SECONDS:
            self._report(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        if trainer.global_step != self._said_step:
            self._metrics = self.get_metrics(trainer, pl_module)
            self._report(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validates_since = monotonic()
        self._open()
        if self._bar:
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            self._images = self._bar.add_task("", what="validating", total=sum(batches))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self._bar:
            self._bar.advance(self._images)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar:
            self._bar.remove_task(self._images)
        if self._pace:
            self._pace.pause(monotonic() - self._validates_since)
            self._metrics = self.get_metrics(trainer, pl_module)
            self._report(trainer)
        else:
            self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return dict(trainer.progress_bar_metrics)

    def _open(self) -> None:
        console = Console(stderr=True)
        if self._enabled and self._bar is None and console.is_terminal:
            columns = TextColumn("{task.fields[what]}"), BarColumn(), MofNCompleteColumn()
            self._bar = Progress(
                *columns, TextColumn("{task.description}", markup=False), console=console, transient=True
            )
            self._bar.start()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        if self._enabled:
            print(line, file=sys.stderr, flush=True)
            self._said = monotonic()

    def _report(self, trainer: L.Trainer) -> None:
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        self._say(f"step {trainer.global_step}{of}: {self._state(trainer)}")
        self._said_step = trainer.global_step

    def _state(self, trainer: L.Trainer) -> str:
        """Speed, time left and metrics."""
        assert self._pace
        found = [f"{self._pace.speed / 1e6:.3g} MP/s"]
        left = self._left(trainer, self._pace)
        if left is not None:
            found.append(f"{timedelta(seconds=max(0, round(left)))} left")
        return ", ".join([*found, *(f"{name} {value:.4g}" for name, value in self._metrics.items())])

    def _left(self, trainer: L.Trainer, pace: Pace) -> float | None:
        """The seconds to max_steps or max_time, whichever comes first; None if neither is known."""
        ends = []
        if trainer.max_steps > 0:
            ends.append(pace.left(trainer.max_steps - trainer.global_step))
        timers = (callback for callback in trainer.callbacks if isinstance(callback, Timer))  # pyright: ignore[reportAttributeAccessIssue]
        ends += [timer.time_remaining() for timer in timers]
        return min((end for end in ends if end is not None), default=None)
