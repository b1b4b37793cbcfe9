"""Tests of what a training says: its help, its progress on a terminal and in a log, and the warnings that it shows."""

import re
import warnings

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from small_training import arguments, noise_images

from rnncodec.data.cache import build_cache
from rnncodec.training import cli
from rnncodec.training.messages import messages
from rnncodec.training.progress import Pace, TrainingProgress


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("console") / "images", 4)


@pytest.fixture(autouse=True)
def log(alone, monkeypatch):
    """Wide enough, and no terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


# What jsonargparse deprecates of Lightning; users do not see warnings of this kind.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def trained(arguments):
    """The exit status of a training, after which another may start in this process."""
    try:
        return cli.main(arguments)
    finally:
        wandb.finish()
        wandb.teardown()


STATE = r"[\d.e-]+ MP/s(, \d+:\d\d:\d\d left)?(, [\w/]+ [\d.e+-]+)*"
SAID = (
    r"2 images to train on, 2 to validate on",
    r"decoded images: .*/[0-9a-f]{24}, 49\.2 kB",
    r"CodecTraining: [\d,]+ parameters, on 1 x cpu, 32-true",
    rf"step \d+/\d+: {STATE}",
    r"`Trainer\.fit` stopped: `max_steps=\d+` reached\.",
    r"Restoring states from the checkpoint path at .*last\.ckpt",
)


def test_a_log_has_few_lines_and_no_warnings(images, tmp_path, capsys):
    """A warning would be an error here, as in all tests, unless the training itself leaves it out."""
    assert trained(arguments(images, tmp_path, "--trainer.log_every_n_steps", "1")) == 0
    first = capsys.readouterr()
    assert trained(arguments(images, tmp_path, "--ckpt_path", "last", steps=10)) == 0
    again = capsys.readouterr()
    assert trained(["validate", *arguments(images, tmp_path, "--ckpt_path", "last")[1:]]) == 0
    validated = capsys.readouterr()
    for text in first.err, again.err, validated.err:
        others = [line for line in text.splitlines() if not any(re.fullmatch(said, line) for said in SAID)]
        assert others == ["decoding images"] * len(others)
    steps = [line.split(":")[0] for line in first.err.splitlines() if line.startswith("step")]
    assert steps == ["step 3/8", "step 6/8", "step 8/8"]  # after validations, and at the end
    assert "Restoring" in again.err
    assert "val/psnr_4" in validated.out
    assert "Epoch" not in first.out + first.err + again.out + again.err


def test_lines_come_at_logging_intervals_once_they_are_due(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rnncodec.training.progress.SECONDS", 0)
    more = ["--trainer.log_every_n_steps", "2", "--trainer.limit_val_batches", "0", "--trainer.max_time", "00:01:00:00"]
    assert trained(arguments(images, tmp_path, *more, steps=5)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert [line.split(":")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert all("train/loss" in line for line in lines)
    assert all(re.search(r", 0:0\d:\d\d left", line) for line in lines)  # the steps end before the hour
    more = [
        *more,
        "--trainer.limit_train_batches",
        "1",
        "--trainer.max_epochs",
        "1",
        "--trainer.log_every_n_steps",
        "1",
    ]
    assert trained(arguments(images, tmp_path, *more, "--name", "other", steps=-1)) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert re.match(r"step 1: .*, (1:00:00|0:59:\d\d) left", line)  # nothing else ends it


def test_a_terminal_has_a_bar(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert trained(arguments(images, tmp_path, steps=4)) == 0
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(rf"training ━+.*4/4 {STATE}", said)
    assert re.search(r"validating ━+.*[012]/2", said)
    assert "Epoch" not in said
    assert re.search(r"[\r\n]step 3/4: ", said)


def test_no_time_is_left_where_it_is_over(monkeypatch):
    """As after a validation that took longer than what was left."""
    bar = TrainingProgress()
    monkeypatch.setattr(bar, "_pace", Pace(0, lambda: 0.0))
    monkeypatch.setattr(bar, "_left", lambda trainer, pace: -8.0)
    assert "0:00:00 left" in bar._state(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))


def test_pace():
    """Steps of 2 seconds and 100 pixels, and a validation of 30 after the third."""
    now = 1000.0
    pace = Pace(7, lambda: now)
    assert (pace.speed, pace.left(10)) == (0, None)
    for step in range(8, 11):
        now += 2
        pace.advance(step, 100)
    assert (pace.speed, pace.left(10)) == (50, 20)
    now += 30
    pace.pause(30)
    now += 2
    pace.advance(11, 100)
    assert pace.speed == 50
    assert pace.left(10) == pytest.approx(20 * (1 + 30 / 8))
    for step in range(12, 112):  # faster: only recent steps count
        now += 0.5
        pace.advance(step, 100)
    assert pace.speed == 200


def test_warnings_are_lines_that_begin_with_the_program(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with messages("rnncodec train"):
            warnings.warn("an image\nand more", stacklevel=1)
            warnings.warn("The `srun` command is available on your system but is not used. HINT", stacklevel=1)
            rank_zero_info("Seed set to 0")
            rank_zero_info("what we say")
    assert capsys.readouterr().err.splitlines() == ["rnncodec train: warning: an image", "what we say"]


def test_what_images_lose_is_told_once_for_each_kind(tmp_path):
    files = {}
    for name in ("a.png", "b.png", "c.png"):
        mode = "RGB" if name == "c.png" else "RGBA"
        Image.new(mode, (20, 20)).save(tmp_path / name)
        files[name] = tmp_path / name
    with pytest.warns(UserWarning, match=r"^2 files, such as a\.png: .*transparency") as told:
        build_cache(tmp_path / "cache", files, 1000)
    assert len(told) == 1


# Help


def help_of(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*args, "--help"], "rnncodec train")
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def default_of(text, option):
    """The default that a help names for an option."""
    found = re.search(rf" --{re.escape(option)} [A-Z_]+ .*?default: (.+?)\)", text)
    return found and found[1]


@pytest.mark.parametrize(
    ("args", "kind", "defaults"),
    [
        (["fit"], "CodecTraining", {"model.learning_rate": "0.0005", "name": "codec", "data.batch_size": "32"}),
        (["fit", "--config", "latent"], "JointTraining",
         {"model.rate_weight": "0.4", "name": "latent", "data.batch_size": "4", "trainer.max_steps": "40000"}),
        (["--config=debug"], "CodecTraining", {"model.learning_rate": "0.002", "ema.decay": "0.95"}),
        (["validate", "--model", "CompressiveTraining"], "CompressiveTraining", {"name": "codec"}),
        (["fit", "--model=rnncodec.training.context.ContextTraining"], "ContextTraining", {}),
    ],
)  # fmt: skip
def test_help_has_the_options_of_the_class_and_the_values_of_the_config(capsys, args, kind, defaults):
    text = help_of(capsys, *args)
    assert f"The options of --model are those of {kind}. With --config or --model before --help" in text
    assert {option: default_of(text, option) for option in defaults} == defaults
    own = {"JointTraining": "rate_weight", "CompressiveTraining": "scale_steps", "ContextTraining": "contexts"}
    for name, option in own.items():
        assert (f"--model.{option} " in text) == (name == kind)


def test_help_of_a_run(images, tmp_path, capsys):
    assert trained(arguments(images, tmp_path, "--trainer.enable_progress_bar", "false", steps=1)) == 0
    text = help_of(capsys, "fit", "-c", str(tmp_path / "debug" / "config.yaml"))
    assert default_of(text, "model.learning_rate") == "0.002"
    assert default_of(text, "data.batch_size") == "2"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("- a", "not a config"),
        ("a: [", "while parsing"),
        ("nonsense: 1", "nonsense"),
        ("model: {class_path: Nonsense}", "'Nonsense' is not a training, as CodecTraining"),
        ("model: {class_path: os.path.join}", "'os.path.join' is not a training"),
    ],
)
def test_a_bad_config_is_one_line_in_a_help_too(tmp_path, capsys, content, said):
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_text(content)
    assert cli.main(["fit", "--config", str(path), "--help"], "rnncodec train") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rnncodec train: error: ")
    assert said in line


def test_the_help_without_a_subcommand_lists_them(capsys):
    assert "{fit,validate}" in help_of(capsys)


def test_buffers_are_not_sent_between_processes(images, tmp_path, monkeypatch):
    """Which would hang where ranks have unequal numbers of images."""
    seen = {}

    def ignore(module, names):
        seen[type(module).__name__] = set(names) == {name for name, _ in module.named_buffers()}

    target = torch.nn.parallel.DistributedDataParallel
    monkeypatch.setattr(target, "_set_params_and_buffers_to_ignore_for_model", staticmethod(ignore))
    assert trained(arguments(images, tmp_path, "--trainer.enable_progress_bar", "false", steps=1)) == 0
    assert seen == {"CodecTraining": True}
