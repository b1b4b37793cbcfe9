"""The coders that need no model: raw bits, Huffman codes, and the range coder with counted probabilities."""

import heapq
from collections.abc import Callable

import numpy as np

from rnncodec.entropy.exact import SCALE
from rnncodec.entropy.ranges import RangeDecoder, RangeEncoder, Session
from rnncodec.files.codings import ADAPTIVE, CODINGS, HUFFMAN, RAW, STATIC, EntropyName, huffman_group
from rnncodec.files.errors import FormatError
from rnncodec.files.fields import pack_bits, unpack_bits

Code = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
"""Codes the bits at a location (y, x), given P(1) * SCALE of each: int [bits] to bool [bits]."""


class RawSession(Session):
    """Stores the bits without entropy coding."""

    coding = RAW

    def _encode(self, plane: np.ndarray) -> bytes:
        return pack_bits(plane)

    def _decode_whole(self, payload: bytes) -> np.ndarray:
        return unpack_bits(payload, *self.shape)


class HuffmanSession(Session):
    """Canonical Huffman codes of four bits of a location at a time, with a code book for each iteration (Song 2007)."""

    coding = HUFFMAN
    LONGEST = 15  # the most bits of a code for 16 symbols, so that a length fits in four

    def __init__(self, bits: int, rows: int, cols: int) -> None:
        super().__init__(bits, rows, cols)
        self.group = huffman_group(bits)

    def _encode(self, plane: np.ndarray) -> bytes:
        symbols = plane.transpose(1, 2, 0).reshape(-1, self.group) @ (1 << np.arange(self.group)[::-1])
        lengths = huffman_lengths(np.bincount(symbols, minlength=1 << self.group))
        codes = np.zeros((len(lengths), self.LONGEST), bool)  # left-aligned
        for symbol, code in canonical_codes(lengths).items():
            codes[symbol, : lengths[symbol]] = [char == "1" for char in code]
        bits = codes[symbols][np.arange(self.LONGEST) < lengths[symbols, None]]
        nibbles = np.unpackbits(lengths[:, None], axis=1)[:, 4:]
        return np.packbits(nibbles).tobytes() + np.packbits(bits).tobytes()

    def _decode_whole(self, payload: bytes) -> np.ndarray:
        bits, rows, cols = self.shape
        size = (4 << self.group) // 8
        flat = np.unpackbits(np.frombuffer(payload, np.uint8))
        lengths = flat[: 8 * size].reshape(-1, 4) @ (1 << np.arange(4)[::-1])
        if len(lengths) < 1 << self.group or (2.0 ** -lengths[lengths > 0].astype(float)).sum() > 1:
            raise FormatError("the code book of an entropy-coded payload is corrupt")
        # For every value of the next 15 bits: the symbol that they begin with, and the length of its code.
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
    """Canonical codes: in order of length, then symbol, each is the previous one plus 1, shifted to its own length."""
    codes, code, before = {}, 0, 0
    for length, symbol in sorted((int(length), symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - before
        codes[symbol] = f"{code:0{length}b}"
        code, before = code + 1, length
    return codes


class StaticSession(Session):
    """The range coder with one probability for each channel, each stored as a byte before the code (Song 2007)."""

    coding = STATIC

    PIECE = 2**9  # locations that are decoded at once, so that a code that is too short is soon noticed

    def _probabilities(self, shares: np.ndarray, locations: int) -> np.ndarray:
        return np.tile(shares.astype(np.int64) * (SCALE // 256), locations)

    def _encode(self, plane: np.ndarray) -> bytes:
        shares = np.clip(np.round(plane.mean((1, 2)) * 256), 1, 255).astype(np.uint8)
        coder = RangeEncoder()
        coder.write(self._probabilities(shares, plane[0].size), plane.transpose(1, 2, 0).ravel())
        return shares.tobytes() + coder.finish()

    def _decode_whole(self, payload: bytes) -> np.ndarray:
        bits, rows, cols = self.shape
        shares = np.frombuffer(payload[:bits], np.uint8)
        if len(shares) < bits or not shares.all():
            raise FormatError("an entropy-coded payload is corrupt")
        coder, probabilities = RangeDecoder(payload[bits:]), self._probabilities(shares, self.PIECE)
        count = rows * cols * bits
        found = [coder.read(probabilities[: count - first]) for first in range(0, count, len(probabilities))]
        coder.finish()
        return np.concatenate(found).reshape(rows, cols, bits).transpose(2, 0, 1)


class AdaptiveSession(Session):
    """The range coder with adaptive probabilities: of each channel, given its bits to the left and above.

    They are estimates of Krichevsky and Trofimov, counted anew in every iteration by encoder and decoder (Song 2007).
    """

    coding = ADAPTIVE

    def _encode(self, plane: np.ndarray) -> bytes:
        coder = RangeEncoder()

        def write(probabilities: np.ndarray, place: tuple[int, int]) -> np.ndarray:
            coder.write(probabilities, plane[:, *place])
            return plane[:, *place]

        self._walk(write)
        return coder.finish()

    def _decode_whole(self, payload: bytes) -> np.ndarray:
        coder = RangeDecoder(payload)
        plane = self._walk(lambda probabilities, place: coder.read(probabilities))
        coder.finish()
        return plane

    def _walk(self, code: Code) -> np.ndarray:
        """Visits the locations row by row; gives the bits that `code` gave for each."""
        bits, rows, cols = self.shape
        channels = np.arange(bits)
        ones = np.ones((bits, 4), np.int64)  # of each channel and context: twice the ones so far, plus 1
        total = np.full((bits, 4), 2, np.int64)  # twice the bits so far, plus 2
        plane = np.zeros((rows + 1, cols + 1, bits), bool)
        for y in range(1, rows + 1):
            for x in range(1, cols + 1):
                context = channels, 2 * plane[y - 1, x] + plane[y, x - 1]
                probabilities = np.clip(ones[context] * SCALE // total[context], 1, SCALE - 1)
                plane[y, x] = code(probabilities, (y - 1, x - 1))
                ones[context] += 2 * plane[y, x]
                total[context] += 2
        return plane[1:, 1:].transpose(2, 0, 1)


CLASSICAL: dict[EntropyName, type[Session]] = {
    CODINGS[session.coding]: session for session in (RawSession, HuffmanSession, StaticSession, AdaptiveSession)
}
