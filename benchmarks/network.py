"""What does a training step of a whole network cost, beside Flax's and without norms?

Prints a Markdown table and writes JSON for each target whose compiler is installed:

    python benchmarks/network.py cpu h200 v5e
    python benchmarks/network.py h200 --networks critic --dtypes bfloat16

The second command stores its cases with those of earlier runs of the same versions.

A step is the gradients of all parameters, and the new statistics. Its program is
compiled, not run, and no GPU or TPU is needed: what its kernels read and write, each
operand once, has no noise, and is not a time. "none" is the network without its norms:
what they cost is the difference. All-reduces are those of the step with its batch split
over four devices, under `jax.jit`.
"""

import argparse
import collections
import functools
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

# Before JAX is imported: no device is to be looked for, neither here nor by libtpu.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import flax.linen as nn
import jax
import jax.numpy as jnp
from _compiled import compile_for, cost_of, traced_for
from _devices import TARGETS, devices, installed
from _machine import versions
from _networks import NETWORKS, Net
from _programs import KINDS, kernels
from _tables import RESULTS, markdown, write

import jaxbn.linen

DTYPES = ("bfloat16", "float32")
# Of the images (or rows), batch and size: as many as such a device would have.
SHAPES = {
    "ResNet-50": {"cpu": (32, 224), "h200": (256, 224), "v5e": (64, 224)},
    "MobileNetV2": {"cpu": (32, 224), "h200": (256, 224), "v5e": (64, 224)},
    "EfficientNet-B0": {"cpu": (32, 224), "h200": (256, 224), "v5e": (64, 224)},
    "DenseNet-121": {"cpu": (32, 224), "h200": (256, 224), "v5e": (64, 224)},
    "critic": {"cpu": (256, 32), "h200": (256, 32), "v5e": (256, 32)},
    "U-Net": {"cpu": (4, 256), "h200": (32, 256), "v5e": (8, 256)},
}
# Fields that make each network small, to try the script.
SMALL = {
    "ResNet-50": {"blocks": (1, 1), "width": 4},
    "MobileNetV2": {"stages": ((1, 4, 1, 1), (6, 8, 2, 2)), "ends": (4, 16)},
    "EfficientNet-B0": {"stages": ((1, 4, 1, 1, 3), (6, 8, 2, 2, 5)), "ends": (4, 16)},
    "DenseNet-121": {"blocks": (2, 2), "growth": 4},
    "critic": {"width": 8, "depth": 2},
    "U-Net": {"width": 4, "depth": 2},
}
DEVICES = 4
TIMES = ("trace_s", "lower_s", "compile_s")
HEAD = ("network", "library", "dtype", *KINDS, "total", "kernels", "scratch")
HEAD += ("all_reduces", *TIMES)
GIB = 2**30


def no_norm() -> Callable:
    """In place of a norm."""
    return lambda x, mask=None: x


def norms(dtype: Any) -> dict[str, Callable[[], Callable]]:
    """The norm of each library."""
    options = {"use_running_average": False, "dtype": dtype}
    return {
        "jaxbn": functools.partial(jaxbn.linen.BatchNorm, **options),
        "flax": functools.partial(nn.BatchNorm, **options),
        "none": no_norm,
    }


LIBRARIES = tuple(norms(None))


def step_of(net: Net) -> Callable:
    """`(variables, *inputs)` to the gradients and the new statistics."""

    def loss(params, rest, inputs):
        given = {"params": params, **rest}
        scores, new = net.apply(given, *inputs, mutable=["batch_stats"])
        return jnp.square(scores.astype(jnp.float32)).mean(), new

    def step(variables, *inputs):
        rest = {k: v for k, v in variables.items() if k != "params"}
        return jax.grad(loss, has_aux=True)(variables["params"], rest, inputs)

    return step


def inputs_of(name: str, shape: tuple[int, int], dtype: Any) -> tuple:
    """What the network is called with, as shapes."""
    batch, size = shape
    if name == "critic":
        return (jax.ShapeDtypeStruct((batch, size), dtype),)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), dtype)
    mask = jax.ShapeDtypeStruct((batch, size, size, 1), jnp.bool_)
    return (images, mask) if name == "U-Net" else (images,)


