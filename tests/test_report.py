"""Tests of the report of an evaluation: its content, its errors, and its use in a browser."""

import base64
import csv
import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.actions import interaction
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from rnncodec.evaluation.baselines import BASELINES
from rnncodec.evaluation.report import match, write_report
from rnncodec.metrics.curves import Point, mean_curve, read_points, to_csv

COLUMNS = [field.name for field in fields(Point)]
SIZES = {"alpha": (96, 64), "beta": (64, 96)}  # width, height
CODEC = "rnncodec-tiny"
QUALITIES = {"jpeg": (10, 30, 45, 60, 90), "webp": (5, 50, 95), "avif": (20, 60, 90)}
HOSTILE_IMAGE = "\"><img src=x onerror='hacked=1'>&amp;{{ data }}"
HOSTILE_CODEC = "</script><script>hacked=1</script><!--'\"{{ pictures }}"


def photograph(seed, width, height):
    """Smooth and a little noisy, so that quality matters."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([2 * x, 2 * y, x + y], -1) + 40 * np.sin(x / 5 + seed)[..., None]
    return Image.fromarray((smooth % 256 * 0.8 + rng.integers(0, 40, (height, width, 3))).astype(np.uint8))


def make_results(folder, sizes=SIZES, codec=CODEC, webp="webp"):
    """What an evaluation of two images leaves.

    The bytes of the four iterations are laid around those of the JPEG files: below all, exactly as many as quality 30
    takes, one less than quality 90, and above all.
    """
    points = []
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        pictures = folder / "pictures" / f"image-{seed}"
        pictures.mkdir(parents=True)
        original = photograph(seed, width, height)
        original.save(pictures / "original.png")

        def add(codec, setting, size, psnr, picture, name=name, pixels=width * height):
            ms_ssim = math.nan if name == "alpha" else 0.9 + setting / 1000
            path = "" if picture is None else str(picture.relative_to(folder))
            metrics = {"psnr": psnr, "ms_ssim": ms_ssim, "psnr_hvs_m": psnr + 1}
            points.append(Point(name, codec, setting, size, 8 * size / pixels, **metrics, picture=path))

        taken = {}
        for coder, qualities in QUALITIES.items():
            for quality in qualities:
                path = pictures / f"{coder}-{quality}.{coder.replace('jpeg', 'jpg')}"
                original.save(path, quality=quality)
                taken[coder, quality] = path.stat().st_size
                add(webp if coder == "webp" else coder, quality, taken[coder, quality], 25 + quality / 8, path)
        for quality in (1, 2):
            path = pictures / f"jpeg2000-{quality}.png"
            original.save(path)
            add("jpeg2000", quality, 400 * quality, 24 + quality, path)
        add("jxl", 1.5, 700, 30, None)
        add("png", 9, (pictures / "original.png").stat().st_size, math.inf, pictures / "original.png")
        sizes_ours = taken["jpeg", 10] - 20, taken["jpeg", 30], taken["jpeg", 90] - 1, taken["jpeg", 90] + 500
        for t, size in enumerate(sizes_ours, start=1):
            path = pictures / f"ours-{t}.png"
            photograph(10 * seed + t, width, height).save(path)
            add(codec, t, size, 20 + 2 * t + seed, path)
    (folder / "points.csv").write_text(to_csv(points))
    write_means(folder)
    return folder


def write_means(folder):
    points = read_points(folder)
    codecs = dict.fromkeys(point.codec for point in points)
    means = [point for codec in codecs for point in mean_curve(p for p in points if p.codec == codec)]
    (folder / "mean.csv").write_text(to_csv(means))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture
def results(shared, tmp_path):
    """A folder of results to damage."""
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def rows_of(folder):
    with open(folder / "points.csv", newline="") as file:
        return list(csv.DictReader(file))


class Page(html.parser.HTMLParser):
    """The attributes of every element, and the content of every script by its id."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.scripts, self.ids = [], {}, []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.ids.append(dict(attrs).get("id"))

    def handle_data(self, data):
        if self.lasttag == "script" and data.strip():
            self.scripts[self.ids[-1]] = self.scripts.get(self.ids[-1], "") + data

    @property
    def data(self):
        return json.loads(self.scripts["data"], parse_constant=pytest.fail)


