"""The pages' tables of whole networks, and of a GPU."""

from _programs import KINDS
from _tables import markdown, read, shape_text, three_digits

TARGETS = {"h200": "H200", "v5e": "TPU v5e", "cpu": "CPU"}
DTYPES = ("bfloat16", "float32")
LIBRARIES = ("jaxbn", "flax", "none")
NO_GPU = (
    "jaxbn has not been timed on a GPU yet. `python benchmarks/gpu.py` does this on an "
    "NVIDIA GPU, and `python benchmarks/tables.py` then writes the table here."
)


def ratios() -> str:
    """What a step moves in all, relative to Flax's: a column for each target."""
    found = {target: _cases(target) for target in TARGETS}
    names = dict.fromkeys(name for cases in found.values() for name, _, _ in cases)
    columns = [(target, dtype) for target in TARGETS for dtype in DTYPES]
    rows = [
        [name, *(_ratio(found[target], name, dtype) for target, dtype in columns)]
        for name in names
    ]
    head = [f"{TARGETS[target]}, {dtype}" for target, dtype in columns]
    return markdown(["network", *head], rows)


def networks() -> str:
    """A table for each target: GiB by kinds of kernels, and the rest that is known."""
    sizes = [*KINDS, "total", "scratch"]
    counts = {"kernels": "kernels", "all_reduces": "all-reduces"}
    head = ["network", "dtype", "norm", *KINDS, "all", "scratch", *counts.values()]
    tables = []
    for target, shown in TARGETS.items():
        rows = [
            [
                *kind,
                *(three_digits(case[size]) for size in sizes),
                *(case.get(count, "") for count in counts),
            ]
            for kind, case in _cases(target).items()
        ]
        if rows:
            tables.append(f"{shown}:\n\n{markdown(head, rows, left=3)}")
    return "\n\n".join(tables)


def gpu_layers() -> str:
    """Milliseconds of a layer on a GPU, and the share of a copy's bandwidth."""
    found = read("gpu")
    if found is None:
        return NO_GPU
    rows = []
    for case in found["layers"]:
        ours, flax = (case["libraries"][name][1] for name in ("jaxbn", "linen"))
        share = f"{8 / 2 * case['copy'][1] / ours:.0%}"  # Of the eight transfers.
        kind = [shape_text(case["shape"]), case["dtype"], "yes" if case["relu"] else ""]
        rows.append([*kind, f"{ours:.3g}", f"{flax / ours:.2f}", share])
    head = ["x", "dtype", "relu", "jaxbn, ms", "flax", "of a copy's bandwidth"]
    steps = [
        f"A step of ResNet-50 with {case['library']}: {case['step_ms'][1]:.1f} ms."
        for case in found["networks"]
    ]
    where = f"{found['machine'].get('accelerator', found['machine']['cpu'])}."
    return "\n\n".join([markdown(head, rows, left=3), " ".join([*steps, where])])


def _cases(target: str) -> dict[tuple[str, str, str], dict]:
    """By network, dtype and library."""
    found = read(f"network_{target}")
    if found is None:
        return {}
    return {(c["network"], c["dtype"], c["library"]): c for c in found["cases"]}


def _ratio(cases: dict, name: str, dtype: str) -> str:
    ours, flax, without = (cases.get((name, dtype, library)) for library in LIBRARIES)
    if not (ours and flax):
        return "–"
    ratio = f"{ours['total'] / flax['total']:.2f}"
    if not without:
        return ratio
    norms = (ours["total"] - without["total"]) / (flax["total"] - without["total"])
    return f"{ratio} ({norms:.2f})"
