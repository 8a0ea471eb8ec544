"""`fold` and `report` on whole programs."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import older
import pytest
from flax import nnx
from jax import lax

import jaxbn
from jaxbn.folding import fold, report
from jaxbn.folding._structure import structure

DN = ("NHWC", "HWIO", "NHWC")
IMAGE = (2, 6, 6, 3)


def norm_(dtype=None, **given):
    return jaxbn.linen.BatchNorm(use_running_average=True, dtype=dtype, **given)


class Block(nn.Module):
    features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        conv = lambda size: nn.Conv(self.features, size, dtype=self.dtype)
        y = nn.relu(norm_(self.dtype)(conv((3, 3))(x)))
        y = norm_(self.dtype)(conv((3, 3))(y))
        return nn.relu(y + norm_(self.dtype)(conv((1, 1))(x)))


class Net(nn.Module):
    dtype: jnp.dtype | None = None
    wrap: str = ""

    @nn.compact
    def __call__(self, x):
        block = {"": Block, "remat": nn.remat(Block), "jit": nn.jit(Block)}[self.wrap]
        x = nn.Conv(4, (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = block(5, self.dtype)(nn.relu(norm_(self.dtype)(x)))
        return nn.Dense(3, dtype=self.dtype)(x.mean((1, 2)))


def random(tree, seed=0, dtype=None):
    """The same tree with numbers at random, none of them trivial."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        name, z = jax.tree_util.keystr(path), rng.normal(size=like.shape)
        if "var" in name or "std" in name:
            z = np.abs(z) + 0.2
        if "kernel" in name:
            z = z / np.sqrt(max(1, np.prod(like.shape[:-1])))
        return jnp.asarray(z, dtype or like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def example(shape=IMAGE, dtype="float32", seed=9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def of_module(module, shape=IMAGE, dtype="float32"):
    """The function, its parameters and an input of a linen module."""
    x = example(shape, dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return module.apply, random(variables, dtype=dtype), x


def assert_same(function, params, *inputs, tolerance=2e-5):
    """Folds, compares, and gives the folded function, its parameters, the report."""
    folded_fn, folded = fold(function, params, *inputs)
    found = jax.tree.leaves(jax.jit(folded_fn)(folded, *inputs))
    wanted = jax.tree.leaves(jax.jit(function)(params, *inputs))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        size = np.abs(b).max() + 1e-30
        np.testing.assert_allclose(a / size, b / size, 0, tolerance)
    return folded_fn, folded, report(function, params, *inputs)


def program(function, *args):
    return str(jax.make_jaxpr(function)(*args))


def conv(x, kernel, padding="SAME", **more):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=DN, **more
    )


def norm_of(features, seed=0, **given):
    names = ("mean", "var", "scale", "bias")
    like = {name: jax.ShapeDtypeStruct((features,), "float32") for name in names}
    return random(like, seed)


def normalized(x, norm, **given):
    return jaxbn.normalize(x, **norm, **given)


@pytest.mark.parametrize("wrap", ["remat", "jit"])
def test_a_residual_network_of_linen(x64, wrap):
    f, variables, x = of_module(Net(wrap=wrap), dtype="float64")
    folded_fn, folded, found = assert_same(f, variables, x, tolerance=1e-10)
    assert len(found.folded) == 4
    assert not found.left
    assert "rsqrt" not in program(folded_fn, folded, x)
    assert not any("BatchNorm" in path for path in folded)
    assert folded["params/Conv_0/bias"].shape == (4,)
    assert "4 folded, 0 left" in str(found)
    assert found.layers[0].path == "batch_stats/BatchNorm_0"
    assert found.layers[0].into == "params/Conv_0/kernel"


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.first = jaxbn.nnx.BatchNorm(4, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.second = jaxbn.nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(self.stem(x)))
        x = nnx.relu(x + self.second(self.conv(x)))
        return self.head(x.mean((1, 2)))


def test_a_residual_network_of_nnx():
    model = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
    model.eval()
    graph, state = nnx.split(model)
    f = lambda state, x: nnx.merge(graph, state)(x)
    folded_fn, folded, found = assert_same(f, random(state), example())
    assert len(found.folded) == 2
    assert not found.left
    assert "rsqrt" not in program(folded_fn, folded, example())
    assert set(folded) == {
        f"{layer}/{name}"
        for layer in ("stem", "conv", "head")
        for name in ("kernel", "bias")
    }


def test_transformations_and_other_shapes():
    f, variables, x = of_module(Net())
    f = jax.jit(f)
    folded_fn, folded = fold(f, variables, x)
    loss = lambda g: lambda params, x: (g(params, x) ** 2).sum()
    mine, theirs = (
        jax.jit(jax.grad(loss(g), (0, 1)))(p, x)
        for g, p in ((folded_fn, folded), (f, variables))
    )
    np.testing.assert_allclose(mine[1], theirs[1], 1e-4, 1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(mine[0]))
    head = mine[0]["params/Dense_0/kernel"]
    np.testing.assert_allclose(head, theirs[0]["params"]["Dense_0"]["kernel"], 1e-4)

    each = jax.jit(jax.vmap(folded_fn, (None, 0)))(folded, x[:, None])
    np.testing.assert_allclose(each[:, 0], f(variables, x), 1e-4, 1e-5)
    for shape in ((3, 6, 6, 3), (2, 9, 7, 3)):
        other = example(shape)
        wanted = f(variables, other)
        np.testing.assert_allclose(folded_fn(folded, other), wanted, 1e-4, 1e-5)
    abstract = jax.eval_shape(lambda v: fold(f, v, x)[1], variables)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, abstract)


def test_bfloat16_is_folded_before_the_cast():
    f, variables, x = of_module(Net(jnp.bfloat16))
    folded_fn, folded = fold(f, variables, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, "float64"), (variables, x))
        truth = np.asarray(jax.jit(Net().apply)(*wide))
    error = lambda y: np.abs(np.asarray(y, "float64") - truth).max()
    assert error(folded_fn(folded, x)) < 2 * error(f(variables, x))
    kernel = folded["params/Conv_0/kernel"]
    norm = variables["params"]["BatchNorm_0"]["scale"] / jnp.sqrt(
        variables["batch_stats"]["BatchNorm_0"]["var"] + 1e-5
    )
    whole = variables["params"]["Conv_0"]["kernel"] * norm[None, None, None]
    np.testing.assert_allclose(
        kernel.astype("float32"), whole.astype(kernel.dtype).astype("float32"), 1e-2
    )
    assert kernel.dtype == jnp.bfloat16


