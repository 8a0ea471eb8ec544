"""What does a training step of a ResNet-50 cost, by whose batch norm it has?

Prints a Markdown table and writes JSON: time of a step, the memory that the compiled
step needs (arguments and results among it), and the time it takes to compile.

    python benchmarks/resnet.py
    python benchmarks/resnet.py --gpu

The network is `_networks.ResNet`. On a CPU it is narrower, and its images are smaller.
All of it but the batch norm is Flax's; the steps of the networks are timed in turn.
"""

import argparse
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _layers import LAYERS
from _machine import keep_memory, warn_if_busy
from _networks import CLASSES, ResNet
from _peers import Run, installed
from _tables import RESULTS, markdown, write
from _timing import interleaved, quartiles

LIBRARIES = ("jaxbn", "jaxbn native", "linen")
RATE = 0.1


class Norm(nn.Module):
    """A layer of a library, whose parameters and statistics Flax keeps."""

    library: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The output in training; the running statistics move."""
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        train = LAYERS[self.library]().train
        y, (mean.value, var.value) = train(x, scale, bias, mean.value, var.value)
        return y


def sgd_step(net: nn.Module) -> Callable:
    """`(variables, images, labels)` to new variables."""

    def step(variables, images, labels):
        def loss(params):
            given = variables | {"params": params}
            scores, new = net.apply(given, images, mutable=["batch_stats"])
            log = jax.nn.log_softmax(scores.astype(jnp.float32))
            return -jnp.take_along_axis(log, labels[:, None], 1).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - RATE * g, variables["params"], grads)
        return {"params": params, **new}

    return step


def start(net: nn.Module, images: jax.Array) -> Any:
    """Random kernels and fresh statistics, without compiling the network for it."""
    rng = np.random.default_rng(0)

    def fill(path, leaf) -> jax.Array:
        if leaf.ndim > 1:
            kernel = rng.standard_normal(leaf.shape, np.float32)
            return jnp.asarray(kernel * math.sqrt(2 / math.prod(leaf.shape[:-1])))
        return jnp.full(leaf.shape, float(path[-1].key in ("scale", "var")))

    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def prepare(library: str, args: argparse.Namespace) -> tuple[Run, dict]:
    """Steps to time, and what is known without a clock, or from compiling."""
    dtype = jnp.dtype(args.dtype)
    norm = functools.partial(Norm, library)
    net = ResNet(norm, dtype, blocks=tuple(args.blocks), width=args.width)
    shape = (args.batch, args.size, args.size, 3)
    images = jax.random.normal(jax.random.key(0), shape, dtype)
    labels = jnp.arange(args.batch) % CLASSES
    variables = start(net, images)
    # The new variables take the place of the old ones.
    lowered = jax.jit(sgd_step(net), donate_argnums=0).lower(variables, images, labels)
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
    needed += memory.temp_size_in_bytes - memory.alias_size_in_bytes

    def run(n: int) -> None:
        nonlocal variables
        for _ in range(n):
            variables = compiled(variables, images, labels)
        jax.block_until_ready(variables)

    found = {"library": library, "memory_mib": round(needed / 2**20, 1)}
    return run, found | {"compile_s": round(seconds, 1)}


def parse() -> argparse.Namespace:
    """The command line; sizes not given are those of the device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="full size, on a GPU")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, help="of an image")
    parser.add_argument("--width", type=int, help="of the first stage; ResNet-50: 64")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 4, 6, 3])
    parser.add_argument("--dtype")
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=LAYERS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    sizes = {"batch": 16, "size": 96, "width": 16, "dtype": "float32"}
    if args.gpu:
        sizes = {"batch": 256, "size": 224, "width": 64, "dtype": "bfloat16"}
    for name, value in sizes.items():
        setattr(args, name, getattr(args, name) or value)
    args.out = args.out or RESULTS / f"resnet_{'gpu' if args.gpu else 'cpu'}.json"
    return args


def main() -> None:
    """Prints the table."""
    args = parse()
    if args.malloc == "keep":
        keep_memory()
    warn_if_busy()
    if not args.gpu:
        jax.config.update("jax_platforms", "cpu")
    names = installed(args.libraries)
    runs, cases = zip(*(prepare(name, args) for name in names), strict=True)
    times = interleaved(dict(zip(names, runs, strict=True)), args.rounds)
    for case in cases:
        case["step_ms"] = quartiles(times[case["library"]])
    head = ["library", "step, ms", f"× {names[0]}", "memory, MiB", "compiling, s"]
    first, rows = cases[0]["step_ms"][1], []
    for case in cases:
        ms = case["step_ms"][1]
        cells = [f"{ms:.1f}", f"{ms / first:.2f}"]
        rows.append([case["library"], *cells, case["memory_mib"], case["compile_s"]])
    print(markdown(head, rows))
    sizes = ("batch", "size", "width", "blocks", "dtype", "rounds", "malloc", "gpu")
    options = {name: getattr(args, name) for name in sizes}
    write(args.out, options, cases=list(cases))


if __name__ == "__main__":
    main()
