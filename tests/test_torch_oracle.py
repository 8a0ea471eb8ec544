"""torch's own sample inputs, which its wheel carries, as an oracle.

torch tests its operators and modules on inputs that `OpInfo` and `ModuleInfo` describe.
Here jaxbn and torch compute the same on them. What means something else in torch:
momentum is the weight of the new value, the running variance is unbiased (and batches
are normalized by the biased one), channels are axis 1.
"""

import importlib
import inspect
import itertools
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers, wide

import jaxbn
import jaxbn.linen

OPERATORS = "torch.testing._internal.common_methods_invocations"
MODULES = "torch.testing._internal.common_modules"
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1.6e-2}
PARTS = ("output", "statistics", "gradients", "second order")
PARAMETERS = {"weight": "scale", "bias": "bias"}


@pytest.fixture(scope="module")
def torch():
    """torch and its samples; not imported at the top, for that takes seconds."""
    require = partial(pytest.importorskip, reason="`make peers` installs it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch imports is not ours to mend
        torch = require("torch")
        require("expecttest")  # which the samples import
        importlib.import_module(OPERATORS)
        importlib.import_module(MODULES)
    return torch


@pytest.fixture(autouse=True)
def wide_if_asked(dtype):
    with jax.enable_x64(dtype == "float64"):
        yield


def to_jax(tensor, dtype):
    if tensor is None:
        return None
    return jnp.asarray(tensor.detach().double().numpy().astype(jnp.dtype(dtype)))


def to_torch(array, like):
    return like.new_tensor(wide(array))


def random_like(array, seed):
    return numbers(array.shape, array.dtype, seed, mean=0)


def assert_same(got, expected, tol, what):
    """Every leaf, beside its largest element: small ones are differences of large."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected), what
    for array, tensor in zip(got, expected, strict=True):
        truth = tensor.detach().double().numpy()
        assert array.shape == truth.shape, what
        assert str(tensor.dtype) == f"torch.{array.dtype}", what
        size = max(1, np.abs(truth).max(initial=0))
        assert_close(wide(array), truth, 0, tol * size, err_msg=str(what))


def operator_samples(torch, name, dtype):
    database = importlib.import_module(OPERATORS).op_db
    operator = next(op for op in database if op.name == name)
    dtype = getattr(torch, dtype)
    assert dtype in operator.supported_dtypes("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return list(operator.reference_inputs("cpu", dtype, requires_grad=True))


def forward(case, operands):
    """The output, and the running mean and variance after it."""
    _, mean, var, _, _, training, momentum, epsilon = case
    x, scale, bias = operands
    mean, var = to_jax(mean, x.dtype), to_jax(var, x.dtype)
    # An empty vector is torch's way to have no channels.
    options = {"feature_axes": min(1, x.ndim - 1), "epsilon": epsilon}
    if not training:
        return jaxbn.normalize(x, mean, var, scale, bias, **options), (mean, var)
    y, m = jaxbn.batch_norm(x, scale, bias, **options)
    if mean is None:
        return y, (mean, var)
    # An array: momentums below 0 are among the samples, and refused as a number.
    keep = jnp.asarray(1 - momentum)
    stats = jaxbn.RunningStats(mean, var, jnp.int32(0))
    return y, jaxbn.update(stats, m, momentum=keep, unbiased=True)[:2]


def derivatives(case, second, operands, dy, along):
    """Output, statistics, gradients; and if asked their own gradients, along some."""

    def gradients(dy, operands):
        y, pull, stats = jax.vjp(partial(forward, case), operands, has_aux=True)
        return pull(dy)[0], (y, stats)

    first, pull, (y, stats) = jax.vjp(gradients, dy, operands, has_aux=True)
    return y, stats, first, pull(along) if second else ()


def torch_derivatives(torch, case, second, dy, along):
    x, mean, var, weight, bias, *options = case
    given = [t for t in (x, weight, bias) if t is not None]
    stats = [t if t is None else t.clone() for t in (mean, var)]  # updated in place
    y = torch.nn.functional.batch_norm(x, *stats, weight, bias, *options)
    dy = to_torch(dy, y).requires_grad_()
    first = torch.autograd.grad(y, given, dy, create_graph=second)
    if not second:
        return y, stats, first, ()
    along = [to_torch(a, t) for a, t in zip(along, given, strict=True)]
    # Third order and nested forward mode are wrong in torch 2.13; this is right.
    second = torch.autograd.grad(first, [dy, *given], along, materialize_grads=True)
    return y, stats, first, second


NARROW = [pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "bfloat16")]


@pytest.mark.parametrize("dtype", ["float64", *NARROW])
def test_functional(torch, dtype):
    samples = operator_samples(torch, "nn.functional.batch_norm", dtype)
    assert len(samples) >= 12
    signature = inspect.signature(torch.nn.functional.batch_norm)
    second = dtype == "float64"
    for sample in samples:
        bound = signature.bind(sample.input, *sample.args, **sample.kwargs)
        bound.apply_defaults()
        case = x, _, _, weight, bias, *options = bound.args
        operands = [to_jax(tensor, dtype) for tensor in (x, weight, bias)]
        leaves, structure = jax.tree.flatten(operands)
        dy, *along = map(random_like, [leaves[0], *leaves], range(4))
        ours = jax.jit(partial(derivatives, case, second))(
            operands, dy, jax.tree.unflatten(structure, along)
        )
        theirs = torch_derivatives(torch, case, second, dy, along)
        for part, *both in zip(PARTS, ours, theirs, strict=True):
            assert_same(*both, TOLERANCE[dtype], (part, x.shape, *options))


@jax.jit
def saved_moments(x, epsilon):
    m = jaxbn.moments(x, feature_axes=1)
    return m.mean, jax.lax.rsqrt(m.var + epsilon)


@pytest.mark.parametrize("dtype", ["float64", *NARROW[:1]])
def test_saved_moments(torch, dtype):
    """In training, torch's operator also returns the mean and 1/√(variance + eps)."""
    samples = operator_samples(torch, "native_batch_norm", dtype)
    training = [s for s in samples if s.args[4]]
    assert len(training) >= 5
    for sample in training:
        got = saved_moments(to_jax(sample.input, dtype), sample.args[6])
        _, *saved = torch.native_batch_norm(sample.input, *sample.args)
        assert_same(got, saved, TOLERANCE[dtype], sample.args)


def module_samples(torch, name, dtype, steps=3):
    """Modules with random parameters, each with inputs for some steps."""
    database = importlib.import_module(MODULES).module_db
    info = next(i for i in database if i.module_cls is getattr(torch.nn, name))
    dtype = getattr(torch, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draw = partial(info.module_inputs_func, info, "cpu", dtype, True, True)
        for drawn in zip(*(draw() for _ in range(steps)), strict=True):
            given = drawn[0].constructor_input
            bn = info.module_cls(*given.args, **given.kwargs, dtype=dtype)
            for parameter in bn.parameters():
                torch.nn.init.normal_(parameter)
            yield bn, [sample.forward_input.args[0] for sample in drawn]


def options_of(bn, dtype):
    """A torch module's options, as those of `jaxbn.layers.standard`."""
    return {
        "momentum": jaxbn.cumulative() if bn.momentum is None else 1 - bn.momentum,
        "epsilon": bn.eps,
        "use_scale": bn.weight is not None,
        "use_bias": bn.bias is not None,
        "unbiased": True,
        # 0 is inference by the batch's own statistics.
        "pseudo_samples": None if bn.track_running_stats else 0.0,
        "param_dtype": dtype,
    }


def as_layer(options, dtype):
    """A function from state, parameters and x to the output and the new state."""
    layer = jaxbn.layers.standard(feature_axes=1, stats_dtype=dtype, **options)

    def run(state, training, params, x):
        return layer.apply(params, state, x, training=training)

    return run


def as_module(options, dtype):
    bn = jaxbn.linen.BatchNorm(axis=1, force_float32_reductions=False, **options)
    names = ["mean", "var"] + ["step"] * callable(bn.momentum)

    def run(state, training, params, x):
        stats = {name: getattr(state, name) for name in names}
        variables = {"params": params, "batch_stats": stats}
        y, new = bn.apply(variables, x, not training, mutable=["batch_stats"])
        return y, state._replace(**new["batch_stats"])

    return run


def step(run, state, params, x, dy):
    """One step of training, then inference, with gradients."""
    y, pull, state = jax.vjp(partial(run, state, True), params, x, has_aux=True)
    z, pull_z, _ = jax.vjp(partial(run, state, False), params, x, has_aux=True)
    return state, ((y, pull(dy)), (z, pull_z(dy)))


def torch_step(torch, bn, x, dy):
    def run(training):
        y = bn.train(training)(x)
        leaves = {PARAMETERS[name]: p for name, p in bn.named_parameters()}
        dx, *rest = torch.autograd.grad(y, [x, *leaves.values()], to_torch(dy, y))
        return y, (dict(zip(leaves, rest, strict=True)), dx)

    return run(training=True), run(training=False)


def module_cases():
    """Each make in one dtype, the thin adapter for one class; the rest is slow."""
    for i in (1, 2, 3):
        quick = [("float64", as_layer)] + [("float32", as_module)] * (i == 1)
        for case in itertools.product(["float64", "float32"], [as_layer, as_module]):
            marks = [] if case in quick else pytest.mark.slow
            yield pytest.param(f"BatchNorm{i}d", *case, marks=marks)


@pytest.mark.parametrize(("name", "dtype", "make"), list(module_cases()))
def test_modules(torch, name, dtype, make):
    samples = list(module_samples(torch, name, dtype))
    assert len(samples) >= 7
    for bn, inputs in samples:
        tol = TOLERANCE[dtype]
        state = jaxbn.init_stats(bn.num_features, dtype=dtype)
        params = {PARAMETERS[k]: to_jax(p, dtype) for k, p in bn.named_parameters()}
        compiled = jax.jit(partial(step, make(options_of(bn, dtype), dtype)))
        for tensor in inputs:
            x = to_jax(tensor, dtype)
            dy = random_like(x, 0)
            state, got = compiled(state, params, x, dy)
            assert_same(got, torch_step(torch, bn, tensor, dy), tol, bn)
            if bn.track_running_stats:  # or else they are never used
                assert_same(state[:2], (bn.running_mean, bn.running_var), tol, bn)
