"""Tests of a training in two processes, an export and an evaluation, and of what they leave in offline runs of W&B."""

import csv
import hashlib
import json
import math
import os
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from skimage import data
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] - made at run time

from rnncodec.evaluation import evaluate
from rnncodec.metrics.curves import Point
from rnncodec.training import tracking

ROOT = Path(__file__).parent.parent
COUNTS = (1, 2, 4, 8, 16)


def records(path):
    """The records of a .wandb file: a log in LevelDB's format, whose header is of seven bytes, of protocol buffers."""
    content, position, part, result = path.read_bytes(), 7, b"", defaultdict(list)
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:  # no header fits into the rest of a block
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        part += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(part)
            name = record.WhichOneof("record_type")
            result[name].append(getattr(record, name))
            part = b""
    return result


class OfflineRun:
    """An offline run as its files tell it."""

    def __init__(self, folder):
        (self.folder,) = (folder / "wandb").glob("offline-run-*")
        (path,) = self.folder.glob("*.wandb")
        found = records(path)
        self.start = found["run"][0]
        self.steps = {metric.name: metric.step_metric for metric in found["metric"]}
        self.history = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
            for row in found["history"]
        ]
        self.artifacts, self.used, self.inputs = defaultdict(list), {}, {}
        for artifact in found["artifact"]:
            if artifact.use_after_commit:  # an input
                self.used[artifact.name] = artifact.digest
                self.inputs[artifact.name] = {
                    entry.path: Path(entry.local_path) for entry in artifact.manifest.contents
                }
                continue
            self.artifacts[artifact.name].append(
                {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
            )
        self.digests = {
            artifact.name: artifact.digest for artifact in found["artifact"] if not artifact.use_after_commit
        }
        self.metadata = {artifact.name: json.loads(artifact.metadata or "{}") for artifact in found["artifact"]}
        updates = [update for summary in found["summary"] for update in summary.update]
        self.summary = {"/".join(update.nested_key) or update.key: json.loads(update.value_json) for update in updates}
        updates = [update for config in (self.start.config, *found["config"]) for update in config.update]
        self.config = {update.key: json.loads(update.value_json) for update in updates if update.key}
        self.facts = json.loads((self.folder / "files" / "provenance.json").read_text())
        self.charts = {}
        for update in (update for config in found["config"] for update in config.update):
            if list(update.nested_key[:2]) == ["_wandb", "visualize"]:
                self.charts[update.nested_key[2]] = json.loads(update.value_json)["panel_config"]

    def tables(self, key):
        """All tables that were logged under a key, in order: columns and rows."""
        rows = [row for row in self.history if f"{key}/path" in row]
        documents = [json.loads((self.folder / "files" / row[f"{key}/path"]).read_text()) for row in rows]
        return [(document["columns"], document["data"]) for document in documents]

    def table_with_pictures(self, key):
        """The last table of this key as an artifact has it: its rows, and its files by path."""
        (versions,) = (found for found in self.artifacts.values() if f"{key}.table.json" in found[-1])
        document = json.loads(versions[-1][f"{key}.table.json"].read_text())
        return [dict(zip(document["columns"], row, strict=True)) for row in document["data"]], versions[-1]

    def pictures(self, key):
        """All pictures that were logged under a key, in order: captions and sizes."""
        result = []
        for row in self.history:
            for path, caption in zip(row.get(f"{key}/filenames", []), row.get(f"{key}/captions", []), strict=True):
                result.append((caption, size_of(self.folder / "files" / path)))
        return result

    def manifest(self, name):
        """The rows of the manifest of images that were used, which is among the files of the run, too."""
        text = self.inputs[name]["manifest.json"].read_text()
        assert (self.folder / "files" / "images.json").read_text() == text
        assert hashlib.sha256(text.encode()).hexdigest().startswith(self.facts["data"]["fingerprint"])
        return json.loads(text)

    def curve(self, metric):
        """The points of a line over rate/bpp."""
        return [(row["rate/bpp"], row[metric]) for row in self.history if metric in row]


def size_of(path):
    """Width and height of a picture that opens."""
    with Image.open(path) as image:
        image.load()
        return image.size


def environment(folder, **values):
    """Without a login, and without any trace of this machine's W&B."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return {**clean, "OMP_NUM_THREADS": "1", "HOME": str(folder), "NETRC": str(folder / "no-netrc"), **values}


def run(folder, *arguments, status=0, **values):
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(folder, **values), cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def rows_of(path) -> list[dict[str, Any]]:
    """The rows of a CSV file; numbers as such, None where there is nothing."""

    def read(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text

    return [{name: read(text) for name, text in row.items()} for row in csv.DictReader(path.read_text().splitlines())]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Small crops of different sizes, just large enough for MS-SSIM."""
    folder = tmp_path_factory.mktemp("photographs")
    Image.fromarray(data.astronaut()[:192, :208]).save(folder / "astronaut.png")
    Image.fromarray(data.coffee()[:180, :200]).save(folder / "coffee.png")
    Image.fromarray(data.chelsea()[:192, :192]).save(folder / "chelsea.png")
    Image.fromarray(data.rocket()[:192, :192]).save(folder / "rocket.png")
    return folder


@pytest.fixture(scope="module")
def training(photographs, tmp_path_factory):
    """The folder of a training in two processes, which share the validation images: one has two, the other one."""
    folder = tmp_path_factory.mktemp("training")
    run(
        folder, ROOT / "train.py", "fit", "--config", ROOT / "configs" / "debug.yaml", "--name", "tiny",
        "--data.root", photographs, "--data.cache_dir", folder / "cache", "--data.val_images", 3,
        "--data.tile_size", 64, "--data.patch_size", 32, "--data.num_workers", 0,
        "--trainer.default_root_dir", folder, "--trainer.accelerator", "cpu", "--trainer.devices", 2,
        "--trainer.strategy", "ddp", "--trainer.max_steps", 4, "--trainer.val_check_interval", 2,
        "--trainer.log_every_n_steps", 2,
        "--trainer.limit_val_batches", "1.0", "--model.network.decoder_cell", "associative_lstm",
        "--trainer.callbacks+", "probe.Probe", "--trainer.callbacks.folder", folder / "probe",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
        PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    return folder / "tiny"


@pytest.fixture(scope="module")
def exported(training, tmp_path_factory):
    """Weights of the training, whose export was logged to W&B."""
    folder = tmp_path_factory.mktemp("exported")
    run(
        folder, "-m", "rnncodec", "export", training / "best.ckpt", folder / "tiny.safetensors", "--name", "tiny",
        "--wandb", "an export", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    return folder / "tiny.safetensors"


@pytest.fixture(scope="module")
def evaluation(photographs, exported, tmp_path_factory):
    """The results of an evaluation that logged to W&B."""
    folder = tmp_path_factory.mktemp("evaluation")
    run(
        folder, ROOT / "evaluate.py", photographs / "astronaut.png", photographs / "coffee.png", "--weights",
        exported, "--iterations", 4, "--baselines", "jpeg", "--save-images", "--wandb", "a run",
        "--cache-dir", folder / "cache", "--output", folder / "results",
    )  # fmt: skip
    return folder / "results"


def test_an_evaluation_leaves_its_table_curves_and_pictures(evaluation):
    offline = OfflineRun(evaluation)
    assert (offline.start.display_name, offline.start.project, offline.start.job_type) == (
        "a run",
        "rnncodec",
        "evaluation",
    )
    assert offline.config["iterations"] == 4

    # One row for each image, codec and setting: those of points.csv.
    points = rows_of(evaluation / "points.csv")
    ((columns, rows),) = offline.tables("points")
    assert columns == [name for name in points[0] if name != "picture"]
    assert rows == [[row[name] for name in columns] for row in points]
    assert {(row["image"], row["setting"]) for row in points if row["codec"] == "rnncodec-tiny"} == {
        (image, k) for image in ("astronaut", "coffee") for k in (1, 2, 3, 4)
    }

    # The curves of all codecs, as a chart and as lines over bpp: those of mean.csv.
    means = rows_of(evaluation / "mean.csv")
    for metric in ("psnr", "ms_ssim", "psnr_hvs_m"):
        ((columns, rows),) = offline.tables(f"curve/{metric}_table")
        assert columns == ["codec", "setting", "bpp", metric]
        assert rows == [[row[name] for name in columns] for row in means]
        chart = offline.charts[f"curve/{metric}"]
        assert chart["panelDefId"] == "wandb/line/v0"
        assert chart["fieldSettings"] == {"x": "bpp", "y": metric, "stroke": "codec"}
        for codec, name in (("rnncodec-tiny", f"rate/{metric}"), ("jpeg", f"rate/{metric}_jpeg")):
            assert name not in offline.summary  # where the last point would stand
            assert offline.steps[name] == "rate/bpp"
            assert offline.curve(name) == [(row["bpp"], row[metric]) for row in means if row["codec"] == codec]

    sizes = [size_of(evaluation / f"{name}_comparison.png") for name in ("astronaut", "coffee")]
    assert offline.pictures("comparisons") == list(zip(("astronaut", "coffee"), sizes, strict=True))


def test_an_evaluation_leaves_its_files_as_an_artifact(evaluation):
    (files,) = OfflineRun(evaluation).artifacts["a-run-results"]
    assert set(files) == {
        "points.csv", "mean.csv", "summary.csv", "rate_distortion.png", "rate_distortion.svg", "rnncodec-tiny.json",
        "jpeg.json", "report.html",
    }  # fmt: skip
    for name, copy in files.items():
        assert copy.is_relative_to(evaluation / "wandb")  # nothing is left in the user's home
        assert copy.read_bytes() == (evaluation / name).read_bytes()


def test_the_summary_of_an_evaluation_is_about_its_codec(evaluation):
    """Not about the baseline, whose points are the last that were logged."""
    offline = OfflineRun(evaluation)
    mine, jpeg = rows_of(evaluation / "summary.csv")
    assert mine["codec"] == "rnncodec-tiny"
    for name, value in mine.items():
        if name.startswith("auc"):
            assert offline.summary.get(name) == value
    for name, value in jpeg.items():
        if name.startswith("bd_rate"):
            assert offline.summary.get(f"{name}_jpeg") == value
    # Overlaps are known even where the curves share no quality.
    assert "bd_rate_psnr_overlap_jpeg" in offline.summary


def test_a_table_of_an_evaluation_shows_pictures(evaluation):
    offline = OfflineRun(evaluation)
    shown, files = offline.table_with_pictures("pictures")
    assert [(row["image"], row["iterations"]) for row in shown] == [
        (image, k) for image in ("astronaut", "coffee") for k in (1, 2, 4)
    ]
    points = {(row["image"], row["codec"], row["setting"]): row for row in rows_of(evaluation / "points.csv")}
    for row in shown:
        point = points[row["image"], "rnncodec-tiny", row["iterations"]]
        assert (row["bpp"], row["psnr"]) == (point["bpp"], point["psnr"])
        sources = {"original": "original.png", "picture": Path(point["picture"]).name}
        sources["bits"] = f"{Path(point['picture']).stem}-bits.png"
        for column, name in sources.items():
            assert (
                files[row[column]["path"]].read_bytes() == (evaluation / "pictures" / row["image"] / name).read_bytes()
            )
        if row["baseline"] is not None:  # no file of JPEG may be as small
            codec, setting = row["baseline"].split()
            rival = points[row["image"], codec, float(setting)]
            assert codec == "jpeg"
            assert rival["bytes"] <= point["bytes"]


def commit():
    """The commit of this repository; None without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def test_offline_files_tell_where_a_curve_comes_from(training, exported, evaluation, photographs):
    """Commit, data, config and weights, from the evaluation back to the images, by files alone."""
    evaluated, made, trained = OfflineRun(evaluation), OfflineRun(exported.parent), OfflineRun(training)
    before = {name: hashlib.sha256((photographs / name).read_bytes()).hexdigest() for name in os.listdir(photographs)}
    for offline in (evaluated, made, trained):
        described = {key: value for key, value in offline.facts.items() if key not in ("run", "name")}
        assert {key: offline.config[key] for key in described} == described
        assert offline.facts["run"] == offline.start.run_id
        assert offline.facts["source"].get("commit") == commit()
        assert offline.facts["versions"]["torch"] == torch.__version__

    # The weights are those of the file, which says by what they were made.
    with safe_open(exported, "pt") as file:
        metadata = file.metadata()
    provenance = json.loads(metadata["provenance"])
    for offline in (evaluated, made):
        assert offline.facts["weights"] == "tiny"
        assert offline.facts["fingerprint"] == metadata["fingerprint"]
        assert offline.facts["provenance"]["run"] == {"id": trained.start.run_id, "name": "tiny"}
        assert offline.facts["provenance"]["images"]["fingerprint"] == trained.facts["data"]["fingerprint"]
    assert json.loads(provenance["source"]) == trained.facts["source"]
    assert json.loads(provenance["settings"])["network"] == trained.facts["network"]
    assert str(photographs) not in metadata["provenance"]  # it may be shared

    # What one run has made, another one uses, and nothing else.
    assert evaluated.used["tiny-weights"] == made.digests["tiny-weights"]
    assert made.used == {"tiny-checkpoints": trained.digests["tiny-checkpoints"]}
    (files,) = made.artifacts["tiny-weights"]
    assert files["tiny.safetensors"].read_bytes() == exported.read_bytes()
    assert set(trained.used) == {f"{photographs.name}-images"}
    assert set(evaluated.used) == {f"{photographs.name}-images", "tiny-weights"}

    # The images themselves stay where they are.
    listed = {row["file"]: row for row in trained.manifest(f"{photographs.name}-images")}
    assert {name: row["sha256"] for name, row in listed.items()} == before
    assert {name: row["bytes"] for name, row in listed.items()} == {
        name: (photographs / name).stat().st_size for name in before
    }
    assert sorted(row["split"] for row in listed.values()) == ["train", "val", "val", "val"]
    assert {row["sha256"] for row in evaluated.manifest(f"{photographs.name}-images")} == {
        before["astronaut.png"], before["coffee.png"],
    }  # fmt: skip

    facts = trained.facts
    assert facts["data"]["root"] == str(photographs)
    assert (facts["data"]["train"], facts["data"]["val"], facts["data"]["patch_size"]) == (1, 3, 32)
    assert (facts["seed"], facts["trainer"]["processes"], facts["trainer"]["max_steps"]) == (0, 2, 4)
    assert facts["config"] == yaml.safe_load((training / "config.yaml").read_text())
    weights = torch.load(training / "best.ckpt", weights_only=True)["state_dict"]
    learned = {name: tensor for name, tensor in weights.items() if not name.endswith(("permutation", "permutations"))}
    assert facts["parameters"] == {"network": sum(tensor.numel() for tensor in learned.values())}


def test_gradients_are_charted_before_clipping_and_by_part(training):
    rows = [row for row in OfflineRun(training).history if "train/gradient_norm" in row]
    assert rows
    for row in rows:
        parts = [row[f"train/gradient_norm_{part}"] for part in ("encoder", "binarizer", "decoder")]
        assert row["train/gradient_norm"] == pytest.approx(math.hypot(*parts), rel=1e-5)


def test_two_processes_hold_the_same_weights_and_share_no_patch(training):
    probe = training.parent / "probe"
    weights = [torch.load(probe / f"weights-{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    patches = [(probe / f"patches-{rank}.txt").read_text().split() for rank in (0, 1)]
    assert [len(p) for p in patches] == [32, 32]
    assert len(set(patches[0]) | set(patches[1])) == 64


def test_every_validation_leaves_a_table_and_curves(training, photographs):
    offline = OfflineRun(training)
    validations = [row for row in rows_of(training / "metrics" / "version_0" / "metrics.csv") if row.get("val/psnr")]
    assert [row["step"] for row in validations] == [1, 3]
    tables = offline.tables("val/images")
    assert len(tables) == 2
    for validation, (columns, rows) in zip(validations, tables, strict=True):
        points = [dict(zip(columns, row, strict=True)) for row in rows]
        # Images of both processes, by name.
        images = sorted({point["image"] for point in points})
        assert len(images) == 3
        assert [(point["image"], point["codec"], point["setting"]) for point in points] == [
            (image, "tiny", k) for image in images for k in COUNTS
        ]
        for point in points:
            width, height = size_of(photographs / point["image"])
            bits = point["setting"] * 32 * math.ceil(height / 16) * math.ceil(width / 16)
            assert point["bytes"] == bits / 8
            assert point["bpp"] == pytest.approx(bits / (height * width))
        for metric in ("psnr", "ms_ssim"):
            for k in COUNTS:
                mean = np.mean([point[metric] for point in points if point["setting"] == k])
                assert validation[f"val/{metric}_{k}"] == pytest.approx(mean, rel=1e-5)
    for metric in ("psnr", "ms_ssim"):
        charts = offline.tables(f"curve/{metric}_table")
        for validation, (columns, rows) in zip(validations, charts, strict=True):
            assert columns == ["codec", "setting", "bpp", metric]
            assert [row[:3] for row in rows] == [["tiny", k, k * 0.125] for k in COUNTS]
            assert [row[3] for row in rows] == pytest.approx([validation[f"val/{metric}_{k}"] for k in COUNTS])
        assert offline.charts[f"curve/{metric}"]["fieldSettings"]["x"] == "bpp"
        # The line over bpp is that of the last validation.
        assert offline.steps[f"rate/{metric}"] == "rate/bpp"
        bpp, values = zip(*offline.curve(f"rate/{metric}"), strict=True)
        assert bpp == tuple(k * 0.125 for k in COUNTS)
        assert values == pytest.approx([validations[-1][f"val/{metric}_{k}"] for k in COUNTS])


def test_every_validation_leaves_reconstructions(training, photographs):
    offline = OfflineRun(training)
    pictures = offline.pictures("val/reconstructions")
    (first, *_), *_ = offline.tables("val/images")[0][1]
    width, height = size_of(photographs / first)
    assert [size for _, size in pictures] == [(6 * width, height)] * 2  # of the first image, in both validations
    rows, files = offline.table_with_pictures("val/images")
    shown = [row for row in rows if row["picture"] is not None]
    assert [(row["image"], row["setting"]) for row in shown] == [(first, k) for k in COUNTS]
    assert all(size_of(files[row["picture"]["path"]]) == (width, height) for row in shown)


def test_a_training_leaves_its_checkpoints_as_an_artifact(training):
    (files,) = OfflineRun(training).artifacts["tiny-checkpoints"]  # of the end alone
    assert set(files) == {"last.ckpt", "best.ckpt", "config.yaml"}
    for name, copy in files.items():
        assert copy.is_relative_to(training / "wandb")
        assert copy.read_bytes() == (training / name).read_bytes()


def test_wandb_can_be_turned_off_and_its_errors_are_one_line(exported, photographs, tmp_path, monkeypatch):
    command = [
        ROOT / "evaluate.py", photographs / "astronaut.png", "--weights", exported,
        "--iterations", 2, "--baselines", "--cache-dir", tmp_path / "cache", "--wandb", "a",
    ]  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert evaluate.main([*map(str, command[1:]), "--output", str(tmp_path / "off")]) == 0
    assert (tmp_path / "off" / "points.csv").exists()
    assert not (tmp_path / "off" / "wandb").exists()
    # An online run without a login, and nobody to ask.
    done = run(tmp_path, *command, "--output", tmp_path / "on", status=1, WANDB_MODE="online")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("evaluate: error: W&B: ")
    assert (tmp_path / "on" / "points.csv").exists()


@pytest.mark.parametrize(
    ("variables", "content", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "0" * 40}, "", None),
        ({"WANDB_MODE": "disabled"}, "", None),  # W&B reads it itself
        ({}, "machine api.wandb.ai login user password 0", None),
        ({}, "machine api.forge.coreweave.com login user password 0", None),
        ({}, "machine other.org login user password 0", "offline"),
        ({"WANDB_BASE_URL": "http://other.org:8080"}, "machine other.org:8080 login user password 0", None),
        ({"WANDB_BASE_URL": "http://other.org"}, "machine api.wandb.ai login user password 0", "offline"),
        ({}, "no netrc at all", "offline"),
    ],
)
def test_a_run_is_offline_without_login_or_mode(variables, content, mode, tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    (tmp_path / "netrc").write_text(content)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracking.settings(tmp_path)["mode"] == mode


def test_what_is_not_finite_is_left_empty():
    exact = Point("a", "codec", 2, 100, 0.5, psnr=math.inf)
    table = tracking.points_table([exact])
    assert dict(zip(table.columns, table.data[0], strict=True))["psnr"] is None
    logged, defined = [], {}
    fake = SimpleNamespace(log=logged.append, define_metric=lambda name, **options: defined.update({name: options}))
    tracking.log_rates(fake, [exact, Point("a", "codec", 3, 200, 1.0, psnr=40.0)])  # pyright: ignore[reportArgumentType]
    assert logged == [{"rate/bpp": 0.5}, {"rate/bpp": 1.0, "rate/psnr": 40.0}]
    assert defined["rate/psnr"] == {"step_metric": "rate/bpp", "summary": "none"}
