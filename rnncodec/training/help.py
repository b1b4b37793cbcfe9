"""What `--help` shows: the options of the training that the arguments name, with the values of configs as defaults."""

import pkgutil
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rnncodec.files.errors import one_line
from rnncodec.training.base import Training
from rnncodec.training.module import CodecTraining


class Help(NamedTuple):
    """A help that arguments ask for.

    Attributes:
        subcommand: of which the options are.
        model: the class of the training.
        defaults: values of the configs, by the names of their options.
    """

    subcommand: str
    model: type[Training]
    defaults: dict[str, Any]

    @property
    def parser_options(self) -> dict[str, dict[str, str]]:
        """What its parser needs: a description that says of which class the options are, and how to see others."""
        text = (
            f"The options of --model are those of {self.model.__name__}. "
            "With --config or --model before --help, they are those of the class that it names."
        )
        return {self.subcommand: {"description": text}}


def help_asked(args: Sequence[str], subcommands: Container[str]) -> Help | None:
    """The help that arguments ask for; None if they ask for none, or for that of the program without a subcommand.

    Raises:
        ValueError: a config is no mapping, or a class is no training; the message is one line.
        OSError: a config cannot be read.
    """
    subcommand = next((arg for arg in args if arg in subcommands), None)
    if subcommand is None or not {"-h", "--help"} & set(args):
        return None
    model, defaults = "", {}
    for option, value in _options(args):
        if option in ("-c", "--config"):
            for key, values in _read(Path(value)).items():
                if key == "model" and isinstance(values, str):
                    model, values = values, {}
                elif key == "model" and isinstance(values, dict) and "class_path" in values:
                    model, values = values["class_path"], values.get("init_args", {})
                defaults |= (
                    {f"{key}.{name}": v for name, v in values.items()} if isinstance(values, dict) else {key: values}
                )
        elif option in ("--model", "--model.class_path"):
            model = value
    return Help(subcommand, _class(model) if model else CodecTraining, defaults)


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options among arguments, with their values."""
    for arg, following in pairwise([*args, ""]):
        option, equals, value = arg.partition("=")
        yield option, value if equals else following


def _read(path: Path) -> dict[str, Any]:
    """The values of a config."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a config")
    return values


def _class(path: str) -> type[Training]:
    """The class of a training, by its name, or by that of its module and its own for a class of somebody else."""
    known = {kind.__name__: kind for kind in _subclasses(Training)}
    try:
        found = known.get(path) or pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Training)):
        raise ValueError(f"{path!r} is not a training, as {', '.join(sorted(known))} are")
    return found


def _subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
