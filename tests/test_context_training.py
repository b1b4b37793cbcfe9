"""Tests of the training of context models, on a frozen codec and joint, and of the export of their checkpoints."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from rnncodec.cli import main
from rnncodec.codec import Codec
from rnncodec.entropy import ContextConfig
from rnncodec.files import format
from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.training.context import ContextTraining, JointTraining
from rnncodec.training.export import add_context
from rnncodec.weights import WeightsError, load_weights, save_weights

TINY = NetworkConfig(bits=8, encoder_channels=(8, 8, 8, 8), decoder_channels=(8, 8, 8, 8, 8))
CONTEXTS = {
    "lines": ContextConfig(kind="sequential", channels=8),
    "board": ContextConfig(kind="parallel", channels=8, groups=2, iterations=2),
}


def make_weights(path, seed=0):
    """A random codec whose channels are seldom as often 1 as 0."""
    torch.manual_seed(seed)
    network = RecurrentCodec(TINY)
    bias = network.binarizer.features.bias
    assert bias is not None
    bias.data = torch.linspace(-1, 1, 8)
    save_weights(path, network, "tiny")
    return path


@pytest.fixture(scope="module")
def codec_file(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("codec") / "tiny.safetensors")


class Patches(torch.utils.data.Dataset):
    """Random patches, coarse enough to have structure."""

    def __init__(self, steps, size=64):
        self.steps, self.size = steps, size

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(step)) * 2 - 1
        return torch.nn.functional.interpolate(x, size=(self.size, self.size))


def fit(module, steps, folder, val_size=64, **kwargs):
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **kwargs,
    )  # fmt: skip
    training, validation = (
        torch.utils.data.DataLoader(Patches(n, size), batch_size=None) for n, size in ((steps, 64), (2, val_size))
    )
    trainer.fit(module, training, validation)
    return trainer


@pytest.fixture(scope="module")
def trained(codec_file, tmp_path_factory):
    """A checkpoint of `ContextTraining`, and the metrics of its last validation."""
    folder = tmp_path_factory.mktemp("context")
    torch.manual_seed(0)
    module = ContextTraining(CONTEXTS, str(codec_file), iterations=4, learning_rate=1e-2, warmup_steps=1)
    trainer = fit(module, 40, folder, val_size=50)
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt", {key: value.item() for key, value in trainer.callback_metrics.items()}


@pytest.fixture
def with_board(trained, codec_file, tmp_path):
    """The weights of the codec with its trained context model `board`."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(codec_file.read_bytes())
    add_context(trained[0], path, "board")
    return path


def test_context_models_learn_the_bits_of_the_codec(trained):
    _, metrics = trained
    for name in CONTEXTS:
        for k in (1, 2, 4):
            raw = k * 8 / 256
            assert 0 < metrics[f"val/bpp_{name}_{k}"] < 0.9 * raw
    assert metrics["val/bpp"] == pytest.approx(sum(metrics[f"val/bpp_{name}_4"] for name in CONTEXTS) / 2)


def test_the_frozen_codec_does_not_change_and_is_not_saved(trained, codec_file):
    checkpoint = torch.load(trained[0], weights_only=True)
    assert all(key.startswith("contexts.") for key in checkpoint["state_dict"])
    module = ContextTraining.load_from_checkpoint(trained[0], map_location="cpu", weights_only=True)
    x = Patches(1)[0]
    network = load_weights(codec_file).recurrent
    with torch.inference_mode():
        expected = torch.stack([step.bits for step in network.unroll(x, 4)])
    module.train()
    bits, cases = module.codes(x)
    assert torch.equal(torch.stack(bits), expected)
    assert cases == [None] * 4


def test_a_checkpoint_of_another_codec_is_not_resumed(trained, tmp_path):
    other = make_weights(tmp_path / "other.safetensors", seed=1)
    module = ContextTraining(CONTEXTS, str(other), iterations=4, learning_rate=1e-2)
    with pytest.raises(ValueError, match="trained on the codec"):
        module.on_load_checkpoint(torch.load(trained[0], weights_only=True))


def test_a_resumed_training_says_that_it_keeps_its_rates(trained, codec_file):
    module = ContextTraining(CONTEXTS, str(codec_file), iterations=4, learning_rate=1e-3, weight_decay=0.2)
    with pytest.warns(UserWarning, match=r"^a resumed run keeps its learning_rate and weight_decay; what is given has"):
        module.on_load_checkpoint(torch.load(trained[0], weights_only=True))


