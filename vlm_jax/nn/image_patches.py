"""Patches of noisy images as the tokens of a sequence, and what a sequence says of them as images (2408.11039)."""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.conditioning import Conditioning, Image, Time, conditioning_rules
from vlm_jax.nn.unet import Sizes, UNetBlock, way_down, way_up
from vlm_jax.nn.vision import patchify, unpatchify

TIME_FEATURES = 256


@dataclass(frozen=True, kw_only=True)
class LinearPatches:
    """A linear layer each way; the time is added to a patch before it."""

    patch_size: int
    bottleneck: int | None = None
    """Features between two linear layers on the way in, as JiT (2511.13720, section 4.2); None: there is one."""


@dataclass(frozen=True, kw_only=True)
class ConvolutionalPatches(LinearPatches):
    """Linear layers between a stem and a head of convolutions, which see over the borders of patches.

    Both are residual and begin as nothing, so that a small decoder learns to read by them as soon as by linear layers:
    with a U-Net's blocks in their place, which draw without much of a decoder, it hardly did.
    """

    channels: int
    """Between the two convolutions of each."""

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise UserError(f"channels is {self.channels}: convolutions need at least 1")


@dataclass(frozen=True, kw_only=True)
class UNetPatches(Sizes):
    """The blocks of a U-Net's way down, and those of its way up, which see them: a patch is what the coarsest sees."""

    epsilon: ClassVar[float] = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention:
            raise UserError(f"attention is {list(self.attention)}: that of patches is the decoder's, leave it out")

    @property
    def patch_size(self) -> int:
        return 2 ** (len(self.widths) - 1)


Patches = LinearPatches | ConvolutionalPatches | UNetPatches


class Convolutions(nn.Module):
    """An image beside what two 3x3 convolutions make of it; starts as the image."""

    channels: int
    dtype: str

    @nn.compact
    def __call__(self, x: Image) -> Image:
        y = nn.silu(nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_in")(x))
        return x + nn.Conv(x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv_out")(y)


class PatchReader(nn.Module):
    """Noisy image and time -> a token for each patch, and what the way back sees of it."""

    config: Patches
    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Image, time: Time, *, train: bool = False) -> tuple[Float[Array, "B L D"], tuple[Array, ...]]:
        c = self.config
        if isinstance(c, LinearPatches):
            if isinstance(c, ConvolutionalPatches):
                x = Convolutions(c.channels, self.dtype, name="stem")(x)
            x = patchify(x, c.patch_size)
            time = Conditioning(x.shape[-1], TIME_FEATURES, False, dtype=self.dtype, name="conditioning")(time)
            x = x + time[:, None]
            if c.bottleneck is not None:
                x = nn.Dense(c.bottleneck, use_bias=False, dtype=self.dtype, name="bottleneck")(x)
            return nn.Dense(self.width, dtype=self.dtype, name="patch")(x), ()
        condition = Conditioning(4 * c.widths[0], TIME_FEATURES, False, dtype=self.dtype, name="conditioning")(time)

        def block(x: Array, width: int, name: str) -> Array:
            return UNetBlock(c, width, name=name)(x, condition, train=train)

        skips = way_down(x, c, block)
        batch, *_, channels = skips[-1].shape
        tokens = nn.Dense(self.width, dtype=self.dtype, name="patch")(skips[-1].reshape(batch, -1, channels))
        return tokens, (condition, *skips)


class PatchWriter(nn.Module):
    """What the sequence says of patches -> an image of `channels`; starts at zero."""

    config: Patches
    channels: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], seen: tuple[Array, ...], *, train: bool = False
    ) -> Float[Array, "B H W C"]:
        c = self.config
        if isinstance(c, LinearPatches):
            p = c.patch_size
            x = nn.Dense(p * p * self.channels, kernel_init=nn.initializers.zeros, name="last")(x.astype(jnp.float32))
            x = unpatchify(x, p, self.channels)
            return Convolutions(c.channels, "float32", name="head")(x) if isinstance(c, ConvolutionalPatches) else x
        condition, *skips = seen
        batch, height, width, channels = skips[-1].shape
        x = nn.Dense(channels, dtype=c.dtype, name="tokens")(x).reshape(batch, height, width, channels)

        def block(x: Array, width: int, name: str) -> Array:
            return UNetBlock(c, width, name=name)(x, condition, train=train)

        return way_up(x, skips, c, block, self.channels)


CONVOLUTIONS: tuple[Rule, ...] = (
    (r"(first|conv|conv_in|conv_out|condition|skip)/kernel$", (None, "filters")),
    (r"(bias|scale)$", (None,)),
)


def reader_rules(config: Patches) -> tuple[Rule, ...]:
    """Sharding rules of a `PatchReader`."""
    patch: tuple[Rule, ...] = (*conditioning_rules(None), (r"patch/kernel$", (None, "embed")))
    if isinstance(config, UNetPatches):
        return (*patch, *CONVOLUTIONS)
    bottleneck: tuple[Rule, ...] = ((r"bottleneck/kernel$", (None, None)),) if config.bottleneck is not None else ()
    return (*patch, *bottleneck, *beside(config, "stem"), (r"patch/bias$", (None,)))


def writer_rules(config: Patches) -> tuple[Rule, ...]:
    """Sharding rules of a `PatchWriter`."""
    if isinstance(config, UNetPatches):
        return ((r"tokens/kernel$", ("embed", None)), (r"last/kernel$", (None, None)), *CONVOLUTIONS)
    return (*beside(config, "head"), (r"last/kernel$", ("embed", None)), (r"last/bias$", (None,)))


def beside(config: LinearPatches, name: str) -> tuple[Rule, ...]:
    """Those of the convolutions of that name, which are small, where there are any."""
    if not isinstance(config, ConvolutionalPatches):
        return ()
    return (rf"{name}/conv_(in|out)/kernel$", (None, None)), (rf"{name}/conv_(in|out)/bias$", (None,))
