"""Bytes that a network moves at inference, folded over unfolded.

    python benchmarks/folding.py [cpu] [v5e] [h200] [--network RepVGG]

XLA compiles for devices that are not there: for v5e with `pip install "jax[tpu]"`, for
h200 with `pip install "jax[cuda13]"`. The figure is what the kernels of the compiled
program read and write, each operand once; on the CPU, what XLA itself estimates.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
from _compiled import compile_for
from _devices import device
from _programs import kernels

import jaxbn


class Block(nn.Module):
    """Two convolutions and a shortcut, all normalized."""

    features: int
    strides: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The block's output."""
        y = nn.relu(self.layer(x, 3, self.strides))
        y = self.layer(y, 3, 1)
        if x.shape != y.shape:
            x = self.layer(x, 1, self.strides)
        return nn.relu(x + y)

    def layer(self, x: jax.Array, size: int, strides: int) -> jax.Array:
        """A convolution and its batch norm."""
        kind = {"use_bias": False, "dtype": self.dtype}
        x = nn.Conv(self.features, (size, size), strides, **kind)(x)
        return jaxbn.linen.BatchNorm(use_running_average=True, dtype=self.dtype)(x)


class Network(nn.Module):
    """A stem and two stages of residual blocks, as in a ResNet."""

    dtype: jnp.dtype
    blocks: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scores of ten classes."""
        x = nn.Conv(64, (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = jaxbn.linen.BatchNorm(use_running_average=True, dtype=self.dtype)(x)
        x = nn.relu(x)
        for features, strides in [(64, 1), (64, 1), (128, 2), (128, 1)][: self.blocks]:
            x = Block(features, strides, self.dtype)(x)
        return nn.Dense(10, dtype=self.dtype)(jnp.mean(x, (1, 2)))


class RepVGG(nn.Module):
    """Blocks of three branches, which are one convolution when they are folded."""

    dtype: jnp.dtype
    blocks: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scores of ten classes."""
        kind = {"use_bias": False, "dtype": self.dtype}
        norm = partial(jaxbn.linen.BatchNorm, True, dtype=self.dtype)
        for _ in range(self.blocks):
            y = norm()(nn.Conv(64, (3, 3), **kind)(x))
            y += norm()(nn.Conv(64, (1, 1), **kind)(x))
            x = nn.relu(y + norm()(x) if x.shape == y.shape else y)
        return nn.Dense(10, dtype=self.dtype)(jnp.mean(x, (1, 2)))


NETWORKS = {"ResNet": Network, "RepVGG": RepVGG}


def compiled(function: Callable, arguments: tuple, where: Any) -> tuple[int, int, int]:
    """Bytes, kernels, and convolutions of a program."""
    found = kernels(compile_for(function, arguments, [where]).as_text())
    convolutions = sum(kernel.kind == "convolutions" for kernel in found)
    return sum(kernel.bytes for kernel in found), len(found), convolutions


def main() -> None:
    """Prints a line for each device and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="*", default=["cpu", "v5e"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--network", choices=NETWORKS, default="ResNet")
    given = parser.parse_args()
    for name in given.devices:
        where = device(name)
        for dtype in map(jnp.dtype, given.dtypes):
            net = NETWORKS[given.network](dtype, given.blocks)
            x = jax.ShapeDtypeStruct((given.batch, given.size, given.size, 3), dtype)
            variables = jax.eval_shape(net.init, jax.random.key(0), x)
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), variables)
            folded_fn, folded = jaxbn.folding.fold(net.apply, zeros, x)
            full, *before = compiled(net.apply, (variables, x), where)
            less, *after = compiled(folded_fn, (folded, x), where)
            print(
                f"{name:5} {dtype.name:9} {full / 2**20:8.1f} MiB in {before[0]:3} "
                f"kernels ({before[1]} convolutions), folded {less / 2**20:8.1f} MiB "
                f"in {after[0]:3} ({after[1]}): {less / full:.3f}"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
