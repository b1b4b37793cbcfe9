"""Tests of EXIF and XMP in files, beside Pillow and a plain reader of FORMAT.md; damaged and hostile blocks."""

import io
import json
import random
import sys
import time
import tracemalloc
import types
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from reference import parts_file
from test_format import (
    EXAMPLE,
    LIMIT,
    PARTS_EXAMPLE,
    PARTS_PAYLOADS,
    RECORDS_BLOCK,
    RECORDS_EXAMPLE,
    RECORDS_HEAD,
    container,
    corrupt,
    crc,
    forge,
)

from rnncodec import weights
from rnncodec.cli import main
from rnncodec.codec import Codec
from rnncodec.files import load_image, load_photograph, read_header, read_records, save_image, truncate
from rnncodec.files.format import Container, Entry, FormatError, read, write
from rnncodec.files.records import MAX_BLOCK, pack, unpack
from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.weights import load_weights, save_weights

CONFIG = NetworkConfig(bits=4, encoder_channels=(4, 4, 4, 4), decoder_channels=(4, 4, 4, 4, 4))
HOLDING = ["jpg", "png", "webp", "avif", "tif"]
GPS = {1: "N", 2: (48.0, 8.0, 30.5), 3: "E", 4: (11.0, 34.0, 0.25)}
PACKET = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d" dc:title="Käfer"/>'
    "</rdf:RDF></x:xmpmeta>"
)
RECORDS = {"EXIF": RECORDS_BLOCK[12:26], "XMP ": b"<x/>", "note": bytes(300)}


def exif(orientation=6) -> Image.Exif:
    """What a camera says that was held upright: it is to be turned."""
    made = Image.Exif()
    made[271], made[272], made[274], made[282] = "Maker", "Model X", orientation, 72.0
    made.get_ifd(34665).update({33434: (1, 250), 36867: "2026:01:02 03:04:05", 37380: -0.5, 37500: b"private\0"})
    made.get_ifd(34665)[40965] = {1: "R98", 2: b"0100"}
    made.get_ifd(34853).update(GPS)
    return made


def stored() -> np.ndarray:
    """The picture as it is stored, with a red first row and a blue first column."""
    ramp = np.add.outer(np.arange(32) * 3, np.arange(48) * 2)[..., None] + [0, 20, 40]
    ramp[:8], ramp[:, :8] = (255, 0, 0), (0, 0, 255)
    return ramp.astype(np.uint8)


UPRIGHT = np.rot90(stored(), -1)


def camera(format="JPEG", made=None, packet: "str | None" = PACKET % 6, **options) -> bytes:
    """A photograph of a camera, written by Pillow."""
    if packet is not None and format == "PNG":
        (info := PngInfo()).add_itxt("XML:com.adobe.xmp", packet)
        options["pnginfo"] = info
    elif packet is not None:
        options["xmp"] = packet.encode()
    if format == "JPEG":
        options |= {"quality": 100, "subsampling": 0}
    data = (made or exif()).tobytes()
    Image.fromarray(stored()).save(file := io.BytesIO(), format, exif=data, **options)
    return file.getvalue()


def shown(data) -> tuple[dict, "bytes | None"]:
    """What Pillow reads from an image: the tags of EXIF, and XMP."""
    with Image.open(data if isinstance(data, (str, Path)) else io.BytesIO(data)) as image:
        image.load()
        found = image.getexif()
        directory = dict(found.get_ifd(34665))
        tags = {272: found.get(272), 274: found.get(274, 1), "gps": dict(found.get_ifd(34853)), **directory}
        return tags, image.info.get("xmp")


def check_exif(tags):
    assert tags[272] == "Model X"
    assert tags[274] == 1
    assert tags["gps"] == GPS
    assert tags[33434] == (1, 250)
    assert tags[36867] == "2026:01:02 03:04:05"
    assert tags[37380] == -0.5
    assert tags[37500] == b"private\0"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    network = RecurrentCodec(CONFIG)
    torch.nn.init.normal_(network.decoder.output.weight)
    save_weights(folder / "small.safetensors", network, "small", {})
    return folder


