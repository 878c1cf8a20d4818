"""The diffusion transformer of PixArt-alpha (Chen et al. 2023, 2310.00426), which reads a text by cross-attention.

One layer makes shifts, scales and gates of the time for all blocks, to which each adds a table of its own
(adaLN-single, section 2.3). As in its release a text's padding is not attended to.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.nn.attention import ATTENTION_RULES, Attention
from vlm_jax.nn.conditioning import Conditioning, Image, Label, Text, Time, conditioning_rules
from vlm_jax.nn.dit import TIME_FEATURES, check_positions, position_features
from vlm_jax.nn.stack import stack
from vlm_jax.nn.transformer import MLP, Transformer
from vlm_jax.nn.vision import patchify, unpatchify
from vlm_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class PixArt:
    """Sizes of a diffusion transformer that is told a text."""

    patch_size: int
    transformer: Transformer

    def __post_init__(self) -> None:
        check_positions(self.transformer)


class Table(nn.Module):
    """Vectors that are added to those made of the time."""

    count: int

    @nn.compact
    def __call__(self, shared: Float[Array, "B N D"]) -> list[Float[Array, "B 1 D"]]:
        width = shared.shape[-1]
        table = self.param("table", nn.initializers.normal(width**-0.5), (self.count, width))
        return jnp.split(shared + constrain(table, None, None).astype(shared.dtype), self.count, axis=1)


class PixArtBlock(nn.Module):
    """Attention to the image, modulated; to the text, as it is; a feed-forward layer, modulated."""

    config: Transformer

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], shared: Float[Array, "B 6 D"], text: Text, train: bool
    ) -> tuple[Float[Array, "B T D"], None]:
        c = self.config
        x = constrain(x, "batch", None, None)
        norm = nn.LayerNorm(c.norm_eps, use_bias=False, use_scale=False, dtype=c.dtype)
        dropout = nn.Dropout(c.dropout, deterministic=not train)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = Table(6, name="modulation")(shared)
        y, _ = Attention(c.width, c.heads, dtype=c.dtype, name="attention")(norm(x) * (1 + scale) + shift)
        x = x + gate * dropout(y)
        # A scale of 0 is an output that starts at zero: the block starts as one that reads no text.
        reading = Attention(c.width, c.heads, 0.0, dtype=c.dtype, name="reading")
        y, _ = reading(x, text.features, jnp.repeat(text.inside[:, None, None], x.shape[1], axis=2))
        x = x + dropout(y)
        mlp = MLP(c.width, c.mlp, c.activation, dtype=c.dtype, name="mlp")
        return x + mlp_gate * dropout(mlp(norm(x) * (1 + mlp_scale) + mlp_shift)), None


class PixArtTower(nn.Module):
    """Noisy image, time and text -> an image of `channels`."""

    config: PixArt
    channels: int
    classes: int | None = None

    @nn.compact
    def __call__(
        self, x: Image, time: Time, label: Label = None, text: Text | None = None, *, train: bool = False
    ) -> Float[Array, "B H W O"]:
        assert text is not None
        p, c = self.config.patch_size, self.config.transformer
        side = x.shape[1] // p
        condition = Conditioning(c.width, TIME_FEATURES, False, self.classes, c.dtype, name="conditioning")(time, label)
        modulation = nn.Dense(6 * c.width, kernel_init=nn.initializers.normal(0.02), dtype=c.dtype, name="modulation")
        shared = constrain(modulation(nn.silu(condition)), "batch", None).reshape(-1, 6, c.width)
        features = MLP(c.width, c.width, "gelu_tanh", dtype=c.dtype, name="text")(text.features.astype(c.dtype))
        x = nn.Dense(c.width, dtype=c.dtype, name="patch")(patchify(x, p))
        x = x + position_features(side, c.width).astype(c.dtype)
        x, _ = stack(PixArtBlock, c, x, shared, text._replace(features=features), train)
        shift, scale = Table(2, name="last_modulation")(condition[:, None])
        norm = nn.LayerNorm(c.norm_eps, use_bias=False, use_scale=False, dtype=c.dtype)
        x = (norm(constrain(x, "batch", None, None)) * (1 + scale) + shift).astype(jnp.float32)
        x = nn.Dense(p * p * self.channels, kernel_init=nn.initializers.zeros, name="last")(x)
        return unpatchify(x, p, self.channels)


def pixart_rules(classes: int | None) -> tuple[Rule, ...]:
    """Sharding rules of a `PixArtTower`."""
    return (
        *conditioning_rules(classes),
        (r"patch/kernel$", (None, "embed")),
        (r"modulation/kernel$", ("embed", "mlp")),
        (r"modulation/bias$", ("mlp",)),
        (r"modulation/table$", (None, None)),
        (r"last/kernel$", ("embed", None)),
        (r"(patch|last)/bias$", (None,)),
        *ATTENTION_RULES,
        (r"up/kernel$", ("embed", "mlp")),
        (r"up/bias$", ("mlp",)),
        (r"down/kernel$", ("mlp", "embed")),
        (r"down/bias$", (None,)),
    )
