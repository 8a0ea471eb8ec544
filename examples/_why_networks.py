"""The networks of "why batch norm": dense layers, with and without batch norm."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn

WIDTH = 64  # As many as there are pixels: then all kernels are one array.
CLASSES = 10
ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
NORMS = ["none", "before", "after"]  # Where the norm is, seen from the activation.
SHIFT, STRETCH = 0.5, 0.35  # Of disturbed networks: how far at most.


@dataclass(frozen=True)
class Net:
    """Which network; hashable, so that it can choose the program."""

    depth: int
    norm: str = "none"
    activation: str = "relu"
    disturbed: bool = False


class Layers(NamedTuple):
    """Parameters of all hidden layers, layers first."""

    kernel: jax.Array
    bias: jax.Array  # Before the activation: that of the norm, if that is there too.
    scale: jax.Array
    offset: jax.Array  # Of a norm after the activation.


class Params(NamedTuple):
    """Parameters of a network."""

    layers: Layers
    kernel: jax.Array
    bias: jax.Array


class Seen(NamedTuple):
    """Moments that layers saw, layers first.

    Attributes:
      products: Of inputs times kernel, where the norm comes in.
      inputs: Of what goes into the activation.
    """

    products: jaxbn.Moments
    inputs: jaxbn.Moments


def init(net: Net, seed: int) -> Params:
    """Kernels of He et al. in the hidden layers; all networks of a depth get the same.

    Drawn by NumPy: XLA takes seconds to compile normal numbers for a CPU.
    """
    rng = np.random.default_rng(seed)
    kernels = math.sqrt(2 / WIDTH) * rng.normal(size=(net.depth, WIDTH, WIDTH))
    kernel = rng.normal(size=(WIDTH, CLASSES)) / math.sqrt(WIDTH)
    zeros = jnp.zeros((net.depth, WIDTH))
    layers = Layers(jnp.asarray(kernels, zeros.dtype), zeros, zeros + 1, zeros)
    return Params(layers, jnp.asarray(kernel, zeros.dtype), jnp.zeros((1, CLASSES)))


def scaled(params: Params, gain: jax.Array | float) -> Params:
    """The same with the hidden kernels times `gain`."""
    layers = params.layers._replace(kernel=gain * params.layers.kernel)
    return params._replace(layers=layers)


def logits(
    net: Net,
    params: Params,
    x: jax.Array,
    *,
    weights: jax.Array | None = None,
    key: jax.Array,
) -> jax.Array:
    """Logits of the rows of `x`.

    The statistics are of the rows of weight 1: some rows may be normalized by the
    statistics of others. The key is that of the disturbance.
    """

    def layer(x, of_layer):
        p, key = of_layer
        x, _ = hidden(net, p, key, x, weights)
        return x, None

    x, _ = jax.lax.scan(layer, x, (params.layers, keys_of_layers(net, key)))
    return x @ params.kernel + params.bias


def seen(net: Net, params: Params, x: jax.Array, key: jax.Array) -> Seen:
    """What every layer sees of the rows of `x`."""

    def layer(x, of_layer):
        p, key = of_layer
        x, (products, inputs) = hidden(net, p, key, x, None)
        return x, Seen(jaxbn.moments(products), jaxbn.moments(inputs))

    return jax.lax.scan(layer, x, (params.layers, keys_of_layers(net, key)))[1]


def keys_of_layers(net: Net, key: jax.Array) -> jax.Array | None:
    return jax.random.split(key, net.depth) if net.disturbed else None


def hidden(net: Net, p: Layers, key: jax.Array, x: jax.Array, weights):
    """One layer: its output, its products and what went into its activation."""
    products = x @ p.kernel
    if net.norm == "before":
        inputs, _ = jaxbn.batch_norm(products, p.scale, p.bias, weights=weights)
    else:
        inputs = products + p.bias[None]
    if net.disturbed:
        inputs = disturb(inputs, key)
    y = ACTIVATIONS[net.activation](inputs)
    if net.norm == "after":
        y, _ = jaxbn.batch_norm(y, p.scale, p.offset, weights=weights)
    return y, (products, inputs)


def disturb(x: jax.Array, key: jax.Array) -> jax.Array:
    """`x` with a random mean and a random scale for every channel."""
    shift, stretch = jax.random.uniform(key, (2, 1, WIDTH), minval=-1.0)
    return x * jnp.exp(STRETCH * stretch) + SHIFT * shift
