"""Entropy coding of the bits of an iteration, without loss: the context model's range coder and the classical ones.

Every coder works through the iterations of one image in order, as a `Session`: what an iteration of bits [bits, rows,
cols] becomes depends on the earlier iterations and on nothing else, so that a file can be cut after any of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import constriction
import numpy as np
import torch
from torch import Tensor

from rnncodec.context import SCALE, ContextModel, Memory, probability
from rnncodec.format import ADAPTIVE, CONTEXT, HUFFMAN, RAW, STATIC, FormatError, pack_bits, unpack_bits

EntropyName = Literal["none", "context", "huffman", "static", "adaptive"]

BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)

Code = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
"""Codes the bits at a location (y, x), given P(1) * SCALE of each: int [bits] to bool [bits]."""


class RangeEncoder:
    """Collects bits with their probabilities and codes them at once; `RangeDecoder` is the other side."""

    def __init__(self) -> None:
        self.bits: list[np.ndarray] = []
        self.chances: list[np.ndarray] = []

    def write(self, chances: np.ndarray, bits: np.ndarray) -> None:
        """Takes bits, bool [n], and P(1) * SCALE of each, int [n] between 0 and SCALE, exclusive."""
        self.bits.append(bits)
        self.chances.append(chances)

    def finish(self) -> bytes:
        """The code of all bits."""
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(np.concatenate(self.bits).astype(np.int32), BERNOULLI, np.concatenate(self.chances) / SCALE)
        return coder.get_compressed().astype("<u4").tobytes()


class RangeDecoder:
    """Gives the bits back, in groups of any size, for the same probabilities."""

    def __init__(self, payload: bytes) -> None:
        if len(payload) % 4:
            raise FormatError("an entropy-coded payload is cut short")
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))

    def read(self, chances: np.ndarray) -> np.ndarray:
        """The next bits, bool [n], given P(1) * SCALE of each.

        Raises:
            FormatError: no encoder gives such a code.
        """
        try:
            return self._coder.decode(BERNOULLI, chances / SCALE).astype(bool)
        except AssertionError as error:
            raise FormatError("an entropy-coded payload is corrupt") from error

    def finish(self) -> None:
        """Makes sure that nothing is left.

        Raises:
            FormatError: something is.
        """
        if not self._coder.maybe_exhausted():
            raise FormatError("an entropy-coded payload is corrupt")


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Keeps products in float32, whatever the caller allows: no autocast, no bfloat16 within matrix products."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Session(ABC):
    """Codes the iterations of one image in order.

    Args:
        bits, rows, cols: shape of the bits of an iteration.
    """

    coding: ClassVar[int]  # number of the coder in files, see FORMAT.md

    def __init__(self, bits: int, rows: int, cols: int) -> None:
        self.shape = bits, rows, cols

    def encode(self, plane: np.ndarray) -> tuple[int, bytes]:
        """Coding and payload of the next iteration, bool [bits, rows, cols]: raw if the coder does not shorten it."""
        raw, coded = pack_bits(plane), self._encode(plane)
        self._advance(plane)
        return (self.coding, coded) if len(coded) < len(raw) else (RAW, raw)

    def decode(self, coding: int, payload: bytes) -> np.ndarray:
        """The bits of the next iteration, bool [bits, rows, cols].

        Raises:
            FormatError: the payload is none that `encode` gives, or of another coder.
        """
        if coding not in (RAW, self.coding):
            raise FormatError(f"coding {coding} where {self.coding} was expected")
        plane = unpack_bits(payload, *self.shape) if coding == RAW else self._decode(payload)
        self._advance(plane)
        return plane

    @abstractmethod
    def _encode(self, plane: np.ndarray) -> bytes:
        """The payload of a plane."""

    @abstractmethod
    def _decode(self, payload: bytes) -> np.ndarray:
        """The plane of a payload."""

    def _advance(self, plane: np.ndarray) -> None:  # noqa: B027 - most coders remember nothing
        """Takes note of an iteration before the next one."""


class ContextSession(Session):
    """The range coder with the probabilities of an exact context model (T17 sec. 4).

    Args:
        model: from `ContextModel.quantize`, on the device that is to compute.
        bits, rows, cols: shape of the bits of an iteration.
    """

    coding = CONTEXT

    def __init__(self, model: ContextModel, bits: int, rows: int, cols: int) -> None:
        super().__init__(bits, rows, cols)
        self.model = model
        self.iteration = 0
        self.state: Memory | None = None
        weight = model.history.prior.weight
        self._blank = weight.new_zeros(1, bits, rows, cols)

    def chances(self, plane: np.ndarray) -> np.ndarray:
        """P(1) * SCALE of every bit of the next iteration, int [bits, rows, cols]."""
        with _exact(self._blank.device):
            prior = self.model.history.look(self.state, self._blank)
            logits = self.model.predictor(self.iteration)(self._signs(plane), prior)
            return probability(logits)[0].cpu().numpy()

    def _encode(self, plane: np.ndarray) -> bytes:
        order = self.model.predictor(self.iteration).order(*self.shape)
        coder = RangeEncoder()
        coder.write(*(a.transpose(1, 2, 0).ravel()[order] for a in (self.chances(plane), plane)))
        return coder.finish()

    def _decode(self, payload: bytes) -> np.ndarray:
        coder = RangeDecoder(payload)
        with _exact(self._blank.device):
            prior = self.model.history.look(self.state, self._blank)
            plane = self.model.predictor(self.iteration).decode(prior, self.shape[0], coder.read)
        coder.finish()
        return (plane[0] > 0).cpu().numpy()

    def _advance(self, plane: np.ndarray) -> None:
        with _exact(self._blank.device):
            self.state = self.model.history(self._signs(plane), self.state)
        self.iteration += 1

    def _signs(self, plane: np.ndarray) -> Tensor:
        return torch.from_numpy(plane).to(self._blank)[None] * 2 - 1


class RawSession(Session):
    """No entropy coding."""

    coding = RAW

    def _encode(self, plane: np.ndarray) -> bytes:
        return pack_bits(plane)

    def _decode(self, payload: bytes) -> np.ndarray:
        return unpack_bits(payload, *self.shape)


class HuffmanSession(Session):
    """Huffman codes of groups of bits of one location (S07): a code book for each iteration, at its beginning.

    The book says how probable each group is, as a power of two in four bits.
    """

    coding = HUFFMAN
    GROUP = 4

    def __init__(self, bits: int, rows: int, cols: int) -> None:
        super().__init__(bits, rows, cols)
        self.group = next(size for size in (self.GROUP, 2, 1) if bits % size == 0)

    def _encode(self, plane: np.ndarray) -> bytes:
        groups = plane.transpose(1, 2, 0).reshape(-1, self.group)
        symbols = groups @ (1 << np.arange(self.group)[::-1])
        shares = np.bincount(symbols, minlength=1 << self.group) / len(symbols)
        lengths = np.clip(np.round(-np.log2(np.maximum(shares, 2.0**-15))), 0, 15).astype(np.uint8)
        book = constriction.symbol.huffman.EncoderHuffmanTree(2.0 ** -lengths.astype(np.float64))
        coder = constriction.symbol.QueueEncoder()
        for symbol in symbols.tolist():
            coder.encode_symbol(symbol, book)
        words, size = coder.get_compressed()
        nibbles = np.unpackbits(lengths[:, None], axis=1)[:, 4:]
        return np.packbits(nibbles).tobytes() + words.astype("<u4").tobytes()[: -(-size // 8)]

    def _decode(self, payload: bytes) -> np.ndarray:
        bits, rows, cols = self.shape
        size = -(-(4 << self.group) // 8)
        if len(payload) < size:
            raise FormatError("an entropy-coded payload is cut short")
        nibbles = np.unpackbits(np.frombuffer(payload[:size], np.uint8))[: 4 << self.group].reshape(-1, 4)
        lengths = nibbles @ (1 << np.arange(4)[::-1])
        book = constriction.symbol.huffman.DecoderHuffmanTree(2.0 ** -lengths.astype(np.float64))
        code = payload[size:] + bytes(-(len(payload) - size) % 4)
        coder = constriction.symbol.QueueDecoder(np.frombuffer(code, "<u4").astype(np.uint32))
        try:
            symbols = np.array([coder.decode_symbol(book) for _ in range(rows * cols * bits // self.group)])
        except (AssertionError, ValueError) as error:
            raise FormatError("an entropy-coded payload is corrupt") from error
        flat = (symbols[:, None] >> np.arange(self.group)[::-1]) & 1
        return flat.astype(bool).reshape(rows, cols, bits).transpose(2, 0, 1)


class StaticSession(Session):
    """The range coder with one probability for each channel, a byte at the beginning of each iteration (S07)."""

    coding = STATIC

    def _chances(self, shares: np.ndarray) -> np.ndarray:
        return np.tile(shares.astype(np.int64) * (SCALE // 256), self.shape[1] * self.shape[2])

    def _encode(self, plane: np.ndarray) -> bytes:
        shares = np.clip(np.round(plane.mean((1, 2)) * 256), 1, 255).astype(np.uint8)
        coder = RangeEncoder()
        coder.write(self._chances(shares), plane.transpose(1, 2, 0).ravel())
        return shares.tobytes() + coder.finish()

    def _decode(self, payload: bytes) -> np.ndarray:
        bits, rows, cols = self.shape
        shares = np.frombuffer(payload[:bits], np.uint8)
        if len(shares) < bits or not shares.all():
            raise FormatError("an entropy-coded payload is corrupt")
        coder = RangeDecoder(payload[bits:])
        plane = coder.read(self._chances(shares)).reshape(rows, cols, bits).transpose(2, 0, 1)
        coder.finish()
        return plane


class AdaptiveSession(Session):
    """The range coder with probabilities that are counted on both sides: of each channel, given its left and upper bit.

    An estimate of Krichevsky and Trofimov for each channel and context, which begins anew in every iteration (S07).
    """

    coding = ADAPTIVE

    def _encode(self, plane: np.ndarray) -> bytes:
        coder = RangeEncoder()

        def write(chances: np.ndarray, place: tuple[int, int]) -> np.ndarray:
            coder.write(chances, plane[:, *place])
            return plane[:, *place]

        self._walk(write)
        return coder.finish()

    def _decode(self, payload: bytes) -> np.ndarray:
        coder = RangeDecoder(payload)
        plane = self._walk(lambda chances, place: coder.read(chances))
        coder.finish()
        return plane

    def _walk(self, code: Code) -> np.ndarray:
        """Visits the locations line by line and gives what `code` gave for each."""
        bits, rows, cols = self.shape
        channels = np.arange(bits)
        ones = np.ones((bits, 4), np.int64)  # counts of half an occurrence
        total = np.full((bits, 4), 2, np.int64)
        plane = np.zeros((rows + 1, cols + 1, bits), bool)
        for y in range(1, rows + 1):
            for x in range(1, cols + 1):
                context = channels, 2 * plane[y - 1, x] + plane[y, x - 1]
                chances = np.clip(ones[context] * SCALE // total[context], 1, SCALE - 1)
                plane[y, x] = code(chances, (y - 1, x - 1))
                ones[context] += 2 * plane[y, x]
                total[context] += 2
        return plane[1:, 1:].transpose(2, 0, 1)


# The coders that need no model.
CLASSICAL: dict[EntropyName, type[Session]] = {
    "none": RawSession,
    "huffman": HuffmanSession,
    "static": StaticSession,
    "adaptive": AdaptiveSession,
}
