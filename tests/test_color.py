"""Tests of colors: profiles and color chunks beside formulas of their standards, and what written files say."""

import io
import struct
import warnings
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from pictures import (
    ADOBE_XY,
    BT2020_XY,
    CMYK_LAB,
    D65,
    P3_XY,
    SRGB_XY,
    chunk,
    cmyk_profile,
    converted,
    iccp,
    png,
    smooth,
    srgb_light,
    srgb_of_lab,
    to_xyz,
)
from PIL import Image, ImageCms, features

from rnncodec.files.images import ImageError, ImageWarning, load_image, load_photograph, save_image, to_rgb

GAMMA = {"p3": 0.0, "adobe": 563 / 256, "bt2020": 2.4, "p18": 1.8}  # 0 for sRGB's curve
XY = {"p3": P3_XY, "adobe": ADOBE_XY, "bt2020": BT2020_XY, "p18": P3_XY}
SPACES = list(XY)
AVIF = pytest.mark.skipif(not features.check("avif"), reason="Pillow lacks AVIF")


def light(name):
    return (lambda v: v ** GAMMA[name]) if GAMMA[name] else srgb_light


def curve_of(points: int) -> np.ndarray:
    return np.rint(65535 * srgb_light(np.linspace(0, 1, points))).astype(np.uint16)


def profile(name) -> bytes:
    """A profile made by Little CMS, with a curve of 4096 points for sRGB's."""
    xy = [value for x, y in XY[name][:3] for value in (x, y, 1)]
    curve: dict[str, Any] = {"gamma": GAMMA[name]} if GAMMA[name] else {"transferfunction": curve_of(4096)}
    return bytes(imagecodecs.cms_profile("rgb", whitepoint=[*D65, 1], primaries=xy, **curve))


def rgb_file(kind: str, samples: np.ndarray, icc: bytes) -> io.BytesIO:
    """A file without loss, or nearly so."""
    file = io.BytesIO()
    if kind == "png":
        return png(samples, iccp(icc))
    if kind.startswith("tiff"):
        planar: dict[str, Any] = {"planarconfig": "separate"} if kind == "tiff planes" else {}
        samples = np.moveaxis(samples, 2, 0) if planar else samples
        tifffile.imwrite(file, samples, photometric="rgb", iccprofile=icc, compression="zlib", **planar)
    else:
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100}
        if kind == "JPEG":
            options["subsampling"] = 0
        Image.fromarray(samples).save(file, kind, icc_profile=icc, **options)
    return file


