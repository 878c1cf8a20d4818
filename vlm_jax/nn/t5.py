"""The encoder of T5 (1910.10683, section 2.1), and of T5 v1.1, whose feed-forward is gated (2002.05202).

Where a key is relative to its query is all that the attention knows of places: a bias of each head, one of a few for
near distances and shared by far ones, is added to the logits of every layer. The logits are not divided by the root
of a head's width; queries begin so much smaller instead. Nothing but that has a bias.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.sequence import up_to_end
from vlm_jax.nn.stack import StackConfig, stack
from vlm_jax.nn.transformer import feature_layers
from vlm_jax.nn.vocabulary import look_up, vocabulary_rules
from vlm_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class T5(StackConfig):
    """Sizes of an encoder."""

    vocab_size: int
    context_length: int = 512
    """Tokens of a text, padding included. No parameter depends on it."""
    eos_id: int = 1
    """The token that ends a text; nothing attends to what follows it."""
    head_width: int = 64
    """heads * head_width need not be the width."""
    feed_forward: Literal["gated_gelu", "relu"] = "gated_gelu"
    """gated_gelu: of v1.1. relu: of the first release."""
    buckets: int = 32
    """Biases of each head: half of them for keys after the query, of which again half are of one distance each."""
    max_distance: int = 128
    """From here on all distances share a bias."""
    norm_eps: float = 1e-6
    features: int = 0
    """Of how many blocks, counted from the last, features know nothing. 0: of none; they come from after the final
    norm, as every published model is told by them."""

    def __post_init__(self) -> None:
        if self.eos_id >= self.vocab_size:
            raise UserError(f"eos_id is {self.eos_id}: it must be below vocab_size, which is {self.vocab_size}")
        if self.head_width < 1:
            raise UserError(f"head_width is {self.head_width}: it must be at least 1")
        if self.buckets < 4 or self.buckets % 2:
            raise UserError(f"buckets is {self.buckets}: it must be even, and at least 4")
        if self.max_distance <= self.buckets // 4:
            raise UserError(
                f"max_distance is {self.max_distance} and the {self.buckets // 4} nearest distances have buckets of "
                f"their own: it must be above that"
            )
        feature_layers(self, self.features)


def bucket_of(distance: int, config: T5) -> int:
    """Which of a side's buckets a distance >= 0 falls into.

    Each of the nearest has its own, those up to `max_distance` are split in equal parts of their logarithm, and what
    is farther is in the last.
    """
    side = config.buckets // 2
    near = side // 2
    if distance < near:
        return distance
    # The k-th of the others begins at near * (max_distance / near)^(k / far): some at whole numbers, which a logarithm
    # could miss by its rounding.
    far = side - near
    return near + sum(distance**far * near**k >= config.max_distance**k * near**far for k in range(1, far))


def relative_bias(table: Float[Array, "N H"], length: int, config: T5) -> Float[Array, "1 H T T"]:
    """What is added to the logits of each query [.., .., T, .] and key [.., .., ., T], in fp32."""
    before = [bucket_of(distance, config) for distance in range(length)]
    after = [config.buckets // 2 + bucket for bucket in before[1:]]
    buckets = jnp.array([*reversed(before), *after])  # of a key at -(length - 1), ..., length - 1 from its query
    place = jnp.arange(length)
    bias = jnp.asarray(table, jnp.float32)[buckets[place - place[:, None] + length - 1]]
    return constrain(bias.transpose(2, 0, 1)[None], None, "heads", None, None)


class Setting(NamedTuple):
    """What the attention of every layer is told of the tokens."""

    bias: Float[Array, "1 H T T"]
    mask: Bool[Array, "B 1 1 T"]


def biased_attention(
    query: Float[Array, "B T H d"], key: Float[Array, "B T H d"], value: Float[Array, "B T H d"], told: Setting
) -> Float[Array, "B T H d"]:
    """softmax(q k^T + bias) v, the softmax in fp32. Where the mask is False nothing is attended to."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    logits = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32) + told.bias
    logits = jnp.where(told.mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, value).swapaxes(1, 2)


