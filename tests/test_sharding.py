"""The mesh, the rules and the batch: what is laid out where, and what is refused with which words."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
    under,
)
from vlm_jax.trees import leaves_by_path

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


def test_the_rules_of_parts_hold_within_them_alone_in_either_order():
    """Both have kernels, which lie otherwise; a rule that is anchored begins where its part does."""
    tower = ((r"^kernel$", ("embed", None)), (r"kernel$", (None, "mlp")), (r"(^|/)bias$", (None,)))
    other = ((r"kernel$", ("vocab", None)),)
    kernel = shapes(kernel=(8, 8))
    part = kernel | {"up": kernel | shapes(bias=(8,))}
    params = {"vision": part, "lm": kernel | {"vision": kernel}, "visions": kernel}
    rules = (under("vision", tower), under("lm", other), under("visions", ((r"l$", (None, None)),)))
    layouts = []
    for order in itertools.permutations(rules):
        shardings = leaves_by_path(parameter_shardings(params, sum(order, ()), MESH))
        layouts.append({path: tuple(sharding.spec) for path, sharding in shardings.items()})
    assert all(layout == layouts[0] for layout in layouts)
    assert layouts[0] == {
        "lm/kernel": ("tensor", None),
        "lm/vision/kernel": ("tensor", None),
        "vision/kernel": ("fsdp", None),
        "vision/up/bias": (None,),
        "vision/up/kernel": (None, "tensor"),
        "visions/kernel": (None, None),
    }


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


def test_constrain_leaves_keys_and_values_whole_whose_heads_the_mesh_does_not_divide():
    with jax.set_mesh(MESH):
        for heads, axis in ((3, None), (4, "tensor")):
            y = jax.jit(lambda x: constrain(x, "batch", None, "kv_heads"))(np.ones((8, 3, heads)))
            assert y.sharding.is_equivalent_to(NamedSharding(MESH, PartitionSpec(("data", "fsdp"), None, axis)), 3)


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
        (
            6,
            1,
            "the batch size 6 cannot be split over 4 devices (data x fsdp): choose a multiple of 4, such as --batch-",
        ),
        (
            0,
            1,
            "the batch size 0 cannot be split over 4 devices (data x fsdp): choose a multiple of 4, such as --batch-",
        ),
        (-4, 1, "the batch size -4 cannot be split"),
        (12, 2, "cannot be split over 4 devices (data x fsdp) times 2 micro-steps: choose a multiple of 8"),
    ],
)
def test_a_batch_that_does_not_split_evenly_is_refused(batch_size: int, micro_steps: int, message: str):
    with pytest.raises(UserError, match=re.escape(message)) as told:
        check_batch_size(batch_size, MESH, micro_steps)
    check_batch_size(int(re.search(r"--batch-size (\d+)$", str(told.value))[1]), MESH, micro_steps)


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(data=2, fsdp=2, tensor=2), MeshShape(tensor=8)])
def test_a_single_process_holds_all_rows(shape: MeshShape):
    np.testing.assert_array_equal(process_rows(16, make_mesh(shape)), np.arange(16))


@dataclass(frozen=True)
class Chip:
    """A device as JAX describes it, of a machine that is not here."""

    id: int
    process_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    slice_index: int = 0
    core_on_chip: int = 0


def torus(kind: str, x: int, y: int, z: int = 1, **fields: Any) -> list[Chip]:
    """A slice as `jax.devices()` lists it, process by process: each host has 2x2 chips of one plane."""
    chips = []
    for i in range(x * y * z):
        plane, (row, column) = i // (x * y), divmod(i % (x * y), x)
        host = (plane * (y // 2) + row // 2) * (x // 2) + column // 2
        chips.append(Chip(i, host, (column, row, plane), kind, **fields))
    return sorted(chips, key=lambda chip: (chip.process_index, chip.id))


def hosts_of_gpus(count: int) -> list[Chip]:
    """Eight to a host, each of which is a slice of its own."""
    return [Chip(i, i // 8, device_kind="H100", platform="gpu", slice_index=i // 8) for i in range(8 * count)]


MACHINES = {
    "v5e:4x4": torus("TPU v5 lite", 4, 4),
    "v5e:16x16": torus("TPU v5 lite", 16, 16),
    "v6e:16x16": torus("TPU v6 lite", 16, 16),
    "v5p:4x4x4": torus("TPU v5", 4, 4, 4),
    "H100 8x8": hosts_of_gpus(8),
}


def meshes(machine: str) -> list[Mesh]:
    """Every shape of powers of 2."""
    count = len(MACHINES[machine])
    powers = [2**i for i in range(count.bit_length())]
    shapes = [MeshShape(data=d, fsdp=f, tensor=count // d // f) for d in powers for f in powers if d * f <= count]
    return [make_mesh(shape, MACHINES[machine]) for shape in shapes]


@pytest.mark.parametrize("machine", MACHINES)
def test_each_process_reads_the_rows_of_its_devices_and_all_together_read_all(machine: str):
    """Whatever the shape of the mesh and wherever a host lies in it; counted here on the mesh's own array."""
    processes = {chip.process_index for chip in MACHINES[machine]}
    for mesh in meshes(machine):
        shards = batch_shards(mesh)
        holders = np.array([chip.process_index for chip in mesh.devices.flat]).reshape(shards, -1)
        union = set()
        for process in processes:
            rows = process_rows(2 * shards, mesh, process)
            assert rows.tolist() == [row for row in range(2 * shards) if process in holders[row // 2]]
            union |= set(rows.tolist())
        assert union == set(range(2 * shards))


def test_a_host_of_a_torus_holds_rows_with_gaps():
    """Each of its 2x2 chips lies in another place of a mesh of data alone."""
    mesh = make_mesh(MeshShape(), MACHINES["v5e:16x16"])
    rows = process_rows(32768, mesh, 0)
    assert rows.tolist() == [*range(256), *range(2048, 2304)]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_shape_can_be_built_and_uses_each_device_once(machine: str):
    """Also where no whole axis of the torus has the size of one of the mesh."""
    for mesh in meshes(machine):
        assert sorted(chip.id for chip in mesh.devices.flat) == list(range(len(MACHINES[machine])))


def test_tensor_stays_within_a_host_of_gpus_and_fsdp_next_to_it():
    mesh = make_mesh(MeshShape(fsdp=2, tensor=4), MACHINES["H100 8x8"][::-1])
    hosts = np.vectorize(lambda chip: chip.process_index)(mesh.devices)
    np.testing.assert_array_equal(hosts, np.broadcast_to(np.arange(8)[:, None, None], (8, 2, 4)))


TWO_SLICES = [*torus("TPU v5 lite", 4, 4), *torus("TPU v5 lite", 4, 4, slice_index=1)]


def test_only_data_spans_slices():
    mesh = make_mesh(MeshShape(fsdp=8), TWO_SLICES)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert [set(part.flat) for part in slices] == [{0}, {0}, {1}, {1}]


def test_a_mesh_whose_parameters_would_span_slices_is_refused_with_one_that_can_be():
    with pytest.raises(
        UserError, match=r"2 slices of 16, .* --mesh.data is 1: choose a multiple of 2, such as"
    ) as told:
        make_mesh(MeshShape(fsdp=32), TWO_SLICES)
    axes = dict(re.findall(r"--mesh\.(\w+) (\d+)", str(told.value)))
    assert make_mesh(MeshShape(**{axis: int(size) for axis, size in axes.items()}), TWO_SLICES).size == 32


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param([chip for chip in torus("TPU v4", 4, 4) if chip.id != 5], id="a hole"),
        pytest.param([Chip(i, 0, (i // 2, 0, 0), "TPU v4", core_on_chip=i % 2) for i in range(4)], id="two a chip"),
        pytest.param([*torus("TPU v4", 4, 4), *torus("TPU v4", 2, 2, slice_index=1)], id="unequal slices"),
    ],
)
def test_devices_that_are_no_whole_slice_are_refused_in_one_sentence(devices: list[Chip]):
    with pytest.raises(UserError, match="of kind TPU v4 are no whole slice with one device a chip: run on all hosts"):
        make_mesh(MeshShape(), devices)


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
