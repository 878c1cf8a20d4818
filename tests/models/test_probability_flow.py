"""Rectified flow and EDM, with the exact network for Gaussian data, whose density is in closed form."""

import math
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from densities import IMAGES
from optimized import mapped
from vlm_jax.errors import UserError
from vlm_jax.models import probability_flow
from vlm_jax.models.probability_flow import Sampling
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.unet import UNet
from vlm_jax.objectives.diffusion import edm_preconditioning

NETWORK = Network(backbone=UNet(widths=(8,), blocks=1, groups=4))
CONFIG = probability_flow.Config(image_size=2, channels=1, levels=3, network=NETWORK, likelihood_steps=400)
BATCH = {"image": IMAGES}
DEVIATION = 1.0
"""Of the data: independent Gaussian sub-pixels on [-1, 1] and beyond."""
KEY = jax.random.key(0)


class Velocity(nn.Module):
    """E[eps - x | x_t]"""

    config: Any
    channels: int

    def __call__(self, x_t: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        t = (time / 1000)[:, None, None, None]
        return (t - (1 - t) * DEVIATION**2) / ((1 - t) ** 2 * DEVIATION**2 + t**2) * x_t


class Preconditioned(nn.Module):
    """EDM's F for E[x | x_t]."""

    config: Any
    channels: int

    def __call__(self, inputs: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        sigma = jnp.exp(4 * time / 1000)[:, None, None, None]
        p = edm_preconditioning(sigma)
        x_t = inputs / p.into
        return (DEVIATION**2 / (DEVIATION**2 + sigma**2) - p.skip) * x_t / p.out


@pytest.fixture(params=["rectified_flow", "edm"])
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> probability_flow.Config:
    monkeypatch.setattr(probability_flow, "Denoiser", Velocity if request.param == "rectified_flow" else Preconditioned)
    return replace(CONFIG, process=request.param)


@pytest.mark.parametrize("error", [0.0, 0.005 * 4 * math.log(2)], ids=["as it is", "five thousandths of a bit off"])
def test_the_likelihoods_of_all_images_sum_to_the_density_between_the_ends(config, error: float):
    """In expectation over the noise of dequantisation, which the probability of an image averages over."""
    model = probability_flow.build(config)
    keys = jax.random.split(KEY, 256)
    values = mapped(lambda key: model.log_likelihood({}, BATCH, key), keys)
    totals = np.exp(values + error).sum(axis=1)
    expected = math.erf(1 / (DEVIATION * math.sqrt(2))) ** 4
    standard_error = totals.std(ddof=1) / 16
    assert standard_error < 2e-3 * expected
    assert (abs(totals.mean() / expected - 1) < 7e-3) == (error == 0)


@pytest.mark.parametrize("solver", ["ancestral", "heun", "dpm_solver"])
def test_samples_have_the_distribution_of_the_data(config, solver: str):
    model, sampling = probability_flow.build(replace(config, levels=None)), Sampling(solver=solver, steps=100)
    samples = np.asarray(jax.jit(lambda key: model.sample({}, key, {}, num=20_000, sampling=sampling))(KEY))
    np.testing.assert_allclose(samples.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(samples.std(axis=0), DEVIATION, rtol=0.1 if solver == "ancestral" else 0.03)


def test_samples_are_levels(config):
    """Of the share of [-1, 1] that each has, the outermost with the tails."""
    model, sampling = probability_flow.build(config), Sampling(steps=100)
    samples = np.asarray(jax.jit(lambda key: model.sample({}, key, {}, num=20_000, sampling=sampling))(KEY))
    middle = math.erf(1 / 3 / (DEVIATION * math.sqrt(2)))
    observed = np.bincount(samples.reshape(-1), minlength=3) / samples.size
    np.testing.assert_allclose(observed, [(1 - middle) / 2, middle, (1 - middle) / 2], atol=0.01)


def test_the_loss_of_the_exact_network_is_what_no_network_can_know(config):
    """E Var[target | x_t], by quadrature over the times, of data with the deviation of dequantised levels."""
    model = probability_flow.build(replace(config, levels=None))
    x = DEVIATION * np.random.default_rng(0).normal(size=(20_000, 2, 2, 1)).astype(np.float32)
    loss, aux = jax.jit(lambda key: model.loss({}, {"image": x}, key, 0, train=True))(KEY)
    u, variance = (np.arange(10_000) + 0.5) / 10_000, DEVIATION**2
    if config.process == "rectified_flow":
        # The variance of x given x_t, over t^2.
        expected = np.mean(variance / ((1 - u) ** 2 * variance + u**2))
    else:
        sigma = np.exp(-1.2 + 1.2 * np.asarray(jax.scipy.special.ndtri(jnp.float32(u))))
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        expected = np.mean(weight * variance * sigma**2 / (variance + sigma**2))
    np.testing.assert_allclose(loss, expected, rtol=0.02)
    assert aux.weight == len(x)


class Data(nn.Module):
    """E[x | x_t]"""

    config: Any
    channels: int

    def __call__(self, x_t: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        t = (time / 1000)[:, None, None, None]
        return (1 - t) * DEVIATION**2 / ((1 - t) ** 2 * DEVIATION**2 + t**2) * x_t


class Noise(Data):
    """E[eps | x_t]."""

    def __call__(self, x_t: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        t = (time / 1000)[:, None, None, None]
        return t / ((1 - t) ** 2 * DEVIATION**2 + t**2) * x_t


@pytest.mark.parametrize(("predict", "exact"), [("x", Data), ("eps", Noise)])
def test_a_prediction_of_data_or_noise_has_the_velocitys_loss_with_time_clamped(
    predict: Any, exact: Any, monkeypatch: pytest.MonkeyPatch
):
    """E |x - xh|^2 / max(t, 0.05)^2 (2511.13720, section 4.3), of the noise with 1 - t, by quadrature."""
    monkeypatch.setattr(probability_flow, "Denoiser", exact)
    model = probability_flow.build(replace(CONFIG, levels=None, predict=predict))
    x = DEVIATION * np.random.default_rng(0).normal(size=(40_000, 2, 2, 1)).astype(np.float32)
    loss, _ = jax.jit(lambda key: model.loss({}, {"image": x}, key, 0, train=True))(KEY)
    t, variance = (np.arange(10_000) + 0.5) / 10_000, DEVIATION**2
    spread = (1 - t) ** 2 * variance + t**2
    share = t if predict == "x" else 1 - t
    loss_of = variance * share**2 / spread / np.maximum(share, 0.05) ** 2
    np.testing.assert_allclose(loss, np.mean(loss_of), rtol=0.01)
    # The velocity is so many times x_t, and what begins with deviation 1 has come to this.
    rate = (1 - (1 - t) * variance / spread if predict == "x" else t / spread - 1) / np.maximum(share, 0.05)
    samples = model.sample({}, KEY, {}, num=20_000, sampling=Sampling(steps=100))
    np.testing.assert_allclose(samples.std(axis=0), np.exp(-np.mean(rate)), rtol=0.02)


@pytest.mark.parametrize(("logit_normal", "shift"), [((-0.8, 0.8), 1.0), (None, 3.0), ((0.5, 1.0), 0.25)])
def test_times_of_training_are_those_of_the_config(logit_normal: Any, shift: float, monkeypatch: pytest.MonkeyPatch):
    """By the loss of the exact network, which hangs on the time, in quadrature."""
    monkeypatch.setattr(probability_flow, "Denoiser", Velocity)
    model = probability_flow.build(replace(CONFIG, levels=None, logit_normal=logit_normal, shift=shift))
    x = DEVIATION * np.random.default_rng(0).normal(size=(40_000, 2, 2, 1)).astype(np.float32)
    loss, _ = jax.jit(lambda key: model.loss({}, {"image": x}, key, 0, train=True))(KEY)
    t, variance = (np.arange(10_000) + 0.5) / 10_000, DEVIATION**2
    if logit_normal is not None:
        t = scipy.special.expit(logit_normal[0] + logit_normal[1] * scipy.stats.norm.ppf(t))
    t = shift * t / (1 + (shift - 1) * t)  # 2403.03206, equation 23
    expected = np.mean(variance / ((1 - t) ** 2 * variance + t**2))
    np.testing.assert_allclose(loss, expected, rtol=0.01)
    plain = np.mean(variance / ((1 - t / 2) ** 2 * variance + (t / 2) ** 2))
    assert abs(plain / expected - 1) > 0.03


def test_a_shift_is_that_of_the_times_that_samples_pass(monkeypatch: pytest.MonkeyPatch):
    """On unit noise, noise of that deviation: ((1 - t) x + t s eps) / (1 - t + t s) is the line at the shifted time."""
    monkeypatch.setattr(probability_flow, "Denoiser", Velocity)
    model = probability_flow.build(replace(CONFIG, levels=None, shift=3.0))
    seen: list[float] = []

    def watch(denoise: Any, schedule: Any, times: jax.Array, x: jax.Array, key: jax.Array, **_: Any) -> jax.Array:
        seen.extend(np.asarray(times).tolist())
        return x

    monkeypatch.setitem(probability_flow.SOLVERS, "euler", watch)
    model.sample({}, KEY, {}, num=1, sampling=Sampling(solver="euler", steps=4))
    t = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(seen, t * 3 / (1 - t + t * 3), rtol=1e-6)


def test_settings_of_a_rectified_flow_are_none_of_edms():
    for change in ({"predict": "x"}, {"logit_normal": (0.0, 1.0)}, {"shift": 2.0}):
        with pytest.raises(UserError, match=r"predict, logit_normal and shift are of a rectified flow: leave them out"):
            replace(CONFIG, process="edm", **change)
    with pytest.raises(UserError, match=r"shift is 0\.0: it must be above 0, and 1 is for none"):
        replace(CONFIG, shift=0.0)
    with pytest.raises(UserError, match=r"logit_normal is \(0\.0, 0\.0\): its deviation must be above 0"):
        replace(CONFIG, logit_normal=(0.0, 0.0))


def test_training_dequantises_levels():
    """A network that knows nothing predicts zero: what is left is the variance of noise and dequantised data."""
    model = probability_flow.build(CONFIG)
    batch = {"image": np.ones((5000, 2, 2, 1), np.uint8)}
    variables = jax.jit(model.init)(KEY, {"image": batch["image"][:1]})
    loss = jax.jit(lambda v: model.loss(v, batch, KEY, 0, train=False)[0])(variables)
    np.testing.assert_allclose(loss, 1 + (2 / 3) ** 2 / 12, rtol=0.02)


def test_too_few_steps_are_refused():
    with pytest.raises(UserError, match="likelihood_steps is 1: it must be at least 2"):
        replace(CONFIG, likelihood_steps=1)
    with pytest.raises(UserError, match=r"sampling\.steps is 0: it must be at least 1"):
        Sampling(steps=0)


def test_a_single_step_goes_straight_to_the_mean_of_the_data(config):
    """Which is 0, whatever the noise: what a model of straight paths is for (2209.03003)."""
    model = probability_flow.build(replace(config, levels=None))
    for solver in ("heun", "euler", "ddim", "dpm_solver"):
        samples = model.sample({}, KEY, {}, num=50, sampling=Sampling(solver=solver, steps=1))
        np.testing.assert_allclose(samples, 0, atol=0.05)


class Zero(nn.Module):
    """Says nothing."""

    config: Any
    channels: int

    def __call__(self, x_t: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        return jnp.zeros_like(x_t)


@pytest.mark.parametrize("deviation", [0.5, 1.3])
def test_edm_is_preconditioned_by_the_deviation_of_its_config(deviation: float, monkeypatch: pytest.MonkeyPatch):
    """A network that says nothing leaves skip x_t for x: of x = 0.7 the error is skip eps sigma - (1 - skip) 0.7."""
    monkeypatch.setattr(probability_flow, "Denoiser", Zero)
    model = probability_flow.build(replace(CONFIG, process="edm", levels=None, data_deviation=deviation))
    batch = {"image": jnp.full((20_000, 2, 2, 1), 0.7)}
    loss, _ = jax.jit(lambda key: model.loss({}, batch, key, 0, train=True))(KEY)
    u = (np.arange(10_000) + 0.5) / 10_000
    sigma = np.exp(-1.2 + 1.2 * scipy.stats.norm.ppf(u))
    skip = deviation**2 / (sigma**2 + deviation**2)
    weight = (sigma**2 + deviation**2) / (sigma * deviation) ** 2
    np.testing.assert_allclose(loss, np.mean(weight * ((skip * sigma) ** 2 + ((1 - skip) * 0.7) ** 2)), rtol=0.02)
    # Denoised once more from the last deviation but one, what is left is skip x_t.
    seen: list[np.ndarray] = []
    sampling = Sampling(solver="ddim", steps=2)
    model.sample({}, KEY, {}, num=2, sampling=sampling, on_step=lambda done, x: seen.append(np.asarray(x)))
    jax.effects_barrier()
    skip = deviation**2 / (0.002**2 + deviation**2)
    np.testing.assert_allclose(seen[1], skip * seen[0], rtol=1e-4)


def test_deviations_of_samples_fall_by_the_seventh_power_from_80_to_a_five_hundredth():
    """2206.00364, equation 5 and table 1."""
    i = np.arange(12)
    expected = (80 ** (1 / 7) + i / 11 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(probability_flow.karras_times(12), expected, rtol=1e-3)
    assert CONFIG.data_deviation == 0.5
