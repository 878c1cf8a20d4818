"""The transformer autoregressive flow: on 2x2 images of 3 levels all 81 probabilities are known."""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densities import IMAGES, check_bound, check_importance_weights
from optimized import mapped
from reference import dense, random_params, transformer
from vlm_jax.errors import UserError
from vlm_jax.models import tarflow
from vlm_jax.models.tarflow import Block, Config, Sampling, TarFlow
from vlm_jax.nn.transformer import Transformer
from vlm_jax.trees import map_with_path, unstack

KEY = jax.random.key(1)
TRANSFORMER = Transformer(width=8, depth=2, heads=2, mlp=16)
WIDE = Config(image_size=8, channels=1, patch_size=2, blocks=3, classes=2, transformer=TRANSFORMER)
X = jax.random.normal(KEY, (4, 16, 4))
LABEL = jnp.array([0, 1, 1, 0])

SMALL = Config(image_size=2, channels=1, levels=3, blocks=2, transformer=replace(TRANSFORMER, depth=1))
DRAWS = 8192


def random_variables(module: Any, *args: Any, scale: float = 0.1, alpha: float = 0.0) -> Any:
    """As initialised, each parameter moved at random, and every alpha by as much."""
    random = np.random.default_rng(0)

    def move(path: str, leaf: jax.Array) -> jax.Array:
        leaf = leaf + scale * random.normal(size=leaf.shape).astype(np.float32)
        return leaf.at[..., leaf.shape[-1] // 2 :].add(alpha) if path.endswith("affine/bias") else leaf

    return map_with_path(move, jax.jit(module.init)(KEY, *args))


def invert(module: Any, variables: Any, z: jax.Array, label: jax.Array | None = None) -> jax.Array:
    return jax.jit(lambda z: module.apply(variables, z, label, method="invert"))(z)


@pytest.fixture(scope="module")
def wide() -> Any:
    return random_variables(TarFlow(WIDE), X, LABEL)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 0.01)])
def test_the_inverse_undoes_the_flow(wide, dtype: str, error: float):
    """In bfloat16 the transformer rounds what the inverse has recovered otherwise now and then."""
    module = TarFlow(replace(WIDE, transformer=replace(TRANSFORMER, dtype=dtype)))
    z, log_det = jax.jit(module.apply)(wide, X, LABEL)
    assert (z.dtype, log_det.dtype) == (jnp.float32, jnp.float32)
    assert np.abs(z - X).max() > 0.1
    np.testing.assert_allclose(invert(module, wide, z, LABEL), X, atol=error)


def test_in_bfloat16_the_maps_are_not_rounded():
    """Of a block whose transformer has no say yet they are the bias, and that is not a number of eight bits."""
    module = TarFlow(replace(WIDE, classes=None, blocks=1, transformer=replace(TRANSFORMER, dtype="bfloat16")))
    variables = jax.jit(module.init)(KEY, X)
    bias = jnp.full((1, 8), 1.001)
    variables = map_with_path(lambda path, leaf: bias if path.endswith("affine/bias") else leaf, variables)
    z, log_det = jax.jit(module.apply)(variables, X)
    np.testing.assert_allclose(z[:, ::-1], (X - 1.001) * math.exp(-1.001), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_det, -64 * 1.001, rtol=1e-6)


def test_the_log_determinant_is_that_of_the_jacobian(wide):
    module = TarFlow(WIDE)

    def flow(x: jax.Array) -> jax.Array:
        return module.apply(wide, x[None], LABEL[1:2])[0].ravel()

    jacobian = np.asarray(jax.jit(jax.jacfwd(flow))(X[1]), np.float64).reshape(64, 64)
    expected = np.linalg.slogdet(jacobian)[1]
    assert abs(expected) > 0.1
    np.testing.assert_allclose(jax.jit(module.apply)(wide, X, LABEL)[1][1], expected, atol=1e-4)
    # The order turns round from block to block, so that every patch's noise depends on every patch.
    assert (np.abs(jacobian.reshape(16, 4, 16, 4)).max(axis=(1, 3)) > 0).all()


def test_a_block_transforms_each_patch_given_those_before_it():
    variables = random_variables(Block(WIDE), X, LABEL)
    jacobian = jax.jit(jax.jacfwd(lambda x: Block(WIDE).apply(variables, x[None], LABEL[:1])[0][0]))(X[0])
    depends = np.abs(jacobian).max(axis=(1, 3)) > 0
    np.testing.assert_array_equal(depends, np.tri(16, dtype=bool))
    # Of its own patch, sub-pixel by sub-pixel: all of them at once are functions of the patches before.
    own = np.asarray(jacobian)[np.arange(16), :, np.arange(16)]
    np.testing.assert_array_equal(own * (1 - np.eye(4)), 0)


