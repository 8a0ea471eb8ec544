"""Batch norm by the CPU kernels of jaxbn-cpu: the same numbers, everywhere."""

import re
from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import spread
from allpairspy import AllPairs
from data import (
    LAYOUTS,
    WEIGHTS,
    assert_close,
    numbers,
    reduced_axes,
    squeeze,
    weights,
)
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._kernels import sums as kernels

pytestmark = pytest.mark.optimized

jaxbn_cpu = pytest.importorskip(
    "jaxbn_cpu", reason="needs jaxbn-cpu: `pip install ./native`"
)


@pytest.fixture(autouse=True)
def small_arrays_too(monkeypatch):
    """These tests have small arrays, of which XLA would compute the backward pass."""
    monkeypatch.setattr(kernels, "SMALL", 0)


CALLS = r"custom_call(?:_target)?[ =(]*[@\"]+jaxbn_"
ADJACENT = [name for name in LAYOUTS if "two_axes" not in name]
BROAD = [kind for kind in WEIGHTS if kind != "features"]


def batch_norm(x, scale, bias, *, implementation="native", **options):
    return jaxbn.batch_norm(x, scale, bias, implementation=implementation, **options)


def calls(text, name=""):
    return len(re.findall(CALLS + name, text))


@pytest.mark.parametrize(
    ("layout", "kind", "dtype", "near"),
    list(AllPairs([ADJACENT, BROAD, ["float32", "bfloat16"], [False, True]])),
)
def test_values_and_derivatives(layout, kind, dtype, near):
    shape, axes = LAYOUTS[layout]
    reduced = reduced_axes(shape, axes)
    x, dy = numbers(shape, dtype), numbers(shape, dtype, 3)
    w = weights(kind, shape, reduced)
    if w is not None and any(w.shape[axis] > 1 for axis in axes):
        w = w.max(tuple(axis % len(shape) for axis in axes), keepdims=True)
    features = [shape[axis] for axis in sorted(axis % len(shape) for axis in axes)]
    scale, bias = numbers(features, "float32", 5), numbers(features, "float32", 6)
    options = {"feature_axes": axes, "weights": w, "shift": scale if near else None}

    @jax.jit
    def step(x, scale, bias, dy):
        f = partial(batch_norm, **options)
        y, vjp, m = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, m, vjp(dy)

    y, m, cotangents = step(x, scale, bias, dy)
    wide = oracle.moments(x, reduced, w)
    at = np.expand_dims
    s, b = at(scale, reduced), at(bias, reduced)
    empty = wide.count.max() == 0  # Normalized by the shift, or 0.
    if not empty:
        near_enough = {"rtol": 1e-5, "atol": 1e-5}
        assert_close(m.mean, squeeze(wide.mean, reduced), **near_enough)
        assert_close(m.var, squeeze(wide.var, reduced), **near_enough)
        tolerance = 4e-2 if dtype == "bfloat16" else 2e-3
        truth = oracle.normalize(x, wide.mean, wide.var, s, b)
        assert_close(y, truth, rtol=tolerance, atol=tolerance)
    expected = jax.jit(
        lambda *a: jax.vjp(
            lambda *a: batch_norm(*a, implementation="xla", **options)[0], *a
        )[1](dy)
    )(x, scale, bias)
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-3
    for got, truth in zip(cotangents, expected, strict=True):
        size = float(np.abs(np.asarray(truth, np.float64)).max(initial=1))
        assert_close(got, truth, rtol=tolerance, atol=tolerance * size)
    if kind in ("none", "mask") and not empty and dtype == "float32":
        truths = oracle.vjp(x, dy, reduced, s, w)
        for got, truth in zip(cotangents, truths, strict=True):
            truth = truth if truth.shape == got.shape else squeeze(truth, reduced)
            size = float(np.abs(truth).max(initial=1))
            assert_close(got, truth, rtol=2e-3, atol=2e-4 * size)


