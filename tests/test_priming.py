"""Tests of priming and diffusion: against NumPy, and that decoder, files, tiles, stops and weights go along."""

import json
from dataclasses import replace

import numpy as np
import pytest
import test_codec
import test_training
import torch
import yaml
from test_cells import ReferenceLSTM, array, convolve
from test_latent import TINY, look, lstm, started
from test_latent import convolve as convolve_one
from test_latent import images as photographs
from test_network import NARROW, RECONSTRUCTIONS, images, narrow
from test_weights import parse, rewrite

import compare
from rnncodec.codec import Codec
from rnncodec.files import format
from rnncodec.files.images import load_image
from rnncodec.network import CELLS, NetworkConfig, RecurrentCodec, latent, network_config, places, widened
from rnncodec.network.priming import MOST, ExtraRuns
from rnncodec.tiling import receptive_field
from rnncodec.training import cli as training_cli
from rnncodec.training.export import load_checkpoint
from rnncodec.training.module import CodecTraining
from rnncodec.weights import WeightsError, load_weights, save_weights

RUNS = [(3, 0), (0, 1), (2, 1)]


def squares(x):
    """Depth-to-space of [B, 4 C, H, W], as a table of its moves."""
    batch, channels, height, width = x.shape
    y = np.zeros((batch, channels // 4, 2 * height, 2 * width))
    for channel in range(channels):
        y[:, channel // 4, channel % 4 // 2 :: 2, channel % 2 :: 2] = x[:, channel]
    return y


@pytest.fixture(scope="module")
def unprimed(photos):
    """A latent network without extra runs."""
    return started(photos, TINY).eval()


# The rule of the paper


@torch.no_grad()
@pytest.mark.parametrize(("priming", "diffusion"), RUNS)
def test_the_lstm_of_2017_is_primed_as_in_the_paper(priming, diffusion):
    """Encoder and decoder run k more times on the first residual and the first bits, and only their states are kept.

    Johnston et al. 2018; with diffusion, likewise in each later iteration. The loop is written out in NumPy.
    """
    network = narrow(priming=priming, diffusion=diffusion).double().eval()
    assert network.config == replace(NetworkConfig(**NARROW), priming=priming, diffusion=diffusion)
    encoder = [ReferenceLSTM(cell, 2) for cell in network.encoder.cells]
    decoder = [ReferenceLSTM(cell, 1) for cell in network.decoder.cells]

    def weights(layer):
        return array(layer.weight), array(layer.bias)

    def encode(residual):
        features = convolve(residual, *weights(network.encoder.stem), stride=2)
        for cell in encoder:
            features = cell.step(features)
        return convolve(features, *weights(network.binarizer.features))

    def decode(bits):
        x = convolve(bits, *weights(network.decoder.stem))
        for cell in decoder:
            x = squares(cell.step(x))
        return np.tanh(convolve(x, *weights(network.decoder.output)))

    x = images(1, 16, 32).double()
    x_hat = np.zeros(x.shape)
    for t, step in enumerate(network.unroll(x, 3)):
        residual, extra = x.numpy() - x_hat, diffusion if t else priming
        for _ in range(extra):
            encode(residual)
        bits = np.where(encode(residual) >= 0, 1.0, -1.0)
        for _ in range(extra):
            decode(bits)
        x_hat = x_hat + decode(bits)
        np.testing.assert_array_equal(step.bits.numpy(), bits)
        np.testing.assert_allclose(step.state.y_hat.numpy(), x_hat, rtol=0, atol=1e-6)
        for part, references in ((step.state.encoder, encoder), (step.state.decoder, decoder)):
            for found, cell in zip(part, references, strict=True):
                for tensor, expected in zip(found, cell.state, strict=True):
                    np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("priming", "diffusion"), RUNS)
def test_the_latent_network_primes_its_cells(unprimed, photos, priming, diffusion):
    """Each cell takes the input of a pass again; what the binarizer says of a pass is asked once."""
    network = widened(unprimed, replace(TINY, priming=priming, diffusion=diffusion)).eval()
    y = network.analyse(photographs(photos)[3:4, :, :48, :64])
    encoder, decoder = network.encoder, network.decoder
    y_hat, encoded, decoded, hidden = np.zeros(y.shape[1:]), None, None, np.zeros(0)
    known = network.binarizer.questions.start(y)
    for t, step in enumerate(network.unroll(y, 3)):
        residual = y[0].double().numpy() - y_hat
        scaled = residual / encoder.scale[t].numpy()[:, None, None]
        seen = look(scaled, encoder.look, encoder.bias[t].numpy()[:, None, None])
        for _ in range(1 + (diffusion if t else priming)):
            hidden, encoded = lstm(seen, encoder.cell, encoded)
        offset = torch.from_numpy(convolve_one(hidden, encoder.output)).float()[None]
        asked = network.binarizer.questions.ask(
            torch.tensor(t), known, torch.from_numpy(residual).float()[None], offset
        )
        assert (asked.bits != step.bits).float().mean() < 0.002  # where rounding decides
        answered = network.binarizer.questions.values(torch.tensor(t), known, step.bits)
        known, added = answered.known, answered.added[0].double().numpy()
        scaled = added / decoder.scale[t].numpy()[:, None, None]
        bias = decoder.received.weight[TINY.groups * (t + 1)].numpy()[:, None, None]
        seen = look(np.concatenate([scaled, y_hat + added]), decoder.look, bias)
        for _ in range(1 + (diffusion if t else priming)):
            hidden, decoded = lstm(seen, decoder.cell, decoded)
        y_hat = y_hat + added + convolve_one(hidden, decoder.output)
        np.testing.assert_allclose(step.state.y_hat[0].numpy(), y_hat, atol=1e-4)
        assert decoded is not None
        np.testing.assert_allclose(step.state.decoder.cell[1][0].numpy(), decoded[1], atol=1e-4)


@torch.no_grad()
def test_priming_fills_the_states_and_costs_no_bits():
    plain, primed = narrow().eval(), narrow(priming=3).eval()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), primed.parameters(), strict=True))
    first, other = plain(y=images()), primed(y=images())
    assert other.bits.shape == first.bits.shape
    assert not torch.equal(other.state.decoder[0][1], first.state.decoder[0][1])
    assert not torch.equal(other.state.y_hat, first.state.y_hat)