@pytest.fixture(scope="module")
def codec(pretrained):
    return Codec(load_weights(pretrained / "small.safetensors"))


@pytest.fixture
def place(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PRETRAINED", pretrained)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(capsys):
    found = capsys.readouterr().err.splitlines()
    assert all(line.startswith("rnncodec: ") and line.isprintable() for line in found)
    return [line for line in found if not line.endswith(": turned upright, as the file says")]


def with_block(block: bytes, data: bytes = EXAMPLE) -> bytes:
    """A file with a block of records, whatever it holds, with right checksums."""
    file = read(data, max_pixels=LIMIT)
    entries = tuple(
        Entry.of(payload, entry.coding, 3) for payload, entry in zip(file.payloads, file.header.entries, strict=True)
    )
    return write(Container(replace(file.header, entries=entries, records=Entry.of(block)), file.payloads, block))


class TestExample:
    """The example of FORMAT.md, which test_format.py compares with the document."""

    def test_plain_reader(self):
        fields, payloads = parts_file(RECORDS_EXAMPLE)
        assert fields["records"] == {"EXIF": bytes.fromhex("4D4D002A00000008000000000000")}
        assert payloads == [(0, b"\xb3\x40"), (0, b"\xf8\0")]

    def test_reader(self):
        header = read_header(RECORDS_EXAMPLE)
        assert (header.version, header.parts, header.maps, header.size, header.raw_length) == (3, 1, False, 83, 2)
        assert header.sizes == (80 - 3 + 5, 87)
        assert header.bpp == (8 * 82 / 200, 8 * 87 / 200)
        assert header.records == Entry(0, 30, 0x609F7EB4)
        assert read_records(RECORDS_EXAMPLE) == {"EXIF": bytes.fromhex("4D4D002A00000008000000000000")}
        assert read(RECORDS_EXAMPLE, max_pixels=200).payloads == (b"\xb3\x40", b"\xf8\0")
        assert write(read(RECORDS_EXAMPLE, max_pixels=200)) == RECORDS_EXAMPLE == with_block(RECORDS_BLOCK)

    def test_truncate(self):
        head = RECORDS_HEAD[:37] + b"\1" + RECORDS_HEAD[38:41] + RECORDS_HEAD[44:]
        assert truncate(RECORDS_EXAMPLE, iterations=1) == forge(head, RECORDS_BLOCK + b"\xb3\x40")
        assert truncate(RECORDS_EXAMPLE, strip=True) == EXAMPLE
        assert truncate(RECORDS_EXAMPLE, iterations=1, strip=True) == truncate(EXAMPLE, iterations=1)
        assert truncate(EXAMPLE, strip=True) == EXAMPLE

    def test_bytes_count_the_block(self):
        assert truncate(RECORDS_EXAMPLE, max_bytes=82) == truncate(RECORDS_EXAMPLE, iterations=1)
        with pytest.raises(FormatError, match="iteration 1 with 30 bytes of records takes 82 bytes, more than 81"):
            truncate(RECORDS_EXAMPLE, max_bytes=81)
        assert truncate(RECORDS_EXAMPLE, max_bytes=44, strip=True) == EXAMPLE
        with pytest.raises(FormatError, match="iteration 1 takes 37 bytes, more than 36"):
            truncate(RECORDS_EXAMPLE, max_bytes=36, strip=True)

    def test_beside_parts_and_maps(self):
        block = pack(RECORDS)
        data = with_block(block, PARTS_EXAMPLE)
        fields, payloads = parts_file(data)
        assert (fields["flags"], fields["records"]) == (3, RECORDS)
        assert [payload for _, payload in payloads] == list(PARTS_PAYLOADS)
        assert read(data, max_pixels=LIMIT).payloads == PARTS_PAYLOADS
        assert truncate(data, iterations=1, strip=True) == truncate(PARTS_EXAMPLE, iterations=1)
        assert truncate(data, iterations=1) == with_block(block, truncate(PARTS_EXAMPLE, iterations=1))

    @pytest.mark.parametrize("length", [*range(53, 83)])
    def test_cut_within_the_block(self, length):
        cut = RECORDS_EXAMPLE[:length]
        assert read(cut, max_pixels=LIMIT).payloads == ()
        assert read(cut, max_pixels=LIMIT).records == b""
        with pytest.raises(FormatError, match="cut within its records and has no complete iteration"):
            read_records(cut)
        for strip in (False, True):
            with pytest.raises(FormatError, match="no complete iteration"):
                truncate(cut, strip=strip)

    @pytest.mark.parametrize("position", range(5, 83))
    def test_every_bit_counts(self, position):
        for bit in range(8):
            data = bytearray(RECORDS_EXAMPLE)
            data[position] ^= 1 << bit
            message = "the records are corrupt" if position >= 53 else r"the header is (corrupt|cut short)"
            for use in (lambda data: read(data, max_pixels=LIMIT), read_records, truncate):
                with pytest.raises(FormatError, match=message):
                    use(bytes(data))
            if position >= 53:
                with pytest.raises(FormatError, match=message):
                    read(bytes(data), max_pixels=LIMIT, iterations=1)
                assert truncate(bytes(data), strip=True) == EXAMPLE  # what is not kept is not looked at

    @pytest.mark.parametrize(
        "fields",
        [
            b"\0" + crc(b""),  # an empty block
            b"\x9e\0" + crc(RECORDS_BLOCK),  # a length in more bytes than it needs
            b"\x81\x80\x40" + bytes(4),  # 2^20 + 1
            b"\xff\xff\xff\xff\x7f" + bytes(4),
            b"\xff\xff\xff\xff\xff" + bytes(4),
        ],
    )
    def test_contradictions(self, fields):
        with pytest.raises(FormatError):
            read_header(forge(RECORDS_HEAD[:44] + fields, RECORDS_BLOCK + EXAMPLE[40:]))

    def test_raw_payloads_have_their_length(self):
        """Other than with parts or maps, where it depends on what was sent."""
        head = RECORDS_HEAD[:37] + b"\1\2" + RECORDS_HEAD[39:41] + RECORDS_HEAD[44:]
        with pytest.raises(FormatError, match="iteration 1 takes 1 bytes, not 2 to 2"):
            read_header(forge(head))

    def test_write_refuses_other_records(self):
        file = read(RECORDS_EXAMPLE, max_pixels=LIMIT)
        for records in (b"", RECORDS_BLOCK + b"\0"):
            with pytest.raises(FormatError, match="the records are not those"):
                write(replace(file, records=records))
        with pytest.raises(FormatError, match="the records are not those"):
            write(replace(read(EXAMPLE, max_pixels=LIMIT), records=RECORDS_BLOCK))


# Blocks that break the rules, and what is said of them.
HOSTILE = {
    "a bomb": (zlib.compress(bytes(2**26), 9), "take more than 1048576 bytes"),
    "just too much": (zlib.compress(b"long" + b"\xfa\xff\x3f" + bytes(MAX_BLOCK - 6)), "take more than"),
    "empty deflate blocks": (b"\x78\x01" + b"\0\0\0\xff\xff" * 200_000 + b"\1\0\0\xff\xff\0\0\0\1", "do not end"),
    "no zlib stream": (b"EXIF\0", "cannot be inflated"),
    "a wrong Adler-32": (RECORDS_BLOCK[:-1] + b"\0", "cannot be inflated"),
    "a dictionary": (b"\x78\x20\0\0\0\1" + RECORDS_BLOCK[2:], "cannot be inflated"),
    "a stream cut short": (RECORDS_BLOCK[:-1], "do not end where they must"),
    "bytes at the end": (RECORDS_BLOCK + b"\0", "do not end where they must"),
    "no records": (zlib.compress(b""), "do not end where they must"),
    "a truncated type": (zlib.compress(b"EXI"), "a record is cut short"),
    "no length": (zlib.compress(b"EXIF"), "a record is cut short"),
    "a truncated length": (zlib.compress(b"EXIF\x80"), "a record is cut short"),
    "a truncated record": (zlib.compress(b"EXIF\5abcd"), "a record is cut short"),
    "a huge length": (zlib.compress(b"EXIF\xff\xff\xff\xff\x7fabcd"), "a record is cut short"),
    "an endless length": (zlib.compress(b"EXIF" + b"\xff" * 1000), "more bytes than it needs"),
    "a length with a byte too many": (zlib.compress(b"EXIF\x83\0abc"), "more bytes than it needs"),
    "a type of other bytes": (zlib.compress(b"\x1b[2J\0"), "four letters, digits or spaces, not '.x1b"),
    "duplicates": (zlib.compress(b"EXIF\0XMP \0EXIF\0"), "there are two records 'EXIF'"),
    "very many": (zlib.compress(b"".join(b"%04d\0" % i for i in range(10_000))), "more than 255 records"),
}


class TestBlock:
    kinds = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 ]{3}", fullmatch=True)

    @given(st.dictionaries(kinds, st.binary(max_size=300), max_size=5))
    @settings(max_examples=50, deadline=None)
    def test_round_trip(self, records):
        block = pack(records)
        assert unpack(block) == records
        assert bool(block) == bool(records)
        assert block == pack(dict(reversed(list(records.items()))))
        if records:
            assert parts_file(with_block(block))[0]["records"] == records

    def test_lengths(self):
        for length in (0, 127, 128, 16383, 16384, MAX_BLOCK - 7):
            assert unpack(pack({"long": bytes(length)})) == {"long": bytes(length)}

    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ({"long": bytes(MAX_BLOCK - 6)}, "1048577 bytes of records are above the limit of 1048576"),
            ({"long": random.Random(0).randbytes(MAX_BLOCK - 7)}, "above the limit"),  # deflated, it is longer
            ({f"{i:04d}": b"" for i in range(256)}, "256 records are above the limit of 255"),
            ({"": b""}, "four letters"),
            ({"EXIF2": b""}, "four letters"),
            ({" XMP": b""}, "four letters"),
            ({"Käse": b""}, "four letters"),
            ({"EXI\n": b""}, "four letters"),
            ({5: b"", "EXIF": b""}, "four letters"),
            ({"EXIF": "text"}, "a record is bytes, not str"),
        ],
    )
    def test_pack_refuses(self, records, message):
        with pytest.raises(FormatError, match=message) as error:
            pack(records)
        assert str(error.value).isprintable()

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile(self, name, place, codec, capsys):
        """The checksum is right: an error of one line for who reads the records; the picture is there without them."""
        block, message = HOSTILE[name]
        picture = codec.encode(stored(), 1)
        if len(block) > MAX_BLOCK:
            with pytest.raises(FormatError, match="records take 1 to 1048576"):
                with_block(block, picture)
            return
        Path("x.rnc").write_bytes(data := with_block(block, picture))
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(FormatError, match=message) as error:
            read_records(data)
        seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert str(error.value).isprintable()
        assert seconds < 1
        assert peak < 4 * MAX_BLOCK
        for command, hint in (
            (["decode", "x.rnc", "x.png"], "; --strip decodes without EXIF and XMP"),
            (["info", "x.rnc"], ""),
        ):
            assert main(command) == 1
            (line,) = lines(capsys)
            assert line == f"rnncodec: error: x.rnc: {error.value}{hint}"
        assert not Path("x.png").exists()
        assert main(["decode", "x.rnc", "x.png", "--strip"]) == 0
        np.testing.assert_array_equal(np.asarray(Image.open("x.png")), np.asarray(codec.decode(picture)))
        assert main(["truncate", "x.rnc", "y.rnc", "--strip"]) == 0
        assert Path("y.rnc").read_bytes() == picture

    def test_a_long_stream_that_gives_nothing(self):
        start = time.perf_counter()
        with pytest.raises(FormatError):
            unpack(b"\x78\x01" + b"\0\0\0\xff\xff" * 200_000)
        assert time.perf_counter() - start < 1


