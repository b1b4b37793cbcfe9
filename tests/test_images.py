"""Tests of reading and writing images: pixels computed by hand, and faulty files."""

import io
import os
import stat
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from rnncodec.files.images import (
    ImageError,
    ImageWarning,
    atomic_write,
    find_images,
    load_image,
    read_photograph,
    save_image,
    to_rgb,
)

Image.init()  # fills Image.SAVE

LOSSLESS = ["png", "webp", "tif", "bmp", "ppm", "jp2"]
SUFFIXES = [*LOSSLESS, "jpg", *(["avif"] if features.check("avif") else [])]


def photo(height=40, width=50, seed=0) -> np.ndarray:
    """A smooth picture with a little noise."""
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] + [0, 20, 40]
    return np.clip(ramp + np.random.default_rng(seed).integers(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)


def file_of(image: Image.Image, format: str = "PNG", **options) -> io.BytesIO:
    image.save(buffer := io.BytesIO(), format, **options)
    buffer.seek(0)
    return buffer


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG file, byte by byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + data)


def tiff(width: int, bits: int, photometric: int, strip: bytes, sample_format: int = 1) -> io.BytesIO:
    """A little-endian TIFF of one row of gray, byte by byte."""
    tags = [
        (256, 4, width),
        (257, 4, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, 1),
        (279, 4, len(strip)),
        (339, 3, sample_format),
    ]
    strip += b"\0" * (len(strip) % 2)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    return io.BytesIO(b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + bytes(4))


