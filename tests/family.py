"""The family of layers, each with its formula in NumPy, to run one test on them all.

The oracles take x with its features last, and return y, the moments that move the
running statistics (keepdims), and whatever no derivative passes through.
"""

from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from jaxbn import layers

EXAMPLES, FEATURES = 8, 3
IDS = np.array([0, 2, 0, 2, 2, 0, 2, 0])  # of three; the second is absent
EMBEDDINGS = np.random.default_rng(3).normal(size=(EXAMPLES, 2))
LIMITS = 1.2, 0.3  # both clip some features, not all


class Case(NamedTuple):
    make: Any
    oracle: Any
    inputs: Any = MappingProxyType({})
    form: bool = False  # whether it has `derivatives`
    reverse_only: bool = False


def standard(x, params, state, w, frozen):
    m = oracle.moments(x, reduced(x), w)
    return affine(oracle.normalize(x, m.mean, m.var), params), m, None


def ghost_of(group_of):
    def ghost(x, params, state, w, frozen):
        y, _ = oracle.groups(x, group_of, w)
        return affine(y, params), oracle.moments(x, reduced(x), w), None

    return ghost


def renorm(x, params, state, w, frozen):
    y, m, frozen = oracle.renorm(x, state[0], state[1], LIMITS, w, frozen)
    return affine(y, params), m._replace(var=np.sqrt(m.var + 1e-5)), frozen


def renorm_of_variances(x, params, state, w, frozen):
    std = np.sqrt(state[1] + 1e-5)
    y, m, frozen = oracle.renorm(x, state[0], std, LIMITS, w, frozen)
    return affine(y, params), m, frozen


def domain(x, params, state, w, frozen):
    y, found = oracle.groups(x, IDS, w)
    own = {name: spread(v[IDS], x) for name, v in params.items()}
    return affine(y, own), found, None


def conditional(x, params, state, w, frozen):
    y, m, _ = standard(x, {}, state, w, frozen)
    if "scale_kernel" in params:
        rows = {
            n: params[n] + EMBEDDINGS @ params[f"{n}_kernel"] for n in ("scale", "bias")
        }
    else:
        rows = {name: v[IDS] for name, v in params.items()}
    return affine(y, {n: spread(v, x) for n, v in rows.items()}), m, None


def streaming(x, params, state, w, frozen):
    """From statistics of one step, with momentum 0.9 debiased."""
    m = oracle.moments(x, reduced(x), w)
    keep = 0.9 * (1 - 0.9) / (1 - 0.9**2)
    mean = keep * state[0] + (1 - keep) * m.mean
    between = keep * (1 - keep) * (m.mean - state[0]) ** 2
    var = keep * state[1] + (1 - keep) * m.var + between
    return affine(oracle.normalize(x, mean, var), params), m, None


def in_place_of(activation):
    def in_place(x, params, state, w, frozen):
        own = {**params, "scale": np.abs(params["scale"]) + 1e-5}
        y, m, _ = standard(x, own, state, w, frozen)
        return activation(y), m, None

    return in_place


CASES = {
    "standard": Case(layers.standard, standard, form=True),
    "ghost": Case(
        lambda **o: layers.ghost(group_size=2, **o),
        ghost_of([0, 0, 1, 1, 2, 2, 3, 3]),
        form=True,
    ),
    "ghost strided": Case(
        lambda **o: layers.ghost(num_groups=2, strided=True, **o),
        ghost_of([0, 1] * 4),
        form=True,
    ),
    "renorm": Case(
        lambda **o: layers.renorm(r_max=LIMITS[0], d_max=LIMITS[1], **o),
        renorm,
        form=True,
    ),
    "renorm of variances": Case(
        lambda **o: layers.renorm(
            r_max=LIMITS[0], d_max=LIMITS[1], tracks="var", warm_up_steps=1, **o
        ),
        renorm_of_variances,
        form=True,
    ),
    "domain": Case(
        lambda **o: layers.domain(num_domains=3, **o), domain, {"domain_ids": IDS}
    ),
    "classes": Case(
        lambda **o: layers.conditional(num_classes=3, **o),
        conditional,
        {"condition": IDS},
    ),
    "embedding": Case(
        lambda **o: layers.conditional(embedding_size=2, **o),
        conditional,
        {"condition": EMBEDDINGS},
    ),
    "streaming": Case(lambda **o: layers.streaming(**o), streaming),
    "leaky relu": Case(
        layers.in_place, in_place_of(oracle.leaky_relu), reverse_only=True
    ),
    "elu": Case(
        lambda **o: layers.in_place(activation="elu", **o),
        in_place_of(oracle.elu),
        reverse_only=True,
    ),
    "identity": Case(
        lambda **o: layers.in_place(activation="identity", **o),
        in_place_of(lambda y: y),
        reverse_only=True,
    ),
}


def reduced(x):
    return tuple(range(x.ndim - 1))


def affine(y, params):
    return y * params.get("scale", 1.0) + params.get("bias", 0.0)


def spread(rows, x):
    """A row per example, against x with its features last."""
    return rows.reshape(len(x), *[1] * (x.ndim - 2), -1)


def started(case, dtype=jnp.float64, seed=0, **options):
    """A layer, parameters at random, and statistics as after one step."""
    layer = case.make(momentum=0.9, **options)
    params, state = layer.init(FEATURES)
    rng = np.random.default_rng(seed)
    draw = lambda p: rng.uniform(0.5, 1.5, p.shape) * rng.choice([-1, 1], p.shape)
    array = lambda a: jnp.asarray(np.asarray(a).astype(dtype))
    own = {name: array(draw(p)) for name, p in params.items()}
    mean, var, step = (np.asarray(a) for a in state)
    mean = mean + rng.normal(size=mean.shape)
    var = var * rng.uniform(1, 2, var.shape)
    return layer, own, type(state)(array(mean), array(var), jnp.asarray(step + 1))


def inputs(case, dtype=jnp.float64):
    """The extra keywords of `apply`."""
    return {
        name: jnp.asarray(v.astype(dtype) if v.dtype.kind == "f" else v)
        for name, v in case.inputs.items()
    }


def compiled(layer):
    """The layer with functions that are compiled: op by op is slow."""
    static = {"static_argnames": "training"}
    return layer._replace(
        apply=jax.jit(layer.apply, **static),
        forward=jax.jit(layer.forward, **static),
        update=jax.jit(layer.update),
    )
