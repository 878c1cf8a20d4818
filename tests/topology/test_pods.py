"""Meshes and steps for chips that libtpu describes and that are not here (extra `tpu`)."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from test_sharding import MACHINES

from experiments.presets import presets
from tools.compile_report import chips, compile_report
from vlm_jax.sharding import MeshShape, batch_shards, make_mesh, process_rows

V5E_BYTES = 15.75 * 2**30
"""Of a chip's memory, what a program can have."""


@pytest.mark.parametrize("name", ["v5e:4x4", "v5e:16x16", "v6e:16x16", "v5p:4x4x4"])
def test_the_machines_of_the_quick_tests_are_those_that_libtpu_describes(name: str):

    def described(devices: list) -> set[tuple]:
        return {(d.process_index, *d.coords, d.device_kind, d.platform, d.core_on_chip) for d in devices}

    assert described(chips(name)) == described(MACHINES[name])


@pytest.mark.parametrize("name", ["v5e:16x16", "v6e:16x16", "v5p:4x4x8"])
@pytest.mark.parametrize("slices", [1, 2])
def test_rows_and_shapes_on_real_topologies(name: str, slices: int):
    """Every shape of powers of 2 is built, and the processes together read every row of a batch."""
    devices = topologies.get_topology_desc(name, "tpu", num_slices=slices).devices
    count, processes = len(devices), {device.process_index for device in devices}
    for fsdp in (1, 8, 64):
        for tensor in (1, 2, 16):
            if count // slices % (fsdp * tensor):
                continue
            mesh = make_mesh(MeshShape(fsdp=fsdp, tensor=tensor), devices)
            parts = [process_rows(batch_shards(mesh), mesh, process) for process in processes]
            assert len({len(part) for part in parts}) == 1
            np.testing.assert_array_equal(np.unique(np.concatenate(parts)), np.arange(batch_shards(mesh)))
            owners = [{getattr(device, "slice_index", 0) for device in part.flat} for part in mesh.devices]
            assert all(len(part) == 1 for part in owners)


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Less search for a fast program; it fits its memory no better for that."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("name", ["clip-vit-b16", "clip-vit-l14"])
def test_the_published_batch_fits_a_pod_of_v5e(name: str):
    experiment = presets()[name][1]
    training = replace(experiment.training, mesh=MeshShape(fsdp=8))
    results = compile_report(replace(experiment, training=training), chips("v5e:16x16"))
    assert experiment.training.batch_size == 32768
    assert results["bytes/in all"] < 0.6 * V5E_BYTES
