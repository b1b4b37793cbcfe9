"""Tests of the context models: causality, gradients, and the exact network against slow integer arithmetic."""

import copy

import numpy as np
import pytest
import torch
from reference import Reference

from rnncodec.entropy import ContextConfig, ContextModel, ContextSession, code_length, probability
from rnncodec.entropy.exact import PROBABILITY, SIGMOID, TANH

KINDS = ["sequential", "parallel"]


def planes(iterations=3, batch=1, bits=8, height=5, width=7, seed=0, dtype=torch.float32):
    """Random bits, each of which repeats the one above it with a probability of 0.9."""
    rng = np.random.default_rng(seed)
    flips = rng.random((iterations, batch, bits, height, width)) < 0.1
    flips[..., 0, :] = rng.random((iterations, batch, bits, width)) < 0.5
    return torch.from_numpy(np.where(np.cumsum(flips, -2) % 2, 1.0, -1.0)).to(dtype)


def model(kind, seed=0, **config):
    """Random weights, large enough to use the tables' whole range."""
    torch.manual_seed(seed)
    made = ContextModel(ContextConfig(**{"kind": kind, "bits": 8, "channels": 6, "groups": 2, **config}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
            if parameter.ndim <= 2:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iterations", [0, 2, 5])
def test_exact_model_is_the_integer_reference(kind, iterations):
    exact = model(kind, iterations=iterations).quantize()
    x = planes(dtype=torch.float64)
    with torch.inference_mode():
        logits = exact(x)[:, 0]
    assert torch.equal(logits * 256, torch.from_numpy(Reference(exact).logits(x[:, 0].numpy())).double())
    assert logits.unique().numel() > 50


WIDE = {"bits": 32, "channels": 64, "groups": 4}  # as shipped


@pytest.mark.parametrize("kind", KINDS)
def test_exact_model_gives_the_same_everywhere(kind):
    exact = model(kind, **WIDE).quantize()
    single = copy.deepcopy(exact).float()
    x = planes(batch=2, bits=32, height=9, width=11, dtype=torch.float64)
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            expected = exact(x)
            assert expected.unique().numel() > 50
            for count in (1, 2):
                torch.set_num_threads(count)
                for carrier in (exact, single):
                    bits = x.to(carrier.history.prior.weight)
                    assert torch.equal(carrier(bits).double(), expected)
                    each = [carrier(bits[:, i : i + 1]) for i in range(2)]
                    assert torch.equal(torch.cat(each, 1).double(), expected)
                    last = bits.flatten(0, 1).contiguous(memory_format=torch.channels_last).view_as(bits)
                    assert torch.equal(carrier(last).double(), expected)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(exact(x), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own internals
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_exact_model_gives_the_same(kind):
    exact = model(kind, **WIDE).quantize()
    x = planes(bits=32, dtype=torch.float64)
    with torch.inference_mode():
        expected = exact(x)
        for carrier in (exact, copy.deepcopy(exact).float()):
            assert torch.equal(torch.compile(carrier)(x.to(carrier.history.prior.weight)).double(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tf32", [False, True])
def test_gpu_gives_what_the_cpu_gives(kind, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    exact = model(kind, **WIDE).quantize()
    x = planes(batch=2, bits=32, height=9, width=11, dtype=torch.float64)
    with torch.inference_mode():
        expected = exact(x)
        assert torch.equal(copy.deepcopy(exact).cuda()(x.cuda()).cpu(), expected)
    shape = (32, 9, 11)
    on_cpu, on_gpu = ContextSession(exact, *shape), ContextSession(copy.deepcopy(exact).cuda(), *shape)
    back_on_cpu, back_on_gpu = ContextSession(exact, *shape), ContextSession(copy.deepcopy(exact).cuda(), *shape)
    for plane in x[:, 0].numpy().astype(np.int8):
        coded = on_cpu.encode(plane)
        assert on_gpu.encode(plane) == coded
        for decoder in (back_on_cpu, back_on_gpu):
            np.testing.assert_array_equal(decoder.decode(coded), plane)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [{}, WIDE])
@pytest.mark.parametrize("carrier", [torch.float32, torch.float64])
def test_decoding_sees_the_probabilities_of_encoding(kind, width, carrier):
    exact = model(kind, **width).quantize().to(carrier)
    x = planes(bits=exact.config.bits, height=6, width=9, dtype=carrier)
    with torch.inference_mode():
        probabilities = probability(exact(x))
        state = None
        for t, bits in enumerate(x):
            predictor = exact.predictor(t)
            order = predictor.order(*bits.shape[1:])
            assert sorted(order) == list(range(bits[0].numel()))
            expected = probabilities[t, 0].permute(1, 2, 0).flatten().numpy()[order]
            truth = bits[0].permute(1, 2, 0).flatten().numpy()[order] > 0
            place = 0

            def read(found, expected=expected, truth=truth):
                nonlocal place
                here = slice(place, place + len(found))
                place += len(found)
                np.testing.assert_array_equal(found, expected[here])
                return truth[here]

            assert torch.equal(predictor.decode(exact.history.look(state, bits), bits.shape[1], read), bits)
            assert place == len(order)
            state = exact.history(bits, state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_depends_on_earlier_bits_only(kind):
    context = model(kind).eval()
    x = planes(iterations=2, height=5, width=5)
    order = context.predictor(0).order(8, 5, 5)
    with torch.inference_mode():
        before = context(x)[:, 0].permute(0, 2, 3, 1).flatten(1)
        for place in (0, 37, 111, 199):
            changed = x.clone()
            changed[1, 0].permute(1, 2, 0)[np.unravel_index(order[place], (5, 5, 8))] *= -1
            after = context(changed)[:, 0].permute(0, 2, 3, 1).flatten(1)
            assert torch.equal(after[0], before[0])  # the earlier iteration
            same = (after[1] - before[1]).abs()[order] < 1e-6
            assert same[: place + 1].all()
            if place < 111:
                assert not same.all()


def test_tables_are_far_from_where_rounding_could_differ():
    # The libraries of two machines may differ in the last place of tanh and exp, some 1e-16.
    x = np.arange(-2048, 2049, dtype=np.longdouble) / 256
    sigma = 1 / (1 + np.exp(-x))
    for values, table, scale in ((np.tanh(x), TANH, 256), (sigma, SIGMOID, 256), (sigma, PROBABILITY / 65536, 65536)):
        scaled = np.asarray(values * scale)
        assert np.abs(scaled - np.floor(scaled) - 0.5).min() > 1e-9
        assert np.abs(np.asarray(table, np.float64) * scale - np.rint(scaled).astype(np.float64)).max() == 0
    assert PROBABILITY.min() == 22
    assert PROBABILITY.max() == 65536 - 22


@pytest.mark.parametrize("kind", KINDS)
def test_quantization_costs_little(kind):
    context, x = model(kind).eval(), planes(batch=4, height=16, width=16)
    with torch.no_grad():
        logits = context(x)
        assert (context.quantize()(x.double()) - logits).abs().mean() < 0.02 * logits.abs().mean()


def test_integers_restore_the_model_and_are_checked():
    exact = model("parallel").quantize()
    integers = exact.integers()
    again = ContextModel.from_integers(exact.config, integers)
    x = planes(dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(exact(x), again(x))
    integers["history.input.bias"] = torch.full_like(integers["history.input.bias"], 2**30)
    with pytest.raises(ValueError, match="more bits"):
        ContextModel.from_integers(exact.config, integers)


def test_code_length_is_the_entropy_formula():
    x = planes(iterations=2)
    logits = torch.randn_like(x)
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    expected = -np.where(x.numpy() > 0, np.log2(p), np.log2(1 - p)).mean()
    assert code_length(logits, x).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "bound"), [("sequential", 0.7), ("parallel", 0.85)])
def test_training_learns_structure(kind, bound):
    # The entropy is (1 + 7 H(0.1)) / 8 = 0.535 bits; a checkerboard cannot use all of it in its first pass.
    torch.manual_seed(0)
    context = ContextModel(ContextConfig(kind=kind, bits=8, channels=16, groups=2))
    optimizer = torch.optim.AdamW(context.parameters(), 1e-2)
    for step in range(80):
        x = planes(iterations=2, batch=4, height=8, width=8, seed=step)
        loss = code_length(context(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = planes(iterations=2, batch=4, height=8, width=8, seed=1000)
    with torch.no_grad():
        length = code_length(context(x), x).item()
        assert 0.5 < length < bound
        p = probability(context.quantize()(x.double())) / 65536
    exact = -torch.where(x > 0, p, 1 - p).log2().mean().item()
    assert exact == pytest.approx(length, rel=0.005)


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="kind is one of"):
        ContextConfig(kind="other")  # pyright: ignore[reportArgumentType]
    for bits, iterations in ((0, 0), (8, -1), (8, 256)):
        with pytest.raises(ValueError, match="at least 1"):
            ContextConfig(bits=bits, iterations=iterations)
    with pytest.raises(ValueError, match="equal groups"):
        ContextConfig(kind="parallel", bits=8, groups=3)
    ContextConfig(kind="sequential", bits=8, groups=3)
