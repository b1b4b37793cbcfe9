"""Encodes images of any size to compressed files and decodes them, with one trained network."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import SupportsIndex, get_args

import numpy as np
import torch
from PIL import Image

from rnncodec import threads  # noqa: F401 - its hook lets forked processes compute
from rnncodec.allocation import TuneName, region_weights
from rnncodec.entropy import EntropyName, Session, new_session
from rnncodec.files import format
from rnncodec.files.format import (
    CODINGS,
    CONTEXT,
    MAX_PARTS,
    PARTS_VERSION,
    RAW_VERSION,
    Container,
    Entry,
    FormatError,
    Header,
)
from rnncodec.files.images import MAX_PIXELS
from rnncodec.imagecodec import ImageCodec, check_targets
from rnncodec.inputs import Input
from rnncodec.loop import Loop, Progress
from rnncodec.network import to_uint8
from rnncodec.targets import Allocator
from rnncodec.tiling import MAX_ITERATIONS
from rnncodec.weights import Weights, WeightsError

PART = 256  # locations for each part of an iteration; more parts would cost small images too much in headers


class Codec(ImageCodec):
    """A network ready to code images; `rnncodec.load` makes one.

    On one device, encoding and decoding t iterations and step t of `network.unroll` reconstruct exactly the same image.

    Args:
        weights: from `rnncodec.weights.load_weights`; their network moves to the device.
        device: where to compute, `cpu` or `cuda`.
        tile: side in pixels, rounded up to whole blocks, of the tiles that images are cut into; None cuts only images
            whose activations would take more than 2 GiB. Tiles change files only in the choice of bits along borders,
            and decoded images only in the last bits of floating-point sums.
        bfloat16: compute in bfloat16 where encoder and decoder need not agree: the encoder's decisions, and the
            transforms of latent networks. Files still decode everywhere. It is faster on GPUs and on processors with
            instructions for it; images change by about a thousandth of a dB.

    Raises:
        ValueError: the device is not available.
    """

    def __init__(
        self, weights: Weights, device: str | torch.device = "cpu", tile: int | None = None, bfloat16: bool = False
    ) -> None:
        super().__init__(weights, device)
        if tile is not None and tile < 1:
            raise ValueError(f"tile must be at least 1, not {tile}")
        self.context = weights.context and weights.context.to(self.device)
        network = weights.recurrent.eval().to(self.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.network = copy.copy(network)  # shares the parameters, but not `in_bfloat16`
        self.network.in_bfloat16 = bfloat16
        self.config = weights.recurrent.config
        self.loop = Loop(self.network, tile)
        self.max_iterations = self.loop.max_iterations
        grouped = self.context is not None and self.context.config.kind == "grouped"
        self._questions = self.network.binarizer.questions if grouped else None
        self.allocator: Allocator | None = None
        if weights.allocation is not None and self.context is not None and grouped:
            self.allocator = Allocator(self.loop, self.context, weights.allocation)

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
        entropy: EntropyName | Session | None = None,
        records: Mapping[str, bytes] | None = None,
        progress: Progress | None = None,
    ) -> bytes:
        """Compresses an image; at most one of iterations, quality, bpp, max_bytes and psnr sets the target.

        Without a target, or with one of iterations, every location gets as many iterations as all others. For psnr, bpp
        and max_bytes, and for quality with the tune `psnr`, a latent network with its context model chooses how many
        each location gets, see `rnncodec.allocation`. In all other cases the number is chosen for the whole image.

        Args:
            image: path of an image file of at most 2^28 pixels (`load_photograph` reads larger ones), PIL image of any
                mode, uint8 array [H, W, 3], or tensor [3, H, W] in [0, 1], rounded to 8 bits. A file, also one that PIL
                has opened, is turned upright as its EXIF says; what PIL has made of it since is taken as it is.
            iterations: at least 1, 16 by default, at most `max_iterations`.
            quality: from 1 to 100, see README.md.
            bpp: the most bits per pixel of the whole file.
            max_bytes: the most bytes of the whole file.
            psnr: PSNR of the decoded image in dB, which is warned of if it is out of reach.
            tune: the metric that locations get their iterations for, with quality, bpp or max_bytes.
            roi: how much each region counts, uint8 [H, W] from 0, as without it, to 255, whose errors count 16 times
                as much; needs a target, and a network that chooses the iterations of each location, by squared error.
            entropy: coder of the bits (see `rnncodec.entropy`), a new session of it, or `none` for raw bits; None takes
                the context model if the weights have one. Iterations that a coder does not shorten are stored raw.
            records: what the file is to say of the photograph, as `rnncodec.files.load_photograph` gives it; None takes
                what an image file says, nothing for other images.
            progress: is called with the number of steps done and the number of all steps.

        Returns:
            The bytes of a file, see FORMAT.md.

        Raises:
            ValueError: the image, the target or the records are not as above, the image file cannot be read, or not
                even the first payload fits bpp or max_bytes.
        """
        array, block = self.read(image, records)
        height, width = array.shape[:2]
        max_bytes = check_targets(
            height, width, iterations=iterations, quality=quality, bpp=bpp, max_bytes=max_bytes, psnr=psnr
        )
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
        if tune not in get_args(TuneName):
            raise ValueError(f"tune is one of {', '.join(get_args(TuneName))}, not {tune!r}")
        if roi is not None:
            found = f"{roi.dtype} {list(roi.shape)}" if isinstance(roi, np.ndarray) else type(roi).__name__
            if found != f"uint8 {[height, width]}":
                raise ValueError(f"the region of interest of this image is uint8 [{height}, {width}], not {found}")
        way: TuneName = "psnr" if psnr is not None or roi is not None else tune
        if self.allocator is not None and entropy in (None, "context"):
            target = self.allocator.target(quality, max_bytes, psnr, way, array.size)
            if target is not None:
                grid = self.loop.grid(height, width)

                def write(planes: Iterable[np.ndarray]) -> bytes:
                    planes = list(planes)
                    session = self.session("context", *grid, maps=not all(plane.all() for plane in planes))
                    return self._write(planes, session, height, width, None, block)

                weight = region_weights(roi, self.config.stride)
                return self.allocator.encode(pixels, target, way, weight, write, self._parts(*grid), progress)
        if roi is not None:
            raise ValueError("a region of interest needs a target, and a latent network with its context model")
        session = self.session(entropy, *self.loop.grid(height, width))  # before the work, as it may raise
        count = None
        if quality is not None:
            count = round((1 + self._effort(quality) * (self.max_iterations - 1)) * session.parts)
            iterations = -(-count // session.parts)
        if psnr is None:
            planes: Iterable[np.ndarray] = self.loop.encode(pixels, self._check_iterations(iterations), progress)
            if max_bytes is None:  # to alternate takes time: small images are entropy coded by one thread
                planes = list(planes)
        else:
            planes = self.loop.encode_to(psnr, pixels, progress)
        return self._write((plane[0] for plane in planes), session, height, width, max_bytes, block, count)

    def _effort(self, quality: float) -> float:
        """The effort of a quality without stops, see `rnncodec.allocation`."""
        return self.allocator.effort(quality, "ms-ssim") if self.allocator else (quality - 1) / 99

    def write_bits(
        self,
        planes: Iterable[np.ndarray],
        height: int,
        width: int,
        entropy: EntropyName | Session | None = None,
        max_bytes: int | None = None,
    ) -> bytes:
        """Writes bits that this codec has computed as a file; `read_bits` reads them.

        Args:
            planes: int8 [bits, rows, columns] of -1 and +1 for each iteration; those that do not fit into `max_bytes`
                are left out.
            height: of the image in pixels.
            width: of the image in pixels.
            entropy: as in `encode`.
            max_bytes: the most bytes of the whole file.

        Raises:
            ValueError: not even the first payload fits into `max_bytes`.
        """
        return self._write(planes, self.session(entropy, *self.loop.grid(height, width)), height, width, max_bytes, b"")

    def _write(
        self,
        planes: Iterable[np.ndarray],
        session: Session,
        height: int,
        width: int,
        max_bytes: int | None,
        block: bytes,
        count: int | None = None,
    ) -> bytes:
        """Writes a file as `write_bits` does, with a new session and a block of records, which may be empty.

        It gets at most `count` payloads.
        """
        entries: list[Entry] = []
        payloads: list[bytes] = []
        shape = {"parts": session.parts, "maps": session.maps}
        version = PARTS_VERSION if session.parts > 1 or session.maps or block else RAW_VERSION
        for coding, payload in (piece for plane in planes for piece in session.encode(plane)):
            entries.append(Entry.of(payload, coding, version))
            payloads.append(payload)
            if max_bytes is not None:
                header = self.header(height, width, entries, block, **shape)
                if header.sizes[-1] > max_bytes:
                    if len(entries) == 1:
                        raise ValueError(header.above(max_bytes))
                    del entries[-1], payloads[-1]
                    break
            if len(payloads) == count:
                break
        return format.write(Container(self.header(height, width, entries, block, **shape), tuple(payloads), block))

    def decode(
        self,
        data: bytes,
        iterations: int | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        progress: Progress | None = None,
    ) -> Image.Image:
        """Decompresses a file, which may have been cut.

        Args:
            data: the bytes of a file, at least as far as the end of the first iteration.
            iterations: how many to decode; None decodes all that are complete, with a warning if some are not.
            max_pixels: larger images are refused before anything is allocated for them.
            progress: is called with the number of steps done and the number of all steps.

        Raises:
            WeightsError: the file needs other weights.
            FormatError: the data is not an .rnc file, corrupt, too large, or without a complete iteration.
            ValueError: the file has fewer complete iterations than asked for.
        """
        header, _, planes = self._read(data, iterations, max_pixels)
        bits = list(planes)  # if they are corrupt, nothing is allocated for the image
        array = np.empty((header.height, header.width, 3), np.uint8)
        for _, (y, x), x_hat in self.loop.decode(bits, len(bits), header.height, header.width, progress):
            array[y, x] = to_uint8(x_hat)[0].permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(array)

    def decode_progressive(
        self, data: bytes, iterations: int | None = None, *, parts: bool = False, max_pixels: int = MAX_PIXELS
    ) -> Iterator[np.ndarray]:
        """Decompresses a file once and yields the image of every iteration, uint8 [H, W, 3].

        Args:
            data: as in `decode`.
            iterations: as in `decode`.
            parts: whether to yield the image after every part of an iteration, as if the file ended there.
            max_pixels: as in `decode`.

        Raises:
            ValueError: as in `decode`, before the first image; a FormatError may also come at a corrupt iteration.
        """
        header, found, planes = self._read(data, iterations, max_pixels)
        arrays: dict[int, np.ndarray] = {}  # of one picture at a time, unless the loop runs in tiles
        per, count = header.parts if parts else 1, -(-found // header.parts)
        for i, (y, x), x_hat in self.loop.decode(planes, count, header.height, header.width, None, per):
            if i not in arrays:
                arrays[i] = np.empty((header.height, header.width, 3), np.uint8)
            arrays[i][y, x] = to_uint8(x_hat)[0].permute(1, 2, 0).cpu().numpy()
            if (y.stop, x.stop) == (header.height, header.width):  # the last tile
                yield arrays.pop(i)
                if parts and i + 1 == found:  # the last iteration may lack parts
                    return

    def read_bits(self, data: bytes, iterations: int | None = None, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Reads the bits of a file, which may have been cut.

        Arguments and errors as in `decode`.

        Returns:
            int8 [iterations, bits, rows, columns] of -1 and +1, and 0 where nothing was sent.
        """
        return np.concatenate(list(self._read(data, iterations, max_pixels)[2]))

    def _read(self, data: bytes, iterations: int | None, max_pixels: int) -> tuple[Header, int, Iterator[np.ndarray]]:
        """The header of a file, how many payloads to decode, and the bits of iterations [1, bits, rows, columns]."""
        if iterations is not None:
            self._check_iterations(iterations)
        header = format.read_header(data)
        self.check_header(header)
        payloads = format.read(data, max_pixels=max_pixels, iterations=iterations).payloads
        parts = header.parts
        if not payloads:
            raise FormatError(f"the file has no complete {'part of an ' if parts > 1 else ''}iteration")
        if iterations is not None and iterations > len(payloads) // parts:
            raise ValueError(f"the file has {len(payloads) // parts} complete iterations, not {iterations}")
        if iterations is None and len(payloads) < len(header.entries):
            found, whole = (f"{count / parts:g}" for count in (len(payloads), len(header.entries)))
            warnings.warn(f"the file is cut: decoded {found} of {whole} iterations", stacklevel=3)
        codings = [entry.coding for entry in header.entries[: len(payloads)]]
        if CONTEXT in codings and header.context != self.context_fingerprint:
            loaded = f"those that are loaded have {self.context_fingerprint.hex() if self.context else 'none'}"
            raise WeightsError(
                f"the file needs the weights {header.weights!r} with the context model {header.context.hex()}; {loaded}"
            )
        entropy = CODINGS[max(codings)]  # RAW is 0; there is at most one other
        if parts > 1 or header.maps:
            entropy = "context"
        session = self._session(entropy, header.rows, header.cols, parts, header.maps)
        pieces = list(zip(codings, payloads, strict=True))
        planes = (session.decode(pieces[t : t + parts])[None] for t in range(0, len(pieces), parts))
        return header, len(pieces), planes

    def session(self, entropy: EntropyName | Session | None, rows: int, columns: int, maps: bool = False) -> Session:
        """A new session of an entropy coder, chosen as in `encode`; a given session is returned as it is.

        If `maps` is set, locations may stop. Raises ValueError or WeightsError if the weights have no fitting coder.
        """
        if isinstance(entropy, Session):
            return entropy
        entropy = entropy or ("context" if self.context else "none")
        parts = self._parts(rows, columns) if entropy == "context" else 1
        return self._session(entropy, rows, columns, parts, maps)

    def _parts(self, rows: int, columns: int) -> int:
        """Payloads of an iteration with the context model."""
        if self.context is None or self.context.config.kind != "grouped":
            return 1
        groups, most = self.context.config.groups, max(1, rows * columns // PART)
        return max(parts for parts in range(1, min(groups, most, MAX_PARTS) + 1) if groups % parts == 0)

    def _session(self, entropy: EntropyName, rows: int, columns: int, parts: int, maps: bool) -> Session:
        """A new session that codes iterations in parts, or locations that may stop."""
        if entropy == "context" and self.context is None:
            raise WeightsError(f"the weights {self.name!r} have no context model")
        shape = self.config.bits, rows, columns
        return new_session(entropy, shape, self.context, self._questions, parts, maps)

    def _check_iterations(self, iterations: int | None) -> int:
        """A number of iterations in range, 16 by default."""
        if iterations is None:
            return min(MAX_ITERATIONS, self.max_iterations)
        if not isinstance(iterations, SupportsIndex) or not 1 <= iterations.__index__() <= self.max_iterations:
            raise ValueError(f"iterations must be in 1..{self.max_iterations}, not {iterations}")
        return iterations
