"""Models of diffusion of real vectors, such as latents: their densities are those of Gaussian data, known exactly."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vlm_jax.contract import Model
from vlm_jax.models import diffusion, probability_flow, vdm
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.unet import UNet

KEY = jax.random.key(0)
NETWORK = Network(backbone=UNet(widths=(4,), blocks=1, groups=4))
SHAPE: dict[str, Any] = {"image_size": 2, "channels": 1, "levels": None, "network": NETWORK}
X = np.random.default_rng(0).normal(size=(4000, 2, 2, 1)).astype(np.float32)
"""Independent, of deviation one, so that so are the states of a process that keeps the variance."""
EXACT = scipy.stats.norm.logpdf(X).sum(axis=(1, 2, 3))


class Exact(nn.Module):
    """E[eps - x | x_t] of a straight path, and elsewhere, where a network predicts x, E[x | x_t]."""

    config: Any
    channels: int

    def __call__(self, inputs: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        return CASE["formula"](inputs, jnp.broadcast_to(time, (len(inputs),))[:, None, None, None] / 1000)


CASE: dict[str, Callable[..., jax.Array]] = {}


def of_straight(x_t: jax.Array, t: jax.Array) -> jax.Array:
    return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x_t


def of_straight_data(x_t: jax.Array, t: jax.Array) -> jax.Array:
    return (1 - t) / ((1 - t) ** 2 + t**2) * x_t


@pytest.mark.parametrize("predict", ["velocity", "x"])
def test_the_density_of_a_probability_flow(predict: str, monkeypatch: pytest.MonkeyPatch):
    """By Hutchinson's estimate, here of a multiple of the identity, which is exact."""
    monkeypatch.setattr(probability_flow, "Denoiser", Exact)
    monkeypatch.setitem(CASE, "formula", of_straight if predict == "velocity" else of_straight_data)
    model = probability_flow.build(probability_flow.Config(**SHAPE, predict=predict, likelihood_steps=400))
    assert (model.bound, model.dequantisation, model.inputs["image"].dtype) == ("estimate", None, "float32")
    found = jax.jit(lambda key: model.log_likelihood({}, {"image": X}, key))(KEY)
    if predict == "velocity":
        np.testing.assert_allclose(found, EXACT, atol=0.02)
    else:  # below t = 0.05 the velocity is held, and of that much the flow stops short of the data
        assert 0.01 < np.mean(np.abs(found - EXACT)) < 0.1


def bounds(model: Model, variables: Any) -> np.ndarray:
    """Of each vector, the mean of several."""
    one = jax.jit(lambda key: model.log_likelihood(variables, {"image": X}, key))
    return np.mean([one(jax.random.fold_in(KEY, i)) for i in range(20)], axis=0)


def test_the_bound_of_variational_diffusion_is_reached_but_for_the_least_noise(monkeypatch: pytest.MonkeyPatch):
    """With the exact network and gamma from -7 to 7 there is lost: KL(q(x_0 | x) || p(x_0)) of what p(x | x_0) is."""
    monkeypatch.setattr(vdm, "Denoiser", Exact)
    ends = {"first_gamma": jnp.float32(-7), "last_gamma": jnp.float32(7)}

    def formula(inputs: jax.Array, time: jax.Array) -> jax.Array:
        gamma = -7 + 14 * time
        return jnp.sqrt(jax.nn.sigmoid(-gamma)) * inputs

    monkeypatch.setitem(CASE, "formula", formula)
    model = vdm.build(vdm.Config(**SHAPE, predict="x", fourier=(), gamma_min=-7.0, gamma_max=7.0))
    found = bounds(model, {"params": ends})
    error = found.std() / np.sqrt(len(X))
    assert abs(np.mean(found - EXACT)) < 0.05 + error, (found.mean(), EXACT.mean())
    assert np.mean(found - EXACT) < 0.05


def test_samples_of_real_vectors_are_the_mean_of_the_least_noisy_state(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vdm, "Denoiser", Exact)
    monkeypatch.setitem(CASE, "formula", lambda inputs, time: jnp.full_like(inputs, 0.7))
    model = vdm.build(vdm.Config(**SHAPE, predict="x", fourier=(), gamma_min=-9.0, gamma_max=5.0))
    ends = {"first_gamma": jnp.float32(-9), "last_gamma": jnp.float32(5)}
    drawn = model.sample({"params": ends}, KEY, {}, num=50, sampling=vdm.Sampling(solver="ddim", steps=40))
    assert drawn.dtype == jnp.float32
    np.testing.assert_allclose(drawn, 0.7, atol=0.05)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_the_bound_of_a_chain_lacks_what_its_last_step_has_too_little_variance(
    betas: Any, monkeypatch: pytest.MonkeyPatch
):
    """Of these data the steps are Gaussian, with the variance of the forward step; but the last has another one.

    That of the posterior of the step before, as 2006.11239's release has it: of a Gaussian whose variance is r times as
    large that costs (r - 1 - ln r) / 2.
    """
    monkeypatch.setattr(diffusion, "Denoiser", Exact)
    model = diffusion.build(diffusion.Config(**SHAPE, betas=betas, predict="x", timesteps=400, variance="forward"))
    values = np.array(diffusion.BETAS[betas](400))
    alphas = jnp.asarray(np.sqrt(np.cumprod(1 - values)), jnp.float32)

    def formula(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return alphas[jnp.round(400 * t).astype(jnp.int32)] * x_t

    monkeypatch.setitem(CASE, "formula", formula)
    assert (model.bound, model.inputs["image"].dtype) == ("lower", "float32")
    first, second = values[:2]
    ratio = (first + second - first * second) / second
    found = bounds(model, {})
    error = found.std() / np.sqrt(len(X))
    lost = 4 * (ratio - 1 - np.log(ratio)) / 2
    assert abs((EXACT - found).mean() - lost) < 0.05 + error and lost > 0.3
