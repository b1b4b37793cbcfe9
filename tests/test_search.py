"""The search for better bits: against all bits there are, with and without a context model, in files and in batches."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import rnncodec
from rnncodec import format, search
from rnncodec.codec import Codec, activation_bytes
from rnncodec.context import ContextConfig, ContextModel, ContextName
from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.weights import Weights, load_weights

CONFIG = NetworkConfig(bits=8, encoder_channels=(4, 6, 6, 8), decoder_channels=(12, 12, 12, 8, 8))


KINDS = ["raw", "parallel", "sequential"]


def make_network(**changes):
    """A random network whose bits matter, and whose encoder knows nothing of what the decoder needs."""
    torch.manual_seed(2)
    network = RecurrentCodec(replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter *= 1.5
        network.decoder.output.weight.normal_(std=0.3)
    return network


def make_context(kind: ContextName = "parallel", iterations=0):
    """A random context model to which earlier bits matter much."""
    torch.manual_seed(3)
    context = ContextModel(ContextConfig(kind=kind, bits=8, channels=8, groups=2, iterations=iterations))
    with torch.no_grad():
        for parameter in context.parameters():
            parameter *= 2
    return context.requires_grad_(False)


def images(count=2, height=32, width=48, seed=4):
    x = torch.rand(count, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(x, size=(height, width), mode="bilinear")


@torch.no_grad()
def costs(network, x, planes, context=None, size=(None, None)):
    """What the search minimizes, decoded and coded in plain terms, after each iteration: [T, N] for N codes of one x.

    Args:
        x: [3, H, W].
        planes: [T, N, bits, H / 16, W / 16].
        size: of what counts of x.
    """
    state, nats, result = None, 0.0, []
    logits = context(planes) if context else torch.zeros(planes.shape)
    for bits, logit in zip(planes, logits, strict=True):
        step = network(state, bits=bits)
        state = step.state
        p = 1 / (1 + np.exp(-logit.double().numpy()))
        nats -= np.log(np.where(bits.numpy() > 0, p, 1 - p)).sum((1, 2, 3))
        error = ((x - step.x_hat).double().numpy()[:, :, : size[0], : size[1]] ** 2).sum((1, 2, 3))
        result.append(np.log(error) + (0.7 * np.log(nats) if context else 0))
    return np.stack(result)


def planes_of(steps, image=0):
    return torch.stack([step.bits[image] for step in steps])


@torch.no_grad()
def unroll(network, x, iterations, effort, context=None, size=None):
    return list(search.unroll(network, x, iterations, effort, context, size))


EVERY = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8))).view(-1, 8, 1, 1)


@pytest.mark.parametrize("size", [(16, 16), (2, 3)])
@pytest.mark.parametrize("context", [None, make_context("parallel", 3), make_context("sequential", 3)], ids=KINDS)
def test_search_comes_close_to_the_best_of_all_bits(context, size):
    """In every iteration, given what was coded before: the rank among all 256 codes of one location."""
    network = make_network()
    ranks = {effort: [] for effort in (0, 60)}
    for seed in range(4):
        x = images(1, 16, 16, seed)
        for effort, found in ranks.items():
            planes = planes_of(unroll(network, x, 3, effort, context, size))
            for t in range(3):
                options = torch.cat([planes[: t + 1, None], planes[: t + 1, None].repeat(1, 256, 1, 1, 1)], dim=1)
                options[t, 1:] = EVERY
                mine, *every = costs(network, x[0], options, context, size)[t]
                found.append(sum(cost < mine - 1e-5 for cost in every))
    assert np.mean(ranks[0]) > 20, "a guess this good would prove nothing"
    assert np.mean(ranks[60]) < 1


@pytest.mark.parametrize("reconstruction", ["additive", "one_shot", "residual_scaling"])
@pytest.mark.parametrize("context", [None, make_context(), make_context("sequential", 2)], ids=KINDS)
def test_more_effort_costs_less(reconstruction, context):
    network, x = make_network(reconstruction=reconstruction), images()
    steps = {effort: unroll(network, x, 3, effort, context) for effort in (0, 2, 8)}
    for i in range(len(x)):
        found = [costs(network, x[i], planes_of(steps[effort], i)[:, None], context) for effort in (0, 2, 8)]
        assert found[0][0] > found[1][0] > found[2][0]
        assert found[0][-1] > found[2][-1]


class Witness:
    """In place of a context model: what it is asked, and given what."""

    def __init__(self):
        self.asked = []
        self.history = self

    def look(self, memory, like):
        return memory or ()

    def __call__(self, bits, memory):
        return (*(memory or ()), bits)

    def predictor(self, t):
        def logits(bits, prior):
            self.asked.append((t, prior))
            return torch.zeros_like(bits)

        return logits


def test_context_model_is_told_of_all_bits_before():
    context = Witness()
    planes = [step.bits for step in unroll(make_network(), images(), 3, 1, context)]
    assert {t for t, _ in context.asked} == {0, 1, 2}
    for t, prior in context.asked:
        assert len(prior) == t
        assert all(torch.equal(told, bits) for told, bits in zip(prior, planes, strict=False))


def test_no_effort_is_the_encoder_and_steps_are_those_of_the_decoder():
    network, x = make_network(), images()
    with torch.no_grad():
        plain = list(network.unroll(x, 3))
    for step, expected in zip(unroll(network, x, 3, 0), plain, strict=True):
        assert torch.equal(step.bits, expected.bits)
        assert torch.equal(step.x_hat, expected.x_hat)
    state = None
    for step in unroll(network, x, 3, 4, make_context()):
        assert not step.x_hat.requires_grad
        with torch.no_grad():
            decoded = network(state, bits=step.bits)
        assert torch.equal(decoded.x_hat, step.x_hat)
        assert set(step.bits.unique().tolist()) == {-1.0, 1.0}
        state = decoded.state


def test_images_of_a_batch_are_searched_for_on_their_own():
    network, context, x = make_network(), make_context(), images()
    together = unroll(network, x, 2, 3, context)
    for i in range(len(x)):
        alone = unroll(network, x[i : i + 1], 2, 3, context)
        assert torch.equal(planes_of(together, i), planes_of(alone))


def test_length_counts_only_with_a_context_model():
    """Where a 1 is nearly free and a 0 dear, far more bits become 1."""
    network, x = make_network(), images()
    context = make_context()
    for parameter in context.parameters():
        parameter.zero_()
    output = context.predictor(0).output
    assert output.bias is not None
    output.bias.fill_(4.0)
    free, priced = (planes_of(unroll(network, x, 2, 10, model)) for model in (None, context))
    assert (priced > 0).float().mean() > (free > 0).float().mean() + 0.1


def make_codec(context=None, **kwargs):
    exact = context and context.quantize()
    return Codec(Weights(make_network(), "tiny", bytes(8), {}, exact, b"\1" * 8 if exact else bytes(8)), **kwargs)


def picture(height=50, width=70):
    x = images(1, height + -height % 16, width + -width % 16)[0, :, :height, :width]
    return ((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def mse(codec, data, image):
    return np.mean((np.asarray(codec.decode(data)).astype(float) - image) ** 2)


@pytest.mark.parametrize("context", [None, make_context()], ids=["raw", "context"])
def test_files_of_the_same_bytes_are_better(context):
    codec, image = make_codec(context), picture()
    plain, searched = (codec.encode(image, 3, effort=effort) for effort in (0, 8))
    assert searched == codec.encode(image, 3, effort=8)
    if context is None:
        assert len(searched) == len(plain)
    assert mse(codec, searched, image) < mse(codec, plain, image)
    for k in (1, 2):  # searching does not look ahead: a prefix is what fewer iterations give
        assert format.truncate(searched, iterations=k) == codec.encode(image, k, effort=8)


def test_a_searched_file_reaches_a_quality_in_fewer_iterations():
    codec, image = make_codec(), picture()
    plain = codec.encode(image, 6)
    target = 10 * math.log10(255**2 / mse(codec, plain, image)) - 1e-6
    assert len(format.read_header(codec.encode(image, psnr=target, effort=8)).iterations) < 6


def test_tiles_are_searched_one_by_one_and_smaller_where_gradients_take_memory():
    image = picture(300, 50)
    whole, cut = make_codec(), make_codec(tile=64)
    assert len(cut._tiles(300, 50)) > 1
    errors = [mse(whole, codec.encode(image, 2, effort=4), image) for codec in (whole, cut)]
    plain = mse(whole, whole.encode(image, 2), image)
    assert errors[0] < errors[1] < plain or errors[1] < errors[0] < plain
    assert plain - errors[1] > 0.8 * (plain - errors[0])
    config = load_weights().network.config
    assert activation_bytes(config, searching=True) > 1.3 * activation_bytes(config)
    searching, plain = (make_codec()._tiles(8000, 6000, searching)[0].area[0].stop for searching in (True, False))
    assert searching < 0.95 * plain


def test_batches_are_searched_for_too():
    codec, x = make_codec(), (images() + 1) / 2
    plain, searched = (codec.compress(x, 2, effort=effort) for effort in (0, 8))
    errors = [(codec.decompress(**coded) - x).square().mean((1, 2, 3)) for coded in (plain, searched)]
    assert (errors[1] < errors[0]).all()


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (1, 40)])
def test_padding_does_not_count(size):
    codec, image = rnncodec.load(), picture(*size)
    errors = [mse(codec, codec.encode(image, 3, effort=effort, entropy="none"), image) for effort in (0, 8)]
    assert errors[1] <= errors[0]


def test_search_works_whatever_the_mode_of_the_caller():
    codec, image = make_codec(make_context()), picture()
    expected = codec.encode(image, 2, effort=2)
    with torch.inference_mode():
        assert codec.encode(image, 2, effort=2) == expected


def test_progress_ends_at_its_total_where_the_decoder_has_fewer_tiles(monkeypatch):
    codec = make_codec()
    tiles = codec._tiles
    monkeypatch.setattr(codec, "_tiles", lambda *size, searching=False: make_codec(tile=64)._tiles(*size) if searching
                        else tiles(*size))  # fmt: skip
    calls = []
    with pytest.warns(UserWarning, match="out of reach"):
        codec.encode(picture(200, 20), psnr=90, effort=1, progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == list(range(1, calls[-1][1] + 1))
    assert len({total for _, total in calls}) == 1


@pytest.mark.parametrize("effort", [-1, 101])
def test_effort_has_bounds(effort):
    with pytest.raises(ValueError, match=r"effort must be in 0\.\.100"):
        make_codec().encode(picture(), 1, effort=effort)
