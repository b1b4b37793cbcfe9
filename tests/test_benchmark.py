"""Tests of the benchmark script with tiny sizes: it runs and reports every ratio."""

import json
import logging
from pathlib import Path

import pytest
import yaml

import benchmark


@pytest.fixture(autouse=True)
def level():
    """The program silences Lightning for good; later tests hear it again."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


def test_ratios_are_taken_turn_by_turn():
    ratio = benchmark.Ratio.of([2, 9, 8], [1, 3, 8])
    assert (ratio.median, ratio.low, ratio.high) == (2, 1, 3)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice is about runs longer than these
def test_a_quick_run_reports_every_ratio(tmp_path, capsys):
    assert benchmark.main(["--quick", "--json", str(tmp_path / "ratios.json")]) == 0
    result = json.loads((tmp_path / "ratios.json").read_text())
    assert set(result["entropy_over_network"]) == {"encode", "decode"}
    names, modes = ("toderici2017", "debug"), ("float32", "fastest")
    assert set(result["cost"]) == {f"{name}, {mode}" for name in names for mode in modes}
    assert set(result["stream_over_training"]) == {"2 iterations", "4 iterations"}
    assert result["cost"]["toderici2017, float32"]["encode"]["median"] == 1
    assert "time of entropy" in capsys.readouterr().out  # the title of the last table, which may be broken


@pytest.mark.filterwarnings("ignore")
def test_a_joint_training_is_measured_with_its_patches_and_its_context_model(tmp_path, monkeypatch):
    config = yaml.safe_load((Path(benchmark.__file__).parent.parent / "configs" / "small_falling.yaml").read_text())
    tiny = {"encoder_channels": [8, 16, 16, 16], "decoder_channels": [16] * 5}
    context = {"kind": "parallel", "channels": 8}
    config["model"]["init_args"] |= {"network": tiny, "context": context, "growth": {0: [3, 16]}}
    config["data"] |= {"patch_size": 80, "tile_size": 112}
    (tmp_path / "joint.yaml").write_text(yaml.safe_dump(config))
    measured, time_training = set(), benchmark.time_training

    def spy(module, data, mode, steps):
        measured.add((type(module).__name__, module.iterations, data.tile_size, data.patch_size, data.batch_size))
        return time_training(module, data, mode, steps)

    monkeypatch.setattr(benchmark, "time_training", spy)
    result = tmp_path / "ratios.json"
    assert benchmark.main(["--quick", "--config", str(tmp_path / "joint.yaml"), "--json", str(result)]) == 0
    assert set(json.loads(result.read_text())["stream_over_training"]) == {"3 iterations", "16 iterations"}
    costs = {("CodecTraining", 2, 64, 32, 2), ("JointTraining", 2, 64, 32, 2)}  # like for like
    assert measured == costs | {("JointTraining", k, 112, 80, 2) for k in (3, 16)}


@pytest.mark.parametrize(
    "text",
    [
        "name: x",
        "model: 3",
        "{model: {}, data: 3}",
        "model: {speed: 3}",
        "model: {class_path: ContextTraining, init_args: {codec: small}}",
        "model: {class_path: CodecTraining, init_args: {rate_weight: 0.1}}",
    ],
)
def test_errors_are_one_line_before_anything_is_measured(text, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    assert benchmark.main(["--quick", "--config", str(tmp_path / "bad.yaml")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"benchmark: error: {tmp_path / 'bad.yaml'}: not a config with a model"
    ]
