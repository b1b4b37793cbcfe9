"""Tests of the recurrent cells against NumPy versions of their equations, in float64 and step by step."""

from typing import get_args

import numpy as np
import pytest
import torch

from rnncodec.network.cells import CELLS, AssociativeConvLSTM, CellName, ConvGRU, ConvLSTM, Feedforward

SIZES = pytest.mark.parametrize(("stride", "hidden_kernel"), [(1, 1), (1, 3), (2, 1), (2, 3)])


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def convolve(x, weight, bias=None, stride=1):
    """Zero-padded cross-correlation of x [B, C, H, W] with weight [D, C, K, K], every product written out."""
    batch, _, height, width = x.shape
    channels, _, kernel, _ = weight.shape
    pad = kernel // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    y = np.zeros((batch, channels, -(-height // stride), -(-width // stride)))
    for row in range(y.shape[2]):
        for column in range(y.shape[3]):
            top, left = row * stride, column * stride
            window = padded[:, :, top : top + kernel, left : left + kernel]
            for channel in range(channels):
                y[:, channel, row, column] = (window * weight[channel]).sum(axis=(1, 2, 3))
    return y if bias is None else y + bias[:, None, None]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def parts(convolution, *widths):
    """Weights and biases (zeros where there are none) of the consecutive groups of a convolution's outputs."""
    weight = array(convolution.weight)
    bias = np.zeros(len(weight)) if convolution.bias is None else array(convolution.bias)
    assert len(weight) == sum(widths)
    ends = np.cumsum(widths)
    return [(weight[end - width : end], bias[end - width : end]) for width, end in zip(widths, ends, strict=True)]


class Reference:
    """A cell's equations in float64; `state` is None before the first step."""

    def __init__(self, cell, stride):
        self.stride, self.state = stride, None

    def of_input(self, group, x):
        return convolve(x, *group, stride=self.stride)


class ReferenceFeedforward(Reference):
    def __init__(self, cell, stride):
        super().__init__(cell, stride)
        (self.w,) = parts(cell.input, cell.input.out_channels)

    def step(self, x):
        return np.tanh(self.of_input(self.w, x))


class ReferenceLSTM(Reference):
    """i, f, o = sigmoid(W x + U h), j = tanh(W x + U h), c' = f c + i j, h' = o tanh(c')."""

    def __init__(self, cell, stride):
        super().__init__(cell, stride)
        width = cell.hidden.in_channels
        self.w = dict(zip("ifoj", parts(cell.input, *[width] * 4), strict=True))
        self.u = dict(zip("ifoj", parts(cell.hidden, *[width] * 4), strict=True))
        self.width = width

    def step(self, x):
        pre = {gate: self.of_input(self.w[gate], x) for gate in "ifoj"}
        if self.state is None:
            self.state = np.zeros_like(pre["i"]), np.zeros_like(pre["i"])
        h, c = self.state
        pre = {gate: pre[gate] + convolve(h, *self.u[gate]) for gate in "ifoj"}
        c = sigmoid(pre["f"]) * c + sigmoid(pre["i"]) * np.tanh(pre["j"])
        h = sigmoid(pre["o"]) * np.tanh(c)
        self.state = h, c
        return h


class ReferenceGRU(Reference):
    """Toderici et al. 2017 section 3.1, with a = 0.1.

    h' = (1 - z) h + z tanh(W x + U (r h)) + a W_h h, and the output is h' + a W_x x.
    """

    def __init__(self, cell, stride):
        super().__init__(cell, stride)
        width = cell.candidate.in_channels
        self.w = dict(zip("zrco", parts(cell.input, *[width] * 4), strict=True))
        self.u = dict(zip("zrh", parts(cell.hidden, *[width] * 3), strict=True))
        (self.u["c"],) = parts(cell.candidate, width)

    def step(self, x):
        pre = {gate: self.of_input(self.w[gate], x) for gate in "zrco"}
        h = np.zeros_like(pre["z"]) if self.state is None else self.state
        z = sigmoid(pre["z"] + convolve(h, *self.u["z"]))
        r = sigmoid(pre["r"] + convolve(h, *self.u["r"]))
        candidate = np.tanh(pre["c"] + convolve(r * h, *self.u["c"]))
        h = (1 - z) * h + z * candidate + 0.1 * convolve(h, *self.u["h"])
        self.state = h
        return h + 0.1 * pre["o"]


