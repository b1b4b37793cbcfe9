"""Encoder, binarizer and decoder of the latent network, whose loop runs on one latent vector for each 16x16 block.

Each bit answers a question, see `questions`. Encoder and decoder are ConvLSTMs that correct the questions' tables: the
encoder's output is added to the residual before it is compared, the decoder's output to the latents. Both corrections
start at zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnncodec.network.binarizer import Coded
from rnncodec.network.cells import CellState, ConvLSTM, GateConv
from rnncodec.network.parts import Parts
from rnncodec.network.places import Places, convolve, pick, put
from rnncodec.network.priming import ExtraRuns
from rnncodec.network.questions import Answered, Known, Questions, at
from rnncodec.network.transforms import STRIDE, Analysis, LatentTransforms, Synthesis, full_precision, zero_conv

BAND = 2**12  # locations that an LSTM computes at once, which bounds its memory


@dataclass(frozen=True)
class LatentConfig:
    """Architecture of a network whose loop runs in a latent space.

    Attributes:
        iterations: number of passes; each has its own questions.
        bits: questions, and so bits, of each location in a pass.
        groups: groups into which these are divided; a group's questions depend on the answers of earlier groups.
        latents: channels of the latent space.
        encoder_channels, decoder_channels: of the hidden states of the two ConvLSTMs.
        mixed: channels to which a 1x1 convolution reduces the input of each ConvLSTM.
        around: channels of a 3x3 convolution of these, which sees the neighboring locations.
        analysis_channels: of the nonlinear branch of the analysis, at 1/4, 1/8 and 1/16 of the resolution.
        analysis_blocks: residual blocks of this branch at each resolution.
        synthesis_channels: of the nonlinear branch of the synthesis, at 1/16, 1/8 and 1/4 of the resolution.
        synthesis_blocks: residual blocks of this branch at each resolution.
        priming, diffusion: extra runs of the cells of encoder and decoder in the first and in each later pass, see
            `ExtraRuns`. What a cell takes in is computed once, because nothing before it has a state.
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
    priming: int = 0
    diffusion: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):  # configs and checkpoints contain lists
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        numbers = [getattr(self, field.name) for field in fields(self) if field.name not in ("priming", "diffusion")]
        if min(min(number) if isinstance(number, tuple) else number for number in numbers) < 1:
            raise ValueError("every number of a latent network but priming and diffusion must be at least 1")
        _ = self.extra_runs  # checks them
        if self.bits % self.groups or self.bits // self.groups > self.latents:
            raise ValueError(f"{self.bits} bits are not {self.groups} groups of different channels of {self.latents}")
        if self.bits > 255:
            raise ValueError(f"a file has room for 255 bits of a location, not {self.bits}")
        if len(self.analysis_channels) != 3 or len(self.synthesis_channels) != 3:
            raise ValueError("the branches of the transforms have three scales")

    @property
    def stride(self) -> int:
        """Side in pixels of the block that one location stands for."""
        return STRIDE

    @property
    def extra_runs(self) -> ExtraRuns:
        """Priming and diffusion of the cells of encoder and decoder."""
        return ExtraRuns(self.priming, self.diffusion)

    def parts(self) -> Parts:
        """Makes the parts of a network."""
        counts = self.iterations * self.groups
        return Parts(
            LatentTransforms(
                Analysis(self.latents, self.analysis_channels, self.analysis_blocks),
                Synthesis(self.latents, self.decoder_channels, counts, self.synthesis_channels, self.synthesis_blocks),
            ),
            LatentEncoder(self),
            LatentBinarizer(self),
            LatentDecoder(self),
        )


class EncoderState(NamedTuple):
    """The number of the next pass, a long scalar, and the state of the cell."""

    iteration: Tensor
    cell: CellState | None


class Asked(NamedTuple):
    """The number of a pass, what is known before it, and how many groups each location has received, long [B, H, W]."""

    iteration: Tensor
    known: Known
    received: Tensor


class Answers(NamedTuple):
    """What a pass adds to the latents [B, C, H, W], its number, and the groups received after it, long [B, H, W].

    `going`, bool [B, 1, H, W], tells which locations have received any in this pass; None stands for all.
    """

    added: Tensor
    iteration: Tensor
    received: Tensor
    going: Tensor | None


class DecoderState(NamedTuple):
    """The groups that each location has received, long [B, H, W], and the state of the cell."""

    received: Tensor
    cell: CellState


class LookAround(nn.Module):
    """Computes the input of a cell with 1x1 kernels: reduced channels, and a 3x3 convolution of them."""

    def __init__(self, in_channels: int, config: LatentConfig) -> None:
        super().__init__()
        self.mixed = GateConv(in_channels, config.mixed, 1)
        self.around = GateConv(config.mixed, config.around, 3)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        mixed = self.mixed(x)
        return torch.cat([mixed, F.relu(self.around(F.relu(mixed)) + bias)], 1)

    def at(self, places: Places, near: Tensor, bias: Tensor) -> Tensor:
        """Computes some locations only, [1, C, 1, n], from x at these and their neighbors, [1, C, 1, m]."""
        mixed = self.mixed(near)
        here = mixed.index_select(3, places.within)
        return torch.cat([here, F.relu(convolve(self.around, F.relu(mixed), places) + bias)], 1)


class LatentEncoder(nn.Module):
    """A ConvLSTM that computes from the residual [B, C, H, W] an offset for each decision, [B, bits, H, W]."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        # Standard deviation of the residual before each pass.
        self.scale = nn.Parameter(torch.ones(config.iterations, config.latents))
        self.bias = nn.Parameter(torch.zeros(config.iterations, config.around))
        self.look = LookAround(config.latents, config)
        self.cell = ConvLSTM(config.mixed + config.around, config.encoder_channels, 1, 1)
        self.output = zero_conv(config.encoder_channels, config.bits, 1)
        self.groups, self.extra_runs = config.groups, config.extra_runs

    def forward(
        self, residual: Tensor, state: EncoderState | None, limit: Tensor | None = None
    ) -> tuple[Tensor, EncoderState]:
        """Offsets and state, which mean nothing where the limit leaves nothing to decide."""
        iteration, cell = state or EncoderState(torch.zeros((), dtype=torch.long, device=residual.device), None)
        scale, bias = _per_channel(at(self.scale, iteration)), _per_channel(at(self.bias, iteration))
        going = None if limit is None or state is None else (limit > iteration * self.groups)[:, None]

        def finish(looked: Tensor, *cell: Tensor) -> tuple[Tensor, ...]:
            hidden, new_cell = self.extra_runs(self.cell, looked, cell or None)
            return self.output(hidden), *new_cell

        def band(residual: Tensor, *cell: Tensor) -> tuple[Tensor, ...]:
            return finish(self.look(residual / scale, bias), *cell)

        if cell is not None and (places := Places.of(going, self.training)):
            looked = self.look.at(places, pick(residual, places.near) / scale, bias)
            found, *new = finish(looked, *(pick(part, places.here) for part in cell))
            offset = put(found.new_zeros(len(residual), found.shape[1], *residual.shape[2:]), places.here, found)
            new_cell = [put(part, places.here, values) for part, values in zip(cell, new, strict=True)]
        else:
            offset, *new_cell = by_rows(band, residual, *(cell or ()))
        return offset, EncoderState(iteration + 1, tuple(new_cell))


class LatentBinarizer(nn.Module):
    """Turns the residual into bits by answering questions; the encoder's offsets shift the decisions."""

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
        """Codes a pass to bits [B, bits, H, W] of -1 and +1, or 0 in groups beyond a location's limit [B, H, W]."""
        asked = self._asked(state, len(residual), *residual.shape[2:])
        with full_precision(residual):
            left = None if limit is None else limit - asked.received
            answered = self.questions.ask(asked.iteration, asked.known, residual.float(), features.float(), left)
        return self._coded(asked, answered, whole=limit is None)

    def values(self, bits: Tensor, state: Asked | None) -> Coded:
        """The decoder's input for the bits of a pass."""
        asked = self._asked(state, len(bits), *bits.shape[2:])
        with full_precision(bits):
            answered = self.questions.values(asked.iteration, asked.known, bits.float())
            # A graph cannot branch, so it computes all locations.
            return self._coded(asked, answered, whole=torch.compiler.is_exporting() or bool(bits.all()))

    def _coded(self, asked: Asked, answered: Answered, whole: bool) -> Coded:
        groups = answered.bits.detach().unflatten(1, (self.questions.groups, -1))
        received = asked.received + (groups != 0).any(2).sum(1)
        going = None if whole else (received > asked.received)[:, None]
        answers = Answers(answered.added, asked.iteration, received, going)
        return Coded(answered.bits, answers, Asked(asked.iteration + 1, answered.known, received), answered.case)


