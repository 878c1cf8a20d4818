"""The U-Nets of DDPM (Ho et al. 2020, 2006.11239) and of latent diffusion (Rombach et al. 2021, 2112.10752)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.conditioning import Conditioning, Image, Label, Text, Time, conditioning_rules
from vlm_jax.nn.convolution import Downsample, GroupNorm, SpatialAttention, Upsample
from vlm_jax.nn.spatial_transformer import SPATIAL_TRANSFORMER_RULES, SpatialTransformer
from vlm_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a U-Net."""

    epsilon: ClassVar[float]
    """Of the group norms."""
    padding: ClassVar[Literal["SAME"] | int] = "SAME"
    """Of the strided convolutions."""

    widths: tuple[int, ...]
    """Channels at each resolution, the finest first; each next has half the height and width."""
    blocks: int = 2
    """Residual blocks at each resolution on the way down; one more on the way up."""
    attention: tuple[int, ...] = ()
    """Heights at which each block of either way is followed by self-attention; between the ways there always is one."""
    heads: int = 1
    groups: int = 32
    """Of channels that are normalised together."""
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters and the output are float32."""

    def __post_init__(self) -> None:
        for divisor in (self.groups, self.heads):
            if not self.widths or divisor < 1 or any(width % divisor for width in self.widths):
                raise UserError(
                    f"the widths of a U-Net must be one or more multiples of its groups ({self.groups}) and of its "
                    f"heads ({self.heads}), not {list(self.widths)}"
                )


@dataclass(frozen=True, kw_only=True)
class UNet(Sizes):
    """DDPM's, by its release in TensorFlow. It is told no text."""

    epsilon: ClassVar[float] = 1e-6
    last_frequency: ClassVar[bool] = True
    """Of the time: whether 1/10000 is one."""


@dataclass(frozen=True, kw_only=True)
class LatentUNet(Sizes):
    """Latent diffusion's, and Stable Diffusion's: its attention is a transformer that reads a text."""

    epsilon: ClassVar[float] = 1e-5
    last_frequency: ClassVar[bool] = False
    padding: ClassVar[Literal["SAME"] | int] = 1


SD15 = LatentUNet(widths=(320, 640, 1280, 1280), attention=(64, 32, 16), heads=8)
"""Of Stable Diffusion 1: 859,520,964 parameters, for latents [64, 64, 4] and texts of width 768."""


class UNetBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, beside a skip; the condition is added between. Starts as almost the skip."""

    config: Sizes
    width: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], condition: Float[Array, "B E"], *, train: bool
    ) -> Float[Array, "B H W D"]:
        c = self.config
        x = constrain(x, "batch", None, None, None)
        y = nn.silu(GroupNorm(c.groups, c.dtype, c.epsilon, name="norm_in")(x))
        y = constrain(nn.Conv(self.width, (3, 3), dtype=c.dtype, name="conv_in")(y), "batch", None, None, None)
        shift = constrain(nn.Dense(self.width, dtype=c.dtype, name="condition")(nn.silu(condition)), "batch", None)
        y = nn.silu(GroupNorm(c.groups, c.dtype, c.epsilon, name="norm_out")(y + shift[:, None, None]))
        y = nn.Dropout(c.dropout, deterministic=not train)(y)
        init = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")
        y = nn.Conv(self.width, (3, 3), kernel_init=init, dtype=c.dtype, name="conv_out")(y)
        if x.shape[-1] != self.width:
            x = nn.Dense(self.width, dtype=c.dtype, name="skip")(x)
        return constrain(x + y, "batch", None, None, None)


class UNetTower(nn.Module):
    """Noisy image and time -> an image of `channels`; each resolution of the way down is seen on the way up."""

    config: UNet | LatentUNet
    channels: int
    classes: int | None = None

    @nn.compact
    def __call__(
        self, x: Image, time: Time, label: Label = None, text: Text | None = None, *, train: bool = False
    ) -> Float[Array, "B H W O"]:
        c = self.config
        conditioning = Conditioning(
            4 * c.widths[0], c.widths[0], c.last_frequency, self.classes, c.dtype, name="conditioning"
        )
        condition = conditioning(time, label)

        def attend(x: Array, name: str) -> Array:
            if isinstance(c, UNet):
                return SpatialAttention(c.heads, c.groups, c.dtype, name=name)(x)
            return SpatialTransformer(c.heads, c.groups, c.dropout, c.dtype, name=name)(x, text, train=train)

        def block(x: Array, width: int, name: str) -> Array:
            x = UNetBlock(c, width, name=name)(x, condition, train=train)
            return attend(x, f"{name}_attention") if x.shape[1] in c.attention else x

        skips = way_down(x, c, block)
        x = skips[-1]
        x = UNetBlock(c, c.widths[-1], name="middle_0")(x, condition, train=train)
        x = attend(x, "middle_attention")
        x = UNetBlock(c, c.widths[-1], name="middle_1")(x, condition, train=train)
        return way_up(x, skips, c, block, self.channels)


def way_down(x: Image, sizes: Sizes, block: Callable[[Array, int, str], Array]) -> list[Array]:
    """What the way up sees of an image, [B, h, w, D] each, the coarsest last, by layers of the module that calls it.

    Args:
      block: `(x, width, name) -> x`
    """
    x = nn.Conv(sizes.widths[0], (3, 3), dtype=sizes.dtype, name="first")(x)
    skips = [constrain(x, "batch", None, None, None)]
    for level, width in enumerate(sizes.widths):
        if level:
            down = Downsample(sizes.widths[level - 1], sizes.dtype, sizes.padding, name=f"down_{level}")
            skips.append(down(skips[-1]))
        for i in range(sizes.blocks):
            skips.append(block(skips[-1], width, f"down_{level}_{i}"))
    return skips


def way_up(
    x: Float[Array, "B h w D"],
    skips: Sequence[Array],
    sizes: Sizes,
    block: Callable[[Array, int, str], Array],
    channels: int,
) -> Float[Array, "B H W O"]:
    """An image of `channels` by layers of the module that calls it; starts at zero."""
    left = list(skips)
    for level, width in reversed(list(enumerate(sizes.widths))):
        for i in range(sizes.blocks + 1):
            x = block(jnp.concatenate([x, left.pop()], axis=-1), width, f"up_{level}_{i}")
        if level:
            x = Upsample(width, sizes.dtype, name=f"up_{level}")(x)
    x = nn.silu(GroupNorm(sizes.groups, sizes.dtype, sizes.epsilon, name="norm_out")(x)).astype(jnp.float32)
    return nn.Conv(channels, (3, 3), kernel_init=nn.initializers.zeros, name="last")(x)


def unet_rules(config: UNet | LatentUNet, classes: int | None) -> tuple[Rule, ...]:
    """Sharding rules of a `UNetTower`."""
    return (
        *conditioning_rules(classes),
        *(SPATIAL_TRANSFORMER_RULES if isinstance(config, LatentUNet) else ()),
        (r"last/kernel$", (None, None)),
        (r"(first|conv|conv_in|conv_out|condition|skip|query|key|value|out)/kernel$", (None, "filters")),
        (r"(bias|scale)$", (None,)),
    )
