"""Tests of `compress` and `decompress` in CompressAI's own evaluation, if there is an environment for CompressAI."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compressai_benchmark as benchmark
import rnncodec

# Arguments: folders to import from, weights, iterations, images.
EVALUATE = """
import json, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, torch
from compressai.utils.eval_model import __main__ as theirs
from PIL import Image

ours, packages, weights, iterations, *images = sys.argv[1:]
sys.path += [ours, packages]  # what their environment lacks
import rnncodec


def read(path):  # theirs needs torchvision
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


theirs.read_image = read
codec = rnncodec.load(weights)
compress = partial(codec.compress, iterations=int(iterations))
model = SimpleNamespace(compress=compress, decompress=codec.decompress, parameters=codec.network.parameters)
how = {"architecture": "rnncodec", "half": False, "per_image": False}
found = [theirs.inference(model, read(image)) for image in images]
print(json.dumps([*found, theirs.eval_model(model, "", "", [Path(image) for image in images], **how)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RNNCODEC_COMPRESSAI"), reason="needs RNNCODEC_COMPRESSAI, a folder for it")
@pytest.mark.parametrize("iterations", [1, 3])
def test_their_evaluation_measures_what_ours_does(photos, tmp_path, iterations):
    python = benchmark.environment(Path(os.environ["RNNCODEC_COMPRESSAI"]))
    photo = Image.open(photos / "chelsea.png").convert("RGB")
    sizes = [(256, 192), (200, 250)]
    images = [tmp_path / f"{width}.png" for width, _ in sizes]
    for path, size in zip(images, sizes, strict=True):
        photo.crop((100, 20, 100 + size[0], 20 + size[1])).save(path)
    root, packages = Path(rnncodec.__file__).parent.parent, sysconfig.get_path("purelib")
    command = [python, "-c", EVALUATE, root, packages, "small", str(iterations), *images]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    *each, mean = json.loads(out.splitlines()[-1])
    codec = rnncodec.load()
    for path, found in zip(images, each, strict=True):
        image = np.asarray(Image.open(path))
        # Theirs codes images with a black border up to multiples of 64, and measures them without.
        added = [-side % 64 for side in image.shape[:2]]
        border = [(more // 2, more - more // 2) for more in added]
        data = codec.encode(np.pad(image, (*border, (0, 0))), iterations)
        assert found["bpp"] == 8 * len(data) / (image.shape[0] * image.shape[1])
        (top, bottom), (left, right) = border
        decoded = np.asarray(codec.decode(data)).astype(float)
        decoded = decoded[top : decoded.shape[0] - bottom, left : decoded.shape[1] - right]
        assert found["psnr-rgb"] == pytest.approx(10 * np.log10(255**2 / np.square(decoded - image).mean()), abs=1e-3)
    for key in ("bpp", "psnr-rgb"):
        assert mean[key] == pytest.approx(np.mean([found[key] for found in each]))
