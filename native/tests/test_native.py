"""The kernels through XLA, beside NumPy in float64."""

import pathlib
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import jaxbn_cpu
import numpy as np
import pytest

pytestmark = pytest.mark.optimized

NATIVE = pathlib.Path(__file__).parents[1]
SHAPES = [
    (37, 3, 1),
    (4096, 64, 1),
    (50, 10007, 1),
    (6, 5, 49),
    (0, 4, 1),
    (200, 4, 0),
    (9, 1, 1),
    (4, 70001, 1),
    (20, 5000, 1),
    (2, 9000, 3),
    (90, 130, 7),
    (1, 3, 400000),
]
DTYPES = ["float32", "bfloat16"]

moments = partial(jaxbn_cpu.moments, feature_axes=(1,))
cotangents = partial(jaxbn_cpu.cotangents, feature_axes=(1,))
input_cotangent = partial(jaxbn_cpu.input_cotangent, feature_axes=(1,))


def numbers(shape, dtype, seed=0, mean=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(mean, 2, size=shape), jnp.float32).astype(dtype)


def wide(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_moments(shape, dtype, weighted):
    x = numbers(shape, dtype)
    rng = np.random.default_rng(1)
    each = shape[0], 1, shape[2]
    w = rng.integers(0, 3, size=each).astype(np.float32) if weighted else None
    truth, k = wide(x), np.ones(each) if w is None else w
    if weighted:
        x = jnp.where(k > 0, x, jnp.nan)
    n = k.sum()
    mean = (k * truth).sum((0, 2)) / max(n, 1)
    squares = (k * (truth - mean[:, None]) ** 2).sum((0, 2))
    got = jax.jit(moments)(x, w)
    np.testing.assert_allclose(got[0], mean, 2e-6, 2e-6)
    np.testing.assert_allclose(got[2], squares, 2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [(d, x) for d in DTYPES for x in DTYPES], ids=str)
def test_cotangents(shape, dtypes):
    dy, x = numbers(shape, dtypes[0], 2), numbers(shape, dtypes[1])
    mean = numbers(shape[1:2], "float32", 3)
    got = jax.jit(cotangents)(dy, x, mean)
    delta = wide(x) - wide(mean)[:, None]
    size = np.abs(wide(dy)).sum((0, 2)).max(initial=1.0)
    np.testing.assert_allclose(got[0], wide(dy).sum((0, 2)), 1e-5, 1e-6 * size)
    product = (wide(dy) * delta).sum((0, 2))
    np.testing.assert_allclose(got[1], product, 1e-5, 1e-5 * size)


# Of the large ones, rows or slabs are of a length that goes past the caches, or not.
LARGE = [(4096, 320, 1), (4, 5, 65536), (3, 2, 200001)]


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("dtypes", [(d, x) for d in DTYPES for x in DTYPES], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_input_cotangent(shape, dtypes, weighted):
    dy, x = numbers(shape, dtypes[0], 2), numbers(shape, dtypes[1])
    vectors = [numbers(shape[1:2], "float32", seed) for seed in range(3, 7)]
    w = None
    if weighted:
        each = shape[0], 1, shape[2]
        w = np.random.default_rng(1).integers(0, 3, size=each).astype(np.float32)
        x = jnp.where(w > 0, x, jnp.nan)
    got = jax.jit(input_cotangent)(dy, x, *vectors, w)
    assert got.dtype == x.dtype
    mean, k, c1, c0 = (wide(v)[:, None] for v in vectors)
    known = np.nan_to_num(wide(x))
    through = (1.0 if w is None else w) * (c1 * (known - mean) + c0)
    truth = k * wide(dy) + through
    rounding = 2.0**-8 if dtypes[1] == "bfloat16" else 1e-6
    np.testing.assert_allclose(wide(got), truth, rounding, 1e-5)


def test_bfloat16_is_rounded_as_jax_rounds():
    bits = np.arange(2**16, dtype=np.uint32) << 16
    near = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    dy = jnp.asarray((bits[:, None] | near).view(np.float32))
    zero, x = jnp.zeros(6), jnp.zeros(dy.shape, jnp.bfloat16)
    got = jaxbn_cpu.input_cotangent(dy, x, zero, zero + 1, zero, zero)
    expected = (dy * 1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(wide(got), wide(expected))  # NaN where there is NaN.


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_the_variance_is_exact_without_a_shift(mean):
    x = numbers((20000, 32, 1), "float32", mean=mean)
    near, rest, squares = moments(x)
    truth = wide(x).var((0, 2)) * 20000
    np.testing.assert_allclose(squares, truth, 1e-6)
    np.testing.assert_allclose(wide(near) + wide(rest), wide(x).mean((0, 2)), 0, 1e-6)


@pytest.mark.parametrize("channels", [65, 511, 1000])
@pytest.mark.parametrize("kind", ["normal", "sorted", "weighted"])
def test_rounding_does_not_add_up_where_rows_are_not_folded(channels, kind):
    x = np.array(numbers((512, channels, 1), "float32"))
    if kind == "sorted":
        x.sort(0)
    w = np.ones((512, 1, 1), np.float32) if kind == "weighted" else None
    _, _, squares = moments(x, w)
    truth = x.astype(np.float64).var((0, 2)) * 512
    np.testing.assert_allclose(squares, truth, 5e-7)


@pytest.mark.parametrize("shape", [(1, 2, 2**18), (2, 1, 2**17), (65536, 1, 1)])
@pytest.mark.parametrize("first", [0.0, 1e4 + 100])
def test_the_variance_is_exact_where_the_first_values_are_not_typical(shape, first):
    x = np.array(numbers(shape, "float32", mean=1e4))
    x[:8, :, :8] = first
    _, _, squares = moments(x)
    truth = x.astype(np.float64).var((0, 2)) * x[:, 0].size
    np.testing.assert_allclose(squares, truth, 1e-6)


def test_large_numbers_do_not_overflow_on_the_way():
    x = jnp.array([2e38, -2e38, 1, 2], jnp.float32)[:, None, None]
    mean, _, squares = moments(x)
    np.testing.assert_allclose(mean, 0.75, atol=1e-7 * 2e38)
    assert squares == np.inf


def test_runs_are_equal_to_the_bit():
    x, dy = numbers((30000, 48, 1), "float32"), numbers((30000, 48, 1), "bfloat16", 1)
    runs = []
    for _ in range(10):
        mean, _, squares = moments(x)
        sums = cotangents(dy, x, mean)
        runs.append([mean, squares, *sums, input_cotangent(dy, x, mean, *sums, mean)])
    for run in runs[1:]:
        for got, expected in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(got, expected)


def test_many_calls_at_once():
    """As many as there are threads, none of which may wait for another for ever."""
    xs = numbers((16, 4096, 32, 1), "float32")
    many = jax.jit(lambda xs: [moments(x)[0] for x in xs])
    for got, x in zip(many(xs), xs, strict=True):
        np.testing.assert_allclose(got, wide(x).mean((0, 2)), 1e-5, 1e-5)


def test_under_vmap():
    x = numbers((3, 100, 5, 2), "float32")
    mean, _, _ = jax.vmap(moments)(x)
    np.testing.assert_allclose(mean, wide(x).mean((1, 3)), 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((6, 5), ()), ((6, 5), (1,)), ((3, 4, 5), (-2, -1)), ((3, 4, 5, 2), (1, 2))],
)
def test_feature_axes(shape, axes):
    x, dy = numbers(shape, "float32"), numbers(shape, "bfloat16", 1)
    features = [axis % x.ndim for axis in axes]
    reduced = tuple(axis for axis in range(x.ndim) if axis not in features)
    mean, _, squares = jaxbn_cpu.moments(x, feature_axes=axes)
    truth = wide(x).mean(reduced, keepdims=True)
    np.testing.assert_allclose(mean, truth.squeeze(reduced), 1e-6, 1e-7)
    np.testing.assert_allclose(squares, ((x - truth) ** 2).sum(reduced), 1e-5)
    first, second = jaxbn_cpu.cotangents(dy, x, mean, feature_axes=axes)
    np.testing.assert_allclose(first, wide(dy).sum(reduced), 1e-5)
    product = (wide(dy) * (x - truth)).sum(reduced)
    np.testing.assert_allclose(second, product, 1e-5, 1e-4)
    vectors = mean, mean, first, second
    dx = jaxbn_cpu.input_cotangent(dy, x, *vectors, feature_axes=axes)
    _, k, c1, c0 = (np.expand_dims(v, reduced) for v in vectors)
    np.testing.assert_allclose(dx, k * wide(dy) + c1 * (x - truth) + c0, 1e-4, 1e-3)


def test_what_is_refused():
    x, f16 = jnp.ones((4, 3, 1)), np.ones((4, 3, 1), np.float16)
    with pytest.raises(TypeError, match="`x` must be float32 or bfloat16, got float16"):
        moments(f16)
    for axes in [(0, 2), (2, 1), (3,), (-4,)]:
        with pytest.raises(ValueError, match="expected axes of `x`, which has 3, next"):
            jaxbn_cpu.moments(x, feature_axes=axes)
    with pytest.raises(ValueError, match=r"`weights` .*\(4,\), expected \(4, 1, 1\)"):
        moments(x, jnp.ones(4))
    with pytest.raises(TypeError, match="`weights` must be float32, got bool"):
        moments(x, jnp.ones((4, 1, 1), bool))
    with pytest.raises(ValueError, match=r"`mean` is float32 of shape \(4,\), expec"):
        cotangents(x, x, jnp.ones(4))
    with pytest.raises(ValueError, match=r"`c1` is float16 of shape \(3,\), expected"):
        input_cotangent(x, x, *[jnp.ones(3)] * 2, jnp.ones(3, jnp.float16), jnp.ones(3))
    with pytest.raises(ValueError, match=r"`dy` has shape \(4, 3\), expected \(4, 3,"):
        cotangents(x[..., 0], x, jnp.ones(3))


@pytest.mark.parametrize(
    "clones",
    [pytest.param(True, marks=pytest.mark.slow, id="machine's"), False],
    ids=lambda clones: "portable",
)
def test_under_the_sanitizers(tmp_path, clones):
    """ASan and UBSan, over every type and awkward size, without XLA."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake: `pip install cmake`")
    configure = ["cmake", "-S", NATIVE, "-B", tmp_path, "-DJAXBN_SANITIZE=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DCMAKE_CXX_FLAGS=" + "-march=native" * clones]
    subprocess.run(configure, check=True, capture_output=True)
    build = ["cmake", "--build", tmp_path, "--target", "kernels_test"]
    subprocess.run(build, check=True, capture_output=True)
    run = subprocess.run([tmp_path / "kernels_test"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_lists_and_single_axes_are_taken():
    got = jaxbn_cpu.moments([[1.0, 2.0], [3.0, 6.0]], feature_axes=1)
    np.testing.assert_array_equal(got[0], [2, 4])
    np.testing.assert_array_equal(got[2], [2, 8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxbn_cpu.moments("all"), "`x` must be an array, got 'all'"),
        (lambda: jaxbn_cpu.moments(None), "`x` must be an array, got None"),
        (
            lambda: jaxbn_cpu.moments(jnp.ones((2, 2)), feature_axes="a"),
            "`feature_axes` must be integers, got 'a'",
        ),
        (
            lambda: jaxbn_cpu.moments(jnp.ones((2, 2)), weights="all"),
            "`weights` must be an array, got 'all'",
        ),
    ],
)
def test_what_is_no_array_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()
