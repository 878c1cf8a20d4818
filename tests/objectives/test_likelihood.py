"""Likelihoods of levels sum to one, agree with the published formula, and are what the sampler draws from."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from vlm_jax.objectives.likelihood import (
    from_unit_range,
    gaussian_kl,
    gaussian_log_density,
    logistic_mixture_log_prob,
    logistic_mixture_mean,
    mixture_channels,
    nats_to_bits_per_dim,
    sample_logistic_mixture,
    to_unit_range,
)

MIXTURES = 3

log_prob = jax.jit(logistic_mixture_log_prob, static_argnums=2)


def all_pixels(channels: int, levels: int) -> np.ndarray:
    return np.array(list(itertools.product(range(levels), repeat=channels)), np.uint8)


def random_outputs(channels: int, *, mean: float = 1.0, log_scale: float = -1.0, count: int = 16) -> np.ndarray:
    """A network's outputs: for each mixture its weight, means, log scales and coefficients between channels."""
    outputs = np.random.default_rng(channels).normal(size=(count, MIXTURES, mixture_channels(1, channels)))
    outputs[..., 1 : 1 + channels] *= mean
    outputs[..., 1 + channels : 1 + 2 * channels] += log_scale
    return outputs.reshape(count, -1).astype(np.float32)


@jax.jit(static_argnames="levels")
def log_probs_of_all(outputs: jax.Array, pixels: jax.Array, levels: int) -> jax.Array:
    """[pixels, outputs]"""
    shape = (len(pixels), len(outputs))
    pixels = jnp.broadcast_to(pixels[:, None], (*shape, pixels.shape[-1]))
    return logistic_mixture_log_prob(jnp.broadcast_to(outputs, (*shape, outputs.shape[-1])), pixels, levels)


@pytest.mark.parametrize(("mean", "log_scale"), [(1, -1), (1, -7), (1, -20), (1e4, -7), (1e4, 0), (1, 20)])
@pytest.mark.parametrize(("channels", "levels"), [(1, 17), (1, 256), (3, 3)])
def test_probabilities_of_all_levels_sum_to_one(channels: int, levels: int, mean: float, log_scale: float):
    outputs = random_outputs(channels, mean=mean, log_scale=log_scale)
    log_probs = log_probs_of_all(outputs, all_pixels(channels, levels), levels)
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_probs), axis=0), 1, atol=1e-5)


@pytest.mark.parametrize(("mean", "log_scale"), [(1, -7), (1e4, -7), (1e4, 0), (1, 20)])
@pytest.mark.parametrize(("channels", "levels"), [(1, 256), (3, 3)])
def test_gradients_are_finite_at_the_extremes(channels: int, levels: int, mean: float, log_scale: float):
    def total(outputs: jax.Array) -> jax.Array:
        return jnp.sum(log_probs_of_all(outputs, all_pixels(channels, levels), levels))

    gradient = jax.jit(jax.grad(total))(random_outputs(channels, mean=mean, log_scale=log_scale))
    assert jnp.isfinite(gradient).all()


def pixel_cnn_log_prob(outputs: np.ndarray, pixel: np.ndarray, levels: int) -> float:
    """PixelCNN++'s formula (1701.05517, section 2.1) for one RGB pixel in float64; its bins are 2/255 wide for 256."""
    outputs = outputs.reshape(MIXTURES, 10).astype(np.float64)
    red, green, blue = 2 * pixel.astype(np.float64) / (levels - 1) - 1
    log_weights = outputs[:, 0] - scipy.special.logsumexp(outputs[:, 0])
    log_probs = log_weights
    c0, c1, c2 = np.tanh(outputs[:, 7:]).T
    means = (outputs[:, 1], outputs[:, 2] + c0 * red, outputs[:, 3] + c1 * red + c2 * green)
    for value, x, mean, log_scale in zip(pixel, (red, green, blue), means, outputs[:, 4:7].T, strict=True):
        upper = scipy.special.expit((x + 1 / (levels - 1) - mean) / np.exp(log_scale))
        lower = scipy.special.expit((x - 1 / (levels - 1) - mean) / np.exp(log_scale))
        log_probs = log_probs + np.log((1 if value == levels - 1 else upper) - (0 if value == 0 else lower))
    return scipy.special.logsumexp(log_probs)


def test_rgb_pixels_have_the_published_probability():
    """At scales for which the formula's plain difference of sigmoids is accurate in float64."""
    outputs = random_outputs(3, log_scale=-3.0, count=64) / 2
    pixels = np.random.default_rng(1).integers(0, 256, (64, 3)).astype(np.uint8)
    pixels[0], pixels[1], pixels[2] = 0, 255, (0, 128, 255)
    expected = [pixel_cnn_log_prob(o, pixel, 256) for o, pixel in zip(outputs, pixels, strict=True)]
    np.testing.assert_allclose(log_prob(outputs, pixels, 256), expected, rtol=1e-5)


@pytest.mark.parametrize(("mean", "log_scale"), [(3.0, -3.0), (-3.0, -3.0), (0.0, -7.0), (1e4, 9.0), (0.0, 12.0)])
def test_tails_and_wide_scales_have_their_exact_probability(mean: float, log_scale: float):
    """Where a difference of sigmoids cancels in float32, and where PixelCNN++ takes a density instead."""
    x = np.linspace(-1, 1, 256)[1:-1]
    upper, lower = ((x - mean + side / 255) * np.exp(-log_scale) for side in (1, -1))
    swapped = upper + lower > 0  # the smaller sigmoids of the two have the more exact difference
    upper, lower = np.where(swapped, -lower, upper), np.where(swapped, -upper, lower)
    log_upper, log_lower = scipy.special.log_expit(upper), scipy.special.log_expit(lower)
    expected = log_upper + np.log(-np.expm1(log_lower - log_upper))
    outputs = np.broadcast_to(np.array([0, mean, log_scale], np.float32), (254, 3))
    actual = log_prob(outputs, np.arange(1, 255, dtype=np.uint8)[:, None], 256)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-4)


