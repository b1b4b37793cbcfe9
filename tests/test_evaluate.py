import csv
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

sys.path.append(str(Path(__file__).parent.parent))  # the script lies beside the package

import evaluate
from evaluate import Coded, Point
from rnncodec.codec import Codec
from rnncodec.context import ContextConfig, ContextModel
from rnncodec.format import truncate
from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.weights import load_weights, save_weights


def point(image, setting, size, bpp, psnr, ms_ssim=math.nan):
    return Point(image, "codec", setting, size, bpp, psnr, ms_ssim)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    config = NetworkConfig(bits=4, encoder_channels=(4, 4, 4, 4), decoder_channels=(4, 4, 4, 4, 4))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, RecurrentCodec(config), "tiny", {})
    return path


def test_rate_points_count_whole_files_over_true_pixels():
    x = data.astronaut()[:17, :33]
    worse = x // 2
    points = list(evaluate.rate_points("a", "codec", x, [Coded(1, 100, worse), Coded(2, 250, x)]))
    assert [p.bpp for p in points] == [8 * 100 / (17 * 33), 8 * 250 / (17 * 33)]
    assert [(p.image, p.codec, p.setting, p.bytes) for p in points] == [("a", "codec", 1, 100), ("a", "codec", 2, 250)]
    assert points[0].psnr == pytest.approx(peak_signal_noise_ratio(x, worse), abs=1e-4)
    assert points[1].psnr == math.inf
    assert all(math.isnan(p.ms_ssim) for p in points)


def test_mean_curve_is_the_mean_at_equal_setting():
    points = [
        point("a", 2, 300, 0.5, 30, 0.9),
        point("a", 1, 100, 0.25, 20, 0.8),
        point("b", 1, 200, 0.75, 26),  # too small for MS-SSIM
        point("b", 2, 500, 1.5, 31),
    ]
    assert evaluate.mean_curve(points) == [
        Point("mean", "codec", 1, 150, 0.5, 23, 0.8),
        Point("mean", "codec", 2, 400, 1.0, 30.5, 0.9),
    ]


def test_interpolation_stays_within_the_curve():
    curve = [point("mean", 5, 1, 0.5, 20, 0.8), point("mean", 10, 2, 1.5, 30, 0.9)]
    assert evaluate.interpolate(curve, 0.75) == pytest.approx((22.5, 0.825))
    assert evaluate.interpolate(curve, 1.5) == (30, 0.9)
    for outside in (0.49, 1.51):
        assert all(map(math.isnan, evaluate.interpolate(curve, outside)))


def test_jpeg_is_what_pillow_writes():
    x = data.astronaut()[100:180, 100:220]
    coded = list(evaluate.jpeg(x))
    assert [c.setting for c in coded] == list(evaluate.QUALITIES)
    for c in coded:
        plain, optimized = io.BytesIO(), io.BytesIO()
        Image.fromarray(x).save(plain, "JPEG", quality=c.setting, subsampling="4:2:0")
        Image.fromarray(x).save(optimized, "JPEG", quality=c.setting, subsampling="4:2:0", optimize=True)
        assert c.bytes == len(optimized.getvalue()) < len(plain.getvalue())
        np.testing.assert_array_equal(c.x_hat, np.asarray(Image.open(plain)))


@pytest.mark.parametrize("size", [(1, 1), (33, 17), (48, 64)])
def test_every_iteration_is_that_of_the_cut_file(weights, size):
    codec = Codec(load_weights(weights))
    x = data.astronaut()[: size[0], 100 : 100 + size[1]]
    file = codec.encode(x, iterations=3)
    coded = list(evaluate.decode_every_iteration(codec, file))
    assert [c.setting for c in coded] == [1, 2, 3]
    for c in coded:
        cut = truncate(file, iterations=c.setting)
        assert c.bytes == len(cut)
        np.testing.assert_array_equal(c.x_hat, np.asarray(codec.decode(cut)))
    assert coded[-1].bytes == len(file)


def test_another_picture_from_the_cut_file_is_an_error(weights):
    codec = Codec(load_weights(weights))
    file = codec.encode(data.astronaut()[:32, :32], iterations=2)
    coded = next(evaluate.decode_every_iteration(codec, file))
    evaluate.check_truncated(codec, file, coded)
    other = coded.x_hat.copy()
    other[3, 4, 1] ^= 1
    with pytest.raises(RuntimeError, match="another picture"):
        evaluate.check_truncated(codec, file, coded._replace(x_hat=other))


def test_json_has_no_nan():
    result = json.loads(evaluate.to_json([point("mean", 1, 10, 0.5, math.inf)], "what it is"))
    assert result == {
        "name": "codec",
        "description": "what it is",
        "results": {"bpp": [0.5], "psnr-rgb": [None], "ms-ssim-rgb": [None]},
    }


def test_names_are_unique():
    paths = map(Path, ["a/x.png", "b/x.png", "b/x-2.png", "x.jpg", "y.png"])
    assert evaluate.unique_names(paths) == ["x", "x-2", "x-2-2", "x-3", "y"]


