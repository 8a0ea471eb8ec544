"""For optimizers: which parameters weight decay is for."""

from typing import Any

import jax


def weight_decay_mask(params: Any) -> Any:
    """Weight decay for everything but scales and biases, as a mask for optax.

        update(p) = … + weight_decay · p    only where the mask is True

    Leaves are told by their name, so that those called "scale" or "bias" in other
    layers are left alone as well.

    Args:
      params: The parameters: a tree of dicts, lists and dataclasses, as linen, jaxbn's
        layers, haiku and equinox make them, an `nnx.State`, or one of these flattened
        to a dict whose keys are tuples or paths ("norm/scale", "norm.scale").

    Returns:
      A tree like `params` with False for each leaf called "scale" or "bias", and True
      for the others: what optax takes for `mask`.

    Example:
      >>> import jaxbn, optax
      >>> params = {"kernel": 1.0, "norm": {"scale": 1.0, "bias": 0.0}}
      >>> print(jaxbn.interop.optax.weight_decay_mask(params))
      {'kernel': True, 'norm': {'bias': False, 'scale': False}}
      >>> mask = jaxbn.interop.optax.weight_decay_mask
      >>> optimizer = optax.adamw(1e-3, weight_decay=1e-2, mask=mask)

    References:
      He et al., "Bag of Tricks for Image Classification with Convolutional Neural
      Networks" (2019), section 3.1, "No bias decay".
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path) not in ("scale", "bias"), params
    )


def _name(path: tuple) -> str:
    """The last name on the way to a leaf, in a nested tree or a flattened one."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]  # an nnx variable's array
    last = path[-1] if path else None
    name = getattr(last, "key", getattr(last, "name", None))
    if isinstance(name, tuple):
        name = name[-1]
    return str(name).replace(".", "/").rpartition("/")[2]
