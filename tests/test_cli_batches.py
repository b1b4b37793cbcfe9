"""Tests of the command line with folders: which files are done, what they are named, and what is said of the others."""

import io
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from rnncodec.cli import main
from rnncodec.codec import Codec
from rnncodec.files import finding, read_header
from rnncodec.weights import load_weights

TURNED = "turned upright, as the file says"
PIXELS = 40 * 30  # of `picture`
FAST = ["--iterations", "1", "--weights", "tiny.safetensors"]


@pytest.fixture(autouse=True)
def place(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny, ".")
    return tmp_path


def picture(seed=0, mode="RGB"):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)).convert(mode)


def save(name, image=None, **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(name, **options)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def run(capsys, *arguments, status=0):
    assert main([*arguments]) == status
    captured = capsys.readouterr()
    assert all(line.startswith("rnncodec: ") for line in captured.err.splitlines()), captured.err
    return captured.out.splitlines(), [line.removeprefix("rnncodec: ") for line in captured.err.splitlines()]


def closing(line, pixels):
    """A closing line without how long the work took, after checks of that."""
    found = re.search(r"; (\S+) megapixels in (\d+):(\d\d):(\d\d), (\S+) a second", line)
    assert found
    megapixels, hours, minutes, seconds, speed = map(float, found.groups())
    taken = 3600 * hours + 60 * minutes + seconds  # rounded to a second
    assert megapixels == round(pixels / 1e6, 1)
    assert 0.99 * pixels / 1e6 / (taken + 0.5) <= speed
    assert taken < 1 or speed <= 1.01 * pixels / 1e6 / (taken - 0.5)
    return line.replace(found.group(), "")


def test_an_album(monkeypatch, capsys):
    """One command says, in a few lines, what became of all that a telephone and a camera leave in a folder."""
    monkeypatch.setattr(finding, "find_spec", lambda name: None)  # no package that reads HEIF or JPEG XL
    portrait = Image.Exif()
    portrait[274] = 6
    for name in ("album/a.jpg", "album/b.jpg", "album/trip/c.jpg"):
        save(name, exif=portrait)
    clear = picture(1, "RGBA")
    clear.putalpha(99)
    save("album/logo.png", clear)
    save("album/moving.gif", save_all=True, append_images=[picture(2)])
    save("album/twice.gif", picture(3), save_all=True, append_images=[picture(4)])
    for name in ("live.heic", "live.mov", "trip/other.HEIC", "x.jxl", "raw.CR2", "notes.txt", "trip/.hidden.heic"):
        Path("album", name).write_bytes(b"of no format")
    Path("album/broken.jpg").write_bytes(b"\xff\xd8\xff of no format")
    out, said = run(capsys, "encode", "album", "--output-dir", "out", *FAST, status=1)
    done = ["a.rnc", "b.rnc", "logo.rnc", "moving.rnc", "trip/c.rnc", "twice.rnc"]
    assert files("out") == done
    assert [line.split(":")[0] for line in out[:-1]] == [f"out/{name}" for name in done]
    sources = ("a.jpg", "b.jpg", "trip/c.jpg", "logo.png", "moving.gif", "twice.gif")
    before = sum(Path("album", name).stat().st_size for name in sources)
    after = sum(Path("out", name).stat().st_size for name in done)
    assert closing(out[-1], 6 * PIXELS) == f"6 of 11 files: {before} bytes became {after}; 1 failed; 4 skipped"
    assert len(said) == 7
    assert said[0].startswith("error: album/broken.jpg: ")
    assert sorted(said[1:4]) == [
        "warning: 2 files, such as album/moving.gif: only the first of several images is kept",
        "warning: 3 files, such as album/a.jpg: turned upright, as the file says",
        "warning: album/logo.png: transparency is replaced by white",
    ]
    assert sum("pip install 'rnncodec[" in line for line in said[4:]) == 2
    for start in ("album/live.heic, album/trip/other.HEIC: ", "album/raw.CR2: ", "album/x.jxl: "):
        assert any(line.startswith(f"skipped: {start}") for line in said[4:])

    out, said = run(capsys, "encode", "album", "--output-dir", "out", "--force", "--quiet", *FAST, status=1)
    assert out == []
    assert len(said) == 4
    assert said[0].startswith("error: ")
    assert all(line.startswith("skipped: ") for line in said[1:])


def test_many_skipped_files_are_counted(monkeypatch, capsys):
    save("raws/a.png")
    for number in range(12):
        Path(f"raws/{number:02}.nef").write_bytes(b"")
    _, (line,) = run(capsys, "encode", "raws", *FAST, status=1)
    listed = ", ".join(f"raws/{number:02}.nef" for number in range(10))
    assert line.startswith(f"skipped: 12 files, such as {listed}: ")


def test_a_folder_of_skipped_files_alone(capsys):
    Path("raws").mkdir()
    Path("raws/a.nef").write_bytes(b"")
    out, (line,) = run(capsys, "encode", "raws", *FAST, status=1)
    assert out == []
    assert line.startswith("skipped: raws/a.nef: ")
    save("more/a.png")
    out, (line,) = run(capsys, "encode", "raws", "more", *FAST, status=1)
    assert out[-1].startswith("1 of 2 files: ")
    assert out[-1].endswith("; 1 skipped")


def test_a_single_file_has_no_summary(capsys):
    save("a.png")
    out, said = run(capsys, "encode", "a.png", *FAST)
    assert len(out) == 1
    assert out[0].startswith("a.rnc: 1 iterations, ")
    assert said == []
    assert run(capsys, "encode", "a.png", "b.rnc", "--quiet", *FAST) == ([], [])
    assert run(capsys, "decode", "b.rnc", "b.png", "--quiet", *FAST[2:]) == ([], [])


def test_what_is_lost_of_one_file(capsys):
    save("a.png", picture(mode="LA").convert("RGBA"))
    clear = picture(mode="RGBA")
    clear.putalpha(0)
    save("b.png", clear)
    assert run(capsys, "encode", "a.png", "a.rnc", *FAST)[1] == []
    assert run(capsys, "encode", "b.png", "b.rnc", *FAST)[1] == ["warning: b.png: transparency is replaced by white"]
    assert run(capsys, "encode", "b.png", "b.rnc", "--quiet", *FAST)[1] == []


@pytest.mark.parametrize("format", ["JPEG", "HEIF"])
def test_what_a_pipe_holds(monkeypatch, capsys, format):
    """A picture that can be read only once is turned and converted like a file, and the same is said of it."""
    exif = Image.Exif()
    exif[274] = 8
    file = io.BytesIO()
    if format == "HEIF":
        pillow_heif.from_pillow(picture()).save(file, exif=exif.tobytes())
    else:
        picture().save(file, format, exif=exif)
    Path("a.picture").write_bytes(file.getvalue())
    assert run(capsys, "encode", "a.picture", "a.rnc", *FAST)[1] == [f"warning: a.picture: {TURNED}"]

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

        def seek(self, *_):
            raise io.UnsupportedOperation

    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=Pipe(file.getvalue())))
    assert run(capsys, "encode", "-", "b.rnc", *FAST)[1] == [f"warning: -: {TURNED}"]
    assert read_header(Path("b.rnc").read_bytes()).width == 30
    assert Path("b.rnc").read_bytes() == Path("a.rnc").read_bytes()


