"""The variational autoencoder: on 2x2 images of 3 levels all 81 probabilities are known, and every bound is checked."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from densities import IMAGES, check_copies
from optimized import mapped
from vlm_jax.contract import Model
from vlm_jax.errors import UserError
from vlm_jax.models import vae
from vlm_jax.objectives.likelihood import logistic_mixture_mean

CONFIG = vae.Config(image_size=2, channels=1, levels=3, latent=2, widths=(8,), mixtures=2)
MODELS = {"standard": vae.build(CONFIG), "learned": vae.build(replace(CONFIG, pseudo_inputs=3))}
BATCH = {"image": IMAGES}
DRAWS = 8192
KEY = jax.random.key(1)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    """With either prior."""
    return MODELS[request.param]


def random_variables(model: Model) -> Any:
    """Random values for every parameter, so that latents, posteriors and pixels depend on one another.

    The posteriors are kept wide: those much narrower than the true ones have importance weights of infinite variance.
    """
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, BATCH)
    variables = jax.tree.map(lambda leaf: (0.5 * random.normal(size=leaf.shape)).astype(np.float32), shapes)
    posterior = variables["params"]["encoder"]["posterior"]
    posterior["kernel"] *= 0.3
    posterior["bias"] = posterior["bias"] * 0.3 + np.array([0, 0, 0.5, 0.5], np.float32)
    return jax.tree.map(jnp.asarray, variables)


@pytest.fixture(scope="module")
def variables(model) -> Any:
    return random_variables(model)


def draws(function: Any, variables: Any) -> np.ndarray:
    """[draws, images], nats"""
    return mapped(lambda key: function(variables, BATCH, key), jax.random.split(KEY, DRAWS), batch_size=64)


@pytest.fixture(scope="module")
def bounds(model, variables) -> np.ndarray:
    return draws(model.log_likelihood, variables)


@pytest.fixture(scope="module")
def log_weights(model, variables) -> np.ndarray:
    return draws(model.log_weight, variables)


def test_importance_weights_are_unbiased(log_weights):
    """Their means sum to one; 0.005 bits a dimension, either way, would be 0.0138 of it, twice what is allowed."""
    totals = np.exp(log_weights).sum(axis=1)
    error = totals.std(ddof=1) / math.sqrt(DRAWS)
    assert 8 * error < 0.0138
    assert abs(totals.mean() - 1) < 4 * error


def test_the_bound_is_below_every_probability_and_sums_to_at_most_one(bounds, log_weights):
    bound, probability = bounds.mean(axis=0), np.exp(log_weights).mean(axis=0)
    assert np.exp(bound).sum() <= 1 + 1e-5
    assert (np.exp(bound) < probability).all()
    # It is a bound that says something: a constant below all would pass what stands above.
    assert np.exp(bound).sum() > 0.5


def test_the_bound_is_the_mean_of_the_log_weights(model, bounds, log_weights):
    """The divergence beside its estimate by samples, which from a learned prior it is."""
    difference = bounds - log_weights
    error = difference.std(axis=0, ddof=1) / math.sqrt(DRAWS)
    assert (difference.std() > 0.1) == (model is MODELS["standard"])
    assert (np.abs(difference.mean(axis=0)) < 5 * error + 1e-5).all()
    # All images together, whose draws are independent: an error that each by itself would hide.
    together = difference.mean(axis=1)
    assert abs(together.mean()) < 4 * together.std(ddof=1) / math.sqrt(DRAWS) + 1e-5


def test_samples_have_the_probabilities_of_the_importance_weights(model, variables, log_weights):
    count = 20_000
    samples = np.asarray(jax.jit(lambda key: model.sample(variables, key, {}, num=count))(KEY))
    assert samples.dtype == np.uint8 and samples.shape == (count, 2, 2, 1)
    observed = np.bincount(samples.reshape(count, 4) @ [27, 9, 3, 1], minlength=81) / count
    weights = np.exp(log_weights)
    expected = weights.mean(axis=0)
    error = np.sqrt(expected / count + weights.var(axis=0) / DRAWS)
    assert (np.abs(observed - expected) < 5 * error).all()


def test_at_temperature_zero_pixels_are_the_mean_given_the_latent():
    """The limit of low temperatures where a pixel has a single logistic; the latent is drawn as at any other."""
    model = vae.build(vae.Config(image_size=2, channels=1, levels=256, latent=2, widths=(8,), mixtures=1))
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, BATCH)
    variables = jax.tree.map(lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(np.float32), shapes)
    draw = jax.jit(model.sample, static_argnames=("num", "temperature"))
    zero, low, one = (np.int32(draw(variables, KEY, {}, num=100, temperature=t)) for t in (0.0, 1e-6, 1.0))
    assert np.abs(zero - low).max() <= 1
    assert np.abs(zero - one).max() > 10
    assert len(np.unique(zero, axis=0)) > 50


def test_the_loss_is_the_negative_bound_in_bits_per_dimension(model, variables):
    loss, aux = jax.jit(lambda key: model.loss(variables, BATCH, key, 0, train=False))(KEY)
    noise_key, _ = jax.random.split(KEY)
    bound = jax.jit(model.log_likelihood)(variables, BATCH, noise_key)
    np.testing.assert_allclose(loss, -bound.mean() / (4 * math.log(2)), rtol=1e-5)
    np.testing.assert_allclose(sum(aux.metrics.values()), loss, rtol=1e-6)
    assert aux.metrics["rate_bits_per_dim"] > 0
    assert aux.weight == 81


def test_the_divergence_weighs_more_and_more_in_training_and_fully_after():
    plain, warm = MODELS["standard"], vae.build(replace(CONFIG, kl_warmup_steps=100))
    variables = random_variables(plain)
    loss = jax.jit(lambda step, train: warm.loss(variables, BATCH, KEY, step, train=train), static_argnums=1)
    expected, parts = jax.jit(lambda: plain.loss(variables, BATCH, KEY, 0, train=True))()
    rate, distortion = parts.metrics["rate_bits_per_dim"], parts.metrics["distortion_bits_per_dim"]
    for step, weight in ((0, 0.0), (50, 0.5), (100, 1.0), (1000, 1.0)):
        value, aux = loss(step, True)
        np.testing.assert_allclose(value, distortion + weight * rate, rtol=1e-6)
        np.testing.assert_allclose(aux.metrics["rate_bits_per_dim"], rate, rtol=1e-6)
    np.testing.assert_allclose(loss(0, False)[0], expected, rtol=1e-6)


def test_reconstructions_become_their_originals():
    check_copies(vae.build(replace(CONFIG, mixtures=1)))


def test_latents_are_the_posteriors_mean_and_draws_from_it_and_decode_to_the_pixels_means():
    """Beside the module's own outputs, of random parameters."""
    model = MODELS["standard"]
    variables, module = random_variables(model), vae.VAE(CONFIG)
    mean, log_variance = (np.float64(y) for y in module.apply(variables, IMAGES, method="encode"))
    assert np.abs(mean).max() > 0.1
    np.testing.assert_allclose(model.encode(variables, IMAGES), mean, atol=1e-6)
    draws = mapped(lambda key: model.encode(variables, IMAGES, key), jax.random.split(KEY, 4096))
    deviation = np.exp(0.5 * log_variance)
    np.testing.assert_allclose((draws.mean(axis=0) - mean) / deviation, 0, atol=5 / 64)
    np.testing.assert_allclose(draws.std(axis=0) / deviation, 1, atol=5 / math.sqrt(2 * 4096))
    outputs = module.apply(variables, jnp.float32(mean), method="decode")
    pixels = np.clip(np.round(logistic_mixture_mean(outputs, 1) + 1), 0, 2)
    np.testing.assert_array_equal(model.decode(variables, jnp.float32(mean)), pixels)


