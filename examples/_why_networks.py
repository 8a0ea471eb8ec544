"""The networks of "why batch norm": dense layers, with and without batch norm."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn

WIDTH = 64  # The number of pixels, so that all kernels can be one array.
CLASSES = 10
ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
NORMS = ["none", "before", "after"]  # Its place, relative to the activation.
SHIFT, STRETCH = 0.5, 0.35  # The largest disturbance of a channel.


@dataclass(frozen=True)
class Net:
    """Which network. It is hashable, so that it can be a static argument."""

    depth: int
    norm: str = "none"
    activation: str = "relu"
    disturbed: bool = False


class Layers(NamedTuple):
    """Parameters of all hidden layers, with layers on the leading axis."""

    kernel: jax.Array
    bias: jax.Array  # Before the activation; of the norm, if that is there too.
    scale: jax.Array
    offset: jax.Array  # Of a norm after the activation.


class Params(NamedTuple):
    """Parameters of a network."""

    layers: Layers
    kernel: jax.Array
    bias: jax.Array


class Seen(NamedTuple):
    """Moments of the inputs of layers, with layers on the leading axis.

    Attributes:
      products: Of inputs times kernel, where the norm is applied.
      inputs: Of the input of the activation.
    """

    products: jaxbn.Moments
    inputs: jaxbn.Moments


def init(net: Net, seed: int) -> Params:
    """Kernels of He et al. in the hidden layers, the same for all nets of a depth.

    NumPy draws them, because XLA takes seconds to compile normal numbers for a CPU.
    """
    rng = np.random.default_rng(seed)
    kernels = math.sqrt(2 / WIDTH) * rng.normal(size=(net.depth, WIDTH, WIDTH))
    kernel = rng.normal(size=(WIDTH, CLASSES)) / math.sqrt(WIDTH)
    zeros = jnp.zeros((net.depth, WIDTH))
    layers = Layers(jnp.asarray(kernels, zeros.dtype), zeros, zeros + 1, zeros)
    return Params(layers, jnp.asarray(kernel, zeros.dtype), jnp.zeros((1, CLASSES)))


def scaled(params: Params, gain: jax.Array | float) -> Params:
    """The same parameters, with the hidden kernels multiplied by `gain`."""
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

    The statistics are those of the rows with weight 1, so rows with weight 0 are
    normalized by the statistics of others. `key` is for the disturbance.
    """

    def layer(x, of_layer):
        p, key = of_layer
        x, _ = hidden(net, p, key, x, weights)
        return x, None

    x, _ = jax.lax.scan(layer, x, (params.layers, keys_of_layers(net, key)))
    return x @ params.kernel + params.bias


def seen(net: Net, params: Params, x: jax.Array, key: jax.Array) -> Seen:
    """The moments in every layer for the rows of `x`."""

    def layer(x, of_layer):
        p, key = of_layer
        x, (products, inputs) = hidden(net, p, key, x, None)
        return x, Seen(jaxbn.moments(products), jaxbn.moments(inputs))

    return jax.lax.scan(layer, x, (params.layers, keys_of_layers(net, key)))[1]


def keys_of_layers(net: Net, key: jax.Array) -> jax.Array | None:
    return jax.random.split(key, net.depth) if net.disturbed else None


def hidden(net: Net, p: Layers, key: jax.Array, x: jax.Array, weights):
    """One layer: its output, its products, and the input of its activation."""
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
    """`x`, with a random shift and a random scale for every channel."""
    shift, stretch = jax.random.uniform(key, (2, 1, WIDTH), minval=-1.0)
    return x * jnp.exp(STRETCH * stretch) + SHIFT * shift
