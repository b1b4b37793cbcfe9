"""Tests of weights files: saved weights are loaded unchanged, and invalid files are refused."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_calibration import save_latent
from test_latent import TINY

from rnncodec import weights
from rnncodec.allocation import QUALITIES, Allocation
from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.weights import WeightsError, known_weights, load_weights, save_weights

CONFIG = NetworkConfig(
    decoder_cell="associative_lstm",
    reconstruction="residual_scaling",
    bits=3,
    encoder_channels=(4, 4, 6, 8),
    decoder_channels=(8, 8, 8, 8, 4),
    gain_channels=(2, 2, 2, 2),
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return RecurrentCodec(CONFIG)


@pytest.fixture
def path(network, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_weights(path, network, "tiny", {"seed": "0", "data": "noise"})
    return path


def parse(path):
    """The header and the body of a safetensors file, by its specification."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewrite(path, metadata=None, tensors=None, drop=()):
    """Changes parts of a weights file, and leaves its fingerprint as it was."""
    old = parse(path)[0]["__metadata__"]
    values = {key: value for key, value in load_file(path).items() if key not in drop} | (tensors or {})
    save_file(values, path, {key: value for key, value in (old | (metadata or {})).items() if value is not None})


def test_round_trip(network, path):
    loaded = load_weights(path)
    assert (loaded.name, loaded.provenance) == ("tiny", {"seed": "0", "data": "noise"})
    assert loaded.network.config == CONFIG
    assert not loaded.network.training
    for key, value in network.state_dict().items():
        found = loaded.network.state_dict()[key]
        assert found.dtype == value.dtype
        expected = value.numpy().astype(np.float16).astype(np.float32) if value.is_floating_point() else value.numpy()
        assert np.array_equal(found.numpy(), expected)


def test_a_loaded_network_can_be_trained_further(path):
    network = load_weights(path).recurrent.train()
    step = network(y=torch.rand(1, 3, 32, 32) * 2 - 1)
    step.state.y_hat.sum().backward()
    assert network.decoder.output.weight.grad is not None


def test_saving_again_gives_the_same_content(path, tmp_path):
    loaded = load_weights(path)
    network = loaded.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    save_weights(tmp_path / "again", network, "tiny", loaded.provenance)
    assert parse(tmp_path / "again") == parse(path)


def test_fingerprint_by_hand(path):
    header, body = parse(path)
    digest = hashlib.sha256(header["__metadata__"]["config"].encode())
    names = {"F16": "float16", "I64": "int64"}
    for key in sorted(set(header) - {"__metadata__"}):
        entry = header[key]
        shape = ",".join(str(n) for n in entry["shape"])
        digest.update(f'["{key}","{names[entry["dtype"]]}",[{shape}]]'.encode())
        digest.update(body[slice(*entry["data_offsets"])])
    assert load_weights(path).fingerprint == digest.digest()[:8]
    assert header["__metadata__"]["fingerprint"] == digest.hexdigest()[:16]


def test_fingerprint_is_of_config_and_values_alone(network, path, tmp_path):
    def fingerprint_of(network, name="tiny"):
        save_weights(tmp_path / "other.safetensors", network, name, {})
        return load_weights(tmp_path / "other.safetensors").fingerprint

    original = load_weights(path).fingerprint
    assert fingerprint_of(network, "another.name") == original
    with torch.no_grad():
        network.binarizer.features.bias[0] += 1
    assert fingerprint_of(network) != original
    torch.manual_seed(0)
    config = NetworkConfig(**{**vars(CONFIG), "binarizer": "sign"})
    assert fingerprint_of(RecurrentCodec(config)) != original


