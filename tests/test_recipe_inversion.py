"""The recipe of inversion: images approach the statistics, and the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("examples")


@pytest.fixture
def net():
    from _covariate_shift import Network

    return Network(width=6, strides=(2, 2))


def test_the_distance_is_that_of_the_definition(net):
    """In the first layer: of the convolved images' mean and variance."""
    import inversion as recipe
    from _covariate_shift import Network, init

    first = Network(width=6, strides=(2,))
    variables = init(first, 0).variables  # Mean 0, variance 1.
    x = np.random.default_rng(0).random((10, 8, 8), np.float32)
    kernel = variables["params"]["Conv_0"]["kernel"]
    y = jax.lax.conv_general_dilated(
        x[..., None], kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    expected = jnp.linalg.norm(mean) + jnp.linalg.norm(var - 1)
    found = recipe.distance(first, variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_images_approach_the_statistics_only_with_the_term(net, tmp_path):
    import inversion as recipe

    page = tmp_path / "page.md"
    argv = ["--small", "--out", tmp_path / "out", "--table", page]
    results = recipe.main(list(map(str, argv)), net=net)
    made, without = (
        results[f"made {how} the statistics"]["distance"] for how in ("with", "without")
    )
    assert made < without
    assert len(page.read_text().splitlines()) == 2 + 3
    assert (tmp_path / "out" / "inversion.png").stat().st_size > 10_000


def test_the_slope_is_finite_where_the_distance_is_0(net):
    import inversion as recipe
    from _covariate_shift import init

    from jaxbn.linen import load_stats, moments_fn
    from jaxbn.population import recalibrate

    variables = init(net, 0).variables
    x = jnp.asarray(np.random.default_rng(0).random((10, 8, 8), np.float32))
    stats = recalibrate(moments_fn(net, variables, training=True), [x])
    variables = load_stats(variables, stats)
    slope = jax.grad(lambda x: recipe.distance(net, variables, x))(x)
    assert jnp.isfinite(slope).all()
