"""Records that modules keep next to their statistics: moments of batches or a window.

A record is a dict of arrays: mean, var and count, the moments of the data seen. The
record of a window also has the statistics at its start, with names prefixed by `START`.
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
    """An empty record for statistics with this mean, as wide as JAX's default dtype."""
    mean = jnp.zeros_like(_dtypes.widen(mean, jnp.zeros(())))
    real = mean.real
    # Separate arrays, or they could not be donated.
    return {"mean": mean, "var": jnp.zeros_like(real), "count": jnp.zeros_like(real)}


def empty_window(stats: Arrays) -> Arrays:
    """The record of a window before its first micro-batch."""
    start = {START + name: jnp.array(v, copy=True) for name, v in stats.items()}
    return empty(stats["mean"]) | start


def is_window(record: Any) -> bool:
    """Whether a record, or a list of its names, belongs to a window."""
    return START + "mean" in tuple(record)  # Flax 0.12.0's `nnx.Dict` has no `in`.


def closed(record: Record) -> Arrays:
    """Empties the record; a window then starts from the current statistics."""
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

    `kind` makes the layer's state from a dict. Returns the output, the new state (None
    at inference), and the new record. The statistics take one step per window: each
    micro-batch updates the statistics from its start with all the data seen since.
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
    """The statistics at the start of a window; while it is empty, the current ones."""
    is_empty = jnp.all(record["count"] == 0)
    return {
        name: _devices.where(is_empty, now, record[START + name].astype(now.dtype))
        for name, now in stats.items()
    }


def _with(record: Arrays, m: Moments) -> Arrays:
    """Adds a batch to the record."""
    # A record restored in a narrow dtype would stay narrow, and its count would stop.
    old = Moments(*(_dtypes.widen(v) for v in moments_of(record)))
    if m.mean.ndim > old.mean.ndim:  # groups, each with its own moments
        m = merge_moments(m)
    m = m._replace(count=whole_count(m))

    def stacked(old: jax.Array, new: jax.Array) -> jax.Array:
        new = _dtypes.widen(new, old)
        return _devices.stack(old.astype(new.dtype), new)

    both = merge_moments(Moments(*map(stacked, old, m)))

    def recorded(new: jax.Array, old: jax.Array) -> jax.Array:
        return _devices.shard_like(new.astype(old.dtype), old)

    return record | jax.tree.map(recorded, both, old)._asdict()
