"""Saves and loads trained weights as safetensors files, which a fingerprint identifies."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from rnncodec.allocation import QUALITIES, Allocation, TuneName
from rnncodec.entropy import SCALE, ContextConfig, ContextModel
from rnncodec.files.format import NAME_PATTERN, Header
from rnncodec.files.images import atomic_write, one_line
from rnncodec.network import (
    AnyConfig,
    CompressiveAutoencoder,
    CompressiveConfig,
    LatentConfig,
    Questions,
    RecurrentCodec,
    config_class,
)

PRETRAINED = Path(__file__).parent / "pretrained"
DEFAULT_NAME = "small"

# A config in a file may be malicious. These bounds limit the network that is built to check the file's tensors.
MAX_WIDTH, MAX_LAYERS, MAX_BLOCKS, MAX_KERNEL = 2**14, 8, 64, 31
MAX_QUESTIONS = 2**16
LATER = ("priming", "diffusion")  # fields that the configs in older files do not have
TYPES = {torch.float32: "F16", torch.int32: "I32", torch.int64: "I64"}  # of a network's tensors, and of these in a file


class WeightsError(ValueError):
    """Raised for weights that are missing, damaged or not those that a file needs; the message is one line."""


Network = RecurrentCodec | CompressiveAutoencoder
Config = TypeVar("Config", bound=AnyConfig | CompressiveConfig | ContextConfig)


@dataclass(frozen=True)
class Weights:
    """A trained network and its identity.

    Attributes:
        network: float32, in evaluation mode, on the CPU.
        name: a name for people, at most 32 characters.
        fingerprint: 8 bytes that decide whether a compressed file was made with these weights.
        provenance: how the weights came to be (config, data, steps, seed, ...).
        context: exact context model for entropy coding, or None.
        context_fingerprint: 8 bytes that decide whether a compressed file was made with this model; zeros for None.
        allocation: what an encoder knows of them to choose the iterations of each location, or None.
        path: the file that they were loaded from, or None.
    """

    network: Network
    name: str
    fingerprint: bytes
    provenance: dict[str, str]
    context: ContextModel | None = None
    context_fingerprint: bytes = bytes(8)
    allocation: Allocation | None = None
    path: Path | None = None

    @property
    def recurrent(self) -> RecurrentCodec:
        """The network. Raises WeightsError if it is not a recurrent one."""
        if not isinstance(self.network, RecurrentCodec):
            raise WeightsError(f"the weights {self.name!r} are not those of a recurrent network")
        return self.network


def save_weights(
    path: str | os.PathLike[str],
    network: Network,
    name: str,
    provenance: Mapping[str, str] | None = None,
    context: ContextModel | None = None,
    allocation: Allocation | None = None,
) -> None:
    """Writes a network in half precision, and a context model in integers.

    Args:
        path: the file, usually `<name>.safetensors`.
        network: floating-point values are rounded to float16.
        name: up to 32 of A-Z, a-z, 0-9, '.', '_', '-', starting with a letter or digit.
        provenance: how the weights came to be, as text by key.
        context: from `ContextModel.quantize`.
        allocation: as in `Weights`.

    Raises:
        WeightsError: the name is not allowed, a value is NaN, infinite or beyond the range of float16, or the context
            model is for another number of bits.
        OSError: the file cannot be written.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise WeightsError(f"the name of weights is up to 32 letters, digits, '.', '_' and '-', not {name!r}")
    tensors = stored(network)
    _check_values(tensors, name, network)
    config = described(network.config)
    metadata = {
        "name": name,
        "config": config,
        "provenance": canonical(dict(provenance or {})),
        "fingerprint": fingerprint(config, tensors).hex(),
    }
    if context is not None:
        if context.config.bits != network.config.bits:
            raise WeightsError(f"{context.config.bits} bits of the context model, {network.config.bits} of the codec")
        integers = {key: tensor.cpu().contiguous() for key, tensor in context.integers().items()}
        metadata["context"] = canonical(asdict(context.config))
        metadata["context_fingerprint"] = fingerprint(metadata["context"], integers).hex()
        tensors |= {f"context.{key}": tensor for key, tensor in integers.items()}
    if allocation is not None:
        metadata["allocation"] = canonical(allocation._asdict())
    atomic_write(path, safetensors.torch.save(tensors, metadata))