def test_each_image_is_opened_once(monkeypatch, capsys):
    save("a.png")
    opened = []
    original = open

    def counted(file, *arguments, **options):
        opened.append(str(file))
        return original(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", counted)
    run(capsys, "encode", "a.png", "a.rnc", *FAST)
    assert opened.count("a.png") == 1


@pytest.mark.parametrize("arguments", [["a.rnc", "x.gif"], ["in", "--format", "gif"], ["a.rnc", "-", "--format=pgm"]])
def test_formats_of_few_colors_are_refused_at_once(capsys, arguments):
    """Before anything is read: the files are none."""
    Path("in").mkdir()
    for name in ("in/b.rnc", "in/c.rnc", "a.rnc"):
        Path(name).write_bytes(b"no such file")
    with pytest.raises(SystemExit) as error:
        main(["decode", *arguments])
    assert error.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"rnncodec: error: \.(gif|pgm) files cannot hold all colors; \.png always works", line)
    assert files(".") == ["a.rnc", "in/b.rnc", "in/c.rnc", "tiny.safetensors"]


@pytest.mark.parametrize("format", ["", "xyz", "../png", "JPEG2000"])
def test_unknown_formats(capsys, format):
    with pytest.raises(SystemExit) as error:
        main(["decode", "a.rnc", "--format", format])
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unknown --format {format!r}\n")


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (["x.jpg", "x.png", "y.png"], ["x.jpg.rnc", "x.png.rnc", "y.rnc"]),
        (["x.jpg", "x.png", "x.jpg.png"], ["x.jpg.png.rnc", "x.jpg.rnc", "x.png.rnc"]),
        (["x.jpg", "sub/x.png"], ["sub/x.rnc", "x.rnc"]),
        (["x.1.png", "x.2.png"], ["x.1.rnc", "x.2.rnc"]),
        (["X.JPG", "X.jpg", "X.png"], ["X.JPG.rnc", "X.jpg.rnc", "X.png.rnc"]),
    ],
)
def test_names_that_would_collide(tiny, capsys, inputs, outputs):
    """Each picture has a file of its own, which decodes to the picture, with a name that tells which one it was."""
    codec = Codec(load_weights(tiny))
    for seed, name in enumerate(inputs):
        save(f"in/{name}", picture(seed), format="png")
    run(capsys, "encode", "in", "--output-dir", "out", *FAST)
    assert files("out") == sorted(outputs)
    run(capsys, "decode", "out", "--output-dir", "back", *FAST[2:])
    assert files("back") == sorted(name.removesuffix("rnc") + "png" for name in outputs)
    for seed, name in enumerate(inputs):
        data = codec.encode(picture(seed), 1)
        stem = name if f"{name}.rnc" in outputs else name.rpartition(".")[0]
        assert Path("out", f"{stem}.rnc").read_bytes() == data
        assert np.array_equal(np.asarray(Image.open(f"back/{stem}.png")), np.asarray(codec.decode(data)))


