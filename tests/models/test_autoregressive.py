"""The autoregressive transformer: probabilities that sum to one, conditionals on the past alone, exact sampling."""

import itertools
import math
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
from vlm_jax.models import autoregressive
from vlm_jax.models.autoregressive import Autoregressive, Config
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import patchify, unpatchify
from vlm_jax.sharding import MeshShape, make_mesh, parameter_shardings

KEY = jax.random.key(0)


def config(
    image_size: int,
    channels: int,
    levels: int,
    patch_size: int,
    *,
    mixtures: int | None = None,
    classes: int | None = None,
    **transformer: Any,
) -> Config:
    image = {"image_size": image_size, "channels": channels, "levels": levels, "patch_size": patch_size}
    stack = Transformer(**{"width": 8, "depth": 2, "heads": 2, "mlp": 16, "scan": False, **transformer})
    return Config(**image, mixtures=mixtures, classes=classes, transformer=stack)


def random_variables(c: Config, scale: float = 0.5) -> Any:
    """Random values for every parameter, so that each conditional depends on all before it."""
    model = autoregressive.build(c)
    shapes = jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 1))
    variables = jax.tree.map(jnp.asarray, random_params(shapes, scale))
    if c.classes is not None:
        variables["params"]["label"] *= 10  # so that images tell their labels apart
    return variables


@pytest.mark.parametrize(
    "c",
    [
        config(2, 1, 3, 1),
        config(2, 1, 3, 2),
        config(2, 3, 2, 1),
        config(2, 1, 3, 1, mixtures=2),
        config(2, 3, 2, 1, mixtures=2),
    ],
    ids=["pixels", "patches", "colours", "mixture", "mixture_of_colours"],
)
def test_probabilities_of_all_images_sum_to_one(c: Config):
    model, images = autoregressive.build(c), all_images(c)
    log_likelihood = jax.jit(model.log_likelihood)(random_variables(c), {"image": images}, KEY)
    assert log_likelihood.shape == (c.levels ** (4 * c.channels),)
    np.testing.assert_allclose(np.exp(np.float64(log_likelihood)).sum(), 1, atol=1e-5)
    assert np.ptp(log_likelihood) > 2


def test_images_of_each_class_have_a_distribution_of_their_own():
    c = config(2, 1, 3, 2, classes=2)
    model, images, variables = autoregressive.build(c), all_images(c), random_variables(c)
    log_likelihood = jax.jit(model.log_likelihood)
    zero, one = (log_likelihood(variables, {"image": images, "label": np.full(81, y)}, KEY) for y in (0, 1))
    for values in (zero, one):
        np.testing.assert_allclose(np.exp(np.float64(values)).sum(), 1, atol=1e-5)
    assert np.abs(zero - one).max() > 0.1


def test_a_pixel_changes_no_mixture_before_it_and_all_after():
    """And the mixture at a pixel does not see it: only the coefficients between its channels do."""
    c = config(3, 2, 4, 1, mixtures=2)
    image = np.random.default_rng(0).integers(0, c.levels, (1, 3, 3, 2))
    changes = np.eye(9, dtype=int).reshape(9, 3, 3, 1) * np.array([1, 0])
    variables, module = random_variables(c), Autoregressive(c)
    outputs = jax.jit(lambda images: module.apply(variables, images, capture_intermediates=True)[1])
    mixtures = outputs(np.concatenate([(image + changes) % c.levels, image]))["intermediates"]["head"]["__call__"][0]
    changed = np.asarray(mixtures[:-1] != mixtures[-1]).any(axis=-1)
    np.testing.assert_array_equal(changed, np.triu(np.ones((9, 9), bool), 1))


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


def pearson(samples: jax.Array, probabilities: np.ndarray) -> float:
    """Over images of 2x2 pixels and 3 levels; it has the mean `freedom` and twice that as its variance."""
    count = len(samples)
    observed = np.bincount(np.asarray(samples).reshape(count, 4) @ [27, 9, 3, 1], minlength=81)
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = count * probabilities[possible]
    assert expected.min() > 5
    freedom = possible.sum() - 1
    return float((np.sum((observed[possible] - expected) ** 2 / expected) - freedom) / math.sqrt(2 * freedom))


COUNT = 50_000


@pytest.mark.parametrize("settings", [{"patch_size": 2}, {"patch_size": 1, "mixtures": 2}], ids=["softmax", "mixture"])
def test_samples_have_the_probabilities_of_the_likelihood(settings: dict[str, int]):
    c = config(2, 1, 3, **settings)
    model, variables, images = autoregressive.build(c), random_variables(c, 0.2), all_images(c)
    samples = jax.jit(lambda key: model.sample(variables, key, {}, num=COUNT))(KEY)
    log_likelihood = jax.jit(model.log_likelihood)(variables, {"image": images}, KEY)
    assert pearson(samples, np.exp(log_likelihood)) < 4


def test_samples_are_of_the_labels_given_or_of_all_alike():
    c = config(2, 1, 3, 2, classes=3)
    model, variables, images = autoregressive.build(c), random_variables(c, 0.35), all_images(c)
    draw = jax.jit(lambda key, conditioning: model.sample(variables, key, conditioning, num=COUNT))
    log_likelihood = jax.jit(model.log_likelihood)
    given = np.stack(
        [np.exp(log_likelihood(variables, {"image": images, "label": np.full(81, y)}, KEY)) for y in range(3)]
    )
    assert pearson(draw(KEY, {"label": np.full(COUNT, 2)}), given[2]) < 4
    assert pearson(draw(KEY, {"label": np.full(COUNT, 1)}), given[2]) > 10
    assert pearson(draw(KEY, {}), given.mean(axis=0)) < 4


