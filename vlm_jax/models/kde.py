"""The kernel density estimator (Parzen 1962): the training images, and one bandwidth.

Every stored image is the centre of a Gaussian, and the density is their mean. Of the levels of an image that is either
a density of its dequantised pixels or, with each pixel's Gaussian integrated over the bins of the levels, an exact
probability, far higher where most pixels are black or white. A Gaussian's deviation at a pixel is that of the pixel
over the stored images times one bandwidth (Scott 1992, section 6.3), which trains like any parameter, by the likelihood
of each stored image given the others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.images import Images
from vlm_jax.objectives.kernel_density import discretised_log_kernel, gaussian_log_kernel, mixture_log_density
from vlm_jax.objectives.likelihood import nats_to_bits_per_dim, subpixels
from vlm_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """A mean of Gaussians, one at each image of the batch that the model is initialised with."""

    kernel: Literal["discretised", "gaussian"]
    """discretised: an exact probability of levels; gaussian: a density, and by uniform dequantisation a lower bound."""
    queries: int | None = None
    """Stored images, drawn anew each step, whose likelihood given all others is the loss; None: all of them."""
    chunk: int = 2048
    """Stored images whose kernels are in memory at a time. It changes no value."""

    def __post_init__(self) -> None:
        for name in ("queries", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} of a kernel density estimator is {value}: it must be at least 1")


def pixel_deviations(image: Int[Array, "N H W C"], levels: int) -> Float[Array, "H W C"]:
    """Of each sub-pixel over the images, in levels, kept from falling much below a sixteenth of the range.

    A pixel that is black in all stored images has no deviation, and is not black in every other.
    """
    return jnp.sqrt(jnp.var(image.astype(jnp.float32), axis=0) + (levels / 16) ** 2)


def scott_factor(images: int, dimensions: int) -> float:
    """Scott's rule for the bandwidth in units of deviations: where it starts, and far too wide for images."""
    return images ** (-1 / (dimensions + 4))


def build(config: Config) -> Model:
    """A density in closed form over images, from the training images themselves."""
    shape = config.shape

    def init(key: Array, batch: Batch) -> Variables:
        """Keeps the images of the batch: make it the whole training split."""
        del key
        image = batch["image"]
        if len(image) < 2:
            raise UserError("a kernel density estimator leaves out one image of its first batch: make batch_size >= 2")
        log_bandwidth = jnp.full((), math.log(scott_factor(len(image), math.prod(shape))))
        data = {"image": image, "deviation": pixel_deviations(image, config.levels)}
        return {"params": {"log_bandwidth": log_bandwidth}, "data": data}

    def log_density(
        log_bandwidth: Float[Array, ""],
        data: Mapping[str, Array],
        image: Int[Array, "B D"],
        key: Array,
        left_out: Int[Array, " B"] | None = None,
    ) -> Float[Array, " B"]:
        """log P(image), or log p(image + u) at one draw of u."""
        bandwidth = jnp.exp(log_bandwidth) * data["deviation"].reshape(-1)
        image = constrain(image, "batch", None)

        if config.kernel == "discretised":

            def log_kernel(images: Int[Array, "n D"]) -> Float[Array, "n B"]:
                return discretised_log_kernel(image, images, config.levels, bandwidth)

        else:
            # Level x is dequantised evenly over the bin around it, x - 1/2 ... x + 1/2, in whose middle kernels stand.
            middle = (config.levels - 1) / 2
            x = image + jax.random.uniform(key, image.shape, minval=-0.5, maxval=0.5) - middle

            def log_kernel(images: Int[Array, "n D"]) -> Float[Array, "n B"]:
                return gaussian_log_kernel(x, images - middle, bandwidth)

        return mixture_log_density(log_kernel, flat(data["image"]), left_out=left_out, chunk=config.chunk)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative log-likelihood in bits a dimension: in training, of stored images, each without itself.

        The batch, which the stored images were once, then plays no part; else it is what is held out.
        """
        del step
        query_key, noise_key = jax.random.split(key)
        stored = flat(variables["data"]["image"])
        left_out = None
        if train:
            left_out = jnp.arange(len(stored))
            if config.queries is not None:
                left_out = jax.random.randint(query_key, (config.queries,), 0, len(stored))
        image = flat(batch["image"]) if left_out is None else stored[left_out]

        def bits_per_dim(log_bandwidth: Float[Array, ""]) -> Float[Array, ""]:
            log_densities = log_density(log_bandwidth, variables["data"], image, noise_key, left_out)
            return nats_to_bits_per_dim(jnp.mean(log_densities), shape)

        # There is one parameter, so its derivative comes with the value, forwards; the reverse would have to keep the
        # kernels of all chunks or to compute them twice, and to scatter into the table of masses.
        log_bandwidth = variables["params"]["log_bandwidth"]
        value, slope = jax.lax.stop_gradient(jax.jvp(bits_per_dim, (log_bandwidth,), (jnp.ones(()),)))
        value = value + slope * (log_bandwidth - jax.lax.stop_gradient(log_bandwidth))
        weight = None if train else jnp.float32(len(image))
        metrics = {"bandwidth": jnp.exp(log_bandwidth)}
        return value, Aux(metrics, weight=weight, state={"data": variables["data"]})

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        return log_density(variables["params"]["log_bandwidth"], variables["data"], flat(batch["image"]), key)

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """Stored images with noise of `temperature` times the bandwidth, rounded; at 0 they are the images."""
        del given
        choice_key, noise_key = jax.random.split(key)
        stored = variables["data"]["image"]
        bandwidth = jnp.exp(variables["params"]["log_bandwidth"]) * variables["data"]["deviation"]
        centre = stored[jax.random.randint(choice_key, (num,), 0, len(stored))]
        noise = temperature * bandwidth * jax.random.normal(noise_key, centre.shape)
        return jnp.clip(jnp.round(centre + noise), 0, config.levels - 1).astype(jnp.uint8)

    return Model(
        inputs={"image": config.image},
        init=init,
        loss=loss,
        rules=((r"log_bandwidth$", ()),),
        log_likelihood=log_likelihood,
        count=subpixels,
        bound="exact" if config.kernel == "discretised" else "lower",
        dequantisation=None if config.kernel == "discretised" else "uniform",
        sample=sample,
    )


def flat(image: Num[Array, "N H W C"]) -> Num[Array, "N D"]:
    return image.reshape(len(image), -1)
