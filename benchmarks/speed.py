"""How fast is a layer, beside the same layer in other libraries?

Prints Markdown tables and writes JSON, from which `tables.py` makes the README's:

    python benchmarks/speed.py
    python benchmarks/speed.py --gpu
    python benchmarks/speed.py --shapes 8192x512 --dtypes float32 --modes forward
    python benchmarks/speed.py --family    # jaxbn's own layers, beside `standard`

All libraries are called in turn in one process, by as many threads; times are medians
over rounds, and those of the others ratios to jaxbn's (compiled by XLA, one pass about
the running mean). Beside them is the time of a copy of x, measured in the same rounds:
a copy is two transfers, forward is three at least, and backward five more.
"""

import argparse
import itertools
import math
import pathlib

import jax
from _family import measure as measure_family
from _family import table
from _machine import keep_memory, warn_if_busy
from _peers import MODES, NAMES, installed, make
from _tables import RESULTS, markdown, shape_text, write
from _timing import copies, interleaved, quartiles

OURS = "jaxbn"
LIBRARIES = [name for name in NAMES if name not in ("jaxbn jvp", "textbook")]
RELU = ("no", "yes")
FAMILY_SHAPES = "256x1024 32x28x28x128"
CPU_SHAPES = "256x1024 8192x512 32x56x56x64 32x28x28x128 32x7x7x2048 128x32x32x32"
GPU_SHAPES = "65536x1024 256x112x112x64 256x56x56x256 256x28x28x512 256x14x14x1024 "
GPU_SHAPES += "256x7x7x2048"
# Arrays of the size of x that have to be read or written.
TRANSFERS = dict(zip(MODES, (3, 8, 2), strict=True))


def measure(case: dict, names: list[str], rounds: int) -> dict:
    """The case with the quartiles of all libraries, and of the fastest copy."""
    runs = {n: make(n, **case) for n in names}
    ways = copies(case["shape"], case["dtype"])
    times = {k: quartiles(v) for k, v in interleaved(runs | ways, rounds).items()}
    copy = min((times[way] for way in ways), key=lambda q: q[1])
    jax.clear_caches()
    return case | {"copy": copy, "libraries": {n: times[n] for n in names}}


def row(case: dict, names: list[str]) -> list[str]:
    """The cells of a case: milliseconds, transfers, bandwidth, ratios to ours."""
    ours, copy = case["libraries"][OURS][1], case["copy"][1]
    cells = [f"{copy:.3g}", f"{ours:.3g}", f"{2 * ours / copy:.1f}"]
    cells.append(f"{TRANSFERS[case['mode']] / 2 * copy / ours:.0%}")
    kind = [case["mode"], shape_text(case["shape"]), case["dtype"], yes(case["relu"])]
    return [*kind, *cells, *(mean_ratio([case], n) for n in names if n != OURS)]


def means(cases: list[dict], names: list[str]) -> list[list[str]]:
    """A row for each kind of case: the geometric means over its shapes."""
    kinds: dict[tuple, list[dict]] = {}
    for case in cases:
        kind = case["mode"], case["dtype"], yes(case["relu"])
        kinds.setdefault(kind, []).append(case)
    others = [n for n in names if n != OURS]
    return [[*k, *(mean_ratio(found, n) for n in others)] for k, found in kinds.items()]


def mean_ratio(cases: list[dict], name: str) -> str:
    """A library's time over ours, the geometric mean of those cases that it has."""
    found = [c["libraries"] for c in cases if name in c["libraries"]]
    logs = [math.log(times[name][1] / times[OURS][1]) for times in found]
    return f"{math.exp(sum(logs) / len(logs)):.2f}" if logs else "–"


def yes(flag: bool) -> str:
    """A cell for it."""
    return "yes" if flag else ""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="large batches, on a GPU")
    parser.add_argument("--family", action="store_true", help="jaxbn's layers")
    parser.add_argument("--shapes", nargs="+", metavar="NxHxWxC")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--relu", nargs="+", default=RELU, choices=RELU)
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=NAMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--malloc",
        choices=("keep", "default"),
        default="keep",
        help="whether freed memory is kept for the next call, or as the system does",
    )
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    default = GPU_SHAPES if args.gpu else FAMILY_SHAPES if args.family else CPU_SHAPES
    args.shapes = [
        [int(n) for n in s.split("x")] for s in args.shapes or default.split()
    ]
    name = f"{'family' if args.family else 'speed'}_{'gpu' if args.gpu else 'cpu'}"
    args.out = args.out or RESULTS / f"{name}.json"
    args.libraries = [OURS, *(n for n in args.libraries if n != OURS)]
    return args


def family(args: argparse.Namespace) -> None:
    """Prints a table for each shape: the layers by dtype and mode."""
    cases = []
    for shape in args.shapes:
        kinds = itertools.product(args.dtypes, args.modes)
        alike = [measure_family(shape, *kind, args.rounds) for kind in kinds]
        print(f"\n{table(alike)}", flush=True)
        cases += alike
    store(args, cases)


def compare(args: argparse.Namespace) -> None:
    """Prints a row when it is known, and then the means."""
    names = installed(args.libraries)
    head = ["mode", "x", "dtype", "relu", "copy, ms", f"{OURS}, ms", "transfers"]
    head += ["of copy's bandwidth", *names[1:]]
    print(markdown(head, [], left=4))
    relu = [word == "yes" for word in args.relu]
    cases = []
    for values in itertools.product(args.modes, args.dtypes, relu, args.shapes):
        case = dict(zip(("mode", "dtype", "relu", "shape"), values, strict=True))
        here = [n for n in names if n != "torch channels first" or len(values[-1]) > 2]
        cases.append(measure(case, here, args.rounds))
        print("| " + " | ".join(row(cases[-1], names)) + " |", flush=True)
    print("\nGeometric means over the shapes:\n")
    print(markdown(["mode", "dtype", "relu", *names[1:]], means(cases, names), left=3))
    store(args, cases)


def store(args: argparse.Namespace, cases: list[dict]) -> None:
    """Writes them, and how they were measured."""
    options = {k: getattr(args, k) for k in ("rounds", "malloc", "gpu")}
    write(args.out, options, cases=cases)


def main() -> None:
    """Sets up JAX, and measures."""
    args = parse()
    if args.malloc == "keep":
        keep_memory()
    warn_if_busy()
    if not args.gpu:
        jax.config.update("jax_platforms", "cpu")
    (family if args.family else compare)(args)


if __name__ == "__main__":
    main()
