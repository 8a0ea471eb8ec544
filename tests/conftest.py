"""What holds for every test: eight devices, strict shapes, no NaN passing unseen."""

import os
import pathlib

import jax
import older
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras asks when it is imported.

jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    if older.JAX < (0, 8):  # where `jax.pmap` is no program that `jax.jit` has parts of
        config.addinivalue_line("filterwarnings", "ignore:The function jit.*pmap")


jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert jax.device_count() == 8


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def examples(monkeypatch):
    """Lets a test import the modules of examples/."""
    folder = pathlib.Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(folder))


def pytest_collection_modifyitems(items):
    if older.FLAX < (0, 12):
        skip = pytest.mark.skip(reason="jaxbn.nnx needs Flax 0.12.0")
        for item in items:
            if "nnx" in item.nodeid:
                item.add_marker(skip)
