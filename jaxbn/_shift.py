"""The shift that sums are taken about: a vector, or a sample of the batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn import _axes, _devices, _dtypes, _sample
from jaxbn._batch import Batch
from jaxbn._operation import CPU, GPUS, Bound, Operation


class Sampled(NamedTuple):
    """A shift that is taken from the batch; `otherwise` if it has no sample."""

    otherwise: jax.Array | None = None


class SampledWhereFree(NamedTuple):
    """The same on one CPU or GPU; elsewhere it is `otherwise`.

    Over several devices it would cost a collective. On TPUs, XLA sums what a
    convolution or matrix product writes in the same kernel, but cannot do so about a
    shift that depends on the result.
    """

    otherwise: jax.Array


Shift = ArrayLike | Sampled | SampledWhereFree | None


def shift_named(shift: ArrayLike | str | None) -> Shift:
    """What users pass as `shift`: "sample" is a `Sampled`."""
    if not isinstance(shift, str):
        return shift
    if shift != "sample":
        raise ValueError(
            f"`shift` must be an array, 'sample' or None, got {shift!r}. 'sample' "
            "takes it from the batch."
        )
    return Sampled()


def shift_of(shift: Shift, batch: Batch) -> jax.Array | None:
    """The vector to take sums about, or None: about the mean, in a second pass."""
    if not isinstance(shift, (Sampled, SampledWhereFree)):
        return checked_shift(shift, batch)
    otherwise = checked_shift(shift.otherwise, batch)
    operands = *lax.stop_gradient((batch.x, batch.weights)), otherwise
    how = batch._replace(x=None, weights=None, kernels=None)
    if isinstance(shift, Sampled):
        return _sampled(how, *operands)[0]
    # The kernels of CPUs need no shift.
    platforms = GPUS if batch.kernels else (*CPU, *GPUS)
    general, special = Bound(_otherwise, ()), Bound(_sampled, (how,))
    options = {"mapped": True, "alone": True}
    return Operation(general, special, platforms, **options)(*operands)[0]


def _otherwise(x, weights, otherwise) -> tuple[jax.Array]:
    return (_devices.vary_like(otherwise, x),)


def _sampled(how: Batch, x, weights, otherwise) -> tuple[jax.Array]:
    batch = how._replace(x=x, weights=weights)
    sums, sizes = _sample.sample_sums(x, weights, batch.feature_axes)
    if batch.axis_name is not None:
        sizes = [jnp.asarray(size, sums[0].real.dtype) for size in sizes]
        total = batch.all_sum(*sums, *sizes)
        sums, sizes = total[: len(sums)], total[len(sums) :]
    if weights is None and 0 not in x.shape:
        otherwise = None  # There is a sample.
    return (_sample.median_of_means(sums, sizes, otherwise),)


def checked_shift(shift: ArrayLike | None, batch: Batch) -> jax.Array | None:
    if shift is None:
        return None
    shift = lax.stop_gradient(_dtypes.inexact_array("shift", shift))
    _dtypes.require_no_imaginary_loss("shift", shift, "x", batch.x.dtype)
    _axes.require_features("shift", shift, batch.x, batch.feature_axes)
    shift = shift.astype(_dtypes.widen(batch.x).dtype)
    return jnp.where(jnp.isfinite(shift), shift, 0)
