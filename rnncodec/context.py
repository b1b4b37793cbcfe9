"""The context model: the probability of every bit given those before it, learned in floats, then exact on any machine.

    bits of iteration t-1 ──► history (ConvLSTM over iterations) ──► prior ─┐
                                                                            ├──► predictor ──► P(bit = +1)
    bits of iteration t that are known already ─────────────────────────────┘

Two predictors fill in the last box. The sequential one is the BinaryRNN of T17 (sec. 4), which knows all locations
above and to the left. The parallel one reveals an iteration in a few passes, each of which predicts a group of
channels on one color of a checkerboard.

A coder needs the very same probabilities on both sides, which floating-point sums do not give: their value depends on
their order. `ContextModel.quantize` therefore moves every weight and activation to a grid of powers of two, so coarse
that no sum of a layer needs more than the 24 bits of a float32. All sums are then exact, so that order, batch, threads
and device no longer matter; what is not a sum is rounded to the grid or looked up in a table.
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

ContextName = Literal["sequential", "parallel"]

STEP = 2.0**-8  # grid of activations and of the sums that go into a table
MEMORY_STEP = 2.0**-12  # grid of LSTM memories, finer because they accumulate
SPAN = (
    8.0  # tables end at +-8, where tanh and the sigmoid have come to their limits on the grid; memories end there, too
)
MANTISSA = 24  # bits that a float32 holds exactly
WEIGHT = 2**11  # largest weight in units of its grid: what TF32 would hold exactly, too
SCALE = 2**16  # probabilities are integers over this
BAND = 2**24  # values in the columns of a convolution that are laid out at once

Read = Callable[[np.ndarray], np.ndarray]
"""Decodes the next bits, given P(+1) * SCALE of each: int [n] to bool [n]."""


def table(function: Callable[[np.ndarray], np.ndarray], scale: float) -> Tensor:
    """The values of a function from -SPAN to SPAN in steps of STEP, rounded to multiples of 1 / scale."""
    x = np.arange(-SPAN, SPAN + STEP, STEP)
    return torch.from_numpy(np.round(function(x) * scale) / scale)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


TANH = table(np.tanh, 1 / STEP)
SIGMOID = table(_sigmoid, 1 / STEP)
PROBABILITY = table(lambda x: np.round(_sigmoid(x) * SCALE), 1).to(torch.int32)  # 22 to SCALE - 22


@dataclass(frozen=True)
class ContextConfig:
    """Shape of a context model.

    Attributes:
        kind: `sequential`, the BinaryRNN, or `parallel`.
        bits: of one location in one iteration.
        channels: of every hidden layer.
        iterations: 0 to share the predictor among all iterations, or for how many each has its own (later ones take
            the last).
        groups: of channels that the parallel predictor reveals one after the other.
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
        if self.kind == "parallel" and self.bits % self.groups:
            raise ValueError(f"{self.bits} bits cannot be divided into {self.groups} equal groups")


class Memory(NamedTuple):
    """State of an LSTM, both parts [B, channels, H, W]."""

    hidden: Tensor
    memory: Tensor


