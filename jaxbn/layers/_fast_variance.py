"""The option `use_fast_variance` of layers: what their sums are taken about."""

from typing import Any

import numpy as np

from jaxbn._shift import Sampled, SampledWhereFree

SAMPLE, RUNNING_MEAN = "sample", "running_mean"


def require_fast_variance(value: Any) -> None:
    """Raises unless the option has one of its four values."""
    if isinstance(value, (bool, np.bool_)) or value in (SAMPLE, RUNNING_MEAN):
        return
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(
        f"`use_fast_variance` must be True, False, {SAMPLE!r} or {RUNNING_MEAN!r}, got "
        f"{value!r}. True chooses one of the words; False takes two passes over `x`."
    )


def chosen(value: bool | str, mean: Any, *, split: bool) -> Any:
    """The shift: about a running mean, a sample of the batch, or None for two passes.

    A sample costs one small all-reduce more where the batch is split over devices.
    """
    if isinstance(value, str):
        return Sampled(mean) if value == SAMPLE else mean
    if not value:
        return None
    return mean if split else SampledWhereFree(mean)
