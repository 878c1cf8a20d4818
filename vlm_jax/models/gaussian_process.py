"""A Gaussian process over the pixel grid (Rasmussen & Williams 2006): every image is one draw of it, and noise.

The covariance of two pixels falls with their distance, and that of their channels is free: K = K_pixels (x) A A^T,
with a mean for each sub-pixel. It is a density of the dequantised levels, y = (x + u) / levels with u uniform on
[0, 1), so that log P(x) >= E_u log p(y) - D log(levels). All hyperparameters train by the exact marginal likelihood:
one Cholesky factor of the D x D covariance serves all images. The same factor completes images.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.images import Images
from vlm_jax.objectives.dequantisation import to_level
from vlm_jax.objectives.likelihood import nats_to_bits_per_dim, subpixels
from vlm_jax.objectives.multivariate_normal import condition, log_density
from vlm_jax.sharding import constrain

JITTER = 1e-5
"""Added to the noise's variance, on the scale where levels span [0, 1]: the least that factors safely in float32."""


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """A stationary kernel over the pixels of a square image."""

    kernel: Literal["rbf", "matern12", "matern32", "matern52"]
    """Of the squared exponential or, with the smoothness 1/2, 3/2 or 5/2, of Matern."""

    def __post_init__(self) -> None:
        if min(self.image_size, self.channels) < 1 or self.levels < 2:
            raise UserError(
                f"a Gaussian process needs at least 1 pixel, 1 channel and 2 levels, not image_size={self.image_size}, "
                f"channels={self.channels}, levels={self.levels}"
            )


def correlation(kernel: str, squared_distance: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The correlation at a distance in units of the length scale (Rasmussen & Williams, equations 4.9 and 4.17)."""
    if kernel == "rbf":
        return jnp.exp(-0.5 * squared_distance)
    # The root has no finite slope at zero, where the correlation has none that matters.
    apart = squared_distance > 0
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared_distance, 1.0)), 0.0)
    if kernel == "matern12":
        return jnp.exp(-distance)
    if kernel == "matern32":
        scaled = math.sqrt(3) * distance
        return (1 + scaled) * jnp.exp(-scaled)
    scaled = math.sqrt(5) * distance
    return (1 + scaled + scaled**2 / 3) * jnp.exp(-scaled)


def covariance(config: Config, params: Variables) -> Float[Array, "D D"]:
    """Of the sub-pixels of an image in raster order, channels last, with the noise."""
    grid = np.indices((config.image_size, config.image_size), np.float32).reshape(2, -1).T
    offsets = (grid[:, None] - grid) / jnp.exp(params["log_length_scale"])
    pixels = correlation(config.kernel, jnp.sum(offsets**2, axis=-1))
    channels = jnp.matmul(params["channel_factor"], params["channel_factor"].T, precision="highest")
    noise = jnp.exp(2 * params["log_noise"]) + JITTER
    return jnp.kron(pixels, channels) + noise * jnp.eye(len(grid) * config.channels)


def build(config: Config) -> Model:
    """A density in closed form over images, which can be conditioned on any of their pixels."""
    shape = config.shape
    dimensions = math.prod(shape)

    def init(key: Array, batch: Batch) -> Variables:
        """The mean and the variance are those of the batch, the latter shared by signal and noise, four to one."""
        del key
        y = centres(batch["image"])
        mean = jnp.mean(y, axis=0)
        deviation = jnp.maximum(jnp.sqrt(jnp.mean((y - mean) ** 2)), 1 / config.levels)
        params = {
            "mean": mean,
            "channel_factor": math.sqrt(0.8) * deviation * jnp.eye(config.channels),
            "log_length_scale": jnp.full(2, math.log(2.0)),
            "log_noise": jnp.log(math.sqrt(0.2) * deviation),
        }
        return {"params": params}

    def centres(image: Int[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Each level as the middle of its bin of [0, 1]."""
        return (image.reshape(len(image), dimensions) + 0.5) / config.levels

    def to_image(y: Float[Array, "B D"]) -> Int[Array, "B H W C"]:
        """The level whose bin of [0, 1] a value is in, or is next to."""
        return to_level(y.reshape(-1, *shape), config.levels)

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """log p(y) - D log(levels) at one draw of the dequantisation."""
        y = constrain(centres(batch["image"]), "batch", None)
        y = y + jax.random.uniform(key, y.shape, minval=-0.5, maxval=0.5) / config.levels
        cholesky = jnp.linalg.cholesky(covariance(config, variables["params"]))
        return log_density(y, variables["params"]["mean"], cholesky) - dimensions * math.log(config.levels)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative log marginal likelihood in bits a dimension."""
        del step, train
        value = nats_to_bits_per_dim(jnp.mean(log_likelihood(variables, batch, key)), shape)
        rows, columns = jnp.exp(variables["params"]["log_length_scale"])
        noise = config.levels * jnp.exp(variables["params"]["log_noise"])
        metrics = {"length_scale_rows": rows, "length_scale_columns": columns, "noise_levels": noise}
        return value, Aux(metrics, weight=jnp.float32(len(batch["image"])))

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """Draws with `temperature` times their deviation from the mean; at 0 they are the mean."""
        del given
        cholesky = jnp.linalg.cholesky(covariance(config, variables["params"]))
        noise = jax.random.normal(key, (num, dimensions))
        return to_image(variables["params"]["mean"] + temperature * jnp.matmul(noise, cholesky.T, precision="highest"))

    def complete(
        variables: Variables,
        key: Array,
        image: Int[Array, "B H W C"],
        known: Bool[np.ndarray, "H W"],
        *,
        temperature: float = 1.0,
    ) -> Int[Array, "B H W C"]:
        """Draws from the pixels' Gaussian given those that are known, noise included; at temperature 0 its mean."""
        mask = np.repeat(known.reshape(-1), config.channels)
        given, wanted = np.flatnonzero(mask), np.flatnonzero(~mask)
        order = np.concatenate([given, wanted])
        cholesky = jnp.linalg.cholesky(covariance(config, variables["params"])[order][:, order])
        mean, factor = condition(centres(image)[:, given], variables["params"]["mean"][order], cholesky)
        noise = temperature * jax.random.normal(key, (len(image), len(wanted)))
        y = (
            jnp.zeros((len(image), dimensions))
            .at[:, wanted]
            .set(mean + jnp.matmul(noise, factor.T, precision="highest"))
        )
        return jnp.where(known[..., None], image, to_image(y))

    return Model(
        inputs={"image": config.image},
        init=init,
        loss=loss,
        rules=(
            (r"mean$", ("embed",)),
            (r"channel_factor$", (None, None)),
            (r"log_length_scale$", (None,)),
            (r"log_noise$", ()),
        ),
        log_likelihood=log_likelihood,
        count=subpixels,
        bound="lower",
        dequantisation="uniform",
        sample=sample,
        complete=complete,
    )
