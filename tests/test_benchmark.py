"""The benchmark script, on tiny sizes: it runs and reports every ratio."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))  # the script lies beside the package

import benchmark


def test_ratios_are_taken_turn_by_turn():
    ratio = benchmark.Ratio.of([2, 9, 8], [1, 3, 8])
    assert (ratio.median, ratio.low, ratio.high) == (2, 1, 3)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice is about runs longer than these
def test_a_quick_run_reports_every_ratio(tmp_path, capsys):
    assert benchmark.main(["--quick", "--json", str(tmp_path / "ratios.json")]) == 0
    result = json.loads((tmp_path / "ratios.json").read_text())
    assert set(result["entropy_over_network"]) == {"encode", "decode"}
    assert set(result["cost"]) == {f"{name}, {mode}" for name in ("T17", "debug") for mode in ("float32", "fastest")}
    assert set(result["stream_over_training"]) == {"2 iterations", "4 iterations"}
    assert result["cost"]["T17, float32"]["encode"]["median"] == 1
    assert "time of entropy" in capsys.readouterr().out  # the title of the last table, which may be broken


def test_errors_are_one_line_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("name: x")
    assert benchmark.main(["--quick", "--config", str(tmp_path / "bad.yaml")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"benchmark: error: {tmp_path / 'bad.yaml'}: not a config with a model"
    ]
