"""The network in whose eyes FID is measured (1706.08500): Inception v3 (1512.00567) as it was ported from TensorFlow.

Its release is `pt_inception-2015-12-05` of pytorch-fid, whose names the parameters have. It differs from the Inception
of torchvision in what pools within blocks: averages leave out the padding, and the last block takes the largest. It
learns nothing here: what it is for is to judge pictures, by the mean of its features over their places (`pool3`).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from vlm_jax.contract import Batch, Input, Model, Rule, Variables, without_loss
from vlm_jax.errors import UserError
from vlm_jax.sharding import constrain

EPSILON = 1e-3
"""Added to variances."""
LEAST = 75
"""Pixels of a side of which a place is left at the end."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The published sizes, but for what it is shown."""

    image_size: int = 299
    """Pixels of a side of the images that it is shown, in RGB; no parameter hangs on it."""
    size: int = 299
    """To which they are scaled."""
    width: int = 32
    """Channels of the first convolution; those of all others are in proportion."""
    classes: int | None = 1008
    """Of ImageNet, by the last layer, which no feature needs and the release has; None: it is left out."""

    def __post_init__(self) -> None:
        if self.width % 2:
            raise UserError(f"width is {self.width}: it must be even, for all layers to have whole channels")
        if self.size < LEAST:
            raise UserError(f"size is {self.size}: of less than {LEAST} pixels a side no place is left at the end")


def measures_fid(config: Any) -> bool:
    """Whether it is the network of FID, of the release's sizes, whatever it is shown."""
    return isinstance(config, Config) and replace(config, image_size=Config.image_size) == Config()


class Unit(NamedTuple):
    """A convolution, a norm and a ReLU."""

    name: str
    channels: int
    """Where the first of all has 32."""
    window: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: Literal["SAME", "VALID"] = "SAME"


Step = Unit | tuple[Unit, Unit] | Literal["average", "largest", "halved"]
"""A unit, two of one input side by side, or what pools 3x3 places: the last every second one."""
Branch = tuple[Step, ...]


class Block(NamedTuple):
    """Branches side by side."""

    name: str
    branches: tuple[Branch, ...]


def several(name: str, *units: tuple[int, tuple[int, int]]) -> Branch:
    """Units in a row, called NAME_1, NAME_2 and so on."""
    return tuple(Unit(f"{name}_{number}", *unit) for number, unit in enumerate(units, 1))


