"""Compares speeds on this machine, as ratios of times measured in the same run.

    python studies/benchmark.py                 # a few minutes; generates its images
    python studies/benchmark.py --root PHOTOS   # reads the data stream from a folder
    python studies/benchmark.py --image PHOTO   # codes a photograph instead of a generated image

It prints three tables:

1. Patches per second of the data stream alone, over those that training `small` consumes.
2. The time of a train step, of encoding and of decoding: `small` and the configuration of Toderici et al. 2017, in
   eager float32 and in the fastest mode, relative to the latter configuration in eager float32. The fastest mode is
   bfloat16 by autocast where the processor has AVX512-BF16.
3. The time of entropy coding with the shipped weights, relative to the network's part of encoding and decoding.

What is compared runs in turns, so that changes of the machine's load affect all alike. Numbers are medians of the
ratios of all turns, with the range in brackets.
"""

import argparse
import inspect
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch._dynamo
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rnncodec.codec import Codec
from rnncodec.data import PatchDataModule
from rnncodec.files.format import RAW, read_header
from rnncodec.files.images import atomic_write, load_image, save_image
from rnncodec.network import AnyConfig, RecurrentCodec
from rnncodec.training.context import JointTraining
from rnncodec.training.module import CodecTraining
from rnncodec.training.optim import bfloat16_pays
from rnncodec.weights import load_weights, save_weights

REQUIRED = 100  # patches that the stream must deliver for each one that training consumes
Mode = Literal["float32", "fastest"]
Training = Callable[..., CodecTraining]
TRAININGS = {kind.__name__: kind for kind in (CodecTraining, JointTraining)}
BFLOAT16 = bfloat16_pays(torch.device("cpu"))
PRECISION: dict[Mode, Any] = {"float32": "32-true", "fastest": "bf16-mixed" if BFLOAT16 else "32-true"}


@dataclass(frozen=True)
class Scale:
    """The amount of work of a benchmark.

    Attributes:
        turns: number of turns, after one more to warm up.
        seconds: how long the data stream is read in each turn.
        steps: train steps of `small` in each turn of the comparison with the data stream.
        batch_size: of all train steps; replaces that of the config, which may be meant for a GPU.
        iterations: of the train steps whose cost is compared.
        size: width and height of the generated image to encode and decode.
        coded: iterations to encode and decode.
        entropy_coded: iterations to encode and decode with and without entropy coding.
        images: number of images generated for the data stream.
    """

    turns: int = 3
    seconds: float = 3.0
    steps: int = 6
    batch_size: int = 8
    iterations: int = 8
    size: tuple[int, int] = (768, 512)
    coded: int = 2
    entropy_coded: int = 8
    images: int = 12


QUICK = Scale(
    turns=1, seconds=0.2, steps=1, batch_size=2, iterations=2, size=(64, 48), coded=1, entropy_coded=2, images=3
)


@dataclass(frozen=True)
class Ratio:
    """A ratio of two speeds or costs: its median, minimum and maximum over the turns."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        """Computes the ratio in each turn."""
        ratios = np.divide(numerators, denominators)
        return cls(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))

    def __str__(self) -> str:
        spread = f" ({self.low:.3g} to {self.high:.3g})" if self.low < self.high else ""
        return f"{self.median:.3g}{spread}"


def generate_image(width: int, height: int, seed: int) -> np.ndarray:
    """Generates noise with the 1/f amplitudes of photographs, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
    noise = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
    x = np.fft.irfft2(noise, s=(height, width))
    return np.clip(128 + 50 * x / x.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)


