"""What holds for every test: eight devices, strict shapes, no NaN passing unseen."""

import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# What several tests, or workers, compile is compiled once: a third of their time.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert jax.device_count() == 8


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