def load_weights(path_or_name: str | os.PathLike[str] = DEFAULT_NAME) -> Weights:
    """Loads weights, without unpickling and without allocating more than the size of the file.

    Args:
        path_or_name: a name from `known_weights()`, or a path, which ends in `.safetensors` or contains a `/`.

    Raises:
        WeightsError: there is no such file or name, or the file is not intact weights of this codec.
    """
    path = _locate(path_or_name)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _metadata(file.metadata(), path)
            try:
                config = network_config_of(json.loads(metadata["config"]))
                provenance = json.loads(metadata["provenance"])
                if not isinstance(provenance, dict) or not all(isinstance(text, str) for text in provenance.values()):
                    raise ValueError("provenance must map text to text")
                allocation = _allocation(json.loads(metadata.get("allocation", "null")), config)
                context_config = None
                with torch.device("meta"):
                    network = new_network(config)
                    expected = {
                        key: (tensor.shape, TYPES[tensor.dtype]) for key, tensor in network.state_dict().items()
                    }
                    if "context" in metadata:
                        context_config = context_config_of(json.loads(metadata["context"]), config)
                        expected |= _context_tensors(ContextModel(context_config))
            except (ValueError, TypeError, RecursionError) as error:
                raise WeightsError(f"{path}: {one_line(error)}") from error
            if set(file.keys()) != set(expected):
                odd = sorted(set(file.keys()) ^ set(expected))[0]
                raise WeightsError(f"{path}: the tensors do not fit the config, {odd!r} is missing or too much")
            for key, (shape, dtype) in expected.items():
                view = file.get_slice(key)
                if view.get_shape() != list(shape) or view.get_dtype() != dtype:
                    found = f"{view.get_dtype()} {view.get_shape()}"
                    raise WeightsError(f"{path}: {key} is {found}, the config needs {dtype} {list(shape)}")
            tensors = {key: file.get_tensor(key) for key in expected}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({one_line(error)})") from error
    integers = {key[len("context.") :]: tensors.pop(key) for key in list(tensors) if key.startswith("context.")}
    _check_values(tensors, str(path), network)
    digest = fingerprint(metadata["config"], tensors)
    if metadata["fingerprint"] != digest.hex():
        raise WeightsError(f"{path}: damaged, the tensors do not match the fingerprint {metadata['fingerprint']}")
    network.load_state_dict(
        {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}, assign=True
    )
    if context_config is None:
        return Weights(network.eval(), metadata["name"], digest, provenance, path=path)
    context_digest = fingerprint(metadata["context"], integers)
    if metadata.get("context_fingerprint") != context_digest.hex():
        raise WeightsError(f"{path}: damaged, the context model does not match its fingerprint")
    try:
        context = ContextModel.from_integers(context_config, integers)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    return Weights(network.eval(), metadata["name"], digest, provenance, context, context_digest, allocation, path)


def stored(network: Network) -> dict[str, torch.Tensor]:
    """The tensors of a network as they are in a file."""
    return {
        key: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for key, tensor in network.state_dict().items()
    }


def new_network(config: AnyConfig | CompressiveConfig) -> Network:
    """A network with random weights."""
    return CompressiveAutoencoder(config) if isinstance(config, CompressiveConfig) else RecurrentCodec(config)


def network_config_of(values: Any) -> AnyConfig | CompressiveConfig:
    """Checks the config of a network, of unknown origin."""
    known = values if isinstance(values, dict) else {}
    config = _config(CompressiveConfig if "coefficients" in known else config_class(known), values)
    if isinstance(config, LatentConfig) and (
        config.iterations > 255 or config.iterations * config.bits > MAX_QUESTIONS
    ):
        raise ValueError(f"{config.iterations} iterations of {config.bits} bits are too many")
    return config


