"""Autoencoders whose latents are codes: VQ-VAE (1711.00937), VQGAN (2012.09841), and their quantisers since.

The likelihood is log p(codes) + log p(image | codes), a lower bound, for an image has one code of many. Here all codes
are alike, a priori; what models them takes their place. `Adversarial` is VQGAN's loss in its place.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.adversary import Adversarial, Adversary, adversary_rules, check_adversary, onlookers
from vlm_jax.nn.autoencoder import PYRAMID_RULES, Decoder, Encoder, Pyramid, painter
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
from vlm_jax.objectives.adversarial import Onlookers, loss_of_copies
from vlm_jax.objectives.likelihood import (
    from_unit_range,
    logistic_log_prob,
    nats_to_bits_per_dim,
    sample_logistic,
    subpixels,
    to_unit_range,
)
from vlm_jax.sharding import under
from vlm_jax.trees import part


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The lower bound of the likelihood, by a logistic of each sub-pixel with a scale of each channel."""


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """An encoder, a quantiser, and a decoder."""

    network: Pyramid
    hidden: int = 256
    """Channels of what the encoder gives and the decoder reads; the quantiser's are its own."""
    quantizer: EMA | Learned | SimVQ | FSQ | LFQ | Residual
    penalty_weight: float = 1.0
    """Of the quantiser's penalty beside what else there is to the loss, in training."""
    objective: Bound | Adversarial | None = Bound()
    """None: it does not train, as the first stage of another model, and holds nothing for that."""

    def __post_init__(self) -> None:
        check_halved(self.network.widths, self.image_size)
        if isinstance(self.objective, Adversarial):
            check_adversary(self.objective, self.image_size)

    @property
    def latents(self) -> tuple[int, ...]:
        """Of codes: the map's height and width, and the books where there are several."""
        side, books = self.image_size // self.network.factor, self.quantizer.books
        return (side, side) if books == 1 else (side, side, books)


def vqgan(codes: int) -> Config:
    """For ImageNet (2012.09841; the release's `imagenet_vqgan`).

    Where the paper weights the distance of the features to the codes, the release weights that of the codes to the
    features, by 0.25: so here.
    """
    return Config(
        image_size=256,
        network=Pyramid(widths=(128, 128, 256, 256, 512), attention=(16,)),
        quantizer=Learned(size=codes, width=256, commitment=4.0),
        penalty_weight=0.25,
    )


VQGAN_F16 = vqgan(1024)
VQGAN_F16_16384 = vqgan(16_384)
LLAMAGEN_F16 = replace(VQGAN_F16, quantizer=Learned(size=16_384, width=8, unit=True), penalty_weight=1.0)
"""LlamaGen's tokenizer VQ-16 (2406.06525)."""
LLAMAGEN_F8 = replace(LLAMAGEN_F16, network=Pyramid(widths=(128, 256, 256, 512), attention=(32,)))
"""VQ-8."""
CHAMELEON_F16 = replace(vqgan(8192), image_size=512, network=replace(VQGAN_F16.network, attention=()), objective=None)
"""Chameleon's (2405.09818, section 2.1; the `vq_config` of the release's config.json)."""


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
        if isinstance(c.objective, Bound):
            self.log_scale = self.param("log_scale", nn.initializers.constant(-2.0), (c.channels,))
        elif c.objective is not None:
            self.objective = Adversary(c.objective)
        shape = (c.quantizer.size,) if c.quantizer.books == 1 else (c.quantizer.books, c.quantizer.size)
        self.age = self.variable("use", "age", lambda: jnp.full(shape, RECENT))

    def quantised(self, image: Int[Array, "B H W C"], *, train: bool = False) -> Quantised:
        x = self.encoder(to_unit_range(image, self.config.levels), train=train)
        return self.quantizer(self.features(x), train=train)

    def decode(self, codes: Int[Array, "B h w *R"]) -> Float[Array, "B H W C"]:
        """Means of the pixels, on [-1, 1]."""
        return self.decoder(self.latent(self.quantizer.look_up(codes)))

    def copied(
        self, image: Int[Array, "B H W C"], *, train: bool, painted: bool = True
    ) -> tuple[Float[Array, "B H W _"], Quantised, dict[str, Array]]:
        """Means of the pixels, or, not `painted`, what the decoder's last layer reads; the codes; how they are used."""
        found = self.quantised(image, train=train)
        use, age = use_of_codes(found.codes, self.age.value)
        if train:
            self.age.value = age
        return self.decoder(self.latent(found.value), train=train, painted=painted), found, use

    def __call__(
        self, image: Int[Array, "B H W C"], *, train: bool = False
    ) -> tuple[Float[Array, " B"], Quantised, dict[str, Array]]:
        """Of a `Bound`: log p(image | codes), the codes, and how they are used."""
        mean, found, use = self.copied(image, train=train)
        log_prob = logistic_log_prob(mean, self.log_scale, image, self.config.levels)
        return jnp.sum(log_prob, axis=(1, 2, 3)), found, use

    def initialise(self, image: Int[Array, "B H W C"]) -> None:
        """All parts."""
        pixels, _, _ = self.copied(image, train=False)
        if isinstance(self.config.objective, Adversarial):
            self.objective(pixels)


