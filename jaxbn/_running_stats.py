"""Running statistics: the state for inference, and its updates."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _compat, _devices, _dtypes
from jaxbn._moments import Moments, finite_only

Momentum = ArrayLike | Callable[[jax.Array], ArrayLike]


@_compat.exportable("jaxbn.RunningStats")
class RunningStats(NamedTuple):
    """Running mean and variance. Their structure, shapes and dtypes never change.

    Attributes:
      mean: Array with the shape of the feature axes.
      var: Real array of the same shape.
      step: int32 scalar, the number of updates in which any feature had weight.

    Example:
      >>> import jaxbn
      >>> jaxbn.init_stats(2).step
      Array(0, dtype=int32)
    """

    mean: jax.Array
    var: jax.Array
    step: jax.Array


def init_stats(
    features: int | tuple[int, ...], *, dtype: DTypeLike = jnp.float32
) -> RunningStats:
    """Makes initial running statistics: mean 0, variance 1, step 0.

    Args:
      features: The number of features, or the lengths of several feature axes.
      dtype: The dtype of `mean`, complex for complex data. `var` has the real dtype of
        the same precision.

    Returns:
      `RunningStats(mean, var, step)`.

    Raises:
      TypeError: `dtype` is not floating or complex, or `features` are not integers.
      ValueError: `features` are negative.

    Example:
      >>> import jaxbn
      >>> stats = jaxbn.init_stats(3)
      >>> print(stats.mean, stats.var, stats.step)
      [0. 0. 0.] [1. 1. 1.] 0
    """
    dtype = _dtypes.checked("dtype", dtype)
    shape = _axes.shape(features)
    real = jnp.finfo(dtype).dtype
    step = jnp.zeros((), jnp.int32)
    return RunningStats(jnp.zeros(shape, dtype), jnp.ones(shape, real), step)


@_dtypes.mixing
def update(
    stats: RunningStats,
    moments: Moments,
    *,
    momentum: Momentum = 0.99,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
) -> RunningStats:
    """Moves running statistics towards the moments of a batch.

        new = momentum · old + (1 − momentum) · batch

    Args:
      stats: The statistics so far.
      moments: The moments of the batch, as `moments` and `batch_norm` return them.
      momentum: The weight of the *old* value, as in Flax, Keras and Haiku. (In PyTorch,
        momentum is the weight of the new value: 1 minus this.) A number from 0 to 1, an
        array with the shape of the features, or a function of `stats.step`:
        `cumulative()`, `debiased(0.99)`, or an optax schedule. Gradients stop at it.
      unbiased: Whether to multiply the batch variance by n/(n − 1) where n > 1.
      skip_nonfinite: Whether features whose batch mean or variance is infinite or NaN
        keep their statistics. Without it, one such batch makes these statistics NaN for
        good.

    Returns:
      `RunningStats` with the dtypes of `stats`, without gradient. Features without
      weight in the batch keep their values. `step` increases by 1 if any feature had
      weight. float16 and bfloat16 are rounded at random, by a hash of the value and
      `stats.step`, so that small steps are not lost. At step 0, which includes modules
      that do not count steps, a step that is too small moves to the next number
      instead.

    Raises:
      TypeError: The moments are complex and the statistics real, or `unbiased` or
        `skip_nonfinite` is not a bool.
      ValueError: A shape does not match `stats`, or the momentum is not from 0 to 1.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> stats = jaxbn.init_stats(1)
      >>> batch = jaxbn.moments(jnp.array([[1.0], [3.0], [5.0]]))
      >>> stats = jaxbn.update(stats, batch, momentum=0.5)
      >>> print(stats.mean, stats.step)
      [1.5] 1

    References:
      Ioffe and Szegedy, "Batch Normalization" (2015), section 3.1 and algorithm 2.
    """
    stats, moments = _as_arrays("stats", stats), _as_arrays("moments", moments)
    _check_update(stats, moments)
    require_bool("unbiased", unbiased)
    require_bool("skip_nonfinite", skip_nonfinite)
    if skip_nonfinite:
        moments = finite_only(moments)
    return _updated(bool(unbiased), stats, moments, old_weight(stats, momentum))


# Traced once for each kind of arguments, and one program when called without `jit`.
@functools.partial(jax.jit, static_argnums=0)
def _updated(
    unbiased: bool, stats: RunningStats, moments: Moments, keep: jax.Array
) -> RunningStats:
    stats, moments = lax.stop_gradient((stats, moments))
    n = moments.count
    var = moments.var
    if unbiased:
        var = _devices.where(n > 1, var * (n / jnp.where(n > 1, n - 1, 1)), var)

    mean = blended(stats.mean, moments.mean, keep, n)
    return stepped(stats, mean, blended(stats.var, var, keep, n), 1 - keep, n)


def stepped(
    stats: RunningStats,
    mean: jax.Array,
    var: jax.Array,
    share: jax.Array,
    count: jax.Array,
) -> RunningStats:
    """Statistics after a step to `mean` and `var`; `share` is the batch's weight."""
    had_weight = _devices.any_feature(count > 0, stats.mean, stats.step)
    step = stats.step + had_weight.astype(stats.step.dtype)
    mean = _stored(stats.mean, mean, share, stats.step)
    var = _stored(stats.var, var, share, stats.step)
    return RunningStats(mean, var, step)


