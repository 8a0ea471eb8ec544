"""The family's Flax modules: each is its layer, with variables."""

import functools
import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data import assert_close, numbers
from flax import nnx
from jax.sharding import PartitionSpec as P
from spread import mesh_of

import jaxbn
from jaxbn import layers
from jaxbn._flax import fields

IDS = np.array([0, 2, 0, 2, 2, 0, 2, 0])
EMBEDDINGS = np.random.default_rng(3).normal(size=(8, 2)).astype(np.float32)
# Class, layer, options of both, what a call needs more.
FAMILY = {
    "standard": ("BatchNorm", layers.standard, {"example_weight": 0.3}, {}),
    "ghost": (
        "GhostBatchNorm",
        layers.ghost,
        {"num_groups": 2, "strided": True, "unbiased": True},
        {},
    ),
    "renorm": (
        "BatchRenorm",
        layers.renorm,
        {"r_max": optax.linear_schedule(1.0, 2.0, 3), "d_max": 0.2},
        {},
    ),
    "renorm of variances": (
        "BatchRenorm",
        layers.renorm,
        {"r_max": 1.3, "d_max": 0.2, "tracks": "var", "warm_up_steps": 1},
        {},
    ),
    "domain": (
        "DomainBatchNorm",
        layers.domain,
        {"num_domains": 3},
        {"domain_ids": IDS},
    ),
    "classes": (
        "ConditionalBatchNorm",
        layers.conditional,
        {"num_classes": 3},
        {"condition": IDS},
    ),
    "embedding": (
        "ConditionalBatchNorm",
        layers.conditional,
        {"embedding_size": 2, "unbiased": True},
        {"condition": EMBEDDINGS},
    ),
    "streaming": ("StreamingBatchNorm", layers.streaming, {}, {}),
    "in_place": ("InPlaceBatchNorm", layers.in_place, {"activation": "elu"}, {}),
}
every = pytest.mark.parametrize("name", FAMILY)
X = numbers((8, 5, 3), "float32")
MASK = np.arange(8).reshape(8, 1, 1) != 3


def linen(name, **options):
    """Parameters, statistics, and `f(params, stats, x, training) -> (y, stats)`."""
    cls, _, own, given = FAMILY[name]
    init = nn.initializers.normal(1.0)
    inits = {"scale_init": init, "bias_init": init} | (
        {"kernel_init": init} if name == "embedding" else {}
    )
    layer = getattr(jaxbn.linen, cls)(momentum=0.9, **inits, **own, **options)
    variables = layer.init(jax.random.key(0), X, use_running_average=False, **given)

    def apply(params, stats, x, training):
        y, new = layer.apply(
            {"params": params, "batch_stats": stats},
            x,
            use_running_average=not training,
            mask=MASK,
            mutable=["batch_stats"],
            **given,
        )
        return y, new["batch_stats"]

    return variables["params"], variables["batch_stats"], apply


def nnx_(name, **options):
    cls, _, own, given = FAMILY[name]
    init = nnx.initializers.normal(1.0)
    inits = {"scale_init": init, "bias_init": init} | (
        {"kernel_init": init} if name == "embedding" else {}
    )
    make = getattr(jaxbn.nnx, cls)
    module = make(3, momentum=0.9, rngs=nnx.Rngs(0), **inits, **own, **options)
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)

    def apply(params, stats, x, training):
        module = nnx.merge(graph, params, stats, copy=True)
        module.set_attributes(use_running_average=not training)
        y = module(x, mask=MASK, **given)
        return y, nnx.state(module, nnx.BatchStat)

    return params, stats, apply


def plain(tree):
    """Variables by their names, without what wraps them."""
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    return {name: jnp.asarray(value) for name, value in dict(tree).items()}


