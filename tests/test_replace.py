"""`replace_batch_norm` and `replacing`: models made of Flax's own batch norm."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data import assert_close
from flax import nnx
from jax.sharding import PartitionSpec as P
from spread import mesh_of

import jaxbn

X = jnp.asarray(np.random.default_rng(0).normal(3, 2, size=(8, 4)), jnp.float32)
NAN = X.at[5:].set(jnp.nan)
MASK = jnp.arange(8)[:, None] < 5


class Block(nn.Module):
    """A third party's module; `how` is a transform that it applies."""

    how: str = "plain"

    @nn.compact
    def __call__(self, x, train: bool = True, mask=None):
        x = nn.Dense(4)(x)
        if self.how == "remat":
            norm = nn.remat(nn.BatchNorm, static_argnums=(2,))(momentum=0.5)
            return norm(x, not train)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.5)
        if self.how == "cond":
            return nn.cond(
                x.sum() > -jnp.inf, lambda n, x: n(x), lambda n, x: 0 * n(x), norm, x
            )
        if self.how == "twice":
            return norm(norm(x))
        if self.how == "jit":
            return nn.jit(lambda n, x: n(x))(norm, x)
        return norm(x, mask=mask)

    def encode(self, x):
        return self(x, train=False)


class Scanned(nn.Module):
    """Three blocks, one after another, each with its own variables."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(Block(), x, None)[0]


class Mapped(nn.Module):
    """One block for each of two inputs."""

    @nn.compact
    def __call__(self, x):
        norms = nn.vmap(
            nn.BatchNorm,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        )
        return norms(use_running_average=False)(jnp.stack([x, 2 * x]))


MODELS = {
    **{how: Block(how) for how in ("plain", "remat", "cond", "twice", "jit")},
    "scan": Scanned(),
    "vmap": Mapped(),
}


def apply(model, variables, x=X, **kwargs):
    return model.apply(variables, x, mutable=["batch_stats"], **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_linen_under_every_transform(name):
    """Same variables, Flax's numbers, jaxbn's arithmetic."""
    model = MODELS[name]
    variables = model.init(jax.random.key(0), X)
    y, new = apply(model, variables)

    @jax.make_jaxpr
    def program(variables):
        return apply(model, variables)

    assert "jaxbn" not in str(program(variables))
    with jaxbn.linen.replacing():
        own = model.init(jax.random.key(0), X)
        in_context = apply(model, variables)
    ours = jaxbn.linen.replace_batch_norm(model)
    assert "jaxbn_normalize" in str(jax.make_jaxpr(lambda v: apply(ours, v))(variables))
    for got, expected in (
        (own, variables),
        (ours.init(jax.random.key(0), X), variables),
        (in_context, (y, new)),
        (apply(ours, variables), (y, new)),
    ):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-4, 1e-5), got, expected)


def moved(new):
    """How far the running mean went towards the batch's."""
    return new["batch_stats"]["BatchNorm_0"]["mean"] / X.mean(0)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, momentum=0.5)(x)


