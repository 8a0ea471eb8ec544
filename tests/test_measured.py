"""What `moments_fn` draws, is compiled for, and holds."""

import dataclasses
import gc
import weakref
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers
from flax import nnx

import jaxbn
from jaxbn.population import adapt, collect, recalibrate

KEY = jax.random.key(0)
BATCHES = list(numbers((40, 8, 16), "float32"))


class Net(nn.Module):
    """Two streams before a batch norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(x)
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        self.sow("seen", "x", x)
        return jaxbn.linen.BatchNorm(False)(x)


class NNXNet(nnx.Module):
    """The same; what the batch norm sees is what it returns."""

    def __init__(self, rngs):
        self.rngs, self.dropout = rngs.fork(), nnx.Dropout(0.5, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(x)
        x = x + jax.random.normal(self.rngs.noise(), x.shape)
        self.norm(x)
        return x


def nnx_net():
    return NNXNet(nnx.Rngs(params=0, dropout=1, noise=2))


def pooled(seen):
    m = jaxbn.moments(jnp.concatenate(seen).reshape(-1, seen[0].shape[-1]))
    return m.mean, m.var


# What is drawn


def test_the_streams_of_an_nnx_model_go_on():
    """As those of a loop over the model; the model's own stay."""
    model, direct = nnx_net(), nnx_net()
    mean, var = pooled([direct(x) for x in BATCHES])
    for made in (collect, recalibrate):
        stats = made(jaxbn.nnx.moments_fn(model), BATCHES)["norm"]
        assert_close(stats.mean, mean, rtol=1e-4, atol=1e-6)
        assert_close(stats.var, var, rtol=1e-5)
    assert model.rngs.noise.count[...] == 0
    assert direct.rngs.noise.count[...] == len(BATCHES)
    m = collect(jaxbn.nnx.moments_fn(model), BATCHES)
    adapted = adapt(jaxbn.nnx.running_stats(model), m)["norm"]
    assert_close(adapted.var, var, rtol=1e-5)


@pytest.mark.parametrize("kind", ["a key", "a raw key", "keys", "raw keys"])
def test_every_call_of_linen_folds_its_number_into_the_keys(kind):
    key = jax.random.PRNGKey(5) if "raw" in kind else jax.random.key(5)
    rngs = {"dropout": key, "noise": key} if "keys" in kind else key
    variables = Net().init(KEY, BATCHES[0])

    def seen(i, x):
        own = jax.tree.map(lambda key: jax.random.fold_in(key, i), rngs)
        mutable = ["batch_stats", "seen"]
        _, new = Net().apply(variables, x, rngs=own, mutable=mutable)
        return new["seen"]["x"][-1]

    mean, var = pooled([seen(i, x) for i, x in enumerate(BATCHES)])
    f = jaxbn.linen.moments_fn(Net(), variables, rngs=rngs)
    stats = recalibrate(f, BATCHES)["BatchNorm_0"]
    assert_close(stats.mean, mean, rtol=1e-4, atol=1e-6)
    assert_close(stats.var, var, rtol=1e-5)


