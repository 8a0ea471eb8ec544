"""`nnx.BatchNorm` under Flax's transforms, with its state, beside Flax's own."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data import assert_close, numbers
from flax import nnx

import jaxbn

BOTH = (jaxbn.nnx.BatchNorm, nnx.BatchNorm)
X = numbers((8, 3), "float32")


class Block(nnx.Module):
    """Linear, batch norm, relu."""

    def __init__(self, cls, rngs, **options):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        scale = nnx.initializers.normal(1.0)
        self.norm = cls(3, scale_init=scale, rngs=rngs, **options)

    def __call__(self, x):
        return nnx.relu(self.norm(self.linear(x)))


def blocks(**options):
    return [Block(cls, nnx.Rngs(0), **options) for cls in BOTH]


def stacked(n, cls):
    return nnx.vmap(lambda rngs: Block(cls, rngs))(nnx.Rngs(0).split(n))


def assert_alike(results, modules):
    """Outputs and all variables, of jaxbn and of Flax."""
    states = [nnx.to_pure_dict(nnx.state(m)) for m in modules]
    assert np.any(states[0]["norm"]["mean"] != 0)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4, 1e-4), *states)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4, 1e-4), *results)


def test_split_and_merge():
    results, modules = [], []
    for module in blocks():
        graph, state = nnx.split(module)

        @jax.jit
        def step(state, x, graph=graph):
            module = nnx.merge(graph, state)
            return module(x), nnx.state(module)

        for _ in range(2):
            y, state = step(state, X)
        results.append(y)
        modules.append(nnx.merge(graph, state))
        assert step._cache_size() == 1
    assert_alike(results, modules)


def test_jit_and_grad_and_an_optimizer():
    @nnx.jit
    def step(module, optimizer, x):
        loss = lambda m: jnp.sum(jnp.sin(m(x)))
        value, grads = nnx.value_and_grad(loss)(module)
        optimizer.update(module, grads)
        return value

    modules, results = blocks(), []
    for module in modules:
        optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
        results.append([step(module, optimizer, X) for _ in range(3)])
    assert_alike(results, modules)


def test_vmap_over_models():
    forward = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))
    modules = [stacked(4, cls) for cls in BOTH]
    for _ in range(2):  # Both calls: state comes out as it went in.
        results = [forward(m, X) for m in modules]
    assert_alike(results, modules)
    assert modules[0].norm.mean[...].shape == (4, 3)


def test_vmap_over_examples_with_shared_statistics():
    modules = blocks(axis_name="examples")
    forward = nnx.vmap(
        lambda m, x: m(x),
        in_axes=(nnx.StateAxes({...: None}), 0),
        axis_name="examples",
    )
    for _ in range(2):
        results = [forward(m, X) for m in modules]
    assert_alike(results, modules)
    assert modules[0].norm.mean[...].shape == (3,)


def test_scan_over_layers():
    forward = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    modules = [stacked(3, cls) for cls in BOTH]
    results = [forward(X, m) for m in modules]
    assert_alike(results, modules)


def test_scan_over_time_carries_the_statistics():
    def step(m, x):
        return m, m(x)

    forward = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    modules, results = blocks(), []
    for module in modules:
        results.append(forward(module, numbers((5, 8, 3), "float32"))[1])
    assert_alike(results, modules)


def test_remat_updates_once():
    def train(module, call):
        loss = lambda m: jnp.sum(jnp.sin(call(m, X)))
        return nnx.to_pure_dict(nnx.grad(loss)(module))

    call = nnx.remat(lambda m, x: m(x))
    modules = blocks()
    assert_alike([train(m, call) for m in modules], modules)
    plain = blocks()
    train(plain[0], lambda m, x: m(x))
    assert_close(plain[0].norm.mean[...], modules[0].norm.mean[...], 1e-6)


def test_eval_shape():
    module = nnx.eval_shape(lambda: Block(BOTH[0], nnx.Rngs(0)))
    described = nnx.to_pure_dict(nnx.state(module))
    expected = nnx.to_pure_dict(nnx.state(blocks()[0]))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), described) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )
    module = blocks()[0]
    y = nnx.eval_shape(lambda m, x: m(x), module, X)
    assert y.shape == X.shape
    np.testing.assert_array_equal(module.norm.mean[...], 0)


@pytest.mark.parametrize("take", [True, False])
def test_cond(take):
    def train(m, x):
        return m.norm(x, use_running_average=False)

    def infer(m, x):
        return m.norm(x, use_running_average=True)

    results, modules = [], blocks()
    for module in modules:
        run = nnx.jit(lambda m, x: nnx.cond(x[0, 0] > 0, train, infer, m, x))
        results.append(run(module, X.at[0, 0].set(1.0 if take else -1.0)))
    if take:
        assert_alike(results, modules)
    else:
        assert_close(*results, 1e-5, 1e-5)
        np.testing.assert_array_equal(modules[0].norm.mean[...], 0)


def test_views_and_attributes():
    model = nnx.Sequential(*blocks())
    inference = nnx.view(model, use_running_average=True)
    inference(X)
    for block in model.layers:
        np.testing.assert_array_equal(block.norm.mean[...], 0)
    model.eval()
    assert model.layers[0].norm.use_running_average
    model.train()
    assert not model.layers[0].norm.use_running_average
    model(X)
    assert model.layers[0].norm.mean[...].any()
    # The view shares the variables.
    assert inference.layers[0].norm.mean[...].any()


def test_bridge_to_linen():
    outs = []
    for cls in BOTH:
        layer = nnx.bridge.to_linen(cls, 3, momentum=0.5)
        variables = layer.init(jax.random.key(0), X)
        y, new = layer.apply(variables, X, mutable=["batch_stats"])
        outs.append((y, variables["params"], new["batch_stats"]))
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, 1e-5), *outs)


def test_bridge_from_linen():
    outs = []
    for cls in (jaxbn.linen.BatchNorm, nn.BatchNorm):
        module = nnx.bridge.ToNNX(cls(False, momentum=0.5), rngs=nnx.Rngs(0))
        nnx.bridge.lazy_init(module, X)
        y = module(X, mutable=["batch_stats"])
        outs.append((y, module.mean[...], module.var[...], module.scale[...]))
        assert isinstance(module.mean, nnx.BatchStat)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, 1e-5), *outs)
    assert outs[0][1].any()


def test_donated_state():
    module = blocks()[0]
    graph, state = nnx.split(module)

    @partial(jax.jit, donate_argnums=0)
    def step(state, x):
        module = nnx.merge(graph, state)
        module(x)
        return nnx.state(module)

    first = jax.tree.leaves(state)
    for _ in range(2):
        state = step(state, X)
    assert all(leaf.is_deleted() for leaf in first)


@pytest.mark.parametrize("momentum", [0.9, jaxbn.debiased(0.9), jaxbn.cumulative()])
def test_equal_instances_share_one_program(momentum):
    traced = 0

    @nnx.jit
    def step(module, x):
        nonlocal traced
        traced += 1
        return module(x)

    for _ in range(3):
        module = BOTH[0](3, axis=[1], momentum=momentum, rngs=nnx.Rngs(0))
        step(module, X)
        step(module, X)
    assert traced == 1
    for groups in ([[0, 1]], ((0, 1),)):  # as a list, and as a tuple
        module = BOTH[0](3, axis_index_groups=groups, rngs=nnx.Rngs(0))
        hash(nnx.graphdef(module))