def context_config_of(values: Any, network: AnyConfig | CompressiveConfig) -> ContextConfig:
    """Checks the config of a context model for a network, of unknown origin."""
    config = _config(ContextConfig, values)
    if isinstance(network, CompressiveConfig):
        raise ValueError("a compressive autoencoder has priors, and no context model")
    if config.bits != network.bits:
        raise ValueError(f"a context model for {config.bits} bits, where the codec has {network.bits}")
    if config.kind == "grouped" and (not isinstance(network, LatentConfig) or config.groups != network.groups):
        raise ValueError("a grouped context model needs a latent network of as many groups")
    return config


def _context_tensors(model: ContextModel) -> dict[str, tuple[torch.Size, str]]:
    """Shapes and types of the integers of a context model, by name."""
    types = {"weight": "I16", "bias": "I32", "map": "I8"}  # all others are biases on the grid of activations
    expected = {
        f"context.{key}": (tensor.shape, types.get(key.split(".")[-1], "I16"))
        for key, tensor in model.named_parameters()
    }
    exponents = {}
    for key, (shape, _) in expected.items():
        layer, _, tensor = key.rpartition(".")
        if tensor in ("weight", "map"):
            exponents[f"{layer}.exponent"] = (torch.Size() if tensor == "weight" else shape[:1], "I8")
    return expected | exponents


