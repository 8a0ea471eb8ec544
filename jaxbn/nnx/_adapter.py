"""Makes nnx modules from layers: stores their parameters and statistics."""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn import _axes, _compat, _devices, layers
from jaxbn._flax import fields, recording
from jaxbn._running_stats import Momentum

_compat.require_flax("jaxbn.nnx", 0, 12, 0)

NOT_GIVEN = (
    "`use_running_average` was given neither to the constructor nor to the call. Pass "
    "True (inference) or False (training), or call `train()` or `eval()` on the model."
)


LATE_ACCUMULATE = (
    "`accumulate` became True after the module was made, which has no variables for "
    "the window. Pass it to the constructor."
)
COMPLEX = "Make the module with `param_dtype=jnp.complex64`."
STATISTICS = ("mean", "var", "std", "step")


class Common(TypedDict, total=False):
    """The keywords that every variant takes, as `flax.nnx.BatchNorm` does.

    See `Variant`.
    """

    use_running_average: bool | None
    axis: _axes.Axes
    momentum: Momentum
    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype
    use_bias: bool
    use_scale: bool
    bias_init: Initializer
    scale_init: Initializer
    axis_name: _devices.AxisName | None
    accumulate: bool
    implementation: str | None
    skip_nonfinite: bool


class BatchMoments(nnx.BatchStat):
    """Variable for recorded moments, and for a window of micro-batches.

    With `accumulate`, `layer.batch_moments` holds mean, var and count of the data since
    the window was opened, and the statistics at its start.

    Example:
      >>> import jaxbn
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(2, accumulate=True, rngs=nnx.Rngs(0))
      >>> sorted(layer.batch_moments)
      ['count', 'mean', 'start_mean', 'start_var', 'var']

    References:
      https://flax.readthedocs.io/en/latest/guides/filters_guide.html
    """


def stats_dtype(param_dtype: Dtype) -> Dtype:
    """The dtype of the running mean: complex for complex parameters."""
    complex_ = jnp.issubdtype(param_dtype, jnp.complexfloating)
    return param_dtype if complex_ else jnp.float32


def recorder(record: dict[str, jax.Array]) -> nnx.Dict:
    """Variables for a record."""
    return nnx.Dict({name: BatchMoments(value) for name, value in record.items()})


def statistics(module: Any) -> dict[str, nnx.Variable]:
    """The running statistics of a module, by name."""
    found = {name: getattr(module, name, None) for name in STATISTICS}
    return {name: v for name, v in found.items() if v is not None}


def arrays(variables: Mapping[str, nnx.Variable]) -> dict[str, jax.Array]:
    """The values of variables."""
    return {name: variable[...] for name, variable in variables.items()}


