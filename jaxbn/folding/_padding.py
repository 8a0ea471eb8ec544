"""Which paddings put zeros next to the values of a convolution's input."""

import operator
from collections.abc import Sequence

import jax
import numpy as np
from jax.core import Tracer

# Flax's paddings with the input's own values commute with a factor and an offset.
OF_VALUES = ("CIRCULAR", "REFLECT")
OF_ZEROS = ("SAME", "SAME_LOWER", "CAUSAL")


def require_exact(
    padding: str | int | Sequence | None,
    spatial: Sequence[int],
    transposed: bool,
    offset: jax.Array,
) -> None:
    """Raises for a batch norm before a convolution that adds zeros to its input.

    `offset` is the batch norm of 0; where `offset` is 0, zeros do no harm.
    """
    zeros = _zeros(padding, spatial)
    if not (zeros or transposed):
        return
    traced = isinstance(offset, Tracer)
    if not traced and not np.any(offset):
        return
    what = f"`padding`, {padding!r}, puts zeros around its input"
    if transposed:
        what = "A transposed convolution puts zeros between the values of its input"
    why = ", which is unknown while tracing" if traced else ""
    raise ValueError(
        "A batch norm before a convolution folds only where no zeros come between the "
        f"two. {what}, and there the batch norm would give `bn_bias` − `stats.mean`·a, "
        f"not 0{why}. Keep the batch norm, put it after the convolution, or pad its "
        'input yourself and convolve with "VALID"; give a "SAME" that adds no zeros as '
        "pairs."
    )


def _zeros(padding: str | int | Sequence | None, spatial: Sequence[int]) -> bool:
    """Whether the padding may add zeros."""
    if padding is None:
        raise ValueError(
            '`padding` must be given for position="before", got None: around a padded '
            'input the folding is not exact. Pass that of the convolution, as "VALID".'
        )
    if isinstance(padding, str):
        name = padding.upper()
        if name not in ("VALID", *OF_VALUES, *OF_ZEROS):
            raise ValueError(
                '`padding` must be "VALID", "SAME", "CAUSAL", "CIRCULAR", "REFLECT" '
                f"or numbers, got {padding!r}."
            )
        # A kernel of length 1 needs no padding to keep the size.
        return name in OF_ZEROS and any(n > 1 for n in spatial)
    alone = not isinstance(padding, Sequence | np.ndarray)
    entries = [padding] * len(spatial) if alone else list(padding)
    try:
        widths = [_pair(entry) for entry in entries]
    except (TypeError, ValueError):
        widths = []
    if len(widths) != len(spatial):
        raise ValueError(
            "`padding` must be a name, an integer, or an integer or a pair for each of "
            f"the {len(spatial)} spatial dimensions of `kernel`, got {padding!r}."
        )
    # Negative widths crop.
    return any(width > 0 for pair in widths for width in pair)


def _pair(width: int | Sequence[int]) -> tuple[int, int]:
    low, high = (width, width) if isinstance(width, int | np.integer) else width
    return operator.index(low), operator.index(high)
