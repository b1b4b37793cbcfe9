"""Types of command-line arguments, whose errors say what was expected."""

import argparse
import math
from contextlib import suppress


def positive(text: str) -> float:
    """A positive number."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")


def positive_int(text: str) -> int:
    """A positive whole number."""
    with suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")


def quality(text: str) -> float:
    """A number from 1 to 100."""
    with suppress(ValueError):
        if 1 <= (value := float(text)) <= 100:
            return value
    raise argparse.ArgumentTypeError(f"must be a number from 1 to 100, not {text}")


def port(text: str) -> int:
    """A port."""
    with suppress(ValueError):
        if 0 <= (value := int(text)) < 2**16:
            return value
    raise argparse.ArgumentTypeError(f"must be a port from 0 to {2**16 - 1}, not {text}")
