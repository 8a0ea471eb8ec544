"""`linen.BatchNorm` under Flax's transforms, with its state, beside Flax's own."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers

import jaxbn

BOTH = (jaxbn.linen.BatchNorm, nn.BatchNorm)
KEY = jax.random.key(0)
AXES = {"params": 0, "batch_stats": 0}
SPLIT = {"params": True}


def train(module, x, *args, steps=2):
    """Variables and output after some training steps with the gradient of a loss."""
    variables = module.init(KEY, x, *args)

    @jax.jit
    def step(variables, x):
        def loss(params):
            given = {**variables, "params": params}
            y, new = module.apply(given, x, *args, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, new)

        grads, (y, new) = jax.grad(loss, has_aux=True)(variables["params"])
        return {"params": variables["params"], **new}, y, grads

    for _ in range(steps):
        variables, y, grads = step(variables, x)
    return variables, y, grads


def assert_like_flax(make, x, *args):
    """The module that `make` makes of either class trains alike."""
    ours, flax = (train(make(cls), x, *args) for cls in BOTH)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4, 1e-4), ours, flax)
    return ours


def block(cls, **options):
    """Dense, batch norm, relu."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3)(x)
            return nn.relu(
                cls(False, scale_init=nn.initializers.normal(), **options)(x)
            )

    return Block


def stats_of(tree):
    """The arrays called mean."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return [leaf for path, leaf in flat if path[-1].key == "mean"]


X = numbers((8, 3), "float32")


def test_jit():
    assert_like_flax(lambda cls: nn.jit(block(cls))(), X)


def test_vmap():
    mapped = partial(nn.vmap, variable_axes=AXES, split_rngs=SPLIT)
    variables, y, _ = assert_like_flax(
        lambda cls: mapped(block(cls))(), numbers((4, 8, 3), "float32")
    )
    assert stats_of(variables)[0].shape == (4, 3)
    assert y.shape == (4, 8, 3)


def test_vmap_with_shared_variables_and_an_axis_name():
    def make(cls):
        return nn.vmap(
            block(cls, axis_name="examples"),
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            axis_name="examples",
        )()

    variables, _, _ = assert_like_flax(make, X)
    assert stats_of(variables)[0].shape == (3,)


def test_nested_vmap():
    mapped = partial(nn.vmap, variable_axes=AXES, split_rngs=SPLIT)
    variables, _, _ = assert_like_flax(
        lambda cls: mapped(mapped(block(cls)))(), numbers((2, 4, 8, 3), "float32")
    )
    assert stats_of(variables)[0].shape == (2, 4, 3)


class Carried(nn.Module):
    """A scan's body: x is the carry."""

    block: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        return self.block()(x), None


def test_scan_over_layers():
    class Layers(nn.Module):
        block: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Carried, variable_axes=AXES, split_rngs=SPLIT, length=3)
            return scan(self.block)(x, None)[0]

    variables, _, _ = assert_like_flax(lambda cls: Layers(block(cls)), X)
    assert stats_of(variables)[0].shape == (3, 3)


def test_scan_over_time_carries_the_statistics():
    class Steps(nn.Module):
        block: type[nn.Module]

        @nn.compact
        def __call__(self, xs):
            block = self.block()
            if self.is_initializing():
                return block(xs[0])
            scan = nn.scan(
                lambda block, carry, x: (carry, block(x)),
                variable_carry="batch_stats",
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return scan(block, None, xs)[1]

    xs = numbers((5, 8, 3), "float32")
    variables, _, _ = assert_like_flax(lambda cls: Steps(block(cls)), xs)
    assert stats_of(variables)[0].shape == (3,)


def test_remat_updates_once():
    rematted, _, _ = assert_like_flax(lambda cls: nn.remat(block(cls))(), X)
    plain, _, _ = train(block(BOTH[0])(), X)
    for a, b in zip(stats_of(rematted), stats_of(plain), strict=True):
        assert_close(a, b, 1e-6, 1e-6)


def test_a_shared_module_called_twice_updates_twice():
    class Twice(nn.Module):
        cls: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            norm = self.cls(False, momentum=0.5)
            return norm(norm(x) + 1)

    variables, _, _ = assert_like_flax(Twice, X)
    assert list(variables["batch_stats"]) == ["BatchNorm_0"]


def test_sequential():
    make = lambda cls: nn.Sequential([nn.Dense(3), cls(False), nn.relu, cls(False)])
    variables, _, _ = assert_like_flax(make, X)
    assert len(stats_of(variables)) == 2


def test_cond():
    class Either(nn.Module):
        cls: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            norm = self.cls(name="norm")
            if self.is_initializing():
                return norm(x, False)
            branches = [
                lambda norm, x: norm(x, use_running_average=True),
                lambda norm, x: norm(x, use_running_average=False),
            ]
            return nn.cond(x[0, 0] > 0, *branches, norm, x)

    for x, updated in [(X.at[0, 0].set(1.0), False), (X.at[0, 0].set(-1.0), True)]:
        variables, _, _ = assert_like_flax(Either, x)
        assert np.any(stats_of(variables)[0] != 0) == updated


def test_tabulate():
    def text(cls):
        table = nn.Sequential([nn.Dense(3), cls(False)]).tabulate(KEY, X)
        return [line.rstrip() for line in table.splitlines()]

    assert text(BOTH[0]) == text(BOTH[1])


def test_donated_state():
    module = block(BOTH[0])()
    variables = module.init(KEY, X)

    @partial(jax.jit, donate_argnums=0)
    def step(stats):
        given = {**variables, "batch_stats": stats}
        return module.apply(given, X, mutable=["batch_stats"])[1]["batch_stats"]

    first = stats = jax.tree.map(jnp.copy, variables["batch_stats"])
    for _ in range(3):
        stats = step(stats)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert_close(stats_of(stats)[0], stats_of(train(module, X, steps=3)[0])[0], 1e-6)


def test_functions_of_flax_that_look_at_modules():
    module = block(BOTH[0])()
    shapes = jax.eval_shape(module.init, KEY, X)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(
        jnp.shape, module.init(KEY, X)
    )
    lazy = module.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert jax.tree.map(jnp.shape, lazy) == jax.tree.map(jnp.shape, shapes)
    _, seen = module.apply(
        module.init(KEY, X), X, capture_intermediates=True, mutable=True
    )
    assert sorted(seen["intermediates"]) == ["BatchNorm_0", "Dense_0", "__call__"]


@pytest.mark.parametrize("momentum", [0.9, jaxbn.debiased(0.9), jaxbn.cumulative()])
def test_equal_instances_share_one_program(momentum):
    @partial(jax.jit, static_argnums=0)
    def step(module, variables):
        return module.apply(variables, X, mutable=["batch_stats"])

    for groups in ([[0, 1]], ((0, 1),)):  # as a list, and as a tuple
        make = partial(
            BOTH[0], False, momentum=momentum, axis=[1], axis_index_groups=groups
        )
        module = make()
        assert module == make()
        assert hash(module) == hash(make())
    variables = BOTH[0](False, momentum=momentum).init(KEY, X)
    for _ in range(3):
        step(BOTH[0](False, momentum=momentum), variables)
    assert step._cache_size() == 1
