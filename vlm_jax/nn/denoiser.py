"""The network of a diffusion model: a U-Net or a diffusion transformer behind one signature, with guidance."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.conditioning import Image, Label, Time
from vlm_jax.nn.convolution import check_halved
from vlm_jax.nn.dit import DiT, DiTTower, dit_rules
from vlm_jax.nn.labels import check_classes
from vlm_jax.nn.unet import UNet, UNetTower, unet_rules
from vlm_jax.nn.vision import check_patches


@dataclass(frozen=True, kw_only=True)
class Network:
    """A backbone, and the classes that it may be told."""

    backbone: UNet | DiT
    classes: int | None = None
    """None: it is told no class."""
    class_dropout: float = 0.1
    """Share of training examples whose class is not told, for guidance (2207.12598)."""

    def __post_init__(self) -> None:
        check_classes(self.classes)


def check_network(config: Network, image_size: int) -> None:
    """Refuses an image that the backbone cannot take."""
    if isinstance(config.backbone, UNet):
        check_halved(config.backbone.widths, image_size)
    else:
        check_patches(image_size, config.backbone.patch_size)


class Denoiser(nn.Module):
    """Noisy image, time from 0 to 1000 and label -> an image of `channels`."""

    config: Network
    channels: int

    @nn.compact
    def __call__(
        self,
        x: Image,
        time: Time | Float[Array, ""],
        label: Label = None,
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
        if isinstance(c.backbone, UNet):
            tower = UNetTower(c.backbone, self.channels, c.classes, name="backbone")
        else:
            tower = DiTTower(c.backbone, self.channels, c.classes, name="backbone")
        if c.classes is None and guidance != 1:
            raise UserError(
                f"guidance goes away from the prediction without a class and this network is told none: leave "
                f"sampling.guidance at 1, not {guidance}"
            )
        if label is None or c.classes is None or guidance == 1:
            return tower(x, time, label, train=train)
        both = jnp.concatenate([label, jnp.full_like(label, c.classes)])
        y = tower(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both, train=train)
        told, untold = jnp.split(y, 2)
        with_guidance = untold + guidance * (told - untold)
        return jnp.concatenate([with_guidance[..., :guided], told[..., guided:]], axis=-1) if guided else with_guidance


def network_rules(config: Network) -> tuple[Rule, ...]:
    """Sharding rules of a `Denoiser`."""
    return unet_rules(config.classes) if isinstance(config.backbone, UNet) else dit_rules(config.classes)
