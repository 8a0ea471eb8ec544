"""Flax NNX modules, which hold the variables and call `jaxbn.layers`."""

from jaxbn.nnx._adapter import BatchMoments as BatchMoments
from jaxbn.nnx._batch_norm import BatchNorm as BatchNorm
from jaxbn.nnx._models import end_accumulation as end_accumulation
from jaxbn.nnx._models import load_stats as load_stats
from jaxbn.nnx._models import moments_fn as moments_fn
from jaxbn.nnx._models import running_stats as running_stats
from jaxbn.nnx._replace import replace_batch_norm as replace_batch_norm
from jaxbn.nnx._variants import BatchRenorm as BatchRenorm
from jaxbn.nnx._variants import ConditionalBatchNorm as ConditionalBatchNorm
from jaxbn.nnx._variants import DomainBatchNorm as DomainBatchNorm
from jaxbn.nnx._variants import GhostBatchNorm as GhostBatchNorm
from jaxbn.nnx._variants import InPlaceBatchNorm as InPlaceBatchNorm
from jaxbn.nnx._variants import StreamingBatchNorm as StreamingBatchNorm
