"""Multi-head attention, with a cache of keys and values for decoding."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.sharding import constrain


class Cache(NamedTuple):
    """Keys and values of the positions decoded so far, and room for those to come."""

    key: Float[Array, "*layers B T H d"]
    value: Float[Array, "*layers B T H d"]


def empty_cache(batch: int, length: int, heads: int, head_width: int, *, layers: int, dtype: str) -> Cache:
    """Room for `length` positions in each of `layers` layers."""
    zeros = jnp.zeros((layers, batch, length, heads, head_width), dtype)
    return Cache(zeros, zeros)


def dot_product_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S H d"],
    value: Float[Array, "B S H d"],
    mask: Bool[Array, "#B #H T S"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "B T H d"]:
    """softmax(q k^T / sqrt(d)) v, the softmax in fp32. Where `mask` is False nothing is attended to."""
    if jax.default_backend() != "cpu":  # the fused kernels of GPU and TPU
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
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
        """With a `cache`, `x` are the tokens from `position` on, each of which attends to those up to it."""
        batch, length, _ = x.shape
        context = x if context is None else context

        def project(name: str, inputs: Array) -> Array:
            heads = nn.Dense(self.width, dtype=self.dtype, name=name)(inputs)
            heads = heads.reshape(*inputs.shape[:2], self.heads, self.width // self.heads)
            return constrain(heads, "batch", None, "heads", None)

        query, key, value = project("query", x), project("key", context), project("value", context)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache.key, key.astype(cache.key.dtype), position, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cache.value, value.astype(cache.value.dtype), position, axis=1)
            cache = Cache(key, value)
            mask = (jnp.arange(key.shape[1]) <= position + jnp.arange(length)[:, None])[None, None]
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
