"""The hierarchical variational autoencoder: latent images from coarse to fine, each drawn given those before it.

An encoder reads the image once, from fine to coarse. A decoder works from coarse to fine, block after block; each block
has a latent image, with a prior given all that was drawn before it and, in training, a posterior given what the encoder
saw at that resolution as well. As in the ladder VAE (Sonderby et al. 2016, 1602.02282), with the blocks of VDVAE
(Child 2020, 2011.10650).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.convolution import unroll
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

Seen = list[Float[Array, "B _ _ D"]]
Noise = list[Float[Array, "_ B _ _ Z"]]
"""Of the blocks of each resolution, the finest first."""
MAX_LOG_DEVIATION = 5.0
"""Of priors and posteriors: beyond it a step of the optimizer can make a divergence that no gradient survives."""


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """Residual blocks at resolutions that shrink to the coarsest and grow again."""

    width: int
    """Channels of both ways."""
    hidden: int
    """Channels within a residual block."""
    latent: int
    """Channels of each latent image."""
    sizes: tuple[int, ...]
    """Heights of the resolutions, from the image's own to the coarsest; each is a multiple of the next."""
    encoder_blocks: tuple[int, ...]
    """At each resolution."""
    decoder_blocks: tuple[int, ...]
    """At each resolution, each with a latent image."""
    mixtures: int = 5
    """Logistics in each pixel's mixture."""
    kl_warmup_steps: int = 0
    """Steps over which the divergence's weight in the loss rises from 0 to 1, so that latents are of use before they
    cost (1602.02282, section 2.3)."""
    dropout: float = 0.0
    """Of the decoder's residual branches."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the convolutions; parameters, latents and likelihoods are float32."""

    def __post_init__(self) -> None:
        sizes = self.sizes
        if not sizes or sizes[0] != self.image_size or any(a <= b or a % b for a, b in itertools.pairwise(sizes)):
            raise UserError(
                f"sizes={list(sizes)} must begin with image_size={self.image_size}, and each must be a multiple of the "
                f"next"
            )
        for name in ("encoder_blocks", "decoder_blocks"):
            blocks = getattr(self, name)
            if len(blocks) != len(sizes) or min(blocks) < 1:
                raise UserError(f"{name}={list(blocks)} must be one number, 1 or more, for each of sizes={list(sizes)}")
        if self.mixtures < 1:
            raise UserError(f"mixtures is {self.mixtures}: it must be at least 1")
        if self.kl_warmup_steps < 0:
            raise UserError(f"kl_warmup_steps is {self.kl_warmup_steps}: it must be 0 or more")


class Terms(NamedTuple):
    """Of the evidence lower bound, nats."""

    divergence: Float[Array, "*L B"]
    """KL(q || p) of each latent image, given those before."""
    log_ratio: Float[Array, "*L B"]
    """log p(z) - log q(z), whose mean is the negative of it."""


def pool(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w C"]:
    """Means over squares."""
    factor = x.shape[1] // size
    return jnp.mean(x.reshape(len(x), size, factor, size, factor, -1), axis=(2, 4))


def enlarge(x: Float[Array, "B h w C"], size: int) -> Float[Array, "B H W C"]:
    """Nearest neighbours."""
    factor = size // x.shape[1]
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


class Bottleneck(nn.Module):
    """GELU and a convolution, four times: into few channels, twice among them, and out again (2011.10650, figure 3)."""

    hidden: int
    out: int
    out_scale: float = 1.0
    """Multiplies the variance of the last kernel's initialisation: 1 / depth in a residual stack."""
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B H W D"]:
        window = (3, 3) if x.shape[1] > 2 else (1, 1)
        x = nn.Dense(self.hidden, dtype=self.dtype, name="reduce")(nn.gelu(x.astype(self.dtype)))
        for name in ("first", "second"):
            x = constrain(
                nn.Conv(self.hidden, window, dtype=self.dtype, name=name)(nn.gelu(x)), "batch", None, None, None
            )
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.gelu(x))
        if self.out_scale:
            init = nn.initializers.variance_scaling(self.out_scale, "fan_in", "normal")
        else:
            init = nn.initializers.zeros
        # In fp32: what comes out is the mean and deviation of a latent, or joins the state that all blocks add to.
        return nn.Dense(self.out, kernel_init=init, name="expand")(x.astype(jnp.float32))