def test_training_starts_from_a_given_context_model(with_board, codec_file, tmp_path):
    other = make_weights(tmp_path / "other.safetensors", seed=1)
    start = load_weights(with_board)
    board = {"board": CONTEXTS["board"]}
    module = ContextTraining(board, str(other), weights=str(with_board), iterations=4, learning_rate=0.0)
    assert start.context is not None
    planes = Patches(1)[0][:1, :1].sign().expand(3, 1, 8, 64, 64)[..., :5, :7]
    with torch.inference_mode():  # the same predictions, but for the grid of the exact model's activations
        exact = start.context(planes.double())
        torch.testing.assert_close(module.contexts["board"](planes), exact.float(), atol=0.05, rtol=0)
        other_model = ContextTraining(board, str(other), iterations=4).contexts["board"]
        assert not torch.allclose(other_model(planes), exact.float(), atol=0.05)
    fit(module, 1, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    add_context(tmp_path / "a.ckpt", other, "board")
    record = json.loads(load_weights(other).provenance["context"])
    assert record["started_from"] == start.context_fingerprint.hex()
    assert record["settings"]["codec"] == "other.safetensors"  # no folder of this machine
    assert record["settings"]["weights"] == with_board.name
    with pytest.raises(ValueError, match="no context model of the shape"):
        ContextTraining(CONTEXTS, str(other), weights=str(with_board))
    with pytest.raises(ValueError, match=r"tiny\.safetensors has no context model"):
        ContextTraining(board, str(other), weights=str(codec_file))


@pytest.mark.parametrize("name", list(CONTEXTS))
def test_export_adds_a_context_model_that_shrinks_files(trained, codec_file, name, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    path.write_bytes(codec_file.read_bytes())
    assert main(["export", str(trained[0]), str(path), "--context", name]) == 0
    weights, before = load_weights(path), load_weights(codec_file)
    assert weights.fingerprint == before.fingerprint
    assert weights.context_fingerprint.hex() in capsys.readouterr().out
    codec = Codec(weights)
    x = ((Patches(1, 320)[0][0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    data, raw = codec.encode(x, 4), codec.encode(x, 4, entropy="none")
    assert {it.coding for it in format.read_header(data).entries} == {format.CONTEXT}
    assert len(data) < 0.9 * len(raw)
    np.testing.assert_array_equal(np.asarray(codec.decode(data)), np.asarray(Codec(before).decode(raw)))


def test_export_refuses_what_does_not_belong_together(trained, codec_file, tmp_path, capsys):
    other = make_weights(tmp_path / "other.safetensors", seed=1)
    content = other.read_bytes()
    with pytest.raises(WeightsError, match="trained on the codec"):
        add_context(trained[0], other, "lines")
    with pytest.raises(WeightsError, match="no context model 'nope', there are: lines, board"):
        add_context(trained[0], codec_file, "nope")
    with pytest.raises(WeightsError, match="no such weights file"):
        add_context(trained[0], tmp_path / "missing.safetensors", "lines")
    (tmp_path / "bad.ckpt").write_bytes(b"PK\x03\x04")
    torch.save({"hyper_parameters": {}, "state_dict": {}}, tmp_path / "empty.ckpt")
    checkpoint = torch.load(trained[0], weights_only=True)
    checkpoint["hyper_parameters"]["contexts"]["lines"]["channels"] = 2**14
    torch.save(checkpoint, tmp_path / "huge.ckpt")
    for file in ("bad.ckpt", "empty.ckpt", "huge.ckpt"):
        with pytest.raises(WeightsError) as error:
            add_context(tmp_path / file, codec_file, "lines")
        assert "\n" not in str(error.value)
    assert main(["export", str(tmp_path / "empty.ckpt"), str(other), "--context", "lines"]) == 1
    assert other.read_bytes() == content


def test_bad_arguments_are_refused(codec_file):
    for contexts, iterations in (({}, 4), (CONTEXTS, 0)):
        with pytest.raises(ValueError, match="at least one"):
            ContextTraining(contexts, str(codec_file), iterations=iterations)
    module = ContextTraining(CONTEXTS, str(codec_file), iterations=2)
    module._trainer = SimpleNamespace(world_size=2)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="at least 3 iterations"):
        module.on_fit_start()


def joint(**kwargs):
    torch.manual_seed(0)
    context = ContextConfig(kind="parallel", channels=8, groups=2)
    return JointTraining(context=context, network=TINY, iterations=3, warmup_steps=1, **kwargs)


def joint_step(**kwargs):
    """The loss of a training step, its residuals, and by hand the bits per pixel of each of its iterations."""
    module = joint(**kwargs)
    module.log = module.log_dict = lambda *args, **kwargs: None
    module._trainer = SimpleNamespace(global_step=0)  # pyright: ignore[reportAttributeAccessIssue]
    x = Patches(1)[0]
    torch.manual_seed(5)
    loss = module.training_step(x, 0).item()
    torch.manual_seed(5)  # the same stochastic bits
    steps = list(module.network.unroll(x, 3))
    bits = torch.stack([step.bits for step in steps])
    p = torch.sigmoid(module.context(bits).double())
    rates = -torch.log2(torch.where(bits > 0, p, 1 - p)).sum((1, 2, 3, 4)) / (2 * 64 * 64)
    return loss, [(x - step.state.y_hat).double() for step in steps], rates.tolist()


def test_joint_loss_is_distortion_and_weighted_rate():
    loss, residuals, rates = joint_step(rate_weight=0.25)
    l1 = sum(residual.abs().mean().item() for residual in residuals) / 3
    assert loss == pytest.approx(l1 + 0.25 * sum(rates), rel=1e-5)


@pytest.mark.parametrize(("last", "weights"), [(None, (0.5, 0.5, 0.5)), (0.1, (0.5, 0.3, 0.1))])
def test_joint_loss_with_geometric_means_is_a_product(last, weights):
    loss, residuals, rates = joint_step(rate_weight=0.5, last_rate_weight=last, distortion="rmse")
    expected = 1.0
    for k, (residual, weight) in enumerate(zip(residuals, weights, strict=True), 1):
        rmse = math.sqrt(residual.square().mean().item())
        expected *= (rmse * sum(rates[:k]) ** weight) ** (1 / 3)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_joint_loss_of_iterations_after_the_last_and_of_fewer():
    module = joint(rate_weight=0.5, last_rate_weight=0.1, distortion="rmse")
    rates = torch.tensor([0.1, 0.2, 0.4, 0.7])
    expected = (0.1**0.5 * 0.2**0.3 * 0.4**0.1 * 0.7**0.1) ** (1 / 4)  # all after the third count as the third does
    assert module.weighed(torch.tensor(2.0), rates).item() == pytest.approx(2 * expected, rel=1e-5)
    assert module.weighed(torch.tensor(2.0), rates[:2]).item() == pytest.approx(
        2 * (0.1**0.5 * 0.2**0.3) ** 0.5, rel=1e-5
    )


def test_joint_loss_with_arithmetic_means_has_one_rate_weight():
    with pytest.raises(ValueError, match="last_rate_weight is for rmse"):
        joint(rate_weight=0.5, last_rate_weight=0.1)


def test_joint_training_starts_from_given_weights_and_their_context_model(with_board):
    start = load_weights(with_board)
    assert start.context is not None
    module = JointTraining(context=CONTEXTS["board"], network=TINY, weights=str(with_board))
    for ours, theirs in ((module.network, start.network), (module.context, start.context)):
        expected = theirs.state_dict()
        assert all(torch.equal(tensor, expected[key].float()) for key, tensor in ours.state_dict().items())
    other = JointTraining(context=replace(CONTEXTS["board"], channels=4), network=TINY, weights=str(with_board))
    assert other.context.config.channels == 4


def test_the_rate_has_a_gradient_to_the_encoder():
    module = joint(rate_weight=1.0)
    steps = list(module.network.unroll(Patches(1)[0], 3))
    module.rates([step.bits for step in steps], [step.cases for step in steps])[-1].backward()
    gradient = module.network.encoder.stem.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_joint_training_lowers_the_rate_and_exports_both_parts(tmp_path):
    rates = {}
    for weight in (0.0, 3.0):
        module = joint(rate_weight=weight, learning_rate=6e-3)
        trainer = fit(module, 20, tmp_path, val_size=176, limit_val_batches=1)
        rates[weight] = trainer.callback_metrics["val/bpp"].item()
    assert rates[3.0] < 0.9 * rates[0.0]
    up_to = [trainer.callback_metrics[f"val/bpp_{k}"].item() for k in (1, 2, 4, 8, 16)]
    assert up_to == sorted(up_to)
    assert up_to[-1] == rates[3.0]
    loss = trainer.callback_metrics["val/loss"].item()
    assert loss > 3 * rates[3.0]
    assert not math.isnan(loss)
    trainer.save_checkpoint(tmp_path / "joint.ckpt")
    checkpoint = torch.load(tmp_path / "joint.ckpt", weights_only=True)
    torch.save(checkpoint | {"PatchDataModule": {}}, tmp_path / "joint.ckpt")  # where it says what it was trained on
    again = JointTraining.load_from_checkpoint(tmp_path / "joint.ckpt", map_location="cpu", weights_only=True)
    assert again.rate_weight == 3.0
    assert again.context.config.bits == 8
    path = str(tmp_path / "j.safetensors")
    assert main(["export", str(tmp_path / "joint.ckpt"), path, "--name", "joint"]) == 0
    assert main(["export", str(tmp_path / "joint.ckpt"), path, "--context", "context"]) == 0
    assert load_weights(path).context is not None
    other = make_weights(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="trained on the codec"):
        add_context(tmp_path / "joint.ckpt", other, "context")
