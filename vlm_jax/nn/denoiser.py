"""The network of a diffusion model: a U-Net or a diffusion transformer behind one signature, with guidance."""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Input, Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.dit import DiT, DiTTower, dit_rules
from vlm_jax.nn.unet import UNet, UNetTower, check_unet, unet_rules
from vlm_jax.nn.vision import check_patches


@dataclass(frozen=True, kw_only=True)
class Network:
    """Either backbone, and the classes that it may be told."""

    unet: UNet | None = None
    dit: DiT | None = None
    classes: int | None = None
    """None: it is told no class."""
    class_dropout: float = 0.1
    """Share of training examples whose class is not told, for guidance (2207.12598)."""

    def __post_init__(self) -> None:
        if (self.unet is None) == (self.dit is None):
            raise UserError(
                "a diffusion model's network is either a unet or a dit: set one of them, and the other None"
            )
        if self.classes is not None and self.classes < 1:
            raise UserError(f"a network that is told classes has at least 1, not classes={self.classes}")


def class_input(config: Network) -> dict[str, Input]:
    """The field that tells classes; none of a network without."""
    return {} if config.classes is None else {"label": Input((), "int32", config.classes)}


def check_network(config: Network, image_size: int, guidance: float) -> None:
    """Refuses an image that the backbone cannot take, and guidance that is no share."""
    if not 0 <= guidance < math.inf:
        raise UserError(f"guidance is {guidance}: it must be a number, at least 0, and 1 is for none")
    if config.unet is not None:
        check_unet(config.unet, image_size)
    if config.dit is not None:
        check_patches(image_size, config.dit.patch_size)


class Denoiser(nn.Module):
    """Noisy image, time from 0 to 1000 and label -> an image of `channels`."""

    config: Network
    channels: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        time: Float[Array, "*B"],
        label: Int[Array, " B"] | None = None,
        *,
        train: bool = False,
        guidance: float = 1.0,
        guided: int | None = None,
    ) -> Float[Array, "B H W O"]:
        """A label of `classes`, or None, tells no class.

        Args:
          guidance: 1: the prediction for the label; above, that much of its distance from the one without a label
            (classifier-free guidance, 2207.12598).
          guided: how many of the output's channels guidance changes, the first; None: all.
        """
        c = self.config
        time = jnp.broadcast_to(time, (len(x),))
        tower: UNetTower | DiTTower
        if c.dit is not None:
            tower = DiTTower(c.dit, self.channels, c.classes, name="dit")
        else:
            assert c.unet is not None
            tower = UNetTower(c.unet, self.channels, c.classes, name="unet")
        if label is None or c.classes is None or guidance == 1:
            return tower(x, time, label, train=train)
        both = jnp.concatenate([label, jnp.full_like(label, c.classes)])
        y = tower(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both, train=train)
        told, untold = jnp.split(y, 2)
        with_guidance = untold + guidance * (told - untold)
        return jnp.concatenate([with_guidance[..., :guided], told[..., guided:]], axis=-1) if guided else with_guidance


def training_labels(config: Network, key: Array, label: Int[Array, " B"] | None) -> Int[Array, " B"] | None:
    """The labels, a random share of them replaced by the one that tells nothing."""
    if label is None or config.classes is None:
        return None
    dropped = jax.random.bernoulli(key, config.class_dropout, label.shape)
    return jnp.where(dropped, config.classes, label)


def sampling_labels(config: Network, key: Array, label: Int[Array, " N"] | None, num: int) -> Int[Array, " N"] | None:
    """The labels to draw images of: those asked for, else uniform ones; None of a network that is told no class."""
    if config.classes is None or label is not None:
        return label if config.classes is not None else None
    return jax.random.randint(key, (num,), 0, config.classes)


def network_rules(config: Network) -> tuple[Rule, ...]:
    """Sharding rules of a `Denoiser`."""
    return unet_rules(config.classes) if config.unet is not None else dit_rules(config.classes)
