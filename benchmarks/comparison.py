"""What batch norms of six libraries do on hard inputs, measured: the README's table.

    python benchmarks/comparison.py

Each row is one question, put to every library with its default settings, in float32 on
a CPU; only the guard against infinity is switched on where there is one. A library that
has no argument for a question has a dash. Those that are missing here
(`make peers` installs them) are left out. Writes JSON, from which `tables.py` makes the
table.
"""

import argparse
import os
import pathlib
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")

import _comparison
import jax
import numpy as np
from _tables import RESULTS, markdown, write

NONE = "–"
FEATURES = 8
DEVICES = 4


def data(seed: int = 0, rows: int = 64, mean: float = 0.0) -> np.ndarray:
    """A batch with features of standard deviation 1."""
    rng = np.random.default_rng(seed)
    return (mean + rng.standard_normal((rows, FEATURES))).astype(np.float32)


def first_variance(library: Any) -> str:
    """The variance that the first batch is normalized by is seen in its output."""
    x = data(mean=1000.0, rows=4096)
    y = np.asarray(library.train(x).y, np.float64)
    true = np.var(x.astype(np.float64), 0)
    used = true / np.var(y, 0) - library.epsilon
    error = np.max(np.abs(used / true - 1))
    if error < 1e-4:
        return "exact"
    # The last digits depend on the machine and on the version of XLA.
    bound = next((b for b in (50, 5, 1) if 100 * error > b), 0)
    return f"more than {bound} % off"


def nan_under_the_mask(library: Any) -> str:
    """Whether what is not masked, and its gradients, are finite."""
    if not library.has_mask:
        return NONE
    x, mask = data(), np.arange(64) != 3
    x[3] = np.nan
    out = library.train(x, mask, gradient=True)
    rest = [out.y[mask], out.mean, out.var, out.gradient[mask]]
    return "right" if all(np.isfinite(a).all() for a in rest) else "NaN"


def all_masked(library: Any) -> str:
    """What becomes of mean 0 and variance 1."""
    if not library.has_mask:
        return NONE
    out = library.train(data(), np.zeros(64, bool))
    if not np.isfinite([out.mean, out.var]).all():
        return "NaN"
    same = np.allclose(out.mean, 0) and np.allclose(out.var, 1)
    return "unchanged" if same else "moved"


def masks_over_devices(library: Any) -> str:
    """The first device has one example of sixteen, the others have all."""
    if not (library.has_mask and library.has_devices):
        return NONE
    x, mask = data(mean=1.0), np.ones(64, bool)
    x[:16] += 5
    mask[1:16] = False
    found = library.train_on_devices(x, mask, DEVICES)
    true = x[mask].astype(np.float64).mean(0)
    error = np.max(np.abs(found - true) / x[mask].std(0))
    return "exact" if error < 1e-4 else f"{error:.1f} std off"


def one_bad_batch(library: Any) -> str:
    """With the guard of a library that has one."""
    x = data()
    x[3, 2] = np.inf
    out = library.train(x, guarded=True)
    return "kept" if np.isfinite([out.mean, out.var]).all() else "NaN for good"


def kept_for_backward(library: Any) -> str:
    """The bytes, relative to the input's."""
    x = data(rows=4096)
    return f"{library.residuals(x) / x.nbytes:.1f} × x"


ROWS: dict[str, Callable[[Any], str]] = {
    "Variance of the first batch, mean/std = 1000": first_variance,
    "Rest of the batch and its gradients, NaN under the mask": nan_under_the_mask,
    "Running statistics after a batch that is all masked": all_masked,
    "Mean over 4 devices with different masks": masks_over_devices,
    "Running statistics after infinity, guarded (`skip_nonfinite`)": one_bad_batch,
    "Kept for the backward pass": kept_for_backward,
}


def answers() -> list[dict[str, str]]:
    """A row for each question: the library's name and what it does."""
    libraries = _comparison.installed()
    return [
        {"": row} | {library.name: ask(library) for library in libraries}
        for row, ask in ROWS.items()
    ]


def main() -> None:
    """Prints the table, and stores it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="a folder")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    rows = answers()
    print(markdown(rows[0], [row.values() for row in rows]))
    write(args.out / "comparison.json", {}, rows=rows)


if __name__ == "__main__":
    main()