def test_the_data_are_those_of_the_csv(shared, tmp_path):
    path = tmp_path / "page.html"
    assert write_report(shared, path) == path
    data, rows = Page(path).data, rows_of(shared)
    assert data["codec"] == CODEC
    assert data["count"] == 2
    assert len(data["points"]) == len(rows) == 38
    for values, row in zip(data["points"], rows, strict=True):
        for column, value in zip(data["columns"], values, strict=True):
            if column in ("image", "codec"):
                assert value == row[column]
            elif row[column] in ("", "inf"):
                assert value == (row[column] or None)
            else:
                assert value == float(row[column])


def test_the_page_names_codecs_as_the_baselines_do(shared, tmp_path):
    named = Page(write_report(shared, tmp_path / "page.html")).data["baselines"]
    assert list(named) == list(BASELINES)
    assert named["jpeg"] == {"label": "JPEG", "setting": "quality"}
    assert named["jpeg2000"] == {"label": BASELINES["jpeg2000"].title, "setting": "target bpp"}


def test_pictures_are_the_files(shared, tmp_path):
    page, rows = Page(write_report(shared, tmp_path / "page.html")), rows_of(shared)
    types = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".avif": "image/avif"}
    shown = {id: text for id, text in page.scripts.items() if id not in ("data", None)}
    for id, text in shown.items():
        kind, number = id.split("-")
        path = shared / (rows[int(number)]["picture"] if kind == "picture" else f"pictures/image-{number}/original.png")
        assert text == f"data:{types[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    codecs = [rows[int(id.split("-")[1])]["codec"] for id in shown if id.startswith("picture")]
    assert codecs.count(CODEC) == 8
    assert codecs.count("jpeg") == 2 * 4  # of both images, without quality 45
    assert set(codecs) == {CODEC, "jpeg", "webp", "avif"}


@pytest.mark.parametrize(
    ("size", "setting"), [(99, 5), (100, 5), (149, 5), (150, 20), (151, 20), (299, 20), (10**9, 60)]
)
def test_match_is_nearest_at_or_below(size, setting):
    sizes = {60: 300, 5: 100, 20: 150}
    points = [Point("a", "jpeg", quality, size, 1, psnr=30) for quality, size in sizes.items()]
    assert match(points, size).setting == setting


def test_match_takes_the_better_of_the_same_bytes():
    points = [Point("a", "jpeg", psnr, 100, 1, psnr=psnr) for psnr in (30, 32, 31)]
    assert match(points, 120).setting == 32
    assert match(points, 80).setting == 32


def test_chosen_settings(shared, tmp_path):
    """With the fixture's bytes, these are the smallest, the equal, the second largest and the largest file."""
    data, rows = Page(write_report(shared, tmp_path / "page.html")).data, rows_of(shared)
    assert [image["name"] for image in data["images"]] == ["alpha", "beta"]
    for image in data["images"]:
        assert [rows[i]["setting"] for i in image["iterations"]] == ["1", "2", "3", "4"]
        others = {other["codec"]: [rows[i] for i in other["points"]] for other in image["others"]}
        assert set(others) == {"jpeg", "webp", "avif"}
        assert [row["setting"] for row in others["jpeg"]] == ["10", "30", "60", "90"]
        assert {row["image"] for other in others.values() for row in other} == {image["name"]}
        sizes = [int(rows[i]["bytes"]) for i in image["iterations"]]
        for codec, chosen in others.items():
            files = sorted(int(r["bytes"]) for r in rows if (r["image"], r["codec"]) == (image["name"], codec))
            for size, row in zip(sizes, chosen, strict=True):
                at = int(np.searchsorted(files, size, side="right")) - 1
                assert int(row["bytes"]) == files[max(at, 0)]


