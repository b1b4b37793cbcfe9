"""Codes which locations go on and which have stopped, at the start of each iteration of a file with stop maps.

A location that has stopped is sent nothing more. Flags are coded in four turns, on every second location of every
second row. Their probabilities are counted by how many of the eight neighbors are known to have stopped, and how many
to go on.
"""

from collections.abc import Callable

import numpy as np

from rnncodec.entropy.exact import SCALE

TURNS = (0, 0), (1, 1), (0, 1), (1, 0)  # first row and column of the locations of a turn
STOPPED, GOING = (1, 2, 3, 5), (1, 3)  # numbers of neighbors from which the next context applies
START = 1, 8  # of both counts of each context: stops, and locations that go on
MOST = 64  # sum of the counts of a context above which they are halved

Code = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Codes whether locations, a mask [rows, cols], go on, given P(yes) * SCALE of each: int [n] to bool [n]."""


class StopMap:
    """The locations that go on from iteration to iteration, and the counts from which both sides predict them.

    Attributes:
        living: bool [rows, cols], which locations have not stopped.
    """

    def __init__(self, rows: int, cols: int) -> None:
        self.living = np.ones((rows, cols), bool)
        self.counts = np.tile(np.array(START), ((len(STOPPED) + 1) * (len(GOING) + 1), 1))
        self.first = True

    def advance(self, code: Code) -> np.ndarray:
        """Codes who goes on to the next iteration, in order; in the first, all do. Gives `living`."""
        if self.first:
            self.first = False
            return self.living
        stopped, going = ~self.living, np.zeros_like(self.living)
        for row, col in TURNS:
            turn = np.zeros_like(self.living)
            turn[row::2, col::2] = self.living[row::2, col::2]
            beside = np.digitize(_around(stopped), STOPPED) * (len(GOING) + 1) + np.digitize(_around(going), GOING)
            contexts = beside[turn]
            counts = self.counts[contexts]
            flags = code(turn, counts[:, 1] * SCALE // counts.sum(1))
            going[turn], stopped[turn] = flags, ~flags
            np.add.at(self.counts, (contexts, flags.astype(int)), 1)
            while (large := self.counts.sum(1) > MOST).any():
                self.counts[large] = (self.counts[large] + 1) // 2
        self.living = going
        return going


def _around(flags: np.ndarray) -> np.ndarray:
    """How many of the eight neighbors of each location have a flag, int [rows, cols]."""
    rows, cols = flags.shape
    padded = np.pad(flags, 1).astype(np.int64)
    lines = padded[:-2] + padded[1:-1] + padded[2:]
    return lines[:, :-2] + lines[:, 1:-1] + lines[:, 2:] - padded[1 : rows + 1, 1 : cols + 1]
