"""Convolutional recurrent cells, which compute one step for each call and take and return their state as a value."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

CellName = Literal["none", "lstm", "gru", "associative_lstm"]
CellState = tuple[Tensor, ...]


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution whose output has the input's size divided by `stride` (zero padding, odd kernels)."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2)


class GateConv(nn.Conv2d):
    """A convolution that computes several gates of equal width, which the Muon optimizer updates separately."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = True, gates: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
        self.gates = gates


class Cell(nn.Module):
    """Base of the cells: what the rest of the program needs to know of each.

    The first two decide where large images are cut, on which files depend: they never change once a cell is trained.

    Attributes:
        reach: how many hidden kernels a state passes in one step, one after the other, on its way to the next state.
        footprint: memory that a channel takes, as a multiple of an LSTM's.
        widens: whether `widened` can add channels.
    """

    reach: ClassVar[int] = 1
    footprint: ClassVar[int] = 1
    widens: ClassVar[bool] = True


class Feedforward(Cell):
    """A convolution with tanh that has the interface of a cell, for models without recurrence.

    Toderici et al. 2016, sec. 3.2.

    Arguments and shapes are those of `ConvLSTM`; the state is an empty tuple.
    """

    reach = 0

    def __init__(
        self, in_channels: int, hidden_channels: int, kernel_size: int = 3, hidden_kernel_size: int = 1, stride: int = 1
    ) -> None:
        super().__init__()
        self.input = GateConv(in_channels, hidden_channels, kernel_size, stride)

    def forward(self, x: Tensor, state: CellState | None = None) -> tuple[Tensor, CellState]:
        return torch.tanh(self.input(x)), ()


