"""The search for better bits: against all bits there are, with and without a context model, in files and in batches."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rnncodec import format, search
from rnncodec.codec import Codec, activation_bytes
from rnncodec.context import ContextConfig, ContextModel
from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.weights import Weights, load_weights

CONFIG = NetworkConfig(bits=8, encoder_channels=(4, 6, 6, 8), decoder_channels=(12, 12, 12, 8, 8))


def make_network(**changes):
    """A random network whose bits matter, and whose encoder knows nothing of what the decoder needs."""
    torch.manual_seed(2)
    network = RecurrentCodec(replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter *= 1.5
        network.decoder.output.weight.normal_(std=0.3)
    return network


def make_context(bits=8):
    torch.manual_seed(3)
    context = ContextModel(ContextConfig(kind="parallel", bits=bits, channels=8, groups=2))
    with torch.no_grad():
        for parameter in context.parameters():
            parameter *= 2
    return context.requires_grad_(False)


def images(count=2, height=32, width=48):
    x = torch.rand(count, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return torch.nn.functional.interpolate(x, size=(height, width), mode="bilinear")


@torch.no_grad()
def costs(network, x, planes, context=None):
    """What the search minimizes, after each iteration of an image, decoded and coded in plain terms."""
    state, nats, result = None, 0.0, []
    logits = context(planes[:, None]) if context else torch.zeros(len(planes), 1, *planes.shape[1:])
    for bits, logit in zip(planes, logits[:, 0], strict=True):
        step = network(state, bits=bits[None])
        state = step.state
        p = 1 / (1 + np.exp(-logit.double().numpy()))
        nats -= np.log(np.where(bits.numpy() > 0, p, 1 - p)).sum()
        error = float(((x - step.x_hat[0]).double() ** 2).sum())
        result.append(math.log(error) + (0.7 * math.log(nats) if context else 0))
    return result


def planes_of(steps, image=0):
    return torch.stack([step.bits[image] for step in steps])


@torch.no_grad()
def unroll(network, x, iterations, effort, context=None):
    return list(search.unroll(network, x, iterations, effort, context))


@pytest.mark.parametrize("coded", [False, True])
def test_search_comes_close_to_the_best_of_all_bits(coded):
    network, context = make_network(bits=8), make_context(8) if coded else None
    x = images(1, 16, 16)  # one location
    (start,), (found,) = (planes_of(unroll(network, x, 1, effort, context))[None] for effort in (0, 40))
    cost_of = lambda planes: costs(network, x[0], planes, context)[0]  # noqa: E731
    every = sorted(cost_of(torch.tensor(bits).view(1, 8, 1, 1)) for bits in itertools.product([-1.0, 1.0], repeat=8))
    assert cost_of(start) > every[20], "a guess this good would prove nothing"
    assert cost_of(found) <= every[2]


@pytest.mark.parametrize("reconstruction", ["additive", "one_shot", "residual_scaling"])
def test_more_effort_costs_less(reconstruction):
    network, context, x = make_network(reconstruction=reconstruction), make_context(), images()
    for model in (None, context):
        steps = {effort: unroll(network, x, 3, effort, model) for effort in (0, 2, 8)}
        for i in range(len(x)):
            first = [costs(network, x[i], planes_of(steps[effort], i), model) for effort in (0, 2, 8)]
            assert first[0][0] > first[1][0] > first[2][0]
            assert first[0][-1] > first[2][-1]


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
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert errors[1] < mse(whole, whole.encode(image, 2), image)
    config = load_weights().network.config
    assert activation_bytes(config, searching=True) > 1.3 * activation_bytes(config)
    searching, plain = (make_codec()._tiles(8000, 6000, searching)[0].area[0].stop for searching in (True, False))
    assert searching < 0.95 * plain


def test_batches_are_searched_for_too():
    codec, x = make_codec(), (images() + 1) / 2
    plain, searched = (codec.compress(x, 2, effort=effort) for effort in (0, 8))
    errors = [(codec.decompress(**coded) - x).square().mean((1, 2, 3)) for coded in (plain, searched)]
    assert (errors[1] < errors[0]).all()


@pytest.mark.parametrize("effort", [-1, 101])
def test_effort_has_bounds(effort):
    with pytest.raises(ValueError, match=r"effort must be in 0\.\.100"):
        make_codec().encode(picture(), 1, effort=effort)
