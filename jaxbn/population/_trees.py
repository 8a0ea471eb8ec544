"""Trees of moments and of layers' states, layer by layer."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxbn import _dtypes
from jaxbn._flax import model_stats
from jaxbn._moments import Moments, merge_moments, whole_count
from jaxbn._running_stats import RunningStats
from jaxbn.layers import RenormStats

State = RunningStats | RenormStats
STATES = (RunningStats, RenormStats)


def named_layers(name: str, tree: Any, *kinds: type) -> dict[str, Any]:
    """The layers of a tree, by path; raises if a leaf is not one of `kinds`."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_layer)
    for path, leaf in found:
        if not isinstance(leaf, kinds):
            expected = " or ".join(f"`{kind.__name__}`" for kind in kinds)
            raise TypeError(
                f"`{name}{jax.tree_util.keystr(path)}` is {type(leaf).__name__}, "
                f"expected a tree of {expected}, one for each layer."
            )
    if not found:
        raise ValueError(
            f"`{name}` has no layer. Build the model with batch norms of jaxbn."
        )
    return {path_name(path): leaf for path, leaf in found}


def map_layers(function: Callable, tree: Any, *rest: Any) -> Any:
    """Applies `function` to the layers at each place of the trees."""
    return jax.tree.map(function, tree, *rest, is_leaf=_is_layer)


def as_stats(state: State) -> RunningStats:
    """A layer's state as mean and variance, which is std squared for renorm."""
    return model_stats.as_running_stats(state._asdict())


def as_state(like: State, stats: RunningStats) -> Any:
    """The inverse: a state with the kind, shapes and dtypes of `like`."""
    return type(like)(**model_stats.as_kept(like._asdict(), stats))


def without_groups(m: Moments, state: State) -> Moments:
    """Pools the moments of a layer's groups, if it has any, to match its state.

    A ghost batch norm with `update_per_group` has such groups.
    """
    if not _has_groups(m, state):
        return m
    whole = m._replace(count=whole_count(m))
    return merge_moments(whole, np.ndim(state.step))  # After stacked layers.


def require_same_layers(stats: Any, moments: Any) -> None:
    """Raises unless states and moments belong to the same layers."""
    ours = named_layers("stats", stats, *STATES)
    theirs = named_layers("moments", moments, Moments)
    if set(ours) != set(theirs):
        raise ValueError(
            f"`stats` and `moments` are of different layers: {sorted(ours)} and "
            f"{sorted(theirs)}. Take both from the same model."
        )
    places = [jax.tree.structure(map_layers(lambda _: 0, t)) for t in (stats, moments)]
    if places[0] != places[1]:
        raise ValueError(
            f"`stats` and `moments` have different containers: {places[0]} and "
            f"{places[1]}. Make them alike, for example dicts by the layers' paths."
        )
    for name, own in ours.items():
        found = np.shape(theirs[name].mean)
        if np.shape(own.mean) != found and not _has_groups(theirs[name], own):
            raise ValueError(
                f"`moments` of layer {name!r} have features of shape {found}, `stats` "
                f"of {np.shape(own.mean)}. Take both from the same model."
            )
        _dtypes.require_no_imaginary_loss(
            f"moments of layer {name!r}", theirs[name].mean, "stats", own.mean.dtype
        )


def _has_groups(m: Moments, state: State) -> bool:
    """Whether the moments have one more axis, after the axes of stacked layers."""
    shape, axis = np.shape(m.mean), np.ndim(state.step)
    fits = (*shape[:axis], *shape[axis + 1 :]) == np.shape(state.mean)
    return fits and len(shape) > np.ndim(state.mean)


def require_weight(moments: Any, remedy: str) -> None:
    """Raises for moments without data, if counts are known."""
    for name, m in named_layers("moments", moments, Moments).items():
        if isinstance(m.count, Tracer):
            continue
        counts = np.asarray(m.count)
        if not counts.any():
            raise ValueError(
                f"Layer {name!r} has seen no data: it never ran, or all its weights "
                "were 0, or it is a batch norm of another library, or under a "
                f"transform that does not lift `batch_moments`. {remedy}"
            )
        if not counts.all():
            raise ValueError(
                f"{np.sum(counts == 0)} of {counts.size} entries of layer {name!r} "
                f"have seen no data: those of a domain without examples, or features "
                f"that a mask hides. {remedy}"
            )


def path_name(path: Iterable[Any]) -> str:
    """A path as words joined by slashes."""
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_layer(node: Any) -> bool:
    return isinstance(node, (Moments, *STATES))
