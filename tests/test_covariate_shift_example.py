"""The study of covariate shift: its corruptions, its table, and what it shows."""

import json
import pathlib

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
NAMES = ["noise", "blur", "contrast", "rotation", "inversion", "occlusion"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="module")
def images():
    from sklearn.datasets import load_digits

    return (load_digits().images[:50] / 16).astype(np.float32)


@pytest.fixture
def net():
    """One small network for all, so that each program is compiled once."""
    from _covariate_shift import Network

    return Network(width=12, strides=(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_corruptions_grow_with_strength(images, name):
    from _corruptions import STRENGTHS, corrupt

    np.testing.assert_array_equal(corrupt(images, name, 0, seed=3), images)
    distances = [0.0]
    for strength in STRENGTHS:
        corrupted = corrupt(images, name, strength, seed=3)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == np.float32
        assert 0 <= corrupted.min() <= corrupted.max() <= 1
        distances.append(np.square(corrupted - images).mean())
        again = corrupt(images, name, strength, seed=3)
        np.testing.assert_array_equal(corrupted, again)
    assert (np.diff(distances) > 0).all()


def test_corruptions_are_what_they_are_called(images):
    from _corruptions import corrupt, rotation

    np.testing.assert_allclose(corrupt(images, "inversion", 5, seed=0), 1 - images)
    for name in ("noise", "occlusion"):
        one, other = (corrupt(images, name, 3, seed) for seed in (0, 1))
        assert (one != other).any()
    hidden = corrupt(np.zeros_like(images), "occlusion", 2, seed=0)
    np.testing.assert_array_equal((hidden == 0.5).sum((1, 2)), 3 * 3)
    contrast = corrupt(images, "contrast", 5, seed=0)
    np.testing.assert_allclose(contrast.mean((1, 2)), images.mean((1, 2)), rtol=1e-5)
    quarter = rotation(images, 90, np.random.default_rng(0))
    np.testing.assert_allclose(quarter, np.rot90(images, axes=(1, 2)), atol=1e-6)


def test_the_mix_leads_from_the_image_alone_to_the_source(net):
    from _covariate_shift import (
        accuracy,
        batch_accuracy,
        in_batches,
        init,
        mixed_accuracy,
    )

    variables = init(net, 0).variables
    rng = np.random.default_rng(0)
    x, y = rng.random((512, 8, 8), np.float32), rng.integers(10, size=512)
    alone = in_batches(x, 1), in_batches(y, 1)
    for pseudo_samples, expected in [
        (0.0, batch_accuracy(net, variables, *alone)),
        (1e9, accuracy(net, variables, x, y)),
    ]:
        found = mixed_accuracy(net, variables, *alone, pseudo_samples)
        np.testing.assert_allclose(found, expected, atol=1.5 / 512)


def test_the_study_writes_its_table_and_its_picture(net, tmp_path, capsys):
    import covariate_shift

    argv = ["--out", tmp_path, "--steps", 60, "--seed", 1, "--pseudo-samples", 2]
    results = covariate_shift.main(list(map(str, argv)), strengths=(4,), net=net)

    text = (tmp_path / "summary.md").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1  # The columns line up.
    labels = [row.split("|")[1].strip() for row in rows]
    assert labels[2:] == [*NAMES, "mean of the six", "clean"]
    assert "one image, N = 2" in rows[0]

    assert results["clean"][0]["source"] > 0.9
    contrast = results["contrast"][4]
    for method in ("AdaBN", "batch of 64"):
        assert contrast[method] > contrast["source"] + 0.1
    assert contrast["one image, N = 2"] > contrast["source"]

    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["contrast"]["4"] == contrast
    assert (tmp_path / "drift.md").read_text().count("| BatchNorm_") == 2 * len(NAMES)
    assert (tmp_path / "covariate_shift.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps: 0 is not above 0"),
        (["--seed", "-1"], "-1 is not in 0 ..."),
        (["--pseudo-samples", "-1"], "-1 is not at least 0 and finite"),
        (["--pseudo-samples", "nan"], "nan is not at least 0 and finite"),
        (["--figure", "a.txt"], "does not end in .png, .svg or .pdf"),
    ],
)
def test_wrong_options(capsys, argv, message):
    import covariate_shift

    with pytest.raises(SystemExit):
        covariate_shift.main(argv)
    assert message in capsys.readouterr().err
