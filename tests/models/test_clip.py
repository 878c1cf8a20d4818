"""CLIP and SigLIP: where the temperature starts and stops, what a text is read at, and unit vectors."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import dense, layer_norm, transformer
from vlm_jax.errors import UserError
from vlm_jax.models import clip
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import AttentionPool, VisionTower, VisionTransformer, patchify
from vlm_jax.objectives.contrastive import info_nce, sigmoid
from vlm_jax.trees import unstack

BATCH, CONTEXT, EOS, VOCAB = 4, 6, 2, 11
TRANSFORMER = Transformer(width=8, depth=1, heads=2, mlp=16, scan=False)
CLIP = clip.Config(
    image=VisionTransformer(image_size=4, patch_size=2, pre_norm=True, patch_bias=False, transformer=TRANSFORMER),
    text=clip.TextTransformer(vocab_size=VOCAB, context_length=CONTEXT, eos_id=EOS, transformer=TRANSFORMER),
    embedding=12,
)
SIGLIP = clip.Config(
    objective="sigmoid",
    image=replace(CLIP.image, pool="attention", pre_norm=False, patch_bias=True),
    text=replace(CLIP.text, pool="last"),
    embedding=8,
    projection=False,
)
CONFIGS = {"clip": CLIP, "siglip": SIGLIP}
KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (BATCH, 4, 4, 3)).astype(np.uint8)
TOKENS = np.array([[5, 4, 3, 7, EOS, 0], [3, EOS, 0, 0, 0, 0], [EOS, 4, EOS, 9, 0, 0], [9, 8, 7, 6, 5, EOS]], np.int32)
BATCH_OF_PAIRS = {"image": IMAGE, "tokens": TOKENS}


def random_variables(config: clip.Config) -> Any:
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(clip.build(config).init, KEY, BATCH_OF_PAIRS)
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.5 * random.normal(size=leaf.shape), jnp.float32), shapes)
    variables["params"]["log_scale"] = jnp.log(3.0)
    return variables


embed_image = jax.jit(lambda name, variables: clip.build(CONFIGS[name]).embed_image(variables, IMAGE), static_argnums=0)
embed_text = jax.jit(
    lambda name, variables, tokens: clip.build(CONFIGS[name]).embed_text(variables, tokens), static_argnums=0
)
loss_of = jax.jit(
    lambda name, variables: clip.build(CONFIGS[name]).loss(variables, BATCH_OF_PAIRS, KEY, 0, train=True),
    static_argnums=0,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_are_unit_vectors_in_float32(name: str):
    config = CONFIGS[name]
    variables = random_variables(config)
    for embedding in (embed_image(name, variables), embed_text(name, variables, TOKENS)):
        assert embedding.shape == (BATCH, config.embedding) and embedding.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)
        assert np.ptp(embedding, axis=0).min() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_of_bfloat16_towers_are_float32(name: str):
    config, rounded = CONFIGS[name], replace(TRANSFORMER, dtype="bfloat16")
    config = replace(
        config, image=replace(config.image, transformer=rounded), text=replace(config.text, transformer=rounded)
    )
    model, variables = clip.build(config), random_variables(config)
    assert jax.eval_shape(model.embed_image, variables, IMAGE).dtype == jnp.float32
    assert jax.eval_shape(model.embed_text, variables, TOKENS).dtype == jnp.float32


def test_a_vector_of_zeros_has_a_finite_gradient():
    gradient = jax.grad(lambda x: jnp.sum(clip.unit(x)))(jnp.zeros((1, 4)))
    assert jnp.isfinite(gradient).all()


def test_a_short_vector_becomes_one_of_unit_length_too():
    np.testing.assert_allclose(clip.unit(jnp.array([[3e-5, -4e-5]])), [[0.6, -0.8]], rtol=1e-5)


def test_tables_of_texts_start_with_the_published_deviations():
    """Those of OpenAI's release: a fiftieth for tokens, a hundredth for positions."""
    config = replace(CLIP, text=replace(CLIP.text, vocab_size=500, context_length=400))
    batch = {"image": IMAGE[:1], "tokens": np.full((1, 400), EOS, np.int32)}

    def tables(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        text = clip.build(config).init(key, batch)["params"]["text"]
        return text["token"]["embedding"], text["position"]

    token, position = jax.jit(tables)(KEY)
    np.testing.assert_allclose(token.std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(position.std(), 0.01, rtol=0.05)


def test_clip_starts_at_its_published_temperature():
    params = jax.jit(clip.build(CLIP).init)(KEY, BATCH_OF_PAIRS)["params"]
    np.testing.assert_allclose(params["log_scale"], math.log(1 / 0.07), rtol=1e-6)
    assert "logit_bias" not in params


def test_siglip_starts_at_its_published_temperature_and_bias():
    params = jax.jit(clip.build(SIGLIP).init)(KEY, BATCH_OF_PAIRS)["params"]
    np.testing.assert_allclose(params["log_scale"], math.log(10), rtol=1e-6)
    assert params["logit_bias"] == -10
    assert "image_projection" not in params


@pytest.mark.parametrize(
    ("name", "log_scale", "scale"),
    [
        ("clip", math.log(1 / 0.07), 1 / 0.07),
        ("clip", math.log(100), 100),
        ("clip", 5.0, 100),
        ("siglip", 5.0, math.exp(5)),
    ],
)
def test_the_loss_compares_the_embeddings_at_the_effective_scale(name: str, log_scale: float, scale: float):
    """CLIP's is clipped at 100, and SigLIP's is not."""
    variables = random_variables(CONFIGS[name])
    variables["params"]["log_scale"] = jnp.float32(log_scale)
    loss, aux = loss_of(name, variables)
    image, text = embed_image(name, variables), embed_text(name, variables, TOKENS)
    if name == "clip":
        expected, metrics = info_nce(image, text, scale)
    else:
        expected, metrics = sigmoid(image, text, scale, variables["params"]["logit_bias"])
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["scale"], scale, rtol=1e-5)
    assert aux.metrics["accuracy"] == metrics["accuracy"]
    # The loss spans the batch: a mean over parts of it would be another.
    assert aux.weight is None


def test_clip_reads_a_text_at_its_first_end_token():
    """Under a causal mask, so that nothing after it counts, and everything before does."""
    variables = random_variables(CLIP)
    end = np.argmax(TOKENS == EOS, axis=1)
    original = embed_text("clip", variables, TOKENS)
    for position in range(CONTEXT):
        changed = TOKENS.copy()
        changed[:, position] = np.where(end == position, EOS, VOCAB - 1)
        same = (embed_text("clip", variables, changed) == original).all(axis=1)
        np.testing.assert_array_equal(same, end <= position)


def test_siglip_reads_the_whole_text():
    variables = random_variables(SIGLIP)
    original = embed_text("siglip", variables, TOKENS)
    for position in range(CONTEXT):
        changed = TOKENS.copy()
        changed[:, position] = VOCAB - 1
        difference = np.abs(embed_text("siglip", variables, changed) - original).max(axis=1)
        assert (difference > 1e-4).all()


def test_siglip_reads_texts_without_a_causal_mask():
    """Without positions the order of the tokens before the last means nothing, whatever the depth."""
    config = replace(SIGLIP, text=replace(SIGLIP.text, transformer=replace(TRANSFORMER, depth=2)))
    model, variables = clip.build(config), random_variables(config)
    position = variables["params"]["text"]["position"]
    variables["params"]["text"]["position"] = jnp.zeros_like(position)
    encode = jax.jit(model.embed_text)
    shuffled = TOKENS[:, np.array([3, 1, 4, 2, 0, 5])]
    np.testing.assert_allclose(encode(variables, shuffled), encode(variables, TOKENS), atol=1e-5)


def test_pixels_are_normalised_before_the_tower():
    """0 is -1 and 255 is 1, unless the tower says otherwise."""
    variables = random_variables(CLIP)
    params = variables["params"]
    tower = jax.jit(
        lambda x, pooled: VisionTower(CLIP.image).apply({"params": params["image"]}, x, pooled=pooled), static_argnums=1
    )
    x = tower(IMAGE.astype(np.float32) / 255 * 2 - 1, True) @ params["image_projection"]["kernel"]
    expected = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(embed_image("clip", variables), expected, atol=1e-5)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    model = clip.build(replace(CLIP, image=replace(CLIP.image, mean=mean, std=std)))
    x = np.float32((IMAGE / 255 - np.array(mean)) / np.array(std))
    np.testing.assert_allclose(jax.jit(model.image_features)(variables, IMAGE), tower(x, False), atol=1e-4)


def test_a_text_without_end_is_refused_only_where_it_is_read_there():
    assert clip.build(CLIP).inputs["tokens"].contains == EOS
    assert clip.build(SIGLIP).inputs["tokens"].contains is None


@pytest.mark.parametrize("tower", ["image", "text"])
def test_dropout_reaches_each_tower_in_training_alone(tower: str):
    dropping = replace(getattr(CLIP, tower), transformer=replace(TRANSFORMER, dropout=0.5))
    model, variables = clip.build(replace(CLIP, **{tower: dropping})), random_variables(CLIP)
    loss = jax.jit(lambda train: model.loss(variables, BATCH_OF_PAIRS, KEY, 0, train=train)[0], static_argnums=0)
    plain, _ = loss_of("clip", variables)
    np.testing.assert_allclose(loss(False), plain, rtol=1e-5)
    assert abs(loss(True) - plain) > 1e-3


@pytest.mark.parametrize("left_out", [0, 1, 3])
@pytest.mark.parametrize("scan", [True, False])
def test_features_are_those_of_the_layer_that_the_config_names(left_out: int, scan: bool):
    """Beside the stack run by hand: of all its blocks and the final norm, of those before the last, of none."""
    stack = Transformer(width=8, depth=3, heads=2, mlp=16, scan=scan)
    image = replace(CLIP.image, transformer=stack, features=left_out)
    config = replace(CLIP, image=image, text=replace(CLIP.text, transformer=stack, features=left_out))
    model, variables = clip.build(config), random_variables(config)
    batch = {name: np.asarray(values) for name, values in BATCH_OF_PAIRS.items()}

    def run(params: Any, x: np.ndarray, causal: bool) -> np.ndarray:
        layers = unstack(params, "blocks", "block")
        if left_out == 0:
            return transformer(layers, x, stack, causal=causal)
        del layers["final_norm"]
        return transformer(layers, x, replace(stack, depth=3 - left_out), causal=causal)

    params = variables["params"]["image"]
    patches = dense(params["patch"], patchify(np.float64(batch["image"]) * (2 / 255) - 1, image.patch_size))
    first = np.broadcast_to(params["class_token"], (len(patches), 1, 8))
    x = np.concatenate([first, patches], axis=1) + params["position"]
    x = layer_norm(params["pre_norm"], x, stack.norm_eps) if image.pre_norm else x
    features = jax.jit(model.image_features)(variables, batch["image"])
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, run(params["transformer"], x, False)[:, 1:], rtol=1e-3, atol=1e-4)

    params = variables["params"]["text"]
    x = np.float64(params["token"]["embedding"])[batch["tokens"]] + params["position"]
    features, inside = jax.jit(model.text_features)(variables, batch["tokens"])
    np.testing.assert_allclose(features, run(params["transformer"], x, True), rtol=1e-3, atol=1e-4)
    for row, text in zip(inside, batch["tokens"].tolist(), strict=True):
        assert row.sum() == text.index(config.text.eos_id) + 1 and row[: row.sum()].all()


