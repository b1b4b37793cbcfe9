"""The parts of the loop in the latent space: one location for each 16x16 block, bits that answer questions about it.

Encoder and decoder are ConvLSTMs that correct what the questions' tables know already: the encoder moves the
decisions, the decoder moves the latents. Both corrections start at zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnncodec.network.binarizer import Coded
from rnncodec.network.cells import CellState, ConvLSTM, GateConv
from rnncodec.network.questions import Answered, Known, Questions, at
from rnncodec.network.transforms import STRIDE, full_precision, silent

BAND = 2**12  # locations that the LSTMs work on at once


@dataclass(frozen=True)
class LatentConfig:
    """Shapes of a network whose loop runs in a latent space.

    Attributes:
        iterations: passes that there are questions for.
        bits: questions of each pass.
        groups: of them; each knows the answers of those before it.
        latents: channels of the latent space.
        encoder_channels, decoder_channels: of the hidden states of the two ConvLSTMs.
        mixed: channels to which the input of a ConvLSTM is reduced, before a 3x3 convolution looks around.
        around: channels of that convolution.
        analysis_channels: of the branch of the analysis, at 1/4, 1/8 and 1/16 of the resolution.
        analysis_blocks: its residual blocks at each of these.
        synthesis_channels: of the branch of the synthesis, at 1/16, 1/8 and 1/4 of the resolution.
        synthesis_blocks: its residual blocks at each of these.
    """

    iterations: int = 24
    bits: int = 64
    groups: int = 4
    latents: int = 384
    encoder_channels: int = 192
    decoder_channels: int = 256
    mixed: int = 128
    around: int = 96
    analysis_channels: tuple[int, ...] = (64, 128, 192)
    analysis_blocks: int = 1
    synthesis_channels: tuple[int, ...] = (192, 128, 64)
    synthesis_blocks: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):  # configs and checkpoints hold lists
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        values = [getattr(self, field.name) for field in fields(self)]
        if min(min(value) if isinstance(value, tuple) else value for value in values) < 1:
            raise ValueError("every number of a latent network must be at least 1")
        if self.bits % self.groups or self.bits // self.groups > self.latents:
            raise ValueError(f"{self.bits} bits are not {self.groups} groups of different channels of {self.latents}")
        if len(self.analysis_channels) != 3 or len(self.synthesis_channels) != 3:
            raise ValueError("the branches of the transforms have three scales")

    @property
    def stride(self) -> int:
        """Side in pixels of the block of one location."""
        return STRIDE


class EncoderState(NamedTuple):
    """The number of the next pass, a long scalar, and the state of the cell."""

    iteration: Tensor
    cell: CellState | None


class Asked(NamedTuple):
    """What is known before a pass, its number, and how many groups each location has received, long [B, H, W]."""

    iteration: Tensor
    known: Known
    received: Tensor


class Answers(NamedTuple):
    """What the bits of a pass add to the latents [B, C, H, W]; `iteration` and `received` as in `Asked`, after it."""

    added: Tensor
    iteration: Tensor
    received: Tensor


class DecoderState(NamedTuple):
    """Groups received, long [B, H, W], and the state of the cell."""

    received: Tensor
    cell: CellState


class LookAround(nn.Module):
    """A reduction of the channels and, beside it, a 3x3 convolution of it: the input of a cell of 1x1 convolutions."""

    def __init__(self, in_channels: int, config: LatentConfig) -> None:
        super().__init__()
        self.mixed = GateConv(in_channels, config.mixed, 1)
        self.around = GateConv(config.mixed, config.around, 3)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        mixed = self.mixed(x)
        return torch.cat([mixed, F.relu(self.around(F.relu(mixed)) + bias)], 1)


class LatentEncoder(nn.Module):
    """A ConvLSTM: the residual [B, C, H, W] to what moves the decisions, [B, bits, H, W]."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        # Standard deviation of the residual before each pass.
        self.scale = nn.Parameter(torch.ones(config.iterations, config.latents))
        self.bias = nn.Parameter(torch.zeros(config.iterations, config.around))
        self.look = LookAround(config.latents, config)
        self.cell = ConvLSTM(config.mixed + config.around, config.encoder_channels, 1, 1)
        self.output = silent(config.encoder_channels, config.bits, 1)

    def forward(self, residual: Tensor, state: EncoderState | None) -> tuple[Tensor, EncoderState]:
        iteration, cell = state or EncoderState(torch.zeros((), dtype=torch.long, device=residual.device), None)
        scale, bias = _columns(at(self.scale, iteration)), _columns(at(self.bias, iteration))

        def band(residual: Tensor, *cell: Tensor) -> tuple[Tensor, ...]:
            hidden, new_cell = self.cell(self.look(residual / scale, bias), cell or None)
            return self.output(hidden), *new_cell

        offset, *new_cell = by_rows(band, residual, *(cell or ()))
        return offset, EncoderState(iteration + 1, tuple(new_cell))


