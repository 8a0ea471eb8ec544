"""Devices: axis names, sums over devices, and the sharding of arrays."""

from jaxbn._devices.collectives import all_sum as all_sum
from jaxbn._devices.collectives import any_feature as any_feature
from jaxbn._devices.collectives import gather as gather
from jaxbn._devices.names import AxisName as AxisName
from jaxbn._devices.names import Groups as Groups
from jaxbn._devices.names import as_names as as_names
from jaxbn._devices.names import axis_size as axis_size
from jaxbn._devices.names import hashable as hashable
from jaxbn._devices.names import require_bound as require_bound
from jaxbn._devices.sharding import alike as alike
from jaxbn._devices.sharding import parts_along as parts_along
from jaxbn._devices.sharding import repeat_along as repeat_along
from jaxbn._devices.sharding import reshape_like as reshape_like
from jaxbn._devices.sharding import shard_like as shard_like
from jaxbn._devices.sharding import split_axis as split_axis
from jaxbn._devices.sharding import stack as stack
from jaxbn._devices.sharding import sum_rows as sum_rows
from jaxbn._devices.sharding import take_rows as take_rows
from jaxbn._devices.sharding import where as where
from jaxbn._devices.sharding import whole_along_first as whole_along_first
from jaxbn._devices.varying import cotangent_like as cotangent_like
from jaxbn._devices.varying import is_spread_further as is_spread_further
from jaxbn._devices.varying import require_same_on_all as require_same_on_all
from jaxbn._devices.varying import same_on_all as same_on_all
from jaxbn._devices.varying import vary_like as vary_like
