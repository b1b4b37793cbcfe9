r"""Trains variants of one codec for the same steps on the same data, and compares them as in the papers.

    python studies/compare.py KODAK --root PHOTOS           # three studies, with the budget of configs/small.yaml
    python studies/compare.py PHOTOS --root PHOTOS --config configs/debug.yaml      # minutes, to see that it works
    python studies/compare.py KODAK --root PHOTOS --studies binarizers \
        -- --trainer.max_steps 3000 --model.decay_steps 2000

Options after `--` are passed to every `train.py fit`. On one machine with 8 GPUs, and in a SLURM job (4 nodes, one task
per GPU), where only rank zero exports, measures and prints:

    python studies/compare.py KODAK --root CLIC --config configs/toderici2017_lstm_additive.yaml --studies grid \
        --device cuda -- --trainer.devices 8 --trainer.strategy ddp
    srun python studies/compare.py KODAK --root CLIC --config configs/toderici2017_lstm_additive.yaml --studies grid \
        -- --trainer.num_nodes 4 --trainer.devices 8 --trainer.strategy ddp

A study varies one part of the config: `cells` the recurrent cell (LSTM, residual GRU, or associative LSTM in the
decoder only), `reconstructions` the reconstruction (one-shot, additive, residual scaling), and `binarizers` the
binarizer (stochastic, sign, noise). `priming` adds three runs of encoder and decoder to the first iteration, or to each
one (diffusion), as in Johnston et al. 2018; their steps take longer. `grid` is each cell with each reconstruction, as
in the table of Toderici et al. 2017. Variants that several studies share are trained once. Seed, data, steps and
everything else are the same. With a smaller --trainer.max_steps, also set smaller --model.decay_steps and
--model.growth, if the config has them.

The command may be repeated, also by a requeued job: finished trainings are kept, a training that was stopped continues
from its last checkpoint, and one that failed is tried again. Other settings need another folder. If a training fails,
this is reported, and the others continue.

OUTPUT/VARIANT contains each run (train.log, checkpoints, weights.safetensors) and its evaluation (results). OUTPUT gets
a table for each study, best first, as CSV and Markdown, and its curves (STUDY.png). The evaluation uses the averaged
weights of the last step. Areas under the curve are integrals over bits per pixel of whole files, without entropy coding
but with header and checksums: from the first iteration to 2 bpp, as in Toderici et al. 2017, which favors curves that
start lower, and over a fixed range.
"""

import argparse
import csv
import io
import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.table import Table

from rnncodec.codec import Codec
from rnncodec.evaluation.evaluate import evaluate
from rnncodec.evaluation.pictures import figure, rendered
from rnncodec.evaluation.tables import WINDOW, number
from rnncodec.files.images import atomic_write, find_images, load_image, one_line
from rnncodec.metrics.curves import NAN, Point, area, mean_curve
from rnncodec.network import ReconstructionName
from rnncodec.network.binarizer import BinarizerName
from rnncodec.training.export import load_checkpoint
from rnncodec.weights import load_weights, save_weights
from trainings import check_settings, environment, error_line, rank, run

ROOT = Path(__file__).parent.parent
STUDIES = ("cells", "reconstructions", "binarizers", "priming", "grid")
CELLS = {  # of encoder and decoder; Toderici et al. 2017 found the associative LSTM useful in the decoder only
    "lstm": ("lstm", "lstm"),
    "gru": ("gru", "gru"),
    "associative_lstm": ("lstm", "associative_lstm"),
}
PRIMED = ((0, 0), (3, 0), (3, 3))  # extra runs in the first iteration and in each later one; Johnston et al. 2018
TITLES = {
    "lstm": "LSTM",
    "gru": "residual GRU",
    "associative_lstm": "associative LSTM",
    "one_shot": "one-shot",
    "residual_scaling": "residual scaling",
}
SPANS = {"auc": (None, 2.0), "auc_window": WINDOW}  # bits per pixel; the first as in Toderici et al. 2017
PSNR_AT = (1, 4, 16)  # iterations
WARNING = "One seed each: a short budget predicts little of a long one, and small differences mean nothing."