def known_weights() -> dict[str, str]:
    """Names of the weights that come with the package, each with its fingerprint in hexadecimal."""
    known = {}
    for path in sorted(PRETRAINED.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                known[path.stem] = _metadata(file.metadata(), path)["fingerprint"]
        except (SafetensorError, OSError, WeightsError):
            continue  # one damaged file must not hide the others; `load_weights` reports it
    return known


def shipped_name(header: Header) -> str:
    """The name of the shipped weights that a file needs.

    Raises:
        WeightsError: there are no such weights.
    """
    known = known_weights()
    for name, digest in known.items():
        if digest == header.fingerprint.hex():
            return name
    needed = f"{header.weights} ({header.fingerprint.hex()})"
    raise WeightsError(f"the file needs the weights {needed}; known are: {_listed(known)}")


def _listed(known: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({digest})" for name, digest in known.items()) or "none"


def fingerprint(config: str, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The first 8 bytes of the SHA-256 of the config and every tensor's name, type, shape and little-endian bytes.

    Args:
        config: the JSON text as it is in the file, which a later version with more fields might write differently.
        tensors: by name.
    """
    digest = hashlib.sha256(config.encode())
    for key in sorted(tensors):
        array = tensors[key].cpu().contiguous().numpy()
        digest.update(canonical([key, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.digest()[:8]


def _locate(path_or_name: str | os.PathLike[str]) -> Path:
    """The path of weights that are given by name or path."""
    path = Path(path_or_name)
    if path.suffix == ".safetensors" or path.name != os.fspath(path_or_name):
        if not path.is_file():
            raise WeightsError(f"{path}: no such weights file")
        return path
    shipped = PRETRAINED / f"{path.name}.safetensors"
    if not shipped.is_file():
        known = _listed(known_weights())
        raise WeightsError(f"no weights are named {path.name!r}; known are: {known}; a path ends in .safetensors")
    return shipped


def _metadata(metadata: dict[str, str] | None, path: Path) -> dict[str, str]:
    """The metadata of a file, checked for completeness."""
    metadata = metadata or {}
    for key in ("name", "config", "provenance", "fingerprint"):
        if key not in metadata:
            raise WeightsError(f"{path}: not weights of this codec, its metadata has no {key!r}")
    if not NAME_PATTERN.fullmatch(metadata["name"]) or not re.fullmatch("[0-9a-f]{16}", metadata["fingerprint"]):
        raise WeightsError(f"{path}: not weights of this codec, its name or fingerprint is malformed")
    return metadata


def _config(kind: type[Config], values: Any) -> Config:
    """Builds a config from parsed JSON of unknown origin."""
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or not set(values) <= {field.name for field in fields(kind)}:
        raise ValueError(f"the config may have the fields {', '.join(hints)}, and no others")
    checked = {}
    for key, value in values.items():
        if hints[key] is int:
            most = MAX_BLOCKS if key.endswith("blocks") else MAX_WIDTH
            valid = type(value) is int and 0 <= value <= most
        elif choices := [choice for choice in get_args(hints[key]) if isinstance(choice, str)]:
            valid = isinstance(value, str) and value in choices
        else:
            largest = MAX_KERNEL if key.endswith("kernels") else MAX_WIDTH
            valid = isinstance(value, list) and len(value) <= MAX_LAYERS
            valid = valid and all(type(number) is int and 1 <= number <= largest for number in value)
            value = tuple(value) if valid else value
        if not valid:
            raise ValueError(f"the config has a {key} that cannot be: {str(value)[:80]}")
        checked[key] = value
    return kind(**checked)


def _allocation(values: Any, network: AnyConfig | CompressiveConfig) -> Allocation | None:
    """Checks what is known for the allocation, of unknown origin."""
    if values is None:
        return None
    if not isinstance(network, LatentConfig) or not isinstance(values, dict) or set(values) != {"worth", "quality"}:
        raise ValueError("the allocation is not that of a latent network")
    if not _numbers(values["worth"], network.latents):
        raise ValueError(f"the allocation needs {network.latents} numbers")
    if not isinstance(values["quality"], dict) or set(values["quality"]) != set(get_args(TuneName)):
        raise ValueError(f"a scale of quality is for the measures {', '.join(get_args(TuneName))}")
    for scale in values["quality"].values():
        rises = _numbers(scale, len(QUALITIES)) and all(before < after <= 1 for before, after in pairwise(scale))
        if not rises:
            raise ValueError(f"a scale of quality has {len(QUALITIES)} rising numbers from 0 to 1")
    return Allocation(tuple(values["worth"]), values["quality"])


def _numbers(values: Any, count: int) -> bool:
    """Whether values from JSON are so many finite numbers that are not negative."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(number) is float and 0 <= number < math.inf for number in values)
    )


def _check_values(tensors: Mapping[str, torch.Tensor], source: str, network: Network) -> None:
    """Refuses values that are not finite, invalid permutations, and questions with numbers out of range."""
    questions = {f"{name}." for name, module in network.named_modules() if isinstance(module, Questions)}
    for key, tensor in tensors.items():
        prefix, name = key[: key.rfind(".") + 1], key[key.rfind(".") + 1 :]
        if tensor.is_floating_point():
            if not torch.isfinite(tensor).all():
                raise WeightsError(f"{source}: {key} holds values that are not finite in float16")
        elif prefix in questions:
            assert isinstance(network.config, LatentConfig)
            # Limited costs keep their sums exact; edges are compared with these sums.
            limits = {"channel": network.config.latents, "cost": 2**20, "edges": 2**31}
            limit = limits[name]
            if int(tensor.min()) < 0 or int(tensor.max()) >= limit:
                raise WeightsError(f"{source}: {key} holds numbers beyond 0..{limit - 1}")
        elif isinstance(network, CompressiveAutoencoder):
            if int(tensor.min()) < 1 or int(tensor.max()) >= SCALE:
                raise WeightsError(f"{source}: {key} holds numbers beyond 1..{SCALE - 1}")
        elif not np.array_equal(tensor.sort(-1).values, np.broadcast_to(np.arange(tensor.shape[-1]), tensor.shape)):
            raise WeightsError(f"{source}: {key} does not hold permutations")


def described(config: AnyConfig | CompressiveConfig) -> str:
    """The config of a network as it is in a file: without later fields that are 0, so that fingerprints stay."""
    return canonical({name: value for name, value in asdict(config).items() if value or name not in LATER})


def canonical(value: Any) -> str:
    """Canonical JSON of a value: sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
