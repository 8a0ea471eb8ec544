"""The recipe of Monte Carlo batch norm: sampled statistics, and calibration."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("examples")


def test_the_calibration_error_of_known_predictions():
    from uncertainty import scores

    labels = np.zeros(10, int)
    labels[:4] = 1  # Class 0 is right in 6 of 10 cases, and has 0.9.
    found = scores(np.tile([0.9, 0.1], (10, 1)), labels)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["ECE"] == pytest.approx(0.3)
    expected = -(0.6 * np.log(0.9) + 0.4 * np.log(0.1))
    assert found["NLL"] == pytest.approx(expected)


def test_sampled_statistics_are_those_of_each_batch():
    from _covariate_shift import Network, init
    from uncertainty import averaged, probabilities, sampled_stats

    net = Network(width=4, strides=(2, 2))
    variables = init(net, 0).variables
    batches = np.random.default_rng(0).random((3, 16, 8, 8), np.float32)
    stats = sampled_stats(net, variables, batches)
    as_batch = net.clone(pseudo_samples=0.0)
    for i, batch in enumerate(batches):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], stats)
        found = averaged(net, variables, one, batch)
        expected = probabilities(as_batch, variables, batch)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # The average of samples is not that of the statistics, and less sure than they.
    x = batches[0]
    samples = [
        averaged(
            net, variables, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], stats), x
        )
        for i in range(3)
    ]
    p = averaged(net, variables, stats, x)
    np.testing.assert_allclose(p, np.mean(samples, 0), atol=1e-6)
    assert np.max(p, -1).mean() < np.max(samples, -1).mean()


def test_the_recipe(tmp_path):
    import uncertainty

    results = uncertainty.main(["--small", "--out", str(tmp_path)])
    for kind in ("clean", "corrupted"):
        ordinary, large, small = results[kind].values()
        assert ordinary != large != small
        for found in (ordinary, large, small):
            gap = abs(found["accuracy"] - found["confidence"])
            assert gap - 1e-6 <= found["ECE"] <= 1
    text = (tmp_path / "summary.md").read_text()
    assert text.count("\n| corrupted: MC, batches of") == 2
    assert (tmp_path / "uncertainty.png").stat().st_size > 10_000
