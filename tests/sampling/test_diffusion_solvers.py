"""Diffusion's solvers on a mixture of Gaussians, whose means given x_t, states and densities are in closed form."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from vlm_jax.objectives import diffusion
from vlm_jax.sampling.diffusion import SOLVERS, Denoised, ode_log_density, probability_flow

KEY = jax.random.key(0)
WEIGHTS = np.float32([0.2, 0.5, 0.3])
MEANS = np.float32([[-1.0, 0.6], [0.4, 0.2], [0.0, -2.2 / 3]])
DEVIATION = 0.5


def preserving(t: jax.Array) -> diffusion.Level:
    return diffusion.variance_preserving(-6 + 11 * t)


SCHEDULES = {
    "preserving": (preserving, 1.0, 0.0),
    "flow": (diffusion.rectified_flow, 1.0, 0.02),
    "exploding": (diffusion.variance_exploding, 8.0, 0.02),
}
"""Each with its first time and its last."""


def mixture_mean(x_t: jax.Array, level: tuple[jax.Array, jax.Array]) -> jax.Array:
    """E[x | x_t]"""
    alpha, sigma = level
    variance = jnp.square(alpha * DEVIATION) + jnp.square(sigma)
    distance = x_t[:, None] - alpha * MEANS
    posterior = jax.nn.softmax(jnp.log(WEIGHTS) - 0.5 * jnp.sum(jnp.square(distance), axis=-1) / variance)
    means = MEANS + alpha * DEVIATION**2 / variance * distance
    return jnp.einsum("bk,bkd->bd", posterior, means)


def denoiser(schedule):
    return lambda x, t: Denoised(mixture_mean(x, schedule(t)))


def grid(name: str, steps: int) -> jax.Array:
    _, first, last = SCHEDULES[name]
    if name == "exploding":  # Karras et al.'s, 2206.00364, equation 5
        return jnp.linspace(first ** (1 / 7), last ** (1 / 7), steps + 1) ** 7
    return jnp.linspace(first, last, steps + 1)


@partial(jax.jit, static_argnames=("solver", "name", "steps"))
def solve(noise: jax.Array, *, solver: str, name: str, steps: int) -> jax.Array:
    schedule, times = SCHEDULES[name][0], grid(name, steps)
    _, sigma = schedule(times[0])
    return SOLVERS[solver](denoiser(schedule), schedule, times, sigma * noise, KEY)


NOISE = np.float32(np.random.default_rng(1).normal(size=(256, 2)))


@pytest.fixture(scope="module", params=SCHEDULES)
def reference(request: pytest.FixtureRequest) -> tuple[str, np.ndarray]:
    """A schedule, and the solution of its ODE."""
    return request.param, np.asarray(solve(NOISE, solver="heun", name=request.param, steps=2000))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm_solver", 2)])
def test_deterministic_solvers_have_their_order_of_convergence(reference, solver: str, order: int):
    """The slope of the logarithm of the error over that of the number of steps."""
    name, expected = reference
    counts = (32, 64, 128, 256)
    errors = [np.sqrt(np.mean((solve(NOISE, solver=solver, name=name, steps=n) - expected) ** 2)) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.25, (slope, errors)
    assert errors[-1] < (0.05 if order == 1 else 2e-3)


def test_ancestral_sampling_converges_to_the_data_with_order_one():
    """In distribution: by the variance of its samples of Gaussian data."""
    data_variance = 0.25

    def denoise(x: jax.Array, t: jax.Array) -> Denoised:
        alpha, sigma = preserving(t)
        return Denoised(alpha * data_variance / (alpha**2 * data_variance + sigma**2) * x)

    alpha, sigma = preserving(jnp.float32(0.0))
    truth = float(alpha**2 * data_variance + sigma**2)
    counts, errors = (8, 16, 32), []
    for steps in counts:
        times = jnp.linspace(1.0, 0.0, steps + 1)
        noise = jax.random.normal(KEY, (100_000, 1))
        solver = jax.jit(lambda x, times=times: SOLVERS["ancestral"](denoise, preserving, times, x, KEY))
        samples = np.asarray(solver(noise), np.float64)
        errors.append(abs(samples.var() - truth) / truth)
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - 1) < 0.35, (slope, errors)


@pytest.mark.parametrize("solver", ["ancestral", "dpm_solver", "euler"])
def test_all_parameterisations_give_the_same_samples(solver: str):
    """What a perfect network of each kind would predict, turned back into data."""
    times = jnp.linspace(1.0, 0.0, 33)

    def sample(kind: diffusion.Parameterisation) -> jax.Array:
        def denoise(x: jax.Array, t: jax.Array) -> Denoised:
            level = preserving(t)
            prediction = diffusion.from_data(mixture_mean(x, level), x, level, kind)
            return Denoised(diffusion.to_data(prediction, x, level, kind))

        return jax.jit(lambda noise: SOLVERS[solver](denoise, preserving, times, noise, KEY))(NOISE)

    expected = sample("x")
    for kind in ("eps", "v", "velocity"):
        np.testing.assert_allclose(sample(kind), expected, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_have_the_moments_of_the_data(solver: str):
    """From the noise of rectified flow, where nothing is left of the data, to no noise at all."""
    count = 20_000
    times = jnp.linspace(1.0, 0.0, 129)
    schedule = diffusion.rectified_flow
    noise = jax.random.normal(KEY, (count, 2))
    samples = np.asarray(
        jax.jit(lambda x: SOLVERS[solver](denoiser(schedule), schedule, times, x, jax.random.key(1)))(noise)
    )
    covariance = MEANS.T @ np.diag(WEIGHTS) @ MEANS + DEVIATION**2 * np.eye(2)
    np.testing.assert_allclose(samples.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.03)


def test_ancestral_steps_have_the_variance_between_their_limits():
    """Of one step from x = 0 with the data known to be 0: only noise is left."""
    times = jnp.array([0.8, 0.6])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = preserving(times[0]), preserving(times[1])
    beta = 1 - (alpha_t / alpha_s) ** 2
    beta_tilde = beta * sigma_s**2 / sigma_t**2
    x = jnp.zeros((100_000, 1))
    for mix in (0.0, 0.3, 1.0):
        samples = SOLVERS["ancestral"](lambda x, t, mix=mix: Denoised(x, mix), preserving, times, x, KEY)
        np.testing.assert_allclose(
            np.log(samples.var()), mix * np.log(beta) + (1 - mix) * np.log(beta_tilde), atol=0.02
        )


def test_a_temperature_scales_the_noise_of_ancestral_steps():
    times = jnp.array([0.8, 0.6])
    step = partial(SOLVERS["ancestral"], lambda x, t: Denoised(0 * x), preserving, times, jnp.zeros((8, 1)), KEY)
    np.testing.assert_allclose(step(temperature=0.5), 0.5 * step(temperature=1.0), rtol=1e-6)
    np.testing.assert_array_equal(step(temperature=0.0), 0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_progress_is_told_after_each_step(solver: str):
    seen: dict[int, np.ndarray] = {}
    times = jnp.linspace(1.0, 0.0, 5)

    def on_step(done: jax.Array, x: jax.Array) -> None:
        seen[int(done)] = np.asarray(x)

    sample = partial(SOLVERS[solver], denoiser(preserving), preserving, times, key=KEY, on_step=on_step)
    result = jax.jit(lambda x: sample(x))(NOISE)
    jax.effects_barrier()
    assert sorted(seen) == [1, 2, 3, 4]
    np.testing.assert_allclose(seen[4], result, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_likelihood_ode_reaches_the_true_log_density(name: str):
    """Of the data with the noise of the first time; the probes are the axes, by which the divergence is exact."""
    schedule = SCHEDULES[name][0]
    times = grid(name, 300)[::-1]
    alpha, sigma = (np.float64(value) for value in schedule(times[0]))
    x = np.random.default_rng(2).normal(size=(64, 2)).astype(np.float32)
    probes = math.sqrt(2) * jnp.broadcast_to(jnp.eye(2)[:, None], (2, 64, 2))
    velocity = probability_flow(denoiser(schedule), schedule)
    actual = jax.jit(lambda x: ode_log_density(velocity, times, x, probes, mixture_deviation(schedule(times[-1]))))(x)
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    squares = np.sum((x[:, None] - alpha * MEANS) ** 2, axis=-1)
    expected = scipy.special.logsumexp(
        np.log(WEIGHTS) - 0.5 * squares / variance - math.log(2 * math.pi * variance), axis=1
    )
    np.testing.assert_allclose(actual, expected, atol=0.02 if name != "flow" else 2e-3)


def mixture_deviation(level: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Of the coordinates of x_t, of mean 0, both taken together: a little of the data is left in the last state."""
    alpha, sigma = level
    variance = np.mean(WEIGHTS @ MEANS**2) + DEVIATION**2
    return jnp.sqrt(alpha**2 * variance + sigma**2)


