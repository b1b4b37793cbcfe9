"""Logging to Weights & Biases, for training, export and evaluation; offline unless there is a login."""

import json
import math
import netrc
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import WandbLogger
from wandb.sdk.wandb_run import Run

from rnncodec.data.manifest import Manifest, manifest_of_files
from rnncodec.imagecodec import ImageCodec
from rnncodec.metrics.curves import DRAWN, Point
from rnncodec.training.artifacts import (
    checkpoints_artifact,
    files_artifact,
    images_artifact,
    use,
    weights_artifact,
    weights_facts,
)
from rnncodec.training.provenance import source, versions
from rnncodec.weights import Weights

SERVERS = ("https://api.wandb.ai", "https://api.forge.coreweave.com")  # the default before wandb 0.31, and since


def login_exists() -> bool:
    """Whether `wandb login` or the environment provides a key for the W&B server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    urls = [urlparse(url) for url in ([server] if server else SERVERS)]
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(name or "") for url in urls for name in (url.netloc, url.hostname))


def settings(folder: Path) -> dict[str, Any]:
    """The project and mode of a run in a folder: those of WANDB_PROJECT and WANDB_MODE, or offline without a login.

    W&B copies the files of artifacts before it uploads them, and an offline run needs these copies. Unless
    WANDB_DATA_DIR is set, this sets it to folder/wandb; by default they would accumulate in the user's home.
    """
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").resolve()))
    mode = None if os.environ.get("WANDB_MODE") or login_exists() else "offline"
    return {"project": os.environ.get("WANDB_PROJECT") or "rnncodec", "mode": mode}


@contextmanager
def outlived() -> Iterator[None]:
    """Meanwhile, the end of W&B's process is only told; what is logged to it is lost."""
    try:
        yield
    except ConnectionError:
        warnings.warn("W&B's process has ended, and the training goes on without it", stacklevel=1)


class Tracker(WandbLogger):
    """Lightning's logger for W&B, but a training goes on if W&B's process ends.

    Under SLURM, for one, a signal reaches all processes of a job, and this one ends at once, while the training has a
    step to finish and to save.

    Attributes:
        lost: whether W&B's process has ended.
    """

    lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.lost:
            return
        self.lost = True
        with outlived():
            super().log_metrics(metrics, step)
            self.lost = False


def describe(run: Run, facts: Mapping[str, Any], images: Manifest | None) -> None:
    """Adds facts to the config of a run, and writes them and its images to its files, where people can read them.

    Args:
        run: the run.
        facts: on which its results depend; become provenance.json.
        images: on which it works; become images.json.
    """
    run.config.update(dict(facts), allow_val_change=True)
    text = json.dumps({"run": run.id, "name": run.name, **facts}, indent=2, default=str) + "\n"
    for name, content in {"provenance.json": text, **({"images.json": images.text} if images else {})}.items():
        path = Path(run.dir) / name
        path.write_text(content)
        run.save(str(path), base_path=run.dir, policy="now")