def test_shipped_weights_are_found_by_name(path, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "PRETRAINED", tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    digest = load_weights(path).fingerprint
    assert known_weights() == {"tiny": digest.hex()}
    assert load_weights("tiny").fingerprint == digest
    with pytest.raises(WeightsError, match=rf"'large'; known are: tiny \({digest.hex()}\)"):
        load_weights("large")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not safetensors", struct.pack("<Q", 2**40) + b"{}"])
def test_not_safetensors(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_weights(tmp_path / "x.safetensors")


def test_missing_cut_and_foreign_files(path, tmp_path):
    with pytest.raises(WeightsError, match="no such weights file"):
        load_weights(tmp_path / "absent.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_weights(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="no 'name'"):
        load_weights(path)


def test_a_small_file_cannot_ask_for_thousands_of_layers(path):
    for key in ("analysis_blocks", "synthesis_blocks"):
        rewrite(path, {"config": json.dumps({"latents": 384, key: 65})})
        with pytest.raises(WeightsError, match=f"a {key} that cannot be: 65$"):
            load_weights(path)


HUGE = {"decoder_channels": [16384, 16384, 16384, 16384, 16384], "encoder_channels": [16384] * 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2**40}, "a bits that cannot be"),
        ({"bits": True}, "a bits that cannot be"),
        ({"bits": "3"}, "a bits that cannot be"),
        ({"patch_size": 300, "reconstruction": "additive"}, "blocks of up to 255 pixels a side, not 300"),
        ({"encoder_channels": [2**31] * 4}, "a encoder_channels that cannot be"),
        ({"encoder_channels": [4] * 1000}, "a encoder_channels that cannot be"),
        ({"encoder_channels": 4}, "a encoder_channels that cannot be"),
        ({"decoder_cell": "transformer"}, "a decoder_cell that cannot be"),
        ({"decoder_cell": ["lstm"]}, "a decoder_cell that cannot be"),
        ({"encoder_hidden_kernels": [1, 1, 2]}, "odd"),
        ({"unheard_of": 1}, "and no others"),
        ({"bits": 4}, "the config needs F16"),
        (HUGE, "the config needs F16"),
        ({"reconstruction": "additive"}, "gain.*missing or too much"),
    ],
)
def test_hostile_configs(path, change, message):
    config = json.loads(json.dumps(vars(CONFIG))) | change
    rewrite(path, {"config": json.dumps(config)})
    with pytest.raises(WeightsError, match=message) as error:
        load_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": "["},
        {"config": "[" * 100_000},
        {"config": "[]"},
        {"provenance": "[]"},
        {"provenance": '{"a": 1}'},
        {"name": "a b"},
        {"name": None},
        {"fingerprint": "0"},
        {"fingerprint": "0" * 16},
    ],
)
def test_hostile_metadata(path, metadata):
    rewrite(path, metadata)
    with pytest.raises(WeightsError) as error:
        load_weights(path)
    assert "\n" not in str(error.value)


def test_hostile_tensors(path):
    key = "binarizer.features.bias"
    permutations = "decoder.cells.0.permutations"
    good = path.read_bytes()
    for tensors, drop, message in (
        ({key: torch.zeros(4).half()}, (), r"F16 \[4\], the config needs F16 \[3\]"),
        ({key: torch.zeros(3)}, (), "is F32"),
        ({key: torch.tensor([0, float("nan"), 0]).half()}, (), "not finite"),
        ({key: torch.tensor([0, float("inf"), 0]).half()}, (), "not finite"),
        ({key: torch.zeros(3).half()}, (), "damaged"),
        ({}, (key,), "missing or too much"),
        ({"more": torch.zeros(3).half()}, (), "missing or too much"),
        ({permutations: torch.full((4, 4), 2**40)}, (), "permutations"),
    ):
        path.write_bytes(good)
        rewrite(path, None, tensors, drop)
        with pytest.raises(WeightsError, match=message):
            load_weights(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0])
def test_values_beyond_half_precision_are_not_saved(network, path, value):
    good = path.read_bytes()
    with torch.no_grad():
        network.binarizer.features.bias[0] = value
    with pytest.raises(WeightsError, match="not finite in float16"):
        save_weights(path, network, "tiny", {})
    assert path.read_bytes() == good


