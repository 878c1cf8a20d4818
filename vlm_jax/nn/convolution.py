"""Residual convolutions and attention over maps, and stacks of convolutions from an image to a small map and back."""

from typing import Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.errors import UserError
from vlm_jax.nn.attention import dot_product_attention
from vlm_jax.sharding import constrain

GROUPS = 8
"""Of channels that are normalised together, unless said otherwise: they divide every width."""


def unroll(depth: int) -> int:
    """How many layers of a stack of convolutions each turn of its `nn.scan` computes.

    All of a short stack, which then is no loop: on the CPU a convolution within a loop takes tens of times as long as
    one outside. A deep stack stays a loop, which compiles in a fraction of the time.
    """
    return depth if depth <= 8 else 1


class GroupNorm(nn.Module):
    """Group normalisation (1803.08494) over positions and the channels of a group, statistics in fp32."""

    groups: int
    dtype: str = "float32"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, *_, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)  # before it is squared: a variance is a small difference of large squares
        # Sums over positions first and over a group's channels after: five times faster on the CPU in this layout.
        moments = jnp.stack([jnp.mean(x, (1, 2)), jnp.mean(jnp.square(x), (1, 2))])
        moments = jnp.mean(moments.reshape(2, batch, self.groups, -1), axis=-1, keepdims=True)
        mean, mean_square = jnp.broadcast_to(moments, (2, batch, self.groups, channels // self.groups))
        variance = jnp.maximum(mean_square - jnp.square(mean), 0)  # rounding may take it below zero
        gain = jax.lax.rsqrt(variance + self.epsilon).reshape(batch, channels) * scale
        shift = bias - mean.reshape(batch, channels) * gain
        return (x * gain[:, None, None] + shift[:, None, None]).astype(self.dtype)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, beside a skip; starts as the identity where the width stays."""

    width: int
    groups: int = GROUPS
    dropout: float = 0.0
    bias: bool = False
    """Of the first convolution. The norm that follows takes most of it away again, and leaves its gradient to rounding:
    only published weights have it."""
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B H W D"]:
        x = constrain(x, "batch", None, None, None)
        y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm_in")(x))
        y = nn.Conv(self.width, (3, 3), use_bias=self.bias, dtype=self.dtype, name="conv_in")(y)
        y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(y))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.Conv(self.width, (3, 3), kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv_out")(y)
        if x.shape[-1] != self.width:
            x = nn.Dense(self.width, dtype=self.dtype, name="skip")(x)
        return constrain(x + y, "batch", None, None, None)


class Downsample(nn.Module):
    """A strided 3x3 convolution: half the height and width. Of even ones the padding is at the right and below."""

    width: int
    dtype: str = "float32"
    padding: Literal["SAME"] | int = "SAME"
    """1: on all sides."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        x = nn.Conv(self.width, (3, 3), (2, 2), padding=self.padding, dtype=self.dtype, name="conv")(x)
        return constrain(x, "batch", None, None, None)


class Upsample(nn.Module):
    """Nearest neighbours, then a 3x3 convolution: twice the height and width."""

    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="conv")(x)
        return constrain(x, "batch", None, None, None)


class SpatialAttention(nn.Module):
    """Self-attention between all positions of a map, added to them; starts as almost the identity."""

    heads: int
    groups: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        y = GroupNorm(self.groups, self.dtype, name="norm")(x).reshape(batch, height * width, channels)

        def project(name: str) -> Array:
            heads = nn.Dense(channels, dtype=self.dtype, name=name)(y)
            return constrain(heads.reshape(*y.shape[:2], self.heads, -1), "batch", None, None, None)

        y = dot_product_attention(project("query"), project("key"), project("value")).reshape(y.shape)
        init = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")
        y = nn.Dense(channels, kernel_init=init, dtype=self.dtype, name="out")(y)
        return constrain(x + y.reshape(x.shape), "batch", None, None, None)


def check_halved(widths: tuple[int, ...], image_size: int) -> None:
    """Refuses an image that cannot be halved for each width after the first."""
    if image_size % 2 ** (len(widths) - 1):
        raise UserError(
            f"an image of {image_size} pixels a side cannot be halved for each width of {list(widths)} after the "
            f"first: choose fewer widths, or another image_size"
        )


class Resolutions(Protocol):
    """What a configuration says of convolutions at several resolutions."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each, the finest first; each next has half the height and width."""

    @property
    def blocks(self) -> int:
        """Residual blocks at each."""

    @property
    def dropout(self) -> float: ...

    @property
    def dtype(self) -> str: ...


def downwards(x: Float[Array, "B H W C"], sizes: Resolutions, *, train: bool) -> Float[Array, "B h w D"]:
    """Features at the coarsest resolution of an image, by layers of the module that calls it."""
    x = constrain(nn.Conv(sizes.widths[0], (3, 3), dtype=sizes.dtype, name="first")(x), "batch", None, None, None)
    for level, width in enumerate(sizes.widths):
        if level:
            x = Downsample(width, sizes.dtype, name=f"down_{level}")(x)
        x = blocks(x, level, sizes, train)
    return nn.silu(GroupNorm(GROUPS, sizes.dtype, name="norm_out")(x))


def upwards(x: Float[Array, "B h w D"], sizes: Resolutions, *, train: bool) -> Float[Array, "B H W C"]:
    """Features at the finest resolution of those at the coarsest, by layers of the module that calls it."""
    for level in reversed(range(len(sizes.widths))):
        x = blocks(x, level, sizes, train)
        if level:
            x = Upsample(sizes.widths[level - 1], sizes.dtype, name=f"up_{level}")(x)
    return nn.silu(GroupNorm(GROUPS, sizes.dtype, name="norm_out")(x))


def blocks(x: Float[Array, "B H W C"], level: int, sizes: Resolutions, train: bool) -> Float[Array, "B H W D"]:
    """Of one resolution."""
    for i in range(sizes.blocks):
        block = ResidualBlock(sizes.widths[level], dropout=sizes.dropout, dtype=sizes.dtype, name=f"block_{level}_{i}")
        x = block(x, train=train)
    return x


CONVOLUTION_RULES = (
    (r"(conv_in|conv_out|conv)/kernel$", (None, "filters")),
    (r"(conv_out|conv)/bias$", (None,)),
    (r"(norm_in|norm_out)/(scale|bias)$", (None,)),
)