def test_streams_that_an_nnx_model_is_called_with():
    class Model(nnx.Module):
        def __init__(self):
            self.norm = jaxbn.nnx.BatchNorm(16, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            x = self.dropout(x, rngs=rngs)
            self.norm(x)
            return x

    rngs, own = nnx.Rngs(3), nnx.Rngs(3)
    mean, var = pooled([Model()(x, own) for x in BATCHES])
    stats = recalibrate(jaxbn.nnx.moments_fn(Model(), rngs=rngs), BATCHES)["norm"]
    assert_close(stats.mean, mean, rtol=1e-4, atol=1e-6)
    assert_close(stats.var, var, rtol=1e-5)
    assert rngs.default.count[...] == 0


@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_nnx_layers_with_split_streams(transform):
    """Stacked layers, each with a stream of its own."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return NNXNet(rngs)

    def run(stack, x):
        if transform == "vmap":
            return nnx.vmap(lambda net, x: net(x), in_axes=(0, None))(stack, x)
        body = lambda x, net: (net(x), x)
        over = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        return over(x, stack)[1]

    class Model(nnx.Module):
        def __init__(self):
            self.stack = stack(nnx.Rngs(params=0, dropout=1, noise=2))

        def __call__(self, x):
            return run(self.stack, x)

    model, direct = Model(), Model()
    f, before = jaxbn.nnx.moments_fn(model), jaxbn.nnx.moments_fn(model)
    for x in BATCHES[:3]:
        direct(x)
    for x in BATCHES[:3]:
        f(x)
    later = f(BATCHES[0])["stack/norm"]
    expected = jaxbn.nnx.moments_fn(direct)(BATCHES[0])["stack/norm"]
    jax.tree.map(partial(assert_close, rtol=1e-6), later, expected)
    first = before(BATCHES[0])["stack/norm"]
    assert np.all(np.abs(first.mean - later.mean).max(-1) > 1e-3), "of every layer"


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_linen_layers_with_split_keys(lift):
    axes = {"params": 0, "batch_stats": 0, "batch_moments": 0}
    split = {"params": True, "dropout": True, "noise": True}

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return Net(name="net")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            if lift == "scan":
                return nn.scan(Body, axes, split_rngs=split, length=3)(name="b")(
                    x, None
                )
            lifted = {"variable_axes": axes, "split_rngs": split}
            over = nn.vmap(Body, in_axes=None, axis_size=3, **lifted)
            return over(name="b")(x)

    rngs = {"params": KEY, "dropout": jax.random.key(1), "noise": jax.random.key(2)}
    variables = Model().init(rngs, BATCHES[0])
    f = jaxbn.linen.moments_fn(Model(), variables, rngs=rngs)
    first, second = (f(BATCHES[0])["b/net/BatchNorm_0"].mean for _ in range(2))
    assert first.shape == (3, 16)
    assert np.all(np.abs(first - second).max(-1) > 1e-3)
    own = {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}
    _, new = Model().apply(variables, BATCHES[0], rngs=own, mutable=["batch_moments"])
    assert_close(new["batch_moments"]["b"]["net"]["BatchNorm_0"]["mean"], second, 1e-6)


def measured(kind, **traced):
    """`moments_fn`, and how often its model has been traced."""
    times = []
    if kind == "nnx":
        model = nnx_net()
        method = lambda model, x: (times.append(0), model(x))
        return jaxbn.nnx.moments_fn(model, method=method), "norm", times
    variables = Net().init(KEY, BATCHES[0])
    method = lambda net, x: (times.append(0), net(x))
    f = jaxbn.linen.moments_fn(Net(), variables, rngs=KEY, method=method)
    return f, "BatchNorm_0", times


both = pytest.mark.parametrize("kind", ["linen", "nnx"])


@both
def test_nothing_is_compiled_again(kind):
    f, name, times = measured(kind)
    first, *_, last = (f(BATCHES[0])[name].mean for _ in range(4))
    assert len(times) == 1
    assert not np.allclose(first, last, atol=1e-3)


@both
def test_inside_of_other_traces_nothing_leaks(kind):
    f, name, _ = measured(kind)
    again, _, _ = measured(kind)
    stacked = jnp.stack(BATCHES[:2])
    expected = again(BATCHES[0])[name].mean
    assert_close(jax.jit(f)(BATCHES[0])[name].mean, expected, rtol=1e-5)
    _, m = jax.lax.scan(lambda c, x: (c, f(x)[name].mean), 0, stacked)
    assert_close(m[0], expected, rtol=1e-5)
    assert jax.eval_shape(f, BATCHES[0])[name].mean.shape == (16,)
    # It was no call of its own.
    assert_close(f(BATCHES[0])[name].mean, expected, rtol=1e-5)
    assert_close(jax.vmap(f)(stacked)[name].mean.shape, (2, 16))
    loss = lambda x: f(x)[name].var.sum()
    assert np.isfinite(jax.grad(loss)(BATCHES[0])).all()
    assert np.isfinite(f(BATCHES[0])[name].mean).all()


@both
def test_batches_on_other_devices_than_the_last_one(kind):
    f, name, _ = measured(kind)
    again, _, _ = measured(kind)
    devices = jax.devices()
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    for place in (everywhere, devices[1], devices[2]):
        got = f(jax.device_put(BATCHES[0], place))[name]
        assert_close(got.mean, again(BATCHES[0])[name].mean, rtol=1e-5)


# What it is compiled for


@dataclasses.dataclass
class Config:
    """Not hashable, as the configuration of public EfficientNets."""

    widths: list


class Configured(nnx.Module):
    def __init__(self, cls=jaxbn.nnx.BatchNorm):
        self.config = Config([1, 2])
        self.norm = cls(16, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x * self.config.widths[1])


class LinenConfigured(nn.Module):
    config: Config
    cls: type = jaxbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        return self.cls(False)(x * self.config.widths[1])


def test_an_nnx_model_that_cannot_be_hashed():
    model = Configured(nnx.BatchNorm)
    x, expected = BATCHES[0], 2 * np.mean(BATCHES[0], 0)
    with jaxbn.nnx.replace_batch_norm(model, accumulate=True):
        nnx.jit(lambda model, x: model(x))(model, x)
        jaxbn.nnx.end_accumulation(model)
    jaxbn.nnx.replace_batch_norm(model)
    stats = recalibrate(jaxbn.nnx.moments_fn(model), [x, x])
    assert_close(stats["norm"].mean, expected, rtol=1e-5)
    jaxbn.nnx.load_stats(model, stats)
    assert_close(jaxbn.nnx.running_stats(model)["norm"].mean, expected, rtol=1e-5)

    model.eval()
    graphdef, state = nnx.split(model)
    infer = lambda state, x: nnx.merge(graphdef, state)(x)
    folded, params = jaxbn.folding.fold(infer, state, x)
    assert_close(folded(params, x), model(x), rtol=1e-5, atol=1e-5)
    assert len(jaxbn.folding.report(infer, state, x).layers) == 1


def test_a_linen_model_that_cannot_be_hashed():
    config = Config([1, 2])
    x, expected = BATCHES[0], 2 * np.mean(BATCHES[0], 0)
    theirs, net = LinenConfigured(config, nn.BatchNorm), LinenConfigured(config)
    variables = net.init(KEY, x)
    f = jaxbn.linen.moments_fn(net, variables)
    stats = recalibrate(f, [x, x])
    assert_close(stats["BatchNorm_0"].mean, expected, rtol=1e-5)
    variables = jaxbn.linen.load_stats(variables, stats)
    same = jaxbn.linen.running_stats(variables)["BatchNorm_0"]
    assert_close(same.mean, expected, rtol=1e-5)

    ours = jaxbn.linen.replace_batch_norm(theirs)
    variables = ours.init(KEY, x)
    stats = recalibrate(jaxbn.linen.moments_fn(ours, variables), [x, x])
    assert_close(stats["BatchNorm_0"].mean, expected, rtol=1e-5)
    with jaxbn.linen.replacing():
        stats = recalibrate(jaxbn.linen.moments_fn(theirs, variables), [x, x])
    assert_close(stats["BatchNorm_0"].mean, expected, rtol=1e-5)


def scaled(model, x):
    return model(2 * x)


@both
def test_functions_for_equal_models_share_a_program(kind):
    times = []

    class Counted(Net):
        def __call__(self, x):
            times.append(0)
            return super().__call__(x)

    class CountedNNX(NNXNet):
        def __call__(self, x):
            times.append(0)
            return super().__call__(x)

    for _ in range(2):
        for own in ({}, {"method": scaled}):
            if kind == "nnx":
                model = CountedNNX(nnx.Rngs(0, noise=1))
                jaxbn.nnx.moments_fn(model, **own)(BATCHES[0])
            else:
                variables = Net().init(KEY, BATCHES[0])
                f = jaxbn.linen.moments_fn(Counted(), variables, rngs=KEY, **own)
                f(BATCHES[0])
    assert len(times) == 2


# What it holds


def use_replacement(model):
    jaxbn.nnx.replace_batch_norm(model)


def use_context(model):
    with jaxbn.nnx.replace_batch_norm(model):
        model(BATCHES[0])


def use_moments(model):
    jaxbn.nnx.replace_batch_norm(model)
    jaxbn.nnx.moments_fn(model)(BATCHES[0])


def use_method_that_holds_it(model):
    jaxbn.nnx.replace_batch_norm(model)
    method = lambda own, x: own(x * model.norm.epsilon)
    jaxbn.nnx.moments_fn(model, method=method)(BATCHES[0])
    jaxbn.nnx.moments_fn(model, method=partial(method))(BATCHES[0])


def use_bound_method(model):
    jaxbn.nnx.replace_batch_norm(model)
    f = jaxbn.nnx.moments_fn(model, method=model.apart)
    f(BATCHES[0])


def use_stats(model):
    jaxbn.nnx.replace_batch_norm(model, accumulate=True)
    model(BATCHES[0])
    jaxbn.nnx.load_stats(model, jaxbn.nnx.running_stats(model))
    jaxbn.nnx.end_accumulation(model)


class Held(Configured):
    def __init__(self):
        super().__init__(nnx.BatchNorm)
        self.config = None

    def __call__(self, x):
        return self.norm(x)

    def apart(self, own, x):
        return own(x * self.norm.epsilon)


@pytest.mark.parametrize(
    "use",
    [
        use_replacement,
        use_context,
        use_moments,
        use_method_that_holds_it,
        use_bound_method,
        use_stats,
    ],
)
def test_nothing_holds_an_nnx_model_but_its_owner(use):
    model = Held()
    use(model)
    held = model, model.norm, model.norm.scale[...], model.norm.mean[...]
    kept = list(map(weakref.ref, held))
    del model, held
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4


@pytest.mark.parametrize("how", ["call", "method", "replaced", "context"])
def test_nothing_holds_variables_of_linen(how):
    theirs = nn.BatchNorm(use_running_average=False)
    variables = theirs.init(KEY, BATCHES[0])
    net = jaxbn.linen.BatchNorm(False)
    call = {}
    if how == "method":
        call["method"] = lambda net, x, own=variables: net(
            x + own["params"]["bias"][None]
        )
    if how == "replaced":
        net = jaxbn.linen.replace_batch_norm(theirs)
    if how == "context":
        with jaxbn.linen.replacing():
            jaxbn.linen.moments_fn(theirs, variables)(BATCHES[0])
    f = jaxbn.linen.moments_fn(net, variables, **call)
    stats = recalibrate(f, BATCHES[:2])
    variables = jaxbn.linen.load_stats(variables, stats)
    kept = [weakref.ref(leaf) for leaf in jax.tree.leaves((variables, stats))]
    kept.append(weakref.ref(f))
    del variables, stats, f, call
    gc.collect()
    assert not any(ref() is not None for ref in kept)


# What it is given


Y = jnp.arange(8)
PAIRS = {
    "tuples": [(x, Y) for x in BATCHES[:2]],
    "lists": [[x, Y] for x in BATCHES[:2]],
    "dicts": [{"image": x, "label": Y} for x in BATCHES[:2]],
    "pairs of one shape": [(x, x) for x in BATCHES[:2]],
}


def first_of(batch):
    return batch["image"] if isinstance(batch, dict) else batch[0]


def functions_of_parts(kind, method=None):
    own = {} if method is None else {"method": method}
    if kind == "nnx":
        return jaxbn.nnx.moments_fn(Configured(), **own)
    net = jaxbn.linen.BatchNorm(False)
    return jaxbn.linen.moments_fn(net, net.init(KEY, BATCHES[0]), **own)


@both
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("function", [collect, recalibrate])
def test_batches_of_several_parts(kind, pairs, function):
    """The error is the model's own, and says what to do."""
    with pytest.raises(TypeError) as raised:
        function(functions_of_parts(kind), PAIRS[pairs])
    (note,) = raised.value.__notes__[-1:]
    of = "dict of ['image', 'label']" if pairs == "dicts" else "of 2"
    assert "batch that `moments_fn` was given is a " in note
    assert of in note
    assert "`method=lambda model, batch: model(batch[0])`" in note
    assert "(x for x, _ in batches)" in note
    method = lambda model, batch: model(first_of(batch))
    function(functions_of_parts(kind, method), PAIRS[pairs])
    function(functions_of_parts(kind), map(first_of, PAIRS[pairs]))


def test_an_error_of_one_array_has_no_such_note():
    with pytest.raises(ValueError, match="is for features of shape") as raised:
        collect(functions_of_parts("linen"), [BATCHES[0][:, :3]])
    assert "`moments_fn` was given" not in "".join(
        getattr(raised.value, "__notes__", [])
    )


@pytest.mark.parametrize("x", [(BATCHES[0], BATCHES[0]), [[1.0, 2.0]], {"x": Y}])
def test_a_module_takes_no_container_for_an_array(x):
    """JAX would stack arrays of one shape, and all would be normalized together."""
    net = jaxbn.linen.BatchNorm(False)
    module = jaxbn.nnx.BatchNorm(16, rngs=nnx.Rngs(0))
    for call in (lambda: net.init(KEY, x), lambda: module(x)):
        with pytest.raises(TypeError, match="`x` must be an array, got a "):
            call()
