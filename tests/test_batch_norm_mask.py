"""`interop.optax.batch_norm_mask` on the parameters of every library."""

import jax
import jax.numpy as jnp
import optax
import peers
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from test_weight_decay import Norms, equinox_model

import jaxbn

MASK = jaxbn.interop.optax.batch_norm_mask
OF_LINEN = {
    "BatchNorm_0": {"scale", "bias"},
    "ConditionalBatchNorm_0": {"scale", "scale_kernel", "bias", "bias_kernel"},
    "ConditionalBatchNorm_1": {"scale", "bias"},
    "DomainBatchNorm_0": {"scale", "bias"},
}


def chosen(mask):
    """The paths at which a mask is True, of nested and flattened trees alike."""
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    names = (
        jax.tree_util.keystr(p, simple=True, separator="/") for p, v in leaves if v
    )
    return {name.replace(".", "/").removesuffix("/value") for name in names}


def of(layers):
    return {f"{layer}/{name}" for layer, names in layers.items() for name in names}


@pytest.fixture(scope="module")
def variables():
    return jax.eval_shape(Norms().init, jax.random.key(0), jnp.ones((2, 4, 4, 3)))


@pytest.mark.parametrize("sep", ["nested", "/", "."])
def test_linen_by_statistics(variables, sep):
    params, stats = variables["params"], variables["batch_stats"]
    if sep != "nested":
        params, stats = flatten_dict(params, sep=sep), flatten_dict(stats, sep=sep)
    # The statistics of SpectralNorm are no running mean.
    assert chosen(MASK(params, stats)) == of(OF_LINEN)


def test_linen_by_name(variables):
    named = {k: v for k, v in variables["params"].items() if not k.endswith("_only")}
    assert chosen(MASK(named)) == of(OF_LINEN)


def test_names_that_say_nothing(variables):
    with pytest.raises(ValueError, match=r"\['scale_only'\]. Pass `statistics`"):
        MASK(variables["params"])
    with pytest.raises(ValueError, match=r"\['norm_in'\]"):
        MASK({"norm_in": {"scale": 1.0}})
    params = {"norm": {"bias": 1.0}, "net": {"scale": 1.0}, "bias_of": {"bias": 1.0}}
    with pytest.raises(ValueError, match=r"\['net', 'norm'\]"):
        MASK(params)
    stats = {"norm": jaxbn.init_stats(1)}
    assert chosen(MASK(params, stats)) == {"norm/bias"}
    assert chosen(MASK(params["norm"], jaxbn.init_stats(1))) == {"bias"}


NAMES = {
    True: "BatchNorm_0 bn bn1 bn_proj norm1/BatchNorm_2 GhostBatchNorm_0 BatchRenorm_1 "
    "batch_norm batch_normalization_3 downsample/1/bn_2 InPlaceBatchNorm_0 batchnorm2",
    False: "LayerNorm_0 ln ln_1 GroupNorm_0 gn1 RMSNorm_0 rms_norm layer_norm_2 "
    "InstanceNorm_1 instance_norm bn/LayerNorm_0",
}


@pytest.mark.parametrize("own", [True, False])
def test_names(own):
    for name in NAMES[own].split():
        mask = MASK({f"net/{name}": {"scale": 1.0, "bias": 1.0}, "a": {"kernel": 1.0}})
        assert set(mask[f"net/{name}"].values()) == {own}, name
        assert mask["a"]["kernel"] is False


def test_nnx():
    rngs = nnx.Rngs(0)
    made = {
        "first": jaxbn.nnx.BatchNorm(3, rngs=rngs),
        "second": nnx.BatchNorm(3, rngs=rngs),
        "third": nnx.LayerNorm(3, rngs=rngs),
        "fourth": jaxbn.nnx.BatchRenorm(3, use_bias=False, rngs=rngs),
        "dense": nnx.Linear(3, 4, rngs=rngs),
    }
    model = nnx.Dict(made)
    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    both = {"scale", "bias"}
    expected = of({"first": both, "second": both, "fourth": {"scale"}})
    assert chosen(MASK(params, stats)) == expected


def test_layers():
    made = {
        "a": jaxbn.layers.standard(),
        "b": jaxbn.layers.conditional(embedding_size=7, use_scale=False),
        "c": jaxbn.layers.renorm(),
    }
    params, stats = zip(*(layer.init(3) for layer in made.values()), strict=True)
    params, stats = dict(zip(made, params)), dict(zip(made, stats))  # noqa: B905
    params["rms"] = {"scale": jnp.ones(3)}
    assert chosen(MASK(params, stats)) == chosen(
        {**jax.tree.map(lambda _: True, params), "rms": {"scale": False}}
    )


def test_haiku():
    hk = pytest.importorskip("haiku", reason=peers.MISSING)

    def net(x):
        hk.BatchNorm(True, True, 0.9, name="any_name")(x, True)
        hk.BatchNorm(True, False, 0.9)(x, True)
        hk.LayerNorm(-1, True, True, name="other")(x)
        hk.Linear(3)(x)

    init = hk.transform_with_state(net).init
    params, state = init(jax.random.key(0), jnp.ones((2, 4, 4, 3)))
    expected = of({"any_name": {"scale", "offset"}, "batch_norm": {"scale"}})
    assert chosen(MASK(params, state)) == expected


def test_equinox():
    eqx = pytest.importorskip("equinox", reason=peers.MISSING)
    model, _ = eqx.nn.make_with_state(equinox_model)(eqx)
    mask = MASK(eqx.filter(model, eqx.is_inexact_array))
    both = {"weight", "bias"}
    assert chosen(mask) == of({"by_name/bn": both, "by_name/ema": both})


def test_keras():
    keras = pytest.importorskip("keras", reason=peers.MISSING)
    norms = keras.layers
    net = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            norms.Conv2D(3, 1),
            norms.BatchNormalization(name="any_name"),
            norms.BatchNormalization(name="bn"),
            norms.LayerNormalization(name="other"),
        ],
        name="net",
    )
    params = {v.path: jnp.asarray(v) for v in net.trainable_variables}
    stats = {v.path: jnp.asarray(v) for v in net.non_trainable_variables}
    both = {"gamma", "beta"}
    expected = of({"net/any_name": both, "net/bn": both})
    assert chosen(MASK(params, stats)) == expected


def test_torch():
    torch = pytest.importorskip("torch", reason=peers.MISSING)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.LayerNorm(4)
    )
    params = {k: jnp.asarray(p.detach().numpy()) for k, p in net.named_parameters()}
    stats = {k: jnp.asarray(p.numpy()) for k, p in net.named_buffers()}
    assert chosen(MASK(params, stats)) == {"1/weight", "1/bias"}


def test_trains_batch_norms_alone(variables):
    params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), variables["params"])
    mask = MASK(params, variables["batch_stats"])
    rest = jax.tree.map(lambda own: not own, mask)
    optimizer = optax.selective_transform(optax.sgd(0.5), freeze_mask=rest)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    moved = jax.tree.map(lambda u: bool((u != 0).any()), updates)
    assert chosen(moved) == of(OF_LINEN)


def test_a_callable_mask():
    """optax calls a mask with the parameters, and with the updates."""
    params = {"bn": {"scale": jnp.ones(2)}, "dense": {"kernel": jnp.ones(2)}}
    optimizer = optax.masked(optax.set_to_zero(), MASK)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["bn"]["scale"].sum() == 0
    assert updates["dense"]["kernel"].sum() == 2
