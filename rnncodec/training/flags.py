"""Arguments of Lightning's Trainer that training here cannot do, told in one line before anything starts."""

from collections.abc import Mapping
from typing import Any

# Others compute in weights of fewer or more bits, or need other hardware.
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "32", "16", "bf16")
# Others divide the weights among processes, of which there could be no averages, or send them to processes.
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", "single_device")
LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}


def check_trainer(config: Mapping[str, Any]) -> None:
    """Checks the arguments of the Trainer.

    Raises:
        ValueError: training cannot do what one of them asks for; the message is one line.
    """
    for name, allowed in (("precision", PRECISIONS), ("strategy", STRATEGIES)):
        value = config[name]
        if isinstance(value, str | int) and str(value) not in allowed:
            raise ValueError(f"--trainer.{name} is one of {', '.join(allowed)}, not {value}")
    for name, least in LEAST.items():
        if config[name] is not None and config[name] < least:
            raise ValueError(f"--trainer.{name} must be at least {least}, not {config[name]}")
    interval = config["val_check_interval"]
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(f"--trainer.val_check_interval must be above 0, not {interval}")
    if config["overfit_batches"]:
        raise ValueError("--trainer.overfit_batches is not for an endless stream of patches: use a small --data.root")
    if config["barebones"]:
        raise ValueError("--trainer.barebones leaves out what every run has: checkpoints, metrics and averaged weights")
