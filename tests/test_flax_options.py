"""What the Flax modules have beyond Flax's, and how a checkpoint gets there."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from data import assert_close, numbers
from flax import nnx

import jaxbn

X = numbers((16, 3), "float32", mean=3.0)
MOMENTA = {
    "debiased": jaxbn.debiased(0.9),
    "cumulative": jaxbn.cumulative(),
    "schedule": optax.linear_schedule(0.0, 0.9, 10),
}


def linen_steps(layer, variables, steps):
    for _ in range(steps):
        _, new = layer.apply(variables, X, mutable=["batch_stats"])
        variables = {**variables, **new}
    return variables


@pytest.mark.parametrize("momentum", MOMENTA)
def test_momentum_as_a_function_of_the_step(momentum):
    momentum = MOMENTA[momentum]
    layer = jaxbn.linen.BatchNorm(False, momentum=momentum)
    variables = layer.init(jax.random.key(0), X)
    assert sorted(variables["batch_stats"]) == ["mean", "step", "var"]
    stats = linen_steps(layer, variables, 2)["batch_stats"]
    # From step 0 on, the first batch counts in full.
    assert_close(stats["mean"], X.mean(0), 1e-5)
    assert stats["step"] == 2

    module = jaxbn.nnx.BatchNorm(3, momentum=momentum, rngs=nnx.Rngs(0))
    module(X)
    module(X)
    assert_close(module.mean[...], X.mean(0), 1e-5)
    assert isinstance(module.step, nnx.BatchStat)
    assert module.step[...] == 2


def test_a_number_as_momentum_adds_no_leaf():
    layer = jaxbn.linen.BatchNorm(False)
    stats = layer.init(jax.random.key(0), X)["batch_stats"]
    assert list(stats) == ["mean", "var"]
    module = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    assert sorted(nnx.state(module, nnx.BatchStat)) == ["mean", "var"]


def test_linen_momentum_turned_into_a_function():
    old = nn.BatchNorm(False, momentum=0.5)
    variables = linen_steps(old, old.init(jax.random.key(0), X), 3)
    new = jaxbn.linen.BatchNorm(momentum=jaxbn.debiased(0.5))
    # Inference needs no step.
    expected = old.clone(use_running_average=True).apply(variables, X)
    assert_close(new.apply(variables, X, True), expected, 1e-5, 1e-6)
    # Training would start at step 0 and forget what is in mean and var.
    with pytest.raises(
        ValueError, match=r"`batch_stats` has a mean and no `step`.*Add"
    ):
        new.apply(variables, X, False, mutable=["batch_stats"])
    variables["batch_stats"]["step"] = jnp.int32(100)
    _, moved = new.apply(variables, X, False, mutable=["batch_stats"])
    _, flax = old.apply(variables, X, mutable=["batch_stats"])
    assert_close(moved["batch_stats"]["mean"], flax["batch_stats"]["mean"], 1e-5)
    assert moved["batch_stats"]["step"] == 101


def test_nnx_momentum_turned_into_a_function_too_late():
    module = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    module.momentum = jaxbn.cumulative()
    with pytest.raises(ValueError, match="Pass it to the constructor"):
        module(X)


def test_derivatives_and_unbiased():
    options = {"momentum": 0.0, "unbiased": True, "derivatives": "jvp"}
    layer = jaxbn.linen.BatchNorm(False, **options)
    variables = layer.init(jax.random.key(0), X)
    f = lambda x: layer.apply(variables, x, mutable=["batch_stats"])
    (_, new), _ = jax.jvp(f, (X,), (X,))  # forward mode
    assert_close(new["batch_stats"]["var"], np.var(X, 0, ddof=1), 1e-5)
    module = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    jax.jvp(lambda x: nnx.clone(module)(x), (X,), (X,))
    module(X)
    assert_close(module.var[...], np.var(X, 0, ddof=1), 1e-5)


@pytest.mark.parametrize("way", ["from Flax", "to Flax"])
class TestCheckpoints:
    """What one library saves, the other goes on with as if nothing had happened."""

    def classes(self, way, module):
        ours, flax = getattr(jaxbn, module.__name__.rpartition(".")[-1]), module
        both = (flax.BatchNorm, ours.BatchNorm)
        return both if way == "from Flax" else both[::-1]

    @pytest.mark.parametrize("format_", ["orbax", "msgpack"])
    def test_linen(self, way, format_, tmp_path):
        net = lambda cls: nn.Sequential([nn.Dense(4), cls(False), nn.relu, cls(False)])
        saver, loader = map(net, self.classes(way, nn))
        saved = linen_steps(saver, saver.init(jax.random.key(0), X), 2)
        target = loader.init(jax.random.key(1), X)
        if format_ == "orbax":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "saved", saved)
                checkpointer.wait_until_finished()
                restored = checkpointer.restore(tmp_path / "saved", target)
        else:
            data = flax.serialization.to_bytes(saved)
            restored = flax.serialization.from_bytes(target, data)
        jax.tree.map(np.testing.assert_array_equal, saved, restored)
        ends = linen_steps(saver, saved, 2), linen_steps(loader, restored, 2)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, 1e-6), *ends)

    def test_nnx(self, way, tmp_path):
        def net(cls, seed):
            rngs = nnx.Rngs(seed)
            return nnx.Sequential(
                nnx.Linear(3, 4, rngs=rngs), cls(4, rngs=rngs), cls(4, rngs=rngs)
            )

        cls_saver, cls_loader = self.classes(way, nnx)
        saver, loader = net(cls_saver, 0), net(cls_loader, 1)
        saver(X)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "saved", nnx.state(saver))
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "saved", nnx.state(loader))
        nnx.update(loader, restored)
        assert_close(loader(X), saver(X), 1e-5, 1e-5)
        states = [nnx.to_pure_dict(nnx.state(m)) for m in (saver, loader)]
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, 1e-6), *states)