def block_5(name: str, pool: int) -> Block:
    """Of torchvision's InceptionA."""
    return Block(
        name,
        (
            (Unit("branch1x1", 64),),
            several("branch5x5", (48, (1, 1)), (64, (5, 5))),
            several("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            ("average", Unit("branch_pool", pool)),
        ),
    )


def block_6(name: str, inner: int) -> Block:
    """InceptionC: windows of 7x7 as 1x7 and 7x1."""
    row, column = (1, 7), (7, 1)
    long = ((inner, (1, 1)), (inner, column), (inner, row), (inner, column), (192, row))
    return Block(
        name,
        (
            (Unit("branch1x1", 192),),
            several("branch7x7", (inner, (1, 1)), (inner, row), (192, column)),
            several("branch7x7dbl", *long),
            ("average", Unit("branch_pool", 192)),
        ),
    )


def block_7(name: str, pool: Literal["average", "largest"]) -> Block:
    """InceptionE, whose windows of 3x3 are 1x3 beside 3x1."""
    row, column = (1, 3), (3, 1)
    wide = Unit("branch3x3_2a", 384, row), Unit("branch3x3_2b", 384, column)
    deep = Unit("branch3x3dbl_3a", 384, row), Unit("branch3x3dbl_3b", 384, column)
    return Block(
        name,
        (
            (Unit("branch1x1", 320),),
            (Unit("branch3x3_1", 384), wide),
            (*several("branch3x3dbl", (448, (1, 1)), (384, (3, 3))), deep),
            (pool, Unit("branch_pool", 192)),
        ),
    )


SMALLER_6 = Block(
    "Mixed_6a",
    (
        (Unit("branch3x3", 384, (3, 3), 2, "VALID"),),
        (
            *several("branch3x3dbl", (64, (1, 1)), (96, (3, 3))),
            Unit("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
        ),
        ("halved",),
    ),
)
"""InceptionB."""
SMALLER_7 = Block(
    "Mixed_7a",
    (
        (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), 2, "VALID")),
        (
            *several("branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1))),
            Unit("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
        ),
        ("halved",),
    ),
)
"""InceptionD."""
NETWORK: tuple[Step | Block, ...] = (
    Unit("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Unit("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Unit("Conv2d_2b_3x3", 64, (3, 3)),
    "halved",
    Unit("Conv2d_3b_1x1", 80),
    Unit("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    "halved",
    block_5("Mixed_5b", 32),
    block_5("Mixed_5c", 64),
    block_5("Mixed_5d", 64),
    SMALLER_6,
    block_6("Mixed_6b", 128),
    block_6("Mixed_6c", 160),
    block_6("Mixed_6d", 160),
    block_6("Mixed_6e", 192),
    SMALLER_7,
    block_7("Mixed_7b", "average"),
    block_7("Mixed_7c", "largest"),
)


class FixedNorm(nn.Module):
    """Batch normalisation (1502.03167) in use: the statistics are parameters, as published."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        mean, variance = self.param("mean", zeros, x.shape[-1:]), self.param("variance", ones, x.shape[-1:])
        scale, bias = self.param("scale", ones, x.shape[-1:]), self.param("bias", zeros, x.shape[-1:])
        return (x - mean) * (scale * jax.lax.rsqrt(variance + EPSILON)) + bias


class ConvolutionUnit(nn.Module):
    """A `Unit`."""

    unit: Unit
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        unit = self.unit
        x = nn.Conv(
            unit.channels * self.width // 32,
            unit.window,
            (unit.stride, unit.stride),
            padding=unit.padding,
            use_bias=False,
            precision="highest",  # a measure is the same on all machines, of which some would round to bfloat16
            name="conv",
        )(x)
        return nn.relu(FixedNorm(name="bn")(x))


class InceptionBlock(nn.Module):
    """A `Block`."""

    block: Block
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        ends = []
        for branch in self.block.branches:
            y = x
            for step in branch:
                y = taken(step, y, self.width)
            ends.append(y)
        return constrain(jnp.concatenate(ends, axis=-1), "batch", None, None, None)


def taken(step: Step, x: Float[Array, "B H W C"], width: int) -> Float[Array, "B h w D"]:
    """One step further; within a module, whose submodules the units are."""
    if isinstance(step, Unit):
        return ConvolutionUnit(step, width, name=step.name)(x)
    around = ((1, 1), (1, 1))
    if step == "average":
        return nn.avg_pool(x, (3, 3), padding=around, count_include_pad=False)
    if step == "largest":
        return nn.max_pool(x, (3, 3), padding=around)
    if step == "halved":
        return nn.max_pool(x, (3, 3), (2, 2))
    return jnp.concatenate([taken(each, x, width) for each in step], axis=-1)


def scaled(image: UInt8[Array, "B H W C"], size: int) -> Float[Array, "B S S C"]:
    """What the network reads: in [-1, 1], between the four nearest pixels, though there may be more (no antialias)."""
    x = image.astype(jnp.float32) / 255
    return 2 * jax.image.resize(x, (len(x), size, size, x.shape[-1]), "bilinear", antialias=False) - 1


class Inception(nn.Module):
    """Images -> a vector of each place, row by row: of 299 pixels a side 64 of 2048."""

    config: Config

    @nn.compact
    def __call__(self, image: UInt8[Array, "B H W C"]) -> Float[Array, "B T D"]:
        c = self.config
        x = constrain(scaled(image, c.size), "batch", None, None, None)
        for part in NETWORK:
            x = InceptionBlock(part, c.width, name=part.name)(x) if isinstance(part, Block) else taken(part, x, c.width)
        x = x.reshape(len(x), -1, x.shape[-1])
        if c.classes is not None and self.is_initializing():  # published weights have it
            nn.Dense(c.classes, name="fc")(jnp.mean(x, axis=1))
        return x


def rules_of(config: Config) -> tuple[Rule, ...]:
    """Sharding rules of an `Inception`."""
    last: tuple[Rule, ...] = ((r"^fc/kernel$", ("embed", None)), (r"^fc/bias$", (None,)))
    return (
        *(() if config.classes is None else last),
        (r"conv/kernel$", (None, "filters")),
        (r"bn/(mean|variance|scale|bias)$", (None,)),
    )


def build(config: Config) -> Model:
    """`image_features`, and nothing that could be trained for itself."""
    module: Any = Inception(config)  # linen types what `apply` returns as a union

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch["image"])

    def image_features(variables: Variables, image: UInt8[Array, "B H W C"]) -> Float[Array, "B T D"]:
        """Of each place of the last block; their mean is what FID is measured of."""
        return module.apply(variables, image)

    return Model(
        inputs={"image": Input((config.image_size, config.image_size, 3), "uint8", 256)},
        init=init,
        loss=without_loss(
            "the network of FID has no loss: make it a part of another model, or a --judge of what another one draws"
        ),
        rules=rules_of(config),
        image_features=image_features,
    )
