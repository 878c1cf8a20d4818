"""PixelCNN: probabilities that sum to one, a field of view without a blind spot, and cached sampling."""

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densities import all_images
from reference import random_params
from vlm_jax.contract import Input, abstract_batch
from vlm_jax.errors import UserError
from vlm_jax.models import pixelcnn
from vlm_jax.models.pixelcnn import Config, PixelCNN
from vlm_jax.sharding import MeshShape, make_mesh, parameter_shardings

KEY = jax.random.key(0)
SMALL = Config(image_size=2, channels=1, levels=3, width=8, depth=2)
COUNT = 50_000


def random_variables(c: Config, scale: float = 0.5) -> Any:
    """Random values for every parameter, so that each conditional depends on all before it."""
    model = pixelcnn.build(c)
    shapes = jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 1))
    variables = jax.tree.map(jnp.asarray, random_params(shapes, scale))
    if c.classes is not None:
        variables["params"]["stack"]["layers"]["label"] *= 5  # so that images tell their labels apart
    return variables


@pytest.mark.parametrize(
    "settings",
    [{}, {"channels": 3, "levels": 2}, {"mixtures": 2}, {"channels": 3, "levels": 2, "mixtures": 2}, {"kernel": 5}],
    ids=["softmax", "colours", "mixture", "mixture_of_colours", "window"],
)
def test_probabilities_of_all_images_sum_to_one(settings: dict[str, Any]):
    c = replace(SMALL, **settings)
    log_likelihood = jax.jit(pixelcnn.build(c).log_likelihood)(random_variables(c), {"image": all_images(c)}, KEY)
    assert log_likelihood.shape == (c.levels ** (4 * c.channels),)
    np.testing.assert_allclose(np.exp(np.float64(log_likelihood)).sum(), 1, atol=1e-5)
    assert np.ptp(log_likelihood) > 3


def test_images_of_each_class_have_a_distribution_of_their_own():
    c = replace(SMALL, classes=2)
    log_likelihood, variables = jax.jit(pixelcnn.build(c).log_likelihood), random_variables(c)
    batches = [{"image": all_images(c), "label": np.full(81, label)} for label in (0, 1)]
    zero, one = (np.float64(log_likelihood(variables, batch, KEY)) for batch in batches)
    for values in (zero, one):
        np.testing.assert_allclose(np.exp(values).sum(), 1, atol=1e-5)
    assert np.abs(zero - one).max() > 0.1


def test_a_sub_pixel_changes_no_conditional_before_it_and_all_after():
    """All of those after it: there is no blind spot. Raster order, and within a pixel that of the channels."""
    c = replace(SMALL, image_size=4, channels=2, levels=4, depth=5)
    image = np.random.default_rng(0).integers(0, c.levels, (1, 4, 4, 2))
    changes = np.eye(image.size, dtype=int).reshape(-1, 4, 4, 2)
    variables = random_variables(c)
    apply = jax.jit(lambda images: PixelCNN(c).apply(variables, images))
    log_probs = apply(np.concatenate([(image + changes) % c.levels, image])).reshape(len(changes) + 1, -1)
    changed = np.asarray(log_probs[:-1] != log_probs[-1])
    assert not np.tril(changed, -1).any()
    assert changed[np.triu_indices(len(changed))].mean() > 0.99


@pytest.mark.parametrize("settings", [{}, {"mixtures": 2}], ids=["softmax", "mixture"])
def test_samples_have_the_probabilities_of_the_likelihood(settings: dict[str, Any]):
    c = replace(SMALL, **settings)
    model, variables = pixelcnn.build(c), random_variables(c, 0.3)
    samples = jax.jit(lambda key: model.sample(variables, key, {}, num=COUNT))(KEY)
    assert samples.dtype == jnp.uint8 and samples.shape == (COUNT, 2, 2, 1)
    log_likelihood = jax.jit(model.log_likelihood)(variables, {"image": all_images(c)}, KEY)
    assert pearson(samples, np.exp(log_likelihood)) < 4


