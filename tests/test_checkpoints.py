"""`interop`: layers that go on in jaxbn where another library left off, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from data import assert_close

import jaxbn

EACH = pytest.mark.parametrize("peer", peers.ALL, ids=lambda p: p.__name__)
CLOSE = peers.DOUBLE


def batches(number, seed=0):
    """Batches whose mean and deviation wander, so that no convention goes unseen."""
    rng = np.random.default_rng(seed)
    for i in range(number):
        mean, std = rng.normal(size=peers.FEATURES), rng.uniform(0.5, 2)
        yield jnp.asarray(3 + mean + std * rng.normal(size=(4 + i % 3, 3, 5)))


def affine(seed=1):
    """Parameters that are neither 0 nor 1, after which an array may be mistaken."""
    rng = np.random.default_rng(seed)
    names = ("scale", "bias")
    return {name: jnp.asarray(rng.normal(size=peers.FEATURES)) for name in names}


def trained(peer, steps=3):
    layer = peer()
    for x in batches(steps):
        layer.train(x)
    _, stats = layer.module.to_jaxbn(layer.arrays(), **peer.to)
    steps = stats._replace(step=jnp.int32(max(int(stats.step), 1)))
    layer.load(layer.module.from_jaxbn(affine(), steps, **peer.back))
    return layer


def state_of(layer):
    return layer.module.to_jaxbn(layer.arrays(), **layer.to)


@pytest.mark.usefixtures("x64")
@EACH
def test_inference_is_the_same_after_moving_in(peer):
    layer = trained(peer)
    params, stats = state_of(layer)
    [x] = batches(1, seed=2)
    ours = jaxbn.layers.standard(**layer.options)
    y, _ = ours.apply(params, stats, x, training=False)
    assert not np.allclose(y, x, atol=0.1)
    assert_close(y, layer.infer(x), **peer.close)
    jax.tree.map(lambda a, b: assert_close(a, b, **peer.close), params, affine())


@pytest.mark.usefixtures("x64")
@EACH
def test_ten_more_steps_end_in_the_same_state(peer):
    layer = trained(peer)
    params, stats = state_of(layer)
    ours = jaxbn.layers.standard(**layer.options)
    for x in batches(10, seed=3):
        layer.train(x)
        _, stats = ours.apply(params, stats, x, training=True)
    _, expected = state_of(layer)
    assert_close(stats.mean, expected.mean, **peer.close)
    assert_close(stats.var, expected.var, **peer.close)
    assert_close(
        ours.apply(params, stats, x, training=False)[0], layer.infer(x), **peer.close
    )


@pytest.mark.usefixtures("x64")
@EACH
def test_the_way_back(peer):
    """A layer of jaxbn that trained goes on in the other library."""
    ours = jaxbn.layers.standard(**peer.options)
    params, stats = affine(), jaxbn.init_stats(peers.FEATURES, dtype=float)
    for x in batches(3):
        _, stats = ours.apply(params, stats, x, training=True)
    layer = peer()
    layer.load(layer.module.from_jaxbn(params, stats, **peer.back))
    y, _ = ours.apply(params, stats, x, training=False)
    assert_close(layer.infer(x), y, **peer.close)
    for x in batches(10, seed=3):
        layer.train(x)
        _, stats = ours.apply(params, stats, x, training=True)
    assert_close(
        layer.infer(x), ours.apply(params, stats, x, training=False)[0], **peer.close
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("peer", [peers.Linen, peers.Torch, peers.Haiku])
@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_into_the_modules(peer, flavour):
    from flax import nnx

    layer = trained(peer)
    params, stats = state_of(layer)
    stepped = callable(layer.options["momentum"])
    variables = jaxbn.interop.flax.from_jaxbn(params, stats, step=stepped)
    if flavour == "linen":
        module = jaxbn.linen.BatchNorm(**layer.options, param_dtype=float)
    else:
        module = jaxbn.nnx.BatchNorm(5, **layer.options, rngs=nnx.Rngs(0))
        nnx.update(module, {**variables["params"], **variables["batch_stats"]})
    for x in batches(3, seed=4):
        layer.train(x)
        if flavour == "nnx":
            y = (module(x), module(x, use_running_average=True))[1]
        else:
            mutable = {"mutable": ["batch_stats"]}
            _, new = module.apply(variables, x, use_running_average=False, **mutable)
            variables = {**variables, **new}
            y = module.apply(variables, x, use_running_average=True)
    assert_close(y, layer.infer(x), 1e-5, 1e-6)


COUNT = 12  # values per feature in a batch of 4 x 3


@pytest.mark.usefixtures("x64")
def test_from_unbiased_to_biased_and_back():
    """torch's statistics in a layer that tracks biased ones: as if it always had."""
    torch = peers.Torch()
    ours = jaxbn.layers.standard(**{**torch.options, "unbiased": False})
    params, tracked = ours.init(peers.FEATURES)
    tracked = jaxbn.init_stats(peers.FEATURES, dtype=float)
    same = [x[:4] for x in batches(40)]
    for x in same:
        torch.train(x)
        _, tracked = ours.apply(params, tracked, x, training=True)
    _, stats = jaxbn.interop.torch.to_jaxbn(torch.arrays(), unbiased=False, count=COUNT)
    assert_close(stats.mean, tracked.mean, **CLOSE)
    # All but what is left of the first variance, 1, which no batch had.
    assert_close(stats.var, tracked.var, 1e-4)
    again = jaxbn.interop.torch.from_jaxbn(params, stats, unbiased=False, count=COUNT)
    assert_close(again["running_var"], torch.arrays()["running_var"].numpy(), **CLOSE)


