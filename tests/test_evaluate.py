"""Tests of the evaluation: rates of whole files, metrics against other implementations, cache, tables and errors."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from psnr_hvsm import psnr_hvs_hvsm
from reference import Reference
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

import rnncodec
from rnncodec.codec import Codec
from rnncodec.entropy import CLASSICAL, ContextConfig, ContextModel
from rnncodec.evaluation import evaluate, measure, pictures
from rnncodec.evaluation.baselines import BASELINES
from rnncodec.evaluation.measure import Coded
from rnncodec.files.format import truncate
from rnncodec.metrics.curves import Point, from_csv, to_csv
from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.weights import load_weights, save_weights

BT601 = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    config = NetworkConfig(bits=4, encoder_channels=(4, 4, 4, 4), decoder_channels=(4, 4, 4, 4, 4))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, RecurrentCodec(config), "tiny", {})
    return path


@pytest.fixture(scope="module")
def weights_with_context(weights):
    torch.manual_seed(1)
    context = ContextModel(ContextConfig(kind="parallel", bits=4, channels=4, groups=2)).quantize()
    path = weights.with_name("context.safetensors")
    save_weights(path, load_weights(weights).network, "tiny", {}, context)
    return path


@pytest.fixture
def command(weights, tmp_path):
    """The command line of a quick evaluation, and the folder its results go to."""
    output = tmp_path / "results"
    options = ["--weights", str(weights), "--iterations", "2", "--output", str(output)]
    return [*options, "--cache-dir", str(tmp_path / "cache")], output


def photographs(folder: Path) -> Path:
    folder.mkdir()
    Image.fromarray(data.astronaut()[:200, :176]).save(folder / "astronaut.png")
    Image.fromarray(data.coffee()[:20, :30]).save(folder / "coffee.png")
    return folder


def test_metrics_are_of_the_whole_file_over_true_pixels():
    x = data.astronaut()[:17, :33]
    worse = x // 2
    point = measure.measure("a", "codec", x, Coded(3, 100, worse, None, 90, 0.5, 0.25))
    assert (point.image, point.codec, point.setting, point.bytes) == ("a", "codec", 3, 100)
    assert (point.bpp, point.ideal_bpp) == (8 * 100 / (17 * 33), 8 * 90 / (17 * 33))
    assert point.l1 == pytest.approx(np.abs(x.astype(float) - worse).mean(), rel=1e-6)
    assert point.psnr == pytest.approx(peak_signal_noise_ratio(x, worse), abs=1e-4)
    luma, luma_worse = (a[:16, :32] @ BT601 / 255 for a in (x, worse))
    hvs, hvs_m = map(float, psnr_hvs_hvsm(luma, luma_worse))
    assert (point.psnr_hvs, point.psnr_hvs_m) == pytest.approx((hvs, hvs_m), abs=1e-3)
    assert math.isnan(point.ms_ssim)  # too small for it
    assert (point.encode_seconds, point.decode_seconds) == (0.5, 0.25)
    assert measure.measure("a", "codec", x, Coded(1, 1, x)).psnr == math.inf


@pytest.mark.parametrize("size", [(1, 1), (33, 17), (48, 64)])
def test_every_iteration_is_that_of_the_cut_file(weights_with_context, size):
    codec = Codec(load_weights(weights_with_context))
    x = data.astronaut()[: size[0], 100 : 100 + size[1]]
    file = codec.encode(x, iterations=3)
    coded = list(measure.ours(codec, 3).run(x, (1, 2, 3)))
    assert [c.setting for c in coded] == [1, 2, 3]
    for c in coded:
        cut = truncate(file, iterations=int(c.setting))
        assert c.size == len(cut)
        np.testing.assert_array_equal(c.x_hat, np.asarray(codec.decode(cut)))
    assert coded[-1].size == len(file)
    assert [math.isnan(c.encode_seconds) for c in coded] == [True, True, False]  # of the whole file only


def test_another_picture_from_the_cut_file_is_an_error(weights, monkeypatch):
    codec, x = Codec(load_weights(weights)), data.astronaut()[:32, :32]
    list(measure.ours(codec, 3).run(x, (1, 2, 3)))
    decode = codec.decode

    def changed(file, iterations=None):
        picture = np.array(decode(file, iterations))
        picture[3, 4, 1] ^= 1
        return Image.fromarray(picture)

    monkeypatch.setattr(codec, "decode", changed)
    with pytest.raises(RuntimeError, match="another picture"):
        list(measure.ours(codec, 3).run(x, (1, 2, 3)))


def test_ideal_bytes_are_those_of_the_probabilities(weights_with_context):
    """The reference computes them with integer arithmetic, as FORMAT.md specifies."""
    loaded = load_weights(weights_with_context)
    codec, x = Codec(loaded), data.astronaut()[:160, 100:260]
    coded = list(measure.ours(codec, 3).run(x, (1, 2, 3)))
    signs = codec.read_bits(codec.encode(x, 3))
    logits = Reference(loaded.context).logits(signs) / 256
    lengths = np.log2(1 + np.exp(-signs * logits)).sum((1, 2, 3)) / 8
    for c, least in zip(coded, lengths.cumsum(), strict=True):
        assert c.ideal_bytes == pytest.approx(least, rel=1e-3)  # probabilities are multiples of 2^-16
        assert 0 < c.size - c.ideal_bytes < 0.01 * c.ideal_bytes + 150


def test_labels_of_curves_that_coincide_stay_apart_and_inside():
    assert pictures.spread([1, 5], 1, 10) == [1, 5]
    assert pictures.spread([1, 1.5, 1.6], 1, 10) == [1, 2, 3]
    assert pictures.spread([1, 9.5, 9.6, 9.7], 1, 10) == [1, 8, 9, 10]
    assert pictures.spread([], 1, 10) == []


def test_one_iteration_and_nothing_beside_it(command, tmp_path):
    options, output = command
    arguments = [str(photographs(tmp_path / "photos")), *options, "--iterations", "1", "--baselines"]
    assert evaluate.main(arguments) == 0
    assert [point.image for point in from_csv((output / "mean.csv").read_text())] == ["mean", "mean of 1"]
    assert ET.parse(output / "rate_distortion.svg").getroot().tag.endswith("svg")


def test_names_are_unique():
    paths = map(Path, ["a/x.png", "b/x.png", "b/x-2.png", "x.jpg", "y.png"])
    assert measure.unique_names(paths) == ["x", "x-2", "x-2-2", "x-3", "y"]


def test_names_that_no_text_or_folder_can_have():
    """Names have bytes that are not UTF-8, line breaks, only dots, or more bytes than allowed."""
    paths = [Path(os.fsdecode(b"a\xff\xfe.png")), Path("a\n\r.png"), Path("...png"), Path("..png"), Path("ä" * 125)]
    assert measure.unique_names(paths) == ["a__", "a__-2", "_", "_-2", "ä" * 100]


def test_a_folder_with_an_unreadable_image(command, tmp_path, capsys):
    options, output = command
    folder = photographs(tmp_path / "photos")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    arguments = [str(folder), str(tmp_path / "missing.png"), *options, "--save-images", "--baselines", "jpeg", "png"]
    assert evaluate.main(arguments) == 1

    captured = capsys.readouterr()
    assert "broken.png" in captured.err
    assert "missing.png" in captured.err
    assert "could not be measured: 2" in captured.err
    assert "Traceback" not in captured.err
    assert {path.name for path in output.iterdir()} == {
        "rnncodec-tiny.json",
        "jpeg.json",
        "png.json",
        "points.csv",
        "mean.csv",
        "summary.csv",
        "rate_distortion.png",
        "rate_distortion.svg",
        "report.html",
        "pictures",
        "astronaut_comparison.png",
        "coffee_comparison.png",
    }
    ET.parse(output / "rate_distortion.svg")
    assert "<!-- MS-SSIM (dB), mean of 1 -->" in (output / "rate_distortion.svg").read_text()
    with Image.open(output / "rate_distortion.png") as plot:
        plot.verify()

    points = from_csv((output / "points.csv").read_text())
    mine = [point for point in points if point.codec == "rnncodec-tiny"]
    assert [(point.image, point.setting) for point in mine] == [
        ("astronaut", 1),
        ("astronaut", 2),
        ("coffee", 1),
        ("coffee", 2),
    ]
    # Files hold whole bytes of 4 bits for each 16x16 block beside a header that does not depend on the size.
    assert mine[0].bytes - mine[2].bytes == 13 * 11 * 4 // 8 + 1 - 2 * 2 * 4 // 8
    assert [math.isnan(point.ms_ssim) for point in mine] == [False, False, True, True]
    for point in points:
        x = np.asarray(Image.open(folder / f"{point.image}.png"))
        np.testing.assert_array_equal(np.asarray(Image.open(output / "pictures" / point.image / "original.png")), x)
        with Image.open(output / point.picture) as picture:
            x_hat = np.asarray(picture.convert("RGB"))
        if point.codec == "png":
            assert point.psnr == math.inf
            np.testing.assert_array_equal(x_hat, x)
        else:
            assert point.psnr == pytest.approx(peak_signal_noise_ratio(x, x_hat), abs=1e-4)
        if point.codec == "jpeg":  # the picture is the coded file itself
            assert (output / point.picture).stat().st_size == point.bytes
        assert point.bpp == pytest.approx(8 * point.bytes / (x.shape[0] * x.shape[1]))

    # Beside our files lies the JPEG whose bytes are closest: the smallest there is, as it is larger than both of ours.
    settings = {(point.image, point.setting) for point in points if point.codec == "jpeg"}
    assert settings == {(image, q) for image in ("astronaut", "coffee") for q in (1, *BASELINES["jpeg"].settings)}

    for codec, count in (("rnncodec-tiny", 2), ("jpeg", len(BASELINES["jpeg"].settings))):
        results = json.loads((output / f"{codec}.json").read_text())["results"]
        assert set(results) == {"bpp", "psnr-rgb", "ms-ssim-rgb", "psnr-hvs", "psnr-hvs-m", "l1"}
        # MS-SSIM, for which one image is too small, has rates of its own.
        assert {len(values) for values in results.values()} == {2 * count}
        settings = BASELINES["jpeg"].settings if codec == "jpeg" else (1, 2)
        large = [p for p in points if p.codec == codec and p.image == "astronaut" and p.setting in settings]
        assert results["bpp"][count:] == pytest.approx([point.bpp for point in large])
        assert results["ms-ssim-rgb"][:count] == [None] * count
        assert results["ms-ssim-rgb"][count:] == pytest.approx([point.ms_ssim for point in large])
        first = [p for p in points if p.codec == codec and p.setting == (5 if codec == "jpeg" else 1)]
        assert [point.image for point in first] == ["astronaut", "coffee"]
        assert results["psnr-rgb"][0] == pytest.approx(np.mean([point.psnr for point in first]))
        assert results["bpp"][0] == pytest.approx(np.mean([point.bpp for point in first]))


@pytest.mark.usefixtures("undrawn")
def test_saved_pictures_change_no_curve(command, tmp_path):
    """Curves leave out the settings at which other codecs are measured to match the bytes of single files."""
    options, output = command
    arguments = [str(photographs(tmp_path / "photos")), *options, "--baselines", "jpeg"]
    names = ["mean.csv", "summary.csv", "jpeg.json", "rnncodec-tiny.json"]
    assert evaluate.main(arguments) == 0
    before = {name: (output / name).read_text() for name in names}
    assert evaluate.main([*arguments, "--save-images"]) == 0
    assert {name: (output / name).read_text() for name in names} == before


@pytest.mark.usefixtures("undrawn")
def test_what_images_lost_is_said_once(command, tmp_path, capsys):
    """In the words and the form of `rnncodec encode`, even where an image is read several times."""
    options, _ = command
    folder = photographs(tmp_path / "photos")
    for name in ("clear.png", "glass.png"):
        Image.new("RGBA", (32, 24), (0, 99, 0, 99)).save(folder / name)
    assert evaluate.main([str(folder), *options, "--save-images", "--baselines"]) == 0
    first = folder / "clear.png"
    said = f"evaluate: warning: 2 files, such as {first}: transparency is replaced by white"
    assert [line for line in capsys.readouterr().err.splitlines() if "arning" in line] == [said]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("codec", "side"), [("jpeg", 65535), ("webp", 16384)])
def test_an_image_that_another_codec_cannot_hold_is_named(command, tmp_path, capsys, codec, side):
    options, output = command
    folder = photographs(tmp_path / "photos")
    Image.new("RGB", (side, 1)).save(folder / "long.png")
    assert evaluate.main([str(folder), *options, "--baselines", codec]) == 1
    error = capsys.readouterr().err
    assert f"skipped: {folder / 'long.png'}: {BASELINES[codec].title}: " in error
    assert "could not be measured: 1" in error
    assert {point.image for point in from_csv((output / "points.csv").read_text())} == {"astronaut", "coffee"}


@pytest.mark.usefixtures("undrawn")
def test_what_was_measured_is_remembered(command, tmp_path, monkeypatch):
    options, output = command
    folder = photographs(tmp_path / "photos")
    arguments = [str(folder), *options, "--baselines", "jpeg"]
    assert evaluate.main(arguments) == 0
    first = from_csv((output / "points.csv").read_text())

    measured = []
    measure_one = measure.measure

    def counted(image, codec, *rest):
        measured.append((image, codec))
        return measure_one(image, codec, *rest)

    monkeypatch.setattr(measure, "measure", counted)
    # An image under another name is the same image, and one that has changed is not.
    (folder / "coffee.png").rename(folder / "tea.png")
    Image.fromarray(255 - data.astronaut()[:200, :176]).save(folder / "astronaut.png")
    assert evaluate.main(arguments) == 0
    again = from_csv((output / "points.csv").read_text())
    assert {image for image, _ in measured} == {"astronaut"}
    for old, new in zip(first, again, strict=True):
        assert (old.codec, old.setting) == (new.codec, new.setting)
        if old.image == "coffee":
            assert new.image == "tea"
            assert (old.bytes, old.psnr, old.encode_seconds) == pytest.approx(
                (new.bytes, new.psnr, new.encode_seconds), nan_ok=True
            )

    # Other weights of the same name are another codec; JPEG is what it was.
    measured.clear()
    torch.manual_seed(5)
    config = NetworkConfig(bits=4, encoder_channels=(4, 4, 4, 4), decoder_channels=(4, 4, 4, 4, 4))
    save_weights(tmp_path / "new.safetensors", RecurrentCodec(config), "tiny", {})
    assert evaluate.main([*arguments, "--weights", str(tmp_path / "new.safetensors")]) == 0
    assert {codec for _, codec in measured} == {"rnncodec-tiny"}

    # What is remembered of an interrupted or damaged run is measured again.
    measured.clear()
    for path in (tmp_path / "cache").iterdir():
        path.write_text(path.read_text()[:-40])
    assert evaluate.main(arguments) == 0
    assert {codec for _, codec in measured} == {"rnncodec-tiny", "jpeg"}
    assert [p.psnr for p in from_csv((output / "points.csv").read_text())] == [p.psnr for p in again]


def comparable(points, **changes):
    """Points as text, as nan is not equal to itself; what was read has bytes as floats."""
    return to_csv(replace(point, bytes=float(point.bytes), **changes) for point in points)


@pytest.mark.usefixtures("undrawn")
def test_the_function_gives_the_points_of_the_command_line(weights_with_context, command, tmp_path):
    options, output = command
    folder = photographs(tmp_path / "photos")
    weights = ["--weights", str(weights_with_context)]
    assert evaluate.main([str(folder), *options, *weights, "--baselines", "jpeg", "png"]) == 0
    codec = rnncodec.load(weights_with_context)
    points = rnncodec.evaluate(codec, folder, iterations=2, baselines=["jpeg", "png"], cache=tmp_path / "cache")
    assert comparable(points) == comparable(from_csv((output / "points.csv").read_text()))  # seconds are remembered

    saved = tmp_path / "saved"
    points = rnncodec.evaluate(
        codec, [str(folder)], iterations=2, baselines=["jpeg"], output=saved, save_images=True, cache=tmp_path / "cache"
    )
    assert comparable(points) == comparable(from_csv((saved / "points.csv").read_text()))
    assert all((saved / point.picture).is_file() for point in points)
    assert (saved / "mean.csv").read_text() == "".join(
        line for line in (output / "mean.csv").read_text().splitlines(keepends=True) if ",png," not in line
    )


@pytest.mark.usefixtures("undrawn")
def test_the_function_writes_and_prints_nothing_unless_asked(weights, command, tmp_path, monkeypatch, capfd):
    options, output = command
    folder = photographs(tmp_path / "photos")
    assert evaluate.main([str(folder), *options, "--baselines", "jpeg"]) == 0
    capfd.readouterr()
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    points = rnncodec.evaluate(rnncodec.load(weights), [folder], iterations=2, baselines=["jpeg"])
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert capfd.readouterr() == ("", "")
    timeless = {"encode_seconds": math.nan, "decode_seconds": math.nan}
    assert comparable(points, **timeless) == comparable(from_csv((output / "points.csv").read_text()), **timeless)


@pytest.mark.usefixtures("undrawn")
def test_codecs_by_name_are_measured_beside_each_other(weights, weights_with_context, tmp_path):
    """Two codecs with the same bits, raw and coded, give the same points as each alone."""
    folder, output = tmp_path / "photos", tmp_path / "results"
    folder.mkdir()
    for name, side in (("a.png", 48), ("b.png", 30)):
        Image.fromarray(data.coffee()[:side, :40]).save(folder / name)
    codecs = {"raw": rnncodec.load(weights), "coded": rnncodec.load(weights_with_context)}
    points = rnncodec.evaluate(codecs, folder, output=output)
    for name, codec in codecs.items():
        alone = rnncodec.evaluate(codec, folder)
        mine = [point for point in points if point.codec == f"rnncodec-{name}"]
        assert [(p.image, p.setting, p.bytes, p.psnr) for p in mine] == [
            (p.image, p.setting, p.bytes, p.psnr) for p in alone
        ]
        assert len(mine) == 2 * 16  # all iterations there are
    assert {path.name for path in output.glob("*.json")} == {"rnncodec-raw.json", "rnncodec-coded.json"}
    rows = list(csv.DictReader((output / "summary.csv").read_text().splitlines()))
    assert [row["codec"] for row in rows] == ["rnncodec-raw", "rnncodec-coded"]
    assert all(row["auc_psnr_to_2"] for row in rows)  # neither has larger files than these


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be in 1..16, not 0"),
        ({"iterations": 17}, "iterations must be in 1..16, not 17"),
        ({"save_images": True}, "output folder"),
        ({"wandb": "a run"}, "output folder"),
        ({"baselines": ["no-such-codec"]}, "no-such-codec"),
        ({"codecs": {}}, "no codec"),
        ({"codecs": "../a"}, "not '../a'"),
        ({"images": []}, "no image could be measured"),
        ({"images": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_what_the_function_refuses(weights, tmp_path, options, message):
    codec = rnncodec.load(weights)
    codecs = options.pop("codecs", codec)
    arguments = {"images": photographs(tmp_path / "photos"), **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        rnncodec.evaluate({codecs: codec} if isinstance(codecs, str) else codecs, **arguments)


def test_the_package_loads_the_evaluation_when_it_is_wanted():
    code = (
        "import sys, rnncodec, rnncodec.evaluation.report\n"
        "print(*{'torch', 'lightning', 'wandb', 'matplotlib', 'rnncodec.evaluation.evaluate'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert rnncodec.evaluate.__module__ == "rnncodec.evaluation.evaluate"


def test_only_runs_of_wandb_need_it(weights, tmp_path, monkeypatch):
    """Without W&B, as with only the extra `eval` installed, the rest of the evaluation works."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "rnncodec.training.tracking", raising=False)
    codec, folder = rnncodec.load(weights), photographs(tmp_path / "photos")
    assert rnncodec.evaluate(codec, folder, iterations=1)
    with pytest.raises(ValueError, match=r"W&B needs wandb, .*rnncodec\[train\]"):
        rnncodec.evaluate(codec, folder, output=tmp_path / "results", wandb="a run")
    assert not (tmp_path / "results").exists()