def pearson(samples: jax.Array, probabilities: np.ndarray) -> float:
    """Over images of 2x2 pixels and 3 levels, in standard deviations above its mean."""
    count = len(samples)
    observed = np.bincount(np.asarray(samples).reshape(count, 4) @ [27, 9, 3, 1], minlength=81)
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = count * probabilities[possible]
    assert expected.min() > 5
    freedom = possible.sum() - 1
    return float((np.sum((observed[possible] - expected) ** 2 / expected) - freedom) / math.sqrt(2 * freedom))


def test_cached_sampling_is_sampling_from_the_full_pass():
    """Each sub-pixel drawn from the module's conditional over all levels, with the same key."""
    num, c = 16, replace(SMALL, image_size=4, channels=2, depth=3, kernel=5)
    variables = random_variables(c)

    @jax.jit
    def draw(images: jax.Array, row: jax.Array, column: jax.Array, i: jax.Array) -> jax.Array:
        def conditional(level: jax.Array) -> jax.Array:
            return PixelCNN(c).apply(variables, images.at[:, row, column, i].set(level))[:, row, column, i]

        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, row), column), i)
        logits = jax.vmap(conditional, out_axes=-1)(jnp.arange(c.levels))
        return images.at[:, row, column, i].set(jax.random.categorical(key, logits))

    images = jnp.zeros((num, 4, 4, 2), int)
    for row, column, i in itertools.product(range(4), range(4), range(2)):
        images = draw(images, row, column, i)
    model = pixelcnn.build(c)
    samples = jax.jit(lambda key: model.sample(variables, key, {}, num=num))(KEY)
    np.testing.assert_array_equal(samples, images)
    assert set(np.unique(samples)) == {0, 1, 2}


def test_samples_are_of_the_labels_given_or_of_all_alike():
    c = replace(SMALL, classes=3)
    model, variables = pixelcnn.build(c), random_variables(c, 0.3)
    draw = jax.jit(lambda key, conditioning: model.sample(variables, key, conditioning, num=COUNT))
    log_likelihood, images = jax.jit(model.log_likelihood), all_images(c)
    given = np.stack(
        [np.exp(log_likelihood(variables, {"image": images, "label": np.full(81, y)}, KEY)) for y in range(3)]
    )
    assert pearson(draw(KEY, {"label": np.full(COUNT, 2)}), given[2]) < 4
    assert pearson(draw(KEY, {"label": np.full(COUNT, 1)}), given[2]) > 10
    assert pearson(draw(KEY, {}), given.mean(axis=0)) < 4


def first_known(c: Config, count: int) -> np.ndarray:
    return np.arange(c.image_size**2).reshape(c.image_size, c.image_size) < count


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"classes": 2, "mixtures": 2}, marks=pytest.mark.slow)],
    ids=["softmax", "classes_and_mixture"],
)
def test_a_completion_is_a_sample_that_began_with_what_is_known(settings: dict[str, Any]):
    """Nothing known: a sample. The beginning of a sample known: the same sample again, with the same key."""
    c = replace(SMALL, image_size=3, channels=2, **settings)
    model, variables = pixelcnn.build(c), random_variables(c, 0.3)
    sample = jax.jit(lambda key: model.sample(variables, key, {}, num=8))(KEY)
    for count in (0, 3, 5, 9):
        known = first_known(c, count)
        complete = jax.jit(partial(model.complete, known=known))
        completed = np.asarray(complete(variables, KEY, np.where(known[..., None], sample, 1)))
        np.testing.assert_array_equal(completed[:, known], sample[:, known], strict=True)
        if c.classes is None or count == 0:
            np.testing.assert_array_equal(completed, sample)


