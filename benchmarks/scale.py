"""How does a layer's cost grow with the batch, with the channels, and with devices?

Prints four Markdown tables and writes JSON:

    python benchmarks/scale.py
    python benchmarks/scale.py --gpu

Batch and channels: milliseconds of forward and backward in float32, at a fixed number
of channels and of elements. Devices: how many all-reduces the compiled step issues and
how many bytes they sum, its batch split over simulated devices under `jax.jit`; their
times would say nothing, as they share one CPU.

Shapes: the CPU kernels beside XLA, on every kind of shape (`_sweep`); not with `--gpu`.
"""

import argparse
import contextlib
import pathlib

import jax
from _compiled import all_reduced, compile_for
from _layers import LAYERS
from _machine import keep_memory, warn_if_busy
from _peers import NAMES, installed, make, step
from _sweep import CHANNELS as SWEEP_CHANNELS
from _sweep import HEAD, ROWS, cells, sweep
from _tables import RESULTS, markdown, write
from _timing import interleaved, quartiles
from jax.extend import backend

COUNT = "jax_num_cpu_devices"
MODE, DTYPE = "forward+backward", "float32"
LIBRARIES = ("jaxbn", "jaxbn two passes", "jaxbn native", "linen", "torch")
CHANNELS = 256
BATCHES = (64, 256, 1024, 4096, 16384)
WIDTHS = (16, 64, 256, 1024, 4096)
ELEMENTS = 2**22
DEVICES = (1, 2, 4, 8)


def times(shape: tuple[int, int], names: list[str], rounds: int) -> dict:
    """A row of quartiles, in milliseconds."""
    runs = {name: make(name, shape, DTYPE, False, MODE) for name in names}
    found = {name: quartiles(ms) for name, ms in interleaved(runs, rounds).items()}
    jax.clear_caches()
    return {"batch": shape[0], "channels": shape[1]} | found


def reduces(count: int, names: list[str]) -> dict:
    """A row of the all-reduces of a step on `count` devices."""
    x = jax.ShapeDtypeStruct((8 * count, 4, 4, CHANNELS), DTYPE)
    vector = jax.ShapeDtypeStruct((CHANNELS,), DTYPE)
    given = x, *[vector] * 4, x
    row: dict = {"devices": count}
    for name in names:
        f = step(LAYERS[name](), False, MODE)
        compiled = compile_for(f, given, jax.devices()[:count])
        found = all_reduced(compiled.as_text())
        row[name] = {"count": len(found), "bytes": sum(found)}
    return row


@contextlib.contextmanager
def simulated(count: int):
    """So many CPU devices; what is measured later has one, with all threads."""
    before = {name: getattr(jax.config, name) for name in ("jax_platforms", COUNT)}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update(COUNT, count)
    yield
    backend.clear_backends()
    for name, value in before.items():
        jax.config.update(name, value)


def show(title: str, rows: list[dict]) -> None:
    """Prints a table."""

    def cell(value) -> str:
        if isinstance(value, dict):
            return f"{value['count']}, {value['bytes']} B"
        return f"{value[1]:.3g}" if isinstance(value, list) else str(value)

    lines = [map(cell, row.values()) for row in rows]
    print(f"\n{title}\n\n{markdown(rows[0], lines)}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--channels", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--devices", type=int, nargs="*", default=DEVICES)
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=NAMES)
    parser.add_argument("--sweep-rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--sweep-channels", type=int, nargs="*", default=SWEEP_CHANNELS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    args.out = args.out or RESULTS / f"scale_{'gpu' if args.gpu else 'cpu'}.json"
    return args


def main() -> None:
    """Prints each table when it is known."""
    args = parse()
    if args.malloc == "keep":
        keep_memory()
    warn_if_busy()
    with simulated(max(args.devices, default=1)):
        compiled = [name for name in installed(args.libraries) if name in LAYERS]
        devices = [reduces(count, compiled) for count in args.devices]
    if not args.gpu:
        jax.config.update("jax_platforms", "cpu")
    names = installed(args.libraries)
    show("All-reduces, and the bytes that they sum", devices)
    shapes = {
        "batch": [(n, CHANNELS) for n in args.batches],
        "channels": [(args.elements // c, c) for c in args.channels],
    }
    found = {k: [times(s, names, args.rounds) for s in v] for k, v in shapes.items()}
    for kind, rows in found.items():
        show(f"Milliseconds against {kind}", rows)
    shapes = []
    if installed(["jaxbn native"]):
        shapes = sweep(args.sweep_rows, args.sweep_channels, args.rounds)
        lines = markdown(HEAD, map(cells, shapes), left=4)
        print(f"\nOf XLA's time, by shape\n\n{lines}", flush=True)
    options = {k: getattr(args, k) for k in ("rounds", "malloc", "gpu")}
    write(args.out, options, devices=devices, **found, shapes=shapes)


if __name__ == "__main__":
    main()