def test_the_cached_inverse_equals_the_plain_one():
    """The plain one computes all patches anew for each that it settles: of T rounds, round t makes patch t right."""
    module = Block(WIDE)
    variables = random_variables(module, X, LABEL)

    @jax.jit
    def plain(z: jax.Array) -> jax.Array:
        def settle(_: int, x: jax.Array) -> jax.Array:
            before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
            place = variables["params"]["position"]
            mu, alpha, _ = module.apply(variables, before, place, LABEL, method="parameters")
            return z * jnp.exp(alpha) + mu

        return jax.lax.fori_loop(0, z.shape[1], settle, z)

    np.testing.assert_allclose(invert(module, variables, X, LABEL), plain(X), atol=1e-5)


def guided(params: Any, z: np.ndarray, label: np.ndarray | None, config: Config, sampling: Sampling) -> np.ndarray:
    """The release's `reverse` of one block, each patch with all before it anew: x = z exp(a) + b, a and b guided.

    Its weight rises as i / (T - 1) with the patch i.
    """
    stack, length = unstack(params["transformer"], "blocks", "block"), z.shape[1]

    def parameters(before: np.ndarray, vector: Any, temperature: float) -> np.ndarray:
        x = dense(params["embed"], before) + params["position"] + vector
        return dense(params["affine"], transformer(stack, x, config.transformer, causal=True, temperature=temperature))

    told, untold = (0, 0) if label is None else (params["label"][label][:, None], params["label"].mean(axis=0))
    x = np.zeros(z.shape)
    for i in range(length):
        before = np.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        y, other = parameters(before, told, 1), parameters(before, untold, sampling.attention_temperature)
        weight = sampling.guidance * (i / (length - 1) if sampling.rising else 1)
        b, a = np.split((y + weight * (y - other))[:, i], 2, axis=-1)
        x[:, i] = z[:, i] * np.exp(a) + b
    return x


@pytest.mark.parametrize(
    ("classes", "sampling"),
    [
        (2, Sampling(guidance=1.5)),
        (2, Sampling(guidance=1.5, rising=False)),
        (2, Sampling(guidance=0.7, attention_temperature=0.5)),
        (None, Sampling(guidance=2.0, attention_temperature=1.7)),
    ],
)
def test_guidance_moves_each_patchs_shift_and_scale_away_from_those_of_no_class(
    classes: int | None, sampling: Sampling
):
    config = replace(WIDE, classes=classes, image_size=4)
    label, z = (LABEL if classes else None), jax.random.normal(KEY, (4, 4, 4))
    module = Block(config)
    params = random_params(jax.eval_shape(module.init, KEY, z, label)["params"], scale=0.4)
    draw = jax.jit(
        lambda sampling: module.apply({"params": params}, z, label, sampling, method="invert"), static_argnums=0
    )
    expected = guided(params, np.float64(z), label, config, sampling)
    plain = guided(params, np.float64(z), label, config, Sampling())
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(draw(sampling), expected, rtol=1e-4, atol=1e-4)
    none = draw(replace(sampling, guidance=0.0))
    np.testing.assert_array_equal(none, invert(module, {"params": params}, z, label))
    np.testing.assert_allclose(none, plain, rtol=1e-4, atol=1e-4)


def test_guidance_needs_something_to_go_away_from():
    model = tarflow.build(SMALL)
    with pytest.raises(UserError, match=r"this one is told none: set sampling\.attention_temperature to another value"):
        model.sample({}, KEY, {}, num=1, sampling=Sampling(guidance=1.0))


