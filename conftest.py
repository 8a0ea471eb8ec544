"""For tests and doctests: what several of them compile is compiled once, or quickly."""

import os
import pathlib

import jax

CACHE = pathlib.Path(__file__).parent / ".pytest_cache" / "compiled"

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_addoption(parser):
    """Adds `--quick`."""
    parser.addoption(
        "--quick",
        action="store_true",
        help="compile in half the time, without most of XLA's optimizations, and leave "
        "out the tests that are marked `optimized`",
    )


def pytest_configure(config):
    """Sets what programs are compiled with, before anything is compiled."""
    if not config.getoption("--quick"):
        return
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # For the processes of tests.
    # Later versions do not know the first flag, and stop. The second is no help there.
    if jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = " ".join(
            [
                os.environ.get("XLA_FLAGS", ""),
                "--xla_cpu_use_fusion_emitters=false",
                "--xla_cpu_parallel_codegen_split_count=1",
            ]
        )


def pytest_collection_modifyitems(config, items):
    """Leaves out what `--quick` would make meaningless."""
    if not config.getoption("--quick"):
        return
    left_out = [item for item in items if item.get_closest_marker("optimized")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
