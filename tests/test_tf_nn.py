"""`interop.tf_nn`: what TensorFlow returns, and what is right where it is not."""

import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import assert_close, numbers, tolerance, wide
from golden import tensorflow_cases as golden

from jaxbn.interop import tf_nn

STORED = np.load(pathlib.Path(__file__).parent / "golden" / "tensorflow.npz")
RESULTS = golden.unpack(STORED)
X = jnp.ones((2, 3, 4, 5))
V = jnp.ones(5)

# TensorFlow computes in the dtype of x, but for float16.
TOLERANCE = {"float16": 3e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}


def stored(name):
    """The stored results of a case, under their own names."""
    start = f"{name} "
    return {
        key.removeprefix(start): value
        for key, value in RESULTS.items()
        if key.startswith(start)
    }


def results(name, case):
    """What jaxbn makes of a case, under the names that `make_tensorflow.py` stores."""
    arrays = {
        key: jnp.asarray(value).astype(case.arrays[key].dtype)
        for key, value in golden.inputs(name, case).items()
    }
    sources = {key: arrays[key] for key in case.gradients}

    def outputs(sources):
        found = golden.call(tf_nn, case, arrays | sources)
        return found[0], found

    @jax.jit
    def run(sources):
        if not case.gradients:
            return outputs(sources)[1], {}
        first, back, found = jax.vjp(outputs, sources, has_aux=True)
        return found, back(
            jnp.asarray(golden.cotangent(name, first.shape), first.dtype)
        )[0]

    found, gradients = run(sources)
    named = {f"output {i}": v for i, v in enumerate(found) if v is not None}
    return named | gradients


@pytest.mark.parametrize("name", golden.CASES, ids=str)
def test_returns_what_tensorflow_returns(name):
    case, expected = golden.CASES[name], stored(name)
    dtypes = {spec.dtype for spec in case.arrays.values()}
    tol = max(TOLERANCE.get(dtype, 0) for dtype in dtypes)
    with jax.enable_x64("float64" in dtypes):
        found = results(name, case)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            dtype, array = expected[key]
            assert value.shape == array.shape, key
            sums = case.function == "sufficient_statistics"
            assert value.dtype == dtype or (sums and value.dtype == jnp.float32), key
            # Where the truth is 0, the terms that cancel there leave their rounding.
            largest = np.max(np.abs(array), initial=0) or 10
            assert_close(wide(value), array, tol, tol * largest, key)


def test_the_stored_results_are_those_of_the_cases():
    names = {key.rpartition(" output ")[0] for key in RESULTS if " output " in key}
    assert names == set(golden.CASES)


def test_signatures():
    for name, parameters in json.loads(str(STORED["signatures"])).items():
        found = inspect.signature(getattr(tf_nn, name)).parameters.values()
        required = inspect.Parameter.empty
        own = [
            [p.name, "required" if p.default is required else p.default] for p in found
        ]
        assert own == parameters, name
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)


@pytest.mark.parametrize("axes", [[0], (0, 1, 2), [1, 3], [0, 1, 2, 3], []])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_moments(axes, dtype):
    x = numbers((4, 3, 2, 5), dtype)
    mean, variance = jax.jit(lambda x: tf_nn.moments(x, axes, keepdims=True))(x)
    truth = oracle.moments(wide(x), tuple(axes))
    assert mean.dtype == x.dtype
    assert variance.dtype == x.real.dtype
    for got, expected in ((mean, truth.mean), (variance, truth.var)):
        assert got.shape == expected.shape
        tol = 10 * tolerance(dtype)
        assert_close(wide(got), expected, tol, tol)


def test_a_shift_is_used():
    x = numbers((500, 3), "float32", mean=1e4, std=0.5)
    truth = oracle.moments(x, (0,)).var[0]
    for shift, tol in ((None, 1e-5), (x[0], 1e-5), (x[:1], 1e-5), (1e4, 1e-5)):
        assert_close(tf_nn.moments(x, [0], shift)[1], truth, tol)
    # One pass about 0, by XLA: the CPU kernels need no shift, and are not for vmap.
    (far,) = jax.vmap(lambda x: tf_nn.moments(x, [0], 0.0)[1])(x[None])
    assert np.max(np.abs(far - truth)) > 0.1


