"""Compares time and memory of our codecs with those of CompressAI on the same photographs, as ratios.

    python studies/compressai_benchmark.py PHOTO ...

CompressAI needs NumPy 1, so it has a separate environment (--environment), which the first run makes in a few minutes.
Its networks, bmshj2018-hyperprior and mbt2018-mean at quality 8, have random weights, which take as long as trained
ones. They code a single rate, whereas our files contain all rates. Every codec runs in its own process with the same
number of threads. All code a photograph once to warm up, then in turns, so that changes of the machine's load affect
all alike. Peak memory is that of the whole process while it codes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

THEIRS = {"bmshj2018-hyperprior": "bmshj2018_hyperprior", "mbt2018-mean": "mbt2018_mean"}
QUALITY = 8
NUMPY, COMPRESSAI = "numpy<2", "compressai==1.2.8"
NEEDED = (  # packages that CompressAI imports, except torchvision
    "einops",
    "matplotlib",
    "pandas",
    "pillow",
    "pytorch-msssim",
    "requests",
    "scipy",
    "tomli",
    "torch-geometric",
    "tqdm",
    "typing-extensions",
)
# Tasks of our codecs; "raw" means without entropy coding, which shows how long entropy coding takes.
OURS = "encode", "decode", "decode one iteration", "encode raw", "decode raw"


def compressai_tasks(name: str, image: Path) -> dict[str, Callable[[], object]]:
    """The tasks of a codec of CompressAI, for one photograph."""
    import compressai.zoo  # pyright: ignore[reportMissingImports]
    import numpy as np
    import torch
    from PIL import Image

    network = getattr(compressai.zoo, THEIRS[name])(QUALITY, pretrained=False).eval()
    network.update()
    pixels = np.array(Image.open(image).convert("RGB"))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    height, width = x.shape[-2:]
    x = torch.nn.functional.pad(x, (0, -width % 64, 0, -height % 64))
    with torch.no_grad():
        coded = network.compress(x)

    @torch.no_grad()
    def encode() -> object:
        return network.compress(x)

    @torch.no_grad()
    def decode() -> object:
        return network.decompress(coded["strings"], coded["shape"])

    return {"encode": encode, "decode": decode}


def our_tasks(weights: str, image: Path) -> dict[str, Callable[[], object]]:
    """The tasks of one of our codecs, for one photograph."""
    import rnncodec
    from rnncodec.files.images import load_image

    codec, x = rnncodec.load(weights), load_image(image)
    coded, raw = codec.encode(x), codec.encode(x, entropy="none")
    return dict(
        zip(
            OURS,
            (
                partial(codec.encode, x),
                partial(codec.decode, coded),
                partial(codec.decode, coded, 1),
                partial(codec.encode, x, entropy="none"),
                partial(codec.decode, raw),
            ),
            strict=True,
        )
    )


def peak() -> float:
    """Peak memory of this process since the last call, in GiB; nan where the system does not report it."""
    try:
        held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, StopIteration):
        return float("nan")
    return int(held.split()[1]) / 2**20


def serve(codec: str, image: Path, threads: int) -> None:
    """Does the tasks named on standard input, one a line, and prints seconds and GiB of each."""
    import torch

    torch.set_num_threads(threads)
    tasks = (compressai_tasks if codec in THEIRS else our_tasks)(codec, image)
    for work in tasks.values():
        work()
    print(json.dumps(list(tasks)), flush=True)
    for line in sys.stdin:
        peak()
        start = time.perf_counter()
        tasks[line.strip()]()
        print(json.dumps([time.perf_counter() - start, peak()]), flush=True)


class Server:
    """A codec in its own process.

    Raises:
        RuntimeError: the process has stopped; its messages are on our standard error.
    """

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self.process, self.name = process, name
        self.tasks: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has stopped")
        return json.loads(line)

    def do(self, task: str) -> tuple[float, float]:
        """Runs a task; gives its seconds and peak GiB."""
        assert self.process.stdin is not None
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        seconds, memory = self._answer()
        return seconds, memory


@contextmanager
def server(python: Path, codec: str, image: Path, threads: int) -> Iterator[Server]:
    """Starts a process with a codec and a photograph, and ends it afterwards."""
    command = [str(python), __file__, "--serve", codec, "--threads", str(threads), str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process, codec)
        finally:
            process.kill()


def environment(folder: Path) -> Path:
    """The interpreter of an environment with CompressAI, which is made if it does not exist.

    Raises:
        RuntimeError: the environment cannot be made.
    """
    import torch

    python = folder / "bin" / "python"
    done = folder / "complete"
    if done.exists():
        return python
    print(f"making an environment for CompressAI in {folder}", file=sys.stderr)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([*install, f"torch=={torch.__version__.split('+')[0]}", NUMPY], check=True)
        subprocess.run([*install, "--no-deps", COMPRESSAI], check=True)
        subprocess.run([*install, NUMPY, *NEEDED], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"no environment for CompressAI: {error}") from error
    # CompressAI imports torchvision, which is large and not used here, so an empty package replaces it.
    packages = next((folder / "lib").glob("python3*/site-packages"))
    (packages / "torchvision").mkdir(exist_ok=True)
    (packages / "torchvision" / "__init__.py").touch()
    (packages / "torchvision" / "transforms.py").touch()
    done.touch()
    return python


def measure(image: Path, ours: Sequence[str], python: Path, threads: int, turns: int) -> dict[str, dict[str, Any]]:
    """Seconds of each turn and peak GiB, by codec and task."""
    from rich.progress import Progress

    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack, Progress(transient=True) as progress:
        working = progress.add_task(image.name, total=turns + len(ours) + len(THEIRS))
        servers: dict[str, Server] = {}
        for codec in (*ours, *THEIRS):
            interpreter = python if codec in THEIRS else Path(sys.executable)
            servers[codec] = stack.enter_context(server(interpreter, codec, image, threads))
            progress.advance(working)
        for _ in range(turns):
            for codec, busy in servers.items():
                for task in busy.tasks:
                    seconds, memory = busy.do(task)
                    of_task = found.setdefault(codec, {}).setdefault(task, {"seconds": [], "GiB": 0.0})
                    of_task["seconds"].append(seconds)
                    of_task["GiB"] = max(of_task["GiB"], memory)
            progress.advance(working)
    return found


def ratios(found: dict[str, dict[str, Any]], first: str) -> list[tuple[str, str, list[float], float]]:
    """The rows to print, by codec and task: ratios of our first codec to it, of seconds in each turn and peak GiB."""
    rows = []

    def add(what: str, task: str, codec: str, other: str) -> None:
        mine, theirs = found[first][task], found[codec][other]
        each = [a / b for a, b in zip(mine["seconds"], theirs["seconds"], strict=True)]
        rows.append((codec, what, each, mine["GiB"] / theirs["GiB"]))

    for codec, tasks in found.items():
        if codec == first:
            continue
        add("encode", "encode", codec, "encode")
        add("decode", "decode", codec, "decode")
        shortest = "decode one iteration"
        add(shortest, shortest, codec, shortest if shortest in tasks else "decode")
    for task in ("encode", "decode"):
        coded, raw = found[first][task]["seconds"], found[first][f"{task} raw"]["seconds"]
        rows.append(
            (first, f"entropy coding in {task}", [1 - b / a for a, b in zip(coded, raw, strict=True)], float("nan"))
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compares our codecs with those of CompressAI, as ratios.")
    parser.add_argument("images", nargs="+", type=Path, metavar="PHOTO")
    parser.add_argument(
        "--weights", nargs="+", default=["small"], help="ours, by name or file: the first is compared with all others"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of every codec")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--environment", type=Path, default=Path(".compressai"), help="folder for CompressAI")
    parser.add_argument("--json", type=Path, help="file to write seconds and GiB to")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve, args.images[0], args.threads)
        return 0
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from rnncodec.files.images import atomic_write

    results = {}
    try:
        missing = [image for image in args.images if not image.is_file()]
        if missing:
            raise RuntimeError(f"no such file: {missing[0]}")
        python = environment(args.environment)
        for image in args.images:
            results[image.name] = measure(image, args.weights, python, args.threads, args.turns)
            table = Table(title=f"{args.weights[0]} over others, {image.name}, {args.threads} threads")
            for column in ("", "task", "seconds (range)", "peak memory"):
                table.add_column(column)
            for codec, what, each, memory in ratios(results[image.name], args.weights[0]):
                seconds = f"{np.median(each):.3g} ({min(each):.3g} to {max(each):.3g})"
                table.add_row(codec, what, seconds, "" if np.isnan(memory) else f"{memory:.2g}")
            Console().print(table)
        if args.json:
            atomic_write(args.json, (json.dumps(results, indent=2) + "\n").encode())
    except (RuntimeError, OSError) as error:
        print(f"compressai_benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
