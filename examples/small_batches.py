"""Which batch norm for which batch size: four of them, on batches of 2 to 32.

Trains three dense layers of 100 with relu on scikit-learn's handwritten digits, with
batch norm, batch renormalization, ghost batch norm and streaming batch norm, at several
batch sizes and from several seeds. A seed decides the split, the first kernels and the
order of the images; all norms and batch sizes share them. Every run sees the same
number of images, so smaller batches take more steps. SGD with momentum 0.9; the
learning rate is --lr · batch / 32 and falls to zero along a cosine, for all norms.

Dense layers have no spatial axes, so at batch 2 each statistic comes from two values.
These become -1 and 1, whatever they are. Almost no gradient passes, except where the
two values are nearly equal: there the gradient is huge. The network was chosen to show
this. In a network of three 3×3 convolutions, whose last statistics at batch 2 come from
eight values, all four methods reached 97 to 99 %. The learning rate was chosen too: of
five between 0.005 and 0.1, at batch 2, renorm was ahead of batch norm up to 0.05.

With five seeds at batch 2, renorm reaches 86 %, batch norm 56 % and streaming 97 %.
From batch 4 on, all methods but ghost with groups of 2 are within 2 points. Renorm is
as good in training mode as at inference, and batch norm is not: 32 % against 56 %. But
renorm has the gradient of batch norm, times r. It learns hardly more than the last
layer, the scales and the biases: with --freeze-kernels renorm reaches 88 %, batch norm
68 % and streaming 91 %. Where two values are nearly equal, σ_B / σ is near 0, and an r
clipped at 1 / r_max does not compensate for the factor 1 / σ_B. At --lr 0.1 renorm
diverges for three of the five seeds. With --limits inf inf it reaches 89 % at both
rates, and the largest gradient falls from 1e4 to 3. --epsilon 0.01 also bounds the
gradient: 93 % for renorm, 88 % for batch norm.

At batch 2 ghost is batch norm by definition. The two rows still differ, because
gradients of 1e5 magnify rounding errors: they are two samples of the same method.

Run it with

    python examples/small_batches.py

which prints the tables, and writes them to summary.md in the output directory, every
seed's numbers to results.json, and the picture to small_batches.png.

Options:
    --seeds N       How many seeds (default 5).
    --batches N...  Batch sizes (default 2 4 8 16 32).
    --examples N    Images seen by each run (default 16384, twelve epochs).
    --lr X          Learning rate at batch 32 (default 0.02).
    --epsilon X     Added to every variance (default 1e-5).
    --limits R D    Where r_max and d_max of renorm end, inf for none (default 3 5).
    --freeze-kernels  Train only the norms and the last layer.
    --out DIR       Where results go (default out/small_batches).
    --figure PATH   Also write the picture there.

Needs `pip install 'jaxbn[examples]'`.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from _digits_figure import STYLE
from _small_batches import (
    DEPTH,
    NORMS,
    REFERENCE_BATCH,
    WIDTH,
    Setting,
    advance,
    evaluate,
    first_states,
    ghost_group,
    stacked_data,
    stacked_orders,
)
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter
from tqdm import tqdm

PIECES = 16  # Of a run, between which the progress bar moves.
LARGEST_BATCH = 256  # So that the 450 test images make a batch.
# Okabe and Ito's colours, told apart by every kind of colour vision.
LOOKS = {
    "batch norm": ("#D55E00", "s"),
    "renorm": ("#0072B2", "o"),
    "ghost": ("#CC79A7", "^"),
    "streaming": ("#009E73", "D"),
}

Values = dict[str, list[float]]  # What was measured, by its name: a number per seed.
Results = dict[str, dict[int, Values]]  # By norm and batch.


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a network on handwritten digits with four batch norms at "
        "several batch sizes, and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="how many seeds")
    add("--batches", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="batch sizes")
    add("--examples", type=int, default=16384, help="images seen by each run")
    add("--lr", type=float, default=0.02, help="learning rate at batch 32")
    add("--epsilon", type=float, default=1e-5, help="added to every variance")
    add(
        "--limits",
        type=float,
        nargs=2,
        metavar=("R", "D"),
        default=[3.0, 5.0],
        help="where r_max and d_max of renorm end",
    )
    add("--freeze-kernels", action="store_true", help="train only norms and last layer")
    add("--out", type=Path, default=Path("out/small_batches"), help="results go here")
    add("--figure", type=Path, metavar="PATH", help="also write the picture there")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what would fail, or compare unequal things, when much work is done."""
    if min(args.seeds, args.examples, args.lr, args.epsilon) <= 0:
        parser.error("--seeds, --examples, --lr and --epsilon must be above 0")
    if args.limits[0] < 1 or args.limits[1] < 0:
        parser.error("--limits must be at least 1 and 0")
    for batch in args.batches:
        if batch % 2 or not 2 <= batch <= LARGEST_BATCH:
            parser.error(f"batch {batch} is not even, from 2 to {LARGEST_BATCH}")
        if args.examples % batch:
            parser.error(f"--examples {args.examples} is no multiple of batch {batch}")
    for folder in [args.out, *([args.figure.parent] if args.figure else [])]:
        folder.mkdir(parents=True, exist_ok=True)


