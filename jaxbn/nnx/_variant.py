"""From a layer to an nnx module: where its parameters and statistics live."""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn.dtypes import canonicalize_dtype
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn import _axes, _flax_fields, _mesh, layers
from jaxbn._running_stats import Momentum

NOT_GIVEN = (
    "`use_running_average` was given neither to the constructor nor to the call. Pass "
    "True (inference) or False (training), or call `train()` or `eval()` on the model."
)


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
    axis_name: _mesh.AxisName | None


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
        axis_name: _mesh.AxisName | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis, self.axis_name, _ = _flax_fields.hashable(axis, axis_name, None)
        self.momentum, self.epsilon = momentum, epsilon
        self.dtype, self.param_dtype = dtype, param_dtype
        self.use_bias, self.use_scale = use_bias, use_scale
        self.bias_init, self.scale_init = bias_init, scale_init
        features = _axes.shape(num_features, "num_features")
        complex_ = jnp.issubdtype(param_dtype, jnp.complexfloating)
        stats_dtype = param_dtype if complex_ else jnp.float32
        params, state = self._layer(stats_dtype=stats_dtype).init(features)
        self._params, self._stats = tuple(params), type(state)
        for name, like in params.items():
            init = getattr(self, f"{name.rpartition('_')[2]}_init")
            value = init(rngs.params(), like.shape, param_dtype)
            setattr(self, name, nnx.Param(value))
        stepped = any(callable(value) for value in self._of_the_step())
        self._kept = tuple(n for n in state._fields if n != "step" or stepped)
        for name in self._kept:
            setattr(self, name, nnx.BatchStat(getattr(state, name)))

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
        raise NotImplementedError

    def _of_the_step(self) -> tuple:
        """What may be a function of the step, which then is kept."""
        return (self.momentum,)

    def _run(self, x, use_running_average, mask, **inputs: Any) -> jax.Array:
        use_running_average = first_from(
            use_running_average, self.use_running_average, error_msg=NOT_GIVEN
        )
        training = _flax_fields.is_training(use_running_average)
        x = _flax_fields.as_inexact(x)
        axes = _flax_fields.feature_axes(self.axis, x.ndim)
        features = _axes.lengths(x, axes)
        plan = self._layer(feature_axes=axes)
        _, expected = jax.eval_shape(lambda: plan.init(features))
        stats = {name: getattr(self, name) for name in self._kept}
        mean = stats["mean"][...]
        _flax_fields.require_features("num_features", mean, expected.mean, x, axes)
        remedy = "Make the module with `param_dtype=jnp.complex64`."
        x = _flax_fields.like_mean(x, mean, remedy)
        _flax_fields.require_mask(mask, x)
        params = {name: getattr(self, name)[...] for name in self._params}
        out = canonicalize_dtype(x, *params.values(), dtype=self.dtype)
        values = {name: variable[...] for name, variable in stats.items()}
        if callable(self.momentum) and "step" not in values:
            raise ValueError(_flax_fields.LATE_MOMENTUM)
        y, new = self._layer(feature_axes=axes, dtype=out).apply(
            params,
            _flax_fields.state(self._stats, values, expected),
            x,
            training=training,
            weights=mask,
            **inputs,
        )
        if training:
            for name, variable in stats.items():
                variable[...] = getattr(new, name)
        return y
