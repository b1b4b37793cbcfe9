"""Tests of image files of every kind of samples, beside the samples that other libraries wrote into them."""

import io
import itertools
import struct
import tracemalloc
import warnings
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from pictures import chunk, png, smooth, srgb_of
from PIL import Image, ImageCms, ImageOps, features

from rnncodec.files.images import (
    ImageError,
    ImageWarning,
    find_images,
    find_unreadable,
    load_image,
    load_photograph,
    read_photograph,
    to_rgb,
)

pytestmark = pytest.mark.filterwarnings("ignore:transparency is replaced")
AVIF = pytest.mark.skipif(not features.check("avif"), reason="Pillow lacks AVIF")
COLOR = smooth()
ALPHA = COLOR[::-1, ::-1, :1]
# 40x24 pixels, stored with the orientation 6 by cjxl 0.7.0 with --lossless_jpeg=0 --distance=1.
TURNED_JXL = bytes.fromhex(
    "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c200000005f6a786c63ff0a058805128a4b0200128802001c015de5"
    "120000152aa38c1bbc9cebf9f24387c5b48deb0c6db56d010000003c807f258922e3d8249dc02149ac41b4f33c510101c060cc470080a700800a"
    "0280867362071a00a82401"
)


def quantized(samples, bits: int) -> np.ndarray:
    return np.rint(samples * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def check(file, expected, most: float = 1) -> None:
    """The pixels are those that were expected, from 0 to 1, of one or of three channels."""
    found = load_image(file if isinstance(file, io.BytesIO) else io.BytesIO(file))
    expected = 255 * np.broadcast_to(expected, (*expected.shape[:2], 3))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= most + 1e-9


class TestTiff:
    @pytest.mark.parametrize("alpha", [None, "unassalpha", "assocalpha"])
    @pytest.mark.parametrize("layout", ["contig", "separate"])
    @pytest.mark.parametrize("bits", [8, 16])
    def test_rgb(self, bits, layout, alpha):
        """Byte orders, strips and tiles, with and without compression and predictor."""
        top = 2**bits - 1
        color = COLOR * ALPHA if alpha == "assocalpha" else COLOR
        samples = quantized(color if alpha is None else np.concatenate([color, ALPHA], 2), bits)
        color, a = samples[..., :3] / top, samples[..., 3:] / top if alpha else 1
        expected = color * a + 1 - a if alpha == "unassalpha" else color + 1 - a
        stored = samples if layout == "contig" else np.moveaxis(samples, 2, 0)
        options: dict[str, Any] = {"photometric": "rgb", "planarconfig": layout, "rowsperstrip": 7}
        options["extrasamples"] = [alpha] if alpha else None
        for order, tile, packed in itertools.product(
            "<>", (None, (16, 16)), ((None, False), ("zlib", True), ("lzw", False))
        ):
            how = {**options, "byteorder": order, "tile": tile, "compression": packed[0], "predictor": packed[1]}
            if tile:
                del how["rowsperstrip"]
            tifffile.imwrite(file := io.BytesIO(), stored, **how)
            check(file, expected)

    @pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
    def test_gray(self, bits, photometric):
        samples = quantized(COLOR[..., 0], bits)
        expected = samples / (2**bits - 1)
        expected = (expected if photometric == "minisblack" else 1 - expected)[..., None]
        for order, tile, packed in itertools.product("<>", (None, (16, 16)), (None, "zlib", "packbits")):
            how: dict[str, Any] = {"byteorder": order, "tile": tile, "photometric": photometric}
            if bits in (1, 8, 16):
                how["compression"] = packed
            if bits not in (1, 8, 16):
                how["bitspersample"] = bits
            tifffile.imwrite(file := io.BytesIO(), samples.astype(bool) if bits == 1 else samples, **how)
            if (bits == 12 and (order, photometric) != ("<", "minisblack")) or (
                bits == 16 and (order, photometric) == (">", "miniswhite")
            ):
                with pytest.raises(ImageError, match="TIFF file cannot be read: unknown pixel mode"):
                    load_image(file)
            else:
                check(file, expected)

    @pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha", "unspecified"])
    def test_gray_with_alpha(self, alpha):
        color = COLOR[..., :1] * ALPHA if alpha == "assocalpha" else COLOR[..., :1]
        samples = quantized(np.concatenate([color, ALPHA], 2), 8)
        c, a = samples[..., :1] / 255, samples[..., 1:] / 255
        expected = {"unassalpha": c * a + 1 - a, "assocalpha": c + 1 - a, "unspecified": c}[alpha]
        tifffile.imwrite(
            file := io.BytesIO(), samples, photometric="minisblack", extrasamples=[alpha], planarconfig="contig"
        )
        check(file, expected)

    @pytest.mark.parametrize("bits", [8, 16])
    @pytest.mark.parametrize("layout", ["contig", "separate"])
    def test_cmyk(self, bits, layout):
        """Plain inks, without a profile: light is what neither the ink nor black takes."""
        samples = quantized(np.concatenate([COLOR, ALPHA / 3], 2), bits)
        inks = samples / (2**bits - 1)
        stored = samples if layout == "contig" else np.moveaxis(samples, 2, 0)
        for order in "<>":
            how: dict[str, Any] = {"photometric": "separated", "planarconfig": layout, "byteorder": order}
            tifffile.imwrite(file := io.BytesIO(), stored, **how)
            check(file, (1 - inks[..., :3]) * (1 - inks[..., 3:]), 1.5)  # Pillow rounds twice

    def test_profile_of_another_kind_of_color(self):
        """Inks with a profile of RGB are read as without it, in 8 and in 16 bits."""
        icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for bits in (8, 16):
            samples = quantized(np.concatenate([COLOR, ALPHA / 3], 2), bits)
            inks = samples / (2**bits - 1)
            tifffile.imwrite(file := io.BytesIO(), samples, photometric="separated", iccprofile=icc)
            with pytest.warns(ImageWarning, match="it is for RGB, but the pixels are CMYK"):
                check(file, (1 - inks[..., :3]) * (1 - inks[..., 3:]), 1.5)

    def test_images_of_pillow(self):
        """Planes of 16 bits and associated alpha are right too where the caller has opened the file, and stay so."""
        samples = quantized(COLOR, 16)
        how: dict[str, Any] = {"photometric": "rgb", "planarconfig": "separate"}
        tifffile.imwrite(file := io.BytesIO(), np.moveaxis(samples, 2, 0), **how)
        assert np.abs(to_rgb(Image.open(file)) - 255 * COLOR).max() <= 1.5  # Pillow gives upper bytes
        samples = quantized(np.concatenate([COLOR * ALPHA, ALPHA], 2), 8)
        tifffile.imwrite(file := io.BytesIO(), samples, photometric="rgb", extrasamples=["assocalpha"])
        image = Image.open(file)
        expected = samples[..., :3] + 255.0 - samples[..., 3:]
        for _ in range(2):
            assert np.abs(to_rgb(image) - expected).max() <= 2  # Pillow divides by alpha

    def test_palette_of_16_bits(self):
        colors = np.random.default_rng(0).integers(0, 2**16, (3, 256)).astype(np.uint16)
        index = np.arange(960).reshape(24, 40).astype(np.uint8)
        tifffile.imwrite(file := io.BytesIO(), index, photometric="palette", colormap=colors)
        check(file, colors.T[index] / 65535)

    @pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
    def test_ycbcr(self, subsampling):
        """Samples as they are, by hand: a block of luma, then one of each chroma; BT.601 in full range."""
        across, down = subsampling
        y = quantized(0.1 + 0.8 * COLOR[..., 0], 8)
        cb, cr = (quantized(0.35 + 0.3 * COLOR[::down, ::across, i], 8) for i in (1, 2))
        strip = b""
        for row, column in itertools.product(range(0, 24, down), range(0, 40, across)):
            strip += y[row : row + down, column : column + across].tobytes()
            strip += bytes([cb[row // down, column // across], cr[row // down, column // across]])
        strip += b"\0" * (len(strip) % 2)
        tags = [(256, 40), (257, 24), (258, 8), (259, 1), (262, 6), (273, 8), (277, 3), (278, 24), (279, len(strip))]
        tags.append((530, across | down << 16))
        directory = struct.pack("<H", len(tags))
        for tag, value in tags:
            kind, count = (3, 2) if tag == 530 else (4, 1)
            if tag == 258:
                kind, count, value = 3, 3, 8 + len(strip) + 2 + 12 * len(tags) + 4
            directory += struct.pack("<HHII", tag, kind, count, value)
        data = b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + bytes(4) + struct.pack("<3H", 8, 8, 8)
        cb, cr = (c.repeat(down, 0).repeat(across, 1) - 128.0 for c in (cb, cr))
        expected = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 2) / 255
        check(data, expected.clip(0, 1), 1.5)  # libtiff rounds twice

    @pytest.mark.parametrize("kind", ["f4", "f2", "i1", "i2", "u4"])
    def test_other_samples_are_refused(self, kind):
        tifffile.imwrite(file := io.BytesIO(), (100 * COLOR).astype(kind), photometric="rgb")
        with pytest.raises(ImageError, match=r"image: the TIFF file cannot be read: "):
            load_image(file)

    def test_other_compressions_are_refused(self):
        tifffile.imwrite(file := io.BytesIO(), quantized(COLOR, 8), photometric="rgb", compression="jpeg2000")
        with pytest.raises(ImageError, match="TIFF file cannot be read: compression 34712"):
            load_image(file)

    def test_thumbnails_are_not_the_picture(self):
        samples = quantized(COLOR, 8)
        for small in (0, 1):
            with tifffile.TiffWriter(file := io.BytesIO()) as writer:
                for page in range(2):
                    reduced = samples[::4, ::4] if page == small else samples
                    writer.write(reduced, photometric="rgb", subfiletype=int(page == small))
            check(file, samples / 255)  # without a warning
        with tifffile.TiffWriter(file := io.BytesIO()) as writer:
            writer.write(samples, photometric="rgb", subfiletype=1)
        with pytest.raises(ImageError, match="a raw file of a camera"):
            load_image(file)

    def test_pages(self):
        samples = quantized(COLOR, 8)
        with tifffile.TiffWriter(file := io.BytesIO()) as writer:
            writer.write(samples, photometric="rgb")
            writer.write((100 * COLOR).astype(np.float32), photometric="rgb")  # which cannot be read
        with pytest.warns(ImageWarning, match="only the first of several images is kept"):
            check(file, samples / 255)

    def test_raw_files_of_cameras(self):
        samples = quantized(COLOR, 8)
        tifffile.imwrite(
            file := io.BytesIO(), samples, photometric="rgb", extratags=[(50706, 1, 4, (1, 4, 0, 0), True)]
        )
        with pytest.raises(ImageError, match="a raw file of a camera"):
            load_image(file)
        with pytest.raises(ImageError, match="a raw file of a camera"):
            load_image(io.BytesIO(b"II*\0\x10\0\0\0CR\2\0" + bytes(100)))


class TestPng:
    @pytest.mark.parametrize("bits", [8, 16])
    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_channels(self, bits, channels):
        samples = quantized(np.concatenate([COLOR[..., : 1 if channels < 3 else 3], ALPHA], 2)[..., :channels], bits)
        values = samples / (2**bits - 1)
        expected = values if channels % 2 else values[..., :-1] * values[..., -1:] + 1 - values[..., -1:]
        check(png(samples), expected)
        encoded = imagecodecs.png_encode(samples.squeeze())  # by libpng, with filters
        check(encoded, expected)

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_transparent_gray(self, bits):
        """The value of tRNS is in the depth of the file; others that are alike in 8 bits stay."""
        top = 2**bits - 1
        values = [0, 1, top // 2, top] if bits < 16 else [0, 257, 258, 65535]
        key = values[1]
        packed = "".join(f"{value:0{bits}b}" for value in values).ljust(8, "0")
        row = int(packed, 2).to_bytes(len(packed) // 8)
        header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
        parts = [
            (b"IHDR", header),
            (b"tRNS", struct.pack(">H", key)),
            (b"IDAT", zlib.compress(b"\0" + row)),
            (b"IEND", b""),
        ]
        data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
        check(data, np.array([[[1.0 if value == key else value / top] for value in values]]))

    def test_transparent_color_of_16_bits(self):
        samples = np.array([[[1000, 2000, 3000], [1001, 2000, 3000], [0, 0, 0]]], np.uint16)
        file = png(samples, (b"tRNS", struct.pack(">3H", 1000, 2000, 3000)))
        expected = samples / 65535
        expected[0, 0] = 1
        check(file, expected)

    @pytest.mark.parametrize("bits", [8, 16])
    def test_interlaced(self, bits):
        samples = quantized(COLOR, bits)
        rows = samples.astype(samples.dtype.newbyteorder(">"))
        data = b""
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        for top, left, down, across in passes:
            data += b"".join(b"\0" + row.tobytes() for row in rows[top::down, left::across])
        header = struct.pack(">IIBBBBB", 40, 24, bits, 2, 0, 0, 1)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
        check(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts), samples / (2**bits - 1))


class TestOthers:
    @pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 16])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_jpeg_2000(self, bits, channels):
        samples = quantized(COLOR[..., :channels], bits)
        data = imagecodecs.jpeg2k_encode(samples.squeeze(), level=0, reversible=True, bitspersample=bits)
        if bits > 8 and channels == 3:
            with pytest.raises(ImageError, match=f"JPEG 2000 colors of {bits} bits are not supported"):
                load_image(io.BytesIO(data))
        else:
            check(data, samples / (2**bits - 1))

    @AVIF
    @pytest.mark.parametrize("bits", [8, 10, 12])
    def test_avif(self, bits):
        data = imagecodecs.avif_encode(quantized(COLOR, bits), level=100, bitspersample=bits)
        check(data, imagecodecs.avif_decode(data) / (2**bits - 1), 1.5)

    @pytest.mark.parametrize("top", [1, 3, 100, 255, 1000, 65535])
    def test_ppm(self, top):
        samples = np.rint(top * COLOR).astype(np.uint8 if top < 256 else ">u2")
        check(b"P6 40 24 %d\n" % top + samples.tobytes(), samples / top)
        check(b"P5 40 24 %d\n" % top + samples[..., 0].tobytes(), samples[..., :1] / top)
        check(b"P3 40 24 %d\n" % top + b" ".join(b"%d" % value for value in samples.ravel()), samples / top)

    def test_several_pictures_in_a_jpeg_file(self):
        """The main picture of MPO is the first, whatever the suffix."""
        first, second = (Image.fromarray(quantized(color, 8)) for color in (COLOR, COLOR[:, ::-1]))
        first.save(file := io.BytesIO(), "MPO", save_all=True, append_images=[second], quality=100, subsampling=0)
        with pytest.warns(ImageWarning, match="only the first of several images is kept"):
            check(file, COLOR, 4)


class TestBesidesPixels:
    """What is corrupt besides the pixels never costs a picture."""

    samples = quantized(COLOR, 8)

    @pytest.mark.parametrize(
        "parts",
        [
            (b"tEXt", b"Comment\0" + b"x" * 2_000_000),
            (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000), 1)),
            (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(3_000_000), 1)),
            (b"tEXt", b""),
            (b"iTXt", b"XML:com.adobe.xmp\0\1"),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(40_000_000), 1)),
            (b"iTXt", b"XML:com.adobe.xmp"),
            (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(40_000_000), 1)),
            (b"zTXt", b"Raw profile type exif"),
            (b"tEXt", b"Raw profile type exif\0not hexadecimal"),
            (b"zTXt", b"x\0\7abc"),
            (b"iCCP", b"x\0\7abc"),
            (b"eXIf", b""),
            (b"gAMA", b"\0"),
            (b"cHRM", b"\0"),
            (b"sRGB", b""),
            (b"pHYs", b"\0"),
            (b"acTL", b"\0"),
            (b"fcTL", b"\0" * 26),
            (b"cICP", b""),
            (b"tRNS", b"\0"),
            (b"abCd", b"private"),
        ],
    )
    def test_png(self, parts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImageWarning)
            np.testing.assert_array_equal(load_photograph(png(self.samples, parts))[0], self.samples)

    @pytest.mark.parametrize("kind", [b"tEXt", b"gAMA", b"iCCP", b"eXIf", b"tRNS"])
    def test_wrong_checksum(self, kind):
        data = bytearray(png(self.samples, (kind, b"\0" * 6)).getvalue())
        data[data.index(kind) + 4] ^= 1
        with pytest.warns(ImageWarning, match=f"the chunk {kind.decode()} is ignored: its checksum is wrong"):
            np.testing.assert_array_equal(load_image(io.BytesIO(bytes(data))), self.samples)

    def test_inflated_profile_is_bounded(self):
        file = png(self.samples, (b"iCCP", b"x\0\0" + zlib.compress(bytes(100_000_000), 1)))
        tracemalloc.start()
        try:
            with pytest.warns(ImageWarning, match="color profile ignored"):
                load_image(file)
            assert tracemalloc.get_traced_memory()[1] < 2**26
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("keep", [0, 1, 20, 60])
    @pytest.mark.parametrize("option", ["exif", "xmp", "icc_profile"])
    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", pytest.param("AVIF", marks=AVIF)])
    def test_broken_metadata(self, kind, option, keep):
        exif = Image.Exif()
        exif[271] = "Camera" * 20
        whole = {"exif": exif.tobytes(), "xmp": b"<x:xmpmeta>" * 20, "icc_profile": b"profile" * 40}[option]
        plain: dict[str, Any] = {"quality": 90}
        Image.fromarray(self.samples).save(bare := io.BytesIO(), kind, **plain)
        Image.fromarray(self.samples).save(file := io.BytesIO(), kind, **plain, **{option: whole})
        start = whole.removeprefix(b"Exif\0\0")
        assert start in file.getvalue()
        data = file.getvalue().replace(start, start[:keep] + b"\xff" * (len(start) - keep))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImageWarning)
            np.testing.assert_array_equal(load_photograph(io.BytesIO(data))[0], load_image(bare))


