"""The recipe of averaged weights: means, alignment and its table."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("examples")


@pytest.fixture
def net():
    from _covariate_shift import Network

    return Network(width=6, strides=(2, 2))


@pytest.fixture
def data():
    from _covariate_shift import load_data

    return load_data(0)


def shuffled(net, variables, orders):
    """The same network with its channels in other orders."""
    new = jax.tree.map(np.array, variables)
    for i, order in enumerate(orders):
        conv = new["params"][f"Conv_{i}"]
        conv["kernel"] = conv["kernel"][..., order]
        if i:
            conv["kernel"] = conv["kernel"][:, :, orders[i - 1]]
        for tree in (new["params"], new["batch_stats"]):
            norm = tree[f"BatchNorm_{i}"]
            for name in set(norm) - {"step"}:
                norm[name] = norm[name][order]
    kernel = new["params"]["Dense_0"]["kernel"].reshape(-1, net.width, 10)
    new["params"]["Dense_0"]["kernel"] = kernel[:, orders[-1]].reshape(-1, 10)
    return new


def trained(net, data):
    from _covariate_shift import init, train_step

    state = init(net, 3)
    for i in range(10):
        state = train_step(net, state, data, 3, 10, i)
    return state.variables


def test_alignment_finds_the_order_of_shuffled_channels(net, data):
    import averaged_weights as recipe

    variables = trained(net, data)
    rng = np.random.default_rng(0)
    other = shuffled(net, variables, [rng.permutation(6) for _ in net.strides])
    x = data.train_x[:200]
    logits = net.apply(variables, x, training=False)
    same = net.apply(other, x, training=False)
    np.testing.assert_allclose(same, logits, rtol=1e-4, atol=1e-4)
    first = [v["params"]["Conv_0"]["kernel"] for v in (other, variables)]
    assert not np.array_equal(*first)

    found = recipe.aligned(net, variables, other, x)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_only_new_statistics_fit_far_weights(net, data):
    """Means and variances in the middle of two networks are none of theirs."""
    import averaged_weights as recipe
    from _covariate_shift import init

    members = [init(net, seed).variables for seed in (0, 1, 2)]
    average = recipe.mean(members)
    kernel = np.mean([m["params"]["Conv_1"]["kernel"] for m in members], axis=0)
    np.testing.assert_allclose(average["params"]["Conv_1"]["kernel"], kernel, atol=1e-6)
    step = average["batch_stats"]["BatchNorm_0"]["step"]
    assert step.dtype == members[0]["batch_stats"]["BatchNorm_0"]["step"].dtype

    # Half the contrast after the first kernel makes half the standard deviation.
    one = recipe.recalibrated(net, members[0], data)
    half = jax.tree.map(np.array, one)
    half["params"]["Conv_0"]["kernel"] /= 2
    found = recipe.recalibrated(net, half, data)["batch_stats"]["BatchNorm_0"]
    old = one["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(found["var"], old["var"] / 4, rtol=1e-4)
    np.testing.assert_allclose(found["mean"], old["mean"] / 2, rtol=1e-4, atol=1e-6)


def test_the_table(net, tmp_path):
    import averaged_weights as recipe

    page = tmp_path / "page.md"
    argv = ["--small", "--out", tmp_path / "out", "--table", page]
    found = recipe.main(list(map(str, argv)), net=net)
    assert len(page.read_text().splitlines()) == 2 + len(found)
    # The last weights and one network are no averages: old and averaged are the same.
    for name in ("last weights", "one network"):
        assert found[name][0] == found[name][1]
    assert (tmp_path / "out" / "averaged_weights.png").stat().st_size > 10_000