class ReferenceAssociativeLSTM(Reference):
    """Danihelka et al. 2016, section 4, with complex numbers: one real gate for each, permuted keys for each copy."""

    def __init__(self, cell, stride):
        super().__init__(cell, stride)
        self.numbers = cell.hidden.in_channels // 2
        # i, f, o are real; value, write key, read key are complex: real parts first, then imaginary parts.
        widths = [self.numbers] * 3 + [2 * self.numbers] * 3
        names = ["i", "f", "o", "value", "write", "read"]
        self.w = dict(zip(names, parts(cell.input, *widths), strict=True))
        self.u = dict(zip(names, parts(cell.hidden, *widths), strict=True))
        self.permutations = cell.permutations.numpy()

    def complex(self, x):
        return x[:, : self.numbers] + 1j * x[:, self.numbers :]

    @staticmethod
    def bound(x):
        return x / np.maximum(1, np.abs(x))

    def step(self, x):
        pre = {name: self.of_input(w, x) for name, w in self.w.items()}
        if self.state is None:
            self.state = np.zeros_like(pre["value"]), [np.zeros_like(pre["i"], complex) for _ in self.permutations]
        h, copies = self.state
        pre = {name: pre[name] + convolve(h, *self.u[name]) for name in pre}
        i, f, o = (sigmoid(pre[gate]) for gate in "ifo")
        value, write, read = (self.bound(self.complex(pre[name])) for name in ("value", "write", "read"))
        copies = [
            f * memory + write[:, order] * (i * value) for memory, order in zip(copies, self.permutations, strict=True)
        ]
        retrieved = sum(read[:, order] * memory for memory, order in zip(copies, self.permutations, strict=True))
        out = o * self.bound(retrieved / len(copies))
        h = np.concatenate([out.real, out.imag], axis=1)
        self.state = h, copies
        return h


REFERENCES = {
    Feedforward: ReferenceFeedforward,
    ConvLSTM: ReferenceLSTM,
    ConvGRU: ReferenceGRU,
    AssociativeConvLSTM: ReferenceAssociativeLSTM,
}


def random_cell(kind, stride=1, hidden_kernel=1, in_channels=3, hidden_channels=4, **options):
    """A cell in float64 whose weights and biases are large enough to reach the bends of every nonlinearity."""
    torch.manual_seed(0)
    cell = kind(in_channels, hidden_channels, 3, hidden_kernel, stride, **options).double()
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return cell


def test_every_cell_has_a_name_and_a_reference():
    assert tuple(CELLS) == get_args(CellName)
    assert set(CELLS.values()) == set(REFERENCES)


