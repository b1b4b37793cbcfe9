"""Tests of compression to a budget: the choice against all combinations, and what files have against NumPy."""

import argparse
import itertools
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_calibration import save_latent
from test_compressive import TINY as COMPRESSIVE
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from rnncodec import arguments, budget
from rnncodec.cli import main
from rnncodec.codec import Codec
from rnncodec.evaluation.baselines import BASELINES
from rnncodec.evaluation.contenders import baseline
from rnncodec.evaluation.sharing import RESOLUTION, hull, share
from rnncodec.files import format
from rnncodec.files.images import load_image
from rnncodec.jobs import Job
from rnncodec.network import CompressiveAutoencoder
from rnncodec.training.calibration import calibrate
from rnncodec.weights import load_weights, save_weights

SIZES = [(32, 48), (48, 32), (40, 40), (32, 32), (48, 48), (25, 35)]


def total(tables, places):
    """The bytes and the error of a choice."""
    files = [table[place] for table, place in zip(tables, places, strict=True)]
    return sum(size for size, _ in files), sum(error for _, error in files)


def random_tables(seed, images, files):
    rng = np.random.default_rng(seed)
    return [[(int(rng.integers(1, 60)), float(rng.exponential(100))) for _ in range(files)] for _ in range(images)]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("least", [0.0, 0.9])
def test_the_choice_is_the_best_of_all_combinations(seed, least):
    tables = random_tables(seed, images=4, files=5)
    smallest = sum(min(table)[0] for table in tables)
    limit = int(np.random.default_rng(seed).integers(smallest, smallest + 120))
    every = [total(tables, places) for places in itertools.product(range(5), repeat=4)]
    fit = [found for found in every if found[0] <= limit]
    best = min(error for _, error in fit)
    size, error = total(tables, share(tables, limit, math.ceil(least * limit)))
    assert size <= limit
    window = [found for found in fit if found[0] >= least * limit]
    if error > best + 1e-9:  # only to use enough of the limit
        assert window
        assert size >= least * limit
        assert error == pytest.approx(min(error for _, error in window))


@pytest.mark.parametrize("seed", range(5))
def test_many_images_come_near_the_bound_of_duality(seed):
    """For any price of a byte, no choice that fits has less error than this."""
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(60):
        sizes = np.cumsum(rng.integers(1000, 9000, 12))
        errors = rng.uniform(1e6, 1e8) / (sizes + rng.uniform(500, 5000)) ** rng.uniform(0.8, 1.2)
        tables.append(list(zip(sizes.tolist(), errors * rng.uniform(0.97, 1.03, 12), strict=True)))
    limit = 60 * 20000
    size, error = total(tables, share(tables, limit, math.ceil(0.998 * limit)))
    prices = np.exp(np.linspace(-20, 10, 600))
    bound = max(sum(min(e + price * s for s, e in table) for table in tables) - price * limit for price in prices)
    assert 0.998 * limit <= size <= limit
    assert bound <= error <= 1.002 * bound


def test_hull():
    table = [(10, 100.0), (20, 80.0), (30, 30.0), (30, 50.0), (40, 35.0), (50, 20.0), (60, 20.0), (5, 120.0)]
    assert hull(table) == [7, 0, 2, 5]
    assert hull([(3, 1.0)]) == [0]


def test_limits_beyond_all_files_and_below():
    tables = [[(10, 5.0), (20, 1.0), (30, 2.0)], [(8, 3.0)]]
    assert share(tables, 1000, 998) == [1, 0]
    assert share(tables, 18) == [0, 0]
    with pytest.raises(ValueError, match="the smallest files take 18 bytes, more than 17"):
        share(tables, 17)


def test_coarse_totals_still_fit():
    """With limits above RESOLUTION, combinations are merged; what is left must fit in any case."""
    rng = np.random.default_rng(1)
    tables = [[(int(s), float(1e9 / s)) for s in rng.integers(100_000, 1_000_000, 30)] for _ in range(6)]
    smallest = sum(min(table)[0] for table in tables)
    for limit in (smallest, smallest + 3, smallest + 100_000, 3_000_000):
        assert limit > RESOLUTION
        assert total(tables, share(tables, limit))[0] <= limit


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    """Small parts of photographs, of different sizes and contents."""
    place = tmp_path_factory.mktemp("set")
    sources = [load_image(path) for path in sorted(photos.iterdir())]
    for number, (height, width) in enumerate(SIZES):
        x = sources[number % len(sources)][60 + 9 * number :, 80 + 11 * number :][:height, :width]
        Image.fromarray(x).save(place / f"{number}.png")
    return place


