"""The contrastive losses beside the papers' own definitions, and what their form implies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.objectives.contrastive import info_nce, sigmoid

BATCH = 6
SCALE, BIAS = 14.3, -10.0


def unit_vectors(seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(BATCH, 5))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


IMAGE, TEXT = unit_vectors(0), unit_vectors(1)
LOSSES = {
    "info_nce": jax.jit(lambda image, text, scale=SCALE: info_nce(image, text, scale)),
    "sigmoid": jax.jit(lambda image, text, scale=SCALE: sigmoid(image, text, scale, BIAS)),
}


def test_info_nce_is_the_mean_of_choosing_the_text_and_the_image():
    expected = 0.0
    for i in range(BATCH):
        paired = SCALE * float(IMAGE[i] @ TEXT[i])
        texts = sum(math.exp(SCALE * float(IMAGE[i] @ TEXT[j])) for j in range(BATCH))
        images = sum(math.exp(SCALE * float(IMAGE[j] @ TEXT[i])) for j in range(BATCH))
        expected += (math.log(texts) - paired) / (2 * BATCH) + (math.log(images) - paired) / (2 * BATCH)
    np.testing.assert_allclose(LOSSES["info_nce"](IMAGE, TEXT)[0], expected, rtol=1e-6)


def test_sigmoid_is_the_papers_pseudo_code():
    """2303.15343, algorithm 1."""
    labels = 2 * np.eye(BATCH) - np.ones((BATCH, BATCH))
    logits = IMAGE.astype(np.float64) @ TEXT.T.astype(np.float64) * SCALE + BIAS
    expected = -np.sum(-np.log1p(np.exp(-labels * logits))) / BATCH
    np.testing.assert_allclose(LOSSES["sigmoid"](IMAGE, TEXT)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 100.0])
def test_info_nce_of_aligned_orthogonal_pairs(scale: float):
    eye = np.eye(BATCH, dtype=np.float32)
    loss, metrics = LOSSES["info_nce"](eye, eye, scale)
    np.testing.assert_allclose(loss, math.log1p((BATCH - 1) * math.exp(-scale)), rtol=1e-6, atol=1e-6)
    assert metrics["accuracy"] == 1


def test_info_nce_of_identical_embeddings_is_the_uniform_choice():
    same = np.broadcast_to(IMAGE[0], IMAGE.shape)
    np.testing.assert_allclose(LOSSES["info_nce"](same, same)[0], math.log(BATCH), rtol=1e-6)


def test_sigmoid_of_orthogonal_embeddings_at_its_initial_scale_and_bias():
    """Each paired logit is 10 - 10 = 0 and every other one is -10."""
    eye = np.eye(BATCH, dtype=np.float32)
    loss, metrics = LOSSES["sigmoid"](eye, eye, 10.0)
    np.testing.assert_allclose(loss, math.log(2) + (BATCH - 1) * math.log1p(math.exp(-10)), rtol=1e-6)
    assert metrics["accuracy"] == 1


@pytest.mark.parametrize("name", LOSSES)
def test_swapping_image_and_text_changes_nothing(name: str):
    np.testing.assert_allclose(LOSSES[name](IMAGE, TEXT)[0], LOSSES[name](TEXT, IMAGE)[0], rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_pairs_does_not_matter_and_the_pairing_does(name: str):
    order = np.array([3, 0, 5, 1, 4, 2])
    loss = LOSSES[name]
    np.testing.assert_allclose(loss(IMAGE[order], TEXT[order])[0], loss(IMAGE, TEXT)[0], rtol=1e-6)
    assert abs(loss(IMAGE, TEXT[order])[0] - loss(IMAGE, TEXT)[0]) > 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_accuracy_is_the_share_of_images_whose_nearest_text_is_theirs(name: str):
    eye = np.eye(BATCH, dtype=np.float32)
    _, metrics = LOSSES[name](eye, eye[[0, 1, 3, 2, 4, 5]])
    np.testing.assert_allclose(metrics["accuracy"], 4 / 6, rtol=1e-6)


def test_products_of_bfloat16_embeddings_are_float32():
    image, text = jnp.asarray(IMAGE, jnp.bfloat16), jnp.asarray(TEXT, jnp.bfloat16)
    expected, _ = LOSSES["info_nce"](np.float32(image), np.float32(text))
    np.testing.assert_allclose(LOSSES["info_nce"](image, text)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_there_is_no_branch(name: str):
    """`jnp.diagonal` is one; sharded it may hold an all-gather, and two such branches at once stall CPU devices."""
    gradient = jax.jit(jax.grad(lambda image, text: LOSSES[name](image, text)[0], (0, 1)))
    assert "stablehlo.case" not in gradient.lower(IMAGE, TEXT).as_text()
