"""`batch_norm`: moments and normalization as one, with a hand-written derivative.

With δ = x − mean, inv = 1/√(var + ε), k = scale·inv, weights w and n = Σw, the output
y = δ·k + bias depends on x directly, and through mean and var:

    dmean = Σw·dx / n            dvar = 2·Re Σw·conj(δ)·dx / n
    dy    = k·(dx − dmean) − ½·k·inv²·δ·dvar + inv·δ·dscale + dbias

`_jvp_form` is this map. `_vjp_form` is its transpose, with the cotangent c of y:

    ct(x)     = k·c − (w/n)·(Σk·c + conj(δ)·inv²·Re Σk·c·δ)
    ct(scale) = Σc·δ·inv         ct(bias) = Σc

Neither form computes the moments: they are operands. The rules say how y depends on x
in all, moments included, so that the operands themselves count as constant, but only to
the first order (`_constant_to_first_order`): the derivatives of a rule see all of them.
What is kept for the backward pass is x, in its own dtype, and feature vectors.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _dtypes, _mesh, _sums
from jaxbn._moments import Moments, divisor, moments
from jaxbn._normalize import checked_epsilon, normalize, optional_vector


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: _axes.Axes = -1,
    epsilon: ArrayLike = 1e-5,
    weights: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    axis_name: _mesh.AxisName | None = None,
    axis_index_groups: _mesh.Groups | None = None,
    dtype: DTypeLike | None = None,
    derivatives: str = "vjp",
) -> tuple[jax.Array, Moments]:
    """Normalizes `x` by its own mean and variance, as training does.

        m = moments(x)      y = (x − m.mean) · (scale / √(m.var + epsilon)) + bias

    This is `moments` and `normalize` one after the other, with a derivative that keeps
    only `x` and feature vectors for the backward pass, and takes one all-reduce there
    if `axis_name` is given. Losses may use the returned moments as well.

    Args:
      x: Floating or complex array.
      scale: Factor γ with the shape of the feature axes, in ascending order; by default
        1. Axes before those of the features belong to the first reduced axes of `x`:
        one vector per example.
      bias: Summand β, shaped as `scale`; by default 0.
      feature_axes: The axes that are kept, an integer or a tuple. By default the last.
      epsilon: Added to the variance. A number or a scalar array, and data: gradients
        stop there.
      weights: As for `moments`. They decide what the statistics are of; all of `x` is
        normalized. NaN and infinity where the weight is 0 reach no gradient.
      shift: As for `moments`: a running mean saves one pass over `x`.
      axis_name: As for `moments`.
      axis_index_groups: As for `moments`.
      dtype: The output's dtype, by default that of `x`. May be complex for real `x`,
        and must be where `scale` or `bias` is.
      derivatives: "vjp" has reverse mode, and reverse or forward mode over it. "jvp"
        has every mode at the same cost on one device; across devices its backward pass
        issues more all-reduces.

    Returns:
      The output, with the shape of `x`, and the `Moments` of `x`. A batch whose total
      weight is 0 is normalized by mean `shift` (or 0) and variance 0.

    Raises:
      TypeError: An argument is not floating or complex, or complex where the output is
        real.
      ValueError: A shape does not fit, an axis is out of range or named twice, or
        `derivatives` is another word.
      NameError: `axis_name` is not bound.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, m = jaxbn.batch_norm(x, epsilon=0.0)
      >>> print(y, m.mean)
      [[-1. -1.]
       [ 1.  1.]] [ 2. 20.]
      >>> loss = lambda x: jnp.sum(jaxbn.batch_norm(x)[0] ** 3)
      >>> jax.grad(loss)(x).shape
      (2, 2)

    References:
      Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1.
    """
    if derivatives not in ("vjp", "jvp"):
        raise ValueError(f"`derivatives` must be 'vjp' or 'jvp', got {derivatives!r}.")
    x = _dtypes.inexact_array("x", x)
    axes = _axes.canonical(feature_axes, x.ndim)
    dtype = _dtypes.output(x.dtype, dtype)
    scale = optional_vector("scale", scale, x, axes, dtype)
    bias = optional_vector("bias", bias, x, axes, dtype)
    m = moments(
        x,
        feature_axes=axes,
        weights=weights,
        shift=shift,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    if weights is not None:
        weights = _axes.weights_like(weights, x, m.count.dtype)
    static = _Static(axes, dtype, *_mesh.hashable(axis_name, axis_index_groups))
    given = _Given(m.mean, m.var, m.count, weights, checked_epsilon(epsilon))
    if _axes.is_per_example(scale, axes) or _axes.is_per_example(bias, axes):
        # Their cotangents are no channel sums: the plain composition.
        return _normalize(static, x, scale, bias, given), m

    form = _vjp_form if derivatives == "vjp" else _jvp_form
    given = given._replace(
        mean=_constant_to_first_order(m.mean), var=_constant_to_first_order(m.var)
    )
    x = _mesh.vary_like(x, m.mean, m.var, scale, bias, weights)
    return form(static, x, scale, bias, given), m


class _Static(NamedTuple):
    """What must be known while tracing."""

    feature_axes: tuple[int, ...]
    dtype: Any
    axis_name: _mesh.AxisName | None
    axis_index_groups: _mesh.Groups | None


class _Given(NamedTuple):
    """Operands that the rules have no cotangent for."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array
    weights: jax.Array | None
    epsilon: jax.Array