class EncoderBlock(nn.Module):
    """A residual block."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        c = self.config
        scale = 1 / sum(c.encoder_blocks)
        return constrain(
            x + Bottleneck(c.hidden, c.width, scale, dtype=c.dtype, name="block")(x), "batch", None, None, None
        )


class DecoderBlock(nn.Module):
    """Draws a latent image from its posterior, or without the encoder's word from its prior, and takes it in."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        seen: Float[Array, "B H W C"] | None,
        noise: Float[Array, "B H W Z"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "B H W C"], Terms, Float[Array, "B H W Z"]]:
        """What comes last is the noise by which the prior would have drawn the same latent image."""
        c = self.config
        scale = 1 / sum(c.decoder_blocks)
        # A prior that starts as the standard normal, and adds nothing to x.
        prior = Bottleneck(c.hidden, 2 * c.latent + c.width, 0.0, c.dropout, c.dtype, name="prior")(x, train=train)
        prior_mean, prior_log_deviation, shift = jnp.split(prior, (c.latent, 2 * c.latent), axis=-1)
        prior_log_deviation = bounded(prior_log_deviation)
        if seen is None:
            z = prior_mean + jnp.exp(prior_log_deviation) * noise
            terms = Terms(jnp.zeros(len(x)), jnp.zeros(len(x)))
        else:
            both = jnp.concatenate([x, seen], axis=-1)
            outputs = Bottleneck(c.hidden, 2 * c.latent, 1.0, c.dropout, c.dtype, name="posterior")(both, train=train)
            mean, log_deviation = jnp.split(outputs, 2, axis=-1)
            log_deviation = bounded(log_deviation)
            z = mean + jnp.exp(log_deviation) * noise
            divergence = gaussian_kl(
                (mean - prior_mean) * jnp.exp(-prior_log_deviation), 2 * (log_deviation - prior_log_deviation)
            )
            log_ratio = gaussian_log_density(z, prior_mean, 2 * prior_log_deviation)
            log_ratio = log_ratio - gaussian_log_density(z, mean, 2 * log_deviation)
            terms = Terms(jnp.sum(divergence, axis=(1, 2, 3)), jnp.sum(log_ratio, axis=(1, 2, 3)))
            noise = (z - prior_mean) * jnp.exp(-prior_log_deviation)
        init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
        x = x + shift + nn.Dense(c.width, kernel_init=init, name="latent")(z)
        x = x + Bottleneck(c.hidden, c.width, scale, c.dropout, c.dtype, name="block")(x, train=train)
        return constrain(x, "batch", None, None, None), terms, noise


