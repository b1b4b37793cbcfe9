"""Tests of the command line, called in this process: its files, messages and exit status."""

import io
import json
import os
import stat
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_calibration import save_latent

import rnncodec
from rnncodec import jobs, weights
from rnncodec.cli import main
from rnncodec.codec import Codec
from rnncodec.entropy import CLASSICAL
from rnncodec.files import format
from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.weights import load_weights, save_weights

CONFIG = NetworkConfig(bits=4, encoder_channels=(4, 4, 4, 4), decoder_channels=(4, 4, 4, 4, 4))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    for seed, name in enumerate(("small", "other")):
        torch.manual_seed(seed)
        network = RecurrentCodec(CONFIG)
        torch.nn.init.normal_(network.decoder.output.weight)
        save_weights(folder / f"{name}.safetensors", network, name, {})
    return folder


@pytest.fixture(autouse=True)
def place(pretrained, tmp_path, monkeypatch):
    """A folder with images to work in, and weights that seem to come with the package."""
    monkeypatch.setattr(weights, "PRETRAINED", pretrained)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "folder/b.png", "folder/deep/c.png")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed)).save(name)
    return tmp_path


@pytest.fixture(scope="module")
def codec(pretrained):
    return Codec(load_weights(pretrained / "small.safetensors"))


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def files(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def pipe(monkeypatch, data=b""):
    """Standard input that holds data, and standard output that collects bytes."""
    output = io.TextIOWrapper(io.BytesIO(), write_through=True)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    monkeypatch.setattr(sys, "stdout", output)
    return output.buffer


def complaints(capsys):
    """What was said on standard error, a line each; never a traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("rnncodec: ") for line in lines), lines
    return lines


def test_encode_info_truncate_decode(codec, capsys):
    assert main(["encode", "a.png", "out.rnc", "--iterations", "5"]) == 0
    data = Path("out.rnc").read_bytes()
    assert data == codec.encode(picture(), 5)
    assert capsys.readouterr().out == f"out.rnc: 5 iterations, {len(data)} bytes, {len(data) * 8 / 1200:.4f} bpp\n"
    assert main(["truncate", "out.rnc", "short.rnc", "--iterations", "2"]) == 0
    assert Path("short.rnc").read_bytes() == codec.encode(picture(), 2)
    assert main(["decode", "short.rnc", "two.png"]) == 0
    assert main(["decode", "out.rnc", "three.png", "--iterations", "3"]) == 0
    for name, iterations in (("two.png", 2), ("three.png", 3)):
        expected = np.asarray(codec.decode(data, iterations))
        assert np.array_equal(np.asarray(Image.open(name)), expected)
    assert complaints(capsys) == []


def test_targets(codec, capsys):
    rate = 8 * len(codec.encode(picture(), 4)) / 1200
    assert main(["encode", "a.png", "rate.rnc", "--bpp", str(rate)]) == 0
    assert Path("rate.rnc").read_bytes() == codec.encode(picture(), 4)
    assert main(["encode", "a.png", "quality.rnc", "--psnr", "1"]) == 0
    assert Path("quality.rnc").read_bytes() == codec.encode(picture(), 1)
    assert complaints(capsys) == []
    assert main(["encode", "a.png", "quality.rnc", "--psnr", "99"]) == 0
    assert Path("quality.rnc").read_bytes() == codec.encode(picture(), 16)
    (line,) = complaints(capsys)
    assert line.startswith("rnncodec: warning: a.png: 99 dB are out of reach")
    assert main(["encode", "a.png", "no.rnc", "--bpp", "0.001"]) == 1
    (line,) = complaints(capsys)
    assert "iteration 1 takes" in line
    assert not Path("no.rnc").exists()


def test_truncate_to_bytes_and_cut_files(codec, capsys):
    Path("x.rnc").write_bytes(codec.encode(picture(), 4))
    size = len(codec.encode(picture(), 3))
    assert main(["truncate", "x.rnc", "y.rnc", "--bytes", str(size)]) == 0
    assert Path("y.rnc").read_bytes() == codec.encode(picture(), 3)
    assert main(["truncate", "x.rnc", "x.rnc", "--bytes", str(size - 1)]) == 0  # in place
    assert Path("x.rnc").read_bytes() == codec.encode(picture(), 2)
    Path("cut.rnc").write_bytes(codec.encode(picture(), 4)[:-1])
    assert main(["decode", "cut.rnc", "cut.png"]) == 0
    (line,) = complaints(capsys)
    assert line == "rnncodec: warning: cut.rnc: the file is cut: decoded 3 of 4 iterations"
    assert main(["decode", "cut.rnc", "cut.png", "--iterations", "4"]) == 1
    assert "3 complete iterations" in complaints(capsys)[0]
    assert main(["truncate", "cut.rnc", "whole.rnc"]) == 0
    assert Path("whole.rnc").read_bytes() == codec.encode(picture(), 3)
    assert main(["truncate", "cut.rnc", "whole.rnc", "--iterations", "4"]) == 1
    assert main(["truncate", "cut.rnc", "whole.rnc", "--bytes", "5"]) == 1
    assert Path("whole.rnc").read_bytes() == codec.encode(picture(), 3)


def test_info(codec, capsys):
    data = codec.encode(picture(), 3)
    Path("x.rnc").write_bytes(data[:-1])
    assert main(["info", "x.rnc"]) == 0
    out = capsys.readouterr().out
    for part in ("40x30", f"{len(data) - 1} bytes", "small", codec.fingerprint.hex(), "2 of 3 iterations complete"):
        assert part in out
    rows = [line.strip("│ ").split() for line in out.splitlines() if line.startswith("│")]
    sizes = [len(codec.encode(picture(), t)) for t in (1, 2, 3)]
    assert [row[2] for row in rows] == [str(size) for size in sizes]
    assert [row[6] for row in rows] == ["raw"] * 3
    assert [row[4] for row in rows] == [f"{8 * size / 1200:.4f}" for size in sizes]

    Path("y.rnc").write_bytes(data)
    assert main(["info", "x.rnc", "y.rnc", "--json"]) == 0
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [document["file"] for document in documents] == ["x.rnc", "y.rnc"]
    assert documents[0]["complete"] == 2
    assert documents[1] == {
        "file": "y.rnc",
        "version": 1,
        "bytes": len(data),
        "width": 40,
        "height": 30,
        "weights": "small",
        "fingerprint": codec.fingerprint.hex(),
        "complete": 3,
        "context": "0000000000000000",
        "parts": 1,
        "maps": False,
        "records": {},
        "records_bytes": 0,
        "sizes": sizes,
        "iterations": [
            {"iteration": t, "bytes": size, "bpp": 8 * size / 1200, "coding": 0} for t, size in enumerate(sizes, 1)
        ],
    }


def test_entropy_coders(codec, capsys):
    """Each option writes the codec's bytes, which decode without an option, and `info` shows the sizes."""
    y, x = np.mgrid[:320, :320] // 2
    ramp = np.stack([y, x, y], -1).astype(np.uint8)
    Image.fromarray(ramp).save("ramp.png")
    sizes = {}
    for entropy in CLASSICAL:
        option = "--no-entropy" if entropy == "none" else f"--entropy={entropy}"
        assert main(["encode", "ramp.png", "x.rnc", "--iterations", "3", option]) == 0
        data = Path("x.rnc").read_bytes()
        assert data == codec.encode(ramp, 3, entropy=entropy)
        sizes[entropy] = len(data)
        assert main(["decode", "x.rnc", "x.png", "--iterations", "2"]) == 0
        assert np.array_equal(np.asarray(Image.open("x.png")), np.asarray(codec.decode(data, 2)))
    assert max(sizes, key=lambda entropy: sizes[entropy]) == "none"
    assert main(["encode", "ramp.png", "raw.rnc", "--iterations", "3"]) == 0  # these weights have no context model
    assert Path("raw.rnc").read_bytes() == codec.encode(ramp, 3, entropy="none")

    capsys.readouterr()
    assert main(["info", "x.rnc"]) == 0
    rows = [line.strip("│ ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    raw = 20 * 20 * 4 / 8
    expected = [
        f"{it.length / raw:.1%}" if it.coding else "raw"
        for it in format.read_header(Path("x.rnc").read_bytes()).entries
    ]
    assert [row[6] for row in rows] == expected
    assert main(["info", "x.rnc", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 2
    *_, last = CLASSICAL.values()
    assert last.coding in {iteration["coding"] for iteration in document["iterations"]} <= {0, last.coding}

    assert main(["encode", "ramp.png", "no.rnc", "--entropy", "context"]) == 1
    (line,) = complaints(capsys)
    assert "'small' have no context model" in line
    assert not Path("no.rnc").exists()


def test_many_inputs_and_folders(codec, capsys):
    assert main(["encode", "a.png", "folder", "--output-dir", "out/rnc", "--iterations", "1"]) == 0
    assert files("out") == ["rnc/a.rnc", "rnc/b.rnc", "rnc/deep/c.rnc"]
    for seed, name in enumerate(files("out")):
        assert Path("out", name).read_bytes() == codec.encode(picture(seed), 1)
    assert main(["decode", "out", "--output-dir", "png"]) == 0
    assert files("png") == ["rnc/a.png", "rnc/b.png", "rnc/deep/c.png"]
    assert main(["decode", "out/rnc/a.rnc", "out/rnc/b.rnc", "--format", "ppm"]) == 0
    assert Path("out/rnc/b.ppm").read_bytes().startswith(b"P6")
    assert complaints(capsys) == []


def test_outputs_beside_inputs(capsys):
    assert main(["encode", "a.png", "folder/b.png", "folder/deep", "--iterations", "1"]) == 0
    assert {"a.rnc", "folder/b.rnc", "folder/deep/c.rnc"} <= set(files())
    assert complaints(capsys) == []


def test_originals_are_not_replaced_by_their_decoded_copies(capsys):
    original = Path("a.png").read_bytes()
    assert main(["encode", "a.png"]) == 0
    assert main(["decode", "a.rnc"]) == 1
    assert complaints(capsys) == ["rnncodec: error: a.rnc: a.png exists; --force replaces it"]
    assert Path("a.png").read_bytes() == original
    assert main(["decode", "a.rnc", "--force"]) == 0
    assert Path("a.png").read_bytes() != original


def test_a_named_output_is_replaced(codec, capsys):
    Path("out.rnc").write_text("old")
    Path("out.rnc").chmod(0o640)
    assert main(["encode", "a.png", "out.rnc", "--iterations", "1"]) == 0
    assert Path("out.rnc").read_bytes() == codec.encode(picture(), 1)
    assert stat.S_IMODE(os.stat("out.rnc").st_mode) == 0o640
    assert complaints(capsys) == []


def test_one_bad_file_among_many(codec, capsys):
    Path("bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    assert main(["encode", "absent.png", "bad.png", "a.png", "--iterations", "1"]) == 1
    lines = complaints(capsys)
    assert len(lines) == 2
    assert lines[0] == "rnncodec: error: absent.png: No such file or directory"
    assert "bad.png" in lines[1]
    assert Path("a.rnc").read_bytes() == codec.encode(picture(), 1)
    assert not Path("bad.rnc").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["encode", "a.png", "copy/a.png", "--output-dir", "out"], "would both become out/a.png.rnc"),
        (["encode", "link.rnc", "a.rnc"], "would overwrite the input link.rnc"),
        (["encode", "empty"], "nothing to do in empty"),
        (["decode", "folder"], "nothing to do in folder"),
    ],
)
def test_refused_before_any_work(command, message, capsys):
    Path("copy").mkdir()
    Path("empty").mkdir()
    for name in ("copy/a.png", "a.jpg", "a.rnc"):
        Image.fromarray(picture()).save(name, "png")
    Path("link.rnc").symlink_to("a.rnc")
    before = files()
    assert main(command) == 1
    (line,) = complaints(capsys)
    assert message in line
    assert files() == before


@pytest.mark.parametrize(
    "command",
    [
        ["--nothing"],
        ["encode"],
        ["shrink", "a.png"],
        ["encode", "a.png", "--iterations", "0"],
        ["encode", "a.png", "--iterations", "17"],
        ["encode", "a.png", "--iterations", "x"],
        ["encode", "a.png", "--bpp", "-1"],
        ["encode", "a.png", "--bpp", "nan"],
        ["encode", "a.png", "--psnr", "inf"],
        ["encode", "a.png", "--quality", "0"],
        ["encode", "a.png", "--quality", "101"],
        ["encode", "a.png", "--quality", "x"],
        ["encode", "a.png", "--quality", "nan"],
        ["encode", "a.png", "--bytes", "0"],
        ["encode", "a.png", "--bytes", "1.5"],
        ["encode", "a.png", "--bytes", "100", "--quality", "50"],
        ["encode", "a.png", "--quality", "50", "--tune", "vmaf"],
        ["encode", "a.png", "folder/b.png", "--quality", "50", "--roi", "a.png"],
        ["encode", "folder", "--quality", "50", "--roi", "a.png"],
        ["export", "a.safetensors", "b.safetensors"],
        ["export", "a.safetensors", "b.safetensors", "--name", "b", "--allocation", "folder"],
        ["encode", "a.png", "--iterations", "1", "--bpp", "1"],
        ["encode", "a.png", "out.rnc", "--output-dir", "out"],
        ["encode", "folder", "out.rnc"],
        ["encode", "a.png", "-", "folder"],
        ["encode", "a.png", "--max-pixels", "0"],
        ["encode", "a.png", "--device", "abacus"],
        ["decode", "a.rnc", "--iterations", "256"],
        ["decode", "a.rnc", "--format", "exe"],
        ["truncate", "a.rnc", "b.rnc", "--iterations", "1", "--bytes", "100"],
        ["truncate", "a.rnc"],
        ["info"],
    ],
)
def test_wrong_usage(command, capsys):
    with pytest.raises(SystemExit) as error:
        main(command)
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("usage: rnncodec")
    assert captured.out == ""
    assert files() == ["a.png", "folder/b.png", "folder/deep/c.png"]


def test_pipes(codec, monkeypatch, capsys):
    png = Path("a.png").read_bytes()
    data = codec.encode(picture(), 2)
    for command, given, expected in (
        (["encode", "-", "--iterations", "2"], png, data),
        (["encode", "-", "-", "--iterations", "2"], png, data),
        (["encode", "a.png", "-", "--iterations", "2"], b"", data),
        (["truncate", "-", "-", "--iterations", "1"], data, codec.encode(picture(), 1)),
    ):
        with monkeypatch.context() as context:
            output = pipe(context, given)
            assert main(command) == 0
            assert output.getvalue() == expected
    for command in (["decode", "-"], ["decode", "-", "-", "--format", "webp"]):
        with monkeypatch.context() as context:
            output = pipe(context, data)
            assert main(command) == 0
            image = Image.open(io.BytesIO(output.getvalue()))
            assert image.format == command[-1].upper().replace("-", "PNG")
            assert np.array_equal(np.asarray(image), np.asarray(codec.decode(data)))
    with monkeypatch.context() as context:
        pipe(context, png)
        assert main(["encode", "-", "piped.rnc", "--iterations", "2"]) == 0
    assert Path("piped.rnc").read_bytes() == data
    with monkeypatch.context() as context:
        output = pipe(context, data)
        assert main(["info", "-", "--json"]) == 0
        assert json.loads(output.getvalue())["bytes"] == len(data)
    assert complaints(capsys) == []


@pytest.mark.parametrize("command", ["encode", "decode", "info"])
@pytest.mark.parametrize("data", [b"", b"\x8f", b"\x8fRNC", b"\x8fRNC\x02", b"GIF89a", bytes(10_000)])
def test_nonsense_from_a_pipe(command, data, monkeypatch, capsys):
    output = pipe(monkeypatch, data)
    assert main([command, "-"]) == 1
    assert len(complaints(capsys)) == 1
    assert output.getvalue() == b""


def test_no_more_is_read_than_the_header_announces(codec, monkeypatch, capsys):
    """The inputs are an endless pipe, and a header that announces more bytes than the limit."""

    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size=-1):
            assert 0 <= size < 2**24
            self.taken += size
            return (data + bytes(size))[:size] if self.taken == size else bytes(size)

    data = codec.encode(picture(), 1)
    endless = Endless()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=endless))
    assert main(["info", "-"]) == 1
    assert "follow the last iteration" in complaints(capsys)[0]
    assert endless.taken == 2**15  # the longest header has 28,636 bytes

    monkeypatch.setattr(jobs, "MAX_FILE_BYTES", len(data) - 1)
    Path("x.rnc").write_bytes(data)
    assert main(["info", "x.rnc"]) == 1
    assert "more than the limit" in complaints(capsys)[0]


