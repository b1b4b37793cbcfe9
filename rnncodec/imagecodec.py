"""What the codecs of all networks share: what they are asked for, their headers, and the files that they refuse."""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise, zip_longest
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rnncodec.allocation import TuneName
from rnncodec.files import format
from rnncodec.files.codings import CONTEXT, EntropyName
from rnncodec.files.errors import FormatError
from rnncodec.files.header import Entry, Header
from rnncodec.files.images import MAX_PIXELS
from rnncodec.files.records import pack
from rnncodec.inputs import Input, read_input
from rnncodec.loop import Progress
from rnncodec.tiling import MAX_SIDE
from rnncodec.weights import Weights, WeightsError

LARGEST = 2**62  # bytes that are asked for


class Compressed(TypedDict):
    """A batch as CompressAI's models give it: strings[t][i] is iteration t of image i; height and width of the images.

    The strings of an image, one after the other, are its file.
    """

    strings: list[list[bytes]]
    shape: tuple[int, int]


class Decompressed(TypedDict):
    """A batch as CompressAI's models give it: the images [B, 3, H, W] in [0, 1]."""

    x_hat: Tensor


class ImageCodec(ABC):
    """A network ready to code images.

    Attributes:
        max_iterations: of a file.
        of_integers: whether files have integers, not bits.

    Args:
        weights: from `rnncodec.weights.load_weights`.
        device: where to compute, `cpu` or `cuda`.

    Raises:
        ValueError: the device is not available.
    """

    max_iterations: int
    of_integers = False

    def __init__(self, weights: Weights, device: str | torch.device) -> None:
        if str(device).split(":")[0] not in ("cpu", "cuda"):  # others lack float64, which the entropy coder needs
            raise ValueError(f"a codec computes on cpu or cuda, not on {device}")
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("no CUDA device is available")
        self.config = weights.network.config
        self.name, self.fingerprint, self.provenance = weights.name, weights.fingerprint, weights.provenance
        self.context_fingerprint, self.path = weights.context_fingerprint, weights.path

    @abstractmethod
    def encode(
        self,
        image: Input,
        iterations: int | None = None,
        *,
        quality: float | None = None,
        bpp: float | None = None,
        max_bytes: int | None = None,
        psnr: float | None = None,
        tune: TuneName = "ms-ssim",
        roi: np.ndarray | None = None,
        entropy: EntropyName | None = None,
        records: Mapping[str, bytes] | None = None,
        progress: Progress | None = None,
    ) -> bytes:
        """Compresses an image."""

    @abstractmethod
    def decode(
        self,
        data: bytes,
        iterations: int | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        progress: Progress | None = None,
    ) -> Image.Image:
        """Decompresses a file."""

    def decode_progressive(
        self, data: bytes, iterations: int | None = None, *, max_pixels: int = MAX_PIXELS
    ) -> Iterator[np.ndarray]:
        """Decompresses a file once and yields the image of every iteration, uint8 [H, W, 3]; here there is one."""
        yield np.asarray(self.decode(data, iterations, max_pixels=max_pixels))

    def decode_tensor(self, data: bytes, iterations: int | None = None, *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Decompresses like `decode` to a tensor [3, H, W] in [0, 1], in steps of 1 / 255, on the codec's device."""
        array = np.asarray(self.decode(data, iterations, max_pixels=max_pixels))
        return torch.tensor(array, device=self.device).permute(2, 0, 1) / 255

    def compress(self, x: Tensor, **how: Any) -> Compressed:
        """Compresses a batch of images, with the interface of CompressAI's models.

        Args:
            x: floating-point [B, 3, H, W] in [0, 1], rounded to 8 bits.
            how: arguments of `encode`, such as `iterations`, for all images.

        Returns:
            The strings of each image in turn; where files have different numbers of iterations, the last are empty.

        Raises:
            ValueError: the batch is empty or not as above, or an argument is invalid.
        """
        if x.ndim != 4 or not len(x):
            raise ValueError(f"a batch is floating-point [B, 3, H, W], not {x.dtype} {list(x.shape)}")
        strings = list(zip_longest(*(_iterations(self.encode(image, **how)) for image in x), fillvalue=b""))
        return {"strings": list(map(list, strings)), "shape": (x.shape[2], x.shape[3])}

    def decompress(self, strings: Sequence[Sequence[bytes]], shape: tuple[int, int]) -> Decompressed:
        """Decompresses a batch from `compress`, with the interface of CompressAI's models.

        Args:
            strings: all, or those of the first iterations.
            shape: height and width of the images.

        Returns:
            The images, in steps of 1 / 255, on the codec's device.

        Raises:
            ValueError: there are no images, they are not of this shape, or `decode` refuses one.
        """
        height, width = shape
        images = []
        for own in zip(*strings, strict=True):
            data = b"".join(own)
            header = format.read_header(data)
            if (header.height, header.width) != (height, width):
                raise ValueError(f"an image of {header.width}x{header.height} in a batch of {width}x{height}")
            cut = len(data) < header.size + sum(entry.length for entry in header.entries)
            images.append(self.decode_tensor(data, len(own) if cut else None, max_pixels=height * width))
        if not images:
            raise ValueError("a batch has at least one image, and one string of it")
        return {"x_hat": torch.stack(images)}

    def read(self, image: Input, records: Mapping[str, bytes] | None) -> tuple[np.ndarray, bytes]:
        """An image to encode, uint8 [H, W, 3], and its block of records.

        Raises:
            ValueError: the image is too large or cannot be read, or the records are invalid.
        """
        array, own = read_input(image)
        height, width = array.shape[:2]
        if max(height, width) > MAX_SIDE:
            raise ValueError(f"an image has at most {MAX_SIDE} pixels a side, not {width}x{height}")
        return array, pack(own if records is None else records)

    def header(
        self, height: int, width: int, entries: Sequence[Entry], block: bytes, **others: int | bool | None
    ) -> Header:
        """The header of a file; `others` are fields of `Header`."""
        return Header(
            width=width,
            height=height,
            fingerprint=self.fingerprint,
            weights=self.name,
            stride=self.config.stride,
            bits=self.config.bits,
            entries=tuple(entries),
            context=self.context_fingerprint if any(entry.coding == CONTEXT for entry in entries) else bytes(8),
            records=Entry.of(block) if block else None,
            **others,  # pyright: ignore[reportArgumentType]
        )

    def check_header(self, header: Header) -> None:
        """Refuses files that this codec cannot decode.

        Raises:
            WeightsError: the file needs other weights.
            FormatError: the header contradicts the weights.
        """
        if header.fingerprint != self.fingerprint:
            raise WeightsError(
                f"the file needs the weights {header.weights!r} ({header.fingerprint.hex()}), "
                f"loaded are {self.name!r} ({self.fingerprint.hex()})"
            )
        if (header.level is not None) != self.of_integers:
            found, needed = ("integers", "bits") if header.level is not None else ("bits", "integers")
            raise FormatError(f"the file has {found}, its weights code {needed}")
        if (header.stride, header.bits) != (self.config.stride, self.config.bits):
            raise FormatError(
                f"the header says stride {header.stride} and {header.bits} bits, "
                f"its weights have stride {self.config.stride} and {self.config.bits} bits"
            )
        if header.iterations > self.max_iterations:
            raise FormatError(f"{header.iterations} iterations, its weights decode up to {self.max_iterations}")


def _iterations(data: bytes) -> list[bytes]:
    """The iterations of a file, the first one with all that comes before it."""
    header = format.read_header(data)
    offsets = list(accumulate((entry.length for entry in header.entries), initial=header.size))
    return [data[start:end] for start, end in pairwise([0, *(offsets[end] for end in header.ends)])]


def check_targets(
    height: int,
    width: int,
    *,
    quality: float | None,
    bpp: float | None,
    max_bytes: int | None,
    psnr: float | None,
    **others: int | None,
) -> int | None:
    """Checks what a file is to have; gives the most bytes, if there is a most.

    Raises:
        ValueError: more than one target is set, or one is out of range.
    """
    targets = {**others, "quality": quality, "bpp": bpp, "max_bytes": max_bytes, "psnr": psnr}
    if sum(target is not None for target in targets.values()) > 1:
        *first, last = targets
        raise ValueError(f"give one of {', '.join(first)} and {last}, not several")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality must be in 1..100, not {quality}")
    if psnr is not None and not 0 < psnr < math.inf:
        raise ValueError(f"psnr must be a positive number of dB, not {psnr}")
    if max_bytes is not None:
        try:
            return min(operator.index(max_bytes), LARGEST)
        except TypeError as error:
            raise ValueError(f"max_bytes must be a whole number, not {max_bytes}") from error
    if bpp is None:
        return None
    if not bpp > 0:
        raise ValueError(f"bpp must be positive, not {bpp}")
    return int(min(bpp * height * width / 8 * (1 + 1e-12), LARGEST))
