"""Weights & Biases: what training and evaluation log alike, offline unless there is a login."""

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

from rnncodec.metrics.curves import Point

SERVERS = ("https://api.wandb.ai", "https://api.forge.coreweave.com")  # W&B's own: before wandb 0.31, and since
METRICS = {"psnr": "PSNR (dB)", "ms_ssim": "MS-SSIM", "psnr_hvs_m": "PSNR-HVS-M (dB)"}  # of the curves


def login_exists() -> bool:
    """Whether `wandb login`, or the environment, has left a key for the W&B server."""
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
    """Project and mode of a run that is kept in a folder: offline unless logged in or set by WANDB_MODE.

    W&B copies the files of artifacts before it uploads them. The copies go to folder/wandb too, as an offline run needs
    them for as long as it exists; by default they would pile up in the user's home.
    """
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").resolve()))
    mode = None if os.environ.get("WANDB_MODE") or login_exists() else "offline"
    return {"project": "rnncodec", "mode": mode}


def points_table(points: Iterable[Point]) -> wandb.Table:
    """One row for each image, codec and setting, with the columns of points.csv; what is not finite is left empty."""
    rows = [
        [None if isinstance(value, float) and not math.isfinite(value) else value for value in astuple(point)]
        for point in points
    ]
    return wandb.Table([field.name for field in fields(Point)], rows)


def curve_charts(curves: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """A custom chart over bpp, with a line for each curve, for each metric that the curves have."""
    charts = {}
    for metric, title in METRICS.items():
        rows = [
            [name, point.setting, point.bpp, value]
            for name, curve in curves.items()
            for point in curve
            if math.isfinite(value := getattr(point, metric))
        ]
        if rows:
            table = wandb.Table(["codec", "setting", "bpp", metric], rows)
            charts[f"curve/{metric}"] = wandb.plot.line(table, "bpp", metric, stroke="codec", title=title)
    return charts


def log_rates(run: Run, curve: Sequence[Point], suffix: str = "") -> None:
    """Logs a curve point by point, so that W&B's line plots show it over bpp beside those of other runs.

    Args:
        run: to log to.
        curve: in order of rate; once for each run, or the line would go back and forth.
        suffix: of the metrics' names, for another codec than the run's own.
    """
    run.define_metric("rate/bpp", hidden=True)
    for metric in METRICS:
        # Each by its full name: of two patterns that match, Lightning's "*" may win.
        run.define_metric(f"rate/{metric}{suffix}", step_metric="rate/bpp")
    for point in curve:
        values = {f"rate/{metric}{suffix}": getattr(point, metric) for metric in METRICS}
        run.log({"rate/bpp": point.bpp} | {name: value for name, value in values.items() if math.isfinite(value)})


def log_files(run: Run, kind: str, paths: Iterable[Path]) -> None:
    """Logs files as an artifact that is named after the run and the kind; a new version of it if it exists."""
    if run.disabled:  # W&B would copy the files all the same
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
    """Logs an evaluation as a run of its own.

    Args:
        folder: to keep the run in.
        name: of the run.
        config: what the results depend on.
        curves: mean curves by codec; the first is that of the codec which the evaluation is about.
        points: all of them.
        files: of the results.
        sheets: pictures to look at, by name of the image.

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
