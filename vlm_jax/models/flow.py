"""The multiscale coupling flow (RealNVP, 1605.08803; Glow, 1807.03039): an invertible map of an image to noise.

With MaCow's masked convolutions (1902.04208) it sees pixels on all sides in every step. Its density is one of
continuous images; noise below the levels of the data, uniform or learned (Flow++, 1902.00275),
turns it into a bound on the probability of the integers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.coupling import MultiScale, Repeated, Step, flow_rules, squeeze, unsqueeze
from vlm_jax.nn.images import Images
from vlm_jax.nn.masked_flow import MASKED_RULES, MaskedStep
from vlm_jax.objectives.dequantisation import (
    from_logit,
    from_symmetric,
    squash,
    standard_normal_log_density,
    to_logit,
    to_symmetric,
)
from vlm_jax.objectives.likelihood import nats_to_bits_per_dim, subpixels, to_unit_range


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """Steps of actnorm, invertible convolution and coupling, at resolutions that halve."""

    scales: int
    """Resolutions; the first is half the image's."""
    steps: int
    """At each resolution."""
    width: int
    """Hidden channels of each coupling's network."""
    masked_width: int | None = None
    """Hidden channels of the masked convolutions, one from each side, that come before each step (MaCow, 1902.04208);
    None: there are none."""
    mixtures: int = 0
    """Logistics in the mixtures whose distribution functions transform each element (1902.00275); 0: affine alone."""
    dequantisation: Literal["uniform", "variational"] = "uniform"
    """Noise in [0, 1) that is added to the levels: uniform, or a conditional flow's (1902.00275)."""
    dequantisation_steps: int = 4
    """Of the conditional flow."""
    logit_margin: float | None = None
    """For data that saturate: the flow sees the logit of values in [margin, 1 - margin]; None: values in [-1, 1]."""
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the couplings' networks; parameters, maps and likelihoods are float32."""

    def __post_init__(self) -> None:
        check_scales(self.image_size, self.scales)
        if self.masked_width is not None and self.masked_width < 1:
            raise UserError(f"masked_width is {self.masked_width}: it must be at least 1, or None for no such layers")
        if self.logit_margin is not None and not 0 < self.logit_margin < 0.5:
            raise UserError(f"logit_margin is {self.logit_margin}: it must lie in (0, 0.5), or be None for no logit")


def check_scales(image_size: int, scales: int) -> None:
    """Refuses an image that cannot be halved that often."""
    if scales < 1 or image_size % 2**scales:
        raise UserError(
            f"an image of {image_size} pixels a side cannot be halved scales={scales} times: choose from 1 up to as "
            f"often as image_size can be halved"
        )


class Flow(nn.Module):
    """An image of integers and noise <-> standard normal noise. All noise is the caller's."""

    config: Config

    def setup(self) -> None:
        c = self.config
        step: Callable[..., nn.Module] = partial(Step, c.width, c.mixtures, c.dropout, c.dtype)
        if c.dequantisation == "variational":
            self.dequantiser = Repeated(step, c.dequantisation_steps)
        if c.masked_width is not None:
            step = partial(MaskedStep, c.masked_width, step, c.dtype)
        self.flow = MultiScale(step, c.steps, c.scales)

    def __call__(
        self, image: Int[Array, "B H W C"], noise: Float[Array, "B H W C"], *, train: bool = False
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """log p(x + u) and log q(u | x), nats; the noise is uniform, or standard normal for variational u."""
        if self.config.dequantisation == "variational":
            noise, log_q = self.dequantise(image, noise, train=train)
        else:
            log_q = jnp.zeros(len(image))
        latent, log_det = self.encode(image, noise, train=train)
        return standard_normal_log_density(latent) + log_det, log_q

    def dequantise(
        self, image: Int[Array, "B H W C"], noise: Float[Array, "B H W C"], *, train: bool = False
    ) -> tuple[Float[Array, "B H W C"], Float[Array, " B"]]:
        """u of q(u | x), made of standard normal noise, and log q."""
        context = squeeze(to_unit_range(image, self.config.levels))
        v, log_det = self.dequantiser(squeeze(noise), context, train=train)
        u, more = squash(unsqueeze(v))
        return u, standard_normal_log_density(noise) - log_det - more

    def encode(
        self, image: Int[Array, "B H W C"], u: Float[Array, "B H W C"], *, train: bool = False
    ) -> tuple[Float[Array, "B D"], Float[Array, " B"]]:
        """The noise that x + u stands for, and the log-determinant of all between."""
        c = self.config
        if c.logit_margin is None:
            y, log_det = to_symmetric(image, u, c.levels)
        else:
            y, log_det = to_logit(image, u, c.levels, c.logit_margin)
        latent, more = self.flow(y, train=train)
        return latent, log_det + more

    def decode(self, latent: Float[Array, "B D"]) -> Int[Array, "B H W C"]:
        """The image whose bin holds what the noise stands for."""
        c = self.config
        y = self.flow.invert(latent, c.shape)
        if c.logit_margin is None:
            return from_symmetric(y, c.levels)
        return from_logit(y, c.levels, c.logit_margin)


def build(config: Config) -> Model:
    """A density over images: its likelihood is bounded from below."""
    module: Any = Flow(config)  # linen types what `apply` returns as a union
    shape = config.shape
    draw = jax.random.normal if config.dequantisation == "variational" else jax.random.uniform

    def init(key: Array, batch: Batch) -> Variables:
        """Reads the images: each actnorm makes its first inputs standard."""
        noise_key, init_key = jax.random.split(key)
        return module.init(init_key, batch["image"], draw(noise_key, batch["image"].shape))

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative lower bound in bits a dimension, with one draw of the noise for an image."""
        del step
        noise_key, dropout_key = jax.random.split(key)
        image = batch["image"]
        log_p, log_q = module.apply(
            variables, image, draw(noise_key, image.shape), train=train, rngs={"dropout": dropout_key}
        )
        value = nats_to_bits_per_dim(jnp.mean(log_p - log_q), shape)
        return value, Aux({}, jnp.float32(len(image)), {"constants": variables["constants"]})

    def log_weight(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """log p(x + u) / q(u | x): its mean is the bound, and the mean of its exponential the probability."""
        log_p, log_q = module.apply(variables, batch["image"], draw(key, batch["image"].shape))
        return log_p - log_q

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """The temperature multiplies the noise."""
        del given
        return module.apply(variables, temperature * jax.random.normal(key, (num, math.prod(shape))), method="decode")

    return Model(
        inputs={"image": config.image},
        init=init,
        loss=loss,
        rules=(*(() if config.masked_width is None else MASKED_RULES), *flow_rules(config.scales)),
        log_likelihood=log_weight,
        count=subpixels,
        bound="lower",
        dequantisation=config.dequantisation,
        log_weight=log_weight,
        sample=sample,
    )
