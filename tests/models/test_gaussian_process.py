"""The Gaussian process against SciPy: its covariance, its density, the masses of levels, samples and completions."""

import itertools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gamma, kv
from scipy.stats import multivariate_normal

from densities import IMAGES
from optimized import mapped
from vlm_jax.contract import Model
from vlm_jax.errors import UserError
from vlm_jax.models import gaussian_process
from vlm_jax.models.gaussian_process import JITTER, correlation, covariance

KEY = jax.random.key(1)
SMALL = gaussian_process.Config(image_size=2, channels=1, levels=3, kernel="matern32")
LARGE = gaussian_process.Config(image_size=4, channels=3, levels=256, kernel="rbf")
DRAWS = 4096
NARROW = 0.3
"""A scale at which levels are not cut at the ends of their range, which would change their moments."""


def random_variables(config: gaussian_process.Config, scale: float = 1.0) -> Any:
    """`scale` is that of the deviations."""
    random = np.random.default_rng(0)
    dimensions = config.image_size**2 * config.channels
    factor = 0.3 * scale * (np.eye(config.channels) + 0.3 * random.normal(size=(config.channels, config.channels)))
    return {
        "params": {
            "mean": jnp.float32(0.5 + 0.1 * random.normal(size=dimensions)),
            "channel_factor": jnp.float32(factor),
            "log_length_scale": jnp.log(jnp.float32([1.5, 0.8])),
            "log_noise": jnp.log(jnp.float32(0.15 * scale)),
        }
    }


