"""`layers.standard`: what every layer promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers

import jaxbn
from jaxbn import layers

OPTIONS = [
    {},
    {"use_scale": False},
    {"use_bias": False, "use_fast_variance": False},
    {"feature_axes": (1, -1), "unbiased": True},
    {"momentum": jaxbn.debiased(0.9), "derivatives": "jvp"},
    {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
]


def made(options):
    layer = layers.standard(**options)
    x = numbers((6, 4, 3), "float32")
    features = (4, 3) if "feature_axes" in options else 3
    params, state = layer.init(features)
    return layer, params, state, x


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_verbs(options):
    layer, params, state, x = made(options)
    state = state._replace(mean=state.mean + 0.5)
    same = {
        "feature_axes": options.get("feature_axes", -1),
        "dtype": options.get("dtype"),
    }
    affine = params.get("scale"), params.get("bias")
    w = jnp.arange(6).reshape(6, 1, 1) > 1

    y, new = layer.apply(params, state, x, training=True, weights=w)
    shift = state.mean if options.get("use_fast_variance", True) else None
    y_verb, m = jaxbn.batch_norm(x, *affine, **same, weights=w, shift=shift)
    new_verb = jaxbn.update(
        state,
        m,
        momentum=options.get("momentum", 0.99),
        unbiased=options.get("unbiased", False),
    )
    jax.tree.map(np.testing.assert_array_equal, (y, new), (y_verb, new_verb))

    y, kept = layer.apply(params, new, x, training=False)
    np.testing.assert_array_equal(
        y, jaxbn.normalize(x, new.mean, new.var, *affine, **same)
    )
    assert kept is new


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_keeps_structure_under_scan_vmap_and_remat(options):
    layer, params, state, x = made(options)

    def step(state, x):
        y, state = jax.checkpoint(
            lambda s, x: layer.apply(params, s, x, training=True)
        )(state, x)
        return state, y

    last, ys = jax.lax.scan(step, state, jnp.stack([x, 2 * x]))
    assert jax.tree.map(jnp.shape, last) == jax.tree.map(jnp.shape, state)
    models = jax.tree.map(lambda a: jnp.stack([a, a]), state)
    new, y = jax.vmap(lambda s: step(s, x))(models)
    assert_close(y[1].astype(jnp.float32), ys[0].astype(jnp.float32), 1e-5, 1e-5)
    assert new.step.shape == (2,)


def test_parameters_are_as_asked():
    params, _ = layers.standard(use_scale=False, use_bias=False).init(3)
    assert params == {}
    params, state = layers.standard(stats_dtype=jnp.complex64).init((2, 3))
    assert params["scale"].shape == (2, 3)
    assert (state.mean.dtype, state.var.dtype) == (jnp.complex64, jnp.float32)


def test_traced_training_is_refused():
    layer, params, state, x = made({})
    apply = jax.jit(lambda t: layer.apply(params, state, x, training=t))
    with pytest.raises(TypeError, match=r"`training` must be a Python bool.*static"):
        apply(True)