class Jitted(nn.Module):
    """Flax keeps the program of a class for all of its instances."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, momentum=0.5)(x)


@pytest.mark.parametrize("model", [Plain(), Jitted()], ids=["outside", "inside"])
def test_what_was_jitted_is_traced_anew(model):
    """A program belongs to the overrides that it was traced under."""
    variables = model.init(jax.random.key(0), X)
    step = jax.jit(lambda v: apply(model, v)[1])
    for _ in range(2):
        assert_close(moved(step(variables)), np.full(4, 0.5), 1e-5)
        with jaxbn.linen.replacing(momentum=0.0):
            assert_close(moved(step(variables)), np.ones(4), 1e-5)
        for momentum in (0.25, 0.75):
            ours = jaxbn.linen.replace_batch_norm(model, momentum=momentum)
            new = jax.jit(lambda v, m=ours: apply(m, v)[1])(variables)
            assert_close(moved(new), np.full(4, 1 - momentum), 1e-5)
            assert_close(
                moved(apply(ours, variables)[1]), np.full(4, 1 - momentum), 1e-5
            )


def test_replaced_modules_are_equal_by_value():
    model = Block()
    ours = jaxbn.linen.replace_batch_norm(model)
    assert hash(ours) == hash(jaxbn.linen.replace_batch_norm(Block()))
    assert ours == jaxbn.linen.replace_batch_norm(Block())
    assert ours != jaxbn.linen.replace_batch_norm(model, momentum=0.1)
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert ours.clone() == ours


def test_contexts_in_contexts():
    """Both hold, and the inner one takes precedence, for both kinds of layers."""
    for make in (nn.BatchNorm, jaxbn.linen.BatchNorm):
        model = make(use_running_average=False)
        variables = model.init(jax.random.key(0), X)

        def mean(ours, variables=variables):
            return apply(ours, variables)[1]["batch_stats"]["mean"] / X.mean(0)

        outer = jaxbn.linen.replacing(momentum=0.0, use_fast_variance=False)
        for _ in range(2):  # A context may be entered again.
            with outer, jaxbn.linen.replacing(momentum=0.75):
                assert_close(mean(model), np.full(4, 0.25), 1e-5)
            with outer, jaxbn.linen.replacing(unbiased=True):
                assert_close(mean(model), np.ones(4), 1e-5)
            with outer, outer:
                assert_close(mean(model), np.ones(4), 1e-5)
        inner = jaxbn.linen.replace_batch_norm(model, momentum=0.75)
        assert_close(
            mean(jaxbn.linen.replace_batch_norm(inner, momentum=0.0)),
            np.full(4, 0.25),
            1e-5,
        )
        with outer:
            assert_close(mean(inner), np.full(4, 0.25), 1e-5)
        assert_close(mean(model), np.full(4, 0.01), 1e-4)


def test_other_interceptors_entered_before():
    seen = []

    def watch(call, args, kwargs, context):
        seen.append(type(context.module).__name__)
        return call(*args, **kwargs)

    model = Plain()
    with nn.intercept_methods(watch), jaxbn.linen.replacing():
        model.init(jax.random.key(0), X)
    assert "BatchNorm" in seen


def test_replaced_keeps_paths_inside_other_modules():
    class Compact(nn.Module):
        wrap: bool

        @nn.compact
        def __call__(self, x):
            block = Block()
            return (jaxbn.linen.replace_batch_norm(block) if self.wrap else block)(x)

    class SetUp(nn.Module):
        wrap: bool

        def setup(self):
            block = Block()
            self.block = jaxbn.linen.replace_batch_norm(Block()) if self.wrap else block

        def __call__(self, x):
            return self.block(x)

    for make in (Compact, SetUp):
        plain, wrapped = make(False), make(True)
        variables = plain.init(jax.random.key(0), X)
        own = wrapped.init(jax.random.key(0), X)
        assert jax.tree.structure(own) == jax.tree.structure(variables)
        assert_close(
            apply(wrapped, variables)[0], apply(plain, variables)[0], 1e-4, 1e-5
        )


def test_methods_of_a_replaced_module():
    model = Block()
    ours = jaxbn.linen.replace_batch_norm(model)
    variables = model.init(jax.random.key(0), X)
    expected = model.apply(variables, X, method="encode")
    assert_close(ours.apply(variables, X, method="encode"), expected, 1e-5, 1e-6)
    assert_close(ours.apply(variables, X, method=Block.encode), expected, 1e-5, 1e-6)
    plain = jaxbn.linen.replace_batch_norm(Plain())
    own = plain.init(jax.random.key(0), X)
    by_class = jax.make_jaxpr(
        lambda v: plain.apply(v, X, method=Plain.__call__, mutable=["batch_stats"])
    )
    assert "jaxbn" in str(by_class(own))
    call = lambda module, x: module.encode(x)
    assert_close(ours.apply(variables, X, method=call), expected, 1e-5, 1e-6)
    assert "jaxbn" in str(
        jax.make_jaxpr(lambda v: ours.apply(v, X, method="encode"))(variables)
    )
    with pytest.raises(AttributeError, match="decode"):
        ours.apply(variables, X, method="decode")
    assert ours.bind(variables).encode(X).shape == X.shape
    assert ours.how == "plain"
    table = jaxbn.linen.replace_batch_norm(nn.Sequential([nn.Dense(2)]))
    assert len(table.layers) == 1


def test_overrides_win_in_linen():
    model = Block()
    variables = model.init(jax.random.key(0), X)

    def mean(new):
        return new["batch_stats"]["BatchNorm_0"]["mean"]

    half = mean(apply(jaxbn.linen.replace_batch_norm(model), variables)[1])
    all_ = mean(
        apply(jaxbn.linen.replace_batch_norm(model, momentum=0.0), variables)[1]
    )
    assert_close(all_, 2 * half, 1e-5)
    own = nn.Sequential([jaxbn.linen.BatchNorm(False, momentum=0.5)])
    variables = own.init(jax.random.key(0), X)
    with jaxbn.linen.replacing(momentum=0.0):
        _, new = apply(own, variables)
    assert_close(new["batch_stats"]["layers_0"]["mean"], X.mean(0), 1e-5)
    _, new = apply(own, variables)
    assert_close(new["batch_stats"]["layers_0"]["mean"], 0.5 * X.mean(0), 1e-5)


def test_a_model_becomes_synchronized():
    """The model knows of no devices; statistics are those of all of them."""
    model = nn.BatchNorm(use_running_average=False, momentum=0.0)
    variables = model.init(jax.random.key(0), X)
    mesh = mesh_of(8)

    def step(x):
        ours = jaxbn.linen.replace_batch_norm(model, axis_name="data")
        y, new = apply(ours, variables, x)
        return y, new["batch_stats"]

    spread = jax.shard_map(
        step, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P())
    )
    y, stats = spread(jax.device_put(X, jax.NamedSharding(mesh, P("data"))))
    alone, expected = apply(jaxbn.linen.replace_batch_norm(model), variables)
    assert_close(y, alone, 1e-5, 1e-6)
    assert_close(stats["var"], expected["batch_stats"]["var"], 1e-5)


def test_intermediates_and_tables_name_each_layer_once():
    model = nn.Sequential([nn.BatchNorm(False), nn.Dense(2)])
    ours = jaxbn.linen.replace_batch_norm(model)
    variables = ours.init(jax.random.key(0), X)
    _, new = ours.apply(
        variables, X, mutable=["batch_stats"], capture_intermediates=True
    )
    _, of_flax = model.apply(
        variables, X, mutable=["batch_stats"], capture_intermediates=True
    )
    assert jax.tree.structure(new) == jax.tree.structure(of_flax)
    table = nn.tabulate(ours, jax.random.key(0), compute_flops=False)(X)
    assert table.count("layers_0") == 1


class Odd(nn.BatchNorm):
    """Somebody's own."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class OddNnx(nnx.BatchNorm):
    """Somebody's own."""


