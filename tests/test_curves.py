"""Tests of rate-distortion curves: means, areas and BD-rate against values by hand, and CSV and JSON."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rnncodec
from rnncodec.metrics.curves import (
    DRAWN,
    Point,
    area,
    bd_rate,
    from_csv,
    from_json,
    interpolate,
    largest_within,
    mean_curve,
    picture_path,
    read_points,
    samples,
    to_csv,
    to_json,
)


def curve(rates, psnrs, codec="codec"):
    return [Point("mean", codec, i, 100 * r, r, psnr=p) for i, (r, p) in enumerate(zip(rates, psnrs, strict=True), 1)]


def test_mean_curve_is_the_mean_at_equal_setting():
    points = [
        Point("a", "codec", 2, 300, 0.5, psnr=30, ms_ssim=0.9),
        Point("a", "codec", 1, 100, 0.25, psnr=20, ms_ssim=0.8, picture="a.png"),
        Point("b", "codec", 1, 200, 0.75, psnr=26),  # too small for MS-SSIM
        Point("b", "codec", 2, 500, 1.5, psnr=31),
        Point("b", "codec", 3, 900, 2.5, psnr=35),  # a mean of one image would be another curve
    ]
    first, second, *of_one = mean_curve(points)
    assert (first.setting, first.bytes, first.bpp, first.psnr) == (1, 150, 0.5, 23)
    assert (second.setting, second.bytes, second.bpp, second.psnr) == (2, 400, 1.0, 30.5)
    assert math.isnan(first.psnr_hvs)
    assert (first.image, first.picture) == ("mean", "")
    # MS-SSIM stands beside the bytes and the rate of the one image that has it.
    assert [(p.image, p.setting, p.bytes, p.bpp, p.ms_ssim) for p in of_one] == [
        ("mean of 1", 1, 100, 0.25, 0.8),
        ("mean of 1", 2, 300, 0.5, 0.9),
    ]
    assert all(map(math.isnan, (first.ms_ssim, second.ms_ssim, *(point.psnr for point in of_one))))


def test_a_metric_that_an_image_lacks_at_one_setting_is_not_of_that_image():
    points = [Point(image, "codec", k, 100 * k, k, psnr=20 + k) for image in ("a", "b") for k in (1, 2)]
    points += [Point("c", "codec", k, 400 * k, 4 * k, psnr=psnr) for k, psnr in ((1, 40), (2, math.nan))]
    curve = mean_curve(points)
    assert samples(curve, "psnr")[0].tolist() == [1, 2]  # not 2 and 4, the rates of all three
    assert samples(curve, "psnr")[1].tolist() == [21, 22]
    assert [(p.image, p.bytes) for p in curve] == [("mean", 200), ("mean", 400), ("mean of 2", 100), ("mean of 2", 200)]


def test_no_rate_of_small_images_stands_beside_the_ms_ssim_of_large_ones():
    """Of the image with MS-SSIM, the codec takes half of the bits. What it takes of the other does not count."""
    rates, similarities = np.array([0.125, 0.25, 0.5, 1.0, 2.0]), [0.8, 0.9, 0.95, 0.97, 0.99]
    for small in (0.1, 5.0):
        curves = []
        for codec, factor, of_small in (("other", 1, 4), ("mine", 1 / 2, small)):
            points = [Point("small", codec, k, 1, of_small * rate, psnr=30) for k, rate in enumerate(rates)]
            for k, (rate, similarity) in enumerate(zip(rates, similarities, strict=True)):
                points.append(Point("large", codec, k, 1, factor * rate, psnr=30, ms_ssim=similarity))
            curves.append(mean_curve(points))
        other, mine = curves
        assert bd_rate(other, mine, "ms_ssim_db") == (pytest.approx(-50, abs=1e-6), 1)
        assert area(other, "ms_ssim", 0.25, 1.0) == pytest.approx(0.925 * 0.25 + 0.96 * 0.5)
        assert interpolate(mine, "ms_ssim", 0.25) == pytest.approx(0.95)
        results = json.loads(to_json(mine, "mine", ""))["results"]
        assert results["bpp"][5:] == (rates / 2).tolist()
        assert results["ms-ssim-rgb"] == [None] * 5 + similarities


def test_an_equal_picture_takes_its_setting_out_of_the_curve():
    """A mean with an infinite value is infinite, and curves, areas, BD-rates and JSON leave it out."""
    finite = curve([0.25, 0.5, 0.75, 1.0, 1.25], [20, 22, 24, 26, 28])
    with_equal = mean_curve(
        [*finite, *(replace(p, image="b", psnr=math.inf if p.setting > 4 else p.psnr) for p in finite)]
    )
    assert [point.psnr for point in with_equal] == [20, 22, 24, 26, math.inf]
    assert samples(with_equal, "psnr")[1].tolist() == [20, 22, 24, 26]
    assert interpolate(with_equal, "psnr", 0.875) == 25
    assert math.isnan(interpolate(with_equal, "psnr", 1.1))
    assert bd_rate(finite, with_equal, "psnr") == (pytest.approx(0, abs=0.1), 1)
    assert bd_rate(with_equal, finite, "psnr") == (pytest.approx(0, abs=0.1), 6 / 8)
    assert json.loads(to_json(with_equal, "a", ""))["results"]["psnr-rgb"] == [20, 22, 24, 26, None]


@pytest.mark.parametrize(
    ("size", "setting"), [(99, None), (100, 5), (149, 5), (150, 20), (299, 20), (300, 61), (10**9, 61)]
)
def test_largest_file_within_a_size(size, setting):
    points = [Point("a", "jpeg", q, b, 1, psnr=q) for q, b in ((60, 300), (61, 300), (59, 300), (5, 100), (20, 150))]
    found = largest_within(points, size)
    assert (found and found.setting) == setting


def test_interpolation_stays_within_the_curve():
    line = curve([1.5, 0.5], [30, 20])  # in any order
    assert interpolate(line, "psnr", 0.75) == 22.5
    assert interpolate(line, "psnr", 1.5) == 30
    assert all(math.isnan(interpolate(line, "psnr", bpp)) for bpp in (0.49, 1.51))
    assert math.isnan(interpolate(line, "ms_ssim", 0.75))


def test_area_is_that_of_trapezoids():
    line = curve([0.125, 0.5, 1.0, 2.0], [20, 26, 30, 32])
    paper = (20 + 26) / 2 * 0.375 + (26 + 30) / 2 * 0.5 + (30 + 32) / 2
    assert area(line, "psnr", None, 2.0) == pytest.approx(paper)
    # From 0.25 (where the line is at 22) to 1.5 (at 31).
    window = (22 + 26) / 2 * 0.25 + (26 + 30) / 2 * 0.5 + (30 + 31) / 2 * 0.5
    assert area(line, "psnr", 0.25, 1.5) == pytest.approx(window)
    assert math.isnan(area(line, "psnr", 0.1, 1.5))
    assert math.isnan(area(line, "psnr", None, 2.1))
    assert area(line, "psnr", None, 2.5, saturates=True) == pytest.approx(paper + 32 * 0.5)
    assert area(line, "psnr", None, 1.0, saturates=True) == area(line, "psnr", None, 1.0)
    assert math.isnan(area(line, "psnr", 0.1, 2.5, saturates=True))
    assert math.isnan(area([], "psnr", None, 2.0))


def test_bd_rate_of_ten_percent_fewer_bits():
    rates = np.array([0.125, 0.25, 0.5, 1.0, 1.5, 2.0])
    psnrs = [23.0, 25.6, 28.3, 31.6, 33.6, 34.6]
    anchor, fewer = curve(rates, psnrs), curve(0.9 * rates, psnrs)
    for pair, expected in (((anchor, fewer), -10.0), ((fewer, anchor), 100 / 9), ((anchor, anchor), 0.0)):
        difference, overlap = bd_rate(*pair, "psnr")
        assert difference == pytest.approx(expected, abs=1e-6)
        assert overlap == 1


def test_bd_rate_tells_the_overlap_and_ignores_points_that_are_no_better():
    rates = [0.25, 0.5, 0.75, 1.0, 1.25]
    anchor, higher = curve(rates, [20, 22, 24, 26, 28]), curve(rates, [24, 26, 28, 30, 32])
    difference, overlap = bd_rate(anchor, higher, "psnr")
    assert overlap == pytest.approx(4 / 8)
    assert difference < -30
    with_plateau = [*anchor, *curve([2.0, 3.0], [28, 27.5])]
    assert bd_rate(anchor, with_plateau, "psnr")[0] == pytest.approx(0, abs=1e-9)
    apart = curve(rates, [40, 41, 42, 43, 44])
    assert math.isnan(bd_rate(anchor, apart, "psnr")[0])
    assert math.isnan(bd_rate(anchor, higher[:3], "psnr")[0])


def test_csv_and_back():
    points = [
        Point('a,"b"', "codec", 1, 100, 0.25, psnr=math.inf, picture="pictures/a/1.png"),
        Point("ü", "codec", 0.125, 1e6 / 3, 1 / 3, 0.3, 1.5, 30.25, 0.5, 29.0, 31.0, 0.5, 0.25),
    ]
    again = from_csv(to_csv(points))
    for point, copy in zip(points, again, strict=True):
        assert repr(copy) == repr(replace(point, setting=float(point.setting), bytes=float(point.bytes)))
    assert to_csv(points[:1]).splitlines()[1].count("nan") == 0
    header, *rows = to_csv(points).splitlines()
    others = "\n".join([f"note,{header}", *(f"x,{row}" for row in rows)])
    assert repr(from_csv(others)) == repr(again)
    assert from_csv(header) == []


def changed(**values):
    """A text of two points, the second with other values."""
    text = to_csv([Point("a", "rnncodec-x", 1, 100, 0.25, psnr=30), Point("b\n", "rnncodec-x", 2, 200, 0.5, psnr=32)])
    rows = list(csv.DictReader(io.StringIO(text)))
    rows[1] |= values
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no column image, codec, setting, bytes, bpp, ideal_bpp,"),
        (changed().replace("psnr_hvs_m", "other"), "there is no column psnr_hvs_m"),
        (changed() + "a,b\n", "line 5: not as many fields as columns"),
        (changed() + "a," * 20, "line 5: not as many fields as columns"),
        (changed(psnr="high"), "line 4: psnr is not a number: 'high'"),
        (changed(psnr="-inf"), "line 4: psnr cannot be '-inf'"),
        (changed(bytes="0"), "line 4: bytes cannot be '0'"),
        (changed(bytes=""), "line 4: bytes cannot be ''"),
        (changed(bytes="inf"), "line 4: bytes cannot be 'inf'"),
        (changed(bpp="-0.5"), "line 4: bpp cannot be '-0.5'"),
        (changed(bpp="nan"), "line 4: bpp cannot be 'nan'"),
        (changed(setting=""), "line 4: setting cannot be ''"),
        (changed(setting="1.5"), "line 4: iterations are a whole number, not '1.5'"),
        (changed(setting="-1"), "line 4: iterations are a whole number, not '-1'"),
        (changed(image="x" * 200_000), "field larger than field limit"),
    ],
)
def test_what_is_no_point_is_told_with_its_line(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_csv(text)


def test_settings_of_others_and_of_steps_may_be_fractions():
    assert from_csv(changed(codec="jpeg2000", setting="0.1875"))[1].setting == 0.1875
    assert from_csv(changed(setting="0.25"), steps=True)[1].setting == 0.25
    with pytest.raises(ValueError, match="line 4: iterations are a positive number, not '0'"):
        from_csv(changed(setting="0"), steps=True)


def test_points_of_a_folder(tmp_path):
    path = tmp_path / "points.csv"
    for content, message in (
        (None, "No such file or directory"),
        (b"\xff", "can't decode byte"),
        (changed().splitlines()[0].encode(), "there are no points"),
        (changed(bpp="x").encode(), "line 4: bpp is not a number: 'x'"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read_points(tmp_path)
        assert str(error.value).startswith(f"{path}: ")
    path.write_bytes(changed(image="é\r\nü").encode())
    assert [(point.image, point.setting) for point in read_points(tmp_path)] == [("a", 1), ("é\r\nü", 2)]


def test_pictures_are_in_the_folder(tmp_path):
    results = tmp_path / "results"
    (results / "pictures").mkdir(parents=True)
    for place in (tmp_path / "secret.png", results / "pictures" / "a.png"):
        place.write_bytes(b"")
    (results / "link.png").symlink_to(tmp_path / "secret.png")
    (results / "loop.png").symlink_to(results / "loop.png")
    (tmp_path / "alias").symlink_to(results)
    found = (results / "pictures" / "a.png").resolve()
    for folder in (results, tmp_path / "alias"):
        assert picture_path(folder, "pictures/a.png") == picture_path(folder, "pictures/../pictures/a.png") == found
    for picture in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "/etc/passwd"):
        with pytest.raises(ValueError, match="is not in"):
            picture_path(results, picture)
    for picture in ("none.png", "pictures", "", "loop.png", "x" * 300, "a\nb.png"):
        with pytest.raises(ValueError, match="no such file") as error:
            picture_path(results, picture)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="null"):
        picture_path(results, "\0.png")
    assert Point("a", "c", 1, 1, 1, picture="pictures/a/c-1.png").original == "pictures/a/original.png"


def test_json_and_back(tmp_path):
    points = curve([0.25, 0.5], [30, math.inf])
    text = to_json(points, "mine", "how")
    assert json.loads(text) == {
        "name": "mine",
        "description": "how",
        "results": {"bpp": [0.25, 0.5], "psnr-rgb": [30, None]},
    }
    path = tmp_path / "mine.json"
    path.write_text(text)
    name, again = from_json(path)
    assert name == "mine"
    assert (again[0].bpp, again[0].psnr) == (0.25, 30)
    assert math.isnan(again[1].psnr)
    assert samples(again, "psnr")[0].tolist() == [0.25]
    for bad in (
        "",
        "[]",
        "{}",
        '{"name": 1, "results": {"bpp": [1]}}',
        '{"name": "a", "results": {"bpp": [1], "psnr-rgb": []}}',
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match="not a rate curve") as error:
            from_json(path)
        assert "\n" not in str(error.value)


def test_ms_ssim_in_decibels():
    assert Point("a", "c", 1, 1, 1, ms_ssim=0.99).ms_ssim_db == pytest.approx(20)
    assert Point("a", "c", 1, 1, 1, ms_ssim=1.0).ms_ssim_db == math.inf
    assert Point("a", "c", 1, 1, 1, ms_ssim=1 + 2**-23).ms_ssim_db == math.inf  # a sum of float32 may come out so
    assert math.isnan(Point("a", "c", 1, 1, 1).ms_ssim_db)


def test_does_without_torch_and_pyplot():
    code = "import sys, rnncodec.metrics.curves; sys.exit(bool({'torch', 'scipy', 'matplotlib'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# Where each published curve is from, and a few of its values as read there, by metric and bits per pixel.
PUBLISHED = {
    "toderici2017": (
        "tensorflow/compression",
        {"psnr": {0.125: 23.01, 0.5: 28.27, 2.0: 34.63}, "ms_ssim": {0.125: 0.8191, 0.5: 0.9538, 2.0: 0.9887}},
    ),
    "johnston2018": (
        "tensorflow/compression",
        {"psnr": {0.125: 25.90, 0.5: 30.54, 1.5: 36.22}, "ms_ssim": {0.125: 0.9068, 0.5: 0.9736, 1.5: 0.9926}},
    ),
    "bpg": (
        "tensorflow/compression",
        {"psnr": {0.25: 30.16, 0.5: 33.02, 1.0: 36.75}, "ms_ssim": {0.25: 0.9459, 0.5: 0.9706, 1.0: 0.9862}},
    ),
}
CURVE_FILES = sorted((Path(rnncodec.__file__).parent / "evaluation" / "published").glob("*.json"))


@pytest.mark.parametrize("path", CURVE_FILES, ids=lambda path: path.stem)
def test_published_curves(path):
    source, expected = PUBLISHED[path.stem]
    description = json.loads(path.read_text())["description"]
    assert source in description
    assert "Kodak" in description
    _, points = from_json(path)
    rates = [point.bpp for point in points]
    assert rates == sorted(set(rates))
    for metric in DRAWN:
        values = samples(points, metric)[1].tolist()
        assert values == sorted(set(values))
        assert bool(values) == (metric in expected)
    for metric, values in expected.items():
        for bpp, value in values.items():
            assert interpolate(points, metric, bpp) == pytest.approx(value, abs=6 * 10 ** -DRAWN[metric].digits)


def test_the_columns_of_a_file_of_points():
    metrics = "l1,psnr,ms_ssim,psnr_hvs,psnr_hvs_m"
    assert to_csv([]) == f"image,codec,setting,bytes,bpp,ideal_bpp,{metrics},encode_seconds,decode_seconds,picture\n"
