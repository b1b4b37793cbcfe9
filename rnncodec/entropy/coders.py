"""`ContextSession`, which codes with a context model, and `PartsSession`, whose iterations have several payloads."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnncodec.entropy.alphabets import signs
from rnncodec.entropy.context import ContextModel, Memory, Read
from rnncodec.entropy.exact import SCALE, STEP, probability
from rnncodec.entropy.grouped import Pass, Questions, grid
from rnncodec.entropy.ranges import Piece, RangeDecoder, RangeEncoder, RawDecoder, Session
from rnncodec.entropy.stops import StopMap
from rnncodec.files.codings import CONTEXT, RAW
from rnncodec.files.errors import FormatError


class Band(ABC):
    """A band of rows of an image, which an exact context model codes independently of all others.

    Planes are int8 [bits, rows, cols] of -1 and +1, and 0 where nothing is sent.

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
        return found[0].to(torch.int8).cpu().numpy()

    def advance(self, plane: np.ndarray) -> None:
        self.pending.append(plane)
        self.iteration += 1

    def _prior(self) -> Tensor:
        """The prior of the next iteration, which follows from the earlier ones."""
        pending, self.pending = self.pending, []
        for plane in pending:
            self.state = self.model.history(self._signs(plane), self.state)
        return self.model.history.look(self.state, self.model.history.prior.weight.new_zeros(1).expand(1, *self.shape))

    def _signs(self, plane: np.ndarray) -> Tensor:
        return torch.from_numpy(plane).to(self.model.history.prior.weight)[None]


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
        self.known: Any = None  # what the questions say is known so far, made by the first iteration
        self.memory: Tensor | None = None
        self.after: tuple[np.ndarray, Any, Tensor] | None = None  # a plane, and `known` and `memory` after it

    def order(self) -> np.ndarray:
        bits, rows, cols = self.shape
        index = np.arange(rows * cols * bits).reshape(rows * cols, self.model.config.groups, -1)
        order = grid(1, rows, cols, self.device).order.cpu().numpy()
        return index[order].swapaxes(0, 1).ravel()

    def probabilities(self, plane: np.ndarray) -> np.ndarray:
        bits, rows, cols = self.shape
        walked = self._walk(None, plane, (plane != 0).any(0))
        return probability(walked.all_logits() * STEP).view(rows, cols, bits).permute(2, 0, 1).cpu().numpy()

    def decode(self, read: Read) -> np.ndarray:
        return self.code(lambda group, probabilities, _: read(probabilities))

    def code(self, code: "Code", plane: np.ndarray | None = None, living: np.ndarray | None = None) -> np.ndarray:
        """Codes the next iteration group by group, in the order of coding.

        Args:
            code: codes bits.
            plane: to encode; None to decode.
            living: bool [rows, cols], the locations that are sent anything; None for all.

        Returns:
            The plane.
        """
        self._walk(code, plane, living)
        assert self.after is not None
        return self.after[0]

    def advance(self, plane: np.ndarray) -> None:
        if self.after is None or not np.array_equal(self.after[0], plane):
            self.probabilities(plane)
        assert self.after is not None
        _, self.known, self.memory = self.after
        self.after = None
        self.iteration += 1

    def _walk(self, code: "Code | None", plane: np.ndarray | None, living: np.ndarray | None) -> Pass:
        """Computes the next iteration, of a plane or of what `code` gives, and what follows from it, `after`."""
        (bits, rows, cols), groups = self.shape, self.model.config.groups
        alive = None if living is None else torch.from_numpy(living.ravel()).to(self.device)

        def of_group(group: int, case: Tensor) -> Tensor:
            def tell(turn: slice, logits: Tensor) -> Tensor:
                known = None if sent is None else sent[turn, group]
                if code is None:
                    assert known is not None
                    return known
                given = None if known is None else known.flatten().cpu().numpy() > 0
                found = code(group, probability(logits.flatten() * STEP).cpu().numpy(), given)
                if found is None:
                    return torch.zeros_like(logits)
                return torch.from_numpy(found).to(logits).view_as(logits) * 2 - 1 if known is None else known

            told = current.group(group, case[0].flatten(1).T.contiguous(), tell)
            return told.T.contiguous().unflatten(1, (rows, cols))[None]

        with _threads_for(rows * cols), torch.autocast(self.device.type, enabled=False):
            current = Pass(self.model.grouped, self.iteration, self.memory, (1, rows, cols), alive)
            sent = None
            if plane is not None:
                signs = torch.from_numpy(plane).to(self.device, torch.float32).flatten(1).T
                sent = signs.index_select(0, current.grid.order).view(-1, groups, bits // groups)
            number = torch.tensor(self.model.grouped.index(self.iteration), device=self.device)
            before = self.known or self.questions.start(torch.empty(1, 0, rows, cols, device=self.device))
            planes, _, known = self.questions.walk(number, before, of_group, spare=self.known is None)
            memory = current.remember()
        self.after = planes[0].to(torch.int8).cpu().numpy(), known, memory
        return current


Code = Callable[[int, np.ndarray, np.ndarray | None], np.ndarray | None]
"""Codes bits of a group, given P(1) * SCALE of each, int [n], and the bits, bool [n], or None to decode them.

Gives the bits, or None if they are missing.
"""


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
        self.bands: list[tuple[slice, Any]] = []
        for top in range(0, rows, height):
            band = slice(top, min(top + height, rows))
            shape = bits, band.stop - top, cols
            made = PlainBand(model, *shape) if questions is None else GroupedBand(model, *shape, questions)
            self.bands.append((band, made))

    @torch.inference_mode()
    def probabilities(self, plane: np.ndarray) -> np.ndarray:
        """P(1) * SCALE of every bit of the next iteration, int [bits, rows, cols]."""
        return np.concatenate([band.probabilities(plane[:, rows]) for rows, band in self.bands], axis=1)

    @torch.inference_mode()
    def price(self, plane: np.ndarray) -> np.ndarray:
        """The code length in bits of the next iteration at each location, float [rows, cols]; then advances."""
        chances = self.probabilities(plane) / SCALE
        lengths = -np.log2(np.where(plane > 0, chances, 1 - chances)) * (plane != 0)
        self._advance(plane)
        return lengths.sum(0)

    def _encode(self, values: np.ndarray) -> bytes:
        probabilities, coder = self.probabilities(signs(values)), RangeEncoder()
        for rows, band in self.bands:
            order = band.order()
            coder.write(*(a[:, rows].transpose(1, 2, 0).ravel()[order] for a in (probabilities, values)))
        self.ideal_bits.append(coder.ideal_bits())
        return coder.finish()

    @torch.inference_mode()
    def _decode_whole(self, payload: bytes) -> np.ndarray:
        coder = RangeDecoder(payload)
        plane = np.concatenate([band.decode(coder.read) for _, band in self.bands], axis=1)
        coder.finish()
        return plane > 0

    @torch.inference_mode()
    def _advance(self, plane: np.ndarray) -> None:
        for rows, band in self.bands:
            band.advance(plane[:, rows])


class PartsSession(ContextSession):
    """Codes each iteration in several payloads, one after the other, and only the locations that have not stopped.

    Args:
        model: of the grouped kind.
        bits, rows, cols: as in `ContextSession`.
        questions: likewise.
        parts: payloads of an iteration, a divisor of its number of groups.
        maps: whether locations may stop. The first payload of each iteration then says which have.

    Raises:
        FormatError: the parts do not divide the groups.
    """

    def __init__(
        self, model: ContextModel, bits: int, rows: int, cols: int, questions: Questions, parts: int, maps: bool
    ) -> None:
        super().__init__(model, bits, rows, cols, questions)
        if model.config.groups % parts:
            raise FormatError(f"{model.config.groups} groups cannot be divided into {parts} parts")
        self.parts, self.maps, self.size = parts, maps, model.config.groups // parts
        self.stops = StopMap(rows, cols)

    @torch.inference_mode()
    def encode(self, plane: np.ndarray) -> list[Piece]:
        """Codes the next iteration, int8 [bits, rows, cols]; a payload is raw if coding saves nothing.

        Raises:
            ValueError: a location has only some of its bits, or bits after it had stopped, or all have stopped; or some
                have in the first iteration, or without stop maps.
        """
        going = plane[0] != 0
        if ((plane != 0) != going).any() or (going & ~self.stops.living).any():
            raise ValueError("a location gets all bits of an iteration, or none from there on")
        if not (going.any() if self.maps and not self.stops.first else going.all()):
            raise ValueError("all locations get the first iteration, without stop maps every one, and some the others")
        coders = [RangeEncoder() for _ in range(self.parts)]

        def code(group: int, probabilities: np.ndarray, bits: np.ndarray | None) -> np.ndarray | None:
            assert bits is not None
            coders[group // self.size].write(probabilities, bits)
            return bits

        if self.maps:

            def write(probabilities: np.ndarray, flags: np.ndarray | None) -> np.ndarray:
                assert flags is not None
                coders[0].write(probabilities, flags)
                return flags

            self.stops.advance(write, going)
        for rows, band in self.bands:
            band.code(code, plane[:, rows], going[rows])
            band.advance(plane[:, rows])
        self.ideal_bits.append(sum(coder.ideal_bits() for coder in coders))
        pieces = [(coder.finish(), coder.raw()) for coder in coders]
        return [(CONTEXT, coded) if len(coded) < len(raw) else (RAW, raw) for coded, raw in pieces]

    @torch.inference_mode()
    def _decode(self, pieces: Sequence[Piece]) -> np.ndarray:
        coders = [RawDecoder(payload) if coding == RAW else RangeDecoder(payload) for coding, payload in pieces]
        if self.maps and not self.stops.advance(lambda probabilities, _: coders[0].read(probabilities)).any():
            raise FormatError("an iteration in which no location goes on")

        def code(group: int, probabilities: np.ndarray, _: np.ndarray | None) -> np.ndarray | None:
            part = group // self.size
            return coders[part].read(probabilities) if part < len(coders) else None

        plane = np.concatenate([band.code(code, None, self.stops.living[rows]) for rows, band in self.bands], axis=1)
        for coder in coders:
            coder.finish()
        return plane
