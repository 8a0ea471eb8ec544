"""The study of small batches: it writes what it says, of the same data for all."""

import json
import sys

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("examples")


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The script with a narrow network, as a function of argv."""
    import _small_batches
    import small_batches

    monkeypatch.setattr(_small_batches, "WIDTH", 4)
    monkeypatch.setattr(_small_batches, "DEPTH", 1)

    def run(*argv):
        argv = ["small_batches.py", "--out", str(tmp_path), *map(str, argv)]
        monkeypatch.setattr(sys, "argv", argv)
        small_batches.main()

    return run


@pytest.mark.slow
def test_the_study_writes_its_tables_and_its_picture(study, tmp_path, capsys):
    study("--seeds", 1, "--batches", 2, 4, "--examples", 8)
    text = (tmp_path / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| streaming") == 3
    assert (tmp_path / "small_batches.png").stat().st_size > 10_000

    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert set(results) == {"batch norm", "renorm", "ghost", "streaming"}
    for by_batch in results.values():
        assert list(by_batch) == ["2", "4"]
        for found in by_batch.values():
            assert np.isfinite(found["largest gradient"]).all()
            for name in ("inference", "training"):
                (accuracy,) = found[name]  # one seed
                assert 0 <= accuracy <= 1


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_kernels_stay_and_the_rest_moves(frozen, examples):
    import _small_batches as study

    setting = study.Setting("batch norm", 4, 9, 0.1, 1e-5, (3.0, 5.0), frozen)
    old = study.init(setting, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 64))
    step = jax.jit(study.train_step, static_argnums=0)
    new = step(setting, step(setting, old, x, np.arange(4)), x, np.arange(4))
    same = jax.tree.map(np.array_equal, new.params, old.params)
    assert all(is_same == frozen for is_same in same["kernels"])
    assert not any(jax.tree.leaves([same["norms"], same["head"]]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batches", 3], "batch 3 is not even"),
        (["--batches", 512], "batch 512 is not even, from 2 to 256"),
        (["--batches", 32, "--examples", 40], "no multiple of batch 32"),
        (["--seeds", 0], "must be above 0"),
        (["--limits", 0.5, 1], "must be at least 1 and 0"),
    ],
)
def test_wrong_options(study, capsys, argv, message):
    with pytest.raises(SystemExit):
        study(*argv)
    assert message in capsys.readouterr().err


def test_every_batch_size_sees_the_same_rows():
    from _small_batches import stacked_orders

    orders = stacked_orders(2, 10, 25)
    np.testing.assert_array_equal(orders, stacked_orders(2, 10, 25))
    assert orders.shape == (2, 25)
    assert (orders[0] != orders[1]).any()
    for order in orders:
        for epoch in (order[:10], order[10:20]):
            np.testing.assert_array_equal(np.sort(epoch), np.arange(10))


def test_the_limits_of_renorm_relax_after_a_warm_up():
    from _small_batches import relaxing

    limit = jax.jit(relaxing(1.0, 3.0, 1000, until=0.3))
    assert [float(limit(step)) for step in (0, 39, 170, 300, 999)] == [1, 1, 2, 3, 3]
    assert relaxing(1.0, float("inf"), 1000, until=0.3) == float("inf")


def test_half_of_the_batch_is_a_group():
    from _small_batches import ghost_group

    assert [ghost_group(batch) for batch in (2, 4, 8, 32)] == [2, 2, 4, 16]
