"""A training of seconds, for the tests of its command line, of what it says, and of clusters."""

import numpy as np
import torch
from PIL import Image


def noise_images(folder, count):
    """The folder with so many images of one tile each."""
    folder.mkdir()
    for seed in range(count):
        noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")
    return folder


def arguments(images, folder, *more, steps=8):
    """A training of a tiny network, with a validation after every third step."""
    return [
        "fit", "--config", "debug", "--data.root", str(images), "--data.cache_dir", str(images.parent / "cache"),
        "--data.val_images", "2", "--data.batch_size", "2", "--data.num_workers", "0",
        "--model.network.encoder_channels", "[4, 4, 4, 4]", "--model.network.decoder_channels", "[4, 4, 4, 4, 4]",
        "--model.iterations", "2", "--model.growth", "null",
        "--trainer.default_root_dir", str(folder), "--trainer.accelerator", "cpu", "--trainer.precision", "32-true",
        "--trainer.max_steps", str(steps), "--trainer.val_check_interval", "3", *more,
    ]  # fmt: skip


def states(folder):
    """The weights, their averages and the optimizer's moments in the last checkpoint of a run, and its step."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    moments = checkpoint["optimizer_states"][0]["state"]
    found = {f"{kind} {name}": value for kind in ("state_dict", "current_model_state")
             for name, value in checkpoint[kind].items()}  # fmt: skip
    found |= {f"{number} {name}": value for number, state in moments.items() for name, value in state.items()}
    return found, checkpoint["global_step"]


def assert_same(first, second):
    """Asserts that two runs have ended in the same step with the same state, bit for bit."""
    (a, step), (b, other) = states(first), states(second)
    assert step == other
    assert a.keys() == b.keys()
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(b[name])) for name, value in a.items())
