"""Who looks at the copies of VQGAN (2012.09841) and latent diffusion (2112.10752): a critic of patches, and a judge."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Rule, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.convolution import GroupNorm
from vlm_jax.nn.vision import VisionTower, VisionTransformer, vision_rules
from vlm_jax.sharding import constrain, under


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """The absolute error, the distance in the eyes of a judge, and what a critic says."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of the critic's layers. All but the last halve the height and width (1611.07004)."""
    groups: int = 32
    """Of the critic's channels that are normalised together."""
    judge: VisionTransformer | None = None
    """The image tower of another model, which is to be frozen; None: there is no judge."""
    judged: float = 1.0
    """Weight of the distance in its eyes beside the absolute error."""
    adversarial: float = 0.5
    """Weight of what the critic says, times what makes its gradient as long as the others' at the last layer."""
    start: int = 50_001
    """Step from which on that counts; the critic learns before."""
    lecam: float = 0.0
    """Weight of what keeps a critic of few images from growing too sure (2104.03310)."""
    kl_weight: float = 1e-6
    """Of latents' divergence, a sum over them beside a sum over pixels, where latents have one."""


def strides(config: Adversarial) -> list[int]:
    """Of the critic's layers but the one that says."""
    return [1 if i and i == len(config.widths) - 1 else 2 for i in range(len(config.widths))]


def check_adversary(config: Adversarial, image_size: int) -> None:
    """Refuses an image that is too small for the critic to say anything of, or for the judge another size."""
    patches = image_size
    for stride in (*strides(config), 1):
        patches = (patches + 2 - 4) // stride + 1
    if patches < 1:
        raise UserError(
            f"of an image of {image_size} pixels a side a critic of widths {list(config.widths)} sees no whole patch: "
            f"choose fewer widths"
        )
    if config.judge is not None and config.judge.image_size != image_size:
        raise UserError(
            f"the judge looks at images of {config.judge.image_size} pixels a side and the copies have {image_size}: "
            f"choose another judge"
        )


class PatchCritic(nn.Module):
    """Image in [-1, 1] -> a number for each patch, large for what looks real: of 70x70 pixels with four widths.

    Groups of channels are normalised, where the release normalises over the batch: what is said of an image is of it
    alone.
    """

    config: Adversarial

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w"]:
        c = self.config
        for i, (width, stride) in enumerate(zip(c.widths, strides(c), strict=True)):
            first, around = i == 0, ((1, 1), (1, 1))
            x = nn.Conv(width, (4, 4), (stride, stride), around, use_bias=first, name=f"conv_{i}")(x)
            x = constrain(x, "batch", None, None, None)
            x = x if first else GroupNorm(c.groups, name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return nn.Conv(1, (4, 4), padding=((1, 1), (1, 1)), name="last")(x)[..., 0]


class Adversary(nn.Module):
    """Both; moving averages of what the critic says are kept in the collection `said`."""

    config: Adversarial

    def setup(self) -> None:
        self.critic = PatchCritic(self.config)
        if self.config.judge is not None:
            self.judge = VisionTower(self.config.judge)
        for name in ("real", "fake"):
            self.variable("said", name, jnp.zeros, ())

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w"]:
        """Of images in [-1, 1]: what the critic says."""
        if self.is_initializing() and self.config.judge is not None:
            self.judge(x)  # as a whole: features do not reach its last layers, which the tower that it is taken of has
        return self.critic(x)

    def distance(self, x: Float[Array, "B H W C"], y: Float[Array, "B H W C"]) -> Float[Array, " B"]:
        """In the judge's eyes: between the features of both, each of unit length, a mean over places; 0 without one."""
        if self.config.judge is None:
            return jnp.zeros(len(x))
        mean, std = (jnp.asarray(each, jnp.float32) for each in (self.config.judge.mean, self.config.judge.std))

        def seen(image: Array) -> Array:
            features = self.judge((0.5 * (image + 1) - mean) / std, pooled=False).astype(jnp.float32)
            return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + 1e-6)

        return jnp.mean(jnp.sum(jnp.square(seen(x) - seen(y)), axis=-1), axis=-1)


def onlookers(config: Adversarial, variables: Variables) -> tuple[Callable[..., Array], ...]:
    """Distance in the judge's eyes, what the critic says, and the same without a gradient for its parameters."""
    module: Any = Adversary(config)
    still = jax.lax.stop_gradient(variables)
    return (
        partial(module.apply, still, method="distance"),
        partial(module.apply, variables),
        partial(module.apply, still),
    )


def adversary_rules(config: Adversarial) -> tuple[Rule, ...]:
    """Sharding rules of an `Adversary`."""
    judge = () if config.judge is None else under("judge", vision_rules(config.judge))
    return (
        *judge,
        (r"critic/last/kernel$", (None, None)),
        (r"critic/conv_\d+/kernel$", (None, "filters")),
        (r"critic/.*(bias|scale)$", (None,)),
    )
