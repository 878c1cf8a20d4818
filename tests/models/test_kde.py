"""The kernel density estimator: all 81 probabilities of 2x2 images of 3 levels, and the plain leave-one-out loop."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from densities import IMAGES
from optimized import mapped
from vlm_jax.contract import Model
from vlm_jax.errors import UserError
from vlm_jax.models import kde

CONFIG = kde.Config(image_size=2, channels=1, levels=3, kernel="discretised", chunk=4)
MODELS = {"discretised": kde.build(CONFIG), "gaussian": kde.build(replace(CONFIG, kernel="gaussian"))}
STORED = np.random.default_rng(0).choice(IMAGES, 6)
BANDWIDTH = 0.7
KEY = jax.random.key(1)
DRAWS = 4096


@pytest.fixture(scope="module")
def variables() -> Any:
    variables = MODELS["discretised"].init(KEY, {"image": jnp.asarray(STORED)})
    return {**variables, "params": {"log_bandwidth": jnp.log(BANDWIDTH)}}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


def masses(variables: Any, *, tails: bool) -> np.ndarray:
    """[81], float64: the mixture integrated over each image's bins, with the tails in the outermost or without."""
    centres, h = np.float64(STORED), BANDWIDTH * np.float64(variables["data"]["deviation"])
    images = np.float64(IMAGES)[:, None]
    lower = np.where((images == 0) & tails, -np.inf, images - 0.5)
    upper = np.where((images == 2) & tails, np.inf, images + 0.5)
    bins = norm.cdf(upper, centres, h) - norm.cdf(lower, centres, h)
    return bins.prod(axis=(2, 3, 4)).mean(axis=1)


def test_the_discretised_estimator_is_exact_and_sums_to_one(variables):
    model = MODELS["discretised"]
    assert model.bound == "exact"
    probability = np.exp(np.float64(jax.jit(model.log_likelihood)(variables, {"image": IMAGES}, KEY)))
    assert abs(probability.sum() - 1) < 1e-5
    np.testing.assert_allclose(probability, masses(variables, tails=True), rtol=1e-5)


def test_the_density_integrates_to_the_mass_of_each_bin_and_bounds_it(variables):
    """The mean of p(x + u) is the mass of the bin; that of log p(x + u) is below its logarithm."""
    model = MODELS["gaussian"]
    assert model.bound == "lower"

    def draw(key: jax.Array) -> jax.Array:
        return model.log_likelihood(variables, {"image": IMAGES}, key)

    values = mapped(draw, jax.random.split(KEY, DRAWS), batch_size=64)
    densities, expected = np.exp(values), masses(variables, tails=False)
    error = densities.std(axis=0, ddof=1) / math.sqrt(DRAWS)
    assert (np.abs(densities.mean(axis=0) - expected) < 5 * error).all()
    totals = densities.sum(axis=1)
    error = totals.std(ddof=1) / math.sqrt(DRAWS)
    assert error < 0.001
    assert abs(totals.mean() - expected.sum()) < 4 * error
    assert expected.sum() < 1
    bound = np.exp(values.mean(axis=0))
    assert (bound < expected).all()
    assert 0.7 * expected.sum() < bound.sum()


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_in_training_each_stored_image_does_without_itself(chunk: int, variables):
    """And not without another that is equal to it, of which there is one."""
    stored = np.concatenate([STORED, STORED[:1]])
    variables = {**variables, "data": {**variables["data"], "image": jnp.asarray(stored)}}
    model = kde.build(replace(CONFIG, chunk=chunk))
    loss, aux = jax.jit(lambda: model.loss(variables, {"image": IMAGES}, KEY, 0, train=True))()
    expected = []
    for i in range(len(stored)):
        others = {**variables["data"], "image": jnp.asarray(np.delete(stored, i, axis=0))}
        expected.append(
            MODELS["discretised"].log_likelihood({**variables, "data": others}, {"image": stored[[i]]}, KEY)
        )
    np.testing.assert_allclose(loss, -np.mean(expected) / (4 * math.log(2)), rtol=1e-5)
    assert aux.weight is None
    np.testing.assert_array_equal(aux.state["data"]["image"], stored, strict=True)


