"""Where Flax's batch norm is wrong: its modules and these, side by side."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import assert_close, numbers, wide
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxbn

FLAX, OURS = nn.BatchNorm, jaxbn.linen.BatchNorm


def running_stats(cls, x, mask=None, steps=1, **options):
    """mean and var after some steps with momentum 0: those of the last batch."""
    layer = cls(False, momentum=0.0, **options)
    variables = layer.init(jax.random.key(0), x)
    for _ in range(steps):
        _, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        variables = {**variables, **new}
    return variables["batch_stats"]


def over_devices(cls, x, mask, **options):
    """The same over eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda x, mask: running_stats(cls, x, mask, axis_name="data", **options)
    return jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    )(x, mask)


@pytest.mark.parametrize("fast", [True, False])
def test_masks_that_differ_between_devices(fast):
    x = numbers((32, 3), "float32") + jnp.arange(32.0)[:, None]
    mask = np.arange(32)[:, None] % 4 <= np.arange(32)[:, None] // 8  # 1 to 4 of 4
    truth = oracle.moments(wide(x), (0,), mask)
    ours, flax = (
        over_devices(cls, x, mask, use_fast_variance=fast) for cls in (OURS, FLAX)
    )
    assert_close(ours["mean"], truth.mean[0], 1e-5)
    assert_close(ours["var"], truth.var[0], 1e-4 if fast else 1e-5)
    assert np.max(np.abs(flax["mean"] - truth.mean[0])) > 1  # a mean of means


def test_a_device_that_is_all_masked():
    x = numbers((16, 3), "float32")
    mask = np.arange(16)[:, None] >= 2  # none of the first device's two
    truth = oracle.moments(wide(x), (0,), mask)
    ours, flax = (over_devices(cls, x, mask) for cls in (OURS, FLAX))
    assert_close(ours["mean"], truth.mean[0], 1e-5)
    assert_close(ours["var"], truth.var[0], 1e-5)
    assert np.all(np.isnan(flax["mean"]))


@pytest.mark.parametrize("fast", [True, False])
def test_a_batch_that_is_all_masked(fast):
    x = numbers((5, 3), "float32").at[0].set(jnp.nan)
    mask = jnp.zeros((5, 1), bool)
    ours, flax = (
        running_stats(cls, x, mask, use_fast_variance=fast) for cls in (OURS, FLAX)
    )
    np.testing.assert_array_equal(ours["mean"], 0)
    np.testing.assert_array_equal(ours["var"], 1)
    assert np.all(np.isnan(flax["mean"]))

    for cls, right in [(jaxbn.nnx.BatchNorm, True), (nnx.BatchNorm, False)]:
        module = cls(3, use_fast_variance=fast, rngs=nnx.Rngs(0))
        y = module(x, mask=mask)
        assert np.all(np.isfinite(y[1:])) == right
        assert np.all(module.var[...] == 1) == right


@pytest.mark.parametrize("cls", [OURS, FLAX])
def test_nan_under_the_mask(cls):
    x = numbers((5, 3), "float32").at[0].set(jnp.nan)
    mask = (jnp.arange(5) > 0)[:, None]
    layer = cls(False)
    variables = layer.init(jax.random.key(0), x)

    def loss(params, x):
        given = {**variables, "params": params}
        y, _ = layer.apply(given, x, mask=mask, mutable=["batch_stats"])
        return jnp.sum(jnp.where(mask, y, 0) ** 3)

    grads = jax.grad(loss, (0, 1))(variables["params"], x)
    finite = [bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)]
    assert all(finite) == (cls is OURS)


def test_groups_of_devices():
    x = numbers((8, 2, 3), "float32")
    groups = ((0, 1, 2), (3, 4, 5, 6, 7))
    run = lambda cls: jax.vmap(
        lambda x: running_stats(cls, x, axis_name="i", axis_index_groups=groups)["var"],
        axis_name="i",
    )(x)
    ours = run(OURS)
    assert_close(ours[0], x[:3].reshape(6, 3).var(0), 1e-5)
    assert_close(ours[7], x[3:].reshape(10, 3).var(0), 1e-5)
    with pytest.raises(NotImplementedError, match="axis_index_groups"):
        run(FLAX)


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_variance_when_warm(mean):
    x = numbers((256, 4), "float32", mean=mean, std=1.0)
    truth = oracle.moments(wide(x), (0,)).var[0]
    error = lambda stats: np.max(np.abs(stats["var"] / truth - 1))
    assert error(running_stats(OURS, x, steps=2)) < 1e-6
    assert error(running_stats(OURS, x, use_fast_variance=False)) < 1e-6
    assert error(running_stats(FLAX, x, steps=2)) > 1e-2
    # Cold, at a running mean of 0, XLA's variance about it is Flax's.
    assert error(running_stats(OURS, x, implementation="xla")) < 1e-6
    about_mean = {"use_fast_variance": "running_mean", "implementation": "xla"}
    assert error(running_stats(OURS, x, **about_mean)) > 1e-3


