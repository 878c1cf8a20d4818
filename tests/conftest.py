"""Eight CPU devices, the compile cache, and a data directory that outlives the run."""

import os
from pathlib import Path

import jax
import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vlm_jax"

# Most of the time goes into compiling what runs for milliseconds: without LLVM's optimizations it takes half.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Prepared data sets, shared between runs as a user's are."""
    path = CACHE / "data"
    path.mkdir(parents=True, exist_ok=True)
    return path
