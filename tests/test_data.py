"""Tests of the training data: splits, cache, patches, resumption, ranks and workers, and the download of CLIC."""

import hashlib
import http.server
import io
import json
import os
import pickle
import re
import threading
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from rnncodec.data import (
    DataError,
    ImageCache,
    PatchDataModule,
    PatchStream,
    cache,
    clic,
    cut_patches,
    datamodule,
    download_clic,
)

SIZES = [(64, 64), (70, 93), (33, 100), (48, 17)]  # the cells of 16 pixels: 16, 20, 12, 3


def coordinates(number, height, width):
    """An image whose pixels tell where they are: red x, green y, blue the number of the image."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.full_like(x, number)], axis=-1).astype(np.uint8)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for number, (height, width) in enumerate(SIZES):
        Image.fromarray(coordinates(number, height, width)).save(root / f"{number}.png")
    return root


@pytest.fixture
def module(photos, tmp_path):
    def make(root=photos, **arguments):
        arguments = {"val_images": 0, "tile_size": 16, "patch_size": 8, "num_workers": 0} | arguments
        arguments = {"batch_size": 7, "cache_dir": tmp_path / "cache"} | arguments
        return PatchDataModule(root, **arguments)

    return make


def ready(module):
    module.prepare_data()
    module.setup()
    return module


def stream_of(module):
    dataset = module.train_dataloader().dataset
    assert isinstance(dataset, PatchStream)
    return dataset


def tiles_of(stream, batches):
    return np.concatenate([stream[b]["tiles"].numpy() for b in batches])


def places(tiles):
    """(image, y, x) of each tile, after a check that it is a piece of that image."""
    found = []
    for tile in tiles:
        x, y, number = map(int, tile[0, 0])
        size = len(tile)
        np.testing.assert_array_equal(tile, coordinates(number, *SIZES[number])[y : y + size, x : x + size])
        found.append((number, y, x))
    return found


@pytest.fixture
def messages(monkeypatch):
    said = []
    for place in clic, datamodule:
        monkeypatch.setattr(place, "rank_zero_info", said.append)
    return said


# The stream


def test_each_epoch_visits_every_cell_once(module):
    stream = stream_of(ready(module()))
    cells, epochs = 51, 6
    found = places(tiles_of(stream, range(-(-cells * epochs // 7))))
    phases = set()
    for epoch in range(epochs):
        visited = found[epoch * cells : (epoch + 1) * cells]
        for number, (height, width) in enumerate(SIZES):
            mine = [(y, x) for image, y, x in visited if image == number]
            (down,), (right,) = {y % 16 for y, _ in mine}, {x % 16 for _, x in mine}
            grid = [(down + 16 * i, right + 16 * j) for i in range(height // 16) for j in range(width // 16)]
            assert sorted(mine) == grid
            phases.add((number, down, right))
    assert {phase for phase in phases if phase[0] == 0} == {(0, 0, 0)}  # 64x64 leaves no margin
    assert len({phase for phase in phases if phase[0] == 1}) > 3
    assert {right for number, _, right in phases if number == 3} == {0, 1}  # 17 pixels leave one
    orders = {tuple(number for number, _, _ in found[e * cells : (e + 1) * cells]) for e in range(epochs)}
    assert len(orders) == epochs


def test_the_seed_decides_the_stream(module):
    first, same, other = (stream_of(ready(module(seed=seed)))[3] for seed in (5, 5, 6))
    for key in ("tiles", "corners", "flips"):
        assert torch.equal(first[key], same[key])
        assert not torch.equal(first[key], other[key])


def test_ranks_together_see_what_one_process_sees(module):
    single = stream_of(ready(module(batch_size=12)))
    ranks = []
    for rank in range(3):
        part = ready(module(batch_size=4))
        part.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        ranks.append(stream_of(part))
    for b in range(20):
        for key in ("tiles", "corners", "flips"):
            assert torch.equal(torch.cat([rank[b][key] for rank in ranks]), single[b][key])


def test_workers_change_nothing(module):
    alone, two = ready(module()), ready(module(num_workers=2))
    for _, a, b in zip(range(12), alone.train_dataloader(), two.train_dataloader(), strict=False):
        assert all(torch.equal(a[key], b[key]) for key in ("tiles", "corners", "flips"))
        assert a["next_sample"] == b["next_sample"]


def test_a_worker_is_not_sent_the_pixels(module):
    stream = stream_of(ready(module(batch_size=2)))
    expected = stream[1]  # opens the memory map
    copy = pickle.dumps(stream)
    assert len(copy) < sum(3 * height * width for height, width in SIZES)
    assert torch.equal(pickle.loads(copy)[1]["tiles"], expected["tiles"])


def test_epochs_smaller_than_a_batch(module, tmp_path):
    root = tmp_path / "few"
    root.mkdir()
    Image.fromarray(coordinates(3, *SIZES[3])).save(root / "3.png")  # three cells below one another
    found = places(tiles_of(stream_of(ready(module(root, batch_size=30))), [0]))
    for epoch in range(10):
        assert sorted(y for _, y, _ in found[3 * epoch : 3 * epoch + 3]) == [0, 16, 32]


def test_crops_and_flips_are_drawn_from_all_there_are(module):
    stream = stream_of(ready(module(batch_size=2000)))
    batch = stream[0]
    assert batch["tiles"].dtype == torch.uint8
    for axis in range(2):
        counts = np.bincount(batch["corners"][:, axis].numpy(), minlength=9)
        assert len(counts) == 9  # offsets 0 to 8 of 8 pixels in 16
        assert counts.min() > 150  # 222 expected
    assert 900 < batch["flips"].sum() < 1100
    assert not stream_of(ready(module(batch_size=2000, flips=False)))[0]["flips"].any()


def test_patches_are_slices_of_the_tiles():
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (50, 11, 11, 3), np.uint8)
    corners, flips = rng.integers(0, 7, (50, 2)), rng.random(50) < 0.5
    corners[0], flips[0] = (6, 6), True
    x = cut_patches(torch.from_numpy(tiles), torch.from_numpy(corners), torch.from_numpy(flips), 5)
    assert (x.shape, x.dtype) == ((50, 3, 5, 5), torch.float32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert flips.any()
    assert not flips.all()
    for tile, (top, left), flip, patch in zip(tiles, corners, flips, x.numpy(), strict=True):
        expected = tile[top : top + 5, left : left + 5]
        expected = expected[:, ::-1] if flip else expected
        np.testing.assert_allclose(patch, 2.0 * expected.transpose(2, 0, 1) / 255 - 1, rtol=0, atol=1e-6)


# Stopping and going on


class Recorder(L.LightningModule):
    """Writes down what it is trained and validated on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, x, batch_idx):
        self.seen.append(x.clone())
        return self.weight * x.mean()

    def validation_step(self, x, batch_idx):
        self.validated.append(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, checkpoint=None, **arguments):
    recorder = Recorder()
    arguments = {"max_steps": 8, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 4} | arguments
    with warnings.catch_warnings():
        # Lightning's: internals of torch, few workers, few batches, no validation images, a folder used before.
        warnings.filterwarnings(
            "ignore", ".*(LeafSpec|many workers|logging interval|Total length of|Checkpoint directory)"
        )
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing="callbacks" in arguments,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **arguments,
        )
        trainer.fit(recorder, module, ckpt_path=checkpoint)
    return recorder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(module, tmp_path, workers):
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    settings = {"accumulate_grad_batches": 2, "callbacks": [checkpoints]}
    whole = fit(module(num_workers=workers), **settings).seen
    assert len(whole) == 16
    resumed_module = module(num_workers=workers)
    resumed = fit(resumed_module, tmp_path / "step=3.ckpt", **settings).seen
    assert len(resumed) == 10
    assert all(torch.equal(a, b) for a, b in zip(whole[6:], resumed, strict=True))
    assert resumed_module.position == 16 * 7
    stream = stream_of(ready(module()))
    for b, x in enumerate(whole):
        batch = stream[b]
        assert torch.equal(x, cut_patches(batch["tiles"], batch["corners"], batch["flips"], 8))


