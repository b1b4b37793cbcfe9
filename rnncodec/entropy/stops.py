"""Codes which locations go on and which have stopped, at the start of each iteration of a file with stop maps.

A location that has stopped is sent nothing more. Flags are coded in four turns, on every second location of every
second row. Their probabilities are counted by how many of the eight neighbors are known to have stopped, and how many
to go on. Four bits at the start of a map say whether these counts are those of earlier maps, which is best if a few
stop each time, or new ones, and how many stop by them: in the last iteration of a file nearly all may.
"""

from collections.abc import Callable

import numpy as np

from rnncodec.entropy.exact import SCALE
from rnncodec.files.codings import LEVEL_BITS

TURNS = (0, 0), (1, 1), (0, 1), (1, 0)  # first row and column of the locations of a turn
STOPPED, GOING = (1, 2, 3, 5), (1, 3)  # numbers of neighbors from which the next context applies
START = 1, 8  # of both counts of each context: stops, and locations that go on
MOST = 64  # sum of the counts of a context above which they are halved
EVEN = 9  # level of new counts by which as many stop as go on; from one level to the next, twice as many stop

Code = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
"""Codes flags, bool [n], given P(yes) * SCALE of each, int [n]; they are None to decode. Gives the flags."""


class StopMap:
    """The locations that go on from iteration to iteration, and the counts from which both sides predict them.

    Attributes:
        living: bool [rows, cols], which locations have not stopped.
    """

    def __init__(self, rows: int, cols: int) -> None:
        self.living = np.ones((rows, cols), bool)
        self.counts = _counts(START)
        self.first = True

    def advance(self, code: Code, going: np.ndarray | None = None) -> np.ndarray:
        """Codes who goes on to the next iteration, in order; in the first, all do.

        Args:
            code: codes flags.
            going: to encode, bool [rows, cols]; None to decode.

        Returns:
            `living`.
        """
        if self.first:
            self.first = False
            return self.living
        digits = 1 << np.arange(LEVEL_BITS)[::-1]
        sent = None if going is None else (self._level(going) & digits) > 0
        level = int(code(np.full(LEVEL_BITS, SCALE // 2), sent) @ digits)
        self.living = self._turns(self._start(level), code, going)
        return self.living

    def _level(self, going: np.ndarray) -> int:
        """The level that codes a map in fewer bits: 0, or that of new counts which are nearest to what they count."""
        stop, go = ((self.living & flags).sum() for flags in (~going, going))
        nearest = round(float(np.log2((stop + 0.5) / (go + 0.5)))) + EVEN
        return min((0, int(np.clip(nearest, 1, 2**LEVEL_BITS - 1))), key=lambda level: self._cost(level, going))

    def _cost(self, level: int, going: np.ndarray) -> float:
        """The code length of a map in bits."""
        bits = 0.0

        def add(probabilities: np.ndarray, flags: np.ndarray | None) -> np.ndarray:
            nonlocal bits
            assert flags is not None
            bits -= np.log2(np.where(flags, probabilities, SCALE - probabilities) / SCALE).sum()
            return flags

        self._turns(self._start(level).copy(), add, going)
        return bits

    def _start(self, level: int) -> np.ndarray:
        """The counts before a map, those that are kept at level 0."""
        return _counts((max(1, 2 ** (level - EVEN)), max(1, 2 ** (EVEN - level)))) if level else self.counts

    def _turns(self, counts: np.ndarray, code: Code, sent: np.ndarray | None) -> np.ndarray:
        """Codes a map turn by turn, and adds what each has shown to the counts. Gives who goes on."""
        most = max(MOST, counts[0].sum())
        stopped, going = ~self.living, np.zeros_like(self.living)
        for row, col in TURNS:
            turn = np.zeros_like(self.living)
            turn[row::2, col::2] = self.living[row::2, col::2]
            beside = np.digitize(_around(stopped), STOPPED) * (len(GOING) + 1) + np.digitize(_around(going), GOING)
            contexts = beside[turn]
            found = counts[contexts]
            flags = code(found[:, 1] * SCALE // found.sum(1), None if sent is None else sent[turn])
            going[turn], stopped[turn] = flags, ~flags
            np.add.at(counts, (contexts, flags.astype(int)), 1)
            while (large := counts.sum(1) > most).any():
                counts[large] = (counts[large] + 1) // 2
        return going


def _counts(start: tuple[int, int]) -> np.ndarray:
    """Both counts of every context."""
    return np.tile(np.array(start), ((len(STOPPED) + 1) * (len(GOING) + 1), 1))


def _around(flags: np.ndarray) -> np.ndarray:
    """How many of the eight neighbors of each location have a flag, int [rows, cols]."""
    rows, cols = flags.shape
    padded = np.pad(flags, 1).astype(np.int64)
    lines = padded[:-2] + padded[1:-1] + padded[2:]
    return lines[:, :-2] + lines[:, 1:-1] + lines[:, 2:] - padded[1 : rows + 1, 1 : cols + 1]
