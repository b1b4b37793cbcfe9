"""Damaged image files of nine formats: an image or an ImageError, and what a second decoder sees too."""

import io
import random
import struct
from collections import Counter

import imagecodecs
import numpy as np
import pytest
import tifffile
from pictures import smooth
from PIL import Image

from rnncodec.files.images import FORMATS, ImageError, load_image

Image.init()  # fills Image.SAVE

PIXELS = np.rint(255 * smooth(16, 20)).astype(np.uint8)
MAX_PIXELS = 10**6


def whole(format: str) -> list[bytes]:
    """Small files of a format, without metadata."""
    if format == "PPM":
        return [b"P6 20 16 255\n" + PIXELS.tobytes(), b"P5\n20 16\n255\n" + PIXELS[..., 0].tobytes()]
    color, gray = Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])
    options = {"WEBP": [{"lossless": True}, {}], "TIFF": [{}, {"compression": "tiff_lzw"}], "JPEG": [{"quality": 90}]}
    files = []
    for image in (color, gray):
        for option in options.get(format, [{}]):
            image.save(file := io.BytesIO(), format, **option)
            files.append(file.getvalue())
    return files


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file with some other bytes, cut, or with a piece doubled or left out."""
    result = bytearray(data)
    kind = rng.randrange(8)
    start = rng.randrange(len(result))
    end = min(len(result), start + rng.randrange(1, 40))
    if kind == 0:
        del result[start:]
    elif kind == 1:
        del result[start:end]
    elif kind == 2:
        result[start:start] = result[start:end]
    else:
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(min(len(result), rng.choice([64, 10**6])))
            result[place] = rng.choice([rng.randrange(256), result[place] ^ 1 << rng.randrange(8), 0, 255])
    return bytes(result)


def second(format: str, data: bytes) -> np.ndarray | None:
    """What an independent decoder makes of a file, None if it refuses."""
    decoders = {
        "PNG": imagecodecs.png_decode,
        "JPEG": imagecodecs.jpeg8_decode,
        "WEBP": imagecodecs.webp_decode,
        "AVIF": avif_decode,
        "TIFF": tiff_decode,
        "BMP": imagecodecs.bmp_decode,
        "GIF": gif_decode,
        "JPEG2000": jpeg2k_decode,
        "PPM": ppm_decode,
    }
    try:
        pixels = decoders[format](data)
    except Exception:  # of any type
        return None
    return np.atleast_3d(pixels) if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 else None


def avif_decode(data: bytes) -> np.ndarray | None:
    """Only sRGB: the other decoder does not convert colors."""
    return imagecodecs.avif_decode(data) if b"nclx\0\1\0\x0d" in data else None


def gif_decode(data: bytes) -> np.ndarray | None:
    """Only where the frame covers the screen: what lies beside it has no color that all decoders agree on."""
    pixels = imagecodecs.gif_decode(data) if data[6:10] == struct.pack("<HH", 20, 16) else None
    return pixels if pixels is not None and pixels.shape[:2] == PIXELS.shape[:2] else None


def jpeg2k_decode(data: bytes) -> np.ndarray | None:
    """Only samples of 8 bits: the other decoder gives fewer bits as they are stored."""
    return imagecodecs.jpeg2k_decode(data) if data[data.find(b"\xff\x4f\xff\x51") + 42] == 7 else None


def tiff_decode(data: bytes) -> np.ndarray | None:
    """The first page, of gray or RGB; tifffile gives samples as they are stored."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0].aspage()
        kind = page.photometric
        if not all(page.databytecounts):  # libtiff then guesses, tifffile reads zeros
            return None
        if kind == tifffile.PHOTOMETRIC.MINISWHITE:
            return 255 - page.asarray()
        return page.asarray() if kind in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB) else None


def ppm_decode(data: bytes) -> np.ndarray | None:
    """Netpbm's binary formats of 8 bits, by their definition."""
    fields = data.split(None, 3)
    if len(fields) < 4 or fields[0] not in (b"P5", b"P6") or b"#" in data[:16]:
        return None
    width, height, rest = int(fields[1]), int(fields[2]), fields[3]
    top = rest[: len(rest) - len(rest.lstrip(b"0123456789"))]
    channels = 1 if fields[0] == b"P5" else 3
    samples = np.frombuffer(rest[len(top) + 1 :], np.uint8)[: width * height * channels]
    scaled = np.rint(samples.reshape(height, width, channels) * 255.0 / int(top))
    return scaled.clip(0, 255).astype(np.uint8) if 0 < int(top) < 256 else None


def fuzz(count: int, seed: int) -> Counter:
    """Reads damaged files and counts how it went; what is not as it must be fails."""
    rng, said = random.Random(seed), Counter()
    files = {format: whole(format) for format in FORMATS if format in Image.SAVE or format == "PPM"}
    for number in range(count):
        format = list(files)[number % len(files)]
        data = damaged(rng.choice(files[format]), rng)
        try:
            found = load_image(io.BytesIO(data), MAX_PIXELS)
        except ImageError as error:
            said["lines"] += len(str(error).splitlines())
            said["refused"] += 1
            continue
        assert found.dtype == np.uint8
        assert found.ndim == 3
        other = second(format, data)
        if other is None or other.shape[:2] != found.shape[:2] or other.shape[2] not in (1, 3):
            said["unknown " + format] += 1
            continue
        assert np.abs(found.astype(int) - other).max() <= 1, f"{format}, file {number} of seed {seed}"
        said["alike " + format] += 1
    return said


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files(count):
    """Most formats notice damage by themselves; where one does not, both decoders see the same."""
    said = fuzz(count, seed=8)
    assert said["refused"] > count / 3
    assert said["lines"] == said["refused"]
    for format in FORMATS:
        if format in Image.SAVE:
            assert said["alike " + format] > count / 1000


def test_whole_files():
    """The comparison sees differences: whole files are alike, others are not."""
    for format in FORMATS:
        if format in Image.SAVE or format == "PPM":
            for data in whole(format):
                other = second(format, data)
                assert other is not None
                found = load_image(io.BytesIO(data)).astype(int)
                assert np.abs(found - other).max() <= 1
                assert np.abs(found - other[:, ::-1]).max() > 1
