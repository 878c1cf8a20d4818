"""Log-likelihoods of images and the divergences between Gaussians. Everything is in nats and in fp32."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MIN_LOG_SCALE = -7.0
"""Of a discretised logistic (1701.05517): sharper components only invite overflow in the gradient."""


def nats_to_bits_per_dim(nats: Float[Array, "*B"], image_shape: tuple[int, ...]) -> Float[Array, "*B"]:
    """A log-likelihood of whole images -> bits per sub-pixel, positive."""
    return -nats / (math.prod(image_shape) * math.log(2))


def subpixels(batch: Mapping[str, Array]) -> Int[Array, " B"]:
    """How many each image has: what a likelihood of images is of."""
    image = batch["image"]
    return jnp.full(len(image), math.prod(image.shape[1:]), jnp.int32)


def to_unit_range(image: Int[Array, "*B"], levels: int) -> Float[Array, "*B"]:
    """Levels 0 ... levels - 1 -> [-1, 1], evenly, both ends included."""
    return image.astype(jnp.float32) * (2 / (levels - 1)) - 1


def from_unit_range(x: Float[Array, "*B"], levels: int) -> Int[Array, "*B"]:
    """The nearest level; what lies outside [-1, 1] becomes the first or the last."""
    return jnp.clip(jnp.round((x + 1) * ((levels - 1) / 2)), 0, levels - 1).astype(jnp.uint8)


def gaussian_log_density(
    x: Float[Array, "*#B"], mean: Float[Array, "*#B"], log_variance: Float[Array, "*#B"]
) -> Float[Array, "*B"]:
    """log N(x; mean, exp(log_variance)), elementwise."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + jnp.square(x - mean) * jnp.exp(-log_variance))


def gaussian_kl(mean: Float[Array, "*#B"], log_variance: Float[Array, "*#B"]) -> Float[Array, "*B"]:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), elementwise (1312.6114, appendix B)."""
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)


def mixture_channels(mixtures: int, channels: int) -> int:
    """How many outputs a pixel of `logistic_mixture_log_prob` takes: weights, means, scales, channel coefficients."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def split_mixture(
    outputs: Float[Array, "*B O"], channels: int
) -> tuple[Float[Array, "*B K"], Float[Array, "*B K C"], Float[Array, "*B K C"], Float[Array, "*B K P"]]:
    """A network's outputs -> log weights, means, log scales, and the coefficients in (-1, 1) between channels."""
    pairs = channels * (channels - 1) // 2
    mixtures = outputs.shape[-1] // mixture_channels(1, channels)
    outputs = outputs.astype(jnp.float32).reshape(*outputs.shape[:-1], mixtures, 1 + 2 * channels + pairs)
    weights, means, log_scales, coefficients = jnp.split(outputs, [1, 1 + channels, 1 + 2 * channels], axis=-1)
    log_weights = jax.nn.log_softmax(weights[..., 0])
    return log_weights, means, jnp.maximum(log_scales, MIN_LOG_SCALE), jnp.tanh(coefficients)


def conditional_means(
    means: Float[Array, "*B K C"], coefficients: Float[Array, "*B K P"], x: Float[Array, "*B #K C"]
) -> Float[Array, "*B K C"]:
    """Each channel's mean given those before it: green += c0 red; blue += c1 red + c2 green."""
    channels, pair = x.shape[-1], 0
    columns = []
    for channel in range(channels):
        mean = means[..., channel]
        for before in range(channel):
            mean = mean + coefficients[..., pair] * x[..., before]
            pair += 1
        columns.append(mean)
    return jnp.stack(columns, axis=-1)


def logistic_mixture_log_prob(
    outputs: Float[Array, "*B O"], image: Int[Array, "*B C"], levels: int
) -> Float[Array, "*B"]:
    """log p(pixel) under a mixture of discretised logistics over its channels jointly (PixelCNN++, 1701.05517).

    The mass of a level is that of its bin of width 2 / (levels - 1) on [-1, 1]; the outermost bins absorb the tails.

    Args:
      outputs: the network's, `mixture_channels(K, C)` a pixel.
      image: values in [0, levels).
    """
    x = to_unit_range(image, levels)[..., None, :]
    log_weights, means, log_scales, coefficients = split_mixture(outputs, image.shape[-1])
    distance = x - conditional_means(means, coefficients, x)
    log_mass = logistic_log_mass(distance, log_scales, image[..., None, :], levels)
    return jax.nn.logsumexp(log_weights + jnp.sum(log_mass, axis=-1), axis=-1)


