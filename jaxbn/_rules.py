"""The derivative of batch norm, written by hand, in a `vjp` and a `jvp` form.

With δ = x − mean, inv = 1/√(var + ε), k = scale·inv, weights w and n = Σw, the output
y = δ·k + bias depends on x directly, and through mean and var:

    dmean = Σw·dx / n            dvar = 2·Re Σw·conj(δ)·dx / n
    dy    = k·(dx − dmean) − ½·k·inv²·δ·dvar + inv·δ·dscale + dbias

`jvp_form` is this map. `vjp_form` is its transpose, with the cotangent c of y:

    ct(x)     = k·c − (w/n)·(Σk·c + conj(δ)·inv²·Re Σk·c·δ)
    ct(scale) = Σc·δ·inv         ct(bias) = Σc

Neither form computes the moments: they are operands. The rules say how y depends on x
in all, moments included, so that the operands themselves count as constant, but only to
the first order (`_constant_to_first_order`): the derivatives of a rule see all of them.
What is kept for the backward pass is x, in its own dtype, and feature vectors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _axes, _devices, _dtypes, _kernels, _sums
from jaxbn._kernels import GPUS, Operation
from jaxbn._normalize import inverse_deviation, normalize, normalize_shifted

GPU_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Static(NamedTuple):
    """What must be known while tracing."""

    feature_axes: tuple[int, ...]
    dtype: Any
    axis_name: _devices.AxisName | None
    axis_index_groups: _devices.Groups | None
    kernels: _kernels.Chosen | None = None


class Given(NamedTuple):
    """Operands that the rules have no cotangent for."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array
    weights: jax.Array | None
    epsilon: jax.Array


def rule_operands(x, scale, bias, given: Given) -> tuple:
    """The operands as a rule takes them: moments constant, and x varying as y does."""
    mean, var = map(_constant_to_first_order, (given.mean, given.var))
    x = _devices.vary_like(x, mean, var, scale, bias, given.weights)
    return x, scale, bias, given._replace(mean=mean, var=var)


@jax.custom_jvp
def _constant_to_first_order(x: jax.Array) -> jax.Array:
    return x


@_constant_to_first_order.defjvp
def _constant_to_first_order_jvp(primals, tangents):
    # The primal output is the operand itself, not a call of this function: whatever
    # differentiates next sees an identity. (stop_gradient is constant to every order.)
    (x,), _ = primals, tangents
    return x, jnp.zeros_like(x)


class _Output(NamedTuple):
    """`normalize_hidden` by one way to normalize, as an `Operation` takes it."""

    static: Static
    normalize: Callable

    def __call__(self, x, scale, bias, given: Given) -> tuple[jax.Array]:
        return (normalize_hidden(self.static, x, scale, bias, given, self.normalize),)


def _output(static: Static, x, scale, bias, given: Given) -> jax.Array:
    """y, in a form that GPUs do not have to store what an activation makes of it.

    With one operation less, XLA computes a mask such as y > 0 anew in each kernel of
    the backward pass, from the x that it reads there anyway.
    """
    if bias is None or jnp.iscomplexobj(bias) or x.dtype not in GPU_DTYPES:
        return normalize_hidden(static, x, scale, bias, given)
    forms = _Output(static, normalize), _Output(static, normalize_shifted)
    (y,) = Operation(*forms, GPUS)(x, scale, bias, given)
    return y


def normalize_hidden(
    static: Static, x, scale, bias, given: Given, normalize: Callable = normalize
) -> jax.Array:
    """y, and x itself where it is not finite and its weight is 0."""
    apply = partial(
        normalize,
        mean=given.mean,
        var=given.var,
        scale=scale,
        bias=bias,
        feature_axes=static.feature_axes,
        epsilon=given.epsilon,
        dtype=static.dtype,
    )
    if given.weights is None:
        return apply(x)
    # NaN under the mask passes by the arithmetic, whose derivative would be 0 · NaN.
    hidden = _sums.hidden(x, given.weights)
    y = apply(jnp.where(hidden, 0, x))
    return _devices.where(hidden, x.astype(static.dtype), y)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def vjp_form(static: Static, x, scale, bias, given: Given) -> jax.Array:
    return _output(static, x, scale, bias, given)


def _vjp_form_fwd(static: Static, x, scale, bias, given: Given):
    return _output(static, x, scale, bias, given), (x, scale, bias, given)