def test_log_scales_below_minus_seven_count_as_minus_seven():
    outputs = random_outputs(1).reshape(-1, MIXTURES, 3)
    pixels = np.arange(0, 256, 16, dtype=np.uint8)[:, None]
    below, at = outputs.copy(), outputs.copy()
    below[..., 2], at[..., 2] = -9, -7
    below, at = (log_prob(x.reshape(len(x), -1), pixels, 256) for x in (below, at))
    np.testing.assert_array_equal(below, at)


@pytest.mark.parametrize(("channels", "levels"), [(1, 17), (3, 3)])
def test_samples_have_the_frequencies_of_the_likelihood(channels: int, levels: int):
    """Pearson's statistic, which has mean `freedom` and variance twice that."""
    count = 100_000
    outputs = random_outputs(channels, mean=0.5, count=1)
    pixels = all_pixels(channels, levels)
    expected = count * np.exp(log_probs_of_all(outputs, pixels, levels)[:, 0])
    repeated = np.broadcast_to(outputs, (count, outputs.size))
    draw = jax.jit(sample_logistic_mixture, static_argnums=(2, 3))
    samples = np.asarray(draw(jax.random.key(0), repeated, channels, levels))
    assert samples.dtype == np.uint8
    observed = np.array([(samples == pixel).all(axis=1).sum() for pixel in pixels])
    assert observed.sum() == count
    freedom = len(pixels) - 1
    assert expected.min() > 10
    assert np.sum((observed - expected) ** 2 / expected) < freedom + 4 * math.sqrt(2 * freedom)


def test_a_temperature_sharpens_the_weights_and_narrows_the_scales():
    """It is the same draw from the mixture of those weights and scales."""
    temperature, key = 0.5, jax.random.key(0)
    outputs = random_outputs(3, log_scale=-2.0, count=1000).reshape(-1, MIXTURES, 10)
    cooled = outputs.copy()
    cooled[..., 0] /= temperature
    cooled[..., 4:7] = np.maximum(cooled[..., 4:7], -6) + math.log(temperature)
    outputs[..., 4:7] = np.maximum(outputs[..., 4:7], -6)
    draw = jax.jit(sample_logistic_mixture, static_argnums=(2, 3, 4))
    expected = draw(key, cooled.reshape(1000, -1), 3, 17, 1.0)
    np.testing.assert_array_equal(draw(key, outputs.reshape(1000, -1), 3, 17, temperature), expected)


def test_the_mean_of_a_mixture_follows_the_coefficients_between_channels():
    outputs = random_outputs(3, mean=0.1).reshape(-1, MIXTURES, 10).astype(np.float64)
    weights = scipy.special.softmax(outputs[..., 0], axis=-1)
    c0, c1, c2 = np.moveaxis(np.tanh(outputs[..., 7:]), -1, 0)
    red = outputs[..., 1]
    green = outputs[..., 2] + c0 * red
    blue = outputs[..., 3] + c1 * red + c2 * green
    expected = np.stack([np.sum(weights * channel, axis=-1) for channel in (red, green, blue)], axis=-1)
    mean = jax.jit(logistic_mixture_mean, static_argnums=1)(outputs.reshape(len(outputs), -1).astype(np.float32), 3)
    np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_the_mean_of_a_mixture_stays_within_the_range_of_the_levels():
    outputs = jnp.array([[0.0, 3.0, -1.0], [0.0, -3.0, -1.0], [0.0, 0.4, -1.0]])
    np.testing.assert_allclose(logistic_mixture_mean(outputs, 1)[:, 0], [1, -1, 0.4], rtol=1e-6)


def test_gaussian_log_density_is_that_of_scipy():
    x, mean, log_variance = np.random.default_rng(0).normal(size=(3, 100)) * 2
    expected = scipy.stats.norm.logpdf(x, mean, np.exp(log_variance / 2))
    np.testing.assert_allclose(gaussian_log_density(*map(jnp.float32, (x, mean, log_variance))), expected, rtol=1e-4)


def test_gaussian_kl_is_the_expected_difference_of_log_densities():
    """By Gauss-Hermite quadrature, exact for this integrand, a quadratic polynomial."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    for mean, log_variance in ((0.0, 0.0), (1.5, -2.0), (-0.3, 1.2)):
        deviation = np.exp(log_variance / 2)
        x = mean + deviation * nodes
        difference = scipy.stats.norm.logpdf(x, mean, deviation) - scipy.stats.norm.logpdf(x)
        expected = weights @ difference / weights.sum()
        kl = gaussian_kl(jnp.float32(mean), jnp.float32(log_variance))
        np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_over_levels_takes_its_logarithm_in_bits(levels: int):
    shape = (4, 6, 3)
    nats = jnp.full((2,), -math.prod(shape) * math.log(levels))
    np.testing.assert_allclose(nats_to_bits_per_dim(nats, shape), math.log2(levels), rtol=1e-6)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels_span_the_unit_range_evenly_and_come_back(levels: int):
    x = to_unit_range(jnp.arange(levels, dtype=jnp.uint8), levels)
    np.testing.assert_allclose(x, np.linspace(-1, 1, levels), atol=1e-6)
    np.testing.assert_array_equal(from_unit_range(x, levels), np.arange(levels, dtype=np.uint8), strict=True)
    outside = from_unit_range(jnp.array([-1e4, -1.1, 1.1, 1e4]), levels)
    np.testing.assert_array_equal(outside, [0, 0, levels - 1, levels - 1])
