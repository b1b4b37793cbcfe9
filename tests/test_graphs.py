"""Tests of graphs: the examples of docs/export.md, run on photographs, against the codec in PyTorch."""

import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rnncodec.cli import main
from rnncodec.codec import Codec
from rnncodec.network import CompressiveAutoencoder, CompressiveConfig, LatentConfig, NetworkConfig, RecurrentCodec
from rnncodec.weights import load_weights, save_weights

ONNX, TORCH = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "export.md").read_text("utf-8"), re.DOTALL
)
PIXELS = NetworkConfig(bits=4, encoder_channels=(4, 6, 6, 8), decoder_channels=(12, 12, 12, 8, 8))
LATENT = LatentConfig(5, 16, 4, 24, 8, 8, 8, 8, (8, 8, 8), 1, (8, 8, 8), 1)


def make_weights(path, config):
    torch.manual_seed(1)
    network = RecurrentCodec(config)
    if isinstance(config, LatentConfig):
        network.start(
            torch.nn.functional.interpolate(torch.rand(8, 3, 16, 16), scale_factor=8, mode="bilinear") * 2 - 1
        )
        with torch.no_grad():  # what training starts from zero
            for layer in (network.encoder.output, network.decoder.output, network.transforms.synthesis.hidden):
                layer.weight.normal_(std=0.05)
    else:
        torch.nn.init.normal_(network.decoder.output.weight, std=0.3)
    save_weights(path, network, "tiny", {})
    return path


@pytest.fixture(autouse=True)
def quiet():
    """Pytest would keep what tracing logs, which takes longer than tracing."""
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def photo(tmp_path_factory, photos):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.open(photos / "coffee.png").convert("RGB").crop((150, 60, 150 + 70, 60 + 100)).save(path)
    return path


def check(weights, photo, folder, iterations=4):
    """Runs the examples; gives the share of bits that differ from the codec's."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("photo.png").write_bytes(photo.read_bytes())
        exec(ONNX, found)
    pixels = np.asarray(Image.open(photo))
    codec = Codec(load_weights(weights))
    ours = codec.read_bits(codec.encode(pixels, iterations, entropy="none"))
    shape = (iterations, codec.config.bits, *found["blocks"])
    theirs = np.stack([np.unpackbits(plane)[: ours[0].size] for plane in found["planes"]]).reshape(shape) * 2.0 - 1
    data = codec.write_bits(list(theirs.astype(np.int8)), *pixels.shape[:2], entropy="none")
    decoded = np.asarray(Image.open(folder / "decoded.png"))
    assert decoded.std() > 5
    assert np.abs(decoded.astype(int) - np.asarray(codec.decode(data))).max() <= 1
    return found, float((theirs != ours).mean())


@pytest.mark.slow
@pytest.mark.parametrize("config", [PIXELS, LATENT], ids=["pixels", "latent"])
def test_the_examples_code_photographs(config, photo, tmp_path, capsys):
    weights = make_weights(tmp_path / "tiny.safetensors", config)
    folder = tmp_path / "graphs"
    assert main(["export", str(weights), str(folder), "--onnx"]) == 0
    out = capsys.readouterr()
    assert "encoder.onnx, decoder.onnx" in out.err + out.out
    names = {"encoder", "decoder"} | ({"analysis", "synthesis"} if config is LATENT else set())
    assert {path.name for path in folder.iterdir()} == {f"{name}.onnx" for name in names} | {"interface.json"}
    found, flipped = check(weights, photo, tmp_path)
    assert flipped < 0.02

    assert main(["export", str(weights), str(folder), "--torch-export"]) == 0
    document = json.loads((folder / "interface.json").read_text())
    assert (document["weights"], document["stride"], document["bits"]) == ("tiny", 16, config.bits)
    assert set(document["graphs"]) == {f"{name}.pt2" for name in names}
    before = found["state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        second = dict(found, interface=document)
        exec(TORCH, second)
    for ours, theirs in zip(before, second["state"], strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("format", ["--onnx", "--torch-export"])
def test_what_cannot_be_a_graph_is_one_line(format, tmp_path, capsys):
    made = {
        "no gain": RecurrentCodec(NetworkConfig(**{**vars(PIXELS), "reconstruction": "residual_scaling"})),
        "priming": RecurrentCodec(NetworkConfig(**{**vars(PIXELS), "priming": 1})),
        "recurrent": CompressiveAutoencoder(CompressiveConfig(coefficients=4)),
    }
    messages = {
        "no gain": "without a gain",
        "priming": "priming unlike diffusion",
        "recurrent": "not those of a recurrent",
    }
    made["recurrent"].tabulate()
    for name, network in made.items():
        path = tmp_path / f"{name}.safetensors"
        save_weights(path, network, "tiny", {})
        assert main(["export", str(path), str(tmp_path / "out"), format]) == 1
        err = capsys.readouterr().err
        assert messages[name] in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    for source, target in (
        ("small", tmp_path / "file"),
        ("none", tmp_path / "out"),
        (tmp_path / "file", tmp_path / "out"),
    ):
        assert main(["export", str(source), str(target), format]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_graphs_are_not_logged(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", "small", str(tmp_path / "out"), "--onnx", "--wandb", "run"])
    assert "--wandb goes with --name, --context and --allocation" in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", "small", str(tmp_path / "out"), "--onnx"]) == 1
    err = capsys.readouterr().err
    assert (
        err == "rnncodec: error: export --onnx needs onnxscript, which is not installed: pip install 'rnncodec[onnx]'\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_shipped_weights(photo, tmp_path):
    assert main(["export", "small", str(tmp_path / "graphs"), "--onnx"]) == 0
    _, flipped = check("small", photo, tmp_path)
    assert flipped < 0.001