FAR = jnp.zeros(4)  # As a running mean is at first.


def far(dtype="float32", rows=64, ratio=1e4):
    """Data that are as far from 0 as their ratio of mean to standard deviation says."""
    if dtype == "bfloat16":  # Neighbours in 8 bits: they do not differ by less.
        steps = np.random.default_rng(0).integers(0, 3, size=(rows, 4))
        return jnp.asarray(256 + 2.0 * steps, dtype)
    return numbers((rows, 4), dtype, mean=ratio, std=1.0)


def exact_var(x, w=None):
    return oracle.moments(x, (0,), w).var[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shift", [None, FAR], ids=["none", "far"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_variance_is_exact_about_any_shift(dtype, shift, weighted):
    x = far(dtype, rows=30000)
    w = np.random.default_rng(1).integers(0, 3, size=(30000, 1)) if weighted else None
    f = partial(jaxbn.moments, weights=w, shift=shift, implementation="native")
    for run in (f, jax.jit(f)):
        m = run(x)
        assert_close(m.var, exact_var(x, w), rtol=1e-6)
        assert_close(m.mean, oracle.moments(x, (0,), w).mean[0], rtol=1e-7)


def test_without_any_weight_the_mean_is_the_shift():
    shift = jnp.arange(4.0)
    m = jaxbn.moments(far(), weights=False, shift=shift, implementation="native")
    spread.close(m, jaxbn.Moments(shift, jnp.zeros(4), jnp.zeros(())))


@pytest.mark.parametrize("name", [n for n in spread.CONTEXTS if n != "vmap"])
def test_the_variance_is_exact_over_devices_about_any_shift(name):
    args = far(rows=spread.ROWS)[:, :3], *[jnp.ones(3)] * 2, jnp.ones((spread.ROWS, 1))
    _, (_, m, _) = jax.jit(partial(spread.CONTEXTS[name], form="vjp", shift=0.0))(*args)
    assert_close(m.var, exact_var(args[0]), rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_the_variance_is_exact_on_meshes_about_any_shift(kind):
    mesh = spread.mesh_of(8, kind=kind)
    x = far()
    with jax.set_mesh(mesh):
        spread_x = jax.device_put(x, NamedSharding(mesh, P("data")))
        m = jax.jit(partial(jaxbn.moments, shift=FAR, implementation="native"))(
            spread_x
        )
    assert_close(m.var, exact_var(x), rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_groups_are_pooled_exactly_about_any_shift(devices):
    names = {"axis_name": "data"} if devices > 1 else {}
    groups = {"num_groups": 8, "strided": True}  # Next to the features: kernels sum.
    layer = jaxbn.layers.ghost(implementation="native", momentum=0.0, **groups, **names)
    params, state = layer.init(4)
    run, x = partial(layer.apply, params, state, training=True), far()
    if devices > 1:
        places = {"in_specs": P("data"), "out_specs": (P("data"), P())}
        run = jax.shard_map(run, mesh=spread.mesh_of(8), **places)
    y, new = jax.jit(run)(x)
    assert_close(new.var, exact_var(x), rtol=1e-3)  # Of means rounded to float32.
    truth, _ = oracle.groups(x, np.tile(np.arange(8), 8))
    assert_close(y, truth, rtol=5e-3, atol=5e-3)  # x has no more digits.


@pytest.mark.parametrize("kind", ["linen", "nnx", "standard", "renorm", "in_place"])
def test_a_first_step_is_exact(kind):
    """Where the running mean, which XLA would take for the shift, is 0."""
    x, option = far(), {"momentum": 0.0}
    if kind == "linen":
        layer = jaxbn.linen.BatchNorm(use_running_average=False, **option)
        variables = layer.init(jax.random.key(0), x)
        var = layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"][
            "var"
        ]
    elif kind == "nnx":
        layer = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0), **option)
        layer(x)
        var = layer.var[...]
    else:
        layer = getattr(jaxbn.layers, kind)(**option)
        _, state = layer.apply(*layer.init(4), x, training=True)
        var = jnp.square(state.std) - 1e-5 if kind == "renorm" else state.var
    assert_close(var, exact_var(x), rtol=1e-6)