class TestProfiles:
    @pytest.mark.parametrize("space", SPACES)
    @pytest.mark.parametrize("kind", ["png", "tiff", "tiff planes", "WEBP"])
    def test_8_bits(self, space, kind):
        samples = np.rint(255 * smooth()).astype(np.uint8)
        expected = converted(samples / 255, XY[space], light(space))
        assert np.abs(load_image(rgb_file(kind, samples, profile(space))) - expected).max() <= 1

    @pytest.mark.parametrize("space", SPACES)
    @pytest.mark.parametrize("kind", ["png", "tiff"])
    def test_16_bits(self, space, kind):
        samples = np.rint(65535 * smooth()).astype(np.uint16)
        expected = converted(samples / 65535, XY[space], light(space))
        assert np.abs(load_image(rgb_file(kind, samples, profile(space))) - expected).max() <= 0.6

    @pytest.mark.parametrize("kind", ["JPEG", pytest.param("AVIF", marks=AVIF)])
    def test_with_loss(self, kind):
        """The profile applies to what another library decodes."""
        file = rgb_file(kind, np.rint(255 * smooth()).astype(np.uint8), profile("p3"))
        decoded = {"JPEG": imagecodecs.jpeg_decode, "AVIF": imagecodecs.avif_decode}[kind](file.getvalue())
        assert np.abs(load_image(file) - converted(decoded / 255, P3_XY)).max() <= 1.6  # a level less or more decoded

    @pytest.mark.parametrize("depth", [8, 16])
    @pytest.mark.parametrize("kind", ["png", "tiff"])
    def test_gray(self, depth, kind):
        top = 2**depth - 1
        samples = np.linspace(0, top, 256).astype(f"u{depth // 8}").reshape(8, 32, 1)
        icc = bytes(imagecodecs.cms_profile("gray", whitepoint=[0.3457, 0.3585, 1], gamma=1.8))
        expected = converted((samples / top).repeat(3, 2), SRGB_XY, lambda v: v**1.8)
        if kind == "png":
            file = png(samples, iccp(icc))
        else:
            tifffile.imwrite(file := io.BytesIO(), samples[..., 0], photometric="minisblack", iccprofile=icc)
        assert np.abs(load_image(file) - expected).max() <= 1

    @pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
    def test_press_inks(self, kind):
        """Inks of a press, at the colors that its profile states; JPEG files of Adobe hold them inverted."""
        inks = [[255 * (number >> bit & 1) for bit in (3, 2, 1, 0)] for number in (0, 2, 4, 6, 8, 10, 12, 14)]
        lab = np.array([CMYK_LAB[number] for number in (0, 2, 4, 6, 8, 10, 12, 14)])
        samples = np.array(inks, np.uint8)[:, None].repeat(8, 0).repeat(8, 1)
        image = Image.frombytes("CMYK", (8, 64), samples.tobytes())
        image.save(
            file := io.BytesIO(), kind, icc_profile=cmyk_profile(), **({"quality": 100} if kind == "JPEG" else {})
        )
        if kind == "JPEG":
            assert b"Adobe" in file.getvalue()
            stored = imagecodecs.jpeg_decode(file.getvalue(), outcolorspace="CMYK")
            assert np.abs(255 - stored.astype(int) - samples).max() <= 3
        found = load_image(file)[4::8, 4].astype(float)
        assert np.abs(found - srgb_of_lab(lab)).max() <= (6 if kind == "JPEG" else 2.5)  # Lab of 8 bits

    def test_lab(self):
        lab = np.array([[[50, 20, -30], [90, -10, 40], [10, 5, 5], [100, 0, 0]]])
        samples = np.stack([np.rint(lab[..., 0] * 2.55), lab[..., 1], lab[..., 2]], 2).astype(int).astype(np.uint8)
        tifffile.imwrite(file := io.BytesIO(), samples, photometric="cielab")
        assert np.abs(load_image(file) - srgb_of_lab(lab)).max() <= 2  # L of 8 bits

    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_srgb_changes_nothing(self, mode):
        samples = np.random.default_rng(0).integers(0, 256, (64, 64, 3 if mode == "RGB" else 1), np.uint8)
        icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        table: dict[str, Any] = {"transferfunction": curve_of(1024)}  # as most files have it
        xy = [value for x, y in SRGB_XY[:3] for value in (x, y, 1)]
        curved = bytes(imagecodecs.cms_profile("rgb", whitepoint=[*D65, 1], primaries=xy, **table))
        gray = bytes(imagecodecs.cms_profile("gray", whitepoint=[0.3457, 0.3585, 1], **table))
        for found in [icc, curved] if mode == "RGB" else [gray]:
            np.testing.assert_array_equal(
                load_image(png(samples, iccp(found))), samples.repeat(4 - samples.shape[2], 2)[..., :3]
            )

    def test_alpha_is_kept_apart(self):
        samples = np.concatenate([smooth(), np.full((24, 40, 1), 128 / 255)], 2)
        samples = np.rint(255 * samples).astype(np.uint8)
        with pytest.warns(ImageWarning, match="replaced by white"):
            found = load_image(png(samples, iccp(profile("p3"))))
        color = converted(samples[..., :3] / 255, P3_XY)
        assert np.abs(found - (color * 128 + 255 * 127) / 255).max() <= 1

    @pytest.mark.parametrize("broken", [b"", b"x" * 200, profile("p3")[:200], profile("p3")[:-40]])
    @pytest.mark.parametrize("kind", ["png", "tiff", "WEBP", "JPEG"])
    def test_broken(self, broken, kind):
        if not broken and kind != "png":
            return  # there is no empty profile
        samples = np.rint(255 * smooth()).astype(np.uint8)
        with pytest.warns(ImageWarning, match="color profile ignored"):
            found = load_image(rgb_file(kind, samples, broken))
        assert np.abs(found.astype(int) - samples).max() <= (3 if kind == "JPEG" else 0)

    def test_of_another_kind_of_color(self):
        samples = np.full((4, 4, 1), 90, np.uint8)
        with pytest.warns(ImageWarning, match="color profile ignored: it is for RGB, but the pixels are L"):
            assert (load_image(png(samples, iccp(profile("p3")))) == 90).all()
        with pytest.warns(ImageWarning, match="color profile ignored: it is for CMYK, but the pixels are RGB"):
            assert (load_image(png(samples.repeat(3, 2), iccp(cmyk_profile()))) == 90).all()

    def test_jpeg_profile_behind_the_header(self):
        file = rgb_file("JPEG", np.rint(255 * smooth()).astype(np.uint8), profile("p3"))
        data = file.getvalue()
        start, scan = data.index(b"\xff\xe2"), data.index(b"\xff\xda")
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        moved = data[:start] + data[end:scan] + data[start:end] + data[scan:]
        np.testing.assert_array_equal(load_image(io.BytesIO(moved)), load_image(file))
        assert np.abs(load_image(file).astype(int) - imagecodecs.jpeg_decode(moved)).max() > 20

    @pytest.mark.parametrize(("value", "rule"), [(2, ""), (65535, "R03"), (65535, "R98"), (1, "R98"), (1, "")])
    def test_cameras_name_adobe_rgb_in_exif(self, value, rule):
        exif = Image.Exif()
        exif[34665] = {40961: value, 37386: 50} | ({40965: {1: rule}} if rule else {})
        samples = np.rint(255 * smooth()).astype(np.uint8)
        Image.fromarray(samples).save(file := io.BytesIO(), "JPEG", quality=100, subsampling=0, exif=exif)
        pixels, records = load_photograph(file)
        decoded = imagecodecs.jpeg_decode(file.getvalue())
        if value == 2 or rule == "R03":
            decoded = converted(decoded / 255, ADOBE_XY, light("adobe"))
        assert np.abs(pixels - decoded).max() <= 1.6
        kept = Image.Exif()
        kept.load(records["EXIF"])
        directory = kept.get_ifd(34665)
        assert (directory[40961], directory[37386]) == (1, 50)  # the pixels are sRGB by now
        assert kept.get_ifd(40965).get(1, "R98") == "R98" if 40965 in directory else True
        profiled = io.BytesIO()
        Image.fromarray(samples).save(
            profiled, "JPEG", quality=100, subsampling=0, exif=exif, icc_profile=profile("p3")
        )
        assert (
            np.abs(load_image(profiled) - converted(imagecodecs.jpeg_decode(file.getvalue()) / 255, P3_XY)).max() <= 1.6
        )

    @pytest.mark.parametrize("depth", [8, 16])
    @pytest.mark.parametrize("small", [False, True])
    def test_tiff_pages_have_profiles_of_their_own(self, depth, small):
        samples = np.rint((2**depth - 1) * smooth()).astype(f"u{depth // 8}")
        for first, second in ((None, "p3"), ("p3", None), ("p3", "adobe")):
            file = io.BytesIO()
            with tifffile.TiffWriter(file) as writer:
                for space, page in ((first, samples), (second, samples[::-1])):
                    options: dict[str, Any] = {"iccprofile": profile(space)} if space else {}
                    options |= {"subfiletype": 1} if small and page is not samples else {}
                    writer.write(page, photometric="rgb", **options)
            shown = samples / (2**depth - 1)
            expected = 255 * shown if first is None else converted(shown, XY[first], light(first))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert np.abs(load_image(file) - expected).max() <= 1.1
            if depth == 8:
                assert np.abs(to_rgb(Image.open(file)) - expected).max() <= 1.1

    @pytest.mark.parametrize("depth", [8, 16])
    def test_gray_profile_in_lightness(self, depth):
        """Its connection space is Lab, so that its curve gives lightness instead of light."""
        icc = bytearray(imagecodecs.cms_profile("gray", whitepoint=[0.3457, 0.3585, 1], gamma=1.0))
        icc[20:24] = b"Lab "
        top = 2**depth - 1
        samples = np.linspace(0, top, 256).astype(f"u{depth // 8}").reshape(8, 32, 1)
        lab = np.concatenate([samples * (100 / top), np.zeros((8, 32, 2))], 2)
        assert np.abs(load_image(png(samples, iccp(bytes(icc)))) - srgb_of_lab(lab)).max() <= 2

    @pytest.mark.parametrize("depth", [8, 16])
    @pytest.mark.parametrize("kind", ["rgb", "gray"])
    def test_black_that_is_light_becomes_black(self, depth, kind):
        """As a scanner's profile has it: black point compensation maps its darkest light to none."""
        black, points = 3000 / 65535, np.linspace(0, 1, 1024) ** 2.2
        curve = np.rint(65535 * (black + (1 - black) * points)).astype(np.uint16)
        xy = [value for x, y in SRGB_XY[:3] for value in (x, y, 1)]
        primaries: dict[str, Any] = {"primaries": xy} if kind == "rgb" else {}
        white = [*D65, 1] if kind == "rgb" else [0.3457, 0.3585, 1]
        icc = bytes(imagecodecs.cms_profile(kind, whitepoint=white, transferfunction=curve, **primaries))
        top = 2**depth - 1
        samples = np.rint(top * smooth()).astype(f"u{depth // 8}")[..., : 3 if kind == "rgb" else 1]
        found = load_image(png(samples, iccp(icc)))
        expected = converted((samples / top).repeat(4 - samples.shape[2], 2)[..., :3], SRGB_XY, lambda v: v**2.2)
        assert np.abs(found - expected).max() <= 3  # Little CMS compensates in Lab, with 8 bits

    def test_images_of_pillow(self):
        samples = np.rint(255 * smooth()).astype(np.uint8)
        image = Image.open(rgb_file("WEBP", samples, profile("adobe")))
        assert np.abs(to_rgb(image) - converted(samples / 255, ADOBE_XY, light("adobe"))).max() <= 1

    def test_one_picture_in_many_files(self):
        """The same colors, in other spaces, depths and containers, give the same pixels; all readers agree."""
        target = np.rint(255 * smooth() * 0.8 + 20).astype(np.uint8)
        linear = srgb_light(target / 255)
        found = [load_image(png(target))]
        for space in SPACES:
            own = np.clip(linear @ (np.linalg.inv(to_xyz(XY[space])) @ to_xyz(SRGB_XY)).T, 0, None)
            gamma = GAMMA[space]
            samples = own ** (1 / gamma) if gamma else converted(own, SRGB_XY, lambda v: v) / 255
            for kind in ("png", "tiff"):
                file = rgb_file(kind, np.rint(65535 * samples).astype(np.uint16), profile(space))
                found += [load_image(file), load_photograph(file)[0]]
        for suffix in ("webp", "tif", "bmp", "ppm", "jp2"):
            save_image(target, file := io.BytesIO(), suffix)
            found.append(load_image(file))
        for pixels in found:
            assert np.abs(pixels.astype(int) - target).max() <= 1