class StepTimer(L.Callback):
    """Measures seconds from the end of one train step to that of the next: data, forward, backward and update."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """The median over all steps but the first."""
        return float(np.median(np.diff(self.ends)))


def time_training(module: CodecTraining, data: PatchDataModule, mode: Mode, steps: int) -> float:
    """The seconds of a train step, after one more to warm up."""
    timer = StepTimer()
    trainer = L.Trainer(
        accelerator="cpu",
        precision=PRECISION[mode],
        gradient_clip_val=1.0,
        max_steps=steps + 1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timer],
    )
    trainer.fit(module, datamodule=data)
    return timer.seconds()


def time_stream(batches: Iterator[Any], data: PatchDataModule, seconds: float) -> float:
    """The seconds that the data stream takes for a patch: reading, crops, flips, normalization."""
    for _ in range(8):  # batches that may have been read in advance
        data.on_after_batch_transfer(next(batches), 0)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        count += len(data.on_after_batch_transfer(next(batches), 0))
    return elapsed / count


def training_of(model: dict[str, Any]) -> Training:
    """A function that makes the training of a config's `model` section; its arguments replace those in the section.

    Raises:
        ValueError: the section does not describe the training of a codec.
    """
    name = model.get("class_path", CodecTraining.__name__).split(".")[-1]
    arguments = model.get("init_args", model)
    kind = TRAININGS.get(name)
    known = {key for base in (kind, CodecTraining) if base for key in inspect.signature(base).parameters}
    if kind is None or set(arguments) - known:
        raise ValueError("not of a codec's training")
    return partial(kind, **arguments)


def make_training(training: Training, iterations: int, mode: Mode, compile: bool) -> CodecTraining:
    """Makes a training that unrolls all iterations from the start."""
    return training(iterations=iterations, growth={}, compile=compile and mode == "fastest")


def make_codec(network: AnyConfig, folder: Path, mode: Mode, compile: bool) -> Codec:
    """A codec with random weights, which take as long as trained ones."""
    path = folder / "weights.safetensors"
    save_weights(path, RecurrentCodec(network), "benchmark", {})
    codec = Codec(load_weights(str(path)))
    if compile and mode == "fastest":
        codec.network.compile(dynamic=False)
    return codec


def autocast(mode: Mode) -> AbstractContextManager[Any]:
    """A context with the arithmetic of a mode, for code outside the trainer."""
    return torch.autocast("cpu", torch.bfloat16) if mode == "fastest" and BFLOAT16 else nullcontext()


def unrolled(config: Training) -> list[int]:
    """The smallest and largest number of iterations of a training; one number if they are equal."""
    training = config()
    return sorted({training.fewest_iterations(), training.iterations})


def compare_stream(
    config: Training,
    counts: Sequence[int],
    data: PatchDataModule,
    scale: Scale,
    compile: bool,
    tick: Callable[[], None],
) -> dict[int, Ratio]:
    """Patches of the stream alone for each one that training consumes, by number of iterations."""
    modules = {k: make_training(config, k, "fastest", compile) for k in counts}
    batches = iter(data.train_dataloader())
    stream, training = [], {k: [] for k in counts}
    for _ in range(scale.turns + 1):
        stream.append(time_stream(batches, data, scale.seconds))
        tick()
        for k, module in modules.items():
            training[k].append(time_training(module, data, "fastest", scale.steps) / data.batch_size)
            tick()
    return {k: Ratio.of(training[k][1:], stream[1:]) for k in counts}


def compare_costs(
    configs: dict[str, Training],
    data: PatchDataModule,
    x: np.ndarray,
    scale: Scale,
    compile: bool,
    folder: Path,
    tick: Callable[[], None],
) -> dict[tuple[str, Mode], dict[str, Ratio]]:
    """Times of a train step, of encoding and of decoding, relative to the first config in float32."""
    modes: tuple[Mode, ...] = ("float32", "fastest")
    variants: list[tuple[str, Mode]] = [(name, mode) for name in configs for mode in modes]
    training = {(n, m): make_training(configs[n], scale.iterations, m, compile) for n, m in variants}
    codecs = {(n, m): make_codec(training[n, m].network.config, folder, m, compile) for n, m in variants}
    seconds: dict[tuple[str, Mode], dict[str, list[float]]] = {
        variant: {"train step": [], "encode": [], "decode": []} for variant in variants
    }
    for _ in range(scale.turns + 1):
        for variant in variants:
            mode, codec, times = variant[1], codecs[variant], seconds[variant]
            times["train step"].append(time_training(training[variant], data, mode, steps=1))
            with autocast(mode):
                start = time.perf_counter()
                file = codec.encode(x, iterations=scale.coded)
                middle = time.perf_counter()
                codec.decode(file)
                times["encode"].append(middle - start)
                times["decode"].append(time.perf_counter() - middle)
            tick()
    base = seconds[variants[0]]
    return {v: {what: Ratio.of(times[1:], base[what][1:]) for what, times in seconds[v].items()} for v in variants}


def compare_entropy(codec: Codec, x: np.ndarray, scale: Scale, tick: Callable[[], None]) -> dict[str, Ratio]:
    """The time of entropy coding over that of the network, for an image."""
    height, width = x.shape[:2]
    ratios: dict[str, tuple[list[float], list[float]]] = {"encode": ([], []), "decode": ([], [])}

    def timed(times: list[float], work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
        return result

    for _ in range(scale.turns + 1):
        (coder, network), (decoder, synthesis) = ratios["encode"], ratios["decode"]
        raw = timed(network, lambda: codec.encode(x, scale.entropy_coded, entropy="none"))
        timed(synthesis, lambda raw=raw: codec.decode(raw))
        bits = codec.read_bits(raw)
        file = timed(coder, lambda bits=bits: codec.write_bits(bits, height, width, "context"))
        if scale is not QUICK and any(it.coding == RAW for it in read_header(file).entries):
            print(
                "benchmark: bits of this image do not shrink and are not decoded; --image takes another",
                file=sys.stderr,
            )
        timed(decoder, lambda file=file: codec.read_bits(file))
        tick()
    return {what: Ratio.of(entropy[1:], network[1:]) for what, (entropy, network) in ratios.items()}


def report(
    stream: dict[int, Ratio], costs: dict[tuple[str, Mode], dict[str, Ratio]], entropy: dict[str, Ratio]
) -> tuple[Table, Table, Table]:
    """The results as tables."""
    first = Table(title="patches of the data stream for each one that training consumes")
    for column in ("iterations in training", f"ratio (at least {REQUIRED} needed)"):
        first.add_column(column, justify="right")
    for k, ratio in stream.items():
        first.add_row(str(k), str(ratio))
    second = Table(title="cost, relative to the configuration of Toderici et al. 2017 in eager float32")
    for column in ("network", "mode", "train step", "encode", "decode"):
        second.add_column(column, justify="left" if column in ("network", "mode") else "right")
    for (name, mode), ratios in costs.items():
        second.add_row(name, mode, *map(str, ratios.values()))
    third = Table(title="time of entropy coding, relative to that of the network")
    for column in ("", "ratio"):
        third.add_column(column, justify="right")
    for what, ratio in entropy.items():
        third.add_row(what, str(ratio))
    return first, second, third


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if the data stream is too slow."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description="Compares speeds on this machine, as ratios.")
    parser.add_argument("--root", type=Path, help="photographs for the data stream (default: generated)")
    parser.add_argument("--image", type=Path, help="photograph to encode and decode (default: generated)")
    parser.add_argument(
        "--config", type=Path, help="training to compare with Toderici et al. 2017's (default: configs/small.yaml)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the step in the fastest mode")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that everything runs")
    parser.add_argument("--json", type=Path, help="file to write the ratios to")
    args = parser.parse_args(argv)
    # Lightning's advice concerns longer runs than these.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.compile:  # with the default of 8, the ninth compiled variant of the step would run eagerly
        torch._dynamo.config.recompile_limit = 64
    scale = QUICK if args.quick else Scale()
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            stream, costs, entropy = measure(args, scale, Path(folder))
        if args.json:
            result = {
                "stream_over_training": {f"{k} iterations": asdict(ratio) for k, ratio in stream.items()},
                "cost": {
                    f"{name}, {mode}": {what: asdict(ratio) for what, ratio in ratios.items()}
                    for (name, mode), ratios in costs.items()
                },
                "entropy_over_network": {what: asdict(ratio) for what, ratio in entropy.items()},
            }
            atomic_write(args.json, (json.dumps(result, indent=2) + "\n").encode())
    except (ValueError, OSError) as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 1
    Console().print(*report(stream, costs, entropy))
    return 0 if args.quick or min(ratio.median for ratio in stream.values()) >= REQUIRED else 1


def measure(
    args: argparse.Namespace, scale: Scale, folder: Path
) -> tuple[dict[int, Ratio], dict[tuple[str, Mode], dict[str, Ratio]], dict[str, Ratio]]:
    """Runs all comparisons, with temporary files in a folder."""
    file = args.config or Path(__file__).parent.parent / "configs" / ("debug.yaml" if args.quick else "small.yaml")
    try:
        config = yaml.safe_load(file.read_text())
        small = training_of(config["model"])
        sizes = {key: value for key, value in config.get("data", {}).items() if key in ("patch_size", "tile_size")}
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not a config with a model") from error
    x = load_image(args.image) if args.image else generate_image(*scale.size, seed=0)
    shipped = Codec(load_weights())
    if shipped.context is None:
        raise ValueError("the shipped weights have no context model to measure")
    # The defaults are the network and training of Toderici et al. 2017.
    paper = {"network": {"encoder_channels": [8, 16, 16, 16], "decoder_channels": [16] * 5}} if args.quick else {}
    root = args.root
    if root is None:
        root = folder / "images"
        root.mkdir()
        for i in range(scale.images):
            save_image(generate_image(384, 256, seed=i), root / f"{i}.png")
    common = {"root": root, "val_images": 1, "cache_dir": folder / "cache", "batch_size": scale.batch_size}
    data = PatchDataModule(**common, **sizes)
    data.prepare_data()
    data.setup("fit")
    few = PatchDataModule(**common)
    configs = {"toderici2017": training_of(paper), config.get("name", file.stem): small}
    counts = unrolled(small)
    ticks = (scale.turns + 1) * (2 + len(counts) + 2 * len(configs))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=ticks)

        def tick() -> None:
            progress.advance(task)

        stream = compare_stream(small, counts, data, scale, args.compile, tick)
        costs = compare_costs(configs, few, x, scale, args.compile, folder, tick)
        entropy = compare_entropy(shipped, x, scale, tick)
    return stream, costs, entropy


if __name__ == "__main__":
    sys.exit(main())
