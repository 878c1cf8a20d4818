"""The autoencoder with a map of latents: on 2x2 images of 3 levels its bound is one, and its latents are standard."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densities import IMAGES, check_bound, check_copies, check_importance_weights
from optimized import mapped
from reference import random_params
from vlm_jax.errors import UserError
from vlm_jax.models import autoencoder
from vlm_jax.models.autoencoder import Autoencoder, Bound, Config
from vlm_jax.nn.adversary import Adversarial
from vlm_jax.nn.autoencoder import Decoder, Encoder, Pyramid
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTower, VisionTransformer
from vlm_jax.trees import count_parameters, leaves_by_path

CONFIG = Config(
    image_size=2, channels=1, levels=3, network=Pyramid(widths=(4, 4), blocks=1, attention=(2,), groups=2), latent=2
)
MODEL = autoencoder.build(CONFIG)
MODULE: Any = Autoencoder(CONFIG)
BATCH = {"image": IMAGES}
DRAWS = 8192
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def variables() -> Any:
    """Random parameters; posteriors are kept wide, for importance weights of narrow ones have too large a variance."""
    values = random_params(jax.eval_shape(MODEL.init, KEY, BATCH), 0.5)
    posterior = values["params"]["posterior"]
    posterior["kernel"] *= 0.3
    posterior["bias"] = np.float32([0.2, -0.1, -0.3, -0.2])
    values["moments"] = {"mean": np.float32([0.3, -0.2]), "square": np.float32([0.9, 2.0])}
    return jax.tree.map(jnp.asarray, values)


@pytest.fixture(scope="module")
def log_weights(variables: Any) -> np.ndarray:
    """[draws, images], nats"""
    keys = jax.random.split(KEY, DRAWS)
    return mapped(lambda key: MODEL.log_weight(variables, BATCH, key), keys, batch_size=64)


def test_importance_weights_sum_to_one(log_weights: np.ndarray):
    check_importance_weights(log_weights, (1.0, 0.0))


def test_the_bound_is_below_every_probability_and_sums_to_at_most_one(log_weights: np.ndarray):
    check_bound(log_weights)


@pytest.mark.slow
def test_the_divergence_in_closed_form_is_the_mean_of_the_one_by_draws(variables: Any, log_weights: np.ndarray):
    keys = jax.random.split(KEY, DRAWS)
    bounds = mapped(lambda key: MODEL.log_likelihood(variables, BATCH, key), keys, batch_size=64)
    together = (bounds - log_weights).mean(axis=1)
    assert (bounds - log_weights).std() > 0.1
    assert abs(together.mean()) < 4 * together.std(ddof=1) / math.sqrt(DRAWS)


def test_samples_have_the_probabilities_of_the_importance_weights(variables: Any, log_weights: np.ndarray):
    count = 20_000
    samples = np.asarray(jax.jit(lambda key: MODEL.sample(variables, key, {}, num=count))(KEY))
    observed = np.bincount(samples.reshape(count, 4) @ [27, 9, 3, 1], minlength=81) / count
    weights = np.exp(log_weights)
    error = np.sqrt(weights.mean(axis=0) / count + weights.var(axis=0) / DRAWS)
    assert (np.abs(observed - weights.mean(axis=0)) < 5 * error).all()


def test_the_divergence_has_its_weight_in_training_alone(variables: Any):
    light = autoencoder.build(replace(CONFIG, objective=Bound(kl_weight=0.25)))
    loss = jax.jit(lambda train: light.loss(variables, BATCH, KEY, 0, train=train), static_argnums=0)
    for train, weight in ((True, 0.25), (False, 1.0)):
        value, aux = loss(train)
        rate, distortion = aux.metrics["rate_bits_per_dim"], aux.metrics["distortion_bits_per_dim"]
        np.testing.assert_allclose(value, weight * rate + distortion, rtol=1e-6)
        assert rate > 0 and aux.weight == 81


def test_latents_are_standard_by_the_moments_and_decoding_knows_it(variables: Any):
    """Beside the module's own outputs, of moments that are neither 0 nor 1."""
    mean, log_variance = (np.float64(y) for y in MODULE.apply(variables, IMAGES, method="encode"))
    shift, scale = np.array([0.3, -0.2]), np.sqrt([0.9 - 0.09, 2.0 - 0.04])
    latents = MODEL.encode(variables, IMAGES)
    assert latents.shape == (81, 1, 1, 2)
    np.testing.assert_allclose(latents, (mean - shift) / scale, rtol=1e-4, atol=1e-5)
    draw = jax.jit(jax.vmap(lambda key: MODEL.encode(variables, IMAGES[:1], key)))
    draws = np.float64(draw(jax.random.split(KEY, 400)))
    deviation = np.exp(0.5 * log_variance[0]) / scale
    np.testing.assert_allclose(draws.mean(axis=0)[0], latents[0], atol=float(5 * deviation.max() / 20))
    np.testing.assert_allclose(draws.std(axis=0)[0], deviation, rtol=0.15)
    pixels = np.asarray(MODULE.apply(variables, jnp.float32(mean), method="decode"))
    np.testing.assert_array_equal(MODEL.decode(variables, latents), np.clip(np.round(pixels + 1), 0, 2))