class TestModes:
    def test_rgb(self):
        rows = bytes([0, 1, 2, 3, 4, 5, 6])  # filter 0, two pixels
        np.testing.assert_array_equal(load_image(png(2, 1, 8, 2, rows)), [[[1, 2, 3], [4, 5, 6]]])

    def test_gray(self):
        np.testing.assert_array_equal(load_image(png(2, 1, 8, 0, bytes([0, 7, 200]))), [[[7] * 3, [200] * 3]])

    def test_one_bit(self):
        loaded = load_image(png(4, 1, 1, 0, bytes([0, 0b10100000])))
        np.testing.assert_array_equal(loaded[0, :, 1], [255, 0, 255, 0])

    def test_palette(self):
        palette = (b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
        np.testing.assert_array_equal(
            load_image(png(2, 1, 8, 3, bytes([0, 1, 0]), palette)), [[[40, 50, 60], [10, 20, 30]]]
        )

    def test_16_bit_gray_is_rounded(self):
        values = [0, 128, 129, 257, 32768, 65406, 65407, 65535]  # v / 257: 0, .498, .502, 1, 127.502, 254.498, 254.502
        loaded = load_image(png(8, 1, 16, 0, b"\0" + struct.pack(">8H", *values)))
        np.testing.assert_array_equal(loaded[0, :, 0], [0, 0, 1, 1, 128, 254, 255, 255])
        assert (loaded == loaded[..., :1]).all()

    def test_16_bit_rgb(self):
        loaded = load_image(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0, 0x8000, 0xFFFF)))
        np.testing.assert_array_equal(loaded, [[[0, 128, 255]]])

    def test_16_bit_gray_with_transparent_value(self):
        file = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 1000, 25700), (b"tRNS", struct.pack(">H", 1000)))
        with pytest.warns(ImageWarning, match="transparency is replaced by white"):
            loaded = load_image(file)
        np.testing.assert_array_equal(loaded[0, :, 0], [255, 100])

    @pytest.mark.parametrize("maximum", [255, 65535])
    def test_pgm(self, maximum):
        values = np.array([0, maximum // 5, maximum]).astype(">u2" if maximum > 255 else "u1")
        loaded = load_image(io.BytesIO(b"P5 3 1 %d\n" % maximum + values.tobytes()))
        np.testing.assert_array_equal(loaded[0, :, 2], [0, 51, 255])

    def test_tiff_16_bit(self):
        strip = struct.pack("<3H", 0, 25700, 65535)
        np.testing.assert_array_equal(load_image(tiff(3, 16, 1, strip))[0, :, 0], [0, 100, 255])
        np.testing.assert_array_equal(load_image(tiff(3, 16, 0, strip))[0, :, 0], [255, 155, 0])  # white is zero

    def test_tiff_12_bit(self):
        strip = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00])  # 0, 4095, 2048, 0
        np.testing.assert_array_equal(load_image(tiff(4, 12, 1, strip))[0, :, 0], [0, 255, 128, 0])

    def test_integers_beyond_16_bits(self):
        with pytest.raises(ImageError, match="beyond 16 bits"):
            load_image(tiff(2, 32, 1, struct.pack("<2i", 0, 65536), sample_format=2))
        with pytest.raises(ImageError, match="beyond 16 bits"):
            load_image(tiff(2, 16, 1, struct.pack("<2h", -1, 5), sample_format=2))

    def test_signed_bytes(self):
        with pytest.raises(ImageError, match="with a sign"):
            load_image(tiff(2, 8, 1, bytes([0, 255]), sample_format=2))

    @pytest.mark.parametrize("scale", [1, 256, 257])
    def test_tiff_palette(self, scale):
        """Of 16 bits, or of 8 as old programs wrote it."""
        colors = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint16)
        tifffile.imwrite(file := io.BytesIO(), np.arange(256, dtype=np.uint8)[None], photometric="palette",
                         colormap=colors.T * np.uint16(scale))  # fmt: skip
        np.testing.assert_array_equal(load_image(file)[0], colors)

    def test_float(self):
        with pytest.raises(ImageError, match="floating-point"):
            load_image(tiff(2, 32, 1, struct.pack("<2f", 0, 1), sample_format=3))

    def test_cmyk(self):
        image = Image.new("CMYK", (1, 1), (255, 0, 0, 0))
        np.testing.assert_array_equal(load_image(file_of(image, "TIFF")), [[[0, 255, 255]]])
        assert np.abs(load_image(file_of(image, "JPEG", quality=100)).astype(int) - [0, 255, 255]).max() <= 2

    def test_ycbcr(self):  # BT.601, full range: R = Y + 1.402 (Cr - 128), G = Y - .714 (Cr - 128), B = Y
        np.testing.assert_array_equal(to_rgb(Image.new("YCbCr", (1, 1), (100, 128, 178))), [[[170, 64, 100]]])

    def test_lab(self):
        image = file_of(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF")  # L = 100, a = b = 0: white
        assert load_image(image).min() >= 254

    def test_hsv(self):
        np.testing.assert_array_equal(to_rgb(Image.new("HSV", (1, 1), (0, 255, 200))), [[[200, 0, 0]]])


@pytest.mark.filterwarnings("ignore:transparency is replaced")
class TestTransparency:
    """c on white with alpha a gives c a / 255 + 255 - a, rounded."""

    def test_rgba(self):
        rows = bytes([0, 0, 100, 200, 255, 0, 100, 200, 128, 9, 9, 9, 0])
        expected = [[[0, 100, 200], [127, 177, 227], [255, 255, 255]]]  # 177.2, 227.4
        np.testing.assert_array_equal(load_image(png(3, 1, 8, 6, rows)), expected)

    def test_gray_alpha(self):
        np.testing.assert_array_equal(load_image(png(1, 1, 8, 4, bytes([0, 100, 128]))), [[[177] * 3]])

    def test_16_bit_rgba(self):
        loaded = load_image(png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 0, 0, 0xFFFF, 0x8080)))
        np.testing.assert_array_equal(loaded, [[[127, 127, 255]]])

    def test_palette(self):
        chunks = (b"PLTE", bytes([0, 0, 0, 0, 100, 200, 1, 2, 3])), (b"tRNS", bytes([0, 128]))
        loaded = load_image(png(3, 1, 8, 3, bytes([0, 0, 1, 2]), *chunks))
        np.testing.assert_array_equal(loaded, [[[255] * 3, [127, 177, 227], [1, 2, 3]]])

    def test_transparent_color(self):
        rows, chunk = bytes([0, 1, 2, 3, 4, 5, 6]), (b"tRNS", struct.pack(">3H", 4, 5, 6))
        np.testing.assert_array_equal(load_image(png(2, 1, 8, 2, rows, chunk)), [[[1, 2, 3], [255] * 3]])

    def test_transparent_gray(self):
        chunk = (b"tRNS", struct.pack(">H", 7))
        np.testing.assert_array_equal(load_image(png(2, 1, 8, 0, bytes([0, 7, 8]), chunk))[0, :, 0], [255, 8])

    def test_palette_alpha_and_premultiplied(self):
        image = Image.new("PA", (1, 1))
        image.putpalette([0, 100, 200])
        image.putpixel((0, 0), (0, 128))
        np.testing.assert_array_equal(to_rgb(image), [[[127, 177, 227]]])
        premultiplied = Image.new("RGBA", (1, 1), (0, 100, 200, 128)).convert("RGBa")
        assert np.abs(to_rgb(premultiplied).astype(int) - [127, 177, 227]).max() <= 1

    def test_gif(self):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        np.testing.assert_array_equal(load_image(file_of(image, "GIF", transparency=0)), [[[255] * 3, [40, 50, 60]]])

    def test_gif_is_transparent_where_its_picture_is_not(self):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        data = bytearray(file_of(image, "GIF").getvalue())
        data[6:10] = struct.pack("<2H", 4, 3)  # the screen
        place = data.index(b"\x2c\0\0\0\0\2\0\1\0")
        data[place + 1 : place + 5] = struct.pack("<2H", 1, 2)  # left and top of the picture
        expected = np.full((3, 4, 3), 255)
        expected[2, 1:3] = [10, 20, 30], [40, 50, 60]
        with pytest.warns(ImageWarning, match="transparency is replaced by white"):
            np.testing.assert_array_equal(load_image(io.BytesIO(data)), expected)


