"""Tests of the slider's steps within iterations, and of the pictures of where bits are spent."""

import csv
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from test_report import find, open_page, shown_pixels, slide, text  # noqa: F401
from test_targets import codec, plain  # noqa: F401

from rnncodec.codec import Codec
from rnncodec.evaluation import measure, steps
from rnncodec.evaluation.evaluate import evaluate
from rnncodec.evaluation.pictures import drawn_rates
from rnncodec.files import format
from rnncodec.files.images import load_image, save_image
from rnncodec.weights import load_weights

HEIGHT, WIDTH = 350, 390  # 22 x 25 blocks, 550 locations: two parts


@pytest.fixture(scope="module")
def x(photos):
    return load_image(photos / "coffee.png")[:HEIGHT, :WIDTH]


@pytest.fixture(scope="module")
def results(codec, x, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("results")
    save_image(x, folder / "cup.png")
    evaluate(codec, folder / "cup.png", iterations=3, tunes=["psnr"], output=folder, save_images=True)
    return folder


def rows_of(results, name):
    return list(csv.DictReader((results / name).read_text().splitlines()))


def test_bits_are_those_of_the_file(codec, x):  # noqa: F811
    """All blocks together have the bits of the payloads, but for the ends of codes."""
    data = codec.encode(x, 3)
    header, rates = format.read_header(data), measure.spent(codec, data)
    assert rates.shape == (3, HEIGHT, WIDTH)
    blocks = rates[:, ::16, ::16] * 256
    np.testing.assert_array_equal(rates, blocks.repeat(16, 1).repeat(16, 2)[:, :HEIGHT, :WIDTH] / 256)
    lengths = np.cumsum([8 * entry.length for entry in header.entries])[1::2]
    assert (blocks.sum((1, 2)) < lengths).all()
    assert (blocks.sum((1, 2)) > lengths - 3 * 2 * 50).all()


def test_a_location_that_has_stopped_gets_no_more_bits(codec, x):  # noqa: F811
    data = codec.encode(x, quality=60, tune="psnr")
    sent, rates = (codec.read_bits(data) != 0).any(1), measure.spent(codec, data)
    more = np.diff(rates[:, ::16, ::16], axis=0)
    assert not sent.all()
    np.testing.assert_array_equal(more > 0, sent[1:])


def test_raw_bits_are_counted(photos, tmp_path, x):
    from test_calibration import save_latent

    save_latent(photos, tmp_path / "bare.safetensors", context=False)
    bare = Codec(load_weights(tmp_path / "bare.safetensors"))
    rates = measure.spent(bare, bare.encode(x, 2))
    np.testing.assert_array_equal(rates, np.broadcast_to([[[16 / 256]], [[32 / 256]]], (2, HEIGHT, WIDTH)))


def test_colors_of_rates():
    """The ends of matplotlib's inferno, and brighter for each doubling."""
    assert drawn_rates(np.array([[0, 1 / 64, 1 / 32]])).tolist() == [[[0, 0, 3]] * 3]
    assert drawn_rates(np.array([[8, 100.0]])).tolist() == [[[252, 254, 164]] * 2]
    luma = drawn_rates(2.0 ** np.arange(-5, 4)[None]) @ [0.299, 0.587, 0.114]
    assert (np.diff(luma) > 10).all()


def test_steps_are_files_that_end_within_an_iteration(codec, x):  # noqa: F811
    data = codec.encode(x, 3)
    found = list(steps.steps(codec, x, 3))
    assert [each.setting for each in found] == [0.5, 1.5, 2.5]
    for each, size in zip(found, format.read_header(data).sizes[::2], strict=True):
        short = format.truncate(data, max_bytes=size)
        assert each.size == len(short) == size
        np.testing.assert_array_equal(each.x_hat, np.asarray(codec.decode(short)))


def test_large_images_and_single_parts_have_no_steps(codec, x, monkeypatch):  # noqa: F811
    assert list(steps.steps(codec, x[:256], 2)) == []
    monkeypatch.setattr(steps, "LARGEST", HEIGHT * WIDTH - 1)
    assert list(steps.steps(codec, x, 2)) == []


def test_results_have_steps_and_bits(codec, x, results):  # noqa: F811
    rows = rows_of(results, "steps.csv")
    assert [row["setting"] for row in rows] == ["0.5", "1.5", "2.5"]
    for row, each in zip(rows, steps.steps(codec, x, 3), strict=True):
        seen = np.asarray(Image.open(results / row["picture"]).convert("RGB")).astype(float)
        assert ((seen - each.x_hat) ** 2).mean() < ((seen - x) ** 2).mean() / 3  # WebP, of the noise of this network
        error = ((x.astype(float) - each.x_hat) ** 2).mean()
        assert float(row["psnr"]) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    assert {float(row["setting"]) for row in rows_of(results, "points.csv")} == {1, 2, 3}
    rates = measure.spent(codec, codec.encode(x, 3))
    for k in (1, 2, 3):
        picture = load_image(results / f"pictures/cup/rnncodec-latent-{k}-bits.png")
        np.testing.assert_array_equal(picture, drawn_rates(rates[k - 1]))


def test_the_page_has_steps_bits_and_files_with_stops(results):
    page = (results / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found
    data = json.loads(found[1])
    image, columns = data["images"][0], data["columns"]
    points = [dict(zip(columns, values, strict=True)) for values in data["points"]]
    assert [points[i]["setting"] for i in image["iterations"]] == [0.5, 1, 1.5, 2, 2.5, 3]
    others = {
        (other["kind"], other["codec"]): [points[i]["setting"] for i in other["points"]] for other in image["others"]
    }
    assert set(others) == {
        ("picture", "rnncodec-latent-psnr"),
        ("bits", "rnncodec-latent"),
        ("bits", "rnncodec-latent-psnr"),
    }
    assert others["bits", "rnncodec-latent"] == [1, 1, 2, 2, 3, 3]
    for other in image["others"]:
        for i in other["points"]:
            assert f'id="{other["kind"]}-{i}">data:image/png;base64,' in page


def test_older_results_have_neither(results, tmp_path, codec, x):  # noqa: F811
    save_image(x[:64, :64], tmp_path / "cup.png")
    (tmp_path / "steps.csv").write_text("of an earlier evaluation")
    evaluate(codec, tmp_path / "cup.png", iterations=2, output=tmp_path, save_images=True)
    assert not (tmp_path / "steps.csv").exists()


@pytest.mark.browser
def test_the_slider_moves_through_all_steps(results, browser, open_page):  # noqa: F811
    open_page(results)
    slide(browser, 2)
    assert text(browser, "#count") == "iteration 1.5 of 3"
    row = rows_of(results, "steps.csv")[1]
    assert f"bytes {int(float(row['bytes'])):,} bpp {float(row['bpp']):.4f}" in text(browser, "#our-values")
    choose = {option.text: option for option in find(browser, "#other").find_elements("tag name", "option")}
    choose["where rnncodec-latent-psnr spends bits"].click()
    assert "bits of rnncodec-latent-psnr, iteration 2 where they are spent" in text(browser, "#their-values")
    assert "black up to 1/32 bpp yellow 8 bpp and more" in text(browser, "#their-values")
    expected = load_image(results / "pictures/cup/rnncodec-latent-psnr-2-bits.png")
    np.testing.assert_array_equal(shown_pixels(browser, "#theirs"), expected)