def rows_known(c: Config, rows: int) -> np.ndarray:
    return np.arange(c.image_size)[:, None].repeat(c.image_size, axis=1) < rows


@pytest.mark.parametrize(("patch_size", "classes"), [(1, None), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_completion_is_a_sample_that_began_with_what_is_known(patch_size: int, classes: int | None):
    """Nothing known: a sample. The beginning of a sample known: the same sample again, with the same key."""
    c = config(4, 2, 3, patch_size, classes=classes)
    model, variables = autoregressive.build(c), random_variables(c, 0.3)
    sample = jax.jit(lambda key: model.sample(variables, key, {}, num=8))(KEY)
    for rows in (0, 2, 4):
        complete = jax.jit(partial(model.complete, known=rows_known(c, rows)))
        completed = np.asarray(complete(variables, KEY, np.where(rows_known(c, rows)[..., None], sample, 1)))
        np.testing.assert_array_equal(completed[:, :rows], sample[:, :rows], strict=True)
        if classes is None or rows == 0:
            np.testing.assert_array_equal(completed, sample)
        assert (completed[:, rows:] != 1).any() == (rows < 4)


@pytest.mark.parametrize(
    "settings",
    [{"classes": None}, {"classes": 2}, {"classes": None, "mixtures": 2}],
    ids=["softmax", "classes", "mixture"],
)
def test_completions_have_the_conditional_probabilities(settings: dict[str, Any]):
    """Given the first row, and the label that it speaks for, where there are labels."""
    c = config(2, 1, 3, 1, **settings)
    model, variables, images = autoregressive.build(c), random_variables(c, 0.3), all_images(c)
    labels = [{}] if c.classes is None else [{"label": np.full(81, y)} for y in range(c.classes)]
    log_likelihood = jax.jit(model.log_likelihood)
    joint = sum(np.exp(log_likelihood(variables, {"image": images, **label}, KEY)) for label in labels)
    joint = np.where((images[:, 0, :, 0] == [2, 0]).all(axis=1), joint, 0)
    given = np.zeros((COUNT, 2, 2, 1), np.uint8)
    given[:, 0, 0] = 2
    complete = jax.jit(partial(model.complete, known=rows_known(c, 1)))
    assert pearson(complete(variables, KEY, given), joint / joint.sum()) < 4


@pytest.mark.parametrize(
    ("known", "patch_size", "message"),
    [
        ([[0, 0], [1, 1]], 1, r"only from its first pixels in raster order"),
        ([[1, 0], [1, 0]], 1, r"only from its first pixels in raster order"),
        ([[1, 1], [0, 0]], 2, r"only from its first whole patches of 2x2 pixels in raster order"),
    ],
    ids=["bottom", "left", "half_a_patch"],
)
def test_pixels_that_are_not_the_first_are_refused(known: list[list[int]], patch_size: int, message: str):
    c = config(2, 1, 3, patch_size)
    model = autoregressive.build(c)
    with pytest.raises(UserError, match=message):
        model.complete(random_variables(c), KEY, all_images(c), np.array(known, bool))


def test_at_temperature_zero_a_pixel_is_the_middle_of_its_likeliest_component():
    c = config(3, 3, 256, 1, mixtures=3)
    model, variables = autoregressive.build(c), random_variables(c, 0.4)
    draw = jax.jit(model.sample, static_argnames=("num", "temperature"))
    zero, low = (np.int32(draw(variables, KEY, {}, num=4, temperature=t)) for t in (0.0, 1e-7))
    np.testing.assert_array_equal(zero, np.broadcast_to(zero[:1], zero.shape))
    np.testing.assert_array_equal(zero, low)
    assert np.ptp(zero) > 20


def test_parameters_of_labels_and_mixtures_lie_on_the_mesh():
    model = autoregressive.build(config(2, 3, 3, 1, mixtures=2, classes=5))
    params = jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 2))["params"]
    parameter_shardings(params, model.rules, make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))
    assert params["label"].shape == (5, 8)
    assert model.inputs["label"] == Input((), "int32", 5)


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


def test_places_and_labels_start_with_the_deviation_of_a_fiftieth():
    model = autoregressive.build(config(64, 1, 2, 1, classes=50, width=32))
    batch = {"image": np.zeros((1, 64, 64, 1), np.uint8), "label": np.zeros(1, np.int32)}
    tables = jax.jit(lambda key: [model.init(key, batch)["params"][name] for name in ("row", "column", "label")])(KEY)
    for table in tables:
        np.testing.assert_allclose(table.std(), 0.02, rtol=0.06)


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


@pytest.mark.parametrize(
    ("patch_size", "settings", "message"),
    [
        (3, {}, "an image of 4 pixels a side cannot be cut into patches of 3"),
        (2, {"mixtures": 5}, "a mixture of logistics describes one pixel and the patches are 2 pixels a side"),
        (1, {"mixtures": 0}, "mixtures is 0: it must be at least 1, or None"),
        (1, {"classes": 0}, "classes is 0: it must be at least 1, or None"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(patch_size: int, settings: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        config(4, 1, 3, patch_size, **settings)