@pytest.mark.parametrize("form", spread.FORMS)
def test_derivatives_are_exact_about_any_shift(form, x64):
    """To what x has digits for: at 1e3 its mean is rounded to 1e-4 of a deviation."""
    x, scale, bias = far(ratio=1e3), numbers(4, "float32", 5), numbers(4, "float32", 6)

    def loss(x, scale, bias, implementation):
        options = {"shift": FAR.astype(x.dtype), "implementation": implementation}
        y, m = batch_norm(x, scale, bias, derivatives=form, **options)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(m.var) + m.mean)

    def penalty(*args):
        grads = jax.grad(loss, (0, 1, 2))(*args)
        return sum(jnp.sum(jnp.sin(g)) for g in grads)

    wide = [jnp.asarray(a, jnp.float64) for a in (x, scale, bias)]
    for f in (loss, penalty):
        gradient = jax.jit(jax.grad(f, (0, 1, 2)), static_argnums=3)
        for got, truth in zip(
            gradient(x, scale, bias, "native"), gradient(*wide, "xla"), strict=True
        ):
            size = float(np.abs(truth).max())
            assert_close(got, truth, rtol=5e-3, atol=5e-3 * size)


def test_nan_under_the_mask_reaches_nothing():
    x, w = numbers((40, 3), "float32"), np.arange(40)[:, None] % 4 != 0
    x = jnp.where(w, x, jnp.nan)
    scale = bias = numbers(3, "float32", 5)

    def loss(x, scale, implementation):
        y, m = batch_norm(x, scale, bias, weights=w, implementation=implementation)
        return jnp.sum(jnp.sin(jnp.where(w, y, 0))) + jnp.sum(m.var)

    def penalty(x, scale, implementation):
        grads = jax.grad(loss, argnums=(0, 1))(x, scale, implementation)
        return sum(jnp.sum(jnp.sin(g)) for g in grads)

    for f in (loss, penalty):
        got, expected = (jax.grad(f, (0, 1))(x, scale, i) for i in ("native", "xla"))
        for a, b in zip(got, expected, strict=True):
            assert np.isfinite(a).all()
            assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_x_is_read_once_forward_and_once_backward():
    x, v = numbers((64, 5), "float32"), jnp.ones(5)
    step = jax.jit(jax.grad(lambda x: jnp.sum(batch_norm(x, v, v)[0] ** 3)))
    text = step.lower(x).compile().as_text()
    assert calls(text, "moments") == 1
    assert calls(text, "cotangents") == calls(text, "input_cotangent") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((64, 4, 4, 8), -1), ((64, 8, 4, 4), 1), ((1, 8, 999), 1), ((999, 1), 1)],
)
def test_arrays_reach_the_kernels_as_they_are(shape, axis, dtype):
    """In another shape bfloat16 is copied, and the loop that makes dy is a slow one."""
    x, v = numbers(shape, dtype), jnp.ones(shape[axis])

    def step(x, dy):
        f = partial(batch_norm, feature_axes=axis)
        y, vjp = jax.vjp(lambda x: jax.nn.relu(f(x, v, v)[0]), x)
        return y, vjp(dy)

    text = jax.jit(step).lower(x, x).compile().as_text()
    assert calls(text, "cotangents") == calls(text, "input_cotangent") == 1
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|bitcast|reshape)\(", text)
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in moved]
    assert x.size not in sizes, moved


