"""Turns all that `Codec.encode` takes for an image into pixels and records."""

import os

import numpy as np
from PIL import Image
from torch import Tensor

from rnncodec.files.images import load_photograph, to_rgb

Input = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


def read_input(image: Input) -> tuple[np.ndarray, dict[str, bytes]]:
    """The pixels of an image, uint8 [H, W, 3], and what it says of the photograph if it is a file.

    Raises:
        ValueError: it is not as `Codec.encode` says.
    """
    if isinstance(image, str | os.PathLike):
        return load_photograph(image)
    return _as_array(image), {}


def _as_array(image: Image.Image | np.ndarray | Tensor) -> np.ndarray:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(f"a tensor image is floating-point [3, H, W], not {image.dtype} {list(image.shape)}")
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError("a tensor image holds values in [0, 1]")
        return _as_array((image.detach().float() * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image is a path, a PIL image, an array or a tensor, not {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"an image is uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    return np.require(image, requirements=["C", "W"])
