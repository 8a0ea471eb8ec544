"""Types of options that examples share, and the folders that they write to."""

import argparse
import math
from pathlib import Path


def positive(kind):
    """An argparse type: a finite number above zero."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
        return value

    parse.__name__ = kind.__name__
    return parse


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 ... 2**31 - 1")
    return value


def picture(text: str) -> Path:
    if not text.endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .svg or .pdf")
    return Path(text)


def make_folders(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Makes the output folders now, so that an error does not come after the work."""
    for folder in [args.out, *([args.figure.parent] if args.figure else [])]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot write to {folder}: {error.strerror}")