def test_hutchinsons_estimate_is_unbiased():
    """The mean over many random probes beside the exact divergence."""
    schedule = diffusion.rectified_flow
    times = grid("flow", 20)[::-1]
    velocity = probability_flow(denoiser(schedule), schedule)
    x = np.random.default_rng(2).normal(size=(4, 2)).astype(np.float32)
    log_density = jax.jit(lambda probes: ode_log_density(velocity, times, x, probes))
    exact = log_density(math.sqrt(2) * jnp.broadcast_to(jnp.eye(2)[:, None], (2, 4, 2)))
    draws = np.stack(
        [log_density(jax.random.rademacher(key, (1, 4, 2), jnp.float32)) for key in jax.random.split(KEY, 400)]
    )
    assert draws.std(axis=0).max() > 0.1
    assert (np.abs(draws.mean(axis=0) - exact) < 4 * draws.std(axis=0) / 20 + 1e-5).all()


def test_the_density_needs_no_derivative_in_forward_mode():
    """Fused attention has none. Under dx/dt = c x^3 each image's log density falls by the integral of 3 c x^2."""
    cubic = jax.custom_vjp(lambda x: 0.1 * x**3)
    cubic.defvjp(lambda x: (cubic(x), x), lambda x, g: (0.3 * x**2 * g,))
    x = jnp.array([[0.5], [-0.8]])
    times = jnp.linspace(0.0, 1.0, 65)
    actual = jax.jit(lambda x: ode_log_density(lambda x, t: cubic(x), times, x, jnp.ones((1, 2, 1))))(x)
    last = x / jnp.sqrt(1 - 0.2 * x**2)
    expected = jax.scipy.stats.norm.logpdf(last) + 3 * jnp.log(last / x)
    np.testing.assert_allclose(actual, expected[:, 0], atol=1e-4)