@dataclass(frozen=True)
class Variant:
    """The fields of `NetworkConfig` that are compared."""

    encoder_cell: str
    decoder_cell: str
    reconstruction: str
    binarizer: str
    priming: int = 0
    diffusion: int = 0

    @property
    def cell(self) -> str:
        """One name for the cells of encoder and decoder."""
        pair = self.encoder_cell, self.decoder_cell
        return next((name for name, cells in CELLS.items() if cells == pair), ".".join(pair))

    @property
    def name(self) -> str:
        """The name of its folder."""
        return "-".join([self.cell, self.reconstruction, self.binarizer, *self.extra])

    @property
    def extra(self) -> list[str]:
        """The names of its extra runs, as in Johnston et al. 2018."""
        return [f"{k}-{name}" for name, k in (("priming", self.priming), ("diffusion", self.diffusion)) if k]

    @property
    def titles(self) -> dict[str, str]:
        """The names of its parts, by column of a table."""
        names = {
            "model": self.cell,
            "reconstruction": self.reconstruction,
            "binarizer": self.binarizer,
            "priming": " and ".join(self.extra) or "no priming",
        }
        return {column: TITLES.get(name, name) for column, name in names.items()}


COMPARED = tuple(field.name for field in fields(Variant))


@dataclass(frozen=True)
class Result:
    """The result of a variant: its mean curve and its numbers by column, or an error."""

    variant: Variant
    error: str = ""
    curve: list[Point] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)


def variants_of(study: str, base: Variant) -> list[Variant]:
    """The variants of a study around a base."""
    cells = [replace(base, encoder_cell=encoder, decoder_cell=decoder) for encoder, decoder in CELLS.values()]
    match study:
        case "cells":
            return cells
        case "reconstructions":
            return [replace(base, reconstruction=name) for name in get_args(ReconstructionName)]
        case "binarizers":
            return [replace(base, binarizer=name) for name in get_args(BinarizerName)]
        case "priming":
            return [replace(base, priming=first, diffusion=later) for first, later in PRIMED]
    return [variant for cell in cells for variant in variants_of("reconstructions", cell)]


def fit_command(args: argparse.Namespace) -> list[str]:
    """The part of the command that all trainings share."""
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(args.config)]
    return [*command, "--data.root", str(args.root.resolve()), *args.options]


