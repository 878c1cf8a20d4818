"""Eight CPU devices, caches that outlive the run, and two small runs for the tests of what reads them."""

import gc
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from experiments.presets import presets
from experiments.run import run
from vlm_jax.experiment import Experiment
from vlm_jax.paths import cache_directory
from vlm_jax.sharding import MeshShape

CACHE = (cache_directory() or Path(tempfile.gettempdir())) / "vlm_jax"

# Most of the time goes into compiling what runs for milliseconds: without LLVM's optimizations it takes half, without
# MLIR for what is fused four fifths of that, and as one module in the place of one for each thread another tenth less.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_finish() -> None:
    """What libraries hold stays: to look through it for garbage, as tracing would, takes a twentieth of the time."""
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Prepared data sets, shared between runs as a user's are."""
    path = CACHE / "data"
    path.mkdir(parents=True, exist_ok=True)
    return path


def trained(preset: Experiment, **fields: object) -> Experiment:
    """The preset with other fields of its training."""
    return replace(preset, training=replace(preset.training, **fields))


@pytest.fixture(scope="session")
def vae_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a few steps of a small VAE on the digits."""
    workdir = tmp_path_factory.mktemp("vae") / "run"
    preset = presets()["vae-tiny"][1]
    model = replace(preset.model, latent=4, widths=(16,), mixtures=2)
    small = replace(preset, model=model, workdir=str(workdir), data_dir=str(data_dir))
    run("vae-tiny", trained(small, mesh=MeshShape(fsdp=2), steps=4, batch_size=16, checkpoint_every=2, log_every=2))
    return workdir


@pytest.fixture(scope="session")
def clip_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a few steps of a small CLIP on the emoji."""
    workdir = tmp_path_factory.mktemp("clip") / "run"
    preset = presets()["clip-tiny"][1]
    tower = replace(preset.model.image.transformer, width=16, depth=1, heads=2, mlp=32)
    image = replace(preset.model.image, transformer=tower)
    model = replace(preset.model, image=image, text=replace(preset.model.text, transformer=tower), embedding=16)
    small = replace(preset, model=model, workdir=str(workdir), data_dir=str(data_dir))
    run("clip-tiny", trained(small, steps=3, batch_size=16, checkpoint_every=2, log_every=1))
    return workdir
