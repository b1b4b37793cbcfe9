"""Logging to Weights & Biases, for training and evaluation; offline unless there is a login."""

import math
import netrc
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from wandb.sdk.wandb_run import Run

from rnncodec.metrics.curves import DRAWN, Point

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


def points_table(points: Iterable[Point]) -> wandb.Table:
    """A table with a row for each point and the columns of points.csv; non-finite values are left empty."""
    rows = [
        [None if isinstance(value, float) and not math.isfinite(value) else value for value in astuple(point)]
        for point in points
    ]
    return wandb.Table([field.name for field in fields(Point)], rows)


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
    run.define_metric("rate/bpp", hidden=True)
    for metric in DRAWN:
        # By full names, because Lightning defines "*", which may take precedence over another pattern.
        run.define_metric(f"rate/{metric}{suffix}", step_metric="rate/bpp")
    for point in curve:
        values = {f"rate/{metric}{suffix}": getattr(point, metric) for metric in DRAWN}
        run.log({"rate/bpp": point.bpp} | {name: value for name, value in values.items() if math.isfinite(value)})


def log_files(run: Run, kind: str, paths: Iterable[Path]) -> None:
    """Logs files as an artifact named after the run and the kind, or as a new version of that artifact."""
    if run.disabled:  # W&B would still copy the files
        return
    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", f"{run.name}-{kind}"), kind)
    for path in paths:
        artifact.add_file(str(path))
    run.log_artifact(artifact)


def log_evaluation(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    curves: Mapping[str, Sequence[Point]],
    points: Iterable[Point],
    files: Iterable[Path],
    sheets: Mapping[str, Path],
) -> None:
    """Logs an evaluation as a separate run.

    Args:
        folder: folder for the files of the run.
        name: name of the run.
        config: settings on which the results depend.
        curves: mean curves by codec, that of the evaluated codec first.
        points: all points.
        files: files of the results.
        sheets: comparison pictures, by name of the image.

    Raises:
        RuntimeError: W&B refuses or cannot be reached.
    """
    try:
        with wandb.init(name=name, dir=folder, job_type="evaluation", config=dict(config), **settings(folder)) as run:
            run.log({"points": points_table(points), **curve_charts(curves)})
            if sheets:
                run.log({"comparisons": [wandb.Image(str(path), caption=image) for image, path in sheets.items()]})
            for i, (codec, curve) in enumerate(curves.items()):
                log_rates(run, curve, f"_{codec}" if i else "")
            log_files(run, "results", files)
    except wandb.Error as error:
        raise RuntimeError(f"W&B: {error}") from error