def test_names_that_collide_beside_their_inputs(capsys):
    save("x.jpg")
    save("x.png", picture(1))
    run(capsys, "encode", "x.jpg", "x.png", *FAST)
    assert {"x.jpg.rnc", "x.png.rnc"} <= set(files("."))
    run(capsys, "decode", "x.jpg.rnc", "x.png.rnc", *FAST[2:])
    assert {"x.jpg.png", "x.png.png"} <= set(files("."))
    run(capsys, "encode", "x.jpg", *FAST)  # alone, it needs no more than its own name
    assert "x.rnc" in files(".")


def test_terminals_are_refused(monkeypatch, capsys):
    """Bytes of a file may be commands to a terminal; text is no reason to refuse one."""
    save("a.png")
    run(capsys, "encode", "a.png", "a.rnc", *FAST)
    terminal = types.SimpleNamespace(isatty=lambda: True, write=lambda text: None, flush=lambda: None)
    for command in (["decode", "a.rnc", "-"], ["encode", "a.png", "-"], ["encode", "-"], ["truncate", "a.rnc", "-"]):
        with monkeypatch.context() as context:
            context.setattr(sys, "stdout", terminal)
            with pytest.raises(SystemExit) as error:
                main(command)
        assert error.value.code == 2
        assert "standard output is a terminal" in capsys.readouterr().err
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", terminal)
        assert main(["truncate", "a.rnc", "b.rnc"]) == 0