def moments(config: gaussian_process.Config, variables: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the covariance of an image on [0, 1], element by element, in float64."""
    params = jax.tree.map(np.float64, variables["params"])
    pixels = np.array(list(itertools.product(range(config.image_size), repeat=2)))
    channels = params["channel_factor"] @ params["channel_factor"].T
    size = len(pixels) * config.channels
    matrix = np.zeros((size, size))
    for (i, p), (j, q) in itertools.product(enumerate(pixels), repeat=2):
        distance = np.linalg.norm((p - q) / np.exp(params["log_length_scale"]))
        for c, d in itertools.product(range(config.channels), repeat=2):
            value = expected_correlation(config.kernel, distance) * channels[c, d]
            matrix[i * config.channels + c, j * config.channels + d] = value
    return params["mean"], matrix + (np.exp(2 * params["log_noise"]) + JITTER) * np.eye(size)


def expected_correlation(kernel: str, distance: float) -> float:
    """Of Matern in the general form with a Bessel function (Rasmussen & Williams, equation 4.14)."""
    if kernel == "rbf":
        return math.exp(-(distance**2) / 2)
    if distance == 0:
        return 1.0
    order = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}[kernel]
    scaled = math.sqrt(2 * order) * distance
    return 2 ** (1 - order) / gamma(order) * scaled**order * kv(order, scaled)


@pytest.fixture(scope="module")
def small() -> tuple[Model, Any]:
    return gaussian_process.build(SMALL), random_variables(SMALL)


@pytest.fixture(scope="module")
def large() -> tuple[Model, Any]:
    return gaussian_process.build(LARGE), random_variables(LARGE)


def images_like(config: gaussian_process.Config, count: int) -> np.ndarray:
    shape = (count, config.image_size, config.image_size, config.channels)
    return np.random.default_rng(1).integers(0, config.levels, shape).astype(np.uint8)


@pytest.mark.parametrize("kernel", ["rbf", "matern12", "matern32", "matern52"])
def test_correlations_are_those_of_the_book_and_flat_at_zero_where_smooth(kernel: str):
    distances = [0.0, 0.1, 1.0, 3.0]
    values = correlation(kernel, jnp.square(jnp.array(distances)))
    np.testing.assert_allclose(values, [expected_correlation(kernel, distance) for distance in distances], rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda scale: jnp.sum(correlation(kernel, scale * jnp.zeros(3))))(1.0))


@pytest.mark.parametrize("config", [SMALL, LARGE, replace(SMALL, image_size=3, channels=2, kernel="matern52")])
def test_the_covariance_is_the_one_computed_element_by_element(config: gaussian_process.Config):
    variables = random_variables(config)
    np.testing.assert_allclose(covariance(config, variables["params"]), moments(config, variables)[1], atol=1e-6)


def test_the_log_likelihood_is_scipys_at_the_dequantised_pixels(large):
    """Of dequantised levels, on the scale of levels: neither the scale's constant nor the noise can hide."""
    model, variables = large
    image = images_like(LARGE, 4)
    values = np.float64(jax.jit(model.log_likelihood)(variables, {"image": image}, KEY))
    noise = np.float64(jax.random.uniform(KEY, (4, 48), minval=-0.5, maxval=0.5))
    mean, matrix = moments(LARGE, variables)
    expected = multivariate_normal(256 * mean, 256**2 * matrix).logpdf(image.reshape(4, 48) + 0.5 + noise)
    np.testing.assert_allclose(values, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def draws(small) -> np.ndarray:
    """[draws, 81], nats"""
    model, variables = small
    keys = jax.random.split(KEY, DRAWS)
    return mapped(lambda key: model.log_likelihood(variables, {"image": IMAGES}, key), keys, batch_size=64)


def test_the_density_integrates_to_the_mass_of_each_bin_and_bounds_it(small, draws):
    """The mean of p(x + u) is the mass of the bin of x, which the distribution function gives."""
    _, variables = small
    distribution = multivariate_normal(*moments(SMALL, variables))
    lower = IMAGES.reshape(81, 4) / 3
    mass = np.array([distribution.cdf(x + 1 / 3, lower_limit=x, rng=np.random.default_rng(0)) for x in lower])
    error = np.exp(draws).std(axis=0, ddof=1) / math.sqrt(DRAWS)
    assert (np.abs(np.exp(draws).mean(axis=0) - mass) < 5 * error + 1e-5).all()
    totals = np.exp(draws).sum(axis=1)
    error = totals.std(ddof=1) / math.sqrt(DRAWS)
    assert error < 0.001
    assert abs(totals.mean() - mass.sum()) < 4 * error + 1e-4
    assert 0.5 < mass.sum() < 1
    bound = np.exp(draws.mean(axis=0))
    assert (bound < mass).all()
    assert bound.sum() > 0.8 * mass.sum()


def test_the_loss_is_the_negative_log_likelihood_in_bits_per_dimension(small):
    model, variables = small
    loss, aux = jax.jit(lambda: model.loss(variables, {"image": IMAGES}, KEY, 0, train=True))()
    expected = -model.log_likelihood(variables, {"image": IMAGES}, KEY).mean() / (4 * math.log(2))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert aux.weight == 81
    np.testing.assert_allclose(aux.metrics["noise_levels"], 3 * 0.15, rtol=1e-5)


def test_samples_have_the_moments_of_the_process(large):
    """With a quarter of the covariance at half the temperature, and the mean alone at zero."""
    model, _ = large
    variables = random_variables(LARGE, scale=NARROW)
    mean, matrix = moments(LARGE, variables)
    draw = jax.jit(model.sample, static_argnames=("num", "temperature"))
    count = 20_000
    for temperature in (1.0, 0.5):
        samples = draw(variables, KEY, {}, num=count, temperature=temperature)
        assert samples.dtype == jnp.uint8
        y = (np.float64(samples).reshape(count, -1) + 0.5) / 256
        deviation = temperature * np.sqrt(np.diag(matrix))
        np.testing.assert_allclose(y.mean(axis=0), mean, atol=5 * deviation.max() / math.sqrt(count))
        error = 6 * np.outer(deviation, deviation).max() * math.sqrt(2 / count)
        np.testing.assert_allclose(np.cov(y.T), temperature**2 * matrix, atol=error)
    zero = np.int32(draw(variables, KEY, {}, num=2, temperature=0.0)).reshape(2, -1)
    assert np.abs(zero - np.floor(256 * mean)).max() <= 1


MASKS = {
    "top": np.arange(4)[:, None].repeat(4, axis=1) < 2,
    "scattered": np.random.default_rng(0).random((4, 4)) < 0.4,
    "none": np.zeros((4, 4), bool),
    "all": np.ones((4, 4), bool),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_completion_is_the_gaussian_given_the_known_pixels(mask: str, large):
    model, _ = large
    variables = random_variables(LARGE, scale=NARROW)
    known = MASKS[mask]
    image = np.clip(images_like(LARGE, 2), 96, 160)
    complete = jax.jit(lambda key, image, temperature: model.complete(
        variables, key, image, known, temperature=temperature), static_argnums=2)  # fmt: skip

    mean, matrix = moments(LARGE, variables)
    k = known.repeat(3)
    weights = matrix[~k][:, k] @ np.linalg.inv(matrix[k][:, k])
    y = (image.reshape(2, -1) + 0.5) / 256
    expected_mean = mean[~k] + (y[:, k] - mean[k]) @ weights.T
    expected_covariance = matrix[~k][:, ~k] - weights @ matrix[k][:, ~k]

    means = np.asarray(complete(KEY, image, 0.0)).reshape(2, -1)
    np.testing.assert_array_equal(means[:, k], image.reshape(2, -1)[:, k], strict=True)
    off = np.abs(np.int32(means[:, ~k]) - np.floor(256 * expected_mean))
    assert (off <= 1).all() and (off == 0).mean() > 0.95 if off.size else known.all()

    count = 10_000
    samples = np.asarray(complete(KEY, image[:1].repeat(count, axis=0), 1.0)).reshape(count, -1)
    assert (samples[:, k] == image[0].reshape(-1)[k]).all()
    if not known.all():
        y = (np.float64(samples[:, ~k]) + 0.5) / 256
        deviation = np.sqrt(np.diag(expected_covariance)).max()
        np.testing.assert_allclose(y.mean(axis=0), expected_mean[0], atol=5 * deviation / math.sqrt(count))
        np.testing.assert_allclose(np.cov(y.T), expected_covariance, atol=6 * deviation**2 * math.sqrt(2 / count))


def test_it_starts_with_the_mean_and_variance_of_the_batch():
    image = images_like(LARGE, 50)
    params = gaussian_process.build(LARGE).init(KEY, {"image": jnp.asarray(image)})["params"]
    y = (image.reshape(50, 48) + 0.5) / 256
    np.testing.assert_allclose(params["mean"], y.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.diag(covariance(LARGE, params)), y.var(axis=0).mean() + JITTER, rtol=1e-4)
    # A fifth of it is noise; the length is of two pixels, and neighbours are alike before any training.
    np.testing.assert_allclose(np.exp(2 * params["log_noise"]), y.var(axis=0).mean() / 5, rtol=1e-4)
    np.testing.assert_allclose(np.exp(params["log_length_scale"]), 2, rtol=1e-6)
    assert JITTER == 1e-5


def test_images_that_are_all_alike_have_a_density():
    model = gaussian_process.build(SMALL)
    batch = {"image": jnp.zeros((3, 2, 2, 1), jnp.uint8)}
    variables = model.init(KEY, batch)
    assert jnp.isfinite(model.log_likelihood(variables, batch, KEY)).all()
    # The deviation is that of a level at least.
    np.testing.assert_allclose(np.exp(variables["params"]["log_noise"]), math.sqrt(0.2) / 3, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"image_size": 0}, {"channels": 0}, {"levels": 1}])
def test_configurations_without_pixels_or_levels_are_refused(changes: dict[str, int]):
    name, value = next(iter(changes.items()))
    with pytest.raises(UserError, match=rf"at least 1 pixel, 1 channel and 2 levels, not .*{name}={value}"):
        replace(SMALL, **changes)