@pytest.mark.parametrize("far", [10, 100])
def test_variance_far_from_the_running_mean(far):
    """What docs/migrating/flax.md says of it."""
    x = numbers((4096, 4), "float32", mean=0.0, std=1.0)
    layer = OURS(False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    variables["batch_stats"]["mean"] += far
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    truth = oracle.moments(wide(x), (0,)).var[0]
    assert_close(new["batch_stats"]["var"], truth, 3e-7 * (1 + far**2))


def test_statistics_restored_narrow_arrive():
    x = numbers((64, 3), "float32", mean=5.0)
    layer = OURS(False)
    variables = layer.init(jax.random.key(0), x)
    variables["batch_stats"] = jax.tree.map(
        lambda a: np.asarray(a.astype(jnp.bfloat16)), variables["batch_stats"]
    )
    step = jax.jit(lambda v: layer.apply(v, x, mutable=["batch_stats"])[1])
    for _ in range(600):
        variables = {**variables, **step(variables)}
    stats = variables["batch_stats"]
    assert stats["mean"].dtype == stats["var"].dtype == jnp.bfloat16
    assert_close(wide(stats["mean"]), x.mean(0), 5e-3)


def test_state_keeps_its_dtype_through_a_scan(x64):
    xs = numbers((4, 8, 3), "float64")

    def train(cls):
        layer = cls(False)
        variables = layer.init(jax.random.key(0), xs[0])

        def step(stats, x):
            given = {**variables, "batch_stats": stats}
            y, new = layer.apply(given, x, mutable=["batch_stats"])
            return new["batch_stats"], y

        return jax.lax.scan(step, variables["batch_stats"], xs)[0]

    stats = train(OURS)
    assert (stats["mean"].dtype, stats["var"].dtype) == (jnp.float32, jnp.float32)
    with pytest.raises(TypeError, match="carry"):
        train(FLAX)


def round_all(args, *, dtype):
    """A `promote_dtype` that rounds what it is given."""
    return tuple(a if a is None else a.astype(jnp.bfloat16) for a in args)


@pytest.mark.parametrize(
    "options",
    [{"dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16, "promote_dtype": round_all}],
    ids=["dtype", "promote_dtype"],
)
def test_evaluation_in_bfloat16_has_statistics_in_float32(options):
    x = numbers((512, 8), "float32", mean=20.0, std=1.0)
    truth = oracle.moments(wide(x), (0,))
    expected = oracle.normalize(wide(x.astype(jnp.bfloat16)), truth.mean, truth.var)
    errors = []
    for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm):
        module = cls(8, **options, rngs=nnx.Rngs(0))
        module.mean[...] = jnp.asarray(truth.mean[0], jnp.float32)
        module.var[...] = jnp.asarray(truth.var[0], jnp.float32)
        module.eval()
        y = module(x)
        assert y.dtype == jnp.bfloat16
        errors.append(np.max(np.abs(wide(y) - expected)))
    ours, flax = errors
    assert ours < 0.01 < 4 * 0.01 < flax


def test_sums_are_in_float32_where_the_state_is_narrow():
    x = numbers((4096, 4), "bfloat16", mean=20.0, std=1.0)
    truth = oracle.moments(wide(x), (0,)).var[0]
    options = {"force_float32_reductions": False, "param_dtype": jnp.bfloat16}
    ours, flax = (running_stats(cls, x, **options)["var"] for cls in (OURS, FLAX))
    assert ours.dtype == jnp.bfloat16
    assert_close(wide(ours), truth, 1e-2)
    assert np.max(np.abs(wide(flax) / truth - 1)) > 0.1


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_masks_that_are_numbers(kind):
    x = numbers((8, 3), "float32")
    mask = (np.arange(8) % 3 > 0)[:, None]
    stats = []
    for m in (mask, mask.astype(kind)):
        module = jaxbn.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
        module(x, mask=m)
        stats.append(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
        assert_close(module.mean[...], x[mask[:, 0]].mean(0), 1e-5, 1e-6)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6, 1e-6), *stats)
    with pytest.raises(ValueError, match="boolean"):
        nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x, mask=mask.astype(kind))


def test_masks_may_be_frequencies():
    x = numbers((3, 2), "float32")
    often = np.array([1, 0, 3])[:, None]
    repeated = np.repeat(x, often[:, 0], 0)
    stats = running_stats(OURS, x, often)
    assert_close(stats["mean"], repeated.mean(0), 1e-6, 1e-6)
    assert_close(stats["var"], repeated.var(0), 1e-5)


