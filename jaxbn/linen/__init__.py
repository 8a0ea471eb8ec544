"""Flax Linen modules: they hold the variables and call `jaxbn.layers`."""

from jaxbn.linen._batch_norm import BatchNorm as BatchNorm
from jaxbn.linen._variants import BatchRenorm as BatchRenorm
from jaxbn.linen._variants import ConditionalBatchNorm as ConditionalBatchNorm
from jaxbn.linen._variants import DomainBatchNorm as DomainBatchNorm
from jaxbn.linen._variants import GhostBatchNorm as GhostBatchNorm
from jaxbn.linen._variants import InPlaceBatchNorm as InPlaceBatchNorm
from jaxbn.linen._variants import StreamingBatchNorm as StreamingBatchNorm
