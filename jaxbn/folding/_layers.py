"""Batch norm folded into one layer: its kernel and bias, given as arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbn import _dtypes
from jaxbn._normalize import checked_epsilon
from jaxbn._running_stats import RunningStats
from jaxbn.folding import _arithmetic, _padding


def fold_dense(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    stats: RunningStats,
    scale: ArrayLike | None = None,
    bn_bias: ArrayLike | None = None,
    *,
    epsilon: ArrayLike = 1e-5,
    position: str = "after",
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm at inference into the dense layer before or after it.

        a = scale / √(var + epsilon)
        position "after":   W' = W·a along the outputs,  b' = (b − mean)·a + bn_bias
        position "before":  W' = a·W along the inputs,   b' = b + Σ (bn_bias − mean·a)·W

    `x·W' + b'` is then the layer and the normalization together. It is the same
    function, but in float32 `x·W' + b'` loses digits where |mean| is far above
    √var, because the mean is subtracted from rounded products; `normalize` does not.

    Args:
      kernel: Array `(*inputs, *outputs)`, floating or complex.
      bias: The layer's bias, shaped as the outputs, or None.
      stats: Running statistics; `mean` and `var` are used. Shaped as the outputs for
        position "after", as the inputs for "before". (Of `layers.renorm`, whose state
        has a standard deviation: `RunningStats(mean, std**2, step)` and epsilon 0.)
      scale: Factor of the batch norm, shaped as `stats.mean`; by default 1.
      bn_bias: Summand of the batch norm, shaped likewise; by default 0.
      epsilon: Added to the variance; of the batch norm that is folded.
      position: Where the batch norm is: "after" the layer (default) or "before" it.

    Returns:
      `(kernel, bias)`: the kernel in its shape and dtype, the bias shaped as the
      outputs, in the dtype of `bias` or else of `kernel`. Computed in float32 or wider.

    Raises:
      TypeError: An argument is not floating or complex, or is complex where `kernel` is
        not.
      ValueError: A shape does not fit the kernel, or `position` is another word.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> stats = jaxbn.RunningStats(jnp.array([1.0]), jnp.array([4.0]), 0)
      >>> kernel, bias = jaxbn.folding.fold_dense(
      ...     jnp.array([[2.0], [6.0]]), None, stats, epsilon=0.0
      ... )
      >>> print(kernel[:, 0], bias)
      [1. 3.] [-0.5]

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference" (2018), section 3.2.
    """
    kernel, bias = _layer(kernel, bias, position)
    rank = _mean(stats).ndim
    if rank > kernel.ndim:
        raise ValueError(
            f"`stats.mean` has shape {_mean(stats).shape}, more axes than `kernel` of "
            f"shape {kernel.shape}. It runs along the layer's outputs (inputs, for "
            'position="before").'
        )
    first = kernel.ndim - rank if position == "after" else rank
    inputs, outputs = tuple(range(first)), tuple(range(first, kernel.ndim))
    axes = outputs if position == "after" else inputs
    features = tuple(kernel.shape[axis] for axis in axes)
    given = (stats, scale, bn_bias, epsilon)
    _require_bias(bias, tuple(kernel.shape[axis] for axis in outputs))
    norm = _norm(kernel, bias, *given, features, position)
    if position == "after":
        return _after(kernel, bias, norm, outputs)
    return _before(kernel, bias, norm, inputs, inputs)