class Layers(nn.Module):
    """One layer of a kind, and its batch norm."""

    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "dense":
            return norm_()(nn.Dense(5)(nn.relu(norm_()(nn.Dense(4)(x)))))
        if self.kind.startswith("renorm"):
            tracks = "var" if self.kind == "renorm of variances" else "std"
            layer = jaxbn.linen.BatchRenorm(use_running_average=True, tracks=tracks)
            return layer(nn.Dense(4)(x))
        if self.kind == "heads":
            return norm_(axis=(-2, -1))(nn.DenseGeneral((2, 4))(x))
        if self.kind == "features":
            return norm_(axis=-1)(nn.DenseGeneral((2, 4), use_bias=False)(x))
        if self.kind == "einsum":
            return norm_(axis=1)(nn.Einsum((3, 4), "bijc,cd->bdij")(x))
        more = {
            "grouped": {"feature_group_count": 3},
            "no scale": {},
            "no bias": {},
            "strided": {"strides": 2, "padding": "VALID"},
        }
        if self.kind == "transposed":
            return norm_()(nn.ConvTranspose(4, (3, 3), (2, 2))(x))
        options = {"no scale": {"use_scale": False}, "no bias": {"use_bias": False}}
        x = nn.Conv(6, (3, 3), **more[self.kind])(x)
        return norm_(**options.get(self.kind, {}))(x)


KINDS = (
    "dense",
    "renorm",
    "renorm of variances",
    "heads",
    "features",
    "einsum",
    "grouped",
    "no scale",
)


@pytest.mark.parametrize("kind", [*KINDS, "no bias", "strided", "transposed"])
def test_layers_of_every_kind(kind):
    _, _, found = assert_same(*of_module(Layers(kind)))
    assert found.folded
    assert not found.left


def arrays(*shapes, seed=3):
    return [example(shape, seed=seed + i) for i, shape in enumerate(shapes)]


def left(function, params, *inputs):
    """Why the one normalization of a function is left, which it must be."""
    folded_fn, folded, found = assert_same(function, params, *inputs)
    assert len(found.left) == 1
    assert "rsqrt" in program(folded_fn, folded, *inputs)
    return found.left[0].reason


