"""Shared by `fold_dense` and `fold_conv`: checks of arguments, and results."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _dtypes
from jaxbn._normalize import checked_epsilon
from jaxbn._running_stats import RunningStats
from jaxbn.folding import _arithmetic


def folded_after(kernel, bias, norm, axes) -> tuple[jax.Array, jax.Array]:
    """The kernel and bias of a layer with a batch norm after it."""
    factor, offset = norm
    wide = _arithmetic.after(_dtypes.widen(kernel, factor), factor, axes)
    return _results(kernel, bias, wide, offset)


def folded_before(kernel, bias, norm, axes, summed) -> tuple[jax.Array, jax.Array]:
    """The kernel and bias of a layer with a batch norm before it."""
    factor, offset = norm
    wide = _dtypes.widen(kernel, factor, offset)
    wide, added = _arithmetic.before(wide, factor, offset, axes, summed)
    if bias is not None:
        added = _dtypes.widen(bias, added) + added
    return _results(kernel, bias, wide, added)


def _results(kernel, bias, wide, wide_bias) -> tuple[jax.Array, jax.Array]:
    dtype = kernel.dtype if bias is None else bias.dtype
    return wide.astype(kernel.dtype), wide_bias.astype(dtype)


def checked_layer(kernel, bias, position: str) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias as arrays; raises if nothing can be folded into them."""
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


def checked_mean(stats: RunningStats) -> jax.Array:
    """The mean as an array; raises if there is none."""
    if not (hasattr(stats, "mean") and hasattr(stats, "var")):
        raise TypeError(
            f"`stats` must have a `mean` and a `var`, got {type(stats).__name__}. Make "
            "it by `jaxbn.RunningStats(mean, var, step)`."
        )
    return _dtypes.inexact_array("stats.mean", stats.mean)


def checked_norm(
    kernel, bias, stats, scale, bn_bias, epsilon, features, position
) -> tuple[jax.Array, jax.Array]:
    """The batch norm as `a·x + c`, in a wide dtype, after checking its arguments."""
    given = {"stats.mean": checked_mean(stats), "stats.var": stats.var}
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
        mean = mean - _dtypes.widen(bias, mean)  # x includes the bias.
    return _arithmetic.affine(mean, var, factor, summand, checked_epsilon(epsilon))


def require_bias(bias: jax.Array | None, outputs: tuple[int, ...]) -> None:
    """Raises unless the bias has one number per output."""
    if bias is not None and bias.shape != outputs:
        raise ValueError(
            f"`bias` has shape {bias.shape}, expected {outputs}, the outputs of "
            "`kernel`. Reshape it; the batch norm's own is `bn_bias`."
        )
