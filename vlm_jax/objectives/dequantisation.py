"""From integer levels to a continuous density and back. Everything is in nats and in fp32.

A density p of x + u, with u in [0, 1), bounds the probability of the integers x: log P(x) >= E_q[log p(x + u) -
log q(u | x)], and p(x + u) / q(u | x) is an unbiased estimate of P(x) (1511.01844; 1902.00275). Whatever maps x + u to
the range that a flow likes belongs to p, with the logarithm of its Jacobian determinant.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Image = Float[Array, "B H W C"]


def standard_normal_log_density(z: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """log N(z; 0, 1), summed over all but the first axis."""
    return -0.5 * jnp.sum(jnp.square(z) + math.log(2 * math.pi), axis=range(1, z.ndim))


def to_symmetric(image: Int[Array, "B H W C"], noise: Image, levels: int) -> tuple[Image, Float[Array, " B"]]:
    """2 (x + u) / levels - 1, in [-1, 1), and the log-determinant: -log 128 a sub-pixel of 256 levels."""
    y = (image.astype(jnp.float32) + noise) * (2 / levels) - 1
    return y, jnp.full(len(image), math.prod(image.shape[1:]) * math.log(2 / levels))


def from_symmetric(y: Image, levels: int) -> Int[Array, "B H W C"]:
    """The level whose bin holds `y`; what lies outside [-1, 1) becomes the first or the last."""
    return to_level((y + 1) / 2, levels)


def to_logit(
    image: Int[Array, "B H W C"], noise: Image, levels: int, margin: float
) -> tuple[Image, Float[Array, " B"]]:
    """logit(margin + (1 - 2 margin) (x + u) / levels), and the log-determinant (RealNVP, 1605.08803).

    For data that saturate: a density that is smooth on the whole line then ends where the levels do.
    """
    inside = 1 - 2 * margin
    p = margin + inside * (image.astype(jnp.float32) + noise) / levels
    log_p, log_q = jnp.log(p), jnp.log1p(-p)
    return log_p - log_q, jnp.sum(math.log(inside / levels) - log_p - log_q, axis=(1, 2, 3))


def from_logit(y: Image, levels: int, margin: float) -> Int[Array, "B H W C"]:
    """The level whose bin holds `y`; what lies outside all becomes the first or the last."""
    return to_level((jax.nn.sigmoid(y) - margin) / (1 - 2 * margin), levels)


def to_level(fraction: Image, levels: int) -> Int[Array, "B H W C"]:
    """[0, 1) in `levels` equal bins."""
    return jnp.clip(jnp.floor(fraction * levels), 0, levels - 1).astype(jnp.uint8)


def squash(v: Float[Array, "B ..."]) -> tuple[Float[Array, "B ..."], Float[Array, " B"]]:
    """u = sigmoid(v), noise in (0, 1) of the whole line, and the log-determinant."""
    log_det = jax.nn.log_sigmoid(v) + jax.nn.log_sigmoid(-v)
    return jax.nn.sigmoid(v), jnp.sum(log_det, axis=range(1, v.ndim))
