"""`layers.standard`: what every layer promises."""

import copy
import pickle

import family
import jax
import jax.numpy as jnp
import numpy as np
import peers
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


def test_numpy_says_whether_it_trains():
    layer, params, state, x = made({})
    for yes in (True, np.True_):
        y, _ = layer.apply(params, state, x, training=yes)
        assert_close(y.mean((0, 1)), np.zeros(3), atol=1e-5)


MAKERS = {name: case.make for name, case in family.CASES.items()}
MAKERS["an array"] = lambda: layers.standard(momentum=np.full(3, 0.9), epsilon=1e-3)
MAKERS["an array of JAX"] = lambda: layers.renorm(r_max=jnp.array(2.0))
MAKERS["lists"] = lambda: layers.standard(feature_axes=[1, 2], axis_name=["a", "b"])
MAKERS["a function"] = lambda: layers.standard(momentum=jaxbn.debiased(0.9))


@pytest.mark.parametrize("name", MAKERS)
def test_layers_of_equal_options_are_equal(name):
    one, other = MAKERS[name](), MAKERS[name]()
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert one.apply == other.apply
    assert hash(one.update) == hash(other.update)
    assert one.apply != one.forward
    for twin in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), copy.copy(one)):
        assert twin == one
        assert repr(twin) == repr(one)
    assert pickle.loads(pickle.dumps(one.apply)) == one.apply
    assert jax.tree.leaves(one) == []
    assert jax.tree.map(lambda a: a, one) == one


def test_layers_of_other_options_are_not_equal():
    made = [
        layers.standard(),
        layers.standard(momentum=0.9),
        layers.standard(momentum=1),
        layers.standard(momentum=jnp.array(1.0)),
        layers.standard(momentum=jnp.array([1.0])),
        layers.standard(dtype=jnp.float32),
        layers.streaming(),
        layers.in_place(),
        layers.in_place(activation="elu"),
    ]
    assert len(set(made)) == len(made)
    assert layers.standard(momentum=0.99, dtype=None) == layers.standard()
    assert layers.standard(dtype="float32") == layers.standard(dtype=jnp.float32)


def test_a_layer_prints_as_it_was_made():
    assert repr(layers.standard()) == "standard()"
    made = "ghost(group_size=2, momentum=debiased(0.9))"
    assert repr(layers.ghost(group_size=2, momentum=jaxbn.debiased(0.9))) == made
    assert eval(made, {**vars(layers), "debiased": jaxbn.debiased}) is not None
    assert repr(layers.standard(momentum=jaxbn.cumulative()).apply) == (
        "standard(momentum=cumulative()).apply"
    )


def test_numpys_booleans_are_pythons():
    options = {"use_scale": True, "unbiased": True, "use_fast_variance": False}
    layer = layers.standard(**{name: np.bool_(v) for name, v in options.items()})
    assert layer == layers.standard(**options)
    params, state = layer.init(3)
    layer.apply(params, state, jnp.ones((4, 3)), training=True)


def test_what_says_how_it_is_an_array_is_a_number():
    class Wrapped:
        def __init__(self, value):
            self.value = value

        def __jax_array__(self):
            return self.value

    x, stats = jnp.ones((4, 3)), jaxbn.init_stats(3)
    half = Wrapped(jnp.float32(0.5))
    got = jaxbn.update(stats, jaxbn.moments(x), momentum=half)
    assert_close(got.mean, np.full(3, 0.5))
    jaxbn.batch_norm(x, epsilon=half)
    jax.jit(lambda v: jaxbn.normalize(x, x[0], x[0], epsilon=Wrapped(v)))(1e-3)
    with pytest.raises(ValueError, match="`epsilon` must not be negative"):
        jaxbn.batch_norm(x, epsilon=Wrapped(jnp.float32(-1.0)))


def test_an_array_of_options_may_change_later():
    momentum = np.full(3, 0.9)
    layer = layers.standard(momentum=momentum)
    momentum[:] = 0
    assert layer == layers.standard(momentum=np.full(3, 0.9))


def test_equal_layers_are_traced_once():
    _, params, state, x = made({})
    traced = []

    def step(layer, x):
        traced.append(layer)
        return layer.apply(params, state, x, training=True)

    for compiled in (jax.jit(step), jax.jit(step, static_argnums=0)):
        traced.clear()
        for _ in range(3):
            compiled(layers.standard(momentum=0.9), x)
        assert len(traced) == 1
    applied = jax.jit(layers.standard().apply, static_argnames="training")
    applied(params, state, x, training=True)


def test_in_equinox_two_models_of_an_architecture_have_one_tree():
    eqx = pytest.importorskip("equinox", reason=peers.MISSING)

    class Model(eqx.Module):
        norm: layers.Layer
        scale: jax.Array

    online, target = (Model(layers.standard(), jnp.full(2, v)) for v in (1.0, 3.0))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, online, target)
    assert_close(mean.scale, np.full(2, 2.0))
    assert mean.norm == online.norm
