"""Variational diffusion of 2x2 images of 3 levels, with the best network there is: the true mean of the data."""

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
import scipy.special
import scipy.stats

from optimized import mapped
from vlm_jax.contract import Model
from vlm_jax.errors import UserError
from vlm_jax.models import vdm
from vlm_jax.nn.conditioning import Told
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.schedule import STEPS, MonotoneSchedule
from vlm_jax.nn.unet import UNet
from vlm_jax.objectives.diffusion import Level, from_data, variance_preserving

NETWORK = Network(backbone=UNet(widths=(8,), blocks=1, groups=4))
ENDS = -5.0, 6.0
CONFIG = vdm.Config(
    image_size=2, channels=1, levels=3, network=NETWORK, gamma_min=ENDS[0], gamma_max=ENDS[1], fourier=(0,)
)
IMAGES = np.array(list(itertools.product(range(3), repeat=4)), np.uint8)
X = np.float32(IMAGES) - 1
PROBABILITIES = np.float32(np.random.default_rng(0).dirichlet(np.full(81, 2.0)))
KEY = jax.random.key(0)
DRAWS, REPETITIONS = 2048, 8


class Oracle(nn.Module):
    """Predicts the noise by the mean of the images given the noisy one, which the model adds to what it returns."""

    config: Any
    channels: int

    def __call__(
        self, inputs: jax.Array, time: jax.Array, label: Any = None, *, train: bool = False, guidance: float = 1.0
    ) -> jax.Array:
        x_t = inputs[..., :1].reshape(-1, 4)
        level = Level(*(v[:, None] for v in variance_preserving(ENDS[0] + (ENDS[1] - ENDS[0]) * time / 1000)))
        products = level.alpha * (x_t @ X.T) - 0.5 * level.alpha**2 * np.sum(X**2, axis=-1)
        data = jax.nn.softmax(jnp.log(PROBABILITIES) + products / level.sigma**2) @ X
        return (from_data(data, x_t, level, "eps") - x_t).reshape(inputs[..., :1].shape)


