"""Flax NNX modules: they hold the variables and call `jaxbn.layers`."""

from jaxbn.nnx._batch_norm import BatchNorm as BatchNorm
from jaxbn.nnx._conditional import ConditionalBatchNorm as ConditionalBatchNorm
from jaxbn.nnx._domain import DomainBatchNorm as DomainBatchNorm
from jaxbn.nnx._ghost import GhostBatchNorm as GhostBatchNorm
from jaxbn.nnx._in_place import InPlaceBatchNorm as InPlaceBatchNorm
from jaxbn.nnx._renorm import BatchRenorm as BatchRenorm
from jaxbn.nnx._replace import replace_batch_norm as replace_batch_norm
from jaxbn.nnx._statistics import end_accumulation as end_accumulation
from jaxbn.nnx._statistics import load_stats as load_stats
from jaxbn.nnx._statistics import moments_fn as moments_fn
from jaxbn.nnx._statistics import running_stats as running_stats
from jaxbn.nnx._streaming import StreamingBatchNorm as StreamingBatchNorm
from jaxbn.nnx._variant import BatchMoments as BatchMoments