class Layer(nn.Module):
    """A module that computes in floats, or exactly once `ContextModel.quantize` has been called."""

    exact = False

    def quantize(self) -> None:
        """Moves the layer's own weights to their grid."""

    def integers(self) -> dict[str, Tensor]:
        """The layer's own weights, once quantized, as integers."""
        return {}

    def load_integers(self, integers: Mapping[str, Tensor]) -> None:
        """Takes what `integers` gave."""

    def _lookup(self, values: Tensor, x: Tensor) -> Tensor:
        index = (x.clamp(-SPAN, SPAN) / STEP).long() + int(SPAN / STEP)
        return values.to(x.device)[index].to(x.dtype)

    def tanh(self, x: Tensor) -> Tensor:
        return self._lookup(TANH, x) if self.exact else torch.tanh(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return self._lookup(SIGMOID, x) if self.exact else torch.sigmoid(x)

    def lstm(self, gates: Tensor, memory: Tensor | None, dim: int = 1) -> tuple[Tensor, Tensor]:
        """Gates (input, forget, output, candidate) and the memory before to the hidden state and the memory after."""
        i, f, o, j = gates.chunk(4, dim)
        new = self.sigmoid(i) * self.tanh(j)
        if memory is not None:
            new = new + self.sigmoid(f) * memory
        if self.exact:
            # f and the memory have 8 and 15 bits, their product on a grid of 2^-20 stays below 2^3: 24 with i j.
            new = snap(new, MEMORY_STEP).clamp(-SPAN, SPAN)
        hidden = self.sigmoid(o) * self.tanh(snap(new, STEP) if self.exact else new)
        return (snap(hidden, STEP) if self.exact else hidden), new


def snap(x: Tensor, step: float) -> Tensor:
    """The nearest multiple of a power of two, halves to even: exact wherever it is computed."""
    return (x / step).round() * step


class Conv(Layer):
    """A convolution whose output has its input's size; a mask may hide part of its kernel.

    Args:
        in_channels, out_channels: of the convolution.
        kernel: odd height and width.
        visible: bool of the kernel's size, what the mask lets through; None for all.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int] = (1, 1),
        visible: Tensor | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        like = nn.Conv2d(in_channels, out_channels, kernel, bias=bias)
        self.weight, self.bias = like.weight, like.bias
        self.padding = (kernel[0] // 2, kernel[1] // 2)
        mask = torch.ones(kernel) if visible is None else visible.float()
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():  # the variance of the sum as if nothing were hidden
            self.weight.mul_(mask * (mask.numel() / mask.sum()).sqrt())

    mask: Tensor
    exponent: int  # of the grid of the weights, once they are quantized

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H, W]; of an exact layer, input channels that are left out at the end are zeros."""
        if not self.exact:
            return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)
        # As a matrix product, because libraries may convolve by transforms that are not exact; in bands of rows,
        # because its columns take so much more memory than x.
        (batch, _, height, width), (down, across) = x.shape, self.padding
        x = F.pad(x, (across, across, down, down))
        rows = max(1, BAND // (batch * width * self.weight[0].numel()))
        bands = []
        for top in range(0, height, rows):
            band = x[:, :, top : min(top + rows, height) + 2 * down]
            bands.append(self.at(F.unfold(band, self.weight.shape[2:])).unflatten(2, (-1, width)))
        return torch.cat(bands, dim=2)

    def at(self, columns: Tensor) -> Tensor:
        """The exact output [..., out, N] at N locations, around which `columns` [..., in * kernel, N] lie."""
        out = self.weight.flatten(1)[:, : columns.shape[-2]] @ columns
        return snap(out if self.bias is None else out + self.bias[:, None], STEP)

    @torch.no_grad()
    def quantize(self) -> None:
        """Moves the weights to the finest grid on which no sum leaves the 24 bits of a float32."""
        self.weight.mul_(self.mask)
        total = self.weight.flatten(1).abs().sum(1) + (0 if self.bias is None else self.bias.abs())
        # A row of n weights may grow by n / 2 steps when it is rounded; a bit of margin covers that.
        room = math.log2(2.0**MANTISSA * STEP / max(total.max().item(), STEP)) - 1
        largest = max(self.weight.abs().max().item(), STEP)
        self.exponent = math.floor(min(room, math.log2(WEIGHT / largest), 16))
        self.weight.copy_(snap(self.weight, 2.0**-self.exponent))
        if self.bias is not None:
            self.bias.copy_(snap(self.bias, 2.0**-self.exponent))
        self._check()

    @torch.no_grad()
    def integers(self) -> dict[str, Tensor]:
        """The quantized weights as integers, and the exponent of their grid: they are 2^-exponent times these."""
        scale = 2.0**self.exponent
        integers = {"weight": (self.weight * scale).short(), "exponent": torch.tensor(self.exponent, dtype=torch.int8)}
        return integers if self.bias is None else integers | {"bias": (self.bias * scale).int()}

    @torch.no_grad()
    def load_integers(self, integers: Mapping[str, Tensor]) -> None:
        """Takes what `integers` gave, from whatever source.

        Raises:
            ValueError: sums would not be exact.
        """
        self.exponent = int(integers["exponent"])
        scale = 2.0**-self.exponent
        self.weight.copy_(integers["weight"] * self.mask * scale)
        if self.bias is not None:
            self.bias.copy_(integers["bias"] * scale)
        self._check()

    def _check(self) -> None:
        """Raises ValueError if sums would not be exact."""
        total = self.weight.flatten(1).abs().sum(1) + (0 if self.bias is None else self.bias.abs())
        grid = 2.0**-self.exponent
        exact = self.weight.abs().max() <= WEIGHT * grid and total.max() <= 2.0**MANTISSA * STEP * grid
        if not (exact and 0 <= self.exponent <= 16):
            raise ValueError("sums of a layer would need more bits than a float32 has")


class History(Layer):
    """What all earlier iterations say about the next one: a ConvLSTM over iterations (T17 sec. 4)."""

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
        """The prior [B, channels, H, W] of the next iteration; `like` has B, H and W for the first one."""
        if state is None:
            batch, _, height, width = like.shape
            hidden = like.new_zeros(batch, self.prior.weight.shape[1], height, width)
        else:
            hidden = state.hidden
        return self.tanh(self.prior(hidden))


class Sequential(Layer):
    """The BinaryRNN of T17: bits of one location are independent given all locations above and to the left.

    A masked 7x7 convolution over the bits, an LSTM that runs down the lines, two 1x1 convolutions.
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
        """The order of coding: indices into the bits [H, W, bits], flattened."""
        places = torch.cat([y * width + x for y, x in self.waves(height, width)])
        return (places[:, None] * bits + torch.arange(bits)).flatten().numpy()

    def decode(self, prior: Tensor, bits: int, read: Read) -> Tensor:
        """The bits [1, bits, H, W] that `read` gives, group by group in the order of coding."""
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
    """Predicts an iteration in 2 passes for each group of channels, the black and the white squares of a checkerboard.

    Every pass knows the bits of all passes before it, everywhere.
    """

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
        """The pass in which each bit becomes known, int [bits, H, W]."""
        color = (torch.arange(height)[:, None] + torch.arange(width)) % 2
        return torch.arange(bits)[:, None, None] // (bits // self.groups) * 2 + color

    def _pass(self, turn: int, known: Tensor, from_prior: Tensor) -> Tensor:
        """Logits of all bits given the known ones (0 stands for an unknown one)."""
        bias = self.turn[turn][:, None, None]
        if self.exact:
            groups = max(1, (turn + 1) // 2)  # nothing is known of the others
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
        """The order of coding: indices into the bits [H, W, bits], flattened."""
        return torch.argsort(self.turns(bits, height, width).permute(1, 2, 0).flatten(), stable=True).numpy()

    def decode(self, prior: Tensor, bits: int, read: Read) -> Tensor:
        """The bits [1, bits, H, W] that `read` gives, pass by pass in the order of coding."""
        turns = self.turns(bits, *prior.shape[2:]).to(prior.device).permute(1, 2, 0)
        known = prior.new_zeros(*prior.shape[2:], bits)
        from_prior = self.prior(prior)
        for turn in range(2 * self.groups):
            logits = self._pass(turn, known.permute(2, 0, 1)[None], from_prior)[0].permute(1, 2, 0)
            now = turns == turn
            found = torch.from_numpy(read(probability(logits[now]).cpu().numpy())).to(prior.device)
            known[now] = found.to(prior.dtype) * 2 - 1
        return known.permute(2, 0, 1)[None]


def probability(logits: Tensor) -> Tensor:
    """P(+1) * SCALE of logits on the grid, int32, never 0 and never SCALE."""
    index = (logits.clamp(-SPAN, SPAN) / STEP).long() + int(SPAN / STEP)
    return PROBABILITY.to(logits.device)[index]


class ContextModel(nn.Module):
    """A context model in floats, to be trained, or exact, to code with (T17 sec. 4)."""

    def __init__(self, config: ContextConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ContextConfig()
        self.history = History(config)
        kind = {"sequential": Sequential, "parallel": Parallel}[config.kind]
        self.predictors = nn.ModuleList(kind(config) for _ in range(max(1, config.iterations)))

    def predictor(self, iteration: int) -> Sequential | Parallel:
        """The predictor of an iteration, counted from 0."""
        return cast(Sequential | Parallel, self.predictors[min(iteration, len(self.predictors) - 1)])

    def forward(self, planes: Tensor) -> Tensor:
        """Logits of P(+1) for every bit of all iterations.

        Args:
            planes: bits [T, B, bits, H, W] of -1 and +1.
        """
        state, priors = None, []
        for t, bits in enumerate(planes):
            priors.append(self.history.look(state, bits))
            state = self.history(bits, state) if t + 1 < len(planes) else None
        # Iterations that share a predictor go through it as one batch: on a GPU many small kernels take longer.
        own = min(len(self.predictors) - 1, len(planes))
        logits = [self.predictor(t)(planes[t], priors[t])[None] for t in range(own)]
        if own < len(planes):
            shared = self.predictor(own)(planes[own:].flatten(0, 1), torch.cat(priors[own:]))
            logits.append(shared.unflatten(0, (-1, planes.shape[1])))
        return torch.cat(logits)

    def quantize(self) -> "ContextModel":
        """An exact copy of a trained model.

        It is float64, though float32 holds all its values: nothing converts that behind one's back, neither autocast
        nor the bfloat16 and TF32 that libraries may use within products.

        Raises:
            ValueError: a weight is not finite, or so many are so large that sums would not be exact.
        """
        model = copy.deepcopy(self).double().eval().requires_grad_(False)
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("a weight is not finite")
        for layer in model.layers().values():
            layer.exact = True
            layer.quantize()
        return model

    def layers(self) -> dict[str, "Layer"]:
        """All layers by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Layer)}

    def integers(self) -> dict[str, Tensor]:
        """All weights of an exact model as integers."""
        layers = self.layers().items()
        return {f"{name}.{key}": value for name, layer in layers for key, value in layer.integers().items()}

    @classmethod
    def from_integers(cls, config: ContextConfig, integers: Mapping[str, Tensor]) -> "ContextModel":
        """The exact model of what `integers` gave, from whatever source, if names and shapes are right.

        Raises:
            ValueError: sums would not be exact.
        """
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are replaced
            model = cls(config).double().eval().requires_grad_(False)
        for name, layer in model.layers().items():
            layer.exact = True
            prefix = f"{name}."
            layer.load_integers({k[len(prefix) :]: v for k, v in integers.items() if k.startswith(prefix)})
        return model


def code_nats(logits: Tensor, planes: Tensor) -> Tensor:
    """Code length in nats of each bit of planes of -1 and +1, with a gradient to both (T17 sec. 4)."""
    return F.softplus(-logits.float() * planes.float())


def code_length(logits: Tensor, planes: Tensor) -> Tensor:
    """Mean code length in bits for each bit of planes of -1 and +1, with a gradient to both (T17 sec. 4)."""
    return code_nats(logits, planes).mean() / math.log(2)