def test_truncating_a_file_to_itself(capsys):
    """In place, or through links, the result is the shorter file; other names of the old file keep it."""
    save("a.png")
    run(capsys, "encode", "a.png", "a.rnc", "--iterations", "3", *FAST[2:])
    whole = Path("a.rnc").read_bytes()
    run(capsys, "truncate", "a.rnc", "short.rnc", "--iterations", "1")
    short = Path("short.rnc").read_bytes()
    assert len(short) < len(whole)
    Path("link.rnc").symlink_to("a.rnc")
    Path("hard.rnc").hardlink_to("a.rnc")
    for source, target in (("a.rnc", "a.rnc"), ("link.rnc", "a.rnc"), ("a.rnc", "link.rnc"), ("link.rnc", "link.rnc")):
        run(capsys, "truncate", source, target, "--iterations", "1")
        assert Path("a.rnc").read_bytes() == short
        assert Path("link.rnc").is_symlink()
        assert Path("hard.rnc").read_bytes() == whole
        Path("a.rnc").write_bytes(whole)
    run(capsys, "truncate", "hard.rnc", "a.rnc", "--iterations", "1")
    assert Path("a.rnc").read_bytes() == short
    assert Path("hard.rnc").read_bytes() == whole
    run(capsys, "truncate", "a.rnc", "a.rnc", "--iterations", "3", status=1)
    assert Path("a.rnc").read_bytes() == short


@pytest.mark.parametrize("name", ["out", "out.ckpt", "out.safetensors.bak", "folder/", "safetensors", ".safetensors"])
@pytest.mark.parametrize("kind", [["--name", "x"], ["--context", "x"], ["--allocation", "x"]])
def test_export_to_other_names(capsys, name, kind):
    """Such weights would not be found again; it is said before the work, of which the checkpoint is absent."""
    with pytest.raises(SystemExit) as error:
        main(["export", "absent.ckpt", name, *kind])
    assert error.value.code == 2
    assert f"must end in .safetensors, not {name}\n" in capsys.readouterr().err