def test_images_are_spread_evenly(results):
    rows = rows_of(results)
    more = [row | {"image": f"image {i}"} for i in range(7) for row in rows if row["image"] == "alpha"]
    with open(results / "points.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(reversed(more))
    for images, expected in ((1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (7, [0, 1, 2, 3, 4, 5, 6]), (100, [*range(7)])):
        data = Page(write_report(results, images=images)).data
        assert [image["name"] for image in data["images"]] == [f"image {i}" for i in expected]
        assert data["count"] == 7


def test_the_page_asks_nobody_for_anything(shared, tmp_path):
    page = Page(write_report(shared, tmp_path / "page.html"))
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "background", "ping"):
            assert attributes.get(name, "data:").startswith("data:")
    source = page.text
    for id, content in page.scripts.items():
        if id is not None:
            source = source.replace(content, "")
    assert set(re.findall(r"\w+://[^\s\"'`]*", source)) == {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"url\([^)]*\)", source)) == {"url(#plot)"}
    assert not re.search(r"@import|\bimport\b|fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon", source)
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(" ".join(rules.values()).split()) == {"'none'", "data:", "'unsafe-inline'"}


def test_hostile_names_stay_names(tmp_path):
    codec = f"rnncodec{HOSTILE_CODEC}"
    results = make_results(tmp_path, {HOSTILE_IMAGE: (32, 32), "__proto__": (32, 16)}, codec, HOSTILE_CODEC)
    page = Page(write_report(results))
    assert page.data["codec"] == codec
    assert {row[0] for row in page.data["points"]} == {HOSTILE_IMAGE, "__proto__"}
    assert page.ids[:2] == ["data", None]
    assert all(re.fullmatch(r"(picture|original)-\d+", id) for id in page.ids[2:])
    assert not [
        attributes for tag, attributes in page.elements if "onerror" in attributes or attributes.get("src") == "x"
    ]


def replace(column, text):
    """Damages one column of the last row of points.csv."""

    def damage(folder):
        rows = rows_of(folder)
        rows[-1][column] = text
        with open(folder / "points.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    return damage


def edit(change):
    return lambda folder: (folder / "points.csv").write_text(change((folder / "points.csv").read_text()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "points.csv").unlink(), "points.csv: No such file or directory"),
        (lambda folder: (folder / "mean.csv").unlink(), "mean.csv: No such file or directory"),
        (edit(lambda text: ""), "there is no column image"),
        (edit(lambda text: text.replace("psnr_hvs_m", "other", 1)), "there is no column psnr_hvs_m"),
        (edit(lambda text: text.splitlines()[0]), "there are no points"),
        (edit(lambda text: text + "alpha,jpeg\n"), "line 40: not as many fields as columns"),
        (edit(lambda text: text.replace("rnncodec-", "other-")), "no codec's name begins with rnncodec"),
        (edit(lambda text: re.sub(r"pictures/\S*", "", text)), "no picture of 'rnncodec-tiny' was saved"),
        (replace("psnr", "high\nand low"), r"psnr is not a number: 'high\nand low'"),
        (replace("bytes", "0"), "line 39: bytes cannot be '0'"),
        (replace("bytes", ""), "line 39: bytes cannot be ''"),
        (replace("bpp", "inf"), "bpp cannot be 'inf'"),
        (replace("psnr", "-inf"), "psnr cannot be '-inf'"),
        (replace("setting", "1.5"), "iterations are a whole number, not '1.5'"),
        (replace("picture", "../secret.png"), "'../secret.png' is not in"),
        (replace("picture", "/etc/secret.png"), "'/etc/secret.png' is not in"),
        (replace("picture", "points.csv"), "'points.csv' is not of a kind that browsers show"),
        (replace("picture", "pictures/no\nne.png"), r"'pictures/no\nne.png': no such file"),
        (lambda folder: (folder / "pictures/image-1/original.png").unlink(), "original.png': no such file"),
        (lambda folder: shutil.rmtree(folder / "pictures"), "no such file"),
    ],
)
def test_what_is_missing_is_told_in_one_line(results, damage, message):
    (results / "report.html").write_text("old")
    damage(results)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        write_report(results)
    assert len(str(error.value).splitlines()) == 1
    assert (results / "report.html").read_text() == "old"


