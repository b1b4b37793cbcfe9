"""Tests of the import rules between the rooms, which pyproject.toml defines and import-linter checks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 450  # lines of a file that one can still know

# A forbidden import of each kind, and what the contract that it breaks is called.
FORBIDDEN = [
    ("files/images.py", "import torch", "Files know nothing of torch"),
    ("network/cells.py", "import rnncodec.files.format", "The network knows nothing of ours"),
    ("entropy/exact.py", "import rnncodec.network", "Imports run downward"),
    ("metrics/curves.py", "import rnncodec.codec", "Imports run downward"),
    ("training/optim.py", "import rnncodec.evaluation.report", "Imports run downward"),
    ("evaluation/report.py", "import rnncodec.cli", "Imports run downward"),
    ("weights.py", "import rnncodec.data", "Imports run downward"),
    ("loop.py", "import wandb", "Coding needs neither Lightning nor W&B nor Matplotlib"),
]


def lint(folder):
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())",
    ]
    return subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": "."})


@pytest.fixture
def copy(tmp_path):
    """The sources alone, which may be changed."""
    shutil.copytree(ROOT / "rnncodec", tmp_path / "rnncodec", ignore=shutil.ignore_patterns("*.safetensors", "*.csv"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_keep_to_the_walls(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_each_forbidden_import_is_found(copy):
    for file, line, _ in FORBIDDEN:
        with open(copy / "rnncodec" / file, "a") as module:
            module.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1
    for file, line, contract in FORBIDDEN:
        module = f"rnncodec.{file.removesuffix('.py').replace('/', '.')}"
        _, _, chains = done.stdout.partition(f"\n{contract}\n---")
        assert f"{contract} BROKEN" in done.stdout
        assert f" {module} -> {line.removeprefix('import ')} (l." in chains


@pytest.mark.parametrize("module", ["rnncodec", "rnncodec.cli", "rnncodec.rating", "rnncodec.evaluation.report"])
def test_what_needs_no_network_loads_no_torch(module):
    heavy = ("torch", "lightning", "wandb", "matplotlib")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_decoding_loads_nothing_of_training_and_evaluation():
    heavy = ("lightning", "wandb", "matplotlib", "torchmetrics", "jsonargparse", "filelock")
    code = f"import sys, rnncodec; rnncodec.Codec; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_no_file_is_too_long_to_know():
    ours = [folder for folder in ROOT.iterdir() if folder.name in ("rnncodec", "studies")]
    files = [*ROOT.glob("*.py"), *(path for folder in ours for path in folder.glob("**/*.py"))]
    assert len(files) > 40
    assert {path.name: n for path in files if (n := len(path.read_text().splitlines())) > LONGEST} == {}