class TestMetadata:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", *(["AVIF"] if features.check("avif") else [])])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation(self, orientation, format):
        """The first stored row and column are at these sides of the upright picture, by the EXIF standard."""
        row, column = {
            1: ("top", "left"),
            2: ("top", "right"),
            3: ("bottom", "right"),
            4: ("bottom", "left"),
            5: ("left", "top"),
            6: ("right", "top"),
            7: ("right", "bottom"),
            8: ("left", "bottom"),
        }[orientation]
        stored = np.zeros((16, 32, 3), np.uint8)
        stored[0, :, 0] = 255
        stored[:, 0, 2] = 255
        exif = Image.Exif()
        exif[274] = orientation
        options = {
            "JPEG": {"quality": 100, "subsampling": 0},
            "WEBP": {"lossless": True},
            "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        }.get(format, {})
        file = file_of(Image.fromarray(stored), format, exif=exif, **options)
        upright, _, _, turned = read_photograph(file)
        assert turned == (orientation != 1)
        assert upright.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
        sides = {"top": upright[0], "bottom": upright[-1], "left": upright[:, 0], "right": upright[:, -1]}
        assert [side for side in sides if sides[side][..., 0].min() > 200] == [row]
        assert [side for side in sides if sides[side][..., 2].min() > 200] == [column]

    @pytest.mark.parametrize(
        "exif",
        [
            b"",
            b"garbage",
            b"Exif\0\0",
            b"Exif\0\0II*\0\xff\xff\xff\xff",
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # orientation 99
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",  # a text
            b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\0\0\0\x01",
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\x1a\0\0\0\0\0\0\0\x01\0\0\0\0",  # 1 / 0
        ],
    )
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
    def test_corrupt_exif(self, exif, format):
        options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
        plain = load_image(file_of(Image.fromarray(photo()), format, **options))
        np.testing.assert_array_equal(
            load_image(file_of(Image.fromarray(photo()), format, exif=exif, **options)), plain
        )

    def test_corrupt_exif_in_tiff(self):
        data = bytearray(tiff(2, 8, 1, bytes([5, 250])).getvalue())
        data[-16:-4] = struct.pack("<HHII", 34665, 4, 1, 2**31)  # an EXIF directory far beyond the end
        np.testing.assert_array_equal(load_image(io.BytesIO(bytes(data)))[0, :, 0], [5, 250])

    def test_animation_gives_the_first_frame(self):
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
        for format, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("TIFF", {})):
            file = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
            with pytest.warns(ImageWarning, match="only the first of several images is kept"):
                loaded = load_image(file)
            np.testing.assert_array_equal(loaded, np.broadcast_to([255, 0, 0], (4, 4, 3)))

    def test_broken_profile_is_named(self):
        file = file_of(Image.fromarray(photo()), icc_profile=b"not a profile")
        with pytest.warns(ImageWarning, match="color profile ignored: it is corrupt"):
            np.testing.assert_array_equal(load_image(file), photo())


