"""Where arrays lie on a mesh of devices: one mesh, one table of logical axes, one set of path rules a model."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.trees import leaves_by_path, map_with_path

PyTree = Any

MESH_AXES = ("data", "fsdp", "tensor")

AXES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # the model's width, in parameters: gathered before use, as in ZeRO-3
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "filters": "fsdp",  # output channels of a convolution
    "components": "fsdp",  # of a mixture
}
"""Logical axis -> mesh axes. An axis named None is replicated."""


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices each axis of the mesh has."""

    data: int = -1
    """Copies of the model that split the batch; -1: all the devices that the other axes leave."""
    fsdp: int = 1
    """Devices that split the batch and also each parameter, which is gathered where it is used."""
    tensor: int = 1
    """Devices that split heads and hidden units, and compute on the same examples."""


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, the hosts' devices contiguous along `data` first.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(shape, axis) for axis in MESH_AXES}
    if any(size < 1 for axis, size in sizes.items() if (axis, size) != ("data", -1)):
        raise UserError(f"the mesh {sizes} has an axis below 1: give each at least 1 device (data may be -1: the rest)")
    inner = shape.fsdp * shape.tensor
    if shape.data == -1:
        sizes["data"] = max(len(devices) // inner, 1)
    if sizes["data"] * inner != len(devices):
        raise UserError(
            f"the mesh {sizes} needs {sizes['data'] * inner} devices and there are {len(devices)}: "
            f"choose --mesh.data, --mesh.fsdp and --mesh.tensor whose product is {len(devices)}"
        )
    # Auto, not make_mesh's default Explicit, under which the global `image @ text.T` of a contrastive loss raises.
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of logical axes; a name that `AXES` lacks is a KeyError, never silently replicated."""
    return PartitionSpec(*(None if axis is None else AXES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout to logical axes, one a dimension; without a mesh, as in a notebook, a no-op."""
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: what a function that is being traced will run on.

    The mesh's devices need not be this process's: programs are also compiled ahead of time, for a pod that is not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def parameter_shardings(params: PyTree, rules: Sequence[Rule], mesh: Mesh) -> PyTree:
    """A `NamedSharding` for each leaf: the first rule whose expression is found in its path.

    A rule's axes describe the trailing dimensions; leading ones, such as the layers of a scanned stack, are
    replicated.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: a leaf that no rule matches, or a rule that no leaf matches: either is how a layout rots unseen.
      UserError: a dimension that its mesh axes do not divide.
    """
    used: set[str] = set()

    def sharding(path: str, leaf: Any) -> NamedSharding:
        matching = (rule for rule in rules if re.search(rule[0], path))
        pattern, axes = next(matching, (None, ()))
        if pattern is None:
            raise ValueError(f"no sharding rule matches the parameter {path}: add one to the model's rules")
        used.add(pattern)
        if len(axes) > leaf.ndim:
            raise ValueError(f"the rule {pattern!r} names {len(axes)} dimensions and {path} has shape {leaf.shape}")
        spec = partition_spec((None,) * (leaf.ndim - len(axes)) + tuple(axes))
        check_divisible(path, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    shardings = map_with_path(sharding, params)
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise ValueError(
            f"no parameter matches the sharding rules {unused}; there are {sorted(leaves_by_path(params))}"
        )
    return shardings


def check_divisible(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    """Refuses a parameter that the mesh cannot split evenly."""
    for dimension, axis in zip(shape, spec, strict=True):
        if axis is not None and dimension % mesh.shape[axis]:
            raise UserError(
                f"the parameter {path} of shape {list(shape)} cannot be split over --mesh.{axis} {mesh.shape[axis]}: "
                f"choose one that divides {dimension}"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, partition_spec(["batch"]))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts that the batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: Mesh, micro_steps: int = 1) -> None:
    """Refuses a batch that the mesh cannot split evenly.

    Raises:
      UserError: `batch_size` is no multiple of `micro_steps` times the devices that split the batch.
    """
    shards = batch_shards(mesh)
    if batch_size < 1 or batch_size % (shards * micro_steps):
        parts = f"{shards} devices (data x fsdp)" + (f" times {micro_steps} micro-steps" if micro_steps > 1 else "")
        raise UserError(
            f"the batch size {batch_size} cannot be split over {parts}: choose a multiple of {shards * micro_steps}"
        )


def process_rows(batch_size: int, mesh: Mesh) -> slice:
    """The rows of the global batch that this process's devices hold.

    Raises:
      UserError: they are not contiguous, which no mesh over whole hosts gives.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({index[0].indices(batch_size)[:2] for index in indices if index})
    if any(stop != start for (_, stop), (start, _) in itertools.pairwise(spans)):
        raise UserError(f"this process would hold the rows {spans} of a batch: choose a mesh that keeps them together")
    return slice(spans[0][0], spans[-1][1])


def to_global(batch: Any, batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the rows that each process read (`process_rows`) into arrays that span the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }
