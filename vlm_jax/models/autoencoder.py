"""The autoencoder of latent diffusion (2112.10752): a variational one whose latents are a map, KL-f4, -f8 and -f16.

By default it learns from the evidence lower bound, with a logistic for each sub-pixel, so that two stages have a
likelihood in bits; `Adversarial` is the release's loss in its place. What `encode` returns has mean 0 and variance 1 in
each channel, by moments that are measured as it trains and kept beside the parameters.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.adversary import Adversarial, Adversary, adversary_rules, check_adversary, onlookers
from vlm_jax.nn.autoencoder import PYRAMID_RULES, Decoder, Encoder, Pyramid, painter
from vlm_jax.nn.convolution import check_halved
from vlm_jax.nn.images import Images
from vlm_jax.objectives.adversarial import Onlookers, loss_of_copies
from vlm_jax.objectives.likelihood import (
    from_unit_range,
    gaussian_kl,
    gaussian_log_density,
    logistic_log_prob,
    nats_to_bits_per_dim,
    sample_logistic,
    subpixels,
    to_unit_range,
)
from vlm_jax.sharding import under
from vlm_jax.trees import part

MOMENTUM = 0.99
"""Of the moments of the latents."""
LOG_VARIANCE = (-30.0, 20.0)
"""Of the posterior: the release's bounds."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The evidence lower bound, by a logistic of each sub-pixel with a scale of each channel."""

    kl_weight: float = 1.0
    """Of the divergence in the loss of training; 1: the bound itself. Less leaves more to what models the latents."""


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """An encoder, a Gaussian map of latents, and a decoder."""

    network: Pyramid
    latent: int = 4
    """Channels of the latents."""
    objective: Bound | Adversarial | None = Bound()
    """None: it does not train, as the first stage of another model, and holds nothing for that."""

    def __post_init__(self) -> None:
        check_halved(self.network.widths, self.image_size)
        if isinstance(self.objective, Adversarial):
            check_adversary(self.objective, self.image_size)

    @property
    def latents(self) -> tuple[int, int, int]:
        side = self.image_size // self.network.factor
        return side, side, self.latent


KL_F4 = Config(image_size=256, network=Pyramid(widths=(128, 256, 512)), latent=3)
"""2112.10752, appendix D.4 and table 8; the release's `autoencoder_kl_64x64x3`."""
SD_VAE = Config(image_size=256, network=Pyramid())
"""Stable Diffusion's, KL-f8 (2112.10752): 83,653,863 parameters, and a scale of each channel of pixels."""
KL_F16 = Config(image_size=256, network=Pyramid(widths=(128, 128, 256, 256, 512), attention=(16,)), latent=16)
"""The release's `autoencoder_kl_16x16x16`."""


class Terms(NamedTuple):
    """Of the bound at one draw of the latents, nats of an image."""

    latents: Float[Array, "B h w Z"]
    """As the decoder reads them."""
    log_prob: Float[Array, " B"]
    """log p(x | z)."""
    log_posterior: Float[Array, " B"]
    """log q(z | x)."""
    divergence: Float[Array, " B"]
    """KL(q || N(0, 1)), in closed form."""


