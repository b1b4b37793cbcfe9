"""Tests of the latent network: its step against NumPy, its start from images, missing bits, windows, files."""

import copy
import io
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from rnncodec.codec import Codec
from rnncodec.data import PatchDataModule
from rnncodec.entropy import ContextConfig, ContextModel
from rnncodec.files import format
from rnncodec.files.images import load_image
from rnncodec.network import (
    LatentConfig,
    NetworkConfig,
    RecurrentCodec,
    latent,
    network_config,
    pad_to_blocks,
    to_uint8,
)
from rnncodec.training.context import JointTraining, start_context
from rnncodec.training.module import START_BLOCKS
from rnncodec.weights import WeightsError, load_weights, save_weights

TINY = LatentConfig(
    iterations=4,
    bits=16,
    groups=4,
    latents=24,
    encoder_channels=8,
    decoder_channels=12,
    mixed=8,
    around=6,
    analysis_channels=(8, 8, 8),
    synthesis_channels=(8, 8, 8),
    synthesis_blocks=1,
)
# The networks of the tests below.
CONFIGS = {"tiny": TINY}


def images(photos, size=128):
    """Squares of photographs, [N, 3, size, size] in [-1, 1]."""
    tiles = []
    for path in sorted(photos.iterdir()):
        image = torch.from_numpy(load_image(path)).permute(2, 0, 1)
        tiles += [
            image[:, y : y + size, x : x + size]
            for y in range(0, image.shape[1] - size + 1, size)
            for x in range(0, image.shape[2] - size + 1, size)
        ]
    return torch.stack(tiles).float() / 127.5 - 1


def started(photos, config):
    """A network that has started from photographs, and whose silent layers have begun to speak."""
    torch.manual_seed(0)
    network = RecurrentCodec(config)
    network.start(images(photos))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.05)
    return network


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def network(photos, kind):
    return started(photos, CONFIGS[kind]).eval()


@pytest.fixture(scope="module")
def codec(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "latent.safetensors"
    save_weights(path, network, "latent")
    return Codec(load_weights(path))


def convolve(x, layer):
    """A 1x1 or 3x3 convolution with zeros beyond the border, [C, H, W]."""
    weight, bias = layer.weight.detach().double().numpy(), layer.bias
    r = weight.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (r, r), (r, r)))
    _, height, width = x.shape
    out = sum(
        np.einsum("oi,ihw->ohw", weight[:, :, i, j], padded[:, i : i + height, j : j + width])
        for i in range(2 * r + 1)
        for j in range(2 * r + 1)
    )
    return out if bias is None else out + bias.detach().double().numpy()[:, None, None]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, cell, state):
    gates = convolve(x, cell.input)
    if state is not None:
        gates = gates + convolve(state[0], cell.hidden)
    i, f, o, j = np.split(gates, 4)
    memory = sigmoid(i) * np.tanh(j) + (0 if state is None else sigmoid(f) * state[1])
    return sigmoid(o) * np.tanh(memory), (sigmoid(o) * np.tanh(memory), memory)


def look(x, module, bias):
    mixed = convolve(x, module.mixed)
    around = np.maximum(convolve(np.maximum(mixed, 0), module.around) + bias, 0)
    return np.concatenate([mixed, around])


