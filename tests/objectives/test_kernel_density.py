"""Kernel densities against SciPy in float64, and against the plain loop."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from vlm_jax.objectives.kernel_density import (
    discretised_log_kernel,
    gaussian_log_kernel,
    log_bin_masses,
    mixture_log_density,
)

LEVELS, PIXELS, STORED, QUERIES = 5, 3, 7, 4
RANDOM = np.random.default_rng(0)
STORED_IMAGES = RANDOM.integers(0, LEVELS, (STORED, PIXELS)).astype(np.uint8)
IMAGES = RANDOM.integers(0, LEVELS, (QUERIES, PIXELS)).astype(np.uint8)
BANDWIDTH = np.array([0.4, 1.0, 2.5], np.float32)


def expected_log_mass(value: int, centre: int, levels: int, bandwidth: float) -> float:
    """By a difference of distribution functions or, in the upper tail, of survival functions."""
    lower = -np.inf if value == 0 else (value - 0.5 - centre) / bandwidth
    upper = np.inf if value == levels - 1 else (value + 0.5 - centre) / bandwidth
    if lower > 0:
        lower, upper = -upper, -lower
    return norm.logcdf(upper) + np.log1p(-np.exp(norm.logcdf(lower) - norm.logcdf(upper)))


@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 20.0])
def test_masses_of_bins_are_those_of_scipy_and_sum_to_one(bandwidth: float):
    levels = 17
    image = np.arange(levels, dtype=np.uint8)[:, None]
    kernel = jax.jit(partial(discretised_log_kernel, levels=levels))
    log_masses = np.asarray(kernel(image, image, bandwidth=jnp.full(1, bandwidth)), np.float64)
    expected = [[expected_log_mass(x, centre, levels, bandwidth) for x in range(levels)] for centre in range(levels)]
    np.testing.assert_allclose(log_masses, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(np.exp(log_masses).sum(axis=1), 1, atol=1e-6)


def test_masses_far_from_a_narrow_kernel_are_finite_and_differentiable():
    def total(bandwidth: jax.Array) -> jax.Array:
        return sum(jnp.sum(table) for table in log_bin_masses(256, bandwidth))

    value, slope = jax.value_and_grad(total)(jnp.full(1, 0.01))
    assert jnp.isfinite(value) and jnp.isfinite(slope).all()


def test_the_discretised_kernel_is_a_product_over_pixels():
    kernel = discretised_log_kernel(jnp.asarray(IMAGES), jnp.asarray(STORED_IMAGES), LEVELS, BANDWIDTH)
    expected = [
        [sum(expected_log_mass(int(x[p]), int(centre[p]), LEVELS, BANDWIDTH[p]) for p in range(PIXELS)) for x in IMAGES]
        for centre in STORED_IMAGES
    ]
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)


def test_the_gaussian_kernel_is_a_product_over_pixels():
    kernel = gaussian_log_kernel(jnp.float32(IMAGES), jnp.float32(STORED_IMAGES), BANDWIDTH)
    expected = norm.logpdf(np.float64(IMAGES), np.float64(STORED_IMAGES)[:, None], BANDWIDTH).sum(axis=-1)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)


def log_density(chunk: int, bandwidth: jax.Array, left_out: jax.Array | None = None) -> jax.Array:
    stored = jnp.asarray(STORED_IMAGES)
    images = jnp.asarray(IMAGES) if left_out is None else stored[left_out]
    return mixture_log_density(
        lambda part: discretised_log_kernel(images, part, LEVELS, bandwidth), stored, left_out=left_out, chunk=chunk
    )


KERNEL = np.asarray(discretised_log_kernel(jnp.asarray(STORED_IMAGES), jnp.asarray(STORED_IMAGES), LEVELS, BANDWIDTH))


@pytest.mark.parametrize("chunk", [1, 3, STORED, 100])
def test_chunks_change_no_value(chunk: int):
    """Sizes that divide the stored images, that do not, and one that holds them all."""
    kernel = discretised_log_kernel(jnp.asarray(IMAGES), jnp.asarray(STORED_IMAGES), LEVELS, BANDWIDTH)
    expected = logsumexp(np.float64(kernel), axis=0) - math.log(STORED)
    np.testing.assert_allclose(log_density(chunk, BANDWIDTH), expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_density_without_one_stored_image_is_the_mean_over_the_others(chunk: int):
    left_out = np.array([5, 0, 5, 3])
    expected = [
        logsumexp([np.float64(KERNEL[i, own]) for i in range(STORED) if i != own]) - math.log(STORED - 1)
        for own in left_out
    ]
    values, slopes = jax.jvp(
        lambda h: log_density(chunk, h, jnp.asarray(left_out)), (jnp.asarray(BANDWIDTH),), (jnp.ones(3),)
    )
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert jnp.isfinite(slopes).all()
