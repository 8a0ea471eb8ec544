"""Functions that the recipes share: options, digits, training and tables."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from _covariate_shift import (
    BATCH_SIZE,
    Digits,
    Network,
    Variables,
    init,
    load_data,
    train_step,
)
from _options import make_folders, picture, positive, seed
from tqdm import tqdm

Rows = Sequence[Sequence[Any]]


def options(
    doc: str | None, name: str, argv: Sequence[str] | None, steps: int = 200
) -> argparse.Namespace:
    """Parses the command line of the recipe `name`, and makes its folders.

    `--small` is for a quick run: the script does the same with little data.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=seed, default=0, help="seed of everything random")
    add(
        "--steps", type=positive(int), default=steps, metavar="N", help="training steps"
    )
    add("--small", action="store_true", help="a quick run with little data")
    add("--out", type=Path, default=Path("out", name), help="results go here")
    add("--figure", type=picture, metavar="PATH", help="write the picture here too")
    add("--table", type=Path, metavar="PATH", help="write the table here too")
    args = parser.parse_args(argv)
    make_folders(parser, args)
    if args.small:
        args.steps = min(args.steps, 4)
    args.name, args.began = name, time.perf_counter()
    return args


def trained(
    net: Network, data: Digits, args: argparse.Namespace, seed: int | None = None
) -> Variables:
    """Variables of the network after `args.steps` steps."""
    seed = args.seed if seed is None else seed
    state = init(net, seed)
    for i in tqdm(range(args.steps), "training", unit="step", dynamic_ncols=True):
        state = train_step(net, state, data, seed, args.steps, i)
        state.opt_state[0].trace["Dense_0"]["bias"].block_until_ready()
    return state.variables


def digits(args: argparse.Namespace) -> Digits:
    """Images and labels. With --small, one batch to train on and 64 images to test."""
    data = load_data(args.seed)
    if not args.small:
        return data
    few = (BATCH_SIZE, BATCH_SIZE, 64, 64)
    return Digits(*(part[:n] for part, n in zip(data, few, strict=True)))


def percent(share: float) -> str:
    """A share in percent, as in the tables: 97.3."""
    return f"{100 * float(share):.1f}"


def table(head: Sequence[str], rows: Rows) -> str:
    """A Markdown table whose columns line up as plain text too: words, then numbers."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines = []
    for first, *rest in (cells[0], rule, *cells[1:]):
        right = [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *right]) + " |")
    return "\n".join(lines)


def finish(
    args: argparse.Namespace,
    text: str,
    results: Any,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Writes the table, its numbers and the picture, and prints the table."""
    tables = [args.out / "summary.md", *([args.table] if args.table else [])]
    for path in tables:
        path.write_text(text + "\n", encoding="utf-8")
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    figures: Iterable[Path] = ()
    if draw is not None:
        figures = [args.out / f"{args.name}.png", *filter(None, [args.figure])]
        for path in figures:
            draw(path)
    seconds = time.perf_counter() - args.began
    print(f"\n{text}\n\n{seconds:.0f} seconds. Results: {args.out}", *figures)