def test_moments_move_towards_those_of_each_training_batch(variables: Any):
    noise_key, _ = jax.random.split(KEY)
    _, aux = jax.jit(lambda: MODEL.loss(variables, BATCH, KEY, 0, train=True))()
    z = np.float64(MODULE.apply(variables, IMAGES, jax.random.normal(noise_key, (81, 1, 1, 2))).latents)
    for name, value in (("mean", z), ("square", z**2)):
        expected = 0.99 * np.asarray(variables["moments"][name]) + 0.01 * value.mean(axis=(0, 1, 2))
        np.testing.assert_allclose(aux.state["moments"][name], expected, rtol=1e-5)
    _, aux = jax.jit(lambda: MODEL.loss(variables, BATCH, KEY, 0, train=False))()
    jax.tree.map(np.testing.assert_array_equal, aux.state["moments"], variables["moments"])


ADVERSARIAL = replace(
    CONFIG,
    image_size=8,
    channels=3,
    levels=256,
    objective=Adversarial(
        widths=(4, 8),
        groups=2,
        start=10,
        lecam=0.1,
        judge=VisionTransformer(
            image_size=8,
            patch_size=4,
            features=1,
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.3, 0.4),
            transformer=Transformer(width=8, depth=2, heads=2, mlp=8, scan=False),
        ),
    ),
)


@pytest.fixture(scope="module")
def judged() -> tuple[Any, Any, Any]:
    """A model whose copies are looked at, its variables, and a batch."""
    model = autoencoder.build(ADVERSARIAL)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)}
    variables = jax.jit(model.init)(KEY, batch)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), variables["params"])
    return model, {**variables, "params": params}, batch


@pytest.mark.slow
def test_a_critic_enters_at_its_step_and_learns_before(judged: Any):
    model, variables, batch = judged
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params: Any, step: Any) -> Any:
        return model.loss({**rest, "params": params}, batch, KEY, step, train=True)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, before), early = gradient(variables["params"], 9)
    (_, after), late = gradient(variables["params"], 10)
    assert before.metrics["critic_weight"] == 0 < after.metrics["critic_weight"]
    early, late = leaves_by_path(early), leaves_by_path(late)
    for path, value in early.items():
        if path.startswith("objective/critic"):
            np.testing.assert_allclose(value, late[path], rtol=1e-4, atol=1e-6, err_msg=path)
            assert np.abs(value).max() > 0
        elif path.startswith("objective/judge"):
            assert not np.abs(late[path]).any()
        elif path.startswith("decoder/") and path.endswith("kernel"):
            assert np.abs(value - late[path]).max() > 0, path
    assert jax.tree.structure(after.state) == jax.tree.structure(rest)
    assert after.state["said"]["objective"]["real"] != 0
    assert before.weight is None


