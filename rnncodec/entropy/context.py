"""The context model, which computes the probability of every bit given those before it.

    bits of iteration t-1 ──► history (ConvLSTM over iterations) ──► prior ─┐
                                                                            ├──► predictor ──► P(bit = +1)
    bits of iteration t that are known already ─────────────────────────────┘

There are two predictors. The sequential one is the BinaryRNN of Toderici et al. 2017 (sec. 4), which knows the
locations above and to the left. The parallel one codes an iteration in a few passes, each of which predicts a group of
channels on one color of a checkerboard. `rnncodec.entropy.grouped` has a third kind of model, for bits that answer
questions.

A model is trained in floats. `ContextModel.quantize` makes it exact to code with, see `rnncodec.entropy.exact`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnncodec.entropy.exact import SPAN, STEP, Conv, Layer, blank, checkerboard, probability, snap
from rnncodec.entropy.grouped import Grouped

ContextName = Literal["sequential", "parallel", "grouped"]

Read = Callable[[np.ndarray], np.ndarray]
"""Decodes the next bits, given P(+1) * SCALE of each: int [n] to bool [n]."""


@dataclass(frozen=True)
class ContextConfig:
    """Shape of a context model.

    Attributes:
        kind: `sequential` (the BinaryRNN), `parallel`, or `grouped`, for a network whose bits answer questions.
        bits: of one location in one iteration.
        channels: of every hidden layer.
        iterations: number of iterations with their own predictor (later ones use the last), or 0 for one that all
            share; the grouped kind needs at least 1.
        groups: of channels that the parallel predictor codes one after the other, or of questions.
    """

    kind: ContextName = "sequential"
    bits: int = 32
    channels: int = 64
    iterations: int = 0
    groups: int = 4

    def __post_init__(self) -> None:
        if self.kind not in get_args(ContextName):
            raise ValueError(f"kind is one of {', '.join(get_args(ContextName))}, not {self.kind!r}")
        if min(self.bits, self.channels, self.groups) < 1 or not 0 <= self.iterations <= 255:
            raise ValueError("bits, channels and groups must be at least 1, iterations in 0..255")
        if self.kind != "sequential" and self.bits % self.groups:
            raise ValueError(f"{self.bits} bits cannot be divided into {self.groups} equal groups")


class Memory(NamedTuple):
    """State of an LSTM, both parts [B, channels, H, W]."""

    hidden: Tensor
    memory: Tensor


class History(Layer):
    """A ConvLSTM over iterations, which gives the prior of the next one (Toderici et al. 2017, sec. 4)."""

    def __init__(self, config: ContextConfig) -> None:
        super().__init__()
        width = config.channels
        self.bits = Conv(config.bits, width, (3, 3))
        self.input = Conv(width, 4 * width)
        self.hidden = Conv(width, 4 * width, bias=False)
        self.prior = Conv(width, width, (3, 3))

    def forward(self, bits: Tensor, state: Memory | None) -> Memory:
        """The state after an iteration of bits [B, bits, H, W]."""
        gates = self.input(self.tanh(self.bits(bits)))
        if state is not None:
            gates = gates + self.hidden(state.hidden)
        return Memory(*self.lstm(gates, state.memory if state else None))

    def look(self, state: Memory | None, like: Tensor) -> Tensor:
        """The prior [B, channels, H, W] of the next iteration; for the first, `like` gives B, H and W."""
        if state is None:  # the same at all locations
            batch, _, height, width = like.shape
            hidden = like.new_zeros(batch, self.prior.weight.shape[1], 1, 1)
            return self.tanh(self.prior(hidden)).expand(-1, -1, height, width)
        return self.tanh(self.prior(state.hidden))


class Sequential(Layer):
    """The BinaryRNN of Toderici et al. 2017 (sec. 4): predicts each location from those above and to the left.

    The bits of a location are independent given these. The layers are a masked 7x7 convolution over the bits, an LSTM
    that runs down the lines, and two 1x1 convolutions.
    """

    REACH = 3  # locations that the convolution sees to each side

    def __init__(self, config: ContextConfig) -> None:
        super().__init__()
        width = config.channels
        causal = torch.ones(7, 7, dtype=torch.bool)
        causal[3, 3:] = causal[4:] = False
        left = torch.tensor([[True, True, False]])
        self.context = Conv(config.bits, width, (7, 7), causal)
        self.input = Conv(2 * width, 4 * width, (1, 3), left)
        self.hidden = Conv(width, 4 * width, (1, 3), bias=False)
        self.middle = Conv(width, width)
        self.output = Conv(width, config.bits)

    def forward(self, bits: Tensor, prior: Tensor) -> Tensor:
        """Logits of P(+1) [B, bits, H, W], each given the bits before it."""
        gates = self.input(torch.cat([self.tanh(self.context(bits)), prior], 1))
        hidden: Tensor | None = None
        memory: Tensor | None = None
        lines = []
        for line in gates.split(1, dim=2):
            if hidden is not None:
                line = line + self.hidden(hidden)
            hidden, memory = self.lstm(line, memory)
            lines.append(hidden)
        return self.output(self.tanh(self.middle(torch.cat(lines, 2))))

    def waves(self, height: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Groups of locations (y, x) that depend only on earlier groups: those on x + 4 y = const."""
        slope = self.REACH + 1
        for wave in range(width + slope * (height - 1)):
            y = torch.arange(max(0, -(-(wave - width + 1) // slope)), min(height - 1, wave // slope) + 1)
            yield y, wave - slope * y

    def order(self, bits: int, height: int, width: int) -> np.ndarray:
        """The order of coding, as indices into the flattened bits [H, W, bits]."""
        places = torch.cat([y * width + x for y, x in self.waves(height, width)])
        return (places[:, None] * bits + torch.arange(bits)).flatten().numpy()

    def decode(self, prior: Tensor, bits: int, read: Read) -> Tensor:
        """Decodes bits [1, bits, H, W], which `read` gives group by group in the order of coding."""
        (_, channels, height, width), r = prior.shape, self.REACH
        plane = prior.new_zeros(bits, height + 2 * r, width + 2 * r)
        features = prior.new_zeros(2 * channels, height, width + 2)
        features[channels:, :, 1:-1] = prior[0]
        hidden = prior.new_zeros(channels, height + 1, width + 2)  # a line of zeros above
        memory = prior.new_zeros(channels, height + 1, width)
        around = plane.unfold(1, 2 * r + 1, 1).unfold(2, 2 * r + 1, 1)  # [bits, H, W, 7, 7]
        beside, above = features.unfold(2, 3, 1), hidden.unfold(2, 3, 1)

        def columns(view: Tensor, y: Tensor, x: Tensor) -> Tensor:
            return view[:, y, x].movedim(1, -1).flatten(0, -2)

        for y, x in self.waves(height, width):
            y, x = y.to(prior.device), x.to(prior.device)
            features[:channels, y, x + 1] = self.tanh(self.context.at(columns(around, y, x)))
            gates = self.input.at(columns(beside, y, x)) + self.hidden.at(columns(above, y, x))
            hidden[:, y + 1, x + 1], memory[:, y + 1, x] = self.lstm(gates, memory[:, y, x], dim=0)
            logits = self.output.at(self.tanh(self.middle.at(hidden[:, y + 1, x + 1])))
            found = torch.from_numpy(read(probability(logits.T).flatten().cpu().numpy())).to(prior.device)
            plane[:, y + r, x + r] = (found.view(-1, bits).T.to(prior.dtype)) * 2 - 1
        return plane[None, :, r:-r, r:-r]


class Parallel(Layer):
    """Predicts an iteration in 2 passes for each group of channels, on the black and white squares of a checkerboard.

    Each pass knows the bits of all earlier passes at all locations.
    """

    STRIP = 2**12  # locations, a megapixel
    REACH = 1  # rows that the first pass, which knows no bits, sees above and below

    def __init__(self, config: ContextConfig) -> None:
        super().__init__()
        width = config.channels
        self.groups = config.groups
        self.known = Conv(config.bits, width, (5, 5))
        self.prior = Conv(width, width, (3, 3), bias=False)
        self.turn = nn.Parameter(torch.zeros(2 * config.groups, width))
        self.middle = Conv(width, width, (3, 3))
        self.output = Conv(width, config.bits)

    @torch.no_grad()
    def quantize(self) -> None:
        self.turn.copy_(snap(self.turn, STEP).clamp(-SPAN, SPAN))

    @torch.no_grad()
    def integers(self) -> dict[str, Tensor]:
        return {"turn": (self.turn / STEP).short()}

    @torch.no_grad()
    def load_integers(self, integers: Mapping[str, Tensor]) -> None:
        if integers["turn"].int().abs().max() * STEP > SPAN:
            raise ValueError("a bias is too large")
        self.turn.copy_(integers["turn"] * STEP)

    def turns(self, bits: int, height: int, width: int) -> Tensor:
        """The pass in which each bit becomes known, int16 [bits, H, W]."""
        return torch.arange(bits).short()[:, None, None] // (bits // self.groups) * 2 + checkerboard(height, width)

    def _pass(self, turn: int, known: Tensor, from_prior: Tensor) -> Tensor:
        """Logits of all bits given the known ones; 0 stands for an unknown bit."""
        bias = self.turn[turn][:, None, None]
        if self.exact:
            groups = max(1, (turn + 1) // 2)  # no bit of the others is known
            known = known[:, : known.shape[1] // self.groups * groups]
        x = self.known(known) + from_prior + bias
        return self.output(self.tanh(self.middle(self.tanh(x))))

    def forward(self, bits: Tensor, prior: Tensor) -> Tensor:
        """Logits of P(+1) [B, bits, H, W], each given the bits before it."""
        turns = self.turns(*bits.shape[1:]).to(bits.device)
        from_prior = self.prior(prior)
        logits = torch.zeros_like(bits)
        for turn in range(2 * self.groups):
            guess = self._pass(turn, bits * (turns < turn), from_prior)
            logits = torch.where(turns == turn, guess, logits)
        return logits

    def order(self, bits: int, height: int, width: int) -> np.ndarray:
        """The order of coding, as indices into the flattened bits [H, W, bits]."""
        return torch.argsort(self.turns(bits, height, width).permute(1, 2, 0).flatten(), stable=True).numpy()

    def decode(self, prior: Tensor, bits: int, read: Read) -> Tensor:
        """Decodes bits [1, bits, H, W], which `read` gives pass by pass in the order of coding.

        The first pass is computed in strips of rows, so that a code that holds nothing is noticed before much is.
        """
        height, width = prior.shape[2:]
        size = bits // self.groups
        colors = checkerboard(height, width).to(prior.device)
        known = blank((height, width, bits), prior)
        from_prior = prior.new_empty(prior.shape)
        for turn in range(2 * self.groups):
            squares, own = colors == turn % 2, slice(turn // 2 * size, (turn // 2 + 1) * size)
            rows, reach = (height, 0) if turn else (max(1, self.STRIP // width), self.REACH)
            found = []
            for top in range(0, height, rows):
                first, last = max(0, top - reach), min(top + rows + reach, height)
                if not turn:
                    edge = max(0, first - 1)
                    around = self.prior(prior[:, :, edge : last + 1])
                    from_prior[:, :, first:last] = around[:, :, first - edge : last - edge]
                logits = self._pass(turn, known[first:last].permute(2, 0, 1)[None], from_prior[:, :, first:last])[0]
                asked = logits[own, top - first :][:, :rows].permute(1, 2, 0)[squares[top : top + rows]]
                found.append(read(probability(asked.flatten()).cpu().numpy()))
            told = torch.from_numpy(np.concatenate(found)).to(known) * 2 - 1
            known[..., own][squares] = told.view(-1, size)
        return known.permute(2, 0, 1)[None]


class ContextModel(nn.Module):
    """A context model, which computes in floats for training or exactly for coding (Toderici et al. 2017, sec. 4)."""

    def __init__(self, config: ContextConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ContextConfig()
        if config.kind == "grouped":
            if not config.iterations:
                raise ValueError("the grouped kind needs the number of iterations, because each has its own questions")
            self.grouped = Grouped(config.bits, config.groups, config.channels, config.iterations)
            return
        self.history = History(config)
        kind = {"sequential": Sequential, "parallel": Parallel}[config.kind]
        self.predictors = nn.ModuleList(kind(config) for _ in range(max(1, config.iterations)))

    def predictor(self, iteration: int) -> Sequential | Parallel:
        """The predictor of an iteration, counted from 0."""
        return cast(Sequential | Parallel, self.predictors[min(iteration, len(self.predictors) - 1)])

    def forward(self, planes: Tensor, cases: Tensor | None = None) -> Tensor:
        """Logits of P(+1) for every bit of all iterations.

        Args:
            planes: bits [T, B, bits, H, W] of -1 and +1; for the grouped kind, 0 where none was sent.
            cases: of the bits, uint8 of the same shape, for the grouped kind.

        Raises:
            ValueError: cases are missing for the grouped kind, or given for another.
        """
        if (cases is not None) != (self.config.kind == "grouped"):
            raise ValueError("cases are for context models of the grouped kind, which need them")
        if cases is not None:
            return self.grouped(planes, cases)
        state, priors = None, []
        for t, bits in enumerate(planes):
            priors.append(self.history.look(state, bits))
            state = self.history(bits, state) if t + 1 < len(planes) else None
        # Iterations that share a predictor go through it as one batch, because many small kernels are slower on a GPU.
        own = min(len(self.predictors) - 1, len(planes))
        logits = [self.predictor(t)(planes[t], priors[t])[None] for t in range(own)]
        if own < len(planes):
            shared = self.predictor(own)(planes[own:].flatten(0, 1), torch.cat(priors[own:]))
            logits.append(shared.unflatten(0, (-1, planes.shape[1])))
        return torch.cat(logits)

    def quantize(self) -> "ContextModel":
        """An exact copy of a trained model.

        It is float64, though float32 holds all its values, because float64 is not converted by autocast, nor to the
        bfloat16 or TF32 that libraries may use within products. The grouped kind is float32, which is more than twice
        as fast, because its factors are small enough for both.

        Raises:
            ValueError: a weight is not finite, or weights are too large for exact sums.
        """
        model = copy.deepcopy(self).double().eval().requires_grad_(False)
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("a weight is not finite")
        for layer in model.layers().values():
            layer.exact = True
            layer.quantize()
        return model.float() if self.config.kind == "grouped" else model

    def layers(self) -> dict[str, "Layer"]:
        """All layers by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Layer)}

    def integers(self) -> dict[str, Tensor]:
        """All weights of an exact model as integers."""
        layers = self.layers().items()
        return {f"{name}.{key}": value for name, layer in layers for key, value in layer.integers().items()}

    @classmethod
    def from_integers(cls, config: ContextConfig, integers: Mapping[str, Tensor]) -> "ContextModel":
        """Builds an exact model from integers, which may come from any source; names and shapes must be right.

        Raises:
            ValueError: sums would not be exact.
        """
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are replaced
            model = cls(config).double().eval().requires_grad_(False)
        for name, layer in model.layers().items():
            layer.exact = True
            prefix = f"{name}."
            layer.load_integers({k[len(prefix) :]: v for k, v in integers.items() if k.startswith(prefix)})
        return model.float() if config.kind == "grouped" else model


def code_nats(logits: Tensor, planes: Tensor) -> Tensor:
    """Code length in nats of each bit of planes of -1 and +1, and 0 where none was sent, which costs nothing.

    It is differentiable in both arguments (Toderici et al. 2017, sec. 4).
    """
    return torch.where(planes == 0, 0.0, F.softplus(-logits.float() * planes.float()))


def code_length(logits: Tensor, planes: Tensor) -> Tensor:
    """Mean code length in bits for each bit of planes as in `code_nats` (Toderici et al. 2017, sec. 4).

    It is differentiable in both arguments.
    """
    return code_nats(logits, planes).mean() / math.log(2)
