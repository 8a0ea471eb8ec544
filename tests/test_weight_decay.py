"""`interop.optax.weight_decay_mask` on every kind of parameters."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
from data import assert_close
from flax import nnx
from flax.traverse_util import flatten_dict

import jaxbn

X = jnp.ones((2, 3))
OPTIMIZER = optax.adamw(
    1.0, weight_decay=0.5, mask=jaxbn.interop.optax.weight_decay_mask
)


class Named(NamedTuple):
    scale: jax.Array
    weight: jax.Array
    norms: list


def linen_params():
    net = nn.Sequential([nn.Dense(4), jaxbn.linen.BatchNorm(False)])
    return net.init(jax.random.key(0), X)["params"]


def layer_params():
    params, _ = jaxbn.layers.standard().init(3)
    return {"kernel": jnp.ones((2, 3)), "norm": params}


def attribute_params():
    layer = jaxbn.layers.standard().init(3)[0]
    return Named(jnp.ones(3), jnp.ones(3), [layer, {"scale": {"kernel": jnp.ones(2)}}])


@pytest.mark.parametrize("make", [linen_params, layer_params, attribute_params])
def test_decays_matrices_only(make):
    params = jax.tree.map(lambda a: a + 1, make())
    no_gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = OPTIMIZER.update(no_gradient, OPTIMIZER.init(params), params)
    decayed = 0
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        last = str(path[-1])
        if "scale" in last or "bias" in last:
            np.testing.assert_array_equal(update, 0)
        else:
            assert np.all(update != 0)
            decayed += 1
    assert decayed


def test_nnx_optimizer():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), jaxbn.nnx.BatchNorm(4, rngs=rngs)
    )
    linear, norm = model.layers
    kernel = linear.kernel[...]
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(norm.scale[...], 1)
    np.testing.assert_array_equal(linear.bias[...], 0)
    assert_close(linear.kernel[...], kernel / 2, 1e-6)


def test_trees_without_names():
    mask = jaxbn.interop.optax.weight_decay_mask
    assert mask(1.0) is True
    assert mask([1.0, (2.0,)]) == [True, (True,)]


def test_flattened_trees():
    mask = jaxbn.interop.optax.weight_decay_mask
    params = linen_params()
    for sep in (None, "/", "."):
        flat = flatten_dict(params, sep=sep)
        assert mask(flat) == flatten_dict(mask(params), sep=sep)


MASK = jaxbn.interop.optax.weight_decay_mask


def decayed(params, **options):
    """The paths of what one step with decay 0.5 and no gradients has halved."""
    params = jax.tree.map(lambda a: jnp.ones_like(a) + jnp.abs(a), params)
    mask = functools.partial(MASK, **options) if options else MASK
    optimizer = optax.adamw(1.0, weight_decay=0.5, mask=mask)

    @jax.jit
    def step(params):
        no_gradient = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(no_gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    new = step(params)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    old = jax.tree_util.tree_leaves_with_path(params)
    found = set()
    for (path, before), after in zip(old, jax.tree.leaves(new), strict=True):
        ratio = np.unique(np.asarray(after / before))
        assert ratio.tolist() in ([0.5], [1.0])
        if ratio == 0.5:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found.add(name.removesuffix("/value"))
    return found


class Norms(nn.Module):
    """Every norm that linen and jaxbn have, and layers beside them."""

    @nn.compact
    def __call__(self, x):
        c = jnp.ones((2, 7))
        variants = jaxbn.linen
        conditional = functools.partial(variants.ConditionalBatchNorm, False)
        nn.BatchNorm(False)(x)
        for norm in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm):
            options = {"num_groups": 3} if norm is nn.GroupNorm else {}
            norm(**options, name=f"my_{norm.__name__}")(x)
        nn.SpectralNorm(nn.Dense(3, name="spectral"))(x, update_stats=True)
        nn.WeightNorm(nn.Dense(3, name="weight"))(x)
        nn.MultiHeadDotProductAttention(1, normalize_qk=True, name="heads")(x, x)
        nn.PReLU(name="prelu")(x)
        conditional(embedding_size=7)(x, condition=c)
        conditional(num_classes=2)(x, condition=jnp.zeros(2, int))
        domain = variants.DomainBatchNorm(False, num_domains=2)
        domain(x, domain_ids=jnp.zeros(2, int))
        nn.LayerNorm(use_scale=False, name="bias_only")(x)
        nn.LayerNorm(use_bias=False, name="scale_only")(x)


LINEN_DENSE = {
    *(f"heads/{name}" for name in ("query", "key", "value", "out")),
    *("spectral", "weight"),
}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("sep", ["nested", None, "/", "."])
def test_norms_of_linen(biases, sep):
    params = Norms().init(jax.random.key(0), jnp.ones((2, 4, 4, 3)))["params"]
    expected = {f"{name}/kernel" for name in LINEN_DENSE} | {"prelu/negative_slope"}
    if biases:
        expected |= {f"{name}/bias" for name in LINEN_DENSE}
    mask = MASK(params, biases=biases)
    if sep != "nested":
        flat = MASK(flatten_dict(params, sep=sep), biases=biases)
        assert flat == flatten_dict(mask, sep=sep)
    assert decayed(params, biases=biases) == expected


@pytest.mark.parametrize("biases", [False, True])
def test_norms_of_nnx(biases):
    rngs = nnx.Rngs(0)
    make = {
        "bn": nnx.BatchNorm(3, rngs=rngs),
        "ln": nnx.LayerNorm(3, rngs=rngs),
        "gn": nnx.GroupNorm(3, 3, rngs=rngs),
        "rms": nnx.RMSNorm(3, rngs=rngs),
        "inn": nnx.InstanceNorm(3, rngs=rngs),
        "sn": nnx.SpectralNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs),
        "cond": jaxbn.nnx.ConditionalBatchNorm(3, embedding_size=7, rngs=rngs),
        "domain": jaxbn.nnx.DomainBatchNorm(3, num_domains=2, rngs=rngs),
        "dense": nnx.Linear(3, 4, rngs=rngs),
    }
    params = nnx.state(nnx.Dict(make), nnx.Param)
    leaves = ("kernel", "bias") if biases else ("kernel",)
    dense = ("sn/layer_instance", "dense")
    assert decayed(params, biases=biases) == {f"{d}/{n}" for d in dense for n in leaves}


@pytest.mark.parametrize("biases", [False, True])
def test_norms_of_the_layers(biases):
    layers = jaxbn.layers
    made = {
        "standard": layers.standard(),
        "ghost": layers.ghost(num_groups=2),
        "renorm": layers.renorm(),
        "domain": layers.domain(num_domains=2),
        "classes": layers.conditional(num_classes=2),
        "embedding": layers.conditional(embedding_size=7),
        "bias_kernel_alone": layers.conditional(embedding_size=7, use_scale=False),
        "streaming": layers.streaming(),
        "in_place": layers.in_place(),
    }
    params = {name: layer.init(3)[0] for name, layer in made.items()}
    assert decayed(params, biases=biases) == set()


@pytest.mark.parametrize("biases", [False, True])
def test_norms_of_haiku(biases):
    hk = pytest.importorskip("haiku", reason=peers.MISSING)

    def net(x):
        hk.BatchNorm(True, True, 0.9)(x, True)
        hk.LayerNorm(-1, True, True, name="any_name")(x)
        hk.InstanceNorm(True, True)(x)
        hk.GroupNorm(3)(x)
        hk.RMSNorm(-1)(x)
        hk.LayerNorm(-1, False, True, name="offset_only")(x)
        hk.Conv2D(3, 3, name="conv")(x)
        hk.Linear(3, name="dense")(x)

    init = hk.transform_with_state(net).init
    params, _ = init(jax.random.key(0), jnp.ones((2, 4, 4, 3)))
    names = ("w", "b") if biases else ("w",)
    expected = {f"{layer}/{name}" for layer in ("conv", "dense") for name in names}
    assert decayed(params, biases=biases) == expected


def equinox_model(eqx):
    class Own(eqx.nn.LayerNorm):  # As users name their own.
        pass

    class Block(eqx.Module):
        by_name: dict
        weight: jax.Array  # of one axis, and of no norm
        none: None = None

    key = jax.random.key(0)
    linear = eqx.nn.Linear(3, 4, key=key)
    by_name = {
        "bn": eqx.nn.BatchNorm(3, "batch", mode="batch"),
        "ema": eqx.nn.BatchNorm(3, "batch", mode="ema"),
        "ln": eqx.nn.LayerNorm((4, 3)),
        "own": Own((4, 3)),
        "gn": eqx.nn.GroupNorm(1, 3),
        "plain": eqx.nn.GroupNorm(1, 3, channelwise_affine=False),
        "rms": eqx.nn.RMSNorm(3),
        "sn": eqx.nn.SpectralNorm(linear, "weight", key=key),
        "wn": eqx.nn.WeightNorm(linear),
        "list": [linear, eqx.nn.LayerNorm(3)],
        "gru": eqx.nn.GRUCell(3, 4, key=key),
    }
    return Block(by_name, jnp.ones(3))


@pytest.mark.parametrize("biases", [False, True])
def test_norms_of_equinox(biases):
    eqx = pytest.importorskip("equinox", reason=peers.MISSING)
    model, _ = eqx.nn.make_with_state(equinox_model)(eqx)
    params = eqx.filter(model, eqx.is_inexact_array)
    layers = ("sn/layer", "wn/layer", "list/0")
    expected = {f"by_name/{name}/weight" for name in layers}
    expected |= {"weight", "by_name/gru/weight_ih", "by_name/gru/weight_hh"}
    if biases:
        expected |= {f"by_name/{name}/bias" for name in layers}
        expected |= {"by_name/gru/bias", "by_name/gru/bias_n"}
    assert decayed(params, biases=biases) == expected
    mask = MASK(params)
    assert mask.none is None
    assert mask.by_name["plain"].weight is None


@pytest.mark.parametrize("biases", [False, True])
def test_norms_of_keras(biases):
    keras = pytest.importorskip("keras", reason=peers.MISSING)
    norms = keras.layers
    net = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            norms.Conv2D(3, 1, name="conv"),
            norms.BatchNormalization(name="any_name"),
            norms.LayerNormalization(),
            norms.GroupNormalization(3),
            norms.RMSNormalization(),
            norms.SpectralNormalization(norms.Conv2D(3, 1, name="inner"), name="sn"),
        ],
        name="net",
    )
    params = {v.path: jnp.asarray(v) for v in net.trainable_variables}
    layers = ("net/conv", "net/sn/inner")
    names = ("kernel", "bias") if biases else ("kernel",)
    expected = {f"{layer}/{name}" for layer in layers for name in names}
    assert decayed(params, biases=biases) == expected


@pytest.mark.parametrize("biases", [False, True])
def test_norms_of_torch(biases):
    """`named_parameters()` of a model, as a dict."""
    nn = pytest.importorskip("torch", reason=peers.MISSING).nn
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4), nn.RMSNorm(4),
        nn.LSTM(4, 4),
    )  # fmt: skip
    named = net.named_parameters()
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in named}
    expected = {"0.weight", "6.weight_ih_l0", "6.weight_hh_l0"}
    if biases:
        expected |= {"0.bias", "6.bias_ih_l0", "6.bias_hh_l0"}
    assert decayed(params, biases=biases) == expected


def test_boxes_and_shapes():
    box = nn.Partitioned(jnp.ones(3), ("features",))
    mask = MASK({"norm": {"scale": box}, "dense": {"kernel": box}})
    assert jax.tree.leaves(mask) == [True, False]
    shapes = jax.eval_shape(lambda: {"bn.weight": jnp.ones(3), "w": jnp.ones(3)})
    assert MASK(shapes) == {"bn.weight": False, "w": True}


def test_the_option_is_checked():
    with pytest.raises(TypeError, match="`biases` must be True or False, got 'no'"):
        MASK({}, biases="no")