def test_no_images_are_no_report(shared):
    with pytest.raises(ValueError, match="at least 1 image, not 0"):
        write_report(shared, images=0)


def test_written_whole_or_not_at_all(results, monkeypatch):
    before = sorted(results.rglob("*"))
    with monkeypatch.context() as context:
        context.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_report(results)
    assert sorted(results.rglob("*")) == before
    assert write_report(results) == results / "report.html"
    assert sorted(results.rglob("*")) == sorted([*before, results / "report.html"])


def test_does_without_torch():
    code = "import sys, rnncodec.evaluation.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---- in a browser


@pytest.fixture
def open_page(browser):
    """Opens a page of results; afterwards nothing may have gone wrong, and nothing been requested."""

    def open(results, fragment=""):
        path = write_report(results)
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(path.as_uri() + fragment)
        return path

    yield open
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert requests
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def text(browser, selector):
    return " ".join(find(browser, selector).text.split())


def press(browser, key):
    ActionChains(browser).send_keys(key).perform()


def wait(browser, condition):
    return WebDriverWait(browser, 20, 0.05).until(lambda _: condition())


def slide(browser, index):
    """Moves the range input as a hand does."""
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    browser.execute_script(script, find(browser, "#iteration"), index)


def shown_pixels(browser, pane):
    """Uint8 [H, W, 3] of the picture in a pane."""
    script = """
        const image = document.querySelector(arguments[0] + " img"), canvas = document.createElement("canvas");
        canvas.width = image.naturalWidth;
        canvas.height = image.naturalHeight;
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [image.complete, image.naturalWidth, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
    """
    wait(browser, lambda: browser.execute_script(script, pane)[0])
    _, width, values = browser.execute_script(script, pane)
    return np.array(values, np.uint8).reshape(-1, width, 4)[..., :3]


def placement(browser, pane):
    """Scale and corner of the picture in a pane, and the fraction of the picture in the pane's middle."""
    script = """
        const pane = document.querySelector(arguments[0]), image = pane.querySelector("img");
        const matrix = new DOMMatrix(getComputedStyle(image).transform);
        return [matrix.a, matrix.e, matrix.f, (pane.clientWidth / 2 - matrix.e) / matrix.a / image.naturalWidth];
    """
    return browser.execute_script(script, pane)


@pytest.mark.browser
def test_sliding_shows_each_iteration(shared, browser, open_page):
    open_page(shared)
    rows = [row for row in rows_of(shared) if row["codec"] == CODEC]
    assert text(browser, "h1") == CODEC
    assert "2 images" in text(browser, "#summary")
    for name, image in (("alpha", 0), ("beta", 1)):
        find(browser, f"#thumbnails button:nth-child({image + 1})").click()
        for row in (row for row in rows if row["image"] == name):
            slide(browser, int(row["setting"]) - 1)
            values = text(browser, "#our-values")
            assert f"iteration {row['setting']}" in values
            assert f"bytes {int(row['bytes']):,} bpp {float(row['bpp']):.4f} PSNR {row['psnr']}.00 dB" in values
            ms_ssim = f"{float(row['ms_ssim']):.4f}" if row["ms_ssim"] else "–"
            assert f"MS-SSIM {ms_ssim} PSNR-HVS-M {int(row['psnr']) + 1}.00 dB" in values
            expected = np.asarray(Image.open(shared / row["picture"]))
            np.testing.assert_array_equal(shown_pixels(browser, "#ours"), expected)
    find(browser, "h1").click()
    press(browser, Keys.ARROW_LEFT)
    assert "iteration 3" in text(browser, "#our-values")
    press(browser, Keys.ARROW_RIGHT)
    press(browser, Keys.ARROW_RIGHT)
    assert "iteration 4" in text(browser, "#our-values")
    assert text(browser, "#count") == "iteration 4 of 4"
    find(browser, "#iteration").send_keys(Keys.HOME)
    assert "iteration 1" in text(browser, "#our-values")


