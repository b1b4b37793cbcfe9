"""Converts samples to sRGB by ICC profiles of curves and a matrix, where Pillow is not exact: 16 bits, and gray."""

import struct
from collections.abc import Callable

import numpy as np

from rnncodec.files.profiles import SRGB, profile_of

LEVELS = 65536
MAX_TAGS = 100
# The curves of the ICC specification's type `para`: which of g, a, b, c, d, e, f it has, by its number.
PARAMETERS = ("g", "gab", "gabc", "gabcd", "gabcdef")


def tags_of(profile: bytes) -> dict[bytes, bytes]:
    """The tags of an ICC profile, as far as they are whole."""
    count = min(int.from_bytes(profile[128:132]), MAX_TAGS)
    entries = struct.iter_unpack(">4sII", profile[132 : 132 + len(profile[132 : 132 + 12 * count]) // 12 * 12])
    return {name: profile[start : start + length] for name, start, length in entries}


def shaper(profile: bytes, channels: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """What converts uint16 samples [H, W, 1 or 3] to 8-bit sRGB; None if the profile is not of curves and a matrix."""
    tags = tags_of(profile)
    names = {1: (b"kTRC",), 3: (b"rTRC", b"gTRC", b"bTRC")}.get(channels)
    if names is None or any(name.startswith((b"A2B", b"D2B")) for name in tags) or profile[20:24] != b"XYZ ":
        return None
    try:
        curves = [_curve(tags[name]) for name in names]
        if any(curve[0] > 0 for curve in curves):  # black is light, for which ImageCms makes up
            return None
        to_srgb = np.eye(1)
        if channels == 3:
            to_srgb = np.linalg.solve(_matrix(tags_of(profile_of(SRGB))), _matrix(tags))
    except (KeyError, ValueError, IndexError, struct.error, np.linalg.LinAlgError):
        return None
    columns, encoded = to_srgb.T.astype(np.float32), _encoded()

    def shape(samples: np.ndarray) -> np.ndarray:
        light = np.stack([curve[samples[..., i]] for i, curve in enumerate(curves)], axis=2) @ columns
        return encoded[np.rint(light.clip(0, 1) * (LEVELS - 1)).astype(np.uint16)]

    return shape


def _matrix(tags: dict[bytes, bytes]) -> np.ndarray:
    """From light of the primaries to X, Y and Z."""
    columns = [struct.unpack(">3i", tags[name][8:20]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    return np.array(columns).T / 65536


def _curve(tag: bytes) -> np.ndarray:
    """Light of each of the 65536 levels, from 0 to 1."""
    level = np.linspace(0, 1, LEVELS)
    if tag[:4] == b"curv":
        count = struct.unpack(">I", tag[8:12])[0]
        table = np.array(struct.unpack(f">{min(count, LEVELS)}H", tag[12 : 12 + 2 * min(count, LEVELS)]))
        if count == 0:
            return level.astype(np.float32)
        if count == 1:
            return (level ** (table[0] / 256)).astype(np.float32)
        return np.interp(level * (len(table) - 1), np.arange(len(table)), table / 65535).astype(np.float32)
    names = PARAMETERS[kind] if (kind := struct.unpack(">H", tag[8:10])[0]) < len(PARAMETERS) else None
    if tag[:4] != b"para" or names is None:
        raise KeyError(tag[:4])
    values = struct.unpack(f">{len(names)}i", tag[12 : 12 + 4 * len(names)])
    p = dict.fromkeys("bcdef", 0.0) | {"a": 1.0} | {n: v / 65536 for n, v in zip(names, values, strict=True)}
    power = np.maximum(p["a"] * level + p["b"], 0) ** p["g"]
    if kind in (1, 2):  # below the zero of the base, c alone
        return np.where(p["a"] * level >= -p["b"], power + p["c"], p["c"]).astype(np.float32)
    return np.where(level >= p["d"], power + p["e"], p["c"] * level + p["f"]).astype(np.float32)


def _encoded() -> np.ndarray:
    """The 8-bit sRGB of each of 65536 levels of light."""
    light = np.linspace(0, 1, LEVELS)
    curve = SRGB.curve
    power = (light ** (1 / curve.gamma) - curve.offset) / curve.gain
    return np.rint(255 * np.where(light > curve.start * curve.slope, power, light / curve.slope)).astype(np.uint8)
