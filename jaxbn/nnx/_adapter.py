"""From a layer to an nnx module: where its parameters and statistics live."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn import _axes, _devices, layers
from jaxbn._flax import fields, recording
from jaxbn._running_stats import Momentum

NOT_GIVEN = (
    "`use_running_average` was given neither to the constructor nor to the call. Pass "
    "True (inference) or False (training), or call `train()` or `eval()` on the model."
)


LATE_ACCUMULATE = (
    "`accumulate` became True after the module was made, which has no variables for "
    "the window. Pass it to the constructor."
)
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


class BatchMoments(nnx.BatchStat):
    """Moments of batches, and what else belongs to a window of micro-batches.

    The arrays of `layer.batch_moments`: mean, var and count of what was seen since the
    window was opened, and the statistics at its start.

    Example:
      >>> import jaxbn
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(2, accumulate=True, rngs=nnx.Rngs(0))
      >>> sorted(layer.batch_moments)
      ['count', 'mean', 'start_mean', 'start_var', 'var']

    References:
      https://flax.readthedocs.io/en/latest/guides/filters_guide.html
    """


def recorder(record: dict[str, jax.Array]) -> nnx.Dict:
    """Variables for what is recorded."""
    return nnx.Dict({name: BatchMoments(value) for name, value in record.items()})


def is_training(module: Any, use_running_average: bool | None) -> bool:
    """Whether a call normalizes by the batch; what is being measured is not asked."""
    own, record = module.use_running_average, module.batch_moments
    if record is None or recording.is_window(record):
        own = first_from(use_running_average, own, error_msg=NOT_GIVEN)
    return fields.is_training(own)


def statistics(module: Any) -> dict[str, nnx.Variable]:
    """The running statistics of a module, by their names."""
    found = {name: getattr(module, name, None) for name in STATISTICS}
    return {name: v for name, v in found.items() if v is not None}


def run(
    module: Any,
    layer: layers.Layer,
    kind: Callable[[dict], Any],
    params: dict[str, jax.Array],
    x: jax.Array,
    *,
    training: bool,
    **inputs: Any,
) -> jax.Array:
    """Applies a layer to the variables of its module, and updates them."""
    stats, record = statistics(module), module.batch_moments
    if training and module.accumulate and record is None:
        raise ValueError(LATE_ACCUMULATE)
    if record is not None and recording.is_window(record):
        record = record if training and module.accumulate else None
    y, new, recorded = recording.run(
        layer,
        kind,
        params,
        {name: variable[...] for name, variable in stats.items()},
        record and {name: variable[...] for name, variable in record.items()},
        x,
        training=training,
        **inputs,
    )
    if training:
        for name, variable in stats.items():
            variable[...] = getattr(new, name)
    for name, value in recorded.items():
        record[name][...] = value  # type: ignore  (None recorded nothing)
    return y


class Variant(nnx.Module):
    """Holds the variables of a layer and calls its `apply`.

    Variables are `nnx.Param` (scale, bias) and `nnx.BatchStat` (mean, var, and step
    where something is a function of it).

    Args:
      num_features: The number of features; a tuple where `axis` is one.
      use_running_average: Inference if True, training if False.
      axis: The feature axis or axes of the input.
      momentum: Weight of the old statistics: a number, an array, or a function of the
        number of updates.
      epsilon: Added to the variance.
      dtype: The output's dtype; by default that of input and parameters together.
      param_dtype: The dtype of the parameters. If complex, the running mean is so too.
      use_bias: Whether there is a bias.
      use_scale: Whether there is a scale.
      bias_init: Initializer of the bias.
      scale_init: Initializer of the scale.
      axis_name: Name or names of mapped axes to compute statistics over.
      accumulate: As for `BatchNorm`.
      implementation: As for `BatchNorm`.
      rngs: For the initializers.
    """

    def __init_subclass__(cls, **options: Any):
        fields.name_call(cls)
        super().__init_subclass__(**options)

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
        rngs: nnx.Rngs,
    ):
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis, self.axis_name, _ = fields.hashable(axis, axis_name, None)
        self.momentum, self.epsilon = momentum, epsilon
        self.dtype, self.param_dtype = dtype, param_dtype
        self.use_bias, self.use_scale = use_bias, use_scale
        self.bias_init, self.scale_init = bias_init, scale_init
        self.accumulate = accumulate
        self.implementation = implementation
        features = _axes.shape(num_features, "num_features")
        complex_ = jnp.issubdtype(param_dtype, jnp.complexfloating)
        stats_dtype = param_dtype if complex_ else jnp.float32
        params, state = self._layer(stats_dtype=stats_dtype).init(features)
        self._params, self._stats = tuple(params), type(state)
        for name, like in params.items():
            init = getattr(self, f"{name.rpartition('_')[2]}_init")
            value = init(rngs.params(), like.shape, param_dtype)
            setattr(self, name, nnx.Param(value))
        kept = state._fields if self._keeps_step() else state._fields[:-1]
        self._kept = tuple(kept)
        for name in self._kept:
            setattr(self, name, nnx.BatchStat(getattr(state, name)))
        self.batch_moments = nnx.data(None)
        if accumulate:
            kept = {name: getattr(state, name) for name in self._kept}
            self.batch_moments = recorder(recording.empty_window(kept))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and in training updates the statistics.

        Args:
          x: The input.
          use_running_average: Inference if True, training if False; takes precedence
            over the constructor's, `train()` and `eval()`.
          mask: Boolean mask or non-negative weights that broadcast against `x`: which
            positions the statistics are of.

        Returns:
          An array of the shape of `x`.
        """
        return self._run(x, use_running_average, mask)

    def set_view(self, use_running_average: bool | None = None):
        """Lets `nnx.view` set `use_running_average`; None leaves it as it is."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _layer(self, **given: Any) -> layers.Layer:
        raise NotImplementedError(
            f"{type(self).__name__} must define `_layer(**options)`, which returns the "
            "`jaxbn.layers.Layer` that it holds the variables of."
        )

    def _keeps_step(self) -> bool:
        """Whether something is a function of the step, which then is kept."""
        return callable(self.momentum)

    def _run(self, x, use_running_average, mask, **inputs: Any) -> jax.Array:
        training = is_training(self, use_running_average)
        x = fields.as_inexact(x)
        axes = fields.feature_axes(self.axis, x.ndim)
        features = _axes.lengths(x, axes)
        plan = self._layer(feature_axes=axes)
        _, expected = jax.eval_shape(lambda: plan.init(features))
        stats = statistics(self)
        mean = stats["mean"][...]
        fields.require_features("num_features", mean, expected.mean, x, axes)
        remedy = "Make the module with `param_dtype=jnp.complex64`."
        x = fields.like_mean(x, mean, remedy)
        fields.require_mask(mask, x)
        params = {name: getattr(self, name)[...] for name in self._params}
        out = fields.output_dtype(x, *params.values(), dtype=self.dtype)
        if callable(self.momentum) and "step" not in stats:
            raise ValueError(fields.LATE_MOMENTUM)
        return run(
            self,
            self._layer(feature_axes=axes, dtype=out),
            partial(fields.state, self._stats, like=expected),
            params,
            x,
            training=training,
            weights=mask,
            **inputs,
        )