def test_short_epochs_go_on_in_the_stream(module):
    whole = fit(module()).seen
    arguments = {"max_steps": -1, "max_epochs": 4, "limit_train_batches": 2, "check_val_every_n_epoch": 1}
    parts = fit(module(num_workers=1), val_check_interval=1.0, **arguments).seen
    assert len(parts) == 8
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_position_holds_for_other_batch_sizes_and_ranks(module):
    before = ready(module(batch_size=6))
    before.on_after_batch_transfer(stream_of(before)[1], 0)
    assert before.position == 12
    expected = tiles_of(stream_of(ready(module(batch_size=1))), range(12, 24))

    after = ready(module(batch_size=2))
    after.load_state_dict(before.state_dict())
    batches = [batch["tiles"].numpy() for _, batch in zip(range(6), after.train_dataloader(), strict=False)]
    np.testing.assert_array_equal(np.concatenate(batches), expected)

    after.trainer = SimpleNamespace(global_rank=1, world_size=2)
    np.testing.assert_array_equal(next(iter(after.train_dataloader()))["tiles"].numpy(), expected[2:4])

    after = ready(module(batch_size=5))
    after.load_state_dict(before.state_dict())
    with pytest.raises(DataError, match="sample 12, which steps of 5 samples on each of 1 ranks do not meet"):
        after.train_dataloader()