# Encoder and decoder


@torch.no_grad()
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("cell", [name for name in CELLS if name != "none"])
def test_the_decoder_needs_nothing_but_the_bits(cell, reconstruction):
    network = narrow(cell, reconstruction, priming=2, diffusion=1).eval()
    encoded = list(network.unroll(images(), 4))
    assert len({tuple(step.bits.flatten().tolist()) for step in encoded}) == 4
    for parameter in [*network.encoder.parameters(), *network.binarizer.parameters()]:
        parameter.fill_(torch.nan)
    state = None
    for step in encoded:
        state = network(state, bits=step.bits).state
        assert torch.equal(state.y_hat, step.state.y_hat)
        assert state.encoder is None


@torch.no_grad()
def test_one_side_may_have_no_state():
    for cells in ({"encoder_cell": "none"}, {"decoder_cell": "none"}):
        network = narrow(priming=1, **cells).eval()
        first, second = network.unroll(images(), 2)
        state = network(network(bits=first.bits).state, bits=second.bits).state
        assert torch.equal(state.y_hat, second.state.y_hat)


@pytest.fixture(scope="module")
def codecs(unprimed, tmp_path_factory):
    """Codecs of primed networks, as their weights files give them."""
    folder, made = tmp_path_factory.mktemp("weights"), {}
    networks = {
        "pixels": test_codec.make_network(replace(test_codec.CONFIG, priming=3, diffusion=1)),
        "latent": widened(unprimed, replace(TINY, priming=2, diffusion=1)),
    }
    for name, network in networks.items():
        save_weights(folder / f"{name}.safetensors", network, name)
        made[name] = Codec(load_weights(folder / f"{name}.safetensors"))
        assert made[name].config == network.config
    return made


