"""Tests of the baselines: options, settings, and files that Pillow writes and reads."""

import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from rnncodec.evaluation.baselines import BASELINES
from rnncodec.metrics.curves import Point, from_csv, to_csv

X = data.astronaut()[60:204, 100:260]


@pytest.mark.parametrize("name", BASELINES)
def test_files_grow_with_the_setting_and_so_does_the_quality(name):
    baseline = BASELINES[name]
    if not baseline.available:
        pytest.skip(f"Pillow cannot write {baseline.title} here")
    settings = [baseline.settings[0], baseline.settings[len(baseline.settings) // 2], baseline.settings[-1]]
    files = [baseline.encode(X, setting) for setting in settings]
    decoded = [baseline.decode(file) for file in files]
    assert all(x_hat.shape == X.shape and x_hat.dtype == np.uint8 for x_hat in decoded)
    if len(baseline.settings) == 1:  # lossless
        np.testing.assert_array_equal(decoded[0], X)
        return
    assert len(files[0]) < len(files[1]) < len(files[2])
    psnrs = [peak_signal_noise_ratio(X, x_hat) for x_hat in decoded]
    assert psnrs[0] < psnrs[1] < psnrs[2]
    assert any(character.isdigit() for character in baseline.version)


def test_options_reach_the_encoders():
    for name, sampling in (("jpeg", 2), ("jpeg444", 0)):
        image = Image.open(io.BytesIO(BASELINES[name].encode(X, 50)))
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        assert JpegImagePlugin.get_sampling(image) == sampling
        plain = io.BytesIO()
        Image.fromarray(X).save(plain, "JPEG", quality=50, subsampling=sampling)
        assert len(BASELINES[name].encode(X, 50)) < plain.tell()
        # Optimized tables change the size only.
        np.testing.assert_array_equal(
            BASELINES[name].decode(BASELINES[name].encode(X, 50)), np.asarray(Image.open(plain))
        )
    # Colors are decorrelated first (mct), which a marker segment of the codestream says (ISO 15444-1, A.6.1).
    codestream = BASELINES["jpeg2000"].encode(X, 1.0)
    style = codestream.index(b"\xff\x52")
    assert codestream[style + 8] == 1
    assert codestream[style + 13] == 0  # the 9/7 wavelet
    # The 9/7 wavelet at a given rate: the file has at most that many bits, and nearly as many.
    size = 8 * len(BASELINES["jpeg2000"].encode(X, 1.0)) / X[..., 0].size
    assert 0.9 < size < 1.1


def test_settings_survive_the_table():
    """Settings have at most six digits; with more, the cache would not find them again."""
    for baseline in BASELINES.values():
        for setting in (*baseline.settings, *baseline.scale):
            assert from_csv(to_csv([Point("a", baseline.name, setting, 1, 1)]))[0].setting == setting


def test_grayscale_files_come_back_as_rgb():
    gray = np.repeat(X[..., :1], 3, axis=2)
    for baseline in BASELINES.values():
        if baseline.available:
            assert baseline.decode(baseline.encode(gray, baseline.settings[-1])).shape == gray.shape


@pytest.mark.parametrize("name", [name for name in BASELINES if BASELINES[name].scale and name != "jxl"])
def test_matched_files_enclose_the_bytes(name):
    """All codecs enclose the bytes; for JPEG, which is fast, all settings are compared."""
    baseline = BASELINES[name]
    if not baseline.available:
        pytest.skip(f"Pillow cannot write {baseline.title} here")
    limits = [len(baseline.encode(X, baseline.settings[i])) + 1 for i in (1, len(baseline.settings) // 2)]
    settings = baseline.matched(X, limits)
    assert settings == sorted(set(settings))
    assert set(settings) <= set(baseline.scale)
    sizes = [len(baseline.encode(X, setting)) for setting in settings]
    for limit in limits:
        below, above = (max(s for s in sizes if s <= limit), min(s for s in sizes if s > limit))
        assert 0.9 * limit < below <= limit < above < 1.1 * limit
    if name == "jpeg":
        every = {q: len(baseline.encode(X, q)) for q in range(1, 96)}
        for limit in limits:
            largest = max(size for size in every.values() if size <= limit)
            assert largest in sizes


def test_bytes_beyond_all_settings_match_the_nearest():
    jpeg = BASELINES["jpeg"]
    assert jpeg.matched(X, [1]) == [1]
    assert jpeg.matched(X, [10**9]) == [95]
    assert BASELINES["png"].matched(X, [1000]) == []
