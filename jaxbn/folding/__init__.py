"""Batch norm at inference folded into the dense layer or convolution beside it.

`fold_dense` and `fold_conv` fold one layer, given as arrays.
"""

from jaxbn.folding._layers import fold_conv as fold_conv
from jaxbn.folding._layers import fold_dense as fold_dense
