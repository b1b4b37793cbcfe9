"""Tests of what AVIF and HEIC files say besides pixels, beside boxes and bits made by hand from their standards."""

import io
import random
import struct
import time
from contextlib import suppress
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pictures import P3_XY, converted, smooth
from PIL import features

from rnncodec.files import ImageError, load_image
from rnncodec.files.av1 import code_points
from rnncodec.files.heif import heif_has, heif_is_turned, heif_space
from rnncodec.files.profiles import PRIMARIES, SRGB, TRANSFERS, Space

P3 = Space(PRIMARIES[12], SRGB.curve)
# The first bytes of the pictures in files of avifenc 0.11.1, by its options.
STREAMS = {
    "--cicp 12/13/6": "12000a0938196ffec2181a0d20",
    "--cicp 12/13/6 --yuv 400": "12000a0918196ffec30c0d06a0",
    "--cicp 12/13/6 --codec rav1e": "12000a093fd96ffe5a181a0da0",
    "--cicp 12/13/6, two pictures": "12000a0d200000032dffcdaf92181a0d20",
    "--cicp 9/16/9 --depth 10": "12000a0938196ffec612201320",
    "--cicp 9/18/9 --depth 12 --yuv 444": "12000a0958196ffec6848904c4",
}
P3_STREAM = bytes.fromhex(STREAMS["--cicp 12/13/6"])


def bits(*fields: tuple[int, int]) -> bytes:
    """Fields of a number of bits and their value, filled up to whole bytes."""
    text = "".join(f"{value:0{count}b}" for count, value in fields)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8))


def obu(kind: int, body: bytes, sized=True, extended=False) -> bytes:
    size = b""
    rest = len(body)
    while sized and (not size or rest):  # leb128
        size, rest = size + bytes([rest & 127 | (128 if rest > 127 else 0)]), rest >> 7
    return bytes([kind << 3 | extended << 2 | sized << 1, *([0x20] if extended else [])]) + size + body


def video(profile: int, deep: int, hints: int, tools: tuple[int, ...], timing: int, points: int) -> bytes:
    """A sequence header of BT.2020 and BT.709, as fields in the order of section 5.5 of the AV1 specification."""
    fields = [(3, profile), (1, 0), (1, 0), (1, timing)]
    if timing:
        fields += [(32, 1), (32, 60), (1, 1), (3, 0), (1, 1), (3, 5)]  # equal pictures, of 12 ticks: 3 zeros, 1, 3 bits
        fields += [(1, 1), (5, 9), (32, 7), (5, 3), (5, 4)]  # model of the decoder, with delays of 10 bits
    fields += [(1, 1), (5, points - 1)]
    for point in range(points):
        fields += [(12, point), (5, 8), (1, 1)] if point % 2 else [(12, point), (5, 7)]  # levels above 7 have a tier
        fields += [(1, point % 2)] * timing + [(10, 99), (10, 98), (1, 1)] * (timing and point % 2)
        fields += [(1, 1), (4, 9)] if point % 3 else [(1, 0)]
    fields += [(4, 10), (4, 8), (11, 1919), (9, 300)]
    fields += [(1, 1), (4, 2), (3, 1)] if timing else [(1, 0)]
    fields += [(1, 1), (1, 0), (1, 1), (1, 0), (1, 1), (1, 0), (1, 1), (1, hints), *[(1, 1), (1, 0)] * hints]
    fields += [(1, tool) for tool in tools]
    fields += [(3, 6)] * hints + [(1, 0), (1, 1), (1, 1)]
    fields += [(1, deep), *[(1, 1)] * (profile == 2 and deep), *[(1, 0)] * (profile != 1)]
    return bits(*fields, (1, 1), (8, 9), (8, 1), (8, 9), (1, 1))


