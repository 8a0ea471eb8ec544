"""The Flax modules: Flax's own, on the verbs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from allpairspy import AllPairs
from data import assert_close, numbers, wide
from flax import nnx

import jaxbn

DTYPES = ("float32", "bfloat16", "float16")
TABLE = list(
    AllPairs(
        [
            DTYPES,  # of x
            (None, *DTYPES),  # dtype
            ("float32", "bfloat16"),  # param_dtype
            (True, False),  # use_fast_variance
            (True, False),  # masked
            (True, False),  # use_scale
            (True, False),  # use_bias
            (-1, 1),  # axis
            (0.9, 0.99),  # momentum
        ]
    )
)
OPTIONS = (
    "dtype",
    "param_dtype",
    "use_fast_variance",
    "use_scale",
    "use_bias",
    "axis",
    "momentum",
)


def case(row):
    x_dtype, dtype, param_dtype, fast, masked, scale, bias, axis, momentum = row
    values = (dtype, param_dtype, fast, scale, bias, axis, momentum)
    options = dict(zip(OPTIONS, values, strict=True))
    options["scale_init"] = nn.initializers.normal(1.0)
    mask = np.arange(8)[:, None, None] % 3 > 0 if masked else None
    return numbers((8, 5, 4), x_dtype), mask, options


def assert_same(got, expected, dtype):
    tol = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}[jnp.dtype(dtype).name]
    jax.tree.map(
        lambda a, b: assert_close(wide(a), wide(b), tol, tol),
        got,
        expected,
    )


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_linen_equals_flax(row):
    x, mask, options = case(row)
    ours, theirs = jaxbn.linen.BatchNorm(**options), nn.BatchNorm(**options)
    assert isinstance(ours, nn.BatchNorm)
    made = [m.init(jax.random.key(3), x, False) for m in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *made)
    dtypes = [jax.tree.map(lambda a: a.dtype, m) for m in made]
    assert dtypes[0] == dtypes[1]

    def train(module, params, x):
        y, new = module.apply(
            {**made[0], "params": params}, x, False, mask=mask, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, new["batch_stats"])

    params = made[0].get("params", {})
    results = [
        jax.value_and_grad(lambda *a, m=m: train(m, *a), (0, 1), has_aux=True)(
            params, x
        )
        for m in (ours, theirs)
    ]
    ((_, (y, stats)), grads), ((_, (y_flax, stats_flax)), grads_flax) = results
    assert y.dtype == y_flax.dtype
    assert_same(y, y_flax, y.dtype)
    assert_same(stats, stats_flax, "float32")
    lowest = min((x.dtype, y.dtype, jnp.dtype(options["param_dtype"])), key=_bits)
    assert_same(grads, grads_flax, lowest)

    variables = {"params": params, "batch_stats": stats}
    y, y_flax = (m.apply(variables, x, True) for m in (ours, theirs))
    assert y.dtype == y_flax.dtype
    assert_same(y, y_flax, y.dtype)


def _bits(dtype):
    return {"float32": 24, "float16": 11, "bfloat16": 8}[jnp.dtype(dtype).name]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_nnx_equals_flax(row):
    x, mask, options = case(row)
    features = x.shape[options["axis"]]
    ours = jaxbn.nnx.BatchNorm(features, rngs=nnx.Rngs(3), **options)
    theirs = nnx.BatchNorm(features, rngs=nnx.Rngs(3), **options)
    assert isinstance(ours, nnx.BatchNorm)
    states = [nnx.to_pure_dict(nnx.state(m)) for m in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *states)

    y, y_flax = ours(x, mask=mask), theirs(x, mask=mask)
    assert y.dtype == y_flax.dtype
    assert_same(y, y_flax, min((y.dtype, x.dtype), key=_bits))
    # Flax rounds x to `dtype` before it takes the statistics, and so does this.
    stats = [nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (ours, theirs)]
    assert_same(*stats, "float32")

    for m in (ours, theirs):
        m.eval()
    y, y_flax = ours(x), theirs(x)
    assert y.dtype == y_flax.dtype
    if options["dtype"] in (None, "float32"):  # Otherwise Flax rounds the statistics.
        assert_same(y, y_flax, y.dtype)


def test_fast_variance_is_the_running_mean_as_shift():
    x = numbers((64, 4), "float32", mean=1e3, std=1.0)
    truth = oracle.moments(wide(x), (0,)).var[0]
    errors = {}
    for fast in (True, False):
        layer = jaxbn.linen.BatchNorm(False, momentum=0.0, use_fast_variance=fast)
        variables = layer.init(jax.random.key(0), x)
        for call in ("cold", "warm"):
            _, new = layer.apply(variables, x, mutable=["batch_stats"])
            variables = {**variables, **new}
            error = np.max(np.abs(new["batch_stats"]["var"] / truth - 1))
            errors[fast, call] = error
    assert errors[True, "cold"] > 1e-3  # a shift of 0: Flax's formula
    assert errors[True, "warm"] < 1e-6
    assert errors[False, "cold"] < 1e-6


@pytest.mark.parametrize("momentum", [jaxbn.debiased(0.9), jaxbn.cumulative()])
def test_momentum_as_a_function_of_the_step(momentum):
    x = numbers((16, 3), "float32")
    layer = jaxbn.linen.BatchNorm(False, momentum=momentum)
    variables = layer.init(jax.random.key(0), x)
    assert sorted(variables["batch_stats"]) == ["mean", "step", "var"]
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    assert_close(new["batch_stats"]["mean"], x.mean(0), 1e-5, 1e-6)
    assert new["batch_stats"]["step"] == 1

    module = jaxbn.nnx.BatchNorm(3, momentum=momentum, rngs=nnx.Rngs(0))
    module(x)
    module(x)
    assert_close(module.mean[...], x.mean(0), 1e-5, 1e-6)
    assert module.step[...] == 2


def test_derivatives_and_unbiased_reach_the_verbs():
    x = numbers((5, 3), "float32")
    layer = jaxbn.linen.BatchNorm(False, momentum=0.0, unbiased=True, derivatives="jvp")
    variables = layer.init(jax.random.key(0), x)
    f = lambda x: layer.apply(variables, x, mutable=["batch_stats"])
    (_, new), _ = jax.jvp(f, (x,), (x,))  # forward mode
    assert_close(new["batch_stats"]["var"], np.var(x, 0, ddof=1), 1e-5)
    module = jaxbn.nnx.BatchNorm(
        3, momentum=0.0, unbiased=True, derivatives="jvp", rngs=nnx.Rngs(0)
    )
    jax.jvp(lambda x: nnx.clone(module)(x), (x,), (x,))
    module(x)
    assert_close(module.var[...], np.var(x, 0, ddof=1), 1e-5)


def test_nothing_is_updated_and_nothing_sent_while_initializing():
    x = numbers((5, 3), "float32")
    layer = jaxbn.linen.BatchNorm(False, axis_name="not_there")
    variables = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)


@pytest.mark.parametrize("fast", [True, False])
def test_empty_mask_leaves_the_statistics(fast):
    x = numbers((5, 3), "float32").at[0].set(jnp.nan)
    layer = jaxbn.linen.BatchNorm(False, use_fast_variance=fast)
    variables = layer.init(jax.random.key(0), x)
    mask = jnp.zeros((5, 1), bool)
    y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"]
    )
    assert np.all(np.isfinite(y[1:]))


def test_integers_come_in_as_flax_takes_them():
    x = jnp.arange(12).reshape(4, 3)
    ours, theirs = jaxbn.linen.BatchNorm(False), nn.BatchNorm(False)
    variables = theirs.init(jax.random.key(0), x)
    y, y_flax = (
        m.apply(variables, x, mutable=["batch_stats"])[0] for m in (ours, theirs)
    )
    assert_close(y, y_flax, 1e-5, 1e-6)


def test_complex_input():
    x = numbers((6, 3), "complex64")
    layer = jaxbn.linen.BatchNorm(False, momentum=0.0)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    assert_close(new["batch_stats"]["mean"], x.mean(0), 1e-5, 1e-6)
    assert new["batch_stats"]["var"].dtype == jnp.float32
    assert y.dtype == jnp.complex64

    module = jaxbn.nnx.BatchNorm(3, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
    assert_close(module(x), y, 1e-5, 1e-6)
    with pytest.raises(TypeError, match="imaginary part"):
        jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x)


def test_use_running_average_once_and_only_once():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="use_running_average"):
        jaxbn.linen.BatchNorm().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="use_running_average"):
        jaxbn.linen.BatchNorm(True).init(jax.random.key(0), x, True)
    module = jaxbn.nnx.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"neither to the constructor.*nor to the call"
    ):
        module(x)
    module.eval()
    assert_close(module(x), 1, 1e-4)


def test_nnx_trains_under_its_own_jit_and_grad():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(1))
    )
    x = numbers((16, 3), "float32")

    @nnx.jit
    def step(model, x):
        return nnx.grad(lambda m: jnp.sum(m(x) ** 3))(model)

    grads = step(model, x)
    assert model.layers[1].mean[...].any()
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_linen_module_in_a_training_scan(x64):
    layer = jaxbn.linen.BatchNorm(False)
    xs = numbers((4, 8, 3), "float64")
    variables = layer.init(jax.random.key(0), xs[0])

    def step(stats, x):
        y, new = layer.apply(
            {**variables, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return new["batch_stats"], y

    stats, _ = jax.lax.scan(step, variables["batch_stats"], xs)
    assert stats["mean"].dtype == jnp.float32


def test_momentum_turned_into_a_function_too_late():
    module = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    module.momentum = jaxbn.cumulative()
    with pytest.raises(ValueError, match="Pass it to the constructor"):
        module(jnp.ones((4, 3)))
