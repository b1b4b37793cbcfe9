"""Tests of the .rnc container against FORMAT.md, with bytes made by hand and with malicious files."""

import random
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import least_bytes

from rnncodec.cli import main
from rnncodec.files.fields import pack_bits, unpack_bits
from rnncodec.files.format import (
    Container,
    Entry,
    FormatError,
    Header,
    read,
    read_header,
    truncate,
    write,
    write_header,
)
from rnncodec.jobs import HEADER_BYTES

FINGERPRINT = bytes.fromhex("0123456789ABCDEF")
LIMIT = 2**28

# 20x10 pixels, stride 16, 5 bits, two iterations: written down by hand from FORMAT.md, checksums by `crc` below.
EXAMPLE = bytes.fromhex(
    "8F524E43 01 0014 000A 0123456789ABCDEF 10 05 05 736D616C6C 02"  # 26 bytes
    "00 F8EDAE14  00 9DBC794A  FC34DD59"
    "B340 F800"
)
EXAMPLE_BITS = (
    [[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]],  # one row of two locations of five bits
    [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
)


def crc(data: bytes) -> bytes:
    """CRC-32 bit by bit, from its polynomial."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
    return (register ^ 0xFFFFFFFF).to_bytes(4, "big")


# 20x10 pixels, stride 1, 4 bits, all of them 1: the code book of a single symbol, then 200 times its code 0.
CODED_PAYLOAD = bytes(7) + b"\1" + bytes(25)
CODED_HEAD = (
    bytes.fromhex("8F524E43 02 0014 000A 0123456789ABCDEF 0000000000000000 01 04 05 736D616C6C 01 02 21")
    + crc(CODED_PAYLOAD)
)  # fmt: skip
CODED_EXAMPLE = CODED_HEAD + crc(CODED_HEAD) + CODED_PAYLOAD


def crc16(data: bytes) -> bytes:
    """CRC-16 bit by bit, from its polynomial."""
    register = 0xFFFF
    for byte in data:
        register ^= byte << 8
        for _ in range(8):
            register = (register << 1 ^ (0x1021 if register & 0x8000 else 0)) & 0xFFFF
    return register.to_bytes(2, "big")


# 40x10 pixels, stride 16, 4 bits in two parts, stop maps: four raw payloads.
PARTS_PAYLOADS = tuple(bytes.fromhex(payload) for payload in ("B4", "D8", "0C80", "E0"))
PARTS_FIXED = bytes.fromhex("8F524E43 03 0028 000A 0123456789ABCDEF 0000000000000000 10 04 05 736D616C6C 00 02 01")
PARTS_HEAD = PARTS_FIXED + b"\0\4" + b"".join(bytes([2 * len(payload)]) + crc16(payload) for payload in PARTS_PAYLOADS)
PARTS_EXAMPLE = PARTS_HEAD + crc(PARTS_HEAD) + b"".join(PARTS_PAYLOADS)

# The file EXAMPLE with one record, an EXIF directory that is empty, in a zlib stream that is not compressed.
RECORDS_PLAIN = b"EXIF\x0e" + bytes.fromhex("4D4D002A00000008 000000000000")
RECORDS_BLOCK = bytes.fromhex("7801 01 1300 ECFF") + RECORDS_PLAIN + bytes.fromhex("1F920207")
RECORDS_HEAD = (
    bytes.fromhex("8F524E43 03 0014 000A 0123456789ABCDEF 0000000000000000 10 05 05 736D616C6C 00 01 02 0002")
    + b"".join(b"\4" + crc16(payload) for payload in (EXAMPLE[40:42], EXAMPLE[42:]))
    + bytes([len(RECORDS_BLOCK)]) + crc(RECORDS_BLOCK)
)  # fmt: skip
RECORDS_EXAMPLE = RECORDS_HEAD + crc(RECORDS_HEAD) + RECORDS_BLOCK + EXAMPLE[40:]


def container(width=20, height=10, stride=16, bits=5, iterations=2, seed=0, weights="small") -> Container:
    """A file of random bits."""
    rng = np.random.default_rng(seed)
    rows, cols = -(-height // stride), -(-width // stride)
    payloads = tuple(pack_bits(rng.random((bits, rows, cols)) < 0.5) for _ in range(iterations))
    entries = tuple(Entry.of(payload) for payload in payloads)
    return Container(Header(width, height, FINGERPRINT, weights, stride, bits, entries), payloads)


def forge(head: bytes, payloads: bytes = b"") -> bytes:
    """A header with the right checksum, whatever it says."""
    return head + crc(head) + payloads


def fixed(width=20, height=10, stride=16, bits=5, name=b"small", version=1, context=bytes(8)) -> bytes:
    """All fields before the number of iterations."""
    sizes = width.to_bytes(2, "big") + height.to_bytes(2, "big")
    fingerprints = FINGERPRINT + (context if version == 2 else b"")
    return b"\x8fRNC" + bytes([version]) + sizes + fingerprints + bytes([stride, bits, len(name)]) + name


class TestExample:
    def test_reference_checksum(self):
        assert crc(b"123456789").hex() == "cbf43926"
        assert crc16(b"123456789").hex() == "29b1"
        assert crc(bytes.fromhex("B340")).hex() == "f8edae14"
        assert crc(EXAMPLE[:36]) == EXAMPLE[36:40]

    def test_document_shows_these_bytes(self):
        text = (Path(__file__).parents[1] / "FORMAT.md").read_text("utf-8")
        blocks = re.findall(r"```hex\n(.*?)```", text, re.S)
        documented = ["".join(re.split(r" {2,}", line)[0] for line in block.splitlines()) for block in blocks]
        assert [bytes.fromhex(block) for block in documented] == [
            EXAMPLE,
            CODED_EXAMPLE,
            PARTS_EXAMPLE,
            RECORDS_EXAMPLE,
        ]

    def test_write(self):
        payloads = tuple(pack_bits(np.array([bits], bool).transpose(2, 0, 1)) for bits in EXAMPLE_BITS)
        header = Header(20, 10, FINGERPRINT, "small", 16, 5, tuple(map(Entry.of, payloads)))
        assert write(Container(header, payloads)) == EXAMPLE
        assert (header.rows, header.cols, header.raw_length, header.size) == (1, 2, 2, 40)
        assert header.sizes == (37, 44)
        assert header.bpp == (8 * 37 / 200, 8 * 44 / 200)

    def test_read(self):
        header, payloads = (file := read(EXAMPLE, max_pixels=200)).header, file.payloads
        assert (header.width, header.height, header.stride, header.bits) == (20, 10, 16, 5)
        assert (header.weights, header.fingerprint) == ("small", FINGERPRINT)
        assert header.entries == (Entry(0, 2, 0xF8EDAE14), Entry(0, 2, 0x9DBC794A))
        for payload, bits in zip(payloads, EXAMPLE_BITS, strict=True):
            assert unpack_bits(payload, 5, 1, 2).astype(int).transpose(1, 2, 0).tolist() == [bits]

    def test_truncate(self):
        head = EXAMPLE[:25] + bytes.fromhex("01 00F8EDAE14")
        assert truncate(EXAMPLE, iterations=1) == head + crc(head) + bytes.fromhex("B340")


class TestBits:
    def test_order(self):
        bits = np.zeros((3, 2, 2), bool)  # 12 bits: location-major, rows then columns
        bits[2, 0, 0] = bits[0, 0, 1] = bits[1, 1, 0] = bits[2, 1, 1] = True
        assert pack_bits(bits) == bytes([0b00110001, 0b00010000])

    @given(st.data())
    @settings(max_examples=50, deadline=None)
    def test_round_trip(self, data):
        shape = data.draw(st.tuples(*[st.integers(1, 40)] * 3))
        bits = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < 0.5
        payload = pack_bits(bits)
        text = "".join(
            str(int(bits[b, y, x])) for y in range(shape[1]) for x in range(shape[2]) for b in range(shape[0])
        )
        assert payload == int(text.ljust(8 * len(payload), "0"), 2).to_bytes(-(-len(text) // 8), "big")
        np.testing.assert_array_equal(unpack_bits(payload, *shape), bits)

    @pytest.mark.parametrize("payload", [b"", b"\x00", b"\x00\x00\x00", b"\xff\xff"])
    def test_refuses(self, payload):
        with pytest.raises(FormatError):
            unpack_bits(payload, 5, 1, 2)  # two bytes, the last six bits zero


class TestRoundTrip:
    @given(
        st.integers(1, 300),
        st.integers(1, 300),
        st.sampled_from([1, 8, 16, 32, 255]),
        st.sampled_from([1, 7, 8, 32, 255]),
        st.integers(1, 4),
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", fullmatch=True),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_geometry(self, width, height, stride, bits, iterations, weights):
        file = container(width, height, stride, bits, iterations, weights=weights)
        data = write(file)
        assert read(data, max_pixels=width * height) == file
        locations = -(-width // stride) * -(-height // stride)
        raw = -(-locations * bits // 8)
        assert len(data) == 25 + len(weights) + iterations * (5 + raw)
        assert file.header.sizes[-1] == len(data)

    def test_bit_rate_of_multiples_of_16_is_an_eighth(self):
        header = container(768, 512, 16, 32, 16).header
        assert all(it.length * 8 == 768 * 512 * 0.125 for it in header.entries)

    def test_extremes(self):
        file = container(65535, 1, 255, 255, 255, weights="x" * 32)
        data = write(file)
        assert read(data, max_pixels=LIMIT) == file
        assert file.header.sizes == tuple(57 + n * (5 + 8192) for n in range(1, 256))  # 257 locations of 255 bits

    @pytest.mark.parametrize(
        "change",
        [
            {"width": 0},
            {"height": 65536},
            {"stride": 256},
            {"bits": 0},
            {"fingerprint": b"short"},
            {"weights": ""},
            {"weights": "x" * 33},
            {"weights": "kl\u00fcver"},
            {"weights": "bell\a"},
            {"weights": "../small"},
            {"weights": "small\n"},
            {"entries": ()},
            {"entries": (Entry(0, 2, 0),) * 256},
            {"entries": (Entry(0, 1, 0),)},
            {"entries": (Entry(0, 3, 0),)},
            {"entries": (Entry(1, 3, 0),)},
            {"entries": (Entry(1, -1, 0),)},
            {"entries": (Entry(256, 2, 0),)},
            {"entries": (Entry(0, 2, 2**32),)},
        ],
    )
    def test_header_refuses(self, change):
        with pytest.raises(FormatError) as error:
            replace(container().header, **change)
        assert str(error.value).isprintable()

    def test_write_refuses_other_payloads(self):
        file = container()
        for payloads in (file.payloads[:1], file.payloads[::-1], (*file.payloads, b"\0\0"), ()):
            with pytest.raises(FormatError, match="not those"):
                write(Container(file.header, payloads))


class TestCodedPayloads:
    """Payloads of a coder this version does not have: their length is in the header, and they can be shortened."""

    HEAD = fixed(bits=255, version=2) + b"\3" + b"\0" + crc(bytes(64)) + b"\7\3" + crc(b"abc") + b"\7\1" + crc(b"d")
    DATA = forge(HEAD, bytes(64) + b"abcd")  # 2 locations of 255 bits: 64 raw bytes, lengths take one byte

    def test_read_header(self):
        header = read_header(self.DATA)
        assert [(it.coding, it.length) for it in header.entries] == [(0, 64), (7, 3), (7, 1)]
        assert header.size == len(self.HEAD) + 4
        assert header.sizes == (30 + 5 + 64, 38 + 5 + 6 + 64 + 3, len(self.DATA))  # the first is of version 1

    def test_wide_lengths(self):
        head = fixed(255, 255, 1, 255, version=2)
        head += b"\x01" + b"\7\x00\x00\x03" + crc(b"abc")  # raw: 2072672 bytes, 3 to write
        header = read_header(forge(head))
        assert (header.raw_length, header.entries[0].length) == (2072672, 3)
        assert write(Container(header, (b"abc",))) == forge(head, b"abc")

    def test_read_needs_a_newer_version(self):
        with pytest.raises(FormatError, match="coding 7 of iteration 2 needs a newer version"):
            read(self.DATA, max_pixels=LIMIT)
        assert read(self.DATA, max_pixels=LIMIT, iterations=1).payloads == (bytes(64),)

    def test_truncate(self):
        head = self.HEAD[:33] + b"\x02" + self.HEAD[34:-6]
        assert truncate(self.DATA, iterations=2) == forge(head, bytes(64) + b"abc")
        assert truncate(self.DATA, iterations=3) == self.DATA
        raw = forge(fixed(bits=255) + b"\1\0" + crc(bytes(64)), bytes(64))
        assert truncate(self.DATA, iterations=1) == raw  # what needs no second version has none

    def test_context_model_is_named_where_it_is_needed(self):
        entries = b"\2" + b"\0" + crc(bytes(64)) + b"\1\3" + crc(b"abc")
        data = forge(fixed(bits=255, version=2, context=b"contexts") + entries, bytes(64) + b"abc")
        assert read_header(data).context == b"contexts"
        assert read_header(truncate(data, iterations=1)).context == bytes(8)
        assert truncate(data, iterations=2) == data

    @pytest.mark.parametrize(
        ("version", "context", "entries"),
        [
            (1, b"", b"\1" + b"\2\3" + crc(b"abc")),  # coded
            (2, bytes(8), b"\1" + b"\0" + crc(bytes(64))),  # raw
            (2, b"contexts", b"\1" + b"\2\3" + crc(b"abc")),  # a model that is not used
            (2, bytes(8), b"\1" + b"\1\3" + crc(b"abc")),  # a model that is not named
            (2, bytes(8), b"\2" + b"\2\3" + crc(b"abc") + b"\3\3" + crc(b"abc")),  # two coders
            (2, bytes(8), b"\1" + b"\2\0" + crc(b"")),  # nothing
        ],
    )
    def test_contradictions(self, version, context, entries):
        with pytest.raises(FormatError):
            read_header(forge(fixed(bits=255, version=version, context=context) + entries))


def forge3(parts=2, flags=1, coding=0, count=4, entries=None, context=bytes(8), bits=4, payloads=b"") -> bytes:
    """A file of version 3 with right checksums, whatever it says."""
    head = PARTS_FIXED[:17] + context + bytes([16, bits]) + PARTS_FIXED[27:33] + bytes([coding, parts, flags])
    listed = PARTS_HEAD[len(PARTS_FIXED) + 2 :] if entries is None else entries
    return forge(head + count.to_bytes(2, "big") + listed, payloads)


class TestParts:
    """Version 3: iterations in parts, and stop maps."""

    def test_forged_header_is_that_of_the_example(self):
        assert forge3(payloads=b"".join(PARTS_PAYLOADS)) == PARTS_EXAMPLE

    def test_write(self):
        entries = tuple(Entry.of(payload, version=3) for payload in PARTS_PAYLOADS)
        header = Header(40, 10, FINGERPRINT, "small", 16, 4, entries, parts=2, maps=True)
        assert write(Container(header, PARTS_PAYLOADS)) == PARTS_EXAMPLE
        assert (header.version, header.rows, header.cols, header.raw_length, header.size) == (3, 1, 3, 2, 54)
        assert header.sizes == (46, 50, 55, 59)
        assert (header.iterations, header.ends) == (2, (2, 4))

    def test_read(self):
        header, payloads = (file := read(PARTS_EXAMPLE, max_pixels=400)).header, file.payloads
        assert (header.width, header.height, header.stride, header.bits) == (40, 10, 16, 4)
        assert (header.parts, header.maps, header.context) == (2, True, bytes(8))
        assert [(entry.coding, entry.length) for entry in header.entries] == [(0, 1), (0, 1), (0, 2), (0, 1)]
        assert [entry.checksum for entry in header.entries] == [0x06AF, 0xAB85, 0xC9EA, 0x1CDE]
        assert payloads == PARTS_PAYLOADS
        assert read(PARTS_EXAMPLE + b"end", max_pixels=400, iterations=1).payloads == PARTS_PAYLOADS[:2]

    def test_info(self, tmp_path, capsys):
        """A file that ends within an iteration is whole; one that was cut is not."""
        payloads = tuple(bytes([i]) * length for i, length in enumerate((1, 1, 2)))
        entries = tuple(Entry.of(payload, coding, 3) for payload, coding in zip(payloads, (1, 1, 1), strict=True))
        header = Header(40, 10, FINGERPRINT, "small", 16, 8, entries, bytes([1] * 8), parts=2)
        data = write(Container(header, payloads))
        for size, there in ((len(data), "1.5 of 1.5"), (len(data) - 1, "1 of 1.5")):
            (tmp_path / "a.rnc").write_bytes(data[:size])
            assert main(["info", str(tmp_path / "a.rnc")]) == 0
            out = capsys.readouterr().out
            assert f"{there} iterations complete" in out
            rows = [line.strip("│ ").split() for line in out.splitlines() if line.startswith("│")]
            # Three locations of 8 bits are 12 bits for each part, which takes two bytes.
            assert [row[6] for row in rows] == ["50.0%", "100.0%"]

    @pytest.mark.parametrize(("kept", "size", "iterations"), [(1, 46, 1), (2, 50, 1), (3, 55, 2), (4, 59, 2)])
    def test_truncate(self, kept, size, iterations):
        short = forge3(count=kept, entries=PARTS_HEAD[38 : 38 + 3 * kept], payloads=b"".join(PARTS_PAYLOADS[:kept]))
        assert len(short) == size
        assert truncate(PARTS_EXAMPLE, max_bytes=size) == truncate(PARTS_EXAMPLE, max_bytes=size + 3) == short
        assert truncate(PARTS_EXAMPLE[: 54 + size - 42 - 3 * kept]) == short
        assert read_header(short).iterations == iterations
        assert read_header(short).ends == ((kept,) if iterations == 1 else (2, kept))
        if kept % 2 == 0:
            assert truncate(PARTS_EXAMPLE, iterations=kept // 2) == short

    def test_what_cannot_be_kept(self):
        with pytest.raises(FormatError, match="cannot keep 2 iterations of 1"):
            truncate(PARTS_EXAMPLE[:-1], iterations=2)
        with pytest.raises(FormatError, match="iteration 1, part 1 takes 46 bytes, more than 45"):
            truncate(PARTS_EXAMPLE, max_bytes=45)
        with pytest.raises(FormatError, match="no complete part of an iteration"):
            truncate(PARTS_EXAMPLE[:54])

    def test_coding_and_context_model_are_named_where_they_are_needed(self):
        """Lengths of three, one and two bytes; without the coded payloads, no context model."""
        width = b"\x40\x00"  # 1024 locations of 255 / 3 bits: 10,880 bytes, and with flags at most 11,009
        payloads = bytes(10880), bytes(63), bytes(8191)
        head = bytearray(forge3(3, 1, 1, 3, b"", b"contexts", 255)[:-4])
        head[5:7] = width
        entries = b"\x80\xaa\x01" + crc16(payloads[0]) + b"\x7f" + crc16(payloads[1]) + b"\xff\x7f" + crc16(payloads[2])
        data = forge(bytes(head) + entries, b"".join(payloads))
        header = read_header(data)
        assert [(entry.coding, entry.length) for entry in header.entries] == [(0, 10880), (1, 63), (1, 8191)]
        assert (header.context, header.raw_length) == (b"contexts", 11009)
        assert write(Container(header, payloads)) == data
        short = truncate(data, max_bytes=header.sizes[1] - 1)
        assert (len(short), read_header(short).context) == (header.sizes[0], bytes(8))
        assert short[33] == 0

    @pytest.mark.parametrize(
        "header",
        [
            {"parts": 0},
            {"parts": 3},
            {"parts": 17, "bits": 17},
            {"flags": 2},
            {"flags": 3},
            {"flags": 5},
            {"parts": 1, "flags": 0},
            {"count": 0, "entries": b""},
            {"count": 511, "entries": b"\2\x06\xaf" * 511},
            {"count": 5000, "entries": b"\2\x06\xaf" * 5000},
            {"count": 5},
            {"coding": 1},  # of nothing
            {"context": b"contexts"},
            {"coding": 1, "count": 1, "entries": b"\3\x06\xaf"},  # by a model that is not named
            {"coding": 2, "count": 1, "entries": b"\3\x06\xaf", "context": b"contexts"},
            {"coding": 0, "count": 1, "entries": b"\3\x06\xaf"},
            {"count": 1, "entries": b"\0\xff\xff"},  # nothing
            {"count": 1, "entries": b"\6" + crc16(bytes(3))},  # more than raw
            {"count": 1, "entries": b"\x82\0\x06\xaf"},  # in more bytes than it needs
            {"count": 1, "entries": b"\x82\x80\x80\x80\x80\0\x06\xaf"},
            {"count": 1, "entries": b"\xff\xff\xff\xff\xff\x06\xaf"},
        ],
    )
    def test_contradictions(self, header):
        with pytest.raises(FormatError) as error:
            read_header(forge3(**header) + bytes(100))
        assert str(error.value).isprintable()

    @pytest.mark.parametrize(
        "change",
        [
            {"parts": 0},
            {"parts": 3},
            {"entries": ()},
            {"entries": (Entry(0, 1, 0),) * 511},
            {"entries": (Entry(0, 0, 0),)},
            {"entries": (Entry(0, 3, 0),)},
            {"entries": (Entry(0, 1, 2**16),)},
            {"width": 65535, "height": 65535, "stride": 1, "bits": 254, "entries": (Entry(0, 2**34, 0),)},
        ],
    )
    def test_header_refuses(self, change):
        with pytest.raises(FormatError):
            replace(read_header(PARTS_EXAMPLE), **change)

    def test_longest_header(self):
        """It is that of the most payloads, as long as they can be."""
        entries = (Entry(0, 65535**2 * 16 // 8, 0),) * (255 * 16)
        header = Header(65535, 65535, FINGERPRINT, "x" * 32, 1, 240, entries, parts=16, maps=True)
        assert read_header(write_header(header)) == header
        assert len(write_header(header)) == header.size == 37 + 32 + 255 * 16 * 7 == 28629
        longest = write_header(replace(header, records=Entry(0, 2**20, 0)))
        assert len(longest) == 28629 + 3 + 4 < HEADER_BYTES

    @pytest.mark.parametrize("length", range(1, 54))
    def test_header_cut_short(self, length):
        with pytest.raises(FormatError, match="header is cut short"):
            read(PARTS_EXAMPLE[:length], max_pixels=LIMIT)

    @pytest.mark.parametrize("position", range(5, 54))
    def test_every_bit_of_the_header_counts(self, position):
        for bit in range(8):
            data = bytearray(PARTS_EXAMPLE)
            data[position] ^= 1 << bit
            with pytest.raises(FormatError, match=r"header is (corrupt|cut short)"):
                read(bytes(data), max_pixels=LIMIT)

    def test_corrupt_payload_is_named_unless_less_is_asked_for(self):
        data = bytearray(PARTS_EXAMPLE)
        data[-2] ^= 1
        with pytest.raises(FormatError, match=r"^iteration 2, part 1 is corrupt$"):
            read(bytes(data), max_pixels=LIMIT)
        assert read(bytes(data), max_pixels=LIMIT, iterations=1).payloads == PARTS_PAYLOADS[:2]
        assert truncate(bytes(data), iterations=1) == truncate(PARTS_EXAMPLE, iterations=1)

    @given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([1, 2, 4, 16]), st.booleans(), st.integers(1, 40))
    @settings(max_examples=60, deadline=None)
    def test_any_geometry(self, width, height, parts, maps, count):
        rng = np.random.default_rng(count)
        locations = -(-width // 16) * -(-height // 16)
        most = -(-(locations * (32 // parts + maps) + 4 * maps) // 8)
        version = 3 if parts > 1 or maps else 2
        codings = rng.integers(0, 2, count) if version == 3 else np.ones(count, int)
        least = [least_bytes(int(coding), locations, 32, n, parts, maps) for n, coding in enumerate(codings)]
        payloads = tuple(rng.bytes(int(rng.integers(length, most + 1))) for length in least)
        context = b"contexts" if codings.any() else bytes(8)
        entries = tuple(Entry.of(*pair, version) for pair in zip(payloads, codings.tolist(), strict=True))
        header = Header(width, height, FINGERPRINT, "small", 16, 32, entries, context, parts, maps)
        file = Container(header, payloads)
        data = write(file)
        assert data[4] == version
        assert read(data, max_pixels=width * height) == file
        assert header.sizes[-1] == len(data)
        for kept in range(1, count + 1):
            assert len(truncate(data, max_bytes=header.sizes[kept - 1])) == header.sizes[kept - 1]


class TestErrors:
    @pytest.mark.parametrize("data", [b"", b"x", b"\x89PNG\r\n\x1a\n", b"RNC", b"\x8fRNc\x01", bytes(1000)])
    def test_not_a_file(self, data):
        with pytest.raises(FormatError, match=r"^not an rnc file$"):
            read(data, max_pixels=LIMIT)

    @pytest.mark.parametrize("length", range(1, 40))
    def test_header_cut_short(self, length):
        with pytest.raises(FormatError, match="header is cut short"):
            read(EXAMPLE[:length], max_pixels=LIMIT)

    @pytest.mark.parametrize("version", [0, 4, 255])
    def test_other_version(self, version):
        with pytest.raises(FormatError, match=f"version {version} .* newer version"):
            read(b"\x8fRNC" + bytes([version]), max_pixels=LIMIT)

    @pytest.mark.parametrize("position", range(5, 40))
    def test_every_bit_of_the_header_counts(self, position):
        for bit in range(8):
            data = bytearray(EXAMPLE)
            data[position] ^= 1 << bit
            with pytest.raises(FormatError, match=r"header is (corrupt|cut short)"):
                read(bytes(data), max_pixels=LIMIT)

    @pytest.mark.parametrize(
        "head",
        [
            fixed(width=0) + b"\x01" + bytes(5),
            fixed(stride=0) + b"\x01" + bytes(5),
            fixed(name=b"") + b"\x01" + bytes(5),
            fixed(name=b"x" * 33) + b"\x01" + bytes(5),
            fixed(name=b"\x1b[2J") + b"\x01" + bytes(5),
            fixed(name="é".encode()) + b"\x01" + bytes(5),
            fixed() + b"\x00",
            fixed(version=2) + b"\x01" + b"\x01\x03" + bytes(4),  # longer than raw
        ],
    )
    def test_right_checksum_of_nonsense(self, head):
        with pytest.raises(FormatError) as error:
            read(forge(head, bytes(100)), max_pixels=LIMIT)
        assert str(error.value).isprintable()

    def test_too_many_pixels(self):
        with pytest.raises(FormatError, match="20x10 pixels are above the limit of 199; raise max_pixels"):
            read(EXAMPLE, max_pixels=199)
        assert read_header(EXAMPLE).width == 20

    @pytest.mark.parametrize(("length", "complete"), [(40, 0), (41, 0), (42, 1), (43, 1), (44, 2)])
    def test_cut_in_the_payloads(self, length, complete):
        file = read(EXAMPLE[:length], max_pixels=LIMIT)
        assert file.header.iterations == 2
        assert file.payloads == (b"\xb3\x40", b"\xf8\x00")[:complete]

    def test_corrupt_payload_is_named_unless_less_is_asked_for(self):
        data = bytearray(write(file := container(iterations=4)))
        data[-3] ^= 1  # of the third
        with pytest.raises(FormatError, match=r"^iteration 3 is corrupt$"):
            read(bytes(data), max_pixels=LIMIT)
        with pytest.raises(FormatError, match=r"^iteration 3 is corrupt$"):
            read(bytes(data), max_pixels=LIMIT, iterations=3)
        assert read(bytes(data), max_pixels=LIMIT, iterations=2).payloads == file.payloads[:2]

    def test_bytes_at_the_end(self):
        with pytest.raises(FormatError, match="3 bytes follow the last iteration"):
            read(EXAMPLE + b"end", max_pixels=LIMIT)
        assert len(read(EXAMPLE + b"end", max_pixels=LIMIT, iterations=1).payloads) == 1

    @pytest.mark.parametrize("iterations", [0, -1])
    def test_nothing_asked_for(self, iterations):
        with pytest.raises(ValueError, match="at least 1"):
            read(EXAMPLE, max_pixels=LIMIT, iterations=iterations)


class TestTruncate:
    FILE = container(100, 60, 16, 32, 6)  # 4x7 locations, 112 bytes an iteration
    DATA = write(FILE)

    def shorter(self, count):
        """As if only so many iterations had been encoded."""
        header = replace(self.FILE.header, entries=self.FILE.header.entries[:count])
        return write(Container(header, self.FILE.payloads[:count]))

    @pytest.mark.parametrize("count", range(1, 7))
    def test_iterations(self, count):
        short = truncate(self.DATA, iterations=count)
        assert short == self.shorter(count)
        assert len(short) == self.FILE.header.sizes[count - 1] == 30 + count * 117
        assert truncate(short) == short

    @pytest.mark.parametrize(("max_bytes", "count"), [(147, 1), (263, 1), (264, 2), (731, 5), (732, 6), (10**9, 6)])
    def test_max_bytes(self, max_bytes, count):
        assert truncate(self.DATA, max_bytes=max_bytes) == self.shorter(count)

    def test_cut_file(self):
        cut = self.DATA[: self.FILE.header.size + 3 * 112 + 50]
        assert truncate(cut) == truncate(cut, iterations=3) == truncate(cut, max_bytes=10**6) == self.shorter(3)
        with pytest.raises(FormatError, match="cannot keep 4 iterations of 3"):
            truncate(cut, iterations=4)
        with pytest.raises(FormatError, match="no complete iteration"):
            truncate(self.DATA[: self.FILE.header.size + 111])

    def test_corrupt_file(self):
        data = bytearray(self.DATA)
        data[-200] ^= 1  # of the fifth
        assert truncate(bytes(data), iterations=4) == self.shorter(4)
        with pytest.raises(FormatError, match="iteration 5 is corrupt"):
            truncate(bytes(data), iterations=5)

    @pytest.mark.parametrize("limit", [{"iterations": 0}, {"iterations": 7}, {"iterations": -1}, {"max_bytes": 146}])
    def test_impossible(self, limit):
        with pytest.raises(FormatError):
            truncate(self.DATA, **limit)

    def test_both(self):
        with pytest.raises(ValueError, match="not both"):
            truncate(self.DATA, iterations=1, max_bytes=1000)


def corrupt(data: bytes, rng: random.Random) -> bytes:
    """Bit flips, overwritten, inserted, deleted and repeated bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        position = rng.randrange(len(changed))
        length = rng.choice([1, 1, 2, 4, 30])
        match rng.randrange(5):
            case 0:
                changed[position] ^= 1 << rng.randrange(8)
            case 1:
                changed[position : position + length] = rng.randbytes(length)
            case 2:
                changed[position:position] = rng.randbytes(length)
            case 3 if len(changed) > length:
                del changed[position : position + length]
            case _:
                changed[position:position] = changed[position : position + length]
    return bytes(changed)


class TestHostile:
    FILES = tuple(
        container(*size, stride, 32, iterations, seed)
        for seed, (size, stride, iterations) in enumerate(
            [((1, 1), 16, 16), ((70, 33), 16, 3), ((200, 150), 8, 16), ((500, 1), 16, 1)]
        )
    )

    def check(self, data: bytes, file: Container) -> str:
        """No outcome is allowed but an error and a prefix of the original."""
        try:
            payloads = read(data, max_pixels=LIMIT).payloads
        except FormatError as error:
            return "error" if str(error).isprintable() else "unprintable"
        assert payloads == file.payloads[: len(payloads)]
        if payloads:
            assert read(truncate(data), max_pixels=LIMIT).payloads == payloads
        return "prefix"

    def test_500_corrupted(self):
        rng = random.Random(1)
        outcomes = []
        for i in range(500):
            file = self.FILES[i % len(self.FILES)]
            outcomes.append(self.check(corrupt(write(file), rng), file))
        assert outcomes.count("error") > 400
        assert set(outcomes) <= {"error", "prefix"}

    def test_500_corrupted_or_truncated_of_version_3(self):
        """A payload may become another one with the same CRC-16, which is one of 65,536."""
        rng = random.Random(4)
        entries = tuple(Entry.of(payload, version=3) for payload in PARTS_PAYLOADS * 20)
        header = Header(40, 10, FINGERPRINT, "small", 16, 4, entries, parts=2, maps=True)
        file = Container(header, PARTS_PAYLOADS * 20)
        data, outcomes = write(file), []
        for i in range(500):
            changed = corrupt(data, rng) if i % 2 else data[: rng.randrange(len(data))]
            outcomes.append(self.check(changed, file))
        assert {"error", "prefix"} == set(outcomes)
        assert outcomes[1::2].count("error") > 200

    def test_500_truncated(self):
        rng = random.Random(2)
        outcomes = []
        for i in range(500):
            file = self.FILES[i % len(self.FILES)]
            data = write(file)
            length = rng.randrange(len(data))
            outcome = self.check(data[:length], file)
            assert outcome == ("error" if length < file.header.size else "prefix")
            if outcome == "prefix":
                complete = len(read(data[:length], max_pixels=LIMIT).payloads)
                ends = [file.header.size + sum(map(len, file.payloads[:k])) for k in range(len(file.payloads) + 1)]
                assert ends[complete] <= length < ends[complete + 1]
            outcomes.append(outcome)
        assert {"error", "prefix"} == set(outcomes)

    def test_random_bytes(self):
        rng = random.Random(3)
        for _ in range(300):
            with pytest.raises(FormatError):
                read(b"\x8fRNC\x01" + rng.randbytes(rng.randrange(200)), max_pixels=LIMIT)

    @pytest.mark.parametrize("coding", [b"\x00", b"\x01\xff\xff\xff\xff"])
    def test_huge_claims_allocate_nothing(self, coding):
        stride = 16 if len(coding) == 5 else 1  # 4096 * 4096 * 255 bits need a length of four bytes
        version = 2 if coding[0] else 1
        data = forge(
            fixed(65535, 65535, stride, 255, version=version) + b"\xff" + (coding + bytes(4)) * 255, bytes(1000)
        )
        tracemalloc.start()
        try:
            with pytest.raises(FormatError):
                read(data, max_pixels=LIMIT)
            with pytest.raises(FormatError):
                truncate(data)
            if stride == 1:
                assert read(data, max_pixels=2**32).payloads == ()
                assert len(read_header(data).sizes) == 255
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2**20
