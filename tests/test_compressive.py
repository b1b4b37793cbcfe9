"""The compressive autoencoder: its network against NumPy, its training, its files."""

import copy
import json
import math
import os
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.signal import correlate
from scipy.stats import norm

import rnncodec
from rnncodec import compressive
from rnncodec.cli import main
from rnncodec.codec import Codec
from rnncodec.entropy import SCALE
from rnncodec.evaluation.evaluate import evaluate
from rnncodec.files import codings, format
from rnncodec.files.errors import FormatError
from rnncodec.metrics.curves import read_points
from rnncodec.network import CompressiveAutoencoder, CompressiveConfig
from rnncodec.network import compressive as network_of
from rnncodec.training.compressive import CompressiveTraining
from rnncodec.training.export import load_checkpoint
from rnncodec.weights import WeightsError, load_weights, save_weights

TINY = CompressiveConfig(coefficients=6, channels=(4, 6), blocks=1, mixtures=3, rates=3)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(scope="module")
def network():
    """A network whose integers differ, and whose levels do."""
    torch.manual_seed(0)
    made = CompressiveAutoencoder(TINY).eval()
    with torch.no_grad():
        made.scale.add_(torch.linspace(0, 3, TINY.rates)[:, None] + torch.rand(TINY.rates, TINY.coefficients))
        made.weight.normal_()
        for parameter in made.parameters():  # as files hold them
            parameter.copy_(parameter.half())
    made.tabulate()
    return made


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "cae.safetensors"
    save_weights(path, network, "cae")
    return path


@pytest.fixture(scope="module")
def codec(weights):
    return rnncodec.load(weights)


@pytest.fixture(scope="module")
def photo():
    x, y = np.meshgrid(np.arange(61), np.arange(45))
    return np.stack([4 * x, 5 * y, 128 + 100 * np.sin(x * y / 80)], -1).astype(np.uint8)


def test_the_decisions_are_as_many_as_coders_expect():
    assert (network_of.DECISIONS, network_of.SCALE) == (codings.DECISIONS, SCALE)


def test_the_network_of_the_paper():
    """Theis et al. 2017, fig. 3: 64 and 128 channels, three residual blocks, 96 coefficients for 8x8 pixels."""
    made = CompressiveAutoencoder(CompressiveConfig())
    shapes = [tuple(p.shape) for name, p in made.analysis.named_parameters() if name.endswith("weight")]
    assert shapes == [(64, 3, 5, 5), (128, 64, 5, 5), *[(128, 128, 3, 3)] * 6, (96, 128, 5, 5)]
    shapes = [tuple(p.shape) for name, p in made.synthesis.named_parameters() if name.endswith("weight")]
    assert shapes == [(512, 96, 3, 3), *[(128, 128, 3, 3)] * 6, (256, 128, 3, 3), (12, 64, 3, 3)]
    assert sum(made.margins) == 69


