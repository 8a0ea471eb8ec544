"""The names of a batch norm's variables in Keras and TensorFlow, in every format.

A variable is `bn/gamma` in `model.weights`, `bn/gamma:0` in tf.keras 2, `vars/0` in a
.weights.h5 file, and has a suffix in TensorFlow checkpoints.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAMES = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}
RENORM = {
    "moving_stddev": "moving_std",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "std",
}
MARKS = {"moving_mean", "moving_variance", *RENORM}
SUFFIX = re.compile(
    r"(:\d+|/\.ATTRIBUTES/VARIABLE_VALUE|/ExponentialMovingAverage|/EMA)+$"
)
# The name in a .weights.h5 file for a layer of any name, in a Sequential or functional
# model.
IN_A_FILE = re.compile(r"(.*/)?batch_normalization(_\d+)?")

BY_NAME = "{v.name: v for v in layer.weights}"
AVERAGES = (
    "{k: v for k, v in arrays.items() if f'{k}/ExponentialMovingAverage' not in arrays}"
)

Keys = dict[str, str]  # Keras' name of a variable to its key.


def keys_of(keys: Iterable[str]) -> Keys:
    """The keys of one layer, by Keras' names."""
    found: Keys = {}
    for key in keys:
        _, name = _parsed(key)
        if name in found:
            raise _two_of_a_name(found[name], key)
        found[name] = key
    if not found or not all(name.isdigit() for name in found):
        return found
    in_order = sorted(found, key=int)
    if [int(name) for name in in_order] != list(range(len(found))):
        raise ValueError(
            f"`arrays` has {list(found.values())}, of which one is missing. Pass all "
            "variables of the layer."
        )
    return named([found[name] for name in in_order])


def named(variables: Sequence[Any]) -> dict[str, Any]:
    """The variables of one layer, by Keras' names, in the order of `layer.weights`."""
    names = [*NAMES, *RENORM]
    orders = {len(o): o for o in (names[2:4], names[:4], names[2:], names)}
    number = len(variables)
    if number not in orders:
        shown = f", {variables}" if all(isinstance(v, str) for v in variables) else ""
        raise ValueError(
            f"`arrays` has {number} of them{shown}, which may be more than one set: "
            f"of gamma and beta one may be missing. Pass them by their names, "
            f"`{BY_NAME}`."
        )
    return dict(zip(orders[number], variables, strict=True))


def batch_norms(weights: Mapping[str, Any]) -> dict[str, Keys]:
    """The keys of each batch norm of a model."""
    layers: dict[str, list[str]] = {}
    for key in weights:
        layers.setdefault(_parsed(key)[0], []).append(key)
    return {
        layer: keys_of(keys)
        for layer, keys in layers.items()
        if _is_batch_norm(layer, {key: weights[key] for key in keys})
    }


def _is_batch_norm(layer: str, variables: Mapping[str, Any]) -> bool:
    there = {key: value for key, value in variables.items() if value is not None}
    names = [_parsed(key)[1] for key in there]
    if not all(name.isdigit() for name in names):
        return not MARKS.isdisjoint(names)
    if IN_A_FILE.fullmatch(layer):
        return bool(names)
    # No other layer has this many vectors of equal length.
    shapes = {getattr(value, "shape", None) for value in there.values()}
    shape = shapes.pop() if len(shapes) == 1 else None
    return len(names) > 2 and shape is not None and len(shape) == 1


def _parsed(key: str) -> tuple[str, str]:
    """The path of the layer, and the variable's name or number."""
    layer, _, name = SUFFIX.sub("", key).rpartition("/")
    if name.isdigit() and (layer == "vars" or layer.endswith("/vars")):
        layer = layer.removesuffix("vars").removesuffix("/")
    return layer, name


def _two_of_a_name(one: str, other: str) -> ValueError:
    if _parsed(one) == _parsed(other):
        return ValueError(
            f"`{one}` and `{other}` are the same variable, as it is and averaged. Pass "
            f"one of them; averages, where there are any, by `{AVERAGES}`."
        )
    return ValueError(
        f"`arrays` has two of a name: `{one}` and `{other}`. Pass the weights of one "
        "layer at a time, or those of the whole model to "
        "`jaxbn.interop.keras.batch_norms`."
    )
