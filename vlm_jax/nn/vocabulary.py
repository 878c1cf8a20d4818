"""Tokens as vectors, and what vectors say of tokens: two uses of one table [V, D], or two tables."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Rule
from vlm_jax.sharding import constrain


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str) -> Float[Array, "B T D"]:
    """The vectors of the tokens."""
    # The width is gathered before the lookup: of a table split by width the partitioner would look up the tokens of
    # the whole batch on every device.
    return constrain(constrain(jnp.asarray(table, dtype), "vocab", None)[tokens], "batch", None, None)


def token_logits(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """The inner products with each token's vector, in fp32."""
    table = constrain(jnp.asarray(table, x.dtype), "vocab", None)
    logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", None, "vocab")


def vocabulary_rules(*, tied: bool) -> tuple[Rule, ...]:
    """Sharding rules of a table called `token` and, unless it serves for both, another called `head`."""
    return ((r"token/embedding$" if tied else r"(token|head)/embedding$", ("vocab", "embed")),)
