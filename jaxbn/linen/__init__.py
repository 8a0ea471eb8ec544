"""Flax Linen modules, which hold the variables and call `jaxbn.layers`."""

from jaxbn.linen._batch_norm import BatchNorm as BatchNorm
from jaxbn.linen._models import end_accumulation as end_accumulation
from jaxbn.linen._models import load_stats as load_stats
from jaxbn.linen._models import moments_fn as moments_fn
from jaxbn.linen._models import running_stats as running_stats
from jaxbn.linen._replace import replace_batch_norm as replace_batch_norm
from jaxbn.linen._replace import replacing as replacing
from jaxbn.linen._variants import BatchRenorm as BatchRenorm
from jaxbn.linen._variants import ConditionalBatchNorm as ConditionalBatchNorm
from jaxbn.linen._variants import DomainBatchNorm as DomainBatchNorm
from jaxbn.linen._variants import GhostBatchNorm as GhostBatchNorm
from jaxbn.linen._variants import InPlaceBatchNorm as InPlaceBatchNorm
from jaxbn.linen._variants import StreamingBatchNorm as StreamingBatchNorm
