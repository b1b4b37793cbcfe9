"""The session of a context model, and all coders by their names."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rnncodec.entropy.classical import AdaptiveSession, HuffmanSession, RawSession, StaticSession
from rnncodec.entropy.context import ContextModel, Memory
from rnncodec.entropy.exact import SCALE, probability
from rnncodec.entropy.ranges import RangeDecoder, RangeEncoder, Session
from rnncodec.format import CONTEXT

EntropyName = Literal["none", "context", "huffman", "static", "adaptive"]


class ContextSession(Session):
    """The range coder with the probabilities of an exact context model (T17 sec. 4).

    Large planes are coded in bands of rows that know nothing of each other, which bounds the working memory. There
    remain the states, 16 bytes for each channel and location.

    Args:
        model: from `ContextModel.quantize`, on the device that is to compute.
        bits, rows, cols: shape of the bits of an iteration.
    """

    coding = CONTEXT
    BAND = 2**17  # locations, about 33 megapixels

    def __init__(self, model: ContextModel, bits: int, rows: int, cols: int) -> None:
        super().__init__(bits, rows, cols)
        self.model = model
        self.iteration = 0
        self.pending: list[np.ndarray] = []  # earlier iterations that are not yet part of the states
        height = max(1, self.BAND // cols)
        self.bands = [slice(top, min(top + height, rows)) for top in range(0, rows, height)]
        self.states: list[Memory | None] = [None] * len(self.bands)

    def chances(self, plane: np.ndarray) -> np.ndarray:
        """P(1) * SCALE of every bit of the next iteration, int [bits, rows, cols]."""
        predictor = self.model.predictor(self.iteration)
        with torch.inference_mode():
            found = [probability(predictor(self._signs(plane[:, b]), prior))[0] for b, prior in self._priors()]
        return torch.cat(found, dim=1).cpu().numpy()

    def ideal_bits(self, plane: np.ndarray) -> float:
        """The code length of the next iteration by the model's probabilities alone, which no coder can beat."""
        p = self.chances(plane) / SCALE
        self._advance(plane)
        return float(-np.log2(np.where(plane, p, 1 - p)).sum())

    def _encode(self, plane: np.ndarray) -> bytes:
        predictor, chances = self.model.predictor(self.iteration), self.chances(plane)
        coder = RangeEncoder()
        for band in self.bands:
            order = predictor.order(*plane[:, band].shape)
            coder.write(*(a[:, band].transpose(1, 2, 0).ravel()[order] for a in (chances, plane)))
        return coder.finish()

    def _decode(self, payload: bytes) -> np.ndarray:
        predictor, coder = self.model.predictor(self.iteration), RangeDecoder(payload)
        with torch.inference_mode():
            found = [predictor.decode(prior, self.shape[0], coder.read)[0] > 0 for _, prior in self._priors()]
        coder.finish()
        return torch.cat(found, dim=1).cpu().numpy()

    def _advance(self, plane: np.ndarray) -> None:
        self.pending.append(plane)
        self.iteration += 1

    def _priors(self) -> Iterator[tuple[slice, Tensor]]:
        """The bands, each with what the model knows of the next iteration before its first bit."""
        pending, self.pending = self.pending, []
        for i, band in enumerate(self.bands):
            for plane in pending:
                self.states[i] = self.model.history(self._signs(plane[:, band]), self.states[i])
            blank = self._signs(np.zeros((self.shape[0], band.stop - band.start, self.shape[2]), bool))
            yield band, self.model.history.look(self.states[i], blank)

    def _signs(self, plane: np.ndarray) -> Tensor:
        return torch.from_numpy(plane).to(self.model.history.prior.weight)[None] * 2 - 1


# The coders that need no model.
CLASSICAL: dict[EntropyName, type[Session]] = {
    "none": RawSession,
    "huffman": HuffmanSession,
    "static": StaticSession,
    "adaptive": AdaptiveSession,
}
NAMES: dict[int, EntropyName] = {CONTEXT: "context", **{session.coding: name for name, session in CLASSICAL.items()}}
