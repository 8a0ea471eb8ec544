"""The memory of training: what batch norm keeps for the backward pass, beside Flax's.

Prints a Markdown table of a network of blocks, each a 3×3 convolution of equal width, a
batch norm and a leaky ReLU; memory is in arrays of the size of an activation:

    python benchmarks/memory.py cpu v5e --blocks 16 --shape 256 56 56 64

"kept" is what `jax.vjp` hands to the backward pass. A compiler may compute some of it
again, or keep more: "scratch" is what a compiled step of training needs beside its
arguments and results. Nothing is run, and no GPU or TPU is needed.
"""

import argparse
import os
from typing import Any

# Before JAX is imported: no device is to be looked for, neither here nor by libtpu.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _devices import TARGETS, device, installed
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import SingleDeviceSharding

import jaxbn

KINDS = ("flax", "standard", "in_place", "checkpoint")
DTYPES = ("float32", "bfloat16")
STANDARD, IN_PLACE = jaxbn.layers.standard(), jaxbn.layers.in_place()
BLOCKS = 16
SHAPE = (256, 56, 56, 64)
# By default the CPU's compiler orders operations for speed, and keeps more alive.
SCHEDULER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def norm(kind: str, params, state, x):
    """Batch norm and leaky ReLU in training, and the new running statistics."""
    if kind == "in_place":
        return IN_PLACE.apply(params, state, x, training=True)
    if kind == "flax":
        given = {"params": params, "batch_stats": state}
        module = nn.BatchNorm(use_running_average=False, dtype=x.dtype)
        y, new = module.apply(given, x, mutable=["batch_stats"])
        state = new["batch_stats"]
    else:
        y, state = STANDARD.apply(params, state, x, training=True)
    return jax.nn.leaky_relu(y, 0.01), state


def network(kind: str):
    """`apply(params, state, x) -> (y, new state)` of blocks, as many as `params`."""

    def apply(params, state, x):
        new = []
        for (kernel, affine), s in zip(params, state, strict=True):
            kernel = kernel.astype(x.dtype)
            same = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
            x = lax.conv_general_dilated(x, kernel, (1, 1), **same)
            x, s = norm(kind, affine, s, checkpoint_name(x, "conv"))
            new.append(s)
        return x, new

    if kind == "checkpoint":
        # Around all blocks at once: around each, the input of each would be kept too.
        keep = jax.checkpoint_policies.save_only_these_names("conv")
        apply = jax.checkpoint(apply, policy=keep)
    return apply


def arguments(kind: str, shape, dtype, blocks: int):
    """Shapes and dtypes of parameters, running statistics and input."""
    struct, width = jax.ShapeDtypeStruct, shape[-1]
    kernel, vector = (struct(s, "float32") for s in ((3, 3, width, width), (width,)))
    affine, state = {"scale": vector, "bias": vector}, {"mean": vector, "var": vector}
    if kind != "flax":
        state = jax.eval_shape(lambda: jaxbn.init_stats(width))
    return [(kernel, affine)] * blocks, [state] * blocks, struct(shape, dtype)


def kept_bytes(kind: str, shape, dtype, blocks: int = BLOCKS) -> int:
    """Of all that the backward pass is handed, parameters and input among it."""

    def backward(params, state, x):
        apply = network(kind)
        return jax.vjp(lambda p: apply(p, state, x), params, has_aux=True)[1]

    kept = jax.eval_shape(backward, *arguments(kind, shape, dtype, blocks))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept))


def scratch_bytes(kind: str, shape, dtype, target: str, blocks: int = BLOCKS) -> int:
    """That a compiled step of SGD needs beside its arguments and results."""

    def step(params, state, x):
        def loss(params):
            y, new = network(kind)(params, state, x)
            return jnp.mean(y.astype(jnp.float32) ** 2), new

        (_, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new

    step = jax.jit(step, in_shardings=SingleDeviceSharding(device(target)))
    lowered = step.lower(*arguments(kind, shape, dtype, blocks))
    options: Any = SCHEDULER if target == "cpu" else None
    memory: Any = lowered.compile(options).memory_analysis()
    return memory.temp_size_in_bytes


def main() -> None:
    """Prints the table, each row when it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target", default=list(TARGETS))
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, metavar="N")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(unknown)}: there are {', '.join(TARGETS)}")
    targets = installed(args.targets)
    print(f"{args.blocks} blocks, activations {' × '.join(map(str, args.shape))}\n")
    heads = ["dtype", "kind", "kept", "× flax"]
    heads += [head for t in targets for head in (f"scratch {t}", "× flax")]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for dtype in DTYPES:
        one, flax = np.prod(args.shape) * jnp.dtype(dtype).itemsize, []
        for kind in KINDS:
            case = kind, args.shape, dtype
            found = [kept_bytes(*case, args.blocks)]
            found += [scratch_bytes(*case, t, args.blocks) for t in targets]
            flax = flax or found
            pairs = zip(found, flax, strict=True)
            cells = [f"{a / one:.2f} | {a / b:.3f}" for a, b in pairs]
            print(f"| {dtype} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