def test_linen_refuses():
    model = nn.Sequential([Odd(use_running_average=False)])
    for ours in (model, nn.remat(Odd)(use_running_average=False)):
        refused = pytest.raises(TypeError, match=r"Odd at .* is a subclass")
        with jaxbn.linen.replacing(), refused:
            ours.init(jax.random.key(0), X)
    with pytest.raises(TypeError, match=r"`overrides` has \['axisname'\]"):
        jaxbn.linen.replacing(axisname="data")
    for fixed in ("parent", "use_running_average", "use_bias", "param_dtype"):
        with pytest.raises(TypeError, match=rf"`overrides` has \['{fixed}'\]"):
            jaxbn.linen.replace_batch_norm(model, **{fixed: None})
    with pytest.raises(TypeError, match="`momentum` must be hashable"):
        jaxbn.linen.replace_batch_norm(model, momentum=jnp.ones(4))
    bound = Block().bind(Block().init(jax.random.key(0), X))
    with pytest.raises(ValueError, match="`module`, Block, is bound to variables"):
        jaxbn.linen.replace_batch_norm(bound)
    with pytest.raises(TypeError, match=r"`module` must be a `flax.linen.Module`, got"):
        jaxbn.linen.replace_batch_norm(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))


def test_a_module_is_what_it_was_after_an_error():
    model = nn.BatchNorm(use_running_average=False)
    bound = model.bind(model.init(jax.random.key(0), X), mutable=["batch_stats"])
    refused = pytest.raises(ValueError, match="is for features of shape")
    with jaxbn.linen.replacing(momentum=0.25), refused:
        bound(X[:, :2])
    assert type(bound) is nn.BatchNorm
    assert bound.momentum == 0.99