@pytest.mark.parametrize("name", ["pixels", "latent"])
def test_files_decode_as_the_encoder_predicted_and_are_prefixes(codecs, photos, name):
    codec = codecs[name]
    image = load_image(photos / "coffee.png")[60:97, 40:90]
    data = codec.encode(image, 4)
    x = np.pad(image, ((0, -37 % 16), (0, -50 % 16), (0, 0)), mode="edge").transpose(2, 0, 1)[None]
    with torch.inference_mode():
        y = codec.network.analyse(
            (2 * torch.from_numpy(x).float() / 255 - 1).contiguous(memory_format=torch.channels_last)
        )
        steps = list(codec.network.unroll(y, 4))
        predicted = [codec.network.picture(step.state).clamp(-1, 1)[0, :, :37, :50] for step in steps]
    np.testing.assert_array_equal(codec.read_bits(data), [step.bits[0].numpy() for step in steps])
    shown = list(codec.decode_progressive(data))
    for k, (picture, expected) in enumerate(zip(shown, predicted, strict=True), 1):
        np.testing.assert_array_equal(picture, ((expected + 1) * 127.5).round().numpy().transpose(1, 2, 0))
        cut = format.truncate(data, iterations=k)
        assert cut == codec.encode(image, k)
        np.testing.assert_array_equal(np.asarray(codec.decode(cut)), picture)


# Tiles


