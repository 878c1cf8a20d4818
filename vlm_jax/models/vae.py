"""The variational autoencoder (Kingma & Welling 2013, 1312.6114), convolutional, with a likelihood over levels.

The decoder gives each pixel a mixture of discretised logistics, so that the evidence lower bound is one on the
probability of the integers in the data, in bits, and comparable with every other family's.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.convolution import CONVOLUTION_RULES, GROUPS, check_halved, downwards, upwards
from vlm_jax.nn.images import Images
from vlm_jax.objectives.likelihood import (
    from_unit_range,
    gaussian_kl,
    gaussian_log_density,
    logistic_mixture_log_prob,
    logistic_mixture_mean,
    mixture_channels,
    nats_to_bits_per_dim,
    sample_logistic_mixture,
    subpixels,
    to_unit_range,
)
from vlm_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """A Gaussian latent vector between a convolutional encoder and decoder."""

    latent: int
    """Dimensions of the latent vector."""
    pseudo_inputs: int | None = None
    """Images whose posteriors, mixed evenly, are the prior: they are learned (VampPrior, 1705.07120). None: the prior
    is the standard normal."""
    widths: tuple[int, ...]
    """Channels at each resolution, the finest first; each next has half the height and width."""
    blocks: int = 1
    """Residual blocks at each resolution."""
    mixtures: int = 5
    """Logistics in each pixel's mixture."""
    kl_warmup_steps: int = 0
    """Steps over which the divergence's weight in the loss rises from 0 to 1 (1602.02282, section 2.3)."""
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the convolutions; parameters, latents and likelihoods are float32."""

    def __post_init__(self) -> None:
        if self.pseudo_inputs is not None and self.pseudo_inputs < 1:
            raise UserError(f"pseudo_inputs is {self.pseudo_inputs}: it must be at least 1, or None")
        if self.mixtures < 1:
            raise UserError(f"mixtures is {self.mixtures}: it must be at least 1")
        if self.kl_warmup_steps < 0:
            raise UserError(f"kl_warmup_steps is {self.kl_warmup_steps}: it must be 0 or more")
        if not self.widths or any(width % GROUPS for width in self.widths):
            raise UserError(f"the widths of a VAE must be one or more multiples of {GROUPS}, not {list(self.widths)}")
        check_halved(self.widths, self.image_size)


class Encoder(nn.Module):
    """Image in [-1, 1] -> mean and log-variance of the latent vector."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool = False
    ) -> tuple[Float[Array, "B Z"], Float[Array, "B Z"]]:
        x = downwards(x, self.config, train=train)
        x = constrain(x.reshape(len(x), -1).astype(jnp.float32), "batch", None)
        x = nn.Dense(2 * self.config.latent, name="posterior")(x)
        mean, log_variance = jnp.split(x, 2, axis=-1)
        return mean, log_variance


class Decoder(nn.Module):
    """Latent vector -> parameters of each pixel's mixture of logistics."""

    config: Config

    @nn.compact
    def __call__(self, z: Float[Array, "B Z"], *, train: bool = False) -> Float[Array, "B H W O"]:
        c = self.config
        smallest = c.image_size // 2 ** (len(c.widths) - 1)
        x = constrain(nn.Dense(smallest * smallest * c.widths[-1], dtype=c.dtype, name="latent")(z), "batch", None)
        x = x.reshape(len(z), smallest, smallest, c.widths[-1])
        x = upwards(x, c, train=train).astype(jnp.float32)
        return nn.Dense(mixture_channels(c.mixtures, c.channels), name="mixture")(x)


class VAE(nn.Module):
    """Prior, encoder and decoder. Noise is the caller's."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        if c.pseudo_inputs is not None:
            shape = (c.pseudo_inputs, *c.shape)
            self.pseudo_inputs = self.param("pseudo_inputs", nn.initializers.zeros, shape)

    def encode(
        self, image: Int[Array, "B H W C"], *, train: bool = False
    ) -> tuple[Float[Array, "B Z"], Float[Array, "B Z"]]:
        return self.encoder(to_unit_range(image, self.config.levels), train=train)

    def decode(self, z: Float[Array, "B Z"], *, train: bool = False) -> Float[Array, "B H W O"]:
        return self.decoder(z, train=train)

    def pseudo_posteriors(self) -> tuple[Float[Array, "K Z"], Float[Array, "K Z"]]:
        """Mean and log-variance of the prior's components."""
        # Without dropout: the prior is the same function in training and after.
        return self.encoder(self.pseudo_inputs)

    def log_prior(self, z: Float[Array, "B Z"]) -> Float[Array, " B"]:
        if self.config.pseudo_inputs is None:
            return jnp.sum(gaussian_log_density(z, jnp.zeros_like(z), jnp.zeros_like(z)), axis=-1)
        log_densities = jnp.sum(gaussian_log_density(z[:, None], *self.pseudo_posteriors()), axis=-1)
        return jax.nn.logsumexp(log_densities, axis=-1) - math.log(self.config.pseudo_inputs)

    def draw_latent(self, key: Array, num: int) -> Float[Array, "num Z"]:
        choice_key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (num, self.config.latent))
        if self.config.pseudo_inputs is None:
            return noise
        choice = jax.random.randint(choice_key, (num,), 0, self.config.pseudo_inputs)
        mean, log_variance = self.pseudo_posteriors()
        return mean[choice] + jnp.exp(0.5 * log_variance[choice]) * noise

    def __call__(
        self, image: Int[Array, "B H W C"], noise: Float[Array, "B Z"], *, train: bool = False
    ) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
        """log p(x | z), log p(z) - log q(z | x) and KL(q || p), at z = mean + deviation * noise.

        The divergence is in closed form where there is one; from a mixture it is estimated by this one sample.
        """
        mean, log_variance = self.encode(image, train=train)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        log_prob = logistic_mixture_log_prob(self.decode(z, train=train), image, self.config.levels)
        log_ratio = self.log_prior(z) - jnp.sum(gaussian_log_density(z, mean, log_variance), axis=-1)
        if self.config.pseudo_inputs is None:
            divergence = jnp.sum(gaussian_kl(mean, log_variance), axis=-1)
        else:
            divergence = -log_ratio
        return jnp.sum(log_prob, axis=(1, 2)), log_ratio, divergence