class ConvLSTM(Cell):
    """LSTM without peepholes, with convolutions for its matrix products (Toderici et al. 2017, sec. 3.1).

    Args:
        in_channels: channels of the input.
        hidden_channels: channels of the output, the hidden state and the memory.
        kernel_size: odd kernel of the input convolution.
        hidden_kernel_size: odd kernel of the convolution over the previous hidden state.
        stride: stride of the input convolution.

    Shapes: x is [B, in, H, W]; the output and both parts of the state (hidden, memory) are
    [B, hidden, H / stride, W / stride]. A state of None stands for zeros.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, kernel_size: int = 3, hidden_kernel_size: int = 1, stride: int = 1
    ) -> None:
        super().__init__()
        self.input = GateConv(in_channels, 4 * hidden_channels, kernel_size, stride, gates=4)
        self.hidden = GateConv(hidden_channels, 4 * hidden_channels, hidden_kernel_size, bias=False, gates=4)
        with torch.no_grad():  # forget gates start open (Jozefowicz et al. 2015)
            assert self.input.bias is not None
            self.input.bias[hidden_channels : 2 * hidden_channels] += 1.0

    def forward(self, x: Tensor, state: CellState | None = None) -> tuple[Tensor, CellState]:
        gates = self.input(x)
        if state is not None:
            gates = gates + self.hidden(state[0])
        i, f, o, j = gates.chunk(4, dim=1)
        memory = torch.sigmoid(i) * torch.tanh(j)
        if state is not None:
            memory = memory + torch.sigmoid(f) * state[1]
        hidden = torch.sigmoid(o) * torch.tanh(memory)
        return hidden, (hidden, memory)


class ConvGRU(Cell):
    """GRU with residual connections in its state and its output (Toderici et al. 2017, sec. 3.1).

        z = sigmoid(W_z x + U_z h)        r = sigmoid(W_r x + U_r h)
        h' = (1 - z) h + z tanh(W x + U (r h)) + a_h W_h h
        output = h' + a_x W_x x

    Arguments and shapes are those of `ConvLSTM`; the state is (h,), and `residual_scale` is a_h and a_x.
    """

    reach = 2  # that of the reset gate, then that of the candidate

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        hidden_kernel_size: int = 1,
        stride: int = 1,
        residual_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        # Gates of the input convolution: z, r, candidate, output. Gates of the hidden convolution: z, r, W_h h.
        self.input = GateConv(in_channels, 4 * hidden_channels, kernel_size, stride, gates=4)
        self.hidden = GateConv(hidden_channels, 3 * hidden_channels, hidden_kernel_size, bias=False, gates=3)
        self.candidate = GateConv(hidden_channels, hidden_channels, hidden_kernel_size, bias=False)

    def forward(self, x: Tensor, state: CellState | None = None) -> tuple[Tensor, CellState]:
        z, r, candidate, output = self.input(x).chunk(4, dim=1)
        if state is None:
            hidden = torch.sigmoid(z) * torch.tanh(candidate)
        else:
            (previous,) = state
            hidden_z, hidden_r, hidden_state = self.hidden(previous).chunk(3, dim=1)
            z, r = torch.sigmoid(z + hidden_z), torch.sigmoid(r + hidden_r)
            candidate = torch.tanh(candidate + self.candidate(r * previous))
            hidden = previous + z * (candidate - previous) + self.residual_scale * hidden_state
        return hidden + self.residual_scale * output, (hidden,)


class AssociativeConvLSTM(Cell):
    """LSTM with an associative memory of complex numbers, which is written and read by keys.

    Danihelka et al. 2016; Toderici et al. 2017, sec. 3.1.

    Tensors of `hidden_channels` hold real parts in their first half and imaginary parts in their second half.

        i, f, o = sigmoid(W x + U h)                         one real gate for each complex number
        u, k, q = bound(W x + U h)                           value, write key, read key
        memory_s' = f memory_s + P_s k * (i u)               a complex product, for each copy s
        h' = o bound(mean over s of P_s q * memory_s')
        bound(v) = v / max(1, |v|)

    Arguments and shapes are those of `ConvLSTM`, but `hidden_channels` is even and the memory part of the state is
    [B, copies * hidden, H / stride, W / stride]. `copies` is the number of redundant copies of the memory, each with a
    fixed random permutation P_s of the keys.
    """

    footprint = 2  # several copies of the memory, but one of the gates
    widens = False
    permutations: Tensor

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        hidden_kernel_size: int = 1,
        stride: int = 1,
        copies: int = 4,
    ) -> None:
        super().__init__()
        if hidden_channels % 2:
            raise ValueError(f"an associative LSTM needs an even number of channels, not {hidden_channels}")
        numbers = hidden_channels // 2
        self.splits = [numbers] * 3 + [hidden_channels] * 3
        self.input = GateConv(in_channels, sum(self.splits), kernel_size, stride, gates=9)
        self.hidden = GateConv(hidden_channels, sum(self.splits), hidden_kernel_size, bias=False, gates=9)
        generator = torch.Generator().manual_seed(0)
        permutations = torch.stack([torch.randperm(numbers, generator=generator) for _ in range(copies)])
        self.register_buffer("permutations", permutations)
        with torch.no_grad():
            assert self.input.bias is not None
            self.input.bias[numbers : 2 * numbers] += 1.0

    @staticmethod
    def bound(real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        """Scales complex numbers down to a modulus of at most 1."""
        # The square is clamped before the root, whose gradient at zero would be infinite.
        scale = torch.rsqrt(torch.clamp(real.square() + imaginary.square(), min=1.0))
        return real * scale, imaginary * scale

    def permuted(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds a key [B, hidden, H, W] and permutes it for each copy: two parts [B, copies, hidden / 2, H, W]."""
        real, imaginary = self.bound(*key.chunk(2, dim=1))
        return real[:, self.permutations], imaginary[:, self.permutations]

    def forward(self, x: Tensor, state: CellState | None = None) -> tuple[Tensor, CellState]:
        gates = self.input(x)
        if state is not None:
            gates = gates + self.hidden(state[0])
        i, f, o, value, write_key, read_key = gates.split(self.splits, dim=1)
        i, f, o = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
        real, imaginary = (part * i for part in self.bound(*value.chunk(2, dim=1)))
        real, imaginary = real[:, None], imaginary[:, None]  # every copy gets the same value
        key_real, key_imaginary = self.permuted(write_key)
        memory_real = key_real * real - key_imaginary * imaginary
        memory_imaginary = key_real * imaginary + key_imaginary * real
        if state is not None:
            old_real, old_imaginary = state[1].unflatten(1, (2, len(self.permutations), -1)).unbind(1)
            memory_real = memory_real + f[:, None] * old_real
            memory_imaginary = memory_imaginary + f[:, None] * old_imaginary
        key_real, key_imaginary = self.permuted(read_key)
        real = (key_real * memory_real - key_imaginary * memory_imaginary).mean(1)
        imaginary = (key_real * memory_imaginary + key_imaginary * memory_real).mean(1)
        hidden = torch.cat([o * part for part in self.bound(real, imaginary)], dim=1)
        memory = torch.stack([memory_real, memory_imaginary], dim=1).flatten(1, 3)
        return hidden, (hidden, memory)


CELLS = {"none": Feedforward, "lstm": ConvLSTM, "gru": ConvGRU, "associative_lstm": AssociativeConvLSTM}
