"""Micro-batches: several together take one step of the running statistics."""

from functools import partial

import family
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from data import assert_close, numbers, squeeze
from flax import nnx
from jax.sharding import PartitionSpec as P
from spread import mesh_of
from test_family_flax import EMBEDDINGS, FAMILY, IDS, plain

import jaxbn

BOTH = ["batch_stats", "batch_moments"]
X = numbers((8, 5, 3), "float32", mean=3.0)
# The second part is uneven under the mask, the third has nothing.
PARTS = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
MASK = (np.arange(8) != 3).reshape(8, 1, 1) & (np.arange(8) // 2 != 2).reshape(8, 1, 1)
NORMS = dict(FAMILY)
NORMS["ghost"] = ("GhostBatchNorm", jaxbn.layers.ghost, {"group_size": 2}, {})
every = pytest.mark.parametrize("name", NORMS)


def given(name, rows):
    """What a call needs besides x, of some rows."""
    return {k: v[rows] for k, v in NORMS[name][3].items()}


def truth(x, mask=None, momentum=0.9):
    """Running statistics after one step from 0 and 1, in float64."""
    m = oracle.moments(x, (0, 1), mask)
    mean, var = (squeeze(v, (0, 1)) for v in (m.mean, m.var))
    return (1 - momentum) * mean, momentum + (1 - momentum) * var


@pytest.mark.parametrize("name", family.CASES)
def test_apply_is_forward_and_update(x64, name):
    case = family.CASES[name]
    layer, params, state = family.started(case)
    layer = family.compiled(layer)
    x, more = numbers((8, 4, 3), "float64"), family.inputs(case)
    w = jnp.asarray(np.arange(8) != 3).reshape(8, 1, 1)
    for training in (True, False):
        call = {"training": training, "weights": w, **more}
        y, new = layer.apply(params, state, x, **call)
        again, m = layer.forward(params, state, x, **call)
        assert_close(again, y, rtol=1e-12)
        moved = layer.update(state, m)
        if training:
            jax.tree.map(partial(assert_close, rtol=1e-12), tuple(moved), tuple(new))
        else:  # What it would be moved by in training.
            _, m_training = layer.forward(params, state, x, **call | {"training": True})
            m, m_training = jax.tree.map(np.asarray, (m, m_training))
            seen = m.count > 0  # Where nothing was, a mean may be anything.
            assert_close(m.count, m_training.count)
            assert_close(m.mean[seen], m_training.mean[seen], rtol=1e-12)
            assert_close(m.var[seen], m_training.var[seen], rtol=1e-12)


@pytest.mark.parametrize("name", family.CASES)
def test_parts_move_the_state_as_the_whole_does(x64, name):
    case = family.CASES[name]
    layer, params, state = family.started(case)
    layer = family.compiled(layer)
    x, more = numbers((8, 4, 3), "float64", mean=50.0), family.inputs(case)
    _, m = layer.forward(params, state, x, training=True, **more)
    expected = layer.update(state, m)
    parts = []
    for rows in PARTS:
        own = {k: v[rows] for k, v in more.items()}
        parts.append(layer.forward(params, state, x[rows], training=True, **own)[1])
    stacked = jax.tree.map(lambda *a: np.stack(a), *parts)
    got = layer.update(state, jax.jit(jaxbn.merge_moments)(stacked))
    jax.tree.map(partial(assert_close, rtol=1e-12), tuple(got), tuple(expected))


def test_a_merged_count_may_have_the_first_axes_of_the_features(x64):
    """Such as one per domain, and not one per feature."""
    rng = np.random.default_rng(0)
    mean, var = rng.normal(size=(4, 2, 3)), rng.uniform(1, 2, (4, 2, 3))
    count = rng.integers(0, 3, (4, 2)).astype(float)
    got = jaxbn.merge_moments(jaxbn.Moments(*map(jnp.asarray, (mean, var, count))))
    assert got.count.shape == (2,)
    for k in range(2):
        own = jaxbn.Moments(mean[:, k], var[:, k], count[:, k])
        expected = jaxbn.merge_moments(jax.tree.map(jnp.asarray, own))
        for a, b in zip(got, expected, strict=True):
            assert_close(a[k], b, rtol=1e-14)


class Linen:
    """A module with variables, called as nnx modules are."""

    def __init__(self, name, **options):
        cls, _, own, _ = NORMS[name]
        options = {"momentum": 0.9, **own, **options}
        self.module = getattr(jaxbn.linen, cls)(False, **options)
        more = given(name, slice(None))
        self.variables = jax.jit(self.module.init)(jax.random.key(0), X, **more)
        mutable = [c for c in BOTH if c in self.variables]
        self.train = jax.jit(partial(self.module.apply, mutable=mutable))

    def __call__(self, x, training=True, **more):
        if not training:
            inference = self.module.clone(use_running_average=True)
            return jax.jit(inference.apply)(self.variables, x, **more)
        y, new = self.train(self.variables, x, **more)
        same = jax.tree.map(lambda a: (a.shape, a.dtype), self.variables)
        self.variables = {**self.variables, **new}
        assert jax.tree.map(lambda a: (a.shape, a.dtype), self.variables) == same
        return y

    def end(self):
        self.variables = jaxbn.linen.end_accumulation(self.variables)

    def stats(self):
        return self.variables["batch_stats"]

    def load(self, stats):
        self.variables = jaxbn.linen.load_stats(self.variables, {"": stats})


@partial(nnx.jit, static_argnums=2)
def _called(module, x, use_running_average, **more):
    return module(x, use_running_average, **more)


class NNX:
    """The same of an nnx module."""

    def __init__(self, name, **options):
        cls, _, own, _ = NORMS[name]
        options = {"momentum": 0.9, **own, **options}
        self.module = getattr(jaxbn.nnx, cls)(3, rngs=nnx.Rngs(0), **options)

    def __call__(self, x, training=True, **more):
        return _called(self.module, x, not training, **more)

    def end(self):
        jaxbn.nnx.end_accumulation(self.module)

    def stats(self):
        state = nnx.state(self.module, nnx.BatchStat)
        return {
            k: v for k, v in nnx.to_pure_dict(state).items() if k != "batch_moments"
        }

    def load(self, stats):
        jaxbn.nnx.load_stats(self.module, {"": stats})


both = pytest.mark.parametrize("make", [Linen, NNX])


@both
@every
def test_micro_batches_are_one_step_of_the_pooled_batch(make, name):
    """Twice, with a mask that leaves one micro-batch empty."""
    parts, whole = make(name, accumulate=True), make(name)
    if name == "ghost":  # Its groups are the micro-batches here.
        whole = make(name, group_size=2)
    for x in (X, 2 * X + 1):
        for rows in PARTS:
            parts(x[rows], mask=MASK[rows], **given(name, rows))
        parts.end()
        whole(x, mask=MASK, **given(name, slice(None)))
        for key, value in plain(whole.stats()).items():
            got = plain(parts.stats())[key]
            assert_close(got, value, rtol=2e-6, err_msg=key)


@both
def test_every_micro_batch_writes_the_step_so_far(make):
    layer = make("standard", accumulate=True)
    for stop in (2, 4, 6, 8):
        layer(X[stop - 2 : stop])
        mean, var = truth(X[:stop])
        stats = plain(layer.stats())
        assert_close(stats["mean"], mean, rtol=2e-6)
        assert_close(stats["var"], var, rtol=2e-6)


@both
def test_against_float64_with_a_large_mean(make):
    x = numbers((8, 40, 3), "float32", mean=1e4, std=1.0)
    layer = make("standard", accumulate=True, use_fast_variance=False)
    for rows in PARTS:
        layer(x[rows])
    mean, var = truth(x)
    stats = plain(layer.stats())
    assert_close(stats["mean"], mean, rtol=1e-6)
    assert_close(stats["var"], var, rtol=1e-5)


@both
def test_statistics_that_were_loaded_are_the_start(make):
    """And the window that was open is closed."""
    layer = make("standard", accumulate=True, momentum=0.5)
    layer(X[:4])
    zeros = jnp.zeros(3)
    layer.load(jaxbn.RunningStats(zeros + 8, zeros + 2, jnp.int32(0)))
    layer(X[4:])
    m = oracle.moments(X[4:], (0, 1))
    stats = plain(layer.stats())
    assert_close(stats["mean"], (8 + squeeze(m.mean, (0, 1))) / 2, rtol=3e-6)
    assert_close(stats["var"], (2 + squeeze(m.var, (0, 1))) / 2, rtol=3e-6)


@both
def test_inference_within_a_window_leaves_it(make):
    layer, undisturbed = (make("standard", accumulate=True) for _ in range(2))
    for rows in PARTS:
        layer(X[rows])
        layer(100 * X, training=False)
        undisturbed(X[rows])
    jax.tree.map(assert_close, layer.stats(), undisturbed.stats())


@both
def test_a_schedule_counts_windows(make):
    layer = make("standard", accumulate=True, momentum=jaxbn.cumulative())
    for window, x in enumerate((X, X + 2), 1):
        for rows in PARTS:
            layer(x[rows])
            assert plain(layer.stats())["step"] == window
        layer.end()
    assert_close(plain(layer.stats())["mean"], np.mean(X, (0, 1)) + 1, rtol=1e-6)


class Net(nn.Module):
    remat: bool = False
    accumulate: bool = True

    @nn.compact
    def __call__(self, x, training):
        x = nn.Dense(4)(x)
        norm = nn.remat(jaxbn.linen.BatchNorm) if self.remat else jaxbn.linen.BatchNorm
        x = norm(
            use_running_average=not training,
            momentum=jaxbn.debiased(0.9),
            accumulate=self.accumulate,
            name="norm",
        )(x)
        return nn.Dense(1)(nn.relu(x))


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_micro_batches_with_multi_steps(remat):
    """Statistics move when `optax.MultiSteps` moves the parameters, and as far."""
    net, k = Net(remat), 4
    x = numbers((3 * k, 6, 5), "float32", mean=2.0)
    variables = net.init(jax.random.key(0), x[0], training=False)
    params, rest = variables["params"], {c: variables[c] for c in BOTH}
    optimizer = optax.MultiSteps(optax.sgd(0.1), k)

    def step(carry, x):
        params, rest, opt_state = carry

        def loss(params):
            variables = {"params": params, **rest}
            y, new = net.apply(variables, x, training=True, mutable=BOTH)
            return jnp.mean(jnp.square(y - 1)), new

        grads, rest = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        done = optimizer.has_updated(opt_state)
        rest = jax.lax.cond(done, jaxbn.linen.end_accumulation, lambda v: v, rest)
        return (optax.apply_updates(params, updates), rest, opt_state), params

    start = (params, rest, optimizer.init(params))
    (_, rest, _), seen = jax.jit(partial(jax.lax.scan, step))(start, x)

    # The statistics of three steps, each of one batch of 4 · 6 examples.
    plain_net = Net(accumulate=False)
    stats = {"batch_stats": variables["batch_stats"]}
    for window in range(3):
        params = jax.tree.map(lambda p, w=window: p[w * k], seen)
        batch = x[window * k : (window + 1) * k].reshape(-1, 5)
        _, stats = plain_net.apply(
            {"params": params, **stats}, batch, training=True, mutable=["batch_stats"]
        )
    jax.tree.map(
        partial(assert_close, rtol=1e-5),
        rest["batch_stats"],
        dict(stats)["batch_stats"],
    )
    counts = rest["batch_moments"]
    assert not any(np.any(v["count"]) for v in counts.values())


def test_multi_steps_in_nnx():
    class Model(nnx.Module):
        def __init__(self, accumulate):
            rngs = nnx.Rngs(0)
            self.dense = nnx.Linear(5, 4, rngs=rngs)
            self.norm = jaxbn.nnx.BatchNorm(4, accumulate=accumulate, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x)).sum(-1)

    x = numbers((4, 6, 5), "float32", mean=2.0)
    model, whole = Model(True), Model(False)
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(0.1), 4), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))))(model)
        optimizer.update(model, grads)

    before = jnp.array(model.dense.kernel[...])
    for micro_batch in x:
        assert_close(model.dense.kernel[...], before, rtol=0)
        step(model, optimizer, micro_batch)
    nnx.jit(jaxbn.nnx.end_accumulation)(model)
    assert np.any(model.dense.kernel[...] != before)
    whole(x.reshape(-1, 5))
    assert_close(model.norm.mean[...], whole.norm.mean[...], rtol=1e-5)
    assert_close(model.norm.var[...], whole.norm.var[...], rtol=1e-5)
    assert not np.any(model.norm.batch_moments["count"][...])


