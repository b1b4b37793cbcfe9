"""Tests of the comparison of variants, with real trainings of a few steps, one of which is resumed and one fails."""

import csv
import io
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from PIL import Image

import compare
from compare import Variant
from rnncodec.files.images import load_image, save_image
from rnncodec.network import NetworkConfig
from rnncodec.training.cli import main as train
from rnncodec.weights import load_weights

ROOT = Path(__file__).parent.parent

BASE = Variant("lstm", "lstm", "additive", "stochastic")
MEMBERS = {"cells": len(compare.CELLS), "reconstructions": 3, "binarizers": 3}  # of each study
ALL = sum(MEMBERS.values()) - 2  # they share the base
STEPS, BATCH = 4, 2


@pytest.fixture(scope="module")
def crops(photos, tmp_path_factory) -> Path:
    """Small photographs, just large enough for MS-SSIM."""
    folder = tmp_path_factory.mktemp("crops")
    for path in photos.iterdir():
        save_image(load_image(path)[:176, :176], folder / f"{path.stem}.png")
    return folder


def options(folder: Path, steps: int = STEPS) -> list[str]:
    return [
        "--data.cache_dir", str(folder / "cache"), "--data.val_images", "1", "--data.batch_size", str(BATCH),
        "--trainer.accelerator", "cpu", "--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0",
        "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--model.iterations", "2",
        "--model.network.encoder_channels", "[4,4,4,4]", "--model.network.decoder_channels", "[4,4,4,4,4]",
    ]  # fmt: skip


def command(crops: Path, folder: Path, *arguments: str) -> list[str]:
    images = [str(crops / name) for name in ("coffee.png", "chelsea.png")]
    config = str(ROOT / "configs" / "debug.yaml")
    start = [*images, "--root", str(crops), "--config", config, "--output", str(folder / "out"), *arguments]
    return [*start, "--", *options(folder)]


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def check_numbers(row: dict[str, str], output: Path) -> None:
    """Checks a row against the points of its images, averaged and integrated here."""
    points = table(output / row["variant"] / "results" / "points.csv")
    settings = sorted({int(point["setting"]) for point in points})
    assert settings == list(range(1, 17))

    def mean(name: str) -> np.ndarray:
        groups = [[float(p[name]) for p in points if int(p["setting"]) == k] for k in settings]
        assert {len(group) for group in groups} == {2}
        return np.array(groups).mean(axis=1)

    def integral(values: np.ndarray, low: float, high: float) -> float:
        total = 0.0
        for x0, x1, y0, y1 in zip(rates, rates[1:], values, values[1:], strict=False):
            a, b = max(x0, low), min(x1, high)
            if a < b:
                slope = (y1 - y0) / (x1 - x0)
                total += (b - a) * (y0 + slope * ((a + b) / 2 - x0))
        return total

    rates = mean("bpp")
    assert rates[0] < 0.25
    assert rates[-1] > 2
    for metric in ("ms_ssim", "psnr_hvs"):
        values = mean(metric)
        assert float(row[f"{metric}_auc"]) == pytest.approx(integral(values, rates[0], 2), rel=1e-9)
        assert float(row[f"{metric}_auc_window"]) == pytest.approx(integral(values, 0.25, 1.875), rel=1e-9)
    for k in (1, 4, 16):
        assert float(row[f"psnr_{k}"]) == pytest.approx(mean("psnr")[k - 1], rel=1e-9)
    assert (int(row["steps"]), int(row["patches"])) == (STEPS, STEPS * BATCH)


def check_order(rows: list[dict[str, str]]) -> None:
    areas = [float(row["ms_ssim_auc"]) for row in rows if not row["failed"]]
    assert areas == sorted(areas, reverse=True)
    failed = [bool(row["failed"]) for row in rows]
    assert failed == sorted(failed)


@pytest.fixture
def quiet(monkeypatch):
    """What the trainings find in their environment."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which a training in this process sets
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of train.py, but in this process, which need not load everything again."""
    assert command[:2] == [sys.executable, str(ROOT / "train.py")]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        try:
            status = train(command[2:])
        except SystemExit as end:
            status = cast(int, end.code)
    return subprocess.CompletedProcess(command, status, out.getvalue(), error.getvalue())