class TestDamage:
    def test_500_damaged_or_cut(self):
        """An error, or a prefix of the file with its records."""
        file = container(70, 33, 16, 32, 3)
        data = with_block(pack(RECORDS), write(file))
        rng, outcomes = random.Random(5), []
        for i in range(500):
            changed = corrupt(data, rng) if i % 2 else data[: rng.randrange(len(data))]
            try:
                found = read(changed, max_pixels=LIMIT)
            except FormatError:
                outcomes.append("error")
                continue
            assert found.payloads == file.payloads[: len(found.payloads)]
            if found.payloads:
                assert read_records(changed) == RECORDS
                assert read_records(truncate(changed)) == RECORDS
                kept = replace(file.header, entries=file.header.entries[: len(found.payloads)])
                assert truncate(changed, strip=True) == write(Container(kept, found.payloads))
            outcomes.append("prefix" if found.payloads else "nothing")
        assert set(outcomes) == {"error", "prefix", "nothing"}
        assert outcomes[1::2].count("error") > 200


class TestCodec:
    @pytest.mark.parametrize("entropy", ["none", "huffman"])
    def test_only_the_block_is_added(self, codec, entropy):
        y, x = np.mgrid[:320, :320] // 2
        ramp = np.stack([y, x, y], -1).astype(np.uint8)
        plain = codec.encode(ramp, 5, entropy=entropy)
        data = codec.encode(ramp, 5, entropy=entropy, records=RECORDS)
        assert (plain[4], data[4]) == ({"none": 1, "huffman": 2}[entropy], 3)
        assert codec.encode(ramp, 5, entropy=entropy, records={}) == plain
        assert truncate(data, strip=True) == plain
        assert read_records(data) == RECORDS
        assert read_records(plain) == {}
        fields, payloads = parts_file(data)
        assert (fields["parts"], fields["flags"], fields["records"]) == (1, 2, RECORDS)
        assert tuple(payload for _, payload in payloads) == read(plain, max_pixels=LIMIT).payloads
        assert len(data) == read_header(data).sizes[-1]
        for t in range(1, 6):
            short = codec.encode(ramp, t, entropy=entropy, records=RECORDS)
            assert truncate(data, iterations=t) == short
            assert truncate(data, max_bytes=len(short)) == short
            np.testing.assert_array_equal(np.asarray(codec.decode(data, t)), np.asarray(codec.decode(plain, t)))

    def test_byte_targets_count_the_block(self, codec):
        data = codec.encode(stored(), 4, records=RECORDS)
        assert codec.encode(stored(), max_bytes=len(data), records=RECORDS) == data
        assert codec.encode(stored(), bpp=8 * len(data) / stored()[..., 0].size, records=RECORDS) == data
        assert codec.encode(stored(), max_bytes=len(data) - 1, records=RECORDS) == truncate(data, iterations=3)
        first = read_header(data).sizes[0]
        with pytest.raises(ValueError, match=f"iteration 1 with .* bytes of records takes {first} bytes, more than"):
            codec.encode(stored(), max_bytes=first - 1, records=RECORDS)

    def test_refuses(self, codec):
        for records in ({"long": bytes(2**21)}, {"x": b""}):
            with pytest.raises(FormatError):
                codec.encode(stored(), 1, records=records)

    def test_damaged_records_are_named_before_anything_is_decoded(self, codec, monkeypatch):
        data = bytearray(codec.encode(stored(), 2, records=RECORDS))
        data[read_header(bytes(data)).size - 1] ^= 1
        monkeypatch.setattr(codec.loop, "decode", None)
        with pytest.raises(FormatError, match=r"^the records are corrupt$"):
            codec.decode(bytes(data), 1)

    def test_cut_within_the_records(self, codec):
        data = codec.encode(stored(), 2, records=RECORDS)
        with pytest.raises(FormatError, match="the file has no complete iteration"):
            codec.decode(data[: read_header(data).size - 1])