def _stored(
    old: jax.Array, new: jax.Array, share: jax.Array, step: jax.Array
) -> jax.Array:
    """`new` in the dtype of `old`; a narrow dtype does not get stuck at `old`.

    In bfloat16, a step of 1 % of the way to the batch's value is less than half the gap
    to the next number, long before that value is reached. So rounding is random, and
    correct on average: it depends on the step number and the lost digits. If steps are
    not counted, the result is the next number towards the batch's value.
    """
    # In a loop, new arrays replace old ones, so types must match, including sharding.
    nearest = new.astype(old.dtype)
    if jnp.finfo(old.dtype).bits >= 32:
        return _devices.shard_like(nearest, old)
    wide = _dtypes.widen(old)
    goal = wide + (new - wide) / jnp.where(share > 0, share, 1)
    before = _devices.shard_like(old, nearest)
    missed = (nearest == before) & (new != wide)
    onward = jnp.where(missed, jnp.nextafter(before, goal.astype(old.dtype)), nearest)
    rounded = jnp.where(step > 0, _dtypes.randomly_rounded(new, nearest, step), onward)
    return _devices.shard_like(rounded, old)


def blended(
    old: jax.Array, new: jax.Array, keep: jax.Array, count: jax.Array
) -> jax.Array:
    """keep·old + (1 − keep)·new where the batch has weight, and old elsewhere."""
    old, new = _dtypes.widen(old, new), _dtypes.widen(new, old)
    # The two factors must sum to exactly 1, or errors of one sign add up over steps.
    own = jnp.asarray(keep, _dtypes.accumulation(old.dtype))
    mixed = own * old + (1 - own) * new
    return _devices.where(count > 0, mixed, old)


def old_weight(stats: RunningStats, momentum: Momentum) -> Any:
    """The momentum at this step: a scalar or feature vector, without gradient."""
    value = momentum(stats.step) if callable(momentum) else momentum
    _check_momentum(value, stats)
    if isinstance(value, (float, int, np.ndarray)):  # Faster outside `jax.jit`.
        return np.asarray(value)
    return lax.stop_gradient(jnp.asarray(value))


def cumulative() -> Callable[[jax.Array], jax.Array]:
    """Makes a momentum for the plain average of all batches.

        momentum(step) = step / (step + 1)

    Returns:
      A function of the step for `update`; hashable, equal to any other `cumulative()`.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> stats = jaxbn.init_stats(1)
      >>> for value in (1.0, 2.0, 6.0):
      ...     batch = jaxbn.moments(jnp.full((4, 1), value))
      ...     stats = jaxbn.update(stats, batch, momentum=jaxbn.cumulative())
      >>> print(stats.mean)
      [3.]
    """
    return _Cumulative()


