"""Priming and diffusion: a recurrent part runs several times on one input, for the sake of its hidden states."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

MOST = 8  # extra runs of an iteration: each takes as long as another iteration, and widens what a decoder sees

State = TypeVar("State")


@dataclass(frozen=True)
class ExtraRuns:
    """Runs on the input of an iteration, before the one that counts, of which only the state is kept.

    Johnston et al. 2018, "Hidden-state Priming": k-priming and k-diffusion. Otherwise the first iteration finds states
    of zeros, and information spreads no farther in an iteration than one application of the hidden kernels. The
    encoder runs on the residual, which costs no bits; the decoder on the bits of the iteration, which it has received.

    Attributes:
        priming: extra runs in the first iteration.
        diffusion: extra runs in each later iteration.

    Raises:
        ValueError: a number is negative or above `MOST`.
    """

    priming: int = 0
    diffusion: int = 0

    def __post_init__(self) -> None:
        if min(self.priming, self.diffusion) < 0 or max(self.priming, self.diffusion) > MOST:
            raise ValueError(
                f"priming and diffusion are from 0 to {MOST} extra runs, not {self.priming} and {self.diffusion}"
            )

    def __call__(
        self, part: Callable[[Tensor, State | None], tuple[Tensor, State]], x: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """Runs a part in an iteration.

        Args:
            part: gives output and new state from input and state.
            x: its input.
            state: after the iteration before; None at the first.

        Returns:
            The output of the last run, and the state after it.
        """
        for _ in range(self.priming if state is None else self.diffusion):
            _, state = part(x, state)
        return part(x, state)
