"""Tests of the plugin for Pillow, beside the codec and Pillow's own plugins."""

import copy
import io
import pickle

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from test_calibration import save_latent

import rnncodec
import rnncodec.pillow
from rnncodec.codec import Codec
from rnncodec.files import format
from rnncodec.files.images import load_image
from rnncodec.training.calibration import calibrate
from rnncodec.weights import load_weights, save_weights


@pytest.fixture(scope="module")
def codec(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "latent.safetensors"
    save_latent(photos, path)
    return Codec(load_weights(path))


def opened(path) -> rnncodec.pillow.RncImageFile:
    image = Image.open(path)
    assert isinstance(image, rnncodec.pillow.RncImageFile)
    return image


def forget(monkeypatch):
    monkeypatch.setattr(rnncodec.pillow, "_readers", {})
    monkeypatch.setattr(rnncodec.pillow, "_writers", [])


@pytest.fixture(autouse=True)
def used(codec, monkeypatch):
    forget(monkeypatch)
    rnncodec.pillow.use(codec)


@pytest.fixture(scope="module")
def x(photos):
    return load_image(photos / "coffee.png")[:90, :70]


@pytest.fixture
def path(x, tmp_path):
    Image.fromarray(x).save(tmp_path / "cup.rnc", iterations=3)
    return tmp_path / "cup.rnc"


def test_a_file_is_that_of_the_codec(codec, x, path):
    assert path.read_bytes() == codec.encode(x, 3)
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size, image.get_format_mimetype()) == (
            "RNC",
            "RGB",
            (70, 90),
            "image/x-rnc",
        )
        np.testing.assert_array_equal(np.asarray(image), np.asarray(codec.decode(path.read_bytes())))
        np.testing.assert_array_equal(np.asarray(image.crop((3, 4, 9, 9))), np.asarray(image)[4:9, 3:9])


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_pictures_are_turned_once(codec, x, tmp_path, orientation):
    """As the file says, or as the option says; what was turned before is taken as it is."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(x).save(tmp_path / "a.png", exif=exif)
    turns = {1: 0, 3: 2, 6: 3}[orientation]
    upright = codec.encode(np.ascontiguousarray(np.rot90(x, turns)), 1)

    def saved(image, **options):
        image.save(file := io.BytesIO(), "RNC", iterations=1, **options)
        return file.getvalue()

    with Image.open(tmp_path / "a.png") as stored:
        assert saved(stored) == codec.encode(stored, 1) == upright
        turned = stored.rotate(90 * turns, expand=True)
        assert turned.info["exif"]
        assert saved(turned) == codec.encode(turned, 1) == upright
        for option in (exif, exif.tobytes(), stored.info["exif"]):
            assert saved(Image.fromarray(x), exif=option) == upright
        assert saved(stored, exif=Image.Exif()) == upright


def test_xmp_may_be_text(x):
    packet = "<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    Image.fromarray(x).save(file := io.BytesIO(), "RNC", iterations=1, xmp=packet)
    assert Image.open(file).info["xmp"] == packet.encode()


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="an image of 0x5 pixels"):
        Image.new("RGB", (0, 5)).save(io.BytesIO(), "RNC")


def test_verifying_twice_is_refused(path):
    with opened(path) as image:
        image.verify()
        with pytest.raises(RuntimeError, match="directly after open"):
            image.verify()


def test_iterations_are_chosen_before_loading(codec, path):
    for count in (1, 2, 3, None):
        with opened(path) as image:
            assert image.iterations is None
            image.iterations = count
            np.testing.assert_array_equal(np.asarray(image), np.asarray(codec.decode(path.read_bytes(), count)))
            with pytest.raises(ValueError, match="before the pixels are loaded"):
                image.iterations = 1
    with opened(path) as image:
        image.iterations = 4
        with pytest.raises(ValueError, match="the file has 3 complete iterations, not 4"):
            image.load()


def test_opening_decodes_nothing(path, monkeypatch):
    monkeypatch.setattr(Codec, "decode", lambda *_, **__: pytest.fail("decoded"))
    with opened(path) as image:
        assert image.size == (70, 90)
        image.verify()
        assert image.header.iterations == 3


@pytest.mark.parametrize("options", [{"iterations": 2}, {"psnr": 14}, {"bpp": 1.2}, {"max_bytes": 500}, {}])
def test_options_are_those_of_encode(codec, x, options):
    file = io.BytesIO()
    Image.fromarray(x).save(file, "RNC", **options)
    assert file.getvalue() == codec.encode(x, **options)


def test_modes_are_those_of_the_codec(codec, x):
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        file, image = io.BytesIO(), Image.fromarray(x).convert(mode)
        image.save(file, "RNC", iterations=1)
        assert file.getvalue() == codec.encode(image, 1)


def test_metadata_are_kept_as_other_plugins_do(x, tmp_path):
    exif = Image.Exif()
    exif[0x010E], exif[274] = "a cup", 6
    packet = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    Image.fromarray(x).save(tmp_path / "cup.rnc", iterations=1, exif=exif, xmp=packet)
    Image.fromarray(x).save(tmp_path / "cup.webp", exif=exif, xmp=packet)
    with Image.open(tmp_path / "cup.rnc") as ours, Image.open(tmp_path / "cup.webp") as theirs:
        assert ours.getexif()[0x010E] == theirs.getexif()[0x010E] == "a cup"
        assert 274 not in ours.getexif()
        assert ours.info["xmp"] == theirs.info["xmp"] == packet
        ours.save(tmp_path / "again.rnc", iterations=1, exif=ours.info["exif"])
    with Image.open(tmp_path / "again.rnc") as again:
        assert again.getexif()[0x010E] == "a cup"
        assert again.info["xmp"] == packet
    Image.fromarray(x).save(tmp_path / "bare.rnc", iterations=1)
    with Image.open(tmp_path / "bare.rnc") as bare:
        assert not bare.info
    with pytest.warns(UserWarning, match="EXIF left out"):
        Image.fromarray(x).save(tmp_path / "broken.rnc", iterations=1, exif=b"Exif\0\0MM\0*\0\0")


class Pipe(io.RawIOBase):
    """A stream that cannot seek."""

    def __init__(self, data):
        self.file = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, target):
        return self.file.readinto(target)


def test_streams(codec, path):
    data = path.read_bytes()
    for stream in (io.BytesIO(data), io.BufferedReader(Pipe(data))):
        with Image.open(stream) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(codec.decode(data)))


def test_copies_and_pickles(codec, path):
    expected = np.asarray(codec.decode(path.read_bytes()))
    for make in (Image.Image.copy, copy.deepcopy, lambda image: pickle.loads(pickle.dumps(image))):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(make(image)), expected)


def test_what_is_no_file_is_not_identified(path):
    data = path.read_bytes()
    for wrong in (
        b"\x8fRNC",
        data[:30],
        data[: format.read_header(data).size],
        data[:40] + b"\0" + data[41:],
        data[1:],
    ):
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(wrong))


def test_cut_files_are_shown_as_far_as_they_go(codec, path):
    data = path.read_bytes()
    with Image.open(io.BytesIO(data[:-1])) as image:
        with pytest.warns(UserWarning, match="the file is cut: decoded 2 of 3 iterations"):
            shown = np.asarray(image)
        np.testing.assert_array_equal(shown, np.asarray(codec.decode(data, 2)))
    with Image.open(io.BytesIO(data[:-1])) as image, pytest.raises(OSError, match="the file is cut"):
        image.verify()
    with Image.open(io.BytesIO(data)) as image:
        image.verify()
        with pytest.raises(OSError, match="cannot load this image"):  # as with Pillow's own formats
            image.load()


def test_shipped_weights_read_and_write_without_a_word(x, monkeypatch):
    forget(monkeypatch)
    file, shipped = io.BytesIO(), rnncodec.load()
    Image.fromarray(x[:32, :32]).save(file, "RNC", iterations=1)
    assert file.getvalue() == shipped.encode(x[:32, :32], 1)
    forget(monkeypatch)
    with Image.open(file) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(shipped.decode(file.getvalue())))


def test_a_region_of_interest_may_be_an_image(photos, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_latent(photos, path)
    bare = Codec(load_weights(path))
    x = load_image(photos / "coffee.png")[:256, :384]
    save_weights(path, bare.network, "latent", {}, bare.context, calibrate(bare, [x]))
    allocating, mask = rnncodec.load(path), np.zeros((256, 384), np.uint8)
    mask[:, 192:] = 255
    monkeypatch.setattr(rnncodec.pillow, "_writers", [allocating])
    file = io.BytesIO()
    Image.fromarray(x).save(file, "RNC", max_bytes=900, roi=Image.fromarray(mask))
    assert file.getvalue() == allocating.encode(x, max_bytes=900, roi=mask)
    assert file.getvalue() != allocating.encode(x, max_bytes=900, tune="psnr")


def test_reading_does_not_change_who_writes(codec, x, monkeypatch):
    file, again = io.BytesIO(rnncodec.load().encode(x[:32, :32], 1)), io.BytesIO()
    with Image.open(file) as image:
        image.load()
    Image.fromarray(x).save(again, "RNC", iterations=1)
    assert again.getvalue() == codec.encode(x, 1)


def test_unknown_weights_are_named(x, path, monkeypatch):
    forget(monkeypatch)
    with (
        Image.open(path) as image,
        pytest.raises(ValueError, match=r"the file needs the weights latent .* known are: small"),
    ):
        image.load()