def logistic_log_mass(
    distance: Float[Array, "*#B"], log_scale: Float[Array, "*#B"], level: Int[Array, "*#B"], levels: int
) -> Float[Array, "*B"]:
    """log p(level) of a logistic discretised into bins, elementwise.

    Args:
      distance: of the level from the logistic's mean, on [-1, 1].
    """
    half_bin = 1 / (levels - 1)
    upper = (distance + half_bin) * jnp.exp(-log_scale)
    lower = (distance - half_bin) * jnp.exp(-log_scale)
    # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): exact where a plain difference cancels, so the
    # bins sum to one without PixelCNN++'s switch to a density in the tails. The width of the bin is taken from the
    # scale, not from u - l, which rounds.
    width = 2 * half_bin * jnp.exp(-log_scale)
    inside = jax.nn.log_sigmoid(upper) + jax.nn.log_sigmoid(-lower) + jnp.log(-jnp.expm1(-width))
    log_mass = jnp.where(level == 0, jax.nn.log_sigmoid(upper), inside)
    return jnp.where(level == levels - 1, jax.nn.log_sigmoid(-lower), log_mass)


def logistic_log_prob(
    mean: Float[Array, "*B C"], log_scale: Float[Array, " C"], image: Int[Array, "*B C"], levels: int
) -> Float[Array, "*B C"]:
    """log p of each sub-pixel under a discretised logistic, whose scale is that of its channel.

    Args:
      mean: on [-1, 1].
      image: values in [0, levels).
    """
    distance = to_unit_range(image, levels) - mean
    return logistic_log_mass(distance, jnp.maximum(log_scale, MIN_LOG_SCALE), image, levels)


def sample_logistic(
    key: Array, mean: Float[Array, "*B C"], log_scale: Float[Array, " C"], levels: int, temperature: float = 1.0
) -> Int[Array, "*B C"]:
    """Sub-pixels drawn from the distribution of `logistic_log_prob`; at temperature 0 the mean."""
    scale = temperature * jnp.exp(jnp.maximum(log_scale, MIN_LOG_SCALE))
    return from_unit_range(mean + scale * jax.random.logistic(key, mean.shape), levels)


def sample_logistic_mixture(
    key: Array, outputs: Float[Array, "*B O"], channels: int, levels: int, temperature: float = 1.0
) -> Int[Array, "*B C"]:
    """A pixel drawn from the distribution of `logistic_mixture_log_prob`, at temperature 1.

    Lower ones sharpen the weights and narrow the scales; at 0 it is the middle of the likeliest component.
    """
    choice_key, noise_key = jax.random.split(key)
    log_weights, means, log_scales, coefficients = split_mixture(outputs, channels)
    if temperature == 0:
        choice = jnp.argmax(log_weights, axis=-1)
    else:
        choice = jax.random.categorical(choice_key, log_weights / temperature)
    choice = choice[..., None, None]
    means, log_scales, coefficients = (
        jnp.take_along_axis(values, choice, axis=-2) for values in (means, log_scales, coefficients)
    )
    noise = temperature * jnp.exp(log_scales) * jax.random.logistic(noise_key, means.shape)
    pixel = jnp.zeros((*outputs.shape[:-1], channels), jnp.uint8)
    # Channel by channel, each rounded before the next: the likelihood conditions on levels.
    for channel in range(channels):
        x = conditional_means(means, coefficients, to_unit_range(pixel, levels)[..., None, :]) + noise
        pixel = pixel.at[..., channel].set(from_unit_range(x[..., 0, channel], levels))
    return pixel


def logistic_mixture_mean(outputs: Float[Array, "*B O"], channels: int) -> Float[Array, "*B C"]:
    """The mean of each channel on [-1, 1], bins and tails ignored: the estimate of least squared error."""
    log_weights, means, _, coefficients = split_mixture(outputs, channels)
    mean = means
    for _ in range(channels - 1):  # each round settles one more channel
        mean = conditional_means(means, coefficients, mean)
    return jnp.clip(jnp.sum(jnp.exp(log_weights)[..., None] * mean, axis=-2), -1, 1)
