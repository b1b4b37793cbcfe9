"""Finds out what results depend on: source, versions, data, settings, and the size of the network."""

import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rnncodec
from rnncodec.data import PatchDataModule
from rnncodec.data.cache import CACHE_VERSION
from rnncodec.data.manifest import Manifest
from rnncodec.network import AnyConfig, CompressiveAutoencoder, CompressiveConfig
from rnncodec.weights import new_network

PACKAGES = ("torch", "lightning", "numpy", "pillow", "torchmetrics", "constriction", "safetensors", "wandb")
PATIENCE = 10  # seconds that git may take
SIDE = 1024  # of the image whose cost is counted, in pixels; at small ones the margins of valid convolutions count
DRAWN = ("batch_size", "patch_size", "tile_size", "selection", "patches_per_image", "flips", "max_pixels")


def global_seed() -> int:
    """The seed that `lightning.seed_everything` has set, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def source() -> dict[str, Any]:
    """The version of the package and, where its files are in a git repository, the commit and whether files differ."""
    found: dict[str, Any] = {"version": rnncodec.__version__}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(rnncodec.__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else the repository is another, with an environment in it
        commit, _, dirty = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").partition("-")
    except (OSError, subprocess.SubprocessError):
        return found
    return found | {"commit": commit, "dirty": bool(dirty)}


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages on which results depend."""
    found = {"python": platform.python_version(), "rnncodec": rnncodec.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def data_facts(data: PatchDataModule, manifest: Manifest) -> dict[str, Any]:
    """What a training draws its patches from, and how; without paths, which may be private."""
    return {
        "fingerprint": manifest.fingerprint,
        "train": manifest.images["train"],
        "val": manifest.images.get("val", 0),
        "cache_version": CACHE_VERSION,
        "seed": data.seed,
        **{name: getattr(data, name) for name in DRAWN},
    }


def trainer_facts(trainer: L.Trainer) -> dict[str, Any]:
    """What a training does with each batch, and how often."""
    return {
        "max_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
    }


def parameters(module: nn.Module) -> dict[str, int]:
    """The number of parameters of each part of a training."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}


def macs_per_pixel(config: AnyConfig | CompressiveConfig) -> dict[str, float]:
    """Multiply-accumulates of a network for each pixel of a large image, without those of a context model.

    Returns:
        Those of `analysis` and `synthesis`, once for each image and each picture of it. For recurrent networks also
        those of `encoder` and `decoder` in an iteration, and in the first one, which has no hidden states yet but may
        have extra runs. An encoder runs both in each iteration, a decoder only the second.
    """
    with torch.device("meta"), torch.no_grad():  # computes shapes alone
        network = new_network(config).eval()
        x = torch.zeros(1, 3, SIDE, SIDE)
        if isinstance(network, CompressiveAutoencoder):
            whole = slice(0, SIDE // network.config.stride)
            y, analysis = _counted(lambda: network.analyse(x, whole, whole))
            _, synthesis = _counted(lambda: network.synthesise(y))
            return {"analysis": analysis["Global"], "synthesis": synthesis["Global"]}
        y, analysis = _counted(lambda: network.analyse(x))
        found, state = {"analysis": analysis["Global"]}, None
        for suffix in ("_first", ""):
            step, costs = _counted(lambda state=state: network(state, y=y))
            state = step.state
            encoder = costs["RecurrentCodec.encoder"] + costs["RecurrentCodec.binarizer"]
            found |= {f"encoder{suffix}": encoder, f"decoder{suffix}": costs["Global"] - encoder}
        _, synthesis = _counted(lambda: network.picture(state))
        return found | {"synthesis": synthesis["Global"]}


def _counted(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result of work, and its multiply-accumulates per pixel by module; `Global` stands for all."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    counts = {name: sum(each.values()) / 2 / SIDE**2 for name, each in counter.get_flop_counts().items()}
    return result, {"Global": 0.0, **counts}  # a multiply-accumulate counts as two operations
