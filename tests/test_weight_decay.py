"""`interop.optax.weight_decay_mask` on every kind of parameters."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data import assert_close
from flax import nnx
from flax.traverse_util import flatten_dict

import jaxbn

X = jnp.ones((2, 3))
OPTIMIZER = optax.adamw(
    1.0, weight_decay=0.5, mask=jaxbn.interop.optax.weight_decay_mask
)


class Named(NamedTuple):
    scale: jax.Array
    weight: jax.Array
    norms: list


def linen_params():
    net = nn.Sequential([nn.Dense(4), jaxbn.linen.BatchNorm(False)])
    return net.init(jax.random.key(0), X)["params"]


def layer_params():
    params, _ = jaxbn.layers.standard().init(3)
    return {"kernel": jnp.ones((2, 3)), "norm": params}


def attribute_params():
    layer = jaxbn.layers.standard().init(3)[0]
    return Named(jnp.ones(3), jnp.ones(3), [layer, {"scale": {"kernel": jnp.ones(2)}}])


@pytest.mark.parametrize("make", [linen_params, layer_params, attribute_params])
def test_decays_matrices_only(make):
    params = jax.tree.map(lambda a: a + 1, make())
    no_gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = OPTIMIZER.update(no_gradient, OPTIMIZER.init(params), params)
    decayed = 0
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        last = str(path[-1])
        if "scale" in last or "bias" in last:
            np.testing.assert_array_equal(update, 0)
        else:
            assert np.all(update != 0)
            decayed += 1
    assert decayed


def test_nnx_optimizer():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), jaxbn.nnx.BatchNorm(4, rngs=rngs)
    )
    linear, norm = model.layers
    kernel = linear.kernel[...]
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(norm.scale[...], 1)
    np.testing.assert_array_equal(linear.bias[...], 0)
    assert_close(linear.kernel[...], kernel / 2, 1e-6)


def test_trees_without_names():
    mask = jaxbn.interop.optax.weight_decay_mask
    assert mask(1.0) is True
    assert mask([1.0, (2.0,)]) == [True, (True,)]


def test_flattened_trees():
    mask = jaxbn.interop.optax.weight_decay_mask
    params = linen_params()
    for sep in (None, "/", "."):
        flat = flatten_dict(params, sep=sep)
        assert mask(flat) == flatten_dict(mask(params), sep=sep)