def test_step_is_that_of_the_equations(network, photos):
    """r = y - y_hat; bits by the questions, moved by E(r / scale); y_hat += values + D(values / scale, y_hat)."""
    x = images(photos)[3:4, :, :48, :64]
    y = network.analyse(x).detach()
    questions, encoder, decoder = network.binarizer.questions, network.encoder, network.decoder
    y_hat, encoded, decoded = np.zeros(y.shape[1:]), None, None
    known, received = questions.start(y), 0
    for t, step in enumerate(network.unroll(y, 4)):
        residual = y[0].double().numpy() - y_hat
        scaled = residual / encoder.scale[t].detach().numpy()[:, None, None]
        seen = look(scaled, encoder.look, encoder.bias[t].detach().numpy()[:, None, None])
        hidden, encoded = lstm(seen, encoder.cell, encoded)
        offset = torch.from_numpy(convolve(hidden, encoder.output)).float()[None]
        bits = questions.ask(torch.tensor(t), known, torch.from_numpy(residual).float()[None], offset).bits
        assert (bits != step.bits).float().mean() < 0.002  # where rounding decides
        answered = questions.values(torch.tensor(t), known, step.bits)
        known, added = answered.known, answered.added[0].detach().double().numpy()
        received += TINY.groups
        y_hat = y_hat + added
        scaled = added / decoder.scale[t].detach().numpy()[:, None, None]
        bias = decoder.received.weight[received].detach().numpy()[:, None, None]
        hidden, decoded = lstm(look(np.concatenate([scaled, y_hat]), decoder.look, bias), decoder.cell, decoded)
        y_hat = y_hat + convolve(hidden, decoder.output)
        np.testing.assert_allclose(step.state.y_hat[0].detach().numpy(), y_hat, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_bands_of_rows_leave_no_trace(network, photos, monkeypatch, rows):
    """The LSTMs process large maps in bands of rows; bits and latents equal those of the whole map."""
    x = images(photos)[:2, :, :112, :80]
    with torch.no_grad():
        y = network.analyse(x)
        whole = list(network.unroll(y, 4))
        monkeypatch.setattr(latent, "BAND", 5 * rows + 4)
        state = None
        for expected, step in zip(whole, network.unroll(y, 4), strict=True):
            assert torch.equal(step.bits, expected.bits)
            torch.testing.assert_close(step.state, expected.state, rtol=1e-4, atol=1e-5)
            state = network(state, bits=step.bits).state
            assert torch.equal(state.y_hat, step.state.y_hat)


def test_decoder_follows_the_encoder(network, photos):
    state = None
    with torch.no_grad():
        for step in network.unroll(network.analyse(images(photos)[:2]), 4):
            decoded = network(state, bits=step.bits)
            state = decoded.state
            assert torch.equal(state.y_hat, step.state.y_hat)
            assert torch.equal(network.picture(state), network.picture(step.state))
            assert state.encoder is None


def test_start_is_a_principal_component_codec(photos):
    """Components equal NumPy's, and the untrained network's pictures improve with every iteration."""
    torch.manual_seed(0)
    network, x = RecurrentCodec(TINY).eval(), images(photos)
    network.start(x)
    blocks = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).reshape(-1, 768).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(blocks.T, bias=True))
    components = vectors[:, ::-1][:, : TINY.latents]
    kernels = network.transforms.analysis.linear.weight.detach().reshape(TINY.latents, 768).double().numpy()
    along = np.abs(np.sum(kernels.T * components, 0)) / np.linalg.norm(kernels, axis=1)
    assert along[:10] == pytest.approx(np.ones(10), abs=1e-3)
    scale = values[::-1][: TINY.latents] ** -0.25
    assert np.linalg.norm(kernels, axis=1) == pytest.approx(scale, rel=1e-3)
    with torch.no_grad():
        y = network.analyse(x[:4])
        # All components together: the projection, up to the mean of each pixel of a block.
        state = next(network.unroll(y, 1)).state
        whole = network.picture(state._replace(y_hat=y))
        errors = [(network.picture(step.state) - x[:4]).square().mean().item() for step in network.unroll(y, 4)]
    color = blocks.mean(0).reshape(3, 256).mean(1).repeat(256)
    first = x[0].unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(-1, 768).double().numpy() - color
    expected = first @ components @ components.T + color
    found = whole[0].unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(-1, 768).double().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[0]


def test_pixel_networks_do_not_start_from_images(photos):
    with pytest.raises(ValueError, match="only a latent network"):
        RecurrentCodec(NetworkConfig(encoder_channels=(8, 8, 8, 8), decoder_channels=(8, 8, 8, 8, 8))).start(
            images(photos)
        )


