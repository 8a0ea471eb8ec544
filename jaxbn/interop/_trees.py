"""Checkpoints as dicts: checks them, flattens them, and splits them into layers."""

import reprlib
from collections.abc import Mapping
from typing import Any


def require_dict(
    name: str, tree: Any, what: str = "a dict", hint: str = ""
) -> Mapping[str, Any]:
    """Raises unless `tree` is a dict with only string keys."""
    if not isinstance(tree, Mapping):
        got = type(tree).__name__
    else:
        others = [key for key in tree if not isinstance(key, str)]
        if not others:
            return tree
        got = f"one with the key {reprlib.repr(others[0])}, which is no string"
    raise TypeError(f"`{name}` must be {what}, got {got}.{hint and ' '}{hint}")


def flat(name: str, tree: Any, what: str = "a dict", hint: str = "") -> dict[str, Any]:
    """Flattens a nested dict to one whose keys are paths: "block/norm/gamma"."""
    found: dict[str, Any] = {}
    for key, value in require_dict(name, tree, what, hint).items():
        if isinstance(value, Mapping):
            below = flat(f"{name}[{key!r}]", value, what, hint)
            found |= {f"{key}/{rest}": v for rest, v in below.items()}
        else:
            found[key] = value
    return found


def by_layer(flat: Mapping[str, Any], separator: str) -> dict[str, dict[str, Any]]:
    """Splits a dict of arrays by path into a dict by name for each layer."""
    layers: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        layer, _, name = key.rpartition(separator)
        layers.setdefault(layer, {})[name] = value
    return layers


def require_way(name: str, flat: Mapping[str, Any], path: str) -> None:
    """Raises if another tree has a value instead of a dict on the path to a layer."""
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        above = "/".join(parts[:depth])
        if above in flat:
            require_dict(f"{name}[{above!r}]", flat[above])