def test_held_out_images_cost_their_error_and_their_rate(judged: Any):
    """Beside the judge's own features, as its family computes them of integers."""
    model, variables, batch = judged
    value, aux = jax.jit(lambda: model.loss(variables, batch, KEY, 10, train=False))()
    noise_key, _ = jax.random.split(KEY)
    module: Any = Autoencoder(ADVERSARIAL)
    mean, log_variance = module.apply(variables, batch["image"], method="encode")
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(noise_key, mean.shape)
    copy = np.asarray(module.apply(variables, z, method="decode"))
    x = batch["image"] / 127.5 - 1
    tower, judge = ADVERSARIAL.objective.judge, variables["params"]["objective"]["judge"]

    def seen(image: np.ndarray) -> np.ndarray:
        pixels = (np.float32((image + 1) / 2) - np.float32(tower.mean)) / np.float32(tower.std)
        features = np.float64(VisionTower(tower).apply({"params": judge}, pixels, pooled=False))
        return features / np.linalg.norm(features, axis=-1, keepdims=True)

    distance = np.square(seen(x) - seen(copy)).sum(axis=-1).mean()
    kl = 0.5 * (np.square(mean) + np.exp(log_variance) - 1 - log_variance).sum(axis=(1, 2, 3)).mean() / 192
    np.testing.assert_allclose(aux.metrics["rate"], kl, rtol=1e-5)
    np.testing.assert_allclose(value, np.abs(x - copy).mean() + distance + 1e-6 * kl, rtol=1e-4)
    assert aux.weight == 4 and model.log_likelihood is None and model.sample is None


@pytest.mark.slow
def test_reconstructions_become_their_originals():
    check_copies(MODEL)


def test_the_networks_are_those_of_stable_diffusion():
    """83,653,863 parameters of the release, and three scales of pixels."""
    model = autoencoder.build(autoencoder.SD_VAE)
    batch = {"image": jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.uint8)}
    params = jax.eval_shape(model.init, KEY, batch)["params"]
    assert count_parameters(params) == 83_653_863 + 3
    assert model.latents.shape == (32, 32, 4)


def test_attention_is_where_the_settings_say_and_in_the_middle():
    network = Pyramid(widths=(4, 4, 4), blocks=2, attention=(4,), groups=2)
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    encoder = jax.eval_shape(Encoder(network, 4).init, KEY, x)["params"]
    decoder = jax.eval_shape(Decoder(network, 3).init, KEY, jax.ShapeDtypeStruct((1, 2, 2, 4), jnp.float32))["params"]
    for params, blocks in ((encoder, 2), (decoder, 3)):
        attentive = {f"{level}/{name}" for level in params for name in params[level] if name.startswith("attention")}
        assert attentive == {"middle/attention_0", *(f"level_1/attention_{i}" for i in range(blocks))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"judge": None, "widths": (4, 8, 8)},
            r"a critic of widths \[4, 8, 8\] sees no whole patch: choose fewer widths",
        ),
        (
            {"judge": "small"},
            "the judge looks at images of 4 pixels a side and the copies have 8: choose another judge",
        ),
    ],
)
def test_onlookers_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    if changes["judge"] is not None:
        changes = {"judge": replace(ADVERSARIAL.objective.judge, image_size=4)}
    with pytest.raises(UserError, match=message):
        replace(ADVERSARIAL, objective=replace(ADVERSARIAL.objective, **changes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (6,), "groups": 4}, r"multiples of its groups \(4\), not \[6\]"),
        ({"widths": (4, 4, 4), "groups": 4}, "an image of 2 pixels a side cannot be halved for each width"),
    ],
)
def test_networks_that_do_not_fit_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, network=Pyramid(**fields))