def fold_conv(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    stats: RunningStats,
    scale: ArrayLike | None = None,
    bn_bias: ArrayLike | None = None,
    *,
    epsilon: ArrayLike = 1e-5,
    position: str = "after",
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    padding: str | int | Sequence | None = None,
    transposed: bool = False,
    transpose_kernel: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm at inference into the convolution before or after it.

        a = scale / √(var + epsilon)
        position "after":   W' = W·a along the outputs,  b' = (b − mean)·a + bn_bias
        position "before":  W' = a·W along the inputs,   b' = b + Σ (bn_bias − mean·a)·W

    After the convolution it is exact whatever strides, dilations and padding. Before
    it, zeros that the convolution puts around or between its inputs are zeros of the
    normalized values, which no kernel and bias can tell from others near the border:
    exact only without such zeros, or where bn_bias − mean·a is 0. In float32 it loses
    digits where |mean| is far above √var, as `fold_dense` says.

    Args:
      kernel: Array, floating or complex, of any number of spatial dimensions.
      bias: The layer's bias, one number per output channel, or None.
      stats: Running statistics; `mean` and `var` are used, one number per output
        channel for position "after", per input channel for "before".
      scale: Factor of the batch norm, shaped as `stats.mean`; by default 1.
      bn_bias: Summand of the batch norm, shaped likewise; by default 0.
      epsilon: Added to the variance; of the batch norm that is folded.
      position: Where the batch norm is: "after" the layer (default) or "before" it.
      dimension_numbers: As for `lax.conv_general_dilated`; only the kernel's part
        matters. By default Flax's layout, `(*spatial, inputs, outputs)`.
      feature_group_count: Number of groups; for a depthwise convolution, of channels.
      padding: Of the convolution, needed for position "before" only: "VALID", "SAME",
        "CAUSAL", an integer, or integers or pairs per spatial dimension as in Flax;
        also Flax's "CIRCULAR" and "REFLECT", which add no zeros and so are exact.
      transposed: Whether the convolution is a transposed one, or has a `lhs_dilation`.
      transpose_kernel: Whether input and output channels are swapped in the kernel, as
        `lax.conv_transpose` and `flax.linen.ConvTranspose` can have it.

    Returns:
      `(kernel, bias)`: the kernel in its shape and dtype, the bias `(outputs,)` in the
      dtype of `bias` or else of `kernel`. Computed in float32 or wider.

    Raises:
      TypeError: An argument is not floating or complex, or is complex where `kernel` is
        not, or `feature_group_count` is not an integer.
      ValueError: A shape does not fit the kernel, `position` is another word, or the
        batch norm is before a convolution that puts zeros around or between its inputs.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> stats = jaxbn.RunningStats(jnp.array([1.0]), jnp.array([4.0]), 0)
      >>> kernel, bias = jaxbn.folding.fold_conv(
      ...     jnp.full((3, 3, 1, 1), 2.0),
      ...     None,
      ...     stats,
      ...     epsilon=0.0,
      ...     position="before",
      ...     padding="VALID",
      ... )
      >>> print(kernel[0, 0, 0, 0], bias)
      1.0 [-9.]

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference" (2018), section 3.2.
    """
    kernel, bias = _layer(kernel, bias, position)
    into, out = _channels(kernel, dimension_numbers, transpose_kernel)
    inputs, outputs = kernel.shape[into], kernel.shape[out]
    _require_groups(feature_group_count, outputs)
    after = position == "after"
    features = (outputs if after else inputs * feature_group_count,)
    given = (stats, scale, bn_bias, epsilon)
    _require_bias(bias, (outputs,))
    norm = _norm(kernel, bias, *given, features, position)
    if after:
        return _after(kernel, bias, norm, (out,))
    spatial = [n for i, n in enumerate(kernel.shape) if i not in (into, out)]
    _padding.require_exact(padding, spatial, transposed, norm[1])
    summed = tuple(axis for axis in range(kernel.ndim) if axis != out)
    if feature_group_count == 1:
        return _before(kernel, bias, norm, (into,), summed)
    factor, offset = (_arithmetic.per_group(v, inputs, outputs) for v in norm)
    return _before(kernel, bias, (factor, offset), (into, out), summed)


def _after(kernel, bias, norm, axes) -> tuple[jax.Array, jax.Array]:
    factor, offset = norm
    wide = _arithmetic.after(_dtypes.widen(kernel, factor), factor, axes)
    return _results(kernel, bias, wide, offset)


def _before(kernel, bias, norm, axes, summed) -> tuple[jax.Array, jax.Array]:
    factor, offset = norm
    wide = _dtypes.widen(kernel, factor, offset)
    wide, added = _arithmetic.before(wide, factor, offset, axes, summed)
    if bias is not None:
        added = _dtypes.widen(bias, added) + added
    return _results(kernel, bias, wide, added)


def _results(kernel, bias, wide, wide_bias) -> tuple[jax.Array, jax.Array]:
    dtype = kernel.dtype if bias is None else bias.dtype
    return wide.astype(kernel.dtype), wide_bias.astype(dtype)


def _layer(kernel, bias, position: str) -> tuple[jax.Array, jax.Array | None]:
    if position not in ("after", "before"):
        raise ValueError(
            f'`position` must be "after" or "before", got {position!r}: where the '
            "batch norm is, seen from the layer."
        )
    kernel = _dtypes.inexact_array("kernel", kernel)
    if bias is not None:
        bias = _dtypes.inexact_array("bias", bias)
        _dtypes.require_no_imaginary_loss("bias", bias, "kernel", kernel.dtype)
    return kernel, bias


def _mean(stats: RunningStats) -> jax.Array:
    if not (hasattr(stats, "mean") and hasattr(stats, "var")):
        raise TypeError(
            f"`stats` must have a `mean` and a `var`, got {type(stats).__name__}. Make "
            "it by `jaxbn.RunningStats(mean, var, step)`."
        )
    return _dtypes.inexact_array("stats.mean", stats.mean)


def _norm(
    kernel, bias, stats, scale, bn_bias, epsilon, features, position
) -> tuple[jax.Array, jax.Array]:
    """The batch norm as `a·x + c`, in a wide dtype, all its arguments checked."""
    given = {"stats.mean": _mean(stats), "stats.var": stats.var}
    given |= {"scale": scale, "bn_bias": bn_bias}
    arrays: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            arrays[name] = None
            continue
        array = arrays[name] = _dtypes.inexact_array(name, value)
        _dtypes.require_no_imaginary_loss(name, array, "kernel", kernel.dtype)
        if array.shape != features:
            side = "outputs" if position == "after" else "inputs"
            raise ValueError(
                f"`{name}` has shape {array.shape}, expected {features}: the {side} of "
                f"`kernel` (shape {kernel.shape}), because the batch norm is "
                f"{position} the layer. Check `position` and the kernel's layout."
            )
    _dtypes.require_no_imaginary_loss(
        "stats.var", arrays["stats.var"], "a variance", jnp.float32
    )
    every = (kernel, bias, *arrays.values())
    wide: dict[str, Any] = {
        name: a if a is None else _dtypes.widen(a, *every) for name, a in arrays.items()
    }
    mean, var, factor, summand = wide.values()
    if position == "after" and bias is not None:
        mean = mean - _dtypes.widen(
            bias, mean
        )  # What is normalized is that much larger.
    return _arithmetic.affine(mean, var, factor, summand, checked_epsilon(epsilon))


def _require_bias(bias: jax.Array | None, outputs: tuple[int, ...]) -> None:
    if bias is not None and bias.shape != outputs:
        raise ValueError(
            f"`bias` has shape {bias.shape}, expected {outputs}, the outputs of "
            "`kernel`. Reshape it; the batch norm's own is `bn_bias`."
        )


def _channels(kernel: jax.Array, numbers: Any, swapped: bool) -> tuple[int, int]:
    """The axes of the kernel for input and output channels."""
    if kernel.ndim < 2:
        raise ValueError(
            f"`kernel` has shape {kernel.shape}, expected an axis of inputs, one of "
            "outputs, and any number of spatial ones."
        )
    if numbers is None:
        into, out = kernel.ndim - 2, kernel.ndim - 1
    else:
        shape = (1,) * kernel.ndim
        try:
            out, into = lax.conv_dimension_numbers(shape, shape, numbers).rhs_spec[:2]
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"`dimension_numbers` do not fit `kernel` of shape {kernel.shape}, got "
                f"{numbers!r}. Pass what `lax.conv_general_dilated` takes, such as "
                '("NHWC", "HWIO", "NHWC").'
            ) from error
    return (out, into) if swapped else (into, out)


def _require_groups(groups: int, outputs: int) -> None:
    if not isinstance(groups, int | np.integer) or isinstance(groups, bool):
        raise TypeError(
            f"`feature_group_count` must be an integer, got {groups!r}. Pass that of "
            "the convolution, by default 1."
        )
    if groups < 1 or outputs % groups:
        raise ValueError(
            f"`feature_group_count` must divide the number of outputs of `kernel`, "
            f"{outputs}, got {groups}."
        )
