"""Sampling from a sequence model, a token at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
Step = Callable[[PyTree, jax.Array, jax.Array, jax.Array], tuple[PyTree, jax.Array]]


def decode(
    step: Step,
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


def ending(step: Step, end: int) -> Step:
    """`step` for rows that end: what follows a drawn `end` is `end` again, whatever the model would draw.

    Its cache is `(cache, ended)`, with a bool [B] that is False for a row that has not ended yet.
    """

    def ended(
        cache: tuple[PyTree, jax.Array], token: jax.Array, position: jax.Array, key: jax.Array
    ) -> tuple[tuple[PyTree, jax.Array], jax.Array]:
        cache, over = cache
        cache, token = step(cache, token, position, key)
        token = jnp.where(over, end, token)
        return (cache, over | (token == end)), token

    return ended


def draw_token(
    key: jax.Array,
    logits: Float[Array, "*B V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    allowed: Bool[Array, "*#B V"] | None = None,
) -> Int[Array, "*B"]:
    """A token of softmax(logits / temperature), in fp32; of equally likely ones the lower goes first.

    Args:
      temperature: 0: the likeliest.
      top_k: of the likeliest so many alone; None: of all.
      top_p: of those the fewest, from the likeliest on, that have at least this share of their probability: the
        nucleus of 1904.09751. 1: all.
      allowed: which can be drawn at all, one of a row at least; None: all.
    """
    logits = logits.astype(jnp.float32)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is None and top_p == 1:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    size = logits.shape[-1]
    logits, tokens = jax.lax.top_k(logits, size if top_k is None else min(top_k, size))
    if top_p < 1:
        mass = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
        before = jnp.pad(mass[..., :-1], [(0, 0)] * (mass.ndim - 1) + [(1, 0)])
        logits = jnp.where(before < top_p, logits, -jnp.inf)
    chosen = jax.random.categorical(key, logits)
    return jnp.take_along_axis(tokens, chosen[..., None], axis=-1)[..., 0].astype(jnp.int32)