def row(printed, name):
    """The cells of a row of the printed table."""
    (line,) = [line for line in printed.splitlines() if re.match(rf"│ {name} +│", line)]
    return [cell.strip() for cell in line.strip("│").split("│")]


def of_all_pixels(folder, decoded):
    """The PSNR over all pixels of originals and decoded pictures by NumPy, and how many pixels there are."""
    squared = values = 0
    for path in sorted(folder.iterdir()):
        x, x_hat = np.asarray(Image.open(path), float), np.asarray(Image.open(decoded(path.stem)).convert("RGB"), float)
        assert x.shape == x_hat.shape
        squared, values = squared + ((x - x_hat) ** 2).sum(), values + x.size
    return 10 * np.log10(255**2 * values / squared), values // 3


def check(folder, output, name, printed, decoded, bpp, suffix):
    """Checks files and what was printed of them; gives the share of the budget that they take."""
    size = sum(path.stat().st_size for path in output.glob(f"*{suffix}"))
    psnr, pixels = of_all_pixels(folder, decoded)
    assert size <= bpp * pixels / 8
    cells = row(printed, name)
    assert cells[:3] == [name, str(len(list(folder.iterdir()))), str(size)]
    assert float(cells[3]) == pytest.approx(8 * size / pixels, abs=1e-5)
    assert float(cells[4]) == pytest.approx(psnr, abs=6e-4)
    assert float(cells[6]) >= 0
    return 8 * size / pixels / bpp


def decode(files, output, *weights):
    assert main(["decode", str(files), "--output-dir", str(output), "--quiet", *weights]) == 0
    return lambda stem: output / f"{stem}.png"


