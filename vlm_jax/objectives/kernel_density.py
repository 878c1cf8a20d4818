"""Kernel density estimation (Silverman 1986): a Gaussian at each of many stored images, as a density or as masses."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LEFT_OUT = -1e30
"""The logarithm of what a stored image that does not count adds: nothing. Finite, so that its derivative is zero."""


def log_bin_masses(levels: int, bandwidth: Float[Array, " D"]) -> tuple[Float[Array, "D V"], Float[Array, "D V"]]:
    """The log-mass that a Gaussian has in a bin of width 1 whose middle is 0, 1, ... levels - 1 from its own.

    Returns:
      That of the bin, and that of the bin with the tail beyond it, as the first and the last level have it; so the
      masses of all levels sum to one wherever the Gaussian stands.
    """
    distance = jnp.arange(levels)
    # Both ends on the lower side of the Gaussian, where log Phi is precise however far they are.
    upper, lower = (0.5 - distance) / bandwidth[:, None], (-0.5 - distance) / bandwidth[:, None]
    log_tail = jax.scipy.special.log_ndtr(upper)
    return log_tail + jnp.log(-jnp.expm1(jax.scipy.special.log_ndtr(lower) - log_tail)), log_tail


def discretised_log_kernel(
    image: Int[Array, "B D"], stored: Int[Array, "N D"], levels: int, bandwidth: Float[Array, " D"]
) -> Float[Array, "N B"]:
    """The log-probability of each image's levels under the discretised Gaussian at each stored image."""
    log_bin, log_tail = log_bin_masses(levels, bandwidth)

    def add_pixel(total: Float[Array, "N B"], pixel: tuple[Array, ...]) -> tuple[Float[Array, "N B"], None]:
        values, stored_values, log_bin, log_tail = pixel
        distance = jnp.abs(values - jnp.arange(levels)[:, None])
        edge = (values == 0) | (values == levels - 1)
        rows = jnp.where(edge, log_tail[distance], log_bin[distance])
        # A row for each level that may be stored, and then whole rows gathered: contiguous reads from a small table.
        # A product with one-hot vectors takes up to ten times as long on a CPU, where there are 256 levels.
        return total + rows[stored_values], None

    columns = image.T.astype(jnp.int32), stored.T.astype(jnp.int32), log_bin, log_tail
    return jax.lax.scan(add_pixel, jnp.zeros((len(stored), len(image))), columns)[0]


def gaussian_log_kernel(
    x: Float[Array, "B D"], stored: Float[Array, "N D"], bandwidth: Float[Array, " D"]
) -> Float[Array, "N B"]:
    """The log-density at each x of the Gaussian at each stored point."""
    x, stored = x / bandwidth, stored / bandwidth
    # In full precision: the distance is a small difference of large terms.
    products = jnp.matmul(stored, x.T, precision="highest")
    distance = jnp.sum(stored**2, axis=1)[:, None] - 2 * products + jnp.sum(x**2, axis=1)
    return -0.5 * distance - jnp.sum(jnp.log(bandwidth)) - 0.5 * math.log(2 * math.pi) * x.shape[1]


def mixture_log_density(
    log_kernel: Callable[[Int[Array, "n D"]], Float[Array, "n B"]],
    stored: Int[Array, "N D"],
    *,
    left_out: Int[Array, " B"] | None = None,
    chunk: int = 2048,
) -> Float[Array, " B"]:
    """The logarithm of the mean kernel over the stored images, computed for `chunk` of them at a time.

    Args:
      log_kernel: some of the stored images -> the log-density of each query under the kernel at each.
      left_out: for each query the index of the stored image that it is to do without: itself. The mean is then over
        the N - 1 others.
    """
    count = len(stored)
    pieces = -(-count // chunk)
    size = -(-count // pieces)
    index = jnp.arange(pieces * size).reshape(pieces, size, 1)
    padded = jnp.pad(stored, ((0, pieces * size - count), (0, 0))).reshape(pieces, size, -1)

    def piece(part: tuple[Array, Array]) -> Float[Array, " B"]:
        index, images = part
        counts = index < count if left_out is None else (index < count) & (index != left_out)
        return jax.nn.logsumexp(jnp.where(counts, log_kernel(images), LEFT_OUT), axis=0)

    log_sum = jax.nn.logsumexp(jax.lax.map(piece, (index, padded)), axis=0)
    return log_sum - math.log(count if left_out is None else count - 1)
