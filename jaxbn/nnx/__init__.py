"""Flax NNX modules: they hold the variables and call `jaxbn.layers`."""

from jaxbn.nnx._batch_norm import BatchNorm as BatchNorm
