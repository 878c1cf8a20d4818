"""Encoders of text alone, by which other models are told: CLIP's (2103.00020) and T5's (1910.10683).

A part of other models: it learns nothing of its own. Its variables are those of published weights, or of the text tower
of a `clip` run, which a `Start` takes, and `frozen` keeps.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Batch, Input, Model, Rule, Variables, without_loss
from vlm_jax.nn.sequence import up_to_end
from vlm_jax.nn.t5 import T5, T5Encoder, t5_rules
from vlm_jax.nn.text import TEXT_RULES, TextNetwork, TextTransformer
from vlm_jax.sharding import under


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, whose `features` says which layer is read."""

    network: TextTransformer | T5
    """A `clip` run's `text` without its projection, or T5."""


def published(width: int, depth: int, heads: int, mlp: int) -> T5:
    """The encoder of a T5 v1.1, whose sizes are those of its release (t5x, `t5_1_1`)."""
    return T5(vocab_size=32_128, width=width, depth=depth, heads=heads, mlp=mlp, dtype="bfloat16")


T5_V1_1_SMALL = published(512, 8, 6, 1024)
"""35,332,800 parameters."""
T5_V1_1_BASE = published(768, 12, 12, 2048)
"""109,628,544 parameters."""
T5_V1_1_LARGE = published(1024, 24, 16, 2816)
"""341,231,104 parameters."""
T5_V1_1_XL = published(2048, 24, 32, 5120)
"""1,223,527,424 parameters."""
T5_V1_1_XXL = published(4096, 24, 64, 10_240)
"""4,762,310,656 parameters: what tells PixArt-alpha (2310.00426)."""


class TextEncoder(nn.Module):
    """Token ids -> one vector a token in fp32, and which of them belong to the text."""

    config: Config

    def setup(self) -> None:
        network = self.config.network
        self.network = T5Encoder(network) if isinstance(network, T5) else TextNetwork(network)

    def __call__(
        self, tokens: Int[Array, "B T"], *, train: bool = False
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
        # What features leave out is initialised all the same: published weights have it.
        x = self.network(tokens, whole=self.is_initializing(), train=train)
        return x.astype(jnp.float32), up_to_end(tokens, self.config.network.eos_id)


def inputs_of(config: Config) -> dict[str, Input]:
    """A text, which ends somewhere; but for SigLIP's, which are read whole."""
    n = config.network
    ends = isinstance(n, T5) or n.pool == "eos"
    return {"tokens": Input((n.context_length,), "int32", n.vocab_size, contains=n.eos_id if ends else None)}


def rules_of(config: Config) -> tuple[Rule, ...]:
    """Sharding rules of a `TextEncoder`."""
    return under("network", t5_rules(config.network) if isinstance(config.network, T5) else TEXT_RULES)


def build(config: Config) -> Model:
    """`text_features`, and nothing that could be trained for itself."""
    module: Any = TextEncoder(config)  # linen types what `apply` returns as a union

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch["tokens"])

    def text_features(
        variables: Variables, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
        """A text goes to its first end token, that included."""
        return module.apply(variables, tokens)

    return Model(
        inputs=inputs_of(config),
        init=init,
        loss=without_loss(
            "an encoder of text alone has no loss: make it a part of another model, whose start takes it and whose "
            "frozen keeps it"
        ),
        rules=rules_of(config),
        text_features=text_features,
    )