class Recorder(nn.Module):
    """Predicts no noise at all, and keeps what it is asked, in `seen`, and nothing in parameters."""

    config: Any
    channels: int

    def __call__(self, inputs: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        SEEN.append((np.asarray(inputs, np.float64), np.asarray(time, np.float64)))
        return -inputs[..., :1]


class Silent(nn.Module):
    """Predicts no noise at all."""

    config: Any
    channels: int

    def __call__(self, inputs: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
        return -inputs[..., :1]


SEEN: list[tuple[np.ndarray, np.ndarray]] = []


def parameters(schedule: str = "linear") -> dict[str, Any]:
    """The ends of the schedule; a monotone one goes half of its way in the first fifth of the time."""
    ends = {"first_gamma": jnp.float32(ENDS[0]), "last_gamma": jnp.float32(ENDS[1])}
    if schedule == "linear":
        return {"params": ends}
    centre = jnp.linspace(0, 1, STEPS)
    weight = jnp.where(centre < 0.2, -4.0, 0.8)  # the sign means nothing
    return {
        "params": ends
        | {"schedule": {"line": jnp.float32(0.2), "gain": jnp.full(STEPS, 20.0), "centre": centre, "weight": weight}}
    }


@pytest.fixture(scope="module", params=[pytest.param("linear", marks=pytest.mark.slow), "monotone"])
def oracle(request: pytest.FixtureRequest) -> Any:
    """The model and its variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vdm, "Denoiser", Oracle)
        yield vdm.build(replace(CONFIG, schedule=request.param)), parameters(request.param)


def test_the_bounds_of_all_images_sum_to_one_and_each_is_reached(oracle):
    """Continuous time loses nothing if the network is perfect."""
    model, variables = oracle

    def bound(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        image = jnp.broadcast_to(jnp.asarray(IMAGES).reshape(81, 2, 2, 1)[pair[0]], (DRAWS, 2, 2, 1))
        return jnp.mean(model.log_likelihood(variables, {"image": image}, pair[1]))

    pairs = jnp.tile(jnp.arange(81), REPETITIONS), jax.random.split(KEY, 81 * REPETITIONS)
    bounds = mapped(bound, pairs).reshape(REPETITIONS, 81)
    error = np.exp(bounds).sum(axis=1).std(ddof=1) / math.sqrt(REPETITIONS)
    assert error < 0.02
    assert abs(np.exp(bounds.mean(axis=0)).sum() - 1) < 3 * error
    errors = bounds.std(axis=0, ddof=1) / math.sqrt(REPETITIONS)
    assert np.abs(bounds.mean(axis=0) - np.log(PROBABILITIES)).mean() < 2 * errors.mean()


def exact_bound(image: np.ndarray, x_t: np.ndarray, gamma: np.ndarray, first: float, last: float) -> np.ndarray:
    """2107.00630 in float64 for a network that predicts no noise, where the levels are far apart in the least noise."""
    x = image.astype(np.float64).reshape(len(image), -1) - 1
    alpha, sigma = np.sqrt(1 / (1 + np.exp(gamma)))[:, None], np.sqrt(1 / (1 + np.exp(-gamma)))[:, None]
    eps = (x_t.reshape(x.shape) - alpha * x) / sigma
    variance = 1 / (1 + math.exp(-last))
    prior = 0.5 * np.sum((1 - variance) * x**2 + variance - 1 - math.log(variance), axis=-1)
    return -prior - 0.5 * (last - first) * np.sum(eps**2, axis=-1)


def recorded_bound(scale: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The model's bound of all images, and the formula's for the noise that the network was shown."""
    first, last = -9.0, 2.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vdm, "Denoiser", Recorder)
        model = vdm.build(CONFIG)
        variables = {"params": {"first_gamma": jnp.float32(first), "last_gamma": jnp.float32(last)}}
        SEEN.clear()
        image = IMAGES.reshape(81, 2, 2, 1)
        actual = np.asarray(model.log_likelihood(variables, {"image": image}, KEY), np.float64)
    ((inputs, time),) = SEEN
    gamma = ENDS[0] + (ENDS[1] - ENDS[0]) * time / 1000
    np.testing.assert_allclose(inputs[..., 1], np.sin(2 * np.pi * inputs[..., 0]), atol=1e-5)
    np.testing.assert_allclose(np.diff(np.sort((gamma - first) / (last - first))), 1 / 81, atol=1e-5)
    return actual + scale, exact_bound(image, inputs[..., 0], gamma, first, last)


def test_every_constant_of_the_bound():
    actual, expected = recorded_bound()
    np.testing.assert_allclose(actual, expected, atol=2e-3, rtol=2e-5)


def test_an_error_of_five_thousandths_of_a_bit_is_seen():
    actual, expected = recorded_bound(0.005 * 4 * math.log(2))
    assert np.abs(actual - expected).mean() > 0.01


def test_the_loss_is_the_negative_bound_in_bits_per_dimension(oracle):
    model, variables = oracle
    batch = {"image": IMAGES.reshape(81, 2, 2, 1)}
    loss, aux = jax.jit(lambda key: model.loss(variables, batch, key, 0, train=True))(KEY)
    _, bound_key = jax.random.split(KEY)
    bound = jax.jit(lambda key: model.log_likelihood(variables, batch, key))(bound_key)
    np.testing.assert_allclose(loss, -bound.mean() / (4 * math.log(2)), rtol=1e-5)
    np.testing.assert_allclose(sum(aux.metrics.values()), loss, rtol=1e-6)
    assert aux.metrics.keys() == {f"{name}_bits_per_dim" for name in ("reconstruction", "diffusion", "prior")}
    assert aux.weight == len(batch["image"])


def test_a_learned_schedule_has_the_gradient_of_the_mean_square_and_the_ends_that_of_the_bound(
    monkeypatch: pytest.MonkeyPatch,
):
    """With a network that errs by what depends on gamma alone, the mean square is an integral over the time."""

    class Wrong(nn.Module):
        config: Any
        channels: int

        def __call__(self, inputs: jax.Array, time: jax.Array, told: Any = None, **options: Any) -> jax.Array:
            gamma = (ENDS[0] + (ENDS[1] - ENDS[0]) * time / 1000)[:, None, None, None]
            noise = inputs[..., :1] / variance_preserving(gamma).sigma  # of a grey image, x = 0
            return noise + error(gamma) - inputs[..., :1]

    def error(gamma: jax.Array) -> jax.Array:
        return 1 + 0.5 * jnp.tanh(gamma / 3)

    def cost(progress: jax.Array, slope: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
        """The diffusion term in bits a dimension."""
        return 0.5 * slope * (last - first) * error(first + (last - first) * progress) ** 2 / math.log(2)

    def mean_square(schedule: Any) -> jax.Array:
        progress, slope = MonotoneSchedule().apply({"params": schedule}, (jnp.arange(8192) + 0.5) / 8192)
        return jnp.mean(jnp.square(cost(progress, slope, *ENDS)))

    monkeypatch.setattr(vdm, "Denoiser", Wrong)
    variables, batch = parameters("monotone"), {"image": np.ones((8192, 2, 2, 1), np.uint8)}
    models = {name: vdm.build(replace(CONFIG, schedule=name)) for name in ("linear", "monotone")}
    gradients = {
        name: jax.jit(jax.grad(lambda v, m=model: m.loss(v, batch, KEY, 0, train=True)[0]))(variables)["params"]
        for name, model in models.items()
    }
    expected = jax.grad(mean_square)(variables["params"]["schedule"])
    for name, gradient in gradients["monotone"]["schedule"].items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient / scale, expected[name] / scale, atol=2e-3)
    for end in ("first_gamma", "last_gamma"):
        np.testing.assert_allclose(gradients["monotone"][end], gradients["linear"][end], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["ancestral", "dpm_solver"])
def test_samples_have_the_probabilities_of_the_images(oracle, solver: str):
    _, variables = oracle
    schedule = "monotone" if "schedule" in variables["params"] else "linear"
    count, model = 20_000, vdm.build(replace(CONFIG, schedule=schedule))
    sampling = vdm.Sampling(solver=solver, steps=100)
    samples = np.asarray(jax.jit(lambda key: model.sample(variables, key, {}, num=count, sampling=sampling))(KEY))
    observed = np.bincount(samples.reshape(count, 4) @ [27, 9, 3, 1], minlength=81) / count
    error = np.sqrt(PROBABILITIES / count)
    assert (np.abs(observed - PROBABILITIES) < 5 * error + 0.002).all()


def test_classes_are_read_and_asked_for(monkeypatch: pytest.MonkeyPatch):
    """With a network that takes an image for the level of its label."""

    class Labelled(nn.Module):
        config: Any
        channels: int

        def __call__(self, inputs: jax.Array, time: jax.Array, told: Told, **options: Any) -> jax.Array:
            assert told.label is not None
            return jnp.broadcast_to(told.label[:, None, None, None] - 1.0, inputs[..., :1].shape)

    monkeypatch.setattr(vdm, "Denoiser", Labelled)
    network = Network(backbone=NETWORK.backbone, classes=3)
    model: Model = vdm.build(
        vdm.Config(image_size=2, channels=1, levels=3, network=network, predict="x", gamma_min=-9.0)
    )
    draw = partial(model.sample, sampling=vdm.Sampling(steps=5))
    assert model.inputs["label"].limit == 3
    variables = {"params": {"first_gamma": jnp.float32(-9), "last_gamma": jnp.float32(5)}}
    samples = draw(variables, KEY, {"label": jnp.array([2, 0, 1, 1])}, num=4)
    np.testing.assert_array_equal(samples[:, 1, 1, 0], [2, 0, 1, 1])
    assert set(np.unique(draw(variables, KEY, {}, num=50))) == {0, 1, 2}
    image = np.uint8([2, 0]).repeat(4).reshape(2, 2, 2, 1)
    right = model.log_likelihood(variables, {"image": image, "label": np.int32([2, 0])}, KEY)
    wrong = model.log_likelihood(variables, {"image": image, "label": np.int32([0, 2])}, KEY)
    assert (right > wrong + 1).all() and (right > -0.1).all()


def test_configurations_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"gamma_min=2.0 must be below gamma_max=2.0"):
        vdm.Config(image_size=2, network=NETWORK, gamma_min=2.0, gamma_max=2.0)
    with pytest.raises(UserError, match=r"sampling\.steps is 0: it must be at least 1"):
        vdm.Sampling(steps=0)