def points_table(
    points: Iterable[Point], pictures: Mapping[tuple[str, float], wandb.Image] | None = None
) -> wandb.Table:
    """A table with a row for each point and the columns of points.csv; non-finite values are left empty.

    Args:
        points: of the rows.
        pictures: by image and setting, instead of the paths in points.csv; None leaves the column out.
    """
    columns: list[Any] = [field.name for field in fields(Point) if field.name != "picture"]
    rows = [[finite(asdict(point))[name] for name in columns] for point in points]
    if pictures is not None:
        columns.append("picture")
        rows = [[*row, pictures.get((row[0], row[2]))] for row in rows]
    return wandb.Table(columns, rows)


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Values of which those that are not finite become None."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def curve_charts(curves: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """Custom charts over bpp: one for each metric that the curves have, with one line for each curve."""
    charts = {}
    for name, metric in DRAWN.items():
        rows = [
            [codec, point.setting, point.bpp, value]
            for codec, curve in curves.items()
            for point in curve
            if math.isfinite(value := getattr(point, name))
        ]
        if rows:
            table = wandb.Table(["codec", "setting", "bpp", name], rows)
            title = metric.titled(metric.unit)
            charts[f"curve/{name}"] = wandb.plot.line(table, "bpp", name, stroke="codec", title=title)
    return charts


def log_rates(run: Run, curve: Sequence[Point], suffix: str = "") -> None:
    """Logs a curve point by point, so that W&B's line plots show it over bpp beside those of other runs.

    Call it at most once for each run and suffix, because the line would go back and forth.

    Args:
        run: the run to log to.
        curve: points in order of rate.
        suffix: suffix of the metrics' names, for codecs other than the run's own.
    """
    run.define_metric("rate/bpp", hidden=True, summary="none")
    for metric in DRAWN:
        # By full names, because Lightning defines "*", which may take precedence over another pattern.
        run.define_metric(f"rate/{metric}{suffix}", step_metric="rate/bpp", summary="none")
    for point in curve:
        values = {f"rate/{metric}{suffix}": getattr(point, metric) for metric in DRAWN}
        run.log({"rate/bpp": point.bpp} | {name: value for name, value in values.items() if math.isfinite(value)})


@contextmanager
def new_run(
    folder: Path, name: str, kind: str, facts: Mapping[str, Any], images: Manifest | None = None
) -> Iterator[Run | None]:
    """A run that is described and ends with the block; None if W&B is disabled, which would still copy files.

    Args:
        folder: folder for the files of the run.
        name: name of the run.
        kind: its job type.
        facts: on which its results depend; source and versions are added.
        images: on which it works.

    Raises:
        RuntimeError: W&B refuses or cannot be reached.
    """
    try:
        with wandb.init(name=name, dir=folder, job_type=kind, **settings(folder)) as run:
            if not run.disabled:
                describe(run, {**facts, "source": source(), "versions": versions()}, images)
            yield None if run.disabled else run
    except wandb.Error as error:
        raise RuntimeError(f"W&B: {error}") from error


def log_export(folder: Path, name: str, checkpoint: Path, weights: Weights) -> None:
    """Logs as a run that weights were made, with the checkpoint as what it needs.

    Args:
        folder: folder for the files of the run.
        name: name of the run.
        checkpoint: from which the weights, or a part of them, were made; or weights without this part.
        weights: the weights.

    Raises:
        RuntimeError: W&B refuses or cannot be reached.
    """
    with new_run(folder, name, "export", {**weights_facts(weights), "checkpoint": str(checkpoint)}) as run:
        if run is None:
            return
        if checkpoint.suffix == ".ckpt":  # not weights that were calibrated
            use(run, checkpoints_artifact(checkpoint.parent, None, checkpoint))
        run.log_artifact(weights_artifact(weights))


def log_evaluation(
    folder: Path,
    name: str,
    codec: ImageCodec,
    config: Mapping[str, Any],
    curves: Mapping[str, Sequence[Point]],
    points: Iterable[Point],
    summary: Mapping[str, float],
    images: Mapping[str, Path],
    files: Iterable[Path],
    pictures: Sequence[Mapping[str, Any]],
    sheets: Mapping[str, Path],
) -> None:
    """Logs an evaluation as a separate run.

    Args:
        folder: folder for the files of the run.
        name: name of the run.
        codec: the evaluated codec.
        config: settings on which the results depend, beside codec and images.
        curves: mean curves by codec, that of the evaluated codec first.
        points: all points.
        summary: numbers that sum up the curve of the evaluated codec.
        images: files of the images, by name.
        files: files of the results.
        pictures: rows of a table, in which paths stand for pictures.
        sheets: comparison pictures, by name of the image.

    Raises:
        RuntimeError: W&B refuses or cannot be reached.
        OSError: a file cannot be read.
    """
    manifest = manifest_of_files(images, "test")
    data = {"images": len(images), "fingerprint": manifest.fingerprint}
    with new_run(folder, name, "evaluation", {**weights_facts(codec), **config, "data": data}, manifest) as run:
        if run is None:
            return
        use(run, images_artifact(manifest), weights_artifact(codec))
        run.log({"points": points_table(points), **curve_charts(curves)})
        if pictures:
            rows = [
                [wandb.Image(str(v)) if isinstance(v, Path) else v for v in finite(row).values()] for row in pictures
            ]
            run.log({"pictures": wandb.Table(list(pictures[0]), rows)})
        if sheets:
            run.log({"comparisons": [wandb.Image(str(path), caption=image) for image, path in sheets.items()]})
        for i, (other, curve) in enumerate(curves.items()):
            log_rates(run, curve, f"_{other}" if i else "")
        run.summary.update({key: value for key, value in summary.items() if math.isfinite(value)})
        run.log_artifact(files_artifact(name, "results", {path.name: path for path in files}))