@pytest.mark.slow
def test_shipped_weights_use_the_budget(folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["budget", str(folder), "--output-dir", str(output), "--bpp", "1"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert check(folder, output, "rnncodec-small", printed, decode(output, tmp_path / "png"), 1, ".rnc") > 0.998
    assert len({format.read_header(path.read_bytes()).iterations for path in output.iterdir()}) > 1


@pytest.fixture(scope="module")
def compressive(tmp_path_factory):
    torch.manual_seed(0)
    network = CompressiveAutoencoder(COMPRESSIVE).eval()
    with torch.no_grad():
        network.scale.add_(torch.linspace(0, 3, COMPRESSIVE.rates)[:, None])
        network.weight.normal_()
    network.tabulate()
    path = tmp_path_factory.mktemp("weights") / "cae.safetensors"
    save_weights(path, network, "cae")
    return path


@pytest.fixture(scope="module")
def stopping(photos, tmp_path_factory):
    """Weights of a latent network whose locations may stop."""
    place = tmp_path_factory.mktemp("weights")
    save_latent(photos, place / "bare.safetensors")
    bare = Codec(load_weights(place / "bare.safetensors"))
    allocation = calibrate(bare, [load_image(path)[:256, :256] for path in sorted(photos.iterdir())])
    save_weights(place / "latent.safetensors", bare.network, "latent", {}, bare.context, allocation)
    return place / "latent.safetensors"


@pytest.fixture(scope="module")
def larger(photos, tmp_path_factory):
    """Parts of photographs that are large enough for MS-SSIM."""
    place = tmp_path_factory.mktemp("larger")
    for path in sorted(photos.iterdir())[:3]:
        Image.fromarray(load_image(path)[40:220, 30:230]).save(place / f"{path.stem}.png")
    return place


def test_baselines_use_the_budget(larger, compressive, tmp_path, capsys):
    output = tmp_path / "out"
    others = [name for name in ("jpeg", "webp") if BASELINES[name].available]
    command = ["budget", str(larger), "--output-dir", str(output), "--weights", str(compressive), "--bpp", "2"]
    assert main([*command, "--baselines", *others]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    for name in others:
        place, suffix = output / name, BASELINES[name].suffix
        used = check(larger, place, name, printed, lambda stem, p=place, s=suffix: p / f"{stem}{s}", 2, suffix)
        assert used > 0.998


def test_jpeg_is_nearly_the_best_of_all_qualities(larger, compressive, tmp_path, capsys):
    """Of all combinations of qualities of three images that use the budget."""
    tables = []
    for path in sorted(larger.iterdir()):
        x = np.asarray(Image.open(path))
        files = [BASELINES["jpeg"].encode(x, quality) for quality in range(1, 96)]
        tables.append(
            [(len(file), float(((x - BASELINES["jpeg"].decode(file).astype(float)) ** 2).sum())) for file in files]
        )
    pixels = 3 * 180 * 200
    limit = int(2 * pixels / 8)
    sizes, errors = (np.array([[file[i] for file in table] for table in tables]) for i in (0, 1))
    size = sizes[0][:, None, None] + sizes[1][:, None] + sizes[2]
    error = errors[0][:, None, None] + errors[1][:, None] + errors[2]
    best = 10 * np.log10(255**2 * 3 * pixels / error[(size <= limit) & (size >= 0.998 * limit)].min())
    command = [
        "budget",
        str(larger),
        "--output-dir",
        str(tmp_path / "out"),
        "--weights",
        str(compressive),
        "--bpp",
        "2",
    ]
    assert main([*command, "--baselines", "jpeg"]) == 0
    found = float(row(capsys.readouterr().out, "jpeg")[4])
    assert best - 0.05 < found < best + 0.001


def test_other_weights_keep_to_the_budget(folder, tiny, compressive, stopping, tmp_path, capsys):
    for weights, name, bpp in ((tiny, "tiny", 12.0), (compressive, "cae", 4.0), (stopping, "latent", 0.9)):
        output, given = tmp_path / name, ["--weights", str(weights)]
        assert main(["budget", str(folder), "--output-dir", str(output), "--bpp", str(bpp), *given]) == 0
        printed, errors = capsys.readouterr()
        assert errors == ""
        decoded = decode(output, tmp_path / f"{name}-png", *given)
        check(folder, output, f"rnncodec-{name}", printed, decoded, bpp, ".rnc")


def test_locations_stop_where_weights_allow_it(larger, stopping, tmp_path, capsys):
    output, given = tmp_path / "out", ["--weights", str(stopping)]
    assert main(["budget", str(larger), "--output-dir", str(output), "--bpp", "0.09", *given]) == 0
    cells = row(capsys.readouterr().out, "rnncodec-latent")
    assert any(format.read_header(path.read_bytes()).maps for path in output.iterdir())
    assert 0.98 * 0.09 < float(cells[3]) <= 0.09
    decoded = decode(output, tmp_path / "png", *given)
    each = []
    for path in larger.iterdir():
        x, x_hat = (
            torch.tensor(load_image(file)).permute(2, 0, 1)[None].float() for file in (path, decoded(path.stem))
        )
        each.append(multiscale_structural_similarity_index_measure(x_hat, x, data_range=255.0).item())
    assert float(cells[5]) == pytest.approx(np.mean(each), abs=6e-5)
    assert float(cells[4]) == pytest.approx(of_all_pixels(larger, decoded)[0], abs=6e-4)


@pytest.mark.parametrize("bpp", [0.1, 0.13])
def test_a_single_image_gets_its_bytes(larger, stopping, tmp_path, capsys, bpp):
    """Also where no file that is cut after an iteration takes nearly as many."""
    output = tmp_path / "out"
    given = ["--weights", str(stopping), "--tune", "psnr"]
    assert main(["budget", str(larger / "coffee.png"), "--output-dir", str(output), "--bpp", str(bpp), *given]) == 0
    assert 0.985 * bpp < float(row(capsys.readouterr().out, "rnncodec-latent")[3]) <= bpp


def test_bits_are_spent_for_what_is_to_be_high(larger, tmp_path):
    args = argparse.Namespace(bpp=0.7, max_pixels=10**6, quiet=True)
    found = []
    for tune in ("psnr", "ms-ssim"):
        jobs = [Job(str(path), str(tmp_path / tune / f"{path.stem}.jpg"), False) for path in larger.iterdir()]
        status, read, files = budget.compress(baseline(BASELINES["jpeg"], budget.ERRORS[tune]), jobs, args)
        assert (status, len(read)) == (0, len(jobs))
        found.append((budget.psnr(files), np.mean([file.ms_ssim for file in files])))
    assert found[0][0] > found[1][0]
    assert found[0][1] < found[1][1]


def complaints(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("rnncodec: ") for line in lines), lines
    return lines


def test_a_budget_that_is_too_small(folder, tiny, tmp_path, capsys):
    command = ["budget", str(folder), "--output-dir", str(tmp_path / "out"), "--weights", str(tiny), "--bpp", "0.01"]
    assert main(command) == 1
    (line,) = complaints(capsys)
    assert re.search(r"the smallest files take \d+ bytes, more than \d+$", line)
    assert not (tmp_path / "out").exists()


def test_a_baseline_whose_files_are_too_large_is_named(folder, tiny, tmp_path, capsys):
    output = str(tmp_path / "out")
    command = ["budget", str(folder), "--output-dir", output, "--weights", str(tiny), "--bpp", "0.4"]
    assert main([*command, "--baselines", "jpeg"]) == 0
    (line,) = complaints(capsys)
    assert re.search(r"warning: jpeg: the smallest files take \d+ bytes, more than \d+$", line)


def test_images_that_cannot_be_read_are_named_and_left_out(folder, tiny, tmp_path, capsys):
    place = shutil.copytree(folder, tmp_path / "set")
    (place / "broken.png").write_bytes((place / "0.png").read_bytes()[:200])
    (place / "raw.cr2").write_bytes(b"raw")
    output = tmp_path / "out"
    assert main(["budget", str(place), "--output-dir", str(output), "--weights", str(tiny), "--bpp", "12"]) == 1
    printed, errors = capsys.readouterr()
    broken, raw = errors.splitlines()
    assert broken.startswith("rnncodec: error: ")
    assert "broken.png" in broken
    assert raw.startswith("rnncodec: skipped: ")
    assert "raw.cr2" in raw
    assert row(printed, "rnncodec-tiny")[1] == str(len(SIZES))
    assert len(list(output.iterdir())) == len(SIZES)


def test_outputs_are_replaced_only_if_that_is_asked_for(folder, tiny, tmp_path, capsys):
    command = ["budget", str(folder), "--output-dir", str(tmp_path), "--weights", str(tiny), "--bpp", "12"]
    (tmp_path / "3.rnc").write_bytes(b"mine")
    assert main(command) == 1
    (line,) = complaints(capsys)
    assert line == f"rnncodec: error: {tmp_path / '3.rnc'} exists; --force replaces it"
    assert [path.name for path in tmp_path.iterdir()] == ["3.rnc"]
    assert main([*command, "--force", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "3.rnc").read_bytes() != b"mine"


def test_inputs_are_not_overwritten(folder, tiny, tmp_path, capsys):
    place = tmp_path / "jpeg"
    place.mkdir()
    Image.open(folder / "0.png").save(place / "a.jpg")
    before = (place / "a.jpg").read_bytes()
    command = ["budget", str(place), "--output-dir", str(tmp_path), "--weights", str(tiny), "--force"]
    assert main([*command, "--baselines", "jpeg"]) == 1
    assert "would overwrite the input" in complaints(capsys)[0]
    assert (place / "a.jpg").read_bytes() == before


def test_small_images_have_no_ms_ssim_to_tune_for(folder, tiny, tmp_path, capsys):
    command = ["budget", str(folder), "--output-dir", str(tmp_path), "--weights", str(tiny), "--tune", "ms-ssim"]
    assert main(command) == 1
    *lines, last = complaints(capsys)
    assert len(lines) == len(SIZES)
    assert all("--tune ms-ssim needs images of at least 176 pixels a side" in line for line in lines)
    assert last == "rnncodec: error: there is no image to compress"


def test_arguments_name_all_baselines_with_settings():
    assert [name for name, codec in BASELINES.items() if len(codec.scale)] == list(arguments.BASELINES)


def test_missing_packages_are_named(folder, tmp_path, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics")

    monkeypatch.setattr("rnncodec.cli.import_module", missing)
    assert main(["budget", str(folder), "--output-dir", str(tmp_path)]) == 1
    (line,) = complaints(capsys)
    assert line.endswith("budget needs torchmetrics, which is not installed: pip install 'rnncodec[eval]'")