@pytest.mark.filterwarnings("ignore")  # Lightning warns of small runs
@pytest.mark.usefixtures("undrawn")
def test_one_fails_the_others_go_on_and_nothing_is_done_twice(crops, tmp_path, quiet, capsys, monkeypatch):
    output = tmp_path / "out"
    run = compare.run

    def run_or_train_here(command, log, variables):
        if broken.parent in log.parents:
            return run(command, log, variables)
        done = here(command)
        log.write_text(done.stderr)
        assert done.returncode == 0
        return ""

    monkeypatch.setattr(compare, "run", run_or_train_here)
    broken = output / "lstm-additive-noise" / "last.ckpt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no checkpoint")
    arguments = command(crops, tmp_path, "--studies", "binarizers")
    assert compare.main(arguments) == 1
    captured = capsys.readouterr()
    *good, bad = rows = table(output / "binarizers.csv")
    check_order(rows)
    assert {row["variant"] for row in good} == {"lstm-additive-stochastic", "lstm-additive-sign"}
    for row in good:
        check_numbers(row, output)
        network = load_weights(output / row["variant"] / "weights.safetensors").network
        assert int(row["parameters"]) == sum(parameter.numel() for parameter in network.parameters())
        assert isinstance(network.config, NetworkConfig)
        assert network.config.binarizer == row["binarizer"]
    assert bad["variant"] == "lstm-additive-noise"
    assert "rror" in bad["failed"]
    assert bad["failed"] in (broken.parent / "train.log").read_text()
    assert f"failed: lstm-additive-noise: {bad['failed']}" in captured.out
    assert "Traceback" not in captured.err + captured.out
    assert "short budget" in captured.out

    markdown = (output / "binarizers.md").read_text().splitlines()
    assert [line.split("|")[2].strip() for line in markdown[2:7]] == [
        "binarizer",
        "---",
        *(r["binarizer"] for r in rows),
    ]
    for row, line in zip(good, markdown[4:6], strict=True):
        assert f"| {float(row['ms_ssim_auc']):.4f} | {float(row['psnr_hvs_auc']):.3f} |" in line
        assert line.endswith(f"| {float(row['psnr_16']):.2f} |")
    ranks = [int(line.split("|")[8]) for line in markdown[4:6]]
    hvs = [float(row["psnr_hvs_auc"]) for row in good]
    assert ranks == [1 + sum(other > value for other in hvs) for value in hvs]
    with Image.open(output / "binarizers.png") as plot:
        plot.load()

    kept = ("last.ckpt", "weights.safetensors", "train.log")
    paths = [output / row["variant"] / name for row in good for name in kept] + list((output / "measured").iterdir())
    assert len(paths) == 6 + 4  # two variants and two images
    before = {path: path.stat().st_mtime_ns for path in paths}
    calls = []
    monkeypatch.setattr(compare, "run", lambda command, *_: calls.append(command) or "still")
    monkeypatch.setattr(
        compare, "base_settings", lambda args: (BASE, yaml.safe_load((output / "settings.yaml").read_text()))
    )
    assert compare.main(arguments) == 1
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    assert [call[call.index("--name") + 1] for call in calls] == ["lstm-additive-noise"]
    assert table(output / "binarizers.csv") == [*good, bad | {"failed": "still"}]


@pytest.mark.slow
def test_all_studies_to_the_end_and_one_is_resumed(crops, tmp_path, quiet, capsys):
    output = tmp_path / "out"
    stopped = output / "lstm-additive-sign"
    start = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(ROOT / "configs" / "debug.yaml")]
    start += ["--data.root", str(crops), *options(tmp_path, 2), "--model.network.binarizer", "sign"]
    start += ["--name", stopped.name, "--trainer.default_root_dir", str(output)]
    subprocess.run(start, check=True, capture_output=True)

    assert compare.main(command(crops, tmp_path)) == 0
    assert capsys.readouterr().err.count("compare: training") == ALL
    logs = {path.parent.name: path.read_text() for path in output.glob("*/train.log")}
    assert len(logs) == ALL
    assert {name for name, log in logs.items() if "Restored all states" in log} == {stopped.name}
    shared = []
    for study, column in (
        ("cells", "decoder_cell"),
        ("reconstructions", "reconstruction"),
        ("binarizers", "binarizer"),
    ):
        rows = table(output / f"{study}.csv")
        check_order(rows)
        assert len({row[column] for row in rows}) == MEMBERS[study]
        for row in rows:
            check_numbers(row, output)
        shared += [row | {"failed": ""} for row in rows if row["variant"] == "lstm-additive-stochastic"]
        assert (output / f"{study}.png").is_file()
    assert shared == [shared[0]] * 3
    rows = table(output / "cells.csv")
    parameters = {row["decoder_cell"]: row["parameters"] for row in rows}
    assert parameters["lstm"] == parameters["gru"] != parameters["associative_lstm"]  # by their equations
    assert {(row["encoder_cell"], row["decoder_cell"]) for row in rows} == set(compare.CELLS.values())

    weights = {path: path.stat().st_mtime_ns for path in output.glob("*/weights.safetensors")}
    (stopped / "weights.safetensors").unlink()  # as if interrupted between training and export
    (output / "cells.csv").rename(output / "before.csv")
    assert compare.main(command(crops, tmp_path)) == 0
    assert capsys.readouterr().err.count("compare: training") == 1
    weights.pop(stopped / "weights.safetensors")
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    assert (output / "cells.csv").read_text() == (output / "before.csv").read_text()


