"""Parallel branches that `folding.fold` adds up into one layer."""

import functools
import importlib.util
import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from test_fold_program import assert_same, of_module, program, random

import jaxbn
from jaxbn.folding import report

SIZE, FEATURES = 9, 4
OF_CONVS = "conv_general_dilated["


def conv(x, kernel, strides=1, padding="SAME", **options):
    """With the layout of Flax."""
    given = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
    return lax.conv_general_dilated(x, kernel, (strides,) * 2, padding, **given)


def params_of(**kernels):
    """A kernel and a batch norm for each name; a norm alone for None."""
    vector = jax.ShapeDtypeStruct((FEATURES,), "float32")
    norm = dict.fromkeys(("mean", "var", "scale", "bias"), vector)
    tree = {}
    for name, shape in kernels.items():
        own = (
            {} if shape is None else {"kernel": jax.ShapeDtypeStruct(shape, "float32")}
        )
        tree[name] = {**own, "norm": norm}
    return tree


def branch(p, x, **options):
    return jaxbn.normalize(conv(x, p["kernel"], **options), **p["norm"])


def kernel(*spatial, inputs=FEATURES):
    return (*spatial, inputs, FEATURES)


def merged(function, tree, dtype="float64", size=SIZE, tolerance=1e-10):
    """Folds, compares, and returns the folded program and the report."""
    params = random(tree, dtype=dtype)
    x = random(jax.ShapeDtypeStruct((2, size, size, FEATURES), dtype), 5, dtype)
    folded_fn, folded, found = assert_same(function, params, x, tolerance=tolerance)
    return program(folded_fn, folded, x), folded, found


