"""The derivative of batch norm, written by hand, in a `vjp` and a `jvp` form.

With δ = x − mean, inv = 1/√(var + ε), k = scale·inv, weights w and n = Σw, the output
y = δ·k + bias depends on x directly, and through mean and var:

    dmean = Σw·dx / n            dvar = 2·Re Σw·conj(δ)·dx / n
    dy    = k·(dx − dmean) − ½·k·inv²·δ·dvar + inv·δ·dscale + dbias

`jvp_form` is this map. `vjp_form` is its transpose, with the cotangent c of y:

    ct(x)     = k·c − (w/n)·(Σk·c + conj(δ)·inv²·Re Σk·c·δ)
    ct(scale) = Σc·δ·inv         ct(bias) = Σc

Neither form computes the moments: they are operands. The rules cover the full
dependence of y on x, including through the moments. The moments as operands are
therefore constant, but only to first order (`_constant_to_first_order`): the
derivatives of a rule see all of them. The backward pass keeps x, in its own dtype, and
feature vectors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _axes, _devices, _dtypes, _kernels, _sums
from jaxbn._normalize import (
    factors,
    normalize_masked,
    normalized,
    normalized_in_two_steps,
)
from jaxbn._operation import GPUS, Bound, Operation

GPU_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Given(NamedTuple):
    """Operands without a cotangent in the rules."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array
    weights: jax.Array | None
    epsilon: jax.Array

    def factors(self, x, scale) -> tuple[jax.Array, jax.Array]:
        """inv and k, as wide as x."""
        return factors(self.var, self.epsilon, scale, x)


class Options(NamedTuple):
    """The static options of a rule."""

    feature_axes: tuple[int, ...]
    dtype: Any
    axis_name: _devices.AxisName | None
    axis_index_groups: _devices.Groups | None
    kernels: _kernels.Chosen | None = None

    def normalize(self, x, scale, bias, given: Given, by=normalized) -> jax.Array:
        """y, by the formula `by`."""
        vectors = given.mean, given.var, scale, bias, given.epsilon
        options = {"feature_axes": self.feature_axes, "dtype": self.dtype}
        return normalize_masked(x, *vectors, given.weights, by=by, **options)


def rule_operands(x, scale, bias, given: Given) -> tuple:
    """The operands of a rule: with constant moments, and with x varying like y."""
    mean, var = map(_constant_to_first_order, (given.mean, given.var))
    x = _devices.vary_like(x, mean, var, scale, bias, given.weights)
    return x, scale, bias, given._replace(mean=mean, var=var)


@jax.custom_jvp
def _constant_to_first_order(x: jax.Array) -> jax.Array:
    return x


@_constant_to_first_order.defjvp
def _constant_to_first_order_jvp(primals, tangents):
    # The primal output is the operand itself, not a call of this function: the next
    # derivative sees an identity. (stop_gradient is constant to every order.)
    (x,), _ = primals, tangents
    return x, jnp.zeros_like(x)


def _output(options: Options, x, scale, bias, given: Given) -> jax.Array:
    """y, in a form that lets GPUs recompute the mask of an activation, not store it.

    With one operation less, XLA recomputes a mask such as y > 0 in each kernel of the
    backward pass, from the x that it reads there anyway.
    """
    if bias is None or jnp.iscomplexobj(bias) or x.dtype not in GPU_DTYPES:
        return options.normalize(x, scale, bias, given)
    ways = normalized, normalized_in_two_steps
    general, special = (Bound(_in_a_tuple, (options, way)) for way in ways)
    (y,) = Operation(general, special, GPUS, mapped=True)(x, scale, bias, given)
    return y


def _in_a_tuple(options: Options, by: Callable, x, scale, bias, given: Given) -> tuple:
    return (options.normalize(x, scale, bias, given, by),)


def _vjp_form_fwd(options: Options, x, scale, bias, given: Given):
    return _output(options, x, scale, bias, given), (x, scale, bias, given)