def test_missing_bits_are_zeros_to_the_decoder(network, photos):
    y = network.analyse(images(photos)[:1]).detach()
    limit = torch.randint(0, 17, y[:, 0].shape, generator=torch.Generator().manual_seed(0))
    state = None
    with torch.no_grad():
        for step in network.unroll(y, 4, limit):
            decoded = network(state, bits=step.bits)
            state = decoded.state
            assert torch.equal(state.y_hat, step.state.y_hat)
    assert torch.equal(state.decoder.received, limit)  # pyright: ignore[reportOptionalMemberAccess]
    *_, unlimited = network.unroll(y, 4, torch.full_like(limit, 16))
    *_, whole = network.unroll(y, 4)
    assert torch.equal(unlimited.bits, whole.bits)


def test_gradients_reach_everything(photos, kind):
    network, x = started(photos, CONFIGS[kind]), images(photos)[:4]
    errors = [(network.picture(s.state) - x).square().mean() for s in network.unroll(network.analyse(x), 4)]
    torch.stack(errors).log().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 40), (100, 133), (1, 300)])
def test_files(codec, size, photos):
    height, width = size
    image = load_image(photos / "coffee.png")[50 : 50 + height, 60 : 60 + width]
    data = codec.encode(image)
    assert (format.read_header(data).bits, format.read_header(data).iterations) == (16, 4)
    x = torch.from_numpy(np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="edge"))
    with torch.inference_mode():
        y = codec.network.analyse(
            (2 * x.float() / 255 - 1).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
        )
        steps = list(codec.network.unroll(y, 4))
        pictures = [
            to_uint8(codec.network.picture(s.state))[0].permute(1, 2, 0)[:height, :width].numpy() for s in steps
        ]
    np.testing.assert_array_equal(codec.read_bits(data), [s.bits[0].numpy() for s in steps])
    for k, shown in enumerate(codec.decode_progressive(data), 1):
        np.testing.assert_array_equal(shown, pictures[k - 1])
        np.testing.assert_array_equal(np.asarray(codec.decode(data, k)), pictures[k - 1])
        np.testing.assert_array_equal(np.asarray(codec.decode(format.truncate(data, iterations=k))), pictures[k - 1])


@pytest.mark.parametrize("size", [(1, 65535), (65535, 2)])
def test_the_longest_sides(codec, size, photos):
    """With many windows and bands, the prefix of a file still equals the file of fewer iterations."""
    strip = load_image(photos / "coffee.png")[:2].reshape(-1, 3)
    image = np.resize(strip, (*size, 3))
    data = codec.encode(image, 2)
    shown = list(codec.decode_progressive(data))
    assert np.asarray(codec.decode(data)).shape == image.shape
    np.testing.assert_array_equal(np.asarray(codec.decode(data, 1)), shown[0])
    np.testing.assert_array_equal(np.asarray(codec.decode(data)), shown[1])
    assert codec.encode(image, 1) == format.truncate(data, iterations=1)
    errors = [np.square(x.astype(float) - image).mean() for x in shown]
    assert errors[1] < errors[0] < image.astype(float).var()


@pytest.mark.parametrize("tile", [16, 64, 200])
def test_windows_leave_no_trace(codec, tile, photos):
    image = load_image(photos / "coffee.png")[:205, :301]
    windowed = Codec(load_weights_of(codec), tile=tile)
    whole, parts = codec.encode(image), windowed.encode(image)
    different = codec.read_bits(whole) != windowed.read_bits(parts)
    assert different.mean() < 1e-3  # only where rounding decides
    a, b = np.asarray(codec.decode(whole)).astype(int), np.asarray(windowed.decode(whole)).astype(int)
    assert np.abs(a - b).max() <= 1
    assert (a != b).mean() < 1e-3