def test_a_shift_is_data():
    x, shift = numbers((6, 3), "float32"), jnp.ones(3)
    loss = lambda x, shift: jnp.sum(tf_nn.moments(x, [0], shift)[1] ** 2)
    by_x, by_shift = jax.grad(loss, (0, 1))(x, shift)
    truth = jax.grad(loss)(x, None)
    assert_close(by_x, truth, 1e-5, 1e-5)
    assert not np.any(by_shift)


@pytest.mark.parametrize("shift", [None, 3.0])
def test_the_hessian_of_the_variance(x64, shift):
    x = jnp.array([1.0, 2.0, 4.0, 7.0])
    found = jax.hessian(lambda x: tf_nn.moments(x, [0], shift)[1])(x)
    truth = 2 / 4 * (np.eye(4) - 1 / 4)
    assert_close(found, truth, 1e-12, 1e-12)
    # TensorFlow's lacks the term of the mean.
    assert_close(STORED["hessian"], 2 / 4 * np.eye(4), 1e-12, 1e-12)


def test_weights_of_0_hide_nan():
    x, weights = numbers((6, 3), "float32"), jnp.array([1.0, 0, 2, 0, 1, 1])[:, None]
    hidden = x.at[1].set(jnp.nan).at[3].set(jnp.inf)
    loss = lambda x: sum(map(jnp.sum, tf_nn.weighted_moments(x, [0], weights)))
    for f in (loss, jax.grad(loss)):
        assert_close(f(hidden), f(x), 1e-6, 1e-6)
    by_weights = jax.grad(lambda w: jnp.sum(tf_nn.weighted_moments(x, [0], w)[0]))
    assert not np.any(by_weights(weights))


def test_sums_of_float16_do_not_overflow():
    x = jnp.full((4, 2), 300, jnp.float16)
    counts, m_ss, v_ss, shift = tf_nn.sufficient_statistics(x, [0])
    assert {a.dtype.name for a in (counts, m_ss, v_ss)} == {"float32"}
    assert shift is None
    assert_close(v_ss, 4 * 300.0**2)


@pytest.mark.parametrize("keepdims", [False, True])
def test_a_shift_comes_back_in_the_shape_of_the_sums(keepdims):
    x, shift = numbers((4, 3, 5), "float32"), jnp.ones((3, 1))
    sums = tf_nn.sufficient_statistics(x, [0, 2], shift, keepdims)
    mean, variance = tf_nn.normalize_moments(*sums)
    truth = tf_nn.moments(x, [0, 2], keepdims=keepdims)
    assert mean.shape == variance.shape == truth[0].shape
    assert_close(mean, truth[0], 1e-5, 1e-5)
    assert_close(variance, truth[1], 1e-5, 1e-5)


def test_complex_sufficient_statistics():
    x = numbers((7, 3), "complex64")
    sums = tf_nn.sufficient_statistics(x, [0], x[0])
    assert sums[2].dtype == jnp.float32
    mean, variance = tf_nn.normalize_moments(*sums)
    truth = oracle.moments(x, (0,))
    assert_close(mean, truth.mean[0], 1e-5, 1e-5)
    assert_close(variance, truth.var[0], 1e-5, 1e-5)


def test_a_variance_is_never_negative():
    sums = jnp.array(2.0), jnp.array([4.0, 4.0]), jnp.array([2.0, 8.5])
    mean, variance = tf_nn.normalize_moments(*sums, None)
    assert_close(mean, [2.0, 2.0])
    assert_close(variance, [0.0, 0.25])
    assert np.isnan(tf_nn.normalize_moments(2.0, 4.0, jnp.nan, None)[1])


def test_counts_may_be_integers_and_0():
    sums = jnp.array([0, 4]), jnp.array([0.0, 2.0]), jnp.array([0.0, 5.0]), 1.0
    mean, variance = tf_nn.normalize_moments(*sums)
    assert_close(mean, [1.0, 1.5])
    assert_close(variance, [0.0, 1.0])


