"""The CPU kernels on every kind of shape: the values, and which are left to XLA."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import spread
from allpairspy import AllPairs
from data import assert_close, numbers, reduced_axes, squeeze
from jax.sharding import PartitionSpec as P

import jaxbn

pytestmark = pytest.mark.optimized

jaxbn_cpu = pytest.importorskip(
    "jaxbn_cpu", reason="needs jaxbn-cpu: `pip install ./native`"
)

LAYOUTS = ("last", "first", "two axes", "few behind")
DTYPES = ("float32", "bfloat16")


def shape_of(layout, rows, channels):
    """The shape and the feature axes: so many channels of so many values each."""
    if layout == "last":
        return (rows, channels), (1,)
    if layout == "two axes":
        return (*two_factors(channels), rows), (0, 1)
    outer, inner = two_factors(rows)
    if layout == "few behind":
        outer, inner = max(outer, inner), min(outer, inner)
    return (outer, channels, inner), (1,)


def two_factors(n):
    small = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return small, n // small


def step(implementation, axes):
    def both(x, scale, bias, dy, weights=None):
        f = lambda *args: jaxbn.batch_norm(
            *args, feature_axes=axes, weights=weights, implementation=implementation
        )
        y, vjp, m = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, m, vjp(dy)

    return jax.jit(both)


def kernels_in(compiled):
    return sorted(set(re.findall(r'custom_call_target="jaxbn_(\w+)"', compiled)))


@pytest.mark.parametrize(
    ("rows", "channels", "layout", "dtype"),
    list(AllPairs([[1, 2, 8, 1000, 10**6], [1, 32, 10**5], LAYOUTS, DTYPES])),
)
def test_who_computes(rows, channels, layout, dtype):
    """XLA if there is nothing to sum; and the backward pass of a small array."""
    shape, axes = shape_of(layout, rows, channels)
    x = jax.ShapeDtypeStruct(shape, dtype)
    vector = jax.ShapeDtypeStruct([shape[axis] for axis in axes], np.float32)
    given = x, vector, vector, x
    used = kernels_in(step(None, axes).lower(*given).compile().as_text())
    backward = ["cotangents", "input_cotangent"] if rows * channels >= 4096 else []
    assert used == ([] if rows == 1 else [*backward, "moments"])


def test_demanded_kernels_are_used_on_every_shape():
    x, vector = numbers((1, 5), "float32"), jnp.ones(5)
    used = kernels_in(
        step("native", (1,)).lower(x, vector, vector, x).compile().as_text()
    )
    assert len(used) == 3


def test_one_value_on_each_device_is_summed_by_the_kernels():
    """About a shift that is far, XLA would lose the variance."""
    x = numbers((8, 3), "float32", mean=1e4, std=1.0)
    f = partial(jaxbn.moments, shift=jnp.zeros(3), axis_name="data")
    places = {"in_specs": P("data"), "out_specs": P()}
    m = jax.jit(jax.shard_map(f, mesh=spread.mesh_of(8), **places))(x)
    assert_close(m.var, oracle.moments(x, (0,)).var[0], rtol=1e-5)


# Rows that are few, or not; channels that fill no vector, several, or several parts.
ROWS = [1, 2, 3, 4, 8, 9, 31, 70, 1000]
CHANNELS = [1, 3, 8, 33, 1024]
CASES = [
    *AllPairs([ROWS, CHANNELS, LAYOUTS, DTYPES, [False, True], [False, True]]),
    [4, 70001, "last", "float32", True, False],
    [20, 9001, "last", "bfloat16", True, True],
    [6, 40000, "first", "float32", True, False],
    [90, 3000, "few behind", "bfloat16", True, False],
    [300000, 3, "two axes", "float32", True, True],
    [300000, 1, "first", "bfloat16", True, True],
]


@pytest.mark.parametrize(
    ("rows", "channels", "layout", "dtype", "far", "weighted"), CASES
)
def test_values(rows, channels, layout, dtype, far, weighted):
    """`far` is a mean of 10⁴ standard deviations; in bfloat16, neighbours in 8 bits."""
    shape, axes = shape_of(layout, rows, channels)
    reduced = reduced_axes(shape, axes)
    x, dy = numbers(shape, dtype, mean=1e4 if far else 1, std=1), numbers(shape, dtype)
    if far and dtype == "bfloat16":
        steps = np.random.default_rng(0).integers(0, 3, size=shape)
        x = jnp.asarray(256 + 2.0 * steps, dtype)
    w = None
    if weighted:
        each = [1 if axis in axes else n for axis, n in enumerate(shape)]
        w = np.random.default_rng(1).integers(0, 3, size=each).astype(np.float32)
        w.flat[0] = 1
        x = jnp.where(w > 0, x, jnp.nan)
    features = [shape[axis] for axis in axes]
    scale, bias = numbers(features, "float32", 5), numbers(features, "float32", 6)
    y, m, (dx, dscale, dbias) = step("native", axes)(x, scale, bias, dy, w)

    truth = oracle.moments(x, reduced, w)
    assert_close(m.mean, squeeze(truth.mean, reduced), rtol=1e-6, atol=1e-6)
    assert_close(m.var, squeeze(truth.var, reduced), rtol=2e-6, atol=1e-30)
    assert_close(dbias, np.asarray(dy, np.float64).sum(reduced), rtol=1e-5, atol=1e-2)
    if far:
        return  # x̂ has no more digits than x.
    at = np.expand_dims(scale, reduced)
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-3
    for got, wide in zip(
        (dx, dscale), oracle.vjp(x, dy, reduced, at, w)[:2], strict=True
    ):
        wide = wide if wide.shape == got.shape else squeeze(wide, reduced)
        size = float(np.abs(wide).max(initial=1))
        assert_close(got, wide, rtol=tolerance, atol=tolerance * size)
    seen = oracle.normalize(x, truth.mean, truth.var, at, np.expand_dims(bias, reduced))
    where = np.broadcast_to(True if w is None else w > 0, shape)
    size = float(np.abs(seen[where]).max(initial=1))
    assert_close(
        np.asarray(y, np.float64)[where], seen[where], tolerance, tolerance * size
    )