class LatentBinarizer(nn.Module):
    """Bits by questions: what the encoder says moves the decisions, tables say what an answer adds to the latents."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.questions = Questions(config.latents, config.iterations, config.bits, config.groups)

    def _asked(self, state: Asked | None, batch: int, height: int, width: int) -> Asked:
        if state is not None:
            return state
        device = self.questions.table.device
        known = self.questions.start(torch.empty(batch, 0, height, width, device=device))
        received = torch.zeros(batch, height, width, dtype=torch.long, device=device)
        return Asked(torch.zeros((), dtype=torch.long, device=device), known, received)

    def forward(self, features: Tensor, residual: Tensor, state: Asked | None, limit: Tensor | None = None) -> Coded:
        """The bits of a pass, [B, bits, H, W] of -1 and +1; 0 beyond the limit of groups of a location [B, H, W]."""
        asked = self._asked(state, len(residual), *residual.shape[2:])
        with full_precision(residual):
            left = None if limit is None else limit - asked.received
            answered = self.questions.ask(asked.iteration, asked.known, residual.float(), features.float(), left)
        return self._coded(asked, answered)

    def values(self, bits: Tensor, state: Asked | None) -> Coded:
        """What the bits of a pass say to the decoder."""
        asked = self._asked(state, len(bits), *bits.shape[2:])
        with full_precision(bits):
            return self._coded(asked, self.questions.values(asked.iteration, asked.known, bits.float()))

    def _coded(self, asked: Asked, answered: Answered) -> Coded:
        groups = answered.bits.detach().unflatten(1, (self.questions.groups, -1))
        received = asked.received + (groups != 0).any(2).sum(1)
        answers = Answers(answered.added, asked.iteration, received)
        return Coded(answered.bits, answers, Asked(asked.iteration + 1, answered.known, received), answered.case)


class LatentDecoder(nn.Module):
    """A ConvLSTM that corrects the latents after the answers of each pass."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.iterations, config.latents))
        self.received = nn.Embedding(config.iterations * config.groups + 1, config.around)
        self.look = LookAround(2 * config.latents, config)
        self.cell = ConvLSTM(config.mixed + config.around, config.decoder_channels, 1, 1)
        self.output = silent(config.decoder_channels, config.latents, 1)
        nn.init.zeros_(self.received.weight)

    def forward(
        self, answers: Answers, state: DecoderState | None, y_hat: Tensor | None
    ) -> tuple[Tensor, DecoderState]:
        """What a pass adds to the latents, [B, C, H, W], given their sum so far."""
        added, iteration, received = answers
        scale = _columns(at(self.scale, iteration))

        def band(added: Tensor, y_hat: Tensor, received: Tensor, *cell: Tensor) -> tuple[Tensor, ...]:
            bias = self.received(received[:, 0]).permute(0, 3, 1, 2)
            look = self.look(torch.cat([added / scale, y_hat + added], 1), bias)
            hidden, new_cell = self.cell(look, cell or None)
            return added + self.output(hidden).float(), *new_cell

        y_hat = torch.zeros_like(added) if y_hat is None else y_hat
        values, *cell = by_rows(band, added, y_hat, received[:, None], *(state.cell if state else ()))
        return values, DecoderState(received, tuple(cell))


def by_rows(part: Callable[..., tuple[Tensor, ...]], *maps: Tensor) -> tuple[Tensor, ...]:
    """What a part that sees one location to each side makes of maps [B, C, H, W], of large ones in bands of rows.

    What lies between the part's layers, several times as large as what it takes and gives, is then small.
    """
    height, width = maps[0].shape[2:]
    rows = max(1, BAND // width)
    if height <= rows:
        return part(*maps)
    whole: list[Tensor] = []
    for top in range(0, height, rows):
        above, core = min(top, 1), slice(top, min(top + rows, height))
        found = part(*(x[:, :, top - above : core.stop + 1] for x in maps))
        if not whole:  # channels last
            whole = [x.new_empty(len(x), height, width, x.shape[1]).permute(0, 3, 1, 2) for x in found]
        for x, band in zip(whole, found, strict=True):
            x[:, :, core] = band[:, :, above : above + core.stop - core.start]
    return tuple(whole)


def _columns(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
