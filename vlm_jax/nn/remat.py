"""What the layers of a stack keep for the backward pass, and what they compute a second time (1604.06174)."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax

Remat = Literal["none", "products", "all"]
"""none: keep every activation. products: keep the products with parameters alone, and compute norms, activation
functions and attention again. all: keep the input of each layer alone, and compute the layer again."""

POLICIES: dict[Remat, Callable[..., bool]] = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(
    block: type[nn.Module], remat: Remat, *, scan: bool, static_argnums: tuple[int, ...]
) -> type[nn.Module]:
    """The layer `block` under a policy.

    Args:
      scan: whether a loop over the layers runs it.
      static_argnums: arguments of its call that are no arrays, itself being 0.
    """
    if remat == "none":
        return block
    # prevent_cse guards rematerialisation against being undone outside a loop; inside one it only costs.
    return nn.remat(block, policy=POLICIES[remat], prevent_cse=not scan, static_argnums=static_argnums)
