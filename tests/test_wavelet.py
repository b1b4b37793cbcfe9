"""Tests of the study of wavelet images, against PyWavelets called directly and against bytes counted by hand."""

import csv
import math
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import pywt
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import wavelet
from rnncodec.entropy import CLASSICAL
from rnncodec.files.errors import FormatError


def picture(height=70, width=94):
    """Waves with some noise, gray."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).normal(0, 6, (height, width))
    return np.clip(128 + 90 * np.sin(x / 9 + (y / 20) ** 2) + noise, 0, 255).astype(np.uint8)


def sealed(body):
    """A file with the checksum of its other bytes."""
    return body + zlib.crc32(body).to_bytes(4, "big")


@pytest.mark.parametrize("coder", CLASSICAL)
@pytest.mark.parametrize("shape", [(37, 70), (1, 1), (1, 30), (19, 18)])
def test_coefficients_come_back(coder, shape):
    quantized = wavelet.analyze(picture(*shape), 5)
    found = wavelet.read(wavelet.write(quantized, coder))
    assert (found.height, found.width, found.step) == (*shape, 5)
    assert len(found.bands) == len(quantized.bands)
    for ours, theirs in zip(found.bands, quantized.bands, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(64, 96), (71, 37)])
@pytest.mark.parametrize("step", [4, 32])
def test_quality_is_that_of_pywavelets(shape, step):
    image = picture(*shape)
    count = pywt.dwt_max_level(min(shape), "bior4.4")
    flat, slices = pywt.coeffs_to_array(pywt.wavedec2(image - 128.0, "bior4.4", "periodization", count))
    # Numbered by the lower end of the absolute value; values of the interval around 0 are 0.
    inside = step * np.sign(flat) * (np.floor(np.abs(flat) / step) + 0.5)
    kept = np.where(np.abs(flat) < step, 0, inside)
    back = pywt.waverec2(pywt.array_to_coeffs(kept, slices, "wavedec2"), "bior4.4", "periodization")
    expected = np.clip(back[: shape[0], : shape[1]] + 128, 0, 255).round().astype(np.uint8)
    decoded = wavelet.decode(wavelet.encode(image, step, "huffman"))
    ours, theirs = (peak_signal_noise_ratio(image, each) for each in (decoded, expected))
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert 25 < ours < 52


def test_a_small_step_loses_little():
    image = picture()
    decoded = wavelet.decode(wavelet.encode(image, 1, "none"))
    assert np.abs(decoded.astype(int) - image).max() <= 2


def test_bytes_of_a_tiny_picture():
    """2x3 pixels have no room for the filters: they are the only subband."""
    image = np.array([[128, 138, 148], [118, 128, 255]], np.uint8)
    numbers = [0, 1, 2, -1, 0, 12]  # 127 / 10 is 12.7
    payload = b"".join(number.to_bytes(2, "big", signed=True) for number in numbers)
    body = b"rwv1" + bytes([0, 2, 3, 10]) + bytes([0, 12]) + payload
    assert wavelet.encode(image, 10, "none") == sealed(body)
    np.testing.assert_array_equal(wavelet.decode(sealed(body)), [[128, 143, 153], [113, 128, 253]])


def test_bytes_of_a_book_and_a_code():
    """16x16 equal pixels: one subband of 256 times 3, whose book is of -3 to 3, seven lengths of four bits."""
    file = wavelet.encode(np.full((16, 16), 128 + 34, np.uint8), 10, "huffman")
    book = bytes([0, 3]) + bytes([0, 0, 0, 0x10])  # the largest number; the last symbol has a code of one bit, "0"
    assert file == sealed(b"rwv1" + bytes([2, 16, 16, 10]) + bytes([2, 6 + 32]) + book + bytes(32))


@pytest.mark.parametrize("step", [2, 8, 40])
def test_entropy_is_a_lower_bound(step):
    quantized = wavelet.analyze(picture(72, 80), step)
    least = 0.0
    for band in quantized.bands:
        counts = Counter(band.ravel().tolist())
        least -= sum(count * math.log2(count / band.size) for count in counts.values())
    assert wavelet.entropy(quantized) == pytest.approx(least)
    sizes = {coder: 8 * len(wavelet.write(quantized, coder)) for coder in ("none", "huffman", "static")}
    assert least < sizes["static"] < 1.2 * least + 2000
    assert least < sizes["huffman"] < sizes["none"]


def test_tiles_are_neighboring_coefficients():
    band = np.arange(40 * 70).reshape(40, 70).astype(np.int16)
    grid = wavelet.Grid(band.shape, 32)
    plane = grid.plane(band)
    assert plane.shape == (6, 20, 24)  # three of 24 columns are two columns wider
    np.testing.assert_array_equal(plane[4], band[20:, 24:48])
    np.testing.assert_array_equal(plane[5][:, :22], band[20:, 48:])
    assert not plane[5][:, 22:].any()
    np.testing.assert_array_equal(grid.band(plane), band)


@pytest.mark.parametrize("coder", CLASSICAL)
def test_damage_is_noticed(coder):
    file = wavelet.encode(picture(24, 20), 8, coder)
    for place in range(0, len(file), 3):
        damaged = bytearray(file)
        damaged[place] ^= 64
        with pytest.raises(FormatError, match=r"^(not a wavelet image|the file is damaged: its checksum is wrong)$"):
            wavelet.decode(bytes(damaged))
    for end in range(0, len(file), 5):
        with pytest.raises(FormatError):
            wavelet.decode(file[:end])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"rwv1", "the file is cut short"),
        (b"rwv1" + bytes([1, 2, 2, 9, 0, 8]) + bytes(8), "unknown coder"),
        (b"rwv1" + bytes([9, 2, 2, 9, 0, 8]) + bytes(8), "unknown coder"),
        (b"rwv1" + bytes([0, 0, 2, 9, 0, 0]), "out of range"),
        (b"rwv1" + bytes([0, 2, 2, 0, 0, 8]) + bytes(8), "out of range"),
        (b"rwv1" + bytes([4] + [255, 255, 255, 255, 15] * 2 + [9, 4, 4]) + bytes(4), "out of range"),
        (b"rwv1" + bytes([4, 128, 128, 1, 128, 128, 1, 9, 4, 0]), "too short"),
        (b"rwv1" + bytes([0, 2, 2, 9, 0, 8]) + bytes(7), "cut short"),
        (b"rwv1" + bytes([0, 2, 2, 9, 0, 8]) + bytes(9), "longer"),
        (b"rwv1" + bytes([2, 2, 2, 9, 4, 4]) + bytes(4), "coding 4 where 2 was expected"),
    ],
)
def test_files_that_no_encoder_writes(body, message):
    with pytest.raises(FormatError, match=message) as caught:
        wavelet.decode(sealed(body))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2)), np.zeros((0, 2), np.uint8)])
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match="an image is uint8"):
        wavelet.encode(image, 8, "none")


def test_the_command_line_counts_files(tmp_path, capsys):
    rgb = np.stack([picture(20, 24), picture(24, 20).T, 255 - picture(20, 24)], 2)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    Image.fromarray(rgb[::-1]).save(tmp_path / "b.png")
    output = tmp_path / "rows.csv"
    assert wavelet.main([str(tmp_path), "--steps", "8", "30", "--output", str(output)]) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["step"], row["coder"]) for row in rows] == [
        (image, step, coder) for image in ("a.png", "b.png") for step in ("8", "30") for coder in CLASSICAL
    ]
    gray = np.array(Image.open(tmp_path / "b.png").convert("L"))
    file = wavelet.encode(gray, 30, "adaptive")
    assert int(rows[-1]["bytes"]) == len(file)
    assert float(rows[-1]["bpp"]) == pytest.approx(8 * len(file) / (20 * 24))
    assert float(rows[-1]["psnr"]) == pytest.approx(peak_signal_noise_ratio(gray, wavelet.decode(file)), abs=1e-4)
    mean = np.mean([float(row["bpp"]) for row in rows if row["step"] == "30" and row["coder"] == "adaptive"])
    assert f"{mean:.4f}" in capsys.readouterr().out


def test_a_wrong_coefficient_ends_the_study(tmp_path, monkeypatch, capsys):
    Image.fromarray(picture(20, 20)).save(tmp_path / "a.png")
    right = wavelet.read

    def wrong(data):
        found = right(data)
        return replace(found, bands=[band + 1 for band in found.bands])

    monkeypatch.setattr(wavelet, "read", wrong)
    assert wavelet.main([str(tmp_path / "a.png"), "--output", str(tmp_path / "rows.csv")]) == 1
    assert "not decoded to the same coefficients" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["no.png"], "no.png: No such file"), (["text.png"], "text.png: "), (["a.png", "--steps", "0"], "from 1 to")],
)
def test_errors_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(20, 20)).save("a.png")
    (tmp_path / "text.png").write_text("no image")
    assert wavelet.main(options) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]