def test_nothing_has_moments_0():
    x = jnp.ones((0, 3))
    sums = tf_nn.sufficient_statistics(x, [0])
    for mean, variance in (
        tf_nn.moments(x, [0]),
        tf_nn.weighted_moments(x, [0], 1.0),
        tf_nn.weighted_moments(X[0, 0, :, :3], [0], 0.0),
        tf_nn.normalize_moments(*sums),
    ):
        assert_close(mean, np.zeros(3))
        assert_close(variance, np.zeros(3))


def test_precision_where_the_mean_is_large():
    x = numbers((500, 3), "float32", mean=1e4, std=0.05)
    mean, variance = tf_nn.moments(x, [0])
    y = tf_nn.batch_normalization(x, mean, variance, None, None, 1e-5)
    m = oracle.moments(x, (0,))
    assert_close(y, oracle.normalize(x, m.mean, m.var), 0, 2e-2)


def test_complex_batch_normalization():
    x = numbers((4, 5), "complex64")
    scale = numbers((5,), "complex64", 1)
    mean, variance = tf_nn.moments(x, [0])
    y = tf_nn.batch_normalization(x, mean, variance, jnp.ones(5), scale, 0.01)
    m = oracle.moments(x, (0,))
    truth = oracle.normalize(x, m.mean, m.var, wide(scale), 1, 0.01)
    assert_close(y, truth, 1e-5, 1e-5)


def test_the_fully_connected_snippet():
    """Moments over axis 0 of w·u + b, equal to the formula in two steps."""
    u, w, b = numbers((60, 8), "float32"), numbers((8, 5), "float32", 1), jnp.ones(5)
    scale, offset, epsilon = jnp.full(5, 1.5), jnp.full(5, -0.5), 0.001

    def one_step(u):
        z = u @ w + b[None]
        mean, variance = tf_nn.moments(z, [0])
        return tf_nn.batch_normalization(z, mean, variance, offset, scale, epsilon)

    def two_steps(u):
        z = u @ w + b[None]
        mean, variance = z.mean(0)[None], z.var(0)[None]
        zhat = (z - mean) / jnp.sqrt(variance + epsilon)
        return scale[None] * zhat + offset[None]

    assert_close(one_step(u), two_steps(u), 1e-5, 1e-5)
    loss = lambda f: lambda u: jnp.sum(f(u) ** 3)
    assert_close(jax.grad(loss(one_step))(u), jax.grad(loss(two_steps))(u), 1e-3, 1e-3)


def test_fused_training_has_the_hand_written_derivative():
    x = numbers((2, 3, 4, 5), "float32")
    program = str(jax.make_jaxpr(lambda x: tf_nn.fused_batch_norm(x, V, V))(x))
    assert "custom_vjp" in program
    # Running statistics are state: no gradient passes.
    running = lambda x: sum(map(jnp.sum, tf_nn.fused_batch_norm(x, V, V)[1:]))
    assert not np.any(jax.grad(running)(x))


def test_fused_inference_has_a_gradient_for_the_statistics():
    x = numbers((2, 3, 4, 5), "float32")

    def loss(mean, variance):
        y, *_ = tf_nn.fused_batch_norm(x, V, V, mean, variance, is_training=False)
        return jnp.sum(y**3)

    def truth(mean, variance):
        return jnp.sum(((x - mean) / jnp.sqrt(variance + 0.001) + 1) ** 3)

    with jax.numpy_rank_promotion("allow"):
        expected = jax.grad(truth, (0, 1))(0 * V, V)
    for got, want in zip(jax.grad(loss, (0, 1))(0 * V, V), expected, strict=True):
        assert_close(got, want, 1e-4)


@pytest.mark.parametrize("factor", [0.1, 1.0])
@pytest.mark.parametrize("is_training", [True, False])
def test_a_batch_without_elements_moves_nothing(factor, is_training):
    y, mean, variance = tf_nn.fused_batch_norm(
        X[:0], V, V, 5 * V, 7 * V,
        is_training=is_training, exponential_avg_factor=factor,
    )  # fmt: skip
    assert y.shape == (0, 3, 4, 5)
    assert_close(mean, 5 * V)
    assert_close(variance, 7 * V)


