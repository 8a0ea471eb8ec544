"""Uses jaxbn's batch norm in models that are built with Flax's."""

import inspect
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._flax import recording
from jaxbn.nnx._adapter import arrays, recorder, statistics
from jaxbn.nnx._batch_norm import BatchNorm

VARIABLES = ("mean", "var", "scale", "bias", "step")
OPTIONS = set(inspect.signature(BatchNorm.__init__).parameters) - {"self", "rngs"}
# The options that determine the variables of a layer.
MADE = {"num_features", "param_dtype", "use_bias", "use_scale", "bias_init"}
MADE |= {"scale_init", "bias_metadata", "scale_metadata"}

# Marks of the replacements in force for each layer, the latest at the end. (Not the
# replacements themselves, which hold the model.)
_in_force: WeakKeyDictionary[Any, list[object]] = WeakKeyDictionary()


def replace_batch_norm(model: nnx.Module, **overrides: Any) -> "Replacement":
    """Turns every `flax.nnx.BatchNorm` of a model into jaxbn's, in place.

    The replacement lasts until `undo()`, or until the end of a `with` statement. The
    layers remain the same objects with the same variables, and shared layers remain
    shared, so optimizers and other references to them stay valid. Attributes that
    change in the meantime, for example by `train()` and `eval()`, keep their values
    after undoing. Do not use it inside `nnx.jit`, which does not let nodes change their
    class.

    Args:
      model: An nnx module.
      **overrides: Arguments of `jaxbn.nnx.BatchNorm` that take precedence over those of
        the model's layers: `axis_name="data"`, `use_fast_variance=False`. They also
        apply to layers that already are `jaxbn.nnx.BatchNorm`, but not to jaxbn's other
        layers. A `momentum` that is a function of the step needs layers that have a
        `step`.

    Returns:
      A context manager that returns the model. It undoes the replacement at its end, or
      when its method `undo()` is called.

    Raises:
      TypeError: `overrides` has an entry that is not an argument, or that cannot change
        after a layer was made; or a layer belongs to an unknown subclass of Flax's,
        which may compute something else.
      ValueError: The model has no batch norm, or `momentum` is a function of the step
        and a layer has no `step`.
      RuntimeError: In `undo()`: a later replacement of a layer is still active.

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
            f"`overrides` has {unknown}, which cannot be changed in the layers of a "
            "model. These options of `jaxbn.nnx.BatchNorm` can: "
            f"{sorted(OPTIONS - MADE)}."
        )
    return Replacement(model, overrides)


class Replacement:
    """A replacement of layers that can be undone."""

    def __init__(self, model: nnx.Module, overrides: dict[str, Any]):
        self.model, self.overrides = model, overrides
        self.turned: list[tuple] = []
        self.mark = object()
        self.apply()

    def apply(self) -> None:
        """Turns the layers into jaxbn's batch norm."""
        layers = dict(_batch_norms(self.model))
        if not layers:
            raise ValueError(
                "`model` has no `flax.nnx.BatchNorm`: got "
                f"{type(self.model).__name__}. Pass a model that has one, before it is "
                "split into graph and state."
            )
        # All are made before the first is changed: an error leaves the model unchanged.
        made = [(n, _made(path, n, self.overrides)) for path, n in layers.items()]
        for node, attributes in made:
            self.turned.append(_turn(node, attributes))
            _in_force.setdefault(node, []).append(self.mark)

    def undo(self) -> None:
        """Turns the layers back into Flax's, or restores their options."""
        for node, *_ in self.turned:
            if _in_force[node][-1] is not self.mark:
                raise RuntimeError(
                    "A later `replace_batch_norm` of the same layers is still active. "
                    "Undo it first."
                )
        for node, kind, old, new in self.turned:
            _in_force[node].pop()
            _turn_back(node, kind, old, new)
        self.turned = []

    def __enter__(self) -> nnx.Module:
        """Returns the model; replaces its layers again if that was undone."""
        if not self.turned:
            self.apply()
        return self.model

    def __exit__(self, *_: object) -> None:
        """Undoes the replacement."""
        self.undo()


def _batch_norms(model: nnx.Module) -> Iterator[tuple[str, nnx.BatchNorm]]:
    """Yields every batch norm once, with its path."""
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.BatchNorm):
            continue
        name = "/".join(map(str, path))
        if type(node) is not nnx.BatchNorm and not isinstance(node, BatchNorm):
            raise TypeError(
                f"{type(node).__qualname__} at {name!r} is a subclass of "
                "`flax.nnx.BatchNorm` that may compute something else. Derive it from "
                "`jaxbn.nnx.BatchNorm` instead, or replace parts of the model."
            )
        yield name, node


def _made(name: str, node: nnx.BatchNorm, overrides: dict[str, Any]) -> dict[str, Any]:
    """The attributes that turn `node` into a `BatchNorm` with the overrides."""
    own = vars(node)
    given = {option: own[option] for option in OPTIONS if option in own}
    fresh = vars(BatchNorm(**given | overrides, rngs=nnx.Rngs(0)))
    if fresh["step"] is not None and own.get("step") is None:
        raise ValueError(
            f"`momentum` is a function of the step, but {name!r} has no `step`, so it "
            "could forget its statistics. Make the layer with `jaxbn.nnx.BatchNorm` "
            "and this momentum, and set its `step`."
        )
    jaxbns = isinstance(node, BatchNorm)
    new = set(overrides) if jaxbns else set(fresh) - set(VARIABLES) | {"step"}
    attributes = {key: fresh[key] for key in new if not key.startswith("_pytree__")}
    if fresh["accumulate"] and own.get("batch_moments") is None:
        attributes["batch_moments"] = _window(node)
    # The attributes that nnx treats as variables and arrays.
    nodes = {key: fresh["_pytree__nodes"].get(key, False) for key in attributes}
    attributes["_pytree__nodes"] = own["_pytree__nodes"].update(nodes)
    return attributes


def _window(node: nnx.BatchNorm) -> nnx.Dict:
    """An empty window, stacked like the layer's statistics."""
    stats = arrays(statistics(node))
    features = 1 if isinstance(node.num_features, int) else len(node.num_features)
    stacked = stats["mean"].shape[: stats["mean"].ndim - features]
    one = {name: v[(0,) * len(stacked)] for name, v in stats.items()}
    record = recording.empty_window(one)
    wide = {name: jnp.broadcast_to(v, stacked + v.shape) for name, v in record.items()}
    return recorder(wide)


def _turn(node: Any, attributes: dict[str, Any]) -> tuple:
    """Sets class and attributes, bypassing nnx, which would track them."""
    old = {key: v for key, v in vars(node).items() if key in attributes}
    kind = type(node)
    if kind is nnx.BatchNorm:
        object.__setattr__(node, "__class__", BatchNorm)
    for name, value in attributes.items():
        object.__setattr__(node, name, value)
    return node, kind, old, attributes


def _turn_back(node: Any, kind: type, old: dict[str, Any], new: dict[str, Any]) -> None:
    object.__setattr__(node, "__class__", kind)
    for name, value in new.items():
        if name not in old:
            vars(node).pop(name, None)
        elif vars(node).get(name) is value or isinstance(value, jax.Array):
            # (nnx's transforms replace arrays with other arrays.)
            object.__setattr__(node, name, old[name])
