"""Converts Flax's batch norms, in linen and nnx, and jaxbn's with the same variables.

| | Flax | jaxbn |
| --- | --- | --- |
| momentum, epsilon | weight of the old value, 0.99; 1e-5 | the same |
| running variance | biased | the same, unless `unbiased=True` |
| axis | the feature axes | the same; `feature_axes` in functions |

`jaxbn.linen.BatchNorm` and `jaxbn.nnx.BatchNorm` take Flax's checkpoints unchanged.
These functions convert between Flax's variables and the `(params, stats)` of jaxbn's
functions. Together with the other modules of `jaxbn.interop`, they convert between Flax
and other libraries.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._flax import model_stats
from jaxbn._running_stats import RunningStats
from jaxbn.interop import _checkpoint, _checks, _trees
from jaxbn.interop._checkpoint import Arrays, Converted, Params
from jaxbn.layers import RenormStats

PARAMS = {"scale": "scale", "bias": "bias"}
STATS = {"mean": "mean", "var": "var", "step": "step"}
OF_NNX = "Of an nnx module, pass `nnx.to_pure_dict(nnx.state(module))`."


def to_jaxbn(
    variables: Mapping[str, Any],
) -> Converted | tuple[Params, RenormStats]:
    """Converts the variables of one batch norm to jaxbn's parameters and statistics.

    Args:
      variables: The variables of linen: a dict with `batch_stats` (mean, var) and, if
        there are any, `params` (scale, bias). Or a dict of these four without
        collections, as returned by `nnx.to_pure_dict(nnx.state(layer))`. A `step` is
        read if there is one.

    Returns:
      `(params, stats)`, as `init` of `jaxbn.layers.standard` returns them; for jaxbn's
      `BatchRenorm`, as `init` of `jaxbn.layers.renorm` does. The variance is not
      converted: Flax tracks the biased variance.

    Raises:
      TypeError: A value is not an array of numbers.
      ValueError: Keys are missing or unknown, shapes differ, or a variance is negative
        or NaN.

    Example:
      >>> import flax.linen as nn, jax, jaxbn, jax.numpy as jnp
      >>> variables = nn.BatchNorm(True).init(jax.random.key(0), jnp.ones((4, 2)))
      >>> params, stats = jaxbn.interop.flax.to_jaxbn(variables)
      >>> print(params["scale"], stats.var)
      [1. 1.] [1. 1.]

    References:
      https://flax-linen.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html
    """
    _trees.require_dict("variables", variables, hint=OF_NNX)
    if "batch_stats" not in variables:
        return _to_jaxbn(variables, "")
    unknown = sorted(set(variables) - {"params", "batch_stats"})
    if unknown:
        raise ValueError(
            f"`variables` has the collections {unknown} besides 'params' and "
            "'batch_stats'. Leave them out."
        )
    params, stats = (_at(variables, (name,)) for name in ("params", "batch_stats"))
    return _to_jaxbn({**params, **stats}, "")


def from_jaxbn(
    params: Mapping[str, Any], stats: RunningStats, *, step: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Makes linen's variables of one batch norm: the inverse of `to_jaxbn`.

    Args:
      params: "scale", "bias", both or neither.
      stats: The running statistics. Flax's own classes continue with the biased
        variance; the other modules of `jaxbn.interop` return it with `unbiased=False`.
      step: Whether to include the step, which jaxbn's layers keep if `momentum` is a
        function of it.

    Returns:
      `{"params": {scale, bias}, "batch_stats": {mean, var}}`. For nnx, leave out the
      collections: `nnx.update(layer, {**made["params"], **made["batch_stats"]})`.

    Raises:
      TypeError: `stats` is not a `RunningStats`.
      ValueError: As for `to_jaxbn`.

    Example:
      >>> import flax.linen as nn, jaxbn, jax.numpy as jnp
      >>> params, stats = jaxbn.layers.standard().init(2)
      >>> variables = jaxbn.interop.flax.from_jaxbn(params, stats)
      >>> nn.BatchNorm(True).apply(variables, jnp.ones((4, 2))).shape
      (4, 2)

    References:
      https://flax-linen.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html
    """
    _checks.require_flags(step=step)
    found = _checkpoint.given(params, stats)
    kept = [name for name in STATS if step or name != "step"]
    return {
        "params": {name: np.array(found[name]) for name in PARAMS if name in found},
        "batch_stats": {name: np.array(found[name]) for name in kept},
    }


def batch_norms(
    variables: Mapping[str, Any],
) -> dict[str, Converted | tuple[Params, RenormStats]]:
    """Converts every batch norm in a model, recognized by its mean and variance.

    Args:
      variables: Variables of linen, with `params` and `batch_stats`; or the nested dict
        from `nnx.to_pure_dict(nnx.state(model))`.

    Returns:
      A dict from the path of a layer, such as "Block_0/BatchNorm_1", to its `(params,
      stats)`.

    Raises:
      TypeError: As for `to_jaxbn`.
      ValueError: There is no batch norm, or as for `to_jaxbn`; errors name the full
        key.

    Example:
      >>> import flax.linen as nn, jax, jaxbn, jax.numpy as jnp
      >>> net = nn.Sequential([nn.Dense(2), nn.BatchNorm(True)])
      >>> variables = net.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> list(jaxbn.interop.flax.batch_norms(variables))
      ['layers_1']

    References:
      https://flax-linen.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html
    """
    if not isinstance(variables, Mapping):  # In nnx, keys may be numbers.
        _trees.require_dict("variables", variables, hint=OF_NNX)
    linen = "batch_stats" in variables
    stats = _at(variables, ("batch_stats",)) if linen else variables
    found = {}
    for path, own in model_stats.paths_of_layers(stats):
        arrays = {**_at(variables, ("params", *path)), **own} if linen else own
        # In linen, a module may have submodules next to its variables.
        arrays = {k: v for k, v in arrays.items() if not isinstance(v, Mapping)}
        name = "/".join(map(str, path))
        found[name] = _to_jaxbn(arrays, name and f"{name}/")
    if not found:
        raise ValueError(model_stats.NO_LAYERS.format("`variables`", "flax"))
    return found


def _to_jaxbn(arrays: Arrays, at: str) -> Converted | tuple[Params, RenormStats]:
    names = PARAMS | STATS
    if "std" in arrays:
        # Named var for the checks, which are the same for a standard deviation.
        names = {theirs: ours for theirs, ours in names.items() if theirs != "var"}
        names |= {"std": "var"}
    found = _checkpoint.read(arrays, names, at)
    params, stats = _checkpoint.layer_state(found, names, at)
    return (params, RenormStats(*stats)) if "std" in arrays else (params, stats)


def _at(tree: Any, path: tuple[Any, ...]) -> Mapping[str, Any]:
    """The dict at a path, empty if there is none; raises for an array or None."""
    for depth, name in enumerate(path, 1):
        at = "/".join(map(str, path[:depth]))
        tree = _trees.require_dict(at, tree.get(name, {}))
    return tree
