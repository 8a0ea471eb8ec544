"""Reads, measures and writes the statistics of a linen model, and closes windows."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import FrozenDict, freeze
from flax.errors import ModifyScopeVariableError

from jaxbn._flax import calls, model_stats, recording
from jaxbn._moments import Moments
from jaxbn._running_stats import RunningStats

Variables = Mapping[str, Any]

NOT_OURS = (
    "While moments are measured only `batch_moments` may change, but a layer changes "
    "another collection: {} If it is a batch norm of another library, use "
    "`jaxbn.linen.BatchNorm` in its place; if it is jaxbn's under `nn.scan` or "
    "`nn.vmap`, lift `batch_moments` as `batch_stats`; if it is another layer, call "
    "the model such that it does not."
)


def running_stats(variables: Variables) -> dict[str, RunningStats]:
    """Reads the running statistics of every batch norm in a model.

    Args:
      variables: The variables of a model, with the collection `batch_stats`.

    Returns:
      A dict from the path of a layer, such as "Block_0/BatchNorm_1", to its
      `RunningStats`. For `BatchRenorm`, `var` is the square of its `std`. `step` is 0
      if the layer does not keep it.

    Raises:
      ValueError: The variables have no statistics.

    Example:
      >>> import flax.linen as nn, jax, jaxbn, jax.numpy as jnp
      >>> net = nn.Sequential([nn.Dense(2), jaxbn.linen.BatchNorm(True)])
      >>> variables = net.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> list(jaxbn.linen.running_stats(variables))
      ['layers_1']

    References:
      https://flax-linen.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html
    """
    layers = _layers_of(variables)
    return {path: model_stats.as_running_stats(v) for path, v in layers.items()}


def load_stats(variables: Variables, stats: Mapping[str, RunningStats]) -> dict:
    """Replaces the running statistics in variables: the inverse of `running_stats`.

    Args:
      variables: The variables of a model.
      stats: A dict from the path of every batch norm to its `RunningStats`, as returned
        by `recalibrate`, `adapt` and `running_stats`.

    Returns:
      New variables with the structure and dtypes of the old ones. The `step` of a layer
      never goes back, so schedules continue. Windows of `accumulate` are closed.

    Raises:
      TypeError: A value is not a `RunningStats`.
      ValueError: Layers are missing, unknown, or have other features, or the variables
        have no statistics.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> net = jaxbn.linen.BatchNorm(use_running_average=False)
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
      >>> variables = net.init(jax.random.key(0), batches[0])
      >>> measure = jaxbn.linen.moments_fn(net, variables)
      >>> stats = jaxbn.population.recalibrate(measure, batches)
      >>> variables = jaxbn.linen.load_stats(variables, stats)
      >>> print(variables["batch_stats"]["mean"], variables["batch_stats"]["var"])
      [4.] [5.]

    References:
      https://flax-linen.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html
    """
    own = _layers_of(variables)
    model_stats.require_same_layers(stats, own)
    batch_stats = variables["batch_stats"]
    for path, old in own.items():
        new = model_stats.with_stats(path, old, stats[path])
        batch_stats = _with(batch_stats, path, new)
    loaded = {**variables, "batch_stats": batch_stats}
    if _windows(variables):
        return end_accumulation(_like(variables, loaded))
    return _like(variables, loaded)


def moments_fn(
    model: nn.Module, variables: Variables, **call: Any
) -> Callable[[Any], dict[str, Moments]]:
    """Makes a function that measures the input moments of every batch norm in a model.

    It runs `model.apply(variables, batch, mutable=["batch_moments"], **call)`, and does
    not change the variables. The arguments in `call` choose between training and
    inference. In training, layers normalize by the batch, as needed for Precise BN and
    AdaBN; at inference, by the running statistics, as needed for `drift`.

    Args:
      model: A model with batch norms of `jaxbn.linen`.
      variables: Its variables, with `batch_stats`.
      **call: Further arguments of `model.apply`, such as `training=True`, or the
        model's own name for it. `rngs` is a key or a dict of keys: call number i,
        counted from 0, uses `jax.random.fold_in(key, i)` of each, so every batch gets a
        new dropout mask. (Calls inside a function that JAX traces do not count.)
        `method` is a function of the module and the batch, for models whose first
        argument is not a batch: `lambda net, b: net(b["image"])`. Arrays may be traced;
        other values are static.

    Returns:
      `f(batch)`, compiled, which returns a dict from the path of a layer to its exact
      `Moments`, computed in two passes. If a layer is called several times, these are
      the moments of all its inputs together; if it is not called, their count is 0.

    Raises:
      ValueError: The variables have no statistics. In the call: no layer recorded
        moments, or a layer of another library tries to write statistics.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> net = jaxbn.linen.BatchNorm()
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = net.init(jax.random.key(0), x, use_running_average=True)
      >>> f = jaxbn.linen.moments_fn(net, variables, use_running_average=False)
      >>> print(f(x)[""].mean)
      [2.]

    References:
      Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021).
    """
    _layers_of(variables)
    given = {name: v for name, v in variables.items() if name != "batch_moments"}
    static, traced = calls.static_and_traced(call)
    measure = calls.compiled(_measure, model, static)
    return calls.Repeated(partial(measure, traced, given), np.uint32(0))


def _measure(
    model: nn.Module,
    static: calls.Static,
    traced: list,
    variables: Variables,
    number: jax.Array,
    batch: Any,
) -> tuple[dict[str, Moments], jax.Array]:
    """The moments in call number `number`, and the next number."""
    call = calls.together(static, traced)
    if "rngs" in call:
        fold = lambda key: jax.random.fold_in(key, number)  # noqa: E731
        call["rngs"] = jax.tree.map(fold, call["rngs"])
    layers = _layers_of(variables)
    # Every layer has a record from the start, as `nn.cond` and `nn.scan` require.
    empty = variables["batch_stats"]
    for path, stats in layers.items():
        empty = _with(empty, path, recording.empty(stats["mean"]))
    empty = {**variables, "batch_moments": _only_records(empty)}
    try:
        _, new = model.apply(empty, batch, mutable=["batch_moments"], **call)
    except ModifyScopeVariableError as error:
        raise ValueError(NOT_OURS.format(error)) from error
    found = dict(model_stats.layers_of(new["batch_moments"]))
    before = dict(model_stats.layers_of(empty["batch_moments"]))
    if all(found[path]["count"] is before[path]["count"] for path in layers):
        raise ValueError(
            "No layer of the model recorded moments. Either no batch norm of jaxbn "
            "ran, or it is under an `nn.scan` or `nn.vmap` that does not lift the "
            "collection `batch_moments` like `batch_stats`. Build the model with "
            "`jaxbn.linen.BatchNorm`."
        )
    return {path: recording.moments_of(found[path]) for path in layers}, number + 1


def end_accumulation(variables: Variables) -> dict:
    """Closes the windows of all layers with `accumulate`, at the end of a step.

    A window is the micro-batches of one step. The next window starts from the
    statistics of this one, which are the same as for all its micro-batches in one
    batch.

    Args:
      variables: The variables of a model, or the part returned by `apply`, with the
        collection `batch_moments`.

    Returns:
      New variables of the same structure: the same `batch_stats`, and empty windows.

    Raises:
      ValueError: There is no window.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> net = jaxbn.linen.BatchNorm(False, momentum=0.5, accumulate=True)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = net.init(jax.random.key(0), x)
      >>> for micro_batch in (x, x + 4.0):
      ...     _, new = net.apply(
      ...         variables, micro_batch, mutable=["batch_stats", "batch_moments"]
      ...     )
      ...     variables |= new
      >>> print(variables["batch_stats"]["mean"])  # (0 + 4) / 2: one step
      [2.]
      >>> variables = jaxbn.linen.end_accumulation(variables)

    References:
      https://optax.readthedocs.io/en/latest/api/optimizer_wrappers.html
    """
    windows = _windows(variables)
    if not windows:
        raise ValueError(
            "`variables` has no window of micro-batches. Build the batch norms with "
            "`accumulate=True`, keep the collection `batch_moments` that `init` makes, "
            'and pass `mutable=["batch_stats", "batch_moments"]` in training.'
        )
    tree = variables["batch_moments"]
    for path, record in windows.items():
        tree = _with(tree, path, recording.closed(record))
    return _like(variables, {**variables, "batch_moments": tree})


def _windows(variables: Variables) -> dict[str, Mapping]:
    found = model_stats.layers_of(variables.get("batch_moments", {}))
    return {path: record for path, record in found if recording.is_window(record)}


def _layers_of(variables: Variables) -> dict[str, Mapping]:
    found = dict(model_stats.layers_of(variables.get("batch_stats", {})))
    if not found:
        raise ValueError(model_stats.NO_LAYERS.format("`variables`", "jaxbn.linen"))
    return found


def _only_records(tree: Mapping) -> dict:
    """The tree with only complete records in its dicts."""
    parts = {k: _only_records(v) for k, v in tree.items() if isinstance(v, Mapping)}
    arrays = {k: v for k, v in tree.items() if k in recording.FIELDS}
    return (arrays if len(arrays) == len(recording.FIELDS) else {}) | parts


def _with(tree: Mapping, path: str, leaf: Mapping) -> Any:
    """The tree with these arrays added to the dict at a path."""
    if not path:
        return _like(tree, {**tree, **leaf})
    name, _, rest = path.partition("/")
    return _like(tree, {**tree, name: _with(tree[name], rest, leaf)})


def _like(tree: Mapping, new: Mapping) -> Any:
    return freeze(new) if isinstance(tree, FrozenDict) else dict(new)
