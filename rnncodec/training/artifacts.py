"""W&B artifacts that join runs: images to a training, its checkpoints to weights, weights to an evaluation."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
import yaml
from wandb.sdk.wandb_run import Run

from rnncodec.data.manifest import Manifest
from rnncodec.imagecodec import ImageCodec
from rnncodec.weights import Weights

CHECKPOINTS = ("last.ckpt", "best.ckpt", "config.yaml")  # files of a run's folder in the artifact of its checkpoints


def files_artifact(
    name: str, kind: str, files: Mapping[str, Path], facts: Mapping[str, Any] | None = None
) -> wandb.Artifact:
    """An artifact `NAME-KIND`, where characters that W&B forbids become `-`, of those of the files that exist.

    Args:
        name: of what it is part of.
        kind: its type.
        files: by name in the artifact. Files of the same names and contents make the same version.
        facts: metadata, by which versions can be told apart.
    """
    result = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", f"{name}-{kind}"), kind, metadata=dict(facts or {}))
    for inside, path in files.items():
        if path.exists():
            result.add_file(str(path), inside)
    return result


def images_artifact(manifest: Manifest) -> wandb.Artifact:
    """Names, sizes and hashes of images, but not the images; has the name of their folder."""
    facts = {"fingerprint": manifest.fingerprint, "images": sum(manifest.images.values())}
    result = files_artifact(manifest.root.rstrip("/").rpartition("/")[2], "images", {}, facts)
    with result.new_file("manifest.json", encoding="utf-8") as file:
        file.write(manifest.text)
    return result


def checkpoints_artifact(folder: Path, facts: Mapping[str, Any] | None = None, *others: Path) -> wandb.Artifact:
    """The checkpoints in the folder of a run, its complete config, which has the name of the run, and other files."""
    try:
        name = str(yaml.safe_load((folder / "config.yaml").read_text())["name"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):  # of a checkpoint that was moved
        name = folder.resolve().name
    files = {file: folder / file for file in CHECKPOINTS} | {path.name: path for path in others}
    return files_artifact(name, "checkpoints", files, facts)


def weights_artifact(weights: Weights | ImageCodec) -> wandb.Artifact:
    """The file of weights; one without a file has only their metadata."""
    files = {} if weights.path is None else {f"{weights.name}.safetensors": weights.path}
    return files_artifact(weights.name, "weights", files, weights_facts(weights))


def weights_facts(weights: Weights | ImageCodec) -> dict[str, Any]:
    """What identifies weights, and how they came to be."""
    return {
        "weights": weights.name,
        "fingerprint": weights.fingerprint.hex(),
        "context_fingerprint": weights.context_fingerprint.hex(),
        "provenance": {key: _parsed(text) for key, text in weights.provenance.items()},
    }


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def use(run: Run, *artifacts: wandb.Artifact) -> None:
    """Declares what a run needs; W&B stores what it does not have yet."""
    for each in artifacts:
        if run.offline:
            # `use_artifact` refuses to work without the server. This notes what `wandb sync` then does in its place.
            run._log_artifact(each, is_user_created=True, use_after_commit=True)
        else:
            run.use_artifact(each)
