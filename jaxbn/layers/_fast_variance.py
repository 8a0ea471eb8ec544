"""The option `use_fast_variance` of layers: what their sums are taken about."""

from typing import Any

import numpy as np

SAMPLE, RUNNING_MEAN = "sample", "running_mean"


def require_fast_variance(value: Any) -> None:
    """Raises unless the option has one of its four values."""
    if isinstance(value, (bool, np.bool_)) or value in (SAMPLE, RUNNING_MEAN):
        return
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(
        f"`use_fast_variance` must be True, False, {SAMPLE!r} or {RUNNING_MEAN!r}, got "
        f"{value!r}. True chooses one of these words; False takes two passes over `x`."
    )


def chosen(value: bool | str, *, split: bool) -> str | None:
    """The word that True stands for; None for False.

    A sample costs one small all-reduce more where the batch is split over devices.
    """
    if isinstance(value, str):
        return value
    if not value:
        return None
    return RUNNING_MEAN if split else SAMPLE