def test_very_large_maps_are_coded_in_bands_of_rows(codec, photos, monkeypatch):
    """Bands are coded independently after the analysis, which sees beyond them: latents are cut, not pixels."""
    image = load_image(photos / "coffee.png")[:330, :400]
    rows, columns = 21, 25
    x = 2 * torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - 1
    with torch.no_grad():
        y = codec.network.analyse(pad_to_blocks(x, 16))
        cuts = [y[:, :, top : top + 6] for top in range(0, rows, 6)]
        bands = [[step.bits[0] for step in codec.network.unroll(cut, 3)] for cut in cuts]
    monkeypatch.setattr("rnncodec.tiling.MAP", 6 * columns + 3)
    data = codec.encode(image, 3)
    found = codec.read_bits(data)
    assert found.shape[2:] == (rows, columns)
    expected = np.stack([torch.cat([band[t] for band in bands], 1).numpy() for t in range(3)])
    assert (found != expected).mean() < 1e-3  # only where rounding decides
    for k, shown in enumerate(codec.decode_progressive(data), 1):
        np.testing.assert_array_equal(np.asarray(codec.decode(data, k)), shown)
    error = np.square(np.asarray(codec.decode(data)).astype(float) - image).mean((1, 2))
    assert error.reshape(-1, 6)[15:17].mean() < 2 * error.mean()  # around the first cut
    best = 10 * np.log10(255**2 / error.mean())
    assert format.read_header(codec.encode(image, psnr=best - 0.01)).iterations == 3


def test_bfloat16_changes_decisions_and_pictures_but_never_the_loop(network, photos):
    """Files decode everywhere, because the decoder's states equal those of float32 exactly."""
    x = images(photos)[:1, :, :96, :96]
    fast = copy.deepcopy(network)
    fast.in_bfloat16 = True
    with torch.no_grad():
        y, other = network.analyse(x), fast.analyse(x)
        assert y.dtype == other.dtype == torch.float32
        assert not torch.equal(y, other)
        torch.testing.assert_close(y, other, rtol=0.02, atol=0.02)
        state = None
        for step in fast.unroll(other, 4):
            state = network(state, bits=step.bits).state
            assert torch.equal(step.state.y_hat, state.y_hat)
            for ours, theirs in zip(step.state.decoder.cell, state.decoder.cell, strict=True):
                assert torch.equal(ours, theirs)
        shown, exact = fast.picture(state), network.picture(state)
        assert not torch.equal(shown, exact)
        torch.testing.assert_close(shown, exact, rtol=0, atol=0.02)


def test_files_made_in_bfloat16(codec, photos):
    image = load_image(photos / "coffee.png")[:128, :128]
    expected = codec.encode(image)
    fast = Codec(load_weights_of(codec), bfloat16=True)
    assert (codec.network.in_bfloat16, fast.network.in_bfloat16) == (False, True)  # each computes in its own way
    data = fast.encode(image)
    error = [
        np.square(np.asarray(c.decode(d)).astype(float) - image).mean()
        for c, d in ((codec, expected), (codec, data), (fast, data))
    ]
    assert error == pytest.approx([error[0]] * 3, rel=0.05)


def load_weights_of(codec):
    """The weights of a codec as a file would give them."""
    from rnncodec.weights import Weights

    return Weights(codec.network, codec.name, codec.fingerprint, codec.provenance)


def test_halos_are_the_reach_of_the_transforms(network, photos):
    """A change in a block affects the analysis, and one of a latent the picture, no farther than the halos."""
    x = images(photos, 256)[:1].clone()
    reached = [0, 0]
    for middle in (7, 8):
        changed = x.clone()
        changed[..., middle * 16 : middle * 16 + 16, middle * 16 : middle * 16 + 16] *= -1
        with torch.no_grad():
            y, other = network.analyse(x), network.analyse(changed)
            rows = (y != other).any(1).any(-1)[0].nonzero()
            state = next(network.unroll(y, 1)).state
            y_hat = state.y_hat.clone()
            y_hat[..., middle, middle] += 100
            pictures = network.picture(state), network.picture(state._replace(y_hat=y_hat))
        lines = (pictures[0] != pictures[1]).any(1).any(-1)[0].nonzero() // 16
        for i, found in enumerate((rows, lines)):
            reached[i] = max(reached[i], int((found - middle).abs().max()))
    assert tuple(reached) == network.transforms.halos
    assert network.config != TINY or reached == [5, 4]


