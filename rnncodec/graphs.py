"""Writes a recurrent network as graphs for other programs, in the formats of ONNX and of torch.export.

A graph of encoder or decoder is one step of `RecurrentCodec`, which takes its state and gives the new one. The state
before the first step is zeros.
"""

import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from rnncodec.files.images import atomic_write
from rnncodec.network import LatentConfig, NetworkConfig, RecurrentCodec, State
from rnncodec.weights import Weights, WeightsError

FormatName = Literal["onnx", "pt2"]

ROWS, COLUMNS = 3, 5  # of the example that is traced, in blocks; no channels or other sizes follow from these
MOST = 4096  # blocks of a side


class Graph(NamedTuple):
    """What becomes a file: a module, its inputs by name, the state's last, and the names of its outputs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]


class Step(nn.Module):
    """A step whose state is a list of tensors.

    Args:
        network: gives the steps.
        state: after any step; all others are like it.
        encodes: whether a step gets y, or the bits to decode.
    """

    def __init__(self, network: RecurrentCodec, state: State, encodes: bool) -> None:
        super().__init__()
        self.network, self.encodes = network, encodes
        leaves, self.structure = _pytree.tree_flatten_with_path(self._kept(state))
        self.present = [leaf is not None for _, leaf in leaves]
        self.state = {_name(path): torch.zeros_like(leaf) for path, leaf in leaves if leaf is not None}

    def _kept(self, state: State) -> State:
        return state if self.encodes else state._replace(encoder=None)

    def forward(self, given: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        tensors = iter(state)
        before = _pytree.tree_unflatten([next(tensors) if here else None for here in self.present], self.structure)
        step = self.network(before, **{"y" if self.encodes else "bits": given})
        after = [leaf for leaf in _pytree.tree_leaves(self._kept(step.state)) if leaf is not None]
        return [step.bits, *after] if self.encodes else after


def export(weights: Weights, folder: Path, format: FormatName) -> list[str]:
    """Writes the graphs of a network, and `interface.json`, which tells names, types and shapes of their tensors.

    Args:
        weights: of a recurrent network.
        folder: is made if it does not exist; files that have the same names are replaced.
        format: the suffix of the graphs' files.

    Returns:
        The names of the graphs' files.

    Raises:
        WeightsError: the network is not recurrent, or its first step is unlike the others.
        ModuleNotFoundError: a package that ONNX needs is not installed.
        OSError: a file cannot be written.
    """
    network = weights.recurrent.eval()
    config = network.config
    if isinstance(config, NetworkConfig) and config.reconstruction == "residual_scaling":
        raise WeightsError("no graph for residual scaling: its first step, without a gain, is unlike the others")
    if config.priming != config.diffusion:
        raise WeightsError("no graph for priming unlike diffusion: the first step is unlike the others")
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {}
    for name, graph in graphs(network).items():
        file = f"{name}.{format}"
        with torch.no_grad():
            program = _traced(graph)
        _write(program, folder / file, graph, format)
        described[file] = {
            "inputs": [_described(key, tensor) for key, tensor in graph.inputs.items()],
            "outputs": graph.outputs,
        }
    identity = {"weights": weights.name, "fingerprint": weights.fingerprint.hex()}
    sizes = {
        "stride": config.stride,
        "bits": config.bits,
        "iterations": config.iterations if isinstance(config, LatentConfig) else None,
    }
    atomic_write(folder / "interface.json", (json.dumps(identity | sizes | {"graphs": described}, indent=2)).encode())
    return list(described)


@torch.no_grad()
def graphs(network: RecurrentCodec) -> dict[str, Graph]:
    """The graphs of a network by name: encoder and decoder, and the transforms of a latent network."""
    stride = network.config.stride
    x = torch.zeros(1, 3, ROWS * stride, COLUMNS * stride)
    y = network.analyse(x)
    step = network(y=y)
    encoder, decoder = (Step(network, step.state, encodes) for encodes in (True, False))
    found = {
        "encoder": Graph(encoder, {"y": y, **encoder.state}, ["bits", *(f"next_{name}" for name in encoder.state)]),
        "decoder": Graph(decoder, {"bits": step.bits, **decoder.state}, [f"next_{name}" for name in decoder.state]),
    }
    if isinstance(network.config, LatentConfig):
        transforms, seen = network.transforms, ("y_hat", "decoder_cell_0", "decoder_received")
        found["analysis"] = Graph(transforms.analysis, {"x": x}, ["y"])
        found["synthesis"] = Graph(transforms.synthesis, {name: decoder.state[name] for name in seen}, ["x_hat"])
    return found


def _traced(graph: Graph) -> ExportedProgram:
    """Traces a graph whose numbers of rows and columns are free."""
    rows, columns = Dim("rows", max=MOST), Dim("columns", max=MOST)

    def dims(tensor: Tensor) -> dict[int, Any]:
        if tensor.ndim < 3:
            return {}
        per = tensor.shape[-2] // ROWS  # `1 * rows` would be another dimension
        sides = (rows, columns) if per == 1 else (per * rows, per * columns)
        return {tensor.ndim - 2: sides[0], tensor.ndim - 1: sides[1]}

    first, *others = graph.inputs.values()
    given: Any = (first, others) if isinstance(graph.module, Step) else (first, *others)
    return torch.export.export(graph.module, given, dynamic_shapes=_pytree.tree_map(dims, given), strict=False)


def _write(program: ExportedProgram, path: Path, graph: Graph, format: FormatName) -> None:
    """Writes a traced graph; an existing file is replaced only when all is done."""
    with TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        if format == "onnx":
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PyTorch's own deprecated calls
                model = torch.onnx.export(
                    program,
                    input_names=list(graph.inputs),
                    output_names=graph.outputs,
                    dynamo=True,
                    verbose=False,
                )
            assert model is not None
            model.save(written, external_data=False)
        else:
            torch.export.save(program, written)
        os.replace(written, path)


def _name(path: Sequence[Any]) -> str:
    """The name of a tensor of a state, from the fields and places that lead to it."""
    return "_".join(str(getattr(key, "name", getattr(key, "idx", ""))) for key in path)


def _described(name: str, tensor: Tensor) -> dict[str, Any]:
    """Name, type and shape of an input; the rows and columns of maps are multiples of those of blocks."""
    shape, per = list(tensor.shape), 0
    if tensor.ndim >= 3:
        shape, per = shape[:-2], tensor.shape[-2] // ROWS
    return {"name": name, "type": str(tensor.dtype).removeprefix("torch."), "shape": shape, "per_block": per}
