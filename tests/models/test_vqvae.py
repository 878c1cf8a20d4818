"""Autoencoders of codes: on 2x2 images of 3 levels all codes and images are known, and every probability is checked."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from densities import IMAGES, check_copies
from reference import random_params
from vlm_jax.models import vqvae
from vlm_jax.models.vqvae import VQVAE, Config
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.quantize import EMA, FSQ, LFQ, Learned, Residual
from vlm_jax.objectives.likelihood import to_unit_range

NETWORK = Pyramid(widths=(8, 8), blocks=1, groups=1)
CONFIG = Config(image_size=2, channels=1, levels=3, network=NETWORK, hidden=4, quantizer=FSQ(levels=(3, 5)))
QUANTIZERS: dict[str, Any] = {
    "one book": FSQ(levels=(3, 5)),
    "two books": Residual(book=LFQ(width=2), books=2),
}
BATCH = {"image": IMAGES}
KEY = jax.random.key(0)


@pytest.fixture(scope="module", params=QUANTIZERS)
def config(request: pytest.FixtureRequest) -> Config:
    return replace(CONFIG, quantizer=QUANTIZERS[request.param])


@pytest.fixture(scope="module")
def variables(config: Config) -> Any:
    values = random_params(jax.eval_shape(vqvae.build(config).init, KEY, BATCH), 0.5)
    values["params"]["log_scale"] = np.float32([-0.7])
    values["params"]["features"] = {
        "kernel": 3 * values["params"]["features"]["kernel"],
        "bias": np.zeros(2, np.float32),
    }
    centre = jax.tree.map(jnp.asarray, values)
    features = VQVAE(config).apply(
        centre, IMAGES, method=lambda m, x: m.features(m.encoder(to_unit_range(x, config.levels)))
    )
    # Features around zero, of a deviation of one, so that many codes are met.
    deviation = features.std(axis=(0, 1, 2))
    dense = values["params"]["features"]
    dense["kernel"], dense["bias"] = dense["kernel"] / deviation, (dense["bias"] - features.mean((0, 1, 2))) / deviation
    return jax.tree.map(jnp.asarray, values)


def log_probs(config: Config, variables: Any, codes: np.ndarray) -> np.ndarray:
    """[codes, images], nats: by the logistic's distribution function."""
    mean = np.float64(VQVAE(config).apply(variables, codes, method="decode"))[:, None]
    scale = np.exp(np.float64(variables["params"]["log_scale"]))
    edges = (IMAGES[None] - 1.0)[..., None] + np.array([-0.5, 0.5])
    edges[..., 0] = np.where(IMAGES[None] == 0, -np.inf, edges[..., 0])
    edges[..., 1] = np.where(IMAGES[None] == 2, np.inf, edges[..., 1])
    low, high = np.moveaxis(scipy.special.expit((edges - mean[..., None]) / scale[..., None]), -1, 0)
    return np.log(high - low).sum(axis=(2, 3, 4))


def every_code(config: Config) -> np.ndarray:
    count, books = config.quantizer.size, config.quantizer.books
    codes = np.stack(np.meshgrid(*[np.arange(count)] * books, indexing="ij"), axis=-1).reshape(-1, books)
    return np.int32(codes).reshape(-1, *config.latents)


def test_the_bound_is_that_of_an_images_own_code_and_all_codes_together_sum_to_one(config: Config, variables: Any):
    """An error of 0.005 bits a dimension would be 0.014 nats of an image."""
    model, codes = vqvae.build(config), every_code(config)
    table = log_probs(config, variables, codes)
    np.testing.assert_allclose(np.exp(table).sum() / len(codes), 1, rtol=1e-9)
    own = np.asarray(model.encode(variables, IMAGES))
    assert own.shape == (81, *config.latents)
    place = np.array([np.flatnonzero((codes == code).reshape(len(codes), -1).all(axis=1))[0] for code in own])
    assert len(np.unique(place)) > 2
    expected = table[place, np.arange(81)] - np.log(len(codes))
    bound = np.float64(jax.jit(model.log_likelihood)(variables, BATCH, KEY))
    np.testing.assert_allclose(bound, expected, atol=1e-4)
    assert np.exp(bound).sum() < 1
    assert (bound < scipy.special.logsumexp(table, axis=0) - np.log(len(codes))).all()


def test_the_loss_is_the_negative_bound_and_in_training_has_the_penalty_in_place_of_the_rate(
    config: Config, variables: Any
):
    model = vqvae.build(replace(config, penalty_weight=3.0))
    bound = jax.jit(model.log_likelihood)(variables, BATCH, KEY)
    loss = jax.jit(lambda train: model.loss(variables, BATCH, KEY, 0, train=train), static_argnums=0)
    value, aux = loss(False)
    np.testing.assert_allclose(value, -bound.mean() / (4 * np.log(2)), rtol=1e-5)
    bits = np.log2(len(every_code(config))) / 4
    np.testing.assert_allclose(aux.metrics["rate_bits_per_dim"], bits, rtol=1e-6)
    training, aux = loss(True)
    np.testing.assert_allclose(training, value - bits + 3 * aux.metrics["penalty"], rtol=1e-5)
    assert 0 < aux.metrics["code_use"] <= 1 < aux.metrics["code_perplexity"]


def test_samples_are_of_codes_that_are_all_alike(config: Config, variables: Any):
    count, model = 20_000, vqvae.build(config)
    samples = np.asarray(jax.jit(lambda key: model.sample(variables, key, {}, num=count))(KEY))
    observed = np.bincount(samples.reshape(count, 4) @ [27, 9, 3, 1], minlength=81) / count
    expected = np.exp(log_probs(config, variables, every_code(config))).mean(axis=0)
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected / count) + 1e-6).all()


def test_codes_become_the_means_of_their_pixels(config: Config, variables: Any):
    model, codes = vqvae.build(config), every_code(config)
    mean = np.asarray(VQVAE(config).apply(variables, codes, method="decode"))
    np.testing.assert_array_equal(model.decode(variables, codes), np.clip(np.round(mean + 1), 0, 2))
    np.testing.assert_array_equal(model.encode(variables, IMAGES, KEY), model.encode(variables, IMAGES))


@pytest.mark.slow
def test_reconstructions_become_their_originals():
    check_copies(vqvae.build(replace(CONFIG, quantizer=Learned(size=4, width=2))))


def test_the_age_of_codes_counts_in_training_alone():
    model = vqvae.build(replace(CONFIG, quantizer=EMA(size=6, width=2)))
    variables = jax.jit(model.init)(KEY, BATCH)
    loss = jax.jit(lambda v, train: model.loss(v, BATCH, KEY, 0, train=train)[1].state, static_argnums=1)
    jax.tree.map(np.testing.assert_array_equal, loss(variables, False), {k: variables[k] for k in ("codebook", "use")})
    state = loss(variables, True)
    seen = np.unique(model.encode(variables, IMAGES))
    assert set(np.flatnonzero(np.asarray(state["use"]["age"]) == 0)) == set(seen)
    assert (np.asarray(state["codebook"]["quantizer"]["clusters"]["count"]) > 0).all()