@jax.custom_jvp
def _constant_to_first_order(x: jax.Array) -> jax.Array:
    return x


@_constant_to_first_order.defjvp
def _constant_to_first_order_jvp(primals, tangents):
    # The primal output is the operand itself, not a call of this function: whatever
    # differentiates next sees an identity. (stop_gradient is constant to every order.)
    (x,), _ = primals, tangents
    return x, jnp.zeros_like(x)


def _normalize(static: _Static, x, scale, bias, given: _Given) -> jax.Array:
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
    return jnp.where(hidden, x.astype(static.dtype), apply(jnp.where(hidden, 0, x)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vjp_form(static: _Static, x, scale, bias, given: _Given) -> jax.Array:
    return _normalize(static, x, scale, bias, given)


def _vjp_form_fwd(static: _Static, x, scale, bias, given: _Given):
    return _normalize(static, x, scale, bias, given), (x, scale, bias, given)


def _vjp_form_bwd(static: _Static, residuals, c):
    x, scale, bias, given = residuals
    wide, c, expand, inv, k, n = _prepare(static, x, c, scale, given)
    local = _sums.cotangent_sums(c, wide + expand(-given.mean), static.feature_axes)
    over = static.axis_name, static.axis_index_groups
    if _mesh.same_on_all(k, x, static.axis_name):
        total = _mesh.all_sum(local, *over)
        sum_kc, sum_kc_delta = k * total[0], (k * total[1]).real
    else:  # Scale may differ between the devices: k is summed with c.
        with_k = k * local[0], (k * local[1]).real
        sum_kc, sum_kc_delta, *total = _mesh.all_sum((*with_k, *local), *over)
    c0 = -sum_kc / n
    c1 = -jnp.square(inv) * sum_kc_delta / n
    through_moments = (wide - expand(given.mean)).conj() * expand(c1) + expand(c0)
    dx = c * expand(k) + _sums.times(through_moments, given.weights)

    def vector(operand, here, everywhere):
        if operand is None:
            return None
        ct = _mesh.cotangent_like(operand, here, everywhere, static.axis_name)
        return _cotangent(ct, operand)

    dscale = vector(scale, local[1] * inv, total[1] * inv)
    dbias = vector(bias, local[0], total[0])
    return _cotangent(dx, x), dscale, dbias, None


_vjp_form.defvjp(_vjp_form_fwd, _vjp_form_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _jvp_form(static: _Static, x, scale, bias, given: _Given) -> jax.Array:
    return _normalize(static, x, scale, bias, given)


@_jvp_form.defjvp
def _jvp_form_jvp(static: _Static, primals, tangents):
    x, scale, _, given = primals
    # Transposed, this recomputes δ from x instead of keeping it.
    tangent = jax.checkpoint(_tangent, prevent_cse=False, static_argnums=0)
    dy = tangent(static, x, scale, given, *tangents[:3])
    return _jvp_form(static, *primals), dy


def _tangent(static: _Static, x, scale, given: _Given, dx, dscale, dbias):
    x, dx, expand, inv, k, n = _prepare(static, x, dx, scale, given)
    wdx = _sums.times(dx, given.weights)
    # The transpose turns elementwise into summed and back: hence x − mean in the sum.
    delta = (x - expand(given.mean)).conj()
    sums = _sums.cotangent_sums(wdx, delta, static.feature_axes)
    total = _mesh.all_sum(
        (sums[0], sums[1].real), static.axis_name, static.axis_index_groups
    )
    c0 = -k * total[0] / n
    c1 = -k * jnp.square(inv) * total[1] / n
    if dbias is not None:
        c0 = c0 + _dtypes.widen(dbias, x)
    if dscale is not None:
        c1 = c1 + inv * _dtypes.widen(dscale, x)
    dy = dx * expand(k) + ((x + expand(-given.mean)) * expand(c1) + expand(c0))
    return dy.astype(static.dtype)


def _prepare(static: _Static, x, dx, scale, given: _Given):
    """What both forms compute with: x and its (co)tangent, widened, and inv, k, n."""
    expand = partial(_axes.expand, feature_axes=static.feature_axes, ndim=x.ndim)
    x, dx = _dtypes.widen(x, scale), _dtypes.widen(dx, x, scale)
    if given.weights is not None:
        x = jnp.where(_sums.hidden(x, given.weights), expand(given.mean), x)
    inv = lax.rsqrt(given.var + given.epsilon.astype(given.var.dtype))
    k = inv if scale is None else inv * _dtypes.widen(scale, x)
    return x, dx, expand, inv, k, divisor(given.count)


def _cotangent(array: jax.Array, operand: jax.Array) -> jax.Array:
    """In the type of the operand; the real part where that is real."""
    array = array if jnp.iscomplexobj(operand) else array.real
    return _mesh.shard_like(array.astype(operand.dtype), operand)