@pytest.mark.browser
def test_the_other_codec_has_the_same_bytes(shared, browser, open_page):
    open_page(shared)
    rows = rows_of(shared)
    sizes = {int(r["setting"]): int(r["bytes"]) for r in rows if (r["image"], r["codec"]) == ("alpha", "jpeg")}
    select = Select(find(browser, "#other"))
    assert [option.text for option in select.options] == ["JPEG", "WebP", "AVIF", "the original"]
    select.select_by_visible_text("JPEG")
    notes = {
        (0, 10): f"its smallest file, {100 * 20 / (sizes[10] - 20):.1f} % more bytes",
        (1, 30): "the same bytes",
        (3, 90): f"{100 * 500 / (sizes[90] + 500):.1f} % fewer bytes",
    }
    for (index, quality), note in notes.items():
        slide(browser, index)
        values = text(browser, "#their-values")
        assert values.startswith(f"JPEG, quality {quality} {note} bytes {sizes[quality]:,} bpp ")
        coded = (shared / f"pictures/image-0/jpeg-{quality}.jpg").read_bytes()
        assert find(browser, "#theirs img").get_attribute("src").endswith(base64.b64encode(coded).decode())
    assert find(browser, "#theirs img").get_attribute("alt") == "alpha, JPEG, quality 90"
    for choice, suffix in (("WebP", "webp"), ("AVIF", "avif")):
        select.select_by_visible_text(choice)
        assert shown_pixels(browser, "#theirs").shape == (64, 96, 3)
        assert find(browser, "#theirs img").get_attribute("src").startswith(f"data:image/{suffix};")
    select.select_by_visible_text("the original")
    expected = np.asarray(Image.open(shared / "pictures/image-0/original.png"))
    np.testing.assert_array_equal(shown_pixels(browser, "#theirs"), expected)


@pytest.mark.browser
def test_wiper(shared, browser, open_page):
    open_page(shared)
    divider, width = find(browser, "#divider"), find(browser, "#stage").size["width"]

    def clip():
        value = find(browser, "#theirs").value_of_css_property("clip-path")
        (left,) = re.findall(r"^inset\(0px 0px 0px ([\d.]+)%\)$", value)
        return float(left)

    assert clip() == 50
    ActionChains(browser).drag_and_drop_by_offset(divider, 200, 0).perform()
    left = clip()
    assert left == pytest.approx(50 + 100 * 200 / width, abs=0.2)
    assert placement(browser, "#ours") == placement(browser, "#theirs")
    divider.send_keys(Keys.ARROW_LEFT)
    assert clip() == pytest.approx(left - 1, abs=0.02)
    divider.send_keys(Keys.END)
    assert clip() == 100
    assert divider.get_attribute("aria-valuenow") == "100"
    assert "iteration 4" in text(browser, "#our-values")  # the keys of the divider are its own


@pytest.mark.browser
def test_zoom_and_pan_are_the_same_on_both_sides(shared, browser, open_page):
    open_page(shared)
    wait(browser, lambda: placement(browser, "#ours")[0] > 1)
    find(browser, "#mode button[value=side]").click()
    assert find(browser, "#theirs").value_of_css_property("clip-path") == "none"
    left, right = find(browser, "#ours").rect, find(browser, "#theirs").rect
    assert left["x"] + left["width"] <= right["x"]
    assert (left["y"], left["height"]) == (right["y"], right["height"])
    for zoom in (1, 2, 4, 8):
        find(browser, f"#zoom button[value='{zoom}']").click()
        assert placement(browser, "#ours")[0] == zoom
        assert placement(browser, "#ours") == placement(browser, "#theirs")
        assert find(browser, "#ours img").value_of_css_property("image-rendering") == "pixelated"
    before = placement(browser, "#ours")
    ActionChains(browser).drag_and_drop_by_offset(find(browser, "#theirs"), -40, 0).perform()
    after = placement(browser, "#ours")
    assert after[:3] == [8, before[1] - 40, before[2]]
    assert after == placement(browser, "#theirs")

    find(browser, "#mode button[value=wiper]").click()
    wide = placement(browser, "#ours")
    press(browser, "m")
    assert placement(browser, "#ours") == after  # there and back
    assert wide[0] == 8


