"""Tests of the quality of trained weights of a latent network on held-out photographs, which take minutes."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from rnncodec.codec import Codec
from rnncodec.data import PatchDataModule
from rnncodec.network import RecurrentCodec, to_uint8
from rnncodec.weights import load_weights

WEIGHTS, PHOTOS = os.environ.get("RNNCODEC_LATENT"), os.environ.get("RNNCODEC_PHOTOS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (WEIGHTS and PHOTOS),
        reason="needs RNNCODEC_LATENT, weights of a latent network, and RNNCODEC_PHOTOS, what they were trained on",
    ),
]
LENGTH, HEIGHT = 128, 16  # pixels of the strips in which a lattice is looked for


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(load_weights(str(WEIGHTS)))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> list[Tensor]:
    """The tiles that training holds out, uint8 [1, 3, H, W]."""
    data = PatchDataModule(str(PHOTOS), cache_dir=tmp_path_factory.mktemp("cache"), tile_size=192, patch_size=128)
    data.prepare_data()
    data.setup()
    return list(data.val_dataloader())


def decibel(picture: Tensor | np.ndarray, original: Tensor | np.ndarray) -> float:
    difference = np.asarray(picture).astype(float) - np.asarray(original)
    return float(10 * np.log10(255**2 / np.square(difference).mean()))


def strips(image: np.ndarray) -> Iterator[np.ndarray]:
    """Gray strips of an image [H, W, 3], lying and standing ones, that start at multiples of 16."""
    for gray in (image.mean(2), image.mean(2).T):
        for y in range(0, gray.shape[0] - HEIGHT + 1, HEIGHT):
            for x in range(0, gray.shape[1] - LENGTH + 1, LENGTH // 2):
                yield gray[y : y + HEIGHT, x : x + LENGTH]


def lattice(images: list[np.ndarray], flat: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy at multiples of 1/16 cycle a pixel over that beside them: of all together, and of each multiple."""
    window, power = np.hanning(LENGTH + 1)[:LENGTH], np.zeros(LENGTH // 2 + 1)
    every = [strip for image in images for strip in strips(image.astype(float))]
    for i in flat:
        rows = every[i] - every[i].mean(1, keepdims=True)
        power += np.square(np.abs(np.fft.rfft(rows * window, axis=1))).mean(0)
    at = LENGTH // 16 * np.arange(1, 8)
    beside = power[np.stack([at + step for step in (-4, -3, 3, 4)])]  # three bins away the window lets nothing through
    return power[at].sum() / beside.sum(1).mean(), power[at] / np.exp(np.log(beside).mean(0))


def test_flat_regions_have_no_lattice(codec, tiles, capsys):
    """After one and two iterations, the flattest eighth of the strips has at most 1.5 times the energy beside."""
    originals = [tile[0].permute(1, 2, 0).numpy() for tile in tiles]
    spread = np.array([strip.std() for image in originals for strip in strips(image.astype(float))])
    flat = spread.argsort()[: len(spread) // 8]
    lines, found = ["", f"originals: {lattice(originals, flat)[0]:.2f}"], {}
    pictures = [list(codec.decode_progressive(codec.encode(image, 2, entropy="none"))) for image in originals]
    for k in (1, 2):
        found[k], each = lattice([shown[k - 1] for shown in pictures], flat)
        lines.append(f"{k} iterations: {found[k]:.2f}; of each multiple {np.round(each, 2)}")
    with capsys.disabled():
        print("\n".join(lines))
    assert max(found.values()) <= 1.5


@torch.no_grad()
def cut(network: RecurrentCodec, y: Tensor, limit: Tensor) -> Tensor:
    """The picture of as many groups of bits as each location [1, H, W] may have."""
    passes = -(-int(limit.max()) // network.binarizer.questions.groups)
    *_, last = network.unroll(y, passes, limit)
    return to_uint8(network.picture(last.state))


def test_locations_may_stop_at_different_groups(codec, tiles, capsys):
    """Near eight passes, a random end for each location costs at most 0.3 dB over the same end for all."""
    network, generator = codec.network, torch.Generator().manual_seed(0)
    losses = []
    for tile in tiles[::3]:
        with torch.no_grad():
            y = network.analyse(tile.float() / 127.5 - 1)
        shape = (1, *y.shape[2:])
        mixed = cut(network, y, torch.randint(29, 37, shape, generator=generator))
        same = [decibel(cut(network, y, torch.full(shape, count)), tile) for count in (32, 33)]
        # Ends between the first group and the last, against the squared errors that each location has in a file whose
        # locations all end where it does.
        wild = torch.randint(1, 17, shape, generator=generator) * 4
        whole = [cut(network, y, torch.full(shape, count)) for count in range(4, 65, 4)]
        ends = (wild // 4 - 1)[:, None].repeat_interleave(16, 2).repeat_interleave(16, 3).expand_as(tile)
        patched = torch.stack(whole).gather(0, ends[None])[0]
        losses.append(
            (np.mean(same) - decibel(mixed, tile), decibel(patched, tile) - decibel(cut(network, y, wild), tile))
        )
    near, far = np.mean(losses, 0)
    with capsys.disabled():
        print(f"\nends of 29 to 36 groups cost {near:.2f} dB; of 4 to 64, against their own, {far:.2f} dB")
    assert near <= 0.3
    assert far <= 0.3


def test_bfloat16_costs_next_to_nothing(codec, tiles, capsys):
    fast = Codec(load_weights(str(WEIGHTS)), bfloat16=True)
    losses = []
    for tile in tiles[::3]:
        image = tile[0].permute(1, 2, 0).numpy()
        plain = codec.encode(image, 8)
        other = fast.encode(image, 8)
        best = decibel(np.asarray(codec.decode(plain)), image)
        losses.append(
            (
                best - decibel(np.asarray(codec.decode(other)), image),
                best - decibel(np.asarray(fast.decode(plain)), image),
                len(other) / len(plain) - 1,
            )
        )
    encoder, decoder, size = np.mean(losses, 0)
    with capsys.disabled():
        print(f"\nin bfloat16: encoder {encoder:.4f} dB and {size:+.2%} of the bytes, decoder {decoder:.4f} dB")
    assert max(encoder, decoder) < 0.02
    assert abs(size) < 0.005
