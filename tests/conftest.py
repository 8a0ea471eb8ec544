"""What holds for every test: eight devices, strict shapes, no NaN passing unseen."""

import os

import jax
import older as older
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras asks when it is imported.

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert jax.device_count() == 8


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
