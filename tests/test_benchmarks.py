"""The benchmarks: that every script runs, on small sizes, and the README's tables."""

import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
SMALL = "--rounds 1 --malloc default"
# What each script is run with; a file of results is OUT, a folder of them FOLDER.
RUNS = [
    ("accuracy", "--steps 1 2 --libraries linen --out OUT"),
    ("comparison", "--out FOLDER"),
    ("compiled", "cpu --shape 4x2x2x8 --libraries jaxbn linen --out FOLDER"),
    ("figures", "--folder FOLDER"),
    ("folding", "cpu --batch 1 --size 8 --blocks 1 --dtypes float32"),
    ("gpu", "--dry --rounds 1 --out OUT"),
    ("memory", "cpu --blocks 1 --shape 2 4 4 4"),
    ("network", "cpu --small --dtypes float32 --out FOLDER"),
    (
        "resnet",
        f"{SMALL} --batch 2 --size 32 --width 4 --blocks 1 1 --out OUT "
        "--libraries jaxbn linen",
    ),
    (
        "scale",
        f"{SMALL} --batches 8 --channels 4 --elements 64 --devices 1 2 --out OUT "
        "--libraries jaxbn linen --sweep-rows 1 6 --sweep-channels 4",
    ),
    ("scaling", ""),
    (
        "speed",
        "--rounds 1 --shapes 8x4 2x3x3x4 --dtypes bfloat16 --relu yes --out OUT "
        "--modes forward+backward --libraries linen torch",
    ),
    ("speed", f"{SMALL} --gpu --shapes 8x4 --relu no --libraries linen --out OUT"),
    ("speed", f"{SMALL} --family --shapes 2x3x4 --dtypes float32 --out OUT"),
    ("tables", "--check"),
]
SLOW = ("gpu", "memory", "network", "resnet", "scale")


def run(script, argv):
    """In a process of its own, as scripts set up JAX in ways of their own."""
    return subprocess.run(
        [sys.executable, BENCHMARKS / f"{script}.py", *argv],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_no_script_is_left_out():
    scripts = {path.stem for path in BENCHMARKS.glob("[!_]*.py")}
    assert scripts == {script for script, _ in RUNS}


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        pytest.param(*r, marks=[pytest.mark.slow] * (r[0] in SLOW), id=r[0])
        for r in RUNS
    ],
)
def test_runs(script, argv, tmp_path):
    paths = {"OUT": str(tmp_path / "found.json"), "FOLDER": str(tmp_path)}
    out = run(script, [paths.get(word, word) for word in argv.split()])
    assert out.returncode == 0, out.stderr
    assert any(tmp_path.iterdir()) == ("OUT" in argv or "FOLDER" in argv)
    written = list(tmp_path.glob("*.json"))
    assert len(written) == ("--out" in argv)
    for path in written:
        found = json.loads(path.read_text())
        assert {"machine", "versions", "options"} < found.keys()
        # What other libraries make of hard inputs may be NaN.
        assert script == "comparison" or "nan" not in out.stdout.lower()


@pytest.mark.parametrize("relu", [pytest.param(False, marks=pytest.mark.slow), True])
def test_libraries_compute_the_same(monkeypatch, relu):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _layers import LAYERS
    from _peers import arguments, installed, step

    x, *vectors, ct = arguments((4, 3, 3, 8))
    expected = {}
    for name in installed(LAYERS):
        for mode in ("forward+backward", "inference"):
            with jax.numpy_rank_promotion("allow"):  # which some of them need
                out = jax.jit(step(LAYERS[name](), relu, mode))(x, *vectors, ct)
            if mode == "forward+backward":
                y, stats, gradients = out
                # Haiku's averages start anew, and so have another value.
                out = (y, gradients) if name == "haiku" else (y, gradients, stats)
            expected.setdefault(mode, out)
            for got, wanted in zip(out, expected[mode], strict=False):
                chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_page_that_is_not_up_to_date_is_found(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    page = tmp_path / "README.md"
    good = tables.rendered(tables.PAGES[0].read_text())
    assert "| exact |" in good
    page.write_text(good.replace("| exact |", "| about right |"))
    monkeypatch.setattr(tables, "PAGES", [page])
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match=r"Not up to date: README\.md"):
        tables.main()
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    assert page.read_text() == good
