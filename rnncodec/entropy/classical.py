"""The coders without a context model: raw values, Huffman codes, and the range coder with counted probabilities."""

import heapq
from collections.abc import Callable

import numpy as np

from rnncodec.entropy.alphabets import INTEGERS, even
from rnncodec.entropy.exact import SCALE
from rnncodec.entropy.ranges import RangeDecoder, RangeEncoder, Session
from rnncodec.files.codings import ADAPTIVE, CODINGS, HUFFMAN, PRIOR, RAW, STATIC, EntropyName
from rnncodec.files.errors import FormatError

Code = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
"""Codes decisions, given P(yes) * SCALE of each, int [n], and the answers, bool [n], or None to decode, to answers."""


def encoding(coder: RangeEncoder) -> Code:
    """Codes decisions with an encoder."""

    def code(probabilities: np.ndarray, answers: np.ndarray | None) -> np.ndarray:
        assert answers is not None
        coder.write(probabilities, answers)
        return answers

    return code


class RawSession(Session):
    """Stores the values without entropy coding."""

    coding = RAW

    def _encode(self, values: np.ndarray) -> bytes:
        return self.alphabet.pack(values)

    def _decode_whole(self, payload: bytes) -> np.ndarray:
        return self.alphabet.unpack(payload, *self.shape)


class HuffmanSession(Session):
    """Canonical Huffman codes (Song 2007) of integers or of four bits, with a code book for each iteration."""

    coding = HUFFMAN

    def _encode(self, values: np.ndarray) -> bytes:
        before, size, symbols = self.alphabet.symbols(values)
        coded = huffman(symbols, size)
        return coded and before + coded

    def _decode_whole(self, payload: bytes) -> np.ndarray:
        rest, size, count, values = self.alphabet.from_symbols(payload, self.shape)
        return values(from_huffman(rest, size, count))


LONGEST = 15  # the most bits of a Huffman code, so that a length fits in four


def huffman(symbols: np.ndarray, size: int) -> bytes:
    """A code book of `size` symbols, and the code of symbols [n]; empty if so many have no codes of `LONGEST` bits."""
    counts = np.bincount(symbols, minlength=size)
    if np.count_nonzero(counts) > 1 << LONGEST:
        return b""
    lengths = huffman_lengths(counts)
    while lengths.max() > LONGEST:  # the code of symbols whose counts are more alike is less deep
        counts = (counts + 1) // 2
        lengths = huffman_lengths(counts)
    codes = np.zeros((size, LONGEST), bool)  # left-aligned
    for symbol, code in canonical_codes(lengths).items():
        codes[symbol, : lengths[symbol]] = [char == "1" for char in code]
    bits = codes[symbols][np.arange(LONGEST) < lengths[symbols, None]]
    nibbles = np.unpackbits(lengths[:, None], axis=1)[:, 4:]
    return np.packbits(nibbles).tobytes() + np.packbits(bits).tobytes()