def test_halo_by_hand():
    # 3x3 kernels reach 30 px and 15 hops of 4 px between iterations 60 px; then a hop for each extra run.
    assert receptive_field(NetworkConfig(priming=1)) == (96, 16)  # 94
    assert receptive_field(NetworkConfig(priming=3)) == (112, 16)  # 102
    assert receptive_field(NetworkConfig(diffusion=1)) == (160, 16)  # 150
    assert receptive_field(NetworkConfig(decoder_cell="gru", priming=2, diffusion=2)) == (416, 16)  # 30 + 47 * 8
    assert receptive_field(NetworkConfig(decoder_cell="none", priming=3)) == (32, 16)
    # Between iterations, the gain network of residual scaling sees farther than 3 hops of 4 px, but not than 9.
    assert receptive_field(NetworkConfig(reconstruction="residual_scaling", priming=2, diffusion=2)) == (544, 32)  # 518
    assert receptive_field(NetworkConfig(reconstruction="residual_scaling", diffusion=8)) == (576, 32)  # 570


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("priming", "diffusion"), [(0, 0), (3, 0), (0, 1), (2, 1)])
def test_a_decoder_sees_exactly_as_far_as_the_halo(cell, priming, diffusion):
    """Gradients of a column of pixels after 16 iterations reach the bits of the halo's last block, and none beyond."""
    config = NetworkConfig(
        decoder_cell=cell, encoder_channels=(4, 4), encoder_hidden_kernels=(1,), decoder_channels=(4, 4, 4),
        decoder_hidden_kernels=(1, 3), bits=2, priming=priming, diffusion=diffusion,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = RecurrentCodec(config).double().decoder
    halo = receptive_field(config)[0] // config.stride
    middle = halo + 3
    bits = torch.ones(16, 1, 2, 1, 2 * middle + 1, dtype=torch.double, requires_grad=True)
    state, pixels = None, torch.zeros(0)
    for plane in bits:
        pixels, state = decoder(plane, state, None)
    block = pixels[..., middle * config.stride : (middle + 1) * config.stride]
    (gradient,) = torch.autograd.grad(block.sum(), bits)
    seen = gradient.abs().amax((0, 1, 2, 3)).nonzero().flatten()
    assert (middle - int(seen.min()), int(seen.max()) - middle) == (halo, halo)


def test_tiles_leave_no_seams(photos, tmp_path):
    """What the tests of the codec ask of tiles, of a network whose halo is small enough for many tiles."""
    config = NetworkConfig(
        encoder_channels=(6, 8), encoder_hidden_kernels=(3,), decoder_channels=(8, 8, 8), decoder_hidden_kernels=(1, 3),
        bits=4, priming=2, diffusion=1,
    )  # fmt: skip
    save_weights(tmp_path / "primed.safetensors", test_codec.make_network(config), "primed")
    codecs = {"primed": Codec(load_weights(tmp_path / "primed.safetensors"))}
    test_codec.test_tiles_leave_no_seams(codecs, "primed", (20, 250), 32)
    test_codec.test_tiles_cover_the_image_within_memory(config)


# Stops


def limits(y):
    """Groups that each location gets: most stop early, some within a pass, one in the first; a corner never does."""
    random = torch.Generator().manual_seed(0)
    limit = torch.randint(1, 17, y[:, 0].shape, generator=random)
    limit = torch.where(torch.rand(limit.shape, generator=random) < 0.6, limit.clamp(max=5), limit)
    limit[:, 0, :2] = 16
    return limit


@torch.no_grad()
def test_who_has_stopped_is_final_and_costs_nothing(codecs, photos, monkeypatch):
    network = codecs["latent"].network
    y = network.analyse(photographs(photos)[3:5, :, :112, :96])
    limit = limits(y)
    monkeypatch.setattr(places, "MOST", -1)  # all locations are computed, and who has stopped is restored
    whole = list(network.unroll(y, 4, limit))
    monkeypatch.setattr(places, "MOST", 2)  # only those that go on are
    picked, state = list(network.unroll(y, 4, limit)), None
    for t, (step, expected) in enumerate(zip(picked, whole, strict=True), 1):
        assert torch.equal(step.bits, expected.bits)
        torch.testing.assert_close(step.state.y_hat, expected.state.y_hat, rtol=1e-5, atol=1e-5)
        before, state = state, network(state, bits=step.bits).state
        ours, theirs = ((s.y_hat, *s.decoder.cell, s.decoder.received) for s in (state, step.state))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if before is not None:
            stopped = (limit <= 4 * (t - 1))[:, None]
            assert stopped.any()
            for old, new in zip((before.y_hat, *before.decoder.cell), (state.y_hat, *state.decoder.cell), strict=True):
                assert torch.equal((new - old) * stopped, torch.zeros_like(new))
                assert ((new - old) * ~stopped).any()


@torch.no_grad()
def test_bands_of_rows_leave_no_trace(codecs, photos, monkeypatch):
    network = codecs["latent"].network
    y = network.analyse(photographs(photos)[:1, :, :112, :80])
    whole = list(network.unroll(y, 3))
    monkeypatch.setattr(latent, "BAND", 12)
    for step, expected in zip(network.unroll(y, 3), whole, strict=True):
        assert torch.equal(step.bits, expected.bits)
        torch.testing.assert_close(step.state, expected.state, rtol=1e-4, atol=1e-5)


# Configs and weights


@pytest.mark.parametrize("config", [NetworkConfig(), TINY])
@pytest.mark.parametrize("name", ["priming", "diffusion"])
@pytest.mark.parametrize("value", [-1, MOST + 1])
def test_impossible_numbers_of_runs_are_refused(config, name, value):
    with pytest.raises(ValueError, match=f"from 0 to {MOST} extra runs"):
        replace(config, **{name: value})


def test_a_network_without_states_has_nothing_to_prime():
    with pytest.raises(ValueError, match="need a recurrent cell"):
        NetworkConfig("none", "none", priming=1)


@pytest.fixture
def path(tmp_path):
    save_weights(tmp_path / "plain.safetensors", RecurrentCodec(test_training.TINY), "plain")
    return tmp_path / "plain.safetensors"


def test_weights_without_extra_runs_are_those_of_before(path, tmp_path):
    """Their config has not a field more, so that files made with them name the same fingerprint."""
    config = json.loads(parse(path)[0]["__metadata__"]["config"])
    assert not {"priming", "diffusion"} & set(config)
    shipped = load_weights("small")  # older than the fields
    assert shipped.recurrent.config.extra_runs == ExtraRuns(0, 0)
    save_weights(tmp_path / "again.safetensors", shipped.recurrent, "again")
    assert load_weights(tmp_path / "again.safetensors").fingerprint == shipped.fingerprint


def test_primed_weights_come_back_and_are_others(path, tmp_path):
    plain = load_weights(path)
    primed = widened(plain.recurrent, replace(plain.recurrent.config, priming=3))
    save_weights(tmp_path / "primed.safetensors", primed, "primed")
    loaded = load_weights(tmp_path / "primed.safetensors")
    assert (loaded.recurrent.config.priming, loaded.recurrent.config.diffusion) == (3, 0)
    assert loaded.fingerprint != plain.fingerprint
    for key, tensor in plain.recurrent.state_dict().items():
        assert torch.equal(loaded.recurrent.state_dict()[key], tensor), key


@pytest.mark.parametrize("value", [MOST + 1, -1, 2**40, True, "3", 1.5, None, [3]])
@pytest.mark.parametrize("name", ["priming", "diffusion"])
def test_hostile_numbers_of_runs_are_refused(path, name, value):
    config = json.loads(parse(path)[0]["__metadata__"]["config"])
    rewrite(path, {"config": json.dumps(config | {name: value})})
    with pytest.raises(WeightsError, match=name):
        load_weights(path)


# Training


@pytest.mark.parametrize("cell", [name for name in CELLS if name != "none"])
def test_priming_teaches_hidden_kernels_in_one_iteration(cell):
    def silent(network):
        (images() - network(y=images()).state.y_hat).abs().mean().backward()
        return {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}

    assert any("hidden" in name for name in silent(narrow(cell)))
    assert silent(narrow(cell, priming=1)) == set()


@pytest.mark.parametrize("kind", ["pixels", "latent"])
def test_a_trained_network_is_trained_further_with_priming(kind, unprimed, tmp_path):
    network = unprimed if kind == "latent" else RecurrentCodec(test_training.TINY)
    save_weights(tmp_path / "plain.safetensors", network, "plain")
    config = replace(network.config, priming=3, diffusion=1)
    module = CodecTraining(config, weights=str(tmp_path / "plain.safetensors"), iterations=2)
    assert module.network.training
    for key, tensor in load_weights(tmp_path / "plain.safetensors").network.state_dict().items():
        assert torch.equal(module.network.state_dict()[key], tensor), key
    before = {key: tensor.clone() for key, tensor in module.network.named_parameters()}
    test_training.fit(module, test_training.Patches(2)).save_checkpoint(tmp_path / "a.ckpt")
    assert any(not torch.equal(tensor, before[key]) for key, tensor in module.network.named_parameters())
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.save(checkpoint | {"PatchDataModule": {}}, tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt")[0].config == config


def test_other_changes_are_still_refused():
    with pytest.raises(ValueError, match="binarizer, priming and diffusion"):
        widened(narrow(), replace(narrow().config, priming=1, bits=8))
    with pytest.raises(ValueError, match="but for priming and diffusion"):
        widened(RecurrentCodec(TINY), replace(TINY, priming=1, mixed=9))
    associative = narrow("associative_lstm")
    assert widened(associative, replace(associative.config, priming=1)).config.priming == 1


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("toderici2017_gru_one_shot", ["--model.network.priming", "3"]),
        # A latent network is told by `latents`; other fields of the config stay.
        ("base", ["--model.network", "{latents: 384, priming: 3}"]),
    ],
)
def test_the_command_line_adds_priming_to_a_config(config, options, monkeypatch, capsys):
    command = ["train.py", "fit", "--config", config, "--data.root", "photos"]
    found = []
    for arguments in (command, [*command, *options]):
        monkeypatch.setattr("sys.argv", [*arguments, "--print_config"])
        with pytest.raises(SystemExit):
            training_cli.main()
        found.append(network_config(yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]))
    assert found[1] == replace(found[0], priming=3) != found[0]


