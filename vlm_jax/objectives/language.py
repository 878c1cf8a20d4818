"""The probabilities of tokens, and the language-modelling loss."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

LOGITS = 2**24
"""Logits of one sequence that are held at once, at most: 64 MiB."""


class Scores(NamedTuple):
    """What logits say of a token, each in fp32."""

    log_prob: Float[Array, "*B"]
    """log p(token), nats."""
    likeliest: Bool[Array, "*B"]
    """Whether no other token is likelier."""
    log_normaliser: Float[Array, "*B"]
    """log Z, the logarithm of the sum of the exponentials of all logits."""


def token_log_probs(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """log p(token) in nats, in fp32."""
    return token_scores(logits, tokens).log_prob


def token_scores(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Scores:
    """What logits say of tokens."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    return Scores(chosen - log_normaliser, chosen >= jnp.max(logits, axis=-1), log_normaliser)


def sequence_scores(
    logits_of: Callable[[Array], Array], x: Float[Array, "B T D"], tokens: Int[Array, "B T"], vocab_size: int
) -> Scores:
    """`token_scores` of `logits_of(x)`, without all of these at once.

    The logits of a long sequence over a large vocabulary are larger than all else in a step. They are computed, and
    in the backward pass computed again, for as many places at a time as `LOGITS` allows.

    Args:
      logits_of: [B, P, D] -> [B, P, V], each place for itself.
    """

    def scores(part: tuple[Array, Array]) -> Scores:
        return token_scores(logits_of(part[0]), part[1])

    batch, length, _ = x.shape
    places = max((n for n in range(1, length + 1) if length % n == 0 and n * vocab_size <= LOGITS), default=1)
    if places == length:
        return scores((x, tokens))
    parts = jax.tree.map(lambda a: a.reshape(batch, -1, places, *a.shape[2:]).swapaxes(0, 1), (x, tokens))
    found = jax.lax.map(jax.checkpoint(scores), parts)
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(batch, length), found)


def cross_entropy(
    scores: Scores, mask: Shaped[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, ""]]:
    """The mean negative log-probability of the tokens of `mask`.

    Args:
      mask: bool, or how much each token counts.

    Returns:
      The loss in nats a token, metrics, and the number of tokens it is a mean over: the weight that makes
      accumulation over micro-batches exact.
    """
    weight = jnp.sum(mask, dtype=jnp.float32)
    divisor = jnp.where(weight > 0, weight, 1)  # a batch may hold no target at all
    loss = -jnp.sum(jnp.where(mask > 0, mask * scores.log_prob, 0)) / divisor
    return loss, {"accuracy": jnp.sum(mask * scores.likeliest) / divisor}, weight


def shares(mask: Bool[Array, "B T"], document: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """How much each token counts in a mean over documents of the means over their tokens: its share of its document's.

    Args:
      document: 1, 2, ... in each row, up to the tokens that there are.
    """

    def row(mask: Array, document: Array) -> Array:
        return mask / jnp.maximum(jax.ops.segment_sum(mask.astype(jnp.float32), document, len(mask) + 1)[document], 1)

    return jax.vmap(row)(mask, document)
