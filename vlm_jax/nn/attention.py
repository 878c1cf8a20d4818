"""Multi-head attention, with a cache of keys and values for decoding."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.nn.fused_attention import fused_attention
from vlm_jax.sharding import constrain


class Cache(NamedTuple):
    """One layer's keys and values of the positions decoded so far, and room for those to come."""

    key: Float[Array, "B H T d"]
    value: Float[Array, "B H T d"]


def empty_cache(batch: int, length: int, heads: int, head_width: int, *, layers: int, dtype: str) -> tuple[Cache, ...]:
    """Room for `length` positions in each of `layers` layers.

    A loop over tokens writes a position into each in place. Layers that lay in one array would be taken apart and put
    together again, whole, for every token.
    """
    zeros = jnp.zeros((batch, heads, length, head_width), dtype)
    return tuple(Cache(zeros, zeros) for _ in range(layers))


def dot_product_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S H d"],
    value: Float[Array, "B S H d"],
    mask: Bool[Array, "#B #H T S"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "B T H d"]:
    """softmax(q k^T / sqrt(d)) v, the softmax in fp32. Where `mask` is False nothing is attended to."""
    fused = fused_attention(query, key, value, mask, causal=causal)
    return plain_attention(query, key, value, mask, causal=causal) if fused is None else fused


def plain_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S H d"],
    value: Float[Array, "B S H d"],
    mask: Bool[Array, "#B #H T S"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "B T H d"]:
    """`dot_product_attention` as its formula says, for every platform, shape and derivative."""
    # On the CPU a batched product over [B, H, T, d] takes half the time of XLA's own layout.
    query, key, value = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    logits = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32)
    if causal:
        triangle = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        mask = triangle if mask is None else mask & triangle
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, value).swapaxes(1, 2)


class Attention(nn.Module):
    """Multi-head attention (1706.03762) of a sequence to itself, or of queries to a context."""

    width: int
    heads: int
    output_scale: float = 1.0
    """Multiplies the variance of the output projection's initialisation: 1 / (2 layers) in a residual stack."""
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None = None,
        mask: Bool[Array, "#B #H T S"] | None = None,
        *,
        causal: bool = False,
        cache: Cache | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """With a `cache`, `x` are the tokens from `position` on, each of which attends to those up to it.

        S is then the length of the cache; `mask` takes from what may be attended to, as it does without one.
        """
        batch, length, _ = x.shape
        context = x if context is None else context

        def project(name: str, inputs: Array) -> Array:
            heads = nn.Dense(self.width, dtype=self.dtype, name=name)(inputs)
            heads = heads.reshape(*inputs.shape[:2], self.heads, self.width // self.heads)
            return constrain(heads, "batch", None, "heads", None)

        query, key, value = project("query", x), project("key", context), project("value", context)
        if cache is not None:
            new = Cache(*(x.swapaxes(1, 2).astype(cache.key.dtype) for x in (key, value)))
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=2)
            cache = jax.tree.map(write, cache, new)
            key, value = (x.swapaxes(1, 2) for x in cache)
            past = (jnp.arange(key.shape[1]) <= position + jnp.arange(length)[:, None])[None, None]
            mask = past if mask is None else mask & past
        y = dot_product_attention(query, key, value, mask, causal=causal and cache is None)
        init = nn.initializers.variance_scaling(self.output_scale, "fan_in", "normal")
        y = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="out")(y.reshape(batch, length, self.width))
        return y, cache


ATTENTION_RULES = (
    (r"(query|key|value)/kernel$", ("embed", "heads")),
    (r"(query|key|value)/bias$", ("heads",)),
    (r"out/kernel$", ("heads", "embed")),
    (r"out/bias$", (None,)),
)