class Adapter(nnx.Module):
    """Holds the variables of a layer and calls it: the base of every nnx batch norm."""

    axis: _axes.Axes
    momentum: Momentum
    dtype: Dtype | None
    use_running_average: bool | None
    accumulate: bool
    mean: nnx.Variable
    batch_moments: Any  # An `nnx.Dict`, or None.
    _params: tuple[str, ...]

    def __init_subclass__(cls, **options: Any):
        fields.name_call(cls)
        super().__init_subclass__(**options)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`. In training, updates the statistics.

        Args:
          x: The input.
          use_running_average: True for inference, False for training. Takes precedence
            over the constructor, `train()` and `eval()`.
          mask: Boolean mask or non-negative weights that broadcast against `x`. Where
            it is False or 0, values do not count in the statistics.

        Returns:
          An array with the shape of `x`.
        """
        return self._run(x, use_running_average, mask)

    def _layer(self, **given: Any) -> layers.Layer:
        raise NotImplementedError(
            f"{type(self).__name__} must define `_layer(**options)`, which returns the "
            "`jaxbn.layers.Layer` that it holds the variables of."
        )

    def _keeps_step(self) -> bool:
        """Whether the module keeps a step count, because an option depends on it."""
        return callable(self.momentum)

    def _operands(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """The input and the parameters for the layer, and its output dtype."""
        params = {name: getattr(self, name)[...] for name in self._params}
        x = fields.like_mean(x, self.mean[...], COMPLEX)
        return x, params, fields.output_dtype(x, *params.values(), dtype=self.dtype)

    def _run(
        self,
        x: ArrayLike,
        use_running_average: bool | None,
        mask: ArrayLike | None,
        **inputs: Any,
    ) -> jax.Array:
        """Implements `__call__`."""
        training, stats = self._is_training(use_running_average), statistics(self)
        if callable(self.momentum) and "step" not in stats:
            raise ValueError(fields.LATE_MOMENTUM)
        x = fields.as_inexact(x)
        axes = fields.feature_axes(self.axis, x.ndim)
        x, params, dtype = self._operands(x)
        layer = self._layer(feature_axes=axes, dtype=dtype)
        features = _axes.lengths(x, axes)
        _, like = fields.shapes(layer, features)
        fields.require_features("num_features", self.mean[...], like.mean, x, axes)
        fields.require_mask(mask, x)
        record = self._record(training)
        y, new, recorded = recording.run(
            layer,
            partial(fields.state, type(like), like=like),
            params,
            arrays(stats),
            None if record is None else arrays(record),
            x,
            training=training,
            weights=mask,
            **inputs,
        )
        if training:
            for name, variable in stats.items():
                variable[...] = getattr(new, name)
        for name, value in recorded.items():
            _compat.assign(record[name], value)  # type: ignore  (None recorded nothing)
        return y

    def _is_training(self, use_running_average: bool | None) -> bool:
        """Whether a call normalizes by the batch; already decided in a measurement."""
        own, record = self.use_running_average, self.batch_moments
        if record is None or recording.is_window(record):
            own = first_from(use_running_average, own, error_msg=NOT_GIVEN)
        return fields.is_training(own)

    def _record(self, training: bool) -> Any:
        """The variables that a call records moments in, if any."""
        record = self.batch_moments
        if training and self.accumulate and record is None:
            raise ValueError(LATE_ACCUMULATE)
        if record is None or not recording.is_window(record):
            return record
        return record if training and self.accumulate else None

    def _open_window(self) -> None:
        """Makes the variables of a window, if `accumulate`."""
        self.batch_moments = nnx.data(None)
        if self.accumulate:
            stats = arrays(statistics(self))
            self.batch_moments = recorder(recording.empty_window(stats))


class Variant(Adapter):
    """The arguments of every variant, as in `flax.nnx.BatchNorm`.

    Variables are `nnx.Param` (scale, bias) and `nnx.BatchStat` (mean, var, and `step`
    if an option is a function of it).

    Args:
      num_features: The number of features; a tuple if `axis` is one.
      use_running_average: True for inference, False for training.
      axis: The feature axis or axes of the input.
      momentum: Weight of the old statistics: a number, an array, or a function of the
        number of updates.
      epsilon: Added to the variance.
      dtype: The output's dtype; by default promoted from input and parameters.
      param_dtype: The dtype of the parameters. If complex, the running mean is too.
      use_bias: Whether there is a bias.
      use_scale: Whether there is a scale.
      bias_init: Initializer of the bias.
      scale_init: Initializer of the scale.
      axis_name: Name or names of mapped axes to compute statistics over.
      accumulate: As for `BatchNorm`.
      implementation: As for `BatchNorm`.
      skip_nonfinite: As for `BatchNorm`.
      rngs: For the initializers.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        axis: _axes.Axes = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: _devices.AxisName | None = None,
        accumulate: bool = False,
        implementation: str | None = None,
        skip_nonfinite: bool = False,
        rngs: nnx.Rngs,
    ):
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis, self.axis_name = axis, axis_name
        fields.make_hashable(self)
        self.momentum, self.epsilon = momentum, epsilon
        self.dtype, self.param_dtype = dtype, param_dtype
        self.use_bias, self.use_scale = use_bias, use_scale
        self.bias_init, self.scale_init = bias_init, scale_init
        self.accumulate = accumulate
        self.implementation = implementation
        self.skip_nonfinite = skip_nonfinite
        features = _axes.shape(num_features, "num_features")
        layer = self._layer(stats_dtype=stats_dtype(param_dtype))
        params, state = layer.init(features)
        self._params = tuple(params)
        for name, like in params.items():
            init = getattr(self, f"{name.rpartition('_')[2]}_init")
            value = init(rngs.params(), like.shape, param_dtype)
            setattr(self, name, nnx.Param(value))
        for name in state._fields:
            if name != "step" or self._keeps_step():
                setattr(self, name, nnx.BatchStat(getattr(state, name)))
        self._open_window()

    def set_view(self, use_running_average: bool | None = None):
        """Lets `nnx.view` set `use_running_average`; None leaves it unchanged."""
        if use_running_average is not None:
            self.use_running_average = use_running_average
