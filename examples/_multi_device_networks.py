"""The small residual network of the multi-device example, in linen and in nnx."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxbn

WIDTHS = (16, 32, 64)


class Network(NamedTuple):
    """The functions that training needs of a network, in linen or nnx.

    Attributes:
      init: `init(seed) -> (params, stats)`.
      apply: `apply(params, stats, x, training) -> (logits, stats)`.
    """

    init: Callable[[int], tuple[Any, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]


def network(api: str, **synchronize: Any) -> Network:
    """The network in `api`. `synchronize` are options of its batch norms."""
    return {"linen": in_linen, "nnx": in_nnx}[api](**synchronize)


class LinenBlock(nn.Module):
    """Two convolutions and a shortcut."""

    width: int
    stride: int
    norm: Any

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False)
        strides = (self.stride, self.stride)
        y = nn.relu(self.norm()(conv(self.width, (3, 3), strides)(x)))
        y = self.norm()(conv(self.width, (3, 3))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(self.width, (1, 1), strides)(x))
        return nn.relu(x + y)


class LinenNetwork(nn.Module):
    """A block for each width, the mean over pixels, a dense layer, then 10 logits."""

    synchronize: dict[str, Any]

    @nn.compact
    def __call__(self, x, training: bool):
        norm = partial(
            jaxbn.linen.BatchNorm,
            use_running_average=not training,
            momentum=0.9,
            **self.synchronize,
        )
        x = nn.relu(norm()(nn.Conv(WIDTHS[0], (3, 3), use_bias=False)(x)))
        for i, width in enumerate(WIDTHS):
            x = LinenBlock(width, 1 if i == 0 else 2, norm)(x)
        x = norm()(nn.Dense(WIDTHS[-1], use_bias=False)(x.mean((1, 2))))
        return nn.Dense(10)(nn.relu(x))


def in_linen(**synchronize: Any) -> Network:
    net = LinenNetwork(synchronize)

    def init(seed):
        x = jnp.zeros((1, 8, 8, 1))
        variables = net.init(jax.random.key(seed), x, training=False)
        return variables["params"], variables["batch_stats"]

    def apply(params, stats, x, training):
        variables = {"params": params, "batch_stats": stats}
        logits, new = net.apply(variables, x, training, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    return Network(init, apply)


class NnxBlock(nnx.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width_in, width, stride, norm, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        strides = (stride, stride)
        self.conv1, self.norm1 = conv(width_in, width, (3, 3), strides), norm(width)
        self.conv2, self.norm2 = conv(width, width, (3, 3)), norm(width)
        self.shortcut = nnx.data(None)
        if stride > 1 or width_in != width:
            self.shortcut = nnx.Sequential(
                conv(width_in, width, (1, 1), strides), norm(width)
            )

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu((x if self.shortcut is None else self.shortcut(x)) + y)


class NnxNetwork(nnx.Module):
    """A block for each width, the mean over pixels, a dense layer, then 10 logits."""

    def __init__(self, synchronize, rngs):
        norm = partial(jaxbn.nnx.BatchNorm, momentum=0.9, rngs=rngs, **synchronize)
        first, last = WIDTHS[0], WIDTHS[-1]
        self.conv = nnx.Conv(1, first, (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(first)
        widths = zip((first, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.blocks = nnx.List(
            NnxBlock(before, width, 1 if i == 0 else 2, norm, rngs)
            for i, (before, width) in enumerate(widths)
        )
        self.dense = nnx.Linear(last, last, use_bias=False, rngs=rngs)
        self.dense_norm = norm(last)
        self.out = nnx.Linear(last, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        x = self.dense_norm(self.dense(x.mean((1, 2))))
        return self.out(nnx.relu(x))


def in_nnx(**synchronize: Any) -> Network:
    graph, *_ = nnx.split(
        nnx.eval_shape(lambda: NnxNetwork(synchronize, nnx.Rngs(0))),
        nnx.Param,
        nnx.BatchStat,
    )

    def init(seed):
        model = NnxNetwork(synchronize, nnx.Rngs(jax.random.key(seed)))
        params, stats = nnx.state(model, nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def apply(params, stats, x, training):
        model = nnx.merge(graph, params, stats)
        model = nnx.view(model, use_running_average=not training)
        logits = model(x)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return Network(init, apply)