@pytest.mark.parametrize("name", ["", "a" * 33, "no/slash", "ünïcode", "-x", "line\n"])
def test_names(network, tmp_path, name):
    with pytest.raises(WeightsError, match="name of weights"):
        save_weights(tmp_path / "x.safetensors", network, name, {})
    assert list(tmp_path.iterdir()) == []


ALLOCATION = Allocation(
    tuple(np.linspace(0, 3, TINY.latents).tolist()),
    {name: np.linspace(0, 1, len(QUALITIES)).tolist() for name in ("psnr", "ms-ssim")},
)


@pytest.fixture(scope="module")
def latent(photos, tmp_path_factory):
    """The file of a small latent network with its context model, without an allocation."""
    path = tmp_path_factory.mktemp("weights") / "latent.safetensors"
    save_latent(photos, path)
    return path


def allocated(path, target):
    """Saves the weights with an allocation."""
    bare = load_weights(path)
    save_weights(target, bare.network, bare.name, bare.provenance, bare.context, ALLOCATION)


def test_an_allocation_is_kept_and_changes_no_fingerprint(latent, tmp_path):
    allocated(latent, tmp_path / "new.safetensors")
    bare, loaded = load_weights(latent), load_weights(tmp_path / "new.safetensors")
    assert bare.allocation is None
    assert loaded.allocation == ALLOCATION
    assert loaded.fingerprint == bare.fingerprint
    assert loaded.context_fingerprint == bare.context_fingerprint
    assert parse(tmp_path / "new.safetensors")[1] == parse(latent)[1]
    metadata = parse(tmp_path / "new.safetensors")[0]["__metadata__"]
    assert json.loads(metadata.pop("allocation")) == {"worth": list(ALLOCATION.worth), "quality": ALLOCATION.quality}
    assert metadata == parse(latent)[0]["__metadata__"]


GOOD = {"worth": list(ALLOCATION.worth), "quality": dict(ALLOCATION.quality)}
SCALE = GOOD["quality"]["psnr"]
WRONG_WORTH = [GOOD["worth"][1:], [*GOOD["worth"], 0.5], [], None, "x", {}, 1.0]
WRONG_WORTH += [[value, *GOOD["worth"][1:]] for value in (-0.1, float("nan"), float("inf"), "1", None, True, [0.5])]
WRONG_SCALES = [SCALE[1:], [*SCALE, 2.0], SCALE[::-1], [0.5] * len(SCALE), [-0.1, *SCALE[1:]], None, {}, "x"]
WRONG_SCALES += [[*SCALE[:-1], value] for value in (1.01, float("nan"), float("inf"), SCALE[-2], "1")]


@pytest.mark.parametrize(
    "text",
    [
        *(json.dumps(GOOD | {"worth": worth}) for worth in WRONG_WORTH),
        *(json.dumps(GOOD | {"quality": GOOD["quality"] | {"ms-ssim": scale}}) for scale in WRONG_SCALES),
        *(json.dumps(GOOD | {"quality": quality}) for quality in ({}, None, [], {"psnr": SCALE}, SCALE)),
        json.dumps(GOOD | {"quality": GOOD["quality"] | {"vmaf": SCALE}}),
        json.dumps(GOOD | {"more": 1.0}),
        json.dumps({"worth": GOOD["worth"]}),
        "[]",
        "1",
        "{",
        "",
        "[" * 100_000,
    ],
)
def test_malformed_allocations(latent, tmp_path, text):
    path = tmp_path / "latent.safetensors"
    path.write_bytes(latent.read_bytes())
    rewrite(path, {"allocation": text})
    with pytest.raises(WeightsError, match=f"^{path}: [^\n]*$"):
        load_weights(path)


def test_an_allocation_is_not_for_pixel_networks(path):
    rewrite(path, {"allocation": json.dumps(GOOD)})
    with pytest.raises(WeightsError, match="not that of a latent network"):
        load_weights(path)
    rewrite(path, {"allocation": "null"})
    assert load_weights(path).allocation is None
