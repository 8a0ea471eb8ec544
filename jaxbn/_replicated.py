"""Makes state the same on every device, and checks that it is."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental import multihost_utils

from jaxbn import _devices, _dtypes
from jaxbn._moments import moments


@_dtypes.mixing
def sync_stats(stats: Any, axis_name: _devices.AxisName) -> Any:
    """Pools running statistics that each device has tracked separately.

        mean = E[meanₖ]      var = E[varₖ] + E[|meanₖ − mean|²]      over devices k

    By the law of total variance, these are the moments of all the data, if every device
    has seen the same amount. Devices whose `step` is 0 do not count, unless it is 0 on
    all devices.

    Training with `axis_name` tracks something else: the variance of each whole batch.
    Here, each device has tracked the variance of its part of the batch, and the means
    of the parts, which differ from batch to batch, were averaged over time before they
    are compared. A network that is normalized by the statistics of parts also learns
    differently.

    Args:
      stats: The state of a layer, or dicts and lists of such states. These include
        Flax's `batch_stats`: dicts with "mean" and "var" or "std", and optionally
        "step".
      axis_name: Name or names of mapped axes to pool over.

    Returns:
      A tree with the same structure and dtypes, equal on every device. `step` is taken
      from the device with the most updates.

    Raises:
      NameError: `axis_name` is not bound.
      TypeError: The tree has a leaf that is not part of such a state.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> def track(x):
      ...     stats = jaxbn.update(jaxbn.init_stats(1), jaxbn.moments(x), momentum=0.0)
      ...     return jaxbn.sync_stats(stats, "devices")
      >>> x = jnp.array([[1.0, 3.0], [5.0, 7.0]])[:, :, None]  # two devices
      >>> print(jax.vmap(track, axis_name="devices")(x).var[:, 0])
      [5. 5.]

    References:
      https://en.wikipedia.org/wiki/Law_of_total_variance
    """
    _devices.require_bound(axis_name)
    if hasattr(stats, "_asdict"):
        return type(stats)(**sync_stats(stats._asdict(), axis_name))
    if isinstance(stats, Mapping):
        kind = set(stats) - {"step"}
        if kind in ({"mean", "var"}, {"mean", "std"}):
            own = {n: _dtypes.array(f"stats[{n!r}]", v) for n, v in stats.items()}
            return (_pooled if "var" in kind else _pooled_std)(own, axis_name)
        return {name: sync_stats(part, axis_name) for name, part in stats.items()}
    if type(stats) in (list, tuple):
        return type(stats)(sync_stats(part, axis_name) for part in stats)
    raise TypeError(
        f"`stats` has {type(stats).__name__} where running statistics were expected. "
        "Pass `RunningStats`, Flax's `batch_stats`, or dicts and lists of these."
    )


def assert_replicated(tree: Any, *, stacked: bool = False) -> None:
    """Asserts that every array in a tree is the same on every device, bit for bit.

    An array can be marked as replicated and yet hold a different value on each device,
    because `jax.shard_map` with `check_vma=False` trusts its `out_specs`. This happens
    to statistics that were not synchronized, and a checkpoint then keeps the values of
    one device.

    Args:
      tree: Any tree of concrete arrays, such as parameters and running statistics. With
        several processes, each must call this with its own view of the same tree.
      stacked: Whether arrays have a leading device axis, as `jax.pmap` and `jax.vmap`
        return them. All rows must then be equal.

    Returns:
      Nothing.

    Raises:
      AssertionError: A leaf is sharded, or differs between devices; the message names
        the first such leaf and the devices that differ from the first one.
      TypeError: A leaf is traced.
      ValueError: `stacked` is True, and a leaf is a scalar.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> jaxbn.assert_replicated(jaxbn.init_stats(3))
      >>> jaxbn.assert_replicated(jnp.array([[1.0], [1.0]]), stacked=True)

    References:
      https://docs.jax.dev/en/latest/notebooks/shard_map.html
    """
    leaves = [
        (f"tree{jax.tree_util.keystr(path)}", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    tables = [_digests(_copies(name, leaf, stacked)) for name, leaf in leaves]
    if jax.process_count() > 1:
        tables = _of_all_processes(tables)
    what = "rows" if stacked else "devices"
    for (name, _), table in zip(leaves, tables, strict=True):
        differ = [int(i) for i, *d in table if d != list(table[0][1:])]
        if differ:
            raise AssertionError(
                f"`{name}` is not the same everywhere: {what} {differ} differ from "
                f"{table[0][0]}. Synchronize it where it is computed (`axis_name`), or "
                "afterwards (`sync_stats`, `lax.pmean`)."
            )


def _pooled(stats: Mapping[str, jax.Array], axis_name: _devices.AxisName) -> dict:
    # A device without updates has the initial values, which are not data. If no device
    # has updates, all have the same initial values, and so does their average.
    weight, pooled = jnp.ones(()), {}
    if "step" in stats:
        pooled["step"] = lax.pmax(stats["step"], axis_name)
        counts = (stats["step"] > 0) | (pooled["step"] == 0)
        weight = jnp.where(counts, 1.0, 0.0)

    def over_devices(vector):
        features = tuple(range(1, vector.ndim + 1))
        own = (1, *weight.shape, *[1] * (vector.ndim - weight.ndim))  # one per domain
        return moments(
            vector[None],
            feature_axes=features,
            weights=weight.reshape(own),
            axis_name=axis_name,
        )

    between, within = over_devices(stats["mean"]), over_devices(stats["var"])
    pooled |= {"mean": between.mean, "var": within.mean + between.var}
    return {name: pooled[name].astype(old.dtype) for name, old in stats.items()}


def _pooled_std(stats: Mapping[str, jax.Array], axis_name: _devices.AxisName) -> dict:
    """Pools the state of batch renormalization, converting std to variance and back."""
    rest = {name: value for name, value in stats.items() if name != "std"}
    pooled = _pooled(rest | {"var": jnp.square(_dtypes.widen(stats["std"]))}, axis_name)
    std = jnp.sqrt(pooled.pop("var"))
    return pooled | {"std": std}


def _copies(name: str, leaf: Any, stacked: bool) -> dict[int, np.ndarray]:
    """The copies in this process, by device id or row number."""
    if isinstance(leaf, Tracer):
        raise TypeError(f"`{name}` is traced. Call this outside of `jax.jit`.")
    if stacked and np.ndim(leaf) == 0:
        raise ValueError(
            f"`{name}` is a scalar, which has no first axis of devices. Leave out "
            "`stacked=True`, or pass what `jax.pmap` returns."
        )
    if not isinstance(leaf, jax.Array):
        return dict(enumerate(np.asarray(leaf))) if stacked else {0: np.asarray(leaf)}
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not stacked and not leaf.sharding.is_fully_replicated:
        raise AssertionError(
            f"`{name}` is sharded ({leaf.sharding}), not replicated. Leave it out, or "
            "gather it first."
        )
    copies = {}
    for shard in leaf.addressable_shards:
        if stacked:
            first = shard.index[0].start or 0
            copies |= dict(enumerate(np.asarray(shard.data), first))
        else:
            copies[shard.device.id] = np.asarray(shard.data)
    return copies


def _digests(copies: dict[int, np.ndarray]) -> np.ndarray:
    """One row per copy: its number, then a hash of its bytes."""
    return np.array(
        [
            [i, *np.frombuffer(hashlib.sha256(copy.tobytes()).digest(), np.uint32)]
            for i, copy in copies.items()
        ],
        np.uint32,
    )


def _of_all_processes(tables: list[np.ndarray]) -> list[np.ndarray]:
    gathered = multihost_utils.process_allgather(tables)
    return [np.asarray(table).reshape(-1, table.shape[-1]) for table in gathered]
