"""The recipe of federated learning: what is averaged, and what it comes to."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("examples")


@pytest.mark.parametrize(
    ("method", "averaged"),
    [
        ("alone", set()),
        ("FedBN", {"kernel"}),
        ("SiloBN", {"kernel", "affine"}),
        ("FedAvg", {"kernel", "affine", "statistics"}),
    ],
)
def test_what_each_method_averages(method, averaged):
    from _covariate_shift import Network, init
    from federated import communicate

    variables = init(Network(width=4, strides=(2,)), 0).variables
    rng = np.random.default_rng(0)
    clients = jax.tree.map(
        lambda leaf: rng.normal(10, 3, (3, *leaf.shape)).astype(leaf.dtype), variables
    )
    after = communicate(method, clients)
    norm = "BatchNorm_0"
    for kind, path in [
        ("kernel", ("params", "Conv_0", "kernel")),
        ("kernel", ("params", "Dense_0", "bias")),
        ("affine", ("params", norm, "scale")),
        ("affine", ("params", norm, "bias")),
        ("statistics", ("batch_stats", norm, "mean")),
        ("statistics", ("batch_stats", norm, "var")),
    ]:
        old, new = clients, after
        for key in path:
            old, new = old[key], new[key]
        expected = np.broadcast_to(old.mean(0), old.shape) if kind in averaged else old
        np.testing.assert_allclose(new, expected, rtol=1e-6, err_msg=str(path))
    step = "batch_stats", norm, "step"
    assert after[step[0]][norm]["step"].dtype == np.int32


def test_the_recipe(tmp_path):
    import federated

    results = federated.main(["--small", "--out", str(tmp_path), "--steps", "4"])
    assert set(results) == {"alone", "FedAvg", "SiloBN", "FedBN"}
    for method in ("SiloBN", "FedBN"):
        # Averaged statistics are nothing to a client whose images are dark.
        assert results[method]["dark"] > results["FedAvg"]["dark"] + 0.3
        assert results[method]["new: measured"] > results[method]["new: averaged"]
    text = (tmp_path / "summary.md").read_text()
    assert text.splitlines()[2].startswith("| alone")
    assert (tmp_path / "federated.png").stat().st_size > 10_000
