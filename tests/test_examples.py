"""The examples: what their pages and tables say of them."""

import pathlib
import re
import runpy
import sys

import jax
import numpy as np
import pytest
from peers import MISSING

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def test_the_tensorflow_snippet(capsys):
    with jax.numpy_rank_promotion("allow"):  # as TensorFlow does
        runpy.run_path(str(EXAMPLES / "tensorflow_port.py"), run_name="__main__")
    printed = capsys.readouterr().out
    differs = float(re.search(r"two steps − y\s+(\S+)", printed)[1])  # type: ignore
    assert differs < 1e-5


@pytest.fixture
def digits(monkeypatch, tmp_path, capsys):
    """The digits demo with one learning rate in its sweep, as a function of argv."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _digits_training
    import train_digits

    for module in (_digits_training, train_digits):
        monkeypatch.setattr(module, "LEARNING_RATES", [0.1])

    def run(*argv):
        argv = ["train_digits.py", "--out", str(tmp_path), *map(str, argv)]
        monkeypatch.setattr(sys, "argv", argv)
        train_digits.main()
        return capsys.readouterr().out

    return run


def sha256(printed):
    return re.search(r"sha256 (\w+)", printed)[1]  # type: ignore


@pytest.mark.slow
def test_the_digits_demo_resumes_bit_for_bit(digits, tmp_path, capsys):
    at_once = digits("--steps", 7)
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert at_once.split("\n\n")[1] in (tmp_path / "summary.md").read_text()

    half = digits("--steps", 4)
    resumed = digits("--steps", 7, "--resume")
    assert sha256(resumed) == sha256(at_once) != sha256(half)

    for argv, message in [
        (["--steps", 3], "past --steps 3"),
        (["--steps", 9, "--seed", 1], "of --seed 0"),
    ]:
        with pytest.raises(SystemExit):
            digits(*argv, "--resume")
        assert message in capsys.readouterr().err


def test_the_digits_demo_needs_a_checkpoint_to_resume(digits, capsys):
    with pytest.raises(SystemExit):
        digits("--resume")
    assert "start without --resume" in capsys.readouterr().err


def test_both_networks_start_alike(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from _digits_training import Network, init, load_data

    data = load_data(0)
    assert len(data.train_x) + len(data.test_x) == 1797  # all of scikit-learn's
    plain, normed = (init(Network(bn), data, 0) for bn in (False, True))
    for i in range(13):
        np.testing.assert_array_equal(
            plain.params[f"Dense_{i}"]["kernel"], normed.params[f"Dense_{i}"]["kernel"]
        )


def test_masked_sequences_on_devices_are_those_of_one(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import masked_devices

    found = masked_devices.main(["--steps", "2"])
    assert found["first layer"] < 1e-6
    assert 1e-6 < found["second layer"] < 1e-2
    assert found["test accuracy"] > 0


def test_a_network_of_torch_goes_on_in_jax(monkeypatch):
    pytest.importorskip("torch", reason=MISSING)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import torch_port

    with jax.numpy_rank_promotion("allow"):  # A bias, as users add it.
        found = torch_port.main(["--steps", "3"])
    assert found["logits"] < 1e-5
    assert found["losses"] < 1e-5