def test_weights(codec, pretrained, capsys):
    """Files are decoded with the weights that they name: shipped ones by default, others if they are given."""
    assert main(["encode", "a.png", "o.rnc", "--weights", "other", "--iterations", "2"]) == 0
    assert main(["encode", "a.png", "s.rnc", "--iterations", "2"]) == 0
    assert main(["decode", "o.rnc", "s.rnc", "--output-dir", "out"]) == 0
    other = Codec(load_weights("other"))
    for name, used in (("o", other), ("s", codec)):
        expected = used.decode(Path(f"{name}.rnc").read_bytes())
        assert np.array_equal(np.asarray(Image.open(f"out/{name}.png")), np.asarray(expected))

    torch.manual_seed(5)
    save_weights("mine.safetensors", RecurrentCodec(CONFIG), "mine", {})
    assert main(["encode", "a.png", "m.rnc", "--weights", "mine.safetensors"]) == 0
    assert complaints(capsys) == []
    assert main(["decode", "m.rnc", "m.png"]) == 1
    (line,) = complaints(capsys)
    for part in ("mine", load_weights("./mine.safetensors").fingerprint.hex(), "small", codec.fingerprint.hex()):
        assert part in line
    assert main(["decode", "m.rnc", "s.rnc", "--weights", "mine.safetensors", "--output-dir", "both"]) == 0
    assert main(["encode", "a.png", "x.rnc", "--weights", "nameless"]) == 1
    assert "no weights are named 'nameless'" in complaints(capsys)[0]
    assert main(["encode", "a.png", "x.rnc", "--weights", "a.png/x"]) == 1
    assert len(complaints(capsys)) == 1


