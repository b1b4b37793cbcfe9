"""Exports training checkpoints as weights files, without running code that a checkpoint may contain."""

import json
import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rnncodec.codec import Codec
from rnncodec.entropy import ContextModel
from rnncodec.files.images import find_images, load_image, one_line
from rnncodec.network import CompressiveAutoencoder
from rnncodec.training.calibration import calibrate
from rnncodec.weights import (
    Network,
    WeightsError,
    canonical,
    context_config_of,
    described,
    fingerprint,
    load_weights,
    network_config_of,
    new_network,
    save_weights,
    stored,
)

# Errors while reading a file that is not a checkpoint of a training.
UNREADABLE = (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, RuntimeError, ValueError)
UNREADABLE += (ArithmeticError, AssertionError, ImportError, struct.error)  # unpicklers raise nearly anything


def add_allocation(source: str | os.PathLike[str], path: str | os.PathLike[str], photographs: Path) -> None:
    """Writes weights with what an encoder needs to choose iterations, see `rnncodec.training.calibration`.

    Args:
        source: weights of a latent network with its context model.
        path: the file to write, which may be the same.
        photographs: a folder.

    Raises:
        WeightsError: the weights are others, or damaged.
        ValueError: there are no photographs.
        OSError: a file cannot be read or written.
    """
    weights = load_weights(Path(source).absolute())
    if weights.context is None or weights.context.config.kind != "grouped":
        raise WeightsError(f"{os.fspath(source)}: not a latent network with its context model")
    images = [load_image(image) for image in find_images([photographs])]
    allocation = calibrate(Codec(weights), images)
    save_weights(path, weights.network, weights.name, weights.provenance, weights.context, allocation)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[Network, dict[str, str]]:
    """Loads the averaged network and the provenance from a checkpoint of a training.

    Raises:
        WeightsError: the file is no such checkpoint.
        OSError: the file cannot be read.
    """
    try:
        checkpoint = _load(path)
        network = _network(checkpoint)
        provenance = {
            "steps": str(checkpoint["global_step"]),
            "settings": canonical(_shared(checkpoint["hyper_parameters"])),
            "data": canonical(checkpoint["PatchDataModule"]),
            "seed": str(checkpoint["seed"]),
            "torch": torch.__version__,
            "lightning": checkpoint["pytorch-lightning_version"],
        }
        if checkpoint.get("started_from"):
            provenance["started_from"] = checkpoint["started_from"]
        provenance |= {key: canonical(value) for key, value in checkpoint.get("provenance", {}).items()}
    except UNREADABLE as error:
        # PyTorch's message is long and suggests loading in a way that would run code of the file.
        raise WeightsError(f"{os.fspath(path)}: not a checkpoint of a training ({type(error).__name__})") from error
    return network, provenance


def _load(path: str | os.PathLike[str]) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _network(checkpoint: Mapping[str, Any]) -> Network:
    """The averaged network of a checkpoint."""
    with torch.device("meta"):
        network = new_network(network_config_of(json.loads(json.dumps(checkpoint["hyper_parameters"]["network"]))))
    network.load_state_dict(_under(checkpoint, "network."), assign=True)
    if isinstance(network, CompressiveAutoencoder):
        network.tabulate()
    return network.eval()


def _under(checkpoint: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a checkpoint's state whose keys begin with a prefix, which is removed."""
    state: dict[str, Any] = checkpoint["state_dict"]
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for a file that may be shared, in which paths of other weights become names."""
    names = {key: Path(settings[key]).name for key in ("codec", "weights") if settings.get(key)}
    return {**settings, **names}


def add_context(checkpoint: str | os.PathLike[str], path: str | os.PathLike[str], name: str) -> None:
    """Adds a context model from a checkpoint to the weights of the codec on whose bits it was trained.

    Args:
        checkpoint: of `ContextTraining` or `JointTraining`.
        path: the weights file of that codec, which is replaced.
        name: of the context model in the checkpoint; `context` in a joint training.

    Raises:
        WeightsError: the checkpoint is invalid, has no such model, or was trained on another codec.
        OSError: a file cannot be read or written.
    """
    if not Path(path).is_file():
        raise WeightsError(f"{os.fspath(path)}: no such weights file to add a context model to")
    weights = load_weights(Path(path).absolute())
    try:
        loaded = _load(checkpoint)
        settings = json.loads(json.dumps(loaded["hyper_parameters"]))
        record = {"model": name, "steps": loaded["global_step"], "seed": loaded["seed"], "settings": _shared(settings)}
        record |= loaded.get("provenance", {})
        if "contexts" in settings:
            if loaded.get("started_from"):
                record["started_from"] = loaded["started_from"]
            configs, prefix, trained_on = settings["contexts"], f"contexts.{name}.", settings["fingerprint"]
        else:
            configs, prefix = {"context": settings["context"]}, "context."
            network = _network(loaded)
            trained_on = fingerprint(described(network.config), stored(network)).hex()
        if name not in configs:
            raise ValueError(f"no context model {name!r}, there are: {', '.join(configs)}")
        if trained_on != weights.fingerprint.hex():
            raise ValueError(f"trained on the codec {trained_on}, not on {os.fspath(path)}")
        config = context_config_of(configs[name], weights.network.config)
        state = _under(loaded, prefix)
        with torch.device("meta"):  # allocates no memory before the shapes are checked
            shapes = {key: tensor.shape for key, tensor in ContextModel(config).state_dict().items()}
        if shapes != {key: tensor.shape for key, tensor in state.items()}:
            raise ValueError("the tensors do not fit the config")
        model = ContextModel(config)
        model.load_state_dict(state)
        exact = model.quantize()
    except UNREADABLE as error:
        raise WeightsError(
            f"{os.fspath(checkpoint)}: no context model can be taken from it ({one_line(error)})"
        ) from error
    if fingerprint(described(weights.network.config), stored(weights.network)) != weights.fingerprint:
        raise WeightsError(f"{os.fspath(path)}: made by another version; export it again")
    provenance = weights.provenance | {"context": canonical(record)}
    save_weights(path, weights.network, weights.name, provenance, exact)
