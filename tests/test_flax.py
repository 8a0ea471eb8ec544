"""The Flax modules are Flax's own, to rounding: fields, variables, numbers, errors."""

import dataclasses
import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allpairspy import AllPairs
from data import assert_close, half_slow, numbers, tolerance, wide
from flax import nnx

import jaxbn

LOW = ("float32", "bfloat16", "float16")
COMMON = {
    "x": LOW,
    "dtype": (None, *LOW),
    "param_dtype": ("float32", "bfloat16"),
    "use_fast_variance": (True, False),
    "masked": (True, False),
    "use_scale": (True, False),
    "use_bias": (True, False),
    "momentum": (0.9, 0.99),
}


def as_bfloat16(args, *, dtype):
    """A `promote_dtype` of a user's own."""
    return tuple(None if a is None else a.astype(jnp.bfloat16) for a in args)


def table(**more):
    values = COMMON | more
    rows = AllPairs(list(values.values()))
    return [dict(zip(values, row, strict=True)) for row in rows]


LINEN = table(axis=(-1, 1, (-1, 1)), force_float32_reductions=(True, False))
NNX = table(axis=(-1, 1), promote_dtype=("flax", "own"))


def case(row):
    options = dict(row)
    x = numbers((8, 5, 4), options.pop("x"))
    mask = np.arange(8)[:, None, None] % 3 > 0 if options.pop("masked") else None
    return x, mask, options


def coarsest(*dtypes):
    return max(map(jnp.dtype, dtypes), key=tolerance)


def assert_same(got, expected, dtype, slack=1):
    """Equal in structure, shapes and dtypes, and in value as `dtype` allows."""
    tol = slack * max(2e-5, tolerance(dtype))
    described = [jax.tree.map(lambda a: (a.shape, a.dtype), t) for t in (got, expected)]
    assert described[0] == described[1]
    jax.tree.map(lambda a, b: assert_close(wide(a), wide(b), tol, tol), got, expected)