@pytest.mark.parametrize("classes", [None, 2])
def test_completions_have_the_conditional_probabilities(classes: int | None):
    """Given three pixels of four, a row and a half, and the label that they speak for, where there are labels."""
    c = replace(SMALL, classes=classes)
    model, variables, images = pixelcnn.build(c), random_variables(c, 0.3), all_images(c)
    labels = [{}] if classes is None else [{"label": np.full(81, y)} for y in range(classes)]
    log_likelihood = jax.jit(model.log_likelihood)
    joint = sum(np.exp(log_likelihood(variables, {"image": images, **label}, KEY)) for label in labels)
    known = first_known(c, 3)
    joint = np.where((images[:, known, 0] == [2, 0, 1]).all(axis=1), joint, 0)
    given = np.broadcast_to(np.array([[2, 0], [1, 0]], np.uint8)[..., None], (COUNT, 2, 2, 1))
    complete = jax.jit(partial(model.complete, known=known))
    assert pearson(complete(variables, KEY, given), joint / joint.sum()) < 4


def test_pixels_that_are_not_the_first_are_refused():
    with pytest.raises(UserError, match="only from its first pixels in raster order"):
        pixelcnn.build(SMALL).complete(random_variables(SMALL), KEY, all_images(SMALL), ~first_known(SMALL, 2))


def test_at_temperature_zero_every_sub_pixel_is_the_likeliest():
    c = replace(SMALL, channels=2)
    model, variables = pixelcnn.build(c), random_variables(c)
    draw = jax.jit(model.sample, static_argnames=("num", "temperature"))
    zero, low = (draw(variables, KEY, {}, num=5, temperature=t) for t in (0.0, 1e-5))
    np.testing.assert_array_equal(zero, np.broadcast_to(zero[:1], zero.shape))
    np.testing.assert_array_equal(zero, low)


def test_the_loss_is_the_negative_log_likelihood_in_bits_per_dimension():
    """At a dropout that is for training alone."""
    c = replace(SMALL, dropout=0.5)
    model, variables, batch = pixelcnn.build(c), random_variables(c), {"image": all_images(c)}
    loss = jax.jit(lambda train: model.loss(variables, batch, KEY, 0, train=train)[0], static_argnums=0)
    log_likelihood = jax.jit(model.log_likelihood)(variables, batch, KEY)
    expected = -log_likelihood.mean() / (4 * math.log(2))
    np.testing.assert_allclose(loss(False), expected, rtol=1e-5)
    assert abs(loss(True) - expected) > 0.01
    assert jax.eval_shape(lambda: model.loss(variables, batch, KEY, 0, train=True)[1].weight).shape == ()


def test_bfloat16_keeps_probabilities_and_caches_in_their_dtypes():
    c = replace(SMALL, mixtures=2, classes=2, dtype="bfloat16")
    model = pixelcnn.build(c)
    batch = {"image": np.zeros((2, 2, 2, 1), np.uint8), "label": np.zeros(2, np.int32)}
    variables = jax.eval_shape(model.init, KEY, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.log_likelihood, variables, batch, KEY).dtype == jnp.float32
    sample = jax.eval_shape(lambda variables: model.sample(variables, KEY, {}, num=3), variables)
    assert (sample.shape, sample.dtype) == ((3, 2, 2, 1), jnp.uint8)


def test_parameters_of_labels_and_mixtures_lie_on_the_mesh():
    model = pixelcnn.build(replace(SMALL, mixtures=2, classes=5))
    params = jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 2))["params"]
    parameter_shardings(params, model.rules, make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))
    assert params["stack"]["layers"]["label"].shape == (2, 5, 32)
    assert model.inputs["label"] == Input((), "int32", 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": 4}, "the kernel of a masked convolution is 4 pixels a side: choose an odd number"),
        ({"mixtures": 0}, "mixtures is 0: it must be at least 1, or None"),
        ({"classes": 0}, "classes is 0: it must be at least 1, or None"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(settings: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **settings)