class LatentDecoder(nn.Module):
    """A ConvLSTM that corrects the latents after each pass; where nothing is received, nothing changes any more."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.iterations, config.latents))
        self.received = nn.Embedding(config.iterations * config.groups + 1, config.around)
        self.look = LookAround(2 * config.latents, config)
        self.cell = ConvLSTM(config.mixed + config.around, config.decoder_channels, 1, 1)
        self.output = zero_conv(config.decoder_channels, config.latents, 1)
        nn.init.zeros_(self.received.weight)
        self.extra_runs = config.extra_runs

    def forward(
        self, answers: Answers, state: DecoderState | None, y_hat: Tensor | None
    ) -> tuple[Tensor, DecoderState]:
        """What a pass adds to the latents, [B, C, H, W], given their sum so far."""
        added, iteration, received, going = answers
        scale = _per_channel(at(self.scale, iteration))
        y_hat = torch.zeros_like(added) if y_hat is None else y_hat

        def look(added: Tensor, y_hat: Tensor) -> Tensor:
            return torch.cat([added / scale, y_hat + added], 1)

        def finish(looked: Tensor, added: Tensor, *cell: Tensor) -> tuple[Tensor, ...]:
            hidden, new_cell = self.extra_runs(self.cell, looked, cell or None)
            return added + self.output(hidden).float(), *new_cell

        def band(added: Tensor, y_hat: Tensor, received: Tensor, *cell: Tensor) -> tuple[Tensor, ...]:
            bias = self.received(received[:, 0]).permute(0, 3, 1, 2)
            return finish(self.look(look(added, y_hat), bias), added, *cell)

        if state is not None and (places := Places.of(going, self.training)):
            here, near = places.here, places.near
            bias = self.received(received.flatten()[here]).T[None, :, None]
            looked = self.look.at(places, look(pick(added, near), pick(y_hat, near)), bias)
            found, *new = finish(looked, pick(added, here), *(pick(part, here) for part in state.cell))
            values = put(added, here, found)  # which are zeros elsewhere
            cell = [put(part, here, part_here) for part, part_here in zip(state.cell, new, strict=True)]
        else:
            values, *cell = by_rows(band, added, y_hat, received[:, None], *(state.cell if state else ()))
            if state is not None and going is not None:
                values = values * going
                cell = [torch.where(going, new, old) for new, old in zip(cell, state.cell, strict=True)]
        return values, DecoderState(received, tuple(cell))


def by_rows(part: Callable[..., tuple[Tensor, ...]], *maps: Tensor) -> tuple[Tensor, ...]:
    """Applies `part`, which may see one location to each side, to maps [B, C, H, W], large ones in bands of rows.

    The bands save memory: activations within `part` are several times as large as its inputs and outputs.
    """
    if torch.compiler.is_exporting():  # a graph has no loop
        return part(*maps)
    height, width = maps[0].shape[2:]
    rows = max(1, BAND // width)
    if height <= rows:
        return part(*maps)
    whole: list[Tensor] = []
    for top in range(0, height, rows):
        above, core = min(top, 1), slice(top, min(top + rows, height))
        found = part(*(x[:, :, top - above : core.stop + 1] for x in maps))
        if not whole:  # channels last in memory
            whole = [x.new_empty(len(x), height, width, x.shape[1]).permute(0, 3, 1, 2) for x in found]
        for x, band in zip(whole, found, strict=True):
            x[:, :, core] = band[:, :, above : above + core.stop - core.start]
    return tuple(whole)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
