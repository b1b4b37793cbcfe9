"""The recurrent codec network: encoder, binarizer, decoder and the residual loop that joins them, one step at a time.

    x ──► analysis ──► y ──►(-)──► encoder ──► binarizer ──► bits ──► decoder ──►(+)──► y_hat ──► synthesis ──► x_hat
          (once)             ▲      state t                            state t     ▲      │       (where wanted)
                             └───────────────── y_hat of step t-1 ─────────────────┴──────┘

Training, encoding and decoding all repeat the same step, `RecurrentCodec.forward`, in which encoder and decoder may run
more than once (see `rnncodec.network.priming`). The papers' networks run the loop on pixels, where y is x; a
`LatentConfig` makes a network whose loop runs on one vector for each 16x16 block.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnncodec.network.binarizer import Binarizer, BinarizerName, Coded
from rnncodec.network.cells import CELLS, CellName, CellState, GateConv, conv
from rnncodec.network.latent import LatentConfig
from rnncodec.network.parts import Parts
from rnncodec.network.priming import ExtraRuns
from rnncodec.network.transforms import WHOLE, LatentTransforms, Pixels, Window

ReconstructionName = Literal["one_shot", "additive", "residual_scaling"]


def to_uint8(x: Tensor) -> Tensor:
    """Clamps images to [-1, 1] and converts them to the nearest 8-bit values."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def pad_to_blocks(x: Tensor, stride: int) -> Tensor:
    """Repeats the last row and column of images [B, 3, H, W] until both sides are multiples of the stride."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % stride, 0, -height % stride), mode="replicate")


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture of a network; the defaults are the LSTM of Toderici et al. 2017 with 35.5 M parameters.

    Attributes:
        encoder_cell, decoder_cell: recurrent cell of each side (`none` for the feed-forward models of Toderici et
            al. 2016).
        reconstruction: `one_shot` predicts the image anew in each iteration, `additive` adds to the previous
            reconstruction, `residual_scaling` adds and lets a gain network amplify small residuals
            (Toderici et al. 2017, sec. 3.2).
        binarizer: see `rnncodec.network.binarizer.binarize`.
        bits: bits for each location and iteration.
        encoder_channels: of the first convolution, then of each cell; every layer halves the resolution.
        encoder_hidden_kernels: side of the hidden kernel of each encoder cell.
        decoder_channels: of the first convolution, then of each cell; every cell is followed by depth-to-space 2.
        decoder_hidden_kernels: side of the hidden kernel of each decoder cell.
        patch_size: if above 1, the fully connected models of Toderici et al. 2016: patches of this size are coded
            independently, every kernel is 1x1 and no layer changes the resolution.
        gain_channels: of all convolutions but the last of the gain network of `residual_scaling`.
        priming, diffusion: extra runs of encoder and decoder in the first and in each later iteration, which only
            prepare the hidden states (Johnston et al. 2018), see `ExtraRuns`.
    """

    encoder_cell: CellName = "lstm"
    decoder_cell: CellName = "lstm"
    reconstruction: ReconstructionName = "additive"
    binarizer: BinarizerName = "stochastic"
    bits: int = 32
    encoder_channels: tuple[int, ...] = (64, 256, 512, 512)
    encoder_hidden_kernels: tuple[int, ...] = (1, 1, 1)
    decoder_channels: tuple[int, ...] = (512, 512, 512, 256, 128)
    decoder_hidden_kernels: tuple[int, ...] = (1, 1, 3, 3)
    patch_size: int = 1
    gain_channels: tuple[int, ...] = (32, 32, 32, 32)
    priming: int = 0
    diffusion: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):  # configs and checkpoints contain lists
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        for name, names in (
            ("encoder_cell", CellName),
            ("decoder_cell", CellName),
            ("reconstruction", ReconstructionName),
            ("binarizer", BinarizerName),
        ):
            if getattr(self, name) not in get_args(names):
                raise ValueError(f"{name} is one of {', '.join(get_args(names))}, not {getattr(self, name)!r}")
        for name in ("encoder", "decoder"):
            channels, kernels = getattr(self, f"{name}_channels"), getattr(self, f"{name}_hidden_kernels")
            if len(channels) != len(kernels) + 1:
                raise ValueError(f"{name}_channels {channels} need {len(channels) - 1} hidden kernels, not {kernels}")
            if min(*channels, *kernels, 1) < 1 or any(kernel % 2 == 0 for kernel in kernels):
                raise ValueError(f"{name} needs positive channels and odd hidden kernels, not {channels} and {kernels}")
        if self.patch_size == 1:
            if len(self.encoder_channels) != len(self.decoder_channels) - 1:
                raise ValueError(f"{len(self.encoder_channels)} halvings need as many decoder cells")
            if any(channels % 4 for channels in self.decoder_channels[1:]):
                raise ValueError(f"depth-to-space needs multiples of 4, not {self.decoder_channels[1:]}")
        elif self.reconstruction == "residual_scaling":
            raise ValueError("residual scaling looks across patches, which patch_size above 1 codes independently")
        if min(self.bits, self.patch_size, *self.gain_channels) < 1:
            raise ValueError("bits, patch_size and gain_channels must be at least 1")
        if self.bits > 255:
            raise ValueError(f"a file has room for 255 bits of a location, not {self.bits}")
        if self.stride > 255:
            raise ValueError(f"a file has room for blocks of up to 255 pixels a side, not {self.stride}")
        if self.extra_runs != ExtraRuns() and self.encoder_cell == self.decoder_cell == "none":
            raise ValueError("priming and diffusion need a recurrent cell, not the cell none on both sides")

    @property
    def stride(self) -> int:
        """Side in pixels of the block that one location stands for."""
        return self.patch_size if self.patch_size > 1 else 2 ** len(self.encoder_channels)

    @property
    def extra_runs(self) -> ExtraRuns:
        """Priming and diffusion of encoder and decoder."""
        return ExtraRuns(self.priming, self.diffusion)

    def parts(self) -> Parts:
        """Makes the parts of a network."""
        return Parts(
            Pixels(),
            Encoder(self),
            Binarizer(self.encoder_channels[-1], self.bits, self.binarizer),
            Decoder(self),
            GainNetwork(self.gain_channels) if self.reconstruction == "residual_scaling" else None,
            sums=self.reconstruction != "one_shot",
        )


