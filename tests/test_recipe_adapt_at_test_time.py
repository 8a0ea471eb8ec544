"""The recipe of test-time adaptation: what each method normalizes by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("examples")


@pytest.fixture
def case():
    """A network of which running statistics and scales are not the initial ones."""
    from _covariate_shift import Network, init

    net = Network(width=4, strides=(2, 2))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: (
            leaf + rng.uniform(0.1, 0.5, leaf.shape).astype(leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
        ),
        init(net, 0).variables,
    )
    return net, variables, rng.random((8, 8, 8), np.float32)


def weights_of(variables, value):
    mean = jax.tree.leaves(variables["batch_stats"])[0]
    weight = {"test": jnp.full(mean.shape, value)}
    return dict.fromkeys(variables["batch_stats"], weight)


def logits_of(method, x):
    return method.net.apply(method.variables, x, training=False)


@pytest.mark.parametrize(
    ("weight", "like"), [(0.0, "source"), (1.0, "batch statistics")]
)
def test_the_weights_of_ttn_lead_from_the_source_to_the_batch(case, weight, like):
    from _adapt_at_test_time import methods

    net, variables, x = case
    found = methods(net, variables, weights_of(variables, weight), len(x))
    expected = logits_of(found[like], x)
    np.testing.assert_allclose(logits_of(found["TTN"], x), expected, atol=1e-4)
    other = logits_of(found["α-BN, α = 1/2"], x)
    assert np.abs(other - expected).max() > 1e-2


def test_tent_trains_scale_and_bias_alone_and_lowers_the_entropy(case):
    from _adapt_at_test_time import entropy, methods, start, step

    net, variables, x = case
    method = methods(net, variables, weights_of(variables, 0.5), len(x))["Tent"]
    state = start(method)
    assert len(jax.tree.leaves(state.norms)) == 2 * len(net.strides)
    run = jax.jit(lambda state: step(method, method.variables, state, x))
    entropies = []
    for _ in range(5):
        state, logits = run(state)
        entropies.append(entropy(logits).item())
    assert (np.diff(entropies) < 0).all()


def test_renormalized_tent_begins_with_the_batch_then_with_what_was_before(case):
    from _adapt_at_test_time import methods, start, step

    net, variables, x = case
    found = methods(net, variables, weights_of(variables, 0.5), len(x))
    method = found["Tent, renormalized"]._replace(optimizer=None)
    run = jax.jit(lambda state, x: step(method, method.variables, state, x))
    state, first = run(start(method), x)
    by_batch = logits_of(found["batch statistics"], x)
    np.testing.assert_allclose(first, by_batch, atol=1e-4)
    # The second batch is normalized by the first one's statistics, whatever it is.
    _, second = run(state, np.concatenate([x[:4], 0.1 * x[4:]]))
    np.testing.assert_allclose(second[:4], first[:4], atol=1e-4)


def test_the_recipe(tmp_path):
    import adapt_at_test_time

    table = tmp_path / "table.md"
    results = adapt_at_test_time.main(
        ["--small", "--out", str(tmp_path), "--table", str(table)]
    )
    mixed, in_order = results["batches of 64"], results["of 64, sorted"]
    assert mixed.keys() == in_order.keys()
    # There are 64 images: all methods see them all, in whatever order.
    for name, found in mixed.items():
        assert found == pytest.approx(in_order[name], abs=1.5 / 64), name
    assert mixed["AdaBN"] == pytest.approx(mixed["batch statistics"], abs=1.5 / 64)
    assert mixed["source"] != mixed["batch statistics"]
    assert table.read_text().count("\n| Tent") == 4
    assert (tmp_path / "adapt_at_test_time.png").stat().st_size > 10_000
