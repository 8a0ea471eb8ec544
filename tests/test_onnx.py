"""jaxbn's modules at inference, exported by jax2onnx and run by onnxruntime."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers
from flax import nnx
from peers import MISSING
from test_family_flax import FAMILY

import jaxbn

X = numbers((4, 6, 6, 3), "float32", mean=3.0)
KEY = jax.random.key(0)
# jax2onnx reads the variables of nnx in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:'.value' access is now deprecated")


def assert_exported(infer, x):
    """The exported program gives what the function does."""
    jax2onnx = pytest.importorskip("jax2onnx", reason=MISSING)
    onnxruntime = pytest.importorskip("onnxruntime", reason=MISSING)
    exported = jax2onnx.to_onnx(infer, [jax.ShapeDtypeStruct(x.shape, x.dtype)])
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    (name,) = (given.name for given in session.get_inputs())
    (y,) = session.run(None, {name: np.asarray(x)})
    assert_close(y, infer(x), rtol=1e-5, atol=1e-5)


def moved(tree):
    """Statistics and parameters that are not the initial ones."""
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
    return jax.tree.map(draw, tree)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(jaxbn.linen.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)))
        return nn.Dense(5)(norm(epsilon=1e-3)(x).mean((1, 2)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


@pytest.mark.parametrize("net", [jaxbn.linen.BatchNorm(True), Net()], ids=type)
def test_linen(net):
    variables = moved(net.init(KEY, X))
    assert_exported(lambda x: net.apply(variables, x), X)


@pytest.mark.parametrize("make", [partial(jaxbn.nnx.BatchNorm, 3), NNXNet])
def test_nnx(make):
    net = make(rngs=nnx.Rngs(0))
    nnx.update(net, moved(nnx.state(net)))
    net.eval()
    assert_exported(net, X)


@pytest.mark.parametrize("name", [n for n in FAMILY if FAMILY[n][0] != "BatchNorm"])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_variants(kind, name):
    x = numbers((8, 5, 3), "float32", mean=3.0)
    cls, _, own, given = FAMILY[name]
    if kind == "linen":
        layer = getattr(jaxbn.linen, cls)(True, **own)
        variables = layer.init(KEY, x, **given)
        assert_exported(lambda x: layer.apply(variables, x, **given), x)
    else:
        layer = getattr(jaxbn.nnx, cls)(3, rngs=nnx.Rngs(0), **own)
        layer.eval()
        assert_exported(lambda x: layer(x, **given), x)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_folded_programs(kind):
    if kind == "linen":
        variables, net = moved(Net().init(KEY, X)), Net()
        infer = lambda variables, x: net.apply(variables, x)
    else:
        net = NNXNet(rngs=nnx.Rngs(0))
        net.eval()
        graphdef, variables = nnx.split(net)
        variables = moved(variables)
        infer = lambda state, x: nnx.merge(graphdef, state)(x)
    folded_fn, folded = jaxbn.folding.fold(infer, variables, X)
    assert_exported(lambda x: folded_fn(folded, x), X)
    assert_close(folded_fn(folded, X), infer(variables, X), 1e-4, 1e-5)


def test_branches_that_are_merged():
    class Branches(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = partial(jaxbn.linen.BatchNorm, True)
            y = norm()(nn.Conv(3, (3, 3))(x)) + norm()(nn.Conv(3, (1, 1))(x))
            return nn.relu(y + norm()(x))

    net = Branches()
    variables = moved(net.init(KEY, X))
    infer = lambda variables, x: net.apply(variables, x)
    folded_fn, folded = jaxbn.folding.fold(infer, variables, X)
    assert len(folded) == 2
    assert_exported(lambda x: folded_fn(folded, x), X)


def test_features_are_refused_as_ever_while_exporting():
    jax2onnx = pytest.importorskip("jax2onnx", reason=MISSING)
    net = jaxbn.nnx.BatchNorm(2, use_running_average=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`num_features` is for features of shape"):
        jax2onnx.to_onnx(net, [jax.ShapeDtypeStruct(X.shape, X.dtype)])