def test_the_command_bears_the_name_of_its_program(capsys):
    assert evaluate.main(["nowhere", "--weights", "no-such-weights"], "rnncodec evaluate") == 1
    assert capsys.readouterr().err.startswith("rnncodec evaluate: error: ")
    with pytest.raises(SystemExit):
        evaluate.main([], "rnncodec evaluate")
    assert capsys.readouterr().err.startswith("usage: rnncodec evaluate ")


def test_curves_of_others_are_drawn_and_compared(command, tmp_path, capsys):
    options, output = command
    folder = photographs(tmp_path / "photos")
    theirs = {"bpp": [0.001, 0.5, 1, 2, 4], "psnr-rgb": [1.0, 2, 3, 4, 50], "ms-ssim-rgb": [0.01, 0.2, 0.5, 0.8, 0.99]}
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps({"name": "Theirs", "description": "", "results": theirs}))
    arguments = [str(folder), *options, "--baselines", "--overlay", "toderici2017", str(path)]
    assert evaluate.main(arguments) == 0
    text = (output / "rate_distortion.svg").read_text()
    published = json.loads((evaluate.PUBLISHED / "toderici2017.json").read_text())["name"]
    for name in ("Theirs", published):
        assert f"<!-- {name} -->" in text
    table = capsys.readouterr().out
    bpp = from_csv((output / "mean.csv").read_text())[0].bpp
    assert f"{np.interp(bpp, theirs['bpp'], theirs['psnr-rgb']):.2f}" in table

    rows = {row["codec"]: row for row in csv.DictReader((output / "summary.csv").read_text().splitlines())}
    assert list(rows) == ["rnncodec-tiny", published, "Theirs"]
    assert float(rows["Theirs"]["auc_psnr_to_2"]) == pytest.approx(np.trapezoid([1, 2, 3, 4], [0.001, 0.5, 1, 2]))
    start = 0.01 + 0.19 * (0.25 - 0.001) / 0.499
    assert float(rows["Theirs"]["auc_ms_ssim_window"]) == pytest.approx(
        np.trapezoid([start, 0.2, 0.5, 0.5 + 0.3 * 0.875], [0.25, 0.5, 1, 1.875])
    )
    assert rows["Theirs"]["auc_psnr_hvs_to_2"] == ""
    assert rows["rnncodec-tiny"]["bd_rate_psnr"] == ""
    assert rows[published]["bd_rate_psnr"] == ""  # no quality in common

    path.write_text('{"name": 1}')
    assert evaluate.main(arguments) == 1
    assert "theirs.json: not a rate curve" in capsys.readouterr().err