def test_over_devices():
    """Micro-batches that are spread over devices, one of which has no weight."""
    net = jaxbn.linen.BatchNorm(False, momentum=0.9, accumulate=True, axis_name="d")
    x = numbers((2, 16, 3), "float32", mean=3.0)
    mask = (np.arange(16) // 4 != 1).reshape(16, 1)
    variables = net.init(jax.random.key(0), x[0])

    def steps(variables, x, mask):
        for micro_batch in x:
            _, new = net.apply(variables, micro_batch, mask=mask, mutable=BOTH)
            variables = {**variables, **new}
        return variables["batch_stats"], variables["batch_moments"]["count"]

    spread = jax.shard_map(
        steps,
        mesh=mesh_of(4, names=("d",)),
        in_specs=(P(), P(None, "d"), P("d")),
        out_specs=P(),
    )
    stats, count = jax.jit(spread)(variables, x, mask)
    mean, var = truth(x, mask)
    assert_close(stats["mean"], mean, rtol=1e-6)
    assert_close(stats["var"], var, rtol=1e-6)
    assert_close(count, np.full(3, 24.0))


def test_calls_that_would_lose_the_window_are_errors():
    net = jaxbn.linen.BatchNorm(False, accumulate=True)
    variables = net.init(jax.random.key(0), X)
    lacking = {k: v for k, v in variables.items() if k != "batch_moments"}
    for given, mutable in [
        (variables, ["batch_stats"]),
        (variables, ["batch_moments"]),
        (lacking, BOTH),
        (lacking, ["batch_stats"]),
    ]:
        with pytest.raises(ValueError, match="needs the collection `batch_moments`"):
            net.apply(given, X, mutable=mutable)


def test_no_window_to_close_is_an_error():
    variables = jaxbn.linen.BatchNorm(False).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="`accumulate=True`, keep the collection"):
        jaxbn.linen.end_accumulation(variables)
    with pytest.raises(ValueError, match="`accumulate=True`"):
        jaxbn.nnx.end_accumulation(jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no batch norm of jaxbn"):
        jaxbn.nnx.end_accumulation(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_one_step_per_group_and_one_per_window_is_an_error():
    options = {"group_size": 2, "update_per_group": True, "accumulate": True}
    with pytest.raises(ValueError, match="Choose one of them"):
        jaxbn.linen.GhostBatchNorm(False, **options).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="Choose one of them"):
        jaxbn.nnx.GhostBatchNorm(3, **options, rngs=nnx.Rngs(0))


assert len(IDS) == len(EMBEDDINGS) == len(X)


def window(api, parts, stats):
    """The statistics after a window that starts from `stats`, as a dict."""
    options = dict(momentum=jaxbn.debiased(0.9), accumulate=True)
    if api == "linen":
        module = jaxbn.linen.BatchNorm(use_running_average=False, **options)
        variables = module.init(jax.random.key(0), parts[0])
        variables = {**variables, "batch_stats": dict(stats)}
        for x in parts:
            _, new = module.apply(variables, x, mutable=BOTH)
            variables = {**variables, **new}
        return variables["batch_stats"]
    module = jaxbn.nnx.BatchNorm(parts[0].shape[-1], rngs=nnx.Rngs(0), **options)
    for name, value in stats.items():
        setattr(module, name, nnx.BatchStat(value))
    for x in parts:
        module(x)
    return {name: getattr(module, name)[...] for name in stats}


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("wide", ["step", "mean and var"])
def test_a_window_starts_from_statistics_of_any_dtype(x64, api, wide):
    # The record was made for float32 and an integer step; then came a checkpoint.
    dtype, step = ("float64", 7) if wide == "mean and var" else ("float32", 7.5)
    mean = np.array([1 / 3, 1e9 + 1 / 3, 0.1], dtype)
    var = np.array([1 / 7, 1.1, 2.0], dtype)
    stats = {
        "mean": jnp.asarray(mean),
        "var": jnp.asarray(var),
        "step": jnp.array(step),
    }
    if wide == "step":
        stats["step"] = jnp.float32(step)
    parts = [numbers((4, 3), "float32", seed=i) for i in range(2)]
    got = window(api, [jnp.asarray(x) for x in parts], stats)
    m = jaxbn.moments(jnp.concatenate(parts))
    expected = jaxbn.update(
        jaxbn.RunningStats(**stats), m, momentum=jaxbn.debiased(0.9)
    )._asdict()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        rtol = 1e-7 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=1e-6)
