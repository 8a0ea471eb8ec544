"""`batch_norm`: moments and normalization as one, with a hand-written derivative."""

from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _devices, _dtypes, _kernels, _rules
from jaxbn._moments import Moments, moments
from jaxbn._normalize import checked_epsilon, optional_vector


@_dtypes.mixing
def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: _axes.Axes = -1,
    epsilon: ArrayLike = 1e-5,
    weights: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    axis_name: _devices.AxisName | None = None,
    axis_index_groups: _devices.Groups | None = None,
    dtype: DTypeLike | None = None,
    derivatives: str = "vjp",
    implementation: str | None = None,
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
        normalized. NaN and infinity where the weight is 0 make y NaN there, and reach
        no gradient of a loss that leaves these positions out.
      shift: As for `moments`: a running mean saves one pass over `x`.
      axis_name: As for `moments`.
      axis_index_groups: As for `moments`.
      dtype: The output's dtype, by default that of `x`. May be complex for real `x`,
        and must be where `scale` or `bias` is.
      derivatives: "vjp" has reverse mode, and reverse or forward mode over it. "jvp"
        has every mode at the same cost on one device, but for the CPU kernels, which
        its backward pass does not use; across devices it issues more all-reduces.
      implementation: As for `moments`: None, "xla" or "native". The kernels compute
        the backward pass, too, with "vjp".

    Returns:
      The output, with the shape of `x`, and the `Moments` of `x`. A batch whose total
      weight is 0 is normalized by mean `shift` (or 0) and variance 0.

    Raises:
      TypeError: An argument is not floating or complex, or complex where the output is
        real.
      ValueError: A shape does not fit, an axis is out of range or named twice,
        `derivatives` or `implementation` is another word, or the latter demands what is
        not to be had.
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
    m = moments(
        x,
        feature_axes=feature_axes,
        weights=weights,
        shift=shift,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        implementation=implementation,
    )
    y = normalize_batch(
        x,
        m,
        scale,
        bias,
        feature_axes=feature_axes,
        epsilon=epsilon,
        weights=weights,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        derivatives=derivatives,
        implementation=implementation,
    )
    return y, m


def normalize_batch(
    x: ArrayLike,
    m: Moments,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    derivatives: str,
    implementation: str | None = None,
    **options: Any,
) -> jax.Array:
    """`x` normalized by `m`, which must be its own moments: the rule relies on it."""
    require_derivatives(derivatives)
    static, *operands = checked_operands(x, m, scale, bias, **options)
    vectors = operands[1:3]
    if any(_axes.is_per_example(v, static.feature_axes) for v in vectors):
        # Their cotangents are no channel sums: the plain composition.
        return _rules.normalize_hidden(static, *operands)
    if derivatives == "jvp":
        return _rules.jvp_form(static, *_rules.rule_operands(*operands))
    array, *affine, given = operands
    dtypes = [static.dtype, *(v.dtype for v in affine if v is not None)]
    kernels = _kernels.choose(
        implementation, array, static.feature_axes, given.weights, *dtypes
    )
    static = static._replace(kernels=kernels)
    return _rules.vjp_form(static, *_rules.rule_operands(*operands))


def require_derivatives(derivatives: str) -> None:
    """Refuses another word than the two forms'."""
    if derivatives not in ("vjp", "jvp"):
        raise ValueError(f"`derivatives` must be 'vjp' or 'jvp', got {derivatives!r}.")


def normalize_given(
    x: ArrayLike,
    m: Moments,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    **options: Any,
) -> jax.Array:
    """`normalize` by any moments, where NaN under `weights` reaches no gradient."""
    static, *operands = checked_operands(x, m, scale, bias, **options)
    return _rules.normalize_hidden(static, *operands)


def checked_operands(
    x: ArrayLike,
    m: Moments,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    feature_axes: _axes.Axes,
    epsilon: ArrayLike,
    weights: ArrayLike | None,
    dtype: DTypeLike | None,
    axis_name: _devices.AxisName | None = None,
    axis_index_groups: _devices.Groups | None = None,
) -> tuple:
    """Static, x, scale, bias and Given, from what users pass."""
    x = _dtypes.inexact_array("x", x)
    axes = _axes.canonical(feature_axes, x.ndim)
    dtype = _dtypes.output(x.dtype, dtype)
    scale = optional_vector("scale", scale, x, axes, dtype)
    bias = optional_vector("bias", bias, x, axes, dtype)
    if weights is not None:
        weights = _axes.weights_like(weights, x, m.count.dtype)
    static = _rules.Static(
        axes, dtype, *_devices.hashable(axis_name, axis_index_groups)
    )
    given = _rules.Given(m.mean, m.var, m.count, weights, checked_epsilon(epsilon))
    return static, x, scale, bias, given
