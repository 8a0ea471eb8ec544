"""Batch renormalization as reinforcement learners have it, and their checkpoints."""

import family
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_family_flax
from data import assert_close, numbers
from flax import nnx

import jaxbn
from jaxbn.interop import crossq
from jaxbn.interop.optax import incremental_update

LAYER = {"tracks": "var", "warm_up_steps": 2, "momentum": 0.9, "epsilon": 1e-3}


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jaxbn.linen.BatchRenorm(not train, name="BatchRenorm_0", **LAYER)(x)
        x = nn.relu(nn.Dense(4)(x))
        return jaxbn.linen.BatchRenorm(not train, name="BatchRenorm_1", **LAYER)(x)


class Critics(nn.Module):
    """Two critics on the same input, with leading axes in all variables."""

    @nn.compact
    def __call__(self, x, train):
        stacked = nn.vmap(
            Critic,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return stacked(name="VmapCritic_0")(x, train)


def theirs(stats):
    """The collection as those modules have it, written by hand."""
    if "mean" not in stats:
        return {name: theirs(part) for name, part in stats.items()}
    steps = jnp.asarray(stats["step"], jnp.int32)
    limits = {"r_max": jnp.full_like(steps, 3), "d_max": jnp.full_like(steps, 5)}
    return {"mean": stats["mean"], "var": stats["var"], "steps": steps, **limits}


@pytest.fixture(scope="module", params=[Critic, Critics])
def trained(request):
    """A model and its variables after three steps, past the warm-up."""
    model, x = request.param(), numbers((6, 3), "float32")
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), x, True)

    @jax.jit
    def step(variables, x):
        _, new = model.apply(variables, x, True, mutable=["batch_stats"])
        return variables | new

    for seed in range(3):
        variables = step(variables, numbers((6, 3), "float32", seed, mean=2.0))
    return model, variables, x


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(a, b)


def test_whole_trees_there_and_back(trained):
    model, variables, x = trained
    stats = variables["batch_stats"]
    assert set(map(int, np.ravel(jax.tree.leaves(stats)[1]))) == {3}  # the steps
    moved, limits = crossq.to_jaxbn(theirs(stats))
    assert limits == {}
    same(moved, stats)
    same(crossq.from_jaxbn(moved), theirs(stats))
    y = model.apply(variables | {"batch_stats": moved}, x, False)
    assert_close(y, model.apply(variables, x, False))


def test_a_single_layer_and_its_limits():
    one = np.ones(3, np.float32)
    layer = {"mean": one, "var": one, "steps": np.int32(9), "r_max": 2.5, "d_max": 5}
    moved, limits = crossq.to_jaxbn(layer)
    assert limits == {"": {"r_max": 2.5}}
    back = crossq.from_jaxbn(moved, **limits[""])
    assert {n: (v.dtype.name, v.item()) for n, v in back.items() if v.ndim == 0} == {
        "steps": ("int32", 9),
        "r_max": ("float32", 2.5),
        "d_max": ("int32", 5),
    }


ONE = np.ones(3, np.float32)
GOOD = {"mean": ONE, "var": ONE, "steps": 1, "r_max": 3, "d_max": 5}
BATCH_NORM = {"mean": ONE, "var": ONE}


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ({}, ValueError, "no layer with mean, var and `steps`"),
        ({"a": {"b": {}}}, ValueError, "no layer"),
        (3, TypeError, "`batch_stats` must be a dict, got int"),
        ({"a": BATCH_NORM}, ValueError, r"`batch_stats\['a'\]` has \['mean', 'var'\]"),
        ({"a": {**GOOD, "std": ONE}}, ValueError, "has .*'std'.*, expected"),
        ({**GOOD, "mean": "x"}, TypeError, r"`batch_stats\['mean'\]` must be an array"),
        ({**GOOD, "var": -ONE}, ValueError, "negative"),
        ({**GOOD, "var": ONE[:2]}, ValueError, r"variance of shape \(2,\)"),
        ({**GOOD, "steps": np.ones(2)}, ValueError, r"`steps` of shape \(2,\)"),
        ({**GOOD, "r_max": np.ones(2)}, ValueError, r"'r_max'\]` has shape \(2,\)"),
    ],
)
def test_trees_of_something_else(tree, error, words):
    with pytest.raises(error, match=words):
        crossq.to_jaxbn(tree)


