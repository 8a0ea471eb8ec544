"""What a deep network keeps for the backward pass, and what a compiled step needs."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.optimized

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
SHAPE = (256, 56, 56, 64)
SMALL = (8, 32, 32, 16)


@pytest.fixture
def memory(monkeypatch):
    """The benchmark, a module; what it sets in the environment is undone."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory

    return memory


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.36), ("bfloat16", 0.22)])
def test_in_place_keeps_one_array_a_block(memory, dtype, most):
    kinds = ("flax", "standard", "in_place")
    flax, standard, in_place = (memory.kept_bytes(k, SHAPE, dtype) for k in kinds)
    assert in_place <= most * flax
    assert standard < flax


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scratch_memory_on_cpu(memory, dtype):
    kinds = ("flax", "in_place")
    flax, in_place = (memory.scratch_bytes(k, SMALL, dtype, "cpu") for k in kinds)
    assert in_place <= 0.60 * flax


SCRIPT = """
import sys
sys.path.insert(0, {benchmarks!r})
from memory import scratch_bytes
target, dtype, blocks, *shape = sys.argv[1:]
shape = tuple(map(int, shape))
for kind in ("flax", "in_place"):
    print("bytes", scratch_bytes(kind, shape, dtype, target, int(blocks)))
"""


def ratio(target, dtype, blocks, shape):
    """Scratch memory of in-place to flax's, compiled for a device that is not there."""
    argv = [target, dtype, blocks, *shape]
    # A process of its own, because libtpu takes a lock and looks for a TPU.
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(benchmarks=str(BENCHMARKS))]
        + [str(arg) for arg in argv],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu"}
        | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    lines = [line for line in out.stdout.splitlines() if line.startswith("bytes ")]
    flax, in_place = (int(line.split()[1]) for line in lines)
    return in_place / flax


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs libtpu: pip install "jax[tpu]"',
)
def test_scratch_memory_on_tpu():
    """No less than flax, for whom the compiler computes again: but no more either."""
    assert ratio("v5e", "float32", 4, (64, 28, 28, 64)) <= 1.02


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason='needs the compiler for GPUs: pip install "jax[cuda13]"',
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scratch_memory_on_h200(dtype):
    assert ratio("h200", dtype, 16, SHAPE) <= 0.60
