"""A deep sigmoid network on handwritten digits, without and with batch norm.

Trains twelve sigmoid layers of 100 units on scikit-learn's handwritten digits, once
without and once with batch norm before each activation. Both networks start from the
same kernels, and see the same batches, optimizer (SGD with momentum) and number of
steps. The picture shows

1. the gradient norm of each layer at initialization,
2. the test accuracy over the steps,
3. the test accuracy after training from scratch at many learning rates,
4. the gap between train loss and test loss.

Run it with

    python examples/train_digits.py

This prints a table, and writes it to summary.md in the output directory, the picture to
digits.png, and parameters and statistics to checkpoints/. To continue a run where it
stopped, with the same bits as without the stop:

    python examples/train_digits.py --steps 1000 --resume

Options:
    --steps N      Training steps for each network and learning rate (default 500).
    --seed N       Seed of the split, the parameters and the batches (default 0).
    --lr X         Learning rate of panels 2 and 4 (default 0.05).
    --out DIR      Folder for the results (default out/digits).
    --figure PATH  Also write the picture to this path.
    --resume       Continue from the checkpoint in the output directory.

Needs `pip install 'jaxbn[examples]'`.
"""

import argparse
import hashlib
from pathlib import Path

import jax
import numpy as np
from _digits_checkpoints import SAVE_EVERY, Checkpoints, ResumeError
from _digits_figure import draw
from _digits_training import (
    LEARNING_RATES,
    TRAINS,
    Network,
    Run,
    advance,
    load_data,
    new_run,
    pieces,
    sweep,
)
from _options import make_folders, picture, positive, seed
from tqdm import tqdm


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a deep sigmoid network on handwritten digits, without "
        "and with batch norm, and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=positive(int), default=500, help="training steps of every run")
    add("--seed", type=seed, default=0, help="seed of everything random")
    add("--lr", type=positive(float), default=0.05, help="learning rate of the curves")
    add("--out", type=Path, default=Path("out/digits"), help="where results go")
    add("--figure", type=picture, metavar="PATH", help="write the picture here too")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    return parser


def train_both(
    args: argparse.Namespace, checkpoints: Checkpoints, first: int
) -> dict[str, Run]:
    """Trains both networks side by side, then each at all learning rates."""
    total = 2 * (args.steps - first + len(LEARNING_RATES) * args.steps)
    with tqdm(total=total, unit="step", desc="compiling", dynamic_ncols=True) as bar:
        data = load_data(args.seed)
        runs = {
            "without": new_run(Network(batch_norm=False), data, args.seed),
            "with": new_run(Network(batch_norm=True), data, args.seed),
        }
        if first > 0:
            checkpoints.restore(first, runs)
        bar.reset()  # Leaves compilation out of the estimate of the remaining time.
        bar.set_description("both networks")
        for start, stop in pieces(first, args.steps):
            for run in runs.values():
                advance(run, data, args.seed, args.lr, start, stop)
                bar.update(stop - start)
            if stop % SAVE_EVERY == 0 or stop == args.steps:
                checkpoints.save(stop, runs)
        for name, run in runs.items():
            bar.set_description(f"learning rates, {name}")
            sweep(run, data, args.seed, args.steps, bar.update)
    return runs


def digest(runs: dict[str, Run]) -> str:
    """Twelve hexadecimal digits that change with any bit of the trained state."""
    learned = [(run.state.params, run.state.batch_stats) for run in runs.values()]
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(learned):
        hashed.update(np.asarray(leaf).tobytes())
    return hashed.hexdigest()[:12]


def column(run: Run) -> dict[str, str]:
    """The column of one network in the table."""
    last = run.history[-1]
    rates = [lr for lr, accuracy in run.sweep.items() if accuracy >= TRAINS]
    trains = f"{min(rates):g} to {max(rates):g}" if rates else "none"
    best = max(run.sweep, key=lambda lr: run.sweep[lr])
    gap = last["train_accuracy"] - last["test_accuracy"]
    return {
        "test accuracy": f"{last['test_accuracy']:.1%}",
        "train accuracy": f"{last['train_accuracy']:.1%}",
        "gap, train − test": f"{100 * gap:z.1f} points",
        "test loss": f"{last['test_loss']:.3f}",
        "train loss": f"{last['train_loss']:.3f}",
        "gradient norm, first layer": f"{run.gradient_norms[0]:.1e}",
        "gradient norm, last layer": f"{run.gradient_norms[-1]:.1e}",
        "learning rates that train": trains,
        "how many, of those tried": f"{len(rates)} of {len(run.sweep)}",
        "best test accuracy, any rate": f"{run.sweep[best]:.1%} at {best:g}",
        "seconds of training": f"{run.seconds:.1f}",
    }


def table(runs: dict[str, Run]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    columns = [column(run) for run in runs.values()]
    rows = [["", *(f"{name} batch norm" for name in runs)]]
    rows += [[key, *(each[key] for each in columns)] for key in columns[0]]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    lines = []
    for label, *cells in rows:
        aligned = [c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)]
        lines.append(" | ".join(["| " + label.ljust(widths[0]), *aligned]) + " |")
    return "\n".join(lines)


def summary(runs: dict[str, Run], args) -> str:
    net = runs["with"].net
    return f"""\
{net.depth} sigmoid layers of {net.width} on handwritten digits: {args.steps} steps, \
learning rate {args.lr:g}, seed {args.seed}

{table(runs)}

A learning rate trains if the test accuracy after {args.steps} steps is at least \
{TRAINS:.0%}.
Parameters and statistics at step {args.steps}: sha256 {digest(runs)}
"""


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if args.resume and not args.out.is_dir():
        parser.error(f"no checkpoint in {args.out}: start without --resume")
    make_folders(parser, args)
    with Checkpoints(args.out, args.seed, args.lr) as checkpoints:
        first = 0
        if args.resume:
            try:
                first = checkpoints.step(args.steps)
            except ResumeError as error:
                parser.error(str(error))
        else:
            checkpoints.clear()
        runs = train_both(args, checkpoints, first)

    text = summary(runs, args)
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    figures = [args.out / "digits.png"] + ([args.figure] if args.figure else [])
    draw(runs, args.lr, figures)
    print(f"\n{text}\nPicture: {', '.join(map(str, figures))}")


if __name__ == "__main__":
    main()