def test_features_before_the_first_block_are_the_last_that_can_be_had():
    with pytest.raises(UserError, match="features is 2 and there are depth=1 blocks to leave out: choose fewer"):
        replace(CLIP.image, transformer=replace(CLIP.image.transformer, depth=1), features=2)


def test_features_change_no_embedding_and_no_parameter():
    """What they are read at is no part of what is trained."""
    config = replace(CLIP, image=replace(CLIP.image, features=1), text=replace(CLIP.text, features=1))
    variables = random_variables(CLIP)
    for name, field in (("embed_image", "image"), ("embed_text", "tokens")):
        expected = getattr(clip.build(CLIP), name)(variables, BATCH_OF_PAIRS[field])
        np.testing.assert_array_equal(getattr(clip.build(config), name)(variables, BATCH_OF_PAIRS[field]), expected)


def test_features_of_an_attention_pooled_tower_are_all_that_its_probe_attends_to():
    model, variables = clip.build(SIGLIP), random_variables(SIGLIP)
    features = model.image_features(variables, BATCH_OF_PAIRS["image"])
    assert features.shape[1] == (SIGLIP.image.image_size // SIGLIP.image.patch_size) ** 2
    pool = AttentionPool(SIGLIP.image.transformer)
    pooled = pool.apply({"params": variables["params"]["image"]["pool"]}, features)
    np.testing.assert_allclose(clip.unit(pooled), model.embed_image(variables, BATCH_OF_PAIRS["image"]), atol=1e-5)
