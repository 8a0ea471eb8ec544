"""Four batch norms on batches of 2 to 32 examples.

Trains three dense layers of 100 ReLUs on scikit-learn's handwritten digits, with batch
norm, batch renormalization (renorm), ghost batch norm and streaming batch norm, at
several batch sizes and with several seeds. Ghost batch norm normalizes groups of half
the batch by their own statistics; streaming batch norm normalizes by running statistics
in training too. The seed determines the split, the initial kernels and the order of the
images, which are the same for all norms and batch sizes. Every run sees the same number
of images, so smaller batches take more steps. The optimizer is SGD with momentum 0.9.
For all norms, the learning rate is --lr · batch / 32, and falls to zero along a cosine.

Dense layers have no spatial axes, so at batch 2 each statistic comes from two values.
Two values normalize to ±1 whatever they are. Almost no gradient passes, except that it
is huge if the two values are nearly equal. The network was chosen to show this. In a
network of three 3 × 3 convolutions, whose last statistics at batch 2 come from eight
values, all four norms reached 97 to 99 % at batch 2, and batch norm was 0.5 points
above renorm. The learning rate was chosen too. Of five rates from 0.005 to 0.1, at
batch 2, renorm was better than batch norm up to 0.05, and diverged with some or all
seeds at 0.1.

With five seeds, at batch 2, these dense layers reach 86 % with renorm, 56 % with batch
norm and 97 % with streaming. From batch 4 on, all are within 2 points of each other,
except ghost with groups of 2. Renorm classifies as well in training mode as at
inference. Batch norm does not: 32 % in training mode and 56 % at inference. But at
batch 2, renorm has the gradient of batch norm, times r, and learns little more than the
last layer and the scales and biases. With the kernels frozen at their initial values,
renorm reaches 88 %, batch norm 69 % and streaming 91 %. If two values are nearly equal,
σ_B / σ is near 0, and an r clipped at 1 / r_max no longer compensates for the factor
1 / σ_B. At --lr 0.1, renorm diverges with every seed. With --limits inf inf it keeps
89 % at either rate, and the largest gradient falls from 2e4 to 4. --epsilon 0.01 also
bounds the gradient: it gives 93 % for renorm and 87 % for batch norm.

At batch 2, ghost is batch norm by definition. The two rows still differ, because
gradients of 1e5 magnify rounding errors. Consider them two samples of the same result.

Run it with

    python examples/small_batches.py

This prints the tables, and writes them to summary.md in the output directory, every
seed's numbers to results.json, and the picture to small_batches.png.

Options:
    --seeds N       Number of seeds (default 5).
    --batches N...  Batch sizes (default 2 4 8 16 32).
    --examples N    Images seen in each run (default 16384, twelve epochs).
    --lr X          Learning rate at batch 32 (default 0.02).
    --epsilon X     Added to every variance (default 1e-5).
    --limits R D    Final r_max and d_max of renorm, inf for no limit (default 3 5).
    --out DIR       Folder for the results (default out/small_batches).
    --figure PATH   Also write the picture to this path.

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

PIECES = 16  # Of a run. The progress bar moves after each.
LARGEST_BATCH = 256  # The 450 test images must make at least one batch.
# Okabe and Ito's colors, which people with any color vision can tell apart.
LOOKS = {
    "batch norm": ("#D55E00", "s"),
    "renorm": ("#0072B2", "o"),
    "ghost": ("#CC79A7", "^"),
    "streaming": ("#009E73", "D"),
}

Values = dict[str, list[float]]  # Measurements by name, with a number for each seed.
Results = dict[str, dict[int, Values]]  # By norm and batch.


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a network on handwritten digits with four batch norms at "
        "several batch sizes, and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="number of seeds")
    add("--batches", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="batch sizes")
    add("--examples", type=int, default=16384, help="images seen in each run")
    add("--lr", type=float, default=0.02, help="learning rate at batch 32")
    add("--epsilon", type=float, default=1e-5, help="added to every variance")
    add(
        "--limits",
        type=float,
        nargs=2,
        metavar=("R", "D"),
        default=[3.0, 5.0],
        help="final r_max and d_max of renorm",
    )
    add("--freeze-kernels", action="store_true", help="train only norms and last layer")
    add("--out", type=Path, default=Path("out/small_batches"), help="results go here")
    add("--figure", type=Path, metavar="PATH", help="write the picture here too")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Rejects options that would fail late, or compare unequal things."""
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
    """The results of one setting, for every seed. `tick` counts the steps."""
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
    """The standard deviation over seeds, and 0 for a single seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(values: list[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * spread(values):.1f}" if len(values) > 1 else mean


def largest(values: list[float]) -> str:
    """The median over seeds. A seed that diverged counts as infinity."""
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
            # Side by side, because most of the points coincide at the larger batches.
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