@every
@pytest.mark.parametrize("make", [linen, nnx_])
def test_is_its_layer(make, name):
    """Outputs, gradients and statistics of two steps, and inference after them."""
    _, factory, own, given = FAMILY[name]
    params, stats, apply = make(name)
    layer = factory(momentum=0.9, **own)
    _, first = layer.init(3)
    assert set(plain(stats)) == set(first._fields) - (
        set() if name in ("renorm", "renorm of variances", "streaming") else {"step"}
    )

    def loss(apply, params, state):
        y, new = apply(params, state)
        return jnp.sum(jnp.sin(y)), (y, new)

    def two_steps(apply, params, state):
        grad = jax.grad(lambda p, s: loss(apply(True), p, s), has_aux=True)
        _, (_, state) = grad(params, state)
        grads, (y, state) = grad(params, state)
        return grads, y, state, apply(False)(params, state)[0]

    ours = lambda training: lambda p, s: apply(p, s, X, training)
    got = jax.jit(partial(two_steps, ours))(params, stats)

    def theirs(training):
        return lambda p, s: layer.apply(
            p, s, X, training=training, weights=MASK, **given
        )

    expected = jax.jit(partial(two_steps, theirs))(plain(params), first)
    close = partial(assert_close, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, plain(got[0]), expected[0])
    jax.tree.map(close, (got[1], got[3]), (expected[1], expected[3]))
    for field, value in plain(got[2]).items():
        close(value, getattr(expected[2], field))


@every
@pytest.mark.parametrize("modules", [jaxbn.linen, jaxbn.nnx], ids=["linen", "nnx"])
def test_every_option_of_the_layer_is_one_of_the_module(modules, name):
    cls, factory, _, _ = FAMILY[name]
    cls = getattr(modules, cls)
    options = set(inspect.signature(factory).parameters)
    fields = set(inspect.signature(cls.__init__).parameters)
    if "common" in fields:
        fields |= set(inspect.signature(jaxbn.nnx._adapter.Variant.__init__).parameters)
    assert options - fields <= {"feature_axes", "stats_dtype"}
    flax = {"use_running_average", "axis", "bias_init", "scale_init", "kernel_init"}
    flax |= {"self", "parent", "name", "num_features", "rngs", "common", "accumulate"}
    if cls in (jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm):
        flax |= {"force_float32_reductions", "promote_dtype"}
        flax |= {"bias_metadata", "scale_metadata"}
    assert fields - options <= flax


@every
@pytest.mark.parametrize("make", [linen, nnx_])
def test_over_devices(make, name):
    """With `axis_name`, and initialized without it."""
    if FAMILY[name][3]:
        pytest.skip("ids are of the whole batch here; tests/test_family_devices.py")
    options = {"num_groups": 1, "strided": False} if name == "ghost" else {}
    changed = dict(FAMILY)
    changed[name] = (*FAMILY[name][:2], FAMILY[name][2] | options, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILY, name, changed[name])
        patch.setattr("test_family_flax.MASK", None)
        params, stats, alone = make(name)
        _, _, spread = make(name, axis_name="data")
        f = jax.shard_map(
            lambda p, s, x: spread(p, s, x, True),
            mesh=mesh_of(8),
            in_specs=(P(), P(), P("data")),
            out_specs=(P("data"), P()),
        )
        got, expected = jax.jit(f)(params, stats, X), alone(params, stats, X, True)
    jax.tree.map(partial(assert_close, rtol=1e-4, atol=1e-5), got, expected)


@every
def test_linen_modules_go_into_scan_and_are_hashable(name):
    cls, _, own, given = FAMILY[name]
    layer = getattr(jaxbn.linen, cls)(False, axis=[-1], **own)
    assert hash(layer) == hash(getattr(jaxbn.linen, cls)(False, axis=(-1,), **own))
    variables = layer.init(jax.random.key(0), X, **given)

    def step(stats, x):
        given_ = {**variables, "batch_stats": stats}
        y, new = layer.apply(given_, x, mutable=["batch_stats"], **given)
        return new["batch_stats"], y

    last, _ = jax.lax.scan(step, variables["batch_stats"], jnp.stack([X, X]))
    assert jax.tree.map(jnp.shape, last) == jax.tree.map(
        jnp.shape, variables["batch_stats"]
    )