@pytest.mark.usefixtures("x64")
def test_equinox_variance_is_off_until_it_is_corrected():
    layer = trained(peers.Equinox, steps=4)
    seen = [x for x in batches(4)]
    weights = 0.9 ** np.arange(4)[::-1]
    variances = np.stack([np.var(np.asarray(x), axis=(0, 1)) for x in seen])
    truth = weights @ variances / weights.sum()
    _, kept = state_of(layer)
    assert_close(kept.var - truth, np.full(5, 0.9**4 / (1 - 0.9**4)), 1e-9)
    _, stats = jaxbn.interop.equinox.to_jaxbn(
        layer.arrays(), momentum=0.9, correct=True
    )
    assert_close(stats.var, truth, 1e-12)


def test_equinox_before_the_first_step():
    for peer in (peers.Equinox, peers.EquinoxEma):
        _, stats = state_of(peer())
        assert_close(stats.mean, np.zeros(5))
        assert_close(stats.var, np.ones(5))
        assert int(stats.step) == 0


def test_haiku_in_bfloat16_and_channels_first():
    ema = {"counter": np.int32(3), "hidden": jnp.ones((1, 4, 1, 1), jnp.bfloat16)}
    ema["average"] = 2 * ema["hidden"]
    to_jaxbn = jaxbn.interop.haiku.to_jaxbn
    arrays = {"mean_ema": ema, "var_ema": ema}
    _, stats = to_jaxbn(arrays, feature_axes=1)
    assert stats.mean.dtype == jnp.float32
    assert_close(stats.mean, np.full(4, 2.0))
    with pytest.raises(ValueError, match="not 1 along axes that are no `feature_axes`"):
        to_jaxbn(arrays)


@pytest.mark.parametrize("fused", [False, True])
def test_keras_lists_and_old_names(fused):
    rng = np.random.default_rng(0)
    weights = [rng.uniform(1, 2, 3).astype(np.float32) for _ in range(4)]
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    to_jaxbn = jaxbn.interop.keras.to_jaxbn
    params, stats = to_jaxbn(weights, fused=fused)
    for given in (
        dict(zip(names, weights, strict=True)),
        {f"bn/{n}:0": w for n, w in zip(names, weights, strict=True)},
    ):
        jax.tree.map(assert_close, to_jaxbn(given, fused=fused), (params, stats))
    _, plain = to_jaxbn(weights[2:], fused=fused)
    assert_close(plain.mean, stats.mean)
    made = jaxbn.interop.keras.from_jaxbn(params, stats, fused=fused, unbiased=fused)
    assert list(made) == list(names)
    [assert_close(a, b) for a, b in zip(made.values(), weights, strict=True)]
    _, biased = to_jaxbn(weights, fused=True, unbiased=False, count=10)
    assert_close(biased.var, stats.var * 0.9, 1e-6)


@pytest.mark.usefixtures("x64")
def test_keras_renorm_goes_on_in_renorm():
    keras = pytest.importorskip("keras", reason=peers.MISSING)

    limits = {"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.7}
    theirs = keras.layers.BatchNormalization(
        momentum=0.9, renorm=True, renorm_momentum=0.9, renorm_clipping=limits,
        dtype="float64",
    )  # fmt: skip
    theirs.build((None, None, 5))
    for x in batches(3):
        theirs(x, training=True)
    arrays = {v.name: v for v in theirs.weights}
    params, stats = jaxbn.interop.keras.to_jaxbn(arrays)
    options = jaxbn.interop.keras.options(momentum=0.9)
    options.pop("unbiased")
    ours = jaxbn.layers.renorm(**options, r_max=1.5, d_max=0.7)
    made = jaxbn.interop.keras.from_jaxbn(params, stats, epsilon=1e-3)
    assert list(made) == [v.name for v in theirs.weights]
    [assert_close(made[n], np.asarray(v), 1e-5) for n, v in arrays.items()]
    for x in batches(10, seed=3):
        y, stats = ours.apply(params, stats, x, training=True)
        assert_close(y, theirs(x, training=True), **peers.Keras.close)
    assert_close(stats.std, theirs.renorm_stddev, **peers.Keras.close)
    y, _ = ours.apply(params, stats, x, training=False)
    assert_close(y, theirs(x, training=False), **peers.Keras.close)


@pytest.mark.parametrize("minus_one", [True, False])
def test_praxis_keeps_gamma_minus_one(minus_one):
    """By its formula: (x − mean)/√(var + 1e-3)·(1 + gamma) + beta."""
    rng = np.random.default_rng(0)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    arrays = {name: rng.uniform(0.1, 1, 3) for name in names}
    x = rng.normal(size=(4, 3))
    factor = arrays["gamma"] + minus_one
    inv = 1 / np.sqrt(arrays["moving_variance"] + 1e-3)
    expected = (x - arrays["moving_mean"]) * inv * factor + arrays["beta"]
    module = jaxbn.interop.praxis
    params, stats = module.to_jaxbn(arrays, minus_one=minus_one)
    layer = jaxbn.layers.standard(**module.options())
    y, _ = layer.apply(params, stats, jnp.asarray(x, jnp.float32), training=False)
    assert_close(y, expected, 1e-5, 1e-6)
    again = module.from_jaxbn(params, stats, minus_one=minus_one)
    [assert_close(again[name], arrays[name], 1e-6, 1e-7) for name in names]
