"""Codes of an image by what a slow copy of the model itself sees in it, which are named before its pixels are drawn.

Representation forcing (2605.31604). Pooled features of the copy are told by the nearest of prototypes, which follow
the features in equal shares (the balance of SwAV, 2006.09882). The copy and the prototypes are a collection of the
model's variables that its loss moves: what the optimizer's average is no loss can see.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import UserError
from vlm_jax.nn.vision import patchify

TEACHER = "teacher"
"""The collection."""
ROUNDS, TEMPERATURE = 3, 0.05
"""Of the balance: of making shares equal, and by which similarities are divided before."""


@dataclass(frozen=True, kw_only=True)
class OwnCodes:
    """How many codes an image has of how many, and how slowly what they are of moves."""

    code_at: int
    """The token of the first code, which those of the others follow, and then one in whose place nothing is told."""
    size: int
    """Prototypes."""
    pool: int = 2
    """A code is of the patches of a square of so many a side."""
    dropout: float = 0.1
    """Share of the images that are drawn in training whose codes are not told, beside texts that are not."""
    decay: float = 0.996
    """Of the copy's parameters."""
    prototype_decay: float = 0.99

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise UserError(f"codes.pool is {self.pool}: it must be at least 1")
        for name in ("decay", "prototype_decay"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UserError(f"codes.{name} is {value}: it must be at least 0 and less than 1")

    @property
    def untold(self) -> int:
        """The token in whose place nothing is told."""
        return self.code_at + self.size

    def of(self, patches: int) -> int:
        """Codes of an image of so many patches.

        Raises:
          UserError: squares do not tile them.
        """
        side = math.isqrt(patches)
        if side % self.pool:
            raise UserError(f"{side} patches a side cannot be pooled in squares of {self.pool}: choose a codes.pool")
        return (side // self.pool) ** 2


def copied(params: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's parameters those by which it sees: its reader of patches, with what masks some, and its decoder."""
    read = {name: params[name] for name in ("reader", "mask") if name in params}
    return {**read, "language": {"decoder": params["language"]["decoder"]}}


def begun(key: Array, params: Mapping[str, Any], size: int, width: int) -> dict[str, Any]:
    """The copy as the model begins, and prototypes in any direction."""
    prototypes = jax.random.normal(key, (size, width))
    return {"params": jax.tree.map(jnp.copy, copied(params)), "prototypes": unit(prototypes)}


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def pooled(features: Float[Array, "R L D"], pool: int) -> Float[Array, "R M D"]:
    """Means over squares of patches, of unit length."""
    rows, length, width = features.shape
    side = math.isqrt(length)
    squares = patchify(features.reshape(rows, side, side, width), pool)
    return unit(jnp.mean(squares.reshape(rows, -1, pool * pool, width), axis=2))


def nearest(pooled: Float[Array, "R M D"], prototypes: Float[Array, "K D"]) -> Int[Array, "R M"]:
    """The code of each, by the cosine."""
    return jnp.argmax(jnp.einsum("rmd,kd->rmk", pooled, prototypes), axis=-1).astype(jnp.int32)


def balanced(similarity: Float[Array, "N K"], real: Bool[Array, " N"]) -> Float[Array, "N K"]:
    """Shares of the prototypes in each, of which all prototypes have as many in all, or nearly so (2006.09882).

    Args:
      real: what counts; the others have no share.
    """
    shares = jnp.where(real[:, None], jnp.exp(similarity / TEMPERATURE), 0)
    for _ in range(ROUNDS):
        shares = shares / jnp.maximum(jnp.sum(shares, axis=0, keepdims=True), 1e-9)
        shares = shares / jnp.maximum(jnp.sum(shares, axis=1, keepdims=True), 1e-9)
    return shares


def moved(
    teacher: Mapping[str, Any],
    params: Mapping[str, Any],
    pooled: Float[Array, "R M D"],
    real: Bool[Array, " R"],
    config: OwnCodes,
) -> dict[str, Any]:
    """The copy a little nearer to the model, and the prototypes to what they have a share of."""
    copy = jax.tree.map(
        lambda old, new: config.decay * old + (1 - config.decay) * new, teacher["params"], copied(params)
    )
    flat, old = pooled.reshape(-1, pooled.shape[-1]), teacher["prototypes"]
    shares = balanced(flat @ old.T, jnp.repeat(real, pooled.shape[1]))
    mine = jnp.sum(shares, axis=0)[:, None]
    mean = shares.T @ flat / jnp.maximum(mine, 1e-9)
    near = unit(config.prototype_decay * old + (1 - config.prototype_decay) * unit(mean))
    return {"params": copy, "prototypes": jnp.where(mine > 1e-6, near, old)}
