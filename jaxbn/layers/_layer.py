"""The common form of layers: a few pure functions."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, ParamSpec, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbn import _axes, _devices, _dtypes
from jaxbn._batch import Batch, checked_batch
from jaxbn._batch_norm import normalize_batch
from jaxbn._moments import Moments, finite_only, moments_about
from jaxbn._normalize import normalize_given
from jaxbn._running_stats import RunningStats, init_stats
from jaxbn.layers._fast_variance import chosen
from jaxbn.layers._made import Function, Made, signature

Params = dict[str, jax.Array]
P = ParamSpec("P")


class Init(Protocol):
    """`init(features) -> (params, state)`."""

    def __call__(self, features: int | tuple[int, ...]) -> tuple[Params, Any]: ...


# `apply(params, state, x, *, training, weights=None) -> (y, state)`. Some layers take
# one more keyword; Python has no more precise type for this.
Apply = Callable[..., tuple[jax.Array, Any]]


@jax.tree_util.register_static
class Layer(NamedTuple):
    """A batch norm as pure functions, in the style of optax.

    `init` and `apply` are enough for training and inference. `forward` and `update` are
    the halves of `apply`, for moments that are pooled from several parts or come from
    elsewhere. In training, `apply` is `y, m = forward(...)` and
    `state = update(state, m)`.

    Layers with equal options are equal and have the same hash. Layers and their
    functions can be pickled. To JAX, a layer is part of the structure of a tree, not a
    leaf, so it can be an argument of a compiled function or a field of a module.

    Attributes:
      init: `init(features) -> (params, state)`. `features` is the number of features,
        or the lengths of several feature axes. `params` are trained, `state` is not.
      apply: `apply(params, state, x, *, training, weights=None) -> (y, state)`.
        `training` is a Python bool. The new state has the structure, shapes and dtypes
        of the old one; at inference, it is the old one. `domain` and `conditional` need
        one more keyword.
      forward: Takes the arguments of `apply` and returns `(y, moments)`: in training,
        the `Moments` to update the state with; at inference, the exact moments of `x`.
      update: `update(state, moments) -> state`, with moments from `forward`, or pooled
        by `merge_moments`.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.layers.standard(momentum=0.5)
      >>> layer
      standard(momentum=0.5)
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

    def __repr__(self) -> str:
        return repr(self.apply.made)  # type: ignore  (a `Function`)


def factory(make: Callable[P, Layer]) -> Callable[P, Layer]:
    """Decorates a function that makes layers: layers with equal options are equal."""

    @functools.wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> Layer:
        try:
            given = signature(make).bind(*args, **options).arguments
        except TypeError as error:
            raise TypeError(f"{make.__name__}() {error}") from None
        how = Made(made, given)
        return Layer(*(Function(how, name) for name in Layer._fields))

    return made


Affine = tuple[jax.Array | None, jax.Array | None]  # Scale and bias.


class Norm(NamedTuple):
    """How a layer normalizes, how it computes moments, and over which devices."""

    feature_axes: _axes.Axes
    epsilon: float
    dtype: DTypeLike | None
    axis_name: _devices.AxisName | None
    axis_index_groups: _devices.Groups | None
    implementation: str | None
    use_fast_variance: bool | str
    skip_nonfinite: bool

    def batch(self, x: jax.Array, weights: Any) -> Batch:
        """Checks the arguments and makes a batch of them."""
        over = self.axis_name, self.axis_index_groups
        return checked_batch(x, self.feature_axes, weights, *over, self.implementation)

    def shift(self, state: Any) -> Any:
        """The shift that `use_fast_variance` chooses; None for two passes."""
        split = self.axis_name is not None
        return chosen(self.use_fast_variance, state.mean, split=split)

    def near(self, state: Any, batch: Batch) -> Moments:
        """Moments about that shift."""
        return moments_about(self.shift(state), batch)

    def exact(self, state: Any, x: jax.Array, weights: Any, **_: Any) -> Moments:
        """Moments in two passes."""
        return moments_about(None, self.batch(x, weights))

    def counted(self, m: Moments) -> Moments:
        """The moments, with count 0 for features that running statistics ignore."""
        return finite_only(m) if self.skip_nonfinite else m

    def by_moments(
        self, batch: Batch, m: Moments, affine: Affine, derivatives: str
    ) -> jax.Array:
        """Normalizes a batch by its own moments."""
        options = {"epsilon": self.epsilon, "dtype": self.dtype}
        return normalize_batch(batch, m, *affine, derivatives=derivatives, **options)

    def by_stats(
        self, x: jax.Array, mean, var, affine: Affine, weights: Any = None
    ) -> jax.Array:
        """Normalizes `x` by other statistics. NaN with weight 0 reaches no gradient."""
        options = {"epsilon": self.epsilon, "dtype": self.dtype, "weights": weights}
        vectors = mean, var, *affine
        return normalize_given(x, *vectors, feature_axes=self.feature_axes, **options)

    def infer(self, params: Params, state: RunningStats, x, weights) -> jax.Array:
        """Normalizes `x` by the running statistics."""
        return self.by_stats(x, state.mean, state.var, affine(params))


def affine(params: Params) -> Affine:
    """Scale and bias; None for a missing one."""
    return params.get("scale"), params.get("bias")


