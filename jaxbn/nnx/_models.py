"""The statistics of an nnx model: taken out, measured, put back; windows closed."""

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
    """The running statistics of every batch norm of a model.

    Args:
      model: A model with batch norms of `jaxbn.nnx`, or one of these.

    Returns:
      A dict from the path of a layer, such as "blocks/0/norm", to its `RunningStats`.
      For `BatchRenorm`, `var` is the square of its `std`; `step` is 0 where the layer
      keeps none.

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
    """Gives a model other running statistics: the inverse of `running_stats`.

    Args:
      model: A model with batch norms of `jaxbn.nnx`; its variables are changed.
      stats: A `RunningStats` for every batch norm, by its path, as `recalibrate`,
        `adapt` and `running_stats` return them.

    Returns:
      Nothing. Variables keep their dtypes. A layer's `step` does not go back, so that
      schedules go on; windows of `accumulate` are closed.

    Raises:
      TypeError: A value is no `RunningStats`.
      ValueError: Layers are missing, unknown, or have other features, or there is none.

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
    """A function that measures what every batch norm of a model sees of a batch.

    It runs `model(batch, **call)` on a copy, and leaves the model as it is. The copy's
    random streams go on from call to call, as the model's would: every batch has
    another dropout mask. Inside a function that JAX traces (`jax.jit`, `jax.lax.scan`)
    they stay where they are.

    Args:
      model: A model with batch norms of `jaxbn.nnx`, as it is now: the function keeps
        its variables.
      training: True has layers normalized by the batch, as Precise BN and AdaBN want
        it; False by the running statistics, as for `drift`. It is so whatever the
        model passes to its batch norms, and concerns nothing but these.
      method: `method(model, batch, **call)` is run instead, where a batch is not the
        model's first argument: `lambda model, b: model(b["image"])`.
      **call: What the model takes besides. Arrays may be traced; for other values the
        function is compiled.

    Returns:
      `f(batch)`, compiled, that returns a dict from the path of a layer to its
      `Moments`: exact ones, taken in two passes. A layer that is called several times
      has the moments of all its inputs together; one that is not called, count 0.

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
    state = jax.tree.map(lambda leaf: leaf, state)  # Not what the model changes later.
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
        layer.use_fast_variance = False  # Measured in two passes, whatever it does.
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
    """The variables of random streams: a model's, and those that it is called with."""
    nodes = (node for _, node in nnx.iter_graph([model, call]))
    return [node for node in nodes if isinstance(node, nnx.RngState)]


def end_accumulation(model: nnx.Module) -> None:
    """Closes the windows of all layers with `accumulate`: the step is done.

    The statistics of the window, which are those of all its micro-batches in one batch,
    are where the next window starts from.

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
    """The batch norms, by their paths."""
    layers = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
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
