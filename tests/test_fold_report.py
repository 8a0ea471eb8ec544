"""`folding.report` where nothing folds: what the program is, and what to do."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from data import numbers
from flax import nnx
from test_family_flax import FAMILY

import jaxbn
from jaxbn.folding import report

X = numbers((8, 3), "float32")
KEY = jax.random.key(0)
AS_IN_TRAINING = "as in training: what folds is inference by running statistics"


class Net(nn.Module):
    norm: type = jaxbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        return self.norm(use_running_average=not train)(nn.Dense(4)(x))


class Layers(nn.Module):
    """A scan over layers."""

    @nn.compact
    def __call__(self, x, train):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                norm = jaxbn.linen.BatchNorm(not train)
                return nn.relu(norm(nn.Dense(3)(x))), None

        axes = {"params": 0, "batch_stats": 0}
        scanned = nn.scan(Body, axes, split_rngs={"params": True}, length=2)
        return scanned(name="body")(x, None)[0]


def reported(net, train, of=lambda f: f):
    variables = net.init(KEY, X, False)
    mutable = ["batch_stats"] * train

    def run(variables, x):
        return net.apply(variables, x, train, mutable=mutable)

    return report(of(run), variables, X)


def nnx_reported(cls, given, **own):
    norm = getattr(jaxbn.nnx, cls)(3, rngs=nnx.Rngs(0), **own)
    graphdef, state = nnx.split(norm)
    infer = lambda state, x: nnx.merge(graphdef, state)(x, **given)
    return report(infer, state, X)


@pytest.mark.parametrize("derivatives", ["vjp", "jvp"])
@pytest.mark.parametrize("of", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_training_program(derivatives, of):
    net = Net(partial(jaxbn.linen.BatchNorm, derivatives=derivatives))
    (layer,) = reported(net, True, of).left
    assert layer.path == "params/BatchNorm_0"
    assert AS_IN_TRAINING in layer.reason
    assert "(`training=False`, `use_running_average=True`)" in layer.reason
    assert "custom" not in layer.reason
    assert len(reported(net, False, of).folded) == 1


@pytest.mark.parametrize("name", FAMILY)
def test_every_layer_in_training(name):
    cls, _, own, given = FAMILY[name]
    (layer,) = nnx_reported(cls, given, **own).left
    assert AS_IN_TRAINING in layer.reason
    inference = nnx_reported(cls, given | {"use_running_average": True}, **own)
    batch_at_inference = name == "standard"  # `example_weight`
    reasons = [layer.reason for layer in inference.left]
    assert all((AS_IN_TRAINING in r) == batch_at_inference for r in reasons)


def test_a_scan_over_layers():
    (layer,) = reported(Layers(), True).left
    assert layer.reason.startswith("it is inside `scan`, and normalized by the batch")
    (layer,) = reported(Layers(), False).left
    assert layer.reason == "it is inside `scan`"


def test_a_function_with_a_derivative_of_its_own_is_no_training():
    @jax.custom_vjp
    def own(y, stats):
        return jaxbn.normalize(y, stats.mean, stats.var)

    own.defvjp(lambda *given: (own(*given), None), lambda *_: (None, None))
    run = lambda stats, x: own(x, stats)
    (layer,) = report(run, jaxbn.init_stats(3), X).left
    assert layer.reason == "it is inside `custom_vjp_call`"


def test_no_batch_norm_of_jaxbn():
    for found in (
        reported(Net(nn.BatchNorm), False),
        reported(Net(nn.BatchNorm), True),
        report(lambda kernel, x: x @ kernel, jnp.ones((3, 2)), X),
    ):
        assert found.layers == ()
        first, last = str(found).splitlines()
        assert first.startswith("No batch norm of jaxbn found.")
        assert (
            "`jaxbn.linen.replace_batch_norm` or `jaxbn.nnx.replace_batch_norm`"
            in first
        )
        assert last == "0 folded, 0 left"
    replaced = jaxbn.linen.replace_batch_norm(Net(nn.BatchNorm))
    assert str(reported(replaced, False)).endswith("1 folded, 0 left")
