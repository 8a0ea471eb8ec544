"""Five claims about batch norm, measured on handwritten digits.

Trains dense networks with 64 units per layer on scikit-learn's digits, in five
experiments:

    gradients  the gradient of each layer's kernel, in 5, 20 and 50 layers, with He's
               kernels and with kernels half as large
    steps      ten layers at learning rates from 0.0003 to 10
    drift      how far the inputs of layers move (`jaxbn.population.drift`), whether
               training is faster if they move less, and networks that are disturbed on
               purpose
    place      batch norm before the activation, after it, and none, for ReLU and
               sigmoid
    noise      batch sizes from 8 to 512 on 512 images, with the statistics of the batch
               and with those of all 512

All use SGD with momentum 0.9 and, except for the last, batches of 128. The seed
determines the split, the initial kernels and the batches, which are the same for all
networks of the same depth. Accuracies and losses at the end use the statistics of all
training images.

What to expect, from three seeds: without batch norm, kernels half as large prevent the
training of 20 layers. With batch norm, the size of the kernels does not matter, but
gradients grow from layer to layer towards the input. 50 layers hardly train either way.
Batch norm trains at learning rates up to thirty times as large. At small rates it is no
faster. It does reduce drift. If it is disturbed until it drifts more than the plain
network, it still trains about as fast at its best rate. Before or after the activation,
it is equally good if each has its best learning rate. The noise of the statistics adds
a point at most, which is hardly more than the spread.

Run it with

    python examples/why_batch_norm.py

This prints tables, and writes them to summary.md in the output directory, every seed's
numbers to results.json, and a picture for each experiment, why_gradients.png and so on.
It takes about four minutes on two cores. docs/why.md discusses the results.

Options:
    --seeds N       Number of seeds (default 3).
    --steps N       Training steps (default 200). gradients takes half as many, noise
                    three times as many.
    --only NAME...  The experiments to run (default all).
    --out DIR       Folder for the results (default out/why).
    --figures DIR   Also write the pictures to this folder.

Needs `pip install 'jaxbn[examples]'`.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from _options import positive
from _small_batches import stacked_data
from _why_experiments import EXPERIMENTS, Rows
from _why_figures import draw
from _why_tables import TABLES, TITLES
from tqdm import tqdm

MANY = 100  # Seeds, each of which is a copy of the digits in memory.


def seeds(text: str) -> int:
    value = int(text)
    if not 0 < value <= MANY:
        raise argparse.ArgumentTypeError(f"{text} is not in 1 ... {MANY}")
    return value


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measures five claims about batch norm on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=seeds, default=3, metavar="N", help="number of seeds")
    add("--steps", type=positive(int), default=200, metavar="N", help="training steps")
    add(
        "--only",
        nargs="+",
        choices=[*EXPERIMENTS],
        default=[*EXPERIMENTS],
        metavar="NAME",
        help=f"experiments to run, of {', '.join(EXPERIMENTS)}",
    )
    add("--out", type=Path, default=Path("out/why"), help="results go here")
    add("--figures", type=Path, metavar="DIR", help="write the pictures here too")
    return parser


def make_folders(parser: argparse.ArgumentParser, folders: Sequence[Path]) -> None:
    """Makes the output folders now, so that an error does not come after the work."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot write to {folder}: {error.strerror}")


def study(args: argparse.Namespace) -> dict[str, Rows]:
    """The rows of every experiment that was chosen."""
    data = stacked_data(args.seeds)
    names = [name for name in EXPERIMENTS if name in args.only]
    results = {}
    for name in (bar := tqdm(names, unit="experiment", dynamic_ncols=True)):
        bar.set_description(name.ljust(9))
        results[name] = EXPERIMENTS[name](data, args.steps)
    return results


def summary(results: dict[str, Rows], args: argparse.Namespace) -> str:
    parts = [
        f"Batch norm on handwritten digits: {args.steps} steps, seeds: {args.seeds}",
        "Mean ± standard deviation over seeds.",
    ]
    for name, rows in results.items():
        parts += [f"## {TITLES[name]}", TABLES[name](rows)]
    return "\n\n".join(parts) + "\n"


def without_nan(values):
    """Rows for JSON, with null for infinity and NaN."""
    if isinstance(values, dict):
        return {key: without_nan(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_nan(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


def main(argv: Sequence[str] | None = None) -> dict[str, Rows]:
    parser = argument_parser()
    args = parser.parse_args(argv)
    folders = [args.out, *([args.figures] if args.figures else [])]
    make_folders(parser, folders)
    began = time.perf_counter()
    results = study(args)

    text = summary(results, args)
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    record = json.dumps(without_nan(results), allow_nan=False)
    (args.out / "results.json").write_text(record, encoding="utf-8")
    for name, rows in results.items():
        draw(name, rows, [folder / f"why_{name}.png" for folder in folders])
    seconds = time.perf_counter() - began
    print(f"\n{text}\n{seconds:.0f} seconds. Pictures: {', '.join(map(str, folders))}")
    return results


if __name__ == "__main__":
    main()