def base_settings(args: argparse.Namespace) -> tuple[Variant, dict[str, Any]]:
    """The base variant and all other settings, from config and command line.

    Raises:
        ValueError: train.py does not accept the settings, or they include some that this program sets.
    """
    command = [*fit_command(args), "--print_config"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(error_line(done.stderr, done.returncode))
    settings = yaml.safe_load(done.stdout)
    network = settings["model"]["init_args"].get("network")
    if not isinstance(network, dict) or not network.keys() >= set(COMPARED):
        raise ValueError(f"{args.config}: not a config of the training of a codec with cells to compare")
    if settings["trainer"]["default_root_dir"] or settings.get("ckpt_path"):
        raise ValueError("--output decides where the runs are and what is resumed")
    return Variant(**{name: network.pop(name) for name in COMPARED}), settings


def train(variant: Variant, index: int, settings: dict[str, Any], args: argparse.Namespace) -> str:
    """Trains a variant and exports its weights, unless they exist; returns an error message, empty without error."""
    folder = args.output / variant.name
    weights, last = folder / "weights.safetensors", folder / "last.ckpt"
    if weights.exists():
        return ""
    command = [*fit_command(args), "--name", variant.name, "--trainer.default_root_dir", str(args.output)]
    for name, value in asdict(variant).items():
        command += [f"--model.network.{name}", str(value)]
    if last.exists():
        command += ["--ckpt_path", str(last)]
    log = folder / (f"train-{rank()}.log" if rank() else "train.log")
    error = run(command, log, environment(index))
    if error or rank():
        return error
    try:
        network, provenance = load_checkpoint(last)
        steps, planned = int(provenance["steps"]), settings["trainer"]["max_steps"]
        if steps < planned and not settings["trainer"]["max_time"]:
            return f"training stopped after {steps} of {planned} steps"
        save_weights(weights, network, variant.name[:32], provenance)  # longer names are not allowed
    except (ValueError, OSError) as problem:
        return str(problem)
    return ""


def measure(variant: Variant, args: argparse.Namespace) -> Result:
    """Evaluates the weights of a variant, with measurements from the cache where possible."""
    folder = args.output / variant.name
    failures: list[str] = []
    with open(folder / "evaluate.log", "w") as file:
        try:
            trained = load_weights((folder / "weights.safetensors").absolute())
            points = evaluate(
                Codec(trained, args.device),
                args.images,
                output=folder / "results",
                cache=args.output / "measured",
                tables=Console(file=file),
                progress=Console(stderr=True),
                skip=failures.append,
            )
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            return Result(variant, one_line(error))
    if failures:
        return Result(variant, failures[0])
    curve = mean_curve(points)
    values = {
        "parameters": sum(parameter.numel() for parameter in trained.network.parameters()),
        "steps": int(trained.provenance["steps"]),
        "patches": json.loads(trained.provenance["data"])["position"],
    }
    return Result(variant, "", curve, values | quality(curve))


def quality(curve: Sequence[Point]) -> dict[str, float]:
    """The areas and PSNR of a mean curve, by column."""
    psnr = {point.setting: point.psnr for point in curve if point.image == "mean"}
    areas = {
        f"{metric}_{name}": area(curve, metric, *span)
        for name, span in SPANS.items()
        for metric in ("ms_ssim", "psnr_hvs")
    }
    return areas | {f"psnr_{k}": psnr.get(k, NAN) for k in PSNR_AT}


def order(result: Result) -> tuple[float, ...]:
    """The sort key that puts the best first, by MS-SSIM, then PSNR-HVS, and failed variants last."""
    values = [result.values.get(name, NAN) for name in ("ms_ssim_auc", "psnr_hvs_auc")]
    return bool(result.error), *(math.inf if math.isnan(value) else -value for value in values)


def table(results: Sequence[Result]) -> tuple[dict[str, str], list[list[str]]]:
    """What the variants have in common, and the rows of their table, with the head first."""
    titles = [result.variant.titles for result in results]
    common = {column: title for column, title in titles[0].items() if all(t[column] == title for t in titles)}
    hvs = sorted((result.values["psnr_hvs_auc"] for result in results if result.values), key=lambda v: (v != v, -v))
    window = f"{WINDOW[0]} to {WINDOW[1]}"
    columns = {
        "parameters": ("parameters", 0),
        "steps": ("steps", 0),
        "patches": ("patches", 0),
        "ms_ssim_auc": ("MS-SSIM AUC to 2 bpp", 4),
        "psnr_hvs_auc": ("PSNR-HVS AUC to 2 bpp", 3),
        "rank": ("its rank", 0),
        "ms_ssim_auc_window": (f"MS-SSIM AUC {window}", 4),
        "psnr_hvs_auc_window": (f"PSNR-HVS AUC {window}", 3),
        **{f"psnr_{k}": (f"PSNR at {k}", 2) for k in PSNR_AT},
    }
    rows = [["rank", *(c for c in titles[0] if c not in common), *(text for text, _ in columns.values())]]
    for place, (result, title) in enumerate(zip(results, titles, strict=True), 1):
        values = dict(result.values)
        if values:
            values["rank"] = NAN if math.isnan(values["psnr_hvs_auc"]) else hvs.index(values["psnr_hvs_auc"]) + 1
        cells = [number(values.get(name, NAN), digits) for name, (_, digits) in columns.items()]
        rows.append(["failed" if result.error else str(place), *(title[c] for c in title if c not in common), *cells])
    return common, rows


def report(study: str, results: list[Result], count: int, args: argparse.Namespace, console: Console) -> None:
    """Writes and prints the table of a study, and draws its curves."""
    results = sorted(results, key=order)
    common, (head, *rows) = table(results)
    same = ", ".join(
        title if column in ("model", "priming") else f"{title} {column}" for column, title in common.items()
    )
    caption = f"{study}: {same}; mean of {count} images; bits per pixel of whole files, without entropy coding"
    printed = Table(title=caption, caption=WARNING)
    text = f"{caption}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}\n"
    for column in head:
        names = results[0].variant.titles
        printed.add_column(column, justify="left" if column in names else "right", overflow="fold")
    for row in rows:
        printed.add_row(*row)
        text += f"| {' | '.join(row)} |\n"
    failures = [f"failed: {result.variant.name}: {result.error}" for result in results if result.error]
    atomic_write(args.output / f"{study}.md", "\n\n".join([text.rstrip(), *failures, WARNING + "\n"]).encode())
    file = io.StringIO()
    numbers = next((list(result.values) for result in results if result.values), [])
    writer = csv.DictWriter(file, ["variant", *COMPARED, *numbers, "failed"], lineterminator="\n")
    writer.writeheader()
    for result in results:
        values = {name: "" if math.isnan(value) else value for name, value in result.values.items()}
        writer.writerow({"variant": result.variant.name, **asdict(result.variant), **values, "failed": result.error})
    atomic_write(args.output / f"{study}.csv", file.getvalue().encode())
    curves = {
        ", ".join(title for column, title in result.variant.titles.items() if column not in common): result.curve
        for result in results
        if result.curve
    }
    if curves:
        atomic_write(args.output / f"{study}.png", rendered(figure(curves), "png"))
    console.print(printed)
    for failure in failures:
        console.print(failure, markup=False, highlight=False, soft_wrap=True)


def compare(args: argparse.Namespace) -> int:
    """Runs the studies; returns the number of variants that failed."""
    # Invalid images should fail before the training, and in every process, or the other processes would wait.
    paths = find_images(args.images)
    if not paths:
        raise ValueError("no images to measure")
    for path in paths:
        load_image(path)
    base, settings = base_settings(args)
    if not args.root.is_dir() and not settings["data"]["download"]:
        raise ValueError(f"{args.root}: no such folder of photographs")
    check_settings(settings, args.output)
    studies = {study: variants_of(study, base) for study in args.studies}
    variants = list(dict.fromkeys(variant for study in studies.values() for variant in study))
    progress = Console(stderr=True, quiet=rank() > 0)

    def say(text: str) -> None:
        progress.print(f"compare: {text}", markup=False, highlight=False, soft_wrap=True)

    errors = {}
    for i, variant in enumerate(variants):
        known = (args.output / variant.name / "weights.safetensors").exists()
        say(f"{'trained already' if known else 'training'}, {i + 1} of {len(variants)}: {variant.name}")
        errors[variant] = train(variant, i, settings, args)
        if errors[variant]:
            say(f"failed: {variant.name}: {errors[variant]}")
    if rank():
        return sum(map(bool, errors.values()))
    results = {}
    for i, variant in enumerate(variants):
        if errors[variant]:
            results[variant] = Result(variant, errors[variant])
        else:
            say(f"measuring, {i + 1} of {len(variants)}: {variant.name}")
            results[variant] = measure(variant, args)
    # A file or a pipe has no width, so tables may be wide there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for study, members in studies.items():
        report(study, [results[variant] for variant in members], len(paths), args, console)
    return sum(bool(result.error) for result in results.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        usage="%(prog)s [options] IMAGES ... --root PHOTOS [-- options of train.py fit]",
        description="Trains variants of one codec and compares them.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files and folders to measure")
    parser.add_argument("--root", type=Path, required=True, metavar="PHOTOS", help="photographs to train on")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/small.yaml", help="base config (default: small)")
    parser.add_argument(
        "--studies",
        nargs="+",
        choices=STUDIES,
        default=["cells", "reconstructions", "binarizers"],
        help="what to compare (default: cells, reconstructions, binarizers)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("comparison"), help="folder to write to (default: comparison)"
    )
    parser.add_argument("--device", default="cpu", help="for the evaluation; options after -- set that of training")
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:end])
    args.options = given[end + 1 :]
    try:
        return 1 if compare(args) else 0
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"compare: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare: interrupted; the same command goes on", file=sys.stderr)
        return 130


def interrupt(*_: object) -> None:
    """Ends the program on a signal as on Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())
