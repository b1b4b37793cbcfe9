"""Tests of training: schedules, the guard against divergence, and runs that are killed, resumed or distributed."""

import csv
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import torch._dynamo.utils
import yaml
from skimage.metrics import peak_signal_noise_ratio

from rnncodec.codec import Codec
from rnncodec.data import PatchDataModule
from rnncodec.entropy import ContextConfig
from rnncodec.files.images import load_image, save_image
from rnncodec.metrics.distortion import ms_ssim
from rnncodec.network import LatentConfig, NetworkConfig, RecurrentCodec, network_config, to_uint8
from rnncodec.training import cli as training_cli
from rnncodec.training.compressive import CompressiveTraining
from rnncodec.training.dissimilarity import DissimilarityWeights
from rnncodec.training.export import add_context, load_checkpoint
from rnncodec.training.module import CodecTraining
from rnncodec.weights import WeightsError, load_weights, save_weights

ROOT = Path(__file__).parent.parent

TINY = NetworkConfig(encoder_channels=(8, 8, 8, 8), decoder_channels=(8, 8, 8, 8, 8))


def test_iterations_grow_by_step_up_to_the_configured_number():
    module = CodecTraining(TINY, iterations=6, growth={20: 8, 0: 2, 10: 4})  # in any order
    assert [module.current_iterations(step) for step in (0, 9, 10, 19, 20, 1000)] == [2, 2, 4, 4, 6, 6]
    assert CodecTraining(TINY, iterations=6).current_iterations(0) == 6


def test_each_step_draws_one_of_several_numbers_of_iterations(monkeypatch):
    module = CodecTraining(TINY, iterations=6, growth={0: 2, 10: [2, 4, 8]})
    assert module.fewest_iterations() == 2
    drawn = [module.current_iterations(step) for step in range(10, 3010)]
    # A third each, within five standard deviations of the count.
    assert set(drawn) == {2, 4, 6}
    assert all(abs(drawn.count(k) - 1000) < 130 for k in set(drawn))
    again = CodecTraining(TINY, iterations=6, growth={0: 2, 10: [2, 4, 8]})  # as on another rank, or resumed
    assert [again.current_iterations(step) for step in range(10, 3010)] == drawn
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert [module.current_iterations(step) for step in range(10, 3010)] != drawn


def test_learning_rate_rises_stays_and_falls_to_zero():
    module = CodecTraining(TINY, warmup_steps=4, decay_steps=10)
    module._trainer = SimpleNamespace(max_steps=100)  # pyright: ignore[reportAttributeAccessIssue]
    factors = [module.learning_rate_factor(step) for step in (0, 1, 3, 50, 90, 95, 99, 100)]
    assert factors == pytest.approx([0.25, 0.5, 1, 1, 1, 0.5, 0.1, 0])
    module.decay_steps = 0.1  # of all
    assert [module.learning_rate_factor(step) for step in (0, 1, 3, 50, 90, 95, 99, 100)] == pytest.approx(factors)


def test_the_noise_of_a_step_depends_on_seed_step_and_rank(monkeypatch):
    drawn = set()
    for seed, step, rank in ((0, 0, 0), (1, 0, 0), (12345, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        module = CodecTraining(TINY)
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=step))
        module._trainer = SimpleNamespace(fit_loop=loop, world_size=4)  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr(CodecTraining, "global_rank", rank)
        module.on_train_batch_start(None, step)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 5  # the last is the first again


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-2.0, -1.0, -1 + 2 / 255, -1 + 2.9 / 255, 0.0, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 1, 1, 128, 255, 255]


class Patches(torch.utils.data.Dataset):
    """Random patches, of which those of the steps in `bad` hold NaN."""

    def __init__(self, steps, bad=()):
        self.steps, self.bad = steps, bad

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(step)) * 2 - 1
        return x * math.nan if step in self.bad else x


def fit(module, dataset, **kwargs):
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **kwargs,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(dataset, batch_size=None))
    return trainer


class Recorder(L.Callback):
    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))