def test_the_network_sees_the_octaves_that_the_config_names(monkeypatch: pytest.MonkeyPatch):
    """sin and cos of 2 pi 2^n x, n by n: by default those of the release, as are the ends of gamma."""
    default = vdm.Config(image_size=2, network=NETWORK)
    assert (default.fourier, default.gamma_min, default.gamma_max) == ((6, 7), -13.3, 5.0)
    monkeypatch.setattr(vdm, "Denoiser", Recorder)
    x = np.linspace(-1.2, 1.3, 8, dtype=np.float32).reshape(2, 2, 2, 1)
    for octaves in ((6, 7), (0, 3, 1)):
        SEEN.clear()
        vdm.VDM(replace(CONFIG, fourier=octaves)).apply(parameters(), jnp.asarray(x), jnp.zeros(2))
        waves = [wave(2 * np.pi * 2.0**n * np.float64(x)) for n in octaves for wave in (np.sin, np.cos)]
        np.testing.assert_allclose(SEEN[0][0], np.concatenate([x, *waves], axis=-1), atol=1e-3)


@pytest.mark.parametrize("first", [-1.0, 0.3, 2.0])
def test_what_much_noise_leaves_open_of_the_levels_is_the_quadratures(first: float, monkeypatch: pytest.MonkeyPatch):
    """E log p(level | x_0) by Gauss and Hermite, with Bayes' rule between the three Gaussians of x_0 (equation 12)."""
    monkeypatch.setattr(vdm, "Denoiser", Silent)
    model = vdm.build(CONFIG)
    variables = {"params": {"first_gamma": jnp.float32(first), "last_gamma": jnp.float32(6.0)}}
    batch = {"image": jnp.tile(jnp.asarray(IMAGES).reshape(81, 2, 2, 1), (200, 1, 1, 1))}
    _, aux = jax.jit(lambda: model.loss(variables, batch, KEY, 0, train=False))()
    alpha, sigma = math.sqrt(1 / (1 + math.exp(first))), math.sqrt(1 / (1 + math.exp(-first)))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    values = np.array([-1.0, 0.0, 1.0])
    x_0 = alpha * values[:, None] + sigma * nodes
    log_joint = scipy.stats.norm.logpdf(x_0[..., None], alpha * values, sigma)
    log_posterior = log_joint - scipy.special.logsumexp(log_joint, axis=-1, keepdims=True)
    own = log_posterior[np.arange(3), :, np.arange(3)] @ weights / weights.sum()
    expected = -own.mean() / math.log(2)
    assert expected > 0.2
    np.testing.assert_allclose(aux.metrics["reconstruction_bits_per_dim"], expected, rtol=0.015)