@pytest.mark.browser
def test_wheel_zooms_to_the_pointer(shared, browser, open_page):
    open_page(shared)
    wait(browser, lambda: placement(browser, "#ours")[0] > 1)
    browser.execute_script("document.querySelector('#stage').scrollIntoView({block: 'center'})")
    press(browser, "8")
    stage = find(browser, "#stage")
    x, y = 100, -50  # from the middle

    def under():
        scale, left, top, _ = placement(browser, "#ours")
        return (stage.size["width"] / 2 + x - left) / scale, (stage.size["height"] / 2 + y - top) / scale

    before = under()
    browser.execute_async_script("setTimeout(arguments[0], 400)")  # a page that is still scrolling does not zoom
    ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(stage, x, y), 0, -100).perform()
    wait(browser, lambda: placement(browser, "#ours")[0] == 12)
    assert under()[1] == pytest.approx(before[1], abs=0.5)
    assert placement(browser, "#ours") == placement(browser, "#theirs")
    scrolled = browser.execute_script("return scrollY")
    ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(stage, x, y), 0, 100).perform()
    wait(browser, lambda: placement(browser, "#ours")[0] == 8)
    assert browser.execute_script("return scrollY") == scrolled


@pytest.mark.browser
def test_the_address_keeps_the_view(shared, browser, open_page):
    open_page(shared)
    find(browser, "#thumbnails button:nth-child(2)").click()
    slide(browser, 1)
    Select(find(browser, "#other")).select_by_visible_text("AVIF")
    find(browser, "#mode button[value=side]").click()
    press(browser, "8")
    ActionChains(browser).drag_and_drop_by_offset(find(browser, "#ours"), 0, -70).perform()

    def seen():
        values = [text(browser, selector) for selector in ("#our-values", "#their-values")]
        pressed = [button.text for button in browser.find_elements(By.CSS_SELECTOR, "[aria-pressed=true]")]
        return (
            values,
            pressed,
            placement(browser, "#ours")[:3],
            Select(find(browser, "#other")).first_selected_option.text,
        )

    expected = seen()
    assert "iteration 2" in expected[0][0]
    wait(browser, lambda: "image=beta&iteration=2&with=avif&mode=side&zoom=8&" in browser.current_url)
    browser.execute_async_script("setTimeout(arguments[0], 400)")
    address = browser.current_url
    browser.refresh()
    wait(browser, lambda: browser.execute_script("return !!document.querySelector('#ours img')?.naturalWidth"))
    restored = seen()
    assert restored[2] == pytest.approx(expected[2], abs=1)
    assert (restored[:2], restored[3]) == (expected[:2], expected[3])
    assert browser.current_url == address
    browser.execute_script("location.hash = 'image=alpha&iteration=3&with=original&mode=wiper&zoom=fit'")
    wait(browser, lambda: "iteration 3" in text(browser, "#our-values"))
    assert text(browser, "#their-values") == "the original"
    assert shown_pixels(browser, "#ours").shape == (64, 96, 3)


@pytest.mark.browser
def test_nonsense_in_the_address_is_ignored(shared, browser, open_page):
    open_page(shared, "#image=none&iteration=-3&with=gif&mode=upside&zoom=1e9&x=nan&y=7&divider=%FF&&=")
    assert "iteration 4" in text(browser, "#our-values")
    assert text(browser, "#their-values").startswith("JPEG, quality 90")
    assert [button.text for button in browser.find_elements(By.CSS_SELECTOR, "#zoom [aria-pressed=true]")] == ["fit"]