@pytest.mark.parametrize("near", [False, True])
def test_derivatives_of_derivatives(near):
    x = numbers((12, 3), "float32", std=1.0)
    scale, bias = numbers(3, "float32", 5), numbers(3, "float32", 6)

    def loss(implementation):
        options = {"shift": bias if near else None, "implementation": implementation}

        def f(x, scale, bias):
            y, m = batch_norm(x, scale, bias, **options)
            return jnp.sum(jnp.sin(y)) + jnp.sum(m.mean * m.var)

        return f

    def second(f):
        def penalty(*args):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(f, (0, 1, 2))(*args))

        direction = (jnp.cos(x), scale, bias)
        return jax.jit(
            lambda *a: (
                jax.grad(penalty, (0, 1, 2))(*a),
                jax.jvp(penalty, a, direction),
            )
        )(x, scale, bias)

    spread.close(second(loss("native")), second(loss("xla")), 2e-3)
    hessians = (jax.jit(jax.hessian(loss(i)))(x, scale, bias) for i in (None, "xla"))
    spread.close(*hessians, 2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_what_xla_keeps(dtype):
    x, v = jnp.zeros((6, 5, 4), dtype), jnp.ones(4)

    def kept(implementation):
        f = partial(batch_norm, implementation=implementation)
        pull = jax.eval_shape(lambda *a: jax.vjp(lambda *a: f(*a)[0], *a)[1], x, v, v)
        return [a.dtype for a in jax.tree.leaves(pull) if a.ndim == 3]

    assert kept("native") == kept("xla") == [dtype]


@pytest.mark.parametrize(
    ("name", "shift"),
    list(zip((n for n in spread.CONTEXTS if n != "vmap"), cycle([None, 0.7]))),
)
def test_across_devices(name, shift):
    args = spread.arguments("float32")
    options = {"form": "vjp", "shift": shift}
    f = partial(spread.CONTEXTS[name], **options)
    expected = spread.derivatives(partial(spread.whole, **options))(*args)
    # One device may have a few values whose products are large.
    spread.close(spread.derivatives(f)(*args), expected, 3e-3)
    text = jax.jit(jax.grad(f, has_aux=True)).lower(*args).as_text()
    assert calls(text, "moments") >= 1
    assert calls(text, "cotangents") >= 1
    assert calls(text, "input_cotangent") >= 1


def test_vmap_has_xla_compute():
    x, v = numbers((4, 8, 3), "float32"), jnp.ones(3)
    f = jax.jit(jax.vmap(lambda x: batch_norm(x, v, v, implementation=None)))
    assert calls(f.lower(x).compile().as_text()) == 0
    for got, part in zip(f(x)[0], x, strict=True):
        assert_close(got, batch_norm(part, v, v)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"cannot be used under `jax.vmap`"):
        jax.vmap(lambda x: batch_norm(x, v, v))(x)


SHARDINGS = {
    "batch": ((8,), P("a")),
    "pixels": ((8,), P(None, "a")),
    "batch and pixels": ((2, 4), P("a", "b")),
    "features": ((8,), P(None, None, "a")),
    "batch and features": ((4, 2), P("a", None, "b")),
    "two axes on one": ((2, 4), P(("a", "b"))),
    "none": ((8,), P()),
}


@pytest.mark.parametrize("name", SHARDINGS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_on_meshes(name, kind, masked):
    """Nothing is gathered, and one device's numbers are found."""
    shape, spec = SHARDINGS[name]
    mesh = spread.mesh_of(*shape, names=("a", "b")[: len(shape)], kind=kind)
    x, scale = numbers((16, 8, 24), "float32"), numbers(24, "float32", 5)
    mask = np.random.default_rng(2).random((16, 8, 1)) < 0.7 if masked else None

    def step(x, scale, mask, implementation=None):
        def loss(x, scale):
            options = {"weights": mask, "shift": jnp.ones(24)}
            options["implementation"] = implementation
            y, m = batch_norm(x, scale, scale, **options)
            exact = batch_norm(x, scale, scale, implementation=implementation)[1]
            return jnp.sum(jnp.sin(y)), (y, m, exact)

        return jax.grad(loss, (0, 1), has_aux=True)(x, scale)

    expected = jax.jit(partial(step, implementation="xla"))(x, scale, mask)
    place = jax.device_put
    spread_x = place(x, NamedSharding(mesh, spec))
    replicated = place(scale, NamedSharding(mesh, P()))
    if masked:
        mask = place(mask, NamedSharding(mesh, P(*spec[:2])))
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(spread_x, replicated, mask).compile()
        got = compiled(spread_x, replicated, mask)
    spread.close(got, expected, 2e-4)
    text = compiled.as_text()
    assert calls(text, "moments") in (1, 2)  # XLA may see that they are the same.
    assert calls(text, "cotangents") == calls(text, "input_cotangent") == 1
    gathered = re.findall(r"(\w+\[[\d,]*\])\S* all-gather", text)
    assert not [g for g in gathered if g.count(",") == 2], gathered


@pytest.mark.parametrize("constrained", [False, True])
def test_arrays_that_nobody_placed_on_the_mesh_that_is_set(constrained):
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)

    def f(x):
        if constrained:
            x = jax.lax.with_sharding_constraint(x, P("data"))
        y, m = batch_norm(x, jnp.ones(4), jnp.zeros(4))
        return jnp.sum(jnp.sin(y)) + jnp.sum(m.var), m

    def loss(x):
        y, m = batch_norm(x, jnp.ones(4), jnp.zeros(4), implementation="xla")
        return jnp.sum(jnp.sin(y)) + jnp.sum(m.var)

    with jax.set_mesh(spread.mesh_of(8)):
        got, m = jax.jit(jax.grad(f, has_aux=True))(x)
    assert_close(m.var, x.var(0), rtol=1e-5)
    assert_close(got, jax.grad(loss)(x), rtol=1e-3, atol=1e-5)


def test_parts_that_are_not_even_are_not_padded():
    mesh = spread.mesh_of(8)
    x = numbers((16, 5), "float32")

    @jax.jit
    def f(x):
        rows = jax.lax.with_sharding_constraint(x[:13], NamedSharding(mesh, P("data")))
        return jaxbn.moments(rows, implementation="native")

    got = f(jax.device_put(x, NamedSharding(mesh, P("data"))))
    spread.close(got, jaxbn.moments(x[:13], implementation="xla"), 1e-5)


def test_where_some_axes_are_manual_xla_computes():
    mesh = spread.mesh_of(4, 2, names=("data", "other"))
    x = numbers((16, 6), "float32")
    f = jax.jit(
        jax.shard_map(
            lambda x: jaxbn.moments(x, axis_name="data").var,
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
            axis_names={"data"},
        )
    )
    assert_close(f(x), np.var(x, 0), rtol=1e-5, atol=1e-5)
    assert calls(f.lower(x).as_text()) == 0
    demanding = jax.shard_map(
        lambda x: jaxbn.moments(x, axis_name="data", implementation="native").var,
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
        axis_names={"data"},
    )
    with pytest.raises(ValueError, match="axes of the mesh are of different kinds"):
        jax.jit(demanding)(x)


def lowered(f, x, *platforms):
    return jax.jit(f).trace(x).lower(lowering_platforms=platforms).as_text()


def test_programs_for_other_platforms_have_no_kernels():
    x, v = numbers((8, 4), "float32"), jnp.ones(4)

    def grad(implementation):
        f = partial(batch_norm, implementation=implementation)
        return jax.grad(lambda x: jnp.sum(f(x, v, v)[0] ** 3))

    assert calls(lowered(grad(None), x, "cpu")) == 3
    assert calls(lowered(grad(None), x, "cuda")) == 0
    assert calls(lowered(grad("xla"), x, "cpu")) == 0
    with pytest.raises(NotImplementedError, match=r"another platform \(cuda\)"):
        lowered(grad("native"), x, "cuda")
    both = lowered(grad(None), x, "cpu", "cuda")  # Chosen when it is run.
    assert calls(both) == 3
    assert "case" in both


@pytest.mark.parametrize(
    ("implementation", "kernels"), [("xla", []), (None, ["moments", "cotangents"])]
)
def test_export(implementation, kernels):
    """As docs/performance.md tells it."""
    x = numbers((8, 4), "float32")
    f = partial(batch_norm, implementation=implementation)
    allow = export.DisabledSafetyCheck.custom_call
    exported = export.export(
        jax.jit(lambda x: f(x, None, None)[0]),
        disabled_checks=[allow(f"jaxbn_{name}") for name in kernels],
    )(x)
    assert_close(exported.call(x), f(x, None, None)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("near", [True, False])
def test_over_devices_the_mean_takes_an_all_reduce_of_its_own(near):
    x, v = numbers((16, 3), "float32"), jnp.ones(3)

    def step(x, v):
        f = partial(jaxbn.batch_norm, axis_name="data", shift=v if near else None)
        y, vjp, m = jax.vjp(f, x, v, v, has_aux=True)
        return y, m, vjp(y)

    specs = {
        "in_specs": (P("data"), P()),
        "out_specs": (P("data"), P(), (P("data"), P(), P())),
    }
    spread_step = jax.shard_map(step, mesh=spread.mesh_of(8), **specs)
    lowered = jax.jit(spread_step).lower(x, v).as_text()
    assert lowered.count("stablehlo.all_reduce") == 3


def test_longer_axes_than_a_partitioner_takes_are_left_to_xla():
    x = jax.ShapeDtypeStruct((2**31, 2), jnp.float32)
    jax.eval_shape(jaxbn.moments, x)
    with pytest.raises(ValueError, match="an axis is longer than"):
        jax.eval_shape(partial(jaxbn.moments, implementation="native"), x)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones((4, 3), np.float16), {}, "there is an array of float16"),
        (np.ones((4, 3, 2), np.float32), {"feature_axes": (0, 2)}, "not next to each"),
        (
            np.ones((4, 3), np.float32),
            {"weights": np.ones((4, 3))},
            "the weights vary along the features",
        ),
    ],
)
def test_what_the_kernels_do_not_know(x, options, message):
    with pytest.raises(
        ValueError, match=rf"`implementation` is 'native', but.*{message}"
    ):
        jaxbn.moments(x, implementation="native", **options)
    got = jaxbn.moments(x, **options)
    spread.close(got, jaxbn.moments(x, implementation="xla", **options))


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_vectors_per_example_are_left_to_xla(name):
    x, vectors = numbers((4, 3), "float32"), {name: np.ones((4, 3), np.float32)}
    message = rf"'native', but `{name}` of shape \(4, 3\) has a vector per example"
    with pytest.raises(ValueError, match=message):
        jaxbn.batch_norm(x, **vectors, implementation="native")
    got, _ = jaxbn.batch_norm(x, **vectors)
    spread.close(got, jaxbn.batch_norm(x, **vectors, implementation="xla")[0], 1e-5)
    # A layer demands the sums alone.
    layer = jaxbn.layers.conditional(num_classes=2, implementation="native")
    params, state = layer.init(3)
    f = lambda x: layer.apply(
        params, state, x, training=True, condition=np.ones(4, int)
    )
    assert calls(jax.jit(f).lower(x).as_text()) == 1