def test_psnr_target(codec, photos):
    image = load_image(photos / "coffee.png")[:128, :128]
    pictures = list(codec.decode_progressive(codec.encode(image)))
    reached = [10 * np.log10(255**2 / np.square(p.astype(float) - image).mean()) for p in pictures]
    data = codec.encode(image, psnr=reached[1] - 0.01)
    assert format.read_header(data).iterations == 2


def test_weights_come_back(network, codec):
    assert codec.config == network.config
    for key, value in network.state_dict().items():
        found = codec.network.state_dict()[key]
        assert found.dtype == value.dtype
        assert torch.equal(found, value.half().float() if value.is_floating_point() else value)
    assert network_config(asdict(network.config)) == network.config
    assert network_config(asdict(NetworkConfig())) == NetworkConfig()


@pytest.mark.parametrize(
    ("name", "value"), [("channel", 24), ("channel", -1), ("cost", -1), ("cost", 2**20), ("edges", -5)]
)
def test_questions_that_cannot_be_asked_are_refused(network, name, value, tmp_path):
    questions = network.binarizer.questions
    tensor = getattr(questions, name)
    before = tensor.flatten()[0].item()
    tensor.view(-1)[0] = value
    try:
        with pytest.raises(WeightsError, match=f"questions.{name} holds numbers beyond"):
            save_weights(tmp_path / "bad.safetensors", network, "bad")
    finally:
        tensor.view(-1)[0] = before


