"""Are the pages' tables those of the results? Writes them, from `benchmarks/results`.

    python benchmarks/tables.py
    python benchmarks/tables.py --check

On `PAGES`, a table stands between `<!-- table: NAME -->` and `<!-- /table -->`, NAME
being one of `TABLES`. With `--check` nothing is written, and the exit status says
whether it had to.
"""

import argparse
import pathlib
import re
import sys

from _devices import TARGETS
from _family import table as family_table
from _network_tables import gpu_layers, networks, ratios
from _tables import markdown, read, shape_text
from speed import OURS, mean_ratio

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / name for name in ("README.md", "docs/numerics.md", "docs/performance.md")
]
# Columns of the table of speed, by the libraries that they are of.
PEERS = {
    "native": "jaxbn native",
    "flax": "linen",
    "haiku": "haiku",
    "equinox": "equinox",
    "keras": "keras",
    "torch": "torch",
}
MODE = "forward+backward"
COMPILED = {"jaxbn": "jaxbn", "flax": "linen", "textbook": "textbook"}
DEVICES = {"cpu": "CPU", "h200": "H200", "v5e": "TPU v5e"}
KINDS = [("bfloat16", False), ("bfloat16", True), ("float32", False), ("float32", True)]


def speed() -> str:
    """Milliseconds of ours and ratios of the others, without a relu."""
    found = read("speed_cpu")
    cases = [_with_best_torch(c) for c in found["cases"] if _is_plain(c)]
    peers = {k: n for k, n in PEERS.items() if any(n in c["libraries"] for c in cases)}
    rows = []
    for case in sorted(cases, key=lambda c: c["dtype"]):
        ratios = [mean_ratio([case], name) for name in peers.values()]
        ms = f"{case['libraries'][OURS][1]:.3g}"
        rows.append([shape_text(case["shape"]), case["dtype"], ms, *ratios])
    for dtype in sorted({case["dtype"] for case in cases}):
        alike = [case for case in cases if case["dtype"] == dtype]
        means = [mean_ratio(alike, name) for name in peers.values()]
        rows.append(["geometric mean", dtype, "", *means])
    table = markdown(["x", "dtype", "jaxbn, ms", *peers], rows, left=2)
    return f"{table}\n\n{_setting(found)}"


def compiled() -> str:
    """Transfers of a step by target and library, and its all-reduces."""
    rows = []
    for target in TARGETS:
        cases = read(f"compiled_{target}")["cases"]
        for label, name in COMPILED.items():
            of = {(c["dtype"], c["relu"]): c for c in cases if c["library"] == name}
            moved = [f"{of[kind]['transfers']:.1f}" for kind in KINDS]
            reduces = sorted({c["all_reduces"] for c in of.values()})
            between = "–".join(map(str, dict.fromkeys((reduces[0], reduces[-1]))))
            rows.append([DEVICES[target], label, *moved, between])
    kinds = [f"{dtype}{' + relu' if relu else ''}" for dtype, relu in KINDS]
    return markdown(["compiled for", "", *kinds, "all-reduces"], rows, left=2)


def comparison() -> str:
    """What each library does on hard inputs."""
    rows = read("comparison")["rows"]
    return markdown(rows[0], [row.values() for row in rows])


def means() -> str:
    """Ratios to ours, the means over the shapes, for every kind of case."""
    cases = [_with_best_torch(c) for c in read("speed_cpu")["cases"]]
    kinds = dict.fromkeys((c["mode"], c["dtype"], c["relu"]) for c in cases)
    rows = []
    for mode, dtype, relu in kinds:
        kind = (mode, dtype, relu)
        alike = [c for c in cases if (c["mode"], c["dtype"], c["relu"]) == kind]
        ratios = [mean_ratio(alike, name) for name in PEERS.values()]
        rows.append([mode, dtype, "yes" if relu else "", *ratios])
    return markdown(["", "dtype", "relu", *PEERS], rows, left=3)


def family() -> str:
    """jaxbn's layers relative to `standard`."""
    found = read("family_cpu")
    return f"{family_table(found['cases'])}\n\n{_setting(found)}"


def resnet() -> str:
    """Time and memory of a step of a whole network."""
    found = read("resnet_cpu")
    first = found["cases"][0]["step_ms"][1]
    rows = []
    for case in found["cases"]:
        ms = case["step_ms"][1]
        cells = f"{ms:.0f}", f"{ms / first:.2f}", case["memory_mib"]
        rows.append([case["library"], *cells])
    return markdown(["", "step, ms", "relative", "memory, MiB"], rows)


def accuracy() -> str:
    """Errors of the variance, a column for each library."""
    rows = read("accuracy")["libraries"]
    return _errors(rows, left=1)


def shifts() -> str:
    """Errors of the variance, a column for each distance of the shift."""
    others = ("flax default", "two passes")
    rows = read("accuracy")["ways"]
    kept = [{k: v for k, v in row.items() if k not in others} for row in rows]
    return _errors(kept, left=0)


def _errors(rows: list[dict], left: int) -> str:
    def cell(name: str, value) -> str:
        if isinstance(value, str):
            return value
        return f"{value:g}" if name == "mean/std" else f"{value:.0e}"

    return markdown(rows[0], [[cell(*i) for i in row.items()] for row in rows], left)


TABLES = {
    "speed": speed,
    "compiled": compiled,
    "comparison": comparison,
    "means": means,
    "family": family,
    "resnet": resnet,
    "accuracy": accuracy,
    "shifts": shifts,
    "ratios": ratios,
    "networks": networks,
    "gpu": gpu_layers,
}


def rendered(page: str) -> str:
    """The page with its tables written again."""

    def table(found: re.Match) -> str:
        return f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}"

    block = r"(<!-- table: (\w+) -->)\n.*?(<!-- /table -->)"
    return re.sub(block, table, page, flags=re.DOTALL)


def _is_plain(case: dict) -> bool:
    return case["mode"] == MODE and not case["relu"]


def _with_best_torch(case: dict) -> dict:
    """With the faster of torch's two layouts as torch."""
    times = dict(case["libraries"])
    layouts = [v for name, v in times.items() if name.startswith("torch")]
    if layouts:
        times["torch"] = min(layouts, key=lambda quartiles: quartiles[1])
    return case | {"libraries": times}


def _setting(found: dict) -> str:
    """What the times are of, in a line."""
    machine, versions = found["machine"], found["versions"]
    names = ("jax", "flax", "dm-haiku", "equinox", "keras", "torch")
    known = ", ".join(f"{n} {versions[n]}" for n in names if n in versions)
    rounds = f"medians of {found['options']['rounds']} rounds"
    return f"{machine['cpu']}, {machine['cores']} cores; {rounds}; {known}."


def main() -> None:
    """Writes the pages, or says which should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    made = {page: rendered(page.read_text()) for page in PAGES}
    old = [page.name for page, new in made.items() if new != page.read_text()]
    if args.check:
        if old:
            advice = "Run python benchmarks/tables.py"
            sys.exit(f"Not up to date: {', '.join(old)}. {advice}")
        return
    for page, new in made.items():
        page.write_text(new)


if __name__ == "__main__":
    main()