def test_output_of_another_dtype_is_left_to_xla():
    x = numbers((8, 3), "float32")
    with pytest.raises(ValueError, match="there is an array of float16"):
        jaxbn.batch_norm(x, dtype=jnp.float16, implementation="native")
    jax.grad(lambda x: jaxbn.batch_norm(x, dtype=jnp.float16)[0].sum())(x)


@pytest.mark.parametrize("kind", ["linen", "nnx", "standard"])
@pytest.mark.parametrize(
    ("implementation", "used"), [(None, 3), ("native", 3), ("xla", 0)]
)
def test_layers_and_modules(kind, implementation, used):
    x, option = numbers((8, 3), "float32"), {"implementation": implementation}

    def loss(x):
        if kind == "linen":
            layer = jaxbn.linen.BatchNorm(use_running_average=False, **option)
            return jnp.sum(layer.init_with_output(jax.random.key(0), x)[0] ** 3)
        if kind == "nnx":
            return jnp.sum(jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **option)(x) ** 3)
        layer = jaxbn.layers.standard(**option)
        y, _ = layer.apply(*layer.init(3), x, training=True)
        return jnp.sum(y**3)

    assert calls(jax.jit(jax.grad(loss)).lower(x).as_text()) == used


def test_without_jit():
    x, scale = numbers((16, 6), "float32"), numbers((6,), "float32", 1)

    def step(x, scale):
        y, vjp, _ = jax.vjp(jaxbn.batch_norm, x, scale, scale, has_aux=True)
        return y, vjp(jnp.sin(y))

    with jax.disable_jit():
        spread.close(step(x, scale), jax.jit(step)(x, scale), 1e-5)


