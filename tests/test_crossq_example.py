"""`examples/crossq.py`: the pendulum, the agents, and what the script writes."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _crossq

    with jax.numpy_rank_promotion("allow"):
        yield _crossq


def test_the_pendulum_is_that_of_gymnasium(example):
    gymnasium = pytest.importorskip("gymnasium", reason="`make peers`")
    env = gymnasium.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    pendulum = example.Pendulum(*map(jnp.asarray, env.state))
    for _ in range(20):
        action = rng.uniform(-1, 1, 1)
        seen, reward, *_ = env.step(2 * action)
        pendulum, ours = pendulum.pushed(jnp.asarray(action))
        assert_close(ours, reward, rtol=1e-4, atol=1e-4)
        assert_close(pendulum.seen(), seen, rtol=1e-4, atol=1e-4)


def test_an_action_and_its_probability(example):
    """The density of tanh of a normal variable sums up to 1."""
    learner = example.Learner(example.KINDS["SAC, target networks"], 4, 10)
    actor = learner.actor.init(jax.random.key(0), jnp.zeros((2, 3)))
    seen = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.5]), (20_000, 3))
    action, log_p = learner.act(actor, seen, jax.random.key(1))
    assert np.all(np.abs(action) <= 1)
    # E[1/p] over the actions that are drawn is the length of what they reach.
    inside = np.abs(action[:, 0]) < 0.5
    assert_close(np.mean(np.where(inside, np.exp(-log_p), 0)), 1.0, rtol=0.05)


@pytest.mark.parametrize(
    "name",
    [
        "CrossQ (batch renorm)",
        pytest.param("the same with batch norm", marks=pytest.mark.slow),
        pytest.param("the same without a norm", marks=pytest.mark.slow),
        pytest.param("SAC, target networks", marks=pytest.mark.slow),
    ],
)
def test_an_agent_takes_its_steps(example, name):
    learner = example.Learner(example.KINDS[name], 4, 32)
    agents = jax.jit(jax.vmap(learner.init))(jax.random.split(jax.random.key(0), 2))
    part = jax.jit(jax.vmap(learner.part, (0, 0, None)), static_argnums=2)
    keys = jax.random.split(jax.random.key(1), 2)
    new, returns = part(agents, keys, 5)
    assert returns.shape == (2,)
    assert returns[0] != returns[1]
    assert np.all(new.steps == 5)
    assert np.all(new.buffer[0][:, :5].any(-1))
    assert not new.buffer[0][:, 5:].any()
    leaves = jax.tree.leaves(new.critics["params"])
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), agents.actor, new.actor)
    assert all(jax.tree.leaves(moved))
    for layer in new.critics["batch_stats"].get("VmapCritic_0", {}).values():
        if "step" in layer:
            assert np.all(layer["step"] == 5)
    if name == "SAC, target networks":
        a, b = (jax.tree.leaves(t["params"])[0] for t in (new.targets, new.critics))
        assert 0 < np.max(np.abs(a - b)) < 0.1


@pytest.mark.slow
def test_the_script_writes_its_table_and_its_picture(example, monkeypatch, tmp_path):
    import crossq

    monkeypatch.setattr(sys, "argv", ["crossq.py", "--small", "--out", str(tmp_path)])
    crossq.main()
    assert (tmp_path / "crossq.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "results.json").read_text())
    assert set(record["results"]) == set(example.KINDS)
    table = (tmp_path / "summary.md").read_text()
    assert all(name in table for name in example.KINDS)


def test_wrong_options(example, monkeypatch, capsys):
    import crossq

    for argv, message in (
        (["--seeds", "0"], "--seeds must be above 0"),
        (["--steps", "300"], "must be a multiple of 250"),
    ):
        monkeypatch.setattr(sys, "argv", ["crossq.py", *argv])
        with pytest.raises(SystemExit):
            crossq.main()
        assert message in capsys.readouterr().err