def debiased(decay: float) -> Callable[[jax.Array], jax.Array]:
    """Makes a momentum for an exponential average without the initial values.

        momentum(t) = decay · (1 − decayᵗ) / (1 − decayᵗ⁺¹)

    At every step, running mean and variance are Σ decayᵏ·batchₜ₋ₖ / Σ decayᵏ. The first
    batch replaces the initial 0 and 1; later, this is the usual exponential average.
    The stored statistics are already debiased.

    Args:
      decay: The weight of the old value in the long run, 0 ≤ decay < 1.

    Returns:
      A function of the step for `update`; hashable, equal by value.

    Raises:
      ValueError: `decay` is not in [0, 1).

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> batch = jaxbn.moments(jnp.full((4, 1), 5.0))
      >>> stats = jaxbn.update(
      ...     jaxbn.init_stats(1), batch, momentum=jaxbn.debiased(0.99)
      ... )
      >>> print(stats.mean, stats.var)
      [5.] [0.]

    References:
      Kingma and Ba, "Adam" (2015), section 3, written as a momentum.
    """
    decay = _dtypes.number("decay", decay)
    if not 0 <= decay < 1:
        raise ValueError(
            f"`decay` must be at least 0 and below 1, got {decay}. For a plain average "
            "(decay 1) use `cumulative()`."
        )
    return _Debiased(decay)


@dataclasses.dataclass(frozen=True)
class _Cumulative:
    def __repr__(self) -> str:
        return "cumulative()"

    def __call__(self, step: jax.Array) -> jax.Array:
        t = jnp.asarray(step).astype(float)
        return t / (t + 1)


@dataclasses.dataclass(frozen=True)
class _Debiased:
    decay: float

    def __repr__(self) -> str:
        return f"debiased({self.decay})"

    def __call__(self, step: jax.Array) -> jax.Array:
        t = jnp.asarray(step).astype(float)
        if self.decay == 0:
            return jnp.zeros_like(t)
        # 1 − decayᵗ via expm1: for decay near 1 the difference would lose digits.
        log = math.log(self.decay)
        return self.decay * jnp.expm1(t * log) / jnp.expm1((t + 1) * log)


def _as_arrays(name: str, state: Any) -> Any:
    """Statistics or moments with all fields converted to arrays."""
    if not hasattr(state, "_asdict"):
        kind = "RunningStats" if name == "stats" else "Moments"
        raise TypeError(f"`{name}` must be `{kind}`, got {type(state).__name__}.")
    arrays = {n: _dtypes.array(f"{name}.{n}", v) for n, v in state._asdict().items()}
    for n in ("mean", "var"):
        arrays[n] = _dtypes.inexact_array(f"{name}.{n}", arrays[n])
    return state._replace(**arrays)


def require_bool(name: str, value: Any) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def _check_update(stats: RunningStats, moments: Moments) -> None:
    for name in ("mean", "var"):
        old, new = getattr(stats, name), getattr(moments, name)
        if old.shape != new.shape:
            raise ValueError(
                f"`moments.{name}` has shape {new.shape}, expected {old.shape} as "
                f"`stats.{name}`. Make `stats` with `init_stats`, for the shape of "
                "the feature axes."
            )
        _dtypes.require_no_imaginary_loss(
            f"moments.{name}", new, f"stats.{name}", old.dtype
        )

    step = jnp.asarray(stats.step).dtype
    if jnp.issubdtype(step, jnp.floating) and jnp.finfo(step).bits < 32:
        raise TypeError(
            f"`stats.step` is {step}, which is too narrow to count in. Keep it an "
            "integer: if you cast statistics, cast only their floating arrays."
        )
    count, features = moments.count.shape, stats.mean.shape
    if count not in ((), features):
        raise ValueError(
            f"`moments.count` has shape {count}, expected a scalar or {features}. Pool "
            "stacked moments with `merge_moments` first."
        )


def require_momentum(momentum: Momentum) -> None:
    """Raises if the momentum is known and not a weight from 0 to 1."""
    if callable(momentum):
        return
    kind = "`momentum` is the weight of the old value, a number from 0 to 1"
    values = _dtypes.known(momentum)
    if values is None:
        return
    kinds = jnp.bool_, jnp.integer, jnp.floating
    if momentum is None:
        raise TypeError(
            f"{kind}, got None. For the plain average, as PyTorch's None, pass "
            "`jaxbn.cumulative()`."
        )
    if not any(jnp.issubdtype(values.dtype, k) for k in kinds):
        raise TypeError(
            f"{kind}, an array of these, or a function of the step; got {momentum!r}."
        )
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"{kind}, got {momentum}.")


def _check_momentum(momentum: ArrayLike, stats: RunningStats) -> None:
    require_momentum(momentum)
    shape, features = np.shape(momentum), stats.mean.shape
    if shape not in ((), features):
        raise ValueError(
            f"`momentum` has shape {shape}, expected a scalar or {features}, the shape "
            "of the features."
        )
