"""Tests of training data in tar files: the index, the stream, its shares and resumption, and what goes wrong."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rnncodec.data import DataError, PatchDataModule
from rnncodec.data.manifest import manifest_of
from rnncodec.data.patches import StreamSampler
from rnncodec.data.shards import find_shards, index_shards
from rnncodec.data.windows import LANES, SHARDS, TILES, WINDOW, WindowStream, shuffled

SIDE = 40


def image(number, side=SIDE):
    """A picture whose red says which it is; green and blue are its rows and columns."""
    pixels = np.empty((side, side + 8, 3), np.uint8)
    pixels[..., 0] = number
    pixels[..., 1] = np.arange(side)[:, None]
    pixels[..., 2] = np.arange(side + 8)
    return pixels


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_shards(folder, count=4, each=8, **more):
    """Tar files as webdataset writes them: for each sample an image and a text."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        with tarfile.open(folder / f"train-{shard:03}.tar", "w") as tar:
            contents = {"__meta.txt": b"no image"}
            for number in range(shard * each, shard * each + each):
                contents |= {f"{number:04}.png": png(image(number)), f"{number:04}.json": b"{}"}
            for name, data in (contents | more).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def indexed(shards, folder, pattern="*.tar"):
    return index_shards(find_shards([f"{shards}/{pattern}"]), folder, 10**6)


def data_module(root, tmp_path, **options):
    chosen = {"val_images": 3, "batch_size": 4, "patch_size": 16, "tile_size": 32, "cache_dir": tmp_path / "cache"}
    module = PatchDataModule(root, **(chosen | options))
    module.prepare_data()
    module.setup()
    return module


def numbers(batch):
    """Which images the tiles of a batch are of."""
    return batch["tiles"][:, 0, 0, 0].tolist()