def measure(
    name: str, library: str, target: str, dtype: str, shape=None, **fields
) -> dict:
    """What is stored of a case; `fields` make the network small."""
    net = NETWORKS[name](norms(dtype)[library], jnp.dtype(dtype), **fields)
    inputs = inputs_of(name, shape or SHAPES[name][target], dtype)
    variables = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    given = step_of(net), (variables, *inputs)
    seconds = [time.perf_counter()]

    def timed(made: Any) -> Any:
        seconds.append(time.perf_counter())
        return made

    traced = timed(traced_for(*given, devices(target)))
    compiled = timed(timed(traced.lower()).compile())
    found = {"network": name, "library": library, "dtype": dtype}
    found |= {k: round(v / GIB, 4) for k, v in moved(compiled).items()}
    cost = cost_of(compiled)
    found |= {"total": round(cost.bytes / GIB, 4), "kernels": cost.kernels}
    found |= {"scratch": round(cost.scratch / GIB, 3)}
    if library != "none":
        split = compile_for(*given, devices(target, DEVICES), whole=(0,))
        found["all_reduces"] = cost_of(split).all_reduces
    spans = zip(TIMES, itertools.pairwise(seconds), strict=True)
    return found | {word: round(b - a, 2) for word, (a, b) in spans}


def moved(compiled: Any) -> dict[str, int]:
    """Bytes by the kinds of kernels."""
    total = collections.Counter(dict.fromkeys(KINDS, 0))
    for kernel in kernels(compiled.as_text()):
        total[kernel.kind] += kernel.bytes
    return {kind: total[kind] for kind in KINDS}


def _compilers(found: dict[str, str]) -> dict[str, str]:
    """The versions that decide what a program is."""
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "flax")
    return {name: found[name] for name in names if name in found}


class Store:
    """The file of a target: cases in the order of NETWORKS, each once."""

    def __init__(self, folder: pathlib.Path, target: str, small: bool) -> None:
        self.path, self.target = folder / f"network_{target}.json", target
        self.options: dict[str, Any] = {"small": small}
        self.cases: dict[tuple, dict] = {}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            same = found["options"]["small"] == small
            if same and _compilers(found["versions"]) == _compilers(versions()):
                self.cases = {self.key(case): case for case in found["cases"]}

    def key(self, case: dict) -> tuple:
        """What tells a case from others."""
        return tuple(case[word] for word in ("network", "dtype", "library"))

    def add(self, case: dict) -> None:
        """Writes the file after each case, as all of them take an hour."""
        self.cases[self.key(case)] = case
        order = [*itertools.product(NETWORKS, DTYPES, LIBRARIES)]
        cases = sorted(self.cases.values(), key=lambda c: order.index(self.key(c)))
        there = dict.fromkeys(case["network"] for case in cases)
        shapes = {name: SHAPES[name][self.target] for name in there}
        write(self.path, {**self.options, "shapes": shapes}, cases=cases)


def main() -> None:
    """Prints a row when it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target", default=list(TARGETS))
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=LIBRARIES)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--small", action="store_true", help="small networks, as a try")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="a folder")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(unknown)}: there are {', '.join(TARGETS)}")
    for target in installed(args.targets):
        print(f"\nGiB of a step, compiled for {target}\n")
        print(markdown(HEAD, [], left=3))
        store = Store(args.out, target, args.small)
        kinds = itertools.product(args.networks, args.dtypes, args.libraries)
        for name, dtype, library in kinds:
            small = {"shape": (4, 32), **SMALL[name]} if args.small else {}
            case = measure(name, library, target, dtype, **small)
            cells = (str(case.get(word, "")) for word in HEAD)
            print("| " + " | ".join(cells) + " |", flush=True)
            store.add(case)
            jax.clear_caches()


if __name__ == "__main__":
    main()
