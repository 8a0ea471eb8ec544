"""What modules record beside their statistics: moments of batches, and of a window.

A record is a dict of arrays: mean, var and count, the moments of what was seen. That of
a window has also the statistics at its start, under their names with `START` before.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _devices, _dtypes
from jaxbn._moments import Moments, merge_moments, whole_count
from jaxbn.layers import Layer

Arrays = dict[str, jax.Array]
Record = Mapping[str, jax.Array]
FIELDS = Moments._fields
START = "start_"


def empty(mean: jax.Array) -> Arrays:
    """The record of no batch, for statistics with this mean; as wide as JAX has it."""
    mean = jnp.zeros_like(_dtypes.widen(mean, jnp.zeros(())))
    real = mean.real
    # Arrays of their own, or they could not be donated.
    return {"mean": mean, "var": jnp.zeros_like(real), "count": jnp.zeros_like(real)}


def empty_window(stats: Arrays) -> Arrays:
    """The record of a window before its first micro-batch."""
    start = {START + name: jnp.array(v, copy=True) for name, v in stats.items()}
    return empty(stats["mean"]) | start


def is_window(record: Any) -> bool:
    """Whether a record, or the names in it, are a window's."""
    return START + "mean" in record


def closed(record: Record) -> Arrays:
    """The record with nothing in it; a window then starts where statistics are."""
    empty_now = {n: jnp.zeros_like(v) for n, v in record.items() if n in FIELDS}
    return {**record, **empty_now}


def moments_of(record: Record) -> Moments:
    """The moments in a record."""
    return Moments(*(record[name] for name in FIELDS))


def run(
    layer: Layer,
    kind: Any,
    params: Arrays,
    stats: Arrays,
    record: Arrays | None,
    x: jax.Array,
    *,
    training: bool,
    **inputs: Any,
) -> tuple[jax.Array, Any, Arrays]:
    """Applies a layer, and records the moments of `x` if there is a record.

    `kind` makes the layer's state of a dict. Returns the output, the new state (None at
    inference), and the new record. The statistics take one step for a window: each of
    its micro-batches moves those of its start by all that was seen since.
    """
    if record is None:
        y, new = layer.apply(params, kind(stats), x, training=training, **inputs)
        return y, new if training else None, {}
    if not (training and is_window(record)):
        y, m = layer.forward(params, kind(stats), x, training=training, **inputs)
        new = layer.update(kind(stats), m) if training else None
        return y, new, _with(record, m)
    start = _start(record, stats)
    y, m = layer.forward(params, kind(start), x, training=True, **inputs)
    record = _with(record, jax.lax.stop_gradient(m))
    record |= {START + name: v for name, v in start.items()}
    return y, layer.update(kind(start), moments_of(record)), record


def _start(record: Arrays, stats: Arrays) -> Arrays:
    """The statistics at the start of a window: those at hand while it is empty."""
    is_empty = jnp.all(record["count"] == 0)
    return {
        name: _devices.where(is_empty, now, record[START + name].astype(now.dtype))
        for name, now in stats.items()
    }


def _with(record: Arrays, m: Moments) -> Arrays:
    """The record with a batch more."""
    # Restored in a narrow dtype it would stay there, and its count stop.
    old = Moments(*(_dtypes.widen(v) for v in moments_of(record)))
    if m.mean.ndim > old.mean.ndim:  # of groups, each with moments of its own
        m = merge_moments(m)
    m = m._replace(count=whole_count(m))

    def stacked(old: jax.Array, new: jax.Array) -> jax.Array:
        new = _dtypes.widen(new, old)
        return _devices.stack(old.astype(new.dtype), new)

    both = merge_moments(Moments(*map(stacked, old, m)))

    def recorded(new: jax.Array, old: jax.Array) -> jax.Array:
        return _devices.shard_like(new.astype(old.dtype), old)

    return record | jax.tree.map(recorded, both, old)._asdict()
