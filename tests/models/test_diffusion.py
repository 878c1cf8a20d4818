"""Diffusion in discrete steps: its bound beside the papers' formulas in float64, and a chain with a perfect network."""

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from optimized import mapped
from vlm_jax.errors import UserError
from vlm_jax.models import diffusion
from vlm_jax.models.diffusion import Sampling
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.unet import UNet
from vlm_jax.objectives.diffusion import Level, cosine_betas, discrete_gammas, linear_betas, variance_preserving

NETWORK = Network(backbone=UNet(widths=(8,), blocks=1, groups=4))
CONFIG = diffusion.Config(image_size=2, channels=1, levels=3, network=NETWORK, timesteps=100, predict="x")
IMAGES = np.array(list(itertools.product(range(3), repeat=4)), np.uint8)
BATCH = {"image": IMAGES.reshape(81, 2, 2, 1)}
X = np.float32(IMAGES) - 1
PROBABILITIES = np.float32(np.random.default_rng(0).dirichlet(np.full(81, 2.0)))
BETAS = np.array(linear_betas(100))
KEY = jax.random.key(0)


class Oracle(nn.Module):
    """Predicts the mean of the images given the noisy one; the times of all steps but the first lie in (0, 1000)."""

    config: Any
    channels: int
    timesteps: int = 100

    def __call__(self, x_t: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        noisy = x_t.reshape(-1, 4)
        t = jnp.broadcast_to(jnp.round(time * self.timesteps / 1000).astype(jnp.int32), (len(noisy),))
        gammas = discrete_gammas(linear_betas(self.timesteps))
        level = Level(*(v[:, None] for v in variance_preserving(gammas[t])))
        products = level.alpha * (noisy @ X.T) - 0.5 * level.alpha**2 * np.sum(X**2, axis=-1)
        data = jax.nn.softmax(jnp.log(PROBABILITIES) + products / level.sigma**2) @ X
        return data.reshape(x_t.shape)


SEEN: list[tuple[np.ndarray, np.ndarray]] = []


class Recorder(nn.Module):
    """Predicts 0.4 times the noisy image, and log-variances a fifth of the way up; keeps what it is asked."""

    config: Any
    channels: int

    def __call__(self, x_t: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        SEEN.append((np.asarray(x_t, np.float64).reshape(-1, 4), np.asarray(time, np.float64)))
        mean = 0.4 * x_t
        return mean if self.channels == 1 else jnp.concatenate([mean, jnp.full_like(mean, -0.6)], axis=-1)


def step_cost(x_t: np.ndarray, t: np.ndarray, variance: str) -> np.ndarray:
    """The papers' terms for the network of `Recorder`, t counted from 1: 2006.11239, equations 5 to 13."""
    x, products = IMAGES.astype(np.float64) - 1, np.cumprod(1 - BETAS)
    data = np.clip(0.4 * x_t, -1, 1)
    costs = []
    for row, at in enumerate(t):
        # At the last step the forward variance is the posterior's, as in the authors' "fixedlarge".
        mix = {"posterior": 0.0, "forward": float(at > 1), "learned": 0.2}[variance]
        upper = max(at, 2)
        beta, now, before = BETAS[upper - 1], products[upper - 1], products[upper - 2]
        least = (1 - before) / (1 - now) * beta
        deviation = math.exp(0.5 * (mix * math.log(BETAS[at - 1]) + (1 - mix) * math.log(least)))
        if at == 1:
            edges = np.array([-np.inf, -0.5, 0.5, np.inf])
            z = (edges - data[row][:, None]) / deviation
            bins = np.where(z[:, 1:] < 0, np.diff(scipy.stats.norm.cdf(z)), -np.diff(scipy.stats.norm.sf(z)))
            with np.errstate(divide="ignore"):
                costs.append(-np.log(bins[np.arange(4), IMAGES[row]]).sum())
        else:
            difference = np.sqrt(before) * beta / (1 - now) * (x[row] - data[row])
            ratio = least / deviation**2
            costs.append(0.5 * np.sum(difference**2 / deviation**2 + ratio - 1 - math.log(ratio)))
    return np.array(costs)


@pytest.mark.parametrize("error", [0.0, 0.005 * 4 * math.log(2)], ids=["as it is", "five thousandths of a bit off"])
@pytest.mark.parametrize("variance", ["posterior", "forward", "learned"])
def test_every_constant_of_the_bound(variance: str, error: float, monkeypatch: pytest.MonkeyPatch):
    """For the noisy images that the network was shown: the prior, one step for all but the last, and the last.

    Step t stands for all with the weight 1 / p(t), where log t is nearly uniform over them.
    """
    monkeypatch.setattr(diffusion, "Denoiser", Recorder)
    model = diffusion.build(replace(CONFIG, variance=variance))
    SEEN.clear()
    actual = np.asarray(model.log_likelihood({}, BATCH, KEY), np.float64) + error
    noise = np.prod(1 - BETAS)
    prior = 0.5 * np.sum(noise * (IMAGES - 1.0) ** 2 - noise - np.log1p(-noise), axis=-1)
    (first_x, first_time), (x_t, time) = sorted(SEEN, key=lambda seen: seen[1].max())
    t = np.round(time / 10).astype(int) + 1
    assert (first_time == 0).all() and t.min() == 2 and 90 < t.max() <= 100
    weight = math.log(101 / 2) / np.log((t + 1) / t)
    expected = -(prior + weight * step_cost(x_t, t, variance) + step_cost(first_x, np.ones(81, int), variance))
    # Where the last step's bins are hundreds of deviations off, float64 has no mass and the network's is a plain tail.
    sound = np.isfinite(expected)
    assert sound.sum() > 5
    wrong = np.abs(actual - expected)[sound] > 2e-3 + 1e-4 * np.abs(expected[sound])
    assert wrong.any() == (error > 0)


@pytest.mark.parametrize("timesteps", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_the_step_that_is_drawn_stands_for_all(timesteps: int):
    """A network that predicts 0 makes each step's cost a number: over evenly spread draws their mean is the sum."""
    model = diffusion.build(replace(CONFIG, timesteps=timesteps, betas="cosine"))
    batch = {"image": np.broadcast_to(np.uint8([[[0], [1]], [[2], [2]]]), (5_000, 2, 2, 1))}
    variables = jax.jit(model.init)(KEY, batch)  # the last layer starts at zero
    actual = np.asarray(jax.jit(model.log_likelihood)(variables, batch, KEY), np.float64).mean()
    beta = np.array(cosine_betas(timesteps))
    products = np.cumprod(1 - beta)
    steps = 0.5 * 3 * np.sum(products[:-1] / (1 - products[:-1]) * beta[1:] / (1 - products[1:]))
    prior = 0.5 * (3 * products[-1] - 4 * products[-1] - 4 * np.log1p(-products[-1]))
    deviation = math.sqrt((1 - products[0]) / (1 - products[1]) * beta[1])
    outer = scipy.stats.norm.logcdf(-0.5 / deviation)
    first = -(3 * outer + np.log1p(-2 * np.exp(outer)))
    np.testing.assert_allclose(-actual, prior + steps + first, rtol=1e-3)


def test_bounds_sum_to_at_most_one_and_nearly_so(monkeypatch: pytest.MonkeyPatch):
    """Even a thousand steps with a perfect network lose a little of each image."""
    monkeypatch.setattr(diffusion, "Denoiser", partial(Oracle, timesteps=1000))
    model, draws, repetitions = diffusion.build(replace(CONFIG, timesteps=1000)), 1024, 6

    def bound(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        image = jnp.broadcast_to(jnp.asarray(BATCH["image"])[pair[0]], (draws, 2, 2, 1))
        return jnp.mean(model.log_likelihood({}, {"image": image}, pair[1]))

    pairs = jnp.tile(jnp.arange(81), repetitions), jax.random.split(KEY, 81 * repetitions)
    bounds = mapped(bound, pairs).reshape(repetitions, 81)
    error = np.exp(bounds).sum(axis=1).std(ddof=1) / math.sqrt(repetitions)
    total = np.exp(bounds.mean(axis=0)).sum()
    assert total < 1 + 1e-5 + 3 * error
    assert total > 0.9


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "heun"])
def test_samples_have_the_probabilities_of_the_images(solver: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diffusion, "Denoiser", Oracle)
    count, model = 20_000, diffusion.build(CONFIG)
    sampling = Sampling(solver=solver, steps=100)
    samples = np.asarray(jax.jit(lambda key: model.sample({}, key, {}, num=count, sampling=sampling))(KEY))
    observed = np.bincount(samples.reshape(count, 4) @ [27, 9, 3, 1], minlength=81) / count
    assert (np.abs(observed - PROBABILITIES) < 5 * np.sqrt(PROBABILITIES / count) + 0.003).all()


def draw(solver: Any, steps: int = 100, betas: Any = "linear") -> np.ndarray:
    """Samples that are no levels but real vectors, all solvers from the same noise."""
    model, sampling = diffusion.build(replace(CONFIG, levels=None, betas=betas)), Sampling(solver=solver, steps=steps)
    return np.asarray(jax.jit(lambda key: model.sample({}, key, {}, num=50, sampling=sampling))(KEY))


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("solver", ["ancestral", "ddim", "dpm_solver", "euler", "heun"])
def test_a_network_that_knows_the_data_leaves_no_noise(solver: str, betas: Any, monkeypatch: pytest.MonkeyPatch):
    class Known(nn.Module):
        config: Any
        channels: int

        def __call__(self, x_t: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
            return jnp.full_like(x_t, 0.3)

    monkeypatch.setattr(diffusion, "Denoiser", Known)
    np.testing.assert_allclose(draw(solver, 20, betas), 0.3, atol=1e-4)


def test_eulers_steps_on_a_chain_are_ddims_and_heuns_are_of_higher_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diffusion, "Denoiser", Oracle)
    ddim, limit = draw("ddim", 20), draw("heun")
    np.testing.assert_allclose(draw("euler", 20), ddim, atol=1e-4)
    assert np.abs(draw("heun", 20) - limit).mean() < np.abs(ddim - limit).mean() / 3


def test_the_loss_trains_the_variance_by_the_bound_and_the_mean_by_its_error(monkeypatch: pytest.MonkeyPatch):
    class Scaled(nn.Module):
        config: Any
        channels: int

        @nn.compact
        def __call__(self, x_t: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
            mean = self.param("mean", nn.initializers.constant(0.4), ()) * x_t
            fraction = self.param("fraction", nn.initializers.constant(-0.6), ())
            return jnp.concatenate([mean, jnp.broadcast_to(fraction, mean.shape)], axis=-1)

    monkeypatch.setattr(diffusion, "Denoiser", Scaled)
    model = diffusion.build(replace(CONFIG, variance="learned"))
    params = jax.jit(model.init)(KEY, BATCH)["params"]

    def part(params: Any, name: str) -> jax.Array:
        loss, aux = model.loss({"params": params}, BATCH, KEY, 0, train=True)
        return loss if name == "loss" else aux.metrics[name]

    gradient = {name: jax.jit(jax.grad(part), static_argnums=1)(params, name) for name in ("loss", "squared_error")}
    np.testing.assert_allclose(gradient["loss"]["mean"], gradient["squared_error"]["mean"], rtol=1e-5)
    assert gradient["squared_error"]["fraction"] == 0 != gradient["loss"]["fraction"]
    loss, aux = model.loss({"params": params}, BATCH, KEY, 0, train=True)
    steps = aux.metrics["reconstruction_bits_per_dim"] + aux.metrics["diffusion_bits_per_dim"]
    np.testing.assert_allclose(loss, aux.metrics["squared_error"] + steps / 1000, rtol=1e-5)


def test_min_snr_weighs_errors_of_the_data():
    """A network that predicts nothing: min(SNR, 5) |x|^2, whatever it predicts."""
    values = []
    for predict in ("x", "v"):
        model = diffusion.build(replace(CONFIG, predict=predict, weighting="min_snr"))
        batch = {"image": np.zeros((200, 2, 2, 1), np.uint8)}
        variables = jax.jit(model.init)(KEY, batch)  # the last layer starts at zero
        values.append(
            jax.jit(lambda v, model=model, batch=batch: model.loss(v, batch, KEY, 0, train=True)[0])(variables)
        )
    snr = np.exp(-np.asarray(discrete_gammas(list(BETAS))))
    np.testing.assert_allclose(values[0], np.minimum(snr, 5).mean(), rtol=0.02)
    # The target of v = alpha eps - sigma x, here with x = -1, has the mean square alpha^2 + sigma^2 = 1.
    np.testing.assert_allclose(values[1], (np.minimum(snr, 5) / (snr + 1)).mean(), rtol=0.1)


def test_latents_are_real_vectors_that_train_and_are_drawn():
    config = replace(CONFIG, levels=None, channels=8, predict="eps", timesteps=4, betas="cosine", variance="learned")
    model = diffusion.build(config)
    assert model.inputs["image"].dtype == "float32"
    batch = {"image": np.random.default_rng(0).normal(size=(6, 2, 2, 8)).astype(np.float32)}
    variables = jax.jit(model.init)(KEY, batch)
    loss, aux = jax.jit(lambda v: model.loss(v, batch, KEY, 0, train=True))(variables)
    assert jnp.isfinite(loss) and aux.metrics.keys() == {"squared_error"}
    sample = jax.jit(lambda v: model.sample(v, KEY, {}, num=3))(variables)
    assert sample.shape == (3, 2, 2, 8) and sample.dtype == jnp.float32


def test_a_chain_that_ends_in_noise_alone(monkeypatch: pytest.MonkeyPatch):
    """Its bound is finite, its samples come from noise by solvers that need no slope, and eps says nothing there."""
    monkeypatch.setattr(diffusion, "Denoiser", Still)
    config = replace(CONFIG, betas="cosine", zero_terminal=True, predict="x")
    model = diffusion.build(config)
    assert np.isfinite(model.log_likelihood({}, BATCH, KEY)).all()
    for solver in ("ancestral", "ddim", "dpm_solver"):
        sample = model.sample({}, KEY, {}, num=5, sampling=Sampling(solver=solver, steps=20))
        np.testing.assert_array_equal(sample, 2)
    with pytest.raises(UserError, match=r"sampling\.solver is heun, which begins at sigma / alpha"):
        model.sample({}, KEY, {}, num=1, sampling=Sampling(solver="heun", steps=20))
    with pytest.raises(UserError, match=r"says nothing of x where eps is predicted: set predict to v or x"):
        replace(config, predict="eps")


class Still(nn.Module):
    """Predicts an image of the last level."""

    config: Any
    channels: int

    def __call__(self, x_t: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        return jnp.ones((*x_t.shape[:-1], self.channels))


def test_steps_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"timesteps is 1: it must be at least 2"):
        replace(CONFIG, timesteps=1)
    with pytest.raises(UserError, match=r"sampling\.steps is 0: it must be at least 1"):
        Sampling(steps=0)
    model = diffusion.build(CONFIG)
    assert model.sampling == Sampling(steps=100)
    with pytest.raises(UserError, match=r"sampling\.steps is 101 and the model's chain has timesteps=100: ask for as"):
        model.sample({}, KEY, {}, num=1, sampling=Sampling(steps=101))


def test_too_few_steps_of_linear_betas_are_refused_before_they_are_built():
    assert diffusion.build(replace(CONFIG, timesteps=21)).sample is not None
    with pytest.raises(UserError, match=r"timesteps=20 of linear betas would add more noise than there can be: choose"):
        replace(CONFIG, timesteps=20)
