"""What a result is of: the machine, the versions, and how memory is given out."""

import contextlib
import importlib.metadata
import os
import platform
import re
import sys

import jax

import jaxbn

PACKAGES = ("jaxbn-cpu", "jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "flax")
PACKAGES += ("dm-haiku", "equinox", "keras", "torch", "numpy")
# glibc hands freed memory of large arrays back to the system, and the next call spends
# more time on page faults than on arithmetic. These are the settings by which it keeps
# what it has, up to arrays of 32 MiB, the most that the threshold may be.
KEPT_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}


def keep_memory() -> None:
    """Starts the script again with `KEPT_MEMORY`, which glibc reads at the start."""
    if platform.libc_ver()[0] != "glibc" or KEPT_MEMORY.items() <= os.environ.items():
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT_MEMORY)


def threads() -> int:
    """Of the CPU that this process may use; XLA takes as many."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def warn_if_busy() -> None:
    """Says so where others use the CPU: libraries whose threads spin suffer most."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        line = f"Load average {load:.1f}: times will be those of a shared machine."
        print(line, file=sys.stderr)


def machine() -> dict:
    """What the process runs on."""
    found = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": threads(),
        "memory_gib": round(_memory_bytes() / 2**30),
    }
    if jax.default_backend() != "cpu":
        found["accelerator"] = jax.devices()[0].device_kind
    return found


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    found = {"python": platform.python_version(), "jaxbn": jaxbn.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        if found := re.search(r"model name\s*: (.*)", info.read()):
            return found[1]
    return platform.processor()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