def test_an_overlay_of_the_same_name_replaces_no_curve(command, tmp_path):
    options, output = command
    arguments = [str(photographs(tmp_path / "photos")), *options, "--baselines"]
    results = {"bpp": [0.001, 3], "psnr-rgb": [1, 4]}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(json.dumps({"name": "rnncodec-tiny", "results": results}))
    assert evaluate.main([*arguments, "--overlay", *map(str, paths)]) == 0
    rows = {row["codec"]: row for row in csv.DictReader((output / "summary.csv").read_text().splitlines())}
    assert list(rows) == ["rnncodec-tiny", *(f"rnncodec-tiny ({path})" for path in paths)]
    assert rows["rnncodec-tiny"]["auc_psnr_window"] == ""  # two iterations do not reach so far
    for path in paths:
        assert float(rows[f"rnncodec-tiny ({path})"]["auc_psnr_window"]) == pytest.approx(
            1.625 * (1 + 3 * (1.0625 - 0.001) / 2.999)
        )


def test_names_of_others_are_text(command, tmp_path, capsys):
    """Names are shown as they are, not as Rich's markup or Matplotlib's mathematics."""
    options, output = command
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps({"name": "[/b][ours] $_$", "results": {"bpp": [0.001, 3], "psnr-rgb": [1, 4]}}))
    assert evaluate.main([str(photographs(tmp_path / "[b]")), *options, "--baselines", "--overlay", str(path)]) == 0
    assert "[/b][ours] $_$" in capsys.readouterr().out
    assert "<!-- [/b][ours] $_$ -->" in (output / "rate_distortion.svg").read_text()


