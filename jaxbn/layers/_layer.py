"""What every layer is: a pair of pure functions."""

from typing import Any, NamedTuple, Protocol

import jax
from jax.typing import ArrayLike

Params = dict[str, jax.Array]


class Init(Protocol):
    """`init(features) -> (params, state)`."""

    def __call__(self, features: int | tuple[int, ...]) -> tuple[Params, Any]: ...


class Apply(Protocol):
    """`apply(params, state, x, *, training, weights=None) -> (y, state)`."""

    def __call__(
        self,
        params: Params,
        state: Any,
        x: ArrayLike,
        *,
        training: bool,
        weights: ArrayLike | None = None,
    ) -> tuple[jax.Array, Any]: ...


class Layer(NamedTuple):
    """A batch norm as two pure functions, in the manner of optax.

    Attributes:
      init: `init(features) -> (params, state)`. `features` is the number of features,
        or the lengths of several feature axes; `params` are trained, `state` is not.
      apply: `apply(params, state, x, *, training, weights=None) -> (y, state)`.
        `training` is a Python bool. The new state has the structure, shapes and dtypes
        of the old one; at inference it is the old one.

    Example:
      >>> import jaxbn
      >>> layer = jaxbn.layers.standard()
      >>> params, state = layer.init(3)
      >>> sorted(params)
      ['bias', 'scale']
    """

    init: Init
    apply: Apply


def require_static_training(training: Any) -> None:
    """Refuses a `training` that is not known while tracing."""
    if not isinstance(training, bool):
        raise TypeError(
            f"`training` must be a Python bool, got {training!r}. It chooses between "
            "two programs: close over it, or mark it static in `jax.jit` "
            "(`static_argnames='training'`)."
        )


def require_params(params: Params, names: list[str]) -> None:
    """Refuses parameters that the layer would ignore, and those it would miss."""
    if set(params) != set(names):
        raise ValueError(
            f"`params` has {sorted(params)}, expected {sorted(names)}. Take them from "
            "this layer's `init`; `use_scale` and `use_bias` decide which there are."
        )
