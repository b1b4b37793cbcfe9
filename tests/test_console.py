"""Tests that no console, whatever it lacks, turns the success of a command into a failure."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from rnncodec.cli import main
from rnncodec.codec import Codec
from rnncodec.console import Bars, Speed, columns, printable
from rnncodec.weights import load_weights

NAME = "\u5bcc\u58eb \u00e9\u20ac.rnc"  # neither ASCII nor cp1252


@pytest.fixture(autouse=True)
def place(tiny, tmp_path, monkeypatch):
    """A folder with an image and its file of three iterations."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    Path("a.rnc").write_bytes(Codec(load_weights(tiny)).encode(pixels, 3))
    return tmp_path


def run(*command, shell="", **environment):
    """Runs a command that needs no torch, so that it takes no time, with redirections of a shell."""
    line = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "rnncodec", *command]
    return subprocess.run(line, capture_output=True, timeout=60, env={**os.environ, **environment})


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_names_that_a_console_lacks(encoding, tiny, monkeypatch):
    """All lines are there, in characters that the console has; the names of files are as they were given."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    Image.new("RGBA", (20, 20)).save("\u5bcc.png")
    assert main(["encode", "\u5bcc.png", NAME, "--iterations", "1", "--weights", str(tiny)]) == 0
    assert main(["truncate", NAME, NAME]) == 0
    assert main(["info", NAME]) == 0
    assert NAME in os.listdir()
    shown, picture = (name.encode(encoding, "backslashreplace").decode(encoding) for name in (NAME, "\u5bcc.png"))
    text = output.buffer.getvalue().decode(encoding)
    assert sum(line.startswith(f"{shown}: ") for line in text.splitlines()) == 3
    said = errors.buffer.getvalue().decode(encoding)
    assert said == f"rnncodec: warning: {picture}: transparency is replaced by white\n"


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""},
    ],
)
def test_locales(environment):
    whole = Path("a.rnc").read_bytes()
    done = run("truncate", "a.rnc", NAME, **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert Path(NAME).read_bytes() == whole
    done = run("info", NAME, "absent " + NAME, **environment)
    assert done.returncode == 1
    assert f"{len(whole)} bytes".encode() in done.stdout
    assert done.stderr.startswith(b"rnncodec: error: absent ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_closed_and_full_streams(shell):
    """The file is made in any case, with nothing in it that is not its own."""
    if "full" in shell and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    whole = Path("a.rnc").read_bytes()
    done = run("truncate", "a.rnc", "b.rnc", shell=shell)
    assert (done.returncode, done.stderr) == (0, b"")
    assert Path("b.rnc").read_bytes() == whole
    if ">&-" in shell:
        done = run("truncate", "absent.rnc", "c.rnc", shell=shell)
        assert done.returncode == 1
        assert done.stdout == b""  # errors do not move to standard output
        assert not Path("c.rnc").exists()


def test_a_reader_that_stops(tiny, monkeypatch, capsys):
    """A command whose lines go to `head -1` does the whole folder all the same."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    Path("folder").mkdir()
    for name in "bcd":
        Path(f"folder/{name}.png").write_bytes(Path("a.png").read_bytes())
    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["encode", "folder", "--iterations", "1", "--weights", str(tiny)]) == 0
    assert capsys.readouterr().err == ""
    assert len(list(Path("folder").glob("*.rnc"))) == 3


def test_output_that_cannot_be_written_is_a_failure():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = run("truncate", "a.rnc", "-", shell=">/dev/full")
    assert (done.returncode, done.stderr) == (1, b"rnncodec: error: a.rnc: No space left on device\n")
    done = run("truncate", "a.rnc", "-", shell=">&-")
    assert (done.returncode, done.stderr) == (1, b"rnncodec: error: a.rnc: standard output is closed\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b", "a b"), ("a\nb", "a\\nb"), ("\x1b[31m", "\\x1b[31m"), ("\udcff", "\\udcff"), ("\u202e", "\\u202e")],
)
def test_printable(text, expected):
    assert printable(text) == expected


def test_bars_show_time_and_megapixels_per_second():
    """Two of four images of 3 megapixels took 8 seconds."""
    now = 0.0
    shown = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with Progress(*columns(), Speed(), console=shown, auto_refresh=False, get_time=lambda: now) as display:
        bars = Bars(display, 4)
        for _ in range(2):
            now += 4
            bars.start("a\x1b.png")(1, 2)
            bars.end(3_000_000)
        display.refresh()
    lines = shown.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    (files,) = {line for line in lines if "2/4" in line}
    (steps,) = {line for line in lines if "1/2" in line}
    assert files.split()[-4:] == ["0:00:08", "0:00:08", "0.75", "MP/s"]
    assert "a\\x1b.png" in steps
    assert "MP/s" not in steps