class TestAv1:
    @pytest.mark.parametrize("options", STREAMS)
    def test_streams_of_encoders(self, options):
        primaries, transfer, _ = options.split()[1].strip(",").split("/")
        assert code_points(bytes.fromhex(STREAMS[options])) == (int(primaries), int(transfer))

    @pytest.mark.parametrize("points", [1, 2, 32])
    @pytest.mark.parametrize("timing", [0, 1])
    @pytest.mark.parametrize("tools", [(1, 1), (1, 0, 1), (0, 1, 1), (0, 1, 0, 0), (0, 0)])
    @pytest.mark.parametrize("hints", [0, 1])
    @pytest.mark.parametrize(("profile", "deep"), [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)])
    def test_headers_of_videos(self, profile, deep, hints, tools, timing, points):
        header = video(profile, deep, hints, tools, timing, points)
        assert code_points(obu(2, b"") + obu(5, bytes(200), extended=True) + obu(1, header)) == (9, 1)
        assert code_points(obu(1, header, sized=False)) == (9, 1)
        assert code_points(obu(1, header[:-4])) is None  # cut within the color

    def test_nothing_is_stated(self):
        still = [(3, 0), (1, 1), (1, 1), (5, 0), (4, 5), (4, 5), (6, 39), (6, 23), (6, 0)]
        assert code_points(obu(1, bits(*still, (2, 0), (1, 0), (3, 0)))) == (2, 2)  # which stands for unspecified
        assert code_points(b"") is None
        assert code_points(obu(2, b"")) is None
        assert code_points(b"\x0a" + b"\xff" * 20) is None