def test_a_folder_with_an_unreadable_image(weights, tmp_path, capsys):
    folder, output = tmp_path / "photos", tmp_path / "results"
    folder.mkdir()
    Image.fromarray(data.astronaut()[:200, :176]).save(folder / "astronaut.png")
    Image.fromarray(data.coffee()[:20, :30]).save(folder / "coffee.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    arguments = [str(folder), str(tmp_path / "missing.png"), "--weights", str(weights), "--iterations", "2"]
    assert evaluate.main([*arguments, "--output", str(output), "--save-images"]) == 1

    captured = capsys.readouterr()
    assert "broken.png" in captured.err
    assert "missing.png" in captured.err
    assert "could not be measured: 2" in captured.err
    assert "Traceback" not in captured.err
    assert {path.name for path in output.iterdir()} == {
        "rnncodec-tiny.json",
        "jpeg.json",
        "points.csv",
        "mean.csv",
        "rate_distortion.png",
        *(f"{name}_{end}.png" for name in ("astronaut", "coffee") for end in ("01", "02", "comparison")),
    }

    rows = list(csv.DictReader((output / "points.csv").read_text().splitlines()))
    mine = [row for row in rows if row["codec"] == "rnncodec-tiny"]
    assert [(row["image"], row["setting"]) for row in mine] == [
        ("astronaut", "1"),
        ("astronaut", "2"),
        ("coffee", "1"),
        ("coffee", "2"),
    ]
    # Files hold whole bytes of 4 bits for each 16x16 block beside a header that does not depend on the size.
    sizes = [int(row["bytes"]) for row in mine]
    assert sizes[0] - sizes[2] == 13 * 11 * 4 // 8 + 1 - 2 * 2 * 4 // 8
    assert [row["ms_ssim"] == "" for row in mine] == [False, False, True, True]
    for row in mine:
        x = np.asarray(Image.open(folder / f"{row['image']}.png"))
        x_hat = np.asarray(Image.open(output / f"{row['image']}_0{row['setting']}.png"))
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(x, x_hat), abs=1e-4)
        assert float(row["bpp"]) == pytest.approx(8 * int(row["bytes"]) / (x.shape[0] * x.shape[1]))

    for codec, count, setting in (("rnncodec-tiny", 2, "1"), ("jpeg", len(evaluate.QUALITIES), "5")):
        results = json.loads((output / f"{codec}.json").read_text())["results"]
        assert set(results) == {"bpp", "psnr-rgb", "ms-ssim-rgb"}
        assert {len(values) for values in results.values()} == {count}
        first = [row for row in rows if row["codec"] == codec and row["setting"] == setting]
        assert results["psnr-rgb"][0] == pytest.approx(np.mean([float(row["psnr"]) for row in first]))
        assert results["bpp"][0] == pytest.approx(np.mean([float(row["bpp"]) for row in first]))


def test_coders_are_compared_on_the_same_bits(weights, tmp_path, capsys):
    torch.manual_seed(1)
    context = ContextModel(ContextConfig(kind="parallel", bits=4, channels=4, groups=2)).quantize()
    own, folder, output = load_weights(weights), tmp_path / "photos", tmp_path / "results"
    save_weights(tmp_path / "context.safetensors", own.network, "tiny", {}, context)
    folder.mkdir()
    pictures = [data.astronaut()[:160, :192], data.coffee()[:176, :320]]
    for i, x in enumerate(pictures):
        Image.fromarray(x).save(folder / f"{i}.png")
    command = [str(folder), "--weights", str(weights), "--iterations", "2", "--output", str(output), "--baselines"]
    assert evaluate.main([*command, "--coders", str(tmp_path / "context.safetensors")]) == 0
    rows = list(csv.DictReader((output / "coders.csv").read_text().splitlines()))
    plain, coded = Codec(own), Codec(load_weights(tmp_path / "context.safetensors"))
    for coder in ("none", "huffman", "static", "adaptive", "parallel"):
        codec, entropy = (coded, "context") if coder == "parallel" else (plain, coder)
        found = [float(row["bytes"]) for row in rows if row["coder"] == coder]
        assert found == [np.mean([len(codec.encode(x, k, entropy=entropy)) for x in pictures]) for k in (1, 2)]
    assert len(rows) == 5 * 2
    assert "parallel" in capsys.readouterr().out

    torch.manual_seed(2)
    save_weights(tmp_path / "other.safetensors", RecurrentCodec(own.network.config), "other")
    assert evaluate.main([*command, "--coders", str(tmp_path / "other.safetensors")]) == 1
    assert "are not those of tiny" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "no image could be measured"),
        (["nowhere", "--weights", "no-such-weights"], 1, "no-such-weights"),
        (["nowhere", "--iterations", "0"], 2, "--iterations"),
        (["nowhere", "--baselines", "gif"], 2, "gif"),
        ([], 2, "required"),
    ],
)
def test_errors_are_one_line(weights, tmp_path, capsys, arguments, status, message):
    options = [] if "--weights" in arguments else ["--weights", str(weights)]
    try:
        result = evaluate.main([*arguments, *options, "--output", str(tmp_path / "results")])
    except SystemExit as error:
        result = error.code
    captured = capsys.readouterr()
    assert result == status
    assert message in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
