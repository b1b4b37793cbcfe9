"""Images to compressed files and back with one trained network: any size, any device, in tiles if memory is short."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rnncodec.entropy import CLASSICAL, NAMES, ContextSession, EntropyName, Session
from rnncodec.files import format
from rnncodec.files.format import CONTEXT, Container, FormatError, Header, Iteration
from rnncodec.files.images import MAX_PIXELS, to_rgb
from rnncodec.network import LatentConfig, State, pad_to_blocks, to_uint8
from rnncodec.tiling import MAX_ITERATIONS, Box, Tile, inside, tiles, windows
from rnncodec.weights import Weights, WeightsError

MAX_SIDE = 65535  # two bytes in the header
WINDOW = 1024  # pixels, side of what the transforms of a latent network work on at once, without its halo

Progress = Callable[[int, int], None]


class Compressed(TypedDict):
    """Bare payloads of a batch: a string for each image and iteration, and the height and width of the images."""

    strings: list[list[bytes]]
    shape: tuple[int, int]


class Codec:
    """A network ready to code images; `rnncodec.load` makes one.

    On one device, encoding t iterations, decoding t iterations and the t-th step of `network.unroll` agree exactly.

    Args:
        weights: from `rnncodec.weights.load_weights`; their network moves to the device.
        device: where to compute, `cpu` or `cuda`.
        tile: side in pixels, rounded up to whole blocks, of the tiles that images are cut into; None cuts only images
            whose activations would take more than 2 GiB. Files do not depend on it beyond the choice of bits along
            borders, and decoded images only in the last bits of floating-point sums.
        bfloat16: compute in bfloat16 what encoder and decoder need not agree on: the encoder's decisions, and of latent
            networks the transforms. Files decode everywhere all the same. Faster on GPUs and on processors with
            instructions for it; pictures change by about a thousandth of a dB.

    Raises:
        ValueError: the device is not available.
    """

    def __init__(
        self, weights: Weights, device: str | torch.device = "cpu", tile: int | None = None, bfloat16: bool = False
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("no CUDA device is available")
        if tile is not None and tile < 1:
            raise ValueError(f"tile must be at least 1, not {tile}")
        self.context = weights.context and weights.context.to(self.device)
        self.context_fingerprint = weights.context_fingerprint
        network = weights.network.eval().to(self.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.network = copy.copy(network)  # the same parameters, but arithmetic of this codec's own
        self.network.in_bfloat16 = bfloat16
        self.config = weights.network.config
        self.name, self.fingerprint, self.provenance = weights.name, weights.fingerprint, weights.provenance
        self.tile = tile
        self.max_iterations = self.config.iterations if isinstance(self.config, LatentConfig) else MAX_ITERATIONS

    def encode(
        self,
        image: Image.Image | np.ndarray | Tensor,
        iterations: int | None = None,
        *,
        bpp: float | None = None,
        psnr: float | None = None,
        entropy: EntropyName | None = None,
        progress: Progress | None = None,
    ) -> bytes:
        """Compresses an image; at most one of iterations, bpp and psnr says how far.

        Args:
            image: PIL image of any mode, uint8 array [H, W, 3], or tensor [3, H, W] in [0, 1], rounded to 8 bits.
            iterations: at least 1, 16 by default, at most `max_iterations`.
            bpp: as many iterations as keep the whole file within so many bits per pixel.
            psnr: as few iterations as bring the decoded image to so many dB; if none do, all and a warning.
            entropy: coder of the bits (see `rnncodec.entropy`), or `none` for raw bits; None takes the context model
                if the weights have one. What a coder does not shorten is stored raw.
            progress: is called with the steps done and the steps in all.

        Returns:
            The bytes of a file, see the specification of the format.

        Raises:
            ValueError: the image or the target is not as above, or not even one iteration fits bpp.
        """
        if sum(target is not None for target in (iterations, bpp, psnr)) > 1:
            raise ValueError("give one of iterations, bpp and psnr, not several")
        array = _as_array(image)
        height, width = array.shape[:2]
        if max(height, width) > MAX_SIDE:
            raise ValueError(f"an image has at most {MAX_SIDE} pixels a side, not {width}x{height}")
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
        if bpp is not None and not bpp > 0:
            raise ValueError(f"bpp must be positive, not {bpp}")
        self.session(entropy, *self._grid(height, width))  # what it refuses is refused before the work
        if psnr is None:
            planes: Iterable[np.ndarray] = self._analyse(pixels, self._check_iterations(iterations), progress)
        else:
            planes = self._analyse_to(psnr, pixels, progress)
        return self.write_bits((plane[0] for plane in planes), height, width, entropy, bpp)

    def write_bits(
        self,
        planes: Iterable[np.ndarray],
        height: int,
        width: int,
        entropy: EntropyName | None = None,
        bpp: float | None = None,
    ) -> bytes:
        """The file of bits that this codec has computed; `read_bits` is the way back.

        Args:
            planes: bool [bits, rows, columns] for each iteration; no more are taken than fit bpp.
            height: of the image in pixels.
            width: of the image in pixels.
            entropy: as in `encode`.
            bpp: stop before the whole file takes more bits per pixel.

        Raises:
            ValueError: not even one iteration fits.
        """
        session = self.session(entropy, *self._grid(height, width))
        entries: list[Iteration] = []
        payloads: list[bytes] = []
        for plane in planes:
            coding, payload = session.encode(plane)
            header = self._header(height, width, [*entries, Iteration.of(payload, coding)])
            if bpp is not None and header.bpp[-1] > bpp:
                if not entries:
                    raise ValueError(f"one iteration takes {header.bpp[-1]:.4f} bpp, more than {bpp:g}")
                break
            entries, payloads = list(header.iterations), [*payloads, payload]
        return format.write(Container(self._header(height, width, entries), tuple(payloads)))

    def decode(
        self,
        data: bytes,
        iterations: int | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        progress: Progress | None = None,
    ) -> Image.Image:
        """Decompresses a file, or what is there of it.

        Args:
            data: the bytes of a file, which may have been cut anywhere behind the first iteration.
            iterations: decode only so many; None decodes all that are complete, with a warning if some are not.
            max_pixels: larger images are refused before anything is allocated for them.
            progress: is called with the steps done and the steps in all.

        Raises:
            WeightsError: the file needs other weights.
            FormatError: the data is corrupt, too large, no such file or without a complete iteration.
            ValueError: the file has fewer complete iterations than asked for.
        """
        header, count, planes = self._read(data, iterations, max_pixels)
        array = np.empty((header.height, header.width, 3), np.uint8)
        for _, (y, x), x_hat in self._synthesise(planes, count, header.height, header.width, progress):
            array[y, x] = to_uint8(x_hat)[0].permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(array)

    def decode_tensor(self, data: bytes, iterations: int | None = None, *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """As `decode`, but gives a tensor [3, H, W] in [0, 1], in steps of 1 / 255, on the codec's device."""
        array = np.asarray(self.decode(data, iterations, max_pixels=max_pixels))
        return torch.tensor(array, device=self.device).permute(2, 0, 1) / 255

    def decode_progressive(
        self, data: bytes, iterations: int | None = None, *, max_pixels: int = MAX_PIXELS
    ) -> Iterator[np.ndarray]:
        """Decompresses a file once and yields the image of every iteration, uint8 [H, W, 3]; arguments as in `decode`.

        Raises:
            ValueError: as `decode`, before the first image; a FormatError may come with the iteration that is corrupt.
        """
        header, count, planes = self._read(data, iterations, max_pixels)
        arrays: dict[int, np.ndarray] = {}  # of one iteration after the other, unless the loop runs in tiles
        for t, (y, x), x_hat in self._synthesise(planes, count, header.height, header.width, None, every=True):
            if t not in arrays:
                arrays[t] = np.empty((header.height, header.width, 3), np.uint8)
            arrays[t][y, x] = to_uint8(x_hat)[0].permute(1, 2, 0).cpu().numpy()
            if (y.stop, x.stop) == (header.height, header.width):  # the last tile
                yield arrays.pop(t)

    def compress(self, x: Tensor, iterations: int = MAX_ITERATIONS) -> Compressed:
        """Codes a batch to bare payloads, without header and checksums.

        Args:
            x: [B, 3, H, W] in [0, 1].
            iterations: 1 to `max_iterations`.

        Raises:
            ValueError: x or iterations is not as above.
        """
        if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(f"a batch is floating-point [B, 3, H, W], not {x.dtype} {list(x.shape)}")
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError("a batch holds values in [0, 1]")
        planes = np.stack(list(self._analyse(x.detach(), self._check_iterations(iterations), None)))
        strings = [[format.pack_bits(plane) for plane in planes[:, i]] for i in range(len(x))]
        return {"strings": strings, "shape": (x.shape[2], x.shape[3])}

    def decompress(
        self, strings: Sequence[Sequence[bytes]], shape: tuple[int, int], iterations: int | None = None
    ) -> Tensor:
        """Decodes what `compress` gave: [B, 3, H, W] in [0, 1], on the codec's device.

        Args:
            strings: for each image its payloads; may hold fewer iterations than were coded.
            shape: height and width of the images.
            iterations: decode only so many.

        Raises:
            ValueError: the payloads do not fit the shape, or there are fewer than asked for.
        """
        counts = {len(payloads) for payloads in strings}
        if len(counts) != 1 or counts == {0}:
            raise ValueError("every image of a batch needs the same number of payloads, at least one")
        iterations = self._check_iterations(counts.pop() if iterations is None else iterations)
        if iterations > len(strings[0]):
            raise ValueError(f"there are {len(strings[0])} iterations, not {iterations}")
        height, width = shape
        if height < 1 or width < 1:
            raise ValueError(f"not the shape of an image: {shape}")
        rows, columns = self._grid(height, width)
        planes = np.stack(
            [
                np.stack([format.unpack_bits(payloads[t], self.config.bits, rows, columns) for payloads in strings])
                for t in range(iterations)
            ]
        )
        x = torch.empty(len(strings), 3, height, width, device=self.device)
        for _, (rows_px, columns_px), x_hat in self._synthesise(planes, iterations, height, width, None):
            x[..., rows_px, columns_px] = (x_hat.clamp(-1, 1) + 1) / 2
        return x

    def read_bits(self, data: bytes, iterations: int | None = None, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """The bits of a file, or of what is there of it, bool [iterations, bits, rows, columns].

        Arguments and errors as in `decode`.
        """
        return np.concatenate(list(self._read(data, iterations, max_pixels)[2]))

    def _read(self, data: bytes, iterations: int | None, max_pixels: int) -> tuple[Header, int, Iterator[np.ndarray]]:
        """The header of a file, how many iterations to decode, and the bits of each [1, bits, rows, columns]."""
        if iterations is not None:
            self._check_iterations(iterations)
        header = format.read_header(data)
        self._check_header(header)
        payloads = format.read(data, max_pixels=max_pixels, iterations=iterations).payloads
        if not payloads:
            raise FormatError("the file has no complete iteration")
        if iterations is not None and iterations > len(payloads):
            raise ValueError(f"the file has {len(payloads)} complete iterations, not {iterations}")
        if iterations is None and len(payloads) < len(header.iterations):
            warnings.warn(
                f"the file is cut: decoded {len(payloads)} of {len(header.iterations)} iterations", stacklevel=3
            )
        codings = [it.coding for it in header.iterations[: len(payloads)]]
        if CONTEXT in codings and header.context != self.context_fingerprint:
            loaded = f"those that are loaded have {self.context_fingerprint.hex() if self.context else 'none'}"
            raise WeightsError(
                f"the file needs the weights {header.weights!r} with the context model {header.context.hex()}; {loaded}"
            )
        session = self.session(NAMES[max(codings)], header.rows, header.cols)  # raw is 0, of the others there is one
        planes = (session.decode(*coded)[None] for coded in zip(codings, payloads, strict=True))
        return header, len(payloads), planes

    def session(self, entropy: EntropyName | None, rows: int, columns: int) -> Session:
        """A new session of an entropy coder; None as in `encode`."""
        entropy = entropy or ("context" if self.context else "none")
        if entropy in CLASSICAL:
            return CLASSICAL[entropy](self.config.bits, rows, columns)
        if entropy != "context":
            raise ValueError(f"entropy is one of context, {', '.join(CLASSICAL)}, not {entropy!r}")
        if self.context is None:
            raise WeightsError(f"the weights {self.name!r} have no context model")
        questions = self.network.binarizer.questions if self.context.config.kind == "grouped" else None
        return ContextSession(self.context, self.config.bits, rows, columns, questions)

    def _analyse(self, images: Tensor, iterations: int, progress: Progress | None) -> Iterator[np.ndarray]:
        """The bits of images [B, 3, H, W], bool [B, bits, rows, columns] for each iteration."""
        height, width = images.shape[-2:]
        areas = self._tiles(height, width)
        if len(areas) == 1:  # an iteration costs nothing before it is asked for
            with _exact():  # not around `yield`, where it would be in force for the caller, too
                steps = self.network.unroll(self._input(images, areas[0].area), iterations)
            for t in range(iterations):
                with _exact():
                    step = next(steps)
                if progress:
                    progress(t + 1, iterations)
                yield (step.bits > 0).cpu().numpy()
            return
        planes = np.empty((iterations, len(images), self.config.bits, *self._grid(height, width)), bool)
        with _exact():
            for i, tile in enumerate(areas):
                for t, step in enumerate(self.network.unroll(self._input(images, tile.area), iterations)):
                    planes[t][..., *tile.core] = (step.bits > 0)[..., *inside(tile)].cpu().numpy()
                    if progress:
                        progress(i * iterations + t + 1, len(areas) * iterations)
        yield from planes

    def _analyse_to(self, target: float, image: Tensor, progress: Progress | None) -> np.ndarray:
        """As `_analyse`, for one image and with the fewest iterations that reach a PSNR."""
        if not target > 0 or math.isinf(target):
            raise ValueError(f"psnr must be a positive number of dB, not {target}")
        height, width = image.shape[-2:]
        areas = self._tiles(height, width)
        most, best = self.max_iterations, -math.inf

        def squared_error(x_hat: Tensor, box: Box) -> int:
            return int((to_uint8(x_hat).cpu().int() - image[..., *box].int()).square().sum())

        def decibel(error: int) -> float:
            return 10 * math.log10(255**2 * image.numel() / error) if error else math.inf

        if len(areas) == 1:  # the encoder's reconstruction is the decoder's
            found = []
            with _exact():
                for t, step in enumerate(self.network.unroll(self._input(image, areas[0].area), most)):
                    found.append((step.bits > 0).cpu().numpy())
                    pictures = self._pictures(step.state, areas[0], height, width)
                    reached = decibel(sum(squared_error(x_hat, box) for box, x_hat in pictures))
                    if progress:
                        progress(most if reached >= target else t + 1, most)
                    if reached >= target:
                        return np.stack(found)
                    best = max(best, reached)
            planes = np.stack(found)
        else:
            steps = most * len(areas)
            first = progress and (lambda done, _: progress(done, 2 * steps))
            planes = np.stack(list(self._analyse(image, most, first)))
            errors = [0] * most
            later = progress and (lambda done, _: progress(steps + done, 2 * steps))
            for t, box, x_hat in self._synthesise(planes, most, height, width, later, every=True):
                errors[t] += squared_error(x_hat, box)
            for t, error in enumerate(errors):
                if decibel(error) >= target:
                    return planes[: t + 1]
            best = decibel(min(errors))
        warnings.warn(f"{target:g} dB are out of reach, {most} iterations reach {best:.2f} dB", stacklevel=3)
        return planes

    def _synthesise(
        self,
        planes: Iterable[np.ndarray],
        count: int,
        height: int,
        width: int,
        progress: Progress | None,
        every: bool = False,
    ) -> Iterator[tuple[int, Box, Tensor]]:
        """Decodes `count` iterations [B, bits, rows, columns]; gives the iteration, a box in pixels and its x_hat.

        Only of the last iteration, or of `every` one.
        """
        areas = self._tiles(height, width)
        if len(areas) > 1:
            planes = list(planes)
        for i, tile in enumerate(areas):
            state = None
            for t, plane in enumerate(planes):
                with _exact():
                    bits = torch.from_numpy(plane[..., *tile.area]).to(self.device).float() * 2 - 1
                    step = self.network(state, bits=bits.contiguous(memory_format=torch.channels_last))
                state = step.state
                if progress:
                    progress(i * count + t + 1, len(areas) * count)
                if every or t == count - 1:
                    for box, x_hat in self._pictures(state, tile, height, width):
                        yield t, box, x_hat

    def _pictures(self, state: State, tile: Tile, height: int, width: int) -> Iterator[tuple[Box, Tensor]]:
        """What a state of a tile shows: boxes of an image in pixels, and their x_hat."""
        stride, halo = self.config.stride, self.network.transforms.halos[1]
        for area, core in windows(*tile.area, halo, self._window()):
            kept = tuple(
                slice(max(c.start, t.start), min(c.stop, t.stop)) for c, t in zip(core, tile.core, strict=True)
            )
            if any(cut.start >= cut.stop for cut in kept):
                continue
            box = tuple(
                slice(cut.start * stride, min(cut.stop * stride, length))
                for cut, length in zip(kept, (height, width), strict=True)
            )
            with _exact():
                x_hat = self.network.picture(state, inside(Tile(tile.area, area)))
            y, x = (
                slice(cut.start - start.start * stride, cut.stop - start.start * stride)
                for cut, start in zip(box, area, strict=True)
            )
            yield (box[0], box[1]), x_hat[..., y, x]

    def _input(self, images: Tensor, area: Box) -> Tensor:
        """What the loop runs on, of an area of images whose last pixels are repeated up to whole blocks."""
        halo, grid = self.network.transforms.halos[0], self._grid(*images.shape[-2:])
        cuts = windows(*area, halo, self._window(), grid)
        if cuts[0][0] == area:
            return self.network.analyse(self._pixels(images, area))
        parts = []
        for window, core in cuts:
            y = self.network.analyse(self._pixels(images, window))
            parts.append((core, y[..., *inside(Tile(window, core))]))
        rows, columns = (cut.stop - cut.start for cut in area)
        whole = parts[0][1].new_empty(*parts[0][1].shape[:2], rows, columns)
        for core, y in parts:
            whole[..., *inside(Tile(area, core))] = y
        return whole.contiguous(memory_format=torch.channels_last)

    def _pixels(self, images: Tensor, area: Box) -> Tensor:
        """An area of images in [-1, 1], their last pixels repeated up to whole blocks."""
        stride = self.config.stride
        rows, columns = area
        x = images[..., rows.start * stride : rows.stop * stride, columns.start * stride : columns.stop * stride]
        x = x.to(self.device)
        x = 2 * x.float() / 255 - 1 if x.dtype == torch.uint8 else 2 * x.float() - 1
        return pad_to_blocks(x, stride).contiguous(memory_format=torch.channels_last)

    def _window(self) -> int:
        """Blocks, a side, that the transforms work on at once."""
        if isinstance(self.config, LatentConfig):
            return math.ceil((self.tile or WINDOW) / self.config.stride)
        return MAX_SIDE

    def _check_iterations(self, iterations: int | None) -> int:
        """A number of iterations in range, 16 by default."""
        if iterations is None:
            return min(MAX_ITERATIONS, self.max_iterations)
        if not 1 <= iterations <= self.max_iterations:
            raise ValueError(f"iterations must be in 1..{self.max_iterations}, not {iterations}")
        return iterations

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the code of an image."""
        return math.ceil(height / self.config.stride), math.ceil(width / self.config.stride)

    def _tiles(self, height: int, width: int) -> list[Tile]:
        return tiles(self.config, *self._grid(height, width), self.tile)

    def _header(self, height: int, width: int, iterations: Sequence[Iteration]) -> Header:
        return Header(
            width=width,
            height=height,
            fingerprint=self.fingerprint,
            weights=self.name,
            stride=self.config.stride,
            bits=self.config.bits,
            iterations=tuple(iterations),
            context=self.context_fingerprint if any(it.coding == CONTEXT for it in iterations) else bytes(8),
        )

    def _check_header(self, header: Header) -> None:
        """Refuses files that this codec cannot decode."""
        if header.fingerprint != self.fingerprint:
            raise WeightsError(
                f"the file needs the weights {header.weights!r} ({header.fingerprint.hex()}), "
                f"loaded are {self.name!r} ({self.fingerprint.hex()})"
            )
        if (header.stride, header.bits) != (self.config.stride, self.config.bits):
            raise FormatError(
                f"the header says stride {header.stride} and {header.bits} bits, "
                f"its weights have stride {self.config.stride} and {self.config.bits} bits"
            )
        if len(header.iterations) > self.max_iterations:
            raise FormatError(f"{len(header.iterations)} iterations, its weights decode up to {self.max_iterations}")


def _as_array(image: Image.Image | np.ndarray | Tensor) -> np.ndarray:
    """Whatever `Codec.encode` takes as uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(f"a tensor image is floating-point [3, H, W], not {image.dtype} {list(image.shape)}")
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError("a tensor image holds values in [0, 1]")
        return _as_array((image.detach().float() * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"an image is uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    return np.require(image, requirements=["C", "W"])


@contextmanager
def _exact() -> Iterator[None]:
    """No gradients, and float32 in full: encoder and decoder must agree, and tilings differ as little as can be."""
    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
        ),
    ):
        yield
