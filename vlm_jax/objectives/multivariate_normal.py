"""Multivariate normal densities and conditionals from a Cholesky factor (Rasmussen & Williams 2006, appendix A)."""

import math

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float


def log_density(x: Float[Array, "B D"], mean: Float[Array, " D"], cholesky: Float[Array, "D D"]) -> Float[Array, " B"]:
    """log N(x; mean, L L^T), L lower triangular with a positive diagonal."""
    white = solve_triangular(cholesky, (x - mean).T, lower=True)
    # Not jnp.diagonal, which branches under jit.
    half_log_determinant = jnp.sum(jnp.log(jnp.where(jnp.eye(len(mean), dtype=bool), cholesky, 1.0)))
    return -0.5 * jnp.sum(white**2, axis=0) - half_log_determinant - 0.5 * len(mean) * math.log(2 * math.pi)


def condition(
    first: Float[Array, "B K"], mean: Float[Array, " D"], cholesky: Float[Array, "D D"]
) -> tuple[Float[Array, "B U"], Float[Array, "U U"]]:
    """The last U of D coordinates given the first K: their means, and the Cholesky factor of their covariance.

    With the factor's blocks L_kk, L_uk and L_uu the mean is m_u + L_uk L_kk^-1 (x_k - m_k), which is
    m_u + K_uk K_kk^-1 (x_k - m_k), and the covariance K_uu - K_uk K_kk^-1 K_ku is L_uu L_uu^T.
    """
    k = first.shape[1]
    white = solve_triangular(cholesky[:k, :k], (first - mean[:k]).T, lower=True)
    return mean[k:] + jnp.matmul(cholesky[k:, :k], white, precision="highest").T, cholesky[k:, k:]
