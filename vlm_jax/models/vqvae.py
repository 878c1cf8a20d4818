"""Autoencoders whose latents are codes: VQ-VAE (1711.00937), VQGAN (2012.09841), and their quantisers since.

The likelihood is log p(codes) + log p(image | codes), a lower bound, for an image has one code of many. Here all codes
are alike, a priori; what models them takes their place.
"""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.nn.autoencoder import PYRAMID_RULES, Decoder, Encoder, Pyramid
from vlm_jax.nn.codebook import RECENT, use_of_codes
from vlm_jax.nn.convolution import check_halved
from vlm_jax.nn.images import Images
from vlm_jax.nn.quantize import (
    EMA,
    FSQ,
    LFQ,
    Learned,
    Quantised,
    Residual,
    SimVQ,
    quantizer,
    quantizer_rules,
)
from vlm_jax.objectives.likelihood import (
    from_unit_range,
    logistic_log_prob,
    nats_to_bits_per_dim,
    sample_logistic,
    subpixels,
    to_unit_range,
)


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """An encoder, a quantiser, and a decoder."""

    network: Pyramid
    hidden: int = 256
    """Channels of what the encoder gives and the decoder reads; the quantiser's are its own."""
    quantizer: EMA | Learned | SimVQ | FSQ | LFQ | Residual
    penalty_weight: float = 1.0
    """Of the quantiser's penalty beside bits a dimension, in training."""

    def __post_init__(self) -> None:
        check_halved(self.network.widths, self.image_size)

    @property
    def latents(self) -> tuple[int, ...]:
        """Of codes: the map's height and width, and the books where there are several."""
        side, books = self.image_size // self.network.factor, self.quantizer.books
        return (side, side) if books == 1 else (side, side, books)


class VQVAE(nn.Module):
    """Encoder, quantiser and decoder."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c.network, c.hidden)
        self.features = nn.Dense(c.quantizer.width)
        self.quantizer = quantizer(c.quantizer)
        self.latent = nn.Dense(c.hidden)
        self.decoder = Decoder(c.network, c.channels)
        self.log_scale = self.param("log_scale", nn.initializers.constant(-2.0), (c.channels,))
        shape = (c.quantizer.size,) if c.quantizer.books == 1 else (c.quantizer.books, c.quantizer.size)
        self.age = self.variable("use", "age", lambda: jnp.full(shape, RECENT))

    def quantised(self, image: Int[Array, "B H W C"], *, train: bool = False) -> Quantised:
        x = self.encoder(to_unit_range(image, self.config.levels), train=train)
        return self.quantizer(self.features(x), train=train)

    def decode(self, codes: Int[Array, "B h w *R"]) -> Float[Array, "B H W C"]:
        """Means of the pixels, on [-1, 1]."""
        return self.decoder(self.latent(self.quantizer.look_up(codes)))

    def __call__(
        self, image: Int[Array, "B H W C"], *, train: bool = False
    ) -> tuple[Float[Array, " B"], Quantised, dict[str, Array]]:
        """log p(image | codes), the codes, and how they are used."""
        found = self.quantised(image, train=train)
        mean = self.decoder(self.latent(found.value), train=train)
        use, age = use_of_codes(found.codes, self.age.value)
        if train:
            self.age.value = age
        log_prob = logistic_log_prob(mean, self.log_scale, image, self.config.levels)
        return jnp.sum(log_prob, axis=(1, 2, 3)), found, use


def build(config: Config) -> Model:
    """A tokenizer of images: `encode` gives codes, `decode` pixels."""
    module: Any = VQVAE(config)  # linen types what `apply` returns as a union
    nats = math.prod(config.latents) * math.log(config.quantizer.size)
    rate = nats_to_bits_per_dim(-jnp.float32(nats), config.shape)

    def init(key: Array, batch: Batch) -> Variables:
        """Codebooks begin as the centres of what the encoder makes of the batch."""
        return module.init(key, batch["image"])

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative bound in bits a dimension; in training the penalty in place of the codes' rate, a constant."""
        del step
        dropout_key, code_key = jax.random.split(key)
        (log_prob, found, use), state = module.apply(
            variables,
            batch["image"],
            train=train,
            rngs={"dropout": dropout_key, "codes": code_key},
            mutable=nn.DenyList("params"),
        )
        distortion = nats_to_bits_per_dim(jnp.mean(log_prob), config.shape)
        metrics = {"distortion_bits_per_dim": distortion, "rate_bits_per_dim": rate, "penalty": found.penalty, **use}
        value = distortion + (config.penalty_weight * found.penalty if train else rate)
        # What is averaged over batches, or left out of whole ones, moves within a batch that is computed in parts.
        weight = None if train and isinstance(config.quantizer, EMA | Residual) else jnp.float32(len(log_prob))
        return value, Aux(metrics, weight, state)

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """log p(codes) + log p(image | codes), the codes' the same for all."""
        del key
        log_prob, _, _ = module.apply(variables, batch["image"])
        return log_prob - nats

    def encode(variables: Variables, image: Int[Array, "B H W C"], key: Array | None = None) -> Int[Array, "B h w *R"]:
        """Codes. There is nothing to draw."""
        del key
        return module.apply(variables, image, method="quantised").codes

    def decode(variables: Variables, latents: Int[Array, "B h w *R"]) -> Int[Array, "B H W C"]:
        """The mean of each pixel."""
        return from_unit_range(module.apply(variables, latents, method="decode"), config.levels)

    def log_likelihood_given(
        variables: Variables, latents: Int[Array, "B h w *R"], image: Int[Array, "B H W C"]
    ) -> Float[Array, " B"]:
        mean = module.apply(variables, latents, method="decode")
        log_prob = logistic_log_prob(mean, variables["params"]["log_scale"], image, config.levels)
        return jnp.sum(log_prob, axis=(1, 2, 3))

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """Of codes that are all alike. The temperature is that of the pixels given the codes; at 0 their means."""
        del given
        code_key, pixel_key = jax.random.split(key)
        codes = jax.random.randint(code_key, (num, *config.latents), 0, config.quantizer.size)
        mean = module.apply(variables, codes, method="decode")
        return sample_logistic(pixel_key, mean, variables["params"]["log_scale"], config.levels, temperature)

    return Model(
        inputs={"image": config.image},
        init=init,
        loss=loss,
        rules=(
            *quantizer_rules(config.quantizer),
            (r"(features|latent)/kernel$", (None, None)),
            *PYRAMID_RULES,
        ),
        log_likelihood=log_likelihood,
        count=subpixels,
        bound="lower",
        latents=Input(config.latents, "int32", config.quantizer.size),
        encode=encode,
        decode=decode,
        log_likelihood_given=log_likelihood_given,
        sample=sample,
    )