def test_a_checkpoint_of_other_data_is_told(module):
    state = ready(module()).state_dict()
    with pytest.raises(DataError, match="seed 0, not 1"):
        ready(module(seed=1)).load_state_dict(state)
    with pytest.warns(UserWarning, match="not those that the checkpoint was trained on"):
        ready(module(tile_size=32)).load_state_dict(state)


# High-entropy patches


@pytest.fixture
def mixed(tmp_path):
    """Two images whose 8x8 squares are noise of different amplitudes, all with a rest that fills no square."""
    root, rng = tmp_path / "mixed", np.random.default_rng(1)
    root.mkdir()
    for name, (rows, columns) in {"a": (6, 7), "b": (2, 2)}.items():
        amplitude = np.kron(rng.integers(1, 256, (rows, columns)), np.ones((8, 8)))
        noise = rng.random((8 * rows, 8 * columns, 3)) * amplitude[..., None]
        Image.fromarray(np.pad(noise.astype(np.uint8), ((0, 3), (0, 5), (0, 0)))).save(root / f"{name}.png")
    return root


def png_squares(path):
    """(length of the PNG, pixels) of each 8x8 square."""
    image, found = Image.open(path), []
    for top in range(0, image.height - 7, 8):
        for left in range(0, image.width - 7, 8):
            square, file = image.crop((left, top, left + 8, top + 8)), io.BytesIO()
            square.save(file, "png")
            found.append((len(file.getvalue()), np.asarray(square).tobytes()))
    return found


def test_high_entropy_takes_what_png_compresses_worst(module, mixed, monkeypatch):
    chosen = ready(module(mixed, selection="high_entropy", patches_per_image=10, batch_size=14))
    batch = stream_of(chosen)[0]
    assert batch["tiles"].shape == (14, 8, 8, 3)
    assert not batch["corners"].any()
    tiles = [tile.tobytes() for tile in batch["tiles"].numpy()]
    squares = sorted(png_squares(mixed / "a.png"), reverse=True)
    assert squares[9][0] > squares[41][0]
    lengths = dict((pixels, length) for length, pixels in squares)
    assert sorted((lengths[t] for t in tiles if t in lengths), reverse=True) == [length for length, _ in squares[:10]]
    assert {tile for tile in tiles if tile not in lengths} == {pixels for _, pixels in png_squares(mixed / "b.png")}
    assert len(set(tiles)) == 14

    calls = []
    choose = datamodule.high_entropy_cells
    monkeypatch.setattr(datamodule, "high_entropy_cells", lambda *arguments: calls.append(1) or choose(*arguments))
    again = module(mixed, selection="high_entropy", patches_per_image=10)
    again.prepare_data()
    assert not calls
    (file,) = chosen.cache.folder.glob("*.npy")
    for corrupt in (file.read_bytes()[:-4], b"", file.read_bytes()[:-1] + b"\x7f"):
        file.write_bytes(corrupt)
        np.testing.assert_array_equal(
            ready(module(mixed, selection="high_entropy", patches_per_image=10)).cells, chosen.cells
        )
    assert len(calls) == 3


# Images good and bad


