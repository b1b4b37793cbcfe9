"""Tests of the codec network: numbers of parameters, the residual loop of the papers, and decoding of its bits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rnncodec.network import CELLS, GainNetwork, NetworkConfig, RecurrentCodec, widened

RECONSTRUCTIONS = ["one_shot", "additive", "residual_scaling"]
NARROW: dict[str, Any] = dict(
    encoder_channels=(4, 8, 8, 8), decoder_channels=(8, 12, 8, 8, 8), bits=6, gain_channels=(4, 4, 4, 4)
)
PATCHES: dict[str, Any] = dict(
    patch_size=8,
    encoder_channels=(16, 16, 16),
    encoder_hidden_kernels=(1, 1),
    decoder_channels=(16, 16, 16),
    decoder_hidden_kernels=(1, 1),
    bits=4,
)


def lively(**options):
    """A network whose random weights are large enough for bits and reconstructions to differ between iterations."""
    torch.manual_seed(0)
    network = RecurrentCodec(NetworkConfig(**options))
    scale = 4 if "associative_lstm" in options.values() else 1.5  # its products of bounded numbers shrink signals
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=scale / parameter[0].numel() ** 0.5 if parameter.ndim == 4 else 0.05)
    assert network.binarizer.features.bias is not None
    torch.nn.init.zeros_(network.binarizer.features.bias)  # or it alone decides the bits of weak features
    return network


def narrow(cell="lstm", reconstruction="additive", **options):
    """A narrow network for images."""
    cells: dict[str, Any] = dict(encoder_cell=cell, decoder_cell=cell, reconstruction=reconstruction)
    return lively(**{**NARROW, **cells, **options})


def images(batch=1, height=48, width=80, seed=0):
    return 2 * torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) - 1


# Size and rate


def convolution(before, after, kernel):
    return after * before * kernel**2 + after


def lstm(before, after, hidden_kernel):
    return 4 * after * (before * 3**2 + 1 + after * hidden_kernel**2)


def test_parameters_of_the_default():
    """Widths are those of the LSTM in the layer table of Toderici et al. 2017, and not read from the code."""
    encoder = convolution(3, 64, 3) + lstm(64, 256, 1) + lstm(256, 512, 1) + lstm(512, 512, 1)
    binarizer = convolution(512, 32, 1)
    decoder = convolution(32, 512, 1) + lstm(512, 512, 1) + lstm(128, 512, 1) + lstm(128, 256, 3) + lstm(64, 128, 3)
    expected = encoder + binarizer + decoder + convolution(32, 3, 1)
    assert round(expected / 1e6, 1) == 35.5
    with torch.device("meta"):
        network = RecurrentCodec()
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 48), (48, 80)])
def test_bit_rate_is_an_eighth_of_a_bit_per_pixel(height, width):
    network = narrow(bits=NetworkConfig().bits).eval()
    for iteration, step in enumerate(network.unroll(images(1, height, width), 3), start=1):
        assert step.bits.numel() * iteration / (height * width) == 0.125 * iteration


@torch.no_grad()
def test_default_runs():
    network = RecurrentCodec().eval()
    steps = list(network.unroll(images(1, 16, 32), 2))
    assert [step.bits.shape for step in steps] == [(1, 32, 1, 2)] * 2
    assert [step.state.y_hat.shape for step in steps] == [(1, 3, 16, 32)] * 2
    assert network.config.stride == 16


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_shapes_for_an_odd_number_of_blocks(cell, reconstruction):
    network = narrow(cell, reconstruction).eval()
    for step in network.unroll(images(2, 48, 80), 2):
        assert step.bits.shape == (2, 6, 3, 5)
        assert set(step.bits.unique().tolist()) <= {-1.0, 1.0}
        assert step.state.y_hat.shape == (2, 3, 48, 80)
        assert step.state.y_hat is step.state.y_hat


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_stride_follows_the_depth(depth):
    config = NetworkConfig(
        encoder_channels=(4,) * depth,
        encoder_hidden_kernels=(1,) * (depth - 1),
        decoder_channels=(4,) * (depth + 1),
        decoder_hidden_kernels=(3,) * depth,
        bits=5,
    )
    step = RecurrentCodec(config)(y=images(1, 16, 24))
    assert config.stride == 2**depth
    assert step.bits.shape == (1, 5, 16 // 2**depth, 24 // 2**depth)
    assert step.state.y_hat.shape == (1, 3, 16, 24)


# The residual loop


@torch.no_grad()
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_residual_loop(cell, reconstruction):
    """The loop is that of Toderici et al. 2017, eq. 1-2, starting with r = x, x_hat' = 0 and g = 1.

    b = B(E(g r)), x_hat = D(b) / g + gamma x_hat', r = x - x_hat.
    """
    network = narrow(cell, reconstruction).eval()
    x = images()
    gamma = 0 if reconstruction == "one_shot" else 1
    residual, x_hat, gain = x.numpy(), np.zeros_like(x.numpy()), np.ones_like(x.numpy())
    encoder_state = decoder_state = None
    differences = []
    for step in network.unroll(x, 4):
        features, encoder_state = network.encoder(torch.from_numpy(gain * residual), encoder_state)
        y = np.tanh(network.binarizer.features(features).numpy())
        bits = np.where(y >= 0, 1, -1).astype(np.float32)
        output, decoder_state = network.decoder(torch.from_numpy(bits), decoder_state, None)
        previous, x_hat = x_hat, output.numpy() / gain + gamma * x_hat
        residual = x.numpy() - x_hat
        if reconstruction == "residual_scaling":
            assert network.gain is not None
            gain = network.gain(torch.from_numpy(x_hat)).numpy()
        np.testing.assert_array_equal(step.bits.numpy(), bits)
        np.testing.assert_allclose(step.state.y_hat.numpy(), x_hat, rtol=0, atol=1e-6)
        differences.append(np.abs(x_hat - previous).max())
    assert min(differences) > 1e-3  # every iteration changed something


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_decoding_the_bits_gives_the_same_reconstructions(cell, reconstruction, training):
    network = narrow(cell, reconstruction).train(training)
    torch.manual_seed(1)
    encoded = list(network.unroll(images(), 4))
    assert len({tuple(step.bits.flatten().tolist()) for step in encoded}) == 4
    state = None
    for step in encoded:
        decoded = network(state, bits=step.bits)
        state = decoded.state
        assert torch.equal(decoded.bits, step.bits)
        assert torch.equal(decoded.state.y_hat, step.state.y_hat)


@torch.no_grad()
def test_a_decoder_holds_no_encoder_state():
    network = narrow().eval()
    first, second = network.unroll(images(), 2)
    assert first.state.encoder is not None
    assert second.state.encoder is not None
    decoded = network(bits=first.bits)
    assert decoded.state.encoder is None
    decoded = network(decoded.state, bits=second.bits)
    assert decoded.state.encoder is None
    assert torch.equal(decoded.state.y_hat, second.state.y_hat)
    # Nor does decoding read the encoder's weights.
    for parameter in [*network.encoder.parameters(), *network.binarizer.parameters()]:
        parameter.fill_(torch.nan)
    assert torch.equal(network(bits=first.bits).state.y_hat, first.state.y_hat)


@torch.no_grad()
def test_a_step_leaves_the_state_it_was_given_unchanged():
    for cell in CELLS:
        network = narrow(cell, "residual_scaling").eval()
        x = images()
        state = network(y=x).state
        once, again = network(state, y=x), network(state, y=x)
        assert torch.equal(once.bits, again.bits)
        assert torch.equal(once.state.y_hat, again.state.y_hat)


@torch.no_grad()
def test_mixed_precision_sums_reconstructions_in_float32():
    network = narrow().eval()
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = network.unroll(x, 2)
        output, _ = network.decoder(second.bits, first.state.decoder, first.state.y_hat)
        decoded = network(network(bits=first.bits).state, bits=second.bits)
    assert output.dtype == torch.bfloat16
    assert second.state.y_hat.dtype == torch.float32
    assert torch.equal(second.state.y_hat, first.state.y_hat + output.float())
    assert set(second.bits.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(decoded.state.y_hat, second.state.y_hat)


def test_a_step_needs_an_image_or_bits():
    with pytest.raises(ValueError, match="an image to encode or bits to decode"):
        narrow()()


@pytest.mark.parametrize("binarizer", ["stochastic", "sign", "noise"])
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_reaches_every_parameter_in_two_iterations(cell, reconstruction, binarizer):
    network = narrow(cell, reconstruction, binarizer=binarizer)
    x = images()
    torch.stack([(x - step.state.y_hat).abs().mean() for step in network.unroll(x, 2)]).mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_fresh_output_layer_starts_near_zero():
    """The sum of sixteen untrained iterations is small, so that training starts from the residual x."""
    torch.manual_seed(0)
    network = RecurrentCodec(NetworkConfig(**NARROW)).eval()
    with torch.no_grad():
        *_, last = network.unroll(images(), 16)
    assert last.state.y_hat.abs().mean() < 0.5


# The gain of residual scaling


def test_gain_is_a_five_layer_network_shifted_above_one():
    torch.manual_seed(0)
    network = GainNetwork((4, 5, 6, 7))
    x_hat = images(2, 64, 96)
    expected = x_hat
    for layer in network.layers:
        assert isinstance(layer, torch.nn.Conv2d)
        expected = F.conv2d(expected, layer.weight, layer.bias, stride=2, padding=1)
        expected = torch.where(expected > 0, expected, torch.exp(expected) - 1)
    assert len(network.layers) == 5
    assert expected.shape == (2, 1, 2, 3)
    expected = np.kron(expected.detach().numpy() + 2, np.ones((32, 32)))
    np.testing.assert_allclose(network(x_hat).detach().numpy(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 80), (16, 16), (31, 33), (112, 16)])
def test_gain_is_above_one_and_constant_in_each_block(height, width):
    torch.manual_seed(0)
    network = GainNetwork((8, 8, 8, 8))
    for layer in network.layers:
        assert isinstance(layer, torch.nn.Conv2d)
        torch.nn.init.normal_(layer.weight, std=0.3)
    gain = network(images(2, height, width))
    assert gain.shape == (2, 1, height, width)
    assert (gain > 1).all()
    blocks = [
        gain[:, :, top : top + 32, left : left + 32] for top in range(0, height, 32) for left in range(0, width, 32)
    ]
    for block in blocks:
        assert torch.equal(block, block[:, :, :1, :1].expand_as(block))
    assert len({block[0, 0, 0, 0].item() for block in blocks}) == len(blocks)


@torch.no_grad()
def test_only_residual_scaling_has_a_gain():
    assert [narrow(reconstruction=name).gain is not None for name in RECONSTRUCTIONS] == [False, False, True]


# Patch models


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoder_cell", "decoder_cell", "reconstruction"),
    [("none", "none", "additive"), ("lstm", "lstm", "one_shot"), ("none", "gru", "additive")],
)
def test_patches_are_coded_independently(encoder_cell, decoder_cell, reconstruction):
    network = lively(
        **PATCHES, encoder_cell=encoder_cell, decoder_cell=decoder_cell, reconstruction=reconstruction
    ).eval()
    network.double()  # sums over other batches and sizes are rounded differently
    x = images(1, 24, 32).double()
    changed = x.clone()
    changed[:, :, 8:16, 16:24] *= -1
    pixels = torch.ones(24, 32, dtype=torch.bool)
    pixels[8:16, 16:24] = False
    patches = torch.ones(3, 4, dtype=torch.bool)
    patches[1, 2] = False
    steps = list(network.unroll(x, 3))
    changed_steps = list(network.unroll(changed, 3))
    alone = list(network.unroll(changed[:, :, 8:16, 16:24], 3))
    for step, other, patch in zip(steps, changed_steps, alone, strict=True):
        assert step.bits.shape == (1, 4, 3, 4)  # 4 bits for 8x8 pixels: 1/16 bpp
        assert torch.equal(step.bits[:, :, patches], other.bits[:, :, patches])
        torch.testing.assert_close(step.state.y_hat[:, :, pixels], other.state.y_hat[:, :, pixels], rtol=0, atol=1e-6)
        assert torch.equal(other.bits[:, :, 1, 2], patch.bits[:, :, 0, 0])
        torch.testing.assert_close(other.state.y_hat[:, :, 8:16, 16:24], patch.state.y_hat, rtol=0, atol=1e-6)
    assert any(
        not torch.equal(step.bits[:, :, 1, 2], other.bits[:, :, 1, 2])
        for step, other in zip(steps, changed_steps, strict=True)
    )


@torch.no_grad()
def test_fully_connected_model_is_a_multilayer_perceptron():
    """An additive step of the feed-forward patch model equals matrix products over flattened patches."""
    network = lively(**PATCHES, encoder_cell="none", decoder_cell="none").eval()

    def dense(layer, x):
        return x @ layer.weight[:, :, 0, 0].T + layer.bias

    x = images(1, 16, 24)
    h = x.reshape(3, 2, 8, 3, 8).permute(1, 3, 0, 2, 4).reshape(6, 192)  # a row for each patch: channel, row, column
    for layer in [network.encoder.stem, *(cell.input for cell in network.encoder.cells)]:
        h = torch.tanh(dense(layer, h))
    bits = torch.where(dense(network.binarizer.features, h) >= 0, 1.0, -1.0)
    step = network(y=x)
    assert torch.equal(step.bits, bits.T.reshape(1, 4, 2, 3))


# Configuration


def test_default_config():
    """The defaults are those of Toderici et al. 2017, with 32 bits for each 16x16 block."""
    config = NetworkConfig()
    assert (config.encoder_cell, config.decoder_cell) == ("lstm", "lstm")
    assert config.bits == 32
    assert config.stride == 16
    assert NetworkConfig(**PATCHES).stride == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_hidden_kernels": (1, 1)}, "encoder_channels .* need 3 hidden kernels"),
        ({"decoder_hidden_kernels": (1, 1, 3, 3, 3)}, "decoder_channels .* need 4 hidden kernels"),
        ({"encoder_hidden_kernels": (1, 2, 1)}, "encoder needs .* odd hidden kernels"),
        ({"decoder_hidden_kernels": (1, 1, 3, 4)}, "decoder needs .* odd hidden kernels"),
        ({"encoder_channels": (64, 256, 512), "encoder_hidden_kernels": (1, 1)}, "3 halvings"),
        ({"decoder_channels": (512, 512, 512, 256, 126)}, "multiples of 4"),
        ({"decoder_channels": (0, 512, 512, 256, 128)}, "positive channels"),
        ({"reconstruction": "Additive"}, "one_shot, additive, residual_scaling"),
        ({"encoder_cell": "rnn"}, "encoder_cell is one of none, lstm"),
        ({"reconstruction": "residual_scaling", "patch_size": 8}, "across patches"),
        ({"bits": 0}, "at least 1"),
        ({"patch_size": 0}, "at least 1"),
    ],
)
def test_inconsistent_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**options)


def test_first_decoder_channels_need_not_be_a_multiple_of_4():
    step = narrow(decoder_channels=(7, 12, 8, 8, 8))(y=images())
    assert step.state.y_hat.shape == (1, 3, 48, 80)


# GPU


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_cpu_and_gpu_agree(cell, reconstruction):
    """The first bits agree except where features are nearly zero, and equal bits decode to equal images."""
    network = narrow(cell, reconstruction).eval()
    x = images()
    encoded = list(network.unroll(x, 4))
    network.cuda()
    first = network(y=x.cuda())
    assert (first.bits.cpu() == encoded[0].bits).double().mean() > 0.98
    state = None
    for step in encoded:
        decoded = network(state, bits=step.bits.cuda())
        state = decoded.state
        torch.testing.assert_close(decoded.state.y_hat.cpu(), step.state.y_hat, rtol=0, atol=5e-3)


# Wider networks


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.widens])
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_a_widened_network_codes_alike_and_every_new_channel_can_learn(cell, reconstruction):
    network = narrow(cell, reconstruction).eval()
    channels: dict[str, Any] = dict(
        encoder_channels=(6, 8, 20, 12), decoder_channels=(12, 16, 8, 12, 16), gain_channels=(4, 6, 4, 5)
    )
    config = replace(network.config, binarizer="sign", **channels)
    wide = widened(network, config)
    assert wide.config == config
    x = images()
    steps = list(wide.eval().unroll(x, 3))
    for step, expected in zip(steps, network.unroll(x, 3), strict=True):
        assert torch.equal(step.bits, expected.bits)
        torch.testing.assert_close(step.state.y_hat, expected.state.y_hat, atol=1e-5, rtol=1e-4)
    optimizer = torch.optim.SGD(wide.parameters(), 0.1)
    for _ in range(2):  # the first step gives the new channels listeners, which lead gradients to them in the second
        optimizer.zero_grad()
        torch.stack([(x - step.state.y_hat).abs().mean() for step in wide.train().unroll(x, 2)]).mean().backward()
        optimizer.step()
    for name, parameter in wide.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        assert gradient.flatten(1).abs().sum(1).ne(0).all() if gradient.ndim > 1 else gradient.ne(0).all(), name


def test_fresh_kernels_are_about_as_large_as_the_old_ones():
    network = narrow().eval()
    wide = widened(network, replace(network.config, encoder_channels=(4, 128, 16, 128)))
    for cell in (0, 2):  # one gets more outputs, the other more inputs as well
        old, new = (net.encoder.cells[cell].get_parameter("input.weight") for net in (network, wide))
        for before, after in zip(old.chunk(4), new.chunk(4), strict=True):
            assert torch.equal(after[: before.shape[0], : before.shape[1]], before)
            fresh = after[before.shape[0] :]
            ratio = fresh.square().mean() * fresh.shape[1] / (before.square().mean() * before.shape[1])
            assert 0.8 < ratio < 1.6


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 8},
        {"reconstruction": "one_shot"},
        {"decoder_cell": "gru"},
        {"encoder_channels": (4, 8, 8, 4)},
        {"gain_channels": (4,) * 5},
    ],
)
def test_what_is_not_wider_is_refused(changes):
    network = narrow()
    with pytest.raises(ValueError, match=r"can only become wider|fewer channels"):
        widened(network, replace(network.config, **changes))
    associative = narrow("associative_lstm")
    assert widened(associative, associative.config).config == associative.config
    with pytest.raises(ValueError, match="cells of the kind associative_lstm"):
        widened(associative, replace(associative.config, encoder_channels=(4, 8, 8, 16)))
