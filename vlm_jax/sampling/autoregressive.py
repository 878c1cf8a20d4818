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
    start: int = 0,
) -> jax.Array:
    """Draws the tokens at the positions `start` to `length - 1`, each from the model given those before it.

    Args:
      step: `(cache, token, position, key) -> (cache, next token)`: feeds the token that stands before `position` and
        draws the one at it, with the randomness of `fold_in(key, position)`.
      cache: what the model keeps of the tokens before `first`.
      first: what stands before the first token to draw, [B, ...].

    Returns:
      [B, length - start, ...]
    """

    def body(carry: tuple[PyTree, jax.Array], position: jax.Array) -> tuple[tuple[PyTree, jax.Array], jax.Array]:
        cache, token = carry
        cache, token = step(cache, token, position, jax.random.fold_in(key, position))
        return (cache, token), token

    _, tokens = jax.lax.scan(body, (cache, first), jnp.arange(start, length))
    return jnp.moveaxis(tokens, 0, 1)
