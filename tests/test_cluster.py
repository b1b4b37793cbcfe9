"""Tests of training on clusters: the scripts in configs/cluster, torchrun, SLURM where there is one, and W&B sweeps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
import yaml
from small_training import arguments, assert_same, noise_images, states
from torch.distributed.run import parse_args
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from rnncodec.training import cli
from rnncodec.training.folder import RunFolder, run_name

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "configs" / "cluster"

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("alone")]  # Lightning warns of small runs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("cluster") / "images", 6)


def programs(folder, **contents):
    """A folder of programs, and the environment in which they are found first."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / name
        path.write_text(content)
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


RNNCODEC = f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m rnncodec "$@"\n'


# The scripts


@pytest.mark.parametrize("script", sorted(path.name for path in CLUSTER.iterdir() if path.suffix != ".yaml"))
def test_scripts_are_valid_and_say_what_they_are_for(script):
    subprocess.run(["bash", "-n", str(CLUSTER / script)], check=True)
    lines = (CLUSTER / script).read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines[1].startswith("# Trains ")
    assert os.access(CLUSTER / script, os.X_OK)


ECHO = f'#!/bin/sh\nexec "{sys.executable}" -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"\n'


def parsed(capsys, command):
    """The complete config of a command line of training."""
    assert command[:3] == ["rnncodec", "train", "fit"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command[2:], "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_batch_script_trains_on_all_nodes(tmp_path, capsys):
    variables = programs(tmp_path / "bin", srun=ECHO, scontrol="#!/bin/sh\necho requeued\n")
    variables |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "8"}
    command = ["bash", str(CLUSTER / "train.sbatch"), "--config", "base", "--data.root", "a b", "--name", "first"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    config = parsed(capsys, json.loads(done.stdout))
    assert (config["name"], config["data"]["root"], config["ckpt_path"]) == ("first", "a b", "last")
    trainer = config["trainer"]
    assert (trainer["num_nodes"], str(trainer["devices"]), trainer["strategy"]) == (4, "8", "ddp")


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, False), (138, True)])
def test_the_batch_script_requeues_after_the_signal_of_its_time_alone(tmp_path, status, requeued):
    assert status != 138 or status == 128 + signal.SIGUSR1
    requeue = '#!/bin/sh\necho "$@"\n'
    variables = programs(tmp_path / "bin", srun=f"#!/bin/sh\nexit {status}\n", scontrol=requeue)
    variables |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    done = subprocess.run(["bash", str(CLUSTER / "train.sbatch")], env=variables, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout == "requeue 7\n" * requeued


def test_the_options_of_the_batch_script():
    options = [line.split()[1] for line in (CLUSTER / "train.sbatch").read_text().splitlines() if "#SBATCH" in line]
    assert {"--requeue", "--open-mode=append", "--signal=SIGUSR1@120"} <= set(options)


def test_the_torchrun_script_starts_a_training_on_each_gpu(tmp_path, capsys):
    variables = programs(tmp_path / "bin", torchrun=ECHO) | {"NODES": "2", "GPUS": "8", "FIRST": "node1"}
    command = ["bash", str(CLUSTER / "torchrun.sh"), "--config", "base", "--data.root", "PHOTOS"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    args = json.loads(done.stdout)
    start = args.index("rnncodec", args.index("--no-python"))
    config = parsed(capsys, args[start:])
    assert (config["trainer"]["num_nodes"], str(config["trainer"]["devices"])) == (2, "8")
    options = parse_args(args)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "8", "node1:29500")
    assert options.no_python
    assert options.training_script == "rnncodec"


# Stopped and resumed


def waits_for_step(folder, process, begun=120):
    """Waits until a training has logged steps."""
    end = time.monotonic() + begun
    while not any(len(path.read_text().splitlines()) > 2 for path in folder.glob("metrics/*/metrics.csv")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_torchrun_with_a_signal_and_a_resume(images, tmp_path):
    """Two processes on the CPU, ended by SIGTERM, end with the weights of a run that nothing stopped."""
    more = ["--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "30"]

    def start(folder):
        environment = programs(tmp_path / "bin", rnncodec=RNNCODEC) | {
            "GPUS": "2",
            "PORT": "29533",
            "WANDB_MODE": "offline",
        }
        command = [str(CLUSTER / "torchrun.sh"), *arguments(images, folder, *more, steps=60)[1:]]
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    with start(tmp_path / "whole") as process:
        _, error = process.communicate(timeout=250)
    assert process.returncode == 0, error
    with start(tmp_path / "stopped") as process:
        waits_for_step(tmp_path / "stopped" / "debug", process)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "stopped by SIGTERM; --ckpt_path" in error
    assert 0 < states(tmp_path / "stopped" / "debug")[1] < 60
    with start(tmp_path / "stopped") as process:
        _, error = process.communicate(timeout=250)
    assert process.returncode == 0, error
    assert "Restoring states" in error
    assert_same(tmp_path / "whole" / "debug", tmp_path / "stopped" / "debug")


def slurm():
    """Why there is no SLURM here; empty if there is one that runs jobs."""
    if not (shutil.which("slurmctld") and shutil.which("sbatch")):
        return "needs slurmctld"
    if subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode:
        return "needs a running slurmctld"
    return ""


@pytest.mark.slow
def test_slurm_requeues_a_job_twice_that_goes_on(images, tmp_path):
    if reason := slurm():
        pytest.skip(reason)
    environment = programs(tmp_path / "bin", rnncodec=RNNCODEC) | {"WANDB_MODE": "offline"}
    more = ["--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "30"]

    def submit(folder):
        options = ["--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
        options += [f"--output={folder}.log"]
        command = ["sbatch", *options, str(CLUSTER / "train.sbatch"), *arguments(images, folder, *more, steps=60)[1:]]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def wait(condition, seconds):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(1)

    def ended(job):
        return not subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False).stdout

    whole, stopped = submit(tmp_path / "whole"), tmp_path / "stopped"
    wait(lambda: ended(whole), 300)
    job = submit(stopped)
    for start in range(2):  # the second time in the middle of what the first has resumed

        def trains(start=start):
            starts = stopped.glob("debug/metrics/*/metrics.csv")
            return sum(len(path.read_text().splitlines()) > 2 for path in starts) > start

        wait(trains, 400)
        subprocess.run(["scontrol", "requeue", job], check=True)
    wait(lambda: ended(job), 600)
    assert Path(f"{stopped}.log").read_text().count("Restoring states") >= 2
    assert_same(tmp_path / "whole" / "debug", stopped / "debug")


def test_last_starts_a_run_and_then_resumes_it(images, tmp_path):
    quiet = ["--trainer.enable_progress_bar", "false", "--ckpt_path", "last"]
    assert cli.main(arguments(images, tmp_path, *quiet, steps=2)) == 0
    assert states(tmp_path / "debug")[1] == 2
    assert cli.main(arguments(images, tmp_path, *quiet, steps=3)) == 0
    assert states(tmp_path / "debug")[1] == 3


def test_last_of_a_validation_must_exist(images, tmp_path, capsys):
    assert cli.main(["validate", *arguments(images, tmp_path, "--ckpt_path", "last")[1:]]) == 1
    assert "last.ckpt" in capsys.readouterr().err.splitlines()[-1]


# Sweeps


def test_a_sweep_gives_each_run_a_folder(images, tmp_path, monkeypatch):
    """As an agent starts them: W&B's own code makes the command from the sweep and the values of a run."""
    sweep = yaml.safe_load((CLUSTER / "sweep.yaml").read_text())
    monkeypatch.setenv("PHOTOS", str(images))
    command = create_sweep_command(list(sweep["command"]))
    for name, value in {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "sweep1", "WANDB_PROJECT": "others"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(wandb, "init", lambda init=wandb.init, **options: seen.append(options) or init(**options))
    for run, rate in ("run1", 0.01), ("run2", 0.02):
        monkeypatch.setenv("WANDB_RUN_ID", run)
        values = {"model.learning_rate": rate, "model.muon_learning_rate": 0.03, "trainer.max_steps": 1}
        values |= {"trainer.val_check_interval": 1, "model.decay_steps": 1}
        assert values.keys() == sweep["parameters"].keys()
        made = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
        filled = {"${program}": [sweep["program"]], "${args}": made["args"]}
        line = [word for part in command for word in filled.get(part, [part])]
        assert line[:3] == ["rnncodec", "train", "fit"]
        assert str(images) in line
        assert "--model.learning_rate=0.01" in line or rate == 0.02
        tiny = [arg for arg in line[3:] if arg not in ("--config", "small")]  # which would take minutes
        assert cli.main([*arguments(images, tmp_path, "--trainer.enable_progress_bar", "false"), *tiny]) == 0
        wandb.finish()
        wandb.teardown()
        folder = tmp_path / f"debug-{run}"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["name"], config["model"]["init_args"]["learning_rate"]) == (folder.name, rate)
        assert states(folder)[1] == 1
        assert list(folder.glob(f"wandb/offline-run-*-{run}"))
    assert [(one["id"], one["project"], one["name"]) for one in seen] == [
        ("run1", "others", "debug-run1"),
        ("run2", "others", "debug-run2"),
    ]


def test_names_of_runs(monkeypatch):
    assert run_name("a") == "a"
    monkeypatch.setenv("WANDB_RUN_ID", "r")
    assert run_name("a") == "a"  # a single run has the folder that its name says
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert run_name("a") == "a-r"


def test_the_id_of_a_run_is_that_of_the_environment_or_stays(tmp_path, monkeypatch):
    def claimed(resumed):
        folder = RunFolder(tmp_path, "a")
        with folder.claim(resumed):
            return folder.run_id

    first = claimed(False)
    assert claimed(True) == first != claimed(False)
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert claimed(True) == claimed(False) == "given"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert claimed(True) == "given"


def test_the_name_in_wandb_is_that_of_the_environment(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "shown")
    seen = []
    monkeypatch.setattr(wandb, "init", lambda init=wandb.init, **options: seen.append(options) or init(**options))
    assert cli.main(arguments(images, tmp_path, "--trainer.enable_progress_bar", "false", steps=1)) == 0
    assert [(one["name"], one["project"]) for one in seen] == [("shown", "rnncodec")]
    assert (tmp_path / "debug" / "last.ckpt").exists()