def test_without_jit_what_is_demanded_is_used():
    with jax.disable_jit():
        var = jaxbn.moments(far(), shift=FAR, implementation="native").var
    assert_close(var, exact_var(far()), rtol=1e-6)


def test_nan_is_found_where_jax_looks_for_it():
    x, scale = numbers((16, 6), "float32").at[3, 2].set(jnp.nan), jnp.ones(6)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="invalid value"):
        jaxbn.batch_norm(x, scale, scale)


def test_vectors_of_no_mesh_beside_x_of_an_explicit_one():
    x, scale = numbers((16, 8), "float32"), np.linspace(1, 2, 8, dtype="float32")

    def step(x, scale):
        y, vjp, m = jax.vjp(jaxbn.batch_norm, x, scale, scale, has_aux=True)
        return y, vjp(jnp.sin(y)), m

    mesh = jax.make_mesh((4,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for spec in (P("data"), P(None, "data")):
            spread_x = jax.device_put(x, NamedSharding(mesh, spec))
            got = jax.jit(step)(spread_x, scale)
            spread.close(got, jax.jit(step)(np.asarray(x), scale), 1e-4)


def test_kernels_that_cannot_be_loaded_leave_it_to_xla(monkeypatch):
    def fail(name):
        raise OSError("no such symbol")

    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    kernels._missing.cache_clear()
    try:
        x = numbers((5, 3), "float32")
        with pytest.warns(UserWarning, match="cannot be loaded: no such symbol"):
            assert_close(jaxbn.moments(x).var, np.var(x, 0), rtol=1e-5, atol=0)
        with pytest.raises(ValueError, match="no such symbol"):
            jaxbn.moments(x, implementation="native")
    finally:
        kernels._missing.cache_clear()


@pytest.mark.parametrize(("found", "remedy"), [(0, "jaxbn-cpu"), (99, "jaxbn")])
def test_kernels_of_another_version_leave_it_to_xla(monkeypatch, found, remedy):
    monkeypatch.setattr(jaxbn_cpu, "INTERFACE", found)
    kernels._missing.cache_clear()
    try:
        x = numbers((5, 3), "float32")
        message = rf"jaxbn-cpu .*interface {found}, expected .* Update {remedy}\."
        with pytest.warns(UserWarning, match=message):
            assert_close(jaxbn.moments(x).var, np.var(x, 0), rtol=1e-5, atol=0)
        with pytest.raises(ValueError, match=rf"Update {remedy}\."):
            jaxbn.moments(x, implementation="native")  # Not warned of again.
    finally:
        kernels._missing.cache_clear()
