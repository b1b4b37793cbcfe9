"""Tests of steps that compute only the locations that go on: they equal steps that compute all of them."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from test_latent import CONFIGS, images, started

from rnncodec.network import places
from rnncodec.network.latent import DecoderState
from rnncodec.network.places import Places, convolve, pick, put

STEPS, GROUPS = 4, 4


@pytest.fixture(scope="module", params=CONFIGS)
def network(request, photos):
    return started(photos, CONFIGS[request.param]).eval()


@pytest.fixture(scope="module")
def y(network, photos):
    with torch.no_grad():
        return network.analyse(images(photos)[3:5, :, :112, :96])


def limits(y, seed=0):
    """Groups that each location gets: some stop within a pass, most early, a corner at the end."""
    random = torch.Generator().manual_seed(seed)
    limit = torch.randint(1, STEPS * GROUPS + 1, y[:, 0].shape, generator=random)
    limit = torch.where(torch.rand(limit.shape, generator=random) < 0.5, limit.clamp(max=5), limit)
    limit[:, :2, :2] = STEPS * GROUPS
    return limit


def run(network, y, limit):
    with torch.no_grad():
        return list(network.unroll(y, STEPS, limit))


def frozen_by_hand(network, y, limit):
    """Bits, latents and cell of the decoder after steps that compute all locations and restore who has stopped."""
    found, encoder, asked = [], None, None
    y_hat, cell, received = torch.zeros_like(y), (), torch.zeros_like(limit)
    with torch.no_grad():
        for t in range(STEPS):
            features, encoder = network.encoder(y - y_hat, encoder)
            coded = network.binarizer(features, y - y_hat, asked, limit)
            asked = coded.state
            state = DecoderState(received, cell) if t else None
            added, (received, new) = network.decoder(coded.values._replace(going=None), state, y_hat if t else None)
            goes_on = (limit > GROUPS * t)[:, None]
            y_hat = torch.where(goes_on, y_hat + added, y_hat)
            cell = tuple(torch.where(goes_on, after, before) for after, before in zip(new, cell or new, strict=True))
            found.append((coded.bits, y_hat, cell))
    return found


@pytest.mark.parametrize("most", [-1, 0.7, 2])
def test_steps_are_those_that_restore_who_has_stopped(network, y, most, monkeypatch):
    """With a limit of -1, all locations are computed, with 2 only those that go on."""
    limit, picked = limits(y), []
    make = Places.__init__

    def counted(self, going):
        picked.append(int(going.sum()))
        make(self, going)

    monkeypatch.setattr(Places, "__init__", counted)
    monkeypatch.setattr(places, "MOST", most)
    steps = run(network, y, limit)
    going = [int((limit > GROUPS * t).sum()) for t in range(1, STEPS)]
    few = [count for count in going if count <= most * limit.numel()]
    assert picked == [count for count in few for _ in range(2)]  # of encoder and decoder
    assert most < 0 or len(few) > 1
    for t, (step, (bits, y_hat, cell)) in enumerate(zip(steps, frozen_by_hand(network, y, limit), strict=True)):
        assert torch.equal(step.bits, bits)
        sent = (step.bits != 0).unflatten(1, (GROUPS, -1)).any(2).sum(1)
        assert torch.equal(sent, (limit - GROUPS * t).clamp(0, GROUPS))
        torch.testing.assert_close(step.state.y_hat, y_hat, rtol=1e-5, atol=1e-5)
        for found, expected in zip(step.state.decoder.cell, cell, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [-1, 0.7, 2])
def test_decoding_gives_exactly_the_latents_of_the_encoder(network, y, most, monkeypatch):
    monkeypatch.setattr(places, "MOST", most)
    state = None
    for step in run(network, y, limits(y, seed=1)):
        with torch.no_grad():
            state = network(state, bits=step.bits).state
        assert torch.equal(state.y_hat, step.state.y_hat)
        for found, expected in zip(state.decoder.cell, step.state.decoder.cell, strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(state.decoder.received, step.state.decoder.received)


def test_who_has_stopped_does_not_change_any_more(network, y):
    limit = limits(y)
    steps = run(network, y, limit)
    for t, (before, after) in enumerate(pairwise(steps), 1):
        stopped = (limit <= GROUPS * t)[:, None]
        for old, new in zip(
            (before.state.y_hat, *before.state.decoder.cell),
            (after.state.y_hat, *after.state.decoder.cell),
            strict=True,
        ):
            assert torch.equal((new - old) * stopped, torch.zeros_like(new))
            assert ((new - old) * ~stopped).abs().amax(1).gt(0).sum() > 0.9 * (~stopped).sum()


def test_training_computes_all_locations(network, y, monkeypatch):
    """Gradients would else depend on how many have stopped."""
    monkeypatch.setattr(places, "MOST", 2)
    limit = limits(y)
    assert Places.of((limit > 5)[:, None], training=True) is None
    assert Places.of(None, training=False) is None
    assert Places.of((limit > 5)[:, None], training=False) is not None


def test_picked_convolutions_are_those_of_the_whole_map():
    torch.manual_seed(0)
    x, layer = torch.randn(2, 5, 7, 6), torch.nn.Conv2d(5, 3, 3, padding=1)
    going = torch.rand(2, 1, 7, 6) < 0.3
    going[0, 0, 0, 0] = going[1, 0, 6, 5] = True
    picked = Places(going)
    with torch.no_grad():
        found = convolve(layer, pick(x, picked.near), picked)
        whole = F.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(found, pick(whole, picked.here), rtol=1e-5, atol=1e-5)
    assert torch.equal(pick(x, picked.near).index_select(3, picked.within), pick(x, picked.here))
    again = put(x, picked.here, pick(x, picked.here) + 1)
    assert torch.equal(again, x + going)