def study(args: argparse.Namespace) -> Results:
    """Trains with every norm at every batch size."""
    data = stacked_data(args.seeds)
    order = stacked_orders(args.seeds, data.train_x.shape[1], args.examples)
    steps = {batch: args.examples // batch for batch in sorted(set(args.batches))}
    results: Results = {norm: {} for norm in NORMS}
    total = len(NORMS) * sum(steps.values())
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for batch in steps:
            for norm in NORMS:
                bar.set_description(f"{norm}, batch {batch}")
                fixed = args.lr, args.epsilon, tuple(args.limits), args.freeze_kernels
                setting = Setting(norm, batch, steps[batch], *fixed)
                results[norm][batch] = run(setting, data, order, bar.update)
    return results


def run(
    setting: Setting, data, order: np.ndarray, tick: Callable[[int], object]
) -> Values:
    """What one setting comes to, for every seed; `tick` hears of the steps."""
    seeds = len(order)
    batches = jnp.asarray(order.reshape(seeds, setting.steps, setting.batch))
    states = first_states(setting, jnp.arange(seeds))
    bounds = np.linspace(0, setting.steps, PIECES + 1).round().astype(int)
    for start, stop in pairwise(bounds):
        states = advance(setting, states, data, batches, start, stop)
        states.peak.block_until_ready()
        tick(int(stop - start))
    found = evaluate(setting, states, data) | {"largest gradient": states.peak}
    return {name: values.tolist() for name, values in found.items()}


def spread(values: list[float]) -> float:
    """The standard deviation over seeds; none is seen in a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(values: list[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * spread(values):.1f}" if len(values) > 1 else mean


def largest(values: list[float]) -> str:
    """The median over seeds, which a seed that diverged does not hide."""
    return f"{statistics.median(v if v == v else math.inf for v in values):.2g}"


def table(results: Results, name: str, show: Callable[[list[float]], str]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    batches = list(results[NORMS[0]])
    rows = [["", *(f"batch {batch}" for batch in batches)]]
    rows += [[n, *(show(results[n][b][name]) for b in batches)] for n in results]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    lines = []
    for label, *cells in rows:
        aligned = [c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)]
        lines.append(" | ".join(["| " + label.ljust(widths[0]), *aligned]) + " |")
    return "\n".join(lines)


def summary(results: Results, args: argparse.Namespace) -> str:
    groups = ", ".join(f"{ghost_group(b)} at {b}" for b in results["ghost"])
    same = "; at batch 2 ghost is batch norm" if 2 in results["ghost"] else ""
    return f"""\
{DEPTH} dense layers of {WIDTH} on handwritten digits: {args.examples} images seen at \
every batch size, learning rate {args.lr:g} · batch / {REFERENCE_BATCH}, seeds: \
{args.seeds}
Epsilon: {args.epsilon:g}; r_max and d_max of renorm end at {args.limits[0]:g} and \
{args.limits[1]:g}{"; the kernels stay as they were" * args.freeze_kernels}
Groups of ghost: {groups}{same}

Test accuracy in percent, mean ± standard deviation over seeds:

{table(results, "inference", percent)}

The same, normalized as in training, by batches of the test images:

{table(results, "training", percent)}

Largest gradient norm of the kernels in any step, median over seeds:

{table(results, "largest gradient", largest)}
"""


def draw(results: Results, paths: Iterable[Path]) -> None:
    """Writes the picture to every path."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 4.3), layout="constrained"
        )
        for place, (norm, by_batch) in enumerate(results.items()):
            # Side by side, since most of them meet at the larger batches.
            beside = 2 ** (0.06 * (place - (len(results) - 1) / 2))
            at = [batch * beside for batch in by_batch]
            accuracies = [found["inference"] for found in by_batch.values()]
            gaps = [gap(found) for found in by_batch.values()]
            line(left, norm, at, accuracies)
            line(right, norm, at, gaps)
        finish(left, list(results[NORMS[0]]))
        finish(right, list(results[NORMS[0]]))
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        left.set_title("Test accuracy at inference")
        left.set_ylabel("mean ± standard deviation")
        right.set_title("Test accuracy lost in training mode")
        right.set_ylabel("inference − training mode, in points")
        left.legend(loc="lower right")
        for path in paths:
            figure.savefig(path, dpi=200)
        plt.close(figure)


def gap(found: Values) -> list[float]:
    """How much better each seed is at inference than in training mode."""
    pairs = zip(found["inference"], found["training"], strict=True)
    return [inference - training for inference, training in pairs]


def line(axes: Axes, norm: str, at: list[float], values: list[list[float]]) -> None:
    color, marker = LOOKS[norm]
    axes.errorbar(
        at,
        [statistics.fmean(v) for v in values],
        yerr=[spread(v) for v in values],
        color=color,
        marker=marker,
        label=norm,
        capsize=2.5,
        elinewidth=1.2,
    )


def finish(axes: Axes, batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch size")


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    check(parser, args)
    mpl.use("Agg")
    began = time.perf_counter()
    results = study(args)
    seconds = time.perf_counter() - began

    text = summary(results, args)
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    record = {"args": vars(args), "seconds": seconds, "results": results}
    text_of_record = json.dumps(record, indent=1, default=str)
    (args.out / "results.json").write_text(text_of_record, encoding="utf-8")
    figures = [args.out / "small_batches.png"] + ([args.figure] if args.figure else [])
    draw(results, figures)
    print(f"\n{text}\n{seconds:.0f} seconds. Picture: {', '.join(map(str, figures))}")


if __name__ == "__main__":
    main()