def test_held_out_the_loss_is_the_negative_log_likelihood_of_the_batch(model, variables):
    loss, aux = jax.jit(lambda: model.loss(variables, {"image": IMAGES}, KEY, 0, train=False))()
    _, noise_key = jax.random.split(KEY)
    log_likelihood = jax.jit(model.log_likelihood)(variables, {"image": IMAGES}, noise_key)
    np.testing.assert_allclose(loss, -log_likelihood.mean() / (4 * math.log(2)), rtol=1e-5)
    assert aux.weight == 81


@pytest.mark.parametrize("train", [True, False])
def test_the_gradient_is_the_slope_of_the_loss(model, variables, train: bool):
    @jax.jit
    @jax.value_and_grad
    def loss(log_bandwidth: jax.Array) -> jax.Array:
        params = {"log_bandwidth": log_bandwidth}
        return model.loss({**variables, "params": params}, {"image": IMAGES}, KEY, 0, train=train)[0]

    middle, step = math.log(BANDWIDTH), 0.02
    slope = (loss(middle + step)[0] - loss(middle - step)[0]) / (2 * step)
    np.testing.assert_allclose(loss(middle)[1], slope, rtol=5e-3)


def test_queries_are_some_of_the_stored_images(variables):
    """The loss of one query is its own; the mean over all that may be drawn is the loss of all."""

    def losses(queries: int | None, keys: jax.Array) -> np.ndarray:
        model = kde.build(replace(CONFIG, queries=queries))
        loss = jax.jit(lambda key: model.loss(variables, {"image": IMAGES}, key, 0, train=True)[0])
        return np.asarray(jax.lax.map(loss, keys))

    keys = jax.random.split(KEY, 100)
    single = np.unique(losses(1, keys).round(5))
    assert len(single) == len(np.unique(STORED, axis=0)) == len(STORED)
    np.testing.assert_allclose(single.mean(), losses(None, keys[:1])[0], rtol=1e-4)


def test_it_starts_with_the_batch_and_scotts_rule():
    images = np.random.default_rng(0).integers(0, 17, (32, 4, 4, 1)).astype(np.uint8)
    images[:, 0, 0] = 0
    model = kde.build(kde.Config(image_size=4, channels=1, levels=17, kernel="gaussian"))
    variables = model.init(KEY, {"image": jnp.asarray(images)})
    np.testing.assert_array_equal(variables["data"]["image"], images, strict=True)
    np.testing.assert_allclose(jnp.exp(variables["params"]["log_bandwidth"]), 32 ** (-1 / 20), rtol=1e-6)
    expected = np.sqrt(images.astype(np.float64).var(axis=0) + (17 / 16) ** 2)
    np.testing.assert_allclose(variables["data"]["deviation"], expected, rtol=1e-5)


def test_samples_have_their_probabilities(variables):
    count = 20_000
    model = MODELS["discretised"]
    samples = np.asarray(jax.jit(lambda key: model.sample(variables, key, {}, num=count))(KEY))
    assert samples.dtype == np.uint8 and samples.shape == (count, 2, 2, 1)
    observed = np.bincount(samples.reshape(count, 4) @ [27, 9, 3, 1], minlength=81) / count
    expected = masses(variables, tails=True)
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected / count)).all()


def test_at_temperature_zero_samples_are_stored_images(variables):
    samples = MODELS["gaussian"].sample(variables, KEY, {}, num=100, temperature=0.0)
    np.testing.assert_array_equal(np.unique(samples, axis=0), np.unique(STORED, axis=0))


@pytest.mark.parametrize("changes", [{"queries": 0}, {"chunk": 0}])
def test_settings_below_one_are_refused(changes: dict[str, int]):
    with pytest.raises(UserError, match=rf"{next(iter(changes))} of a kernel density estimator is 0: it must be at "):
        replace(CONFIG, **changes)


def test_one_image_is_refused():
    with pytest.raises(UserError, match=r"leaves out one image of its first batch: make batch_size >= 2"):
        MODELS["gaussian"].init(KEY, {"image": jnp.asarray(STORED[:1])})
