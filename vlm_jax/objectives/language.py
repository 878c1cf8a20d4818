"""The language-modelling loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_log_probs(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """log p(token) in nats, in fp32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, ""]]:
    """The mean negative log-probability of the targets where `mask` is True.

    Returns:
      The loss in nats a token, metrics, and the number of tokens it is a mean over: the weight that makes
      accumulation over micro-batches exact.
    """
    weight = jnp.sum(mask, dtype=jnp.float32)
    per_token = jnp.where(mask, -token_log_probs(logits, targets), 0)
    correct = jnp.where(mask, jnp.argmax(logits, axis=-1) == targets, False)
    divisor = jnp.maximum(weight, 1)  # a batch may hold no target at all
    return jnp.sum(per_token) / divisor, {"accuracy": jnp.sum(correct) / divisor}, weight