@SIZES
@pytest.mark.parametrize("kind", REFERENCES)
def test_cell_equals_transcription(kind, stride, hidden_kernel):
    cell = random_cell(kind, stride, hidden_kernel)
    reference = REFERENCES[kind](cell, stride)
    state = None
    for step in range(4):
        x = torch.randn(2, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        y, state = cell(x, state)
        expected = reference.step(array(x))
        assert expected.std() > 0.05  # saturated or vanished outputs would prove nothing
        np.testing.assert_allclose(array(y), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", REFERENCES)
def test_float32_equals_transcription(kind):
    cell = random_cell(kind, stride=2, hidden_kernel=3).float()
    reference = REFERENCES[kind](cell, stride=2)
    state = None
    for step in range(4):
        x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(step))
        y, state = cell(x, state)
        np.testing.assert_allclose(array(y), reference.step(array(x)), rtol=0, atol=1e-5)


@SIZES
@pytest.mark.parametrize("kind", REFERENCES)
def test_state_has_the_documented_shapes_and_none_is_zero(kind, stride, hidden_kernel):
    cell = random_cell(kind, stride, hidden_kernel)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    y, state = cell(x)
    rows, columns = 6 // stride, 8 // stride
    parts = {Feedforward: [], ConvLSTM: [4, 4], AssociativeConvLSTM: [4, 4 * 4]}.get(kind, [4])
    assert y.shape == (2, 4, rows, columns)
    assert [part.shape for part in state] == [(2, channels, rows, columns) for channels in parts]
    y_zero, state_zero = cell(x, tuple(torch.zeros_like(part) for part in state))
    torch.testing.assert_close(y_zero, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(state_zero, state, rtol=0, atol=1e-12)


def test_lstm_memory_equals_transcription():
    cell = random_cell(ConvLSTM, hidden_kernel=3)
    reference = ReferenceLSTM(cell, 1)
    state = None
    for _ in range(3):
        x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
        _, state = cell(x, state)
        reference.step(array(x))
    assert state is not None
    np.testing.assert_allclose(array(state[1]), reference.state[1], rtol=0, atol=1e-9)


def test_gru_state_is_not_its_output():
    cell = random_cell(ConvGRU)
    reference = ReferenceGRU(cell, 1)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    _, (hidden,) = cell(x)
    expected = reference.step(array(x))
    np.testing.assert_allclose(array(hidden), reference.state, rtol=0, atol=1e-9)
    assert np.abs(expected - reference.state).max() > 1e-3


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_associative_memory_of_any_number_of_copies(copies):
    cell = random_cell(AssociativeConvLSTM, hidden_channels=10, copies=copies)
    reference = ReferenceAssociativeLSTM(cell, 1)
    state = None
    for _ in range(3):
        x = torch.randn(2, 3, 3, 3, dtype=torch.float64)
        y, state = cell(x, state)
        np.testing.assert_allclose(array(y), reference.step(array(x)), rtol=0, atol=1e-9)
    assert state is not None
    assert state[1].shape == (2, copies * 10, 3, 3)


def test_associative_permutations_are_fixed_distinct_and_saved():
    cells = [AssociativeConvLSTM(3, 64), AssociativeConvLSTM(3, 64)]
    permutations = [cell.permutations for cell in cells]
    assert torch.equal(permutations[0], permutations[1])
    assert torch.equal(permutations[0].sort(dim=1).values, torch.arange(32).expand(4, 32))
    assert len({tuple(row) for row in permutations[0].tolist()}) == 4
    assert "permutations" in cells[0].state_dict()
    torch.manual_seed(1)
    assert torch.equal(AssociativeConvLSTM(3, 64).permutations, permutations[0])  # whatever the global seed


def test_constructing_an_associative_cell_keeps_the_global_seed():
    draws = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        AssociativeConvLSTM(3, 8)
        draws.add(torch.rand(1).item())
    assert len(draws) == 2


def test_associative_gradient_is_finite_at_zero():
    cell = AssociativeConvLSTM(3, 4, hidden_kernel_size=3)
    for parameter in cell.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.zeros(1, 3, 4, 4, requires_grad=True)
    y, state = cell(x)
    y, _ = cell(x, state)
    (y.sum() + y.square().sum()).backward()
    for tensor in [x, *cell.parameters()]:
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_associative_odd_width_is_refused():
    with pytest.raises(ValueError, match="even number of channels, not 5"):
        AssociativeConvLSTM(3, 5)


def test_feedforward_has_no_state():
    x = torch.randn(1, 3, 4, 4)
    cell = Feedforward(3, 4)
    y, state = cell(x)
    assert state == ()
    assert torch.equal(cell(x, state)[0], y)


@pytest.mark.parametrize("kind", [ConvLSTM, AssociativeConvLSTM])
def test_forget_gate_starts_open(kind):
    torch.manual_seed(0)
    width = 2000
    cell = kind(3, width, kernel_size=1)
    gate = width if kind is ConvLSTM else width // 2
    means = [cell.input.bias[n * gate : (n + 1) * gate].mean().item() for n in range(3)]
    # Biases of a convolution with a fan-in of 3 are uniform with deviation 1/3: six standard errors of their mean.
    assert means == pytest.approx([0, 1, 0], abs=2 / gate**0.5)


@pytest.mark.parametrize("name", CELLS)
def test_a_state_reaches_as_far_as_the_cell_says(name):
    cell = random_cell(CELLS[name], hidden_kernel=3)
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    _, before = cell(x)
    changed = tuple(part.clone() for part in before)
    for part in changed:
        part[..., 4, 4] += 1
    (y, state), (other, other_state) = cell(x, before), cell(x, changed)
    far = 0
    for a, b in zip((y, *state), (other, *other_state), strict=True):
        rows = (a != b).any(1).any(-1)[0].nonzero().flatten()
        far = max([far, *(rows - 4).abs().tolist()])
    assert far == CELLS[name].reach


@pytest.mark.parametrize("name", CELLS)
def test_odd_sizes_are_rounded_up(name):
    y, _ = CELLS[name](3, 4, 3, 1, stride=2)(torch.zeros(1, 3, 5, 7))
    assert y.shape == (1, 4, 3, 4)


@pytest.mark.parametrize("name", CELLS)
def test_every_parameter_is_used(name):
    cell = random_cell(CELLS[name])
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    _, state = cell(x)
    y, _ = cell(x, state)
    y.square().sum().backward()
    for parameter_name, parameter in cell.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all() if parameter.ndim > 1 else parameter.grad.all()