class Pipe:
    """Bytes that can be read once."""

    def __init__(self, data):
        self.read = io.BytesIO(data).read

    def seekable(self):
        return False


class TestPhotographs:
    @pytest.mark.parametrize("target", HOLDING)
    def test_a_photograph_on_its_way(self, target, place, codec, capsys):
        """EXIF and XMP of a camera survive encoding, shortening and decoding; the picture is upright."""
        Path("photo.jpg").write_bytes(camera())
        assert main(["encode", "photo.jpg", "--iterations", "4"]) == 0
        assert main(["truncate", "photo.rnc", "short.rnc", "--iterations", "3"]) == 0
        assert main(["decode", "short.rnc", f"decoded.{target}"]) == 0
        assert lines(capsys) == []
        tags, packet = shown(f"decoded.{target}")
        check_exif(tags)
        assert packet == (PACKET % 1).encode()
        expected = codec.decode(codec.encode(load_image("photo.jpg"), 3))
        assert expected.size == (32, 48)
        found = load_image(f"decoded.{target}")
        assert np.abs(found.astype(int) - np.asarray(expected)).mean() < (6 if target in ("jpg", "avif") else 1e-9)

    @pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
    @pytest.mark.parametrize("target", HOLDING)
    def test_from_any_format_to_any_other(self, source, target):
        made = exif()
        if source == "TIFF":  # whose directory holds XMP, too
            made.load(exif().tobytes())
            made[700] = (PACKET % 6).encode()
        data = camera(source, made, None if source == "TIFF" else PACKET % 6)
        pixels, records = load_photograph(io.BytesIO(data))
        np.testing.assert_array_equal(pixels, load_image(io.BytesIO(data)))
        assert np.abs(pixels.astype(int) - UPRIGHT).mean() < 12
        save_image(pixels, file := io.BytesIO(), target, records)
        tags, packet = shown(file.getvalue())
        check_exif(tags)
        assert packet is not None
        assert "Käfer".encode() in packet
        assert b'tiff:Orientation="6"' not in packet
        assert np.abs(load_image(file).astype(int) - pixels).mean() < 6

    def test_without_orientation_in_exif(self):
        """Pillow then takes that of XMP, in which it must not stay."""
        made = exif()
        del made[274]
        for packet in (PACKET, "<tiff:Orientation>%d</tiff:Orientation>"):
            pixels, records = load_photograph(io.BytesIO(camera(made=made, packet=packet % 6)))
            assert pixels.shape == (48, 32, 3)
            assert records["XMP "] == (packet % 1).encode()
            save_image(pixels, file := io.BytesIO(), "png", records)
            assert load_image(file).shape == pixels.shape

    def test_thumbnails_are_left_out(self):
        """Pillow writes no thumbnails; this one is appended to the first directory by hand."""
        main_directory = b"\0\1" + bytes.fromhex("0110 0002 00000004") + b"Cam\0"
        thumbnail = b"\xff\xd8" + b"T" * 500 + b"\xff\xd9"
        second = b"\0\2" + bytes.fromhex("0201 0004 00000001 00000038") + bytes.fromhex("0202 0004 00000001 000001F8")
        data = b"MM\0*\0\0\0\x08" + main_directory + (26).to_bytes(4, "big") + second + bytes(4)
        assert len(data) == 56
        (made := Image.Exif()).load(data + thumbnail)
        assert made.get_ifd(ExifTags.IFD.IFD1) == {513: 56, 514: 504}
        Image.fromarray(stored()).save(file := io.BytesIO(), "JPEG", exif=b"Exif\0\0" + data + thumbnail)
        _, records = load_photograph(file)
        assert b"TTT" in file.getvalue()
        assert b"TTT" not in records["EXIF"]
        (found := Image.Exif()).load(records["EXIF"])
        assert dict(found) == {272: "Cam"}

    def test_strip(self, place, codec, capsys):
        Path("photo.jpg").write_bytes(camera())
        assert main(["encode", "photo.jpg", "kept.rnc", "--iterations", "2"]) == 0
        assert main(["encode", "photo.jpg", "bare.rnc", "--iterations", "2", "--strip"]) == 0
        bare = Path("bare.rnc").read_bytes()
        assert bare == codec.encode(load_image("photo.jpg"), 2)
        assert main(["truncate", "kept.rnc", "stripped.rnc", "--strip"]) == 0
        assert Path("stripped.rnc").read_bytes() == bare
        assert main(["decode", "kept.rnc", "stripped.jpg", "--strip"]) == 0
        assert main(["decode", "bare.rnc", "bare.jpg"]) == 0
        assert Path("stripped.jpg").read_bytes() == Path("bare.jpg").read_bytes()
        tags, packet = shown("bare.jpg")
        assert (tags, packet) == ({272: None, 274: 1, "gps": {}}, None)
        assert lines(capsys) == []

    def test_formats_without_a_place(self, place, capsys):
        Path("photo.jpg").write_bytes(camera())
        assert main(["encode", "photo.jpg", "x.rnc", "--iterations", "1"]) == 0
        for suffix, name in (("bmp", "BMP"), ("ppm", "PPM"), ("jp2", "JPEG2000")):
            assert main(["decode", "x.rnc", f"x.{suffix}"]) == 0
            assert lines(capsys) == [f"rnncodec: warning: x.rnc: EXIF and XMP left out: no place in {name} files"]
            assert load_image(f"x.{suffix}").shape == (48, 32, 3)
            assert main(["decode", "x.rnc", f"x.{suffix}", "--strip"]) == 0
            assert lines(capsys) == []

    def test_folders_and_pipes(self, place, codec, monkeypatch, capsys):
        """Each photograph of a folder has its own records; a pipe is read once."""
        Path("in").mkdir()
        for name in ("a", "b"):
            made = exif()
            made[272] = f"Model {name}"
            Path(f"in/{name}.jpg").write_bytes(camera(made=made))
        Image.fromarray(stored()).save("in/plain.png")
        assert main(["encode", "in", "--output-dir", "out", "--iterations", "1"]) == 0
        assert main(["decode", "out", "--format", "jpg"]) == 0
        assert [shown(f"out/{name}.jpg")[0][272] for name in ("a", "b", "plain")] == ["Model a", "Model b", None]
        assert Path("out/plain.rnc").read_bytes() == codec.encode(stored(), 1)
        output = io.TextIOWrapper(io.BytesIO(), write_through=True)
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=Pipe(Path("in/a.jpg").read_bytes())))
        with monkeypatch.context() as context:
            context.setattr(sys, "stdout", output)
            assert main(["encode", "-", "--iterations", "1"]) == 0
        assert output.buffer.getvalue() == Path("out/a.rnc").read_bytes()
        assert lines(capsys) == []

    def test_info(self, place, codec, capsys):
        data = codec.encode(stored(), 2, records=RECORDS)
        block = len(pack(RECORDS))
        Path("x.rnc").write_bytes(data)
        Path("cut.rnc").write_bytes(data[: read_header(data).size - 1])
        assert main(["info", "x.rnc"]) == 0
        assert (
            f"records EXIF 14 bytes, XMP 4 bytes, note 300 bytes; {block} bytes in the file\n"
            in capsys.readouterr().out
        )
        assert main(["info", "cut.rnc"]) == 0
        text = capsys.readouterr().out
        assert f"records missing; {block} bytes in the file\n" in text
        assert "0 of 2 iterations complete" in text
        assert main(["info", "x.rnc", "cut.rnc", "--json"]) == 0
        whole, cut = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert (whole["version"], whole["records"]) == (3, {"EXIF": 14, "XMP ": 4, "note": 300})
        assert (whole["records_bytes"], cut["records_bytes"], cut["records"]) == (block, block, {})
        assert whole["sizes"][-1] == len(data)


