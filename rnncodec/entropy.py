"""Entropy coding of the bits of an iteration, without loss: the context model's range coder and the classical ones.

Every coder works through the iterations of one image in order, as a `Session`: what an iteration of bits [bits, rows,
cols] becomes depends on the earlier iterations and on nothing else, so that a file can be cut after any of them.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from rnncodec.context import SCALE, ContextModel, Memory, probability
from rnncodec.format import ADAPTIVE, CONTEXT, HUFFMAN, RAW, STATIC, FormatError, length_size, pack_bits, unpack_bits

EntropyName = Literal["none", "context", "huffman", "static", "adaptive"]

BERNOULLI = stream.model.Bernoulli(perfect=False)

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
        coder = stream.queue.RangeEncoder()
        coder.encode(np.concatenate(self.bits).astype(np.int32), BERNOULLI, np.concatenate(self.chances) / SCALE)
        return coder.get_compressed().astype("<u4").tobytes()


class RangeDecoder:
    """Gives the bits back, in groups of any size, for the same probabilities."""

    def __init__(self, payload: bytes) -> None:
        if len(payload) % 4:
            raise FormatError("an entropy-coded payload is cut short")
        self._coder = stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))

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


class Session(ABC):
    """Codes the iterations of one image in order.

    Args:
        bits, rows, cols: shape of the bits of an iteration.
    """

    coding: ClassVar[int]  # number of the coder in files, see FORMAT.md

    def __init__(self, bits: int, rows: int, cols: int) -> None:
        self.shape = bits, rows, cols

    def encode(self, plane: np.ndarray) -> tuple[int, bytes]:
        """Coding and payload of the next iteration, bool [bits, rows, cols]; raw if that is shorter."""
        raw, coded = pack_bits(plane), self._encode(plane)
        self._advance(plane)
        # The header says how long a coded payload is.
        return (self.coding, coded) if 0 < len(coded) < len(raw) - length_size(len(raw)) else (RAW, raw)

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

    Large planes are coded in bands of rows that know nothing of each other, which bounds the working memory. There
    remain the states, 16 bytes for each channel and location.

    Args:
        model: from `ContextModel.quantize`, on the device that is to compute.
        bits, rows, cols: shape of the bits of an iteration.
    """

    coding = CONTEXT
    BAND = 2**17  # locations, about 33 megapixels

    def __init__(self, model: ContextModel, bits: int, rows: int, cols: int) -> None:
        super().__init__(bits, rows, cols)
        self.model = model
        self.iteration = 0
        self.pending: list[np.ndarray] = []  # earlier iterations that are not yet part of the states
        height = max(1, self.BAND // cols)
        self.bands = [slice(top, min(top + height, rows)) for top in range(0, rows, height)]
        self.states: list[Memory | None] = [None] * len(self.bands)

    def chances(self, plane: np.ndarray) -> np.ndarray:
        """P(1) * SCALE of every bit of the next iteration, int [bits, rows, cols]."""
        predictor = self.model.predictor(self.iteration)
        with torch.inference_mode():
            found = [probability(predictor(self._signs(plane[:, b]), prior))[0] for b, prior in self._priors()]
        return torch.cat(found, dim=1).cpu().numpy()

    def ideal_bits(self, plane: np.ndarray) -> float:
        """The code length of the next iteration by the model's probabilities alone, which no coder can beat."""
        p = self.chances(plane) / SCALE
        self._advance(plane)
        return float(-np.log2(np.where(plane, p, 1 - p)).sum())

    def _encode(self, plane: np.ndarray) -> bytes:
        predictor, chances = self.model.predictor(self.iteration), self.chances(plane)
        coder = RangeEncoder()
        for band in self.bands:
            order = predictor.order(*plane[:, band].shape)
            coder.write(*(a[:, band].transpose(1, 2, 0).ravel()[order] for a in (chances, plane)))
        return coder.finish()

    def _decode(self, payload: bytes) -> np.ndarray:
        predictor, coder = self.model.predictor(self.iteration), RangeDecoder(payload)
        with torch.inference_mode():
            found = [predictor.decode(prior, self.shape[0], coder.read)[0] > 0 for _, prior in self._priors()]
        coder.finish()
        return torch.cat(found, dim=1).cpu().numpy()

    def _advance(self, plane: np.ndarray) -> None:
        self.pending.append(plane)
        self.iteration += 1

    def _priors(self) -> Iterator[tuple[slice, Tensor]]:
        """The bands, each with what the model knows of the next iteration before its first bit."""
        pending, self.pending = self.pending, []
        for i, band in enumerate(self.bands):
            for plane in pending:
                self.states[i] = self.model.history(self._signs(plane[:, band]), self.states[i])
            blank = self._signs(np.zeros((self.shape[0], band.stop - band.start, self.shape[2]), bool))
            yield band, self.model.history.look(self.states[i], blank)

    def _signs(self, plane: np.ndarray) -> Tensor:
        return torch.from_numpy(plane).to(self.model.history.prior.weight)[None] * 2 - 1


class RawSession(Session):
    """No entropy coding."""

    coding = RAW

    def _encode(self, plane: np.ndarray) -> bytes:
        return pack_bits(plane)

    def _decode(self, payload: bytes) -> np.ndarray:
        return unpack_bits(payload, *self.shape)


class HuffmanSession(Session):
    """Canonical Huffman codes of groups of four bits of one location (S07), with a code book for each iteration."""

    coding = HUFFMAN
    LONGEST = 15  # bits of a code of 16 symbols, so that a length takes four

    def __init__(self, bits: int, rows: int, cols: int) -> None:
        super().__init__(bits, rows, cols)
        self.group = next(size for size in (4, 2, 1) if bits % size == 0)

    def _encode(self, plane: np.ndarray) -> bytes:
        symbols = plane.transpose(1, 2, 0).reshape(-1, self.group) @ (1 << np.arange(self.group)[::-1])
        lengths = huffman_lengths(np.bincount(symbols, minlength=1 << self.group))
        codes = np.zeros((len(lengths), self.LONGEST), bool)  # left-aligned
        for symbol, code in canonical_codes(lengths).items():
            codes[symbol, : lengths[symbol]] = [char == "1" for char in code]
        bits = codes[symbols][np.arange(self.LONGEST) < lengths[symbols, None]]
        nibbles = np.unpackbits(lengths[:, None], axis=1)[:, 4:]
        return np.packbits(nibbles).tobytes() + np.packbits(bits).tobytes()

    def _decode(self, payload: bytes) -> np.ndarray:
        bits, rows, cols = self.shape
        size = (4 << self.group) // 8
        flat = np.unpackbits(np.frombuffer(payload, np.uint8))
        lengths = flat[: 8 * size].reshape(-1, 4) @ (1 << np.arange(4)[::-1])
        if len(lengths) < 1 << self.group or (2.0 ** -lengths[lengths > 0].astype(float)).sum() > 1:
            raise FormatError("the code book of an entropy-coded payload is corrupt")
        # What the next 15 bits begin with, for every value they may have: a symbol and the length of its code.
        book = [(0, 0)] * (1 << self.LONGEST)
        for symbol, code in canonical_codes(lengths).items():
            count = 1 << (self.LONGEST - len(code))
            start = int(code, 2) * count
            book[start : start + count] = [(symbol, len(code))] * count
        code = np.pad(flat[8 * size :], (0, self.LONGEST))
        end = len(code) - self.LONGEST
        windows = np.zeros(end, np.uint16)
        for i in range(self.LONGEST):
            windows = windows << 1 | code[i : i + end]
        next_bits, place = windows.data, 0
        symbols = bytearray(rows * cols * bits // self.group)
        for i in range(len(symbols)):
            symbols[i], length = book[next_bits[place]] if place < end else (0, 0)
            if not length:
                raise FormatError("an entropy-coded payload is corrupt")
            place += length
        if not 0 <= end - place < 8 or code[place:].any():
            raise FormatError("an entropy-coded payload is corrupt")
        groups = (np.frombuffer(symbols, np.uint8)[:, None] >> np.arange(self.group)[::-1]) & 1
        return groups.astype(bool).reshape(rows, cols, bits).transpose(2, 0, 1)


def huffman_lengths(counts: np.ndarray) -> np.ndarray:
    """Lengths of the codes of an optimal prefix code, uint8 [N], 0 for symbols that do not occur."""
    heap = [(int(count), symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    lengths = np.zeros(len(counts), np.uint8)
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (first, tie, below), (second, _, beside) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[below + beside] += 1
        heapq.heappush(heap, (first + second, tie, below + beside))
    return lengths


def canonical_codes(lengths: np.ndarray) -> dict[int, str]:
    """Codes in ascending order of length, then of symbol, each the one before plus 1, shifted to its own length."""
    codes, code, before = {}, 0, 0
    for length, symbol in sorted((int(length), symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - before
        codes[symbol] = f"{code:0{length}b}"
        code, before = code + 1, length
    return codes


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
NAMES: dict[int, EntropyName] = {CONTEXT: "context", **{session.coding: name for name, session in CLASSICAL.items()}}
