"""Converts the colors of images to sRGB, by the ICC profile that they are in."""

import io
from collections.abc import Callable
from itertools import product

import numpy as np
from PIL import Image, ImageCms

from rnncodec.files.errors import ImageError
from rnncodec.files.profiles import HDR, space_of_code_points
from rnncodec.files.shaper import shaper, tags_of

# Pillow's modes of the color spaces that ICC profiles have here, and the number of their samples.
SPACES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK", "Lab ": "LAB"}
SAMPLES = {"L": 1, "RGB": 3, "CMYK": 4, "LAB": 3}
ROWS = 2**20  # pixels that are converted at once, which bounds the memory

Transform = Callable[[Image.Image], Image.Image]
Conversion = Callable[[np.ndarray], np.ndarray]


def to_srgb(samples: np.ndarray, mode: str, profile: bytes | None, lost: list[str]) -> np.ndarray:
    """Converts samples of a color space to 8-bit sRGB: relative colorimetric, with black point compensation.

    Args:
        samples: uint8 or uint16 [H, W, C], from 0 to the largest number of the type.
        mode: Pillow's name of the space: L, RGB, CMYK or LAB.
        profile: of the samples; None stands for sRGB, its grays, plain inks and D50. A profile of sRGB changes nothing.
        lost: a profile that cannot be used is named here, and the samples are taken as without it.

    Returns:
        uint8 [H, W, 3].
    """
    convert = _conversion(samples.dtype, mode, profile, lost)
    height, width, _ = samples.shape
    rgb = np.empty((height, width, 3), np.uint8)
    step = max(1, ROWS // width)
    for top in range(0, height, step):
        rgb[top : top + step] = convert(samples[top : top + step])
    return rgb


def refuse_hdr(profile: bytes) -> None:
    """Raises an ImageError if an ICC profile says, by code points, that its colors are HDR."""
    code = tags_of(profile).get(b"cicp", b"")[8:10]
    if len(code) == 2 and code[1] in HDR:
        space_of_code_points(*code)


def _conversion(dtype: np.dtype, mode: str, profile: bytes | None, lost: list[str]) -> Conversion:
    """What converts samples of a type and a mode."""
    if profile is not None:
        try:
            space = ImageCms.core.profile_frombytes(profile).xcolor_space
            if SPACES.get(space) != mode:
                raise ImageError(f"it is for {space.strip()}, but the pixels are {mode}")
            transform = _transform(ImageCms.getOpenProfile(io.BytesIO(profile)), mode)
            if mode in ("L", "RGB") and _changes_nothing(transform, mode):
                return _eight_bits
            if (dtype == np.uint16 or mode == "L") and (shape := shaper(profile, SAMPLES[mode])):
                return lambda rows: shape(rows if dtype == np.uint16 else rows * np.uint16(257))
            return lambda rows: _apply(transform, rows, mode)
        except Exception as error:  # of many types
            reason = str(error) if isinstance(error, ImageError) else "it is corrupt"
            lost.append(f"color profile ignored: {reason}")
    if mode == "LAB":
        d50 = _transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), mode)
        return lambda rows: _apply(d50, rows, mode)
    return _eight_bits if mode in ("L", "RGB") else lambda rows: _apply(lambda inks: inks.convert("RGB"), rows, mode)


def _transform(source: ImageCms.ImageCmsProfile, mode: str) -> Transform:
    """The transform from a profile to sRGB."""
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    return ImageCms.ImageCmsTransform(source, target, mode, "RGB", intent, flags=flags).apply


def _changes_nothing(transform: Transform, mode: str) -> bool:
    """Whether a transform gives what it gets, up to rounding: all grays, and the colors of a grid."""
    grays = np.arange(256, dtype=np.uint8)[None, :, None].repeat(SAMPLES[mode], 2)
    grid = np.array([list(product(range(0, 256, 15), repeat=3))], np.uint8)
    return all(
        np.abs(_apply(transform, probe, mode).astype(int) - probe).max() <= 1
        for probe in ([grays, grid] if mode == "RGB" else [grays])
    )


def _apply(transform: Transform, samples: np.ndarray, mode: str) -> np.ndarray:
    """Converts samples [H, W, C] by a transform of 8-bit images."""
    height, width, _ = samples.shape
    image = Image.frombytes(mode, (width, height), np.ascontiguousarray(_eight_bits(samples)).data)
    return np.asarray(transform(image))


def _eight_bits(samples: np.ndarray) -> np.ndarray:
    """Samples of 16 bits rounded to 8, others as they are."""
    if samples.dtype == np.uint8:
        return samples
    return ((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
