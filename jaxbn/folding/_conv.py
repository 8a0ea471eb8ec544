"""Folds batch norm into a convolution's kernel and bias, given as arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbn._running_stats import RunningStats
from jaxbn.folding import _arguments, _arithmetic, _padding


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

    With position "after", folding is exact for any strides, dilations and padding. With
    "before", it is exact only if no zeros are put around or between the inputs, or if
    bn_bias − mean·a is 0. Such zeros are not normalized, and no kernel and bias can
    treat them separately. In float32, the result loses digits if |mean| is far above
    √var, as for `fold_dense`.

    Args:
      kernel: Array, floating or complex, with any number of spatial dimensions.
      bias: The layer's bias, one number per output channel, or None.
      stats: Running statistics, of which `mean` and `var` are used: one number per
        output channel for position "after", per input channel for "before".
      scale: Factor of the batch norm, shaped like `stats.mean`; by default 1.
      bn_bias: Offset of the batch norm, shaped like `stats.mean`; by default 0.
      epsilon: The batch norm's epsilon, added to the variance.
      position: Where the batch norm is: "after" the layer (default) or "before" it.
      dimension_numbers: As for `lax.conv_general_dilated`, but only the part of the
        kernel matters. By default, the layout of Flax, `(*spatial, inputs, outputs)`.
      feature_group_count: The number of groups; for a depthwise convolution, the number
        of channels.
      padding: The padding of the convolution, only needed for position "before":
        "VALID", "SAME", "CAUSAL", an integer, or integers or pairs per spatial
        dimension, as in Flax. Flax's "CIRCULAR" and "REFLECT" are also allowed, and
        exact, because they add no zeros.
      transposed: Whether the convolution is transposed, or has an `lhs_dilation`.
      transpose_kernel: Whether input and output channels are swapped in the kernel, as
        with this option of `lax.conv_transpose` and `flax.linen.ConvTranspose`.

    Returns:
      `(kernel, bias)`, computed in float32 or wider. The kernel keeps its shape and
      dtype. The bias has the shape `(outputs,)`, and the dtype of `bias`, or of
      `kernel` if there was no bias.

    Raises:
      TypeError: An argument is not floating or complex, or is complex where `kernel` is
        not, or `feature_group_count` is not an integer.
      ValueError: A shape does not fit the kernel, `position` is unknown, or the batch
        norm is before a convolution that puts zeros around or between its inputs.

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
    kernel, bias = _arguments.checked_layer(kernel, bias, position)
    into, out = _channels(kernel, dimension_numbers, transpose_kernel)
    inputs, outputs = kernel.shape[into], kernel.shape[out]
    _require_groups(feature_group_count, outputs)
    after = position == "after"
    features = (outputs if after else inputs * feature_group_count,)
    given = (stats, scale, bn_bias, epsilon)
    _arguments.require_bias(bias, (outputs,))
    norm = _arguments.checked_norm(kernel, bias, *given, features, position)
    if after:
        return _arguments.folded_after(kernel, bias, norm, (out,))
    spatial = [n for i, n in enumerate(kernel.shape) if i not in (into, out)]
    _padding.require_exact(padding, spatial, transposed, norm[1])
    summed = tuple(axis for axis in range(kernel.ndim) if axis != out)
    if feature_group_count == 1:
        return _arguments.folded_before(kernel, bias, norm, (into,), summed)
    factor, offset = (_arithmetic.per_group(v, inputs, outputs) for v in norm)
    return _arguments.folded_before(kernel, bias, (factor, offset), (into, out), summed)


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
