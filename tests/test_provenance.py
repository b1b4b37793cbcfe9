"""Tests of what results depend on: commit, images, cost of the network; and of stops and numbers that are logged."""

import hashlib
import json
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import rnncodec
from rnncodec.data import PatchDataModule
from rnncodec.data.manifest import manifest_of
from rnncodec.evaluation.measure import Source
from rnncodec.evaluation.results import Results
from rnncodec.metrics.curves import Point
from rnncodec.network import LatentConfig, NetworkConfig
from rnncodec.training.context import JointTraining
from rnncodec.training.provenance import macs_per_pixel, source


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with a package that stands for ours; runs git in it."""

    def git(*arguments):
        names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"}
        command = ["git", "-C", str(tmp_path), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | names
        ).stdout.strip()

    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("no git")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "other.txt").write_text("")
    monkeypatch.setattr(rnncodec, "__file__", str(tmp_path / "package" / "__init__.py"))
    return git


def test_the_source_is_a_commit_and_whether_files_differ(repository, tmp_path, monkeypatch):
    version = {"version": rnncodec.__version__}
    assert source() == version  # there is no commit yet
    repository("add", "other.txt")
    repository("commit", "-q", "-m", "a")
    assert source() == version  # as if an environment with the package were in a repository of something else
    repository("add", "package")
    repository("commit", "-q", "-m", "b")
    repository("tag", "-a", "v1-rc", "-m", "b")
    found = version | {"commit": repository("rev-parse", "HEAD")}
    assert source() == found | {"dirty": False}
    (tmp_path / "package" / "__init__.py").write_text("1")
    assert source() == found | {"dirty": True}
    monkeypatch.setenv("PATH", "")
    assert source() == version


def test_the_fingerprint_of_images_is_that_of_their_contents(tmp_path):
    generator = np.random.default_rng(0)
    contents = {}
    for name in ("a.png", "b.png", "c.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        contents[name] = path.read_bytes()
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")  # is skipped, and no part of the data

    def manifest(root="photos"):
        data = PatchDataModule(tmp_path / root, val_images=1, cache_dir=tmp_path / "cache")
        data.prepare_data()
        data.setup()
        return data.cache.folder / "hashes.json", manifest_of(data)

    kept, first = manifest()
    assert {row["file"]: (row["bytes"], row["sha256"]) for row in json.loads(first.text)} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()
    }
    assert sorted(row["split"] for row in first.rows) == ["train", "train", "val"]
    assert (first.images["train"], first.images["val"]) == (2, 1)
    assert hashlib.sha256(first.text.encode()).hexdigest()[:16] == first.fingerprint
    assert manifest()[1] == first  # from what was kept
    for damaged in (b"", b"[]", b'{"a.png": 1}', b'{"a.png": [1, "2"]}'):
        kept.write_bytes(damaged)
        assert manifest()[1] == first
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    assert manifest("elsewhere")[1].fingerprint == first.fingerprint
    changed = bytearray(contents["a.png"])
    Image.new("RGB", (64, 64)).save(tmp_path / "elsewhere" / "a.png")
    assert (tmp_path / "elsewhere" / "a.png").read_bytes() != changed
    assert manifest("elsewhere")[1].fingerprint != first.fingerprint


def test_multiply_accumulates_are_those_counted_by_hand():
    """Of the default network: LSTMs with four gates, whose inputs have 3x3 kernels and whose states 1x1 or 3x3."""
    costs = macs_per_pixel(NetworkConfig())
    stem = 3 * 64 * 9 / 4
    inputs = 4 * 256 * 64 * 9 / 16 + 4 * 512 * 256 * 9 / 64 + 4 * 512 * 512 * 9 / 256
    states = 4 * 256 * 256 / 16 + 4 * 512 * 512 / 64 + 4 * 512 * 512 / 256
    binarizer = 512 * 32 / 256
    assert costs["encoder_first"] == stem + inputs + binarizer
    assert costs["encoder"] == stem + inputs + states + binarizer
    # 32 bits to 512 channels; each cell's output becomes a quarter of the channels at twice the resolution.
    widths = [(512, 512, 1, 256), (128, 512, 1, 64), (128, 256, 3, 16), (64, 128, 3, 4)]
    decoder = 32 * 512 / 256 + sum(4 * out * into * 9 / area for into, out, _, area in widths) + 32 * 3
    assert costs["decoder_first"] == decoder
    assert costs["decoder"] == decoder + sum(4 * out * out * kernel**2 / area for _, out, kernel, area in widths)
    assert costs["analysis"] == costs["synthesis"] == 0


def test_the_map_of_stops_minimizes_error_and_bits(monkeypatch):
    shape = LatentConfig(
        iterations=16, bits=8, groups=2, latents=8, encoder_channels=8, decoder_channels=8, mixed=8, around=8,
        analysis_channels=(8, 8, 8), synthesis_channels=(8, 8, 8), synthesis_blocks=1,
    )  # fmt: skip
    torch.manual_seed(0)
    module = JointTraining(network=shape, iterations=16).eval()
    generator = np.random.default_rng(0)
    height, width, rows, cols = 70, 90, 5, 6
    nats = generator.uniform(0.1, 1, (16, 1, 8, rows, cols))
    errors = np.cumsum(generator.exponential(size=(16, rows, cols)), 0)[::-1].copy()
    monkeypatch.setattr("rnncodec.training.context.predicted", lambda context, bits, cases: (nats, None))
    monkeypatch.setattr("rnncodec.training.context.code_nats", lambda logits, planes: torch.tensor(logits))
    stops = module.maps([], [], [torch.tensor(error) for error in errors])["stops"].numpy() * 16

    bits = np.cumsum(nats.sum((1, 2)), 0) / np.log(2)
    choices = [(errors + factor * bits).argmin(0) + 1 for factor in np.geomspace(1e-4, 1e3, 20000)]
    assert any(np.array_equal(choice, stops) for choice in choices)
    spent = np.take_along_axis(bits, stops.astype(int)[None] - 1, 0).sum()
    assert 0.8 * bits[7].sum() < spent <= bits[7].sum()
    monkeypatch.undo()
    with torch.inference_mode():
        x = torch.rand(1, 3, height, width) * 2 - 1
        found = module.validation_step(x, 0)
        assert found["maps"]["stops"].shape == (3, height, width)
        assert len(np.unique(found["maps"]["stops"][0, :16, :16])) == 1
        assert module.validation_step(x, 1)["maps"] == {}
    for k in (1, 2, 4, 8, 16):
        assert found["values"][f"saved_{k}"] == pytest.approx(1 - found["values"][f"bpp_{k}"] / (k * 8 / 256))


def test_the_numbers_of_an_evaluation_are_those_of_the_first_codec():
    """Of one that takes four fifths of the bits of JPEG for the same quality, and three times those of WebP."""

    def source_of(name, title):
        return Source(name, title, "", ".png", (1, 2, 3, 4, 5), lambda x, settings: iter(()))

    codecs = {"rnncodec-x": 0.8, "jpeg": 1.0, "webp": 0.8 / 3}
    points = [
        Point(
            "a", codec, k, bytes=100 * k, bpp=0.5 * k * bits, psnr=20.0 + 5 * k, ms_ssim=1 - 0.5**k, psnr_hvs_m=10.0 * k
        )
        for codec, bits in codecs.items()
        for k in (1, 2, 3, 4, 5)
    ]
    titles = {"rnncodec-x": "rnncodec-x", "jpeg": "JPEG 4:2:0", "webp": "WebP"}
    numbers = Results(points, [source_of(*each) for each in titles.items()], 1, {}, {}).numbers
    for metric in ("psnr", "ms_ssim_db", "psnr_hvs_m"):
        assert numbers[f"bd_rate_{metric}_jpeg"] == pytest.approx(-20)
        assert numbers[f"bd_rate_{metric}_webp"] == pytest.approx(200)
        assert numbers[f"bd_rate_{metric}_overlap_jpeg"] == 1
    # From 0.4 bpp, where PSNR is 25 dB, it rises by 12.5 dB for each bit per pixel.
    assert numbers["auc_psnr_to_2"] == pytest.approx(1.6 * (25 + 45) / 2)