def test_limits_and_failures(codec, monkeypatch, capsys):
    Path("x.rnc").write_bytes(codec.encode(picture(), 1))
    for command in (["encode", "a.png", "out.rnc"], ["decode", "x.rnc", "out.png"]):
        assert main([*command, "--max-pixels", "1199"]) == 1
        assert "1199" in complaints(capsys)[0]
    for failure, said in (
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "CUDA out of memory."),
        (OSError(28, "No space left on device", "out.rnc"), "out.rnc: No space left on device"),
    ):
        with monkeypatch.context() as context:
            context.setattr(Codec, "encode", raising(failure))
            assert main(["encode", "a.png", "out.rnc"]) == 1
        (line,) = complaints(capsys)
        assert line.endswith(said)
    if not torch.cuda.is_available():
        assert main(["encode", "a.png", "--device", "cuda"]) == 1
        assert "CUDA" in complaints(capsys)[0]
    assert not {"out.rnc", "out.png", "a.rnc"} & set(files())


def raising(failure):
    def fail(*args, **kwargs):
        raise failure

    return fail


def test_interrupt_leaves_nothing_behind(monkeypatch, capsys):
    Path("out.rnc").write_text("old")
    before = files()
    monkeypatch.setattr(os, "replace", raising(KeyboardInterrupt()))  # at the last moment
    assert main(["encode", "a.png", "out.rnc"]) == 130
    assert complaints(capsys) == ["rnncodec: interrupted"]
    assert files() == before
    assert Path("out.rnc").read_text() == "old"