def test_classes_are_dropped_in_training_alone_and_none_has_the_mean_of_all():
    config = replace(SMALL, classes=2, class_dropout=1 - 1e-6)
    variables = random_variables(TarFlow(config), jnp.zeros((2, 4, 1)), jnp.zeros(2, jnp.int32))
    model, batch = tarflow.build(config), {"image": IMAGES[:4], "label": np.array([0, 0, 1, 1], np.int32)}
    mean = jax.tree.map(lambda leaf: leaf, variables)
    table = variables["params"]["block"]["label"]
    mean["params"]["block"]["label"] = jnp.broadcast_to(table.mean(axis=1, keepdims=True), table.shape)
    loss = jax.jit(lambda variables, train: model.loss(variables, batch, KEY, 0, train=train)[0], static_argnums=1)
    np.testing.assert_allclose(loss(variables, True), loss(mean, False), rtol=1e-5)
    assert abs(loss(variables, True) - loss(variables, False)) > 1e-4
    told = tarflow.build(replace(config, class_dropout=0.0))
    np.testing.assert_allclose(
        jax.jit(lambda: told.loss(variables, batch, KEY, 0, train=True)[0])(), loss(variables, False), rtol=1e-6
    )


CONDITIONAL = replace(SMALL, classes=2)
MODEL = tarflow.build(CONDITIONAL)
BATCH = {"image": IMAGES, "label": np.ones(81, np.int32)}


@pytest.fixture(scope="module")
def variables() -> Any:
    return random_variables(TarFlow(CONDITIONAL), jnp.zeros((81, 4, 1)), BATCH["label"], scale=0.05, alpha=-0.35)


@pytest.fixture(scope="module")
def log_weights(variables: Any) -> np.ndarray:
    """[draws, images], nats"""
    return mapped(lambda key: MODEL.log_weight(variables, BATCH, key), jax.random.split(KEY, DRAWS), batch_size=128)


@pytest.fixture(scope="module")
def inside(variables: Any) -> tuple[float, float]:
    """The mass of the density within the range of the levels, by what falls outside of it, and its error."""
    count = 400_000
    z = jax.random.normal(KEY, (count, 4, 1))
    y = invert(TarFlow(CONDITIONAL), variables, z, jnp.ones(count, jnp.int32))
    kept = float((np.abs(y) < 1).all(axis=(1, 2)).mean())
    return kept, math.sqrt(kept * (1 - kept) / count)


@pytest.mark.slow
def test_importance_weights_sum_to_the_mass_within_the_range_of_the_levels(log_weights, inside):
    check_importance_weights(log_weights, inside)


def test_the_bound_is_below_every_probability_and_sums_to_at_most_one(log_weights):
    check_bound(log_weights)


def test_the_likelihood_is_the_log_weight_and_the_loss_its_negative_mean_in_bits(variables):
    noise_key, _, _ = jax.random.split(KEY, 3)
    loss, aux = jax.jit(lambda key: MODEL.loss(variables, BATCH, key, 0, train=False))(KEY)
    bound = jax.jit(MODEL.log_likelihood)(variables, BATCH, noise_key)
    np.testing.assert_allclose(loss, -bound.mean() / (4 * math.log(2)), rtol=1e-5)
    assert MODEL.bound == "lower" and aux.weight == 81


def test_images_have_the_frequencies_of_their_probabilities(variables, log_weights):
    """But for those at the edges, which take in what falls outside the range: the middle one alone is none of them."""
    count = 50_000
    label = {"label": jnp.ones(count, jnp.int32)}
    samples = np.asarray(jax.jit(lambda key: MODEL.sample(variables, key, label, num=count))(KEY))
    assert samples.dtype == np.uint8 and samples.shape == (count, 2, 2, 1)
    weights = np.exp(log_weights[:, (IMAGES == 1).all(axis=(1, 2, 3))])
    observed = (samples == 1).all(axis=(1, 2, 3)).mean()
    error = math.sqrt(observed / count + weights.var() / DRAWS)
    assert observed > 0.005
    assert abs(observed - weights.mean()) < 4 * error


def test_at_temperature_zero_each_class_has_one_image():
    config = replace(SMALL, classes=2, levels=256)
    variables = random_variables(TarFlow(config), jnp.zeros((2, 4, 1)), jnp.zeros(2, jnp.int32))
    model = tarflow.build(config)
    draw = jax.jit(lambda key: model.sample(variables, key, {}, num=64, temperature=0.0))
    assert len(np.unique(draw(KEY), axis=0)) == 2


def test_places_and_labels_start_with_the_deviation_of_a_hundredth():
    config = replace(WIDE, image_size=32, classes=100, transformer=replace(TRANSFORMER, depth=1))
    x, label = jnp.zeros((1, 256, 4)), jnp.zeros(1, jnp.int32)
    params = jax.jit(lambda key: {n: Block(config).init(key, x, label)["params"][n] for n in ("position", "label")})(
        KEY
    )
    for table in params.values():
        np.testing.assert_allclose(table.std(), 0.01, rtol=0.1)


