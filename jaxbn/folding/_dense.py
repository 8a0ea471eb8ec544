"""Folds batch norm into a dense layer's kernel and bias, given as arrays."""

import jax
from jax.typing import ArrayLike

from jaxbn._running_stats import RunningStats
from jaxbn.folding import _arguments


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

    `x·W' + b'` then computes the layer and the normalization together. It is the same
    function, but in float32 it loses digits if |mean| is far above √var, because the
    mean is subtracted from rounded products. `normalize` does not lose them.

    Args:
      kernel: Array `(*inputs, *outputs)`, floating or complex.
      bias: The layer's bias, shaped like the outputs, or None.
      stats: Running statistics, of which `mean` and `var` are used: shaped like the
        outputs for position "after", like the inputs for "before". (`layers.renorm` has
        a standard deviation instead: pass `RunningStats(mean, std**2, step)` and
        epsilon 0.)
      scale: Factor of the batch norm, shaped like `stats.mean`; by default 1.
      bn_bias: Offset of the batch norm, shaped like `stats.mean`; by default 0.
      epsilon: The batch norm's epsilon, added to the variance.
      position: Where the batch norm is: "after" the layer (default) or "before" it.

    Returns:
      `(kernel, bias)`, computed in float32 or wider. The kernel keeps its shape and
      dtype. The bias is shaped like the outputs, and has the dtype of `bias`, or of
      `kernel` if there was no bias.

    Raises:
      TypeError: An argument is not floating or complex, or is complex where `kernel` is
        not.
      ValueError: A shape does not fit the kernel, or `position` is unknown.

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
    kernel, bias = _arguments.checked_layer(kernel, bias, position)
    mean = _arguments.checked_mean(stats)
    rank = mean.ndim
    if rank > kernel.ndim:
        raise ValueError(
            f"`stats.mean` has shape {mean.shape}, more axes than `kernel` of "
            f"shape {kernel.shape}. It runs along the layer's outputs (inputs, for "
            'position="before").'
        )
    first = kernel.ndim - rank if position == "after" else rank
    inputs, outputs = tuple(range(first)), tuple(range(first, kernel.ndim))
    axes = outputs if position == "after" else inputs
    features = tuple(kernel.shape[axis] for axis in axes)
    given = (stats, scale, bn_bias, epsilon)
    _arguments.require_bias(bias, tuple(kernel.shape[axis] for axis in outputs))
    norm = _arguments.checked_norm(kernel, bias, *given, features, position)
    if position == "after":
        return _arguments.folded_after(kernel, bias, norm, outputs)
    return _arguments.folded_before(kernel, bias, norm, inputs, inputs)
