"""Sampling from a sequence model, a token at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def decode(
    step: Callable[[PyTree, jax.Array, jax.Array, jax.Array], tuple[PyTree, jax.Array]],
    cache: PyTree,
    first: jax.Array,
    length: int,
    key: jax.Array,
) -> jax.Array:
    """Draws `length` tokens, each from the model given those before it.

    Args:
      step: `(cache, token, position, key) -> (cache, next token)`: feeds the token that stands before `position` and
        draws the one at it, with the randomness of `fold_in(key, position)`.
      first: what stands before the first token, [B, ...].

    Returns:
      [B, length, ...]
    """

    def body(carry: tuple[PyTree, jax.Array], position: jax.Array) -> tuple[tuple[PyTree, jax.Array], jax.Array]:
        cache, token = carry
        cache, token = step(cache, token, position, jax.random.fold_in(key, position))
        return (cache, token), token

    _, tokens = jax.lax.scan(body, (cache, first), jnp.arange(length))
    return jnp.moveaxis(tokens, 0, 1)