def test_file_names_cannot_forge_messages(capsys):
    assert main(["info", "two\nlines\x1b[31m.rnc", os.fsdecode(b"\xff.rnc")]) == 1
    lines = complaints(capsys)
    assert len(lines) == 2
    assert "two\\nlines\\x1b[31m.rnc" in lines[0]
    assert "\\udcff.rnc" in lines[1]


def test_version_and_help(capsys):
    for arguments, expected in (
        (["--version"], f"rnncodec {rnncodec.__version__}\n"),
        (["encode", "--help"], "Exactly two paths"),
        (["decode", "--help"], "Exactly two paths"),
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 0
        assert expected in capsys.readouterr().out


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


def test_info_and_truncate_do_without_torch(codec):
    Path("x.rnc").write_bytes(codec.encode(picture(), 3))
    code = """
import sys
import types
import rnncodec
from rnncodec.cli import main
assert main(["info", "x.rnc"]) == main(["truncate", "x.rnc", "y.rnc", "--iterations", "2"]) == 0
assert "torch" not in sys.modules
"""
    result = run(code)
    assert (result.returncode, result.stderr) == (0, "")
    assert Path("y.rnc").read_bytes() == codec.encode(picture(), 2)


def test_closed_pipes_end_quietly(codec):
    Path("x.rnc").write_bytes(codec.encode(picture(), 16))
    command = [sys.executable, "-m", "rnncodec", "info", "x.rnc"]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert result.returncode == 1
        assert result.stderr == "rnncodec: error: x.rnc: No space left on device\n"


@pytest.mark.parametrize(
    ("command", "module", "extra", "missing"),
    [
        ("train", "rnncodec.training.cli", "train", "lightning"),
        ("evaluate", "rnncodec.evaluation.evaluate", "eval", "matplotlib"),
    ],
)
def test_train_and_evaluate_are_commands_with_lines_of_their_own(command, module, extra, missing, monkeypatch):
    """They parse all arguments after their name; if a package is missing, one line names the extra that has it."""
    seen = []
    stub = types.SimpleNamespace(main=lambda args, program: seen.append((args, program)) or 3)
    monkeypatch.setitem(sys.modules, module, stub)
    assert main([command, "x", "--help"]) == 3
    assert seen == [(["x", "--help"], f"rnncodec {command}")]
    code = f"import sys; sys.modules[{missing!r}] = None; from rnncodec.cli import main; sys.exit(main([{command!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"rnncodec: error: {command} needs {missing}")
    assert done.stderr.endswith(f"pip install 'rnncodec[{extra}]'\n")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def latent(photos, tmp_path_factory):
    """Weights of a small latent network, first without and then with an allocation."""
    folder = tmp_path_factory.mktemp("latent")
    bare, path = folder / "bare.safetensors", folder / "latent.safetensors"
    save_latent(photos, bare)
    assert main(["export", str(bare), str(path), "--allocation", str(photos)]) == 0
    return bare, path


@pytest.fixture
def photo(photos):
    """Writes a photograph and a mask."""
    array = np.asarray(Image.open(photos / "coffee.png"))[:192, :256]
    Image.fromarray(array).save("photo.png")
    Image.fromarray(np.where(np.arange(256) < 100, 255, 0)[None].repeat(192, 0).astype(np.uint8)).save("mask.png")
    return array


def test_targets_of_weights_that_allocate(latent, photo, capsys):
    allocating, mask = Codec(load_weights(latent[1])), np.asarray(Image.open("mask.png"))
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["--bytes", "500"], {"max_bytes": 500}),
        (["--bytes", "500", "--tune", "psnr"], {"max_bytes": 500, "tune": "psnr"}),
        (["--quality", "40"], {"quality": 40}),
        (["--quality", "62.5", "--tune", "psnr"], {"quality": 62.5, "tune": "psnr"}),
        (["--psnr", "20"], {"psnr": 20}),
        (["--bytes", "500", "--roi", "mask.png"], {"max_bytes": 500, "roi": mask}),
        (["--quality", "40", "--roi", "mask.png"], {"quality": 40, "roi": mask}),
    ]
    data = b""
    for options, expected in cases:
        assert main(["encode", "photo.png", "out.rnc", "--weights", str(latent[1]), *options]) == 0
        data = Path("out.rnc").read_bytes()
        assert data == allocating.encode(photo, **expected)
        assert len(data) <= expected.get("max_bytes", 10**6)
    assert main(["decode", "out.rnc", "out.png", "--weights", str(latent[1])]) == 0
    assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(allocating.decode(data)))
    assert main(["info", "out.rnc"]) == 0
    assert "locations stop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "40", "--roi", "a.png"], "photo.png: the region of interest of this image is uint8 [192, 256]"),
        (["--quality", "40", "--roi", "absent.png"], "absent.png: No such file"),
        (["--roi", "mask.png"], "photo.png: a region of interest needs a target"),
        (["--bytes", "50"], "photo.png: iteration 1 takes"),
    ],
)
def test_targets_that_fail(latent, photo, capsys, options, message):
    assert main(["encode", "photo.png", "out.rnc", "--weights", str(latent[1]), *options]) == 1
    (line,) = complaints(capsys)
    assert line.startswith(f"rnncodec: error: {message}")
    assert not Path("out.rnc").exists()


