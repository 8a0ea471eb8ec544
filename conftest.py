"""For tests and doctests: what several of them compile is compiled once."""

import pathlib

import jax

CACHE = pathlib.Path(__file__).parent / ".pytest_cache" / "compiled"

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