def from_huffman(payload: bytes, size: int, count: int) -> np.ndarray:
    """Undoes `huffman`: `count` symbols.

    Raises:
        FormatError: the payload is corrupt.
    """
    flat = np.unpackbits(np.frombuffer(payload, np.uint8))
    start = -(-4 * size // 8) * 8
    lengths = flat[: 4 * size].reshape(-1, 4) @ (1 << np.arange(4)[::-1]) if len(flat) >= start else np.zeros(0)
    if len(lengths) < size or (2.0 ** -lengths[lengths > 0].astype(float)).sum() > 1 or flat[4 * size : start].any():
        raise FormatError("the code book of an entropy-coded payload is corrupt")
    # For every value of the next 15 bits: the symbol that they begin with, and the length of its code.
    book = [(0, 0)] * (1 << LONGEST)
    for symbol, code in canonical_codes(lengths).items():
        same = 1 << (LONGEST - len(code))
        first = int(code, 2) * same
        book[first : first + same] = [(symbol, len(code))] * same
    code = np.pad(flat[start:], (0, LONGEST))
    end = len(code) - LONGEST
    windows = np.zeros(end, np.uint16)
    for i in range(LONGEST):
        windows = windows << 1 | code[i : i + end]
    next_bits, place = windows.data, 0
    symbols = np.empty(count, np.uint16)
    found = symbols.data
    for i in range(count):
        found[i], length = book[next_bits[place]] if place < end else (0, 0)
        if not length:
            raise FormatError("an entropy-coded payload is corrupt")
        place += length
    if not 0 <= end - place < 8 or code[place:].any():
        raise FormatError("an entropy-coded payload is corrupt")
    return symbols


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


class TableSession(Session):
    """The range coder with given probabilities, one for each channel and decision."""

    PIECE = 2**9  # locations that are coded at once, so that a code that is too short is soon noticed

    def _write(self, table: np.ndarray, values: np.ndarray) -> bytes:
        """The code of values [channels, rows, cols], given P(yes) * SCALE, int [channels, decisions + 1]."""
        coder = RangeEncoder()
        self._walk(table, encoding(coder), values.transpose(1, 2, 0).reshape(-1, len(values)))
        return coder.finish()

    def _read(self, table: np.ndarray, payload: bytes) -> np.ndarray:
        """Undoes `_write`."""
        channels, rows, cols = self.shape
        coder = RangeDecoder(payload)
        lines = self._walk(table, lambda probabilities, _: coder.read(probabilities))
        coder.finish()
        return lines.reshape(rows, cols, channels).transpose(2, 0, 1)

    def _walk(self, table: np.ndarray, code: Code, lines: np.ndarray | None = None) -> np.ndarray:
        """Codes values [locations, channels] in pieces; gives them."""
        channels, rows, cols = self.shape
        pieces = []
        for first in range(0, rows * cols, self.PIECE):
            some = None if lines is None else lines[first : first + self.PIECE].ravel()
            count = min(self.PIECE, rows * cols - first) * channels

            def ask(number: int, places: np.ndarray, answers: np.ndarray | None) -> np.ndarray:
                return code(table[places % channels, number], answers)

            pieces.append(self.alphabet.walk(ask, count, some))
        return np.concatenate(pieces).reshape(-1, channels)


class StaticSession(TableSession):
    """The range coder with counted probabilities, stored as bytes before the code (Song 2007)."""

    coding = STATIC

    def _encode(self, values: np.ndarray) -> bytes:
        lines = values.transpose(1, 2, 0).reshape(-1, len(values))
        asked = np.zeros((2, len(values), self.alphabet.decisions + 1), np.int64)  # how often, and how often yes

        def count(number: int, places: np.ndarray, answers: np.ndarray | None) -> np.ndarray:
            assert answers is not None
            for counts, those in zip(asked, (places, places[answers]), strict=True):
                counts[:, number] += np.bincount(those % len(values), minlength=len(values))
            return answers

        self.alphabet.walk(count, lines.size, lines.ravel())
        shares = np.clip(np.round(asked[1] / np.maximum(asked[0], 1) * 256), 1, 255).astype(np.uint8)
        known = np.maximum((asked[0, :, :-1] > 0).cumsum(1).max(1), 1)  # decisions of each channel
        return self._book(shares, known) + self._write(self._table(shares, known), values)

    def _decode_whole(self, payload: bytes) -> np.ndarray:
        shares, known, rest = self._read_book(payload)
        return self._read(self._table(shares, known), rest)

    def _book(self, shares: np.ndarray, known: np.ndarray) -> bytes:
        """The bytes before the code: of each channel its shares, after their number if that may differ."""
        counted = self.alphabet.decisions > 1
        return b"".join(
            (bytes([count]) if counted else b"") + each[:count].tobytes()
            for each, count in zip(shares, known, strict=True)
        )

    def _read_book(self, payload: bytes) -> tuple[np.ndarray, np.ndarray, bytes]:
        """The shares, how many of them each channel has, and the code."""
        most, place = self.alphabet.decisions, 0
        shares, known = np.zeros((self.shape[0], most), np.uint8), np.ones(self.shape[0], np.int64)
        for channel in range(self.shape[0]):
            if most > 1:
                known[channel] = payload[place] if place < len(payload) else 0
                place += 1
            found = np.frombuffer(payload[place : place + known[channel]], np.uint8)
            if not 1 <= known[channel] <= most or len(found) < known[channel] or not found.all():
                raise FormatError("an entropy-coded payload is corrupt")
            shares[channel, : len(found)] = found
            place += len(found)
        return shares, known, payload[place:]

    def _table(self, shares: np.ndarray, known: np.ndarray) -> np.ndarray:
        """P(yes) * SCALE of the decisions of each channel; those without a share are as likely as not."""
        table = np.full((len(shares), self.alphabet.decisions + 1), SCALE // 2, np.int64)
        for channel, count in enumerate(known):
            table[channel, :count] = shares[channel, :count].astype(np.int64) * (SCALE // 256)
        return table


class PriorSession(TableSession):
    """The range coder with the probabilities of a prior, which is part of the weights (Theis et al. 2017, sec. 2.3).

    Args:
        bits, rows, cols: shape of the integers.
        prior: P(yes) * SCALE of the decisions of each channel, int [bits, decisions], from 1 to SCALE - 1.
    """

    coding = PRIOR

    def __init__(self, bits: int, rows: int, cols: int, prior: np.ndarray) -> None:
        super().__init__(bits, rows, cols, INTEGERS)
        self.table = np.pad(prior.astype(np.int64), ((0, 0), (0, 1)), constant_values=SCALE // 2)

    def _encode(self, values: np.ndarray) -> bytes:
        return self._write(self.table, values)

    def _decode_whole(self, payload: bytes) -> np.ndarray:
        return self._read(self.table, payload)


class AdaptiveSession(Session):
    """The range coder with adaptive probabilities: of each channel, given its values to the left and above.

    They are estimates of Krichevsky and Trofimov, counted anew in every iteration by encoder and decoder (Song 2007).
    """

    coding = ADAPTIVE

    FAR = 2  # distance from 0 from which values to the left and above are all alike

    def _encode(self, values: np.ndarray) -> bytes:
        coder = RangeEncoder()
        self._walk(encoding(coder), values)
        return coder.finish()

    def _decode_whole(self, payload: bytes) -> np.ndarray:
        coder = RangeDecoder(payload)
        values = self._walk(lambda probabilities, _: coder.read(probabilities))
        coder.finish()
        return values

    def _walk(self, code: Code, values: np.ndarray | None = None) -> np.ndarray:
        """Codes the values location by location, row by row; gives them."""
        channels, rows, cols = self.shape
        kinds = self.FAR + 1
        # Of each decision, channel and context: twice how often the answer was yes, plus 1; twice how often, plus 2.
        shape = self.alphabet.decisions, channels * kinds * kinds
        yes, total = np.ones(shape, np.int64), np.full(shape, 2, np.int64)
        plane = np.zeros((rows + 1, cols + 1, channels), np.int64)
        firsts = kinds * kinds * np.arange(channels)
        for y in range(1, rows + 1):
            for x in range(1, cols + 1):
                above, left = (np.minimum(np.abs(beside), self.FAR) for beside in (plane[y - 1, x], plane[y, x - 1]))
                context = firsts + kinds * above + left

                def ask(number: int, places: np.ndarray, answers: np.ndarray | None) -> np.ndarray:
                    if number >= len(yes):
                        return code(even(len(places)), answers)
                    affirmed, asked, here = yes[number], total[number], context[places]  # noqa: B023 - called at once
                    found = code(np.maximum(affirmed[here] * SCALE // asked[here], 1), answers)
                    affirmed[here] += 2 * found
                    asked[here] += 2
                    return found

                given = None if values is None else values[:, y - 1, x - 1]
                plane[y, x] = self.alphabet.walk(ask, channels, given)
        return plane[1:, 1:].transpose(2, 0, 1)


CLASSICAL: dict[EntropyName, type[Session]] = {
    CODINGS[session.coding]: session for session in (RawSession, HuffmanSession, StaticSession, AdaptiveSession)
}
