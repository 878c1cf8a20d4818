"""The convolutional encoder and decoder of two-stage models: VQGAN (2012.09841) and latent diffusion (2112.10752)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.convolution import Downsample, GroupNorm, ResidualBlock, SpatialAttention, Upsample
from vlm_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """Sizes of an encoder and its decoder."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at each resolution, the finest first; each next has half the height and width."""
    blocks: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    attention: tuple[int, ...] = ()
    """Heights at which each block is followed by self-attention; at the coarsest, after all blocks, there always is."""
    groups: int = 32
    """Of channels that are normalised together."""
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters and outputs are float32."""

    def __post_init__(self) -> None:
        if not self.widths or self.groups < 1 or any(width % self.groups for width in self.widths):
            raise UserError(
                f"the widths of an encoder must be one or more multiples of its groups ({self.groups}), not "
                f"{list(self.widths)}"
            )

    @property
    def factor(self) -> int:
        """Pixels on the side of the square that a position of the coarsest resolution stands for."""
        return 2 ** (len(self.widths) - 1)


class Level(nn.Module):
    """The residual blocks of one resolution."""

    config: Pyramid
    width: int
    blocks: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H W D"]:
        c = self.config
        for i in range(self.blocks):
            x = ResidualBlock(self.width, c.groups, c.dropout, True, c.dtype, name=f"block_{i}")(x, train=train)
            if x.shape[1] in c.attention:
                x = SpatialAttention(1, c.groups, c.dtype, name=f"attention_{i}")(x)
        return x


class Middle(nn.Module):
    """Between the ways: a block, attention, a block, at the coarsest resolution."""

    config: Pyramid

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], *, train: bool) -> Float[Array, "B h w C"]:
        c, width = self.config, x.shape[-1]
        x = ResidualBlock(width, c.groups, c.dropout, True, c.dtype, name="block_0")(x, train=train)
        x = SpatialAttention(1, c.groups, c.dtype, name="attention_0")(x)
        return ResidualBlock(width, c.groups, c.dropout, True, c.dtype, name="block_1")(x, train=train)


class Encoder(nn.Module):
    """Image in [-1, 1] -> a map of `channels`, a position for each square of `factor` pixels a side."""

    config: Pyramid
    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B h w O"]:
        c = self.config
        x = constrain(nn.Conv(c.widths[0], (3, 3), dtype=c.dtype, name="first")(x), "batch", None, None, None)
        for level, width in enumerate(c.widths):
            if level:
                x = Downsample(x.shape[-1], c.dtype, name=f"down_{level}")(x)
            x = Level(c, width, c.blocks, name=f"level_{level}")(x, train=train)
        x = Middle(c, name="middle")(x, train=train)
        x = nn.silu(GroupNorm(c.groups, c.dtype, name="norm_out")(x)).astype(jnp.float32)
        return nn.Conv(self.channels, (3, 3), name="last")(x)


class Decoder(nn.Module):
    """A map as `Encoder` makes -> an image of `channels`; not `painted`, what the last layer reads."""

    config: Pyramid
    channels: int

    @nn.compact
    def __call__(
        self, z: Float[Array, "B h w Z"], *, train: bool = False, painted: bool = True
    ) -> Float[Array, "B H W O"]:
        c = self.config
        x = constrain(nn.Conv(c.widths[-1], (3, 3), dtype=c.dtype, name="first")(z), "batch", None, None, None)
        x = Middle(c, name="middle")(x, train=train)
        for level, width in reversed(list(enumerate(c.widths))):
            x = Level(c, width, c.blocks + 1, name=f"level_{level}")(x, train=train)
            if level:
                x = Upsample(width, c.dtype, name=f"up_{level}")(x)
        x = nn.silu(GroupNorm(c.groups, c.dtype, name="norm_out")(x)).astype(jnp.float32)
        return nn.Conv(self.channels, (3, 3), name="last")(x) if painted else x


def painter(
    last: Mapping[str, Array], hidden: Float[Array, "B H W D"]
) -> Callable[[Float[Array, "h w D C"]], Float[Array, "B H W C"]]:
    """From the kernel of a `Decoder`'s last layer to the images that it makes of what it reads.

    Args:
      last: the layer's parameters, of which the bias is used.
    """
    layer: Any = nn.Conv(last["kernel"].shape[-1], (3, 3))
    return lambda kernel: layer.apply({"params": {**last, "kernel": kernel}}, hidden)


PYRAMID_RULES: tuple[Rule, ...] = (
    (r"last/kernel$", (None, None)),
    (r"(first|conv|conv_in|conv_out|skip|query|key|value|out)/kernel$", (None, "filters")),
    (r"(bias|scale)$", (None,)),
)
"""Sharding rules of an `Encoder` and a `Decoder`."""