KERNEL, SQUARE = arrays((3, 3, 3, 4), (3, 3, 3, 3))
AFTER = {"kernel": KERNEL, "norm": norm_of(4)}
BEFORE = {"kernel": KERNEL, "norm": norm_of(3)}


def test_a_shared_convolution_is_left():
    f = lambda p, x: normalized(conv(conv(x, p["kernel"]), p["kernel"]), p["norm"])
    why = left(f, {"kernel": SQUARE, "norm": norm_of(3)}, example())
    assert "kernel of the convolution is used elsewhere" in why


@pytest.mark.parametrize(
    ("padding", "groups", "bias"),
    [("VALID", 1, True), ("VALID", 3, False), ("SAME", 1, False), ("SAME", 3, True)],
)
def test_before_a_convolution(padding, groups, bias):
    kernel = example((3, 2, 3 // groups, 6))
    params = {"kernel": kernel, "norm": norm_of(3), "bias": example((6,))}

    def f(p, x):
        y = conv(normalized(x, p["norm"]), p["kernel"], padding,
                 feature_group_count=groups)  # fmt: skip
        return jnp.tanh(y + p["bias"][None, None, None]) if bias else y

    if padding == "SAME":
        assert "pads with zeros" in left(f, params, example())
        return
    folded_fn, folded, found = assert_same(f, params, example())
    assert [layer.position for layer in found.folded] == ["before"]
    assert "rsqrt" not in program(folded_fn, folded, example())
    assert set(folded) == {"kernel", "bias"}


def test_before_and_after_the_same_products():
    params = {"kernel": example((3, 4)), "first": norm_of(3), "last": norm_of(4, 5)}

    def f(p, x):
        y = normalized(x, p["first"]) @ p["kernel"]
        return normalized(y, p["last"])

    folded_fn, folded, found = assert_same(f, params, example((5, 3)))
    assert {layer.position for layer in found.folded} == {"before", "after"}
    assert set(folded) == {"kernel", "bias"}
    assert "rsqrt" not in program(folded_fn, folded, example((5, 3)))


def test_a_norm_of_a_norm():
    params = {**AFTER, "second": norm_of(4, 6)}
    f = lambda p, x: normalized(
        normalized(conv(x, p["kernel"]), p["norm"]), p["second"]
    )
    _, folded, found = assert_same(f, params, example())
    assert len(found.folded) == 2
    assert set(folded) == {"kernel", "bias"}


def scanned(p, x):
    def body(x, kernel):
        return normalized(conv(x, kernel), p["norm"]), None

    return lax.scan(body, x, p["kernels"])[0]


REASONS = {
    "relu": (
        lambda p, x: normalized(nn.relu(conv(x, p["kernel"])), p["norm"]),
        "the output of `relu`",
    ),
    "twice": (
        lambda p, x: (lambda y: normalized(y, p["norm"]) + y)(conv(x, p["kernel"])),
        "is used elsewhere too",
    ),
    "constants": (
        lambda p, x: (
            normalized(conv(x, p["kernel"]), norm_of(4)) + p["norm"]["mean"].sum()
        ),
        "its mean is not from `params` but of constants",
    ),
    "batch": (
        lambda p, x: (
            lambda y: normalized(y, {**p["norm"], "mean": y.mean((0, 1, 2))})
        )(conv(x, p["kernel"])),
        "its mean is not from `params` but of input",
    ),
    "constant kernel": (
        lambda p, x: normalized(conv(x, KERNEL), p["norm"]) + p["kernel"].sum(),
        "kernel of the convolution is not from `params`",
    ),
    "rows": (
        lambda p, x: normalized(
            conv(x, p["kernel"]),
            {name: v[:1].repeat(6) for name, v in p["norm"].items()},
            feature_axes=1,
        ),
        "its features are not outputs of the kernel",
    ),
    "reshaped": (
        lambda p, x: normalized(
            conv(x, p["kernel"]).reshape(2, 6, 12, 2),
            {name: v[:2] for name, v in p["norm"].items()},
        ),
        "a reshape mixes its features",
    ),
    "branch": (
        lambda p, x: lax.cond(
            x[0, 0, 0, 0] > 0,
            lambda y: normalized(y, p["norm"]),
            lambda y: y,
            conv(x, p["kernel"]),
        ),
        "inside `cond`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REASONS)
def test_what_is_left_and_why(why):
    f, reason = REASONS[why]
    assert reason in left(f, AFTER, example())


def test_inside_a_scan_is_left():
    norms = {"norm": norm_of(3), "last": norm_of(3)}
    params = {"kernels": example((2, 3, 3, 3, 3)), "kernel": SQUARE, **norms}
    assert left(scanned, params, example()) == "it is inside `scan`"

    def f(p, x):
        return normalized(conv(scanned(p, x), p["kernel"]), p["last"])

    found = report(f, params, example())
    assert [layer.path for layer in found.layers] == ["norm", "last"]
    assert found.folded == found.layers[1:]


def test_derivatives_inside_are_left():
    f = lambda p, x: jax.grad(
        lambda x: (normalized(conv(x, p["kernel"]), p["norm"]) ** 2).sum()
    )(x)
    _, _, found = assert_same(f, AFTER, example())
    assert not found.folded
    assert "a derivative" in found.left[-1].reason
    assert found.left[-1].path == "norm"


ROWS = example((5, 3))
DENSE = {"kernel": example((3, 4)), "norm": norm_of(4)}
NARROW = jnp.float8_e4m3fn


def dense(p, x):
    return normalized(x @ p["kernel"], p["norm"])


def test_a_mapped_epsilon_is_left():
    params = {**DENSE, "epsilon": jnp.array([0.0, 1.0, 3.0, 8.0])}
    one = lambda p, e, x: normalized(x @ p["kernel"], p["norm"], epsilon=e)
    f = lambda p, x: jax.vmap(one, (None, 0, 0))(p, p["epsilon"], x)
    assert "its epsilon is not a scalar" in left(f, params, example((4, 3, 3)))


def test_a_scale_per_example_is_left():
    f = lambda p, x, label: normalized(
        x @ p["kernel"], {**p["norm"], "scale": p["table"][label]}
    )
    params = {**DENSE, "table": example((6, 4))}
    why = left(f, params, ROWS, jnp.arange(5))
    assert why == "its scale is not from `params` but of input"
    f = lambda p, x: normalized(x @ p["kernel"], {**p["norm"], "scale": p["table"][:5]})
    assert "its vectors run along different axes" in left(f, params, ROWS)
    assert report(f, params, ROWS).left[0].path == "norm"


def test_parameters_of_the_same_path():
    def f(p, x):
        first, second = p["a/b"], p["a"]["b"]
        if len(x) < 6:
            return x @ first - x @ second
        return -(x @ second) + x @ first

    params = {"a/b": example((3, 3)), "a": {"b": example((3, 3), seed=1)}}
    folded_fn, folded, _ = assert_same(f, params, ROWS)
    assert set(folded) == {"a/b", "a/b_1"}
    more = example((7, 3))
    np.testing.assert_allclose(folded_fn(folded, more), f(params, more), 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", [NARROW, jnp.bfloat16])
def test_a_kernel_that_is_meant_to_be_rounded_stays_so(dtype):
    def f(p, x):
        return dense({**p, "kernel": p["kernel"].astype(dtype).astype("float32")}, x)

    assert assert_same(f, DENSE, ROWS)[2].folded


@pytest.mark.parametrize("dtype", [NARROW, jnp.int8])
def test_narrow_and_integer_kernels_are_left(dtype):
    def f(p, x):
        y = lax.dot(x.astype(dtype), p["kernel"], preferred_element_type=jnp.float32)
        return normalized(y, p["norm"])

    tiny = {**DENSE["norm"], "var": jnp.full(4, 1e-7)}
    params = {"kernel": 9 * example((3, 4)), "norm": tiny}
    params["kernel"] = params["kernel"].astype(dtype)
    why = left(f, params, ROWS)
    assert "has 8 bits" in why if dtype == NARROW else "is not floating" in why


def test_activations_that_are_meant_to_be_rounded_are_left():
    f = lambda p, x: normalized(
        (x @ p["kernel"]).astype(NARROW).astype("float32"), p["norm"]
    )
    assert "the output of `convert_element_type`" in left(f, DENSE, ROWS)


def test_closes_over_what_is_traced():
    def f(t, x):
        infer = lambda p, x: jnp.sin(p["a"] * t)[None] * x
        folded_fn, folded = fold(infer, {"a": jnp.ones(3)}, x)
        return (folded_fn(folded, x) + folded_fn(folded, x[:1])).sum()

    t, x = example((3,)), example((1, 3))
    g = jax.jit(jax.value_and_grad(f))(t, x)
    np.testing.assert_allclose(g[0], 2 * (jnp.sin(t) * x[0]).sum(), 1e-5)
    np.testing.assert_allclose(g[1], 2 * jnp.cos(t) * x[0], 1e-5)
    each = jax.vmap(f, (0, None))(t[None], x)
    np.testing.assert_allclose(each[0], g[0], 1e-5)


def test_closes_over_a_random_key():
    key = jax.random.key(3)
    f = lambda p, x: x * (p["a"] * jax.random.normal(key, (3,)))[None]
    folded_fn, folded, _ = assert_same(f, {"a": example((3,))}, ROWS)
    whole = folded_fn(folded, ROWS)
    np.testing.assert_allclose(folded_fn(folded, ROWS[:2]), whole[:2], 1e-6)


SEEDS = {
    "key": (jax.random.key(1), lambda key: key),
    "raw key": (jax.random.PRNGKey(1), lambda key: key),
    "seed": (jnp.int32(4), jax.random.key),
    "count": (jnp.int32(4), lambda n: jax.random.fold_in(jax.random.key(0), n)),
}


@pytest.mark.parametrize("kind", SEEDS)
def test_seeds_stay_seeds(kind):
    seed, key = SEEDS[kind]

    def f(p, x):
        kept = jax.random.bernoulli(key(p["seed"]), 0.5, (3,))
        return jnp.where(kept[None], x, 0) * jnp.sin(p["a"])

    _, folded, _ = assert_same(f, {"seed": seed, "a": jnp.ones(())}, ROWS)
    assert set(folded) == {"seed", "a"}
    assert folded["seed"].dtype == seed.dtype
    assert folded["seed"].shape == seed.shape


def test_one_example_is_planned_as_several_are():
    f = lambda p, x: x * jnp.sin(jnp.broadcast_to(p["a"], x.shape))
    params = {"a": example((3,))}
    folded_fn, folded, _ = assert_same(f, params, ROWS[:1])
    np.testing.assert_allclose(folded_fn(folded, ROWS), f(params, ROWS), 1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    value: jax.Array
    other: jax.Array


def test_paths():
    params = {"pair": Pair(jnp.ones(3), jnp.ones(3)), "mean": ROWS[0] - 4}

    def f(p, x):
        y = x * p["pair"].value[None] + p["pair"].other[None]
        return jaxbn.normalize(y, p["mean"], jnp.abs(p["mean"]))

    _, folded, found = assert_same(f, params, ROWS)
    assert {"pair/value", "pair/other"} <= set(folded)
    assert found.layers[0].path == "mean"


def test_vmap_moves_the_axes():
    one = lambda p, x: normalized(conv(x[None], p["kernel"])[0], p["norm"])
    f = jax.vmap(one, (None, 3), 1)
    _, _, found = assert_same(f, AFTER, example((6, 6, 3, 2)))
    # Before, JAX makes a grouped convolution and slices of it: left, and reported.
    assert len(found.folded) == (1 if older.JAX >= (0, 10) else 0)
    ensemble = jax.vmap(lambda p, x: normalized(x @ p["kernel"], p["norm"]), (0, None))
    params = {"kernel": example((2, 3, 4)), "norm": jax.tree.map(
        lambda *a: jnp.stack(a), norm_of(4), norm_of(4, 1))}  # fmt: skip
    assert_same(ensemble, params, example((5, 3)))


def test_nothing_to_fold():
    f = lambda p, x: (x["a"] @ p[0] + p[1][None], {"b": x["b"]})
    x = {"a": example((2, 3)), "b": jnp.arange(3)}
    folded_fn, folded, found = assert_same(f, (example((3, 4)), example((4,))), x)
    assert list(folded) == ["0", "1"]
    assert found.layers == ()
    assert str(found).endswith("0 folded, 0 left")
    assert folded_fn(folded, x)[1]["b"] is not None


def test_what_depends_on_parameters_alone_is_computed_once():
    params = {"a": example((3, 3)), "b": example((3, 4)), "pos": example((8, 4))}

    def f(p, x):
        return x @ (jnp.tanh(p["a"]) @ p["b"]) + p["pos"][: x.shape[0]]

    folded_fn, folded, _ = assert_same(f, params, example((5, 3)))
    assert "tanh" not in program(folded_fn, folded, example((5, 3)))
    assert jax.tree.map(jnp.shape, folded) == {"a": (3, 4), "pos": (8, 4)}
    # Other lengths take another part.
    np.testing.assert_allclose(
        folded_fn(folded, example((7, 3))), f(params, example((7, 3))), 1e-5, 1e-5
    )


def test_other_folded_parameters_are_refused():
    f = lambda p, x: x * (jnp.sin(p["a"]) / x.shape[0])
    folded_fn, folded = fold(f, {"a": jnp.ones(())}, example((5,)))
    with pytest.raises(ValueError, match="Fold again with such an example"):
        folded_fn(folded, example((6,)))
    with pytest.raises(ValueError, match="`folded_params` lacks"):
        folded_fn({}, example((5,)))
    with pytest.raises(TypeError, match="`folded_params` must be a dict, got NoneType"):
        folded_fn(None, example((5,)))
    for wrong, got in ((jnp.ones(2), r"shape \(2,\)"), ("b", "no array")):
        with pytest.raises(ValueError, match=rf"`folded_params\['a'\]`.*{got}"):
            folded_fn({"a": wrong}, example((5,)))
    for verb in (fold, report):
        with pytest.raises(TypeError, match="`inference_fn` must be a function"):
            verb(AFTER, f, example())


@pytest.mark.optimized
def test_moves_no_more_on_cpu():
    f, variables, x = of_module(Net(), (8, 16, 16, 3))
    folded_fn, folded = fold(f, variables, x)
    moved = lambda g, p: (
        jax.jit(g).lower(p, x).compile().cost_analysis()["bytes accessed"]
    )
    assert moved(folded_fn, folded) <= moved(f, variables)


@pytest.mark.optimized
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs libtpu: pip install "jax[tpu]"',
)
def test_moves_no_more_on_a_tpu():
    # A process of its own, because libtpu takes a lock and looks for a TPU.
    script = ["benchmarks/folding.py", "v5e", "--batch", "8", "--size", "28"]
    script += ["--blocks", "1", "--dtypes", "bfloat16"]
    out = subprocess.run(
        [sys.executable, *script],
        env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    ratios = [float(line.rsplit(maxsplit=1)[1]) for line in out.splitlines()]
    assert len(ratios) == 1
    assert ratios[0] <= 1


def test_under_shard_map():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda p, x: normalized(conv(x, p["kernel"]), p["norm"])
    folded_fn, folded = fold(f, AFTER, example()[:1])
    spec = jax.sharding.PartitionSpec
    split = jax.shard_map(
        lambda p, x: folded_fn(p, x),
        mesh=mesh,
        in_specs=(spec(), spec("d")),
        out_specs=spec("d"),
    )
    wanted = f(AFTER, example())
    np.testing.assert_allclose(jax.jit(split)(folded, example()), wanted, 1e-4, 1e-4)


def test_what_prints_still_prints(capfd):
    def f(p, x):
        jax.debug.print("mean {}", p["norm"]["mean"].sum())
        return normalized(conv(x, p["kernel"]), p["norm"])

    folded_fn, folded = fold(f, AFTER, example())
    folded_fn(folded, example())
    jax.effects_barrier()
    assert capfd.readouterr().out.count("mean") == 1
    assert report(f, AFTER, example()).folded


def test_programs_are_equal_if_they_compute_the_same():
    """What tells whether inputs of other shapes need other folded parameters."""

    def of(f, *args):
        return structure(jax.make_jaxpr(f)(*args))

    def f(c, op=jnp.sin):
        return lambda x: jax.jit(lambda x: op(x) * c)(x) + jax.nn.relu(x)

    one = jnp.ones(3)
    assert of(f(2.0), one) == of(f(2.0), one)
    assert of(f(jnp.arange(3.0)), one) == of(f(jnp.arange(3.0)), one)
    others = [
        of(f(3.0), one),
        of(f(2.0, jnp.cos), one),
        of(f(2.0), jnp.ones(4)),
        of(f(2.0), one.astype(jnp.bfloat16)),
        of(lambda x: jnp.sin(x) * 2.0 + jax.nn.relu(x + 1), one),
        of(f(jnp.arange(3.0)), one),
    ]
    assert all(of(f(2.0), one) != other for other in others)
    assert of(f(jnp.arange(3.0)), one) != of(f(jnp.arange(3.0) + 1), one)
    assert of(lambda x, y: x - y, one, one) != of(lambda x, y: y - x, one, one)
