"""`flax.nnx.BatchNorm` on jaxbn's verbs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
from jax.typing import ArrayLike

from jaxbn import _flax_fields
from jaxbn._running_stats import init_stats


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` with exact statistics and hand-written derivatives.

    Takes the place of Flax's class by changing one import: same arguments and defaults,
    same variables (`nnx.Param`: scale, bias; `nnx.BatchStat`: mean, var), initial
    values and output dtype. It computes what `jaxbn.layers.standard` does.

        training:   y, m = batch_norm(x, scale, bias);  mean, var = update(..., m)
        inference:  y = normalize(x, mean, var, scale, bias)

    Where it differs from Flax's: statistics over devices weigh every example alike,
    also under masks; a mask may be integers or float weights; NaN under the mask and an
    empty mask do no harm; `dtype` rounds neither running nor batch statistics.

    Args:
      num_features: The number of features.
      unbiased: Track the variance times n/(n − 1).
      derivatives: "vjp" or "jvp", as for `jaxbn.batch_norm`.
      **options: Those of `flax.nnx.BatchNorm`, `rngs` among them. `momentum` may also
        be a function of the number of updates (`jaxbn.debiased(0.99)`, an optax
        schedule); then there is a further `nnx.BatchStat`, `step`. `use_fast_variance`
        (the default) passes the running mean as `shift`. `promote_dtype` is applied to
        `x`, scale and bias only. With a complex `param_dtype` the mean is complex too.

    Raises:
      TypeError: In a call: `x` is complex and the running mean is not.
      ValueError: In a call: `use_running_average` is None both times, or as for
        `jaxbn.batch_norm`.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
      >>> print(layer.mean[...])
      [ 1. 10.]

    References:
      https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/normalization.html
    """

    def __init__(
        self,
        num_features: int,
        *,
        unbiased: bool = False,
        derivatives: str = "vjp",
        **options: Any,
    ):
        super().__init__(num_features, **options)
        self.unbiased = unbiased
        self.derivatives = derivatives
        if jnp.issubdtype(self.param_dtype, jnp.complexfloating):
            initial = init_stats(num_features, dtype=self.param_dtype)
            self.mean = nnx.BatchStat(initial.mean)
        if callable(self.momentum):
            self.step = nnx.BatchStat(jnp.zeros((), jnp.int32))
        else:
            self.step = nnx.data(None)

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
        use_running_average = first_from(
            use_running_average,
            self.use_running_average,
            error_msg="`use_running_average` was given neither to the constructor of "
            "BatchNorm nor to the call. Pass True (inference) or False (training), or "
            "call `train()` or `eval()` on the model.",
        )
        if callable(self.momentum) and self.step is None:
            raise ValueError(
                "`momentum` became a function of the step after the module was made, "
                "so that no step was counted. Pass it to the constructor."
            )
        x, scale, bias, dtype = self._promoted(_flax_fields.as_inexact(x))
        layer = _flax_fields.standard(self, dtype=dtype)
        step = None if self.step is None else self.step[...]
        y, new = layer.apply(
            _flax_fields.affine(scale, bias),
            _flax_fields.stats(self.mean[...], self.var[...], step),
            x,
            training=not use_running_average,
            weights=mask,
        )
        if not use_running_average:
            self.mean[...], self.var[...] = new.mean, new.var
            if self.step is not None:
                self.step[...] = new.step
        return y

    def _promoted(self, x: jax.Array):
        """x, scale and bias as `promote_dtype` has them, and the output's dtype."""
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        given = (x, self.mean[...], self.var[...], scale, bias)
        cast_x, _, _, scale, bias = self.promote_dtype(given, dtype=self.dtype)
        dtype = canonicalize_dtype(cast_x, scale, bias, dtype=self.dtype)
        # Flax's own function only widens x where `dtype` is None. The verbs widen by
        # themselves, and keep x for the backward pass as it came.
        if self.promote_dtype is promote_dtype and self.dtype is None:
            cast_x = x
        return cast_x, scale, bias, dtype
