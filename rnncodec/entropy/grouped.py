"""The context model of a latent network: tables give the log odds of each bit, and a small network corrects them.

A pass asks its questions in groups. Earlier bits decide the case of each question, and a table of log odds by case is
already a good model. The network sees the *surprises*: each bit, 1 or 0, minus its probability by the table. A group is
coded in two turns, on the black and then on the white squares of a checkerboard. Each turn knows all earlier surprises:

    surprises of earlier passes ──► running sum ──► clip ──► prior ──┐
                                                                     ├──► clip ──► middle ──► clip ──► logits - odds
    surprises of this pass so far ──► running sum of convolutions ───┘

Each pass has its own weights, because it has its own questions. An exact model computes the same in whole numbers, in
units of 1/256. Each turn then adds only what has become known since the previous one, and only on its own squares.
Weights have 7 bits and a sign, surprises two bits more. Split into two parts, they are int8, which processors multiply
several times as fast as floats. No sum needs more than the 24 bits of a float32.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnncodec.entropy.exact import MANTISSA, SIGMOID, SPAN, STEP, Layer, blank, checkerboard, halves, product, snap

CASES = 75  # of a question
UNIT = int(1 / STEP)
FACTOR = 2**7 - 1  # largest weight in units of its grid
SIDE = 3  # of the convolutions' kernels
LAYERED = 2**13  # locations that go through the layers at once, which bounds the memory
SQUARES = 512  # locations whose surroundings are gathered at once, so that they fit a cache

Tell = Callable[[slice, Tensor], Tensor]
"""Gives the bits of a turn, [n, S] of -1, 0 and +1, from its place in the order of coding, and the logits [n, S]."""


class Questions(Protocol):
    """The interface to the questions of a latent network, which computes the case of each from earlier bits."""

    def start(self, like: Tensor) -> Any:
        """What is known before the first pass, for a tensor [B, C, H, W]."""
        ...

    def walk(
        self, iteration: Tensor, known: Any, answer: Callable[[int, Tensor], Tensor], spare: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """Asks the groups of a pass in order; `answer` takes a group's number and cases and gives its bits.

        If `known` is `spare`, nobody needs it any more.

        Returns:
            Bits [B, K, H, W], their cases, uint8 of the same shape, and what is known after the pass.
        """
        ...


class Grid(NamedTuple):
    """The order in which the n locations of a batch of planes are coded: the black squares, then the white ones.

    Attributes:
        order: their numbers among all N locations, row by row, [n].
        turns: what is black of this order, and what is white.
        place: the place in this order of each of the N locations, [N]; n where there is none.
        around: the places of the 3x3 locations around each, row by row, [2, n, SIDE * SIDE]. They are indices into the
            two parts of a table, of n + 1 rows each, whose last row is for locations that have no place.
    """

    order: Tensor
    turns: tuple[slice, slice]
    place: Tensor
    around: Tensor

    def only(self, living: Tensor) -> "Grid":
        """The grid of some of the locations, bool [N]."""
        kept = living.index_select(0, self.order).nonzero().flatten()
        moved = torch.full((len(self.order) + 1,), len(kept), dtype=torch.int32, device=kept.device)
        moved[kept] = torch.arange(len(kept), dtype=torch.int32, device=kept.device)
        around = moved.index_select(0, self.around[0, kept].flatten()).view(-1, SIDE * SIDE)
        black = int((kept < self.turns[1].start).sum())
        place = moved.index_select(0, self.place)
        return Grid(self.order[kept], _turns(black, len(kept)), place, _in_two_parts(around))


def _turns(black: int, count: int) -> tuple[slice, slice]:
    """The two colors of a number of locations."""
    return slice(black), slice(black, count)


def _in_two_parts(around: Tensor) -> Tensor:
    """Indices into a table of n + 1 rows as indices into two of them, one below the other."""
    return torch.stack([around, around + len(around) + 1])


@lru_cache(maxsize=8)
def grid(batch: int, height: int, width: int, device: torch.device) -> Grid:
    """The grid of planes of a given size."""
    white = checkerboard(height, width).expand(batch, -1, -1).flatten()
    order = white.argsort(stable=True)
    place = torch.empty(len(order), dtype=torch.int32)
    place[order] = torch.arange(len(order), dtype=torch.int32)
    padded = F.pad(place.view(batch, height, width), [SIDE // 2] * 4, value=len(order))
    around = padded.unfold(1, SIDE, 1).unfold(2, SIDE, 1).reshape(-1, SIDE * SIDE)[order]
    turns = _turns(len(order) - int(white.sum()), len(order))
    return Grid(order.to(device), turns, place.to(device), _in_two_parts(around).to(device))


class Maps(Layer):
    """Linear maps, one or more for each iteration.

    Args:
        shape: of the weights, [iterations, ..., inputs, outputs].
        gain: initial standard deviation of an output for inputs of variance 1.
    """

    def __init__(self, shape: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(shape) * gain / math.sqrt(shape[-2]))
        self.exponent = [0] * shape[0]  # of the grid of an iteration's weights, once they are quantized

    def whole(self, t: int) -> Tensor:
        """The quantized weights of an iteration as whole numbers, which are the weights times 2^exponent."""
        return self.map[t] * 2.0 ** self.exponent[t]

    def rescale(self, t: int, total: Tensor) -> Tensor:
        """Converts sums of products with `whole` weights to the units of the inputs, rounded."""
        return (total * 2.0 ** -self.exponent[t]).round_()

    @torch.no_grad()
    def quantize(self) -> None:
        """Rounds the weights to the finest grid on which no sum needs more than the 24 bits of a float32."""
        for t, weights in enumerate(self.map):
            size = weights.shape[-2]
            total = weights.abs().sum(-2).max().item() / (2.0**MANTISSA * STEP - size / 2)
            largest = weights.abs().max().item() / FACTOR
            self.exponent[t] = min(16, math.floor(-math.log2(max(total, largest, 2.0**-16))))
            weights.copy_(snap(weights, 2.0 ** -self.exponent[t]))
        self._check()

    @torch.no_grad()
    def integers(self) -> dict[str, Tensor]:
        whole = torch.stack([self.whole(t) for t in range(len(self.map))])
        return {"map": whole.to(torch.int8), "exponent": torch.tensor(self.exponent, dtype=torch.int8)}

    @torch.no_grad()
    def load_integers(self, integers: Mapping[str, Tensor]) -> None:
        """Sets the weights to given integers, which may come from any source.

        Raises:
            ValueError: sums would not be exact.
        """
        self.exponent = integers["exponent"].tolist()
        for weights, whole, exponent in zip(self.map, integers["map"], self.exponent, strict=True):
            weights.copy_(whole * 2.0**-exponent)
        self._check()

    def _check(self) -> None:
        """Raises ValueError if sums would not be exact."""
        for t, exponent in enumerate(self.exponent):
            whole = self.whole(t).abs()
            if not (0 <= exponent <= 16 and whole.max() <= FACTOR and whole.sum(-2).max() <= 2.0**MANTISSA * STEP):
                raise ValueError("sums of a layer would need more bits than a float32 has")


class Grouped(Layer):
    """The tables of log odds and the network that corrects them; parameters are [iterations, ...].

    Args:
        bits: of one location in one iteration.
        groups: groups into which these are divided.
        channels: of every hidden layer.
        iterations: number of iterations with their own weights; later ones use the last.
    """

    SHIFTS = ("odds", "turn", "shift", "level")  # parameters on the grid of activations

    def __init__(self, bits: int, groups: int, channels: int, iterations: int) -> None:
        super().__init__()
        self.groups, self.size = groups, bits // groups
        taps = SIDE * SIDE
        self.odds = nn.Parameter(torch.zeros(iterations, bits, CASES))
        # Inputs of `known` are in the order group, tap, bit; those of `remember` tap, bit.
        self.known = Maps((iterations, groups * taps * self.size, channels), 1.2)
        self.turn = nn.Parameter(torch.rand(iterations, 2 * groups, channels) / 2)
        self.middle = Maps((iterations, groups, channels, channels), 1.0)
        self.shift = nn.Parameter(torch.rand(iterations, groups, channels) / 3)
        self.output = Maps((iterations, groups, channels, self.size), 0.0)
        self.remember = Maps((iterations, taps * bits, channels), 1.0)
        self.level = nn.Parameter(torch.rand(iterations, channels) / 2)
        self.prior = Maps((iterations, channels, channels), 0.5)

    def index(self, iteration: int) -> int:
        """The index of the weights that an iteration uses."""
        return min(iteration, len(self.odds) - 1)

    @torch.no_grad()
    def start_odds(self, odds: Tensor) -> None:
        """Initializes the tables with log odds of a yes, [iterations, bits, CASES], from the questions."""
        self.odds.copy_(odds.clamp(-SPAN, SPAN))

    @torch.no_grad()
    def quantize(self) -> None:
        for name in self.SHIFTS:
            shift = getattr(self, name)
            shift.copy_(snap(shift, STEP).clamp(-SPAN, SPAN))

    @torch.no_grad()
    def integers(self) -> dict[str, Tensor]:
        return {name: (getattr(self, name) / STEP).short() for name in self.SHIFTS}

    @torch.no_grad()
    def load_integers(self, integers: Mapping[str, Tensor]) -> None:
        for name in self.SHIFTS:
            if integers[name].int().abs().max() > SPAN / STEP:
                raise ValueError("a bias is too large")
            getattr(self, name).copy_(integers[name] * STEP)

    def forward(self, planes: Tensor, cases: Tensor) -> Tensor:
        """Computes the logits of P(+1) for every bit of all iterations, each given the bits before it.

        Args:
            planes: bits [T, B, bits, H, W] of -1 and +1, and 0 where none was sent.
            cases: of each bit, uint8 of the same shape.
        """
        if self.exact:
            with torch.autocast(planes.device.type, enabled=False):
                return self._exact_forward(planes, cases)
        count, batch, bits, height, width = planes.shape
        groups, own = self.groups, torch.tensor([self.index(t) for t in range(count)], device=planes.device)
        places = self._places(cases, 2) + bits * CASES * own.view(-1, 1, 1, 1, 1)
        odds = F.embedding(places, self.odds.view(-1, 1)).squeeze(-1)
        surprise = torch.where(planes == 0, 0, (planes + 1) / 2 - torch.sigmoid(odds))

        # All iterations and locations at once, [T, groups, N, channels]: training knows all bits from the start.
        columns = _columns(surprise.permute(0, 1, 3, 4, 2))  # [T, N, taps, bits]
        by_group = columns.unflatten(-1, (groups, -1)).permute(0, 3, 1, 2, 4)
        kernel = self.known.map[own].view(count, groups, SIDE * SIDE, self.size, -1)
        # What a location sees of each group on its own color and on the other; white squares see the latter at once.
        same, other = (by_group[..., i::2, :].flatten(-2) @ kernel[:, :, i::2].flatten(2, 3) for i in range(2))
        total = same + other
        white = checkerboard(height, width).to(self.turn)
        white = white.expand(batch, -1, -1).reshape(-1, 1)
        turn = self.turn[own].view(count, groups, 2, 1, -1)
        x = total.cumsum(1) - total + white * other + torch.lerp(turn[:, :, 0], turn[:, :, 1], white)
        if count > 1:
            found = columns[:-1].flatten(2) @ self.remember.map[own[:-1]]
            remembered = (found.float().cumsum(0) + self.level[own[1:], None]).clamp(-1, 1)
            x = x + F.pad((remembered @ self.prior.map[own[1:]])[:, None], (0, 0) * 3 + (1, 0))
        x = (x.clamp(-1, 1) @ self.middle.map[own] + self.shift[own, :, None]).clamp(-1, 1)
        correction = (x @ self.output.map[own]).unflatten(2, (batch, height, width))  # [T, groups, B, H, W, S]
        return odds + correction.permute(0, 2, 1, 5, 3, 4).flatten(2, 3)

    def _places(self, case: Tensor, dim: int) -> Tensor:
        """Indices of cases into the flattened odds of an iteration; `dim` is the dimension of the bits."""
        shape = [1] * case.ndim
        shape[dim] = -1
        starts = torch.arange(0, CASES * case.shape[dim], CASES, dtype=torch.int32, device=case.device)
        return case + starts.view(shape)

    # Exact arithmetic in whole numbers: tensors are [locations, channels], of all planes of a batch

    def _exact_forward(self, planes: Tensor, cases: Tensor) -> Tensor:
        """Computes `forward` exactly, with the probabilities that files are coded with."""
        batch, _, height, width = planes.shape[1:]
        memory, logits = None, []
        for iteration, (bits, case) in enumerate(zip(planes, cases, strict=True)):
            current = Pass(self, iteration, memory, (batch, height, width))
            sent = _rows(bits).index_select(0, current.grid.order)
            groups = zip(sent.chunk(self.groups, 1), _rows(case).chunk(self.groups, 1), strict=True)
            for group, (answers, of_group) in enumerate(groups):
                current.group(group, of_group, lambda turn, _, answers=answers: answers[turn])
            logits.append(current.all_logits().view(batch, height, width, -1).permute(0, 3, 1, 2))
            memory = current.remember()
        return (torch.stack(logits) * STEP).to(planes.dtype)


def _rows(planes: Tensor) -> Tensor:
    """Planes [B, C, H, W] as [B * H * W, C]."""
    return planes.permute(0, 2, 3, 1).flatten(0, 2)


def _columns(maps: Tensor) -> Tensor:
    """The 3x3 locations around each of maps [T, B, H, W, C], zeros beyond the border: [T, B * H * W, taps, C]."""
    height, width = maps.shape[2:4]
    padded = F.pad(maps, (0, 0) + (SIDE // 2,) * 4)
    taps = [padded[:, :, y : y + height, x : x + width] for y in range(SIDE) for x in range(SIDE)]
    return torch.stack(taps, -2).flatten(1, 3)


def _bands(turn: slice, size: int) -> Iterator[slice]:
    """Divides a slice into slices of at most a size."""
    for first in range(turn.start or 0, turn.stop, size):
        yield slice(first, min(first + size, turn.stop))


def _other_color(like: Tensor) -> Tensor:
    """Which taps of a kernel see the other color, bool [SIDE * SIDE, 1, 1]."""
    return (torch.arange(SIDE * SIDE, device=like.device) % 2 > 0).view(-1, 1, 1)  # they alternate, because SIDE is odd


class Pass:
    """One pass of an exact model over a batch of planes, group by group.

    Args:
        model: exact.
        iteration: number of the pass.
        memory: what `remember` gave after the pass before.
        shape: batch, height and width of the planes.
        living: bool [locations], those that are sent anything in this pass, all of which were before; None for all.
            Nothing is computed for the others.
    """

    def __init__(
        self,
        model: Grouped,
        iteration: int,
        memory: Tensor | None,
        shape: tuple[int, int, int],
        living: Tensor | None = None,
    ) -> None:
        self.model, self.t, self.memory = model, model.index(iteration), memory
        self.grid = grid(*shape, model.odds.device)
        if living is not None and not living.all():
            self.grid = self.grid.only(living)
        count, width, t = len(self.grid.order), model.turn.shape[-1], self.t
        self.odds, self.turn, self.shift = (bias[t] * UNIT for bias in (model.odds.flatten(1), model.turn, model.shift))
        self.expected = SIGMOID.to(self.odds).index_select(0, (self.odds.flatten() + SPAN * UNIT).int()) * UNIT
        known = model.known.whole(t).to(torch.int8)
        self.known = known.view(model.groups, SIDE * SIDE, model.size, width)
        self.middle, self.output = model.middle.whole(t), model.output.whole(t)
        self.other = _other_color(self.known)
        self.sums = blank((count, width), self.odds)
        # `halves` of the surprises of all groups, and of the last group known at each location. The last row is for
        # locations that have no place.
        self.surprises = blank((2, count + 1, model.groups, model.size), known)
        self.recent = blank((2, count + 1, model.size), known)
        self.logits: list[Tensor] = []  # of each group
        self.prior = None
        if memory is not None:
            remembered = memory.index_select(0, self.grid.order).add_(model.level[t] * UNIT).clamp_(-UNIT, UNIT)
            self.prior = model.prior.rescale(t, remembered @ model.prior.whole(t))

    def group(self, group: int, case: Tensor, tell: Tell) -> Tensor:
        """Computes the two turns of a group from its cases [locations, S]; returns its bits, likewise."""
        model, t = self.model, self.t
        places = model._places(case.index_select(0, self.grid.order), 1).add_(CASES * model.size * group)
        odds, expected = (
            table.index_select(0, places.flatten()).view_as(places) for table in (self.odds, self.expected)
        )
        bits = blank((len(places) + 1, model.size), self.odds)  # zeros for locations that have no place
        logits = torch.empty_like(odds)
        for color, turn in enumerate(self.grid.turns):
            before = self.known[max(group - 1, 0)]
            # In the second turn, the squares of the other color have this group's surprises already.
            weights = (torch.where(self.other, self.known[group], before) if color else before).flatten(0, 1)
            if group or color:
                for band in _bands(turn, SQUARES):
                    self.sums[band] += self._around(self.recent, self.grid.around[:, band], weights)
            for band in _bands(turn, LAYERED):
                x = model.known.rescale(t, self.sums[band]).add_(self.turn[2 * group + color])
                x = (x if self.prior is None else x.add_(self.prior[band])).clamp_(-UNIT, UNIT)
                x = model.middle.rescale(t, x @ self.middle[group]).add_(self.shift[group]).clamp_(-UNIT, UNIT)
                x = model.output.rescale(t, x @ self.output[group])
                torch.add(x, odds[band], out=logits[band])
            bits[turn] = told = tell(turn, logits[turn]).to(logits.dtype)
            self.recent[:, turn] = halves(((told + 1) * (UNIT // 2)).sub_(expected[turn]).mul_(told.abs()))
        self.logits.append(logits)
        self.surprises[:, :, group] = self.recent
        return bits.index_select(0, self.grid.place)

    def all_logits(self) -> Tensor:
        """The logits of all groups after their turns, [locations, bits]; zeros for locations that are not living."""
        return F.pad(torch.cat(self.logits, 1), (0, 0, 0, 1)).index_select(0, self.grid.place)

    def remember(self) -> Tensor:
        """The memory for the next pass, [locations, channels]."""
        model, surprises = self.model, self.surprises.flatten(2)
        memory = blank((surprises.shape[1], model.level.shape[1]), self.odds)
        weights = model.remember.whole(self.t).to(torch.int8)
        for band in _bands(slice(surprises.shape[1] - 1), SQUARES):
            memory[band] = self._around(surprises, self.grid.around[:, band], weights)
        memory = model.remember.rescale(self.t, memory.index_select(0, self.grid.place))
        return memory if self.memory is None else memory.add_(self.memory).clamp_(-(2**16), 2**16)

    def _around(self, surprises: Tensor, around: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of surprises, int8 [2, locations + 1, S], over the locations `around` [2, n, SIDE * SIDE]."""
        columns = surprises.flatten(0, 1).index_select(0, around.flatten())
        return product(columns.view(-1, len(weights)), weights)
