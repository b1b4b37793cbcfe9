"""Tests of how trainings end: on signals, full disks and errors, what validation leaves, and who may use a folder."""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import small_training
import torch
from lightning.pytorch.utilities import rank_zero_only

from rnncodec.files.images import load_image, save_image
from rnncodec.network import NetworkConfig
from rnncodec.training import cli
from rnncodec.training.checkpoints import AtomicCheckpointIO, check_checkpoint
from rnncodec.training.folder import RunFolder
from rnncodec.training.module import CodecTraining
from rnncodec.training.stopping import StopOnSignal

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of small runs, and of averaged weights


@pytest.fixture(scope="module")
def crops(photos, tmp_path_factory):
    """Photographs of one tile each, whose validation takes little time."""
    folder = tmp_path_factory.mktemp("crops")
    for path in photos.iterdir():
        save_image(load_image(path)[:64, :64], folder / f"{path.stem}.png")
    return folder


@pytest.fixture(autouse=True)
def no_data(alone, monkeypatch):
    """W&B, which is turned off, has no place for data."""
    monkeypatch.setenv("WANDB_DATA_DIR", "/nonexistent")


def arguments(crops, folder, *more, subcommand="fit"):
    """The training of eight steps of `small_training`, without progress."""
    quiet = ["--trainer.enable_progress_bar", "false"]
    return [subcommand, *small_training.arguments(crops, folder, *quiet, *more)[1:]]


def sends(hook, step, *signals):
    path = "--trainer.callbacks"
    numbers = json.dumps([int(number) for number in signals])
    return [f"{path}+", "probe.Sender", f"{path}.hook", hook, f"{path}.step", str(step), f"{path}.signals", numbers]