def test_fused_float64_and_running_dtypes(x64):
    x = numbers((2, 3, 4, 5), "float64")
    y, mean, variance = tf_nn.fused_batch_norm(x, jnp.ones(5), jnp.ones(5))
    assert {a.dtype.name for a in (y, mean, variance)} == {"float64"}
    m = oracle.moments(x, (0, 1, 2))
    assert_close(y, oracle.normalize(x, m.mean, m.var, 1, 1, 0.001), 1e-12, 1e-12)
    assert_close(variance, m.var.reshape(5) * 24 / 23, 1e-12)
    old = jnp.zeros(5, jnp.bfloat16), jnp.ones(5, jnp.float32)
    _, *new = tf_nn.fused_batch_norm(x, V, V, *old, exponential_avg_factor=0.1)
    assert [a.dtype.name for a in new] == ["bfloat16", "float32"]


def test_a_traced_factor():
    x = numbers((2, 3, 4, 5), "float32")
    step = lambda f: tf_nn.fused_batch_norm(
        x, V, V, 0 * V, V, exponential_avg_factor=f
    )[1:]
    for got, want in zip(jax.jit(step)(0.25), step(0.25), strict=True):
        assert_close(got, want, 1e-6)


CALLS = {
    "moments": lambda **o: tf_nn.moments(X, [0], **o),
    "weighted_moments": lambda **o: tf_nn.weighted_moments(X, [0], 1.0, **o),
    "sufficient_statistics": lambda **o: tf_nn.sufficient_statistics(X, [0], **o),
    "normalize": lambda **o: tf_nn.normalize_moments(4.0, V, V, None, **o),
    "batchnorm": lambda **o: tf_nn.batch_normalization(X, V, V, V, V, 0.1, **o),
    "FusedBatchNormV3": lambda **o: tf_nn.fused_batch_norm(X, V, V, **o),
}


@pytest.mark.parametrize("default", CALLS)
def test_names(default):
    call = CALLS[default]
    for name, expected in ((None, default), ("mine", "mine")):
        program = jax.jit(lambda name=name: call(name=name)).lower()
        assert f"{expected}/" in program.as_text(debug_info=True)
    with pytest.raises(TypeError, match="`name` must be a string or None, got 3"):
        call(name=3)