def gama(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(100_000 * value))


def chrm(xy) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(100_000 * v) for point in (xy[3], *xy[:3]) for v in point))


def cicp(primaries: int, transfer: int) -> tuple[bytes, bytes]:
    return b"cICP", bytes([primaries, transfer, 0, 1])


class TestPngColor:
    samples = np.rint(255 * smooth()).astype(np.uint8)

    @pytest.mark.parametrize(
        ("chunks", "xy", "gamma"),
        [
            ([cicp(12, 13), iccp(profile("adobe")), (b"sRGB", b"\0")], P3_XY, 0),
            ([iccp(profile("adobe")), (b"sRGB", b"\0"), gama(1), chrm(P3_XY)], ADOBE_XY, 563 / 256),
            ([(b"sRGB", b"\0"), gama(1), chrm(P3_XY)], SRGB_XY, 0),
            ([gama(1), chrm(P3_XY)], P3_XY, 1),
            ([gama(1 / 1.8)], SRGB_XY, 1.8),
            ([gama(0.45455)], SRGB_XY, 0),
            ([gama(0.45455), chrm(SRGB_XY)], SRGB_XY, 0),
            ([chrm(BT2020_XY)], BT2020_XY, 0),
            ([cicp(9, 8)], BT2020_XY, 1),
            ([cicp(1, 4)], SRGB_XY, 2.2),
            ([cicp(2, 2)], SRGB_XY, 0),
        ],
    )
    def test_precedence(self, chunks, xy, gamma):
        expected = converted(self.samples / 255, xy, (lambda v: v**gamma) if gamma else srgb_light)
        assert np.abs(load_image(png(self.samples, *chunks)) - expected).max() <= 1

    def test_television(self):
        """The curve of BT.709, from its standard: V = 4.5 L below 0.018, 1.099 L^0.45 - 0.099 above."""
        expected = converted(
            self.samples / 255, BT2020_XY, lambda v: np.where(v < 0.081, v / 4.5, ((v + 0.099) / 1.099) ** (1 / 0.45))
        )
        assert np.abs(load_image(png(self.samples, cicp(9, 1))) - expected).max() <= 1

    @pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
    def test_hdr_is_refused(self, transfer, name):
        with pytest.raises(ImageError, match=rf"image: its pixels are HDR \({name}\)"):
            load_image(png(self.samples, cicp(9, transfer)))

    def test_unknown_spaces_are_refused(self):
        with pytest.raises(ImageError, match="primaries 77 and transfer 13 is not supported"):
            load_image(png(self.samples, cicp(77, 13)))
        with pytest.raises(ImageError, match="not RGB of full range"):
            load_image(png(self.samples, (b"cICP", bytes([1, 13, 0, 0]))))

    def test_impossible_chromaticities(self):
        with pytest.warns(ImageWarning, match="color space ignored"):
            np.testing.assert_array_equal(load_image(png(self.samples, (b"cHRM", bytes(32)))), self.samples)

    def test_gray(self):
        samples = np.arange(256, dtype=np.uint8).reshape(4, 64, 1)
        expected = converted((samples / 255).repeat(3, 2), SRGB_XY, lambda v: v)
        assert np.abs(load_image(png(samples, gama(1))) - expected).max() <= 1


