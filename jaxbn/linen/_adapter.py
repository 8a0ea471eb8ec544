"""Makes linen modules from layers: stores their parameters and statistics."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn import _axes, _devices, _dtypes, layers
from jaxbn._flax import fields, recording
from jaxbn._running_stats import Momentum

NO_WINDOW = (
    "With `accumulate`, training needs the collection `batch_moments` that `init` "
    "makes: pass it in the variables of every call, and "
    '`mutable=["batch_stats", "batch_moments"]`; under `nn.scan` and `nn.vmap`, lift '
    "it as `batch_stats`. To measure moments without a step of "
    'the statistics, leave it out, and pass `mutable=["batch_moments"]`.'
)


class Adapter(nn.Module):
    """Holds the variables of a layer and calls it."""

    def __init_subclass__(cls, **options: Any):
        fields.name_call(cls)
        super().__init_subclass__(**options)

    def __post_init__(self):
        """Makes the fields hashable."""
        fields.make_hashable(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`. In training, updates `batch_stats`, which must be mutable.

        Args:
          x: The input.
          use_running_average: True for inference, False for training; given here or as
            a field.
          mask: Boolean mask or non-negative weights that broadcast against `x`. Where
            it is False or 0, values do not count in the statistics.

        Returns:
          An array with the shape of `x`.
        """
        return self._run(x, use_running_average, mask)

    @nn.nowrap
    def _layer(self, **given: Any) -> layers.Layer:
        raise NotImplementedError(
            f"{type(self).__name__} must define `_layer(**options)`, which returns the "
            "`jaxbn.layers.Layer` that it holds the variables of."
        )

    @nn.nowrap
    def _keeps_step(self) -> bool:
        """Whether the module keeps a step count, because an option depends on it."""
        return callable(self.momentum)  # type: ignore  (a field of every module)

    @nn.nowrap
    def _stats_dtype(self) -> Any:
        return jnp.float32

    @nn.nowrap
    def _initializer(self, name: str) -> Initializer:
        """`scale_init` for "scale", `kernel_init` for "scale_kernel"."""
        return getattr(self, f"{name.rpartition('_')[2]}_init")

    @nn.nowrap
    def _run(
        self,
        x: ArrayLike,
        use_running_average: bool | None,
        mask: ArrayLike | None,
        **inputs: Any,
    ) -> jax.Array:
        """Implements `__call__`."""
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        training = fields.is_training(use_running_average)
        initializing = self.is_initializing()
        given, x = x, fields.as_inexact(x)
        axes = fields.feature_axes(self.axis, x.ndim)
        dtype = self._stats_dtype()
        if jnp.iscomplexobj(x):
            dtype = _dtypes.complex_like(dtype)
        plan = self._layer(feature_axes=axes, stats_dtype=dtype)
        features = _axes.lengths(x, axes)
        params, state = fields.shapes(plan, features)

        stats = self._stats(plan, features, state, training)
        mode = self._mode(training)
        if initializing and self.accumulate:  # type: ignore  (a field of every module)
            self._open_window(stats)
        record = self._record(mode, stats)
        mean = stats["mean"].value
        fields.require_features("batch_stats", mean, state.mean, x, axes)
        x = fields.like_mean(x, mean, "Initialize with a complex `x`.")
        fields.require_mask(mask, x)
        params = {
            name: self.param(name, self._initializer(name), like.shape, like.dtype)
            for name, like in sorted(params.items(), reverse=True)  # as in Flax
        }
        like = x if jnp.iscomplexobj(x) else given
        alone = {"axis_name": None} if initializing else {}
        out = fields.output_dtype(like, *params.values(), dtype=self.dtype)
        y, new, recorded = recording.run(
            self._layer(feature_axes=axes, dtype=out, exact=mode == "measure", **alone),
            partial(fields.state, type(state), like=state),
            params,
            {name: jnp.asarray(v.value) for name, v in stats.items()},
            {name: variable.value for name, variable in record.items()} or None,
            x,
            training=training,
            weights=mask,
            **inputs,
        )
        if training and not initializing and mode != "measure":
            for name, variable in stats.items():
                variable.value = getattr(new, name)
        for name, value in recorded.items():
            record[name].value = value
        return y

    @nn.nowrap
    def _mode(self, training: bool) -> str:
        """How the moments of this call are used.

        "plain": only for a step of the statistics, in training. "record": they are also
        recorded. "measure": they are only recorded. "window": the step of the current
        window is taken again, now including this micro-batch.

        Flax's batch norm makes no `batch_moments` when all collections are mutable, so
        they must already exist, or be requested by name.
        """
        accumulate: bool = self.accumulate  # type: ignore  (a field of every module)
        mutable = self.scope.mutable  # type: ignore  (a scope is bound in a call)
        named = not isinstance(mutable, (bool, DenyList))
        there = self.has_variable("batch_moments", "mean")
        window = self.has_variable("batch_moments", recording.START + "mean")
        wanted = (named or there) and self.is_mutable_collection("batch_moments")
        moving = self.is_mutable_collection("batch_stats")
        if self.is_initializing():
            return "plain"
        if accumulate and training:
            if not wanted or window != moving:
                raise ValueError(NO_WINDOW)
            return "window" if window else "measure"
        if window or not wanted:
            return "plain"
        return "record" if moving else "measure"

    @nn.nowrap
    def _record(self, mode: str, stats: dict) -> dict:
        """The variables of `batch_moments` that a call changes."""
        values = {name: v.value for name, v in stats.items()}
        if mode in ("record", "measure"):
            return self._variables("batch_moments", recording.empty(values["mean"]))
        if mode == "window":
            return self._variables("batch_moments", recording.empty_window(values))
        return {}

    @nn.nowrap
    def _open_window(self, stats: dict) -> None:
        """Makes the variables of a window when the module is initialized."""
        if not self.is_mutable_collection("batch_moments"):
            raise ValueError(NO_WINDOW)
        self._record("window", stats)

    @nn.nowrap
    def _variables(self, collection: str, initial: dict) -> dict:
        return {
            name: self.variable(collection, name, lambda value=value: value)
            for name, value in initial.items()
        }

    @nn.nowrap
    def _stats(self, layer: layers.Layer, features, state: Any, training: bool) -> dict:
        """The variables of `batch_stats`, by name."""
        names = list(state._fields)
        given = self.has_variable("batch_stats", "mean")
        if not self._keeps_step():
            names.remove("step")
        elif given and not self.has_variable("batch_stats", "step"):
            if training:
                # Starting at 0, a debiased average would forget the old statistics.
                own = "`momentum`" if callable(self.momentum) else "A field"  # type: ignore
                raise ValueError(
                    f"{own} is a function of the step, but `batch_stats` has a mean "
                    "and no `step`, so it comes from a module where it was a number. "
                    "Add `step`, an int32 scalar, the number of updates so far."
                )
            names.remove("step")

        def initial(name: str) -> jax.Array:
            return getattr(layer.init(features)[1], name)

        return {n: self.variable("batch_stats", n, initial, n) for n in names}


class Variant(Adapter):
    """The fields of every variant, as in `flax.linen.BatchNorm`.

    Attributes:
      use_running_average: True for inference, False for training; given here or in the
        call.
      axis: The feature axis or axes of the input.
      momentum: Weight of the old statistics: a number, an array, or a function of the
        number of updates. With a function, `batch_stats` also has a `step`.
      epsilon: Added to the variance.
      dtype: The output's dtype; by default promoted from input and parameters.
      param_dtype: The dtype of the parameters.
      use_bias: Whether there is a bias.
      use_scale: Whether there is a scale.
      bias_init: Initializer of the bias.
      scale_init: Initializer of the scale.
      axis_name: Name or names of mapped axes to compute statistics over.
      accumulate: As for `BatchNorm`.
      implementation: As for `BatchNorm`.
      skip_nonfinite: As for `BatchNorm`.
    """

    use_running_average: bool | None = None
    axis: _axes.Axes = -1
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: _devices.AxisName | None = None
    accumulate: bool = False
    implementation: str | None = None
    # After the fields of variants, which may be given by position.
    skip_nonfinite: bool = dataclasses.field(default=False, kw_only=True)
