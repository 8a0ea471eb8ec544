"""Other libraries: their checkpoints, their call signatures, what they need to know.

`torch`, `keras`, `haiku`, `equinox`, `flax` and `praxis` turn the arrays of a batch
norm, or of all in a model, into `(params, stats)`, as `jaxbn.layers.standard` has them,
and back, and constructor arguments into options. None of these libraries is imported.
"""

from jaxbn.interop import equinox as equinox
from jaxbn.interop import flax as flax
from jaxbn.interop import haiku as haiku
from jaxbn.interop import keras as keras
from jaxbn.interop import optax as optax
from jaxbn.interop import praxis as praxis
from jaxbn.interop import tf_nn as tf_nn
from jaxbn.interop import torch as torch
