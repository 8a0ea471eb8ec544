"""One layer of each JAX library, all with the same arguments.

`x` has its channels last and the output its dtype; everything else is float32. Layers
are called as their libraries want it, with the defaults of these but for epsilon.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxbn

MOMENTUM, EPSILON = 0.99, 1e-5


class Layer(NamedTuple):
    """Batch norm as pure functions.

    Attributes:
      train: `(x, scale, bias, mean, var, momentum=MOMENTUM)` to the output and the new
        running mean and variance.
      infer: `(x, scale, bias, mean, var)` to the output.
    """

    train: Callable[..., Any]
    infer: Callable[..., Any]


def ours(near: bool | str, implementation: str = "xla", **options) -> Layer:
    """jaxbn's verbs: a pass about the running mean, about a sample, or two passes."""

    def train(x, scale, bias, mean, var, momentum=MOMENTUM):
        y, m = jaxbn.batch_norm(
            x,
            scale,
            bias,
            shift=mean if near is True else near or None,
            implementation=implementation,
            **options,
        )
        stats = jaxbn.RunningStats(mean, var, jnp.int32(1))
        return y, jaxbn.update(stats, m, momentum=momentum)[:2]

    def infer(x, scale, bias, mean, var):
        return jaxbn.normalize(x, mean, var, scale, bias)

    return Layer(train, infer)


def textbook() -> Layer:
    """What one would write down: two passes, differentiated by JAX."""

    def train(x, scale, bias, mean, var, momentum=MOMENTUM):
        reduced = tuple(range(x.ndim - 1))
        wide = x.astype(jnp.float32)
        now = jnp.mean(wide, reduced)
        spread = jnp.mean(jnp.square(wide - now), reduced)
        y = infer(x, scale, bias, now, spread)
        return y, (
            momentum * mean + (1 - momentum) * now,
            momentum * var + (1 - momentum) * spread,
        )

    def infer(x, scale, bias, mean, var):
        y = (x - mean) * jax.lax.rsqrt(var + EPSILON) * scale + bias
        return y.astype(x.dtype)

    return Layer(train, infer)


def linen(**options) -> Layer:
    """`flax.linen.BatchNorm`."""
    import flax.linen as nn

    def apply(x, scale, bias, mean, var, use_average, momentum=MOMENTUM):
        given = {"params": {"scale": scale, "bias": bias}}
        given["batch_stats"] = {"mean": mean, "var": var}
        layer = nn.BatchNorm(
            use_average, momentum=momentum, epsilon=EPSILON, dtype=x.dtype, **options
        )
        y, new = layer.apply(given, x, mutable=["batch_stats"])
        return y, (new["batch_stats"]["mean"], new["batch_stats"]["var"])

    return Layer(
        partial(apply, use_average=False), lambda *a: apply(*a, use_average=True)[0]
    )


def nnx() -> Layer:
    """`flax.nnx.BatchNorm`."""
    from flax import nnx

    def apply(x, scale, bias, mean, var, use_average, momentum=MOMENTUM):
        layer = nnx.BatchNorm(
            x.shape[-1],
            use_running_average=use_average,
            momentum=momentum,
            epsilon=EPSILON,
            dtype=x.dtype,
            rngs=nnx.Rngs(0),
        )
        given = {"scale": scale, "bias": bias, "mean": mean, "var": var}
        nnx.update(layer, given)
        y = layer(x)
        return y, (layer.mean[...], layer.var[...])

    return Layer(
        partial(apply, use_average=False), lambda *a: apply(*a, use_average=True)[0]
    )


def haiku() -> Layer:
    """`haiku.BatchNorm`; its averages start anew, as their counters are no argument."""
    import haiku as hk

    def apply(x, scale, bias, mean, var, training, momentum=MOMENTUM):
        net = hk.transform_with_state(
            lambda x: hk.BatchNorm(True, True, momentum, EPSILON, name="n")(x, training)
        )
        shape = (1,) * (x.ndim - 1) + (-1,)
        scale, bias, mean, var = (v.reshape(shape) for v in (scale, bias, mean, var))
        state = {
            f"n/~/{name}_ema": {"hidden": v, "average": v, "counter": jnp.int32(0)}
            for name, v in (("mean", mean), ("var", var))
        }
        y, new = net.apply({"n": {"scale": scale, "offset": bias}}, state, None, x)
        averages = (new[f"n/~/{name}_ema"]["average"] for name in ("mean", "var"))
        return y.astype(x.dtype), tuple(v.ravel() for v in averages)

    return Layer(partial(apply, training=True), lambda *a: apply(*a, training=False)[0])


def equinox() -> Layer:
    """`equinox.nn.BatchNorm`, mapped over all axes but the channels."""
    import equinox as eqx

    def apply(x, scale, bias, mean, var, inference, momentum=MOMENTUM):
        with jax.ensure_compile_time_eval():
            layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
                x.shape[-1], "rows", EPSILON, momentum=momentum, mode="batch"
            )
        layer = eqx.tree_at(lambda n: (n.weight, n.bias), layer, (scale, bias))
        state = state.set(layer.batch_state_index, (mean, var))
        call = partial(layer, inference=inference)
        rows = x.reshape(-1, x.shape[-1])
        y, new = jax.vmap(call, (0, None), (0, None), axis_name="rows")(rows, state)
        return y.reshape(x.shape).astype(x.dtype), new.get(layer.batch_state_index)

    return Layer(
        partial(apply, inference=False), lambda *a: apply(*a, inference=True)[0]
    )


def keras() -> Layer:
    """`keras.layers.BatchNormalization`, without its state."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    def apply(x, scale, bias, mean, var, training, momentum=MOMENTUM):
        policy = "mixed_bfloat16" if x.dtype == jnp.bfloat16 else "float32"
        with jax.ensure_compile_time_eval():
            kind = {"momentum": momentum, "epsilon": EPSILON, "dtype": policy}
            layer = keras.layers.BatchNormalization(**kind)
            layer.build(x.shape)
        call = partial(layer.stateless_call, training=training)
        y, new = call([scale, bias], [mean, var], x)
        return y, tuple(new)

    return Layer(partial(apply, training=True), lambda *a: apply(*a, training=False)[0])


LAYERS: dict[str, Callable[[], Layer]] = {
    "jaxbn": partial(ours, near=True),
    "jaxbn sample": partial(ours, near="sample"),
    "jaxbn two passes": partial(ours, near=False),
    "jaxbn native": partial(ours, near=False, implementation="native"),
    "jaxbn jvp": partial(ours, near=True, derivatives="jvp"),
    "linen": linen,
    "nnx": nnx,
    "haiku": haiku,
    "equinox": equinox,
    "keras": keras,
    "textbook": textbook,
}
