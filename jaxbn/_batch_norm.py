"""`batch_norm`: moments and normalization in one, with a hand-written derivative."""

import functools

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _devices, _dtypes, _kernels, _rules
from jaxbn._batch import Batch, checked_batch
from jaxbn._moments import Moments, moments_about
from jaxbn._normalize import checked_epsilon, optional_vector
from jaxbn._shift import shift_named


@_dtypes.mixing
def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: _axes.Axes = -1,
    epsilon: ArrayLike = 1e-5,
    weights: ArrayLike | None = None,
    shift: ArrayLike | str | None = None,
    axis_name: _devices.AxisName | None = None,
    axis_index_groups: _devices.Groups | None = None,
    dtype: DTypeLike | None = None,
    derivatives: str = "vjp",
    implementation: str | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes `x` by its own mean and variance, as in training.

        m = moments(x)      y = (x − m.mean) · (scale / √(m.var + epsilon)) + bias

    This is `moments` followed by `normalize`, with a hand-written derivative. It keeps
    only `x` and feature vectors for the backward pass, which needs one all-reduce if
    `axis_name` is given. A loss may also depend on the returned moments.

    Args:
      x: Floating or complex array.
      scale: Factor γ with the shape of the feature axes, in ascending order; by default
        1. It may have further axes before these, which match the first reduced axes of
        `x`: one vector per example.
      bias: Offset β, shaped like `scale`; by default 0.
      feature_axes: The axes to keep, an integer or a tuple. By default the last.
      epsilon: Added to the variance. A number or a scalar array; gradients stop at it.
      weights: As for `moments`. They affect only the statistics: all of `x` is
        normalized. NaN or infinity with weight 0 stays in the output, but does not
        reach the gradients of a loss that leaves these positions out.
      shift: As for `moments`. A running mean, or "sample", saves one pass over `x`.
      axis_name: As for `moments`.
      axis_index_groups: As for `moments`.
      dtype: The output's dtype, by default the dtype of `x`. May be complex for real
        `x`, and must be if `scale` or `bias` is complex.
      derivatives: "vjp" supports reverse mode, and reverse or forward mode over it.
        "jvp" supports every mode. On one device it costs the same, except that its
        backward pass does not use the CPU kernels; across devices it needs more
        all-reduces. If `scale` or `bias` has a vector per example, both support every
        mode.
      implementation: As for `moments`. With "vjp", the kernels also compute the
        backward pass. "native" does not support a vector per example.

    Returns:
      `(y, moments)`: the output, with the shape of `x`, and the `Moments` of `x`. A
      batch whose total weight is 0 is normalized with mean `shift` (or 0) and variance
      0.

    Raises:
      TypeError: An argument is not floating or complex, or is complex and the output is
        real.
      ValueError: A shape does not fit, an axis is out of range or named twice,
        `derivatives` or `implementation` is unknown, or the implementation is not
        available.
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
    require_derivatives(derivatives)
    over = axis_name, axis_index_groups
    batch = checked_batch(x, feature_axes, weights, *over, implementation)
    _require_no_demand(batch, scale=scale, bias=bias)
    m = moments_about(shift_named(shift), batch)
    options = {"epsilon": epsilon, "dtype": dtype, "derivatives": derivatives}
    return normalize_batch(batch, m, scale, bias, **options), m


def _require_no_demand(batch: Batch, **vectors: ArrayLike | None) -> None:
    """Raises for a vector per example if the kernels are required."""
    for name, vector in vectors.items():
        per_example = np.ndim(vector) > len(batch.feature_axes)  # type: ignore  (None)
        if batch.kernels and batch.kernels.demanded and per_example:
            raise ValueError(
                f"`implementation` is 'native', but `{name}` of shape "
                f"{np.shape(vector)} has a vector per example, whose derivative the "  # type: ignore
                "kernels do not compute. Leave `implementation` out."
            )


def normalize_batch(
    batch: Batch,
    m: Moments,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    epsilon: ArrayLike,
    dtype: DTypeLike | None,
    derivatives: str,
) -> jax.Array:
    """Normalizes a batch by `m`, its own moments; the rule relies on this."""
    options, *operands = rule_arguments(batch, m, scale, bias, epsilon, dtype)
    return _normalize_batch(options, derivatives, batch.kernels, *operands)


# Traced once for each kind of arguments, and one program when called without `jit`.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _normalize_batch(
    options: _rules.Options,
    derivatives: str,
    kernels: _kernels.Chosen | None,
    *operands,
) -> jax.Array:
    if any(_axes.is_per_example(v, options.feature_axes) for v in operands[1:3]):
        # Their cotangents are not channel sums: use the plain composition.
        return options.normalize(*operands)
    x, *vectors, given = _rules.rule_operands(*operands)
    if derivatives == "jvp":
        return _rules.jvp_form(options, x, *vectors, given)
    dtypes = [options.dtype, *(v.dtype for v in vectors if v is not None)]
    kernels = _kernels.for_dtypes(kernels, *dtypes)
    return _rules.vjp_form(options._replace(kernels=kernels), x, *vectors, given)


def require_derivatives(derivatives: str) -> None:
    """Raises unless `derivatives` names one of the two forms."""
    if derivatives not in ("vjp", "jvp"):
        raise ValueError(f"`derivatives` must be 'vjp' or 'jvp', got {derivatives!r}.")


def rule_arguments(
    batch: Batch,
    m: Moments,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    epsilon: ArrayLike,
    dtype: DTypeLike | None,
) -> tuple:
    """Checks the arguments; returns the rule's options, x, scale, bias and `Given`."""
    x, axes = batch.x, batch.feature_axes
    dtype = _dtypes.output(x.dtype, dtype)
    scale = optional_vector("scale", scale, x, axes, dtype)
    bias = optional_vector("bias", bias, x, axes, dtype)
    options = _rules.Options(axes, dtype, batch.axis_name, batch.axis_index_groups)
    given = _rules.Given(*m, batch.weights, checked_epsilon(epsilon))
    return options, x, scale, bias, given