class TestLeftOut:
    """Records never cost the picture."""

    def one(self, data: bytes) -> tuple[dict, list[str]]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pixels, records = load_photograph(io.BytesIO(data))
        np.testing.assert_array_equal(pixels, load_image(io.BytesIO(data)))
        found = [str(warning.message) for warning in said]
        assert all(message.isprintable() for message in found)
        assert all(warning.filename == __file__ for warning in said)
        return records, found

    def png(self, **options) -> bytes:
        Image.fromarray(stored()).save(file := io.BytesIO(), "PNG", **options)
        return file.getvalue()

    @pytest.mark.parametrize(
        "data", [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\0\0\0\x01"]
    )
    def test_broken_exif(self, data):
        records, said = self.one(self.png(exif=data))
        assert records == {}
        assert len(said) == 1
        assert said[0].startswith("EXIF left out: ")

    @pytest.mark.parametrize("data", [b"", b"Exif\0\0", b"MM\0*\0\0\0\x08\0\0\0\0\0\0"])
    def test_empty_exif(self, data):
        assert self.one(self.png(exif=data)) == ({}, [])

    def test_too_large(self):
        (info := PngInfo()).add_itxt("XML:com.adobe.xmp", "<x>" * 400_000)
        records, said = self.one(self.png(pnginfo=info, exif=exif().tobytes()))
        assert list(records) == ["EXIF"]
        size = len(records["EXIF"]) + 6 + 1_200_000 + 7
        assert said == [f"XMP left out: {size} bytes of records are above the limit of 1048576"]
        made = exif()
        made.get_ifd(34665)[37500] = bytes(2**21)
        records, said = self.one(self.png(exif=made.tobytes()))
        assert records == {}
        assert len(said) == 1
        assert "above the limit" in said[0]

    def test_command_line(self, place, codec, capsys):
        Path("broken.png").write_bytes(self.png(exif=b"garbage"))
        assert main(["encode", "broken.png", "--iterations", "1"]) == 0
        (line,) = lines(capsys)
        assert line.startswith("rnncodec: warning: broken.png: EXIF left out: ")
        assert Path("broken.rnc").read_bytes() == codec.encode(stored(), 1)
        assert main(["encode", "broken.png", "--iterations", "1", "--strip", "--force"]) == 0
        assert lines(capsys) == []

    @pytest.mark.parametrize("suffix", HOLDING)
    def test_random_exif(self, suffix):
        """Reading and writing end with a picture, whatever the records hold."""
        rng, whole = random.Random(6), exif(1).tobytes()[6:]
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(rng.choice([1, 4, 20])):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save_image(stored(), file := io.BytesIO(), suffix, {"EXIF": bytes(damaged), "XMP ": rng.randbytes(9)})
                pixels, records = load_photograph(file)
                assert sorted(pixels.shape) == [3, 32, 48]
                unpack(pack(records))

    def test_what_jpeg_cannot_hold(self):
        with pytest.warns(UserWarning, match="left out") as said:
            save_image(
                stored(), file := io.BytesIO(), "jpg", {"EXIF": bytes(70_000), "XMP ": b"x" * 70_000, "note": b""}
            )
        assert [str(warning.message) for warning in said] == [
            "EXIF left out: EXIF data is too long",
            "XMP left out: XMP data is too long",
        ]
        assert load_image(file).shape == stored().shape

    def test_tags_that_say_how_pixels_are_stored(self):
        """They must not reach a TIFF file, where they would count."""
        made = exif(1)
        made[256], made[257], made[262], made[278], made[317], made[277] = 5, 5, 0, 1, 2, 1
        data = {"EXIF": made.tobytes()[6:]}
        save_image(stored(), file := io.BytesIO(), "tif", data)
        np.testing.assert_array_equal(load_image(file), stored())
        check_exif(shown(file.getvalue())[0])
        records, said = self.one(file.getvalue())
        assert said == []
        (found := Image.Exif()).load(records["EXIF"])
        assert sorted(found) == [271, 272, 282, 34665, 34853]


@pytest.mark.parametrize(
    ("packet", "kept"),
    [
        ((PACKET % 6).encode("utf-16"), (PACKET % 1).encode()),
        (b"\xfe\xff" + (PACKET % 6).encode("utf-16-be"), (PACKET % 1).encode()),
        (b"\xff\xfe\0ba", None),
        (b"<x:xmpmeta>\xe9</x:xmpmeta>", None),
    ],
)
def test_xmp_becomes_utf_8(packet, kept):
    """As FORMAT.md says; what is in no encoding that XMP may have is left out."""
    Image.fromarray(stored()).save(file := io.BytesIO(), "WEBP", xmp=packet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, records = load_photograph(file)
    assert records.get("XMP ") == kept
    assert len(caught) == (kept is None)
    assert all("XMP left out" in str(warning.message) for warning in caught)