AnyConfig = NetworkConfig | LatentConfig


def config_class(values: Mapping[str, Any]) -> type[AnyConfig]:
    """The class of a config whose fields have these values, some of which may be missing."""
    return LatentConfig if "latents" in values else NetworkConfig


def network_config(values: Mapping[str, Any]) -> AnyConfig:
    """Builds the config of a network from the values of its fields.

    Raises:
        ValueError, TypeError: the values are invalid.
    """
    return config_class(values)(**values)


class State(NamedTuple):
    """The state after a step: those of the parts (the encoder's is None in a decoder), and y_hat."""

    encoder: Any
    binarizer: Any
    decoder: Any
    y_hat: Tensor


class Step(NamedTuple):
    """The result of a step: bits [B, bits, H / stride, W / stride], and the state, from which `picture` makes images.

    Latent networks add the case of each bit, uint8 [B, bits, H / stride, W / stride], see `Questions`.
    """

    bits: Tensor
    state: State
    cases: Tensor | None = None


class Encoder(nn.Module):
    """A strided convolution and a stack of strided cells: [B, 3, H, W] to features [B, C, H / stride, W / stride]."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        first = config.encoder_channels[0]
        kernel, stride = (1, 1) if config.patch_size > 1 else (3, 2)
        self.patch_size = config.patch_size
        # Toderici et al. 2016 have tanh after every layer, Toderici et al. 2017 none after the first convolution.
        self.tanh_stem = config.encoder_cell == "none" or config.patch_size > 1
        self.stem = conv(3 * config.patch_size**2, first, kernel, stride)
        self.cells = nn.ModuleList(
            CELLS[config.encoder_cell](before, after, kernel, hidden_kernel, stride)
            for (before, after), hidden_kernel in zip(
                pairwise(config.encoder_channels), config.encoder_hidden_kernels, strict=True
            )
        )
        self.extra_runs = config.extra_runs

    def forward(self, x: Tensor, states: list[CellState] | None, *_: Any) -> tuple[Tensor, list[CellState]]:
        x = self.stem(F.pixel_unshuffle(x, self.patch_size))
        if self.tanh_stem:
            x = torch.tanh(x)
        return self.extra_runs(self._run, x, states)

    def _run(self, x: Tensor, states: list[CellState] | None) -> tuple[Tensor, list[CellState]]:
        """Runs the stack of cells once."""
        new_states = []
        for cell, state in zip(self.cells, states or [None] * len(self.cells), strict=True):
            x, new_state = cell(x, state)
            new_states.append(new_state)
        return x, new_states


class Decoder(nn.Module):
    """A 1x1 convolution, a stack of cells with depth-to-space and a last convolution: bits to an image in (-1, 1)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        first, *channels = config.decoder_channels
        patches = config.patch_size > 1
        self.kernel, self.upscale = (1, 1) if patches else (3, 2)
        self.patch_size = config.patch_size
        self.tanh_stem = config.decoder_cell == "none" or patches
        self.stem = conv(config.bits, first, 1)
        self.cells = nn.ModuleList()
        width = first
        for hidden, hidden_kernel in zip(channels, config.decoder_hidden_kernels, strict=True):
            self.cells.append(CELLS[config.decoder_cell](width, hidden, self.kernel, hidden_kernel))
            width = hidden // self.upscale**2
        self.output = conv(width, 3 * config.patch_size**2, 1)
        # An additive decoder must start near zero, or each early iteration adds noise to the reconstruction.
        nn.init.normal_(self.output.weight, std=0.01)
        assert self.output.bias is not None
        nn.init.zeros_(self.output.bias)
        self.extra_runs = config.extra_runs

    def forward(
        self, bits: Tensor, states: list[CellState] | None, x_hat: Tensor | None
    ) -> tuple[Tensor, list[CellState]]:
        x = self.stem(bits)
        if self.tanh_stem:
            x = torch.tanh(x)
        x, new_states = self.extra_runs(self._run, x, states)
        return torch.tanh(F.pixel_shuffle(self.output(x), self.patch_size)), new_states

    def _run(self, x: Tensor, states: list[CellState] | None) -> tuple[Tensor, list[CellState]]:
        """Runs the stack of cells once."""
        new_states = []
        for cell, state in zip(self.cells, states or [None] * len(self.cells), strict=True):
            x, new_state = cell(x, state)
            x = F.pixel_shuffle(x, self.upscale)
            new_states.append(new_state)
        return x, new_states


