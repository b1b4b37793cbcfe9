"""Tests of the Trainer's arguments: those that training cannot do are refused in one line, the others run."""

import inspect

import lightning as L
import pytest

from rnncodec.training import cli
from rnncodec.training.flags import check_trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of versions and of small runs

LIGHTNING = {name: parameter.default for name, parameter in inspect.signature(L.Trainer.__init__).parameters.items()}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("precision", "64-true", "64-true"),  # the patches are float32
        ("precision", "bf16-true", "bf16-true"),
        ("precision", "16-true", "16-true"),
        ("precision", "transformer-engine", "transformer-engine"),
        ("precision", 64, "64"),
        ("strategy", "ddp_spawn", "ddp_spawn"),
        ("strategy", "fsdp", "fsdp"),
        ("strategy", "deepspeed", "deepspeed"),
        ("strategy", "nonsense", "nonsense"),
        ("accumulate_grad_batches", 0, "at least 1"),
        ("accumulate_grad_batches", -1, "at least 1"),
        ("check_val_every_n_epoch", 0, "at least 1"),
        ("gradient_clip_val", -0.5, "at least 0"),
        ("log_every_n_steps", -1, "at least 0"),
        ("num_sanity_val_steps", -2, "at least -1"),
        ("val_check_interval", 0, "above 0"),
        ("overfit_batches", 1, "endless stream"),
        ("overfit_batches", 0.5, "endless stream"),
        ("barebones", True, "averaged weights"),
    ],
)
def test_what_training_cannot_do_is_one_line(name, value, said):
    with pytest.raises(ValueError, match=f"--trainer.{name} ") as caught:
        check_trainer({**LIGHTNING, **cli.DEFAULTS, name: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("precision", value) for value in (None, 32, 16, "32", "32-true", "16-mixed", "bf16-mixed")),
        *(("strategy", value) for value in ("auto", "ddp", "ddp_find_unused_parameters_true", "single_device")),
        ("accumulate_grad_batches", 2),
        ("check_val_every_n_epoch", None),
        ("gradient_clip_val", None),
        ("gradient_clip_val", 0),
        ("log_every_n_steps", 0),
        ("num_sanity_val_steps", -1),
        ("val_check_interval", 1),
        ("val_check_interval", "00:00:10:00"),
        ("val_check_interval", None),
    ],
)
def test_what_it_can_do_passes(name, value):
    check_trainer({**LIGHTNING, **cli.DEFAULTS, name: value})


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--trainer.precision", "nonsense"], 2, "precision"),
        (["--trainer.devices", "0"], 1, "devices"),  # of Lightning: a MisconfigurationException
        (["--trainer.devices", "[0]"], 1, "devices"),  # a TypeError
        (["--trainer.accelerator", "tpu"], 1, "torch_xla"),  # a ModuleNotFoundError
        (["--trainer.default_root_dir", "/proc/none"], 1, "/proc/none"),  # an OSError
        (["--name", "../a"], 1, "--name"),  # a ValueError
    ],
)
def test_errors_are_one_line_wherever_they_arise(tmp_path, capsys, monkeypatch, arguments, status, said):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    common = ["--config", "debug", "--data.root", str(tmp_path), "--trainer.accelerator", "cpu"]
    try:
        result = cli.main(["fit", *common, "--trainer.default_root_dir", str(tmp_path), *arguments])
    except SystemExit as stopped:
        result = stopped.code
    *_, line = error = capsys.readouterr().err.splitlines()
    assert result == status
    assert line.startswith("train.py: error: ")
    assert said in line
    assert not any("Traceback" in each for each in error)


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["debug", "--model.network.priming", "9"], 1, "priming and diffusion are from 0 to 8 extra runs, not 9 and 0"),
        (["debug", "--model.network.bits", "256"], 1, "a file has room for 255 bits of a location, not 256"),
        (["debug", "--model.network.bits", "x"], 2, "model.network.bits: Expected a <class 'int'>. Got value: x"),
        (["theis2017", "--model.network.rates", "4"], 1, "4 rates need as many weights of the distortion"),
        (["theis2017", "--model.network.coefficients", "300"], 1, "a file has room for 255 coefficients of a block"),
        (["theis2017", "--model.network.rounding", "up"], 2, "model.network.rounding: Expected a typing.Literal"),
        (["theis2017", "--model.growth", "3"], 2, "model: Option 'growth' is not accepted"),
        (["toderici2016_fc", "--model.network.priming", "1"], 1, "priming and diffusion need a recurrent cell"),
        (["debug", "--trainer.max_steps", "x"], 2, "Parser key \"trainer.max_steps\": Expected a <class 'int'>."),
    ],
)
def test_the_reason_of_a_wrong_option_is_told(tmp_path, monkeypatch, capsys, args, status, said):
    """Not that of each type that the option may have."""
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", *args, "--data.root", "."]
    if status == 2:
        with pytest.raises(SystemExit, match="2"):
            cli.main(command)
    else:
        assert cli.main(command) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.py: error: {said}")
    assert "Union" not in line
