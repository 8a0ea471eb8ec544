"""What every layer is: a few pure functions."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn import _axes
from jaxbn._moments import Moments

Params = dict[str, jax.Array]


class Init(Protocol):
    """`init(features) -> (params, state)`."""

    def __call__(self, features: int | tuple[int, ...]) -> tuple[Params, Any]: ...


# `apply(params, state, x, *, training, weights=None) -> (y, state)`; some layers take a
# keyword more, for which Python has no other type.
Apply = Callable[..., tuple[jax.Array, Any]]


class Layer(NamedTuple):
    """A batch norm as pure functions, in the manner of optax.

    `init` and `apply` are all that training and inference need. `forward` and `update`
    are the halves of `apply`, for moments that come in several parts or from elsewhere:
    in training, `apply` is `y, m = forward(...)`, `state = update(state, m)`.

    Attributes:
      init: `init(features) -> (params, state)`. `features` is the number of features,
        or the lengths of several feature axes; `params` are trained, `state` is not.
      apply: `apply(params, state, x, *, training, weights=None) -> (y, state)`.
        `training` is a Python bool. The new state has the structure, shapes and dtypes
        of the old one; at inference it is the old one. `domain` and `conditional` take
        one keyword more.
      forward: Called like `apply`, it returns `(y, moments)`: the `Moments` that the
        state is to be moved by, or, at inference, those of `x`.
      update: `update(state, moments) -> state`, by moments as `forward` returns them,
        or pooled by `merge_moments`.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.layers.standard(momentum=0.5)
      >>> params, state = layer.init(1)
      >>> def forward(x):  # two micro-batches, one step of the statistics
      ...     return layer.forward(params, state, x, training=True)
      >>> y, m = jax.vmap(forward)(jnp.array([[[1.0], [3.0]], [[5.0], [7.0]]]))
      >>> print(layer.update(state, jaxbn.merge_moments(m)).mean)
      [2.]
    """

    init: Init
    apply: Apply
    forward: Callable[..., tuple[jax.Array, Moments]]
    update: Callable[[Any, Moments], Any]


def compose(
    init: Init,
    names: list[str],
    *,
    train: Callable[..., tuple[jax.Array, Moments]],
    infer: Callable[..., jax.Array],
    measure: Callable[..., Moments],
    update: Callable[[Any, Moments], Any],
) -> Layer:
    """The layer with parameters of these names that has these parts.

    `train`, `infer` and `measure` are called with the parameters (not `measure`), the
    state, `x`, the weights, and what else the layer's `apply` takes by keyword.
    """

    def forward(params, state, x, *, training, weights=None, **inputs):
        require_call(training, params, names)
        if training:
            return train(params, state, x, weights, **inputs)
        y = infer(params, state, x, weights, **inputs)
        return y, measure(state, x, weights, **inputs)

    def apply(params, state, x, *, training, weights=None, **inputs):
        require_call(training, params, names)
        if not training:
            return infer(params, state, x, weights, **inputs), state
        y, m = train(params, state, x, weights, **inputs)
        return y, update(state, m)

    return Layer(init, apply, forward, update)


def init_affine(
    features: int | tuple[int, ...],
    use_scale: bool,
    use_bias: bool,
    param_dtype: DTypeLike,
) -> Params:
    """Scale 1 and bias 0, those of them that are wanted."""
    shape = _axes.shape(features)
    params = {}
    if use_scale:
        params["scale"] = jnp.ones(shape, param_dtype)
    if use_bias:
        params["bias"] = jnp.zeros(shape, param_dtype)
    return params


def require_call(training: Any, params: Params, names: list[str]) -> None:
    """Refuses a traced `training`, and other parameters than the layer's own."""
    if not isinstance(training, bool):
        raise TypeError(
            f"`training` must be a Python bool, got {training!r}. It chooses between "
            "two programs: close over it, or mark it static in `jax.jit` "
            "(`static_argnames='training'`)."
        )
    if set(params) != set(names):
        raise ValueError(
            f"`params` has {sorted(params)}, expected {sorted(names)}. Take them from "
            "this layer's `init`; `use_scale` and `use_bias` decide which there are."
        )


def require_count(name: str, value: Any) -> int:
    """Refuses what is no integer of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, got {value!r}.") from None
    if count < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    return count


def require_one_count(**options: int | None) -> tuple[str, int]:
    """Name and value of the one option that is given."""
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"Give one of {' and '.join(f'`{name}`' for name in options)}, got "
            f"{'both' if given else 'neither'}."
        )
    ((name, value),) = given.items()
    return name, require_count(name, value)