class TestLoadErrors:
    def error(self, source, **options) -> str:
        with pytest.raises(ImageError) as error:
            load_image(source, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_missing(self, tmp_path):
        assert self.error(tmp_path / "no.png") == f"{tmp_path / 'no.png'}: No such file or directory"
        assert "directory" in self.error(tmp_path)

    @pytest.mark.parametrize(
        "data", [b"", b"x", b"hello, world" * 99, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"]
    )
    def test_not_an_image(self, tmp_path, data):
        (path := tmp_path / "a.png").write_bytes(data)
        assert self.error(path).startswith(f"{path}: ")

    @pytest.mark.parametrize("suffix", [*SUFFIXES, "gif"])
    def test_truncated(self, tmp_path, suffix):
        data = file_of(Image.fromarray(photo()), Image.registered_extensions()[f".{suffix}"]).getvalue()
        for length in (5, 20, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
            (cut := tmp_path / f"cut.{suffix}").write_bytes(data[:length])
            assert self.error(cut).startswith(f"{cut}: ")

    @pytest.mark.parametrize("suffix", [*SUFFIXES, "gif"])
    def test_limit(self, suffix):
        file = file_of(Image.new("RGB", (20, 10)), Image.registered_extensions()[f".{suffix}"])
        assert load_image(file, max_pixels=200).shape == (10, 20, 3)
        assert "20x10 pixels are above the limit of 199; raise max_pixels" in self.error(file, max_pixels=199)

    @pytest.mark.parametrize("side", [20_000, 2**31 - 1])
    def test_bomb_is_refused_before_it_is_decoded(self, side):
        bomb = png(side, side, 8, 2, bytes(3 * 20_000))
        tracemalloc.start()
        try:
            assert "above the limit" in self.error(bomb)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1"])
    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.filterwarnings("ignore:transparency is replaced")
    def test_larger_than_pillow_allows(self, monkeypatch, suffix, mode):
        """Only max_pixels counts; Pillow's limit, a global variable, is neither used nor changed."""
        format = Image.registered_extensions()[f".{suffix}"]
        image = Image.fromarray(photo()).convert("RGB" if mode == "RGBA" and suffix == "jpg" else mode)
        if mode == "1" and suffix == "jp2":
            pytest.skip("the format has no such pixels")
        file = file_of(image, format)
        expected = load_image(file)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        np.testing.assert_array_equal(load_image(file), expected)
        assert Image.MAX_IMAGE_PIXELS == 100

    @pytest.mark.parametrize("bits", [8, 16])
    @pytest.mark.parametrize("layout", ["contig", "separate"])
    @pytest.mark.parametrize("compression", [None, "zlib"])
    def test_tiff_larger_than_pillow_allows(self, monkeypatch, bits, layout, compression):
        samples = np.rint((2**bits - 1) / 255 * photo()).astype(f"uint{bits}")
        stored = samples if layout == "contig" else samples.transpose(2, 0, 1)
        tifffile.imwrite(file := io.BytesIO(), stored, photometric="rgb", planarconfig=layout, compression=compression)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        np.testing.assert_array_equal(load_image(file), photo())

    @pytest.mark.parametrize(
        ("chunk", "width", "height"),  # the fields of RFC 9649, sections 2.5, 2.6 and 2.7
        [
            (b"VP8 " + bytes(7) + b"\x9d\x01\x2a" + struct.pack("<HH", 16383 | 1 << 14, 16382), 16383, 16382),
            (b"VP8L" + bytes(4) + b"\x2f" + struct.pack("<I", 16382 | 16381 << 14 | 1 << 28), 16383, 16382),
            (b"VP8X" + bytes(8) + (2**24 - 1).to_bytes(3, "little") + bytes([99, 0, 0]), 2**24, 100),
        ],
    )
    def test_webp_is_refused_by_its_header(self, chunk, width, height):
        header = b"RIFF\0\0\0\0WEBP" + chunk
        message = f"{width}x{height} pixels are above the limit of {width * height - 1};"
        assert message in self.error(io.BytesIO(header), max_pixels=width * height - 1)
        assert "above the limit" not in self.error(io.BytesIO(header), max_pixels=width * height)

    @pytest.mark.parametrize("format", ["WEBP", *(["AVIF"] if features.check("avif") else [])])
    def test_what_is_read_as_a_whole_is_bounded(self, format):
        file = file_of(Image.new("RGB", (10, 10)), format)
        file.seek(8 * 100 + 2**24, io.SEEK_SET)  # the largest size that is allowed for 100 pixels, and a byte
        file.write(b"\0")
        with pytest.raises(ImageError, match="more than 16778016 bytes"):
            load_image(file, max_pixels=100)

    def test_threads_leave_the_warning_filters_alone(self):
        before = list(warnings.filters)
        data = file_of(Image.fromarray(photo()), "JPEG", exif=b"garbage").getvalue()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: load_image(io.BytesIO(data)), range(64)))
        assert list(warnings.filters) == before


class TestStreams:
    def test_file_stays_open_and_is_read_from_its_start(self):
        file = file_of(Image.fromarray(photo()))
        file.seek(0, os.SEEK_END)
        np.testing.assert_array_equal(load_image(file), photo())
        assert not file.closed

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_pipes(self, tmp_path, suffix):
        save_image(photo(), path := tmp_path / f"a.{suffix}")
        code = (
            "import sys; from rnncodec.files.images import load_image, save_image\n"
            "save_image(load_image(sys.stdin.buffer), sys.stdout.buffer)"
        )
        done = subprocess.run([sys.executable, "-c", code], input=path.read_bytes(), capture_output=True, check=True)
        np.testing.assert_array_equal(load_image(io.BytesIO(done.stdout)), photo())

    @pytest.mark.parametrize("start", [b"", b"\x89PNG\r\n\x1a\n", b"II*\0"])
    def test_endless_pipe(self, start):
        class Endless(io.RawIOBase):
            position = 0

            def readable(self):
                return True

            def readinto(self, buffer):
                chunk = start[self.position : self.position + len(buffer)].ljust(len(buffer), b"\0")
                buffer[:] = chunk
                self.position += len(buffer)
                return len(buffer)

        with pytest.raises(ImageError):
            load_image(io.BufferedReader(Endless()), max_pixels=1000)


class TestSave:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_round_trip(self, tmp_path, suffix):
        save_image(photo(), path := tmp_path / f"a.{suffix.upper()}")
        difference = np.abs(load_image(path).astype(int) - photo())
        assert difference.mean() < 2
        if suffix in LOSSLESS:
            assert difference.max() == 0
        with Image.open(path) as image:
            assert image.format == Image.registered_extensions()[f".{suffix}"]

    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_any_size(self, height, width, seed):
        array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        save_image(array, file := io.BytesIO())
        assert file.getvalue().startswith(b"\x89PNG")
        np.testing.assert_array_equal(load_image(file), array)

    def test_format_beats_suffix(self, tmp_path):
        for name in ("jpg", ".jpg", "JPEG"):
            save_image(photo(), path := tmp_path / "a.png", name)
            assert path.read_bytes().startswith(b"\xff\xd8\xff")

    @pytest.mark.parametrize(("name", "format"), [("a", None), ("a.xyz", None), ("a.eps", None), ("a.png", "nonsense")])
    def test_unknown_format(self, tmp_path, name, format):
        with pytest.raises(ImageError, match="cannot write the format"):
            save_image(photo(), tmp_path / name, format)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("name", "format"), [("a.gif", None), ("a.PGM", None), ("a.pbm", None), ("a.png", "gif")])
    def test_formats_without_all_colors(self, tmp_path, name, format):
        with pytest.raises(ImageError, match="files cannot hold all colors"):
            save_image(photo(), tmp_path / name, format)
        assert list(tmp_path.iterdir()) == []

    def test_missing_encoder(self, tmp_path, monkeypatch):
        monkeypatch.delitem(Image.SAVE, "WEBP")
        with pytest.raises(ImageError, match="cannot write the format"):
            save_image(photo(), tmp_path / "a.webp")

    def test_failure_keeps_the_old_file(self, tmp_path):
        (path := tmp_path / "a.webp").write_bytes(b"old")
        with pytest.raises(ImageError, match=r"a\.webp"):
            save_image(np.zeros((1, 16384, 3), np.uint8), path)  # WebP ends at 16383
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize(
        "array",
        [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
    )
    def test_not_an_image(self, tmp_path, array):
        with pytest.raises(ImageError, match="uint8"):
            save_image(array, tmp_path / "a.png")


class TestAtomicWrite:
    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
    def test_permissions_of_a_new_file(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            atomic_write(path := tmp_path / "a", b"new")
            (other := tmp_path / "b").write_bytes(b"plain")
        finally:
            os.umask(before)
        assert path.read_bytes() == b"new"
        assert path.stat().st_mode == other.stat().st_mode

    def test_permissions_of_an_old_file(self, tmp_path):
        (path := tmp_path / "a").write_bytes(b"old")
        path.chmod(0o640)
        atomic_write(path, b"new")
        assert path.read_bytes() == b"new"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_link_stays(self, tmp_path):
        (folder := tmp_path / "folder").mkdir()
        (target := folder / "target").write_bytes(b"old")
        (link := tmp_path / "link").symlink_to(target)
        atomic_write(link, b"new")
        assert link.is_symlink()
        assert target.read_bytes() == b"new"
        (dangling := tmp_path / "dangling").symlink_to(folder / "made")
        atomic_write(dangling, b"new")
        assert (folder / "made").read_bytes() == b"new"

    def test_refuses_a_folder(self, tmp_path):
        with pytest.raises(IsADirectoryError) as error:
            atomic_write(tmp_path, b"new")
        assert error.value.filename == str(tmp_path)

    def test_missing_folder_is_named(self, tmp_path):
        path = tmp_path / "no" / "a"
        with pytest.raises(FileNotFoundError) as error:
            atomic_write(path, b"new")
        assert error.value.filename == str(path)

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    @pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_failure_keeps_the_old_file(self, tmp_path, monkeypatch, step, failure):
        def fail(*_):
            raise failure

        (path := tmp_path / "a").write_bytes(b"old")
        monkeypatch.setattr(os, step, fail)
        with pytest.raises(type(failure)):
            atomic_write(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_readers_see_one_whole_file(self, tmp_path):
        (path := tmp_path / "a").write_bytes(b"old")
        with open(path, "rb") as reader:
            atomic_write(path, b"new")
            assert reader.read() == b"old"

    @pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions and pipes")
    def test_read_only_file_is_refused(self, tmp_path, monkeypatch):
        (path := tmp_path / "a").write_bytes(b"old")
        monkeypatch.setattr(os, "access", lambda *_: False)  # as os.access answers anyone but root for mode 0444
        with pytest.raises(PermissionError):
            atomic_write(path, b"new")
        assert path.read_bytes() == b"old"

    @pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions and pipes")
    def test_devices_and_pipes_are_written_directly(self, tmp_path):
        atomic_write("/dev/null", b"new")
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
        os.mkfifo(pipe := tmp_path / "pipe")
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(pipe.read_bytes)
            atomic_write(pipe, b"new")
            assert received.result(10) == b"new"
        code = "from rnncodec.files.images import atomic_write; atomic_write('/dev/stdout', b'new')"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"new"
        with open(tmp_path / "out", "wb") as file:
            subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
            assert os.stat(tmp_path / "out").st_ino == os.fstat(file.fileno()).st_ino
        assert (tmp_path / "out").read_bytes() == b"new"


class TestFindImages:
    def test_folders(self, tmp_path):
        for name in (
            "b.PNG",
            "a.jpeg",
            "sub/c.Tiff",
            "sub/deep/d.webp",
            "notes.txt",
            ".e.png",
            ".hidden/f.png",
            "g.rnc",
        ):
            (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "broken.png").symlink_to(tmp_path / "nothing")
        (tmp_path / "sub" / "loop").symlink_to(tmp_path)
        (tmp_path / "link.gif").symlink_to(tmp_path / "b.PNG")
        expected = ["a.jpeg", "b.PNG", "link.gif", "sub/c.Tiff", "sub/deep/d.webp"]
        assert find_images([tmp_path]) == [tmp_path / name for name in expected]

    def test_files_are_taken_as_they_are(self, tmp_path):
        for name in ("z", "a.png"):
            (tmp_path / name).touch()
        given = [tmp_path / "z", tmp_path / "a.png", tmp_path / "z"]
        assert find_images(given) == given
        assert find_images(map(str, given)) == given
        assert find_images([]) == []

    def test_linked_folder(self, tmp_path):
        (real := tmp_path / "real").mkdir()
        (real / "a.png").touch()
        (folder := tmp_path / "folder").mkdir()
        (folder / "link").symlink_to(real)
        assert find_images([folder]) == [folder / "link" / "a.png"]

    def test_missing(self, tmp_path):
        with pytest.raises(ImageError, match=r"no\.png: No such file"):
            find_images([Path(tmp_path, "no.png")])