def convolved(x, layer, stride=1, padding=0):
    """A convolution of [C, H, W] by SciPy."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    kernels, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    found = [correlate(x, kernel, "valid")[0] + shift for kernel, shift in zip(kernels, bias, strict=True)]
    return np.stack(found)[:, ::stride, ::stride]


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def shuffled(x):
    """Depth to space: channels 4 c + 2 y + x become pixels."""
    channels, rows, cols = x.shape
    return (
        x.reshape(channels // 4, 2, 2, rows, cols).transpose(0, 3, 1, 4, 2).reshape(channels // 4, 2 * rows, 2 * cols)
    )


def test_analysis_and_synthesis_in_numpy(network, photo):
    x = photo.transpose(2, 0, 1) / 127.5 - 1
    mean, deviation = (np.array(values)[:, None, None] for values in (network_of.MEAN, network_of.DEVIATION))
    before, after = network.margins
    sides = [(before, 48 - 45 + after), (before, 64 - 61 + after)]
    padded = np.pad((x - 2 * mean + 1) / (2 * deviation), ((0, 0), *sides), mode="reflect")
    first, _, second, _, block, last = network.analysis
    y = leaky(convolved(leaky(convolved(padded, first, 2)), second, 2))
    y = y[:, 2:-2, 2:-2] + convolved(leaky(convolved(y, block.first)), block.second)
    y = convolved(y, last, 2)
    with torch.no_grad():
        found = network.analyse(torch.from_numpy(photo).permute(2, 0, 1)[None], slice(0, 6), slice(0, 8))
    np.testing.assert_allclose(found[0], y, atol=2e-5)

    first, _, block, second, _, _, last, _ = network.synthesis
    z = shuffled(convolved(y, first, padding=1))
    z = z + convolved(leaky(convolved(z, block.first, padding=1)), block.second, padding=1)
    z = shuffled(leaky(convolved(z, second, padding=1)))
    z = shuffled(convolved(z, last, padding=1)) * 2 * deviation + 2 * mean - 1
    with torch.no_grad():
        np.testing.assert_allclose(network.synthesise(found)[0], z, atol=2e-5)


def test_scales_of_the_rates_and_between_them(network):
    logarithms = network.scale.detach().numpy()
    for level, expected in ((0, logarithms[0]), (4, logarithms[1]), (5, 0.75 * logarithms[1] + 0.25 * logarithms[2])):
        found = network.scales(level).detach().numpy()
        np.testing.assert_allclose(found, np.exp(expected)[:, None, None], rtol=1e-5)


def bins(network, rate, values):
    """The probability of integers by coefficient, [coefficients, values], by SciPy."""
    deviation, logits = (p[rate].detach().double().numpy() for p in (network.deviation, network.weight))
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    edges = values[None, :, None] + np.array([-0.5, 0.5])[:, None, None, None]
    below = norm.cdf(edges / np.exp(deviation)[None, :, None])
    return (share[:, None] * (below[1] - below[0])).sum(-1)


def test_code_lengths_are_those_of_the_mixtures(network):
    values = np.arange(-7, 8)
    planes = torch.tensor(values, dtype=torch.float).expand(1, 6, 1, -1)
    expected = -np.log(bins(network, 1, values))
    with torch.no_grad():
        np.testing.assert_allclose(network.nats(planes, 1)[0, :, 0], expected, rtol=1e-3)


def test_tables_are_those_of_the_mixtures(network):
    """The product of the decisions of an integer is its probability, up to the rounding of each to 1 / 65536."""
    found = network.table[4 * 2].numpy() / SCALE
    values = np.arange(-6, 7)
    expected = bins(network, 2, values)
    for column, value in enumerate(values):
        chance = 1 - found[:, 0] if not value else found[:, 0] * 0.5
        for least in range(2, abs(value) + 2 if value else 0):
            chance = chance * (found[:, least] if abs(value) >= least else 1 - found[:, least])
        np.testing.assert_allclose(chance, expected[:, column], rtol=2e-3, atol=1e-4)


def test_tables_of_wide_mixtures():
    """Each decision of large integers is right: whether the size is at least n, given that it is at least n - 1."""
    torch.manual_seed(1)
    wide = CompressiveAutoencoder(TINY)
    with torch.no_grad():
        wide.deviation.copy_(torch.rand_like(wide.deviation) + 2)  # e ** 2 to e ** 3
        wide.weight.normal_()
    wide.tabulate()
    values = np.arange(-400, 401)
    for rate in range(3):
        chances = bins(wide, rate, values)
        at_least = np.array([chances[:, np.abs(values) >= n].sum(1) for n in range(17)]).T
        found = wide.table[4 * rate].numpy() / SCALE
        np.testing.assert_allclose(found[:, 0], at_least[:, 1], atol=1e-4)
        np.testing.assert_allclose(found[:, 2:], at_least[:, 2:16] / at_least[:, 1:15], atol=1e-4)


@pytest.mark.parametrize("rounding", ["identity", "noise", "stochastic"])
def test_rounding_and_its_gradient(rounding):
    """Theis et al. 2017, sec. 2.1: the gradient is 1; noise is uniform; stochastic rounding is right on average."""
    torch.manual_seed(0)
    y = torch.full((20000,), 2.3, requires_grad=True)
    found = network_of.rounded(y, rounding, training=True)
    found.sum().backward()
    assert y.grad is not None
    assert (y.grad == 1).all()
    values = found.detach().numpy()
    if rounding == "identity":
        assert (values == 2).all()
    elif rounding == "noise":
        assert values.min() >= 1.8
        assert values.max() <= 2.8
        assert values.std() == pytest.approx(math.sqrt(1 / 12), rel=0.02)
    else:
        np.testing.assert_allclose(values, np.round(values), atol=1e-6)
        assert values.mean() == pytest.approx(2.3, abs=0.02)
    assert (network_of.rounded(y, rounding, training=False) == 2).all()


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_mirrored_places_are_those_of_numpy(size):
    places = torch.arange(-60, size + 60)
    expected = np.pad(np.arange(size), (60, 60), mode="reflect")
    np.testing.assert_array_equal(network_of.mirrored(places, size), expected)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3, 70), (45, 61)])
@pytest.mark.parametrize("entropy", ["prior", "none", "huffman", "static", "adaptive"])
def test_files_decode_to_the_same_picture(codec, network, size, entropy):
    x = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    data = codec.encode(x, level=5, entropy=entropy)
    assert format.read_header(data).level == 5
    rows, cols = (math.ceil(side / 8) for side in size)
    with torch.no_grad():
        scale = network.scales(5)
        y = network.analyse(torch.from_numpy(x).permute(2, 0, 1)[None], slice(0, rows), slice(0, cols))
        x_hat = network.synthesise((y * scale).round() / scale)[0, :, : size[0], : size[1]]
    expected = ((x_hat.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    found = np.asarray(codec.decode(data)).astype(int)
    assert np.abs(found - expected).max() <= 1  # sums in another order
    np.testing.assert_array_equal(codec.integers(x, 5), (y * scale).round()[0])


def test_batches_are_files(codec):
    x = torch.randint(0, 256, (2, 3, 21, 30), dtype=torch.uint8)
    compressed = codec.compress(x / 255, level=3)
    files = [codec.encode(image.permute(1, 2, 0).numpy(), level=3) for image in x]
    assert compressed == {"strings": [files], "shape": (21, 30)}
    x_hat = codec.decompress(**compressed)["x_hat"]
    expected = np.stack([np.asarray(codec.decode(data)) for data in files])
    assert np.array_equal((x_hat * 255).round().permute(0, 2, 3, 1).numpy(), expected)


def test_windows_leave_no_trace(codec, photo, monkeypatch):
    whole = codec.encode(photo, level=8)
    picture = np.asarray(codec.decode(whole)).astype(int)
    monkeypatch.setattr(compressive, "WINDOW", 2)
    assert codec.encode(photo, level=8) == whole
    assert np.abs(np.asarray(codec.decode(whole)) - picture).max() <= 1


def test_targets(codec, photo):
    """Of all levels, the best that fits and the smallest that is good enough; neither rises with every level."""

    def decibel(data):
        return 10 * np.log10(255**2 / np.mean((np.asarray(codec.decode(data)) - photo.astype(float)) ** 2))

    files = [codec.encode(photo, level=level) for level in range(codec.config.levels)]
    sizes, reached = [len(data) for data in files], [decibel(data) for data in files]
    for limit in (min(sizes), (sizes[3] + sizes[4]) // 2, max(sizes), 10**400):
        best = max(value for size, value in zip(sizes, reached, strict=True) if size <= limit)
        data = codec.encode(photo, max_bytes=limit)
        assert len(data) <= limit
        assert decibel(data) == pytest.approx(best, abs=1e-6)
        assert codec.encode(photo, bpp=8 * min(limit, 10**9) / (45 * 61)) == data
    for target in np.sort(reached) - 0.001:
        least = min(size for size, value in zip(sizes, reached, strict=True) if value >= target)
        data = codec.encode(photo, psnr=target)
        assert decibel(data) >= target
        assert len(data) == least
    assert codec.encode(photo, quality=1) == files[0]
    assert codec.encode(photo, quality=100) == files[8]
    assert codec.encode(photo) == files[4]
    with pytest.raises(ValueError, match=f"^the smallest file takes {min(sizes)} bytes, more than {min(sizes) - 1}$"):
        codec.encode(photo, max_bytes=min(sizes) - 1)
    with pytest.warns(UserWarning, match="^90 dB are out of reach, the image has"):
        assert decibel(codec.encode(photo, psnr=90)) == pytest.approx(max(reached), abs=1e-6)


def test_integers_stay_within_16_bits(network, weights, photo):
    loud = rnncodec.load(weights)
    assert isinstance(loud, compressive.CompressiveCodec)
    with torch.no_grad():
        loud.network.scale.add_(20)
    found = loud.integers(photo, 0)
    assert found.min() == -32767
    assert found.max() == 32767


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 2}, "one iteration"),
        ({"level": 9}, "level must be in 0..8, not 9"),
        ({"level": 1, "quality": 3}, "give one of level, quality, bpp, max_bytes and psnr, not several"),
        ({"entropy": "context"}, "entropy is one of prior, none"),
        ({"roi": np.zeros((45, 61), np.uint8)}, "no region of interest"),
    ],
)
def test_wrong_options(codec, photo, options, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(photo, **options)


def test_files_of_others_are_refused(codec, tiny, photo):
    theirs = rnncodec.load(tiny)
    assert isinstance(theirs, Codec)
    with pytest.raises(WeightsError, match="the file needs the weights 'tiny'"):
        codec.decode(theirs.encode(photo, 1))
    with pytest.raises(WeightsError, match="the file needs the weights 'cae'"):
        theirs.decode(codec.encode(photo))
    data = codec.encode(photo)
    for cut in range(len(data)):
        with pytest.raises(FormatError):
            codec.decode(data[:cut])


def test_weights_come_back(network, weights):
    loaded = load_weights(weights)
    assert isinstance(loaded.network, CompressiveAutoencoder)
    assert loaded.network.config == TINY
    torch.testing.assert_close(loaded.network.table, network.table)
    with pytest.raises(WeightsError, match="not those of a recurrent network"):
        _ = loaded.recurrent


@pytest.mark.parametrize("value", [0, -3, SCALE])
def test_tables_out_of_range_are_refused(network, tmp_path, value):
    before = network.table[0, 0, 0].item()
    network.table[0, 0, 0] = value
    with pytest.raises(WeightsError, match=r"numbers beyond 1\.\.65535"):
        save_weights(tmp_path / "bad.safetensors", network, "bad")
    network.table[0, 0, 0] = before


def test_the_command_line(weights, photo, tmp_path, capsys):
    Image.fromarray(photo).save(tmp_path / "a.png")
    files = [str(tmp_path / name) for name in ("a.png", "a.rnc", "b.png")]
    assert main(["encode", *files[:2], "--quality", "80", "--weights", str(weights)]) == 0
    capsys.readouterr()
    assert main(["info", files[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == "cae"
    assert main(["decode", *files[1:], "--weights", str(weights)]) == 0
    with Image.open(files[2]) as image:
        assert image.size == (61, 45)
    assert main(["decode", *files[1:], "--force"]) == 1
    assert "the file needs the weights cae" in capsys.readouterr().err


def test_evaluation_measures_every_rate(codec, photo, tmp_path):
    big = np.tile(photo, (4, 3, 1))
    Image.fromarray(big).save(tmp_path / "a.png")
    points = evaluate(codec, tmp_path / "a.png")
    assert [point.setting for point in points] == [0, 2, 4, 6, 8]
    for point in points:
        data = codec.encode(big, level=int(point.setting))
        assert point.bytes == len(data)
        error = np.mean((np.asarray(codec.decode(data)) - big.astype(float)) ** 2)
        assert point.psnr == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)


def test_evaluations_of_rates_are_kept_and_drawn(codec, photo, tmp_path, monkeypatch):
    """Their settings are levels, which begin at 0."""
    Image.fromarray(np.tile(photo, (4, 3, 1))).save(tmp_path / "a.png")
    options: dict[str, Any] = {"baselines": ["jpeg"], "cache": tmp_path / "cache", "save_images": True}
    first = evaluate(codec, tmp_path / "a.png", output=tmp_path / "out", **options)
    assert (tmp_path / "out" / "report.html").exists()
    assert [point.setting for point in read_points(tmp_path / "out") if point.codec == "rnncodec-cae"] == [
        0,
        2,
        4,
        6,
        8,
    ]
    own = [point.bytes for point in first if point.codec == "rnncodec-cae"]
    jpeg = [point.bytes for point in first if point.codec == "jpeg"]
    reached = [size for size in own if min(jpeg) <= size <= max(jpeg)]
    assert all(min(abs(other - size) for other in jpeg) < 0.1 * size for size in reached)
    monkeypatch.setattr(codec, "encode", None)  # all is in the cache
    assert evaluate(codec, tmp_path / "a.png", baselines=["jpeg"], cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"^the weights 'cae' cannot choose"):
        evaluate(codec, tmp_path / "a.png", tunes=["psnr"])


def test_the_psnr_is_that_of_the_file(network, photo, tmp_path):
    """Also of integers that are too large for a file."""
    large = copy.deepcopy(network)
    with torch.no_grad():
        large.scale.add_(9)
    save_weights(tmp_path / "cae.safetensors", large, "cae")
    codec = compressive.CompressiveCodec(load_weights(tmp_path / "cae.safetensors"))
    with pytest.warns(UserWarning, match=r"^99 dB are out of reach, the image has ([\d.]+) dB$") as told:
        data = codec.encode(photo, psnr=99)
    error = np.mean((np.asarray(codec.decode(data)) - photo.astype(float)) ** 2)
    said = float(str(told[0].message).split()[-2])
    assert said == pytest.approx(10 * math.log10(255**2 / error), abs=0.01)


@pytest.mark.parametrize("level", [2.5, True, "2", -1, 9])
def test_levels_are_whole_numbers(codec, photo, level):
    with pytest.raises(ValueError, match=r"^level must be in 0\.\.8, not"):
        codec.encode(photo, level=level)


class Patches(torch.utils.data.Dataset):
    """Smooth random patches."""

    def __len__(self):
        return 12

    def __getitem__(self, step):
        x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(step)) * 2 - 1
        return torch.nn.functional.interpolate(x, size=(32, 32), mode="bilinear")


def test_training_learns_one_rate_and_then_the_others(tmp_path):
    torch.manual_seed(0)
    module = CompressiveTraining(TINY, (100.0, 400.0, 1600.0), first=1, scale_steps=4, growth_steps=3)
    before = module.network.scale.detach().clone()
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(
                (module.network.scale.detach().clone(), next(module.network.analysis.parameters()).detach().clone())
            )

    trainer = L.Trainer(max_steps=12, default_root_dir=tmp_path, callbacks=[Watch()], limit_val_batches=0, **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader(Patches(), batch_size=None))
    scales, kernels = zip(*seen, strict=True)
    # For eight steps only the first rate, which the others follow a step later; then only scales and priors.
    for earlier, scale in pairwise(scales[:8]):
        torch.testing.assert_close(scale[[0, 2]] - earlier[1], before[[0, 2]] - before[1])
    assert not torch.equal(scales[7][1], before[1])
    assert not torch.equal(kernels[7], kernels[6])
    assert all(torch.equal(kernel, kernels[7]) for kernel in kernels[8:])
    # All begin with what the first has learned; at a fourth of the weight, steps are twice as large.
    apart = (scales[8] - scales[7][1]) / math.log(2)
    np.testing.assert_allclose(apart.mean(1), [-1, 0, 1], atol=0.1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    # The checkpoint of this bare trainer has neither data module nor averages.
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True) | {"PatchDataModule": {}, "seed": 0}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    network, _ = load_checkpoint(tmp_path / "last.ckpt")
    assert isinstance(network, CompressiveAutoencoder)
    assert int(network.table.min()) > 0


def test_several_processes_go_on_when_the_transforms_stay(tmp_path, monkeypatch):
    """DDP waits for the gradients of all parameters for which it did at the start."""
    module = CompressiveTraining(TINY, (100.0, 400.0, 1600.0), first=1, scale_steps=2)
    kernels: list[torch.Tensor] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kernels.append(next(module.network.synthesis.parameters()).detach().clone())

    own: dict[str, Any] = {"strategy": "ddp", "devices": 1, "enable_checkpointing": False}
    trainer = L.Trainer(
        max_steps=5, default_root_dir=tmp_path, callbacks=[Watch()], limit_val_batches=0, **own, **QUIET
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())  # to which the strategy adds its ranks and address
        try:
            trainer.fit(module, torch.utils.data.DataLoader(Patches(), batch_size=None))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    assert not torch.equal(kernels[1], kernels[2])
    assert torch.equal(kernels[2], kernels[3])
    assert torch.equal(kernels[3], kernels[4])


@pytest.fixture
def module(network, monkeypatch):
    """A training with a network, whose steps a test may set, and no trainer but its number of steps."""
    made = CompressiveTraining(TINY, (100.0, 400.0, 1600.0), first=1, scale_steps=4, growth_steps=3)
    made.network = network
    monkeypatch.setattr(made, "log", lambda *args, **options: None)
    monkeypatch.setattr(CompressiveTraining, "trainer", SimpleNamespace(max_steps=12))
    monkeypatch.setattr(CompressiveTraining, "global_step", 0)
    return made


@pytest.mark.parametrize("step", [5, *range(8, 12)])
def test_the_loss_is_rate_and_distortion(module, network, monkeypatch, step):
    monkeypatch.setattr(CompressiveTraining, "global_step", step)
    rate, x = module.rate(), Patches()[0]
    with torch.no_grad():
        x_hat, _ = network(x, rate)
        integers = (network.analyse(x, slice(0, 4), slice(0, 4)) * network.scales(4 * rate)).round()
        loss = module.training_step(x, 0).item()
    chances = bins(network, rate, np.arange(-400, 401))
    length = -np.log2(chances[np.arange(6)[None, :, None, None], integers.int().numpy() + 400]).sum()
    error = (((x - x_hat) / 2) ** 2).mean().item()
    assert loss == pytest.approx(length / (2 * 32 * 32) + 100 * 4**rate * error, rel=1e-2)


def test_the_rates_of_steps(module, monkeypatch):
    """The first eight steps are for one rate, the last four for any; scale_steps beyond all steps are all of them."""
    rates = []
    for step in range(12):
        monkeypatch.setattr(CompressiveTraining, "global_step", step)
        rates.append(module.rate())
    assert rates[:8] == [1] * 8
    assert rates[8:] != [1] * 4
    module.scale_steps = 200
    monkeypatch.setattr(CompressiveTraining, "trainer", SimpleNamespace(max_steps=100))
    found = []
    for step in range(100):
        monkeypatch.setattr(CompressiveTraining, "global_step", step)
        found.append(module.rate())
    assert set(found) == {0, 1, 2}


def test_rates_begin_with_what_the_first_has_learned(module, network):
    module.network = copied = copy.deepcopy(network)
    with torch.no_grad():
        copied.deviation.normal_()
    scale, deviation, weight = (p.detach().clone() for p in (network.scale, copied.deviation, copied.weight))
    module.follow_first()
    for rate, apart in enumerate((-math.log(2), 0, math.log(2))):  # half the logarithm of a weight over the first
        torch.testing.assert_close(copied.scale[rate], scale[1] + apart)
        torch.testing.assert_close(copied.deviation[rate], deviation[1] + apart)
        torch.testing.assert_close(copied.weight[rate], weight[1])


def test_every_parameter_has_one_learning_rate(module, network):
    groups = module.configure_optimizers()["optimizer"].param_groups
    found = {parameter: group["initial_lr"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(network.parameters()))
    rates = module.muon_learning_rate, module.prior_learning_rate, module.learning_rate
    assert len(set(rates)) == 3
    expected = {parameter: rates[2] for parameter in network.parameters()}
    expected |= {parameter: rates[1] for parameter in (network.scale, network.deviation, network.weight)}
    inner = [*list(network.analysis.modules()), *list(network.synthesis.modules())]
    kernels = [layer.weight for layer in inner if isinstance(layer, torch.nn.Conv2d)]
    ends = network.analysis[0].weight, network.synthesis[-2].weight  # that see or make pixels
    expected |= {kernel: rates[0] for kernel in kernels if not any(kernel is end for end in ends)}
    assert found == expected


def test_coefficients_come_one_after_another(module, network, monkeypatch):
    x = Patches()[0]
    for step, active in ((0, 1), (1, 3), (2, 5), (3, 6), (4, 6)):
        monkeypatch.setattr(CompressiveTraining, "global_step", step)
        with torch.no_grad():
            _, nats = network(x, 1, module.active())
        assert (nats[:, active:] == 0).all()
        assert (nats[:, :active].sum((0, 2, 3)) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distortion_weights": (3.0, 2.0, 1.0)}, "positive and rise, unlike"),
        ({"distortion_weights": (1.0, 1.0, 2.0)}, "positive and rise, unlike"),
        ({"distortion_weights": (-1.0, 1.0, 2.0)}, "positive and rise, unlike"),
        ({"distortion_weights": (1.0, 2.0, 3.0), "first": 1, "scale_steps": -0.2}, "scale_steps must not be negative"),
    ],
)
def test_wrong_options_of_training(options, message):
    with pytest.raises(ValueError, match=message):
        CompressiveTraining(TINY, **{"first": 1, **options})


def test_scale_steps_need_a_number_of_steps(tmp_path):
    module = CompressiveTraining(TINY, (100.0, 400.0, 1600.0), first=1)
    trainer = L.Trainer(max_steps=-1, max_time="00:00:01:00", default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="scale_steps are the last ones"):
        trainer.fit(module, torch.utils.data.DataLoader(Patches(), batch_size=None))


def test_more_coefficients_than_a_file_holds_are_refused():
    assert CompressiveConfig(coefficients=255).bits == 255
    with pytest.raises(ValueError, match="room for 255 coefficients of a block, not 256"):
        CompressiveConfig(coefficients=256)


@pytest.mark.parametrize(
    "options", [{"distortion_weights": (1.0, 2.0)}, {"distortion_weights": (1.0, 2.0, 3.0), "first": 3}]
)
def test_rates_need_weights(options):
    with pytest.raises(ValueError, match="3 rates need as many weights"):
        CompressiveTraining(TINY, **options)