def build(config: Config) -> Model:
    """A tokenizer of images: `encode` gives codes, `decode` pixels."""
    module: Any = VQVAE(config)  # linen types what `apply` returns as a union
    nats = math.prod(config.latents) * math.log(config.quantizer.size)
    rate = nats_to_bits_per_dim(-jnp.float32(nats), config.shape)

    def init(key: Array, batch: Batch) -> Variables:
        """Codebooks begin as the centres of what the encoder makes of the batch."""
        return module.init(key, batch["image"], method="initialise")

    def applied(variables: Variables, batch: Batch, key: Array, **how: Any) -> tuple[Any, Any]:
        """What the module makes of images for a loss, and the collections after it."""
        dropout_key, code_key = jax.random.split(key)
        rngs = {"dropout": dropout_key, "codes": code_key}
        return module.apply(variables, batch["image"], rngs=rngs, mutable=nn.DenyList("params"), **how)

    def adversarial_terms(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The release's loss, means over sub-pixels; of held-out images without penalty and what a critic says."""
        goal: Any = config.objective
        (hidden, found, use), state = applied(variables, batch, key, train=train, painted=False, method="copied")
        last, x = variables["params"]["decoder"]["last"], to_unit_range(batch["image"], config.levels)
        eyes = Onlookers(*onlookers(goal, part(variables, "objective")))
        said = state["said"]["objective"]
        value, metrics, said = loss_of_copies(
            x, painter(last, hidden), last["kernel"], eyes, said, goal, step, scale=1.0, train=train
        )
        value = value + config.penalty_weight * found.penalty if train else value
        weight, state = None if train else jnp.float32(len(x)), {**state, "said": {"objective": said}}
        return value, Aux({"penalty": found.penalty, **use, **metrics}, weight, state)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative bound in bits a dimension; in training the penalty in place of the codes' rate, a constant."""
        if config.objective is None:
            raise UserError("model.objective is None, of a first stage that does not train: set it to train one")
        if not isinstance(config.objective, Bound):
            return adversarial_terms(variables, batch, key, step, train=train)
        (log_prob, found, use), state = applied(variables, batch, key, train=train)
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
        variables: Variables, image: Int[Array, "B H W C"], latents: Int[Array, "B h w *R"]
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

    goal = config.objective
    density: dict[str, Any] = {
        "log_likelihood": log_likelihood,
        "count": subpixels,
        "bound": "lower",
        "log_likelihood_given": log_likelihood_given,
        "sample": sample,
    }
    return Model(
        inputs={"image": config.image},
        init=init,
        loss=loss,
        rules=(
            *(under("objective", adversary_rules(goal)) if isinstance(goal, Adversarial) else ()),
            *quantizer_rules(config.quantizer),
            (r"(features|latent)/kernel$", (None, None)),
            *PYRAMID_RULES,
        ),
        latents=Input(config.latents, "int32", config.quantizer.size),
        encode=encode,
        decode=decode,
        **(density if isinstance(goal, Bound) else {}),
    )
