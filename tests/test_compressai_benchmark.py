"""Tests of the benchmark with CompressAI: processes, ratios and, if CompressAI is installed, a real run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compressai_benchmark as benchmark
from rnncodec.entropy import ContextConfig, ContextModel
from rnncodec.network import LatentConfig, RecurrentCodec
from rnncodec.weights import save_weights

NETWORK = LatentConfig(
    iterations=3,
    bits=16,
    latents=24,
    encoder_channels=8,
    decoder_channels=8,
    mixed=8,
    around=8,
    analysis_channels=(8, 8, 8),
    synthesis_channels=(8, 8, 8),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A photograph and weights."""
    folder = tmp_path_factory.mktemp("files")
    image, weights = folder / "photo.png", folder / "tiny.safetensors"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(image)
    torch.manual_seed(0)
    network = RecurrentCodec(NETWORK)
    network.start(torch.rand(8, 3, 64, 64) * 2 - 1)
    context = ContextModel(ContextConfig(kind="grouped", bits=16, groups=4, channels=8, iterations=3))
    save_weights(weights, network, "tiny", context=context.quantize())
    return image, weights


def test_a_codec_works_in_its_own_process(files):
    image, weights = files
    with benchmark.server(Path(sys.executable), str(weights), image, threads=1) as busy:
        assert busy.tasks == list(benchmark.OURS)
        for task in busy.tasks:
            seconds, memory = busy.do(task)
            assert 0 < seconds < 60
            if sys.platform == "linux":
                assert 0.05 < memory < 8  # an interpreter with torch
        process = busy.process
        with pytest.raises(RuntimeError, match="has stopped"):
            busy.do("no such task")
    assert process.poll() is not None


def test_ratios_are_of_the_same_turn():
    def of(*seconds, memory=1.0):
        return {"seconds": list(seconds), "GiB": memory}

    found = {
        "ours": {
            "encode": of(3, 8, memory=2.0),
            "decode": of(2, 4),
            "decode one iteration": of(1, 1),
            "encode raw": of(2, 2),
            "decode raw": of(1, 3),
        },
        "theirs": {"encode": of(1, 2, memory=4.0), "decode": of(4, 2)},
    }
    encode, decode, first, coding, reading = benchmark.ratios(found, "ours")
    assert encode == ("theirs", "encode", [3, 4], 0.5)
    assert decode == ("theirs", "decode", [0.5, 2], 1)
    assert first == ("theirs", "decode one iteration", [0.25, 0.5], 1)
    assert coding[2] == pytest.approx([1 / 3, 3 / 4])
    assert reading[2] == pytest.approx([1 / 2, 1 / 4])


def test_bad_input_is_one_line(files, tmp_path, capfd):
    assert benchmark.main([str(tmp_path / "none.png")]) == 1
    assert capfd.readouterr().err == f"compressai_benchmark: no such file: {tmp_path / 'none.png'}\n"
    (tmp_path / "environment").write_text("a file, where a folder should be")
    assert benchmark.main([str(files[0]), "--environment", str(tmp_path / "environment")]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("compressai_benchmark: no environment for CompressAI")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RNNCODEC_COMPRESSAI"), reason="needs RNNCODEC_COMPRESSAI, a folder for it")
def test_beside_compressai(files, tmp_path):
    image, weights = files
    result = tmp_path / "seconds.json"
    environment = os.environ["RNNCODEC_COMPRESSAI"]
    command = [sys.executable, benchmark.__file__, str(image), "--weights", str(weights), "--environment", environment]
    subprocess.run([*command, "--turns", "2", "--threads", "1", "--json", str(result)], check=True)
    found = json.loads(result.read_text())["photo.png"]
    assert set(found) == {str(weights), *benchmark.THEIRS}
    for codec in benchmark.THEIRS:
        for task in ("encode", "decode"):
            assert len(found[codec][task]["seconds"]) == 2
            assert found[codec][task]["GiB"] > 0
