"""Devices to compile for; they need not be there."""

import importlib.util
import sys
from collections.abc import Iterable

import jax
from jax.experimental import topologies

# What each target's compiler is found by, and what installs it.
GPU, TPU = ("jax_cuda13_plugin", "jax[cuda13]"), ("libtpu", "jax[tpu]")
TARGETS = {"cpu": ("jax", "jax"), "h200": GPU, "v5e": TPU}
# A GPU that is not there has to be described.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 } device_description_str: "NVIDIA H200"
"""


def devices(target: str, count: int = 1) -> list:
    """So many of one of `TARGETS`, to compile for."""
    if target == "cpu":
        return jax.devices("cpu")[:count]
    if target == "v5e":
        return list(topologies.get_topology_desc("v5e:2x2", "tpu").devices[:count])
    given = {"target_config": H200, "topology": f"1x1x{count}"}
    return list(topologies.get_topology_desc("h200", "cuda", **given).devices)


def device(target: str):
    """One of `TARGETS`, to compile for."""
    return devices(target)[0]


def installed(targets: Iterable[str]) -> list[str]:
    """Those whose compiler is here; of the others, standard error tells what to do."""
    found = [t for t in targets if importlib.util.find_spec(TARGETS[t][0])]
    for target in (t for t in targets if t not in found):
        module, package = TARGETS[target]
        line = f'Without {target}: no {module} here. pip install "{package}"'
        print(line, file=sys.stderr)
    return found