class Autoencoder(nn.Module):
    """Encoder and decoder. Noise is the caller's."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c.network, 2 * c.latent)
        self.posterior = nn.Dense(2 * c.latent)
        self.latent = nn.Dense(c.latent)
        self.decoder = Decoder(c.network, c.channels)
        if isinstance(c.objective, Bound):
            self.log_scale = self.param("log_scale", nn.initializers.constant(-2.0), (c.channels,))
        elif c.objective is not None:
            self.objective = Adversary(c.objective)
        self.mean = self.variable("moments", "mean", jnp.zeros, (c.latent,))
        self.square = self.variable("moments", "square", jnp.ones, (c.latent,))

    def encode(
        self, image: Int[Array, "B H W C"], *, train: bool = False
    ) -> tuple[Float[Array, "B h w Z"], Float[Array, "B h w Z"]]:
        """Mean and log-variance of the latents, as the decoder reads them."""
        x = self.posterior(self.encoder(to_unit_range(image, self.config.levels), train=train))
        mean, log_variance = jnp.split(x, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def decode(self, z: Float[Array, "B h w Z"], *, train: bool = False) -> Float[Array, "B H W C"]:
        """Means of the pixels, on [-1, 1]."""
        return self.decoder(self.latent(z), train=train)

    def moments(self) -> tuple[Float[Array, " Z"], Float[Array, " Z"]]:
        """Mean and deviation of the latents over images and positions."""
        variance = jnp.maximum(self.square.value - jnp.square(self.mean.value), 1e-6)
        return self.mean.value, jnp.sqrt(variance)

    def measure(self, z: Float[Array, "B h w Z"]) -> None:
        """Moves the moments towards those of a batch."""
        z = jax.lax.stop_gradient(z)
        for moment, value in ((self.mean, z), (self.square, jnp.square(z))):
            moment.value = MOMENTUM * moment.value + (1 - MOMENTUM) * jnp.mean(value, axis=(0, 1, 2))

    def draw(
        self, image: Int[Array, "B H W C"], noise: Float[Array, "B h w Z"], *, train: bool
    ) -> tuple[Float[Array, "B h w Z"], Float[Array, "B h w Z"], Float[Array, "B h w Z"]]:
        """Latents at mean + deviation * noise, log q of them, and KL(q || N(0, 1)), elementwise."""
        mean, log_variance = self.encode(image, train=train)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        if train:
            self.measure(z)
        return z, gaussian_log_density(z, mean, log_variance), gaussian_kl(mean, log_variance)

    def __call__(self, image: Int[Array, "B H W C"], noise: Float[Array, "B h w Z"], *, train: bool = False) -> Terms:
        """Of a `Bound`."""
        z, log_posterior, divergence = self.draw(image, noise, train=train)
        log_prob = logistic_log_prob(self.decode(z, train=train), self.log_scale, image, self.config.levels)
        return Terms(z, *(jnp.sum(each, axis=(1, 2, 3)) for each in (log_prob, log_posterior, divergence)))

    def hidden(
        self, image: Int[Array, "B H W C"], noise: Float[Array, "B h w Z"], *, train: bool = False
    ) -> tuple[Float[Array, "B H W D"], Float[Array, " B"]]:
        """What the decoder's last layer reads, and KL(q || N(0, 1)): what an `Adversarial` loss needs."""
        z, _, divergence = self.draw(image, noise, train=train)
        x = self.decoder(self.latent(z), train=train, painted=False)
        return x, jnp.sum(divergence, axis=(1, 2, 3))

    def initialise(self, image: Int[Array, "B H W C"]) -> None:
        """All parts: `hidden` leaves out the last layer, and who looks at it."""
        mean, _ = self.encode(image)
        pixels = self.decode(mean)
        if isinstance(self.config.objective, Adversarial):
            self.objective(pixels)


