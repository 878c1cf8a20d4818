"""The vision transformer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt8

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.attention import Attention
from vlm_jax.nn.transformer import MLP, TRANSFORMER_RULES, Transformer, TransformerStack, feature_layers


@dataclass(frozen=True, kw_only=True)
class VisionTransformer:
    """Sizes of an image tower (2010.11929)."""

    image_size: int
    patch_size: int
    channels: int = 3
    pool: Literal["class", "attention"] = "class"
    """A class token beside the patches, or an attention-pooling head over them (2106.04560)."""
    pre_norm: bool = False
    """Normalise the embedded patches before the first block, as CLIP does."""
    patch_bias: bool = True
    mean: tuple[float, ...] = (0.5,)
    """Of the pixels of [0, 1], taken from them: one of each channel, or one of all."""
    std: tuple[float, ...] = (0.5,)
    """What the rest is divided by, likewise. The defaults put pixels on [-1, 1]."""
    features: int = 0
    """Of how many blocks, counted from the last, features know nothing. 0: of none; they come from after the final norm
    (SigLIP, Stable Diffusion). 1: before the last block, without a norm (LLaVA)."""
    transformer: Transformer

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch_size)
        for name in ("mean", "std"):
            object.__setattr__(self, name, each_channel(name, getattr(self, name), self.channels))
        if min(self.std) <= 0:
            raise UserError(f"std is {list(self.std)}, by which pixels are divided: each must be above 0")
        feature_layers(self.transformer, self.features)


def check_patches(image_size: int, patch_size: int) -> None:
    """Refuses an image that patches do not tile."""
    if patch_size < 1 or image_size % patch_size:
        raise UserError(
            f"an image of {image_size} pixels a side cannot be cut into patches of {patch_size}: "
            f"choose a patch_size that divides image_size"
        )


def each_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A number of each channel, or the only one if they are the same, so that what is equal compares equal."""
    if len(values) not in (1, channels):
        raise UserError(
            f"{name} is {list(values)} and images have {channels} channels: give one number, or one of each"
        )
    return tuple(values) if len(set(values)) > 1 else (values[0],)


def normalised(image: UInt8[Array, "B H W C"], config: VisionTransformer) -> Float[Array, "B H W C"]:
    """What the tower reads: (pixels / 255 - mean) / std, in fp32."""
    mean, std = jnp.asarray(config.mean, jnp.float32), jnp.asarray(config.std, jnp.float32)
    return image.astype(jnp.float32) * jnp.asarray([1 / (255 * each) for each in config.std], jnp.float32) - mean / std


def patchify(image: Num[Array, "B H W C"], size: int) -> Num[Array, "B T D"]:
    """Non-overlapping patches in raster order, each flattened as rows, columns, channels."""
    batch, height, width, channels = image.shape
    x = image.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


def unpatchify(patches: Num[Array, "B T D"], size: int, channels: int) -> Num[Array, "B H W C"]:
    """The square image that `patchify` cut up."""
    batch, count, _ = patches.shape
    side = math.isqrt(count)
    x = patches.reshape(batch, side, side, size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, side * size, side * size, channels)


class VisionTower(nn.Module):
    """Image as `normalised` gives it -> one vector, or one for each patch."""

    config: VisionTransformer

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W C"], *, pooled: bool = True, train: bool = False
    ) -> Float[Array, "B *T D"]:
        c, t = self.config, self.config.transformer
        # A reshape and a product: the gradient of the equivalent strided convolution takes twice as long on the CPU.
        x = nn.Dense(t.width, use_bias=c.patch_bias, dtype=t.dtype, name="patch")(patchify(image, c.patch_size))
        if c.pool == "class":
            token = self.param("class_token", nn.initializers.normal(t.width**-0.5), (1, 1, t.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, t.width)).astype(x.dtype), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(t.width**-0.5), (1, x.shape[1], t.width))
        if c.pre_norm:
            x = nn.LayerNorm(t.norm_eps, dtype=t.dtype, name="pre_norm")(x)
        layers = None if pooled else feature_layers(t, c.features)
        x, _ = TransformerStack(t, name="transformer")(x, layers=layers, train=train)
        if not pooled:
            return x[:, 1:] if c.pool == "class" else x
        return x[:, 0] if c.pool == "class" else AttentionPool(t, name="pool")(x)


class AttentionPool(nn.Module):
    """Multi-head attention pooling: a learned probe attends to the sequence, then a residual MLP (2106.04560)."""

    config: Transformer

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        c = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c.width))
        probe = jnp.broadcast_to(probe, (len(x), 1, c.width)).astype(x.dtype)
        x, _ = Attention(c.width, c.heads, dtype=c.dtype, name="attention")(probe, x)
        y = nn.LayerNorm(c.norm_eps, dtype=c.dtype, name="mlp_norm")(x)
        x = x + MLP(c.width, c.mlp, c.activation, dtype=c.dtype, name="mlp")(y)
        return x[:, 0]


def vision_rules(config: VisionTransformer) -> tuple[Rule, ...]:
    """Sharding rules of a `VisionTower`."""
    return (
        (r"patch/kernel$", (None, "embed")),
        *(((r"patch/bias$", (None,)),) if config.patch_bias else ()),
        (r"(class_token|position|probe)$", (None, None, None)),
        *TRANSFORMER_RULES,
    )