@pytest.mark.parametrize(
    ("gpu", "instructions", "precision"),
    [(False, False, "32-true"), (False, True, "bf16-mixed"), (True, False, "bf16-mixed")],
)
def test_mixed_precision_is_the_default_where_it_is_fast(gpu, instructions, precision, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert training_cli.default_precision() == precision


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_steps_with_nan_are_skipped_and_counted(optimizer):
    torch.manual_seed(0)
    module, recorder = CodecTraining(TINY, iterations=2, optimizer=optimizer, warmup_steps=1), Recorder()
    fit(module, Patches(6, bad={2, 3}), callbacks=[recorder], gradient_clip_val=1.0)
    moved = [not torch.equal(a, b) for a, b in zip(recorder.weights, recorder.weights[1:], strict=False)]
    assert moved == [True, False, False, True, True]
    assert all(torch.isfinite(weights).all() for weights in recorder.weights)
    assert module.bad_steps == 2


def test_training_stops_after_many_bad_steps_in_a_row():
    module = CodecTraining(TINY, iterations=1, max_bad_steps=3)
    with pytest.raises(FloatingPointError, match="4 steps in a row"):
        fit(module, Patches(10, bad=set(range(2, 10))))


@pytest.mark.parametrize("distortion", ["l1", "rmse"])
def test_loss_is_the_mean_distortion_of_all_iterations(distortion):
    torch.manual_seed(0)
    module = CodecTraining(TINY, iterations=3, distortion=distortion)
    module.log = lambda *args, **kwargs: None
    module._trainer = SimpleNamespace(global_step=0)  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.manual_seed(5)
    loss = module.training_step(x, 0)
    torch.manual_seed(5)  # the same stochastic bits
    errors = [(x - step.state.y_hat).detach().double().numpy() for step in module.network.unroll(x, 3)]
    if distortion == "l1":
        assert loss.item() == pytest.approx(np.mean([np.abs(error).mean() for error in errors]), abs=1e-6)
    else:  # the mean PSNR of values in [-1, 1]
        images = [(x.double().numpy(), x.double().numpy() - error) for error in errors]
        mean = np.mean([peak_signal_noise_ratio(image, x_hat, data_range=2) for image, x_hat in images])
        assert 20 * math.log10(2 / loss.item()) == pytest.approx(mean, abs=1e-4)


def block_dissimilarity(a, b):
    """(1 - SSIM) / 2 of one channel of one block by the formula of Wang et al. 2004, sec. III-B, values in [0, 1]."""
    (ma, mb), (va, vb) = (a.mean(), b.mean()), (a.var(), b.var())
    covariance = ((a - ma) * (b - mb)).mean()
    ssim = (2 * ma * mb + 1e-4) * (2 * covariance + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    return (1 - ssim) / 2


def test_the_l1_error_is_weighted_by_dissimilarity():
    """Two steps by hand; the moving average starts with the first, and moves a hundredth with each one."""
    rng = np.random.default_rng(0)
    module = DissimilarityWeights()
    average = None
    for noise in (0.2, 0.6):
        x = rng.uniform(-1, 1, (2, 3, 16, 24))
        x_hat = np.clip(x + noise * rng.normal(size=x.shape) * rng.uniform(size=(2, 1, 16, 1)), -1, 1)
        found, errors = [], []
        for image in range(2):
            for channel, y, u in np.ndindex(3, 2, 3):
                block = image, channel, slice(8 * y, 8 * y + 8), slice(8 * u, 8 * u + 8)
                found.append(block_dissimilarity((x[block] + 1) / 2, (x_hat[block] + 1) / 2))
                errors.append(np.abs(x[block] - x_hat[block]).mean())
        average = np.mean(found) if average is None else average + 0.01 * (np.mean(found) - average)
        expected = np.mean(np.array(found) / average * errors)
        given = torch.tensor(x, dtype=torch.float32), torch.tensor(x_hat, dtype=torch.float32, requires_grad=True)
        loss = module(*given)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        loss.backward()
        # Constant weights: the gradient is that of the L1 error, block by block.
        gradient = np.sign(x_hat - x)[0, 0, 0, 0] * found[0] / average / x.size
        assert given[1].grad is not None
        assert given[1].grad[0, 0, 0, 0].item() == pytest.approx(gradient, rel=1e-3)
    module.eval()
    before = module.average.clone()
    assert module(*given).item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(module.average, before)


def test_weighted_errors_are_trained_and_resumed(tmp_path):
    """The moving average is in the checkpoint."""
    fit_ssim = {"iterations": 2, "distortion": "ssim_l1", "optimizer": "muon", "learning_rate": 1e-3}
    module = CodecTraining(TINY, **fit_ssim)
    trainer = fit(module, Patches(6))
    assert module.weights is not None
    assert 0 < module.weights.average < 1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CodecTraining.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert loaded.weights is not None
    assert torch.equal(loaded.weights.average, module.weights.average)


@pytest.fixture(scope="module")
def crops(photos, tmp_path_factory) -> Path:
    """Small photographs, just large enough for MS-SSIM."""
    folder = tmp_path_factory.mktemp("crops")
    for path in photos.iterdir():
        save_image(load_image(path)[:192, :192], folder / f"{path.stem}.png")
    return folder


def arguments(photos, folder, *args):
    return [
        "fit", "--config", str(ROOT / "configs" / "debug.yaml"),
        "--data.root", str(photos), "--data.cache_dir", str(folder / "cache"), "--data.val_images", "2",
        "--trainer.default_root_dir", str(folder), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *args,
    ]  # fmt: skip


def command(*args):
    return [sys.executable, str(ROOT / "train.py"), *arguments(*args)]


def environment(**values):
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": path, **values}


def run(photos, folder, *args, **values):
    """A training in its own process."""
    done = subprocess.run(
        command(photos, folder, *args),
        env=environment(**values),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture
def train(monkeypatch):
    """A training in this process, which need not load everything again."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # of the training alone: it is set again after the test
    return lambda *args: training_cli.main(arguments(*args))


small_runs = pytest.mark.filterwarnings("ignore")  # Lightning warns of them, and of averaged weights


def probe(folder):
    return ["--trainer.callbacks+", "probe.Probe", "--trainer.callbacks.folder", str(folder)]


def logged(folder):
    """The validations in the metrics of a run's first start."""
    lines = (folder / "metrics" / "version_0" / "metrics.csv").read_text().splitlines()
    return [row for row in csv.DictReader(lines) if row.get("val/psnr")]


@small_runs
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(train, crops, tmp_path):
    steps = [
        "--trainer.max_steps", "30", "--trainer.val_check_interval", "10", "--trainer.limit_val_batches", "1",
        "--model.growth", "{0: 2, 20: 4}", "--data.batch_size", "4",
        "--model.network.encoder_channels", "[4, 4, 4, 4]", "--model.network.decoder_channels", "[4, 4, 4, 4, 4]",
    ]  # fmt: skip
    assert train(crops, tmp_path / "whole", *steps, *probe(tmp_path / "whole" / "probe")) == 0

    folder = tmp_path / "killed"
    folder.mkdir()
    last = folder / "debug" / "last.ckpt"
    killed = [
        "--checkpoint_minutes", "0.0001", "--trainer.callbacks+", "probe.Sender", "--trainer.callbacks.step", "15",
        "--trainer.callbacks.hook", "on_before_optimizer_step", "--trainer.callbacks.signals", f"[{signal.SIGKILL:d}]",
    ]  # fmt: skip
    done = subprocess.run(command(crops, folder, *steps, *killed), env=environment(), cwd=folder, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert 0 < torch.load(last, weights_only=True)["global_step"] <= 15

    assert train(crops, folder, *steps, "--ckpt_path", str(last), *probe(folder / "probe")) == 0
    whole, resumed = (torch.load(tmp_path / name / "probe" / "weights-0.pt") for name in ("whole", "killed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    averaged = [
        torch.load(tmp_path / name / "debug" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(value, averaged[1][name]) for name, value in averaged[0].items())
    assert any(not torch.equal(value, whole[name]) for name, value in averaged[0].items())  # they are averages indeed


def test_a_run_leaves_metrics_config_checkpoint_and_wandb_files(crops, tmp_path):
    run(
        crops, tmp_path, "--trainer.max_steps", "10", "--trainer.val_check_interval", "5",
        "--trainer.log_every_n_steps", "5", WANDB_MODE="offline",
    )  # fmt: skip
    folder = tmp_path / "debug"
    assert [int(row["step"]) for row in logged(folder)] == [4, 9]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["iterations"] == 4

    # What was logged is what the averaged weights, which a checkpoint holds, do to the held-out images.
    module = CodecTraining.load_from_checkpoint(folder / "last.ckpt", map_location="cpu").eval()
    assert module.network.config.encoder_channels == (8, 16, 16, 32)
    data = PatchDataModule(crops, cache_dir=tmp_path / "cache", val_images=2)
    data.setup()
    psnrs, similarities = [], []
    for image in data.val_dataloader():
        x = 2 * image.float() / 255 - 1
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            x_hat = to_uint8(list(module.network.unroll(x, 4))[-1].state.y_hat)
        original, decoded = (t[0].permute(1, 2, 0).numpy() for t in (image, x_hat))
        psnrs.append(peak_signal_noise_ratio(original, decoded))
        similarities.append(ms_ssim(image, x_hat).item())
    last = logged(folder)[-1]
    assert float(last["val/psnr_4"]) == pytest.approx(np.mean(psnrs), abs=0.05)
    assert float(last["val/ms_ssim_4"]) == pytest.approx(np.mean(similarities), abs=0.005)

    files = next((folder / "wandb").glob("offline-run-*")) / "files" / "media"
    assert list(files.rglob("reconstructions*.png"))
    assert list(files.rglob("*.table.json"))  # whose content test_tracking.py looks at


@small_runs
def test_a_training_does_not_start_over_where_a_run_has_been(train, crops, tmp_path, capsys):
    (tmp_path / "debug").mkdir()
    (tmp_path / "debug" / "last.ckpt").touch()
    assert train(crops, tmp_path) == 1
    assert "--ckpt_path" in last_line(capsys)


@small_runs
def test_context_models_are_trained_resumed_and_exported(train, crops, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "codec.safetensors"
    save_weights(path, RecurrentCodec(TINY), "tiny")
    small = [
        "--config", str(ROOT / "configs" / "context.yaml"), "--model.codec", str(path), "--model.iterations", "4",
        "--model.contexts.parallel.channels", "8", "--model.contexts.sequential.channels", "8",
        "--data.patch_size", "64", "--data.tile_size", "64", "--trainer.val_check_interval", "4",
    ]  # fmt: skip
    assert train(crops, tmp_path, *small, "--trainer.max_steps", "4") == 0
    last = tmp_path / "context" / "last.ckpt"
    assert train(crops, tmp_path, *small, "--trainer.max_steps", "8", "--ckpt_path", str(last)) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 8
    lines = (tmp_path / "context" / "metrics" / "version_1" / "metrics.csv").read_text().splitlines()
    (row,) = [row for row in csv.DictReader(lines) if row.get("val/bpp")]
    for name in ("parallel", "sequential"):
        assert 0 < float(row[f"val/bpp_{name}_1"]) < float(row[f"val/bpp_{name}_4"]) < 4 * 0.125 * 1.1
    add_context(last, path, "sequential")
    context = load_weights(path).context
    assert context is not None
    assert context.config == ContextConfig(kind="sequential", channels=8)


def last_line(capsys):
    """The last line of standard error, in which there is no traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@small_runs
def test_bad_data_is_an_error_of_one_line(train, tmp_path, capsys):
    assert train(tmp_path / "missing", tmp_path) == 1
    assert "missing" in last_line(capsys)


SHAPE = LatentConfig(
    iterations=4, bits=16, latents=24, encoder_channels=8, decoder_channels=8, mixed=8, around=8,
    analysis_channels=(8, 8, 8), synthesis_channels=(8, 8, 8), synthesis_blocks=1,
)  # fmt: skip
LATENT = [
    "--model.network", json.dumps({"class_path": "rnncodec.network.LatentConfig", "init_args": asdict(SHAPE)}),
    "--model.pictures", "2", "--model.missing", "0.5", "--data.patch_size", "64", "--data.tile_size", "64",
]  # fmt: skip


@small_runs
def test_a_latent_network_starts_once_and_resumes_to_the_bit(train, crops, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("rnncodec.training.module.rank_zero_info", said.append)
    folder, six = tmp_path / "resumed", ["--trainer.max_steps", "6"]
    last = folder / "debug" / "last.ckpt"
    assert train(crops, tmp_path / "whole", *LATENT, *six, *probe(tmp_path / "whole" / "probe")) == 0
    assert said == ["finding principal components and questions"]
    assert train(crops, folder, *LATENT, "--trainer.max_steps", "3") == 0
    said.clear()
    assert train(crops, folder, *LATENT, *six, "--ckpt_path", str(last), *probe(folder / "probe")) == 0
    assert said == []
    ours, theirs = (torch.load(tmp_path / name / "probe" / "weights-0.pt") for name in ("whole", "resumed"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # A checkpoint holds what the start has found, and the averaged weights are weights that can be exported.
    network, _ = load_checkpoint(last)
    assert isinstance(network, RecurrentCodec)
    assert isinstance(network.config, LatentConfig)
    assert network.binarizer.questions.cost.any()
    save_weights(tmp_path / "latent.safetensors", network, "latent")
    assert load_weights(tmp_path / "latent.safetensors").network.config == network.config


def test_two_processes_start_from_the_same_principal_components(crops, tmp_path):
    done = run(
        crops, tmp_path, *LATENT, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "3",
        "--trainer.limit_val_batches", "0", *probe(tmp_path / "probe"),
    )  # fmt: skip
    assert (done.stdout + done.stderr).count("finding principal components") == 1
    weights = [torch.load(tmp_path / "probe" / f"weights-{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert weights[0]["network.binarizer.questions.cost"].any()


@small_runs
def test_codec_and_grouped_context_model_train_resume_and_are_exported(train, crops, tmp_path):
    joint = [
        "--model", "rnncodec.training.context.JointTraining", *LATENT, "--model.distortion", "rmse",
        "--model.context_learning_rate", "0.01", "--model.context", '{"kind": "grouped", "channels": 8}',
    ]  # fmt: skip
    folder, six = tmp_path / "resumed", ["--trainer.max_steps", "6"]
    last = folder / "debug" / "last.ckpt"
    assert train(crops, tmp_path / "whole", *joint, *six, *probe(tmp_path / "whole" / "probe")) == 0
    assert train(crops, folder, *joint, "--trainer.max_steps", "3") == 0
    assert train(crops, folder, *joint, *six, "--ckpt_path", str(last), *probe(folder / "probe")) == 0
    ours, theirs = (torch.load(tmp_path / name / "probe" / "weights-0.pt") for name in ("whole", "resumed"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # The context model started from the odds that the questions know.
    odds = ours["network.binarizer.questions.cost"].view(4, 16, 75, 2).diff(dim=-1)[..., 0] * -math.log(2) / 256
    assert (ours["context.grouped.odds"] - odds).abs().max() < 0.2
    network, provenance = load_checkpoint(folder / "debug" / "last.ckpt")
    save_weights(tmp_path / "l.safetensors", network, "l", provenance)
    add_context(folder / "debug" / "last.ckpt", tmp_path / "l.safetensors", "context")
    codec = Codec(load_weights(tmp_path / "l.safetensors"))
    image = load_image(crops / "coffee.png")
    data = codec.encode(image)
    assert len(data) < len(codec.encode(image, entropy="none"))
    assert codec.decode(data).size == (192, 192)


def test_pictures_are_drawn_one_from_each_stretch_of_the_iterations(monkeypatch):
    module = CodecTraining(LatentConfig(latents=16, bits=16), iterations=16, pictures=3)
    draws = []
    for step in range(600):
        module._trainer = SimpleNamespace(global_step=step)  # pyright: ignore[reportAttributeAccessIssue]
        draws.append(module.draws(16))
    assert all(0 <= a < 5 <= b < 10 <= c < 16 for a, b, c in draws)
    assert {t for drawn in draws for t in drawn} == set(range(16))
    module.pictures = 0
    assert module.draws(16) == list(range(16))


def test_a_share_of_the_steps_has_missing_bits():
    module = CodecTraining(LatentConfig(latents=16, bits=16), iterations=24, missing=0.25)
    limits = []
    for step in range(400):
        module._trainer = SimpleNamespace(global_step=step)  # pyright: ignore[reportAttributeAccessIssue]
        limits.append(module.limit(torch.zeros(2, 3, 32, 48)))
    given = [limit for limit in limits if limit is not None]
    assert 60 < len(given) < 140  # a quarter, within five standard deviations
    assert given[0].shape == (2, 2, 3)
    limits = torch.cat(given)
    assert limits.unique().tolist() == list(range(1, 97))
    cut = (limits == limits[:, :1, :1]).all(2).all(1).float().mean()
    assert 0.35 < cut < 0.65  # half of the images, likewise


def test_one_iteration_is_refused_where_processes_share_gradients():
    module = CodecTraining(TINY, iterations=4, growth={0: 1})
    module._trainer = SimpleNamespace(world_size=2)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="at least 2 iterations"):
        module.on_fit_start()


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_opens_with_its_purpose_and_builds(config, capsys, monkeypatch):
    lines = config.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[0].endswith(".")
    values = yaml.safe_load(config.read_text())
    assert values["name"] == config.stem
    model = values.get("model", {})
    network = model.get("init_args", model).get("network", {})
    assert set(network) <= {field.name for field in fields(network_config(network))}
    monkeypatch.setattr(
        sys, "argv", ["train.py", "fit", "--config", str(config), "--data.root", "photos", "--print_config"]
    )
    with pytest.raises(SystemExit) as stopped:  # every key and type is known to the command line
        training_cli.main()
    assert stopped.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert parsed["name"] == config.stem
    # What a config does not say is as if the class were called from Python.
    module, _, name = parsed["model"]["class_path"].rpartition(".")
    kind = getattr(import_module(module), name)
    parameters = inspect.signature(kind).parameters
    if issubclass(kind, CodecTraining):
        parameters = inspect.signature(CodecTraining).parameters | parameters
    for name, value in parsed["model"]["init_args"].items():
        if name not in model.get("init_args", model) and not is_dataclass(parameters[name].default):
            default = parameters[name].default
            assert value == (list(default) if isinstance(default, tuple) else default), name
    with torch.device("meta"):
        x = torch.zeros(1, 3, 32, 32)
        if kind is CompressiveTraining:
            assert CompressiveTraining().network(x, 0)[0].shape == x.shape
            return
        network = CodecTraining(network_config(network)).network
        assert [network.picture(step.state).shape for step in network.unroll(network.analyse(x), 2)] == [x.shape] * 2


def test_configs_named_in_the_manual_exist():
    named = set(re.findall(r"configs/\w+\.yaml", (ROOT / "train.py").read_text() + (ROOT / "README.md").read_text()))
    assert named
    assert all((ROOT / name).is_file() for name in named)


def test_a_module_made_in_python_has_a_checkpoint_that_can_be_exported(tmp_path):
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    module = CodecTraining(TINY, iterations=2)
    trainer.fit(module, torch.utils.data.DataLoader(Patches(4), batch_size=None))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CodecTraining.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu", weights_only=True)
    assert loaded.network.config == TINY


def test_training_starts_from_given_weights_and_the_checkpoint_says_from_which(tmp_path):
    network = RecurrentCodec(TINY)
    save_weights(tmp_path / "a.safetensors", network, "a")
    start = load_weights(tmp_path / "a.safetensors")
    module = CodecTraining(TINY, weights=str(tmp_path / "a.safetensors"), iterations=2)
    assert module.network.training
    for key, tensor in network.state_dict().items():  # as half precision holds them
        assert torch.equal(module.network.state_dict()[key], tensor.half().float()), key
    fit(module, Patches(2)).save_checkpoint(tmp_path / "a.ckpt")
    fit(CodecTraining(TINY, iterations=2), Patches(2)).save_checkpoint(tmp_path / "b.ckpt")
    for name in ("a.ckpt", "b.ckpt"):  # as if the patches came from the data module
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        torch.save(checkpoint | {"PatchDataModule": {}}, tmp_path / name)
    resumed = CodecTraining(TINY, iterations=2)  # as when the command that resumes no longer names the weights
    resumed.on_load_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=True))
    assert resumed.started_from == start.fingerprint.hex()
    moved, provenance = load_checkpoint(tmp_path / "a.ckpt")
    assert provenance["started_from"] == start.fingerprint.hex()
    assert json.loads(provenance["settings"])["weights"] == "a.safetensors"  # no folder of this machine
    assert isinstance(moved, RecurrentCodec)
    assert not torch.equal(moved.decoder.output.weight, start.recurrent.decoder.output.weight)
    assert "started_from" not in load_checkpoint(tmp_path / "b.ckpt")[1]


def test_a_wider_network_starts_as_the_narrower_one(tmp_path):
    save_weights(tmp_path / "a.safetensors", RecurrentCodec(TINY), "a")
    start = load_weights(tmp_path / "a.safetensors").recurrent
    wider = replace(TINY, binarizer="sign", encoder_channels=(8, 8, 8, 16), decoder_channels=(8, 12, 8, 8, 8))
    module = CodecTraining(wider, weights=str(tmp_path / "a.safetensors"), iterations=2)
    assert module.network.config == wider
    assert module.network.training
    x = Patches(1)[0]
    for ours, theirs in zip(module.network.eval().unroll(x, 2), start.unroll(x, 2), strict=True):
        torch.testing.assert_close(ours.state.y_hat, theirs.state.y_hat)


def test_weights_of_another_network_are_refused(tmp_path):
    save_weights(tmp_path / "a.safetensors", RecurrentCodec(TINY), "a")
    with pytest.raises(ValueError, match=r"a\.safetensors: a network can only become wider"):
        CodecTraining(replace(TINY, reconstruction="one_shot"), weights=str(tmp_path / "a.safetensors"))
    with pytest.raises(WeightsError, match="no weights are named 'nothing'"):
        CodecTraining(TINY, weights="nothing")


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own internals
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # captures the steps and their gradients, but makes no machine code
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")],
        ),
    ],
)
def test_compiled_steps_train_like_eager_ones(backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = replace(TINY, binarizer="sign")
        module = CodecTraining(network, iterations=2, warmup_steps=1, compile=compiled)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        fit(module, Patches(3))
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) is compiled
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("debug", "debug.yaml"),
        ("debug.yaml", "debug.yaml"),
        ("mine", "mine"),  # no such config comes along: the parser says so
        ("configs/debug", "configs/debug"),
    ],
)
def test_configs_that_come_along_go_by_their_names(given, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs" / found
    expected = str(shipped) if shipped.is_file() and "/" not in given else given
    for before, after in ((["--config", given], ["--config", expected]), ([f"-c={given}"], [f"-c={given}"])):
        assert training_cli.with_configs(["fit", *before, "--name", "debug"]) == ["fit", *after, "--name", "debug"]
    assert training_cli.with_configs([f"--config={given}"]) == [f"--config={expected}"]
    (tmp_path / given).parent.mkdir(exist_ok=True)
    (tmp_path / given).write_text("")  # a file of that name comes first
    assert training_cli.with_configs(["--config", given]) == ["--config", given]


def test_without_a_subcommand_it_is_fit():
    options = ["--config", "small.yaml", "--name", "a"]
    assert training_cli.with_subcommand(options) == ["fit", *options]
    for args in (["fit", *options], ["validate", *options], [*options, "fit"], ["--help"], ["-h"], []):
        assert training_cli.with_subcommand(args) == args