def bounded(log_deviation: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return MAX_LOG_DEVIATION * jnp.tanh(log_deviation / MAX_LOG_DEVIATION)


class Encoder(nn.Module):
    """Image in [-1, 1] -> what the decoder is told at each resolution, the finest first."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Seen:
        c = self.config
        x = nn.Conv(c.width, (3, 3), name="first")(x)
        seen = []
        for size, blocks in zip(c.sizes, c.encoder_blocks, strict=True):

            def body(block: nn.Module, x: Array) -> tuple[Array, None]:
                return block(x), None

            scan = nn.scan(
                body, variable_axes={"params": 0}, split_rngs={"params": True}, length=blocks, unroll=unroll(blocks)
            )
            x, _ = scan(EncoderBlock(c, name=f"size_{size}"), pool(x, size))
            seen.append(x)
        return seen


class Decoder(nn.Module):
    """Latents from coarse to fine -> parameters of each pixel's mixture of logistics, and of each latent its terms and
    the noise by which the prior would have drawn it."""

    config: Config

    @nn.compact
    def __call__(
        self, seen: Seen | None, noise: Noise, *, train: bool = False
    ) -> tuple[Float[Array, "B H W O"], Terms, Noise]:
        """`seen` is what the encoder tells; None: latents are drawn from their priors."""
        c, batch = self.config, noise[0].shape[1]
        x, parts = jnp.zeros((batch, c.sizes[-1], c.sizes[-1], c.width)), []
        latents: list[Array] = []
        for i, size in reversed(list(enumerate(c.sizes))):
            x = enlarge(x, size) + self.param(f"start_{size}", nn.initializers.zeros, (size, size, c.width))
            told = None if seen is None else seen[i]

            def body(block: nn.Module, x: Array, noise: Array, told: Array | None = told) -> tuple[Array, Any]:
                x, *drawn = block(x, told, noise, train=train)
                return x, drawn

            scan = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                unroll=unroll(c.decoder_blocks[i]),
            )
            x, (terms, drawn) = scan(DecoderBlock(c, name=f"size_{size}"), x, noise[i])
            parts.append(terms)
            latents.insert(0, drawn)
        gain = self.param("final_gain", nn.initializers.ones, (c.width,))
        bias = self.param("final_bias", nn.initializers.zeros, (c.width,))
        outputs = nn.Dense(mixture_channels(c.mixtures, c.channels), name="mixture")(x * gain + bias)
        return outputs, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts), latents


class LadderVAE(nn.Module):
    """Encoder and decoder. Noise is the caller's."""

    config: Config

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(
        self, image: Int[Array, "B H W C"], noise: Noise, *, train: bool = False
    ) -> tuple[Float[Array, "B H W O"], Terms]:
        """The pixels' mixtures at latents of the posterior, and what the latents cost."""
        return self.decoder(self.encoder(to_unit_range(image, self.config.levels)), noise, train=train)[:2]

    def encode(self, image: Int[Array, "B H W C"], noise: Noise) -> Noise:
        """The noise by which the prior would have drawn these latents of the posterior."""
        return self.decoder(self.encoder(to_unit_range(image, self.config.levels)), noise)[2]

    def draw(self, noise: Noise) -> Float[Array, "B H W O"]:
        """The pixels' mixtures at latents of the prior."""
        return self.decoder(None, noise)[0]


def build(config: Config) -> Model:
    """A latent-variable model of images: its likelihood is bounded from below."""
    module: Any = LadderVAE(config)  # linen types what `apply` returns as a union
    shape = config.shape
    sizes = list(zip(config.sizes, config.decoder_blocks, strict=True))
    latents = {f"size_{size}": Input((blocks, size, size, config.latent), "float32") for size, blocks in sizes}

    def draw_noise(key: Array, count: int) -> Noise:
        shapes = [(blocks, count, size, size, config.latent) for size, blocks in sizes]
        return [jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch["image"], draw_noise(key, len(batch["image"])))

    def terms(
        variables: Variables, image: Int[Array, "B H W C"], key: Array, **settings: Any
    ) -> tuple[Float[Array, " B"], Terms]:
        """log p(x | z), and what the latents cost."""
        outputs, terms = module.apply(variables, image, draw_noise(key, len(image)), **settings)
        log_prob = jnp.sum(logistic_mixture_log_prob(outputs, image, config.levels), axis=(1, 2))
        return log_prob, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), terms)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative evidence lower bound in bits a dimension; in training, the divergence by its weight."""
        noise_key, dropout_key = jax.random.split(key)
        image = batch["image"]
        log_prob, (divergence, _) = terms(variables, image, noise_key, train=train, rngs={"dropout": dropout_key})
        rate = nats_to_bits_per_dim(-jnp.mean(divergence), shape)
        distortion = nats_to_bits_per_dim(jnp.mean(log_prob), shape)
        weight = jnp.float32(1)
        if train and config.kl_warmup_steps:
            weight = jnp.minimum(step / config.kl_warmup_steps, 1)
        metrics = {"rate_bits_per_dim": rate, "distortion_bits_per_dim": distortion, "rate_weight": weight}
        return weight * rate + distortion, Aux(metrics, weight=jnp.float32(len(image)))

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """E_q log p(x | z) - KL(q || p)."""
        log_prob, (divergence, _) = terms(variables, batch["image"], key)
        return log_prob - divergence

    def log_weight(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """log p(x, z) / q(z | x)."""
        log_prob, (_, log_ratio) = terms(variables, batch["image"], key)
        return log_prob + log_ratio

    def encode(variables: Variables, image: Int[Array, "B H W C"], key: Array | None = None) -> dict[str, Array]:
        """The posteriors' means, each given those above it, or draws; in the noise by which the prior draws the same.

        So measured a latent image is standard normal before the image is seen, and needs none of the others.
        """
        noise = draw_noise(jax.random.key(0) if key is None else key, len(image))
        if key is None:
            noise = [jnp.zeros_like(part) for part in noise]
        parts = module.apply(variables, image, noise, method="encode")
        return {name: jnp.moveaxis(part, 0, 1) for name, part in zip(latents, parts, strict=True)}

    def decode(variables: Variables, given: Mapping[str, Float[Array, "B _ _ _ Z"]]) -> Int[Array, "B H W C"]:
        """The mean of each pixel's mixture."""
        noise = [jnp.moveaxis(given[name], 1, 0) for name in latents]
        outputs = module.apply(variables, noise, method="draw")
        return from_unit_range(logistic_mixture_mean(outputs, config.channels), config.levels)

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """The temperature is that of all latents and of the pixels; at 0 both are the means."""
        del given
        latent_key, pixel_key = jax.random.split(key)
        noise = [temperature * part for part in draw_noise(latent_key, num)]
        outputs = module.apply(variables, noise, method="draw")
        if temperature == 0:
            return from_unit_range(logistic_mixture_mean(outputs, config.channels), config.levels)
        return sample_logistic_mixture(pixel_key, outputs, config.channels, config.levels, temperature)

    return Model(
        inputs={"image": config.image},
        init=init,
        loss=loss,
        rules=(
            (r"(first|second)/kernel$", (None, "filters")),
            (r"(reduce|expand)/kernel$", ("embed", None)),
            (r"latent/kernel$", (None, "embed")),
            (r"mixture/kernel$", ("embed", None)),
            (r"start_\d+$", (None, None, "embed")),
            (r"bias$", (None,)),
            (r"final_gain$", (None,)),
        ),
        log_likelihood=log_likelihood,
        count=subpixels,
        bound="lower",
        log_weight=log_weight,
        latents=latents,
        encode=encode,
        decode=decode,
        sample=sample,
    )
