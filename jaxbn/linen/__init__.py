"""Flax Linen modules: they hold the variables and call `jaxbn.layers`."""

from jaxbn.linen._batch_norm import BatchNorm as BatchNorm
