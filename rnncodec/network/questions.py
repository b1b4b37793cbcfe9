"""Quantizes latents by questions: each bit says whether a channel's residual is above a threshold.

Tables give the threshold, and two values of which the answer adds one to the latent. Their index is the *case* of the
question, which encoder and decoder both know. It combines the last three answers on the same channel and block, the
*history*, with the *activity*: what the answers so far have cost in this block and its four neighbors. Where activity
is low, a question with an unlikely yes costs about a tenth of a bit; a plain sign would cost a full bit everywhere.

Cases follow from bits by integer arithmetic, so that they are the same on every machine. Thresholds and values are
floats: they affect which bits are sent and what an image looks like, but never how a file is read.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HISTORIES = 15  # nodes of a binary tree: no answer yet, one, two, or the last three
ACTIVITIES = 5
CASES = HISTORIES * ACTIVITIES
UNIT = 256  # costs are counted in 1/256 bit
QUIET = 10  # first channels, whose costs do not count as activity: they describe brightness rather than texture
PSEUDO_COUNT = 2.0  # blocks of residual 0 that are added to each case, to limit the values of rare cases
SPREADS = (0.0, 1.0, -1.0, 1.7, -1.7)  # candidate thresholds, in standard deviations from the mean of a case

Answer = Callable[[int, Tensor], Tensor]
"""Gives the bits of a group of questions from its number and its cases; bits and cases are [B, K / groups, H, W]."""


def at(table: Tensor, iteration: Tensor) -> Tensor:
    """The row of a table for a scalar on its device, without copying the scalar to the CPU."""
    return table.index_select(0, iteration.reshape(1)).squeeze(0)


class Known(NamedTuple):
    """What both sides know between two groups: history uint8 [B, C, H, W], activity whole float64 [B, 1, H, W]."""

    history: Tensor
    activity: Tensor


class Answered(NamedTuple):
    """Bits of a pass and their cases [B, K, H, W], what they add to latents [B, C, H, W], what is known after it."""

    bits: Tensor
    case: Tensor
    added: Tensor
    known: Known


class Questions(nn.Module):
    """The questions of every pass, in groups; the cases of a group depend on the answers of all groups before it.

    Args:
        channels: C, of the latent space.
        iterations: number of passes.
        bits: K, questions of a pass.
        groups: groups of questions of a pass.
    """

    channel: Tensor
    cost: Tensor
    edges: Tensor

    def __init__(self, channels: int, iterations: int, bits: int, groups: int) -> None:
        super().__init__()
        self.channels, self.groups = channels, groups
        size = bits // groups
        # The channel of each question, the cost of each answer in each case, and the limits between activities.
        self.register_buffer("channel", torch.zeros(iterations, groups, size, dtype=torch.long))
        self.register_buffer("cost", torch.zeros(iterations, groups, size * CASES * 2, dtype=torch.int32))
        self.register_buffer("edges", torch.zeros(iterations, groups, ACTIVITIES - 1, dtype=torch.int32))
        # Threshold, mean of the two values, and half their difference.
        self.table = nn.Parameter(torch.zeros(iterations, bits * CASES, 3))

    def start(self, like: Tensor) -> Known:
        """What is known before the first pass, for latents [B, C, H, W]."""
        batch, _, height, width = like.shape
        # From NumPy, zeros take no memory before something is written: a code that is too short is noticed before.
        history = torch.from_numpy(np.zeros((batch, self.channels, height, width), np.uint8)).to(like.device)
        activity = torch.zeros(batch, 1, height, width, dtype=torch.double, device=like.device)
        return Known(history, activity)

    def case(self, iteration: Tensor, group: int, known: Known) -> Tensor:
        """The cases of a group of questions, uint8 [B, K / groups, H, W]."""
        above = _around(known.activity) > at(self.edges, iteration)[group].view(-1, 1, 1)
        history = known.history.index_select(1, at(self.channel, iteration)[group])
        return history * ACTIVITIES + above.sum(1, keepdim=True, dtype=torch.int32).to(torch.uint8)  # as ONNX can

    def told(self, iteration: Tensor, group: int, known: Known, case: Tensor, bits: Tensor) -> Known:
        """What is known after a group has been answered; a bit of 0 was not sent and changes nothing.

        The history is updated in place, because a copy for each group would take longer than everything else here.
        """
        channel = at(self.channel, iteration)[group]
        no, yes = at(self.cost, iteration)[group].view(-1, CASES, 2).unbind(-1)
        costs = torch.stack([no, torch.zeros_like(no), yes], -1) * (channel >= QUIET).view(-1, 1, 1)
        outcome = 3 * case + (bits + 1).to(torch.uint8)
        spent = _rows(costs.flatten(), _places(outcome, 3 * CASES))
        return Known(
            known.history.index_copy_(1, channel, _rows(_after(case.device), outcome.int())),
            known.activity + spent.sum(1, keepdim=True, dtype=torch.int32),
        )

    def walk(
        self, iteration: Tensor, known: Known, answer: Answer, spare: bool = False
    ) -> tuple[Tensor, Tensor, Known]:
        """Asks all groups of a pass in order.

        Args:
            iteration: number of the pass, from 0, a long scalar.
            known: what is known before the pass.
            answer: gives bits of -1 and +1, and 0 where nothing was sent.
            spare: whether nobody needs `known` any more, which saves memory.

        Returns:
            Bits [B, K, H, W], their cases, uint8 of the same shape, and what is known after the pass.
        """
        bits, cases = [], []
        known = known if spare else known._replace(history=known.history.clone())
        for group in range(self.groups):
            case = self.case(iteration, group, known)
            found = answer(group, case)
            known = self.told(iteration, group, known, case, found.detach())
            bits.append(found)
            cases.append(case)
        return torch.cat(bits, 1), torch.cat(cases, 1), known

    def look_up(self, table: Tensor, case: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds, means and half differences of the values, each [B, k, H, W], from a table [k * CASES, 3]."""
        threshold, mean, half = F.embedding(_places(case, CASES), table).unbind(-1)
        return threshold, mean, half

    def ask(
        self, iteration: Tensor, known: Known, residual: Tensor, offset: Tensor, left: Tensor | None = None
    ) -> Answered:
        """Answers the questions of a pass from the residual.

        The gradient is that of a ramp between the two values: straight-through near the threshold, zero beyond.

        Args:
            iteration: number of the pass, from 0, a long scalar.
            known: what is known before the pass.
            residual: [B, C, H, W].
            offset: added to the residual before it is compared, [B, K, H, W].
            left: how many groups of this and later passes are still sent, long [B, H, W]; the other bits are 0.
        """
        channel, offsets = at(self.channel, iteration), offset.chunk(self.groups, 1)

        def decide(group: int, threshold: Tensor, half: Tensor, added: list[Tensor]) -> Tensor:
            rest = residual[:, channel[group]]
            if added:  # the same channel may have been asked about before in this pass
                same = (channel[group][:, None] == channel[:group].flatten()).to(rest.dtype)
                rest = rest - torch.einsum("ij,bjhw->bihw", same, torch.cat(added, 1))
            margin = rest - threshold + offsets[group]
            ramp = (margin / half.detach().abs().clamp(min=1e-3)).clamp(-1, 1)
            bits = torch.where(margin > 0, 1.0, -1.0).to(margin.dtype) + (ramp - ramp.detach())
            return bits if left is None else bits * (left > group)[:, None]

        return self._answered(iteration, known, decide)

    def values(self, iteration: Tensor, known: Known, bits: Tensor) -> Answered:
        """Answers the questions of a pass with given bits.

        Args:
            iteration: number of the pass, from 0, a long scalar.
            known: what is known before the pass.
            bits: [B, K, H, W] of -1 and +1, and 0 where nothing was sent.
        """
        groups = bits.chunk(self.groups, 1)
        return self._answered(iteration, known, lambda group, *_: groups[group])

    def _answered(
        self, iteration: Tensor, known: Known, decide: Callable[[int, Tensor, Tensor, list[Tensor]], Tensor]
    ) -> Answered:
        """Asks a pass; `decide` gives bits from group, thresholds, half differences, and what earlier groups added."""
        tables, added = at(self.table, iteration).chunk(self.groups), list[Tensor]()

        def answer(group: int, case: Tensor) -> Tensor:
            threshold, mean, half = self.look_up(tables[group], case)
            bits = decide(group, threshold, half, added)
            added.append(mean * bits.detach().abs() + half * bits)
            return bits

        bits, case, known = self.walk(iteration, known, answer)
        latents = added[0].new_zeros(len(bits), self.channels, *bits.shape[2:])
        latents.index_add_(1, at(self.channel, iteration).flatten(), torch.cat(added, 1))
        return Answered(bits, case, latents, known)

    def odds(self) -> Tensor:
        """Log odds of a yes that follow from the costs, [iterations, K, CASES]; a context model starts from them."""
        cost = self.cost.view(len(self.cost), -1, CASES, 2)
        return (cost[..., 0] - cost[..., 1]) * (math.log(2) / UNIT)

    @torch.no_grad()
    def learn(self, y: Tensor, weight: Tensor, selection: int = 2**14, price: float = 0.2) -> Tensor:
        """Finds the questions by a greedy search: each group takes those that save the most squared error per bit.

        Args:
            y: latents of training images, [B, C, H, W].
            weight: squared error of the image for a squared error of 1 in each channel, [C].
            selection: number of blocks from which channels are chosen; the tables are computed from all blocks.
            price: bits added to the entropy of a question; a small price favors questions of low entropy.

        Returns:
            Standard deviation of each channel's residual before each pass, [iterations, C].
        """
        (batch, _, height, width), size = y.shape, self.channel.shape[2]
        residual = y.transpose(0, 1).flatten(1).clone()  # [C, blocks]
        some = torch.arange(0, residual.shape[1], max(1, residual.shape[1] // selection), device=y.device)
        parts = torch.arange(1, ACTIVITIES, dtype=torch.double, device=y.device) / ACTIVITIES
        known, deviations = self.start(y), []
        for t in range(len(self.channel)):
            iteration = torch.tensor(t, device=y.device)
            deviations.append(residual.square().mean(1).sqrt())
            for group in range(self.groups):
                around = _around(known.activity).flatten()
                self.edges[t, group] = torch.quantile(around[:: max(1, len(around) // 2**16)], parts).round().long()
                self.channel[t, group, :] = 0  # any channel: only the activity of its cases is used
                history = known.history.transpose(0, 1).flatten(1)[:, some]
                activity = self.case(iteration, group, known)[:, 0].flatten()[some] % ACTIVITIES
                statistics = _Statistics(history * ACTIVITIES + activity, residual[:, some])
                spreads = torch.tensor(SPREADS, device=y.device)
                scores = torch.stack([statistics.split(spread).score(weight, price) for spread in spreads])
                score, best = scores.max(0)
                channel = score.topk(size).indices
                self.channel[t, group] = channel
                case = self.case(iteration, group, known)
                split = _Statistics(case.transpose(0, 1).flatten(1), residual[channel]).split(
                    spreads[best[channel], None]
                )
                table, self.cost[t, group] = split.table().flatten(0, 1), split.cost().flatten()
                self.table[t].chunk(self.groups)[group].copy_(table)
                threshold, mean, half = self.look_up(table, case)
                asked = residual[channel].view(size, batch, height, width).transpose(0, 1)
                bits = torch.where(asked > threshold, 1.0, -1.0)
                residual[channel] -= (mean + half * bits).transpose(0, 1).flatten(1)
                known = self.told(iteration, group, known, case, bits)
        return torch.stack(deviations)


class _Statistics:
    """Counts, sums, means and standard deviations of residuals [k, N] by their cases [k, N]."""

    def __init__(self, case: Tensor, residual: Tensor) -> None:
        self.questions, self.blocks = residual.shape
        self.place = (case + CASES * torch.arange(len(case), device=case.device)[:, None]).flatten()
        self.residual = residual.flatten()
        self.count, self.sum = self._total(torch.ones_like(self.residual)), self._total(self.residual)
        self.mean = self.sum / (self.count + PSEUDO_COUNT)
        square = self._total(self.residual.square()) / self.count.clamp(min=1)
        self.deviation = (square - self.mean.square()).clamp(min=0).sqrt()

    def _total(self, values: Tensor) -> Tensor:
        return torch.bincount(self.place, values.double(), self.questions * CASES).view(self.questions, CASES)

    def split(self, spread: Tensor) -> "_Split":
        """Divides the residuals of each case at `spread` standard deviations from their mean."""
        threshold = (self.mean + spread * self.deviation).float()
        above = (self.residual > threshold.flatten()[self.place]).float()
        return _Split(self, threshold, self._total(above), self._total(above * self.residual))


class _Split(NamedTuple):
    """Residuals divided by a threshold: for each case [k, CASES], how many are above it, and their sum."""

    all: _Statistics
    threshold: Tensor
    above: Tensor
    total: Tensor

    def score(self, weight: Tensor, price: float) -> Tensor:
        """Squared error that each question saves per bit, [k]."""
        below, rest = self.all.count - self.above, self.all.sum - self.total
        saved = self.total.square() / (self.above + PSEUDO_COUNT) + rest.square() / (below + PSEUDO_COUNT)
        entropy = (
            torch.xlogy(self.all.count, self.all.count)
            - torch.xlogy(self.above, self.above)
            - torch.xlogy(below, below)
        ) / math.log(2)
        return (saved.sum(1) / self.all.blocks * weight / (entropy.sum(1) / self.all.blocks + price)).float()

    def table(self) -> Tensor:
        """Threshold, mean and half difference of the two values, [k, CASES, 3]."""
        high = self.total / (self.above + PSEUDO_COUNT)
        low = (self.all.sum - self.total) / (self.all.count - self.above + PSEUDO_COUNT)
        return torch.stack([self.threshold.double(), (high + low) / 2, (high - low) / 2], -1).float()

    def cost(self) -> Tensor:
        """Costs of a no and a yes in 1/256 bit, [k, CASES, 2]; 0.5 is added to each count."""
        counts = torch.stack([self.all.count - self.above, self.above], -1) + 0.5
        return (-UNIT * (counts / counts.sum(-1, keepdim=True)).log2()).round().long()


@lru_cache(maxsize=8)
def _after(device: torch.device) -> Tensor:
    """The history after each case and answer (no, not sent, yes), uint8 [CASES * 3]."""
    before = torch.arange(CASES)[:, None] // ACTIVITIES
    yes = torch.arange(2)
    answered = torch.where(before < 7, 2 * before + 1 + yes, 7 + (2 * (before - 7) + yes) % 8)
    return torch.stack([answered[:, 0], before[:, 0], answered[:, 1]], 1).flatten().to(device, torch.uint8)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table [n] for an index of any shape; faster than `table[index]`."""
    return table.index_select(0, index.flatten()).view(index.shape)


def _places(index: Tensor, size: int) -> Tensor:
    """Indices [B, k, H, W] below a size as indices into a flattened table [k, size]."""
    starts = torch.arange(0, size * index.shape[1], size, dtype=torch.int32, device=index.device)
    return index + starts.view(-1, 1, 1)


def _around(activity: Tensor) -> Tensor:
    """Four times the activity of each block plus that of its four neighbors; its own stands in for missing ones."""
    padded = F.pad(activity, (1, 1, 1, 1), mode="replicate")
    beside = padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:] + padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
    return 4 * activity + beside