@pytest.mark.browser
def test_curves_and_table(shared, browser, open_page):
    open_page(shared)
    legend = [button.text for button in browser.find_elements(By.CSS_SELECTOR, "#legend button")]
    assert sorted(legend) == sorted([CODEC, "JPEG", "WebP", "AVIF", "JPEG 2000", "JPEG XL"])  # PNG has no curve
    assert legend[0] == CODEC
    assert "PNG, without loss: " in text(browser, "#notes")

    button = find(browser, f"#legend button:nth-child({legend.index('JPEG') + 1})")
    assert browser.find_elements(By.CSS_SELECTOR, "#chart g[data-codec=jpeg] path")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not browser.find_elements(By.CSS_SELECTOR, "#chart g[data-codec=jpeg]")
    assert browser.find_elements(By.CSS_SELECTOR, "#chart g[data-codec=avif] path")
    button.click()
    assert browser.find_elements(By.CSS_SELECTOR, "#chart g[data-codec=jpeg] path")

    def mean(codec, setting, column):
        rows = [row for row in rows_of(shared) if (row["codec"], row["setting"]) == (codec, str(setting))]
        values = [float(row[column]) for row in rows if row[column]]
        return sum(values) / len(values)

    def whole(value):
        return f"{math.floor(value + 0.5):,}"

    rates, levels = zip(*((mean("jpeg", q, "bpp"), mean("jpeg", q, "psnr")) for q in QUALITIES["jpeg"]), strict=True)
    cells = [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "td")] for row in rows_in(browser)]
    # MS-SSIM, which only one of the images has, stands beside the bytes of that image.
    assert [row[0] for row in cells] == ["1", "2", "4", "1 (mean of 1)", "2 (mean of 1)", "4 (mean of 1)"]
    own = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "thead th[rowspan]")]
    assert own[3:6] == ["PSNR, dB", "MS-SSIM", "PSNR-HVS-M, dB"]
    names = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "thead tr:last-child th")]
    jpeg = len(own) + names.index("JPEG")
    beta = {row["setting"]: row for row in rows_of(shared) if (row["image"], row["codec"]) == ("beta", CODEC)}
    for t, row in zip((1, 2, 4), cells[3:], strict=True):
        assert row[1:3] == [whole(float(beta[str(t)]["bytes"])), f"{float(beta[str(t)]['bpp']):.4f}"]
        assert row[3:6] == ["–", f"{0.9 + t / 1000:.4f}", "–"]
        assert set(row[6:]) == {"–"}  # of the PSNR of all images
    for t, row in zip((1, 2, 4), cells[:3], strict=True):
        bpp = mean(CODEC, t, "bpp")
        assert row[1:4] == [whole(mean(CODEC, t, "bytes")), f"{bpp:.4f}", f"{20.5 + 2 * t:.2f}"]
        assert row[4:6] == ["–", f"{21.5 + 2 * t:.2f}"]
        expected = f"{np.interp(bpp, rates, levels):.2f}" if rates[0] <= bpp <= rates[-1] else "–"
        assert row[jpeg] == expected
    assert cells[0][jpeg] == "–"
    assert cells[1][jpeg] != "–"

    for anchor, at, axis, level in (("middle", "x", "cx", mean(CODEC, 1, "bpp")), ("end", "y", "cy", 22.5)):
        ticks = browser.find_elements(By.CSS_SELECTOR, f"#chart text[text-anchor={anchor}]")
        ticks = [(float(t.get_attribute(at)), float(t.text)) for t in ticks if t.text[0].isdigit()]
        assert len(ticks) >= 4
        places, levels = np.array(ticks).T
        slope, offset = np.polyfit(places, levels, 1)
        position = float(find(browser, "#chart .ours circle").get_attribute(axis))
        shift = 0 if at == "x" else 4  # the baseline of a text lies below its middle
        assert slope * (position + shift) + offset == pytest.approx(level, abs=abs(slope))

    ActionChains(browser).move_to_element(find(browser, "#chart .ours circle")).perform()
    tip = text(browser, "#tip")
    rate = f"{whole(mean(CODEC, 1, 'bytes'))} bytes {mean(CODEC, 1, 'bpp'):.4f} bpp"
    assert tip.startswith(f"{CODEC} iteration 1 {rate} PSNR 22.50 dB")

    find(browser, "#metric button[value=ms_ssim]").click()
    assert text(browser, "thead th[colspan]") == "MS-SSIM of others at the same bpp"
    assert "MS-SSIM, dB, mean of 1" in text(browser, "#chart svg")
    ActionChains(browser).move_to_element(find(browser, "#chart .ours circle")).perform()
    assert f"MS-SSIM 0.9010, {-10 * math.log10(1 - 0.901):.2f} dB" in text(browser, "#tip")
    find(browser, "#scope button[value=image]").click()  # alpha, which has no MS-SSIM
    assert not browser.find_elements(By.CSS_SELECTOR, "#chart g[data-codec]")
    find(browser, "#metric button[value=psnr_hvs_m]").click()
    assert len(browser.find_elements(By.CSS_SELECTOR, f"#chart g[data-codec='{CODEC}'] path")) == 1