class TestPackages:
    def test_heic(self):
        import pillow_heif

        samples = quantized(COLOR, 8)
        exif = Image.Exif()
        exif[274] = 6  # stored lying
        heif = pillow_heif.from_pillow(Image.fromarray(samples))
        heif.save(file := io.BytesIO(), quality=-1, chroma=444, exif=exif.tobytes())
        check(file, np.rot90(samples, -1) / 255, 3)  # lossy in YCbCr only

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turned_heic(self, orientation):
        """The decoder turns the pixels; whoever reads them is told."""
        import pillow_heif

        exif = Image.Exif()
        exif[274] = orientation
        image = Image.fromarray(quantized(COLOR, 8))
        pillow_heif.from_pillow(image).save(file := io.BytesIO(), quality=-1, chroma=444, exif=exif.tobytes())
        expected = ImageOps.exif_transpose(self.oriented(image, orientation))
        photograph = read_photograph(file)
        assert np.abs(photograph.pixels.astype(int) - np.asarray(expected)).max() <= 3
        assert photograph.turned == (orientation != 1)

    def oriented(self, image: Image.Image, orientation: int) -> Image.Image:
        image.getexif()[274] = orientation
        return image

    def test_heic_of_hdr(self):
        import pillow_heif

        heif = pillow_heif.from_pillow(Image.fromarray(quantized(COLOR, 8)))
        codes = {"color_primaries": 9, "transfer_characteristics": 16, "matrix_coefficients": 9, "full_range_flag": 1}
        heif.save(file := io.BytesIO(), save_nclx_profile=True, nclx_profile={"version": 1, **codes})
        if b"nclx\0\x09\0\x10" not in file.getvalue():
            file = io.BytesIO(file.getvalue().replace(b"nclx\0\1\0\x0d", b"nclx\0\x09\0\x10"))
        with pytest.raises(ImageError, match=r"HDR \(PQ\)"):
            load_image(file)

    def test_jxl(self):
        samples = quantized(COLOR, 8)
        check(imagecodecs.jpegxl_encode(samples, lossless=True), samples / 255)

    def test_gray_with_alpha_of_16_bits_in_jxl(self):
        """They are linear light; each here has two equal bytes, of which one is read."""
        samples = quantized(COLOR, 8)[..., :2].astype(np.uint16) * 257
        found = load_image(io.BytesIO(imagecodecs.jpegxl_encode(samples, lossless=True)))
        light, alpha = samples[..., :1] / 65535, samples[..., 1:] / 65535
        assert np.abs(found - 255 * (srgb_of(light) * alpha + 1 - alpha)).max() <= 1

    @pytest.mark.parametrize(("height", "width"), [(24, 40), (9, 300), (256, 256)])
    def test_jxl_animation_is_refused(self, height, width):
        """Its decoder would give the last picture."""
        pictures = np.zeros((3, height, width, 3), np.uint8)
        with pytest.raises(ImageError, match="animation"):
            load_image(io.BytesIO(imagecodecs.jpegxl_encode(pictures, lossless=True)))

    @pytest.mark.parametrize("exif", [1, 6])
    def test_turned_jxl(self, exif):
        """The codestream counts, not EXIF: djxl 0.7.0 makes 24x40 pixels of the first file, too, of the other 40x24."""
        box = struct.pack(">I4s", 8 + 4 + 26, b"Exif") + bytes(4)
        box += b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1" + struct.pack(">HHI", exif, 0, 0)
        photograph = read_photograph(io.BytesIO(TURNED_JXL + box))
        assert photograph.pixels.shape == (40, 24, 3)
        assert photograph.turned
        upright = Image.fromarray(quantized(COLOR, 8))
        upright.save(file := io.BytesIO(), "JXL", lossless=True, exif=box[12:])
        photograph = read_photograph(file)
        np.testing.assert_array_equal(photograph.pixels, upright)
        assert not photograph.turned

    @pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 40), (9, 300), (100, 600), (256, 256), (8000, 1)])
    def test_jxl_is_refused_before_it_is_decoded(self, height, width):
        data = imagecodecs.jpegxl_encode(np.zeros((height, width, 3), np.uint8), lossless=True, effort=1)
        assert load_image(io.BytesIO(data), max_pixels=height * width).shape == (height, width, 3)
        with pytest.raises(ImageError, match=f"{width}x{height} pixels are above the limit"):
            load_image(io.BytesIO(data), max_pixels=height * width - 1)

    def test_without_packages(self, tmp_path, monkeypatch):
        from rnncodec.files import opening

        packages = {name: ("no_such_module", kind, extra) for name, (_, kind, extra) in opening.PACKAGES.items()}
        monkeypatch.setattr(opening, "PACKAGES", packages)
        monkeypatch.setattr("rnncodec.files.finding.PACKAGES", packages)
        with pytest.raises(ImageError, match=r"image: HEIC files need another package: pip install 'rnncodec\[heic\]'"):
            load_image(io.BytesIO(b"\0\0\0\x18ftypheic" + bytes(50)))
        with pytest.raises(ImageError, match=r"pip install 'rnncodec\[jxl\]'"):
            load_image(io.BytesIO(b"\xff\x0a" + bytes(50)))
        for name in ("a.HEIC", "b.jxl", "c.png"):
            (tmp_path / name).touch()
        assert find_images([tmp_path]) == [tmp_path / "c.png"]
        reasons = find_unreadable(tmp_path)
        assert list(reasons) == [tmp_path / "a.HEIC", tmp_path / "b.jxl"]
        assert "rnncodec[heic]" in reasons[tmp_path / "a.HEIC"]

    def test_found_in_folders(self, tmp_path):
        for name in ("a.heic", "b.JXL", "c.mpo", "d.nef", "e.psd", "f.txt", "g.rnc", "h.svg", ".i.nef"):
            (tmp_path / name).touch()
        assert [path.name for path in find_images([tmp_path])] == ["a.heic", "b.JXL", "c.mpo"]
        reasons = find_unreadable(tmp_path)
        assert [path.name for path in reasons] == ["d.nef", "e.psd", "h.svg"]
        assert "raw file of a camera" in reasons[tmp_path / "d.nef"]
        assert all("\n" not in reason for reason in reasons.values())