def test_masks_with_transparency_are_refused(latent, photo, capsys):
    """It could count as much as white, or as little as black."""
    Image.new("LA", (256, 192), (255, 0)).save("clear.png")
    options = ["--bytes", "500", "--roi", "clear.png", "--weights", str(latent[1])]
    assert main(["encode", "photo.png", "out.rnc", *options]) == 1
    (line,) = complaints(capsys)
    assert line == "rnncodec: error: clear.png has transparency, of which --roi cannot tell how much it counts"


def test_export_of_an_allocation(latent, pretrained, photos, capsys):
    bare, path = map(load_weights, latent)
    assert bare.allocation is None
    assert path.allocation is not None
    assert (path.name, path.fingerprint, path.context_fingerprint) == (
        bare.name,
        bare.fingerprint,
        bare.context_fingerprint,
    )
    Path("none").mkdir()
    Path("none/text.txt").write_text("no image")
    Path("tiny").mkdir()
    Image.fromarray(picture()).save("tiny/a.png")
    Path("out.safetensors").write_text("old")
    for source, folder, message in (
        (pretrained / "small.safetensors", photos, "not a latent network"),
        (latent[0], "absent", "absent: No such file or directory"),
        (latent[0], "none", "needs photographs of at least 64 pixels"),
        (latent[0], "tiny", "needs photographs of at least 64 pixels"),
        ("a.png", photos, "not a readable safetensors file"),
        ("absent.safetensors", photos, "no such weights file"),
    ):
        assert main(["export", str(source), "out.safetensors", "--allocation", str(folder)]) == 1
        (line,) = complaints(capsys)
        assert message in line
        assert Path("out.safetensors").read_text() == "old"
