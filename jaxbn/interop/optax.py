"""Masks of parameters for optimizers, and averages of trees with running statistics."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn import _dtypes

# The names of norm parameters in Flax, Haiku, Keras and jaxbn's `conditional`.
OF_NORMS = {"scale", "offset", "gamma", "beta", "scale_kernel", "bias_kernel"}
# "bias", Haiku's "b", Equinox's "bias_n", torch's "in_proj_bias" and "bias_ih_l0".
BIAS = re.compile(r"b|(.*_)?bias(_.*)?")
# BatchNorm, RMSNorm, InstanceNorm2d, GroupNormalization, BatchRenorm.
NORM_CLASS = re.compile(r".*norm(alization)?(\dd)?", re.IGNORECASE)
# Words of a name, in the spellings of layers, classes and abbreviations.
OF_BATCH = re.compile(r"batch_?(re)?_?norm|(^|_)bn(\d|_|$)|^bn\w*norm", re.IGNORECASE)
OF_OTHERS = re.compile(
    r"(layer|group|instance|rms|spectral|weight|filter|scale|power)_?norm"
    r"|(^|_)(ln|gn|rms)(_?\d+)?$",
    re.IGNORECASE,
)
# Linen names the parameters of these by the kernels that they normalize.
OF_KERNELS = re.compile(r"(Weight|Spectral)Norm_\d+")
# Names of running means in Flax, torch, Keras and Haiku.
MEANS = {"mean", "running_mean", "moving_mean", "mean_ema"}

Path = tuple[str, ...]


def weight_decay_mask(params: Any, *, biases: bool = False) -> Any:
    """Makes a mask for optax that excludes norms and biases from weight decay.

        update(p) = … + weight_decay · p    only where the mask is True

    In dicts, the parameters of a norm are recognized by name: "scale", "offset",
    "gamma", "beta", "scale_kernel" and "bias_kernel", as in linen, nnx, Haiku, Keras
    and jaxbn, and a "weight" with one axis, as in torch. In trees of objects, as in
    Equinox, a parameter belongs to a norm if its object does: if the name of the class
    or of a base class ends in "Norm" or "Normalization", perhaps with "1d", "2d" or
    "3d". Biases are parameters named "b", "bias", or "bias" joined to other words by
    "_".

    Args:
      params: The parameters: a tree of dicts, lists and dataclasses, as in linen,
        jaxbn's layers, Haiku and Equinox (`eqx.filter(model, eqx.is_array)`, where None
        stays None); an `nnx.State`; or one of these flattened to a dict whose keys are
        tuples or paths ("norm/scale", "norm.scale").
      biases: Whether weight decay also applies to biases of layers with a weight, such
        as dense layers. It never applies to biases of norms, or to biases without a
        weight.

    Returns:
      The `mask` for optax: a tree like `params` with False for each parameter of a norm
      and, by default, for each bias, and True for the others.

    Raises:
      TypeError: `biases` is neither True nor False.

    Example:
      >>> import functools, jaxbn, optax
      >>> params = {"kernel": 1.0, "bias": 0.0, "norm": {"scale": 1.0, "bias": 0.0}}
      >>> mask = jaxbn.interop.optax.weight_decay_mask
      >>> print(mask(params))
      {'bias': False, 'kernel': True, 'norm': {'bias': False, 'scale': False}}
      >>> print(mask(params, biases=True))
      {'bias': True, 'kernel': True, 'norm': {'bias': False, 'scale': False}}
      >>> optimizer = optax.adamw(1e-3, weight_decay=1e-2, mask=mask)
      >>> both = functools.partial(mask, biases=True)
      >>> optimizer = optax.adamw(1e-3, weight_decay=1e-2, mask=both)

    References:
      He et al., "Bag of Tricks for Image Classification with Convolutional Neural
      Networks" (2019), section 3.1, "No bias decay".
    """
    if not isinstance(biases, bool):
        raise TypeError(
            f"`biases` must be True or False, got {biases!r}. As a mask with biases, "
            "pass `functools.partial(weight_decay_mask, biases=True)`."
        )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    kinds = [(_names(path), _kind(params, path, leaf)) for path, leaf in leaves]
    beside = defaultdict(set)
    for names, kind in kinds:
        beside[names[:-1]].add(kind)
    decayed = [
        kind == "weight"
        or (biases and kind == "bias" and "weight" in beside[names[:-1]])
        for names, kind in kinds
    ]
    return treedef.unflatten(decayed)


def batch_norm_mask(params: Any, statistics: Any = None) -> Any:
    """Makes a mask for optax that selects the parameters of batch norms.

        True     for scale and bias of each batch norm, also by class or domain
        False    for all other parameters, including those of layer and group norms

    With this mask, an optimizer can freeze the batch norms, train them alone, or treat
    them differently (`optax.selective_transform`, `optax.masked`, the masks of
    `optax.lars`).

    A batch norm is a norm with running statistics. Without `statistics`, it is
    recognized by the name of its module or class: "BatchNorm_0", "batch_normalization",
    "bn1", "BatchRenorm".

    Args:
      params: The parameters, as for `weight_decay_mask`.
      statistics: The statistics of the same model, in a tree with the same paths:
        `variables["batch_stats"]` in linen, `nnx.state(model, nnx.BatchStat)` in nnx,
        the state in Haiku, the states of jaxbn's layers. They are used instead of
        names. Classes, as in Equinox, are recognized without them.

    Returns:
      A tree like `params` with True for each parameter of a batch norm, and False for
      the others.

    Raises:
      ValueError: There are no `statistics`, and the names of some norms do not show
        whether they are batch norms.

    Example:
      >>> import jax, jaxbn, optax
      >>> norm = {"scale": 1.0, "bias": 0.0}
      >>> params = {"kernel": 1.0, "bias": 0.0, "BatchNorm_0": norm, "norm": norm}
      >>> batch_stats = {"BatchNorm_0": {"mean": 0.0, "var": 1.0}}
      >>> mask = jaxbn.interop.optax.batch_norm_mask(params, batch_stats)
      >>> print(mask["BatchNorm_0"], mask["norm"])
      {'bias': True, 'scale': True} {'bias': False, 'scale': False}
      >>> adam, rest = optax.adam(1e-3), jax.tree.map(lambda own: not own, mask)
      >>> without_norms = optax.selective_transform(adam, freeze_mask=mask)
      >>> only_norms = optax.selective_transform(adam, freeze_mask=rest)

    References:
      Wang et al., "Tent: Fully Test-time Adaptation by Entropy Minimization" (2021).
      Frankle, Schwab and Morcos, "Training BatchNorm and Only BatchNorm" (2021).
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    modules: dict[Path, list] = defaultdict(list)
    for path, leaf in leaves:
        owner, _ = _holders(params, path)
        kind = _kind(params, path, leaf)
        modules[_names(path)[:-1]].append((kind, owner))
    known = None if statistics is None else _paths_of_means(statistics)
    of_batch = {path: _is_of_batch(path, own, known) for path, own in modules.items()}
    if unclear := ["/".join(p) for p, found in of_batch.items() if found is None]:
        raise ValueError(
            f"The names of these norms do not say whether they are batch norms: "
            f"{unclear}. Pass `statistics`, those of the model (in linen, "
            "`variables['batch_stats']`)."
        )
    return treedef.unflatten(of_batch[_names(path)[:-1]] for path, _ in leaves)


