"""Patches and the image tower: the cut is exact, the embedding is a convolution, and order counts by position alone."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from vlm_jax.errors import UserError
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTower, VisionTransformer, normalised, patchify, unpatchify

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.normal(size=(2, 8, 8, 3)).astype(np.float32)
CLASS = VisionTransformer(
    image_size=8, patch_size=4, pre_norm=True, transformer=Transformer(width=8, depth=1, heads=2, mlp=16, scan=False)
)
TOWERS = {"class": CLASS, "attention": replace(CLASS, pool="attention", pre_norm=False, patch_bias=False)}


def random_params(config: VisionTransformer) -> Any:
    shapes = jax.eval_shape(VisionTower(config).init, jax.random.key(0), IMAGE)["params"]
    return jax.tree.map(lambda leaf: RANDOM.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_patches_are_in_raster_order_and_come_back(size: int):
    patches, side = patchify(IMAGE, size), 8 // size
    for row in range(side):
        for column in range(side):
            patch = IMAGE[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            np.testing.assert_array_equal(patches[:, row * side + column], patch.reshape(2, -1))
    np.testing.assert_array_equal(unpatchify(patches, size, 3), IMAGE)


def test_a_linear_map_of_patches_is_a_strided_convolution():
    """Its kernel, reshaped, is the one that published checkpoints hold."""
    kernel = RANDOM.normal(size=(4 * 4 * 3, 5)).astype(np.float32)
    convolved = jax.lax.conv_general_dilated(
        IMAGE, kernel.reshape(4, 4, 3, 5), (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(patchify(IMAGE, 4) @ kernel, convolved.reshape(2, 4, 5), atol=1e-5)


@pytest.mark.parametrize("pool", TOWERS)
def test_only_the_position_embedding_tells_patches_apart(pool: str):
    config = TOWERS[pool]
    assert config.pool == pool
    params = random_params(config)
    apply = jax.jit(lambda params, image: VisionTower(config).apply({"params": params}, image))
    shuffled = unpatchify(patchify(IMAGE, 4)[:, np.array([2, 0, 3, 1])], 4, 3)
    assert apply(params, IMAGE).shape == (2, 8)
    assert np.abs(apply(params, shuffled) - apply(params, IMAGE)).max() > 0.01
    blind = {**params, "position": np.zeros_like(params["position"])}
    np.testing.assert_allclose(apply(blind, shuffled), apply(blind, IMAGE), atol=1e-5)


@pytest.mark.parametrize("pool", TOWERS)
def test_a_tower_has_the_parameters_that_its_config_names(pool: str):
    config = TOWERS[pool]
    names = set(jax.eval_shape(VisionTower(config).init, jax.random.key(0), IMAGE)["params"])
    expected = {"patch", "position", "transformer"}
    assert names == expected | ({"class_token", "pre_norm"} if pool == "class" else {"pool"})


def test_the_patch_bias_is_optional():
    for name, config in TOWERS.items():
        params = jax.eval_shape(VisionTower(config).init, jax.random.key(0), IMAGE)["params"]
        assert ("bias" in params["patch"]) == config.patch_bias == (name == "class")


@pytest.mark.parametrize("pool", TOWERS)
def test_bfloat16_computes_every_product_in_bfloat16(pool: str):
    """A parameter in float32 that is added to the activations would promote all that follows."""
    config = replace(TOWERS[pool], transformer=replace(CLASS.transformer, dtype="bfloat16"))
    module = VisionTower(config)
    variables = jax.eval_shape(module.init, jax.random.key(0), IMAGE)
    lines = str(jax.make_jaxpr(module.apply)(variables, IMAGE)).split("dot_general")
    products = [line.rpartition(":")[2].partition("[")[0] for line in lines[:-1]]
    attentions = 1 if pool == "class" else 2
    assert sorted(products) == ["bf16"] * (len(products) - attentions) + ["f32"] * attentions
    assert jax.eval_shape(module.apply, variables, IMAGE).dtype == jnp.bfloat16


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_normalised_by_each_channel_s_mean_and_deviation(channels: int):
    mean, std = (0.48145466, 0.4578275, 0.40821073)[:channels], (0.26862954, 0.26130258, 0.27577711)[:channels]
    image = RANDOM.integers(0, 256, (2, 8, 8, channels)).astype(np.uint8)
    plain = replace(CLASS, channels=channels)
    np.testing.assert_allclose(normalised(image, plain), image / 127.5 - 1, atol=1e-6)
    expected = (image / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalised(image, replace(plain, mean=mean, std=std)), expected, atol=1e-6)


def test_a_mean_of_all_channels_is_that_of_each():
    """So that a tower whose numbers are written either way is one tower, in colour and in grey."""
    assert replace(CLASS, mean=(0.5, 0.5, 0.5)) == CLASS
    assert replace(CLASS, channels=1).mean == CLASS.mean


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5, 0.4)}, r"mean is \[0\.5, 0\.4\] and images have 3 channels: give one number, or one of each"),
        ({"mean": ()}, r"mean is \[\] and images have 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, r"std is \[0\.5, 0\.0, 0\.5\], by which pixels are divided: each must be above 0"),
    ],
)
def test_means_and_deviations_that_no_image_can_have_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(CLASS, **changes)


@pytest.mark.parametrize("size", [0, 3])
def test_patches_that_do_not_tile_the_image_are_refused(size: int):
    message = f"an image of 8 pixels a side cannot be cut into patches of {size}: choose a patch_size"
    with pytest.raises(UserError, match=message):
        replace(CLASS, patch_size=size)


@pytest.mark.parametrize("pool", TOWERS)
def test_a_tower_is_that_of_the_formula(pool: str):
    """With a class token or SigLIP's attention pooling, two heads, and an epsilon as large as the variances."""
    settings = replace(CLASS.transformer, norm_eps=0.3, activation="gelu")
    config = replace(TOWERS[pool], transformer=settings)
    params = random_params(config)
    x = reference.dense(params["patch"], patchify(IMAGE, 4))
    if pool == "class":
        x = np.concatenate([np.broadcast_to(params["class_token"], (2, 1, 8)), x], axis=1)
    x = x + params["position"]
    if pool == "class":
        x = reference.layer_norm(params["pre_norm"], x, 0.3)
    x = reference.transformer(params["transformer"], x, settings)
    expected = x[:, 0] if pool == "class" else reference.attention_pool(params["pool"], x, settings)
    y = jax.jit(VisionTower(config).apply)({"params": params}, IMAGE)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", TOWERS)
def test_positions_and_the_class_token_start_with_the_length_of_one(pool: str):
    """In expectation: each of the width's values has the variance 1 / width."""
    config = replace(TOWERS[pool], image_size=64, transformer=replace(CLASS.transformer, width=64, mlp=8))
    image = np.zeros((1, 64, 64, 3), np.float32)
    params = jax.jit(VisionTower(config).init)(jax.random.key(0), image)["params"]
    for name in ("position", "class_token") if pool == "class" else ("position",):
        length = np.square(params[name]).sum(axis=-1)
        np.testing.assert_allclose(length.mean(), 1, atol=5 * np.sqrt(2 / 64 / length.size))