@_dtypes.mixing
def _vjp_form_bwd(options: Options, residuals, c):
    x, scale, bias, given = residuals
    inv, k = given.factors(x, scale)
    vectors = scale, bias, inv, k, given
    if options.kernels:
        data, last = (c, x, given.mean), (given.weights, options.kernels)
        local = _kernels.cotangent_sums(*data, *last)
        c1, c0, *cotangents = pull_back(options, local, x, *vectors)
        dx = _kernels.input_cotangent(*data, k, c1, c0, *last)
    else:
        wide, wide_c, expand = _widened(options, x, c, scale, given)
        summed = wide + expand(-given.mean)
        local = _sums.cotangent_sums(wide_c, summed, options.feature_axes)
        c1, c0, *cotangents = pull_back(options, local, x, *vectors)
        elements = wide_c, wide - expand(given.mean), k, c1, c0, given.weights
        dx = _sums.input_cotangent(*elements, options.feature_axes)
    return as_cotangent(dx, x), *cotangents, None


vjp_form = jax.custom_vjp(_output, nondiff_argnums=(0,))
vjp_form.defvjp(_vjp_form_fwd, _vjp_form_bwd)


def pull_back(options: Options, local, x, scale, bias, inv, k, given: Given):
    """c1 and c0 of `_sums.input_cotangent`, and the cotangents of scale and bias.

    `local` holds Σc and Σc·δ over this device's part, where c is the cotangent of y.
    Only the type of `x` matters: the axes it varies over.
    """
    n = given.count
    over = options.axis_name, options.axis_index_groups
    if _devices.same_on_all(k, x, options.axis_name):
        total = _devices.all_sum(local, *over)
        sum_kc, sum_kc_delta = k * total[0], (k * total[1]).real
    else:  # Scale may differ between devices, so k is summed with c.
        with_k = k * local[0], (k * local[1]).real
        sum_kc, sum_kc_delta, *total = _devices.all_sum((*with_k, *local), *over)
    c0 = -_sums.over(sum_kc, n)
    # Factor by factor: inv³ overflows where the variance is tiny.
    c1 = -_sums.over(sum_kc_delta, n) * inv * inv

    def vector(operand, here, everywhere):
        if operand is None:
            return None
        ct = _devices.cotangent_like(operand, here, everywhere, options.axis_name)
        return as_cotangent(ct, operand)

    dscale = vector(scale, local[1] * inv, total[1] * inv)
    return c1, c0, dscale, vector(bias, local[0], total[0])


jvp_form = jax.custom_jvp(_output, nondiff_argnums=(0,))


@jvp_form.defjvp
@_dtypes.mixing
def _jvp_form_jvp(options: Options, primals, tangents):
    x, scale, _, given = primals
    # The transpose recomputes δ from x instead of keeping it.
    tangent = jax.checkpoint(_tangent, prevent_cse=False, static_argnums=0)
    dy = tangent(options, x, scale, given, *tangents[:3])
    return jvp_form(options, *primals), dy


def _tangent(options: Options, x, scale, given: Given, dx, dscale, dbias):
    inv, k = given.factors(x, scale)
    n = given.count
    x, dx, expand = _widened(options, x, dx, scale, given)
    wdx = _sums.times(dx, given.weights)
    # The transpose swaps sums and elementwise terms: hence x − mean in the sum.
    delta = (x - expand(given.mean)).conj()
    sums = _sums.cotangent_sums(wdx, delta, options.feature_axes)
    total = _devices.all_sum(
        (sums[0], sums[1].real), options.axis_name, options.axis_index_groups
    )
    c0 = -k * _sums.over(total[0], n)
    c1 = -_sums.over(total[1], n) * inv * inv * k
    if dbias is not None:
        c0 = c0 + _dtypes.widen(dbias, x)
    if dscale is not None:
        c1 = c1 + inv * _dtypes.widen(dscale, x)
    dy = dx * expand(k) + ((x + expand(-given.mean)) * expand(c1) + expand(c0))
    return dy.astype(options.dtype)


def _widened(options: Options, x, dx, scale, given: Given):
    """x and its (co)tangent, widened, and a function that expands vectors to them."""
    expand = partial(_axes.expand, feature_axes=options.feature_axes, ndim=x.ndim)
    x, dx = _dtypes.widen(x, scale), _dtypes.widen(dx, x, scale)
    x = _sums.finite(x, given.weights, expand(given.mean))
    return x, dx, expand


def as_cotangent(array: jax.Array, operand: jax.Array) -> jax.Array:
    """Casts to the operand's type, taking the real part if the operand is real."""
    array = array if jnp.iscomplexobj(operand) else array.real
    return _devices.shard_like(array.astype(operand.dtype), operand)
