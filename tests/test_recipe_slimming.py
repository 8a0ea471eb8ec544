"""The recipe of slimming: penalty, choice of channels, and removal."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("examples")


@pytest.fixture
def net():
    from _covariate_shift import Network

    return Network(width=6, strides=(2, 2))


@pytest.fixture
def variables(net):
    """Variables in which every scale, bias, mean and variance is its own."""
    from _covariate_shift import init

    rng = np.random.default_rng(0)
    given = jax.tree.map(np.asarray, init(net, 0).variables)
    return jax.tree.map(
        lambda v: v + rng.random(v.shape, np.float32) if v.ndim == 1 else v, given
    )


def test_the_smallest_scales_are_dropped(net, variables):
    import slimming as recipe

    keep = recipe.kept(variables["params"], 0.5)
    sizes = recipe.scales(variables["params"])
    chosen = np.concatenate([sizes[name][keep[name]] for name in keep])
    others = np.concatenate([sizes[name][~keep[name]] for name in keep])
    assert len(chosen) == len(others) == 6
    assert chosen.min() > others.max()
    # A layer is never empty.
    assert [k.sum() for k in recipe.kept(variables["params"], 1.0).values()] == [1, 1]


def test_the_sliced_network_is_the_masked_one(net, variables):
    import slimming as recipe

    keep = recipe.kept(variables["params"], 0.5)
    params = recipe.masked(variables["params"], keep)
    slim, small = recipe.sliced(net, {**variables, "params": params}, keep)
    assert slim.widths == tuple(k.sum() for k in keep.values())
    assert small["params"]["Conv_1"]["kernel"].shape[2:] == slim.widths

    x = np.random.default_rng(1).random((20, 8, 8), np.float32)
    expected = net.apply({**variables, "params": params}, x, training=False)
    found = slim.apply(small, x, training=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    whole = net.apply(variables, x, training=False)
    assert not np.allclose(found, whole, atol=1e-2)


def test_the_penalty_is_on_scales_alone(variables):
    import slimming as recipe

    params = variables["params"]
    penalty = recipe.l1(0.5)
    zeros = jax.tree.map(np.zeros_like, params)
    grads, _ = penalty.update(zeros, penalty.init(params), params)
    for path, slope in jax.tree_util.tree_leaves_with_path(grads):
        of_scale = path[-1].key == "scale"
        np.testing.assert_array_equal(slope, 0.5 if of_scale else 0.0)


def test_the_table(net, tmp_path):
    import slimming as recipe

    page = tmp_path / "page.md"
    argv = ["--small", "--out", tmp_path / "out", "--table", page]
    results = recipe.main(list(map(str, argv)), net=net)
    assert "| 50 % " in page.read_text()
    assert "| BatchNorm_1 |" in page.read_text()
    for found in results.values():
        for share in found.values():
            # The sliced network is tested after fine-tuning the masked one.
            assert share["sliced"] == share["fine-tuned"]
        left = [share["parameters"] for share in found.values()]
        assert left == sorted(left, reverse=True)
        assert left[0] == 1 > left[-1]
    assert (tmp_path / "out" / "slimming.png").stat().st_size > 10_000
