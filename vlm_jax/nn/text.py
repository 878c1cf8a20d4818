"""The text transformer of CLIP (2103.00020) and SigLIP (2303.15343)."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.nn.transformer import TRANSFORMER_RULES, Transformer, TransformerStack, feature_layers
from vlm_jax.nn.vocabulary import look_up, vocabulary_rules


@dataclass(frozen=True, kw_only=True)
class TextTransformer:
    """Sizes of a text tower."""

    vocab_size: int
    context_length: int
    eos_id: int
    """The token that ends a text."""
    pool: Literal["eos", "last"] = "eos"
    """Read the text at its first end token, under a causal mask as CLIP does, or at the last position, without one."""
    features: int = 0
    """Of how many blocks, counted from the last, features know nothing. 0: of none; they come from after the final norm
    (SigLIP, Stable Diffusion). 1: before the last block, without a norm (LLaVA)."""
    transformer: Transformer

    def __post_init__(self) -> None:
        feature_layers(self.transformer, self.features)


class TextNetwork(nn.Module):
    """Token ids -> one vector a token."""

    config: TextTransformer

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], *, whole: bool = False, train: bool = False) -> Float[Array, "B T D"]:
        """At the layer that the config names; `whole`: after the last block and the final norm, whatever it names."""
        c, t = self.config, self.config.transformer
        table = nn.Embed(c.vocab_size, t.width, embedding_init=nn.initializers.normal(0.02), name="token").embedding
        position = self.param("position", nn.initializers.normal(0.01), (1, c.context_length, t.width))
        layers = None if whole else feature_layers(t, c.features)
        x = look_up(table, tokens, t.dtype) + position
        x, _ = TransformerStack(t, name="transformer")(x, causal=c.pool == "eos", layers=layers, train=train)
        return x


class TextTower(nn.Module):
    """Token ids -> one vector: that of the network at one place, projected."""

    config: TextTransformer
    embedding: int
    projection_bias: bool

    def setup(self) -> None:
        self.network = TextNetwork(self.config)
        nn.share_scope(self, self.network)  # its parameters lie beside the projection
        self.projection = nn.Dense(self.embedding, use_bias=self.projection_bias, dtype=self.config.transformer.dtype)

    def features(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """One vector a token."""
        return self.network(tokens)

    def __call__(self, tokens: Int[Array, "B T"], *, train: bool = False) -> Float[Array, "B E"]:
        x = self.network(tokens, whole=True, train=train)
        if self.config.pool == "eos":
            end = jnp.argmax(tokens == self.config.eos_id, axis=1)
            x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        else:
            x = x[:, -1]
        return self.projection(x)


TEXT_RULES = (*vocabulary_rules(tied=True), (r"position$", (None, None, None)), *TRANSFORMER_RULES)
"""Sharding rules of a `TextNetwork`."""