@pytest.mark.slow
def test_the_command_line_trains_further_with_priming(photos, path, tmp_path):
    channels = ["--model.network.encoder_channels", "[8,8,8,8]", "--model.network.decoder_channels", "[8,8,8,8,8]"]
    test_training.run(
        photos, tmp_path, *channels, "--model.weights", str(path), "--model.network.priming", "3",
        "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.logger", "false",
    )  # fmt: skip
    network, provenance = load_checkpoint(tmp_path / "debug" / "last.ckpt")
    assert network.config == replace(test_training.TINY, priming=3)
    assert provenance["started_from"] == load_weights(path).fingerprint.hex()


# The comparison


def test_the_comparison_adds_extra_runs_to_the_base():
    base = compare.Variant("gru", "gru", "one_shot", "sign")
    variants = compare.variants_of("priming", base)
    assert [(v.priming, v.diffusion) for v in variants] == [(0, 0), (3, 0), (3, 3)]
    assert {replace(variant, priming=0, diffusion=0) for variant in variants} == {base}
    assert [variant.name for variant in variants] == [
        "gru-one_shot-sign", "gru-one_shot-sign-3-priming", "gru-one_shot-sign-3-priming-3-diffusion"
    ]  # fmt: skip
    common, (head, *rows) = compare.table([compare.Result(variant, "not trained") for variant in variants])
    assert set(common) == {"model", "reconstruction", "binarizer"}
    assert [row[head.index("priming")] for row in rows] == ["no priming", "3-priming", "3-priming and 3-diffusion"]
