"""Diffusion's constants beside the papers' formulas in float64, and its bounds beside entropies that are known."""

import itertools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from optimized import mapped
from vlm_jax.objectives import diffusion
from vlm_jax.objectives.diffusion import Level, Parameterisation

KINDS = get_args(Parameterisation)
KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)


def test_linear_and_cosine_betas_are_the_published_ones():
    """2006.11239, section 4; 2102.09672, equation 17, and its figure 5: the cosine halves alpha^2 at the middle."""
    np.testing.assert_allclose(diffusion.linear_betas(1000), np.linspace(1e-4, 0.02, 1000), rtol=1e-12)
    np.testing.assert_allclose(diffusion.linear_betas(100), np.linspace(1e-3, 0.2, 100), rtol=1e-12)
    betas = np.array(diffusion.cosine_betas(1000))
    t = np.arange(1001) / 1000
    signal = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], (signal / signal[0])[1:-1], rtol=1e-9)
    assert betas.max() == 0.999


def test_betas_of_latent_diffusion_and_betas_that_end_in_noise():
    """2112.10752's release; 2305.08891, algorithm 1, and its table 1: Stable Diffusion's last alpha is 0.068265."""
    betas = diffusion.scaled_linear_betas(1000)
    np.testing.assert_allclose(betas, np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, rtol=1e-12)
    alpha = np.sqrt(np.cumprod(1 - np.array(betas)))
    np.testing.assert_allclose(alpha[-1], 0.068265, atol=1e-6)
    changed = diffusion.zero_terminal(betas)
    assert changed[-1] == 1
    found = np.sqrt(np.cumprod(1 - np.array(changed)))
    np.testing.assert_allclose(found, (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1]), atol=1e-9)
    levels = diffusion.variance_preserving(diffusion.discrete_gammas(changed))
    assert (levels.alpha[-1], levels.sigma[-1]) == (0, 1)
    np.testing.assert_allclose(levels.alpha, found, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize(
    "betas", [diffusion.linear_betas(1000), diffusion.cosine_betas(1000)], ids=["linear", "cosine"]
)
def test_gammas_have_the_products_of_the_betas(betas: list[float]):
    level = diffusion.variance_preserving(diffusion.discrete_gammas(betas))
    products = np.cumprod(1 - np.array(betas))
    np.testing.assert_allclose(level.alpha, np.sqrt(products), rtol=3e-6)
    np.testing.assert_allclose(level.sigma, np.sqrt(1 - products), rtol=3e-6)


@pytest.mark.parametrize("t", [2, 3, 500, 1000])
@pytest.mark.parametrize(
    "betas", [diffusion.linear_betas(1000), diffusion.cosine_betas(1000)], ids=["linear", "cosine"]
)
def test_the_posterior_is_that_of_the_paper(betas: list[float], t: int):
    """2006.11239, equations 6 and 7."""
    x, x_t = RANDOM.normal(size=(2, 50))
    beta, products = betas[t - 1], np.cumprod(1 - np.array(betas))
    now, before = products[t - 1], products[t - 2]
    mean = np.sqrt(before) * beta / (1 - now) * x + np.sqrt(1 - beta) * (1 - before) / (1 - now) * x_t
    variance = (1 - before) / (1 - now) * beta
    gammas = diffusion.discrete_gammas(betas)
    posterior = diffusion.posterior(jnp.float32(x), jnp.float32(x_t), gammas[t - 2], gammas[t - 1])
    np.testing.assert_allclose(posterior.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(posterior.log_variance, np.log(variance), atol=1e-4)
    np.testing.assert_allclose(posterior.log_forward_variance, np.log(beta), atol=1e-4)


LEVELS = {
    "variance preserving": Level(jnp.float32(0.6), jnp.float32(0.8)),
    "flow": Level(jnp.float32(0.3), jnp.float32(0.7)),
    "exploding": Level(jnp.float32(1.0), jnp.float32(3.0)),
}


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_converted_and_come_back(kind: Parameterisation, level: Level):
    x, eps = np.float32(RANDOM.normal(size=(2, 20)))
    x_t = level.alpha * x + level.sigma * eps
    target = {"eps": eps, "x": x, "v": level.alpha * eps - level.sigma * x, "velocity": eps - x}[kind]
    np.testing.assert_allclose(diffusion.from_data(x, x_t, level, kind), target, atol=1e-5)
    np.testing.assert_allclose(diffusion.to_data(target, x_t, level, kind), x, atol=1e-5)
    slope = jax.grad(lambda output: diffusion.to_data(output, x_t[0], level, kind))(0.0)
    np.testing.assert_allclose(diffusion.data_gain(level, kind), abs(slope), rtol=1e-6)


@pytest.mark.parametrize(("alpha", "expected"), [(0.6, (1.0, 9 / 16, 0.36)), (0.99, (5 / 49.25, 5.0, 5 / 50.25))])
def test_min_snr_weights_are_those_of_the_paper(alpha: float, expected: tuple[float, ...]):
    """min(SNR, 5) / SNR on eps, min(SNR, 5) on x, min(SNR, 5) / (SNR + 1) on v: SNR 9/16 and 49.25."""
    level = Level(jnp.float32(alpha), jnp.sqrt(1 - jnp.float32(alpha) ** 2))
    weights = [diffusion.min_snr_weight(level, kind) for kind in ("eps", "x", "v")]
    np.testing.assert_allclose(weights, expected, rtol=1e-3)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_edm_preconditioning_keeps_unit_variances_and_weighs_all_levels_alike(sigma: float):
    """2206.00364, equations 114 to 117: Var[into x_t] = 1, Var[target] = 1, weight out^2 = 1, least amplification."""
    p = diffusion.edm_preconditioning(jnp.float32(sigma))
    np.testing.assert_allclose(p.into**2 * (sigma**2 + 0.25), 1, rtol=1e-5)
    target_variance = ((1 - p.skip) ** 2 * 0.25 + p.skip**2 * sigma**2) / p.out**2
    np.testing.assert_allclose(target_variance, 1, rtol=1e-3)
    np.testing.assert_allclose(p.weight, (sigma**2 + 0.25) / (sigma * 0.5) ** 2, rtol=1e-5)
    np.testing.assert_allclose(p.time, math.log(sigma) / 4, rtol=1e-5)


@pytest.mark.parametrize(("mean", "log_variance"), [(0.1, -2.0), (0.9, -9.0), (-3.0, -5.0), (0.3, 6.0)])
@pytest.mark.parametrize("levels", [3, 17, 256])
def test_bins_of_a_gaussian_have_its_mass_and_sum_to_one(mean: float, log_variance: float, levels: int):
    image, deviation = np.arange(levels), np.exp(log_variance / 2)
    edges = np.concatenate([[-np.inf], (2 * np.arange(1, levels) - 1) / (levels - 1) - 1, [np.inf]])
    z = (edges - mean) / deviation
    expected = np.where(z[1:] <= 0, np.diff(scipy.stats.norm.cdf(z)), -np.diff(scipy.stats.norm.sf(z)))
    log_prob = jax.jit(diffusion.discretised_gaussian_log_prob, static_argnums=3)
    actual = log_prob(jnp.float32(mean), jnp.float32(log_variance), image, levels)
    np.testing.assert_allclose(np.exp(np.float64(actual)).sum(), 1, atol=2e-5)
    # Where bins are a hundredth of a deviation wide, rounding to float32 of their two edges shows.
    large = expected > 1e-30
    np.testing.assert_allclose(
        actual[large], np.log(expected[large]), rtol=1e-4, atol=2e-3 if log_variance > 0 else 1e-4
    )
    gradient = jax.grad(lambda m, v: jnp.sum(log_prob(m, v, image, levels)), argnums=(0, 1))
    assert np.isfinite(gradient(jnp.float32(mean), jnp.float32(log_variance))).all()


# Bounds that are reached: the prediction is the true mean of the data given the noisy image.

IMAGES = np.array(list(itertools.product(range(3), repeat=4)), np.uint8)
X = np.float32(IMAGES) - 1
PROBABILITIES = RANDOM.dirichlet(np.full(81, 2.0))
GAMMAS = -5.0, 6.0
"""The levels are 12 deviations of the noise apart at one end, and its deviation is 20 levels at the other."""
CENTRE, SCALE = -1.0, 1.5
DRAWS = 2048
REPETITIONS = 16


def schedule(t: jax.Array) -> jax.Array:
    """gamma, of which most is spent where most is learned; the bound knows its ends alone."""
    first, last = (jax.nn.sigmoid((gamma - CENTRE) / SCALE) for gamma in GAMMAS)
    return CENTRE + SCALE * jax.scipy.special.logit(first + (last - first) * t)


def continuous_bound(points: jax.Array, index: int) -> jax.Array:
    """The mean of one-sample estimates of the bound of one image, nats.

    Args:
      points: of the unit cube, one an estimate: t and what becomes the noise.
    """
    x = jnp.broadcast_to(jnp.asarray(X)[index], (DRAWS, 4))
    image = jnp.broadcast_to(jnp.asarray(IMAGES)[index], (DRAWS, 4))
    first, last = GAMMAS
    t, eps = points[:, 0], jax.scipy.stats.norm.ppf(points[:, 1:])
    gamma, slope = jax.vmap(jax.value_and_grad(schedule))(t)
    level = diffusion.variance_preserving(gamma[:, None])
    x_t = level.alpha * x + level.sigma * eps
    # log p(image) p(x_t | image), less what all images share.
    products = level.alpha * (x_t @ X.T) - 0.5 * jnp.square(level.alpha) * jnp.sum(jnp.square(X), axis=-1)
    logits = jnp.log(PROBABILITIES) + products / jnp.square(level.sigma)
    eps_hat = diffusion.from_data(jax.nn.softmax(logits) @ X, x_t, level, "eps")
    least = diffusion.variance_preserving(jnp.float32(first))
    x_0 = least.alpha * x + least.sigma * eps
    return jnp.mean(
        diffusion.level_log_prob(x_0, jnp.float32(first), image, 3)
        - diffusion.continuous_divergence(eps, eps_hat, slope)
        - diffusion.prior_divergence(x, jnp.float32(last))
    )


@pytest.fixture(scope="module")
def bounds() -> np.ndarray:
    """[repetitions, images], independent of one another."""
    sobol = jnp.asarray(scipy.stats.qmc.Sobol(5, seed=0).random(DRAWS), jnp.float32)

    def shifted(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        points = (sobol + jax.random.uniform(jax.random.fold_in(KEY, pair[0]), (5,))) % 1
        return continuous_bound(jnp.clip(points, 1e-6, 1 - 1e-6), pair[1])

    pairs = jnp.arange(REPETITIONS * 81), jnp.arange(REPETITIONS * 81) % 81
    return mapped(shifted, pairs).reshape(REPETITIONS, 81)


def standard_error(values: np.ndarray) -> float:
    return values.std(ddof=1) / math.sqrt(REPETITIONS)


def test_the_bound_of_infinitely_many_steps_reaches_the_entropy(bounds):
    """Of a random distribution over all 81 images of 2x2 pixels and 3 levels."""
    estimates = -bounds @ PROBABILITIES
    error, entropy = standard_error(estimates), -PROBABILITIES @ np.log(PROBABILITIES)
    # 0.005 bits/dim are 0.0139 nats: an error of that size in any term is seen.
    assert error < 0.003
    assert abs(estimates.mean() - entropy) < 3 * error


def test_the_bounds_of_all_images_sum_to_one(bounds):
    total = np.exp(bounds.mean(axis=0)).sum()
    error = standard_error(np.exp(bounds).sum(axis=1))
    assert error < 0.004
    assert abs(total - 1) < 3 * error


@pytest.mark.parametrize("bits", [-0.005, 0.005])
def test_an_error_of_five_thousandths_of_a_bit_is_seen(bounds, bits: float):
    with pytest.raises(AssertionError):
        test_the_bound_of_infinitely_many_steps_reaches_the_entropy(bounds + bits * 4 * math.log(2))


def test_infinitely_many_steps_cost_what_many_small_ones_of_ddpm_do():
    """VDM's formula in eps beside the KL of one of 1000 steps between DDPM's posteriors at x and at its prediction."""
    slope, steps = 18.0, 1000
    x, eps, eps_hat = np.float32(RANDOM.normal(size=(3, 8, 4)))
    for gamma_t in jnp.float32([-4.0, 0.0, 4.0]):
        gamma_s = gamma_t - slope / steps
        level = diffusion.variance_preserving(gamma_t)
        x_t = level.alpha * x + level.sigma * eps
        true = diffusion.posterior(x, x_t, gamma_s, gamma_t)
        model = diffusion.posterior(diffusion.to_data(eps_hat, x_t, level, "eps"), x_t, gamma_s, gamma_t)
        step = diffusion.divergence_of_gaussians(true.mean, true.log_variance, model.mean, model.log_variance)
        exact = diffusion.continuous_divergence(jnp.array(eps), jnp.array(eps_hat), jnp.float32(slope))
        # A step of finite size costs expm1 of what its gamma changes by.
        ratio = math.expm1(slope / steps) / (slope / steps)
        np.testing.assert_allclose(steps * jnp.sum(step, axis=-1), ratio * exact, rtol=2e-3)


def test_the_divergence_of_gaussians_is_zero_at_equality_and_the_expected_log_ratio_elsewhere():
    """By Gauss-Hermite quadrature, exact for this integrand, a quadratic polynomial."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    for mean, log_variance, other, other_log_variance in ((0.3, -1.0, 0.3, -1.0), (0.5, -3.0, 0.4, -2.0)):
        x = mean + math.exp(log_variance / 2) * nodes
        ratio = scipy.stats.norm.logpdf(x, mean, math.exp(log_variance / 2)) - scipy.stats.norm.logpdf(
            x, other, math.exp(other_log_variance / 2)
        )
        arguments = (jnp.float32(value) for value in (mean, log_variance, other, other_log_variance))
        actual = diffusion.divergence_of_gaussians(*arguments)
        np.testing.assert_allclose(actual, weights @ ratio / weights.sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [-4.0, 0.0, 3.0])
def test_levels_given_a_noisy_value_are_those_of_bayes_rule(gamma: float):
    """2107.00630, equation 12: all levels equally likely before, each with a Gaussian of its own after."""
    x_t = np.float32([-1.7, -0.4, 0.0, 0.3, 1.1])
    alpha, sigma = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
    expected = scipy.stats.norm.logpdf(x_t[:, None], alpha * np.linspace(-1, 1, 5), sigma)
    expected = expected - np.logaddexp.reduce(expected, axis=1, keepdims=True)
    logits = diffusion.level_logits(jnp.asarray(x_t), jnp.float32(gamma), 5)
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, rtol=1e-4, atol=1e-4)


def test_stratified_times_are_uniform_and_evenly_spread():
    draws = np.asarray(jax.vmap(lambda key: diffusion.stratified(key, 5))(jax.random.split(KEY, 1000)))
    np.testing.assert_allclose(np.diff(np.sort(draws, axis=1), axis=1), 0.2, atol=1e-5)
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=4 * math.sqrt(1 / 12 / 1000))


def test_data_of_another_deviation_have_their_own_preconditioning():
    """2206.00364, table 1, at a deviation of 1.3."""
    sigma, data = np.array([0.1, 1.0, 20.0]), 1.3
    p = diffusion.edm_preconditioning(jnp.float32(sigma), data)
    total = sigma**2 + data**2
    expected = (data**2 / total, sigma * data / np.sqrt(total), 1 / np.sqrt(total), np.log(sigma) / 4)
    for actual, value in zip(p[:4], expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-5)
    np.testing.assert_allclose(p.weight, total / (sigma * data) ** 2, rtol=1e-5)
