"""Tests of the page of one file: its pictures and numbers, its use in a browser, and its errors."""

import base64
import io
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By

from rnncodec import view
from rnncodec.cli import main
from rnncodec.codec import Codec
from rnncodec.files import read_header, truncate
from rnncodec.weights import load_weights

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
TINY = ["--weights", "tiny.safetensors"]


@pytest.fixture(autouse=True)
def place(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny, ".")


@pytest.fixture
def codec():
    return Codec(load_weights(Path("tiny.safetensors").absolute()))


def pictures(page):
    """The pictures of a page, by a search of our own."""
    urls = re.findall(r'src="data:image/(png|jpeg);base64,([^"]+)"', Path(page).read_text())
    found = [Image.open(io.BytesIO(base64.b64decode(data))) for _, data in urls]
    assert [image.format for image in found] == [kind.upper() for kind, _ in urls]
    return [np.asarray(image) for image in found]


def write(page, codec, iterations=3, title="a.rnc", picture=PICTURE):
    data = codec.encode(picture, iterations)
    return view.write_page(page, title, codec, data), data


def test_the_pictures_are_those_that_decode_gives(codec):
    count, data = write("a.html", codec)
    assert count == 3
    for number, picture in enumerate(pictures("a.html"), 1):
        assert np.array_equal(picture, np.asarray(codec.decode(data, number)))


def test_a_file_that_was_cut_shows_what_it_has(codec):
    data = codec.encode(PICTURE, 3)
    assert view.write_page("a.html", "a", codec, truncate(data, iterations=2)) == 2
    with pytest.warns(UserWarning, match="decoded 2 of 3 iterations"):
        assert view.write_page("a.html", "a", codec, data[:-1]) == 2
    assert len(pictures("a.html")) == 2


def test_large_pictures_are_nearly_as_decoded(codec, monkeypatch):
    monkeypatch.setattr(view, "WITHOUT_LOSS", PICTURE[..., 0].size - 1)
    smooth = np.repeat(np.repeat(PICTURE[:3, :4], 10, 0), 10, 1)
    _, data = write("a.html", codec, picture=smooth)
    for number, picture in enumerate(pictures("a.html"), 1):
        error = picture.astype(float) - np.asarray(codec.decode(data, number))
        assert 0 < np.abs(error).mean() < 4
    assert "JPEG of quality 95" in Path("a.html").read_text()


@pytest.mark.browser
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_the_slider_moves_through_the_iterations(codec, browser, size):
    name = "<img src=x onerror=hacked=1>{{ rows }}&amp;.rnc"
    _, data = write("a.html", codec, title=name)
    header = read_header(data)
    browser.set_window_size(*size)
    browser.get(Path("a.html").absolute().as_uri())
    assert browser.title == name
    assert browser.find_element(By.TAG_NAME, "h1").text == name
    slider, said = (browser.find_element(By.TAG_NAME, tag) for tag in ("input", "output"))

    def shown():
        images = browser.find_elements(By.TAG_NAME, "img")
        (number,) = (i for i, image in enumerate(images, 1) if image.is_displayed())
        assert said.text == (
            f"{number} of 3: {header.sizes[number - 1]:,} bytes, {header.bpp[number - 1]:.3f} bits per pixel"
        )
        natural = browser.execute_script("return arguments[0].naturalWidth", images[number - 1])
        assert natural == PICTURE.shape[1]
        return number

    assert shown() == 3  # the best first
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown() == 2
    slider.send_keys(Keys.HOME)
    assert shown() == 1
    slider.send_keys(Keys.END)
    assert shown() == 3
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    button = browser.find_element(By.TAG_NAME, "button")
    assert min(slider.size["height"], button.size["height"]) >= 44  # for fingers
    assert browser.execute_script("return window.hacked") is None
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.browser
def test_pixel_by_pixel_shows_large_pictures_whole_or_at_their_size(codec, browser):
    wide = np.tile(PICTURE, (1, 50, 1))
    write("a.html", codec, 1, picture=wide)
    browser.set_window_size(1000, 600)
    browser.get(Path("a.html").absolute().as_uri())
    image, button = browser.find_element(By.TAG_NAME, "img"), browser.find_element(By.TAG_NAME, "button")
    assert image.size["width"] <= 1000
    button.click()
    assert image.size["width"] == wide.shape[1]
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert image.size["width"] <= 1000


def test_the_command_writes_and_opens_a_page(capsys, monkeypatch, codec):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    Path("a.rnc").write_bytes(codec.encode(PICTURE, 2))
    assert main(["view", "a.rnc", "a.html", *TINY]) == 0
    assert opened == [Path("a.html").absolute().as_uri()]
    assert capsys.readouterr().out == f"a.html: 2 iterations, {Path('a.html').stat().st_size} bytes\n"
    assert main(["view", "a.rnc", *TINY]) == 0
    page = Path(capsys.readouterr().out.partition(": ")[0])
    assert opened[1:] == [page.as_uri()]
    assert len(pictures(page)) == 2
    assert page.name.startswith("a-")
    assert not stat.S_IMODE(page.stat().st_mode) & 0o077  # others may use this folder
    page.unlink()
    assert main(["view", "a.rnc", "a.html", "--no-open", *TINY]) == 0
    assert len(opened) == 2
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    assert main(["view", "a.rnc", "a.html", *TINY]) == 0
    assert capsys.readouterr().err == "rnncodec: warning: a.rnc: no browser can be started; open the page in one\n"


def test_any_name_has_a_page_but_not_in_place_of_the_file(capsys, codec, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = codec.encode(PICTURE, 1)
    for name in ("写" * 80 + ".rnc", os.fsdecode(b"caf\xe9.rnc")):
        Path(name).write_bytes(data)
        assert main(["view", name, "--no-open", *TINY]) == 0
    assert len(list(tmp_path.glob("*-*.html"))) == 2
    Path("a.html").write_bytes(data)
    with pytest.raises(SystemExit, match="2"):
        main(["view", "a.html", "./a.html", "--no-open", *TINY])
    assert "would overwrite the input" in capsys.readouterr().err
    assert Path("a.html").read_bytes() == data


def test_what_fails_leaves_no_page(capsys, codec, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Path("a.rnc").write_bytes(codec.encode(PICTURE, 2)[:30])
    Path("old.html").write_text("mine")
    for page in ([], ["old.html"]):
        assert main(["view", "a.rnc", *page, *TINY]) == 1
        assert capsys.readouterr().err.startswith("rnncodec: error: a.rnc: ")
    assert Path("old.html").read_text() == "mine"
    assert [path.name for path in Path(".").glob("*.html")] == ["old.html"]
    with pytest.raises(SystemExit, match="2"):
        main(["view", "a.rnc", "photo.png"])
    assert "must end in .html, not photo.png" in capsys.readouterr().err
