"""Runs the command line as `python -m rnncodec`."""

import sys

from rnncodec.cli import main

if __name__ == "__main__":
    sys.exit(main())
