"""What does a compiled layer cost, beside Flax's and a textbook's?

Prints a Markdown table and writes JSON for each target whose compiler is installed:

    python benchmarks/compiled.py cpu h200 v5e

Transfers are the bytes that the kernels of a forward and backward pass read and write,
each operand once, in arrays of the size of x; scratch memory is counted in the same
unit. All-reduces are of the same step with its batch split over four devices, under
`jax.jit`. Nothing is run, and no GPU or TPU is needed; these figures have no noise, and
are not times either.
"""

import argparse
import itertools
import math
import os
import pathlib

# Before JAX is imported: no device is to be looked for, neither here nor by libtpu.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp
from _compiled import Cost, cost
from _devices import TARGETS, devices, installed
from _layers import LAYERS
from _peers import step
from _tables import RESULTS, markdown, shape_text, write

LIBRARIES = ("jaxbn", "jaxbn jvp", "jaxbn two passes", "linen", "textbook")
DTYPES = ("bfloat16", "float32")
SHAPES = {"cpu": "32x28x28x128", "h200": "256x56x56x64", "v5e": "256x56x56x64"}
DEVICES = 4


def layer_cost(name: str, target: str, shape, dtype, relu: bool, count=1) -> Cost:
    """Of a layer's forward and backward pass, its batch split over `count` devices."""
    given = jax.ShapeDtypeStruct(shape, dtype)
    vector = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    f = step(LAYERS[name](), relu, "forward+backward")
    return cost(f, (given, *[vector] * 4, given), devices(target, count))


def measure(name: str, target: str, shape, dtype: str, relu: bool) -> dict:
    """What is stored of a case."""
    given = target, shape, dtype, relu
    found, split = (layer_cost(name, *given, count) for count in (1, DEVICES))
    one = math.prod(shape) * jnp.dtype(dtype).itemsize
    return {
        "library": name,
        "dtype": dtype,
        "relu": relu,
        "transfers": round(found.bytes / one, 2),
        "kernels": found.kernels,
        "scratch": round(found.scratch / one, 2),
        "all_reduces": split.all_reduces,
    }


def main() -> None:
    """Prints a target's table when it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target", default=list(TARGETS))
    parser.add_argument("--shape", metavar="NxHxWxC", help="in place of each target's")
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=LAYERS)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="a folder")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(unknown)}: there are {', '.join(TARGETS)}")
    for target in installed(args.targets):
        shape = [int(n) for n in (args.shape or SHAPES[target]).split("x")]
        kinds = itertools.product(args.libraries, DTYPES, (False, True))
        cases = [measure(n, target, shape, d, r) for n, d, r in kinds]
        print(f"\n{shape_text(shape)} compiled for {target}\n")
        print(markdown(cases[0], [case.values() for case in cases], left=3))
        write(args.out / f"compiled_{target}.json", {"shape": shape}, cases=cases)


if __name__ == "__main__":
    main()