class TestBoxes:
    @AVIF
    @pytest.mark.parametrize(("primaries", "xy"), [(12, P3_XY), (9, BT2020_XY)])
    def test_avif(self, primaries, xy):
        data = self.avif()
        decoded = load_image(io.BytesIO(data)) / 255
        found = load_image(io.BytesIO(data.replace(b"nclx\0\1", bytes([*b"nclx", 0, primaries]))))
        assert np.abs(found - converted(decoded, xy)).max() <= 1

    @AVIF
    @pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
    def test_hdr_is_refused(self, transfer, name):
        data = self.avif().replace(b"nclx\0\1\0\x0d", bytes([*b"nclx", 0, 9, 0, transfer]))
        with pytest.raises(ImageError, match=rf"HDR \({name}\)"):
            load_image(io.BytesIO(data))

    def avif(self) -> bytes:
        Image.fromarray(np.rint(255 * smooth()).astype(np.uint8)).save(file := io.BytesIO(), "AVIF", quality=100)
        assert file.getvalue().count(b"nclx\0\1\0\x0d") == 1
        return file.getvalue()

    def jp2(self, samples, colr: bytes) -> io.BytesIO:
        """A JPEG 2000 file without loss whose color is said in another way."""
        Image.fromarray(samples).save(file := io.BytesIO(), "JPEG2000", mct=0)
        data = file.getvalue()
        old = data.index(b"colr") - 4
        size = int.from_bytes(data[old : old + 4])
        box = struct.pack(">I", 8 + len(colr)) + b"colr" + colr
        header = data.index(b"jp2h") - 4
        length = int.from_bytes(data[header : header + 4]) + len(box) - size
        return io.BytesIO(data[:header] + struct.pack(">I", length) + data[header + 4 : old] + box + data[old + size :])

    def test_jpeg_2000(self):
        samples = np.rint(255 * smooth()).astype(np.uint8)
        np.testing.assert_array_equal(load_image(self.jp2(samples, b"\1\0\0" + struct.pack(">I", 16))), samples)
        found = load_image(self.jp2(samples, b"\2\0\0" + profile("p3")))
        assert np.abs(found - converted(samples / 255, P3_XY)).max() <= 1
        with pytest.raises(ImageError, match="color space 14 of JPEG 2000 is not supported"):
            load_image(self.jp2(samples, b"\1\0\0" + struct.pack(">I", 14)))

    def test_jpeg_2000_of_ycc(self):
        """sYCC of BT.601, in full range."""
        y, cb, cr = (np.rint(60 + 120 * smooth())).astype(np.uint8).transpose(2, 0, 1)
        found = load_image(self.jp2(np.stack([y, cb, cr], 2), b"\1\0\0" + struct.pack(">I", 18)))
        y, cb, cr = y.astype(float), cb - 128.0, cr - 128.0
        expected = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 2)
        assert np.abs(found - expected.clip(0, 255)).max() <= 1