def test_edges_may_be_as_large_as_sums_of_costs(network, tmp_path):
    edges = network.binarizer.questions.edges
    before = edges.clone()
    edges.fill_(2**30)
    save_weights(tmp_path / "busy.safetensors", network, "busy")
    edges.copy_(before)
    assert (load_weights(tmp_path / "busy.safetensors").recurrent.binarizer.questions.edges == 2**30).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 18}, "18 bits are not 4 groups"),
        ({"latents": 3}, "of different channels of 3"),
        ({"iterations": 0}, "at least 1"),
        ({"analysis_channels": (8, 8)}, "three scales"),
        ({"synthesis_channels": (8, 0, 8)}, "at least 1"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_an_image_object_is_encoded_like_its_pixels(codec, photos):
    array = load_image(photos / "chelsea.png")[:64, :64]
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    assert codec.encode(Image.open(buffer), 2) == codec.encode(array, 2)


@torch.no_grad()
def test_validation_measures_the_iterations_that_the_network_has():
    module = JointTraining(network=asdict(TINY), context=ContextConfig("grouped", channels=4), iterations=24)
    assert module.iterations == 4
    found = module.eval().validation_step(torch.rand(1, 3, 64, 64) * 2 - 1, 1)
    means = found["values"]
    assert "psnr_4" in means
    assert "psnr_8" not in means
    assert [point.setting for point in module.curve(means)] == [1, 2, 4]


def test_a_new_context_model_starts_from_the_odds_of_given_weights(network, tmp_path):
    path = tmp_path / "latent.safetensors"
    save_weights(path, network, "latent")
    module = JointTraining(network=asdict(TINY), weights=str(path), distortion="rmse")
    # The cost of a yes and of a no, in 1/256 bit.
    no, yes = module.network.binarizer.questions.cost.view(4, 16, -1, 2).double().unbind(-1)
    assert yes.any()
    expected = (no - yes) / 256 * np.log(2)
    torch.testing.assert_close(module.context.grouped.odds.double(), expected, atol=1e-4, rtol=0)


def test_grouped_context_model_codes_the_bits_of_a_codec(network, photos, tmp_path):
    """Files coded with the exact model decode to the same bits as raw files and are shorter."""
    context = ContextModel(ContextConfig(kind="grouped", bits=16, groups=4, channels=8, iterations=4))
    start_context(context, network)
    torch.manual_seed(0)
    with torch.no_grad():
        context.grouped.output.map.normal_(std=0.05)
    path = tmp_path / "latent.safetensors"
    save_weights(path, network, "latent", context=context.quantize())
    codec = Codec(load_weights(path))
    image = load_image(photos / "coffee.png")[:170, :200]
    raw, coded = codec.encode(image, entropy="none"), codec.encode(image)
    header = format.read_header(coded)
    assert header.context == codec.context_fingerprint
    assert all(it.coding == format.CONTEXT for it in header.entries)
    assert len(coded) < len(raw)
    np.testing.assert_array_equal(codec.read_bits(coded), codec.read_bits(raw))
    for k in range(1, 5):
        assert codec.decode(format.truncate(coded, iterations=k)) == codec.decode(raw, k)
    # By the float model's probabilities, the payloads are as long as they should be.
    planes = torch.from_numpy(codec.read_bits(raw)).float()[:, None]
    state, cases = None, []
    with torch.no_grad():
        for bits in planes:
            step = codec.network(state, bits=bits)
            state = step.state
            cases.append(step.cases)
        logits = context.eval()(planes, torch.stack(cases))
    ideal = torch.nn.functional.softplus(-logits * planes).sum((1, 2, 3, 4)) / np.log(2) / 8
    for it, length in zip(header.entries, ideal.tolist(), strict=True):
        assert it.length == pytest.approx(length, rel=0.02, abs=10)


def test_a_grouped_context_model_needs_the_groups_of_its_network(network, tmp_path):
    context = ContextModel(ContextConfig(kind="grouped", bits=16, groups=2, channels=8, iterations=4)).quantize()
    path = tmp_path / "bad.safetensors"
    save_weights(path, network, "bad", context=context)
    with pytest.raises(WeightsError, match="needs a latent network of as many groups"):
        load_weights(path)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RNNCODEC_PHOTOS"), reason="needs RNNCODEC_PHOTOS, a folder to train on")
def test_an_untrained_network_is_a_decent_codec(tmp_path, capsys):
    """With only components and tables, the default network has 28.8 dB at 0.75 bpp on held-out photographs."""
    data = PatchDataModule(os.environ["RNNCODEC_PHOTOS"], cache_dir=tmp_path, tile_size=192, patch_size=128)
    data.prepare_data()
    data.setup()
    network = RecurrentCodec(LatentConfig()).eval()
    network.start(data.sample(START_BLOCKS * 256))
    odds = network.binarizer.questions.odds()
    rates, psnrs = [], []
    for image in data.val_dataloader():
        x = image.float() / 127.5 - 1
        with torch.no_grad():
            steps = list(network.unroll(network.analyse(x), 16))
            planes = torch.stack([step.bits for step in steps])
            cases = torch.stack([step.cases for step in steps if step.cases is not None])
            rows = cases.long().flatten(3).permute(0, 2, 1, 3).flatten(2)  # [T, bits, blocks]
            logits = odds[:16].gather(2, rows).reshape(planes.permute(0, 2, 1, 3, 4).shape).permute(0, 2, 1, 3, 4)
            bits = torch.nn.functional.softplus(-logits * planes).sum((1, 2, 3, 4)) / np.log(2)
            rates.append((bits.cumsum(0) / (x.shape[2] * x.shape[3])).numpy())
            pictures = [to_uint8(network.picture(step.state)) for step in steps]
        psnrs.append([10 * np.log10(255**2 / (p.double() - image).square().mean().item()) for p in pictures])
    rate, quality = np.mean(rates, 0), np.mean(psnrs, 0)
    with capsys.disabled():
        print("".join(f"\n{k:2} {rate[k - 1]:.4f} bpp {quality[k - 1]:.2f} dB" for k in (1, 2, 4, 8, 16)))
    assert np.interp(np.log(0.75), np.log(rate), quality) > 28.8