# Branches of one input that are one convolution, by the options of each.
ALIKE = {
    "3x3 and 1x1": ({}, {"a": kernel(3, 3), "b": kernel(1, 1)}, {}),
    "of one size": ({}, {"a": kernel(3, 3), "b": kernel(3, 3), "c": kernel(3, 3)}, {}),
    "1x1 alone": ({}, {"a": kernel(1, 1), "b": kernel(1, 1)}, {}),
    "strips": ({}, {"a": kernel(3, 1), "b": kernel(1, 3), "c": kernel(1, 1)}, {}),
    "even": ({}, {"a": kernel(2, 2), "b": kernel(5, 5), "c": kernel(1, 1)}, {}),
    "strides": ({"strides": 2}, {"a": kernel(3, 3), "b": kernel(1, 1)}, {}),
    "strides, even": ({"strides": 2}, {"a": kernel(4, 4), "b": kernel(2, 2)}, {}),
    "groups": (
        {"feature_group_count": 2},
        {"a": kernel(3, 3, inputs=2), "b": kernel(1, 1, inputs=2)},
        {},
    ),
    "depthwise": (
        {"feature_group_count": FEATURES},
        {"a": kernel(5, 5, inputs=1), "b": kernel(3, 3, inputs=1)},
        {},
    ),
    "own paddings": (
        {},
        {"a": kernel(3, 3), "b": kernel(1, 1), "c": kernel(5, 5)},
        {
            "a": {"padding": [(1, 1), (2, 0)]},
            "b": {"padding": [(0, 0), (0, 0)]},
            "c": {"padding": [(3, 1), (4, 0)]},
        },
    ),
    "cropped": (
        {},
        {"a": kernel(3, 3), "b": kernel(1, 1)},
        {"a": {"padding": "VALID"}, "b": {"padding": [(-1, -1), (-1, -1)]}},
    ),
    "dilated": (
        {"rhs_dilation": (2, 2)},
        {"a": kernel(3, 3), "b": kernel(1, 1), "c": kernel(5, 5)},
        {},
    ),
    "dilated, and 1x1": (
        {},
        {"a": kernel(3, 3), "b": kernel(1, 1)},
        {"a": {"rhs_dilation": (3, 2)}},
    ),
    "transposed": (
        {"lhs_dilation": (2, 2)},
        {"a": kernel(3, 3), "b": kernel(1, 1)},
        {"a": {"padding": [(2, 1)] * 2}, "b": {"padding": [(1, 0)] * 2}},
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_convolutions(x64, name):
    options, kernels, own = ALIKE[name]

    def infer(p, x):
        return sum(branch(p[n], x, **options, **own.get(n, {})) for n in kernels)

    text, folded, found = merged(infer, params_of(**kernels))
    assert text.count(OF_CONVS) == 1
    assert len(found.folded) == len(kernels)
    (one,) = found.merged
    assert {f"{n}/kernel" for n in kernels} == set(one.branches)
    assert one.into == one.branches[0]
    assert set(folded) == {one.into, one.into.replace("kernel", "bias")}
    assert {layer.into for layer in found.layers} == {one.into}


@pytest.mark.parametrize("groups", [1, 2, FEATURES])
@pytest.mark.parametrize("size", [(3, 3), (1, 1), (2, 5)])
def test_the_input_with_its_norm(x64, groups, size):
    def infer(p, x):
        x = jnp.sin(x)
        y = branch(p["a"], x, feature_group_count=groups)
        return jnp.tanh(y + jaxbn.normalize(x, **p["c"]["norm"]))

    shape = kernel(*size, inputs=FEATURES // groups)
    text, folded, found = merged(infer, params_of(a=shape, c=None))
    assert text.count(OF_CONVS) == 1
    assert set(folded) == {"a/kernel", "a/bias"}
    assert found.merged[0].branches == ("a/kernel", "c/norm")
    assert found.layers[-1] == ("c/norm", "a/kernel", "beside", None)
    assert "a/kernel  = a/kernel + c/norm" in str(found)


def test_biases_and_the_input_itself(x64):
    def infer(p, x):
        wide = lambda name: p["b"]["norm"][name][None, None, None]
        a = branch(p["a"], x) + wide("mean")
        b = conv(x, p["b"]["kernel"]) - wide("bias")
        return 0.5 + ((a + x) + b) + wide("var")

    text, folded, found = merged(infer, params_of(a=kernel(3, 3), b=kernel(1, 1)))
    assert text.count(OF_CONVS) == 1
    assert set(folded) == {"a/kernel", "a/bias"}
    assert found.merged[0].branches == ("a/kernel", "b/kernel", "(input)")


def test_other_terms_stay(x64):
    def infer(p, x):
        return branch(p["a"], x) + jnp.sin(x) + branch(p["b"], x) + jnp.cos(x)

    text, _, found = merged(infer, params_of(a=kernel(3, 3), b=kernel(1, 1)))
    assert text.count(OF_CONVS) == 1
    assert text.count(" sin ") == text.count(" cos ") == 1
    assert len(found.merged) == 1


def dense(p, x):
    return jaxbn.normalize(x @ p["kernel"], **p["norm"])


def test_dense_layers(x64):
    def infer(p, x):
        return (
            dense(p["a"], x) + dense(p["b"], x) + jaxbn.normalize(x, **p["c"]["norm"])
        )

    tree = params_of(a=(FEATURES,) * 2, b=(FEATURES,) * 2, c=None)
    text, folded, _ = merged(infer, tree)
    assert text.count("dot_general[") == 1
    assert set(folded) == {"a/kernel", "a/bias"}


def test_channels_first(x64):
    numbers = {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}

    def infer(p, x):
        x = x.transpose(0, 3, 1, 2)
        norm = functools.partial(jaxbn.normalize, feature_axes=1)
        y = norm(conv(x, p["a"]["kernel"], **numbers), **p["a"]["norm"])
        y += norm(conv(x, p["b"]["kernel"], **numbers), **p["b"]["norm"])
        return y + norm(x, **p["c"]["norm"])

    shapes = [(FEATURES, FEATURES, n, n) for n in (3, 1)]
    text, _, _ = merged(infer, params_of(a=shapes[0], b=shapes[1], c=None))
    assert text.count(OF_CONVS) == 1


def apart(name):
    """Sums that are not one convolution, and how many convolutions they have."""

    def infer(p, x):
        a = functools.partial(branch, p["a"])
        b = functools.partial(branch, p["b"])
        plain = functools.partial(conv, kernel=p["b"]["kernel"])
        return {
            "other inputs": lambda: a(x) + b(2 * x),
            "other strides": lambda: a(x[:, :1, :1], strides=2) + b(x[:, :1, :1]),
            "other dilations": lambda: a(x) + a(x, rhs_dilation=(2, 2)),
            "no position in common": lambda: (
                a(x, rhs_dilation=(2, 2), padding=[(1, 1)] * 2)
                + plain(x[:, 1:-1, 1:-1])
            ),
            "an activation": lambda: jnp.tanh(a(x)) + b(x),
            "used elsewhere": lambda: (lambda y: (y + b(x), y))(a(x)),
            "a difference": lambda: a(x) - b(x),
            "a product": lambda: a(x) * b(x),
            "its input": lambda: a(x) + x,
            "without norms": lambda: conv(x, p["a"]["kernel"]) + plain(x),
        }[name]()

    return infer


@pytest.mark.parametrize(
    "name",
    [
        "other inputs",
        "other strides",
        "other dilations",
        "no position in common",
        "an activation",
        "used elsewhere",
        "a difference",
        "a product",
        "its input",
        "without norms",
    ],
)
def test_what_is_left(x64, name):
    infer, tree = apart(name), params_of(a=kernel(3, 3), b=kernel(1, 1))
    params = random(tree, dtype="float64")
    x = random(jax.ShapeDtypeStruct((2, SIZE, SIZE, FEATURES), "float64"), 5, "float64")
    before = program(infer, params, x).count(OF_CONVS)
    folded_fn, folded, found = assert_same(infer, params, x, tolerance=1e-10)
    assert found.merged == ()
    assert program(folded_fn, folded, x).count(OF_CONVS) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_dtypes(dtype):
    """The kernels are added up before the cast."""

    def infer(p, x):
        p, x = jax.tree.map(lambda a: a.astype(dtype), (p, x))
        y = jaxbn.normalize(conv(x, p["a"]["kernel"]), **p["a"]["norm"])
        y += jaxbn.normalize(conv(x, p["b"]["kernel"]), **p["b"]["norm"])
        return y + jaxbn.normalize(x, **p["c"]["norm"])

    tree = params_of(a=kernel(3, 3), b=kernel(1, 1), c=None)
    tolerance = {"float32": 2e-6, "bfloat16": 0.02}[dtype]
    text, folded, _ = merged(infer, tree, "float32", tolerance=tolerance)
    assert text.count(OF_CONVS) == 1
    assert {a.dtype for a in folded.values()} == {jnp.dtype(dtype)}


def test_kernels_that_are_meant_to_be_rounded_are_not_added_up():
    def infer(p, x):
        options = {"preferred_element_type": jnp.float32}
        kernels = (p[name]["kernel"].astype(x.dtype) for name in "ab")
        y = sum(conv(x, kernel, **options) for kernel in kernels)
        return y + jaxbn.normalize(x, **p["c"]["norm"], dtype=jnp.float32)

    tree = params_of(a=kernel(3, 3), b=kernel(1, 1), c=None)
    for dtype, merged in ((jnp.bfloat16, 1), (jnp.float8_e4m3fn, 0)):
        x = jax.ShapeDtypeStruct((2, SIZE, SIZE, FEATURES), dtype)
        assert len(report(infer, tree, x).merged) == merged


class RepVGG(nn.Module):
    """A block of RepVGG, as it is trained."""

    features: int = FEATURES

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(jaxbn.linen.BatchNorm, True, dtype=x.dtype)
        layer = functools.partial(nn.Conv, self.features, use_bias=False, dtype=x.dtype)
        y = norm(name="bn_3")(layer((3, 3), name="conv_3")(x))
        y += norm(name="bn_1")(layer((1, 1), name="conv_1")(x))
        if x.shape[-1] == self.features:
            y += norm(name="bn_input")(x)
        return nn.relu(y)


class Blocks(nn.Module):
    """Several, and a layer that uses them."""

    @nn.compact
    def __call__(self, x):
        for features in (6, 6, 8):
            x = RepVGG(features)(x)
        return nn.Dense(3)(x.mean((1, 2)))


def test_a_network_of_linen(x64):
    f, variables, x = of_module(Blocks(), dtype="float64")
    folded_fn, folded, found = assert_same(f, variables, x, tolerance=1e-10)
    assert program(folded_fn, folded, x).count(OF_CONVS) == 3
    assert [len(one.branches) for one in found.merged] == [2, 3, 2]
    assert not found.left
    more = jnp.concatenate([x, x])
    np.testing.assert_allclose(folded_fn(folded, more), f(variables, more), 1e-10)


class OfNnx(nnx.Module):
    def __init__(self, rngs):
        def layer(size):
            return nnx.Conv(3, 3, (size, size), use_bias=False, rngs=rngs)

        self.convs = nnx.List([layer(3), layer(1)])
        make = functools.partial(jaxbn.nnx.BatchNorm, 3, rngs=rngs)
        self.norms = nnx.List([make(), make(), make()])

    def __call__(self, x):
        inputs = (self.convs[0](x), self.convs[1](x), x)
        return sum(norm(y) for norm, y in zip(self.norms, inputs, strict=True))


def test_a_module_of_nnx(x64):
    model = OfNnx(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    state = random(state, dtype="float64")
    x = random(jax.ShapeDtypeStruct((2, 8, 8, 3), "float64"), 5, "float64")
    f = lambda state, x: nnx.merge(graphdef, state)(x)
    folded_fn, folded, found = assert_same(f, state, x, tolerance=1e-10)
    assert program(folded_fn, folded, x).count(OF_CONVS) == 1
    assert len(found.merged[0].branches) == 3


def test_the_report_needs_shapes_alone():
    tree = params_of(a=kernel(3, 3), b=kernel(1, 1))
    x = jax.ShapeDtypeStruct((2, SIZE, SIZE, FEATURES), jnp.float32)
    found = report(lambda p, x: branch(p["a"], x) + branch(p["b"], x), tree, x)
    assert found.merged[0].into == "a/kernel"


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("target", "compiler"), [("h200", "jax_cuda13_plugin"), ("v5e", "libtpu")]
)
def test_a_block_is_one_convolution_once_compiled(target, compiler):
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"needs the compiler for {target}: {compiler}")
    script = "benchmarks/folding.py"
    given = [
        "--network",
        "RepVGG",
        "--batch",
        "8",
        "--size",
        "28",
        "--blocks",
        "2",
        "--dtypes",
        "bfloat16",
    ]
    out = subprocess.run(
        [sys.executable, script, target, *given],
        env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    before, after = map(int, re.findall(r"\((\d+)", out))
    # Two blocks, and the product with the mean of the images.
    assert (before, after) == (5, 3)
    assert float(out.split()[-1]) < 0.6
