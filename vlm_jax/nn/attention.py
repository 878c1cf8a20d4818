"""Multi-head attention, whose queries may share keys and values, with a cache of these for decoding."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.nn.fused_attention import Keys, Mask, Queries, fused_attention
from vlm_jax.sharding import constrain

Slot = Int[Array, " #B"] | Int[Array, ""] | int
"""Where in a cache tokens go: one place for all rows, or one for each."""


class Cache(NamedTuple):
    """One layer's keys and values of the tokens so far, and room for those to come: a slot for each."""

    key: Float[Array, "B K S d"]
    value: Float[Array, "B K S d"]


def empty_cache(batch: int, length: int, heads: int, head_width: int, *, layers: int, dtype: str) -> tuple[Cache, ...]:
    """Room for the `heads` keys and values of `length` tokens in each of `layers` layers.

    A loop over tokens writes a slot of each in place. Layers that lay in one array would be taken apart and put
    together again, whole, for every token.
    """
    zeros = jnp.zeros((batch, heads, length, head_width), dtype)
    return tuple(Cache(zeros, zeros) for _ in range(layers))


def dot_product_attention(
    query: Queries, key: Keys, value: Keys, mask: Mask = None, *, causal: bool = False
) -> Queries:
    """softmax(q k^T / sqrt(d)) v, the softmax in fp32. Where `mask` is False nothing is attended to.

    K divides H: H / K neighbouring heads of queries share one of keys and values (2305.13245).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if key.shape[2] < query.shape[2] and not mesh.empty and key.shape[2] % mesh.shape["tensor"]:
        # Every device has all keys and some of the queries' heads, which need not be whole groups of those that share.
        repeated = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        key, value = (constrain(x, "batch", None, "heads", None) for x in repeated)
    fused = fused_attention(query, key, value, mask, causal=causal)
    return plain_attention(query, key, value, mask, causal=causal) if fused is None else fused


def plain_attention(query: Queries, key: Keys, value: Keys, mask: Mask = None, *, causal: bool = False) -> Queries:
    """`dot_product_attention` as its formula says, for every platform, shape and derivative."""
    batch, length, heads, width = query.shape
    _, context, shared, _ = key.shape
    rows = heads // shared * length
    # On the CPU a batched product over [B, H, T, d] takes half the time of XLA's own layout.
    query, key, value = (x.swapaxes(1, 2) for x in (query * width**-0.5, key, value))
    # Queries that share a key are further rows of its product: nothing is repeated.
    query = query.reshape(batch, shared, rows, width)
    logits = jnp.einsum("bktd,bksd->bkts", query, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, length, context)
    if causal:
        triangle = jnp.tril(jnp.ones((length, context), bool))
        mask = triangle if mask is None else mask & triangle
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(value.dtype).reshape(batch, shared, rows, context)
    y = jnp.einsum("bkts,bksd->bktd", weights, value)
    return y.reshape(batch, heads, length, width).swapaxes(1, 2)


def attend(
    query: Queries,
    key: Keys,
    value: Keys,
    mask: Bool[Array, "#B #H T _"] | None,
    *,
    causal: bool,
    cache: Cache | None,
    slot: Slot,
) -> tuple[Queries, Cache | None]:
    """`dot_product_attention`, among what a cache holds where there is one.

    The keys and values, as many as the queries, then go into it from `slot` on, and the queries attend to all that is
    in it up to the last of them; if `causal`, each up to itself. `mask`, [B, H, T, slots], takes from that.
    """
    if cache is None:
        return dot_product_attention(query, key, value, mask, causal=causal), None
    cache = Cache(*(written(room, x.swapaxes(1, 2), slot) for room, x in zip(cache, (key, value), strict=True)))
    key, value = (x.swapaxes(1, 2) for x in cache)
    slots = jnp.reshape(slot, (-1, 1)) + jnp.arange(query.shape[1])  # [B or 1, T]
    last = slots if causal else jnp.broadcast_to(slots[:, -1:], slots.shape)
    filled = (jnp.arange(key.shape[1]) <= last[..., None])[:, None]  # [B or 1, 1, T, S]
    return dot_product_attention(query, key, value, filled if mask is None else mask & filled), cache


def written(room: Float[Array, "B K S d"], new: Float[Array, "B K T d"], slot: Slot) -> Float[Array, "B K S d"]:
    """`room` with what is new from `slot` on."""

    def write(room: Array, new: Array, slot: Array | int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(room, new, slot, axis=-2)

    return (jax.vmap(write) if jnp.ndim(slot) else write)(room, new.astype(room.dtype), slot)


class Attention(nn.Module):
    """Multi-head attention (1706.03762) of a sequence to itself, or of queries to a context."""

    width: int
    heads: int
    output_scale: float = 1.0
    """Multiplies the variance of the output projection's initialisation: 1 / (2 layers) in a residual stack."""
    dtype: str = "float32"
    qkv_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S E"] | None = None,
        mask: Bool[Array, "#B #H T _"] | None = None,
        *,
        causal: bool = False,
        cache: Cache | None = None,
        slot: Slot = 0,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """With a `cache`, `x` are the tokens from `slot` on: see `attend`."""
        batch, length, _ = x.shape
        context = x if context is None else context

        def project(name: str, inputs: Array) -> Array:
            heads = nn.Dense(self.width, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(inputs)
            heads = heads.reshape(*inputs.shape[:2], self.heads, self.width // self.heads)
            return constrain(heads, "batch", None, "heads", None)

        query, key, value = project("query", x), project("key", context), project("value", context)
        y, cache = attend(query, key, value, mask, causal=causal, cache=cache, slot=slot)
        init = nn.initializers.variance_scaling(self.output_scale, "fan_in", "normal")
        y = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="out")(y.reshape(batch, length, self.width))
        return y, cache


ATTENTION_RULES = (
    (r"(query|key|value)/kernel$", ("embed", "heads")),
    (r"(query|key|value)/bias$", ("heads",)),
    (r"out/kernel$", ("heads", "embed")),
    (r"out/bias$", (None,)),
)
