"""The codings of payloads, and how long a payload must be for what it has to say, see FORMAT.md."""

from typing import Literal, get_args

EntropyName = Literal["none", "context", "huffman", "static", "adaptive", "prior"]
CODINGS: dict[int, EntropyName] = dict(enumerate(get_args(EntropyName)))  # of payloads, raw or by an entropy coder
RAW, CONTEXT, HUFFMAN, STATIC, ADAPTIVE, PRIOR = CODINGS
# Bits that a byte of a code holds at most: 8 / log2(1 / P), rounded up, for the largest P that the coder gives a bit.
MOST = {CONTEXT: 16516, STATIC: 1417, ADAPTIVE: 363406, PRIOR: 363406}
LEVEL_BITS = 4  # before the flags of a stop map
INTEGER_BITS = 16  # of an integer in a raw payload
DECISIONS = 16  # with probabilities of their own, of an integer: is it 0, negative, at least 2, 3, ... 15 away from 0?


def raw_length(width: int, height: int, stride: int, bits: int, maps: bool = False) -> int:
    """The most bytes of a raw payload of so many bits at each location, and of a flag if there are stop maps."""
    return ceil_div(ceil_div(height, stride) * ceil_div(width, stride) * (bits + maps) + LEVEL_BITS * maps, 8)


def length_size(most: int) -> int:
    """Bytes of a length field, which holds any length up to that of the raw bits."""
    return ceil_div(most.bit_length(), 8)


def least_length(coding: int, locations: int, bits: int, flags: int = 0) -> int:
    """The fewest bytes of a payload, however easy it is to predict; 1 for unknown codings.

    Args:
        coding: of the payload.
        locations: that get bits, at least.
        bits: of each location.
        flags: of a stop map, at least; 0 if there is none.
    """
    count = locations * bits + (flags and flags + LEVEL_BITS)
    if coding == RAW:
        return ceil_div(count, 8)
    if coding == HUFFMAN:
        group = huffman_group(bits)
        return ceil_div(4 << group, 8) + ceil_div(count // group, 8)
    if coding not in MOST:
        return 1
    before = bits if coding == STATIC else 0
    return before + ceil_div(count, MOST[coding])


def least_of_integers(coding: int, locations: int, integers: int) -> int:
    """The fewest bytes of a payload of integers, so many at each location; 1 for unknown codings."""
    count = locations * integers
    if coding == RAW:
        return count * INTEGER_BITS // 8
    if coding == HUFFMAN:  # at least one symbol, whose code has a bit
        return 3 + ceil_div(count, 8)
    if coding not in MOST:
        return 1
    before = 2 * integers if coding == STATIC else 0
    return before + ceil_div(count, MOST[coding])


def huffman_group(bits: int) -> int:
    """How many bits of a location are a symbol of Huffman's coder."""
    return next(size for size in (4, 2, 1) if bits % size == 0)


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)
