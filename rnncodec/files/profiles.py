"""Makes small ICC profiles of RGB color spaces, from primaries and transfer curves or from their code points (CICP)."""

import struct
from typing import NamedTuple

import numpy as np

from rnncodec.files.errors import ImageError

D50 = np.array([63190, 65536, 54061]) / 65536  # white of ICC profiles, X, Y and Z
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


class Chromaticities(NamedTuple):
    """x and y of the primaries and of white."""

    red: tuple[float, float]
    green: tuple[float, float]
    blue: tuple[float, float]
    white: tuple[float, float] = (0.3127, 0.3290)  # D65


class Curve(NamedTuple):
    """From samples v to light: (gain v + offset)^gamma from `start` on, and slope v below."""

    gamma: float
    gain: float = 1.0
    offset: float = 0.0
    slope: float = 0.0
    start: float = 0.0


class Space(NamedTuple):
    """An RGB color space, with the same curve for each primary."""

    chromaticities: Chromaticities
    curve: Curve


def _camera(alpha: float, slope: float, start: float) -> Curve:
    """The inverse of a television camera's curve, alpha light^0.45 - (alpha - 1), and `slope` light below."""
    return Curve(1 / 0.45, 1 / alpha, (alpha - 1) / alpha, 1 / slope, start)


BT709 = Chromaticities((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
SRGB = Space(BT709, Curve(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
ADOBE_RGB = Space(Chromaticities((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), Curve(563 / 256))
ILLUMINANT_C = (0.310, 0.316)

# By the code points of ITU-T H.273, which PNG (cICP), AVIF and HEIC (nclx) use.
PRIMARIES = {
    1: BT709,
    4: Chromaticities((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), ILLUMINANT_C),
    5: Chromaticities((0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: Chromaticities((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: Chromaticities((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    8: Chromaticities((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), ILLUMINANT_C),
    9: Chromaticities((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: Chromaticities((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: Chromaticities((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    22: Chromaticities((0.630, 0.340), (0.295, 0.605), (0.155, 0.077)),
}
TELEVISION = _camera(1.09929682680944, 4.5, 0.081242858298635)
TRANSFERS = {
    1: TELEVISION,
    4: Curve(2.2),
    5: Curve(2.8),
    6: TELEVISION,
    7: _camera(1.1115, 4.0, 0.0913),
    8: Curve(1.0),
    11: TELEVISION,
    13: SRGB.curve,
    14: TELEVISION,
    15: TELEVISION,
}
UNSPECIFIED = 2
HDR = {16: "PQ", 18: "HLG"}


def profile_of(space: Space, gray: bool = False) -> bytes:
    """The bytes of an ICC profile, version 4, of a color space, or of its grays.

    Raises:
        ImageError: there is no such space.
    """
    xyz = np.array([[x, y, 1 - x - y] for x, y in space.chromaticities]).T
    with np.errstate(all="ignore"):
        white = xyz[:, 3] / xyz[1, 3]
        try:
            columns = xyz[:, :3] * np.linalg.solve(xyz[:, :3], white)
        except np.linalg.LinAlgError as error:
            raise ImageError("its primaries span no colors") from error
        cones = BRADFORD @ white
        columns = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / cones) @ BRADFORD @ columns
    if not (np.isfinite(columns).all() and np.abs(columns).max() < 4 and 0.1 <= space.curve.gamma <= 10):
        raise ImageError("its primaries or gamma are impossible")
    text = ("sRGB" if space == SRGB else "RGB").encode("utf-16-be")
    label = b"mluc" + struct.pack(">4xII4sII", 1, 12, b"enUS", len(text), 28) + text
    curve = b"para" + struct.pack(">4xHxx", 3) + _fixed(space.curve)
    values = {b"desc": label, b"cprt": label, b"wtpt": _xyz(D50)}  # every profile must have a copyright
    if gray:
        values[b"kTRC"] = curve
    else:
        values |= {tag: _xyz(column) for tag, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns.T, strict=True)}
        values |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    start, table, data = 128 + 4 + 12 * len(values), b"", b""
    places = dict[bytes, int]()  # tags with the same value share it
    for tag, value in values.items():
        if value not in places:
            places[value] = start + len(data)
            data += value + bytes(-len(value) % 4)
        table += tag + struct.pack(">II", places[value], len(value))
    size = start + len(data)
    kind = b"GRAY" if gray else b"RGB "
    header = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x04200000, b"mntr", kind, b"XYZ ", b"acsp") + _fixed(D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(values)) + table + data


def space_of_code_points(primaries: int, transfer: int) -> Space:
    """The space of CICP's code points; what is unspecified is taken as sRGB's.

    Raises:
        ImageError: the curve is for displays of high dynamic range, or a code point is not known.
    """
    if transfer in HDR:
        raise ImageError(f"its pixels are HDR ({HDR[transfer]}), which 8 bits cannot hold; convert the image to sRGB")
    primaries, transfer = (1 if primaries == UNSPECIFIED else primaries), (13 if transfer == UNSPECIFIED else transfer)
    if primaries not in PRIMARIES or transfer not in TRANSFERS:
        raise ImageError(f"the color space of primaries {primaries} and transfer {transfer} is not supported")
    return Space(PRIMARIES[primaries], TRANSFERS[transfer])


def _fixed(values: np.ndarray | tuple[float, ...]) -> bytes:
    """Numbers as ICC profiles have them, in 1/65536."""
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(values)
