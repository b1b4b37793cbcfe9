"""Ends a training on a signal after its current step, with a checkpoint from which it can be resumed."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

import lightning as L

from rnncodec.training.checkpoints import last_checkpoint

# Ctrl-C, what SLURM sends a job that it preempts, and what a script may have it send ahead of the end of its time.
SIGNALS = tuple(
    s for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (s := getattr(signal, name, None))
)  # not all on Windows


class StopOnSignal(L.Callback):
    """Ends a training on a first signal, with last.ckpt as of the end of a step, and the process on a second one.

    It handles signals between `__enter__` and `__exit__`. Before the first step and after the last one, where there is
    nothing to save, a first signal raises KeyboardInterrupt. Of several processes, all end after the same step if a
    signal reaches one of them. List it after all callbacks that the end of a step changes.

    Attributes:
        signal: number of the signal that has arrived; None before.
        saved: last.ckpt, if it holds all steps that were done.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.saved: Path | None = None
        self._waits = False  # for the end of a step
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            # A signal that is ignored, as Ctrl-C is for jobs in the background of a script, stays so.
            self._before = {s: before for s in SIGNALS if (before := signal.getsignal(s)) is not signal.SIG_IGN}
            self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _watch(self) -> None:
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
        if not self._waits:
            raise KeyboardInterrupt
        # Not with print, which the signal may have interrupted.
        os.write(2, b"\nstopping after this step, or this validation; another signal ends at once\n")

    @property
    def status(self) -> int:
        """The exit status: 128 and the number of the signal, as shells report it; 0 without a signal."""
        return 128 + self.signal if self.signal else 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch()  # Lightning has just registered a handler of SIGTERM that saves nothing
        self._waits = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients would be lost
        if not trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False):
            return
        self.signal = self.signal or signal.SIGTERM  # of another process
        self.saved = last_checkpoint(trainer)
        if self.saved is not None:
            trainer.save_checkpoint(self.saved, weights_only=False)
        # A process that launched the others would be killed if they failed.
        raise SystemExit(self.status if trainer.is_global_zero else 0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._waits = False
        self.saved = last_checkpoint(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._watch()  # Lightning ignores Ctrl-C from here on
        self._waits = False
