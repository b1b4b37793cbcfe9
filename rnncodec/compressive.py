"""Encodes images to files of integers and decodes them, with a compressive autoencoder."""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rnncodec.allocation import TuneName
from rnncodec.entropy import CLASSICAL, INTEGERS, LARGEST, EntropyName, PriorSession, Session
from rnncodec.files import format
from rnncodec.files.format import CODINGS, Container, Entry, FormatError
from rnncodec.files.images import MAX_PIXELS
from rnncodec.imagecodec import ImageCodec, check_targets
from rnncodec.inputs import Input
from rnncodec.loop import Progress, exact
from rnncodec.network import CompressiveAutoencoder, to_uint8
from rnncodec.tiling import Tile, inside, windows
from rnncodec.weights import Weights

WINDOW = 64  # blocks, side of the windows in which large images are transformed, without halo


class CompressiveCodec(ImageCodec):
    """A compressive autoencoder ready to code images (Theis et al. 2017).

    A file holds one rate, and is not progressive: it counts as one iteration.

    Args:
        weights: from `rnncodec.weights.load_weights`, of a compressive autoencoder.
        device: where to compute, `cpu` or `cuda`.

    Raises:
        ValueError: the device is not available.
    """

    max_iterations = 1
    of_integers = True

    def __init__(self, weights: Weights, device: str | torch.device = "cpu") -> None:
        super().__init__(weights, device)
        assert isinstance(weights.network, CompressiveAutoencoder)
        self.network = weights.network.eval().to(self.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.config = weights.network.config

    def encode(
        self,
        image: Input,
        iterations: int | None = None,
        *,
        level: int | None = None,
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
        """Compresses an image; at most one of level, quality, bpp, max_bytes and psnr sets the target.

        Args:
            image: as in `Codec.encode`.
            iterations: None or 1.
            level: of the rate, from 0 to `config.levels` - 1.
            quality: from 1 to 100, the first and the last level; 50 by default.
            bpp: the most bits per pixel of the whole file.
            max_bytes: the most bytes of the whole file.
            psnr: PSNR of the decoded image in dB, which is warned of if it is out of reach.
            tune: has no effect, as there is one way to spend bits.
            roi: must be None, as all locations have the same rate.
            entropy: `prior` by default, or a coder that needs no model.
            records: as in `Codec.encode`.
            progress: is called with the number of steps done and the number of all steps.

        Raises:
            ValueError: an argument is not as above, the image file cannot be read, or no file is as small as asked for.
        """
        if iterations not in (None, 1) or roi is not None:
            raise ValueError("a compressive autoencoder has one iteration, and no region of interest")
        if level is not None and (type(level) is not int or not 0 <= level < self.config.levels):
            raise ValueError(f"level must be in 0..{self.config.levels - 1}, not {level}")
        array, block = self.read(image, records)
        height, width = array.shape[:2]
        max_bytes = check_targets(height, width, level=level, quality=quality, bpp=bpp, max_bytes=max_bytes, psnr=psnr)
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
        y, last = self._analyse(pixels), self.config.levels - 1

        def file(integers: np.ndarray, level: int) -> bytes:
            return self._write(integers, level, entropy or "prior", height, width, block)

        if max_bytes is None and psnr is None:
            if level is None:
                level = round(((50 if quality is None else quality) - 1) / 99 * last)
            data = file(self._integers(y, level), level)
        else:  # neither bytes nor PSNR rise with every level, so that all are tried
            files: list[tuple[float, bytes]] = []
            for each in range(last + 1):
                integers = self._integers(y, each)
                files.append((self._decibel(integers, each, pixels), file(integers, each)))
                if progress:
                    progress(each + 1, last + 1)
            data = _chosen(files, max_bytes, psnr)
        if progress:
            progress(1, 1)
        return data

    def decode(
        self,
        data: bytes,
        iterations: int | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        progress: Progress | None = None,
    ) -> Image.Image:
        """Decompresses a file. Arguments and errors as in `Codec.decode`."""
        if iterations not in (None, 1):
            raise ValueError(f"a file of integers has one iteration, not {iterations}")
        header = format.read_header(data)
        self.check_header(header)
        if header.level is None or header.level >= self.config.levels:
            raise FormatError(f"level {header.level}, its weights have levels up to {self.config.levels - 1}")
        payloads = format.read(data, max_pixels=max_pixels).payloads
        if not payloads:
            raise FormatError("the file is cut within its only iteration")
        coding = header.entries[0].coding
        # A raw payload may stand for any coder.
        session = self.session(CODINGS[coding] if coding else "prior", header.level, header.rows, header.cols)
        array = self._picture(session.decode([(coding, payloads[0])]), header.level, header.height, header.width)
        if progress:
            progress(1, 1)
        return Image.fromarray(array)

    def session(self, entropy: EntropyName, level: int, rows: int, columns: int) -> Session:
        """A session of an entropy coder for the integers of a level.

        Raises:
            ValueError: there is no such coder for integers.
        """
        shape = self.config.coefficients, rows, columns
        if entropy == "prior":
            return PriorSession(*shape, self.network.table[level].cpu().numpy())
        if entropy not in CLASSICAL:
            raise ValueError(f"entropy is one of prior, {', '.join(CLASSICAL)}, not {entropy!r}")
        return CLASSICAL[entropy](*shape, INTEGERS)

    def integers(self, image: Input, level: int) -> np.ndarray:
        """The integers of an image at a level, int16 [coefficients, rows, columns]."""
        array, _ = self.read(image, {})
        return self._integers(self._analyse(torch.from_numpy(array).permute(2, 0, 1)[None]), level)

    def _analyse(self, pixels: Tensor) -> Tensor:
        """The coefficients of an image, uint8 [1, 3, H, W]."""
        rows, columns = (math.ceil(side / self.config.stride) for side in pixels.shape[-2:])
        y = torch.empty(1, self.config.coefficients, rows, columns, device=self.device)
        x = pixels.to(self.device)
        for _, core in windows(slice(0, rows), slice(0, columns), 0, WINDOW):
            with exact():
                y[..., *core] = self.network.analyse(x, *core)
        return y

    def _integers(self, y: Tensor, level: int) -> np.ndarray:
        """The integers of coefficients at a level."""
        with torch.inference_mode():
            return (y * self.network.scales(level)).round().clamp(-LARGEST, LARGEST)[0].cpu().numpy().astype(np.int16)

    def _picture(self, integers: np.ndarray, level: int, height: int, width: int) -> np.ndarray:
        """The picture of integers, uint8 [H, W, 3]."""
        with torch.inference_mode():
            y_hat = torch.from_numpy(integers)[None].to(self.device).float() / self.network.scales(level)
        array, stride = np.empty((height, width, 3), np.uint8), self.config.stride
        whole = tuple(slice(0, size) for size in y_hat.shape[-2:])
        for area, core in windows(whole[0], whole[1], self.network.halo, WINDOW):
            with exact():
                x_hat = to_uint8(self.network.synthesise(y_hat[..., *area]))[0].permute(1, 2, 0).cpu().numpy()
            y, x = (slice(cut.start * stride, cut.stop * stride) for cut in core)
            kept = tuple(slice(cut.start * stride, cut.stop * stride) for cut in inside(Tile(area, core)))
            place = array[y, x]
            place[:] = x_hat[kept][: place.shape[0], : place.shape[1]]
        return array

    def _decibel(self, integers: np.ndarray, level: int, pixels: Tensor) -> float:
        """The PSNR of an image, of which these are the integers."""
        array = self._picture(integers, level, *pixels.shape[-2:])
        error = np.square(array.astype(np.int64) - pixels[0].permute(1, 2, 0).numpy()).mean()
        return 10 * math.log10(255**2 / error) if error else math.inf

    def _write(
        self, integers: np.ndarray, level: int, entropy: EntropyName, height: int, width: int, block: bytes
    ) -> bytes:
        """A file of integers."""
        ((coding, payload),) = self.session(entropy, level, *integers.shape[1:]).encode(integers)
        entry = Entry.of(payload, coding, format.PARTS_VERSION)
        return format.write(Container(self.header(height, width, [entry], block, level=level), (payload,), block))


def _chosen(files: Sequence[tuple[float, bytes]], max_bytes: int | None, psnr: float | None) -> bytes:
    """Of files and their PSNR: the best that fits, or the smallest with a PSNR; the best, with a warning, if none has.

    Raises:
        ValueError: none fits.
    """
    if max_bytes is not None:
        fit = [(reached, -len(data), data) for reached, data in files if len(data) <= max_bytes]
        if not fit:
            least = min(len(data) for _, data in files)
            raise ValueError(f"the smallest file takes {least} bytes, more than {max_bytes}")
        return max(fit)[2]
    assert psnr is not None
    good = [(len(data), data) for reached, data in files if reached >= psnr]
    if good:
        return min(good)[1]
    reached, data = max(files)
    warnings.warn(f"{psnr:g} dB are out of reach, the image has {reached:.2f} dB", stacklevel=3)
    return data