def test_encode_takes_a_path(tiny):
    """The file is that of the command line, with the camera's EXIF data; Pillow reads them from the decoded image."""
    exif = Image.Exif()
    exif[271], exif[274] = "Maker", 6
    save("photo.jpg", exif=exif, quality=95)
    with Image.open("photo.jpg") as stored:
        upright = np.rot90(np.asarray(stored), -1)
    assert main(["encode", "photo.jpg", "photo.rnc", *FAST]) == 0
    codec = Codec(load_weights(tiny))
    for path in ("photo.jpg", Path("photo.jpg"), Path("photo.jpg").absolute()):
        assert codec.encode(path, 1) == Path("photo.rnc").read_bytes()
    assert codec.encode("photo.jpg", 1, records={}) == codec.encode(np.ascontiguousarray(upright), 1)
    assert main(["decode", "photo.rnc", "photo.png", *FAST[2:]]) == 0
    with Image.open("photo.png") as decoded:
        assert dict(decoded.getexif()) == {271: "Maker"}
    for wrong, message in (
        ("absent.jpg", "absent.jpg: No such file"),
        (b"photo.jpg", "not bytes"),
        ([[1]], "not list"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.encode(wrong)  # pyright: ignore[reportArgumentType]


def test_existing_outputs_can_be_left_as_they_are(capsys):
    for number in range(3):
        save(f"in/{number}.png", picture(number))
    Path("in/1.rnc").write_bytes(b"mine")
    out, err = run(capsys, "encode", "in", "--skip-existing", *FAST)
    assert Path("in/1.rnc").read_bytes() == b"mine"
    assert err == []
    sizes = [Path(f"in/{number}.{suffix}").stat().st_size for suffix in ("png", "rnc") for number in (0, 2)]
    expected = f"2 of 3 files: {sum(sizes[:2])} bytes became {sum(sizes[2:])}; 1 existed"
    assert closing(out[-1], 2 * PIXELS) == expected
    assert sorted(line.split(":")[0] for line in out[:-1]) == ["in/0.rnc", "in/2.rnc"]
    Path("in/1.rnc").unlink()
    assert run(capsys, "encode", "in", "--skip-existing", *FAST)[0][-1].endswith("; 2 existed")
    assert run(capsys, "encode", "in", *FAST, status=1)[1][0] == "error: in/0.png: in/0.rnc exists; --force replaces it"


def test_outputs_are_replaced_or_left_but_not_both(capsys):
    save("a.png")
    with pytest.raises(SystemExit, match="2"):
        main(["encode", "a.png", "--force", "--skip-existing"])
    assert "not allowed with argument --force" in capsys.readouterr().err


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    found = capsys.readouterr()
    assert found.out.startswith("usage: rnncodec")
    assert "compress images to .rnc files" in found.out
    assert found.err == ""


def test_a_batch_that_is_done_needs_no_weights(capsys, monkeypatch):
    """Loading them takes longer than all else."""
    for number in range(2):
        save(f"in/{number}.png", picture(number))
    run(capsys, "encode", "in", *FAST)
    monkeypatch.setattr("rnncodec.load", lambda *_, **__: pytest.fail("loaded"))
    assert run(capsys, "encode", "in", "--skip-existing", *FAST) == (["0 of 2 files: 0 bytes became 0; 2 existed"], [])


def test_all_iterations_become_a_folder_of_pictures(tiny, capsys):
    """Each picture is that of a decode with so many iterations, with the photograph's EXIF data."""
    exif = Image.Exif()
    exif[271] = "Maker"
    for name in ("in/a.png", "in/deep/b.png"):
        save(name, exif=exif)
    assert main(["encode", "in", "--output-dir", "coded", "--weights", "tiny.safetensors", "--iterations", "3"]) == 0
    codec = Codec(load_weights(tiny))
    command = ["decode", "coded", "--all-iterations", "out", *FAST[2:]]
    capsys.readouterr()
    out, _ = run(capsys, *command)
    assert out[:2] == ["out/a: 3 pictures, 40x30", "out/deep/b: 3 pictures, 40x30"]
    after = sum(Path("out", name).stat().st_size for name in files("out"))
    before = sum(Path("coded", name).stat().st_size for name in files("coded"))
    assert closing(out[2], 2 * PIXELS) == f"2 of 2 files: {before} bytes became {after}"
    assert files("out") == [f"{name}/0{number}.png" for name in ("a", "deep/b") for number in (1, 2, 3)]
    data = Path("coded/a.rnc").read_bytes()
    for number in (1, 2, 3):
        with Image.open(f"out/a/0{number}.png") as decoded:
            assert np.array_equal(np.asarray(decoded), np.asarray(codec.decode(data, number)))
            assert dict(decoded.getexif()) == {271: "Maker"}
    assert run(capsys, *command, status=1)[1][0] == "error: coded/a.rnc: out/a exists; --force replaces it"
    assert run(capsys, *command, "--skip-existing")[0] == ["0 of 2 files: 0 bytes became 0; 2 existed"]
    Path("out/a/notes.txt").write_text("mine")
    Path("out/a/02.png").write_bytes(b"broken")
    said = run(capsys, *command, "--force", "--iterations", "2")[1]
    assert said[0] == "warning: coded/a.rnc: not of this file, but in out/a before: 03.png"  # it may be the user's
    assert files("out/a") == ["01.png", "02.png", "03.png", "notes.txt"]
    assert np.array_equal(np.asarray(Image.open("out/a/02.png")), np.asarray(codec.decode(data, 2)))
    assert Path("out/a/notes.txt").read_text() == "mine"
    out, _ = run(capsys, "decode", "coded/a.rnc", "--all-iterations", "two", "--format", "webp", *FAST[2:])
    assert (out, files("two")) == (["two/a: 3 pictures, 40x30"], [f"a/0{number}.webp" for number in (1, 2, 3)])


def test_all_iterations_leave_other_pictures(capsys):
    save("a.png")
    run(capsys, "encode", "a.png", *FAST)
    for name in ("01", "02", "42"):
        save(f"a/{name}.png", picture(5))
    mine = Path("a/42.png").read_bytes()
    said = run(capsys, "decode", "a.rnc", "--all-iterations", ".", "--force", *FAST[2:])[1]
    assert said == ["warning: a.rnc: not of this file, but in a before: 02.png, 42.png"]
    assert files("a") == ["01.png", "02.png", "42.png"]
    assert Path("a/42.png").read_bytes() == mine
    assert Path("a/01.png").read_bytes() != Path("a/02.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "a.rnc", "b.tga"], "b.tga: no such input, and no output, whose names end in .apng, .avif"),
        (["encode", "a.png", "b.rcn"], "b.rcn: no such input, and no output, whose names end in .rnc"),
        (["truncate", "a.rnc", "a.png", "--iterations", "1"], "a.png would not be an image"),
    ],
)
def test_names_that_are_no_outputs_are_refused_at_once(capsys, arguments, message):
    save("a.png")
    run(capsys, "encode", "a.png", *FAST)
    before = {name: Path(name).read_bytes() for name in files(".")}
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err
    assert {name: Path(name).read_bytes() for name in files(".")} == before


def test_a_compressed_image_is_no_checkpoint(capsys):
    save("a.png")
    run(capsys, "encode", "a.png", *FAST)
    shutil.copy("tiny.safetensors", "x.safetensors")
    for more, what in ((["--name", "x"], "not a checkpoint"), (["--context", "context"], "no context model")):
        said = run(capsys, "export", "a.rnc", "x.safetensors", *more, status=1)[1]
        assert len(said) == 1
        assert said[0].startswith(f"error: a.rnc: {what}")


def test_pictures_of_one_file_and_those_of_a_folder_do_not_mix(capsys):
    save("in/x/y.png")
    save("in/x.png")
    run(capsys, "encode", "in", *FAST)
    said = run(capsys, "decode", "in", "--all-iterations", "out", *FAST[2:], status=1)[1]
    assert said == ["error: in/x.rnc would become a folder that in/x/y.rnc is to be in: give them apart"]
    assert not Path("out").exists()


def test_no_folder_is_left_of_pictures_that_cannot_be_decoded(capsys):
    """Not even if the first iterations can be."""
    save("a.png")
    assert main(["encode", "a.png", "a.rnc", "--weights", "tiny.safetensors", "--iterations", "3"]) == 0
    data = bytearray(Path("a.rnc").read_bytes())
    data[-1] ^= 1
    Path("a.rnc").write_bytes(data)
    capsys.readouterr()
    run(capsys, "decode", "a.rnc", "--all-iterations", "out", "--iterations", "3", *FAST[2:], status=1)
    assert files("out") == []
    Path("out/a").write_text("mine")
    run(capsys, "decode", "a.rnc", "--all-iterations", "out", "--force", "--iterations", "2", *FAST[2:], status=1)
    assert (files("out"), Path("out/a").read_text()) == (["a"], "mine")
    with pytest.raises(SystemExit, match="2"):
        main(["decode", "a.rnc", "a.png", "--all-iterations", "out"])
    assert "give an output or a folder for outputs, not both" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["decode", "a.rnc", "--all-iterations", "out", "--output-dir", "b"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_options_and_files(capsys, shell):
    """The script is one that the shell accepts; bash is asked for what it would complete."""
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert "--all-iterations" in script
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    assert subprocess.run([shell, "-n"], input=script, text=True, capture_output=True).returncode == 0
    if shell == "bash":
        for words, expected in (("rnncodec dec", ["decode"]), ("rnncodec encode --skip", ["--skip-existing"])):
            ask = f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; _shtab_rnncodec; echo ${{COMPREPLY[@]}}"
            done = subprocess.run(["bash"], input=f"{script}\n{ask}", text=True, capture_output=True)
            assert done.stdout.split() == expected
