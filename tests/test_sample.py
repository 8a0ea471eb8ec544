"""`shift="sample"`: one pass about a sample of the batch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import _sample, layers


@pytest.fixture(autouse=True, scope="module")
def small_batches_are_sampled():
    """Otherwise one sample has all positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sample, "SMALL", 0)
        jax.clear_caches()
        yield
    jax.clear_caches()


SHAPES = [(1, 3), (2, 3), (7, 3), (96, 3), (1000, 3), (4, 12, 10, 3), (1, 40, 40, 3)]


def hard(kind, shape, mean, rng):
    """Data of a kind, whose standard deviation is about 1."""
    x = rng.standard_normal(shape)
    if kind == "sorted":
        x = np.sort(x.reshape(-1, shape[-1]), 0).reshape(shape)
    elif kind == "sparse":
        x = np.where(rng.random(shape) < 0.01, 10 * x, 0)
    elif kind == "two clusters":
        x = np.where(rng.random(shape) < 0.5, -1, 1) + 1e-3 * x
    elif kind == "border" and len(shape) == 4:
        x[:, :1] = x[:, -1:] = x[:, :, :1] = x[:, :, -1:] = 3
    elif kind == "periodic":
        x[::4] += 3
    return (x + mean).astype(np.float32)


def exact(x, feature_axes=-1, weights=None):
    """The oracle's moments, with the features alone."""
    kept = {axis % np.ndim(x) for axis in np.atleast_1d(feature_axes)}
    reduced = tuple(axis for axis in range(np.ndim(x)) if axis not in kept)
    m = oracle.moments(x, reduced, weights)
    return m._replace(mean=m.mean.squeeze(reduced), var=m.var.squeeze(reduced))


@functools.partial(jax.jit, static_argnames="feature_axes")
def found(x, **options):
    return jaxbn.moments(x, shift="sample", implementation="xla", **options)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(
        ["normal", "sorted", "sparse", "two clusters", "border", "periodic"]
    ),
    shape=st.sampled_from(SHAPES),
    mean=st.sampled_from([0.0, 10.0, -1e3, 1e4]),
    seed=st.integers(0, 9),
)
def test_exact_on_hard_data(kind, shape, mean, seed):
    x = hard(kind, shape, mean, np.random.default_rng(seed))
    m, expected = found(x), exact(x)
    std = np.sqrt(expected.var)
    np.testing.assert_array_less(
        np.abs(m.mean - expected.mean), 1e-6 * (np.abs(expected.mean) + std) + 1e-12
    )
    # A few samples of small batches may be several standard deviations off.
    np.testing.assert_allclose(m.var, expected.var, rtol=2e-5, atol=1e-10)