class BiasedAttention(nn.Module):
    """Self-attention with a bias by distance."""

    config: T5

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], told: Setting) -> Float[Array, "B T D"]:
        c = self.config

        def project(name: str, share: float) -> Float[Array, "B T H d"]:
            init = nn.initializers.variance_scaling(share, "fan_in", "normal")
            y = nn.Dense(c.heads * c.head_width, use_bias=False, kernel_init=init, dtype=c.dtype, name=name)(x)
            return constrain(y.reshape(*x.shape[:2], c.heads, c.head_width), "batch", None, "heads", None)

        # The release's initialisation, which has the scale that the logits lack.
        query, key, value = project("query", 1 / c.head_width), project("key", 1.0), project("value", 1.0)
        y = biased_attention(query, key, value, told)
        return nn.Dense(c.width, use_bias=False, dtype=c.dtype, name="out")(y.reshape(*x.shape[:2], -1))


class FeedForward(nn.Module):
    """down(gelu(gate(x)) * up(x)), or down(relu(up(x))); the GELU by its approximation with tanh."""

    config: T5

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        hidden = nn.Dense(c.mlp, use_bias=False, dtype=c.dtype, name="up")(x)
        if c.feed_forward == "relu":
            hidden = nn.relu(hidden)
        else:
            hidden = nn.gelu(nn.Dense(c.mlp, use_bias=False, dtype=c.dtype, name="gate")(x)) * hidden
        hidden = constrain(hidden, "batch", None, "mlp")
        return nn.Dense(c.width, use_bias=False, dtype=c.dtype, name="down")(hidden)


class T5Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: T5

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], told: Setting, train: bool) -> tuple[Float[Array, "B T D"], None]:
        c = self.config
        dropout = nn.Dropout(c.dropout, deterministic=not train)
        x = constrain(x, "batch", None, None)
        y = nn.RMSNorm(c.norm_eps, dtype=c.dtype, name="attention_norm")(x)
        x = x + dropout(BiasedAttention(c, name="attention")(y, told))
        y = nn.RMSNorm(c.norm_eps, dtype=c.dtype, name="mlp_norm")(x)
        return x + dropout(FeedForward(c, name="mlp")(y)), None


class T5Encoder(nn.Module):
    """Token ids -> one vector a token."""

    config: T5

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], *, whole: bool = False, train: bool = False) -> Float[Array, "B T D"]:
        """At the layer that the config names; `whole`: after the last block and the final norm, whatever it names."""
        c = self.config
        dropout = nn.Dropout(c.dropout, deterministic=not train)
        words = nn.Embed(c.vocab_size, c.width, embedding_init=nn.initializers.normal(1.0), name="token").embedding
        table = self.param("relative_bias", nn.initializers.normal(c.width**-0.5), (c.buckets, c.heads))
        told = Setting(relative_bias(table, tokens.shape[1], c), up_to_end(tokens, c.eos_id)[:, None, None])
        layers = None if whole else feature_layers(c, c.features)
        x, _ = stack(T5Block, c, dropout(look_up(words, tokens, c.dtype)), told, train, layers=layers)
        if layers is not None:
            return x
        return dropout(nn.RMSNorm(c.norm_eps, dtype=c.dtype, name="final_norm")(constrain(x, "batch", None, None)))


def t5_rules(config: T5) -> tuple[Rule, ...]:
    """Sharding rules of a `T5Encoder`."""
    heads = ("heads", config.heads)
    return (
        *vocabulary_rules(tied=True),
        (r"relative_bias$", (None, "heads")),
        (r"(query|key|value)/kernel$", ("embed", heads)),
        (r"out/kernel$", (heads, "embed")),
        (r"(gate|up)/kernel$", ("embed", "mlp")),
        (r"down/kernel$", ("mlp", "embed")),
        (r"norm/scale$", (None,)),
    )
