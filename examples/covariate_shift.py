"""Test images unlike those of training, and what new statistics do for them.

Trains six convolutions with batch norm on scikit-learn's handwritten digits, then
corrupts the test images: noise, blur, contrast, rotation, inversion and occlusion, at
five strengths each. Parameters stay as they are, and no labels are used: only the
statistics of the batch norms are others, by `jaxbn.population.adapt` and, for the mix,
by the layers' option `pseudo_samples`:

    source            not at all: the running statistics of training
    AdaBN             those of all corrupted test images together
    batch of 64       those of the batch that is predicted (prediction-time batch norm)
    one image         the same for an image alone
    one image, N = 1  those of the image and of training, mixed: training counts as N

What to expect, roughly, from three seeds: of 98 % on clean images the source keeps 60 %
on average over the corruptions, AdaBN and batches of 64 keep 73 %. Much is won where a
corruption scales and shifts (contrast, 59 to 96 %; blur, 81 to 94 %; inversion, while
it is below a half), a little for rotation and occlusion (6 points each), and 1 or 2
points for noise. Past a half, an inversion turns the sign of the contrast, which no
mean and no variance can undo: every method fails.

An image alone has too few values for statistics: its own cost 7 points on clean images,
and 9 on noise. Mixed with those of training they cost 1 on either, and over the
corruptions 68 % are right instead of 64 %. Only where contrast is nearly gone, or blur
is strong, is the mix behind: there the statistics of training are far off. How much
there is to win depends on the batch: the statistics of 8 images alone are within 3
points of those of 64, and N of 8 or 16 loses more on contrast than it wins elsewhere.

The picture also shows how far each channel of each layer has drifted from its running
statistics (`jaxbn.population.drift`): with less contrast from the first layer on, after
rotation hardly in the first layer, and more than ten times as far in the last.

Batches of 64 hold all ten digits. Clean images sorted by digit go from 99 to 82 %.

Run it with

    python examples/covariate_shift.py

which prints the table, and writes it to summary.md in the output directory, accuracies
at every strength to results.json, the tables of drift to drift.md, and the picture to
covariate_shift.png.

Options:
    --seed N            Of split, parameters, batches and corruptions (default 0).
    --steps N           Training steps (default 200).
    --pseudo-samples N  What training counts as in the mix (default 1).
    --out DIR           Where results go (default out/covariate_shift).
    --figure PATH       Also write the picture there.

Needs `pip install 'jaxbn[examples]'`.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from _corruptions import LEVELS, STRENGTHS, corrupt
from _covariate_shift import (
    BATCH,
    Accuracies,
    Digits,
    Network,
    Variables,
    accuracies,
    drift_from_training,
    in_batches,
    init,
    load_data,
    train_step,
)
from _covariate_shift_figure import draw
from _options import make_folders, picture, positive, seed
from tqdm import tqdm

from jaxbn.population import summary as drift_table

DRIFT_AT = 3  # The strength at which drift is measured.

Results = dict[str, dict[int, Accuracies]]  # By corruption and strength.


def samples(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and finite")
    return value


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Adapts the batch norms of a network to corrupted digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=seed, default=0, help="of all that is random")
    add("--steps", type=positive(int), default=200, metavar="N", help="training steps")
    add(
        "--pseudo-samples",
        type=samples,
        default=1,
        metavar="N",
        help="what the statistics of training count as, beside one image",
    )
    add("--out", type=Path, default=Path("out/covariate_shift"), help="results go here")
    add("--figure", type=picture, metavar="PATH", help="also write the picture there")
    return parser


def trained(net: Network, data: Digits, args: argparse.Namespace) -> Variables:
    state = init(net, args.seed)
    numbers = tqdm(range(args.steps), "training", unit="step", dynamic_ncols=True)
    for i in numbers:
        state = train_step(net, state, data, args.seed, args.steps, i)
        state.opt_state[0].trace["Dense_0"]["bias"].block_until_ready()
    return state.variables


def study(
    net: Network,
    variables: Variables,
    data: Digits,
    args: argparse.Namespace,
    strengths: Sequence[int],
) -> Results:
    """Accuracies on clean and corrupted images."""
    cases = [("clean", 0)] + [(name, level) for name in LEVELS for level in strengths]
    results: Results = {name: {} for name in ("clean", *LEVELS)}
    for name, strength in (bar := tqdm(cases, unit="set", dynamic_ncols=True)):
        bar.set_description(f"{name} {strength}".ljust(11))
        x = data.test_x
        if strength:
            x = corrupt(x, name, strength, args.seed)
        results[name][strength] = accuracies(
            net, variables, x, data.test_y, args.pseudo_samples
        )
    return results


def drifts_of_all(net: Network, variables: Variables, data: Digits, seed: int) -> dict:
    """The drift of each corruption."""
    drifts = {}
    for name in LEVELS:
        x = corrupt(data.test_x, name, DRIFT_AT, seed)
        drifts[name] = drift_from_training(net, variables, in_batches(x, BATCH))
    return drifts


def average(of: Iterable[Accuracies]) -> Accuracies:
    rows = list(of)
    return {method: statistics.fmean(row[method] for row in rows) for method in rows[0]}


def table(results: Results) -> str:
    """A Markdown table whose columns line up as plain text too."""
    means = {name: average(found.values()) for name, found in results.items()}
    clean = means.pop("clean")
    means |= {"mean of the six": average(means.values()), "clean": clean}
    rows = [["", *clean]]
    rows += [
        [name, *(f"{100 * v:.1f}" for v in m.values())] for name, m in means.items()
    ]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    lines = []
    for label, *cells in rows:
        aligned = [c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)]
        lines.append(" | ".join(["| " + label.ljust(widths[0]), *aligned]) + " |")
    return "\n".join(lines)


def summary(results: Results, args: argparse.Namespace) -> str:
    return f"""\
Convolutions with batch norm on handwritten digits: {args.steps} steps, seed {args.seed}

Test accuracy in percent, mean over the strengths of each corruption:

{table(results)}
"""


def main(
    argv: Sequence[str] | None = None,
    strengths: Sequence[int] = STRENGTHS,
    net: Network | None = None,
) -> Results:
    parser = argument_parser()
    args = parser.parse_args(argv)
    make_folders(parser, args)
    began = time.perf_counter()
    net, data = net or Network(), load_data(args.seed)
    variables = trained(net, data, args)
    results = study(net, variables, data, args, strengths)
    drifts = drifts_of_all(net, variables, data, args.seed)

    text = summary(results, args)
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    (args.out / "drift.md").write_text(drift_report(drifts), encoding="utf-8")
    figures = [
        args.out / "covariate_shift.png",
        *([args.figure] if args.figure else []),
    ]
    draw(results, drifts, DRIFT_AT, figures)
    seconds = time.perf_counter() - began
    print(f"\n{text}\n{seconds:.0f} seconds. Picture: {', '.join(map(str, figures))}")
    return results


def drift_report(drifts: dict) -> str:
    parts = [
        f"# {name}, strength {DRIFT_AT}\n\n{drift_table(found)}\n"
        for name, found in drifts.items()
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