@pytest.mark.filterwarnings("ignore:.*transparency")
def test_bad_images_are_counted_and_odd_ones_converted(module, tmp_path, messages):
    root = tmp_path / "odd"
    root.mkdir()
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray).save(root / "gray.png")
    Image.fromarray(gray).convert("P").save(root / "palette.png")
    rgba = np.dstack([gray, gray, gray, np.where(gray < 128, 0, 255).astype(np.uint8)])
    Image.fromarray(rgba).save(root / "alpha.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(root / "sixteen.png")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(root / "whole.png")
    (root / "truncated.png").write_bytes((root / "whole.png").read_bytes()[:400])
    Image.fromarray(noise[:15]).save(root / "low.png")
    Image.fromarray(noise[:, :1]).save(root / "narrow.png")
    (root / "text.jpg").write_text("no image")
    (root / "empty.png").touch()
    (root / "notes.txt").write_text("not even by name")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(root / "large.png")

    stream = stream_of(ready(module(root, batch_size=5, max_pixels=1000)))
    found = {tile.tobytes() for tile in stream[0]["tiles"].numpy()}
    rgb = np.repeat(gray[..., None], 3, axis=2)
    assert found == {image.tobytes() for image in (rgb, np.where(rgb < 128, 255, rgb).astype(np.uint8), noise)}
    message, decoded = messages
    # Five images of 16x16 pixels, one of 15x16 and one of 16x1.
    assert re.fullmatch(r"decoded images: .+/[0-9a-f]{24}, 4\.6 kB", decoded)
    assert message.startswith(
        "5 images to train on, 0 to validate on; skipped 4 unreadable: empty.png (the file is empty)"
    )
    assert "large.png (40x40 pixels are above the limit of 1000" in message
    assert message.endswith("...; skipped 2 below 16x16 pixels: low.png, narrow.png")


@pytest.mark.parametrize("content", [None, "no image"])
def test_no_usable_image(module, tmp_path, content):
    root = tmp_path / "none"
    root.mkdir()
    if content:
        (root / "a.png").write_text(content)
    with pytest.raises(DataError, match=r"no images to train on|no usable image; .* a.png"):
        ready(module(root))
    with pytest.raises(ValueError, match="missing"):
        ready(module(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"patch_size": 17}, "tile_size 16 must be at least patch_size 17"),
        ({"val_images": 4}, "hold out 4 of 4 images leaves none"),
    ],
)
def test_bad_arguments(module, arguments, message):
    with pytest.raises(DataError, match=message):
        ready(module(**arguments))


def test_command_line_arguments(photos):
    parser = ArgumentParser()
    parser.add_class_arguments(PatchDataModule, "data")
    config = parser.parse_args([f"--data.root={photos}", "--data.selection=high_entropy", "--data.download=false"])
    assert config.data.root == str(photos)
    help = " ".join(parser.format_help().split())
    for name in vars(config.data):
        assert re.search(rf"--data\.{name}\+? [^-]*?\w{{3,}} [^-]*\(", help), f"{name} has no description"
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data.root={photos}", "--data.selection=low_entropy"])


# Training and validation images


def save(*paths):
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(path)


def split_of(module):
    ready(module)
    names = [entry.name for entry in module.cache.entries]
    return {names[i] for i in module.cells[:, 0]}, {names[i] for i in module.val_indices}


def test_clic_layout(module, tmp_path):
    root = tmp_path / "clic"
    names = ["professional/train/a.png", "mobile/train/a.png", "professional/valid/b.png", "mobile/valid/b.png"]
    save(*(root / name for name in [*names, "test/c.png", "other.png"]))
    assert split_of(module(root)) == (set(names[:2]), set(names[2:]))
    train, val = split_of(module(root / "professional" / "train" / "..", val_images=1))
    assert (train, val) == ({"train/a.png"}, {"valid/b.png"})


def test_val_root_has_images(module, tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "v.tar").write_bytes(bytes(1024))
    for name, reason in (("empty", "no images to validate on"), ("v.tar", "is a folder of images")):
        with pytest.raises(DataError, match=reason):
            module(tmp_path, val_root=tmp_path / name).prepare_data()


def test_names_of_any_bytes(module, tmp_path):
    """As an old archive has them; which images are held out depends on the bytes of their names."""
    names = [os.fsdecode(b"caf\xe9.png"), "a.png", "é.png"]
    save(*(tmp_path / "images" / name for name in names))
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    train, val = split_of(module(tmp_path / "images", val_images=2))
    assert (train, val) == ({ordered[2]}, set(ordered[:2]))