def last_line(capsys):
    """The last line of standard error, in which there is no traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.fixture(scope="module")
def whole(crops, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        assert cli.main(arguments(crops, folder)) == 0
    return folder / "debug"


def weights(folder):
    """The weights and their averages in a checkpoint, and the step."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    states = {f"{kind} {name}": value for kind in ("state_dict", "current_model_state")
              for name, value in checkpoint[kind].items()}  # fmt: skip
    return states, checkpoint["global_step"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def validations(folder):
    """The PSNR of every validation of all starts, by step."""
    found = {}
    for file in sorted(folder.glob("metrics/*/metrics.csv")):
        for row in csv.DictReader(file.read_text().splitlines()):
            if row.get("val/psnr"):
                assert row["step"] not in found
                found[row["step"]] = row["val/psnr"]
    return found


@pytest.mark.parametrize(
    ("number", "status", "hook", "sent", "stopped"),
    [
        (
            signal.SIGINT,
            130,
            "on_before_optimizer_step",
            1,
            2,
        ),  # within a step, before any checkpoint
        (signal.SIGUSR1, 138, "on_train_batch_start", 3, 4),  # ahead of the end of a job's time
        (signal.SIGTERM, 143, "on_validation_batch_start", 3, 4),  # while averaged weights replace the current ones
    ],
)
def test_a_signal_ends_a_training_that_can_be_resumed(
    crops, whole, tmp_path, capsys, number, status, hook, sent, stopped
):
    before = signal.getsignal(number)
    assert cli.main(arguments(crops, tmp_path, *sends(hook, sent, number))) == status
    assert signal.getsignal(number) == before
    last = tmp_path / "debug" / "last.ckpt"
    assert last_line(capsys) == f"train.py: stopped by {number.name}; --ckpt_path {last} resumes it"
    assert weights(tmp_path / "debug")[1] == stopped
    assert cli.main(arguments(crops, tmp_path, "--ckpt_path", str(last))) == 0
    states, step = weights(tmp_path / "debug")
    assert step == 8
    assert same(states, weights(whole)[0])
    assert validations(tmp_path / "debug") == validations(whole)
    assert len(validations(whole)) == 2


def test_a_signal_that_is_ignored_stays_so():
    """As Ctrl-C is for a job in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == stop._handle
        assert stop.status == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_before_the_first_step_there_is_nothing_to_save(crops, tmp_path, capsys):
    more = ["--trainer.num_sanity_val_steps", "1"]
    for hook in ("on_fit_start", "on_sanity_check_start"):
        assert cli.main(arguments(crops, tmp_path, *more, *sends(hook, 0, signal.SIGINT))) == 130
        assert last_line(capsys) == "train.py: stopped by SIGINT; nothing is saved"
        assert not list(tmp_path.rglob("*.ckpt*"))
    # A run of that name may start, also where signals cannot be handled.
    results = []
    last = ["--trainer.max_steps", "1"]
    thread = threading.Thread(target=lambda: results.append(cli.main(arguments(crops, tmp_path, *last))))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert results == [0]
    assert signal.getsignal(signal.SIGINT) == before


def test_without_checkpoints_nothing_is_saved(crops, tmp_path, capsys):
    more = ["--trainer.enable_checkpointing", "false", *sends("on_train_batch_start", 1, signal.SIGINT)]
    assert cli.main(arguments(crops, tmp_path, *more)) == 130
    assert last_line(capsys) == "train.py: stopped by SIGINT; nothing is saved"
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.slow
def test_a_signal_waits_for_accumulated_gradients(crops, tmp_path):
    more = ["--trainer.accumulate_grad_batches", "2", "--trainer.limit_val_batches", "0"]
    assert cli.main(arguments(crops, tmp_path / "a", *more, "--trainer.max_steps", "3")) == 0
    stopping = sends("on_before_zero_grad", 0, signal.SIGINT)  # in the first of two batches
    assert cli.main(arguments(crops, tmp_path / "b", *more, "--trainer.max_steps", "3", *stopping)) == 130
    last = tmp_path / "b" / "debug" / "last.ckpt"
    assert weights(last.parent)[1] == 1
    assert cli.main(arguments(crops, tmp_path / "b", *more, "--trainer.max_steps", "3", "--ckpt_path", str(last))) == 0
    assert same(weights(last.parent)[0], weights(tmp_path / "a" / "debug")[0])


def started(crops, folder, *more, **environment):
    """A training in its own process."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **environment}
    command = [sys.executable, str(ROOT / "train.py"), *arguments(crops, folder, *more)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
def test_without_the_process_of_wandb_a_training_goes_on(crops, whole, tmp_path, monkeypatch, hook):
    """As after a signal to all processes of a job, while there is a step to finish."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DATA_DIR")
    path = "--trainer.callbacks"
    kills = [f"{path}+", "probe.Killer", f"{path}.hook", hook, f"{path}.step", "3"]
    with started(crops, tmp_path, *kills, PYTHONWARNINGS="default") as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert error.count("W&B's process has ended") == 1, error
    assert "Traceback" not in error
    assert "socket" not in error
    assert same(weights(tmp_path / "debug")[0], weights(whole)[0])
    assert validations(tmp_path / "debug") == validations(whole)


@pytest.mark.slow
def test_a_signal_that_ends_the_process_of_wandb_too_saves_the_step(crops, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DATA_DIR")
    path = "--trainer.callbacks"
    kills = [f"{path}+", "probe.Killer", f"{path}.hook", "on_train_batch_start", f"{path}.step", "1"]
    with started(crops, tmp_path, *kills, *sends("on_train_batch_start", 1, signal.SIGTERM)) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert "Traceback" not in error
    assert weights(tmp_path / "debug")[1] == 2


@pytest.mark.slow
def test_a_second_signal_ends_the_process(crops, tmp_path):
    with started(crops, tmp_path, *sends("on_train_batch_start", 1, signal.SIGINT, signal.SIGINT)) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT, error
    assert "another signal ends at once" in error
    assert not list(tmp_path.rglob("*.ckpt*"))


def test_a_run_that_ends_at_once_in_validation_can_be_resumed(crops, whole, tmp_path, monkeypatch):
    """The second signal arrives before the step after it, so the checkpoint is that of the start of validation."""

    def kill(process, number):
        assert (process, signal.getsignal(number)) == (os.getpid(), signal.SIG_DFL)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", kill)
        more = sends("on_validation_batch_start", 3, signal.SIGINT, signal.SIGTERM)
        assert cli.main(arguments(crops, tmp_path, *more)) == 1
    assert weights(tmp_path / "debug")[1] == 3
    last = tmp_path / "debug" / "last.ckpt"
    assert cli.main(arguments(crops, tmp_path, "--ckpt_path", str(last))) == 0
    assert same(weights(tmp_path / "debug")[0], weights(whole)[0])


@pytest.mark.slow
def test_all_processes_end_after_the_same_step(crops, tmp_path):
    """Only the first one is sent a signal."""
    more = ["--trainer.devices", "2", "--trainer.strategy", "ddp", *sends("on_train_batch_start", 1, signal.SIGTERM)]
    code = (
        "import os, sys, probe\n"
        "if os.environ.get('LOCAL_RANK', '0') != '0':\n"
        "    probe.Sender.send = lambda *_, **__: None\n"
        "from rnncodec.training.cli import main\n"
        "sys.exit(main())\n"
    )
    script = tmp_path / "script.py"  # which the first process starts again for the second
    script.write_text(code)
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(script), *arguments(crops, tmp_path, *more)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 143, done.stderr
    assert weights(tmp_path / "debug")[1] == 2


def test_a_second_run_of_a_name_is_refused_while_the_first_lives(crops, tmp_path, capsys):
    folder = tmp_path / "debug"
    folder.mkdir()
    code = (
        f"import filelock, time; lock = filelock.FileLock({str(folder / '.lock')!r}); lock.acquire();"
        "print('held', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            before = sorted(path.name for path in folder.iterdir())
            assert cli.main(arguments(crops, tmp_path)) == 1
            assert last_line(capsys) == f"train.py: error: {folder}: another training with this name is running"
            assert sorted(path.name for path in folder.iterdir()) == before
        finally:
            holder.kill()
    assert cli.main(arguments(crops, tmp_path, "--trainer.max_steps", "1")) == 0  # a dead process holds nothing


@pytest.mark.parametrize(("rank", "node"), [(1, "0"), (0, "1")])
def test_other_processes_of_a_run_do_not_refuse_themselves(tmp_path, monkeypatch, rank, node):
    with RunFolder(tmp_path, "a").claim(resumed=False):
        run_id = RunFolder(tmp_path, "a").run_id
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        monkeypatch.setenv("NODE_RANK", node)
        with RunFolder(tmp_path, "a").claim(resumed=False):
            assert RunFolder(tmp_path, "a").run_id == run_id


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../../b", "/a"])
def test_a_name_is_that_of_a_folder_below_the_root(tmp_path, name):
    with pytest.raises(ValueError, match="--name must be"):
        RunFolder(tmp_path, name)


def test_validation_leaves_a_run_as_it_was(crops, whole, tmp_path, capsys):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(whole.rglob("*"))}

    before = state()
    checkpoint = ["--ckpt_path", str(whole / "last.ckpt")]
    command = arguments(crops, whole.parent, *checkpoint, "--data.val_images", "2", subcommand="validate")
    capsys.readouterr()
    assert cli.main(command) == 0
    assert state() == before
    assert "val/psnr_4" in capsys.readouterr().out  # the results are printed


def test_there_are_two_subcommands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "{fit,validate}" in text
    assert not re.search(r"\b(test|predict)\b", text)
    for subcommand in ("test", "predict"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([subcommand])
        assert stopped.value.code == 2
        assert subcommand in last_line(capsys)


def damaged(whole, path, how):
    content = (whole / "last.ckpt").read_bytes()
    match how:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "text":
            path.write_text("no checkpoint")
        case "folder":
            path.mkdir()
        case "foreign":
            torch.save({"state_dict": {}}, path)
        case "other":
            checkpoint = torch.load(whole / "last.ckpt", weights_only=True)
            checkpoint["state_dict"]["network.decoder.output.bias"] = torch.zeros(5)
            torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "No such file"),
        ("empty", "not a complete checkpoint"),
        ("cut", "not a complete checkpoint"),
        ("text", "not a complete checkpoint"),
        ("foreign", "not a complete checkpoint"),
        ("folder", "Is a directory"),
        ("other", "a checkpoint of another network, which differs in network.decoder.output.bias"),
    ],
)
def test_bad_checkpoints_are_an_error_of_one_line(whole, tmp_path, how, message):
    path = tmp_path / "a.ckpt"
    damaged(whole, path, how)
    module = CodecTraining(NetworkConfig(encoder_channels=(4,) * 4, decoder_channels=(4,) * 5))
    check_checkpoint(whole / "last.ckpt", module)
    with pytest.raises((ValueError, OSError)) as caught:
        check_checkpoint(path, module)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("subcommand", "how", "message"),
    [("fit", "cut", "not a complete checkpoint"), ("validate", "missing", "not found")],
)
def test_bad_checkpoints_are_told_by_the_command_line(crops, whole, tmp_path, capsys, subcommand, how, message):
    path = tmp_path / "a.ckpt"
    damaged(whole, path, how)
    command = arguments(crops, tmp_path / "runs", "--ckpt_path", str(path), subcommand=subcommand)
    assert cli.main(command) == 1
    line = last_line(capsys)
    assert str(path) in line
    assert message in line


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed\nmore")]
)
def test_a_full_disk_leaves_the_old_checkpoint_and_no_other_file(tmp_path, monkeypatch, error):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")

    def fills(self, checkpoint, part, storage_options=None):
        Path(part).write_bytes(b"half")
        raise error

    monkeypatch.setattr(AtomicCheckpointIO.__mro__[1], "save_checkpoint", fills)
    with pytest.raises(OSError, match=r"last\.ckpt: cannot be written: ") as caught:
        AtomicCheckpointIO().save_checkpoint({}, path)
    assert "\n" not in str(caught.value)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_gradients_that_are_not_numbers_end_in_one_line(crops, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "rnncodec.training.module.CodecTraining.error", lambda self, x, x_hat: x_hat.mean() * float("nan")
    )
    more = ["--model.max_bad_steps", "2", "--trainer.val_check_interval", "100"]
    assert cli.main(arguments(crops, tmp_path, *more)) == 1
    assert last_line(capsys) == "train.py: error: gradients were not finite in 3 steps in a row"
