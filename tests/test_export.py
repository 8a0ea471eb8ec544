"""Programs that leave the process: symbolic batches, and no kernels where declined."""

import os
import re
import subprocess
import sys
from functools import partial

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers
from flax import nnx
from jax import export

import jaxbn
from jaxbn._kernels import sums as kernels

CASES = family.CASES | {
    name: family.Case(lambda own=own, **o: jaxbn.layers.standard(**own, **o), None)
    for name, own in {
        "example_weight": {"example_weight": 0.1},
        "pseudo_samples": {"pseudo_samples": 3},
    }.items()
}
KERNEL = r"custom_call @jaxbn_\w+"
CALLS = [
    export.DisabledSafetyCheck.custom_call(f"jaxbn_{name}")
    for name in ("moments", "cotangents", "input_cotangent")
]


def program(case, training, **options):
    """A step of training, or inference, and its further inputs for 8 examples."""
    layer = case.make(momentum=0.9, **options)
    params, state = layer.init(family.FEATURES)
    given = family.inputs(case, jnp.float32)

    def f(x, w, given):
        def loss(params, x):
            y, new = layer.apply(
                params, state, x, training=training, weights=w, **given
            )
            return jnp.sum(jnp.sin(jnp.where(w, y, 0))), (y, new)

        if training:
            return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return loss(params, x)[1]

    return f, given


def exported(f, spec, given):
    shape = export.symbolic_shape(spec)
    batch = lambda a: jax.ShapeDtypeStruct((shape[0], *a.shape[1:]), a.dtype)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    w = jax.ShapeDtypeStruct((shape[0], *[1] * (len(shape) - 1)), jnp.bool_)
    f = jax.jit(f)
    return export.export(f, disabled_checks=CALLS)(x, w, jax.tree.map(batch, given))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_symbolic_batch_without_kernels(name, training):
    f, given = program(CASES[name], training, implementation="xla")
    step = exported(f, "4*b, 2, 3" if name.startswith("ghost") else "b, 2, 3", given)
    assert not re.findall(KERNEL, step.mlir_module())
    w = np.arange(8).reshape(8, 1, 1) % 3 > 0
    args = numbers((8, 2, 3), "float32"), w, given
    close = lambda a, b: assert_close(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, step.call(*args), jax.jit(f)(*args))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", ["4*b, 3", "4*b, h, 3"])
@pytest.mark.parametrize("name", CASES)
def test_a_symbolic_batch_with_kernels_where_they_can_be_used(name, training, spec):
    f, given = program(CASES[name], training)
    text = exported(f, spec, given).mlir_module()
    if name in ("standard", "classes") and training:
        assert "jaxbn_moments" in text or kernels._missing()


@pytest.mark.parametrize("name", ["ghost", "ghost strided"])
def test_groups_of_any_batch_are_refused(name):
    f, given = program(CASES[name], training=True)
    with pytest.raises(ValueError, match=r"does not divide.*Export a batch of `2\*b`"):
        exported(f, "b, 3", given)


MODULES = {
    "BatchNorm": {},
    "GhostBatchNorm": {"group_size": 2},
    "BatchRenorm": {},
    "StreamingBatchNorm": {},
    "InPlaceBatchNorm": {},
    "DomainBatchNorm": {"num_domains": 2},
    "ConditionalBatchNorm": {"num_classes": 2},
}
INPUTS = {"DomainBatchNorm": "domain_ids", "ConditionalBatchNorm": "condition"}


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_decline_kernels_have_none(name):
    x, options = numbers((8, 3), "float32"), {"implementation": "xla", **MODULES[name]}
    given = {INPUTS[name]: 1} if name in INPUTS else {}

    def of_linen(x):
        module = getattr(jaxbn.linen, name)(False, **options)
        return module.init_with_output(jax.random.key(0), x, **given)[0]

    def of_nnx(x):
        return getattr(jaxbn.nnx, name)(3, rngs=nnx.Rngs(0), **options)(x, **given)

    def loss(x, f):
        return jnp.sum(f(x) ** 3)

    for f in (of_linen, of_nnx):
        text = jax.jit(jax.grad(loss), static_argnums=1).lower(x, f).as_text()
        assert not re.findall(KERNEL, text)


STATES = {
    "RunningStats": jaxbn.init_stats(2),
    "Moments": jaxbn.moments(jnp.ones((3, 2))),
    "RenormStats": jaxbn.layers.renorm().init(2)[1],
}


@pytest.mark.parametrize("name", STATES)
def test_functions_of_states_are_saved_and_loaded(name):
    """As arguments and as results, in a tree."""
    tree = {"own": STATES[name]}
    double = jax.jit(lambda tree: jax.tree.map(lambda a: 2 * a, tree))
    saved = export.export(double)(tree).serialize()
    loaded = export.deserialize(saved).call(tree)
    assert type(loaded["own"]) is type(STATES[name])
    jax.tree.map(assert_close, loaded, double(tree))


def test_a_step_is_saved_with_a_symbolic_batch():
    layer = jaxbn.layers.standard(implementation="xla")
    params, state = layer.init(3)

    def step(params, state, x):
        return layer.apply(params, state, x, training=True)

    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 3), jnp.float32)
    saved = export.export(jax.jit(step))(params, state, x).serialize()
    x = numbers((5, 3), "float32")
    y, new = export.deserialize(saved).call(params, state, x)
    wanted, expected = step(params, state, x)
    assert_close(y, wanted, 1e-5, 1e-5)
    jax.tree.map(partial(assert_close, rtol=1e-5), new, expected)


def test_a_module_that_is_loaded_again_registers_once():
    program = "import importlib, jaxbn; importlib.reload(jaxbn._running_stats)"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
