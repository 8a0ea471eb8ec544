"""Batch normalization for JAX.

The main functions are `moments`, `normalize`, `batch_norm` (both in one, with a
hand-written derivative) and `update`, for running statistics. `jaxbn.layers` makes
layers of them, as pure functions; `jaxbn.linen` and `jaxbn.nnx` make Flax modules.
"""

import importlib
from typing import TYPE_CHECKING

from jaxbn import layers as layers
from jaxbn._batch_norm import batch_norm as batch_norm
from jaxbn._moments import Moments as Moments
from jaxbn._moments import merge_moments as merge_moments
from jaxbn._moments import moments as moments
from jaxbn._normalize import normalize as normalize
from jaxbn._replicated import assert_replicated as assert_replicated
from jaxbn._replicated import sync_stats as sync_stats
from jaxbn._running_stats import RunningStats as RunningStats
from jaxbn._running_stats import cumulative as cumulative
from jaxbn._running_stats import debiased as debiased
from jaxbn._running_stats import init_stats as init_stats
from jaxbn._running_stats import update as update

if TYPE_CHECKING:
    from jaxbn import folding as folding
    from jaxbn import interop as interop
    from jaxbn import linen as linen
    from jaxbn import nnx as nnx
    from jaxbn import population as population

__version__ = "0.1.0"

# Loaded on first use: some of them import Flax, and they take half of the import time.
_LAZY = ("folding", "interop", "linen", "nnx", "population")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"jaxbn.{name}")
    raise AttributeError(f"module 'jaxbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