def test_what_cannot_go_back():
    _, state = jaxbn.layers.renorm().init(3)
    with pytest.raises(ValueError, match=r"BatchRenorm\(tracks=.std"):
        crossq.from_jaxbn(state._asdict())
    with pytest.raises(ValueError, match=r"`r_max` must be at least 1, got 0\.5"):
        crossq.from_jaxbn({"mean": ONE, "var": ONE, "step": 1}, r_max=0.5)
    two = np.ones((2, 3), np.float32)
    steps = np.ones(2, np.int32)
    stacked = {"mean": two, "var": two, "steps": steps, "r_max": steps, "d_max": [1, 2]}
    with pytest.raises(ValueError, match="d_max` differs between stacked"):
        crossq.to_jaxbn(stacked)


def of_sbx():
    """sbx's own module, and jaxbn's under the names of its fields."""
    layers = pytest.importorskip("sbx.common.jax_layers", reason="`make peers`")

    class BatchRenorm(jaxbn.linen.BatchRenorm):
        epsilon: float = 0.001
        tracks: str = "var"
        warmup_steps: int = 100_000

        def __post_init__(self):
            self.warm_up_steps = self.warmup_steps
            super().__post_init__()

    return layers.BatchRenorm, BatchRenorm


@pytest.mark.parametrize("warm_up", [100, 3])
def test_ten_updates_on_the_batches_of_sbx(warm_up):
    """Statistics are the same, and outputs where r is 1 or epsilon next to nothing."""
    both = of_sbx()
    fields = {"momentum": 0.9, "warmup_steps": warm_up}
    layer, ours = (cls(**fields) for cls in both)
    x = numbers((32, 3), "float32", mean=3.0)
    state, own = (m.init(jax.random.key(0), x, False) for m in (layer, ours))

    def step(module):
        return jax.jit(lambda v, x: module.apply(v, x, False, mutable=["batch_stats"]))

    steps = step(layer), step(ours)
    for seed in range(10):
        x = numbers((32, 3), "float32", seed, mean=1.0 + seed / 4)
        y, new = steps[0](state, x)
        z, moved = steps[1](own, x)
        state, own = state | new, own | moved
        # r² − 1 is at most 8; the variance is 4.
        bound = 1e-5 if seed < warm_up else 1e-5 + 0.5 * 8 * 0.001 / 3
        assert_close(z, y, rtol=bound, atol=2 * bound)
        expected, limits = crossq.to_jaxbn(state["batch_stats"])
        assert limits == {}
        assert int(expected["step"]) == seed + 1
        jax.tree.map(
            lambda a, b: assert_close(a, b, rtol=2e-6, atol=1e-6),
            own["batch_stats"],
            expected,
        )
    y = layer.apply(state, x, True)
    z = ours.apply(own | {"batch_stats": expected}, x, True)
    assert_close(z, y, rtol=1e-5, atol=1e-5)


@pytest.fixture
def any_rank():
    with jax.numpy_rank_promotion("allow"):  # which sbx needs
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("any_rank")
def test_sbx_trains_with_it_and_takes_its_own_state(monkeypatch, tmp_path):
    """CrossQ of sbx on Pendulum, with sbx's module, then with jaxbn's in its place."""
    _, ours = of_sbx()
    import sbx
    from sbx.crossq import policies

    def agent():
        arch = {"pi": [16], "qf": [32, 32]}
        return sbx.CrossQ(
            "MlpPolicy",
            "Pendulum-v1",
            learning_starts=20,
            policy_kwargs={"net_arch": arch},
            batch_size=16,
            seed=0,
        )

    def value(model, stats=None):
        state = model.policy.qf_state
        variables = {"params": state.params, "batch_stats": stats or state.batch_stats}
        return np.asarray(state.apply_fn(variables, states, actions, train=False))

    states, actions = numbers((8, 3), "float32"), numbers((8, 1), "float32", 1)
    theirs_ = agent()
    theirs_.learn(60)
    expected = value(theirs_)
    moved, _ = crossq.to_jaxbn(theirs_.policy.qf_state.batch_stats)

    monkeypatch.setattr(policies, "BatchRenorm", ours)
    model = agent()
    model.policy.qf_state = model.policy.qf_state.replace(
        params=theirs_.policy.qf_state.params, batch_stats=moved
    )
    assert_close(value(model), expected, rtol=1e-5, atol=1e-5)
    before = jax.tree.map(np.asarray, model.policy.qf_state.batch_stats)
    model.learn(60)
    after = model.policy.qf_state.batch_stats
    assert jax.tree.structure(after) == jax.tree.structure(before)
    layer = after["VmapCritic_0"]["BatchRenorm_0"]
    assert int(layer["step"][0]) > int(
        before["VmapCritic_0"]["BatchRenorm_0"]["step"][0]
    )
    assert np.all(np.isfinite(value(model)))
    model.save(tmp_path / "crossq")
    loaded = sbx.CrossQ.load(tmp_path / "crossq")
    assert_close(value(loaded), value(model))


