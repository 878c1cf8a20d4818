"""The network of a diffusion model: U-Nets and diffusion transformers behind one signature, with guidance."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.conditioning import Image, Time, Told, Untold, doubled
from vlm_jax.nn.convolution import check_halved
from vlm_jax.nn.dit import DiT, DiTTower, dit_rules
from vlm_jax.nn.labels import check_classes
from vlm_jax.nn.pixart import PixArt, PixArtTower, pixart_rules
from vlm_jax.nn.unet import LatentUNet, UNet, UNetTower, unet_rules
from vlm_jax.nn.vision import check_patches

READERS = (LatentUNet, PixArt)
"""Backbones that can be told a text."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A backbone, and the classes that it may be told."""

    backbone: UNet | LatentUNet | DiT | PixArt
    classes: int | None = None
    """None: it is told no class."""
    condition_dropout: float = 0.1
    """Share of training examples that are told nothing, neither class nor text, for guidance (2207.12598)."""

    def __post_init__(self) -> None:
        check_classes(self.classes)


def check_network(config: Network, image_size: int, *, reads: bool) -> None:
    """Refuses an image that the backbone cannot take, and a text that it cannot read, or reads and is not given."""
    backbone = config.backbone
    if isinstance(backbone, UNet | LatentUNet):
        check_halved(backbone.widths, image_size)
    else:
        check_patches(image_size, backbone.patch_size)
    if reads and not isinstance(backbone, READERS):
        raise UserError(
            f"the model has a text encoder and its network a {type(backbone).__name__}, which reads no text: choose "
            f"one of {', '.join(kind.__name__ for kind in READERS)}, or no text"
        )
    if isinstance(backbone, PixArt) and not reads:
        raise UserError(
            "PixArt's transformer reads a text and the model has no text encoder: give it one, or use a DiT"
        )


class Guidance(NamedTuple):
    """Classifier-free guidance (2207.12598): away from the prediction that is told nothing."""

    scale: float | Float[Array, ""] = 1.0
    """1: the prediction for what it is told; above, that much of its distance from the one for nothing."""
    rescale: float = 0.0
    """The share, 0 to 1, by which the deviation of each image is brought back to that of the prediction for what it is
    told (2305.08891, equations 15 and 16)."""

    @property
    def used(self) -> bool:
        """False: it is known to change nothing."""
        return not (isinstance(self.scale, int | float) and self.scale == 1)

    def guided(self, told: Float[Array, "B H W C"], untold: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = untold + self.scale * (told - untold)
        if not self.rescale:
            return y
        before, after = (jnp.std(x, axis=(1, 2, 3), keepdims=True) for x in (told, y))
        return y * (1 - self.rescale + self.rescale * before / after)


def tower(config: Network, channels: int) -> Any:
    """The module of a backbone: noisy image, time, label and, of a reader, text -> an image."""
    match config.backbone:
        case DiT() as sizes:
            return DiTTower(sizes, channels, config.classes)
        case PixArt() as sizes:
            return PixArtTower(sizes, channels, config.classes)
        case sizes:
            return UNetTower(sizes, channels, config.classes)


class Denoiser(nn.Module):
    """Noisy image, time from 0 to 1000 and what it is told -> an image of `channels`."""

    config: Network
    channels: int

    def setup(self) -> None:
        self.backbone = tower(self.config, self.channels)
        self.untold = Untold()

    def predict(self, x: Image, time: Time, told: Told, *, train: bool) -> Float[Array, "B H W O"]:
        """As it is told."""
        if told.text is None:
            return self.backbone(x, time, told.label, train=train)
        return self.backbone(x, time, told.label, self.untold(told.text), train=train)

    def __call__(
        self,
        x: Image,
        time: Time | Float[Array, ""],
        told: Told = Told(),
        *,
        train: bool = False,
        guidance: Guidance = Guidance(),
        guided: int | None = None,
    ) -> Float[Array, "B H W O"]:
        """A label of `classes`, or None, tells no class.

        Args:
          guided: how many of the output's channels guidance changes, the first; None: all.
        """
        time = jnp.broadcast_to(time, (len(x),))
        classes = self.config.classes
        if not guidance.used or (told.label is None and told.text is None):
            return self.predict(x, time, told, train=train)
        y = self.predict(jnp.concatenate([x, x]), jnp.concatenate([time, time]), doubled(told, classes), train=train)
        with_told, without = jnp.split(y, 2)
        first = guidance.guided(with_told[..., :guided], without[..., :guided])
        return first if guided is None else jnp.concatenate([first, with_told[..., guided:]], axis=-1)


def network_rules(config: Network, *, reads: bool) -> tuple[Rule, ...]:
    """Sharding rules of a `Denoiser`, which reads texts or does not."""
    backbone, classes = config.backbone, config.classes
    untold: tuple[Rule, ...] = ((r"untold/features$", (None, None)),) if reads else ()
    if isinstance(backbone, UNet | LatentUNet):
        return (*untold, *unet_rules(backbone, classes))
    return (*untold, *(dit_rules(classes) if isinstance(backbone, DiT) else pixart_rules(classes)))