def test_val_root_within_root(module, tmp_path):
    root = tmp_path / "all"
    save(root / "a.png", root / "b.png", root / "mine" / "c.png")
    train, val = split_of(module(root, val_root=root / "mine"))
    assert train == {"a.png", "b.png"}
    assert val == {"val_root:c.png"}


def test_held_out_images_do_not_depend_on_the_others(module, tmp_path):
    root = tmp_path / "many"
    save(*(root / f"{i}.png" for i in range(12)))
    train, val = split_of(module(root, val_images=4))
    assert (len(train), len(val), train & val) == (8, 4, set())
    assert split_of(module(root, val_images=4, seed=9))[1] == val
    gone = min(train)
    (root / gone).unlink()
    assert split_of(module(root, val_images=4)) == (train - {gone}, val)


def test_manifest(module, tmp_path):
    root = tmp_path / "listed"
    save(*(root / name for name in ("x/a.png", "x/b.png", "c.png", "unlisted.png")))
    rows = [{"file": "x/a.png", "split": "train"}, {"file": "x/b.png", "split": "val", "w": 16}]
    rows += [{"file": "c.png", "split": "test"}, {"file": "gone.png", "split": "train"}]
    (root / "manifest.json").write_text(json.dumps(rows))
    automatic = module(root)
    assert split_of(automatic) == ({"x/a.png"}, {"x/b.png"})
    assert set(automatic.cache.skipped) == {"gone.png"}
    (root / "manifest.json").rename(root / "other.json")
    assert split_of(module(root, manifest=root / "other.json")) == ({"x/a.png"}, {"x/b.png"})
    (root / "manifest.json").write_text('{"name": "an app"}')  # a manifest of something else
    assert split_of(module(root))[0] == {"x/a.png", "x/b.png", "c.png", "unlisted.png"}
    for text, message in {
        '{"name": "an app"}': "not a JSON list",
        "[": "not a JSON list",
        json.dumps([rows[0], rows[0] | {"split": "val"}]): "x/a.png is in two splits",
    }.items():
        (root / "bad.json").write_text(text)
        with pytest.raises(DataError, match=message):
            ready(module(root, manifest=root / "bad.json"))
    with pytest.raises(DataError, match="No such file"):
        ready(module(root, manifest=root / "missing.json"))


def test_validation_shows_whole_images_once(module):
    split = ready(module(val_images=3))
    shown = {}
    for rank in range(2):
        split.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares = split.val_dataloader()
        assert len(shares) == 2 - rank
        for i, x in enumerate(shares):
            shown[2 * i + rank] = split.on_after_batch_transfer(x, 0)
    split.trainer = SimpleNamespace(global_rank=0, world_size=4)
    with pytest.raises(DataError, match="4 ranks need as many validation images, not 3, or none"):
        split.val_dataloader()
    expected = [coordinates(n, *size) for n, size in enumerate(SIZES) if n in split.val_indices]
    assert sorted(shown) == [0, 1, 2]
    for i, image in enumerate(expected):
        x = shown[i]
        np.testing.assert_allclose(x.numpy(), 2.0 * image.transpose(2, 0, 1)[None] / 255 - 1, rtol=0, atol=1e-6)
        assert x.dtype == torch.float32
    recorder = fit(module(val_images=3))
    assert len(recorder.validated) == 6  # at steps 4 and 8
    assert recorder.validated[0].shape[-2:] == expected[0].shape[:2]
    assert not fit(module(val_images=0)).validated


# The cache


def decodes(monkeypatch):
    calls, read = [], cache.read_photograph
    monkeypatch.setattr(cache, "read_photograph", lambda *args, **more: calls.append(args) or read(*args, **more))
    return calls


def test_each_image_is_decoded_once_until_it_changes(module, photos, monkeypatch):
    calls = decodes(monkeypatch)
    ready(module())
    ready(module(tile_size=32, seed=1, val_images=1))
    assert len(calls) == 4
    Image.fromarray(coordinates(3, 16, 16)).save(photos / "0.png")
    changed = ready(module())
    assert len(calls) == 8
    np.testing.assert_array_equal(changed.cache[0], coordinates(3, 16, 16))


