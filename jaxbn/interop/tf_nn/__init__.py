"""TensorFlow's functions for batch norm, computed by jaxbn.

They have the same names, arguments and meaning as in `tf.nn` (`tf.compat.v1.nn` for
`fused_batch_norm`), so code can be ported line by line. The differences are intended:

- Derivatives of every order are right. TensorFlow stops the gradient of the mean inside
  the variance of `moments`, which makes Hessians wrong.
- `batch_normalization` subtracts the mean before it scales, which keeps precision where
  mean/std is large.
- Sums are accumulated in float32 or wider. TensorFlow sums bfloat16 in bfloat16, and
  float16 in float16 in `sufficient_statistics`, where squares soon overflow.
- Variances are real, even for complex `x`, and never negative.
- A batch without elements has mean and variance 0 and does not change running averages.
  TensorFlow returns NaN.
- Without axes to reduce, all axes stay. TensorFlow then drops axes of length 1.
- Integers raise an error. TensorFlow rounds the moments of integers to integers.
"""

from jaxbn.interop.tf_nn._batch_normalization import (
    batch_normalization as batch_normalization,
)
from jaxbn.interop.tf_nn._fused import fused_batch_norm as fused_batch_norm
from jaxbn.interop.tf_nn._moments import moments as moments
from jaxbn.interop.tf_nn._moments import weighted_moments as weighted_moments
from jaxbn.interop.tf_nn._sufficient_statistics import (
    normalize_moments as normalize_moments,
)
from jaxbn.interop.tf_nn._sufficient_statistics import (
    sufficient_statistics as sufficient_statistics,
)
