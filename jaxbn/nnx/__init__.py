"""Flax NNX modules: they hold the variables and call `jaxbn.layers`."""

from jaxbn.nnx._batch_norm import BatchNorm as BatchNorm
from jaxbn.nnx._variants import BatchRenorm as BatchRenorm
from jaxbn.nnx._variants import ConditionalBatchNorm as ConditionalBatchNorm
from jaxbn.nnx._variants import DomainBatchNorm as DomainBatchNorm
from jaxbn.nnx._variants import GhostBatchNorm as GhostBatchNorm
from jaxbn.nnx._variants import InPlaceBatchNorm as InPlaceBatchNorm
from jaxbn.nnx._variants import StreamingBatchNorm as StreamingBatchNorm