class GainNetwork(nn.Module):
    """Computes from a reconstruction [B, 3, H, W] the gain of its residual, above 1, one per 32x32 block.

    Toderici et al. 2017, sec. 3.2.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = [3, *channels, 1]
        self.layers = nn.ModuleList(conv(before, after, 3, 2) for before, after in pairwise(widths))

    def forward(self, x_hat: Tensor) -> Tensor:
        gain = x_hat
        for layer in self.layers:
            gain = F.elu(layer(gain))
        height, width = x_hat.shape[-2:]
        return F.interpolate(gain + 2, scale_factor=2.0 ** len(self.layers), mode="nearest")[..., :height, :width]


class RecurrentCodec(nn.Module):
    """The progressive codec network: each step codes the residual that the earlier steps left.

    Toderici et al. 2016, sec. 3; Toderici et al. 2017, eq. 1-2.

    Attributes:
        in_bfloat16: whether transforms and encoder compute in bfloat16. Only one side needs their results; binarizer
            and decoder, on which both sides must agree, keep their precision.
    """

    def __init__(self, config: AnyConfig | None = None) -> None:
        super().__init__()
        self.config = config or NetworkConfig()
        self.in_bfloat16 = False
        self.transforms, self.encoder, self.binarizer, self.decoder, self.gain, self.sums = self.config.parts()

    def forward(
        self,
        state: State | None = None,
        *,
        y: Tensor | None = None,
        bits: Tensor | None = None,
        limit: Tensor | None = None,
    ) -> Step:
        """Computes one step: codes the residual of an analysed image, or decodes given bits.

            b_t = B(E_t(g_t (y - y_hat_{t-1})))        y_hat_t = D_t(b_t) / g_t + gamma y_hat_{t-1}

        gamma is 0 in one-shot reconstruction and 1 otherwise; g_t is 1 except in residual scaling.

        Args:
            state: after the previous step; None at the first.
            y: the images to encode, after `analyse`.
            bits: or the bits of this step to decode, [B, bits, H / stride, W / stride] of -1 and +1, or 0 where nothing
                was sent (latent networks only).
            limit: the most groups of bits that each location gets in all steps, long [B, H / stride, W / stride]
                (latent networks only); None for no limit. What has got its last group does not change any more.
        """
        gain = self.gain(state.y_hat) if self.gain is not None and state is not None else None
        if bits is None:
            coded, encoder_state = self._code(state, y, gain, limit)
        else:
            coded, encoder_state = self.binarizer.values(bits, state.binarizer if state else None), None
        decoder_state, y_hat = (state.decoder, state.y_hat) if state else (None, None)
        output, decoder_state = self.decoder(coded.values, decoder_state, y_hat)
        coded = coded._replace(values=None)  # frees memory, which the sum of a large image needs
        y_hat = output.float()  # keeps the sum over iterations in float32 under mixed precision
        if gain is not None:
            y_hat = y_hat / gain
        if state is not None and self.sums:
            y_hat = y_hat + state.y_hat
        return Step(coded.bits, State(encoder_state, coded.state, decoder_state, y_hat), coded.case)

    def _code(
        self, state: State | None, y: Tensor | None, gain: Tensor | None, limit: Tensor | None
    ) -> tuple[Coded, Any]:
        """Codes the residual; gives the bits and the new state of the encoder."""
        if y is None:
            raise ValueError("a step needs an image to encode or bits to decode")
        residual = y if state is None else y - state.y_hat
        if gain is not None:
            residual = residual * gain
        with self._precision():
            features, encoder_state = self.encoder(residual, state.encoder if state else None, limit)
        return self.binarizer(features, residual, state.binarizer if state else None, limit), encoder_state

    def analyse(self, x: Tensor) -> Tensor:
        """Transforms images [B, 3, H, W] in [-1, 1], H and W multiples of the stride, to y, the input of the loop."""
        with self._precision():
            return self.transforms.analyse(x)

    def _precision(self) -> AbstractContextManager[Any]:
        """A context with the precision of what only one side computes."""
        if self.in_bfloat16:
            return torch.autocast(next(self.parameters()).device.type, torch.bfloat16)
        return nullcontext()

    def unroll(self, y: Tensor, iterations: int, limit: Tensor | None = None) -> Iterator[Step]:
        """Yields the steps that encode y, the output of `analyse`; `limit` as in `forward`."""
        state = None
        for _ in range(iterations):
            step = self(state, y=y, limit=limit)
            state = step.state
            yield step

    def picture(self, state: State, window: Window = WHOLE) -> Tensor:
        """Makes the images of a state, [B, 3, H, W], roughly in [-1, 1], or of a window of their blocks."""
        with self._precision():
            return self.transforms.synthesise(state.y_hat, state.decoder, window)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Initializes a latent network from images, without gradients: principal components, questions and scales.

        Args:
            x: images to train on, [N, 3, H, W] in [-1, 1], sides multiples of 16.
        """
        if not isinstance(self.transforms, LatentTransforms):
            raise ValueError("only a latent network starts from images")
        weight = self.transforms.start(x)
        y = torch.cat([self.analyse(images) for images in x.split(16)])
        deviations = self.binarizer.questions.learn(y, weight)
        self.encoder.scale.copy_(deviations)
        self.decoder.scale.copy_(deviations)

    def started(self) -> list[nn.Parameter]:
        """The parameters set by `start` that training should change slowly; none in pixel networks."""
        if not isinstance(self.transforms, LatentTransforms):
            return []
        linear = self.transforms.analysis.linear, self.transforms.synthesis.linear
        return [self.binarizer.questions.table, *(p for layer in linear for p in layer.parameters())]


