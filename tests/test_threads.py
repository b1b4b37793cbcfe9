"""Tests of the number of threads, and of one codec in several threads and processes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import rnncodec
from rnncodec import threads
from rnncodec.cli import main


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets the processors of a machine: of hardware, allowed, limited by control groups, and without work."""

    def make(hardware, allowed, limits, idle):
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(os, "cpu_count", lambda: hardware)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
        folder = tmp_path / "groups"
        for part, limit in limits.items():
            folder = folder / part
            folder.mkdir(parents=True)
            (folder / "cpu.max").write_text(f"{limit}\n")
        (tmp_path / "cgroup").write_text(f"1:name=x:/other\n0::/{'/'.join(limits)}\n")
        monkeypatch.setattr(threads, "CGROUP", tmp_path / "cgroup")
        monkeypatch.setattr(threads, "CGROUPS", tmp_path / "groups")
        clock, hertz = [0.0], os.sysconf("SC_CLK_TCK")

        def stat():
            ticks = round(clock[0] * idle * hertz)
            (tmp_path / "stat").write_text(f"cpu  5 6 7 {1000 + ticks - ticks // 4} {ticks // 4} 9 9 0 0 0\ncpu0 1\n")

        def sleep(seconds):
            clock[0] += seconds
            stat()

        stat()
        monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
        monkeypatch.setattr(threads.time, "sleep", sleep)
        monkeypatch.setattr(threads.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(threads, "MOMENT", 10.0)

    return make


@pytest.mark.parametrize(
    ("hardware", "allowed", "limits", "idle", "expected"),
    [
        (2, 2, {}, 2.0, 2),
        (2, 2, {}, 1.0, 1),
        (2, 2, {}, 0.02, 1),
        (16, 16, {}, 15.8, 16),
        (16, 3, {}, 15.8, 3),
        (64, 64, {"docker": "max 100000", "box": "400000 100000"}, 60, 4),
        (64, 64, {"docker": "150000 100000", "box": "400000 100000"}, 60, 2),
        (64, 64, {"docker": "20000 100000"}, 60, 1),
        (64, 64, {"docker": "nonsense"}, 6.3, 6),
    ],
)
def test_free_processors(machine, hardware, allowed, limits, idle, expected):
    machine(hardware, allowed, limits, idle)
    assert threads.free_processors() == expected


def test_machines_that_tell_nothing(machine, tmp_path, monkeypatch):
    machine(6, 5, {}, 1)
    (tmp_path / "stat").unlink()
    (tmp_path / "cgroup").unlink()
    assert threads.free_processors() == 5
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert threads.free_processors() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads.free_processors() == 1


def test_what_the_user_says_wins(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(threads, "free_processors", lambda: 100)
    threads.use_threads(None)  # OMP_NUM_THREADS is set in all tests
    assert set_to == []
    threads.use_threads(12)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.use_threads(None)
    assert set_to == [12, 8]


def environment():
    """That of a user, who has chosen nothing; conftest.py has."""
    return {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", *threads.VARIABLES)}


def run(code, *args, **variables: str):
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment() | variables)


def test_option(tiny, tmp_path, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    common = ["--threads", "3", "--weights", str(tiny)]
    assert main(["encode", str(tmp_path / "a.png"), str(tmp_path / "a.rnc"), "--iterations", "1", *common]) == 0
    assert main(["decode", str(tmp_path / "a.rnc"), str(tmp_path / "b.png"), *common]) == 0
    assert set_to == [3, 3]


@pytest.mark.slow
def test_option_and_waiting(tiny, tmp_path):
    """OpenMP itself says how many threads there are, and how they wait."""
    np.save(tmp_path / "x.npy", picture(0))
    code = """
import sys
import numpy as np
from PIL import Image
from rnncodec.cli import main
Image.fromarray(np.load(sys.argv[2] + "/x.npy")).save(sys.argv[2] + "/x.png")
options = ["--iterations", "1", "--threads", "3", "--force", "--quiet", "--weights", sys.argv[1]]
assert main(["encode", sys.argv[2] + "/x.png", *options]) == 0
import torch
assert "omp_get_max_threads() : 3" in torch.__config__.parallel_info()
"""
    done = run(code, tiny, tmp_path, OMP_DISPLAY_ENV="TRUE")
    assert (done.returncode, done.stdout) == (0, "")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


@pytest.mark.parametrize(("variable", "expected"), [("X", "passive"), ("OMP_WAIT_POLICY", "7"), ("GOMP_SPINCOUNT", "")])
def test_how_the_user_wants_threads_to_wait(variable, expected):
    code = "import os; from rnncodec.threads import use_threads; use_threads(None); "
    done = run(code + "print(os.environ.get('OMP_WAIT_POLICY', ''))", OMP_NUM_THREADS="1", **{variable: "7"})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", "")


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_wrong_numbers_of_threads(count, capsys):
    with pytest.raises(SystemExit) as error:
        main(["encode", "a.png", "--threads", count])
    assert error.value.code == 2
    assert "--threads: must be a whole number of at least 1" in capsys.readouterr().err


def test_one_codec_in_several_threads(tiny):
    """Files and pictures are those of one thread, whatever the threads do at the same time."""
    codec = rnncodec.load(tiny)
    expected = [codec.encode(picture(seed), 4) for seed in range(12)]
    pictures = [np.asarray(codec.decode(data)) for data in expected]

    def both(seed):
        data = codec.encode(picture(seed), 4)
        return data, np.asarray(codec.decode(expected[-1 - seed]))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(both, range(12), timeout=60))
    for seed, (data, decoded) in enumerate(found):
        assert data == expected[seed]
        assert np.array_equal(decoded, pictures[-1 - seed])


POOL = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import numpy as np
import torch
import rnncodec

if __name__ == "__main__":
    torch.set_num_threads(2)
    pictures = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in range(3)]
    codec = rnncodec.load(sys.argv[1])
    expected = [codec.encode(picture, 2) for picture in pictures]
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # surely starts a second thread
    with ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[2])) as pool:
        assert list(pool.map(codec.encode, pictures, [2] * 3)) == expected
        decoded = list(pool.map(codec.decode, expected))
    for image, data in zip(decoded, expected, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(codec.decode(data)))
    print("done")
"""


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")),
        pytest.param("spawn", marks=pytest.mark.slow),
        pytest.param("forkserver", marks=pytest.mark.slow),
    ],
)
def test_one_codec_in_several_processes(method, tiny, tmp_path):
    """Without care, a process that is forked after OpenMP has started its threads waits for them forever."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    command = [sys.executable, str(script), str(tiny), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
