"""Whole models of Keras, Equinox and Praxis: each of their batch norms, by its path."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from data import assert_close

import jaxbn
from jaxbn.interop import equinox, keras, praxis

V = np.arange(1.0, 4.0, dtype=np.float32)
KERAS = {"gamma": V, "beta": 2 * V, "moving_mean": 3 * V, "moving_variance": 4 * V}
X = np.random.default_rng(0).normal(3, 2, size=(16, 4, 4, 3)).astype(np.float32)
SUFFIXES = (
    ":0",
    "/EMA",
    "/ExponentialMovingAverage",
    "/.ATTRIBUTES/VARIABLE_VALUE",
    "/ExponentialMovingAverage/.ATTRIBUTES/VARIABLE_VALUE",
)


def numbered(at, arrays):
    return {f"{at}{i}": v for i, v in enumerate(arrays)}


def keras_model(library):
    """All kinds of batch norm beside other norms, one of them in a model inside."""
    layers, norm = library.layers, library.layers.BatchNormalization
    inner = library.Sequential([layers.Conv2D(3, 1), norm(momentum=0.8)], name="inner")
    clip = {"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.5}
    renorm = {"renorm": True, "renorm_momentum": 0.9, "renorm_clipping": clip}
    net = library.Sequential(
        [
            layers.Input((4, 4, 3)),
            layers.Conv2D(3, 1, use_bias=False),
            norm(momentum=0.9, name="first"),
            layers.LayerNormalization(),
            norm(momentum=0.9, center=False, scale=False),
            inner,
            layers.GroupNormalization(3),
            norm(momentum=0.9, **renorm, name="renorm"),
        ],
        name="net",
    )
    rng = np.random.default_rng(0)
    for variable in net.trainable_variables:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    for _ in range(3):
        net(X, training=True)
    return net


def keras_inference(net, converted, x):
    """The model's layers, with jaxbn's in place of its batch norms."""
    for layer in net.layers:
        if hasattr(layer, "layers"):
            x = keras_inference(layer, converted, x)
        elif layer.name in converted:
            params, stats = converted[layer.name]
            renorm = "renorm" in layer.name
            make = jaxbn.layers.renorm if renorm else jaxbn.layers.standard
            ours = make(epsilon=1e-3, use_scale=layer.scale, use_bias=layer.center)
            x, _ = ours.apply(params, stats, x, training=False)
        else:
            x = layer(x)
    return x


@pytest.fixture(scope="module")
def keras_net():
    return keras_model(pytest.importorskip("keras", reason=peers.MISSING))


def test_a_whole_keras_model(keras_net):
    weights = {v.path: v for v in keras_net.weights}
    found = keras.batch_norms(weights)
    names = [path.rpartition("/")[2] for path in found]
    assert [names[0], names[-1]] == ["first", "renorm"]
    assert len(names) == 4
    assert isinstance(found[list(found)[-1]][1], jaxbn.layers.RenormStats)
    for suffix in SUFFIXES:
        again = keras.batch_norms({f"{path}{suffix}": v for path, v in weights.items()})
        jax.tree.map(np.testing.assert_array_equal, again, found)
    y = keras_inference(keras_net, dict(zip(names, found.values(), strict=True)), X)
    assert_close(y, keras_net(X, training=False), 1e-5, 1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras' own.
def test_a_file_of_keras(keras_net, tmp_path):
    h5py = pytest.importorskip("h5py", reason=peers.MISSING)
    keras_net.save_weights(tmp_path / "net.weights.h5")
    expected = keras.batch_norms({v.path: v for v in keras_net.weights})
    with h5py.File(tmp_path / "net.weights.h5") as file:
        found = keras.batch_norms(file)
        alone = keras.to_jaxbn(file["layers/batch_normalization"])
        inside = keras.to_jaxbn(file["layers/batch_normalization/vars"])
    by_mean = {float(stats.mean[0]): (p, stats) for p, stats in found.values()}
    assert "layers/sequential/layers/batch_normalization" in found
    assert len(by_mean) == len(expected) == 4
    for params, stats in expected.values():
        same = by_mean[float(stats.mean[0])]
        jax.tree.map(np.testing.assert_array_equal, same, (params, stats))
    for one in (alone, inside):
        jax.tree.map(
            np.testing.assert_array_equal, one, found["layers/batch_normalization"]
        )


@pytest.mark.parametrize("at", ["", "vars/", "layers/any/vars/"])
def test_variables_by_number(at):
    arrays = list(KERAS.values())
    expected = keras.to_jaxbn(KERAS)
    backwards = dict(reversed(numbered(at, arrays).items()))
    jax.tree.map(assert_close, keras.to_jaxbn(backwards), expected)
    params, stats = keras.to_jaxbn(numbered(at, arrays[2:]))
    assert params == {}
    assert_close(stats.var, 4 * V)
    renorm = [*arrays[2:], 2 * np.sqrt(V), 3 * V, 2 * np.sqrt(V)]
    assert_close(keras.to_jaxbn(numbered(at, renorm))[1].std, 2 * np.sqrt(V))
    for number in (1, 3, 6):
        with pytest.raises(
            ValueError, match=f"`arrays` has {number} of them, .*may be"
        ):
            keras.to_jaxbn(numbered(at, [V] * number))
    with pytest.raises(ValueError, match="of which one is missing"):
        keras.to_jaxbn({f"{at}0": V, f"{at}2": V})


def test_what_is_a_batch_norm_in_a_file():
    four, two = numbered("bn/vars/", [V] * 4), numbered("ln/vars/", [V] * 2)
    lstm = numbered("lstm/vars/", [np.ones((3, 4)), np.ones((1, 4)), np.ones(4)])
    assert list(keras.batch_norms({**lstm, **two, **four})) == ["bn"]
    plain = numbered("layers/batch_normalization_3/vars/", [V] * 2)
    assert list(keras.batch_norms({**two, **plain})) == ["layers/batch_normalization_3"]
    with pytest.raises(
        ValueError, match=r"`arrays` has 3 of them, .*bn/vars/0.*may be"
    ):
        keras.batch_norms(numbered("bn/vars/", [V] * 3))
    with pytest.raises(ValueError, match="`weights` has no batch norm: none of its 5"):
        keras.batch_norms({**two, **lstm})
    with pytest.raises(ValueError, match=r"`bn/vars/3` has -1.0 at feature 0"):
        keras.batch_norms({**four, "bn/vars/3": -V})


def test_names_of_tensorflow():
    """One layer, its average or its own variables, but not both."""
    expected = keras.to_jaxbn(KERAS)
    slots = {"bn/gamma/RMSProp": V, "bn/gamma/RMSProp_1": V, "global_step": 3}
    for suffix in SUFFIXES:
        one = {f"bn/{name}{suffix}": v for name, v in KERAS.items()}
        jax.tree.map(assert_close, keras.to_jaxbn(one), expected)
        whole = keras.batch_norms({**one, **slots, f"conv/kernel{suffix}": V})
        jax.tree.map(assert_close, whole, {"bn": expected})
        with pytest.raises(ValueError, match=r"has -4.0 at feature 0") as error:
            keras.batch_norms({**one, f"bn/moving_variance{suffix}": -4 * V})
        assert f"`bn/moving_variance{suffix}`" in str(error.value)
    arrays = {f"bn/{name}": v for name, v in KERAS.items()}
    for name in ("gamma", "beta"):
        arrays[f"bn/{name}/ExponentialMovingAverage"] = 7 * V
    for call in (keras.to_jaxbn, keras.batch_norms):
        with pytest.raises(ValueError, match="are the same variable, as it is and ave"):
            call(arrays)
    advised = "{k: v for k, v in arrays.items() if f'{k}/ExponentialMovingAverage' not"
    with pytest.raises(ValueError, match="the same variable") as error:
        keras.batch_norms(arrays)
    assert advised in str(error.value)
    advice = str(error.value).split(" by `")[1].rstrip("`.")
    params, stats = keras.to_jaxbn(eval(advice, {"arrays": arrays}))
    assert_close(params["scale"], 7 * V)
    assert_close(stats.mean, 3 * V)
    with pytest.raises(ValueError, match=r"`a/gamma` and `b/gamma`.*batch_norms`"):
        keras.to_jaxbn({"a/gamma": V, "b/gamma": V})


def test_conventions_of_a_whole_keras_model():
    weights = {f"{bn}/{name}": v for bn in "ab" for name, v in KERAS.items()}
    options = {"unbiased": True, "count": {"a": 2, "b": 5}}
    found = keras.batch_norms(weights, **options)
    assert_close(found["a"][1].var, 8 * V)
    assert_close(found["b"][1].var, 5 * V)
    biased = keras.batch_norms(weights, fused=True, unbiased=False, count=2)
    assert_close(biased["a"][1].var, 2 * V)
    with pytest.raises(ValueError, match="`b/moving_variance` is of biased"):
        keras.batch_norms(weights, unbiased=True, count={"a": 2})
    assert list(keras.batch_norms(KERAS)) == [""]


def equinox_model(eqx):
    class Own(eqx.nn.BatchNorm):
        pass

    class Block(eqx.Module):
        norms: dict
        last: eqx.nn.LayerNorm

    key = jax.random.key(0)
    batch = eqx.nn.BatchNorm(3, "batch", momentum=0.8, mode="batch")
    ema = Own(3, "batch", momentum=0.7, mode="ema", eps=1e-4)
    plain = eqx.nn.BatchNorm(3, "batch", channelwise_affine=False, mode="batch")
    return eqx.nn.Sequential(
        [eqx.nn.Linear(3, 3, key=key), batch, ema, eqx.nn.LayerNorm(3), plain]
    ), Block({"a": batch, "b": [ema]}, eqx.nn.LayerNorm(3))


@pytest.fixture(scope="module")
def equinox_net():
    """A model that has trained, and its forward pass."""
    eqx = pytest.importorskip("equinox", reason=peers.MISSING)
    (net, block), state = eqx.nn.make_with_state(equinox_model)(eqx)
    rng = np.random.default_rng(0)
    params, rest = eqx.partition(net, eqx.is_inexact_array)
    params = jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), params
    )
    net = eqx.combine(params, rest)

    def run(net, state):
        call = jax.vmap(net, (0, None), (0, None), axis_name="batch")
        return call(X[:, 0, 0], state)

    for _ in range(3):
        _, state = run(net, state)
    return net, state, block, lambda s: run(eqx.nn.inference_mode(net), s)[0]


def test_a_whole_equinox_model(equinox_net):
    net, state, _, infer = equinox_net
    found = equinox.batch_norms(net, state)
    assert list(found) == ["layers/1", "layers/2", "layers/4"]
    assert [int(stats.step) for _, stats in found.values()] == [3, 1, 3]
    x = X[:, 0, 0]
    for i, layer in enumerate(net.layers):
        if f"layers/{i}" not in found:
            x = jax.vmap(layer)(x)
            continue
        params, stats = found[f"layers/{i}"]
        affine = layer.channelwise_affine
        ours = jaxbn.layers.standard(
            epsilon=layer.eps, use_scale=affine, use_bias=affine
        )
        x, _ = ours.apply(params, stats, x, training=False)
    assert_close(x, infer(state), 1e-5, 1e-5)


def test_conventions_of_a_whole_equinox_model(equinox_net):
    net, state, block, _ = equinox_net
    kept = equinox.batch_norms(net, state)
    right = equinox.batch_norms(net, state, correct=True)
    assert_close(
        kept["layers/1"][1].var - right["layers/1"][1].var,
        np.full(3, 0.8**3 / (1 - 0.8**3), np.float32),
        1e-5,
    )
    assert_close(kept["layers/2"][1].var, right["layers/2"][1].var)
    twice = equinox.batch_norms(net, state, unbiased=True, count=2)
    for name, (_, stats) in kept.items():
        assert_close(twice[name][1].var, 2 * stats.var)
    names = {"layers/1": 2, "layers/2": 3}
    with pytest.raises(ValueError, match="`layers/4/batch_state_index` is of biased"):
        equinox.batch_norms(net, state, unbiased=True, count=names)
    with pytest.raises(ValueError, match=r"`count` has \['norm'\], which are no batch"):
        equinox.batch_norms(net, state, unbiased=True, count={"norm": 2})
    eqx = pytest.importorskip("equinox", reason=peers.MISSING)
    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    _, of_another = make(3, "batch", momentum=0.8, mode="batch")
    with pytest.raises(ValueError, match="`state` has no `layers/1/batch_counter`"):
        equinox.batch_norms(net, of_another)
    with pytest.raises(ValueError, match="`model` has no batch norm"):
        equinox.batch_norms(block.last, state)
    with pytest.raises(
        TypeError, match=r"`state` must be an `eqx.nn.State`, got tuple"
    ):
        equinox.batch_norms(net, (state,))


def test_paths_in_an_equinox_model():
    eqx = pytest.importorskip("equinox", reason=peers.MISSING)
    (_, block), state = eqx.nn.make_with_state(equinox_model)(eqx)
    found = equinox.batch_norms(block, state)
    assert list(found) == ["norms/a", "norms/b/0"]
    alone, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    assert list(equinox.batch_norms(alone, state)) == [""]
    many, states = eqx.filter_vmap(
        lambda _: eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    )(jnp.arange(2))
    with pytest.raises(
        ValueError, match=r"`batch_counter` must be a .*index the first"
    ):
        equinox.batch_norms(many, states)


PARAMS = {"gamma": V, "beta": 2 * V}
KEPT = {"moving_mean": 3 * V, "moving_variance": 4 * V}


def test_a_whole_praxis_model():
    """By its formula, in the collections that `init` returns there."""
    layers = {"bn": 1, "stack": {"norm": 2}}
    params = {"params": {"conv": {"w": V}} | place(layers, PARAMS)}
    variables = {**params, "non_trainable": place(layers, KEPT)}
    found = praxis.batch_norms(variables)
    assert list(found) == ["bn", "stack/norm"]
    x = X[:, 0, 0]
    for factor, (params, stats) in enumerate(found.values(), 1):
        layer = jaxbn.layers.standard(**praxis.options())
        y, _ = layer.apply(params, stats, x, training=False)
        inv = 1 / np.sqrt(4 * factor * V + 1e-3)
        expected = (x - 3 * factor * V) * inv * (1 + factor * V) + 2 * factor * V
        assert_close(y, expected, 1e-5, 1e-5)
    joined = place(layers, PARAMS | KEPT)
    for same in (joined, flattened(joined), flattened(variables)):
        jax.tree.map(assert_close, praxis.batch_norms(same), found)
    plain = praxis.batch_norms(joined, minus_one=False)
    assert_close(plain["bn"][0]["scale"], V)
    twice = praxis.batch_norms(joined, unbiased=True, count={"bn": 2, "stack/norm": 2})
    assert_close(twice["bn"][1].var, 8 * V)
    assert list(praxis.batch_norms(PARAMS | KEPT)) == [""]
    with pytest.raises(
        ValueError, match="`variables` has no batch norm: none of its 1"
    ):
        praxis.batch_norms({"params": {"w": V}})
    with pytest.raises(ValueError, match=r"`stack/norm/moving_variance` has -8.0"):
        praxis.batch_norms(
            joined | {"stack": {"norm": {**KEPT, "moving_variance": -8 * V}}}
        )
    with pytest.raises(ValueError, match=r"\['bn/moving_mean'\] missing"):
        praxis.batch_norms({"bn": {"moving_variance": V}})


def place(layers, arrays):
    """A tree with these arrays, times a number, for each layer."""
    return {
        name: place(below, arrays)
        if isinstance(below, dict)
        else {key: below * v for key, v in arrays.items()}
        for name, below in layers.items()
    }


def flattened(tree, at=""):
    found = {}
    for key, value in tree.items():
        deeper = isinstance(value, dict)
        found |= flattened(value, f"{at}{key}/") if deeper else {f"{at}{key}": value}
    return found