TARGETS = {
    **{name: case.make for name, case in family.CASES.items()},
    "update_per_group": lambda: jaxbn.layers.ghost(num_groups=2, update_per_group=True),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_network_goes_through_a_scan(name):
    layer = TARGETS[name]()
    state = layer.init(3)
    given = (
        family.inputs(family.CASES[name], jnp.float32) if name in family.CASES else {}
    )

    def step(carry, x):
        (params, stats), target = carry
        _, stats = layer.apply(params, stats, x, training=True, **given)
        online = params, stats
        target = incremental_update(online, target, 0.25)
        return (online, target), None

    x = numbers((3, 8, 3), "float32", mean=2.0)
    (online, target), _ = jax.jit(lambda c, x: jax.lax.scan(step, c, x))(
        (state, state), x
    )
    np.testing.assert_array_equal(target[1].step, online[1].step)
    mean, moments = np.asarray(state[1].mean), state[1]
    for batch in x:
        _, moments = layer.apply(state[0], moments, batch, training=True, **given)
        mean = mean + 0.25 * (np.asarray(moments.mean) - mean)
    assert_close(target[1].mean, mean, rtol=1e-5, atol=1e-6)
    layer.apply(*target, x[0], training=True, **given)  # And training goes on.


@pytest.mark.parametrize("momentum", [0.9, jaxbn.debiased(0.9)], ids=["number", "step"])
@pytest.mark.parametrize("name", test_family_flax.FAMILY)
def test_target_networks_of_modules(name, momentum):
    """The average of linen's variables and of nnx' state; training goes on with it."""
    cls, _, options, given = test_family_flax.FAMILY[name]
    options, average = {**options, "momentum": momentum}, incremental_update
    x = numbers((8, 3), "float32", mean=2.0)
    layer = getattr(jaxbn.linen, cls)(False, **options)
    old = layer.init(jax.random.key(0), x, **given)
    _, new = layer.apply(old, x, mutable=["batch_stats"], **given)
    got = average(old | new, old, 0.5)
    same(jax.tree.map(jnp.zeros_like, got), jax.tree.map(jnp.zeros_like, old))
    expected = optax.incremental_update(new["batch_stats"], old["batch_stats"], 0.5)
    for leaf, value in expected.items():
        if leaf == "step":
            value = new["batch_stats"]["step"]
        assert_close(got["batch_stats"][leaf], value, rtol=1e-6, atol=1e-7)
    layer.apply(got, x, mutable=["batch_stats"], **given)

    online = getattr(jaxbn.nnx, cls)(3, **options, rngs=nnx.Rngs(0))
    target = nnx.clone(online)
    online(x, **given)
    nnx.update(target, average(nnx.state(online), nnx.state(target), 0.5))
    assert_close(target.mean[...], 0.5 * online.mean[...], rtol=1e-6)
    if getattr(target, "step", None) is not None:
        np.testing.assert_array_equal(target.step[...], online.step[...])
        assert target.step[...].dtype == jnp.int32
    target(x, **given)


def test_a_step_size_out_of_range():
    with pytest.raises(ValueError, match=r"`step_size` must be from 0 to 1, got 1\.5"):
        incremental_update({}, {}, 1.5)
