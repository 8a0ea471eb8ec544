"""Layers at random on meshes at random: as on one device, and of the types they had."""

import math
import re
from functools import partial

import jax
import numpy as np
import pytest
from data import assert_close, numbers
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import ANY, KINDS, Case, compare, compiled, draw
from spread import mesh_of

import jaxbn

pytestmark = pytest.mark.usefixtures("x64")

QUICK, ALL = 2 * len(ANY), 40 * len(ANY)
FULL = {"weights": "full", "vectors_placed": False}
# The smallest that once failed, or that are of the same kind.
FOUND = {
    "unbiased, counts and features split, state not": Case(
        "standard", {"unbiased": True}, **FULL
    ),
    "the same of groups": Case("ghost", {"group_size": 2, "unbiased": True}, **FULL),
    "groups of features that are split, state not": Case(
        "ghost", {"group_size": 2}, vectors_placed=False
    ),
    "a batch of one on a mesh axis of one": Case(
        "standard", shape=(1, 4), weights="full", mesh=(1, 8), spec=("a", "")
    ),
    "the same in place": Case(
        "in_place", shape=(1, 4), weights="full", mesh=(1, 8), spec=("a", "")
    ),
    "nothing reduced, state not split": Case(
        "standard", shape=(8, 4), feature_axes=(0, 1), **FULL
    ),
    "nothing reduced, two passes": Case(
        "streaming", shape=(8, 4), feature_axes=(0, 1), **FULL
    ),
    "state stays whole where features are split": Case(
        "embedding", {"use_fast_variance": False}, vectors_placed=False
    ),
    "weights on all devices, of a vector that is split": Case(
        "renorm",
        shape=(8,),
        feature_axes=(0,),
        weights="full",
        weights_placed=False,
        spec=("ab",),
    ),
    "features explicit beside a manual batch": Case("standard", manual="a"),
    "features automatic beside a manual batch": Case(
        "standard", {"use_fast_variance": False}, kinds="AA", manual="a"
    ),
    "groups of devices beside explicit features": Case(
        "ghost", {"num_groups": 2, "update_per_group": True}, manual="a"
    ),
    "groups in a shard_map over one device": Case(
        "ghost", {"group_size": 2}, mesh=(1,), kinds="E", spec=("a", ""), manual="a"
    ),
    "their steps in turn": Case(
        "ghost",
        {"group_size": 2, "update_per_group": True},
        mesh=(1,),
        kinds="A",
        spec=("a", ""),
        manual="a",
    ),
    "a table read by rows that are explicit beside manual features": Case(
        "domain", manual="b"
    ),
    "a table of explicit features beside a manual batch": Case("classes", manual="a"),
    "one step for all features, split by a shard_map": Case(
        "standard",
        shape=(4, 8),
        weights="feature",
        mesh=(8,),
        kinds="A",
        spec=("", "a"),
        manual="a",
    ),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=list(FOUND))
def test_cases_that_failed(case):
    compare(case)


@pytest.mark.parametrize(
    "seed",
    [pytest.param(s, marks=[pytest.mark.slow] * (s >= QUICK)) for s in range(ALL)],
)
def test_is_as_on_one_device(seed):
    compare(draw(seed))


def on_mesh(kinds="EE"):
    """Devices by 4 and 2, and what puts arrays on them."""
    types = tuple(KINDS[kind] for kind in kinds)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=types)
    return mesh, lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))


BIG = {"shape": (16, 32, 8), "feature_axes": (2,), "spec": ("a", "", "b")}
SENT = {
    "explicit": Case("standard", **BIG),
    "whole vectors": Case("standard", {"unbiased": True}, **FULL, **BIG),
    "whole weights": Case("standard", weights="full", weights_placed=False, **BIG),
    "groups": Case("ghost", {"group_size": 4}, **FULL, **BIG),
    "in place": Case("in_place", **FULL, **BIG),
    # (Beside explicit axes JAX 0.10 gathers all that enters or leaves a shard_map.)
    "manual beside automatic": Case("standard", manual="a", kinds="EA", **BIG),
}


