"""Multivariate normal densities against SciPy's, and conditionals against the textbook's inverse."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from vlm_jax.objectives.multivariate_normal import condition, log_density

RANDOM = np.random.default_rng(0)
FACTOR = RANDOM.normal(size=(6, 6))
COVARIANCE = FACTOR @ FACTOR.T + 0.5 * np.eye(6)
MEAN = RANDOM.normal(size=6)
X = RANDOM.normal(size=(5, 6))
CHOLESKY = jnp.float32(np.linalg.cholesky(COVARIANCE))


def test_the_log_density_is_that_of_scipy():
    expected = multivariate_normal(MEAN, COVARIANCE).logpdf(X)
    np.testing.assert_allclose(log_density(jnp.float32(X), jnp.float32(MEAN), CHOLESKY), expected, rtol=1e-5)


@pytest.mark.parametrize("known", [0, 1, 4, 6])
def test_the_conditional_is_that_of_the_textbook(known: int):
    k, u = slice(None, known), slice(known, None)
    mean, factor = condition(jnp.float32(X[:, k]), jnp.float32(MEAN), CHOLESKY)
    weights = COVARIANCE[u, k] @ np.linalg.inv(COVARIANCE[k, k])
    np.testing.assert_allclose(mean, MEAN[u] + (X[:, k] - MEAN[k]) @ weights.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(factor @ factor.T, COVARIANCE[u, u] - weights @ COVARIANCE[k, u], rtol=1e-4, atol=1e-5)


def test_densities_of_first_and_last_given_first_multiply_to_that_of_all():
    x, mean = jnp.float32(X), jnp.float32(MEAN)
    first = log_density(x[:, :2], mean[:2], CHOLESKY[:2, :2])
    conditional_mean, factor = condition(x[:, :2], mean, CHOLESKY)
    last = log_density(x[:, 2:] - conditional_mean, jnp.zeros(4), factor)
    np.testing.assert_allclose(first + last, log_density(x, mean, CHOLESKY), rtol=1e-5)
