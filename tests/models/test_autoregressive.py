"""The autoregressive transformer: probabilities that sum to one, conditionals on the past alone, exact sampling."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.models import autoregressive
from vlm_jax.models.autoregressive import Autoregressive, Config
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import patchify, unpatchify

KEY = jax.random.key(0)


def config(image_size: int, channels: int, levels: int, patch_size: int, **transformer: Any) -> Config:
    settings = {"width": 8, "depth": 2, "heads": 2, "mlp": 16, "scan": False, **transformer}
    return Config(
        image_size=image_size,
        channels=channels,
        levels=levels,
        patch_size=patch_size,
        transformer=Transformer(**settings),
    )


def random_variables(c: Config, scale: float = 0.5) -> Any:
    """Random values for every parameter, so that each conditional depends on all before it."""
    random = np.random.default_rng(0)
    batch = {"image": np.zeros((1, c.image_size, c.image_size, c.channels), np.uint8)}
    shapes = jax.eval_shape(autoregressive.build(c).init, KEY, batch)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * random.normal(size=leaf.shape), jnp.float32), shapes)


def all_images(c: Config) -> np.ndarray:
    size = c.image_size**2 * c.channels
    images = np.array(list(itertools.product(range(c.levels), repeat=size)), np.uint8)
    return images.reshape(-1, c.image_size, c.image_size, c.channels)


@pytest.mark.parametrize(
    ("channels", "levels", "patch_size"), [(1, 3, 1), (1, 3, 2), (3, 2, 1)], ids=["pixels", "patches", "colours"]
)
def test_probabilities_of_all_images_sum_to_one(channels: int, levels: int, patch_size: int):
    c = config(2, channels, levels, patch_size)
    model, images = autoregressive.build(c), all_images(c)
    log_likelihood = jax.jit(model.log_likelihood)(random_variables(c), {"image": images}, KEY)
    assert log_likelihood.shape == (levels ** (4 * channels),)
    np.testing.assert_allclose(np.exp(np.float64(log_likelihood)).sum(), 1, atol=1e-5)
    assert np.ptp(log_likelihood) > 3


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_sub_pixel_changes_no_conditional_before_it_and_all_after(patch_size: int):
    c = config(4, 2, 4, patch_size)
    random = np.random.default_rng(0)
    image = random.integers(0, c.levels, (1, 4, 4, 2))
    patches = patchify(image, patch_size)
    changes = np.eye(patches.size, dtype=int).reshape(-1, *patches.shape[1:])
    images = unpatchify((patches + changes) % c.levels, patch_size, c.channels)
    variables = random_variables(c)
    apply = jax.jit(lambda images: Autoregressive(c).apply(variables, images))
    log_probs = apply(np.concatenate([images, image])).reshape(len(images) + 1, -1)
    changed = np.asarray(log_probs[:-1] != log_probs[-1])
    assert not np.tril(changed, -1).any()
    # In float32 a faint influence may round away: nearly every one is there.
    assert changed[np.triu_indices(len(changed))].mean() > 0.99


@pytest.mark.parametrize(("patch_size", "scan"), [(1, True), (2, False)])
def test_cached_sampling_is_sampling_from_the_full_pass(patch_size: int, scan: bool):
    """Each sub-pixel drawn from the module's conditional over all levels, with the same key."""
    num, c = 16, config(4, 2, 3, patch_size, scan=scan)
    variables = random_variables(c)
    positions, length = (4 // patch_size) ** 2, patch_size**2 * c.channels

    @jax.jit
    def draw(patches: jax.Array, position: jax.Array, i: jax.Array) -> jax.Array:
        def conditional(level: jax.Array) -> jax.Array:
            images = unpatchify(patches.at[:, position, i].set(level), patch_size, c.channels)
            return Autoregressive(c).apply(variables, images)[:, position, i]

        key = jax.random.fold_in(jax.random.fold_in(KEY, position), i)
        logits = jax.vmap(conditional, out_axes=-1)(jnp.arange(c.levels))
        return patches.at[:, position, i].set(jax.random.categorical(key, logits))

    patches = jnp.zeros((num, positions, length), int)
    for position, i in itertools.product(range(positions), range(length)):
        patches = draw(patches, position, i)
    model = autoregressive.build(c)
    samples = jax.jit(lambda key: model.sample(variables, key, {}, num=num))(KEY)
    np.testing.assert_array_equal(samples, unpatchify(patches, patch_size, c.channels))
    assert samples.dtype == jnp.uint8
    assert set(np.unique(samples)) == {0, 1, 2}


def test_samples_have_the_probabilities_of_the_likelihood():
    """Pearson's statistic over all 81 images, which has mean 80 and variance 160."""
    count, c = 50_000, config(2, 1, 3, 2)
    model, variables, images = autoregressive.build(c), random_variables(c, 0.2), all_images(c)
    samples = jax.jit(lambda key: model.sample(variables, key, {}, num=count))(KEY)
    observed = np.bincount(np.asarray(samples).reshape(count, 4) @ [27, 9, 3, 1], minlength=81)
    expected = count * np.exp(jax.jit(model.log_likelihood)(variables, {"image": images}, KEY))
    assert expected.min() > 5
    assert np.sum((observed - expected) ** 2 / expected) < 80 + 4 * math.sqrt(160)


def test_a_temperature_raises_probabilities_to_a_power():
    """An image of one sub-pixel: at 0 always the likeliest level, at a half each with the square of its probability."""
    count, c = 20_000, config(1, 1, 3, 1)
    model, variables = autoregressive.build(c), random_variables(c, 0.3)
    probabilities = np.exp(jax.jit(model.log_likelihood)(variables, {"image": all_images(c)}, KEY))
    draw = jax.jit(model.sample, static_argnames=("num", "temperature"))
    frequencies = [
        np.bincount(np.ravel(draw(variables, KEY, {}, num=count, temperature=temperature)), minlength=3) / count
        for temperature in (0.5, 0.0)
    ]
    np.testing.assert_allclose(frequencies[0], probabilities**2 / np.sum(probabilities**2), atol=4 * 0.5 / count**0.5)
    np.testing.assert_array_equal(frequencies[1], np.eye(3)[probabilities.argmax()])
    assert probabilities.max() < 0.8


def test_the_loss_is_the_negative_log_likelihood_in_bits_per_dimension():
    c = config(2, 1, 3, 1)
    model, variables, batch = autoregressive.build(c), random_variables(c), {"image": all_images(c)}
    loss, aux = jax.jit(lambda: model.loss(variables, batch, KEY, 0, train=True))()
    log_likelihood = jax.jit(model.log_likelihood)(variables, batch, KEY)
    np.testing.assert_allclose(loss, -log_likelihood.mean() / (4 * math.log(2)), rtol=1e-5)
    assert aux.weight == 81


def test_a_model_without_preference_takes_the_logarithm_of_its_levels():
    """With all parameters zero each conditional is uniform."""
    c = config(2, 1, 3, 1)
    variables = jax.tree.map(jnp.zeros_like, random_variables(c))
    loss, _ = jax.jit(lambda: autoregressive.build(c).loss(variables, {"image": all_images(c)}, KEY, 0, train=False))()
    np.testing.assert_allclose(loss, math.log2(3), rtol=1e-6)


def test_dropout_is_for_training_alone():
    plain, dropping = (autoregressive.build(config(2, 1, 3, 1, dropout=rate)) for rate in (0.0, 0.5))
    variables, batch = random_variables(config(2, 1, 3, 1)), {"image": all_images(config(2, 1, 3, 1))}
    loss = jax.jit(lambda train: dropping.loss(variables, batch, KEY, 0, train=train)[0], static_argnums=0)
    expected = jax.jit(lambda: plain.loss(variables, batch, KEY, 0, train=False)[0])()
    np.testing.assert_allclose(loss(False), expected, rtol=1e-6)
    assert abs(loss(True) - expected) > 0.01


def test_bfloat16_keeps_probabilities_and_the_cache_in_their_dtypes():
    c = config(4, 1, 3, 2, dtype="bfloat16")
    model, batch = autoregressive.build(c), {"image": np.zeros((2, 4, 4, 1), np.uint8)}
    variables = jax.eval_shape(model.init, KEY, batch)
    assert jax.eval_shape(model.log_likelihood, variables, batch, KEY).dtype == jnp.float32
    sample = jax.eval_shape(lambda variables: model.sample(variables, KEY, {}, num=3), variables)
    assert (sample.shape, sample.dtype) == ((3, 4, 4, 1), jnp.uint8)


def test_patches_that_do_not_tile_the_image_are_refused():
    with pytest.raises(UserError, match="an image of 4 pixels a side cannot be cut into patches of 3"):
        config(4, 1, 3, 3)
