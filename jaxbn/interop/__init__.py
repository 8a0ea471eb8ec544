"""Interoperation with other libraries: checkpoints, call signatures and optimizers.

`torch`, `keras`, `haiku`, `equinox`, `flax` and `praxis` convert the arrays of one
batch norm, or of all in a model, to `(params, stats)`, as in `jaxbn.layers.standard`,
and back. All but `flax` also convert constructor arguments to options. `crossq`
converts the statistics of batch renormalization in reinforcement learning. None of
these libraries is imported.
"""

from jaxbn.interop import crossq as crossq
from jaxbn.interop import equinox as equinox
from jaxbn.interop import flax as flax
from jaxbn.interop import haiku as haiku
from jaxbn.interop import keras as keras
from jaxbn.interop import optax as optax
from jaxbn.interop import praxis as praxis
from jaxbn.interop import tf_nn as tf_nn
from jaxbn.interop import torch as torch
