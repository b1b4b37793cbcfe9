"""Tests that commands run for a user who has no home, and where a folder cannot be written, and say what they lack."""

import os
import pwd
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rnncodec.cli import main
from rnncodec.data import PatchDataModule
from rnncodec.home import cache_folder


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """A folder to work in, and a user without HOME and without an entry in the table of users."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def absent(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", absent)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save("a.png")
    assert os.path.expanduser("~") == "~"
    return tmp_path


def complaint(capsys):
    """The one line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_coding_needs_no_home(tiny):
    assert main(["encode", "a.png", "a.rnc", "--iterations", "1", "--weights", str(tiny)]) == 0
    assert main(["info", "a.rnc"]) == main(["truncate", "a.rnc", "b.rnc"]) == 0
    assert main(["decode", "b.rnc", "b.png", "--weights", str(tiny)]) == 0
    assert sorted(os.listdir()) == ["a.png", "a.rnc", "b.png", "b.rnc"]


@pytest.mark.parametrize("command", [["evaluate"], ["train"], ["train", "fit"]])
def test_help_needs_no_home(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([*command, "--help"])
    assert error.value.code == 0
    assert f"usage: rnncodec {command[0]} " in capsys.readouterr().out


def test_evaluation_needs_a_folder_for_its_cache(tiny, capsys):
    command = ["evaluate", "a.png", "--weights", str(tiny), "--iterations", "1", "--baselines"]
    assert main(command) == 1
    assert "no home folder for a cache; --cache-dir names a folder" in complaint(capsys)
    assert os.listdir() == ["a.png"]  # no folder that is called ~
    assert main([*command, "--cache-dir", "cache"]) == 0
    assert sorted(os.listdir()) == ["a.png", "cache", "results"]


def test_training_needs_a_folder_for_its_cache():
    with pytest.raises(ValueError, match="no home folder for a cache; cache_dir names a folder"):
        PatchDataModule(".")
    assert PatchDataModule(".", cache_dir="cache").cache_dir == Path("cache")


def test_the_folder_of_a_user_with_a_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/y")
    assert cache_folder("z") == Path("/x/y/rnncodec")


@pytest.mark.parametrize("folder", ["--cache-dir", "--output"])
def test_folders_of_evaluation_that_cannot_be_made(tiny, capsys, folder):
    """A file is in the way, which stops even those who may write everywhere."""
    options = {"--cache-dir": "cache", "--output": "out"} | {folder: "a.png/below"}
    command = ["evaluate", "a.png", "--weights", str(tiny), "--iterations", "1", "--baselines"]
    assert main([*command, *(text for option in options.items() for text in option)]) == 1
    assert complaint(capsys) == "rnncodec evaluate: error: a.png/below: Not a directory"


def test_outputs_that_cannot_be_made(tiny, capsys):
    for command in (["encode", "a.png", "a.png/a.rnc"], ["encode", "a.png", "--output-dir", "a.png/below"]):
        assert main([*command, "--iterations", "1", "--weights", str(tiny)]) == 1
        line = complaint(capsys)
        assert line.startswith("rnncodec: error: ")
        assert line.endswith(("a.png: File exists", "Not a directory"))
    assert os.listdir() == ["a.png"]
