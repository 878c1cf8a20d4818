"""The mesh, the rules and the batch: what is laid out where, and what is refused with which words."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax import sharding
from vlm_jax.errors import UserError
from vlm_jax.sharding import (
    MeshShape,
    batch_sharding,
    batch_shards,
    check_batch_size,
    constrain,
    make_mesh,
    parameter_shardings,
    partition_spec,
    process_rows,
    to_global,
)

MESH = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
RULES = ((r"mlp/up/kernel$", ("embed", "mlp")), (r"kernel$", (None, None)), (r"(bias|scale)$", ()))


def shapes(**leaves: tuple[int, ...]) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


PARAMS = {"blocks": {"mlp": {"up": shapes(kernel=(3, 8, 16), bias=(3, 16))}}, "out": shapes(kernel=(5, 7), scale=())}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (MeshShape(), (8, 1, 1)),
        (MeshShape(fsdp=2), (4, 2, 1)),
        (MeshShape(fsdp=2, tensor=4), (1, 2, 4)),
        (MeshShape(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_data_takes_the_devices_that_are_left(shape: MeshShape, expected: tuple[int, ...]):
    mesh = make_mesh(shape)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), expected, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_may_use_some_of_the_devices():
    assert list(make_mesh(MeshShape(tensor=2), jax.devices()[:2]).devices.flat) == jax.devices()[:2]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(fsdp=3), r"needs 6 devices and there are 8: choose --mesh.data, .* whose product is 8$"),
        (MeshShape(data=3), r"'data': 3, 'fsdp': 1, 'tensor': 1.* needs 3 devices and there are 8"),
        (MeshShape(fsdp=16), r"needs 16 devices and there are 8"),
        (MeshShape(data=16), r"needs 16 devices and there are 8"),
        (MeshShape(tensor=0), r"has an axis below 1: give each at least 1"),
        (MeshShape(fsdp=-1), r"has an axis below 1"),
        (MeshShape(data=0), r"has an axis below 1"),
        (MeshShape(data=-2), r"has an axis below 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape: MeshShape, message: str):
    with pytest.raises(UserError, match=message):
        make_mesh(shape)


def test_the_first_matching_rule_names_the_trailing_dimensions():
    shardings = parameter_shardings(PARAMS, RULES, MESH)
    up, out = shardings["blocks"]["mlp"]["up"], shardings["out"]
    assert up["kernel"] == NamedSharding(MESH, PartitionSpec(None, "fsdp", "tensor"))
    for leaf, ndim in ((up["bias"], 2), (out["kernel"], 2), (out["scale"], 0)):
        assert leaf.is_equivalent_to(NamedSharding(MESH, PartitionSpec()), ndim)
    assert jax.tree.structure(shardings) == jax.tree.structure(PARAMS)


def test_an_unmatched_parameter_is_refused():
    with pytest.raises(ValueError, match="no sharding rule matches the parameter out/scale"):
        parameter_shardings(PARAMS, [*RULES[:2], (r"bias$", ())], MESH)


def test_an_unused_rule_is_refused_with_the_paths_that_there_are():
    with pytest.raises(ValueError, match=re.escape(r"['down/kernel$']; there are ['blocks/mlp/up/bias',")):
        parameter_shardings(PARAMS, [(r"down/kernel$", ()), *RULES], MESH)
    # One that an earlier rule hides is as unused.
    with pytest.raises(ValueError, match="no parameter matches the sharding rules"):
        parameter_shardings(PARAMS, [*RULES, (r"out/kernel$", ())], MESH)


def test_a_rule_of_too_many_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"names 2 dimensions and out/scale has shape \(\)"):
        parameter_shardings(PARAMS, [*RULES[:2], (r"(bias|scale)$", (None, None))], MESH)


@pytest.mark.parametrize(("kernel", "axis", "size"), [((8, 3), "tensor", 3), ((9, 4), "fsdp", 9)])
def test_an_indivisible_dimension_names_the_parameter_and_the_axis(kernel: tuple[int, int], axis: str, size: int):
    message = (
        f"the parameter mlp/up/kernel of shape {list(kernel)} cannot be split over --mesh.{axis} 2: "
        f"choose one that divides {size}"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        parameter_shardings({"mlp": {"up": shapes(kernel=kernel)}}, RULES[:1], MESH)


def test_a_misspelt_logical_axis_is_an_error_and_never_replicated():
    with pytest.raises(KeyError, match="embd"):
        partition_spec(("embd",))
    with pytest.raises(KeyError, match="embd"):
        parameter_shardings(shapes(kernel=(2, 2)), ((r"kernel$", ("embd", None)),), MESH)
    with jax.set_mesh(MESH), pytest.raises(KeyError, match="bach"):
        constrain(jnp.ones(8), "bach")


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.ones((4, 3))
    assert constrain(x, "batch", None) is x


def test_constrain_lays_an_activation_out_as_said():
    with jax.set_mesh(MESH):
        y = jax.jit(lambda x: constrain(x, "batch", None, "heads"))(np.ones((8, 3, 4)))
    assert y.sharding.is_equivalent_to(NamedSharding(MESH, PartitionSpec(("data", "fsdp"), None, "tensor")), 3)


@pytest.mark.parametrize("axes", [("batch",), ("batch", None, None)])
def test_constrain_refuses_another_number_of_axes(axes: tuple[str | None, ...]):
    with pytest.raises(ValueError, match=rf"{len(axes)} logical axes .* shape \(4, 3\)"):
        constrain(jnp.ones((4, 3)), *axes)


def test_a_batch_is_split_over_data_and_fsdp():
    assert batch_shards(MESH) == 4
    assert batch_shards(make_mesh(MeshShape(tensor=8))) == 1
    assert batch_sharding(MESH).shard_shape((8, 5)) == (2, 5)


@pytest.mark.parametrize(("batch_size", "micro_steps"), [(4, 1), (8, 1), (8, 2), (24, 3)])
def test_a_batch_that_splits_evenly_is_accepted(batch_size: int, micro_steps: int):
    check_batch_size(batch_size, MESH, micro_steps)


@pytest.mark.parametrize(
    ("batch_size", "micro_steps", "message"),
    [
        (6, 1, "the batch size 6 cannot be split over 4 devices (data x fsdp): choose a multiple of 4"),
        (0, 1, "the batch size 0 cannot be split over 4 devices (data x fsdp): choose a multiple of 4"),
        (-4, 1, "the batch size -4 cannot be split"),
        (12, 2, "cannot be split over 4 devices (data x fsdp) times 2 micro-steps: choose a multiple of 8"),
    ],
)
def test_a_batch_that_does_not_split_evenly_is_refused(batch_size: int, micro_steps: int, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        check_batch_size(batch_size, MESH, micro_steps)


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(data=2, fsdp=2, tensor=2), MeshShape(tensor=8)])
def test_a_single_process_holds_all_rows(shape: MeshShape):
    assert process_rows(16, make_mesh(shape)) == slice(0, 16)


@pytest.mark.parametrize(
    ("spans", "expected"), [([(8, 12), (4, 8), (8, 12)], slice(4, 12)), ([(12, 16)], slice(12, 16))]
)
def test_a_process_holds_the_rows_of_its_own_devices(monkeypatch, spans, expected: slice):
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: spread(spans))
    assert process_rows(16, MESH) == expected


def test_rows_that_are_not_together_are_refused(monkeypatch):
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: spread([(0, 4), (8, 12)]))
    with pytest.raises(UserError, match=re.escape("would hold the rows [(0, 4), (8, 12)] of a batch: choose a mesh")):
        process_rows(16, MESH)


def spread(spans: list[tuple[int, int]]) -> SimpleNamespace:
    """A batch's sharding, as one process of several sees it."""
    indices = {device: (slice(*span),) for device, span in enumerate(spans)}
    return SimpleNamespace(addressable_devices_indices_map=lambda shape: indices)


def test_rows_become_one_array_over_the_mesh():
    rows = {"image": np.arange(8 * 3).reshape(8, 3), "label": np.arange(8)}
    batch = to_global(rows, 8, MESH)
    for name, values in rows.items():
        np.testing.assert_array_equal(batch[name], values)
        assert batch[name].sharding.is_equivalent_to(batch_sharding(MESH), values.ndim)


def test_a_product_of_sharded_batches_spans_all_of_it():
    """What a contrastive loss rests on: under the mesh of `make_mesh` this is one global product."""
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    mesh: Mesh = MESH
    with jax.set_mesh(mesh):
        batch = to_global({"x": x}, 8, mesh)["x"]
        np.testing.assert_allclose(jax.jit(lambda a, b: a @ b.T)(batch, batch), x @ x.T, rtol=1e-5, atol=1e-5)