def test_the_index_finds_what_tar_files_hold(shards, tmp_path):
    found = indexed(shards, tmp_path)
    expected = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            expected += [tar.extractfile(m).read() for m in tar if m.name.endswith(".png")]  # pyright: ignore
    assert [found.content(i) for i in range(32)] == expected
    assert np.array_equal(found.read(9), image(9))
    assert found.groups.tolist() == [i // 8 for i in range(32)]
    assert found.names[9] == "train-001.tar/0009.png"


def test_the_index_is_kept_until_a_shard_changes(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards")
    indexed(shards, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("rnncodec.data.shards.members", lambda url: pytest.fail("indexed again"))
        assert len(indexed(shards, tmp_path).places) == 32
    write_shards(shards, each=7)
    assert len(indexed(shards, tmp_path).places) == 28


@pytest.mark.parametrize("pattern", ["*.tar", "train-{000..003}.tar", "train-00[0-3].tar"])
def test_shards_are_named_by_patterns(shards, pattern):
    assert find_shards([f"{shards}/{pattern}"]) == [f"file://{shards}/train-00{i}.tar" for i in range(4)]


def test_shards_of_any_file_system_are_read(shards, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    found = index_shards(find_shards(["memory://bucket/train-*.tar"]), tmp_path, 10**6)
    assert [int(found.read(i)[0, 0, 0]) for i in range(32)] == list(range(32))


def test_tiles_are_parts_of_the_images(shards, tmp_path):
    stream = data_module(f"{shards}/*.tar", tmp_path).train_dataloader().dataset
    assert isinstance(stream, WindowStream)
    for batch in range(20):
        item = stream[batch]
        assert item["next_sample"] == 4 * (batch + 1)
        for tile in item["tiles"].numpy():
            number, y, x = tile[0, 0]
            assert np.array_equal(tile, image(number)[y : y + 32, x : x + 32])
        assert item["corners"].min() >= 0
        assert item["corners"].max() <= 16


def test_an_epoch_shows_every_image_once_and_held_out_ones_never(shards, tmp_path):
    """Windows of one epoch over all ranks, 16 tiles of each image; then another order."""
    module = data_module(f"{shards}/*.tar", tmp_path)
    held = {int(name[-8:-4]) for name in module.val_names}
    assert len(held) == 3
    stream = WindowStream(module.images, module.chosen, batch_size=4, tile_size=32, patch_size=16, flips=True, seed=0)
    orders = []
    for epoch in range(3):
        orders.append([stream.at(epoch * 29 + place) for place in range(29)])
        assert sorted(orders[-1]) == sorted(set(range(32)) - held)
    assert orders[0] != orders[1] != orders[2]
    tiles = stream.window(0)
    assert tiles.shape == (WINDOW, 32, 32, 3)
    assert np.bincount(tiles[:, 0, 0, 0]).max() == TILES


def test_ranks_read_other_windows_and_together_every_image(shards, tmp_path):
    module = data_module(f"{shards}/*.tar", tmp_path, val_images=0)
    common = {"batch_size": 64, "tile_size": 32, "patch_size": 16, "flips": True, "seed": 0, "world_size": 2}
    streams = [WindowStream(module.images, module.chosen, rank=rank, **common) for rank in range(2)]
    assert streams[0].count == 16  # images of a window: two windows are an epoch
    first = [{n for batch in range(0, LANES * 4, LANES) for n in numbers(stream[batch])} for stream in streams]
    assert not first[0] & first[1]
    assert first[0] | first[1] == set(range(32))


def test_workers_change_nothing(shards, tmp_path):
    stream = data_module(f"{shards}/*.tar", tmp_path).train_dataloader().dataset

    def batches(workers):
        loader = iter(DataLoader(stream, batch_size=None, sampler=StreamSampler(lambda: 0), num_workers=workers))
        return [next(loader) for _ in range(12)]

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(torch.as_tensor(alone[key]), torch.as_tensor(shared[key])) for key in alone)


def test_a_resumed_stream_goes_on_where_it_was(shards, tmp_path):
    module = data_module(f"{shards}/*.tar", tmp_path)
    whole = iter(module.train_dataloader())
    for _ in range(70):  # beyond the first windows
        batch = next(whole)
        module.on_after_batch_transfer(batch, 0)
    state = module.state_dict()
    assert state["position"] == 280
    resumed = data_module(f"{shards}/*.tar", tmp_path)
    resumed.load_state_dict(state)
    for _, expected, found in zip(range(10), whole, resumed.train_dataloader(), strict=False):
        assert torch.equal(expected["tiles"], found["tiles"])
        assert torch.equal(expected["corners"], found["corners"])


def test_images_are_mixed_only_with_those_of_some_files():
    groups = np.repeat(np.arange(40), 5)
    order = shuffled(groups, 0, 0)
    assert sorted(order) == list(range(200))
    parts = [set(groups[order[start : start + 5 * SHARDS]]) for start in range(0, 200, 5 * SHARDS)]
    assert [len(part) for part in parts] == [SHARDS] * 5  # so that only these have to be near
    assert list(groups[order[:40]]) != sorted(groups[order[:40]])
    assert not np.array_equal(order, shuffled(groups, 0, 1))
    assert not np.array_equal(order, shuffled(groups, 1, 0))


def test_bad_and_small_images_are_replaced(tmp_path):
    more = {"bad.png": b"no image", "small.png": png(image(99, 20)), ".hidden.png": b"", "empty.png": b""}
    shards = write_shards(tmp_path / "shards", 1, 5, **more)
    module = data_module(f"{shards}/*.tar", tmp_path, val_images=0)
    assert len(module.images.places) == 8
    with pytest.warns(UserWarning, match="have no tile, or cannot be read: left out"):
        window = module.train_dataloader().dataset.window(0)  # pyright: ignore[reportAttributeAccessIssue]
    assert set(window[:, 0, 0, 0]) <= set(range(5))
    for path in shards.glob("*.tar"):
        path.unlink()
    with tarfile.open(shards / "bad.tar", "w") as tar:
        info = tarfile.TarInfo("bad.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"bad"))
    with pytest.raises(DataError, match=r"bad.tar/bad.png, has a tile"):
        data_module(f"{shards}/*.tar", tmp_path, val_images=0).train_dataloader().dataset.window(0)  # pyright: ignore


def test_validation_images_may_be_a_folder(shards, tmp_path):
    (tmp_path / "val").mkdir()
    Image.fromarray(image(77)).save(tmp_path / "val/a.png")
    module = data_module(f"{shards}/*.tar", tmp_path, val_root=tmp_path / "val")
    assert module.val_names == ["val_root:a.png"]
    assert len(module.chosen) == 32
    (shown,) = module.val_dataloader()
    assert np.array_equal(shown[0].permute(1, 2, 0), image(77))


def test_what_is_held_out_depends_on_no_place_and_is_renewed(tmp_path):
    """Moved tar files hold out the same images, and have the same fingerprint; a new version is shown at once."""
    found = [data_module(f"{write_shards(tmp_path / name, 2)}/*.tar", tmp_path) for name in ("a", "b")]
    assert found[0].val_names == found[1].val_names
    assert manifest_of(found[0]).fingerprint == manifest_of(found[1]).fingerprint
    with tarfile.open(tmp_path / "a/train-000.tar", "w") as tar:
        for number in range(8):
            info = tarfile.TarInfo(f"{number:04}.png")
            info.size = len(data := png(255 - image(number)))
            tar.addfile(info, io.BytesIO(data))
    again = data_module(f"{tmp_path}/a/*.tar", tmp_path)
    assert again.val_names == found[0].val_names
    renewed = 0
    for name, shown in zip(again.val_names, again.val_dataloader(), strict=True):
        old = image(int(name[-8:-4]))
        renewed += name.startswith("train-000")
        assert np.array_equal(shown[0].permute(1, 2, 0), 255 - old if name.startswith("train-000") else old)
    assert renewed


def test_an_index_without_marks_of_change_is_not_kept(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("rnncodec.data.shards.MARKS", ())
    indexed(shards, tmp_path)
    assert not list(tmp_path.glob("shards-*.json"))


def test_shards_in_folders_with_special_names(tmp_path):
    write_shards(tmp_path / "[x]", 1)
    (url,) = find_shards([str(tmp_path / "[x]/train-000.tar")])
    assert url.endswith("/[x]/train-000.tar")


def test_held_out_images_are_shown_whole(shards, tmp_path):
    module = data_module(f"{shards}/*.tar", tmp_path)
    for name, shown in zip(module.val_names, module.val_dataloader(), strict=True):
        assert np.array_equal(shown[0].permute(1, 2, 0), image(int(name[-8:-4])))


def test_a_latent_network_starts_from_a_sample(shards, tmp_path):
    sample = data_module(f"{shards}/*.tar", tmp_path).sample(300 * 32 * 32)
    assert tuple(sample.shape) == (300, 3, 32, 32)
    assert -1 <= sample.min() < sample.max() <= 1


@pytest.mark.parametrize(
    ("roots", "options", "message"),
    [
        (["none.tar"], {}, "none.tar: no such tar file"),
        (["none-*.tar"], {}, "none-*.tar: no such tar file"),
        (["plain.tar", "folder"], {}, "either folders or tar files, not both"),
        ([], {}, "root names no folder"),
        (["text.tar"], {}, "text.tar: "),
        (["packed.tar"], {}, "packed.tar: "),
        (["cut.tar"], {}, "cut.tar: "),
        (["empty.tar"], {}, "no images in the 1 tar files"),
        (["nowhere://bucket/a.tar"], {}, "nowhere://bucket/a.tar: Protocol not known: nowhere"),
        (["plain.tar"], {"download": True}, "download goes with a folder of images"),
        (["plain.tar"], {"manifest": "a.json"}, "manifest goes with a folder of images"),
        (["plain.tar"], {"selection": "high_entropy"}, "selection high_entropy goes with a folder of images"),
        (["plain.tar"], {"val_images": 8}, "leaves none to train on"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(roots, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(Path("."), 1)
    data = Path("train-000.tar").read_bytes()
    Path("train-000.tar").rename("plain.tar")
    Path("text.tar").write_text("no tar file")
    Path("packed.tar").write_bytes(gzip.compress(data))
    Path("cut.tar").write_bytes(data[:1700])
    with tarfile.open("empty.tar", "w"):
        pass
    with pytest.raises(DataError) as error:
        data_module(roots, tmp_path, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = write_shards(tmp_path / "s", 1) / "train-000.tar"
    with tarfile.open(path) as tar:
        fourth = tar.getmember("0004.png").offset
    data = bytearray(path.read_bytes())
    data[fourth : fourth + 100] = bytes(range(1, 101))
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000\.tar: damaged after 4 images"):
        index_shards(find_shards([str(path)]), tmp_path / "cache", 10**6)


def test_members_above_the_folder_are_not_hidden(tmp_path):
    write_shards(tmp_path / "s", 1, 0, **{"../photos/a.png": png(image(1)), "../.b/a.png": png(image(2))})
    found = index_shards(find_shards([str(tmp_path / "s" / "train-000.tar")]), tmp_path, 10**6)
    assert [place.name for place in found.places] == ["../photos/a.png"]


def test_a_shard_that_shrinks_is_an_error(tmp_path):
    shards = write_shards(tmp_path / "shards", 1)
    module = data_module(f"{shards}/*.tar", tmp_path)
    path = shards / "train-000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"train-000.tar: shorter than when it was indexed"):
        module.train_dataloader().dataset.window(0)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_manifest_names_the_shards(shards, tmp_path):
    """With what the index has of them, and the images to validate on by their content."""
    manifest = manifest_of(data_module(f"{shards}/*.tar", tmp_path, val_images=0))
    url = "train-001.tar"
    listed = [[f"{number:04}.png", len(png(image(number)))] for number in range(8, 16)]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    row = {"file": url, "split": "train", "bytes": sum(size for _, size in listed), "sha256": digest}
    assert manifest.rows[1] == row
    assert (len(manifest.rows), manifest.root) == (4, f"file://{shards}")
    held = manifest_of(data_module(f"{shards}/*.tar", tmp_path))
    assert [row["split"] for row in held.rows].count("val") == 3
    assert held.images == {"train": 29, "val": 3}


def test_several_folders_are_one_set(tmp_path):
    for number, name in enumerate(("a/x.png", "a/train/y.png", "b/x.png", "b/valid/z.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(number)).save(tmp_path / name)
    module = data_module([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path)
    names = {entry.name: int(module.cache[i][0, 0, 0]) for i, entry in enumerate(module.cache.entries)}
    assert names == {"0/train/y.png": 1, "1/x.png": 2, "1/valid/z.png": 3}
    assert module.val_names == ["1/valid/z.png"]


@pytest.mark.slow
def test_a_training_on_shards_ends_as_one_that_was_not_stopped(shards, tmp_path):
    """On the command line, with workers."""
    command = [sys.executable, "-m", "rnncodec", "train", "fit", "--config", "debug", "--data.root"]
    command += [f"{shards}/train-*.tar", "--data.cache_dir", str(tmp_path / "cache"), "--data.val_images", "2"]
    command += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--data.num_workers", "2"]
    command += ["--trainer.default_root_dir", str(tmp_path), "--data.tile_size", "32", "--model.iterations", "2"]
    command += ["--trainer.val_check_interval", "100", "--model.growth", "{}"]

    def fit(name, *options):
        done = subprocess.run([*command, "--name", name, *options], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / name / "last.ckpt", weights_only=False)["state_dict"]

    environment = os.environ | {"WANDB_MODE": "disabled"}
    whole = fit("whole", "--trainer.max_steps", "8")
    fit("cut", "--trainer.max_steps", "5")
    resumed = fit("cut", "--trainer.max_steps", "8", "--ckpt_path", str(tmp_path / "cut/last.ckpt"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.fixture
def store(monkeypatch):
    """An object store on this machine."""
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    yield fsspec.filesystem("s3")
    server.stop()


@pytest.mark.skipif(not find_spec("s3fs"), reason="needs s3fs")
def test_shards_in_an_object_store(store, shards, tmp_path):
    """Also with worker processes, which have connections of their own."""
    store.mkdir("bucket")
    for path in shards.glob("*.tar"):
        store.pipe_file(f"bucket/{path.name}", path.read_bytes())
    module = data_module("s3://bucket/train-*.tar", tmp_path, num_workers=2)
    local = data_module(f"{shards}/train-*.tar", tmp_path)
    # Names differ, and so does the choice of images to validate on.
    for name, shown in zip(module.val_names, module.val_dataloader(), strict=True):
        assert np.array_equal(shown[0].permute(1, 2, 0), image(int(name[-8:-4])))
    seen = [number for _, batch in zip(range(80), module.train_dataloader(), strict=False) for number in numbers(batch)]
    assert set(seen) <= set(range(32)) - {int(name[-8:-4]) for name in module.val_names}
    assert len(set(seen)) > 20
    assert len(local.images.places) == len(module.images.places) == 32
    with pytest.raises(DataError, match=r"s3://bucket/none.tar: no such tar file"):
        data_module("s3://bucket/none.tar", tmp_path)