def build(config: Config) -> Model:
    """A latent-variable model of images: its likelihood is bounded from below."""
    module: Any = VAE(config)  # linen types what `apply` returns as a union
    shape = config.shape

    def noise_like(image: Int[Array, "B H W C"], key: Array) -> Float[Array, "B Z"]:
        return jax.random.normal(key, (len(image), config.latent))

    def init(key: Array, batch: Batch) -> Variables:
        """Pseudo-inputs start as images of the batch: from random ones the prior's components hardly separate."""
        image, count = batch["image"], config.pseudo_inputs
        variables = module.init(key, image, jnp.zeros((len(image), config.latent)))
        if count is None:
            return variables
        choice_key, noise_key = jax.random.split(key)
        chosen = jax.random.permutation(choice_key, image)[jnp.arange(count) % len(image)]
        # The noise tells those apart that start as the same image.
        noise = 0.05 * jax.random.normal(noise_key, chosen.shape)
        return {"params": {**variables["params"], "pseudo_inputs": to_unit_range(chosen, config.levels) + noise}}

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative evidence lower bound in bits a dimension, with one posterior sample an image.

        In training its divergence has the weight of the step; the metrics are the bound's own terms.
        """
        noise_key, dropout_key = jax.random.split(key)
        image = batch["image"]
        log_prob, _, divergence = module.apply(
            variables, image, noise_like(image, noise_key), train=train, rngs={"dropout": dropout_key}
        )
        rate = nats_to_bits_per_dim(-jnp.mean(divergence), shape)
        distortion = nats_to_bits_per_dim(jnp.mean(log_prob), shape)
        metrics = {"rate_bits_per_dim": rate, "distortion_bits_per_dim": distortion}
        warmup = config.kl_warmup_steps if train else 0
        weight = jnp.minimum(step / warmup, 1) if warmup else 1
        return weight * rate + distortion, Aux(metrics, weight=jnp.float32(len(image)))

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """E_q log p(x | z) - KL(q || p)."""
        log_prob, _, divergence = module.apply(variables, batch["image"], noise_like(batch["image"], key))
        return log_prob - divergence

    def log_weight(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """log p(x, z) / q(z | x)."""
        log_prob, log_ratio, _ = module.apply(variables, batch["image"], noise_like(batch["image"], key))
        return log_prob + log_ratio

    def posterior(
        variables: Variables, image: Int[Array, "B H W C"]
    ) -> tuple[Float[Array, "B Z"], Float[Array, "B Z"]]:
        mean, log_variance = module.apply(variables, image, method="encode")
        return mean, log_variance

    def encode(variables: Variables, image: Int[Array, "B H W C"], key: Array | None = None) -> Float[Array, "B Z"]:
        """The posterior's mean, or a draw from it."""
        mean, log_variance = posterior(variables, image)
        return mean if key is None else mean + jnp.exp(0.5 * log_variance) * noise_like(image, key)

    def log_likelihood_given(
        variables: Variables, image: Int[Array, "B H W C"], latents: Float[Array, "B Z"]
    ) -> Float[Array, " B"]:
        outputs = module.apply(variables, latents, method="decode")
        return jnp.sum(logistic_mixture_log_prob(outputs, image, config.levels), axis=(1, 2))

    def decode(variables: Variables, latents: Float[Array, "B Z"]) -> Int[Array, "B H W C"]:
        """The mean of each pixel's mixture."""
        outputs = module.apply(variables, latents, method="decode")
        return from_unit_range(logistic_mixture_mean(outputs, config.channels), config.levels)

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """The temperature is that of the pixels given the latent vector; at 0 they are the decoder's mean."""
        del given
        latent_key, pixel_key = jax.random.split(key)
        latents = module.apply(variables, latent_key, num, method="draw_latent")
        if temperature == 0:
            return decode(variables, latents)
        outputs = module.apply(variables, latents, method="decode")
        return sample_logistic_mixture(pixel_key, outputs, config.channels, config.levels, temperature)

    rules = (
        (r"first/kernel$", (None, "filters")),
        (r"posterior/kernel$", ("embed", None)),
        (r"latent/kernel$", (None, "embed")),
        (r"(mixture|skip)/kernel$", (None, None)),
        *(((r"pseudo_inputs$", ("components", None, None, None)),) if config.pseudo_inputs is not None else ()),
        (r"(first|posterior|latent|mixture|skip)/bias$", (None,)),
        *CONVOLUTION_RULES,
    )
    return Model(
        inputs={"image": config.image},
        init=init,
        loss=loss,
        rules=rules,
        log_likelihood=log_likelihood,
        count=subpixels,
        bound="lower",
        log_weight=log_weight,
        latents=Input((config.latent,), "float32"),
        encode=encode,
        decode=decode,
        posterior=posterior,
        log_likelihood_given=log_likelihood_given,
        sample=sample,
    )
