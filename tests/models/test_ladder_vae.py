"""The hierarchical VAE: on 2x2 images of 3 levels all 81 probabilities are known, and every bound is checked."""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densities import IMAGES, check_copies
from optimized import mapped
from reference import ACTIVATIONS, conv, dense, random_params
from vlm_jax.errors import UserError
from vlm_jax.models import ladder_vae
from vlm_jax.models.ladder_vae import Config, LadderVAE
from vlm_jax.objectives.likelihood import logistic_mixture_mean
from vlm_jax.trees import map_with_path

CONFIG = Config(
    image_size=2,
    channels=1,
    levels=3,
    width=8,
    hidden=8,
    latent=1,
    sizes=(2, 1),
    encoder_blocks=(1, 2),
    decoder_blocks=(1, 2),
    mixtures=2,
)
MODEL = ladder_vae.build(CONFIG)
BATCH = {"image": IMAGES}
DRAWS = 16_384
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def variables() -> Any:
    """Random values for every parameter, so that latents, posteriors and pixels depend on one another.

    The posteriors are kept wide: those much narrower than the true ones have importance weights of infinite variance.
    """
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(MODEL.init, KEY, BATCH)

    def value(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = 0.3 * random.normal(size=leaf.shape)
        if "posterior/expand/bias" in path:
            values = values * 0.1 + np.array([0.0, 0.3])
        elif "posterior" in path or "prior" in path:
            values = 0.35 * values
        return jnp.asarray(values, jnp.float32)

    return map_with_path(value, shapes)


def draws(function: Any, variables: Any) -> np.ndarray:
    """[draws, images], nats"""
    return mapped(lambda key: function(variables, BATCH, key), jax.random.split(KEY, DRAWS), batch_size=64)


@pytest.fixture(scope="module")
def bounds(variables: Any) -> np.ndarray:
    return draws(MODEL.log_likelihood, variables)


@pytest.fixture(scope="module")
def log_weights(variables: Any) -> np.ndarray:
    return draws(MODEL.log_weight, variables)


def test_importance_weights_are_unbiased(log_weights: np.ndarray):
    """Their means sum to one; 0.005 bits a dimension, either way, would be 0.0138 of it, twice what is allowed."""
    totals = np.exp(log_weights).sum(axis=1)
    error = totals.std(ddof=1) / math.sqrt(DRAWS)
    assert 8 * error < 0.0138
    assert abs(totals.mean() - 1) < 4 * error


def test_the_bound_is_below_every_probability_and_sums_to_at_most_one(bounds: np.ndarray, log_weights: np.ndarray):
    bound, probability = bounds.mean(axis=0), np.exp(log_weights).mean(axis=0)
    assert np.exp(bound).sum() <= 1 + 1e-5
    assert (np.exp(bound) < probability).all()
    # It is a bound that says something: a constant below all would pass what stands above.
    assert np.exp(bound).sum() > 0.1


def test_the_bound_is_the_mean_of_the_log_weights(bounds: np.ndarray, log_weights: np.ndarray):
    """The divergences in closed form beside their estimates by samples."""
    difference = bounds - log_weights
    error = difference.std(axis=0, ddof=1) / math.sqrt(DRAWS)
    assert difference.std() > 0.05
    assert (np.abs(difference.mean(axis=0)) < 5 * error + 1e-5).all()
    # All images together, whose draws are independent: an error that each by itself would hide.
    together = difference.mean(axis=1)
    assert abs(together.mean()) < 4 * together.std(ddof=1) / math.sqrt(DRAWS)


def test_samples_have_the_probabilities_of_the_importance_weights(variables: Any, log_weights: np.ndarray):
    count = 20_000
    samples = np.asarray(jax.jit(lambda key: MODEL.sample(variables, key, {}, num=count))(KEY))
    assert samples.dtype == np.uint8 and samples.shape == (count, 2, 2, 1)
    observed = np.bincount(samples.reshape(count, 4) @ [27, 9, 3, 1], minlength=81) / count
    weights = np.exp(log_weights)
    expected = weights.mean(axis=0)
    error = np.sqrt(expected / count + weights.var(axis=0) / DRAWS)
    assert (np.abs(observed - expected) < 5 * error).all()


def test_no_latent_has_a_negative_divergence(variables: Any):
    """From the coarsest to the finest, image by image; together they are the rate."""
    noise = [jax.random.normal(KEY, (blocks, 81, size, size, 1)) for size, blocks in ((2, 1), (1, 2))]
    _, terms = jax.jit(lambda: LadderVAE(CONFIG).apply(variables, IMAGES, noise))()
    assert terms.divergence.shape == terms.log_ratio.shape == (3, 81)
    assert (terms.divergence > 1e-4).all()


def test_every_latent_is_used(variables: Any):
    """Moved by itself, each changes the distribution of all pixels."""
    noise = [np.zeros((blocks, 1, size, size, 1), np.float32) for size, blocks in ((2, 1), (1, 2))]
    draw = jax.jit(lambda noise: LadderVAE(CONFIG).apply(variables, noise, method="draw"))
    still = draw(noise)
    for part, block in ((0, 0), (1, 0), (1, 1)):
        moved = [values.copy() for values in noise]
        moved[part][block] = 1.0
        assert (np.abs(draw(moved) - still).max(axis=-1) > 1e-4).all()


def test_at_temperature_zero_all_samples_are_one_image(variables: Any):
    zero = jax.jit(lambda key: MODEL.sample(variables, key, {}, num=5, temperature=0.0))(KEY)
    assert (zero == zero[0]).all()


def test_the_divergence_weighs_more_and_more_in_training_and_fully_after(variables: Any):
    model = ladder_vae.build(replace(CONFIG, kl_warmup_steps=100))
    loss = jax.jit(lambda step, train: model.loss(variables, BATCH, KEY, step, train=train), static_argnums=1)
    plain, parts = jax.jit(lambda: MODEL.loss(variables, BATCH, KEY, 0, train=True))()
    rate, distortion = parts.metrics["rate_bits_per_dim"], parts.metrics["distortion_bits_per_dim"]
    assert rate > 0.01
    for step, weight in ((0, 0.0), (25, 0.25), (50, 0.5), (100, 1.0), (1000, 1.0)):
        value, aux = loss(step, True)
        np.testing.assert_allclose(value, distortion + weight * rate, rtol=1e-6)
        np.testing.assert_allclose(aux.metrics["rate_weight"], weight, rtol=1e-6)
    np.testing.assert_allclose(loss(0, False)[0], plain, rtol=1e-6)


def test_the_loss_is_the_negative_bound_in_bits_per_dimension(variables: Any):
    loss, aux = jax.jit(lambda key: MODEL.loss(variables, BATCH, key, 0, train=False))(KEY)
    noise_key, _ = jax.random.split(KEY)
    bound = jax.jit(MODEL.log_likelihood)(variables, BATCH, noise_key)
    np.testing.assert_allclose(loss, -bound.mean() / (4 * math.log(2)), rtol=1e-5)
    assert aux.weight == 81


@pytest.mark.slow
def test_a_posterior_that_is_the_prior_costs_nothing():
    """Both are told nothing and have the same biases, a mean and a log-deviation."""
    variables = jax.jit(MODEL.init)(KEY, BATCH)

    def told_nothing(path: str, leaf: jax.Array) -> jax.Array:
        if not re.search("(prior|posterior)/expand", path):
            return leaf
        return jnp.zeros_like(leaf).at[..., :2].set(jnp.array([0.7, -0.4]) if path.endswith("bias") else 0.0)

    same = map_with_path(told_nothing, variables)
    _, aux = jax.jit(lambda: MODEL.loss(same, BATCH, KEY, 0, train=False))()
    assert abs(aux.metrics["rate_bits_per_dim"]) < 1e-6
    _, aux = jax.jit(lambda: MODEL.loss(variables, BATCH, KEY, 0, train=False))()
    assert aux.metrics["rate_bits_per_dim"] > 1e-4


def test_residual_branches_start_with_their_share_of_the_variance():
    """1 / depth, so that the sum over a way's blocks does not grow with depth; priors start as the standard one."""
    c = replace(CONFIG, width=48, hidden=32, latent=8, encoder_blocks=(1, 3), decoder_blocks=(2, 3))

    def kernels(key: jax.Array) -> dict[str, jax.Array]:
        params = ladder_vae.build(c).init(key, {"image": IMAGES[:1]})["params"]
        encoder, decoder = params["encoder"]["size_1"], params["decoder"]["size_1"]
        ends = {name: decoder[name]["expand"]["kernel"] for name in ("block", "posterior", "prior")}
        return ends | {"encoder": encoder["block"]["expand"]["kernel"], "latent": decoder["latent"]["kernel"]}

    variances = {name: kernel.var() for name, kernel in jax.jit(kernels)(KEY).items()}
    expected = {"encoder": 1 / 4 / 32, "block": 1 / 5 / 32, "latent": 1 / 5 / 8, "posterior": 1 / 32, "prior": 0}
    for name, variance in expected.items():
        np.testing.assert_allclose(variances[name], variance, rtol=0.15, err_msg=name)


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "with its hidden units dropped"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_bottleneck_is_that_of_the_figure(size: int, dropped: bool):
    """2011.10650, figure 3: a GELU before each of four convolutions, the middle ones 1x1 where images are small."""
    x = np.random.default_rng(0).normal(size=(2, size, size, 6)).astype(np.float32)
    block = ladder_vae.Bottleneck(5, 4, dropout=1 - 1e-6)
    params = random_params(jax.eval_shape(block.init, KEY, x)["params"])
    assert params["first"]["kernel"].shape[:2] == ((3, 3) if size == 3 else (1, 1))
    rngs = {"dropout": KEY}
    y = jax.jit(lambda params: block.apply({"params": params}, x, train=dropped, rngs=rngs))(params)
    gelu = ACTIVATIONS["gelu_tanh"]
    hidden = dense(params["reduce"], gelu(np.float64(x)))
    for name in ("first", "second"):
        hidden = conv(params[name], gelu(hidden))
    np.testing.assert_allclose(y, dense(params["expand"], gelu(hidden) * (not dropped)), atol=1e-4)


def test_pooling_is_the_mean_of_squares_and_enlarging_repeats():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    squares = x.reshape(2, 2, 2, 2, 2, 3)
    np.testing.assert_allclose(ladder_vae.pool(jnp.asarray(x), 2), squares.mean(axis=(2, 4)), atol=1e-6)
    np.testing.assert_array_equal(ladder_vae.enlarge(jnp.asarray(x), 8), x.repeat(2, axis=1).repeat(2, axis=2))


def test_deviations_are_bounded(variables: Any):
    """Whatever the network says, no divergence overflows."""
    wild = map_with_path(lambda path, leaf: leaf + 1e4 * ("posterior/expand/bias" in path), variables)
    _, aux = jax.jit(lambda: MODEL.loss(wild, BATCH, KEY, 0, train=False))()
    assert jnp.isfinite(aux.metrics["rate_bits_per_dim"])
    bounds = ladder_vae.bounded(jnp.array([-1e4, -0.01, 0.01, 1e4]))
    np.testing.assert_allclose(bounds, [-5, -0.01, 0.01, 5], rtol=1e-5)


def test_convolutions_in_bf16_leave_latents_and_likelihoods_in_fp32(variables: Any):
    model = ladder_vae.build(replace(CONFIG, dtype="bfloat16"))
    bound, rounded = jax.jit(lambda: [each.log_likelihood(variables, BATCH, KEY) for each in (MODEL, model)])()
    assert rounded.dtype == jnp.float32
    assert 1e-5 < np.abs(rounded - bound).max() < 0.1
    block, x = ladder_vae.Bottleneck(8, 8, dtype="bfloat16"), jax.random.normal(KEY, (2, 2, 2, 8))
    y = block.apply(block.init(KEY, x), x)
    assert y.dtype == jnp.float32 and (y != y.astype(jnp.bfloat16)).mean() > 0.9


@pytest.mark.slow
def test_sizes_that_are_no_powers_of_two():
    sizes, blocks = (28, 14, 7, 1), (1, 2, 1, 1)
    config = replace(CONFIG, image_size=28, channels=3, sizes=sizes, encoder_blocks=blocks, decoder_blocks=blocks)
    model = ladder_vae.build(config)
    batch = {"image": jax.ShapeDtypeStruct((2, 28, 28, 3), jnp.uint8)}
    variables = jax.eval_shape(model.init, KEY, batch)
    latents = jax.eval_shape(model.encode, variables, batch["image"])
    expected = {name: ((2, *spec.shape), spec.dtype) for name, spec in model.latents.items()}
    assert {name: (part.shape, part.dtype) for name, part in latents.items()} == expected
    assert jax.eval_shape(model.decode, variables, latents) == batch["image"]
    sample = jax.eval_shape(lambda variables: model.sample(variables, KEY, {}, num=3), variables)
    assert (sample.shape, sample.dtype) == ((3, 28, 28, 3), jnp.uint8)


@pytest.mark.slow
def test_reconstructions_become_their_originals():
    check_copies(ladder_vae.build(replace(CONFIG, mixtures=1)))


@pytest.mark.slow
def test_latents_decode_to_what_the_posteriors_means_become(variables: Any):
    """The noise of the prior that they are told in stands for the same latent images, and so for the same mixtures."""
    module = LadderVAE(CONFIG)
    still = [jnp.zeros((blocks, 81, size, size, 1)) for size, blocks in ((2, 1), (1, 2))]
    expected, _ = module.apply(variables, IMAGES, still)
    noise = module.apply(variables, IMAGES, still, method="encode")
    np.testing.assert_allclose(module.apply(variables, noise, method="draw"), expected, atol=1e-4)
    latents = MODEL.encode(variables, IMAGES)
    assert latents.keys() == {"size_2", "size_1"} and latents["size_1"].shape == (81, 2, 1, 1, 1)
    np.testing.assert_allclose(latents["size_1"], np.swapaxes(noise[1], 0, 1), atol=1e-6)
    pixels = np.clip(np.round(logistic_mixture_mean(expected, 1) + 1), 0, 2)
    near = np.abs(np.asarray(logistic_mixture_mean(expected, 1)) % 1 - 0.5) < 1e-4  # where rounding decides
    assert near.mean() < 0.01
    np.testing.assert_array_equal(np.where(near, 0, MODEL.decode(variables, latents)), np.where(near, 0, pixels))


@pytest.mark.slow
def test_drawn_latents_have_the_mean_and_variance_of_the_coarsest_posterior(variables: Any):
    """It is given nothing but the image: the noise of one draw more, added to its mean, by the ratio of deviations."""
    draws = mapped(lambda key: MODEL.encode(variables, IMAGES[:9], key)["size_1"][:, 0], jax.random.split(KEY, 8192))
    ends = [
        LadderVAE(CONFIG).apply(
            variables, IMAGES[:9], [jnp.zeros((1, 9, 2, 2, 1)), jnp.full((2, 9, 1, 1, 1), noise)], method="encode"
        )[1][0]
        for noise in (0.0, 1.0)
    ]
    mean, deviation = np.float64(ends[0]), np.float64(ends[1]) - np.float64(ends[0])
    assert np.abs(mean).max() > 0.01 and np.abs(deviation - 1).max() > 0.05
    np.testing.assert_allclose((draws.mean(axis=0) - mean) / deviation, 0, atol=5 / math.sqrt(8192))
    np.testing.assert_allclose(draws.std(axis=0) / deviation, 1, atol=5 / math.sqrt(2 * 8192))


def test_dropout_is_for_training_alone(variables: Any):
    model = ladder_vae.build(replace(CONFIG, dropout=0.5))
    loss = jax.jit(lambda train: model.loss(variables, BATCH, KEY, 0, train=train)[0], static_argnums=0)
    expected = jax.jit(lambda: MODEL.loss(variables, BATCH, KEY, 0, train=True)[0])()
    np.testing.assert_allclose(loss(False), expected, rtol=1e-6)
    assert abs(loss(True) - expected) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (4, 1)}, r"sizes=\[4, 1\] must begin with image_size=2"),
        ({"image_size": 7, "sizes": (7, 2)}, "each must be a multiple of the next"),
        ({"decoder_blocks": (1,)}, r"decoder_blocks=\[1\] must be one number, 1 or more, for each of sizes=\[2, 1\]"),
        ({"encoder_blocks": (1, 0)}, r"encoder_blocks=\[1, 0\] must be one number"),
        ({"kl_warmup_steps": -1}, "kl_warmup_steps is -1"),
        ({"mixtures": 0}, "mixtures is 0: it must be at least 1"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)