@pytest.mark.browser
def test_a_codec_that_is_exact_for_one_image_is_not_called_lossless(results, browser, open_page):
    """The mean is infinite if one image is reproduced exactly, but the curves of the other images are still drawn."""
    rows = rows_of(results)
    for row in rows:
        if (row["image"], row["codec"]) == ("beta", "jpeg"):
            row["psnr"] = "inf"
    with open(results / "points.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    write_means(results)
    open_page(results)
    assert "JPEG" in [button.text for button in browser.find_elements(By.CSS_SELECTOR, "#legend button")]
    assert "JPEG, without loss" not in text(browser, "#notes")
    assert "PNG, without loss" in text(browser, "#notes")
    assert not browser.find_elements(By.CSS_SELECTOR, "#chart g[data-codec=jpeg]")
    find(browser, "#scope button[value=image]").click()  # alpha
    assert browser.find_elements(By.CSS_SELECTOR, "#chart g[data-codec=jpeg] path")


def rows_in(browser):
    return browser.find_elements(By.CSS_SELECTOR, "tbody tr")


@pytest.mark.browser
def test_hostile_names_are_shown_as_they_are(tmp_path, browser, open_page):
    codec = f"rnncodec{HOSTILE_CODEC}"
    results = make_results(tmp_path, {HOSTILE_IMAGE: (32, 32), "__proto__": (32, 16)}, codec, HOSTILE_CODEC)
    open_page(results)
    assert find(browser, "h1").get_property("textContent") == codec
    names = [each.get_property("textContent") for each in browser.find_elements(By.CSS_SELECTOR, "#thumbnails span")]
    assert names == [HOSTILE_IMAGE, "__proto__"]
    Select(find(browser, "#other")).select_by_visible_text(HOSTILE_CODEC)
    assert HOSTILE_CODEC in find(browser, "#their-values h3").get_property("textContent")
    wait(browser, lambda: "#" in browser.current_url)
    browser.refresh()
    assert HOSTILE_CODEC in find(browser, "#their-values h3").get_property("textContent")
    assert browser.execute_script("return typeof hacked") == "undefined"


@pytest.mark.browser
def test_fits_a_phone(shared, browser, open_page):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 3, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        open_page(shared)
        wait(browser, lambda: placement(browser, "#ours")[0] > 1)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        finger = ActionBuilder(browser, mouse=PointerInput(interaction.POINTER_TOUCH, "finger"))
        finger.pointer_action.move_to(find(browser, "#divider")).pointer_down().move_by(-78, 0).pointer_up()
        finger.perform()
        value = find(browser, "#theirs").value_of_css_property("clip-path")
        assert float(value.split()[-1].rstrip("%)")) == pytest.approx(30, abs=0.3)
        find(browser, "#mode button[value=side]").click()
        upper, lower = find(browser, "#ours").rect, find(browser, "#theirs").rect
        assert upper["y"] + upper["height"] <= lower["y"]
        find(browser, "#zoom button[value='1']").click()
        assert placement(browser, "#ours")[0] == pytest.approx(1 / 3)  # of the screen's pixels
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
