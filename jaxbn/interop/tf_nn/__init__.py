"""TensorFlow's functions for batch norm, on jaxbn's verbs.

Same names, arguments and meaning as in `tf.nn` (and `tf.compat.v1.nn`, where
`fused_batch_norm` is), so that code ports line by line. What differs is meant to:

- Derivatives of every order are right. TensorFlow stops the gradient of the mean inside
  the variance of `moments`, which makes Hessians wrong.
- `batch_normalization` subtracts the mean before it scales, which keeps precision where
  mean/std is large.
- Sums are accumulated in float32 or wider. TensorFlow sums bfloat16 in bfloat16, and
  float16 in float16 in `sufficient_statistics`, where squares soon overflow.
- Variances are real, also of complex `x`, and never negative.
- A batch without elements has mean and variance 0 and leaves running averages alone.
  TensorFlow returns NaN.
- Without axes to reduce, all axes stay. TensorFlow then drops those of length 1.
- Integers are refused. TensorFlow's moments of integers are rounded to integers.
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
