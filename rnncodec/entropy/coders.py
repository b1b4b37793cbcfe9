"""`ContextSession`, which codes with a context model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnncodec.entropy.context import ContextModel, Memory, Read
from rnncodec.entropy.exact import SCALE, STEP, probability
from rnncodec.entropy.grouped import Pass, Questions, grid
from rnncodec.entropy.ranges import RangeDecoder, RangeEncoder, Session
from rnncodec.files.format import CONTEXT


class Band(ABC):
    """A band of rows of an image, which an exact context model codes independently of all others.

    Args:
        model: exact.
        bits, rows, cols: shape of the bits of an iteration.
    """

    def __init__(self, model: ContextModel, bits: int, rows: int, cols: int) -> None:
        self.model, self.shape = model, (bits, rows, cols)
        self.iteration = 0

    @abstractmethod
    def order(self) -> np.ndarray:
        """The order of coding, as indices into the flattened bits [rows, cols, bits]."""

    @abstractmethod
    def probabilities(self, plane: np.ndarray) -> np.ndarray:
        """P(1) * SCALE of every bit of the next iteration, int [bits, rows, cols]."""

    @abstractmethod
    def decode(self, read: Read) -> np.ndarray:
        """Decodes the next iteration, whose bits `read` gives in the order of coding."""

    @abstractmethod
    def advance(self, plane: np.ndarray) -> None:
        """Updates the state with an iteration."""


class PlainBand(Band):
    """A band for the sequential and the parallel kind."""

    def __init__(self, model: ContextModel, bits: int, rows: int, cols: int) -> None:
        super().__init__(model, bits, rows, cols)
        self.pending: list[np.ndarray] = []  # earlier iterations that are not yet part of the state
        self.state: Memory | None = None

    def order(self) -> np.ndarray:
        return self.model.predictor(self.iteration).order(*self.shape)

    def probabilities(self, plane: np.ndarray) -> np.ndarray:
        logits = self.model.predictor(self.iteration)(self._signs(plane), self._prior())
        return probability(logits)[0].cpu().numpy()

    def decode(self, read: Read) -> np.ndarray:
        found = self.model.predictor(self.iteration).decode(self._prior(), self.shape[0], read)
        return (found[0] > 0).cpu().numpy()

    def advance(self, plane: np.ndarray) -> None:
        self.pending.append(plane)
        self.iteration += 1

    def _prior(self) -> Tensor:
        """The prior of the next iteration, which follows from the earlier ones."""
        pending, self.pending = self.pending, []
        for plane in pending:
            self.state = self.model.history(self._signs(plane), self.state)
        return self.model.history.look(self.state, self._signs(np.zeros(self.shape, bool)))

    def _signs(self, plane: np.ndarray) -> Tensor:
        return torch.from_numpy(plane).to(self.model.history.prior.weight)[None] * 2 - 1


@contextmanager
def _threads_for(locations: int) -> Iterator[None]:
    """A context with one thread for small planes: several wait for each other, for seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if locations < GroupedBand.SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class GroupedBand(Band):
    """A band for the grouped kind.

    Args:
        model: exact.
        bits, rows, cols: shape of the bits of an iteration.
        questions: those that the bits answer.
    """

    SMALL = 2**12  # locations (a megapixel) below which one thread computes

    def __init__(self, model: ContextModel, bits: int, rows: int, cols: int, questions: Questions) -> None:
        super().__init__(model, bits, rows, cols)
        self.questions = questions
        self.device = model.grouped.odds.device
        self.known = questions.start(torch.empty(1, 0, rows, cols, device=self.device))
        self.memory: Tensor | None = None
        self.after: tuple[np.ndarray, Any, Tensor] | None = None  # a plane, and `known` and `memory` after it

    def order(self) -> np.ndarray:
        bits, rows, cols = self.shape
        index = np.arange(rows * cols * bits).reshape(rows * cols, self.model.config.groups, -1)
        squares = [here.cpu().numpy() for here in grid(1, rows, cols, self.device).squares]
        return np.concatenate([index[here, group].ravel() for group in range(index.shape[1]) for here in squares])

    def probabilities(self, plane: np.ndarray) -> np.ndarray:
        bits, rows, cols = self.shape
        with _threads_for(rows * cols):
            sent = self._rows(plane)
            walked, _ = self._walk(lambda group, here, _: sent[here, group])
            return probability(walked.all_logits() * STEP).view(rows, cols, bits).permute(2, 0, 1).cpu().numpy()

    def decode(self, read: Read) -> np.ndarray:
        def answer(group: int, here: Tensor, logits: Tensor) -> Tensor:
            found = read(probability(logits.flatten() * STEP).cpu().numpy())
            return torch.from_numpy(found).to(logits).view_as(logits) * 2 - 1

        with _threads_for(self.shape[1] * self.shape[2]):
            return self._walk(answer)[1]

    def advance(self, plane: np.ndarray) -> None:
        if self.after is None or not np.array_equal(self.after[0], plane):
            self.probabilities(plane)
        assert self.after is not None
        _, self.known, self.memory = self.after
        self.after = None
        self.iteration += 1

    def _rows(self, plane: np.ndarray) -> Tensor:
        """Bits [bits, rows, cols] as -1 and +1, [locations, groups, S]."""
        signs = torch.from_numpy(plane).to(self.device, torch.float32) * 2 - 1
        return signs.permute(1, 2, 0).reshape(-1, self.model.config.groups, self.model.grouped.size)

    def _walk(self, answer: Callable[[int, Tensor, Tensor], Tensor]) -> tuple[Pass, np.ndarray]:
        """Computes the next iteration, with bits from `answer(group, squares, logits)`; gives the pass and the bits."""
        (bits, rows, cols), groups = self.shape, self.model.config.groups
        found = torch.zeros(groups, rows * cols, bits // groups, device=self.device)

        def of_group(group: int, case: Tensor) -> Tensor:
            def tell(color: int, here: Tensor, logits: Tensor) -> Tensor:
                signs = answer(group, here, logits)
                found[group].index_copy_(0, here, signs)
                return signs

            current.group(group, case[0].flatten(1).T, tell)
            return found[group].T.contiguous().unflatten(1, (rows, cols))[None]

        with torch.autocast(self.device.type, enabled=False):
            current = Pass(self.model.grouped, self.iteration, self.memory, (1, rows, cols))
            number = torch.tensor(self.model.grouped.index(self.iteration), device=self.device)
            signs, _, known = self.questions.walk(number, self.known, of_group)
            memory = current.remember()
        plane = (signs[0] > 0).cpu().numpy()
        self.after = plane, known, memory
        return current, plane


class ContextSession(Session):
    """The range coder with the probabilities of an exact context model (Toderici et al. 2017, sec. 4).

    Large planes are coded in independent bands of rows, which bounds the working memory. The states still take up to 16
    bytes for each channel and location.

    Attributes:
        ideal_bits: the code length of each encoded iteration in bits, under the model's probabilities.

    Args:
        model: from `ContextModel.quantize`, on the device that is to compute.
        bits, rows, cols: shape of the bits of an iteration.
        questions: those that the bits answer, on the same device, for a model of the grouped kind.

    Raises:
        ValueError: there are questions for a model of another kind, or none for one of the grouped kind.
    """

    coding = CONTEXT
    BAND = 2**17  # locations, about 33 megapixels

    def __init__(
        self, model: ContextModel, bits: int, rows: int, cols: int, questions: Questions | None = None
    ) -> None:
        super().__init__(bits, rows, cols)
        if (questions is not None) != (model.config.kind == "grouped"):
            raise ValueError("questions are for context models of the grouped kind, which need them")
        self.ideal_bits: list[float] = []
        height = max(1, self.BAND // cols)
        self.bands: list[tuple[slice, Band]] = []
        for top in range(0, rows, height):
            band = slice(top, min(top + height, rows))
            shape = bits, band.stop - top, cols
            made = PlainBand(model, *shape) if questions is None else GroupedBand(model, *shape, questions)
            self.bands.append((band, made))

    @torch.inference_mode()
    def probabilities(self, plane: np.ndarray) -> np.ndarray:
        """P(1) * SCALE of every bit of the next iteration, int [bits, rows, cols]."""
        return np.concatenate([band.probabilities(plane[:, rows]) for rows, band in self.bands], axis=1)

    def _encode(self, plane: np.ndarray) -> bytes:
        probabilities, coder = self.probabilities(plane), RangeEncoder()
        for rows, band in self.bands:
            order = band.order()
            coder.write(*(a[:, rows].transpose(1, 2, 0).ravel()[order] for a in (probabilities, plane)))
        self.ideal_bits.append(float(-np.log2(np.where(plane, probabilities, SCALE - probabilities) / SCALE).sum()))
        return coder.finish()

    @torch.inference_mode()
    def _decode(self, payload: bytes) -> np.ndarray:
        coder = RangeDecoder(payload)
        plane = np.concatenate([band.decode(coder.read) for _, band in self.bands], axis=1)
        coder.finish()
        return plane

    @torch.inference_mode()
    def _advance(self, plane: np.ndarray) -> None:
        for rows, band in self.bands:
            band.advance(plane[:, rows])
