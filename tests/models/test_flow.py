"""The coupling flow: on 2x2 images of 3 levels all 81 probabilities are known, and every bound is checked."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densities import IMAGES, check_bound, check_importance_weights
from optimized import mapped
from vlm_jax.contract import Model
from vlm_jax.errors import UserError
from vlm_jax.models import flow
from vlm_jax.models.flow import Config, Flow
from vlm_jax.trees import map_with_path

CONFIGS = {
    "uniform": Config(image_size=2, channels=1, levels=3, scales=1, steps=2, width=8),
    "masked": Config(image_size=2, channels=1, levels=3, scales=1, steps=1, width=8, masked_width=8),
    "variational": Config(
        image_size=2,
        channels=1,
        levels=3,
        scales=1,
        steps=1,
        width=8,
        mixtures=2,
        dequantisation="variational",
        dequantisation_steps=1,
        logit_margin=0.05,
    ),
}
MODELS = {name: flow.build(config) for name, config in CONFIGS.items()}
BATCH = {"image": IMAGES}
DRAWS = 32_768
KEY = jax.random.key(1)


def random_variables(model: Model, scale: float = 0.1) -> Any:
    """As initialised from the 81 images, and each parameter moved at random but the permutations.

    Learned noise is kept wide: importance weights of noise that seldom comes near the ends have too large a variance.
    """
    random = np.random.default_rng(0)

    def move(path: str, leaf: jax.Array) -> jax.Array:
        leaf = leaf + 0.8 if path.endswith("dequantiser/step/norm/log_scale") else leaf
        return leaf if "permutation" in path else leaf + scale * random.normal(size=leaf.shape).astype(np.float32)

    return map_with_path(move, jax.jit(model.init)(KEY, BATCH))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("masked", "variational")]


@pytest.fixture(scope="module", params=["uniform", *SLOW])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Model:
    return MODELS[name]


@pytest.fixture(scope="module")
def variables(name: str, model: Model) -> Any:
    return random_variables(model, scale=0.07 if name == "masked" else 0.1)


@pytest.fixture(scope="module")
def log_weights(model: Model, variables: Any) -> np.ndarray:
    """[draws, images], nats"""
    return mapped(lambda key: model.log_weight(variables, BATCH, key), jax.random.split(KEY, DRAWS), batch_size=64)


@pytest.fixture(scope="module")
def inside(name: str, model: Model, variables: Any) -> tuple[float, float]:
    """The mass of the density within the range of the levels, by what falls outside of it, and its error."""
    c, count = CONFIGS[name], 800_000
    shape = (c.image_size, c.image_size, c.channels)

    def draw(key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, (count // 10, 4))
        return Flow(c).apply(variables, noise, method=lambda m, z: m.flow.invert(z, shape))

    y = mapped(draw, jax.random.split(KEY, 10)).reshape(count, *shape)
    limit = 1 if c.logit_margin is None else math.log(1 / c.logit_margin - 1)
    kept = (np.abs(y) < limit).all(axis=(1, 2, 3)).mean()
    return kept, math.sqrt(kept * (1 - kept) / count)


def test_importance_weights_sum_to_the_mass_within_the_range_of_the_levels(log_weights, inside):
    check_importance_weights(log_weights, inside)


def test_the_bound_is_below_every_probability_and_sums_to_at_most_one(log_weights):
    check_bound(log_weights)


def test_the_likelihood_is_the_log_weight_and_the_loss_its_negative_mean_in_bits(model, variables):
    noise_key, _ = jax.random.split(KEY)
    loss, aux = jax.jit(lambda key: model.loss(variables, BATCH, key, 0, train=False))(KEY)
    bound = jax.jit(model.log_likelihood)(variables, BATCH, noise_key)
    np.testing.assert_allclose(loss, -bound.mean() / (4 * math.log(2)), rtol=1e-5)
    assert model.bound == "lower" and aux.weight == 81


def test_images_have_the_frequencies_of_their_probabilities(model, variables, log_weights, inside):
    """But for those at the edges, which take in what falls outside the range: it is in none of the others."""
    count = 50_000
    samples = np.asarray(jax.jit(lambda key: model.sample(variables, key, {}, num=count))(KEY))
    assert samples.dtype == np.uint8 and samples.shape == (count, 2, 2, 1)
    weights = np.exp(log_weights)
    expected = weights.mean(axis=0)
    middle = (IMAGES == 1).all(axis=(1, 2, 3))
    observed = (samples == 1).all(axis=(1, 2, 3)).mean()
    error = math.sqrt(expected[middle][0] / count + weights[:, middle].var() / DRAWS)
    assert abs(observed - expected[middle][0]) < 4 * error
    assert set(np.unique(samples)) == {0, 1, 2}


def test_samples_are_what_the_noise_stands_for(name, model, variables):
    """The noise of the middle of a sample's bin is near that which made it, and at temperature 0 all are one image."""
    c = CONFIGS[name]
    fine = replace(c, levels=256)
    noise = 0.5 * jax.random.normal(KEY, (16, 4))
    image = Flow(fine).apply(variables, noise, method="decode")
    again, _ = Flow(fine).apply(variables, image, jnp.full(image.shape, 0.5), method="encode")
    unclipped = np.asarray(((image > 0) & (image < 255)).all(axis=(1, 2, 3)))
    assert unclipped.sum() > 8
    np.testing.assert_allclose(again[unclipped], noise[unclipped], atol=0.2)
    zero = jax.jit(lambda key: model.sample(variables, key, {}, num=5, temperature=0.0))(KEY)
    assert (zero == zero[0]).all()


def test_dropout_is_for_training_alone():
    plain, dropping = MODELS["uniform"], flow.build(replace(CONFIGS["uniform"], dropout=0.5))
    variables = random_variables(plain)
    loss = jax.jit(lambda train: dropping.loss(variables, BATCH, KEY, 0, train=train)[0], static_argnums=0)
    expected = jax.jit(lambda: plain.loss(variables, BATCH, KEY, 0, train=True)[0])()
    np.testing.assert_allclose(loss(False), expected, rtol=1e-6)
    assert abs(loss(True) - expected) > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": 2}, "an image of 2 pixels a side cannot be halved scales=2 times"),
        ({"masked_width": 0}, "masked_width is 0: it must be at least 1, or None"),
        ({"scales": 0}, "cannot be halved scales=0 times"),
        ({"logit_margin": 0.5}, r"logit_margin is 0.5: it must lie in \(0, 0.5\)"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(CONFIGS["uniform"], **changes)
