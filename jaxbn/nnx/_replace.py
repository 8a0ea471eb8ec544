"""jaxbn's batch norm in models that are made of Flax's."""

import inspect
from collections.abc import Iterator
from typing import Any

from flax import nnx

from jaxbn.nnx._batch_norm import BatchNorm

VARIABLES = ("mean", "var", "scale", "bias", "step")
OPTIONS = set(inspect.signature(BatchNorm.__init__).parameters) - {"self", "rngs"}
# What the variables of a layer were made by.
MADE = {"num_features", "param_dtype", "use_bias", "use_scale", "bias_init"}
MADE |= {"scale_init", "bias_metadata", "scale_metadata"}


def replace_batch_norm(model: nnx.Module, **overrides: Any) -> "Replacement":
    """Turns every `flax.nnx.BatchNorm` of a model into jaxbn's, in place.

    As a call it lasts; as a context manager it is undone at the end. The layers stay
    the same objects with the same variables, shared ones shared, so that optimizers and
    other references to them hold. What was replaced by the model's own code meanwhile,
    as by `train()` and `eval()`, stays so after undoing.

    Args:
      model: An nnx module.
      **overrides: Arguments of `jaxbn.nnx.BatchNorm` that take precedence over those of
        the model's layers: `axis_name="data"`, `use_fast_variance=False`. Layers that
        are jaxbn's already take them as well. A `momentum` that is a function of the
        step is for those of them that have a `step`.

    Returns:
      A context manager that gives the model, and undoes the replacement at its end, or
      by its method `undo()`.

    Raises:
      TypeError: `overrides` has what is no argument, or what a layer cannot change
        after it was made; a layer is of a subclass of Flax's that is not known here,
        which may compute something else.
      ValueError: The model has no batch norm; `momentum` is a function of the step, and
        a layer has none.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> net = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
      ...                      nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> with jaxbn.nnx.replace_batch_norm(net, use_fast_variance=False):
      ...     y = net(jnp.ones((4, 3)))
      ...     print(isinstance(net.layers[1], jaxbn.nnx.BatchNorm))
      True
      >>> isinstance(net.layers[1], jaxbn.nnx.BatchNorm)
      False
      >>> handle = jaxbn.nnx.replace_batch_norm(net)  # until `handle.undo()`

    References:
      https://flax.readthedocs.io/en/latest/guides/surgery.html
    """

    unknown = sorted(set(overrides) - (OPTIONS - MADE))
    if unknown:
        raise TypeError(
            f"`overrides` has {unknown}, which a `jaxbn.nnx.BatchNorm` does not take "
            f"once it is made. It takes {sorted(OPTIONS - MADE)}."
        )
    layers = dict(_batch_norms(model))
    if not layers:
        raise ValueError(
            f"`model` has no `flax.nnx.BatchNorm`: got {type(model).__name__}. Pass a "
            "model that has one, before it is split into graph and state."
        )
    # All are made before the first is changed: an error leaves the model alone.
    made = [(node, _made(name, node, overrides)) for name, node in layers.items()]
    return Replacement(model, made)


class Replacement:
    """Layers that are another class for a while."""

    def __init__(self, model: nnx.Module, made: list[tuple[Any, dict[str, Any]]]):
        self.model = model
        self._undo = [_turn(node, BatchNorm, attributes) for node, attributes in made]

    def undo(self) -> None:
        """Turns the layers back into what they were."""
        for node, kind, old, new in self._undo:
            _turn_back(node, kind, old, new)
        self._undo = []

    def __enter__(self) -> nnx.Module:
        """The model."""
        return self.model

    def __exit__(self, *_: object) -> None:
        """Turns the layers back into what they were."""
        self.undo()


def _batch_norms(model: nnx.Module) -> Iterator[tuple[str, nnx.BatchNorm]]:
    """Every batch norm, once, by its path."""
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.BatchNorm):
            continue
        name = "/".join(map(str, path))
        if type(node) not in (nnx.BatchNorm, BatchNorm):
            raise TypeError(
                f"{type(node).__qualname__} at {name!r} is a subclass of "
                "`flax.nnx.BatchNorm` that may compute something else. Derive it from "
                "`jaxbn.nnx.BatchNorm` instead, or replace parts of the model."
            )
        yield name, node


def _made(name: str, node: nnx.BatchNorm, overrides: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a `BatchNorm` with the options and variables of `node`."""
    own = vars(node)
    given = {option: own[option] for option in OPTIONS if option in own}
    attributes = vars(BatchNorm(**given | overrides, rngs=nnx.Rngs(0)))
    if attributes["step"] is not None and own.get("step") is None:
        raise ValueError(
            f"`momentum` is a function of the step, and {name!r} has counted none: it "
            "may forget its statistics. Make the layer by `jaxbn.nnx.BatchNorm` with "
            "this momentum, and set its `step`."
        )
    attributes |= {key: own[key] for key in VARIABLES if key in own}
    if own.get("batch_moments") is not None and "accumulate" not in overrides:
        attributes["batch_moments"] = own["batch_moments"]
    # What nnx takes for variables: the layer's, and what jaxbn adds.
    nodes = {key: True for key in ("step", "batch_moments")}
    attributes["_pytree__nodes"] = own["_pytree__nodes"].update(nodes)
    return {key: v for key, v in attributes.items() if key != "_pytree__state"}


def _turn(node: Any, kind: type, attributes: dict[str, Any]) -> tuple:
    """Sets class and attributes past nnx, which would keep track of them."""
    before = type(node), {key: v for key, v in vars(node).items() if key in attributes}
    object.__setattr__(node, "__class__", kind)
    for name, value in attributes.items():
        object.__setattr__(node, name, value)
    return node, *before, attributes


def _turn_back(node: Any, kind: type, old: dict[str, Any], new: dict[str, Any]) -> None:
    object.__setattr__(node, "__class__", kind)
    for name, value in new.items():
        if name not in old:
            vars(node).pop(name, None)
        elif vars(node).get(name) is value:
            object.__setattr__(node, name, old[name])