def test_the_comparison_shows_the_middle_of_both_pictures_at_the_same_bytes(tmp_path):
    x = data.astronaut()[:300, :400]
    points, colors = [], {}
    for codec, setting, size in (("rnncodec", 2, 1000), ("jpeg", 5, 700), ("jpeg", 10, 990), ("jpeg", 20, 1010)):
        name = f"{codec}-{setting}.png"
        colors[codec, setting] = (setting, 100, len(colors))
        Image.new("RGB", (400, 300), colors[codec, setting]).save(tmp_path / name)
        points.append(Point("a", codec, setting, size, size / 15000, psnr=20, picture=name))
    sheet = pictures.compared("rnncodec", "jpeg", x, points, tmp_path)
    assert sheet is not None
    width, height = pictures.PANEL
    top, left = (300 - height) // 2, (400 - width) // 2
    found = [
        (i, j)
        for i in range(sheet.shape[0] - height + 1)
        for j in range(0, 20)
        if (sheet[i, j : j + width] == x[top, left : left + width]).all()
    ]
    assert len(found) == 1  # the original, unscaled
    (i, j) = found[0]
    np.testing.assert_array_equal(sheet[i : i + height, j : j + width], x[top : top + height, left : left + width])
    assert (sheet == colors["rnncodec", 2]).all(-1).sum() == width * height
    assert (sheet == colors["jpeg", 10]).all(-1).sum() == width * height  # the largest that is not larger
    assert not (sheet == colors["jpeg", 20]).all(-1).any()


