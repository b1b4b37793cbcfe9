"""Rate curves: means, areas and BD-rate against hand-computed values; CSV and JSON and back."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rnncodec.curves import (
    NAN,
    Point,
    area,
    bd_rate,
    from_csv,
    from_json,
    interpolate,
    mean_curve,
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
    ]
    first, second = mean_curve(points)
    assert (first.setting, first.bytes, first.bpp, first.psnr, first.ms_ssim) == (1, 150, 0.5, 23, 0.8)
    assert (second.setting, second.bytes, second.bpp, second.psnr, second.ms_ssim) == (2, 400, 1.0, 30.5, 0.9)
    assert math.isnan(first.psnr_hvs)
    assert (first.image, first.picture) == ("mean", "")


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
    assert overlap == pytest.approx(4 / 12)
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
    for text in ("", "image,codec\na,b\n", to_csv(points).replace("0.25", "x")):
        with pytest.raises(ValueError, match=r"columns|could not convert"):
            from_csv(text)


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
    assert math.isnan(Point("a", "c", 1, 1, 1).ms_ssim_db)
    assert math.isnan(NAN)