@_dtypes.mixing
def _vjp_form_bwd(static: Static, residuals, c):
    x, scale, bias, given = residuals
    inv, k = factors(x, scale, given)
    vectors = scale, bias, inv, k, given
    if static.kernels:
        arrays = c, x, given.mean, given.weights
        local = _kernels.cotangent_sums(static.kernels, *arrays)
        c1, c0, *cotangents = pull_back(static, local, x, *vectors)
        dx = _kernels.input_cotangent(static.kernels, *arrays, k, c1, c0)
    else:
        wide, wide_c, expand = _widened(static, x, c, scale, given)
        summed = wide + expand(-given.mean)
        local = _sums.cotangent_sums(wide_c, summed, static.feature_axes)
        c1, c0, *cotangents = pull_back(static, local, x, *vectors)
        elements = wide_c, wide - expand(given.mean), k, c1, c0, given.weights
        dx = _sums.input_cotangent(*elements, static.feature_axes)
    return as_cotangent(dx, x), *cotangents, None


def pull_back(static: Static, local, x, scale, bias, inv, k, given: Given):
    """c1 and c0 of `_sums.input_cotangent`, and the cotangents of scale and bias.

    `local` are Σc and Σc·δ over this device's part, c being the cotangent of y. Of `x`
    only the type counts: what it varies over.
    """
    n = given.count
    over = static.axis_name, static.axis_index_groups
    if _devices.same_on_all(k, x, static.axis_name):
        total = _devices.all_sum(local, *over)
        sum_kc, sum_kc_delta = k * total[0], (k * total[1]).real
    else:  # Scale may differ between the devices: k is summed with c.
        with_k = k * local[0], (k * local[1]).real
        sum_kc, sum_kc_delta, *total = _devices.all_sum((*with_k, *local), *over)
    c0 = -_sums.over(sum_kc, n)
    # Factor by factor: inv³ overflows where the variance is next to nothing.
    c1 = -_sums.over(sum_kc_delta, n) * inv * inv

    def vector(operand, here, everywhere):
        if operand is None:
            return None
        ct = _devices.cotangent_like(operand, here, everywhere, static.axis_name)
        return as_cotangent(ct, operand)

    dscale = vector(scale, local[1] * inv, total[1] * inv)
    return c1, c0, dscale, vector(bias, local[0], total[0])


vjp_form.defvjp(_vjp_form_fwd, _vjp_form_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def jvp_form(static: Static, x, scale, bias, given: Given) -> jax.Array:
    return _output(static, x, scale, bias, given)


@jvp_form.defjvp
@_dtypes.mixing
def _jvp_form_jvp(static: Static, primals, tangents):
    x, scale, _, given = primals
    # Transposed, this recomputes δ from x instead of keeping it.
    tangent = jax.checkpoint(_tangent, prevent_cse=False, static_argnums=0)
    dy = tangent(static, x, scale, given, *tangents[:3])
    return jvp_form(static, *primals), dy


def _tangent(static: Static, x, scale, given: Given, dx, dscale, dbias):
    inv, k = factors(x, scale, given)
    n = given.count
    x, dx, expand = _widened(static, x, dx, scale, given)
    wdx = _sums.times(dx, given.weights)
    # The transpose turns elementwise into summed and back: hence x − mean in the sum.
    delta = (x - expand(given.mean)).conj()
    sums = _sums.cotangent_sums(wdx, delta, static.feature_axes)
    total = _devices.all_sum(
        (sums[0], sums[1].real), static.axis_name, static.axis_index_groups
    )
    c0 = -k * _sums.over(total[0], n)
    c1 = -_sums.over(total[1], n) * inv * inv * k
    if dbias is not None:
        c0 = c0 + _dtypes.widen(dbias, x)
    if dscale is not None:
        c1 = c1 + inv * _dtypes.widen(dscale, x)
    dy = dx * expand(k) + ((x + expand(-given.mean)) * expand(c1) + expand(c0))
    return dy.astype(static.dtype)


def factors(x, scale, given: Given) -> tuple[jax.Array, jax.Array]:
    """inv and k."""
    inv = inverse_deviation(given.var, given.epsilon)
    return inv, inv if scale is None else inv * _dtypes.widen(scale, x)


def _widened(static: Static, x, dx, scale, given: Given):
    """x and its (co)tangent, to compute with, and what expands vectors to them."""
    expand = partial(_axes.expand, feature_axes=static.feature_axes, ndim=x.ndim)
    x, dx = _dtypes.widen(x, scale), _dtypes.widen(dx, x, scale)
    if given.weights is not None:
        x = _devices.where(_sums.hidden(x, given.weights), expand(given.mean), x)
    return x, dx, expand


def as_cotangent(array: jax.Array, operand: jax.Array) -> jax.Array:
    """In the type of the operand; the real part where that is real."""
    array = array if jnp.iscomplexobj(operand) else array.real
    return _devices.shard_like(array.astype(operand.dtype), operand)
