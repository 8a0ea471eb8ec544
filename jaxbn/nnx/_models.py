"""Reads, measures and writes the statistics of an nnx model, and closes windows."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx

from jaxbn._flax import calls, model_stats, recording
from jaxbn._moments import Moments
from jaxbn._running_stats import RunningStats
from jaxbn.nnx._adapter import Adapter, arrays, recorder, statistics


def running_stats(model: nnx.Module) -> dict[str, RunningStats]:
    """Reads the running statistics of every batch norm in a model.

    Args:
      model: A model with batch norms of `jaxbn.nnx`, or such a batch norm itself.

    Returns:
      A dict from the path of a layer, such as "blocks/0/norm", to its `RunningStats`.
      For `BatchRenorm`, `var` is the square of its `std`. `step` is 0 if the layer does
      not keep it.

    Raises:
      ValueError: There is no such layer.

    Example:
      >>> import jaxbn
      >>> from flax import nnx
      >>> norm = jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
      >>> model = nnx.Sequential(norm)
      >>> list(jaxbn.nnx.running_stats(model))
      ['layers/0']

    References:
      https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/normalization.html
    """
    return {
        path: model_stats.as_running_stats(arrays(statistics(layer)))
        for path, layer in _layers_of(model).items()
    }


def load_stats(model: nnx.Module, stats: Mapping[str, RunningStats]) -> None:
    """Replaces the running statistics of a model: the inverse of `running_stats`.

    Args:
      model: A model with batch norms of `jaxbn.nnx`; its variables are changed.
      stats: A dict from the path of every batch norm to its `RunningStats`, as returned
        by `recalibrate`, `adapt` and `running_stats`.

    Returns:
      Nothing. Variables keep their dtypes. The `step` of a layer never goes back, so
      schedules continue. Windows of `accumulate` are closed.

    Raises:
      TypeError: A value is not a `RunningStats`.
      ValueError: Layers are missing, unknown, or have other features, or the model has
        no batch norm.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
      >>> measure = jaxbn.nnx.moments_fn(model)
      >>> stats = jaxbn.population.recalibrate(measure, batches)
      >>> jaxbn.nnx.load_stats(model, stats)
      >>> print(model.mean[...], model.var[...])
      [4.] [5.]

    References:
      https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/normalization.html
    """
    layers = _layers_of(model)
    model_stats.require_same_layers(stats, layers)
    new = {
        path: model_stats.with_stats(path, arrays(statistics(layer)), stats[path])
        for path, layer in layers.items()
    }
    for path, layer in layers.items():
        for name, value in new[path].items():
            getattr(layer, name)[...] = value
        if layer.batch_moments is not None:
            _close(layer)


def moments_fn(
    model: nnx.Module,
    *,
    training: bool = True,
    method: Callable[..., Any] | None = None,
    **call: Any,
) -> Callable[[Any], dict[str, Moments]]:
    """Makes a function that measures the input moments of every batch norm in a model.

    It runs `model(batch, **call)` on a copy, and does not change the model. The random
    streams of the copy advance from call to call, as the model's would, so every batch
    gets a new dropout mask. They do not advance inside a function that JAX traces
    (`jax.jit`, `jax.lax.scan`).

    Args:
      model: A model with batch norms of `jaxbn.nnx`. The function keeps its current
        variables.
      training: True normalizes by the batch, as needed for Precise BN and AdaBN; False
        by the running statistics, as needed for `drift`. It overrides what the model
        passes to its batch norms, and does not affect other layers.
      method: If given, the function calls `method(model, batch, **call)` instead, for
        models whose first argument is not a batch:
        `lambda model, b: model(b["image"])`.
      **call: Further arguments of the model. Arrays may be traced; other values are
        static.

    Returns:
      `f(batch)`, compiled, which returns a dict from the path of a layer to its exact
      `Moments`, computed in two passes. If a layer is called several times, these are
      the moments of all its inputs together; if it is not called, their count is 0.

    Raises:
      ValueError: The model has no batch norm of `jaxbn.nnx`.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Sequential(jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
      >>> f = jaxbn.nnx.moments_fn(model)
      >>> print(f(jnp.array([[1.0], [3.0]]))["layers/0"].mean)
      [2.]

    References:
      Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021).
    """
    _layers_of(model)
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: leaf, state)  # Not changed with the model.
    static, traced = calls.static_and_traced(call)
    own = nnx.merge(graphdef, state), calls.together(static, traced)
    measure = calls.compiled(_measure, graphdef, training, method, static)
    streams = [variable[...] for variable in _streams_of(*own)]
    return calls.Repeated(partial(measure, traced, state), streams)


def _measure(
    graphdef: Any,
    training: bool,
    method: Callable[..., Any] | None,
    static: calls.Static,
    traced: list,
    state: Any,
    streams: list,
    batch: Any,
) -> tuple[dict[str, Moments], list]:
    model, call = nnx.merge(graphdef, state), calls.together(static, traced)
    variables = _streams_of(model, call)
    for variable, value in zip(variables, streams, strict=True):
        variable[...] = value
    layers = _layers_of(model)
    for layer in layers.values():
        layer.use_running_average = not training
        layer.use_fast_variance = False  # Measured in two passes.
        layer.accumulate = False
        layer.batch_moments = recorder(recording.empty(layer.mean[...]))
    if method is None:
        model(batch, **call)  # type: ignore  (A module need not be callable.)
    else:
        method(model, batch, **call)
    found = {
        path: recording.moments_of(arrays(layer.batch_moments))
        for path, layer in layers.items()
    }
    return found, [variable[...] for variable in variables]


def _streams_of(model: nnx.Module, call: dict[str, Any]) -> list[nnx.RngState]:
    """The variables of random streams in a model and in its arguments."""
    nodes = (node for _, node in nnx.iter_graph([model, call]))
    return [node for node in nodes if isinstance(node, nnx.RngState)]


def end_accumulation(model: nnx.Module) -> None:
    """Closes the windows of all layers with `accumulate`, at the end of a step.

    A window is the micro-batches of one step. The next window starts from the
    statistics of this one, which are the same as for all its micro-batches in one
    batch.

    Args:
      model: A model with batch norms that have `accumulate=True`; its variables are
        changed.

    Returns:
      Nothing.

    Raises:
      ValueError: There is no window.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(
      ...     1, momentum=0.5, accumulate=True, rngs=nnx.Rngs(0)
      ... )
      >>> for micro_batch in (jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])):
      ...     y = layer(micro_batch)
      >>> print(layer.mean[...])  # (0 + 4) / 2: one step
      [2.]
      >>> jaxbn.nnx.end_accumulation(layer)

    References:
      https://optax.readthedocs.io/en/latest/api/optimizer_wrappers.html
    """
    layers = [m for m in _layers_of(model).values() if m.batch_moments is not None]
    if not layers:
        raise ValueError(
            "`model` has no window of micro-batches. Build its batch norms with "
            "`accumulate=True`."
        )
    for layer in layers:
        _close(layer)


def _layers_of(model: nnx.Module) -> dict[str, Any]:
    """The batch norms, by path."""
    layers = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, Adapter)
    }
    if not layers:
        raise ValueError(
            "`model` has no batch norm of jaxbn. Build it with those of `jaxbn.nnx`."
        )
    return layers


def _close(layer: Any) -> None:
    for name, value in recording.closed(arrays(layer.batch_moments)).items():
        layer.batch_moments[name][...] = value