class Net(nnx.Module):
    """Two layers of which one is in it twice."""

    def __init__(self, rngs):
        self.first = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.layers = nnx.List(
            [self.first, nnx.BatchNorm(4, use_bias=False, rngs=rngs)]
        )

    def __call__(self, x):
        x = self.dense(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return x


def graph(model):
    definition, state = nnx.split(model)
    return definition, jax.tree.structure(state)


def test_nnx_in_place_and_undone():
    net = Net(nnx.Rngs(0))
    before, layer, mean = graph(net), net.first, net.first.mean
    optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
    handle = jaxbn.nnx.replace_batch_norm(net, use_fast_variance=False)
    assert handle.model is net
    assert net.first is net.layers[0] is layer
    assert net.first.mean is mean
    assert all(type(n) is jaxbn.nnx.BatchNorm for n in net.layers)
    assert net.layers[1].bias is None
    assert not net.first.use_fast_variance
    assert net.first.momentum == 0.5

    @nnx.jit
    def step(net, optimizer, x):
        grads = nnx.grad(lambda net: jnp.mean(net(x) ** 2))(net)
        optimizer.update(net, grads)

    step(net, optimizer, X)
    assert net.first.mean is mean
    assert not np.array_equal(mean[...], np.zeros(4))
    handle.undo()
    assert graph(net) == before
    assert hash(graph(net)[0]) == hash(before[0])
    assert type(net.first) is nnx.BatchNorm
    step(net, optimizer, X)
    handle.undo()  # Nothing more to undo.
    assert graph(net) == before


def test_nnx_as_a_context():
    net = Net(nnx.Rngs(0))
    before = graph(net)
    with jaxbn.nnx.replace_batch_norm(net, momentum=0.0) as same:
        assert same is net
        with jaxbn.nnx.replace_batch_norm(net, axis_name=None, unbiased=True):
            assert net.first.unbiased
            assert net.first.momentum == 0.0
        assert not net.first.unbiased
        net.layers[1](NAN, mask=MASK)
        copy = nnx.merge(*nnx.split(net))
        assert type(copy.first) is jaxbn.nnx.BatchNorm
        assert copy.layers[0] is copy.first
        net.eval()
    assert_close(net.layers[1].mean[...], X[:5].mean(0), 1e-5)
    assert net.first.use_running_average  # The model's own change stays.
    assert net.first.momentum == 0.5
    net.train()
    assert graph(net) == before
    with pytest.raises(RuntimeError), jaxbn.nnx.replace_batch_norm(net):
        raise RuntimeError
    assert graph(net) == before


def test_nnx_computes_what_a_model_of_jaxbn_does():
    net = Net(nnx.Rngs(0))
    with jaxbn.nnx.replace_batch_norm(net):
        y = net(X)
    ours = jaxbn.nnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))
    other = Net(nnx.Rngs(0))
    other.first = other.layers[0] = ours
    other.layers[1] = jaxbn.nnx.BatchNorm(4, use_bias=False, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(y, other(X))
    np.testing.assert_array_equal(net.first.var[...], ours.var[...])


def test_nnx_windows_and_steps():
    net = Net(nnx.Rngs(0))
    before = graph(net)
    with jaxbn.nnx.replace_batch_norm(net, accumulate=True):
        net(X)
        jaxbn.nnx.end_accumulation(net)
    assert graph(net) == before
    with pytest.raises(ValueError, match="'first' has no `step`"):
        jaxbn.nnx.replace_batch_norm(net, momentum=jaxbn.cumulative())
    assert graph(net) == before
    own = jaxbn.nnx.BatchNorm(4, momentum=jaxbn.cumulative(), rngs=nnx.Rngs(0))
    step = own.step
    with jaxbn.nnx.replace_batch_norm(own, momentum=jaxbn.debiased(0.5)):
        own(X)
    assert own.step is step
    assert int(own.step[...]) == 1
    assert own.momentum == jaxbn.cumulative()


def test_nnx_undone_in_order():
    net = Net(nnx.Rngs(0))
    before = graph(net)
    first = jaxbn.nnx.replace_batch_norm(net.first, momentum=0.0)
    second = jaxbn.nnx.replace_batch_norm(net, momentum=0.1)
    with pytest.raises(RuntimeError, match="Undo it first"):
        first.undo()
    second.undo()
    first.undo()
    assert graph(net) == before
    for _ in range(2):  # A handle may be entered again.
        with first:
            assert net.first.momentum == 0.0
        assert graph(net) == before


class Own(jaxbn.nnx.BatchNorm):
    """Somebody's own, of jaxbn's."""


def test_nnx_takes_subclasses_of_jaxbns():
    own = Own(4, rngs=nnx.Rngs(0))
    before = graph(own)
    with jaxbn.nnx.replace_batch_norm(own, momentum=jnp.zeros(4)):
        assert type(own) is Own
        nnx.jit(lambda own, x: own(x))(own, X)
    assert_close(own.mean[...], X.mean(0), 1e-5)
    assert graph(own) == before


def test_nnx_stacked_layers_and_windows():
    make = nnx.vmap(lambda _: nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    stack = make(jnp.arange(3))
    call = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
    with jaxbn.nnx.replace_batch_norm(stack, accumulate=True):
        call(stack, X)
        call(stack, X)
        assert_close(stack.batch_moments["count"][...], np.full((3, 4), 16.0))
        with jaxbn.nnx.replace_batch_norm(stack, accumulate=True):
            assert_close(stack.batch_moments["count"][...], np.full((3, 4), 16.0))
    assert_close(stack.mean[...], 0.01 * np.broadcast_to(X.mean(0), (3, 4)), 1e-4)


def test_nnx_refuses():
    net = Net(nnx.Rngs(0))
    before = graph(net)
    for wrong in ({"axisname": "data"}, {"num_features": 3}, {"rngs": None}):
        with pytest.raises(
            TypeError, match=rf"`overrides` has {list(wrong)}".replace("[", r"\[")
        ):
            jaxbn.nnx.replace_batch_norm(net, **wrong)
    with pytest.raises(
        ValueError, match=r"`model` has no `flax.nnx.BatchNorm`: got Li"
    ):
        jaxbn.nnx.replace_batch_norm(net.dense)
    net.odd = OddNnx(4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="OddNnx at 'odd' is a subclass"):
        jaxbn.nnx.replace_batch_norm(net)
    assert type(net.first) is nnx.BatchNorm
    del net.odd
    assert graph(net) == before


REASON = "`make peers` installs it"


def test_third_party_transformers():
    """Hugging Face's ResNet, as it comes in the package."""
    pytest.importorskip("transformers", reason=REASON)
    from transformers.models.resnet import ResNetConfig, modeling_flax_resnet

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    made = modeling_flax_resnet.FlaxResNetForImageClassificationModule(config)

    def run(model, variables, x, train):
        call = {"deterministic": not train, "mutable": ["batch_stats"] * train}
        y, new = model.apply(variables, x, **call)
        return y.logits, new

    check_third_party(made, run, 6)


def test_third_party_jax_resnet():
    """The package `jax-resnet`, which asks whether `batch_stats` are mutable."""
    jax_resnet = pytest.importorskip("jax_resnet", reason=REASON)
    made = jax_resnet.ResNet(
        jax_resnet.ResNetBlock, stage_sizes=[1, 1], n_classes=3, hidden_sizes=(8, 16)
    )

    def run(model, variables, x, train):
        return model.apply(variables, x, mutable=["batch_stats"] * train)

    check_third_party(made, run, 7)


def check_third_party(model, run, layers):
    """Same variables, output and statistics; and synchronized, which it was not."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1, 1, size=(8, 16, 16, 3)), jnp.float32)
    ours = jaxbn.linen.replace_batch_norm(model)
    shapes, own = (jax.eval_shape(m.init, jax.random.key(0), x) for m in (model, ours))
    assert own == shapes
    positive = lambda s: jnp.asarray(rng.uniform(0.1, 0.4, s.shape), s.dtype)
    variables = jax.tree.map(positive, shapes)
    assert len(jaxbn.linen.running_stats(variables)) == layers
    for train in (False, True):
        expected, got = (
            jax.jit(lambda v, m=m, t=train: run(m, v, x, t))(variables)
            for m in (model, ours)
        )
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-3, 1e-3), got, expected)

    synchronized = jaxbn.linen.replace_batch_norm(model, axis_name="data")
    mesh = mesh_of(8)
    spread = jax.shard_map(
        lambda v, x: run(synchronized, v, x, True),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P()),
    )
    split = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
    over_devices = jax.jit(spread)(variables, split)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-3, 1e-3), over_devices, got)
