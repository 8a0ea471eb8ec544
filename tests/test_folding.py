"""`fold_dense` and `fold_conv` against the layer and `normalize`, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers
from jax import lax

import jaxbn
from jaxbn.folding import fold_conv, fold_dense

EPSILON = 1e-3


def norm(features, seed=7, dtype="float64", scale=True, bias=True):
    """Statistics, scale and bias of a batch norm, none of them trivial."""
    mean, factor, summand = (numbers(features, dtype, seed + i) for i in range(3))
    var = jnp.abs(numbers(features, dtype, seed + 3)) + 0.1
    stats = jaxbn.RunningStats(mean, var, jnp.int32(3))
    return stats, factor if scale else None, summand if bias else None


def applied(x, n, axes):
    return jaxbn.normalize(
        x, n[0].mean, n[0].var, n[1], n[2], feature_axes=axes, epsilon=EPSILON
    )


def bias_of(shape, given, seed=20):
    return numbers(shape, "float64", seed) if given else None


def assert_same(folded, truth, *arrays):
    """Each as one program: op by op, compiling would take most of the time."""
    assert_equal(jax.jit(folded)(*arrays), jax.jit(truth)(*arrays))


def assert_equal(actual, desired):
    size = np.abs(desired).max()
    assert_close(actual / size, desired / size, 0, 1e-10)


@pytest.mark.parametrize(
    ("given", "into", "out"),
    [
        ((1, 1, 1), (2, 3), (4, 5)),
        ((0, 1, 0), (3,), (5,)),
        ((1, 0, 1), (2, 3), (5,)),
        ((0, 0, 0), (3,), (4, 5)),
    ],
)
def test_dense(x64, into, out, given):
    scale, bn_bias, with_bias = given
    kernel = numbers((*into, *out), "float64")
    bias = bias_of(out, with_bias)
    x = numbers((6, *into), "float64", 1)
    axes_in = tuple(range(1, 1 + len(into)))
    axes_out = tuple(range(1, 1 + len(out)))

    def dense(x, kernel, bias):
        y = jnp.tensordot(x, kernel, len(into))
        return y if bias is None else y + bias[None]

    def folded(x, n, position):
        more = {"epsilon": EPSILON, "position": position}
        return dense(x, *fold_dense(kernel, bias, *n, **more))

    assert_same(
        lambda x, n: folded(x, n, "after"),
        lambda x, n: applied(dense(x, kernel, bias), n, axes_out),
        x,
        norm(out, scale=scale, bias=bn_bias),
    )
    assert_same(
        lambda x, n: folded(x, n, "before"),
        lambda x, n: dense(applied(x, n, axes_in), kernel, bias),
        x,
        norm(into, scale=scale, bias=bn_bias),
    )


# The kernel (without channels), its layout, and the convolution's other arguments.
CONVOLUTIONS = {
    "1d": ((3,), ("NWC", "WIO", "NWC"), {}),
    "2d": ((3, 2), ("NHWC", "HWIO", "NHWC"), {}),
    "strided": ((3, 3), ("NHWC", "HWIO", "NHWC"), {"window_strides": (2, 1)}),
    "dilated": ((3, 2), ("NCHW", "OIHW", "NCHW"), {"rhs_dilation": (1, 2)}),
    "grouped": ((2, 2), ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 2}),
    "grouped, first": ((2, 2), ("NCHW", "OIHW", "NHWC"), {"feature_group_count": 2}),
    "depthwise": ((2, 2), ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 4}),
    "mixed": ((2, 3), ("CNHW", "IHOW", "NHCW"), {}),
    "3d": ((2, 1, 2), ("NDHWC", "DHWIO", "NDHWC"), {}),
    "numbers": ((2,), lax.ConvDimensionNumbers((1, 0, 2), (2, 0, 1), (0, 2, 1)), {}),
}


def convolution(case, padding):
    """The function of (x, kernel), x, the kernel, and the feature axes of x and y."""
    spatial, numbers_, more = CONVOLUTIONS[case]
    groups, channels, out = more.get("feature_group_count", 1), 4, 8
    rank = len(spatial) + 2
    dn = lax.conv_dimension_numbers((1,) * rank, (1,) * rank, numbers_)
    x, kernel = np.zeros(rank, int), np.zeros(rank, int)
    x[list(dn.lhs_spec)] = (3, channels, *(6, 5, 4)[: len(spatial)])
    kernel[list(dn.rhs_spec)] = (out, channels // groups, *spatial)
    more = {"window_strides": (1,) * len(spatial), **more}
    if padding == "pairs":
        padding = [(0, -1)] * len(spatial)

    def conv(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, padding=padding, dimension_numbers=numbers_, **more
        )

    options = {"dimension_numbers": numbers_, "feature_group_count": groups}
    arrays = numbers(tuple(x), "float64", 1), numbers(tuple(kernel), "float64", 2)
    return conv, arrays, (dn.lhs_spec[1], dn.out_spec[1]), options, (channels, out)


def with_bias(y, bias, axis):
    shape = [1] * y.ndim
    shape[axis] = -1
    return y if bias is None else y + bias.reshape(shape)


# Every case once: which padding, and whether there is a bias, goes by turns.
TURNS = list(enumerate(CONVOLUTIONS))


@pytest.mark.parametrize(("turn", "case"), TURNS)
def test_after_a_convolution(x64, turn, case):
    padding = ("SAME", "VALID")[turn % 2]
    conv, (x, kernel), (_, axis), options, (_, out) = convolution(case, padding)
    bias, n = bias_of((out,), turn % 3), norm(out, scale=case != "1d")

    def folded(x, n):
        kernel_, bias_ = fold_conv(kernel, bias, *n, epsilon=EPSILON, **options)
        return with_bias(conv(x, kernel_), bias_, axis)

    def truth(x, n):
        return applied(with_bias(conv(x, kernel), bias, axis), n, axis)

    assert_same(folded, truth, x, n)


@pytest.mark.parametrize(("turn", "case"), TURNS)
def test_before_a_convolution(x64, turn, case):
    padding = ("VALID", "pairs")[turn % 2]
    conv, (x, kernel), (at, axis), options, (into, out) = convolution(case, padding)
    bias, n = bias_of((out,), turn % 3), norm(into, bias=case != "1d")
    given = "VALID" if padding == "VALID" else [(0, -1)] * (x.ndim - 2)
    options |= {"epsilon": EPSILON, "position": "before", "padding": given}

    def folded(x, n):
        kernel_, bias_ = fold_conv(kernel, bias, *n, **options)
        return with_bias(conv(x, kernel_), bias_, axis)

    def truth(x, n):
        return with_bias(conv(applied(x, n, at), kernel), bias, axis)

    assert_same(folded, truth, x, n)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("position", ["after", "before"])
def test_transposed(x64, swapped, position):
    into, out = 3, 4
    shape = (3, 2, out, into) if swapped else (3, 2, into, out)
    x, kernel = numbers((2, 4, 5, into), "float64", 1), numbers(shape, "float64")

    def conv(x, kernel):
        return lax.conv_transpose(
            x, kernel, (2, 1), "SAME", transpose_kernel=swapped
        )  # fmt: skip

    after = position == "after"
    n = norm(out if after else into)
    if not after:  # Exact only where the batch norm maps 0 to 0.
        n = (n[0]._replace(mean=jnp.zeros(into)), n[1], None)
    kernel_, bias = fold_conv(
        kernel,
        None,
        *n,
        epsilon=EPSILON,
        position=position,
        padding="SAME",
        transposed=True,
        transpose_kernel=swapped,
    )

    def truth(x):
        if after:
            return applied(conv(x, kernel), n, -1)
        return conv(applied(x, n, -1), kernel)

    assert_same(lambda x: with_bias(conv(x, kernel_), bias, 3), truth, x)


def test_a_dilated_input_with_groups(x64):
    x, kernel = numbers((2, 5, 4), "float64", 1), numbers((3, 2, 6), "float64")
    dn = ("NWC", "WIO", "NWC")

    def conv(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            (1,),
            [(1, 2)],
            lhs_dilation=(2,),
            dimension_numbers=dn,
            feature_group_count=2,
        )

    n, more = norm(6), {"epsilon": EPSILON, "transposed": True}
    folded = fold_conv(kernel, None, *n, feature_group_count=2, **more)
    assert_same(
        lambda x: with_bias(conv(x, folded[0]), folded[1], 2),
        lambda x: applied(conv(x, kernel), n, -1),
        x,
    )


@pytest.mark.parametrize("mode", ["CIRCULAR", "REFLECT"])
def test_before_a_padding_of_the_inputs_own_values(x64, mode):
    x, kernel = numbers((2, 6, 3), "float64", 1), numbers((3, 3, 4), "float64")

    def conv(x, kernel):
        wrap = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[mode]
        x = jnp.pad(x, [(0, 0), (1, 1), (0, 0)], mode=wrap)
        dn = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=dn)

    n = norm(3)
    folded = fold_conv(
        kernel, None, *n, epsilon=EPSILON, position="before", padding=mode
    )
    assert_same(
        lambda x: with_bias(conv(x, folded[0]), folded[1], 2),
        lambda x: conv(applied(x, n, -1), kernel),
        x,
    )


@pytest.mark.parametrize("padding", ["SAME", "CAUSAL", 0, [0, (0, 0)], [-1, 0]])
def test_padding_that_adds_nothing(padding):
    kernel = numbers((1, 1, 3, 4), "float32")
    n = norm(3, dtype="float32")
    fold_conv(kernel, None, *n, position="before", padding=padding)


def test_complex_layers(x64):
    kernel, x = numbers((3, 4), "complex128"), numbers((5, 3), "complex128", 1)
    n = norm(4)
    n = (n[0]._replace(mean=n[0].mean + 1j), n[1], 1j * n[2])
    kernel_, bias = fold_dense(kernel, None, *n, epsilon=EPSILON)
    assert_equal(x @ kernel_ + bias[None], applied(x @ kernel, n, -1))


def test_keeps_dtypes_and_rounds_once():
    stats, scale, bn_bias = norm(4, dtype="float32")
    kernel = numbers((3, 4), "bfloat16")
    bias = numbers((4,), "float32")
    found = fold_dense(kernel, bias, stats, scale, bn_bias)
    assert [a.dtype for a in found] == ["bfloat16", "float32"]
    wide = fold_dense(kernel.astype("float32"), bias, stats, scale, bn_bias)
    np.testing.assert_array_equal(found[0], wide[0].astype("bfloat16"))
    assert fold_dense(kernel, None, stats)[1].dtype == "bfloat16"


def test_under_jit_vmap_and_grad():
    stats, scale, bn_bias = norm(4, dtype="float32")
    kernels = numbers((2, 3, 4), "float32")
    fold = lambda kernel: fold_dense(kernel, None, stats, scale, bn_bias)[0]
    found = jax.jit(jax.vmap(fold))(kernels)
    assert_close(found[1], fold(kernels[1]), 1e-6)
    slope = jax.grad(lambda s: fold_dense(kernels[0], None, stats, s)[1].sum())(scale)
    assert_close(slope, -stats.mean / jnp.sqrt(stats.var + 1e-5), 1e-5)


KERNEL = np.ones((3, 3, 2, 4), np.float32)
STATS = jaxbn.init_stats(4)
INPUT = jaxbn.RunningStats(np.ones(2, np.float32), np.ones(2, np.float32), 0)
BEFORE = {"stats": INPUT, "position": "before", "padding": "VALID"}
WRONG = [
    ({"position": "around"}, ValueError, '`position` must be "after"'),
    ({"kernel": np.ones((2, 4), int)}, TypeError, "`kernel` must be floating"),
    ({"kernel": np.ones(4, "f")}, ValueError, "`kernel` has shape"),
    (
        {"bias": np.ones(3, "f")},
        ValueError,
        r"`bias` has shape \(3,\), expected \(4,\)",
    ),
    ({"bias": 1j * np.ones(4, "F")}, TypeError, "`bias` is complex"),
    ({"stats": INPUT}, ValueError, r"`stats.mean` has shape \(2,\), expected \(4,\)"),
    ({"stats": STATS._replace(var=np.ones(3, "f"))}, ValueError, "`stats.var` has"),
    (
        {"stats": STATS._replace(var=1j * STATS.var)},
        TypeError,
        "`stats.var` is complex",
    ),
    ({"stats": {"mean": 0}}, TypeError, "`stats` must have a `mean`"),
    ({"scale": np.ones(2, "f")}, ValueError, "`scale` has shape"),
    ({"bn_bias": np.ones(4, int)}, TypeError, "`bn_bias` must be floating"),
    ({"bn_bias": 1j * np.ones(4, "F")}, TypeError, "`bn_bias` is complex"),
    ({"epsilon": -1.0}, ValueError, "`epsilon` must not be negative"),
    ({"dimension_numbers": ("NC", "IO", "NC")}, TypeError, "`dimension_numbers` do"),
    ({"feature_group_count": 3}, ValueError, "`feature_group_count` must divide"),
    *(
        ({"feature_group_count": groups}, TypeError, "`feature_group_count` must be an")
        for groups in (None, "a", 1.5, True)
    ),
    ({"position": "before"}, ValueError, "`stats.mean` has shape"),
    ({**BEFORE, "padding": None}, ValueError, "`padding` must be given"),
    ({**BEFORE, "padding": "SOME"}, ValueError, "`padding` must be"),
    ({**BEFORE, "padding": [1]}, ValueError, "each of the 2 spatial"),
    ({**BEFORE, "padding": 0.5}, ValueError, "each of the 2 spatial"),
    ({**BEFORE, "padding": "SAME"}, ValueError, "puts zeros around its input"),
    ({**BEFORE, "padding": [0, (0, 1)]}, ValueError, "puts zeros around its input"),
    ({**BEFORE, "transposed": True}, ValueError, "between the values of its input"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_errors_of_fold_conv(wrong, error, message):
    given = {"kernel": KERNEL, "bias": None, "stats": STATS, **wrong}
    with pytest.raises(error, match=message):
        fold_conv(**given)


def test_padding_of_a_batch_norm_that_is_traced():
    fold = lambda stats: fold_conv(
        KERNEL, None, stats, position="before", padding="SAME"
    )
    with pytest.raises(ValueError, match="unknown while tracing"):
        jax.jit(fold)(INPUT._replace(mean=jnp.zeros(2)))
    fold(INPUT._replace(mean=jnp.zeros(2)))


@pytest.mark.parametrize("position", ["after", "before"])
def test_errors_of_fold_dense(position):
    kernel = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"`stats.mean` has shape"):
        fold_dense(kernel, None, jaxbn.init_stats(3), position=position)
    with pytest.raises(ValueError, match="more axes than `kernel`"):
        fold_dense(kernel, None, jaxbn.init_stats((1, 2, 4)), position=position)
    stats = jaxbn.init_stats(4 if position == "after" else 2)
    with pytest.raises(ValueError, match="`bias` has shape"):
        fold_dense(kernel, np.ones(3, "f"), stats, position=position)