def test_the_users_cache_folder(module, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ready(module(cache_dir=None)).cache.folder.parent == tmp_path / "xdg" / "rnncodec"


@pytest.mark.parametrize("damage", ["short", "long", "no index", "half an index", "other numbers", "wrong shape"])
def test_a_damaged_cache_is_made_anew(module, damage):
    folder = ready(module()).cache.folder
    pixels, index = folder / "pixels.raw", folder / "index.json"
    if damage == "short":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif damage == "long":
        pixels.write_bytes(pixels.read_bytes() + b"\0")
    elif damage == "no index":
        index.unlink()
    elif damage == "half an index":
        index.write_bytes(index.read_bytes()[:50])
    elif damage == "other numbers":
        index.write_text(index.read_text().replace("93", "39"))
    else:
        index.write_text("[]")
    with pytest.raises(DataError, match="not a complete image cache"):
        ImageCache(folder)
    again = ready(module())
    for number, size in enumerate(SIZES):
        np.testing.assert_array_equal(again.cache[number], coordinates(number, *size))


def test_an_interrupted_build_leaves_nothing(module, monkeypatch, tmp_path):
    read = cache.read_photograph

    def interrupted(path, *arguments, **more):
        if path.name == "3.png":
            raise KeyboardInterrupt
        return read(path, *arguments, **more)

    monkeypatch.setattr(cache, "read_photograph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module().prepare_data()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    monkeypatch.setattr(cache, "read_photograph", read)
    folder = ready(module()).cache.folder
    # What a killed process leaves: a part of a build, under another name.
    folder.rename(folder.with_suffix(".tmp"))
    (folder.with_suffix(".tmp") / "pixels.raw").write_bytes(b"a part")
    again = ready(module())
    np.testing.assert_array_equal(again.cache[3], coordinates(3, *SIZES[3]))
    assert not folder.with_suffix(".tmp").exists()


def test_builds_at_the_same_time(module, monkeypatch, messages):
    calls = decodes(monkeypatch)
    modules = [module() for _ in range(4)]
    threads = [threading.Thread(target=m.prepare_data) for m in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 4
    for m in modules:
        m.setup()
        np.testing.assert_array_equal(m.cache[1], coordinates(1, *SIZES[1]))


def test_a_full_disk(module, monkeypatch, tmp_path):
    needed = sum(3 * height * width for height, width in SIZES)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(DataError, match=r"the decoded images need 0.0 GB, but only"):
        module().prepare_data()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    ready(module())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="choose another folder with cache_dir"):
        module(cache_dir=tmp_path / "file" / "cache").prepare_data()


# The download


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, of which `drops` says, request by request, after how many bytes the connection breaks."""

    def __init__(self):
        self.files, self.drops, self.requests, self.ranges = {}, [], [], True
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/clic"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        assert isinstance(server, Server)
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        content = server.files.get(self.path.removeprefix("/clic/"))
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + server.drops.pop(0) if server.drops else None
        self.wfile.write(content[start:end])

    def log_message(self, format, *args):
        pass


def zip_of(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def server(monkeypatch, photos):
    """A server of four small archives like CLIC's, without checksums."""
    monkeypatch.setattr(clic, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(clic, "CLIC_ARCHIVES", {name: (file, None) for name, (file, _) in clic.CLIC_ARCHIVES.items()})
    with Server() as server:
        for name, (file, _) in clic.CLIC_ARCHIVES.items():
            folder = name.split("/")[1]
            png = (photos / "1.png").read_bytes()
            members = {f"{folder}/": b"", f"{folder}/a.png": png, f"__MACOSX/{folder}/._a.png": b"", "read.me": b""}
            server.files[file] = zip_of(members)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def files_in(root):
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.name[0] != "."
    )


FIRST = "professional_train_2020.zip"
UNPACKED = ["mobile/train/a.png", "mobile/valid/a.png", "professional/train/a.png", "professional/valid/a.png"]


def test_download(server, module, photos, tmp_path, messages):
    root = tmp_path / "clic"
    assert split_of(module(root, download=True, clic_url=server.url)) == (
        {"mobile/train/a.png", "professional/train/a.png"},
        {"mobile/valid/a.png", "professional/valid/a.png"},
    )
    assert files_in(root) == UNPACKED
    assert (root / UNPACKED[0]).read_bytes() == (photos / "1.png").read_bytes()
    assert (
        f"{FIRST}: no checksum is known; its SHA-256 is {hashlib.sha256(server.files[FIRST]).hexdigest()}" in messages
    )
    assert len(server.requests) == 4
    download_clic(root, server.url)
    assert len(server.requests) == 4


def test_a_dropped_connection_goes_on_where_it_was(server, tmp_path, monkeypatch):
    content = server.files[FIRST]
    monkeypatch.setitem(clic.CLIC_ARCHIVES, "professional/train", (FIRST, hashlib.md5(content).hexdigest()))
    server.drops += [100, 0, 57]
    download_clic(tmp_path / "clic", server.url)
    assert [asked for path, asked in server.requests if path.endswith(FIRST)] == [
        None,
        "bytes=100-",
        "bytes=100-",
        "bytes=157-",
    ]
    assert files_in(tmp_path / "clic") == UNPACKED


def test_a_download_goes_on_in_another_run(server, tmp_path):
    root = tmp_path / "clic"
    server.drops += [100] + [0] * 50
    with pytest.raises(DataError, match=r"the connection closed after 100 of .* goes on from here"):
        download_clic(root, server.url)
    assert files_in(root) == [f"{FIRST}.part"]
    server.drops.clear()
    server.requests.clear()
    download_clic(root, server.url)
    assert server.requests[0][1] == "bytes=100-"
    assert files_in(root) == UNPACKED


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("have", ["a part", "all", "more"])
def test_any_partial_file(server, tmp_path, have, ranges):
    root, content = tmp_path / "clic", server.files[FIRST]
    server.ranges = ranges
    root.mkdir()
    (root / f"{FIRST}.part").write_bytes({"a part": content[:60], "all": content, "more": content + b"?"}[have])
    download_clic(root, server.url)
    assert files_in(root) == UNPACKED


def test_a_wrong_checksum_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setitem(clic.CLIC_ARCHIVES, "professional/train", (FIRST, "0" * 32))
    with pytest.raises(DataError, match=f"MD5 is {hashlib.md5(server.files[FIRST]).hexdigest()} where 0000"):
        download_clic(tmp_path / "clic", server.url)
    assert files_in(tmp_path / "clic") == []


@pytest.mark.parametrize(
    "members",
    [
        {"train/a.png": b"1", "../outside.png": b"2"},
        {"train/../../outside.png": b"2"},
        {"/outside.png": b"2"},
        {"train\\..\\..\\outside.png": b"2"},
        {"train/a.png": b"0" * 1001},
        {f"train/{i}.png": b"0" * 900 for i in range(3)},
        {"train/a.txt": b"no image"},
    ],
)
def test_hostile_archives_are_refused(server, tmp_path, monkeypatch, members):
    monkeypatch.setattr(clic, "MAX_MEMBER", 1000)
    monkeypatch.setattr(clic, "MAX_UNPACKED", 2000)
    server.files[FIRST] = zip_of(members)
    root = tmp_path / "a" / "clic"
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="refused and deleted"):
        download_clic(root, server.url)
    assert files_in(root) == []
    assert set(tmp_path.rglob("*")) - before <= {root.parent, root, root / ".clic.lock"}


def test_damaged_archives_are_refused(server, tmp_path):
    whole = server.files[FIRST]
    broken = bytearray(whole)
    broken[whole.index(b"IDAT") + 20] ^= 1
    for content in (whole[:-30], b"<html>", bytes(broken)):
        server.files[FIRST] = content
        with pytest.raises(DataError, match="refused and deleted"):
            download_clic(tmp_path / "clic", server.url)
        assert files_in(tmp_path / "clic") == []


def test_a_server_without_the_file(server, tmp_path):
    server.files.clear()
    with pytest.raises(DataError, match="404"):
        download_clic(tmp_path / "clic", server.url)
    assert len(server.requests) == 1
    with pytest.raises(DataError, match="not an http address"):
        download_clic(tmp_path / "clic", Path(tmp_path).as_uri())


def test_a_download_checks_the_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=len(server.files[FIRST]) - 1))
    with pytest.raises(DataError, match=f"{FIRST}.part need"):
        download_clic(tmp_path / "clic", server.url)
