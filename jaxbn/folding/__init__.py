"""Folds batch norm at inference into the adjacent dense layer or convolution.

`fold_dense` and `fold_conv` fold one layer, given as arrays. `fold` folds a whole
inference function and its parameters, and `report` lists what it can and cannot fold.
"""

from jaxbn.folding._conv import fold_conv as fold_conv
from jaxbn.folding._dense import fold_dense as fold_dense
from jaxbn.folding._fold import fold as fold
from jaxbn.folding._report import FoldedLayer as FoldedLayer
from jaxbn.folding._report import FoldReport as FoldReport
from jaxbn.folding._report import MergedBranches as MergedBranches
from jaxbn.folding._report import report as report