def test_each_block_drops_out_by_itself():
    """Of two equal blocks that shift patches of 0 from the ends in turn: dropped alike, both ends would be alike."""
    config = replace(SMALL, patch_size=1, transformer=replace(TRANSFORMER, depth=1, dropout=0.5))
    module, x = TarFlow(config), jnp.zeros((1, 4, 1))
    params = random_params(jax.eval_shape(module.init, KEY, x)["params"])

    def equal_shifts(path: str, leaf: np.ndarray) -> np.ndarray:
        if re.search("embed|position", path):
            return np.zeros_like(leaf)
        shift = np.array([1, 0]) if "affine" in path else 1  # and no scale
        return np.repeat(leaf[:1] * np.float32(shift), 2, axis=0)

    params = map_with_path(equal_shifts, params)
    apply = jax.jit(lambda key: module.apply({"params": params}, x, train=True, rngs={"dropout": key})[0])
    z = apply(KEY)
    still = jax.jit(lambda: module.apply({"params": params}, x)[0])()
    np.testing.assert_allclose(still, still[:, ::-1], atol=1e-5)
    assert np.abs(z - z[:, ::-1]).max() > 1e-2


def test_dropout_is_for_training_alone():
    batch = {"image": IMAGES}
    plain = tarflow.build(SMALL)
    dropping = tarflow.build(replace(SMALL, transformer=replace(SMALL.transformer, dropout=0.5)))
    variables = random_variables(TarFlow(SMALL), jnp.zeros((1, 4, 1)))
    loss = jax.jit(lambda train: dropping.loss(variables, batch, KEY, 0, train=train)[0], static_argnums=0)
    expected = jax.jit(lambda: plain.loss(variables, batch, KEY, 0, train=True)[0])()
    np.testing.assert_allclose(loss(False), expected, rtol=1e-6)
    assert abs(loss(True) - expected) > 0.001


NOISY = replace(SMALL, levels=256, blocks=1, noise=0.5)


def gaussian(mean: float, deviation: float) -> Any:
    """Variables whose density is that Gaussian in every dimension."""
    variables = jax.jit(TarFlow(NOISY).init)(KEY, jnp.zeros((1, 4, 1)))
    bias = jnp.array([[mean, math.log(deviation)]])
    return map_with_path(lambda path, leaf: bias if path.endswith("affine/bias") else leaf, variables)


def test_gaussian_noise_leaves_no_likelihood_and_a_loss_on_noisy_images():
    model = tarflow.build(NOISY)
    assert model.log_likelihood is None and model.log_weight is None and model.bound is None
    count, level = 20_000, 191.25  # on [-1, 1], the mean of these images is 1/2
    image = jnp.tile(jnp.array([191, 191, 191, 192], jnp.uint8).reshape(1, 2, 2, 1), (count, 1, 1, 1))
    loss, _ = jax.jit(lambda key: model.loss(gaussian(0.5, 0.5), {"image": image}, key, 0, train=True))(KEY)
    assert level * 2 / 255 - 1 == 0.5
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 0.5**2)
    # The square of a normal variable has the deviation sqrt(2).
    assert abs(loss - entropy) < 4 * 0.5 * math.sqrt(2) / math.log(2) / math.sqrt(4 * count)


def test_noisy_samples_move_to_the_mean_of_the_images_given_them():
    """A Gaussian of variance 1/2 with the noise's 1/4 is one of 1/4 without; half of the way to the mean is left."""
    model, count = tarflow.build(NOISY), 10_000
    variables = gaussian(0.2, math.sqrt(0.5))
    samples = jax.jit(lambda key: model.sample(variables, key, {}, num=count, temperature=0.5))(KEY)
    x = np.asarray(samples) * (2 / 255) - 1
    deviation = 0.5 * math.sqrt(0.5) / 2
    np.testing.assert_allclose(x.mean(), 0.2, atol=4 * deviation / math.sqrt(4 * count))
    np.testing.assert_allclose(x.std(), deviation, rtol=4 / math.sqrt(8 * count))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "an image of 2 pixels a side cannot be cut into patches of 3"),
        ({"blocks": 0}, "blocks is 0: it must be at least 1"),
        ({"classes": 0}, "classes is 0: it must be at least 1, or None"),
        ({"noise": 0.0}, "noise is 0.0: it must be above 0, or None for uniform dequantisation"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)