class TestBmp:
    def bmp(self, samples, kind: bytes, points: bytes, icc: bytes = b"") -> io.BytesIO:
        height, width, _ = samples.shape
        rows = b"".join(row[:, ::-1].tobytes() + bytes(-3 * width % 4) for row in samples[::-1])
        start = 14 + 124
        header = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 24, 0, len(rows), 0, 0, 0, 0) + bytes(16)
        header += kind + points.ljust(48, b"\0") + struct.pack("<IIII", 4, 124 + len(rows) if icc else 0, len(icc), 0)
        return io.BytesIO(b"BM" + struct.pack("<IHHI", start + len(rows) + len(icc), 0, 0, start) + header + rows + icc)

    def test_colors(self):
        samples = np.rint(255 * smooth()).astype(np.uint8)
        np.testing.assert_array_equal(load_image(self.bmp(samples, b"BGRs", b"")), samples)
        np.testing.assert_array_equal(load_image(self.bmp(samples, bytes(4), b"")), samples)
        found = load_image(self.bmp(samples, b"DEBM", b"", profile("p3")))
        assert np.abs(found - converted(samples / 255, P3_XY)).max() <= 1
        points = [round(v * 2**30) for v in to_xyz(ADOBE_XY).T.ravel()] + [round(2.2 * 2**16)] * 3
        found = load_image(self.bmp(samples, bytes(4), struct.pack("<12I", *points)))
        assert np.abs(found - converted(samples / 255, ADOBE_XY, lambda v: v**2.2)).max() <= 1