def box(kind: bytes, *parts: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def avif(version=0, method=0, grid=False, config=b"", properties=(), stream=P3_STREAM, wide=0) -> io.BytesIO:
    """A file of one picture, or of a grid of two, in boxes of ISO/IEC 14496-12 and 23008-12.

    Args:
        version: of the box that says where pictures are.
        method: 0 for pictures after the boxes, 1 for pictures in the box `idat`.
        grid: whether the picture is a grid.
        config: what follows the four bytes of `av1C`.
        properties: more boxes that describe the main item.
        stream: the start of the AV1 stream.
        wide: whether numbers of properties have two bytes.
    """
    item = ">I" if version == 2 else ">H"
    long = bytes([version == 2, 0, 0, 0])
    coded = [struct.pack(item, number) for number in ((2, 3) if grid else (1,))]
    main = struct.pack(item, 1)
    container = box(b"ipco", box(b"av1C", b"\x81\0\x0c\0", config), *properties)
    own = [1, *range(2, 2 + len(properties))] if not grid else list(range(2, 2 + len(properties)))
    index = ">H" if wide else ">B"
    links = [(main, own), *[(number, [1]) for number in coded if grid]]
    table = b"".join(
        number + bytes([len(found)]) + b"".join(struct.pack(index, one) for one in found) for number, found in links
    )
    ipma = box(b"ipma", long[:3] + bytes([wide]), struct.pack(">I", len(links)), table)
    references = [box(b"cdsc", struct.pack(item, 9), b"\0\1", main)]
    if grid:
        references.append(box(b"dimg", main, b"\0\2", *coded))
    iref = box(b"iref", long, *references)
    pitm = box(b"pitm", long, main)
    data = b"stuff" + stream

    def place(start: int) -> bytes:
        """Where the pictures are, and another item before: numbers of 4 bytes, with indices from version 1 on."""
        index = bytes(4) if version else b""
        found = bytes([version, 0, 0, 0, 0x44, 0x44 if version else 0x40]) + struct.pack(item, 1 + len(coded))
        found += struct.pack(item, 8) + index[:2] + bytes(6) + b"\0\2" + 2 * (index + struct.pack(">2I", 1, 1))
        for number in coded:
            found += number + (struct.pack(">H", method) if version else b"") + b"\0\0" + struct.pack(">I", start)
            found += b"\0\1" + index + struct.pack(">2I", 5, len(stream))
        return box(b"iloc", found)

    def meta(start: int) -> bytes:
        idat = box(b"idat", data) if method else b""
        return box(b"meta", bytes(4), pitm, place(start), box(b"iprp", container, ipma), iref, idat)

    head = box(b"ftyp", b"avif\0\0\0\0avifmif1")
    start = 0 if method else len(head + meta(0)) + 8
    return io.BytesIO(head + meta(start) + (b"" if method else box(b"mdat", data)))


class TestBoxes:
    @pytest.mark.parametrize("grid", [False, True])
    @pytest.mark.parametrize(("version", "method"), [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)])
    def test_where_the_stream_is(self, version, method, grid):
        assert heif_space(avif(version, method, grid)) == P3
        assert heif_space(avif(version, method, grid, wide=1)) == P3

    def test_precedence(self):
        """A box beats the stream, and the header beside the stream the one in it."""
        nclx = box(b"colr", b"nclx", struct.pack(">HHHB", 1, 4, 6, 128))
        assert heif_space(avif(properties=[nclx])) == Space(PRIMARIES[1], TRANSFERS[4])
        assert heif_space(avif(properties=[nclx], grid=True)) == Space(PRIMARIES[1], TRANSFERS[4])
        beside = bytes.fromhex(STREAMS["--cicp 12/13/6, two pictures"])
        assert heif_space(avif(config=beside, stream=bytes(20))) == P3
        assert heif_space(avif(stream=bytes(20))) == SRGB
        assert heif_space(avif(stream=b"")) == SRGB

    @pytest.mark.parametrize(
        ("properties", "turned"),
        [
            ([], False),
            ([box(b"irot", b"\0")], False),
            ([box(b"irot", b"\1")], True),
            ([box(b"irot", b"\2")], True),
            ([box(b"imir", b"\0")], True),
            ([box(b"irot", b"\0"), box(b"imir", b"\1")], True),
        ],
    )
    def test_turned(self, properties, turned):
        assert heif_is_turned(avif(properties=properties)) == turned

    def test_cropped(self):
        assert heif_has(avif(properties=[box(b"clap", bytes(32))]), b"clap")
        assert not heif_has(avif(), b"clap")

    def test_damaged(self):
        """Whatever the boxes say, there is a space or an ImageError."""
        rng, whole = random.Random(0), avif(2, 0, grid=True).getvalue()
        for _ in range(2000):
            data = bytearray(whole)
            for _ in range(rng.choice([1, 2, 8])):
                data[rng.randrange(20, len(data))] = rng.choice([0, 1, 255, rng.randrange(256)])
            file = io.BytesIO(data[: rng.choice([len(data), rng.randrange(len(data))])])
            heif_is_turned(file)
            with suppress(ImageError):
                assert isinstance(heif_space(file), Space)

    def test_many_parts_of_no_size(self):
        """65,535 extents of no bytes, for each of many items, are not counted one by one."""
        entries = struct.pack(">HHH", 7, 0, 65535) * 65535
        iloc = box(b"iloc", bytes(4), b"\0\0", struct.pack(">H", 65535), entries)
        properties = box(b"ipco", box(b"av1C", bytes(4))), box(b"ipma", bytes(4), b"\0\0\0\1\0\1\1\1")
        meta = box(b"meta", bytes(4), box(b"pitm", bytes(4), b"\0\1"), box(b"iprp", *properties), iloc)
        start = time.process_time()
        assert heif_space(io.BytesIO(meta)) == SRGB
        assert time.process_time() - start < 5


@pytest.mark.skipif(not features.check("avif"), reason="Pillow lacks AVIF")
class TestPictures:
    """Files of another encoder, whose box of color is made unknown."""

    def file(self, primaries: int, transfer: int) -> io.BytesIO:
        samples = np.rint(255 * smooth()).astype(np.uint8)
        codes: Any = {"primaries": primaries, "transfer": transfer, "matrix": 6}
        data = imagecodecs.avif_encode(samples, 100, pixelformat="444", **codes)
        assert data.count(b"colrnclx") == 1
        return io.BytesIO(data.replace(b"colrnclx", b"nonenclx"))

    def test_wide_colors(self):
        stored = load_image(self.file(1, 13)) / 255
        assert np.abs(stored - smooth()).max() < 0.05
        assert np.abs(load_image(self.file(12, 13)) - converted(stored, P3_XY)).max() <= 1

    def test_unspecified_is_srgb(self):
        np.testing.assert_array_equal(load_image(self.file(2, 2)), load_image(self.file(1, 13)))

    @pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
    def test_hdr_is_refused(self, transfer, name):
        with pytest.raises(ImageError, match=rf"HDR \({name}\)"):
            load_image(self.file(9, transfer))