def assert_equal(got, expected):
    """Equal to the last bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert_same(got, expected, "float32")


def name_of(row):
    return "-".join(map(str, row.values()))


def loss(y):
    return jnp.sum(jnp.sin(y.astype(jnp.float32)))


@pytest.mark.parametrize("row", half_slow([row] for row in LINEN), ids=name_of)
def test_linen(row):
    x, mask, options = case(row)
    options["scale_init"] = options["bias_init"] = nn.initializers.normal(1.0)
    ours, theirs = jaxbn.linen.BatchNorm(**options), nn.BatchNorm(**options)
    assert isinstance(ours, nn.BatchNorm)
    made = [m.init_with_output(jax.random.key(3), x, False) for m in (ours, theirs)]
    assert_equal(made[0][1], made[1][1])
    variables = made[1][1]

    def train(module):
        def f(params, x):
            given = {**variables, "params": params}
            y, new = module.apply(given, x, False, mask=mask, mutable=["batch_stats"])
            return loss(y), (y, new["batch_stats"])

        params = variables.get("params", {})
        return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(params, x)

    reduced = "float32" if options["force_float32_reductions"] else x.dtype
    param_dtype = jnp.dtype(options["param_dtype"])
    ((_, (y, stats)), grads), ((_, (y_flax, stats_flax)), grads_flax) = map(
        train, (ours, theirs)
    )
    assert_same(y, y_flax, coarsest(y.dtype, reduced))
    # Where Flax sums in a narrow dtype, it is as rough as that.
    slack = 1 if reduced == "float32" else 5
    low = coarsest(x.dtype, y.dtype, param_dtype)
    assert_same(grads, grads_flax, low, slack)
    kept = jax.tree.map(lambda a, b: a.astype(b.dtype), stats_flax, stats)
    assert_same(stats, kept, coarsest(reduced, stats["mean"].dtype), slack)
    dtypes = [jax.tree.map(lambda a: a.dtype, v) for v in (stats, variables)]
    assert dtypes[0] == dtypes[1]["batch_stats"]

    variables = {**variables, "batch_stats": stats}
    y, y_flax = (
        jax.jit(partial(m.apply, use_running_average=True))(variables, x)
        for m in (ours, theirs)
    )
    assert_same(y, y_flax, y.dtype)


@pytest.mark.parametrize("row", half_slow([row] for row in NNX), ids=name_of)
def test_nnx(row):
    x, mask, options = case(row)
    options["scale_init"] = options["bias_init"] = nn.initializers.normal(1.0)
    promote = options.pop("promote_dtype")
    if promote == "own":
        options["promote_dtype"] = as_bfloat16
    ours, theirs = (
        cls(x.shape[options["axis"]], rngs=nnx.Rngs(3), **options)
        for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm)
    )
    assert isinstance(ours, nnx.BatchNorm)
    assert_equal(*(nnx.to_pure_dict(nnx.state(m)) for m in (ours, theirs)))

    def train(module):
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def f(params, x):
            module = nnx.merge(graph, params, rest, copy=True)
            y = module(x, mask=mask)
            stats = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
            return loss(y), (y, stats)

        (_, out), (dparams, dx) = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(
            params, x
        )
        return *out, (nnx.to_pure_dict(dparams), dx)

    (y, stats, grads), (y_flax, stats_flax, grads_flax) = map(train, (ours, theirs))
    low = coarsest(x.dtype, y.dtype, jnp.bfloat16 if promote == "own" else x.dtype)
    assert_same(y, y_flax, low)
    assert_same(grads, grads_flax, coarsest(low, options["param_dtype"]))
    # Flax rounds x to `dtype` before it takes the statistics, and so does this.
    assert_same(stats, stats_flax, "float32")

    for m in (ours, theirs):
        m.eval()
    y, y_flax = ours(x), theirs(x)
    assert y.dtype == y_flax.dtype
    if options["dtype"] in (None, "float32") and promote == "flax":
        assert_same(y, y_flax, y.dtype)  # Otherwise Flax rounds the statistics.


def test_linen_fields_and_arguments():
    def fields(cls):
        return [(f.name, f.default) for f in dataclasses.fields(cls)]

    def arguments(cls):
        parameters = inspect.signature(cls.__call__).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    theirs = fields(nn.BatchNorm)
    own = [
        ("unbiased", False),
        ("derivatives", "vjp"),
        ("implementation", None),
        ("example_weight", 0.0),
        ("pseudo_samples", None),
        ("accumulate", False),
        ("skip_nonfinite", False),
    ]
    # parent and name stand last in every linen module.
    assert fields(jaxbn.linen.BatchNorm) == [*theirs[:-2], *own, *theirs[-2:]]
    assert arguments(jaxbn.linen.BatchNorm) == arguments(nn.BatchNorm)


def test_nnx_arguments():
    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    ours = arguments(jaxbn.nnx.BatchNorm.__init__)
    own = ["unbiased", "derivatives", "implementation", "example_weight"]
    own += ["pseudo_samples", "accumulate", "skip_nonfinite"]
    assert [n for n, *_ in ours[-7:]] == own
    assert ours[:-7] == arguments(nnx.BatchNorm.__init__)
    calls = [arguments(c.__call__) for c in (jaxbn.nnx.BatchNorm, nnx.BatchNorm)]
    assert calls[0] == calls[1]


def test_linen_metadata():
    init = nn.with_partitioning(nn.initializers.ones, ("features",))
    x = jnp.ones((4, 3))
    specs = [
        nn.get_partition_spec(cls(False, scale_init=init).init(jax.random.key(0), x))
        for cls in (jaxbn.linen.BatchNorm, nn.BatchNorm)
    ]
    assert specs[0] == specs[1]
    assert specs[0]["params"]["scale"] == jax.P("features")


def test_nnx_metadata():
    metadata = {"scale_metadata": {"tag": "γ"}, "bias_metadata": {"tag": "β"}}
    ours, theirs = (
        cls(3, rngs=nnx.Rngs(0), **metadata)
        for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm)
    )
    for name in ("scale", "bias", "mean", "var"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert type(a) is type(b)
        assert a.get_metadata() == b.get_metadata()
    assert ours.scale.tag == "γ"


@pytest.mark.parametrize(
    "axis",
    [(-1, 2), (1, -2, 1), range(1, 3), np.array([1, 2]), {2, 1}],
    ids=["twice", "thrice", "range", "array", "set"],
)
def test_an_axis_however_named(axis):
    x = numbers((4, 5, 3), "float32")
    ours, theirs = (c(False, axis=axis) for c in (jaxbn.linen.BatchNorm, nn.BatchNorm))
    made = [m.init_with_output(jax.random.key(0), x) for m in (ours, theirs)]
    assert_same(*made, "float32")


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_integers_come_in(dtype, param_dtype):
    x = (np.arange(12).reshape(4, 3) % 5).astype(dtype)
    ours, theirs = (
        cls(False, param_dtype=param_dtype)
        for cls in (jaxbn.linen.BatchNorm, nn.BatchNorm)
    )
    made = [m.init_with_output(jax.random.key(0), x) for m in (ours, theirs)]
    assert_same(*made, made[0][0].dtype)
    ours, theirs = (
        cls(3, param_dtype=param_dtype, rngs=nnx.Rngs(0))(x)
        for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm)
    )
    assert_same(ours, theirs, ours.dtype)


def test_nnx_parameters_may_go_after_construction():
    x = numbers((6, 3), "float32")
    outs = []
    for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm):
        module = cls(3, rngs=nnx.Rngs(0))
        module.scale = nnx.data(None)
        wider = cls(5, rngs=nnx.Rngs(0))
        for name in ("mean", "var", "scale", "bias"):
            variable = getattr(wider, name)
            variable.set_value(variable[...][:3])
        outs.append((module(x), wider(x)))
    assert_same(*outs, "float32")


def test_groups_of_no_axis_are_ignored():
    x = numbers((6, 3), "float32")
    groups = [[0], [1]]
    outs = [
        (
            c(False, axis_index_groups=groups).init_with_output(jax.random.key(0), x),
            d(3, axis_index_groups=groups, rngs=nnx.Rngs(0))(x),
        )
        for c, d in (
            (jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm),
            (nn.BatchNorm, nnx.BatchNorm),
        )
    ]
    assert_same(*outs, "float32")


@pytest.mark.parametrize("where", ["constructor", "call"])
@pytest.mark.parametrize("inference", [True, False])
def test_linen_use_running_average(where, inference):
    x = numbers((4, 3), "float32")
    args = ((inference,), ()) if where == "constructor" else ((), (inference,))
    results = []
    for cls in (jaxbn.linen.BatchNorm, nn.BatchNorm):
        module = cls(*args[0])
        variables = module.init(jax.random.key(0), x, *args[1])
        results.append(module.apply(variables, x, *args[1], mutable=["batch_stats"]))
    assert_same(*results, "float32")


@pytest.mark.parametrize("cls", [jaxbn.linen.BatchNorm, nn.BatchNorm])
def test_linen_use_running_average_once_and_only_once(cls):
    x = jnp.ones((4, 3))
    for args, call in [((), ()), ((True,), (True,)), ((True,), (False,))]:
        with pytest.raises(ValueError, match="use_running_average"):
            cls(*args).init(jax.random.key(0), x, *call)
    variables = cls(False).init(jax.random.key(0), x)
    with pytest.raises(nn.module.errors.ModifyScopeVariableError):
        cls(False).apply(variables, x)


@pytest.mark.parametrize("cls", [jaxbn.nnx.BatchNorm, nnx.BatchNorm])
def test_nnx_use_running_average(cls):
    x = numbers((4, 3), "float32")
    updates = lambda m, *args: (m(x, *args), m.mean[...].any())[1]
    make = lambda **options: cls(3, rngs=nnx.Rngs(0), **options)
    assert updates(make())
    assert not updates(make(use_running_average=True))
    assert updates(make(use_running_average=True), False)  # The call goes first.
    assert not updates(make(), True)
    module = make()
    module.eval()
    assert not updates(module)
    module.train()
    assert not updates(nnx.view(module, use_running_average=True))
    assert updates(module)
    with pytest.raises(ValueError, match=r"use_running_average.*constructor"):
        make(use_running_average=None)(x)


@pytest.mark.parametrize("cls", [jaxbn.linen.BatchNorm, nn.BatchNorm])
def test_nothing_is_updated_and_nothing_sent_while_initializing(cls):
    x = numbers((5, 3), "float32")
    layer = cls(False, axis_name="not_there")
    for init in (layer.init, jax.jit(layer.init)):
        variables = init(jax.random.key(0), x)
        np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
        np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