def incremental_update(new: Any, old: Any, step_size: ArrayLike) -> Any:
    """Moves a target network towards the trained network, including its step counts.

        old + step_size · (new − old)       for floating and complex arrays
        new                                 for all others, such as the count `step`

    Like `optax.incremental_update`, but for trees that hold running statistics. That
    function makes `step` a float that is no longer a whole count, and a `scan` rejects
    the changed dtype. Here, every leaf keeps its dtype. The same function can average
    models.

    The averaged statistics are only near the statistics of the averaged weights. After
    large steps, measure them again (`jaxbn.population.recalibrate`).

    Args:
      new: A tree of arrays: parameters, `batch_stats`, states of layers.
      old: The target, a tree of the same structure. Keep it in float32, because small
        steps are lost in half precision.
      step_size: The weight of `new`, from 0 to 1.

    Returns:
      A tree with the structure, shapes and dtypes of `old`.

    Raises:
      ValueError: `step_size` is not from 0 to 1, or the trees differ in structure.

    Example:
      >>> import jaxbn
      >>> _, old = jaxbn.layers.standard().init(1)
      >>> new = old._replace(mean=old.mean + 10, step=old.step + 7)
      >>> target = jaxbn.interop.optax.incremental_update(new, old, 0.1)
      >>> print(target.mean, target.step, target.step.dtype)
      [1.] 7 int32

    References:
      https://optax.readthedocs.io/en/latest/api/apply_updates.html
    """
    share = _dtypes.known(step_size)
    if share is not None and not np.all((share >= 0) & (share <= 1)):
        raise ValueError(f"`step_size` must be from 0 to 1, got {step_size}.")

    def moved(new: Any, old: Any) -> jax.Array:
        new, old = jnp.asarray(new), jnp.asarray(old)
        if not jnp.issubdtype(old.dtype, jnp.inexact):
            return new.astype(old.dtype)
        wide = _dtypes.widen(old)
        return (wide + step_size * (new - wide)).astype(old.dtype)

    return jax.tree.map(moved, new, old)


