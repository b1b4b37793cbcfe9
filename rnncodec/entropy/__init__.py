"""Lossless entropy coding of the bits of each iteration.

Context models compute the probability of each bit, identically on every machine, for the range coder. The classical
coders need no model. Nothing here depends on networks, images or training.
"""

from rnncodec.entropy.alphabets import BITS, INTEGERS, LARGEST, Alphabet, signs
from rnncodec.entropy.classical import CLASSICAL, PriorSession
from rnncodec.entropy.coders import ContextSession, PartsSession
from rnncodec.entropy.context import ContextConfig, ContextModel, ContextName, code_length, code_nats
from rnncodec.entropy.exact import SCALE, probability
from rnncodec.entropy.grouped import Questions
from rnncodec.entropy.ranges import RangeDecoder, RangeEncoder, Session
from rnncodec.entropy.sessions import new_session
from rnncodec.files.codings import EntropyName

__all__ = [
    "BITS",
    "CLASSICAL",
    "INTEGERS",
    "LARGEST",
    "SCALE",
    "Alphabet",
    "ContextConfig",
    "ContextModel",
    "ContextName",
    "ContextSession",
    "EntropyName",
    "PartsSession",
    "PriorSession",
    "Questions",
    "RangeDecoder",
    "RangeEncoder",
    "Session",
    "code_length",
    "code_nats",
    "new_session",
    "probability",
    "signs",
]