@pytest.mark.usefixtures("undrawn")
def test_coders_are_compared_on_the_same_bits(weights, weights_with_context, command, tmp_path, capsys):
    options, output = command
    own, folder = load_weights(weights), tmp_path / "photos"
    folder.mkdir()
    pictures = [data.astronaut()[:160, :192], data.coffee()[:176, :320]]
    for i, x in enumerate(pictures):
        Image.fromarray(x).save(folder / f"{i}.png")
    arguments = [str(folder), *options, "--baselines"]
    assert evaluate.main([*arguments, "--coders", str(weights_with_context)]) == 0
    rows = list(csv.DictReader((output / "coders.csv").read_text().splitlines()))
    plain, coded = Codec(own), Codec(load_weights(weights_with_context))
    for coder in (*CLASSICAL, "parallel"):
        codec, entropy = (coded, "context") if coder == "parallel" else (plain, coder)
        found = [float(row["bytes"]) for row in rows if row["coder"] == coder]
        assert found == [np.mean([len(codec.encode(x, k, entropy=entropy)) for x in pictures]) for k in (1, 2)]
    assert len(rows) == 2 * (len(CLASSICAL) + 1)
    assert "parallel" in capsys.readouterr().out

    torch.manual_seed(2)
    save_weights(tmp_path / "other.safetensors", RecurrentCodec(own.recurrent.config), "other")
    assert evaluate.main([*arguments, "--coders", str(tmp_path / "other.safetensors")]) == 1
    assert "are not those of tiny" in capsys.readouterr().err.splitlines()[-1]


def test_a_codec_that_pillow_lacks_is_named(command, tmp_path, capsys, monkeypatch):
    options, _ = command
    monkeypatch.setattr(evaluate.BASELINES["jxl"].__class__, "available", property(lambda baseline: False))
    assert evaluate.main([str(photographs(tmp_path / "photos")), *options, "--baselines", "jxl"]) == 1
    assert "cannot write jxl" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "no image could be measured"),
        (["nowhere", "--weights", "no-such-weights"], 1, "no-such-weights"),
        (["nowhere", "--overlay", "no-such-curve"], 1, "no-such-curve"),
        (["nowhere", "--iterations", "0"], 2, "--iterations"),
        (["nowhere", "--baselines", "no-such-codec"], 2, "no-such-codec"),
        ([], 2, "required"),
    ],
)
def test_errors_are_one_line(command, capsys, arguments, status, message):
    try:
        result = evaluate.main([*command[0], *arguments])
    except SystemExit as error:
        result = error.code
    captured = capsys.readouterr()
    assert result == status
    assert message in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
