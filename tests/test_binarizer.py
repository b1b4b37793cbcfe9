"""Tests of the binarizers: values, probabilities, gradients, and equal bits at inference."""

import math

import pytest
import torch

from rnncodec.network.binarizer import Binarizer, binarize

METHODS = ["stochastic", "sign", "noise"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def features(dtype=torch.float32, seed=0):
    """Features in [-1, 1], both ends and both zeros among them."""
    y = torch.tanh(2 * torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(seed)))
    y.view(-1)[:4] = torch.tensor([-1.0, 1.0, 0.0, -0.0])
    return y.to(dtype)


@DTYPES
@pytest.mark.parametrize(
    ("method", "training"), [("stochastic", True), ("sign", True), *((method, False) for method in METHODS)]
)
def test_bits_are_exactly_plus_and_minus_one(method, training, dtype):
    torch.manual_seed(0)
    bits = binarize(features(dtype).requires_grad_(), training, method)
    assert bits.dtype == dtype
    assert bits.shape == (4, 8, 5, 5)
    assert set(bits.flatten().tolist()) == {-1.0, 1.0}


@DTYPES
@pytest.mark.parametrize("method", METHODS)
def test_inference_is_the_sign_whatever_the_method(method, dtype):
    y = features(dtype)
    expected = [1.0 if value >= 0 else -1.0 for value in y.flatten().tolist()]
    assert binarize(y, False, method).flatten().tolist() == expected
    assert expected[2:4] == [1.0, 1.0]  # both zeros


def test_sign_does_not_change_in_training():
    y = features()
    assert torch.equal(binarize(y, True, "sign"), binarize(y, False, "sign"))


@DTYPES
@pytest.mark.parametrize("y", [-1.0, -1 + 2**-8, -0.75, -0.25, 0.0, 0.125, 0.5, 0.96875, 1.0])
def test_stochastic_probability(y, dtype):
    """The share of +1 among n draws is within five standard errors of (1 + y) / 2; at the ends, these are 0."""
    torch.manual_seed(1)
    n = 400_000
    bits = binarize(torch.full((n,), y, dtype=dtype), True, "stochastic")
    probability = (1 + y) / 2
    share = (bits == 1).double().mean().item()
    assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / n)


def test_stochastic_bits_of_equal_features_are_independent():
    torch.manual_seed(2)
    bits = binarize(torch.zeros(2, 200_000), True, "stochastic").double()
    assert abs((bits[0] * bits[1]).mean().item()) < 5 / math.sqrt(200_000)
    assert abs((bits[0, 1:] * bits[0, :-1]).mean().item()) < 5 / math.sqrt(200_000)


@DTYPES
def test_noise_is_uniform_over_one_quantization_step(dtype):
    """The noise has the range [-1, 1], mean 0 and variance 1/3."""
    torch.manual_seed(3)
    n = 200_000
    y = torch.full((n,), 0.25, dtype=dtype)
    noise = (binarize(y, True, "noise").double() - 0.25).numpy()
    assert noise.min() >= -1
    assert noise.max() <= 1
    assert noise.min() < -0.98
    assert noise.max() > 0.98
    # The third term allows for the coarse grid of bfloat16 in the sum (2^-7 between 1 and 2).
    grid = 2**-7 if dtype == torch.bfloat16 else 0
    assert abs(noise.mean()) < 5 * math.sqrt(1 / 3 / n) + grid
    assert abs(noise.var() - 1 / 3) < 5 * math.sqrt(4 / 45 / n) + 2 * grid


@DTYPES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_the_identity(method, training, dtype):
    y = features(dtype).requires_grad_()
    bits = binarize(y, training, method)
    cotangent = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(4)).to(dtype)
    bits.backward(cotangent)
    assert y.grad is not None
    assert torch.equal(y.grad, cotangent)


@pytest.mark.parametrize("method", METHODS)
def test_module_is_a_1x1_convolution_and_tanh(method):
    torch.manual_seed(5)
    binarizer = Binarizer(6, 4, method).eval()
    x = torch.randn(2, 6, 3, 5)
    weight, bias = binarizer.features.weight.detach(), binarizer.features.bias
    assert weight.shape == (4, 6, 1, 1)
    assert bias is not None
    y = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x) + bias.detach()[:, None, None]
    assert y.abs().min() > 1e-5  # no sign hangs on rounding
    assert torch.equal(binarizer(x).bits, torch.where(y > 0, 1.0, -1.0))


def test_module_draws_in_training_and_not_at_inference():
    torch.manual_seed(6)
    binarizer = Binarizer(6, 4)
    x = torch.randn(2, 6, 16, 16)
    assert not torch.equal(binarizer(x).bits, binarizer(x).bits)
    binarizer.eval()
    assert torch.equal(binarizer(x).bits, binarizer(x).bits)


def test_module_gradient_passes_through_tanh():
    """d bits / d weight is the gradient of tanh(W x + b), as if there were no quantization."""
    torch.manual_seed(7)
    binarizer = Binarizer(3, 2)
    x = torch.randn(1, 3, 4, 4)
    binarizer(x).bits.sum().backward()
    weight = binarizer.features.weight
    bias = binarizer.features.bias
    assert bias is not None
    y = torch.einsum("oc,bchw->bohw", weight.detach()[:, :, 0, 0], x) + bias.detach()[:, None, None]
    expected = torch.einsum("bohw,bchw->oc", 1 - torch.tanh(y) ** 2, x)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[:, :, 0, 0], expected, rtol=1e-5, atol=1e-5)
