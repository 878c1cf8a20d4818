"""Codebooks: the nearest code, centres of features, gradients past a code, and how many codes are in use."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Gradient = Literal["straight_through", "rotation"]
"""How the gradient of a code's vector becomes the features': as it is (1711.00937), or turned and stretched as the
features are to become the vector (2410.06424)."""
LLOYD = 10
"""Steps of k-means by which a codebook begins."""
RECENT = 65_536.0
"""Tokens within which a code must have been seen to count as in use."""


def nearest(z: Float[Array, "*B D"], vectors: Float[Array, "K D"]) -> Int[Array, "*B"]:
    """Of the vectors the nearest, in fp32."""
    z, vectors = jnp.asarray(z, jnp.float32), jnp.asarray(vectors, jnp.float32)
    # |z|^2 is the same for all of them.
    products = jnp.einsum("...d,kd->...k", z, vectors, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(jnp.square(vectors), axis=-1) - 2 * products, axis=-1).astype(jnp.int32)


def clusters(
    z: Float[Array, "N D"], codes: Int[Array, " N"], size: int
) -> tuple[Float[Array, " K"], Float[Array, "K D"]]:
    """How many features each code has, and their sum."""
    ones = jnp.ones(len(z), jnp.float32)
    return jax.ops.segment_sum(ones, codes, size), jax.ops.segment_sum(z.astype(jnp.float32), codes, size)


def k_means(key: Array, z: Float[Array, "N D"], size: int) -> tuple[Float[Array, "K D"], Float[Array, " K"]]:
    """The centres of features, and how many belong to each, after some of Lloyd's steps.

    They begin as features drawn at random, the same one several times only where there are too few, and then a little
    apart. One that has no feature stays where it was.
    """
    choice_key, noise_key = jax.random.split(key)
    z = jnp.asarray(z, jnp.float32)
    chosen = jax.random.permutation(choice_key, len(z))[jnp.arange(size) % len(z)]
    apart = 1e-2 * (jnp.std(z, axis=0) + 1e-6) * jax.random.normal(noise_key, (size, z.shape[1]))
    start = z[chosen] + jnp.where((jnp.arange(size) < len(z))[:, None], 0, apart)

    def step(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, _ = carry
        count, total = clusters(z, nearest(z, centres), size)
        return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1)[:, None], centres), count

    return jax.lax.fori_loop(0, LLOYD, step, (start, jnp.zeros(size)))


def unit_length(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def with_gradient(
    z: Float[Array, "*B D"], q: Float[Array, "*B D"], gradient: Gradient = "straight_through"
) -> Float[Array, "*B D"]:
    """The value of `q`, with a gradient for `z` alone."""
    z, q = z.astype(jnp.float32), jax.lax.stop_gradient(q.astype(jnp.float32))
    still = jax.lax.stop_gradient(z)
    if gradient == "straight_through":
        return q + (z - still)
    size = jnp.linalg.norm(still, axis=-1, keepdims=True) + 1e-6
    ratio = jnp.linalg.norm(q, axis=-1, keepdims=True) / size
    z_hat, q_hat = still / size, unit_length(q)
    r = unit_length(z_hat + q_hat)

    def along(direction: Array, by: Array) -> Array:
        return direction * jnp.sum(by * z, axis=-1, keepdims=True)

    turned = ratio * (z - 2 * along(r, r) + 2 * along(q_hat, z_hat))  # which is q but for rounding
    return q + (turned - jax.lax.stop_gradient(turned))


def squares(x: Float[Array, "*B D"], y: Float[Array, "*B D"]) -> Float[Array, ""]:
    """The mean squared difference, whose gradient is that of `x`."""
    return jnp.mean(jnp.square(x - jax.lax.stop_gradient(y)))


def use_of_codes(codes: Int[Array, "*C"], age: Float[Array, "*R K"]) -> tuple[dict[str, Array], Float[Array, "*R K"]]:
    """How many of the codes are in use, as a share, and the perplexity of those of a batch.

    Args:
      codes: of one book, [*B], or of several, [*B, R], of which the figures are means.
      age: tokens since each code was last seen, at most `RECENT`.

    Returns:
      The two figures, and the age after these codes.
    """
    books = codes.reshape(-1, *age.shape[:-1])
    seen = jnp.zeros(age.shape)
    at = (books,) if age.ndim == 1 else (jnp.arange(len(age)), books)
    seen = seen.at[at].add(1.0)
    age = jnp.where(seen > 0, 0, jnp.minimum(age + len(books), RECENT))
    p = seen / len(books)
    perplexity = jnp.exp(-jnp.sum(p * jnp.log(p + 1e-10), axis=-1))
    return {"code_use": jnp.mean(age < RECENT), "code_perplexity": jnp.mean(perplexity)}, age
