"""Image files made byte by byte, and colors computed by hand, for the tests of reading and writing images."""

import io
import struct
import zlib

import numpy as np

# x and y of red, green, blue and white, and the curve from samples to light; of the standards that name them.
D65 = (0.3127, 0.3290)
SRGB_XY = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65)
P3_XY = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65)
ADOBE_XY = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65)
BT2020_XY = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65)


def srgb_light(v):
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def srgb_of(light):
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def to_xyz(xy):
    """From light of primaries to XYZ, from their chromaticities."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in xy]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


def converted(samples, xy, light=srgb_light):
    """8-bit sRGB, not rounded, of samples from 0 to 1 in a color space with the white D65."""
    return 255 * srgb_of(light(samples) @ (np.linalg.inv(to_xyz(SRGB_XY)) @ to_xyz(xy)).T)


def smooth(height=24, width=40):
    """Samples from 0 to 1 [H, W, 3] with many colors, dark ones too."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x / (width - 1), y / (height - 1), (x + y) / (height + width - 2)], 2) ** 1.5


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG file of uint8 or uint16 samples [H, W, C], with chunks before the pixels."""
    height, width, channels = samples.shape
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    depth, color = 8 * samples.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def iccp(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"x\0\0" + zlib.compress(profile)


def cmyk_profile() -> bytes:
    """A press profile of 16 colors, of no ink to all inks, as Lab of 8 bits; see `CMYK_LAB`."""
    identity = bytes(range(256))
    lab = b"".join(bytes([round(L * 2.55), a + 128, b + 128]) for L, a, b in CMYK_LAB)
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + lab + identity * 3
    text = b"text" + bytes(4) + b"press\0"
    tags, data, start = b"", b"", 128 + 4 + 12 * 4
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    description = b"desc" + bytes(4) + struct.pack(">I", 6) + b"press\0" + bytes(78)
    for tag, value in ((b"desc", description), (b"cprt", text), (b"wtpt", white), (b"A2B0", table)):
        tags += tag + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(
        ">I4xI4s4s4s12x4s28x3i", start + len(data), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp", 63190, 65536, 54061
    )
    return head.ljust(128, b"\0") + struct.pack(">I", 4) + tags + data


# By inks C, M, Y, K of 0 or all, the last one first: about those of a press; black ink hides the others.
CMYK_LAB = [
    (100, 0, 0), (0, 0, 0), (89, -4, 88), (0, 0, 0), (48, 74, -3), (0, 0, 0), (47, 68, 48), (0, 0, 0),
    (55, -37, -50), (0, 0, 0), (50, -68, 25), (0, 0, 0), (24, 17, -46), (0, 0, 0), (23, 0, 0), (0, 0, 0),
]  # fmt: skip


def srgb_of_lab(lab):
    """8-bit sRGB, not rounded, of Lab with the white D50; adapted to D65 by Bradford's matrix."""
    L, a, b = (np.asarray(lab, float)[..., i] for i in range(3))
    y = (L + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    to_d65 = [
        [0.9555766, -0.0230393, 0.0631636],
        [-0.0282895, 1.0099416, 0.0210077],
        [0.0122982, -0.0204830, 1.3299098],
    ]
    return 255 * srgb_of(xyz @ (np.linalg.inv(to_xyz(SRGB_XY)) @ to_d65).T)