def test_dropout_is_for_training_alone():
    model, without = vae.build(replace(CONFIG, dropout=0.5)), MODELS["standard"]
    variables = random_variables(without)
    loss = jax.jit(lambda train: model.loss(variables, BATCH, KEY, 0, train=train)[0], static_argnums=0)
    expected = jax.jit(lambda: without.loss(variables, BATCH, KEY, 0, train=True)[0])()
    np.testing.assert_allclose(loss(False), expected, rtol=1e-6)
    assert abs(loss(True) - expected) > 0.01


def test_images_that_halve_as_often_as_there_are_widths():
    config = vae.Config(image_size=8, channels=3, latent=4, widths=(8, 16, 24), blocks=2)
    model = vae.build(config)
    batch = {"image": jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.uint8)}
    variables = jax.eval_shape(model.init, KEY, batch)
    latents = jax.eval_shape(model.encode, variables, batch["image"])
    assert (latents.shape, latents.dtype) == ((2, *model.latents.shape), model.latents.dtype)
    assert jax.eval_shape(model.decode, variables, latents) == batch["image"]
    sample = jax.eval_shape(lambda variables: model.sample(variables, KEY, {}, num=3), variables)
    assert (sample.shape, sample.dtype) == ((3, 8, 8, 3), jnp.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pseudo_inputs": 0}, r"pseudo_inputs is 0: it must be at least 1, or None"),
        ({"kl_warmup_steps": -1}, r"kl_warmup_steps is -1: it must be 0 or more"),
        ({"mixtures": 0}, r"mixtures is 0: it must be at least 1"),
        ({"widths": ()}, r"must be one or more multiples of 8, not \[\]"),
        ({"widths": (8, 12)}, r"must be one or more multiples of 8, not \[8, 12\]"),
        ({"widths": (8, 16, 32)}, r"2 pixels a side cannot be halved for each width of \[8, 16, 32\] after the first"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)


def test_a_learned_prior_mixes_the_posteriors_of_its_pseudo_inputs_which_start_as_images():
    model = vae.build(replace(CONFIG, pseudo_inputs=81))
    variables = jax.jit(model.init)(KEY, BATCH)
    pseudo = variables["params"]["pseudo_inputs"]
    levels = np.round(np.asarray(pseudo) + 1).astype(int)  # from [-1, 1]
    assert {tuple(image.ravel()) for image in levels} == {tuple(image.ravel()) for image in IMAGES}
    same = {"params": {**variables["params"], "pseudo_inputs": jnp.repeat(pseudo[:1], 81, axis=0)}}
    one = vae.build(replace(CONFIG, pseudo_inputs=1))
    single = {"params": {**variables["params"], "pseudo_inputs": pseudo[:1]}}
    np.testing.assert_allclose(
        jax.jit(model.log_weight)(same, BATCH, KEY), jax.jit(one.log_weight)(single, BATCH, KEY), rtol=1e-5
    )


def test_pseudo_inputs_that_start_as_the_same_image_are_told_apart():
    model = vae.build(replace(CONFIG, pseudo_inputs=6))
    pseudo = jax.jit(model.init)(KEY, {"image": IMAGES[:2]})["params"]["pseudo_inputs"]
    assert len(np.unique(pseudo, axis=0)) == 6
    # As the images are, but for noise of a twentieth of the range's half.
    init = vae.build(replace(CONFIG, pseudo_inputs=200)).init
    pseudo = np.asarray(jax.jit(lambda key: init(key, BATCH)["params"]["pseudo_inputs"])(KEY))
    np.testing.assert_allclose((pseudo - np.round(pseudo)).std(), 0.05, rtol=0.1)


NARROW_AND_WIDE = np.float32([[-1.0, 3.0], [2.0, 0.0]]), np.float32([[-4.0, 2.0], [1.5, -3.0]])
"""Means and log-variances of the components of a learned prior of two dimensions."""


def test_latents_of_a_learned_prior_have_the_moments_of_its_density(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vae.VAE, "pseudo_posteriors", lambda self: NARROW_AND_WIDE)
    module, count = vae.VAE(replace(CONFIG, pseudo_inputs=2)), 20_000
    variables = {"params": {"pseudo_inputs": jnp.zeros((2, 2, 2, 1))}}
    z = module.apply(variables, KEY, count, method="draw_latent")
    means, log_variances = (np.float64(values) for values in NARROW_AND_WIDE)
    second_moments = np.square(means) + np.exp(log_variances)
    fourth_moments = means**4 + 6 * means**2 * np.exp(log_variances) + 3 * np.exp(2 * log_variances)
    for power, moments, squares in ((1, means, second_moments), (2, second_moments, fourth_moments)):
        expected = moments.mean(axis=0)
        error = np.sqrt((squares.mean(axis=0) - expected**2) / count)
        assert (np.abs(np.mean(np.asarray(z, np.float64) ** power, axis=0) - expected) < 4 * error).all()
    narrow = np.asarray(z)[np.asarray(z[:, 0]) < -0.5][:, 0]
    # Of the narrow component nearly all; of the wide one its lower tail.
    spread = np.mean(np.abs(narrow + 1) < math.exp(-2))
    tails = [scipy.stats.norm.cdf(x, 2, math.exp(0.75)) for x in (-0.5, -1 - math.exp(-2), -1 + math.exp(-2))]
    total = scipy.stats.norm.cdf(0.5 / math.exp(-2)) + tails[0]
    inside = scipy.stats.norm.cdf(1) - scipy.stats.norm.cdf(-1) + tails[2] - tails[1]
    np.testing.assert_allclose(spread, inside / total, atol=0.025)
    log_density = module.apply(variables, z[:50], method="log_prior")
    distance = np.asarray(z[:50], np.float64)[:, None] - means
    components = scipy.stats.norm.logpdf(distance, scale=np.exp(log_variances / 2)).sum(axis=-1)
    np.testing.assert_allclose(
        log_density, scipy.special.logsumexp(components, axis=1) - math.log(2), rtol=1e-4, atol=1e-4
    )