ERRORS = {
    "integers": (
        lambda: tf_nn.moments(jnp.arange(3), [0]),
        TypeError,
        "`x` must be floating or complex, got dtype int32",
    ),
    "keepdims where shift is": (
        lambda: tf_nn.moments(X, [0], True),
        TypeError,
        "`shift` must be floating or complex, got dtype bool",
    ),
    "axis twice": (
        lambda: tf_nn.sufficient_statistics(X, [0, -4]),
        ValueError,
        "`axes` names an axis twice",
    ),
    "axis out of range": (
        lambda: tf_nn.weighted_moments(X, [4], 1.0),
        ValueError,
        "`axes` has 4, which is out of range for an array of rank 4",
    ),
    "shift along reduced axes": (
        lambda: tf_nn.moments(X, [0, 3], V),
        ValueError,
        r"`shift` has shape \(5,\), which varies along the axes \(0, 3\).*keepdims",
    ),
    "shift that does not broadcast": (
        lambda: tf_nn.sufficient_statistics(X, [0], jnp.ones(3)),
        ValueError,
        r"`shift` has shape \(3,\), which does not broadcast against `x`",
    ),
    "complex shift": (
        lambda: tf_nn.sufficient_statistics(X, [0], 1j * V),
        TypeError,
        "`shift` is complex .* where `x` is real",
    ),
    "weights that do not broadcast": (
        lambda: tf_nn.weighted_moments(X, [0], jnp.ones(3)),
        ValueError,
        r"`frequency_weights` has shape \(3,\).*`x`.*frequency_weights\[:, None\]",
    ),
    "complex weights": (
        lambda: tf_nn.weighted_moments(X, [0], 1j),
        TypeError,
        "`frequency_weights` must be boolean or real, got dtype complex64",
    ),
    "sums that do not broadcast": (
        lambda: tf_nn.normalize_moments(jnp.ones((2, 1)), V, V, jnp.ones((3, 1))),
        ValueError,
        r"`shift` has shape \(3, 1\).*`mean_ss` of shape \(5,\), by now .*\(2, 5\)",
    ),
    "complex counts": (
        lambda: tf_nn.normalize_moments(4j, V, V, None),
        TypeError,
        "`counts` is complex",
    ),
    "complex variance_ss": (
        lambda: tf_nn.normalize_moments(4, V, 1j * V, None),
        TypeError,
        "`variance_ss` must be floating, got dtype complex64",
    ),
    "scale that does not broadcast": (
        lambda: tf_nn.batch_normalization(X, V, V, None, jnp.ones(3), 0.1),
        ValueError,
        r"`scale` has shape \(3,\).*`x` of shape \(2, 3, 4, 5\)",
    ),
    "complex mean": (
        lambda: tf_nn.batch_normalization(X, 1j * V, V, None, None, 0.1),
        TypeError,
        "`mean` is complex .* where `x` is real",
    ),
    "complex variance": (
        lambda: tf_nn.batch_normalization(X, V, 1j * V, None, None, 0.1),
        TypeError,
        "`variance` must be floating",
    ),
    "vector of epsilons": (
        lambda: tf_nn.batch_normalization(X, V, V, None, None, V),
        ValueError,
        r"`variance_epsilon` must be a real scalar, got shape \(5,\).*`variance`",
    ),
    "negative epsilon": (
        lambda: tf_nn.fused_batch_norm(X, V, V, epsilon=-1e-3),
        ValueError,
        "`epsilon` must not be negative, got -0.001",
    ),
    "rank 2": (
        lambda: tf_nn.fused_batch_norm(X[0, 0], V, V),
        ValueError,
        r"`x` must have rank 4 or 5, got shape \(4, 5\)",
    ),
    "complex images": (
        lambda: tf_nn.fused_batch_norm(1j * X, V, V),
        TypeError,
        "`x` must be floating, got dtype complex64",
    ),
    "data_format": (
        lambda: tf_nn.fused_batch_norm(X, V, V, data_format="NWC"),
        ValueError,
        "`data_format` must be one of NHWC, NDHWC, NCHW, NCDHW, got 'NWC'",
    ),
    "channels first": (
        lambda: tf_nn.fused_batch_norm(X, V, V, data_format="NCHW"),
        ValueError,
        r"`scale` has shape \(5,\), expected \(3,\).*`data_format`",
    ),
    "no offset": (
        lambda: tf_nn.fused_batch_norm(X, V, None),
        TypeError,
        "`offset` must be an array, got None",
    ),
    "traced is_training": (
        lambda: jax.jit(
            lambda t: tf_nn.fused_batch_norm(X, V, V, is_training=t)
        )(True),
        TypeError,
        "`is_training` must be a Python bool, got .*static_argnames",
    ),
    "no statistics in inference": (
        lambda: tf_nn.fused_batch_norm(X, V, V, is_training=False),
        ValueError,
        "`mean` is None and `variance` is None, expected running statistics",
    ),
    "no statistics to move": (
        lambda: tf_nn.fused_batch_norm(X, V, V, exponential_avg_factor=0.1),
        ValueError,
        "`mean` is None .*`exponential_avg_factor` 1.0",
    ),
    "one of both": (
        lambda: tf_nn.fused_batch_norm(X, V, V, mean=V),
        ValueError,
        r"`mean` is of shape \(5,\) and `variance` is None",
    ),
    "factor": (
        lambda: tf_nn.fused_batch_norm(X, V, V, V, V, exponential_avg_factor=1.5),
        ValueError,
        "`exponential_avg_factor` is the weight of the batch, from 0 to 1, got 1.5",
    ),
    "vector of factors": (
        lambda: tf_nn.fused_batch_norm(X, V, V, V, V, exponential_avg_factor=V),
        ValueError,
        r"`exponential_avg_factor` must be a real scalar, got shape \(5,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, kind, words = ERRORS[case]
    with pytest.raises(kind, match=f"(?s){words}"):
        jax.eval_shape(call)
