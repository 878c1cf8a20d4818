"""NaN and infinity in trees of arrays: looked for in each update, and in what a checkpoint gave back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.trees import leaves_by_path

PyTree = Any


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no array of a tree holds NaN or infinity, as a bool scalar; to be part of a larger program."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in numbers]).all()


def not_finite(tree: PyTree) -> str:
    """The path of an array that holds NaN or infinity, empty if none does; of what this process has of them.

    On the host, where nothing has to be compiled for it.
    """
    for path, leaf in leaves_by_path(tree).items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not all(
            np.isfinite(shard.data).all() for shard in leaf.addressable_shards if shard.replica_id == 0
        ):
            return path
    return ""