def test_the_grid_has_the_configs_of_the_paper():
    configs = [yaml.safe_load(path.read_text()) for path in (ROOT / "configs").glob("toderici2017_*.yaml")]
    networks = [NetworkConfig(**config.get("model", {}).get("network", {})) for config in configs]
    grid = compare.variants_of("grid", BASE)
    assert len(grid) == 3 * len(compare.CELLS)
    expected = {tuple(getattr(network, name) for name in asdict(BASE)) for network in networks}
    assert len(networks) == len(expected) == 9
    assert expected <= {tuple(asdict(variant).values()) for variant in grid}
    assert len({variant.name for variant in grid}) == len(grid)


def test_a_study_varies_one_thing_of_the_base():
    base = Variant("gru", "gru", "one_shot", "sign")
    for study, names in (
        ("cells", {"encoder_cell", "decoder_cell"}),
        ("reconstructions", {"reconstruction"}),
        ("binarizers", {"binarizer"}),
    ):
        variants = compare.variants_of(study, base)
        assert len(set(variants)) == MEMBERS[study]
        assert base in variants
        for variant in variants:
            assert {name for name, value in asdict(variant).items() if value != asdict(base)[name]} <= names


def test_names_tell_cells_apart():
    pairs = [("lstm", "associative_lstm"), ("associative_lstm",) * 2, ("lstm", "lstm"), ("gru", "lstm"), ("none",) * 2]
    assert len({Variant(encoder, decoder, "additive", "sign").name for encoder, decoder in pairs}) == 5


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_an_interrupt_ends_the_training_and_its_children(tmp_path):
    program = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        f"path = pathlib.Path({str(tmp_path)!r}, 'pids')\n"
        "path.with_suffix('.part').write_text(f'{os.getpid()} {child.pid}')\n"
        "path.with_suffix('.part').rename(path)\n"
        "time.sleep(100)\n"
    )

    def interrupt() -> None:
        while not (tmp_path / "pids").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        compare.run([sys.executable, "-c", program], tmp_path / "log", dict(os.environ))
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def test_the_signal_of_slurm_reaches_the_training_and_ends_nothing(tmp_path):
    program = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'saved').touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGUSR1, save)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
        "time.sleep(100)\n"
    )

    def announce() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=announce, daemon=True).start()
    assert compare.run([sys.executable, "-c", program], tmp_path / "log", dict(os.environ)) == ""
    assert (tmp_path / "saved").exists()


def test_what_went_wrong_is_one_line(tmp_path):
    program = "import sys; print('wandb: something', file=sys.stderr); sys.exit('x: error: it diverged')"
    log = tmp_path / "log"
    log.write_text("ValueError: of an earlier start\n")
    assert compare.run([sys.executable, "-c", program], log, dict(os.environ)) == "x: error: it diverged"
    error = compare.run([sys.executable, "-c", "import os; os._exit(3)"], log, dict(os.environ))
    assert error == "train.py ended with status 3"
    assert compare.error_line("a\nerror: b\nwandb: c\n\n", 1) == "error: b"
    assert compare.error_line("a\nb\n", 1) == "b"


@pytest.fixture
def simulated(monkeypatch):
    """Trainings that leave nothing behind; gives the commands that would have run and their environments."""
    calls = []

    def run(command, log, variables):
        calls.append((command, log, variables))
        return ""

    settings = {"data": {"download": False}, "trainer": {"max_steps": 4, "max_time": None}}
    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "base_settings", lambda args: (BASE, settings))
    return calls


def test_ranks_above_zero_train_and_leave_the_rest_to_rank_zero(crops, tmp_path, simulated, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    assert compare.main(command(crops, tmp_path)) == 0
    assert len(simulated) == ALL
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "out").exists()
    assert {log.name for _, log, _ in simulated} == {"train-3.log"}
    ports = [int(variables["MASTER_PORT"]) for _, _, variables in simulated]
    assert len(set(ports)) == ALL  # the next training must not meet the server of the one before
    assert all(1024 < port < 32768 for port in ports)


def test_every_training_gets_the_same_options_and_a_stopped_one_its_checkpoint(crops, tmp_path, simulated):
    last = tmp_path / "out" / "lstm-additive-sign" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    assert compare.main(command(crops, tmp_path)) == 1  # as there is nothing to make weights of
    assert {tuple(call[call.index("--data.cache_dir") :][: len(options(tmp_path))]) for call, _, _ in simulated} == {
        tuple(options(tmp_path))
    }
    resumed = [call for call, _, _ in simulated if "--ckpt_path" in call]
    assert [call[call.index("--ckpt_path") + 1] for call in resumed] == [str(last)]
    assert resumed[0][resumed[0].index("--model.network.binarizer") + 1] == "sign"
    assert len(table(tmp_path / "out" / "cells.csv")) == MEMBERS["cells"]
    assert all(row["failed"] for row in table(tmp_path / "out" / "cells.csv"))


def test_other_settings_need_another_folder(tmp_path):
    settings = {"trainer": {"max_steps": 10, "log_every_n_steps": 1}, "model": {"growth": {"0": 2}}, "name": "a"}
    compare.check_settings(settings, tmp_path)
    compare.check_settings(settings | {"name": "b"}, tmp_path)
    compare.check_settings(settings | {"trainer": {"max_steps": 10, "log_every_n_steps": 2}}, tmp_path)
    with pytest.raises(ValueError, match="max_steps was 10 and is 11"):
        compare.check_settings(settings | {"trainer": {"max_steps": 11, "log_every_n_steps": 1}}, tmp_path)
    with pytest.raises(ValueError, match=r"model\.growth\.100 was None and is 4"):
        compare.check_settings(settings | {"model": {"growth": {"0": 2, "100": 4}}}, tmp_path)
    (tmp_path / "settings.yaml").write_text("- nothing\n")
    with pytest.raises(ValueError, match="cannot be read"):
        compare.check_settings(settings, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["IMAGE", "--root", "nowhere"], 1, "nowhere"),
        (["nowhere.png", "--root", "ROOT"], 1, "nowhere.png"),
        (["BROKEN", "--root", "ROOT"], 1, "broken.png"),
        (["IMAGE", "--root", "ROOT", "--studies", "colours"], 2, "colours"),
        (["IMAGE"], 2, "--root"),
        ([], 2, "required"),
    ],
)
def test_errors_are_one_line_before_anything_is_trained(crops, tmp_path, simulated, capsys, arguments, status, message):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    places = {"IMAGE": crops / "coffee.png", "ROOT": crops, "BROKEN": tmp_path / "broken.png"}
    try:
        result = compare.main([str(places.get(a, a)) for a in arguments] + ["--output", str(tmp_path / "out")])
    except SystemExit as error:
        result = error.code
    captured = capsys.readouterr()
    assert result == status
    assert message in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert not simulated
    assert not (tmp_path / "out").exists()


def test_options_that_train_py_refuses_are_refused_at_once(crops, tmp_path, quiet, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", here)
    assert compare.main([*command(crops, tmp_path), "--trainer.max_stepss", "3"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "compare: error: train.py: error: unrecognized arguments: --trainer.max_stepss 3"
    ]
    assert not (tmp_path / "out").exists()


def test_a_network_without_cells_to_compare_is_refused(crops, tmp_path, quiet, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", here)
    images, config = [str(crops / "coffee.png")], str(ROOT / "configs" / "latent.yaml")
    arguments = [*images, "--root", str(crops), "--config", config, "--output", str(tmp_path / "out")]
    assert compare.main([*arguments, "--", "--trainer.max_steps", "1"]) == 1
    assert "cells to compare" in capsys.readouterr().err