def _paths_of_means(statistics: Any) -> set[Path]:
    """The paths of the modules that have a running mean."""
    found = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(statistics):
        names = _names(path)
        for i, name in enumerate(names):
            if name in MEANS:
                # Haiku's averages are modules: "batch_norm/~/mean_ema".
                found.add(names[: i - 1] if names[i - 1 : i] == ("~",) else names[:i])
    return found


def _is_of_batch(path: Path, own: list, known: set[Path] | None) -> bool | None:
    """Whether a module with these kinds of parameters is a batch norm.

    None if it is a norm, and nothing says which.
    """
    kinds = {kind for kind, _ in own}
    classes = [c.__name__ for _, o in own if _is_norm(o) for c in type(o).__mro__]
    if "weight" in kinds:
        return False
    if known is not None and not classes:
        return path in known
    names = classes or [path[-1] if path else ""]
    if any(map(OF_BATCH.search, names)):
        return True
    if any(map(OF_OTHERS.search, names)) or any(map(OF_KERNELS.fullmatch, path)):
        return False
    is_norm = "norm" in kinds or any("norm" in name.lower() for name in names)
    return None if is_norm else False


def _kind(params: Any, path: tuple, leaf: Any) -> str:
    """The kind of a parameter: "norm", "bias" or "weight"."""
    name = (_names(path) or ("",))[-1]
    owner, parent = _holders(params, path)
    of_torch = (
        name == "weight"
        and isinstance(parent, Mapping)
        and len(getattr(leaf, "shape", ())) == 1
    )
    if name in OF_NORMS or of_torch or _is_norm(owner):
        return "norm"
    return "bias" if BIAS.fullmatch(name) else "weight"


def _is_norm(owner: Any) -> bool:
    return any(NORM_CLASS.fullmatch(c.__name__) for c in type(owner).__mro__)


def _holders(params: Any, path: tuple) -> tuple[Any, Any]:
    """The last object with attributes on the path to a leaf, and the leaf's container.

    Dicts and lists in an object belong to it.
    """
    owner, parent, node = None, None, params
    for key in _own(path):
        parent = node
        if isinstance(key, jax.tree_util.GetAttrKey):
            owner, node = node, getattr(node, key.name)
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        else:  # A class that does not name its children.
            return None, None
    return owner, parent


def _own(path: tuple) -> tuple:
    """The path without the step from an nnx variable to its array."""
    in_variable = path and path[-1] == jax.tree_util.GetAttrKey("value")
    return path[:-1] if in_variable else path


def _names(path: tuple) -> Path:
    """The names on the path to a leaf, in a nested or flattened tree."""
    found: list[str] = []
    for key in _own(path):
        name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))
        for part in name if isinstance(name, tuple) else (name,):
            found += str(part).replace(".", "/").split("/")
    return tuple(found)