@pytest.mark.parametrize("axis", [(1, 3), [-1, 1]])
def test_nnx_with_several_feature_axes(axis):
    assert jaxbn.nnx.BatchNorm(np.int64(3), rngs=nnx.Rngs(0)).num_features == 3
    x = numbers((6, 4, 5, 3), "float32")
    key = nnx.initializers.normal(1.0)
    module = jaxbn.nnx.BatchNorm((4, 3), axis=axis, scale_init=key, rngs=nnx.Rngs(0))
    assert module.scale[...].shape == module.mean[...].shape == (4, 3)
    y = module(x)
    layer = nn.BatchNorm(False, axis=(1, 3))
    y_linen, new = layer.apply(
        {
            "params": {"scale": module.scale[...], "bias": module.bias[...]},
            "batch_stats": {"mean": jnp.zeros((4, 3)), "var": jnp.ones((4, 3))},
        },
        x,
        mutable=["batch_stats"],
    )
    assert_close(y, y_linen, 1e-5, 1e-5)
    assert_close(module.var[...], new["batch_stats"]["var"], 1e-5)
    with pytest.raises(TypeError):
        nnx.BatchNorm((4, 3), axis=(1, 3), rngs=nnx.Rngs(0))


class TestComplex:
    x = numbers((6, 3), "complex64")

    def test_linen_makes_its_mean_complex_at_init(self):
        dtypes = {}
        for cls in (OURS, FLAX):
            layer = cls(False, momentum=0.0)
            y, variables = layer.init_with_output(jax.random.key(0), self.x)
            _, new = layer.apply(variables, self.x, mutable=["batch_stats"])
            assert y.dtype == jnp.complex64
            assert_close(new["batch_stats"]["mean"], self.x.mean(0), 1e-5, 1e-6)
            dtypes[cls] = [s["batch_stats"]["mean"].dtype for s in (variables, new)]
            assert new["batch_stats"]["var"].dtype == jnp.float32
        assert dtypes[OURS] == [jnp.complex64, jnp.complex64]
        assert dtypes[FLAX] == [jnp.float32, jnp.complex64]  # no carry of a scan

    def test_nnx_takes_it_with_complex_param_dtype(self):
        module = jaxbn.nnx.BatchNorm(3, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
        assert module.mean[...].dtype == jnp.complex64
        y = OURS(False).init_with_output(jax.random.key(0), self.x)[0]
        assert_close(module(self.x), y, 1e-5, 1e-6)
        with pytest.raises(TypeError, match=r"imaginary.*param_dtype=jnp.complex64"):
            jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(self.x)
        with pytest.raises(TypeError, match=r"imaginary.*param_dtype=jnp.complex64"):
            jaxbn.nnx.BatchNorm(3, dtype=complex, rngs=nnx.Rngs(0))(self.x.real)
        flax = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        with warnings.catch_warnings(action="ignore"):
            flax(self.x)
        assert flax.mean[...].dtype == jnp.float32

    @pytest.mark.parametrize("given", ["param_dtype", "dtype"])
    @pytest.mark.parametrize("inference", [True, False])
    def test_complex_output_of_real_input(self, given, inference):
        x, results = self.x.real, []
        for cls in (OURS, FLAX):
            layer = cls(inference, **{given: jnp.complex64})
            y, variables = layer.init_with_output(jax.random.key(0), x)
            if not inference:
                y, _ = layer.apply(variables, x, mutable=["batch_stats"])
            results.append((y, variables))
        dtypes = [jax.tree.map(lambda a: a.dtype, r) for r in results]
        assert dtypes[0] == dtypes[1]
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, 1e-5), *results)

    def test_real_input_for_complex_statistics(self):
        x = self.x.real
        m = oracle.moments(wide(x), (0,))
        expected = oracle.normalize(wide(x), m.mean, m.var)
        module = jaxbn.nnx.BatchNorm(3, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
        layer = OURS(False)
        variables = layer.init(jax.random.key(0), self.x)
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        for out, mean in [
            (module(x), module.mean[...]),
            (y, new["batch_stats"]["mean"]),
        ]:
            assert out.dtype == mean.dtype == jnp.complex64
            assert_close(out, expected, 1e-5, 1e-5)
            assert_close(mean, 0.01 * m.mean[0], 1e-5, 1e-7)

    def test_complex_input_for_real_statistics_is_refused(self):
        layer = OURS(False)
        variables = layer.init(jax.random.key(0), self.x.real)
        with pytest.raises(TypeError, match=r"imaginary.*Initialize with a complex"):
            layer.apply(variables, self.x, mutable=["batch_stats"])
