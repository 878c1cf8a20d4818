"""The diffusion transformer (Peebles & Xie 2022, 2212.09748)."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.attention import ATTENTION_RULES, Attention
from vlm_jax.nn.conditioning import Conditioning, Image, Label, Time, conditioning_rules
from vlm_jax.nn.stack import stack
from vlm_jax.nn.transformer import MLP, Transformer
from vlm_jax.nn.vision import patchify, unpatchify
from vlm_jax.sharding import constrain

TIME_FEATURES = 256


@dataclass(frozen=True, kw_only=True)
class DiT:
    """Sizes of a diffusion transformer. It is told no text."""

    patch_size: int
    transformer: Transformer

    def __post_init__(self) -> None:
        check_positions(self.transformer)


def check_positions(config: Transformer) -> None:
    """Refuses a width that positions do not fill."""
    if config.width % 4:
        raise UserError(
            f"a diffusion transformer of width {config.width} has no room for sines and cosines of rows and columns: "
            f"choose a multiple of 4"
        )


def position_features(side: int, width: int) -> Float[Array, "T D"]:
    """Sines and cosines of each patch's column, then of its row, in raster order."""
    frequencies = 10_000.0 ** -jnp.linspace(0, 1, width // 4, endpoint=False)
    angles = jnp.arange(side)[:, None] * frequencies
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    shape = (side, side, width // 2)
    columns, rows = jnp.broadcast_to(waves, shape), jnp.broadcast_to(waves[:, None], shape)
    return jnp.concatenate([columns, rows], axis=-1).reshape(side * side, width)


def modulation(condition: Float[Array, "B D"], count: int, dtype: str, name: str) -> list[Float[Array, "B 1 D"]]:
    """`count` vectors from the condition, that start at zero."""
    width = condition.shape[-1]
    layer = nn.Dense(count * width, kernel_init=nn.initializers.zeros, dtype=dtype, name=name)
    return jnp.split(constrain(layer(nn.silu(condition)), "batch", None)[:, None], count, axis=-1)


class DiTBlock(nn.Module):
    """Attention and MLP whose inputs the condition shifts and scales and whose outputs it gates: adaLN-Zero."""

    config: Transformer

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], condition: Float[Array, "B D"], train: bool
    ) -> tuple[Float[Array, "B T D"], None]:
        c = self.config
        x = constrain(x, "batch", None, None)
        norm = nn.LayerNorm(c.norm_eps, use_bias=False, use_scale=False, dtype=c.dtype)
        dropout = nn.Dropout(c.dropout, deterministic=not train)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(condition, 6, c.dtype, "modulation")
        attention = Attention(c.width, c.heads, dtype=c.dtype, name="attention")
        y, _ = attention(norm(x) * (1 + scale) + shift)
        x = x + gate * dropout(y)
        mlp = MLP(c.width, c.mlp, c.activation, dtype=c.dtype, name="mlp")
        return x + mlp_gate * dropout(mlp(norm(x) * (1 + mlp_scale) + mlp_shift)), None


class DiTTower(nn.Module):
    """Noisy image and time -> an image of `channels`."""

    config: DiT
    channels: int
    classes: int | None = None

    @nn.compact
    def __call__(self, x: Image, time: Time, label: Label = None, *, train: bool = False) -> Float[Array, "B H W O"]:
        p, c = self.config.patch_size, self.config.transformer
        side = x.shape[1] // p
        condition = Conditioning(c.width, TIME_FEATURES, False, self.classes, c.dtype, name="conditioning")(time, label)
        x = nn.Dense(c.width, dtype=c.dtype, name="patch")(patchify(x, p))
        x = x + position_features(side, c.width).astype(c.dtype)
        x, _ = stack(DiTBlock, c, x, condition, train)
        shift, scale = modulation(condition, 2, c.dtype, "last_modulation")
        norm = nn.LayerNorm(c.norm_eps, use_bias=False, use_scale=False, dtype=c.dtype)
        x = (norm(constrain(x, "batch", None, None)) * (1 + scale) + shift).astype(jnp.float32)
        x = nn.Dense(p * p * self.channels, kernel_init=nn.initializers.zeros, name="last")(x)
        return unpatchify(x, p, self.channels)


def dit_rules(classes: int | None) -> tuple[Rule, ...]:
    """Sharding rules of a `DiTTower`."""
    return (
        *conditioning_rules(classes),
        (r"patch/kernel$", (None, "embed")),
        (r"modulation/kernel$", ("embed", "mlp")),
        (r"modulation/bias$", ("mlp",)),
        (r"last/kernel$", ("embed", None)),
        (r"(patch|last)/bias$", (None,)),
        *ATTENTION_RULES,
        (r"up/kernel$", ("embed", "mlp")),
        (r"up/bias$", ("mlp",)),
        (r"down/kernel$", ("mlp", "embed")),
        (r"down/bias$", (None,)),
    )
