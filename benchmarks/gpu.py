"""What a GPU says: layers and ResNet-50 by the clock, beside Flax, and the tests on it.

One command on a machine with JAX for CUDA, in at most 8 minutes:

    python benchmarks/gpu.py

Layers are timed forward and backward at six shapes, with and without a relu; a case has
the share of the bandwidth of a copy that it reaches. A step of ResNet-50 is timed at
batch 256 in bfloat16. Then the tests marked `gpu` are run. All goes into one JSON,
from which `tables.py` makes the pages' tables. What the time does not suffice for is
left out, and named. `--dry` takes small sizes, on whatever device there is.
"""

import argparse
import itertools
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import jax
import resnet
import speed
from _peers import MODES
from _tables import RESULTS, markdown, write
from _timing import interleaved, quartiles

LIBRARIES = ["jaxbn", "linen"]
MODE = MODES[1]
DTYPES = ("bfloat16", "float32")
STEP = {"batch": 256, "size": 224, "width": 64, "blocks": [3, 4, 6, 3]}
DRY_STEP = {"batch": 2, "size": 32, "width": 4, "blocks": [1, 1]}
TESTS = pathlib.Path(__file__).parents[1] / "tests"


class Clock:
    """Says when the minutes are over, and remembers what was left out."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def runs(self, name: str, found: Callable[[], dict]) -> list[dict]:
        """What is found, in a list; an empty one if there is no time left."""
        if time.monotonic() > self.end:
            self.left_out.append(name)
            return []
        return [found()]


def layers(shapes: Iterable[list[int]], rounds: int, clock: Clock) -> list[dict]:
    """Times of forward and backward."""
    cases = []
    for shape, dtype, relu in itertools.product(shapes, DTYPES, (False, True)):
        case = {"mode": MODE, "dtype": dtype, "relu": relu, "shape": shape}
        name = " ".join(map(str, case.values()))
        cases += clock.runs(name, lambda c=case: speed.measure(c, LIBRARIES, rounds))
    return cases


def networks(sizes: dict, rounds: int, clock: Clock) -> list[dict]:
    """Times of a step of ResNet-50."""
    args = argparse.Namespace(dtype="bfloat16", **sizes)
    runs, cases = {}, []
    for name in LIBRARIES:

        def prepared(name=name) -> dict:
            runs[name], case = resnet.prepare(name, args)
            return case

        cases += clock.runs(f"ResNet-50, {name}", prepared)
    times = interleaved(runs, rounds)
    return [case | {"step_ms": quartiles(times[case["library"]])} for case in cases]


def tests() -> dict:
    """How the tests marked `gpu` end: pytest's exit status, and its last line."""
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*argv, "test_gpu.py"], cwd=TESTS, capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {"status": done.returncode, "summary": lines[-1] if lines else ""}


def main() -> None:
    """Prints the tables, and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="small, on any device")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=6, help="then begin no more")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    if not args.dry and jax.default_backend() != "gpu":
        sys.exit("No GPU here, or no JAX for it. Try `--dry`, or install jax[cuda13].")
    clock = Clock(args.minutes)
    shapes = "8x2x2x4 16x8" if args.dry else speed.GPU_SHAPES
    given = [[int(n) for n in shape.split("x")] for shape in shapes.split()]
    # The step first: it is what the time must suffice for.
    steps = networks(DRY_STEP if args.dry else STEP, args.rounds, clock)
    found = layers(given, args.rounds, clock)
    tested = tests()
    head = ["mode", "x", "dtype", "relu", "copy, ms", "jaxbn, ms", "transfers"]
    rows = [speed.row(case, LIBRARIES) for case in found]
    print(markdown([*head, "of copy's bandwidth", "flax"], rows, left=4))
    for case in steps:
        print(f"\nA step with {case['library']}: {case['step_ms'][1]:.1f} ms")
    print(f"\n{tested['summary']}\nLeft out: {', '.join(clock.left_out) or 'nothing'}")
    options = {"rounds": args.rounds, "dry": args.dry, "left_out": clock.left_out}
    write(args.out, options, layers=found, networks=steps, tests=tested)


if __name__ == "__main__":
    main()
