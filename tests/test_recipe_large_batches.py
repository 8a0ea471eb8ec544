"""The recipe of large batches: what the masks leave out, and the table."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("examples")


@pytest.fixture
def net():
    from _covariate_shift import Network

    return Network(width=4, strides=(2, 2))


@pytest.fixture
def params(net):
    from _covariate_shift import init

    return init(net, 0).variables["params"]


def step(make, params, grads, number=1):
    """The updates after `number` steps, as warmup makes the first one 0."""
    optimizer = make(10)
    state = optimizer.init(params)
    for _ in range(number + 1):
        updates, state = optimizer.update(grads, state, params)
    return updates


@pytest.mark.parametrize("name", ["SGD", "LARS", "LAMB"])
def test_without_gradients_only_what_decays_moves(params, name):
    from large_batches import METHODS

    masked = "LARS, masks" if name == "LARS" else f"{name}, mask"
    zeros = jax.tree.map(np.zeros_like, params)
    for method, moves in {f"{name}, no mask": True, masked: False}.items():
        updates = step(METHODS[method], params, zeros)
        assert np.any(updates["BatchNorm_0"]["scale"] != 0) == moves
        assert np.all(updates["Conv_1"]["kernel"] != 0)


def test_masked_scales_take_the_whole_rate_unless_they_have_their_own(params):
    from large_batches import METHODS

    ones = jax.tree.map(np.ones_like, params)
    sizes = {
        name: np.abs(step(METHODS[name], params, ones)["BatchNorm_0"]["scale"]).max()
        for name in METHODS
    }
    assert sizes["LARS, masks"] > 5 * sizes["LARS, SGD for the rest"]
    assert sizes["LARS, masks"] > 9 * sizes["LARS, no mask"]
    np.testing.assert_allclose(
        sizes["LARS, SGD for the rest"], sizes["SGD, mask"], rtol=1e-5
    )


def test_the_table(net, tmp_path):
    import large_batches as recipe

    page = tmp_path / "page.md"
    argv = ["--small", "--out", tmp_path / "out", "--table", page]
    results = recipe.main(list(map(str, argv)), net=net)
    assert list(results) == list(recipe.METHODS)
    assert len(page.read_text().splitlines()) == 2 + len(results)
    assert all(len(found["accuracies"]) == 3 for found in results.values())
    scales = {name: found["scale"] for name, found in results.items()}
    assert abs(scales["LARS, masks"] - 1) > abs(scales["LARS, no mask"] - 1)
