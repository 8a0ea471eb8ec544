"""Batch norm and an activation whose backward pass needs only the output.

With z = φ(y) and y = x̂·s + bias, where x̂ = (x − mean)·inv and s > 0, the output
determines everything that the derivative of batch norm needs:

    y = φ⁻¹(z)      x̂ = (y − bias) / s      φ′(y), as a function of z

so x need not be kept. Only z is kept, which the next layer keeps as its input.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _axes, _dtypes, _rules, _sums


class Activation(NamedTuple):
    """An invertible activation, given by name; `slope` is for leaky ReLU."""

    name: str
    slope: float

    def __call__(self, y: jax.Array) -> jax.Array:
        """φ(y)."""
        if self.name == "leaky_relu":
            return jnp.where(y >= 0, y, self.slope * y)
        return jax.nn.elu(y) if self.name == "elu" else y

    def inverse(self, z: jax.Array, dtype: Any) -> jax.Array:
        """φ⁻¹(z), for a z that was rounded to `dtype`."""
        if self.name == "leaky_relu":
            return jnp.where(z >= 0, z, z / self.slope)
        if self.name == "elu":
            # Where e^y was rounded away, z is −1 and log(1 + z) is −∞. Use the next
            # number instead; φ′ is 0 there anyway.
            lowest = -1 + float(jnp.finfo(dtype).epsneg)
            return jnp.where(z > 0, z, jnp.log1p(jnp.clip(z, lowest, 0)))
        return z

    def slope_at(self, z: jax.Array) -> jax.Array | float:
        """φ′(y), as a function of z."""
        if self.name == "leaky_relu":
            return jnp.where(z >= 0, 1, self.slope)
        return jnp.where(z > 0, 1, z + 1) if self.name == "elu" else 1.0


class InPlaceOptions(NamedTuple):
    """The static options of the rule."""

    rule: _rules.Options
    activation: Activation
    x_dtype: Any


def _output(options: InPlaceOptions, x, scale, bias, given: _rules.Given) -> jax.Array:
    """φ(batch norm of x), given its own moments. `scale` must be positive."""
    wide = options.rule._replace(dtype=_dtypes.widen(x, scale, bias).dtype)
    z = options.activation(wide.normalize(x, scale, bias, given))
    return _rounded(z.astype(options.rule.dtype))


def _rounded(z: jax.Array) -> jax.Array:
    """z, as the one array that is both returned and kept."""
    # XLA may keep more digits of an intermediate than its dtype has, or recompute it
    # from x: the backward pass then gets a different array than the output. Which of
    # the two operations prevents this differs between CPU and GPU.
    info = jnp.finfo(z.dtype)
    z = lax.reduce_precision(z, info.nexp, info.nmant)
    return lax.optimization_barrier(z) if info.bits < 32 else z


def _fwd(options: InPlaceOptions, x, scale, bias, given: _rules.Given):
    z = _output(options, x, scale, bias, given)
    return z, (z, scale, bias, given)


@_dtypes.mixing
def _bwd(options: InPlaceOptions, residuals, c):
    z, scale, bias, given = residuals
    rule, activation = options.rule, options.activation
    expand = partial(_axes.expand, feature_axes=rule.feature_axes, ndim=z.ndim)
    wide, c = (_dtypes.widen(a, z, scale, bias, given.var) for a in (z, c))
    if given.weights is not None:
        masked = _sums.masked_nonfinite(wide, given.weights)
        wide = jnp.where(masked, 0, wide)
    y = activation.inverse(wide, rule.dtype)
    inv, k = given.factors(wide, scale)
    delta = 1 / k
    c = c * activation.slope_at(wide)
    if bias is not None:
        y = y - expand(bias)
    delta = y * expand(delta)
    if given.weights is not None:
        delta = jnp.where(masked, 0, delta)
    local = _sums.cotangent_sums(c, delta, rule.feature_axes)
    vectors = scale, bias, inv, k, given
    c1, c0, *cotangents = _rules.pull_back(rule, local, delta, *vectors)
    elements = c, delta, k, c1, c0, given.weights
    dx = _sums.input_cotangent(*elements, rule.feature_axes)
    return _rules.as_cotangent(dx, z).astype(options.x_dtype), *cotangents, None


in_place_form = jax.custom_vjp(_output, nondiff_argnums=(0,))
in_place_form.defvjp(_fwd, _bwd)
