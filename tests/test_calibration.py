"""Tests of what is learned from photographs to choose iterations: the worth of latent errors, and qualities."""

import numpy as np
import pytest
import scipy.optimize
import torch
from test_latent import TINY, started

from rnncodec.allocation import QUALITIES
from rnncodec.codec import Codec
from rnncodec.entropy import ContextConfig, ContextModel
from rnncodec.files.images import load_image
from rnncodec.training.calibration import RIDGE, calibrate, fit_worth
from rnncodec.training.context import start_context
from rnncodec.weights import load_weights, save_weights

CHANNELS = 12


def save_latent(photos, path, name="latent", context=True):
    """Saves a small latent network that has started from photographs, with its context model."""
    network, model = started(photos, TINY).eval(), None
    if context:
        made = ContextModel(ContextConfig(kind="grouped", bits=16, groups=4, channels=8, iterations=4))
        start_context(made, network)
        torch.manual_seed(0)
        with torch.no_grad():
            made.grouped.output.map.normal_(std=0.05)
        model = made.quantize()
    save_weights(path, network, name, context=model)


@pytest.fixture(scope="module")
def codec(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "latent.safetensors"
    save_latent(photos, path)
    return Codec(load_weights(path))


@pytest.fixture(scope="module")
def images(photos):
    return [load_image(photo)[:256, :256] for photo in sorted(photos.iterdir())]


@pytest.fixture(scope="module")
def allocation(codec, images):
    return calibrate(codec, images)


def synthetic(seed, noise):
    """Falls of squared errors in a latent space, weights of its channels, and what follows for pixels."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 1, CHANNELS)) / 2 ** np.arange(4)[:, None, None]
    latents = rng.exponential(1, (4, 3000, CHANNELS)) * scale * (rng.random((4, 3000, CHANNELS)) < 0.5)
    latents -= 0.05 * scale * rng.exponential(1, latents.shape)  # some errors grow
    worth = rng.uniform(0.5, 5, CHANNELS)
    worth[[2, 7]] = 0
    pixels = latents @ worth
    pixels += noise * pixels.std((1), keepdims=True) * rng.normal(0, 1, pixels.shape)
    return latents, pixels, worth


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_known_worth_is_found(seed, noise):
    latents, pixels, worth = synthetic(seed, noise)
    found = fit_worth(torch.from_numpy(latents).float(), torch.from_numpy(pixels).float()).numpy()
    assert (found >= 0).all()
    share = np.sqrt((latents**2).mean((0, 1)))  # how much a channel matters at all
    assert np.abs((found - worth) * share)[worth > 0].max() < 0.1 * (worth * share).max()
    np.testing.assert_allclose((found * share).sum(), (worth * share).sum(), rtol=0.05)
    assert (found * share)[worth == 0].max() < 0.1 * (worth * share).max()


@pytest.mark.parametrize("seed", range(3))
def test_worth_is_the_least_squares_solution(seed):
    """By the solver of SciPy, with rows that keep values small; each iteration is divided by its mean fall."""
    rng = np.random.default_rng(seed)
    latents, pixels, worth = synthetic(seed, 0.5)
    latents[..., 3] = latents[..., 4] + 0.1 * latents[..., 3]  # hard to tell apart
    pixels = pixels - 2 * worth[5] * latents[..., 5] + rng.normal(0, 0.1, pixels.shape) * pixels.std()  # does harm
    found = fit_worth(torch.from_numpy(latents), torch.from_numpy(pixels)).numpy()
    scale = np.abs(pixels).mean(1)
    matrix = (latents / scale[:, None, None]).reshape(-1, CHANNELS)
    length = np.linalg.norm(matrix, axis=0)
    augmented = np.vstack([matrix / length, np.sqrt(RIDGE) * np.eye(CHANNELS)])
    aims = np.concatenate([(pixels / scale[:, None]).ravel(), np.zeros(CHANNELS)])
    expected = scipy.optimize.nnls(augmented, aims)[0] / length
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())
    assert expected[5] == found[5] == 0


def test_channels_that_never_fall_are_worth_nothing():
    latents, pixels, _ = synthetic(0, 0.1)
    latents[..., 4] = 0
    found = fit_worth(torch.from_numpy(latents), torch.from_numpy(pixels))
    assert found[4] == 0
    assert torch.isfinite(found).all()


def test_latent_errors_foretell_those_of_pixels(codec, allocation, images):
    """How the squared error of decoded photographs falls, measured here, is foretold within 15 % for all of them."""
    falls = []
    for x in images:
        data = codec.encode(x, 4)
        pixels = [((shown.astype(float) - x) ** 2).sum() / 127.5**2 for shown in codec.decode_progressive(data)]
        with torch.inference_mode():
            y = codec.network.analyse(torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1)
            latents = [(y - step.state.y_hat)[0].square().sum((1, 2)).numpy() for step in codec.network.unroll(y, 4)]
        foretold = [float(latent @ np.array(allocation.worth)) for latent in latents]
        falls.append((pixels[0] - pixels[3], foretold[0] - foretold[3]))
        assert 0.6 < falls[-1][0] / falls[-1][1] < 1.6
    measured, expected = np.sum(falls, 0)
    assert measured == pytest.approx(expected, rel=0.15)


def test_an_allocation_is_complete(allocation):
    assert len(allocation.worth) == TINY.latents
    assert min(allocation.worth) >= 0
    assert set(allocation.quality) == {"psnr", "ms-ssim"}
    for scale in allocation.quality.values():
        assert len(scale) == len(QUALITIES)
        assert (np.diff(scale) > 0).all()
        assert 0 <= scale[0] < scale[-1] <= 1
    assert allocation.quality["ms-ssim"][0] == 0  # one iteration
    assert allocation.quality["ms-ssim"][-1] > 0.9


def test_progress(codec, images):
    seen = []
    calibrate(codec, images[:2], lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_photographs_of_all_kinds(codec, images, allocation):
    """Small ones do not count; those that soon need no more iterations, and those of odd sides, do."""
    assert calibrate(codec, [images[0][:63], *images, images[1][:, :20]]) == allocation
    black, odd = np.zeros((80, 64, 3), np.uint8), images[0][:101, :77]
    mixed = calibrate(codec, [black, odd, *images])
    assert mixed.quality != allocation.quality
    assert all((np.diff(scale) > 0).all() for scale in mixed.quality.values())


def test_refused(codec, photos, images, tmp_path):
    save_latent(photos, tmp_path / "bare.safetensors", context=False)
    for photographs, used, message in (
        ([], codec, "a calibration needs photographs of at least 64 pixels a side"),
        ([images[0][:63]], codec, "a calibration needs photographs of at least 64 pixels a side"),
        (images, Codec(load_weights(tmp_path / "bare.safetensors")), "only a latent network with its context model"),
        (images, Codec(load_weights()), "only a latent network with its context model"),
    ):
        with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
            calibrate(used, photographs)
