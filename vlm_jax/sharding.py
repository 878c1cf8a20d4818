"""Where arrays lie on a mesh of devices: one mesh, one table of logical axes, one set of path rules a model."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Int

from vlm_jax.contract import Axis, Rule
from vlm_jax.errors import UserError
from vlm_jax.trees import leaves_by_path, map_with_path

PyTree = Any

MESH_AXES = ("data", "fsdp", "tensor")

AXES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # the model's width, in parameters: gathered before use, as in ZeRO-3
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "filters": "fsdp",  # output channels of a convolution
    "components": "fsdp",  # of a mixture
}
"""Logical axis -> mesh axes. An axis named None is replicated, as are kv_heads that the mesh does not divide."""

logger = logging.getLogger(__name__)


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
    """A mesh over all devices: neighbours in the network lie along `tensor` first, slices of TPUs along `data`.

    Raises:
      UserError: the axes do not multiply to the number of devices, `data` does not divide into the slices, or the
        devices are no whole slice.
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
    return Mesh(arrange(tuple(sizes.values()), devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of `shape`, such that collectives along each axis meet as few links as they can.

    Raises:
      UserError: as `make_mesh`.
    """
    # Of GPUs each host counts as a slice too, and any axis may cross them; their ids go host by host.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    data, *inner = shape
    if data % slices:
        each = len(devices) // slices
        raise UserError(
            f"the devices are {slices} slices of {each}, which only copies of the model can span, and --mesh.data is "
            f"{data}: choose a multiple of {slices}, such as --mesh.data {slices} --mesh.fsdp {each} --mesh.tensor 1"
        )
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    except (AssertionError, ValueError) as error:  # a hole, a box with more than one device a chip, unequal slices
        raise UserError(
            f"the {len(devices)} devices of kind {devices[0].device_kind} are no whole slice with one device a chip: "
            f"run on all hosts of a slice, and on TPU v4 in megacore mode"
        ) from error


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of logical axes; a name that `AXES` lacks is a KeyError, never silently replicated."""
    return PartitionSpec(*(None if axis is None else AXES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout to logical axes, one a dimension; without a mesh, as in a notebook, a no-op."""
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    split = [None if undivided_kv_heads(axis, size, mesh) else axis for axis, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, partition_spec(split))


def undivided_kv_heads(axis: str | None, count: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether these are heads of keys and values that every device has to have all of."""
    return axis == "kv_heads" and count % mesh.shape["tensor"] != 0


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: what a function that is being traced will run on.

    The mesh's devices need not be this process's: programs are also compiled ahead of time, for a pod that is not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def parameter_shardings(params: PyTree, rules: Sequence[Rule], mesh: Mesh) -> PyTree:
    """A `NamedSharding` for each leaf: the first rule whose expression is found in its path.

    A rule's axes describe the trailing dimensions; leading ones, such as the layers of a scanned stack, are
    replicated. It is logged where each device has all heads of keys and values.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: a leaf that no rule matches, or a rule that no leaf matches: either is how a layout rots unseen.
      UserError: a dimension, or the number of heads in it, that its mesh axes do not divide.
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
        return NamedSharding(mesh, divided(path, leaf.shape, axes, mesh))

    shardings = map_with_path(sharding, params)
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise ValueError(
            f"no parameter matches the sharding rules {unused}; there are {sorted(leaves_by_path(params))}"
        )
    heads = {axis for _, axes in rules for axis in axes if isinstance(axis, tuple)}
    for name, count in sorted(heads):
        if undivided_kv_heads(name, count, mesh):
            tensor = mesh.shape["tensor"]
            logger.warning(f"every device has all {count} heads of keys and values: --mesh.tensor {tensor} splits none")
    return shardings


def under(prefix: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of a part, of its parameters alone where they lie in a model's subtree of that name."""
    anchored = rf"^{re.escape(prefix)}(?=/)"
    return tuple(
        (anchored + (f"/(?:{pattern[1:]})" if pattern.startswith("^") else f".*(?:{pattern})"), axes)
        for pattern, axes in rules
    )


def divided(path: str, shape: tuple[int, ...], axes: Sequence[Axis], mesh: Mesh) -> PartitionSpec:
    """The mesh axes of a parameter's trailing dimensions; refuses what they do not divide evenly."""
    spec: list[Any] = [None] * (len(shape) - len(axes))
    for axis, size in zip(axes, shape[len(spec) :], strict=True):
        name, count = axis if isinstance(axis, tuple) else (axis, size)
        (split,) = partition_spec([None if undivided_kv_heads(name, count, mesh) else name])
        if split is not None and count % mesh.shape[split]:
            what = f"of shape {list(shape)}" if count == size else f"of {count} {name}"
            raise UserError(
                f"the parameter {path} {what} cannot be split over --mesh.{split} {mesh.shape[split]}: "
                f"choose one that divides {count}"
            )
        spec.append(split)
    return PartitionSpec(*spec)


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """The shapes and dtypes of `tree`, to lie as `shardings` say: one for each leaf, or one for all of a branch."""

    def place(sharding: Sharding, branch: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), branch)

    return jax.tree.map(place, shardings, tree)


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
        multiple = shards * micro_steps
        nearest = max(round(batch_size / multiple), 1) * multiple
        raise UserError(
            f"the batch size {batch_size} cannot be split over {parts}: choose a multiple of {multiple}, such as "
            f"--batch-size {nearest}"
        )


def process_rows(batch_size: int, mesh: Mesh, process: int | None = None) -> Int[np.ndarray, " rows"]:
    """The rows of the global batch that a process's devices hold, ascending.

    With gaps: the devices of a TPU's host are a block of the torus, and no stretch of any of its axes.

    Args:
      process: its index; None: this one.
    """
    process = jax.process_index() if process is None else process
    spans: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((batch_size,))
    held = np.zeros(batch_size, bool)
    for device, (rows,) in spans.items():
        held[rows] |= device.process_index == process
    return np.flatnonzero(held)


def to_global(batch: Any, batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the rows that each process read (`process_rows`, in that order) into arrays that span the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }
