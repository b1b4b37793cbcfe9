"""Converts opened images of any mode and depth to upright 8-bit sRGB."""

import numpy as np
from PIL import Image

from rnncodec.files.color import refuse_hdr, to_srgb
from rnncodec.files.errors import ImageError
from rnncodec.files.metadata import ORIENTATION, quiet
from rnncodec.files.opening import Picture
from rnncodec.files.profiles import SRGB, Space, profile_of
from rnncodec.files.tiff import BITS, PHOTOMETRIC

ORIENTATIONS = {  # by EXIF tag 274: the operation that turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITE, TWELVE_BITS = 65535, 4095
ON_WHITE = "transparency is replaced by white"
ROWS = 2**20  # pixels that are blended at once, which bounds the memory


def upright_rgb(picture: Picture) -> np.ndarray:
    """Decodes the pixels of an image and converts them to upright 8-bit sRGB, on white where they are transparent.

    The picture says afterwards whether they were turned, and what was lost.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: the pixels are floats or integers beyond 16 bits, or their colors are HDR.
        Exception: nearly any other, where the file is corrupt.
    """
    color, alpha, mode = _samples(picture)
    rgb = to_srgb(color, mode, _profile(picture, mode), picture.lost)
    if picture.frame is not None:
        alpha = _within(picture.frame, color.shape[:2], alpha)
    if alpha is not None and alpha.min() < np.iinfo(alpha.dtype).max:
        picture.lost.append(ON_WHITE)
        rgb = _on_white(rgb, alpha)
    if picture.turned is None:
        number = orientation_of(picture.image) if picture.orientation is None else picture.orientation
        operation = ORIENTATIONS.get(number)
        picture.turned = operation is not None
        if operation is not None:
            rgb = np.asarray(Image.fromarray(rgb).transpose(operation))
    return np.array(rgb) if not rgb.flags.writeable else rgb


def _samples(picture: Picture) -> tuple[np.ndarray, np.ndarray | None, str]:
    """The samples [H, W, C] and alpha [H, W] of an image, both uint8 or both uint16, and the mode of its colors."""
    image, key, premultiplied = picture.image, picture.key, picture.premultiplied
    alpha = None
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined white; convert the image to 8 or 16 bits")
    if picture.interleaved:
        samples = np.asarray(image).view(">u2").astype(np.uint16)
        color, alpha, mode = samples[..., :1], samples[..., 1], "L"
    elif image.mode.startswith("I"):
        color, mode = _wide_gray(image), "L"
        if "transparency" in image.info:
            key = (image.info["transparency"],)
    else:
        image, premultiplied = _plain(image, premultiplied)
        mode = image.mode.removesuffix("A")
        color = np.atleast_3d(np.asarray(image))
        if picture.bits < 8:  # from shifted to the left to the whole range
            top = 2**picture.bits - 1
            color = ((color >> 8 - picture.bits).astype(np.uint32) * 255 // top).astype(np.uint8)
        if picture.planes:
            color = np.stack([np.asarray(plane).astype(np.uint16) for plane in picture.planes], axis=2)
        elif picture.low is not None:
            picture.low.load()
            color = color.astype(np.uint16) << 8 | np.atleast_3d(np.asarray(picture.low))
        if image.mode in ("LA", "RGBA"):
            color, alpha = color[..., :-1], color[..., -1]
    white = np.iinfo(color.dtype).max
    if key is not None:
        alpha = np.where((color == np.array(key)).all(2), 0, white).astype(color.dtype)
    if premultiplied and alpha is not None:  # divided to 16 bits, so that nothing is lost
        straight = color.astype(np.float32) * np.float32(WHITE) / np.maximum(alpha, 1)[..., None]
        color = np.rint(np.minimum(straight, WHITE)).astype(np.uint16)
    return color, alpha, mode


def _plain(image: Image.Image, premultiplied: bool) -> tuple[Image.Image, bool]:
    """An image in one of the modes L, LA, RGB, RGBA, CMYK and LAB, and whether it is multiplied by alpha."""
    if image.mode in ("La", "RGBa"):
        return Image.frombytes(image.mode.upper(), image.size, image.tobytes()), True
    if image.mode in ("LA", "RGBA", "CMYK", "LAB") or (image.mode in ("L", "RGB") and not image.has_transparency_data):
        return image, premultiplied
    if image.has_transparency_data:
        return image.convert("RGBA"), False
    return image.convert("L" if image.mode == "1" else "RGB"), False


def _wide_gray(image: Image.Image) -> np.ndarray:
    """Gray of 16 bits [H, W, 1]."""
    samples = np.asarray(image)
    if samples.min() < 0 or samples.max() > WHITE:
        raise ImageError("integer pixels beyond 16 bits; convert the image to 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})  # of TIFF, whose samples Pillow gives here as they are stored
    gray = samples.astype(np.uint16)
    if tags.get(BITS) == (12,):
        gray = ((gray.astype(np.uint32) * WHITE + TWELVE_BITS // 2) // TWELVE_BITS).astype(np.uint16)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero
        gray = WHITE - gray
    return gray[..., None]


def _profile(picture: Picture, mode: str) -> bytes | None:
    """The ICC profile of the pixels, None for sRGB and its grays."""
    space = picture.space
    if not isinstance(space, Space):
        if space is not None:
            refuse_hdr(space)
        return space
    if space == SRGB or mode not in ("L", "RGB"):
        return None
    try:
        return profile_of(space, gray=mode == "L")
    except ImageError as error:
        picture.lost.append(f"color space ignored: {error}")
        return None


def _within(frame: tuple[int, int, int, int], shape: tuple[int, int], alpha: np.ndarray | None) -> np.ndarray:
    """Alpha uint8 [H, W], where nothing outside of a frame is seen."""
    left, top, right, bottom = frame
    found = np.zeros(shape, np.uint8)
    found[top:bottom, left:right] = 255 if alpha is None else alpha[top:bottom, left:right]
    return found


def _on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blends uint8 pixels [H, W, 3] with white, by alpha [H, W]."""
    result, step = np.empty_like(rgb), max(1, ROWS // rgb.shape[1])
    for top in range(0, len(rgb), step):
        rows = slice(top, top + step)
        part = alpha[rows, :, None].astype(np.float32) / np.iinfo(alpha.dtype).max
        result[rows] = np.rint(rgb[rows] * part + 255 * (1 - part))
    return result


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, 1 (upright) where there is none or the EXIF data is corrupt."""
    try:
        with quiet():
            return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # corrupt EXIF data must not make an image unreadable
        return 1