def build(config: Config) -> Model:
    """A latent-variable model of images: its likelihood is bounded from below."""
    module: Any = Autoencoder(config)  # linen types what `apply` returns as a union

    def noise_like(image: Int[Array, "B H W C"], key: Array) -> Float[Array, "B h w Z"]:
        return jax.random.normal(key, (len(image), *config.latents))

    def init(key: Array, batch: Batch) -> Variables:
        variables: Variables = module.init(key, batch["image"], method="initialise")
        return variables

    def applied(
        variables: Variables, image: Int[Array, "B H W C"], key: Array, *, train: bool, method: str | None = None
    ) -> tuple[Any, Any]:
        """What the module makes of images for a loss, and the collections after it."""
        noise_key, dropout_key = jax.random.split(key)
        return module.apply(
            variables,
            image,
            noise_like(image, noise_key),
            train=train,
            rngs={"dropout": dropout_key},
            mutable=nn.DenyList("params"),
            method=method,
        )

    def adversarial_terms(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The release's loss over the number of sub-pixels; of held-out images without what a critic says."""
        goal: Any = config.objective
        (hidden, divergence), state = applied(variables, batch["image"], key, train=train, method="hidden")
        last, x = variables["params"]["decoder"]["last"], to_unit_range(batch["image"], config.levels)
        eyes = Onlookers(*onlookers(goal, part(variables, "objective")))
        said, size = state["said"]["objective"], math.prod(config.shape)
        value, metrics, said = loss_of_copies(
            x, painter(last, hidden), last["kernel"], eyes, said, goal, step, scale=float(size), train=train
        )
        rate = jnp.mean(divergence) / size
        weight, state = None if train else jnp.float32(len(x)), {**state, "said": {"objective": said}}
        return value + goal.kl_weight * rate, Aux(metrics | {"rate": rate}, weight, state)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative evidence lower bound in bits a dimension, its divergence in training of the config's weight."""
        if config.objective is None:
            raise UserError("model.objective is None, of a first stage that does not train: set it to train one")
        if not isinstance(config.objective, Bound):
            return adversarial_terms(variables, batch, key, step, train=train)
        found, state = applied(variables, batch["image"], key, train=train)
        rate = nats_to_bits_per_dim(-jnp.mean(found.divergence), config.shape)
        distortion = nats_to_bits_per_dim(jnp.mean(found.log_prob), config.shape)
        metrics = {"rate_bits_per_dim": rate, "distortion_bits_per_dim": distortion}
        weight = config.objective.kl_weight if train else 1.0
        return weight * rate + distortion, Aux(metrics, jnp.float32(len(batch["image"])), state)

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """E_q log p(x | z) - KL(q || p), the prior standard normal."""
        found = module.apply(variables, batch["image"], noise_like(batch["image"], key))
        return found.log_prob - found.divergence

    def log_weight(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """log p(x, z) / q(z | x)."""
        found = module.apply(variables, batch["image"], noise_like(batch["image"], key))
        log_prior = jnp.sum(gaussian_log_density(found.latents, jnp.zeros(()), jnp.zeros(())), axis=(1, 2, 3))
        return found.log_prob + log_prior - found.log_posterior

    def posterior(
        variables: Variables, image: Int[Array, "B H W C"]
    ) -> tuple[Float[Array, "B h w Z"], Float[Array, "B h w Z"]]:
        """Mean and log-variance of what `encode` draws."""
        mean, log_variance = module.apply(variables, image, method="encode")
        shift, scale = module.apply(variables, method="moments")
        return (mean - shift) / scale, log_variance - 2 * jnp.log(scale)

    def encode(variables: Variables, image: Int[Array, "B H W C"], key: Array | None = None) -> Float[Array, "B h w Z"]:
        """The posterior's mean, or a draw from it, less the mean of all and over their deviation."""
        mean, log_variance = posterior(variables, image)
        return mean if key is None else mean + jnp.exp(0.5 * log_variance) * noise_like(image, key)

    def log_likelihood_given(
        variables: Variables, image: Int[Array, "B H W C"], latents: Float[Array, "B h w Z"]
    ) -> Float[Array, " B"]:
        shift, scale = module.apply(variables, method="moments")
        mean = module.apply(variables, latents * scale + shift, method="decode")
        log_prob = logistic_log_prob(mean, variables["params"]["log_scale"], image, config.levels)
        return jnp.sum(log_prob, axis=(1, 2, 3))

    def decode(variables: Variables, latents: Float[Array, "B h w Z"]) -> Int[Array, "B H W C"]:
        """The mean of each pixel."""
        shift, scale = module.apply(variables, method="moments")
        return from_unit_range(module.apply(variables, latents * scale + shift, method="decode"), config.levels)

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """Of the standard normal prior. The temperature is that of the pixels given the latents; at 0 their means."""
        del given
        latent_key, pixel_key = jax.random.split(key)
        z = jax.random.normal(latent_key, (num, *config.latents))
        mean = module.apply(variables, z, method="decode")
        return sample_logistic(pixel_key, mean, variables["params"]["log_scale"], config.levels, temperature)

    goal = config.objective
    density: dict[str, Any] = {
        "log_likelihood": log_likelihood,
        "count": subpixels,
        "bound": "lower",
        "log_weight": log_weight,
        "log_likelihood_given": log_likelihood_given,
        "sample": sample,
    }
    return Model(
        inputs={"image": config.image},
        init=init,
        loss=loss,
        rules=(
            *(under("objective", adversary_rules(goal)) if isinstance(goal, Adversarial) else ()),
            (r"(posterior|latent)/kernel$", (None, None)),
            *PYRAMID_RULES,
        ),
        latents=Input(config.latents, "float32"),
        encode=encode,
        decode=decode,
        posterior=posterior,
        **(density if isinstance(goal, Bound) else {}),
    )
