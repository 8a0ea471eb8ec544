"""`fused_batch_norm`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _dtypes
from jaxbn._batch_norm import batch_norm
from jaxbn._normalize import normalize
from jaxbn._running_stats import RunningStats, init_stats, update
from jaxbn.interop.tf_nn import _arguments

# Like TensorFlow's operation, this takes either name of a pair for images and volumes.
CHANNEL_AXIS = {"NHWC": -1, "NDHWC": -1, "NCHW": 1, "NCDHW": 1}


def fused_batch_norm(
    x: ArrayLike,
    scale: ArrayLike,
    offset: ArrayLike,
    mean: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: ArrayLike = 0.001,
    data_format: str = "NHWC",
    is_training: bool = True,
    name: str | None = None,
    exponential_avg_factor: ArrayLike = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes images, like `tf.compat.v1.nn.fused_batch_norm`.

        training     y = (x − m) · scale / √(v + epsilon) + offset
                     running_mean = (1 − f) · mean + f · m
                     running_var = (1 − f) · variance + f · v · n / (n − 1)
        inference    y = (x − mean) · scale / √(variance + epsilon) + offset

    where m and v are the mean and variance of each channel of `x`, over its n elements,
    and f is `exponential_avg_factor`. Training uses `jaxbn.batch_norm` with its
    hand-written derivative.

    Args:
      x: Floating array of rank 4 or 5.
      scale: Factor γ, one number per channel.
      offset: Offset β, shaped like `scale`.
      mean: The running mean, shaped like `scale`. It may be left out in training, if
        `exponential_avg_factor` is 1.
      variance: The running variance; pass it if and only if you pass `mean`.
      epsilon: Added to the variance. A number or a scalar array; gradients stop at it.
        As in TensorFlow 2.20, there is no minimum; older versions replaced smaller
        numbers by 1.001e-5.
      data_format: "NHWC" or "NDHWC" for channels last, "NCHW" or "NCDHW" for channels
        first; usually the shorter names for rank 4 and the longer ones for rank 5.
      is_training: Whether to normalize by the batch's own statistics, and update the
        running statistics. A Python bool.
      name: The `jax.named_scope` of the operations, by default "FusedBatchNormV3".
      exponential_avg_factor: The weight f of the batch in the running statistics, from
        0 to 1. With 1, they are the batch statistics. A number, or a scalar array,
        which TensorFlow does not allow. At inference, running statistics do not change.

    Returns:
      `(y, running_mean, running_var)`. `y` has the shape and dtype of `x`. The others
      have the shape of `scale`, and the dtypes of `mean` and `variance` (without these,
      float32, or float64 for float64 `x`). In training, no gradient passes through the
      running statistics. At inference, they are `mean` and `variance`, and `y` has a
      gradient with respect to them, which TensorFlow leaves out. A batch without
      elements leaves the running statistics unchanged (without these, it returns 0 and
      1); TensorFlow returns NaN.

    Raises:
      TypeError: An array is not floating, or `is_training` is not a bool.
      ValueError: `mean` and `variance` are missing, a shape does not fit, a number is
        out of range, or `data_format` is unknown.

    Example:
      >>> from jaxbn.interop import tf_nn
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 3.0, 5.0, 7.0]).reshape(1, 2, 2, 1)
      >>> scale, offset = jnp.ones(1), jnp.zeros(1)
      >>> y, mean, variance = tf_nn.fused_batch_norm(
      ...     x, scale, offset, jnp.zeros(1), jnp.ones(1), exponential_avg_factor=0.5
      ... )
      >>> print(mean, variance, y.shape)
      [2.] [3.8333335] (1, 2, 2, 1)
      >>> y, mean, variance = tf_nn.fused_batch_norm(
      ...     x, scale, offset, mean, variance, is_training=False
      ... )
      >>> print(mean)
      [2.]

    References:
      https://www.tensorflow.org/api_docs/python/tf/compat/v1/nn/fused_batch_norm
    """
    with _arguments.scope(name, "FusedBatchNormV3"):
        _require_bool(is_training)
        x, axis = _images(x, data_format)
        channels = x.shape[axis]
        affine = _vector("scale", scale, channels), _vector("offset", offset, channels)
        options: dict[str, Any] = {
            "feature_axes": axis,
            "epsilon": _arguments.scalar("epsilon", epsilon, "Pass one number"),
        }
        f = _checked_factor(exponential_avg_factor)
        if mean is variance is None and is_training and _is_one(f):
            stats = init_stats(channels, dtype=_dtypes.accumulation(x.dtype))
        else:
            stats = _running_stats(mean, variance, channels)
        if not is_training:
            y = normalize(x, stats.mean, stats.var, *affine, **options)
            return y, stats.mean, stats.var

        y, m = batch_norm(x, *affine, **options)
        stats = update(stats, m, momentum=1 - f, unbiased=True)
        return y, stats.mean, stats.var


def _require_bool(is_training: Any) -> None:
    if not isinstance(is_training, bool):
        raise TypeError(
            f"`is_training` must be a Python bool, got {is_training!r}. It chooses "
            "between two programs: close over it, or mark it static in `jax.jit` "
            "(`static_argnames='is_training'`)."
        )


def _images(x: ArrayLike, data_format: str) -> tuple[jax.Array, int]:
    """Images or volumes, and their channel axis."""
    x = _arguments.real_array("x", x)
    if x.ndim not in (4, 5):
        raise ValueError(
            f"`x` must have rank 4 or 5, got shape {x.shape}. Use "
            "`batch_normalization`, or add axes of length 1."
        )
    if data_format not in CHANNEL_AXIS:
        raise ValueError(
            f"`data_format` must be one of {', '.join(CHANNEL_AXIS)}, got "
            f"{data_format!r}."
        )
    return x, CHANNEL_AXIS[data_format]


def _vector(name: str, value: ArrayLike, channels: int) -> jax.Array:
    array = _arguments.real_array(name, value)
    if array.shape != (channels,):
        raise ValueError(
            f"`{name}` has shape {array.shape}, expected {(channels,)}: one number per "
            f"channel of `x`. Reshape `{name}`, or name another `data_format`."
        )
    return array


def _checked_factor(factor: ArrayLike) -> ArrayLike:
    factor = _arguments.scalar("exponential_avg_factor", factor, "Pass one number")
    if isinstance(factor, (int, float)) and factor > 1:
        raise ValueError(
            "`exponential_avg_factor` is the weight of the batch, from 0 to 1, got "
            f"{factor}."
        )
    return factor


def _is_one(factor: ArrayLike) -> bool:
    """Whether the new statistics do not depend on the old ones."""
    return isinstance(factor, (int, float)) and factor == 1


def _running_stats(
    mean: ArrayLike | None, variance: ArrayLike | None, channels: int
) -> RunningStats:
    if mean is None or variance is None:
        raise ValueError(
            f"`mean` is {_given(mean)} and `variance` is {_given(variance)}, expected "
            "running statistics. Pass both. You can leave them out only in "
            "training with `exponential_avg_factor` 1.0."
        )
    old = _vector("mean", mean, channels), _vector("variance", variance, channels)
    return RunningStats(*old, step=jnp.zeros((), jnp.int32))


def _given(value: ArrayLike | None) -> str:
    return "None" if value is None else f"of shape {jnp.shape(value)}"