@torch.no_grad()
def widened(network: RecurrentCodec, config: AnyConfig) -> RecurrentCodec:
    """A network with more channels that computes the same function, to continue training (after Chen et al. 2016).

    Old channels have zero weights for new inputs. New channels have random weights about as large as the old ones; for
    old inputs, these are mixed in equal parts with the weights of an old channel.

    Args:
        network: its channels become the first ones.
        config: at least as many channels in every layer; binarizer, priming and diffusion may differ, of which the
            latter two change what is computed. All else is the same.

    Raises:
        ValueError: the config differs in anything else, or widens a latent network or cells that cannot be widened.
    """
    old = network.config
    alike: Any = replace(config, priming=old.priming, diffusion=old.diffusion)
    if isinstance(old, LatentConfig) or isinstance(config, LatentConfig):
        if alike != old:
            raise ValueError("a latent network must stay as it is, but for priming and diffusion")
        same = RecurrentCodec(config)
        same.load_state_dict(network.state_dict())
        return same
    alike = replace(alike, binarizer=old.binarizer)
    widths = {name: getattr(old, name) for name in ("encoder_channels", "decoder_channels", "gain_channels")}
    if replace(alike, **widths) != old or len(config.gain_channels) != len(old.gain_channels):
        raise ValueError(
            "a network can only become wider: its cells and all else but binarizer, priming and diffusion stay the same"
        )
    for cell in (old.encoder_cell, old.decoder_cell):
        if not CELLS[cell].widens and alike != old:
            raise ValueError(f"a network with cells of the kind {cell} cannot become wider")
    wide = RecurrentCodec(config)
    layers = dict(network.named_modules())
    for name, layer in wide.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        before, gates = cast(nn.Conv2d, layers[name]), layer.gates if isinstance(layer, GateConv) else 1
        start = before.weight.unflatten(0, (gates, -1))
        kernel = layer.weight.unflatten(0, (gates, -1))
        more, (_, out, channels) = kernel.shape[1] - start.shape[1], start.shape[:3]
        if more < 0 or kernel.shape[2] < channels:
            raise ValueError(f"{name} would have fewer channels")
        twins = torch.arange(more) % out
        kernel[:, :out, channels:] = 0
        kernel[:, :out, :channels] = start
        # With this scale, a sum over all inputs has the variance of the old sum over the old inputs.
        scale = start.square().mean((1, 2, 3, 4), keepdim=True).sqrt() * (channels / kernel.shape[2]) ** 0.5
        kernel[:, out:] = torch.randn_like(kernel[:, out:]) * scale
        kernel[:, out:, :channels] = (kernel[:, out:, :channels] + start[:, twins]) / 2**0.5
        if layer.bias is not None and before.bias is not None:
            bias = before.bias.unflatten(0, (gates, -1))
            layer.bias.copy_(torch.cat([bias, bias[:, twins]], 1).flatten())
    return wide
