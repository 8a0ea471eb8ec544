"""The study of why batch norm: what it measures, and the forms of its results."""

import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SMALL = {
    "DEPTHS": (3,),
    "DEPTH": 2,
    "SHALLOW": 2,
    "RATES": (0.01, 0.1),
    "DRIFT_RATES": (0.01, 0.1),
    "PIECES": 2,
    "PLACE_ACTIVATIONS": ("sigmoid",),
    "PLACE_RATES": (0.01, 0.1),
    "FEW": 32,
    "BATCHES": (8, 32),
    "NOISE_DEPTH": 1,
}
SEEDS = 2


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(autouse=True)
def quickly_compiled():
    """Compiling is all that takes time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The script with small networks and few rates, as a function of argv."""
    import _why_experiments
    import why_batch_norm

    for name, value in SMALL.items():
        monkeypatch.setattr(_why_experiments, name, value)

    def run(*argv):
        return why_batch_norm.main(["--out", str(tmp_path), *map(str, argv)])

    return run


@pytest.fixture
def data():
    from _small_batches import stacked_data

    return stacked_data(1)


def of_one_seed(data):
    return jax.tree.map(lambda a: a[0], data)


SETTINGS = {
    "gradients": ("depth", "norm", "init"),
    "steps": ("norm", "lr"),
    "drift": ("network", "lr"),
    "place": ("activation", "norm", "lr"),
    "noise": ("statistics", "batch"),
}
SLOW = ("steps", "place", "noise")  # Made like the others.
LENGTHS = {"gradients": 4, "steps": 4, "drift": 6, "place": 6, "noise": 6}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SETTINGS]
)
def test_an_experiment_writes_its_table_and_its_picture(study, name, tmp_path, capsys):
    results = study("--seeds", SEEDS, "--steps", 4, "--only", name)
    assert list(results) == [name]
    settings = [tuple(row[key] for key in SETTINGS[name]) for row in results[name]]
    assert len(settings) == len(set(settings)) == LENGTHS[name]
    for row in results[name]:
        for key, values in row.items():
            if key not in SETTINGS[name]:
                assert len(values) == SEEDS
                assert np.isfinite(values).all()
            if key.endswith("accuracy"):
                assert np.min(values) >= 0
                assert np.max(values) <= 1

    text = (tmp_path / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert "±" in text
    assert json.loads((tmp_path / "results.json").read_text()) == results
    pictures = [path.name for path in tmp_path.glob("*.png")]
    assert pictures == [f"why_{name}.png"]
    assert (tmp_path / pictures[0]).stat().st_size > 10_000


def test_gradients_vanish_with_depth_without_batch_norm(data):
    from _why_networks import Net, init, scaled
    from _why_training import Batch, loss

    one, key = of_one_seed(data), jax.random.key(0)
    batch = Batch(one.train_x[:64], one.train_y[:64])
    norms = {}
    for depth, norm in [(2, "none"), (6, "none"), (6, "before")]:
        net = Net(depth, norm)
        gradient = jax.jit(jax.grad(partial(loss, net=net, batch=batch, key=key)))
        for gain in (1.0, 0.5):
            kernels = gradient(scaled(init(net, 0), gain)).layers.kernel
            norms[depth, norm, gain] = jnp.linalg.norm(kernels, axis=(1, 2))
    assert norms[6, "none", 0.5].max() < norms[2, "none", 0.5].min() / 4
    # With batch norm, kernels half as large have gradients twice as large.
    whole, half = (norms[6, "before", gain] for gain in (1.0, 0.5))
    np.testing.assert_allclose(half, 2 * whole, rtol=1e-2)


def test_batch_norm_undoes_the_scale_of_kernels():
    from _why_networks import Net, init, logits, scaled

    x = jax.random.normal(jax.random.key(1), (32, 64))
    outs = {}
    for norm in ("none", "before"):
        for gain in (1.0, 0.5):
            net, key = Net(3, norm), jax.random.key(0)
            outs[norm, gain] = logits(net, scaled(init(net, 0), gain), x, key=key)
    np.testing.assert_allclose(outs["before", 0.5], outs["before", 1.0], atol=1e-3)
    np.testing.assert_allclose(outs["none", 0.5], outs["none", 1.0] / 8, rtol=1e-4)


def test_a_batch_with_weights_is_that_batch(data):
    from _why_networks import Net, init
    from _why_training import Batch, loss

    one, net, key = of_one_seed(data), Net(2, "before"), jax.random.key(0)
    x, y, counted = one.train_x[:64], one.train_y[:64], jnp.arange(64) % 4 == 0
    masked = Batch(x, y, counted.astype(float), counted[:, None].astype(float))
    alone = Batch(x[::4], y[::4])
    params = init(net, 0)
    grads = [jax.grad(loss)(params, net, batch, key) for batch in (masked, alone)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *grads)


def test_test_images_weigh_nothing_in_the_statistics(data):
    from _why_networks import Net, init
    from _why_training import evaluate

    one, net = of_one_seed(data), Net(2, "before")
    params = init(net, 0)
    other = one._replace(test_x=3 * one.test_x + 1)
    as_is, moved = (evaluate(net, params, data) for data in (one, other))
    np.testing.assert_allclose(as_is["train loss"], moved["train loss"], rtol=1e-5)
    assert as_is["test loss"] != moved["test loss"]


def test_what_diverged_counts_as_ten_nats():
    from _why_training import capped

    losses = jnp.array([0.5, 11.0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(capped(losses), [0.5, 10, 10, 10])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps: 0 is not above 0"),
        (["--seeds", "0"], "--seeds: 0 is not in 1 ..."),
        (["--only", "folklore"], "invalid choice: 'folklore'"),
        (["--only"], "expected at least one argument"),
    ],
)
def test_wrong_options(study, capsys, argv, message):
    with pytest.raises(SystemExit):
        study(*argv)
    assert message in capsys.readouterr().err


def test_a_file_in_the_place_of_a_folder(study, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit):
        study("--figures", tmp_path / "taken")
    assert "cannot write to" in capsys.readouterr().err
