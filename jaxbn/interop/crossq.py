"""Converts statistics of the batch renormalization in reinforcement learning.

CrossQ, sbx, RL-X and purejaxql share one linen module, `BatchRenorm`:

| | theirs | jaxbn's |
| --- | --- | --- |
| `batch_stats` | mean, var, `steps`, `r_max`, `d_max` | mean, var, `step` |
| fields | `warm_up_steps` or `warmup_steps` | `tracks="var"`, `warm_up_steps` |
| limits | 3 and 5, in the variables | `r_max=3.0`, `d_max=5.0`, fields |
| epsilon, momentum | 0.001, 0.99 | 1e-5, 0.99: pass theirs |

Outputs differ by terms of the order of epsilon/var, because these libraries add epsilon
to the variance after dividing it by r². Parameters (scale, bias) are the same in both.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn.interop import _trees, _values

Tree = dict[str, Any]
THEIRS = {"mean", "var", "steps", "r_max", "d_max"}
OURS = {"mean", "var", "step"}
LIMITS = {"r_max": 3.0, "d_max": 5.0}


def to_jaxbn(
    batch_stats: Mapping[str, Any],
) -> tuple[Tree, dict[str, dict[str, float]]]:
    """Converts the `batch_stats` of a model to those of jaxbn's `BatchRenorm`.

        step = steps        mean, var as they are

    Args:
      batch_stats: The collection of a linen model, of any depth, or the dict of a
        single layer. Layers may be stacked, by `nn.vmap`: then every array has the same
        leading axes, and `steps` has only these.

    Returns:
      `(batch_stats, limits)`. The first has the structure of the argument, for
      `jaxbn.linen.BatchRenorm(tracks="var", warm_up_steps=...)`. The second has the
      limits that differ from 3 and 5, by the path of the layer ("" for a single layer):
      pass them as `r_max` and `d_max`.

    Raises:
      TypeError: A value is not an array of numbers.
      ValueError: There is no such layer, a dict has other keys, or shapes differ.

    Example:
      >>> import jaxbn, numpy as np
      >>> one = np.ones(2, np.float32)
      >>> norm = {"mean": one, "var": one, "steps": 7, "r_max": 3, "d_max": 4}
      >>> stats, limits = jaxbn.interop.crossq.to_jaxbn({"critic": {"norm": norm}})
      >>> sorted(stats["critic"]["norm"]), int(stats["critic"]["norm"]["step"])
      (['mean', 'step', 'var'], 7)
      >>> limits
      {'critic/norm': {'d_max': 4.0}}

    References:
      https://github.com/araffin/sbx, `sbx/common/jax_layers.py`.
    """
    limits: dict[str, dict[str, float]] = {}

    def convert(at: str, layer: Mapping[str, Any]) -> Tree:
        found = _read(at, layer, THEIRS, "steps")
        own = {
            name: _common(f"{at}/{name}", found[name])
            for name, default in LIMITS.items()
            if np.any(found[name] != default)
        }
        if own:
            limits[at] = own
        step = jnp.asarray(found["steps"], jnp.int32)
        return {"mean": found["mean"], "var": found["var"], "step": step}

    return _converted(batch_stats, convert, "steps", "jaxbn's has `step`."), limits


def from_jaxbn(
    batch_stats: Mapping[str, Any], *, r_max: float = 3.0, d_max: float = 5.0
) -> Tree:
    """Converts the `batch_stats` of jaxbn's `BatchRenorm`: the inverse of `to_jaxbn`.

        steps = step        mean, var as they are        r_max, d_max as given

    Args:
      batch_stats: The collection of a linen model with `BatchRenorm(tracks="var")`, of
        any depth, or the dict of a single layer. Layers may be stacked.
      r_max: The limit of r, the same for all layers.
      d_max: The limit of |d|.

    Returns:
      A tree of the same structure, for their `BatchRenorm`. `steps` and the limits have
      the leading axes of stacked layers. Limits are int32 if they are whole numbers, as
      in these libraries, and float32 if not.

    Raises:
      TypeError: A value is not an array of numbers.
      ValueError: There is no such layer, a dict has other keys (`tracks="std"` has a
        "std"), shapes differ, or a limit is out of range.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.linen.BatchRenorm(False, tracks="var", warm_up_steps=100)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 2)))
      >>> stats = jaxbn.interop.crossq.from_jaxbn(variables["batch_stats"])
      >>> {name: int(stats[name]) for name in ("steps", "r_max", "d_max")}
      {'steps': 0, 'r_max': 3, 'd_max': 5}

    References:
      https://github.com/araffin/sbx, `sbx/common/jax_layers.py`.
    """
    given = {"r_max": _limit("r_max", r_max, 1), "d_max": _limit("d_max", d_max, 0)}

    def convert(at: str, layer: Mapping[str, Any]) -> Tree:
        found = _read(at, layer, OURS, "step")
        steps = jnp.asarray(found["step"], jnp.int32)
        own = {
            name: jnp.full(steps.shape, v, jnp.int32 if v == int(v) else jnp.float32)
            for name, v in given.items()
        }
        return {"mean": found["mean"], "var": found["var"], "steps": steps, **own}

    hint = 'Make the layer with `tracks="var"`.'
    return _converted(batch_stats, convert, "step", hint)


def _converted(batch_stats: Any, convert: Any, step: str, hint: str) -> Tree:
    """The tree with every layer converted; raises if there is none."""
    found: list[str] = []

    def walk(at: str, tree: Mapping[str, Any]) -> Tree:
        _trees.require_dict(f"batch_stats[{at!r}]" if at else "batch_stats", tree)
        if any(not isinstance(part, Mapping) for part in tree.values()):
            found.append(at)
            return convert(at, tree)
        below = (f"{at}/{name}" if at else name for name in tree)
        return {
            name: walk(path, part)
            for path, (name, part) in zip(below, tree.items(), strict=True)
        }

    made = walk("", batch_stats)
    if not found:
        raise ValueError(
            f"`batch_stats` has no layer with mean, var and `{step}`. Pass the "
            f"`batch_stats` of a model with batch renormalization. {hint}"
        )
    return made


def _read(
    at: str, layer: Mapping[str, Any], names: set[str], step: str
) -> dict[str, Any]:
    """The arrays of a layer, checked."""
    where = f"batch_stats[{at!r}]" if at else "batch_stats"
    if set(layer) != names:
        raise ValueError(
            f"`{where}` has {sorted(layer)}, expected {sorted(names)}. A batch norm or "
            'a `BatchRenorm(tracks="std")` of jaxbn needs no conversion.'
        )
    found: dict[str, Any] = {
        name: _values.leaf(f"{where}[{name!r}]", v) for name, v in layer.items()
    }
    mean, steps = found["mean"].shape, found[step].shape
    if found["var"].shape != mean or mean[: len(steps)] != steps or mean == steps:
        raise ValueError(
            f"`{where}` has a mean of shape {mean}, a variance of shape "
            f"{found['var'].shape} and `{step}` of shape {steps}. Mean and variance "
            f"must have the same shape, and `{step}` only the axes of stacked layers."
        )
    for name in names - {"mean", "var", step}:
        if found[name].shape not in ((), steps):
            raise ValueError(
                f"`{where}[{name!r}]` has shape {found[name].shape}, expected {steps}."
            )
    if not np.all(found["var"] >= 0):
        raise ValueError(f"`{where}['var']` has a negative entry, or NaN.")
    for name in ("mean", "var"):
        found[name] = _values.to_device(f"{where}[{name!r}]", found[name])
    return found


def _common(at: str, values: np.ndarray) -> float:
    """The one value that stacked layers share."""
    if np.any(values != values.flat[0]):
        raise ValueError(
            f"`{at}` differs between stacked layers, {values.tolist()}; in jaxbn it is "
            "a field of all of them. Convert the layers one by one."
        )
    return float(values.flat[0])


def _limit(name: str, value: float, least: float) -> float:
    number = float(_values.leaf(name, value))
    if not number >= least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    return number