def compose(
    init: Init,
    names: list[str],
    norm: Norm,
    *,
    train: Callable[..., tuple[jax.Array, Moments]],
    infer: Callable[..., jax.Array],
    update: Callable[[Any, Moments], Any],
    measure: Callable[..., Moments] | None = None,
    inputs: tuple[str, ...] = (),
    kind: type = RunningStats,
) -> Layer:
    """Makes a layer of these parts, with parameters of these names.

    `train`, `infer` and `measure` are called with the parameters (not `measure`), the
    state, `x` as an array, the weights, and the `inputs`, further keywords of `apply`.
    At inference, `forward` returns exact moments, unless `measure` is given.
    """
    measure = measure or norm.exact

    def trained(params, state, x, weights, **given) -> tuple[jax.Array, Any]:
        y, m = train(params, state, x, weights, **given)
        return y, norm.counted(m)

    def checked(training, params, state, x, given: dict) -> tuple[jax.Array, dict]:
        require_training(training)
        require_names(params, names)
        if unknown := sorted(set(given) - set(inputs)):
            known = ["training", "weights", *inputs]
            raise TypeError(
                f"This layer takes the keywords {known}, but got {unknown} as well. "
                "Pass a mask as `weights`."
            )
        x = _dtypes.inexact_array("x", x)
        require_kind(state, kind)
        require_features(state, x, _axes.canonical(norm.feature_axes, x.ndim))
        return x, {name: given.get(name) for name in inputs}

    def forward(params, state, x, *, training, weights=None, **given):
        x, given = checked(training, params, state, x, given)
        if training:
            return trained(params, state, x, weights, **given)
        y = infer(params, state, x, weights, **given)
        return y, measure(state, x, weights, **given)

    def apply(params, state, x, *, training, weights=None, **given):
        x, given = checked(training, params, state, x, given)
        if not training:
            return infer(params, state, x, weights, **given), state
        y, m = trained(params, state, x, weights, **given)
        return y, update(state, m)

    def move(state, moments):
        require_kind(state, kind)
        return update(state, norm.counted(moments))

    return Layer(init, apply, forward, move)


def init_of(
    use_scale: bool, use_bias: bool, param_dtype: DTypeLike, stats_dtype: DTypeLike
) -> Init:
    """The `init` of a layer with a scale, a bias and `RunningStats`."""

    def init(features):
        params = init_affine(features, use_scale, use_bias, param_dtype)
        return params, init_stats(features, dtype=stats_dtype)

    return init


def init_affine(
    features: int | tuple[int, ...],
    use_scale: bool,
    use_bias: bool,
    param_dtype: DTypeLike,
) -> Params:
    """Scale 1 and bias 0, each only if it is used."""
    shape = _axes.shape(features)
    params = {}
    if use_scale:
        params["scale"] = jnp.ones(shape, param_dtype)
    if use_bias:
        params["bias"] = jnp.zeros(shape, param_dtype)
    return params


def require_training(training: Any) -> None:
    """Raises unless `training` is a Python bool."""
    if not isinstance(training, (bool, np.bool_)):
        raise TypeError(
            f"`training` must be a Python bool, got {training!r}. It chooses between "
            "two programs: close over it, or mark it static in `jax.jit` "
            "(`static_argnames='training'`)."
        )


def require_names(params: Params, names: Iterable[str]) -> None:
    """Raises unless the parameters have exactly these names."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"`params` must be a dict, got {type(params).__name__}. Take it from this "
            "layer's `init`; `apply` takes `(params, state, x)`."
        )
    if set(params) != set(names):
        raise ValueError(
            f"`params` has {sorted(params)}, expected {sorted(names)}. Take them from "
            "this layer's `init`; `use_scale` and `use_bias` decide on the names."
        )


def require_kind(state: Any, kind: type) -> None:
    """Raises unless the state has the fields of `kind`."""
    if not all(hasattr(state, name) for name in kind._fields):  # type: ignore
        raise TypeError(
            f"`state` must be a `{kind.__name__}`, as this layer's `init` makes it, "
            f"got {type(state).__name__}."
        )


def require_features(state: Any, x: jax.Array, feature_axes: tuple[int, ...]) -> None:
    """Raises unless the state has the same features as `x`."""
    features, shape = _axes.lengths(x, feature_axes), np.shape(state.mean)
    own = shape[max(len(shape) - len(features), 0) :]
    if own != features:
        needed = features[0] if len(features) == 1 else features
        raise ValueError(
            f"`state.mean` is for features of shape {own}, but `x` of shape {x.shape} "
            f"has {features} along `feature_axes`, {feature_axes}. Make the state "
            f"with `init({needed})`, or name other `feature_axes`."
        )


def require_count(name: str, value: Any) -> int:
    """Returns `value`; raises unless it is an integer of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, got {value!r}.") from None
    if count < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    return count


def require_one_count(**options: int | None) -> tuple[str, int]:
    """Name and value of the only option given; raises unless exactly one is given."""
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"Give one of {' and '.join(f'`{name}`' for name in options)}, got "
            f"{'both' if given else 'neither'}."
        )
    ((name, value),) = given.items()
    return name, require_count(name, value)