@pytest.mark.parametrize("shape", [(4096, 3), (64, 12, 12, 3)])
def test_an_outlier_anywhere_takes_no_shift_away(shape):
    """Were it in the shift, the variance would be off by more than its own size."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) + 100
    rows = x.reshape(-1, 3)
    moments = jax.jit(
        lambda at: found(jnp.asarray(rows).at[at, 0].set(1e7).reshape(shape))
    )
    for at in range(0, len(rows), 61 if len(rows) > 5000 else 11):
        m = moments(at)
        clean = exact(x)
        np.testing.assert_allclose(m.var[1:], clean.var[1:], rtol=2e-6)
        n = len(rows)
        outlier = (1e7 - clean.mean[0]) ** 2 * (n - 1) / n**2
        np.testing.assert_allclose(m.var[0], outlier, rtol=1e-4)


@pytest.mark.parametrize("axes", [0, 1, (0, 2), (1, 3), (0, 1, 2, 3), ()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_any_feature_axes_and_dtype(axes, dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((6, 5, 8, 4)) + 100, dtype)
    if dtype == "complex64":
        x = x + 50j
    m = found(x, feature_axes=axes)
    wide = complex if dtype == "complex64" else float
    expected = exact(np.asarray(x, wide), axes)
    np.testing.assert_allclose(m.mean, expected.mean, rtol=1e-5)
    np.testing.assert_allclose(m.var, expected.var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.01])
def test_masked_positions_are_no_sample(kept):
    rng = np.random.default_rng(2)
    mask = rng.random((512, 1)) < kept
    x = np.where(mask, rng.standard_normal((512, 3)) + 1e3, np.nan).astype(np.float32)
    m = found(x, weights=mask, feature_axes=-1)
    expected = exact(x, weights=mask)
    # Where no position of a sample is left, the shift is 0.
    rtol = 1e-5 if kept > 0.1 else 1
    np.testing.assert_allclose(m.var, expected.var, rtol=rtol)
    # A layer has its running mean for that.
    layer = layers.standard(momentum=0.0, implementation="xla")
    params, state = layer.init(3)
    near = state._replace(mean=jnp.full(3, 999.0))
    _, new = layer.apply(params, near, x, weights=mask, training=True)
    np.testing.assert_allclose(new.var, expected.var, rtol=1e-5)


def test_of_a_small_batch_all_is_sampled(monkeypatch):
    monkeypatch.setattr(_sample, "SMALL", 2**20)
    jax.clear_caches()
    rng = np.random.default_rng(2)
    mask = rng.random((512, 1)) < 0.01
    x = np.where(mask, rng.standard_normal((512, 3)) + 1e3, np.nan).astype(np.float32)
    m, expected = found(x, weights=mask), exact(x, weights=mask)
    np.testing.assert_allclose(m.var, expected.var, rtol=1e-5)
    jax.clear_caches()


def test_nothing_to_sample():
    m = found(jnp.zeros((0, 3)))
    assert np.array_equal(m.mean, np.zeros(3))
    m = found(jnp.ones((4, 3)), weights=jnp.zeros((4, 1), bool))
    assert np.array_equal(m.var, np.zeros(3))
    assert m.count == 0


def test_all_derivatives_are_those_of_two_passes():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((12, 3)), jnp.float32)

    def loss(x, shift):
        y, m = jaxbn.batch_norm(x, shift=shift, implementation="xla")
        return jnp.sum(jnp.sin(y)) + jnp.sum(m.var * m.mean)

    for of in (jax.grad, jax.hessian):
        one, two = (of(loss)(x, shift) for shift in ("sample", None))
        np.testing.assert_allclose(one, two, atol=2e-5)
    _, tangent = jax.jvp(lambda x: jaxbn.moments(x, shift="sample").mean, (x,), (x,))
    np.testing.assert_allclose(tangent, x.mean(0), atol=1e-6)


def test_mapped_and_of_a_symbolic_batch():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((5, 32, 3)) + 1e3)
    m = jax.vmap(found)(x)
    expected = np.stack([exact(part).var for part in x])
    np.testing.assert_allclose(m.var, expected, rtol=1e-5)
    shape = export.symbolic_shape("b, 3")
    program = export.export(jax.jit(lambda x: tuple(found(x))))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    _, var, _ = program.call(x[0])
    np.testing.assert_allclose(var, expected[0], rtol=1e-5)


def collectives(compiled):
    """The name of each collective of a program, and the length of its operands."""
    lines = re.findall(
        r"= (\S+|\(.*?\)) (all-[a-z]+|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    return [(name, length(shapes)) for shapes, name in lines]


def length(shapes):
    lists = re.findall(r"\[([\d,]*)\]", shapes)
    return sum(int(np.prod([int(n) for n in one.split(",") if n])) for one in lists)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [P("a"), P(("a", "b")), P("a", "b"), P(None, "b")])
@pytest.mark.parametrize("batch", [64, 48, 40])
def test_sharded_batches_send_no_more_than_the_sample(kind, spec, batch):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    x = (
        np.random.default_rng(5).standard_normal((batch, 6, 5, 3)).astype(np.float32)
        + 1e3
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        compiled = jax.jit(found).lower(placed).compile()
        m = compiled(placed)
    np.testing.assert_allclose(m.var, exact(x).var, rtol=1e-5)
    sent = collectives(compiled)
    assert sent
    for name, size in sent:
        assert name in ("all-reduce", "collective-permute"), name
        assert size <= x.size / 8 / 2, (name, size)  # Half of a device's part.


@pytest.mark.parametrize("check", [True, False])
def test_one_small_all_reduce_more_over_named_axes(check):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = np.random.default_rng(6).standard_normal((64, 3)).astype(np.float32) + 1e3

    def moments(shift):
        def local(x):
            return jaxbn.moments(x, shift=shift, axis_name="a", implementation="xla")

        options = {"in_specs": P("a"), "out_specs": P(), "check_vma": check}
        return jax.jit(jax.shard_map(local, mesh=mesh, **options))

    compiled = moments("sample").lower(x).compile()
    np.testing.assert_allclose(compiled(x).var, exact(x).var, rtol=1e-5)
    # The sums and sizes of three samples, then the sums of the batch.
    assert sorted(collectives(compiled)) == [("all-reduce", 7), ("all-reduce", 12)]
    about_running_mean = moments(jnp.full(3, 1e3)).lower(x).compile()
    assert len(collectives(about_running_mean)) == 1


CHOICES = {
    "sample": 2e-6,
    "running_mean": None,
    True: 2e-6,
    False: 2e-6,
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "make",
    [
        layers.standard,
        lambda **o: layers.ghost(num_groups=1, **o),
        lambda **o: layers.renorm(tracks="var", **o),
        lambda **o: layers.conditional(num_classes=2, **o),
        layers.in_place,
    ],
)
def test_layers_are_exact_from_the_first_step(make, choice):
    x = np.random.default_rng(7).standard_normal((256, 3)).astype(np.float32) + 1e3
    layer = make(momentum=0.0, use_fast_variance=choice, implementation="xla")
    params, state = layer.init(3)
    given = {"condition": np.zeros(256, int)} if "conditional" in repr(layer) else {}
    _, new = layer.apply(params, state, x, training=True, **given)
    error = np.max(np.abs(new.var / exact(x).var - 1))
    if CHOICES[choice] is None:
        assert error > 1e-3  # The running mean is 0, 1000 deviations away.
    else:
        assert error < CHOICES[choice]


def test_over_a_named_axis_true_is_the_running_mean():
    x = np.random.default_rng(8).standard_normal((4, 64, 3)).astype(np.float32) + 1e3

    def variance(choice):
        layer = layers.standard(
            momentum=0.0, use_fast_variance=choice, axis_name="i", implementation="xla"
        )
        _, state = layer.init(3)
        params, _ = layer.init(3)

        def step(x):
            return layer.apply(params, state, x, training=True)[1].var

        return jax.vmap(step, axis_name="i")(x)[0]

    assert np.array_equal(variance(True), variance("running_mean"))
    np.testing.assert_allclose(
        variance("sample"), np.var(x, (0, 1), dtype=float), rtol=1e-5
    )


def test_other_words():
    with pytest.raises(ValueError, match="`shift` must be an array, 'sample' or None"):
        jaxbn.moments(jnp.ones((2, 3)), shift="mean")
    with pytest.raises(
        ValueError, match="`use_fast_variance` must be True, False, 'sample'"
    ):
        layers.standard(use_fast_variance="mean")


def test_on_several_devices_true_is_the_running_mean():
    """Under `jit`, for which nothing but the program's devices tells that it is so."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = hard("normal", (64, 3), 1e3, np.random.default_rng(9))
    placed = jax.device_put(x, NamedSharding(mesh, P("a")))

    def compiled(choice):
        layer = layers.standard(use_fast_variance=choice, implementation="xla")
        params, state = layer.init(3)
        step = jax.jit(lambda x: layer.apply(params, state, x, training=True))
        return step.lower(placed).compile()

    found = {choice: collectives(compiled(choice)) for choice in (*CHOICES,)}
    # (How many are combined depends on XLA's version.)
    assert len(found[True]) == len(found["running_mean"]) < len(found["sample"])