@every
def test_nnx_modules_train_and_evaluate(name):
    cls, _, own, given = FAMILY[name]
    module = getattr(jaxbn.nnx, cls)(3, rngs=nnx.Rngs(0), **own)
    step = nnx.jit(lambda m, x: m(x, **given))
    step(module, X)
    before = jax.tree.map(jnp.copy, nnx.state(module, nnx.BatchStat))
    module.eval()
    step(module, 2 * X)
    after = nnx.state(module, nnx.BatchStat)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    module.train()
    step(module, 2 * X)
    assert not np.allclose(
        nnx.state(module, nnx.BatchStat)["mean"][...], before["mean"][...]
    )


def test_ghost_initializes_with_a_batch_of_any_size():
    layer = jaxbn.linen.GhostBatchNorm(False, group_size=4)
    variables = layer.init(jax.random.key(0), X[:1])
    y, _ = layer.apply(variables, X, mutable=["batch_stats"])
    assert y.shape == X.shape


def test_a_step_is_kept_where_something_is_a_function_of_it():
    schedule = optax.linear_schedule(0.0, 5.0, 10)
    for options in ({"d_max": schedule}, {"momentum": jaxbn.debiased(0.9)}):
        layer = jaxbn.linen.BatchRenorm(False, **options)
        assert "step" in layer.init(jax.random.key(0), X)["batch_stats"]
        module = jaxbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0), **options)
        module(X)
        assert module.step[...] == 1


def test_domains_count_their_own_steps():
    layer = jaxbn.linen.DomainBatchNorm(
        False, num_domains=3, momentum=jaxbn.cumulative()
    )
    variables = layer.init(jax.random.key(0), X, domain_ids=IDS)
    _, new = layer.apply(variables, X, domain_ids=IDS, mutable=["batch_stats"])
    np.testing.assert_array_equal(new["batch_stats"]["step"], [1, 0, 1])
    module = jaxbn.nnx.DomainBatchNorm(
        3, num_domains=3, momentum=jaxbn.cumulative(), rngs=nnx.Rngs(0)
    )
    module(X, domain_ids=IDS)
    np.testing.assert_array_equal(module.step[...], [1, 0, 1])


def test_an_option_that_no_module_passes_is_an_error(monkeypatch):
    """It is not ignored: whoever adds an option to a layer hears of the modules."""

    @functools.wraps(layers.ghost)
    def extended(**options):
        return layers.ghost(**options)

    own = inspect.signature(layers.ghost)
    new = inspect.Parameter("novelty", inspect.Parameter.KEYWORD_ONLY, default=0)
    extended.__signature__ = own.replace(parameters=[*own.parameters.values(), new])
    monkeypatch.setitem(fields.OPTIONS, extended, fields.OPTIONS[layers.ghost])
    monkeypatch.setattr(layers, "ghost", extended)
    x, words = jnp.ones((4, 3)), r"`ghost` has options that no module passes.*novelty"
    with pytest.raises(TypeError, match=words):
        jaxbn.nnx.GhostBatchNorm(3, group_size=2, rngs=nnx.Rngs(0))
    module = jaxbn.linen.GhostBatchNorm(False, group_size=2)
    with pytest.raises(TypeError, match=words):
        module.apply(module.init(jax.random.key(0), x), x, mutable=["batch_stats"])


@pytest.mark.parametrize("make", fields.OPTIONS)
def test_modules_pass_every_option_of_their_layer(make):
    passed = {*fields.COMMON, *fields.OPTIONS[make], *fields.OF_THE_INPUT}
    assert passed == set(inspect.signature(make).parameters)
