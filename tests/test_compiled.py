"""What compilers for a GPU and a TPU make of a layer, with neither at hand."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.optimized

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "compiled.py"
# The most arrays of the size of x that a layer with a shift may read and write, forward
# and backward, by dtype and by whether a relu follows. flax moves 9.0, 10.0, 7.0 and
# 8.8 on H200, and 7.0, 7.0, 8.0 and 7.0 on v5e.
KINDS = [("bfloat16", False), ("bfloat16", True), ("float32", False), ("float32", True)]
H200 = dict.fromkeys(KINDS, 7.02)
SMALLEST = ("critic", "U-Net")
V5E = dict(zip(KINDS, (7.02, 8.02, 7.02, 7.02), strict=True))

needs_h200 = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason='needs the compiler for GPUs: pip install "jax[cuda13]"',
)
needs_v5e = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs libtpu: pip install "jax[tpu]"',
)


def compiled(target, library, folder):
    """Each kind of layer, as the benchmark measures it."""
    argv = [SCRIPT, target, "--libraries", library, "--out", folder]
    cases = run(argv, folder / f"compiled_{target}.json")
    return {(case["dtype"], case["relu"]): case for case in cases}


def run(argv, result):
    """The cases that a script stores."""
    # A process of its own, because libtpu takes a lock and looks for a TPU.
    out = subprocess.run(
        [sys.executable, *map(str, argv)],
        env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    return json.loads(result.read_text())["cases"]


def check(target, library, most, folder):
    found = compiled(target, library, folder)
    assert found.keys() == most.keys()
    # Without a shift, x is read once more, and summed over devices once more.
    more = library == "jaxbn two passes"
    for kind, case in found.items():
        assert case["transfers"] <= most[kind] + more, kind
        assert case["all_reduces"] == 2 + more, kind


@needs_h200
@pytest.mark.parametrize("library", ["jaxbn", "jaxbn jvp", "jaxbn two passes"])
def test_on_h200(library, tmp_path):
    check("h200", library, H200, tmp_path)


@needs_h200
def test_a_sample_on_h200_is_no_array_more(tmp_path):
    for kind, case in compiled("h200", "jaxbn sample", tmp_path).items():
        assert case["transfers"] <= H200[kind], kind
        assert case["all_reduces"] == 3, kind  # Under `jit`, devices agree on it.


@needs_v5e
def test_on_v5e(tmp_path):
    check("v5e", "jaxbn", V5E, tmp_path)


@needs_v5e
@pytest.mark.slow
@pytest.mark.parametrize("library", ["jaxbn jvp", "jaxbn two passes"])
def test_other_forms_on_v5e(library, tmp_path):
    check("v5e", library, V5E, tmp_path)


def networks(target, folder):
    """The two networks that compile fastest, jaxbn's relative to flax's."""
    script = SCRIPT.with_name("network.py")
    argv = [script, target, "--networks", *SMALLEST, "--libraries", "jaxbn", "flax"]
    cases = run([*argv, "--out", folder], folder / f"network_{target}.json")
    total = {(c["network"], c["dtype"], c["library"]): c["total"] for c in cases}
    kinds = {key[:2] for key in total}
    assert len(kinds) == 2 * len(SMALLEST)
    return {k: total[*k, "jaxbn"] / total[*k, "flax"] for k in kinds}


@needs_h200
def test_networks_on_h200_move_less_than_flax(tmp_path):
    for kind, ratio in networks("h200", tmp_path).items():
        assert ratio <= 0.97, (kind, ratio)


@needs_v5e
@pytest.mark.slow
def test_networks_on_v5e_move_no_more_than_flax(tmp_path):
    for kind, ratio in networks("v5e", tmp_path).items():
        assert ratio <= 1.01, (kind, ratio)