@pytest.mark.optimized
@pytest.mark.parametrize("case", SENT.values(), ids=list(SENT))
def test_nothing_of_the_size_of_x_is_sent(case):
    """Not even a part of what one device has; what is sent are feature vectors."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    sent = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", compiled(case))
    shapes = re.findall(r"\w+\[([\d,]+)\]", " ".join(sent))
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert sizes
    assert max(sizes) <= 64  # Of 8 features; a device has 512 numbers.


@pytest.mark.parametrize("kinds", ["EE", "AE"])
def test_statistics_of_split_features_pass_through_a_scan(kinds):
    """The state is whole on all devices, and stays so: a carry keeps its type."""
    mesh, put = on_mesh(kinds)
    layer = jaxbn.layers.standard()
    params, state = layer.init(4)
    x = numbers((3, 8, 4), "float32")

    def train(params, state, x):
        step = lambda s, x: layer.apply(params, s, x, training=True)[::-1]
        return lax.scan(step, state, x)

    with jax.set_mesh(mesh):
        whole = jax.tree.map(put, (params, state))
        got, y = jax.jit(train)(*whole, put(x, None, "a", "b"))
    expected = train(params, state, x)
    close = partial(assert_close, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (got, y), expected)


@pytest.mark.parametrize(
    ("weights", "devices", "check_vma"),
    [
        (weights, devices, check_vma)
        for weights in ("mask", "per feature")
        for devices in (4, 8)
        for check_vma in (True, False)
        # Unchecked, nothing tells a mask from one weight for the one feature.
        if (weights, devices, check_vma) != ("mask", 8, False)
    ],
)
def test_count_has_the_weights_axes_where_features_are_split(
    weights, devices, check_vma
):
    """Of eight features, each device has one or two."""
    of_each = weights == "per feature"
    x = numbers((6, 8), "float64")
    shape = (6, 8) if of_each else (6, 1)
    w = np.random.default_rng(0).integers(0, 2, shape).astype(bool)
    columns, vector = P(None, "data"), P("data")
    moments = lambda x, w: jaxbn.moments(x, weights=w)
    f = jax.shard_map(
        moments,
        mesh=mesh_of(devices),
        in_specs=(columns, columns if of_each else P()),
        out_specs=jaxbn.Moments(vector, vector, vector if of_each else P()),
        check_vma=check_vma,
    )
    got, expected = jax.jit(f)(x, w), jax.jit(moments)(x, w)
    assert got.count.shape == expected.count.shape == ((8,) if of_each else ())
    jax.tree.map(partial(assert_close, rtol=1e-12, atol=1e-12), got, expected)


def test_a_window_of_split_features_keeps_its_type():
    x = numbers((3, 8, 4), "float32")
    net = jaxbn.linen.BatchNorm(False, accumulate=True)
    variables = net.init(jax.random.key(0), x[0])

    def train(variables, x):
        step = lambda v, x: (v | net.apply(v, x, mutable=list(v))[1], None)
        return lax.scan(step, variables, x)[0]

    expected = train(variables, x)
    mesh, put = on_mesh()
    with jax.set_mesh(mesh):
        whole = jax.tree.map(put, variables)
        got = jax.jit(train)(whole, put(x, None, "a", "b"))
    jax.tree.map(partial(assert_close, rtol=1e-5, atol=1e-5), got, expected)


def test_population_of_batches_that_are_spread_in_several_ways():
    x = numbers((2, 8, 4), "float32")
    stats, placed = jaxbn.init_stats(4), [("a", "b"), ("a",)]

    def drift(batches):
        pooled = jaxbn.population.collect(jaxbn.moments, batches)
        return pooled, jaxbn.population.drift(stats, pooled)

    expected = drift(list(x))
    mesh, put = on_mesh()
    with jax.set_mesh(mesh):
        batches = [put(batch, *spec) for batch, spec in zip(x, placed, strict=True)]
        got = drift(batches)
    jax.tree.map(partial(assert_close, rtol=1e-5, atol=1e-5), got, expected)