class TestWritten:
    """Files say that they are sRGB, in few bytes."""

    @pytest.mark.parametrize(("suffix", "cost"), [("jpg", 420), ("webp", 440), ("tif", 420)])
    def test_profile(self, suffix, cost):
        array = np.rint(255 * smooth()).astype(np.uint8)
        save_image(array, file := io.BytesIO(), suffix)
        with Image.open(file) as image:
            icc = image.info["icc_profile"]
            image.save(
                bare := io.BytesIO(), image.format, icc_profile=None, **({"lossless": True} if suffix == "webp" else {})
            )
        assert len(icc) <= 400
        # Little CMS, in another build, takes the profile for its own sRGB.
        own = imagecodecs.cms_profile("srgb")
        same = imagecodecs.cms_transform(array, icc, own, colorspace="rgb", outcolorspace="rgb")
        assert np.abs(same.astype(int) - array).max() <= 1
        if suffix == "webp":
            assert len(file.getvalue()) - len(bare.getvalue()) <= cost

    def test_png(self):
        save_image(np.zeros((4, 4, 3), np.uint8), file := io.BytesIO(), "png")
        with Image.open(file) as image:
            assert (image.info["srgb"], image.info["gamma"]) == (0, 0.45455)
            assert "icc_profile" not in image.info
        assert file.getvalue().index(b"sRGB") < file.getvalue().index(b"IDAT")
        assert len(chunk(b"sRGB", b"\0") + chunk(*gama(0.45455))) == 29

    @AVIF
    def test_avif(self):
        save_image(np.zeros((16, 16, 3), np.uint8), file := io.BytesIO(), "avif")
        assert file.getvalue().count(b"nclx\0\1\0\x0d") == 1

    def test_jpeg_2000(self):
        save_image(np.zeros((16, 16, 3), np.uint8), file := io.BytesIO(), "jp2")
        assert b"colr\1\0\0\0\0\0\x10" in file.getvalue()

    def test_own_files_read_without_warnings(self):
        array = np.rint(255 * smooth()).astype(np.uint8)
        for suffix in ("png", "jpg", "webp", "tif"):
            save_image(array, file := io.BytesIO(), suffix)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert np.abs(load_image(file).astype(int) - array).max() <= (6 if suffix == "jpg" else 0)
