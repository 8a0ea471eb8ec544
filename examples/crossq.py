"""CrossQ: reinforcement learning whose critics have batch norm and no target networks.

Trains agents to hold a pendulum upright. Everything is in JAX, from the dynamics to the
optimizer. The script compares four agents: soft actor-critic (SAC), which has target
networks; CrossQ, which puts (s, a) and (s′, a′) through the critics as one batch,
normalizes it by batch renormalization, and has no target networks; and CrossQ with
batch norm, and without any norm. All seeds of an agent train at the same time, by
`vmap`.

Run it with

    python examples/crossq.py

This prints a table of returns, and writes it to summary.md in the output directory,
every evaluation to results.json, and the picture to crossq.png. A return of −200 means
that the pendulum swings up and stands; −1200, that it hangs.

Options:
    --seeds N       Number of seeds (default 5).
    --steps N       Training steps of each agent (default 6000).
    --width N       Units per layer of the actor; critics have twice as many
                    (default 64).
    --small         A quick run with two seeds, 200 steps and 16 units.
    --out DIR       Folder for the results (default out/crossq).
    --figure PATH   Also write the picture to this path.

Needs `pip install 'jaxbn[examples]'`.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np
from _crossq import KINDS, Learner
from _digits_figure import STYLE
from matplotlib.figure import Figure
from tqdm import tqdm

EVERY, GOAL = 250, -200.0
# Okabe and Ito's colours, in the order of `KINDS`.
COLORS = ("#0072B2", "#D55E00", "#999999", "#009E73")


def main() -> None:
    args = arguments()
    mpl.use("Agg")
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    results = {name: trained(name, kind, args) for name, kind in KINDS.items()}
    seconds = time.perf_counter() - began

    text = summary(results, args)
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    record = {
        "args": vars(args),
        "seconds": seconds,
        "results": {name: values.tolist() for name, values in results.items()},
    }
    text_of_record = json.dumps(record, indent=1, default=str)
    (args.out / "results.json").write_text(text_of_record, encoding="utf-8")
    figures = [args.out / "crossq.png"] + ([args.figure] if args.figure else [])
    draw(results, args, figures)
    print(f"\n{text}\n{seconds:.0f} seconds. Picture: {', '.join(map(str, figures))}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/crossq"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.small:
        args.seeds, args.steps, args.width = 2, 200, 16
    for name in ("seeds", "steps", "width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}.")
    args.every = min(EVERY, args.steps)
    if args.steps % args.every:
        parser.error(f"--steps must be a multiple of {EVERY}, got {args.steps}.")
    return args


def trained(name: str, kind, args: argparse.Namespace) -> np.ndarray:
    """The returns of every seed at every evaluation, of shape (evaluations, seeds)."""
    learner = Learner(kind, args.width, args.steps)
    keys = jax.random.split(jax.random.key(0), args.seeds)
    agents = jax.jit(jax.vmap(learner.init))(keys)
    part = jax.jit(
        jax.vmap(learner.part, (0, 0, None)), static_argnums=2, donate_argnums=0
    )
    returns = []
    for i in tqdm(range(args.steps // args.every), desc=name, leave=False):
        keys = jax.random.split(jax.random.key(1 + i), args.seeds)
        agents, values = part(agents, keys, args.every)
        returns.append(np.asarray(values))
    return np.stack(returns)


def summary(results: dict[str, np.ndarray], args: argparse.Namespace) -> str:
    """A table: the final return, its spread, and when the seeds reach the goal."""
    lines = [
        f"| agent | return after {args.steps} steps | steps to {GOAL:.0f} | seeds that "
        "reach it |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, values in results.items():
        last = values[-3:].mean(0)
        first = [int(np.argmax(v >= GOAL)) for v in values.T if (v >= GOAL).any()]
        steps = f"{args.every * (1 + np.median(first)):.0f}" if first else "never"
        reached = f"{len(first)} of {args.seeds}"
        mean = f"{last.mean():.0f} ± {last.std():.0f}"
        lines.append(f"| {name} | {mean} | {steps} | {reached} |")
    note = (
        f"Returns: means of the last three evaluations over {args.seeds} seeds, ± the "
        "standard deviation over seeds. Steps: the median of seeds that reach the goal."
    )
    return "\n".join([*lines, "", note, ""])


def draw(
    results: dict[str, np.ndarray], args: argparse.Namespace, figures: list[Path]
) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        for (name, values), color in zip(results.items(), COLORS, strict=True):
            steps = args.every * np.arange(1, len(values) + 1)
            axes.plot(steps, np.median(values, 1), label=name, color=color)
            low, high = values.min(1), values.max(1)
            axes.fill_between(steps, low, high, alpha=0.15, color=color, lw=0)
        axes.axhline(GOAL, color="#999999", lw=1, ls=":")
        axes.set(xlabel="step", ylabel="return")
        axes.set_title("Pendulum: median and range of seeds")
        axes.legend()
        for path in figures:
            figure.savefig(path, dpi=200)


if __name__ == "__main__":
    main()
