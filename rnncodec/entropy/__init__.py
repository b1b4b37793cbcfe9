"""Lossless entropy coding of the bits of each iteration.

Context models compute the probability of each bit, identically on every machine, for the range coder. The classical
coders need no model. Nothing here depends on networks, images or training.
"""

from rnncodec.entropy.classical import AdaptiveSession, HuffmanSession, RawSession, StaticSession, huffman_lengths
from rnncodec.entropy.coders import CLASSICAL, NAMES, ContextSession, EntropyName
from rnncodec.entropy.context import ContextConfig, ContextModel, ContextName, code_length, code_nats
from rnncodec.entropy.exact import SCALE, probability
from rnncodec.entropy.grouped import Questions
from rnncodec.entropy.ranges import RangeDecoder, RangeEncoder, Session

__all__ = [
    "CLASSICAL",
    "NAMES",
    "SCALE",
    "AdaptiveSession",
    "ContextConfig",
    "ContextModel",
    "ContextName",
    "ContextSession",
    "EntropyName",
    "HuffmanSession",
    "Questions",
    "RangeDecoder",
    "RangeEncoder",
    "RawSession",
    "Session",
    "StaticSession",
    "code_length",
    "code_nats",
    "huffman_lengths",
    "probability",
]
