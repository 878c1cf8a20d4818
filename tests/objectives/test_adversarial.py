"""The adversarial loss: each part by hand, each gradient for whom it is, and the weight that balances them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.objectives.adversarial import (
    Onlookers,
    Weights,
    adversarial_loss,
    balance,
    error_of_copies,
    hinge,
    lecam,
)

RANDOM = np.random.default_rng(0)
X = RANDOM.uniform(-1, 1, (3, 4, 4, 2)).astype(np.float32)
HIDDEN = RANDOM.normal(size=(3, 4, 4, 5)).astype(np.float32)
KERNEL = RANDOM.normal(scale=0.3, size=(1, 1, 5, 2)).astype(np.float32)
CRITIC = RANDOM.normal(size=2).astype(np.float32)
AVERAGES = {"real": jnp.float32(0.4), "fake": jnp.float32(-0.7)}
WEIGHTS = Weights(judged=0.5, adversarial=0.8, lecam=0.1, scale=32.0)


def distance(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x - y), axis=(1, 2, 3))


def paint_of(hidden: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda kernel: jnp.einsum("bhwd,dc->bhwc", hidden, kernel[0, 0])


def onlookers(critic: Any) -> Onlookers:
    def says(critic: Any) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jnp.tanh(x) @ critic

    return Onlookers(distance, says(critic), says(jax.lax.stop_gradient(critic)))


def loss(hidden: Any, kernel: Any, critic: Any, weights: Weights = WEIGHTS) -> Any:
    return adversarial_loss(jnp.asarray(X), paint_of(hidden), kernel, onlookers(critic), AVERAGES, weights)


def test_a_critic_that_is_sure_enough_learns_nothing_more():
    real, fake = jnp.array([1.0, 2.0, 0.5]), jnp.array([-1.0, -0.2, -3.0])
    np.testing.assert_allclose(hinge(real, fake), 0.5 * (0.5 / 3 + 0.8 / 3))
    assert hinge(real + 1, fake - 1) == 0


def test_what_is_said_of_images_stays_near_what_was_said_of_copies():
    real, fake = jnp.array([1.0, 2.0]), jnp.array([0.0, -1.0])
    found = lecam(real, fake, jnp.float32(0.5), jnp.float32(-0.5))
    np.testing.assert_allclose(found, (1.5**2 + 2.5**2) / 2 + (0.5**2 + 1.5**2) / 2)


def test_the_weight_makes_gradients_equally_long_within_a_bound():
    one, other = jnp.full((2, 2), 3.0), jnp.full((2, 2), 0.5)
    np.testing.assert_allclose(balance(one, other), 6 / (1 + 1e-4), rtol=1e-6)
    assert balance(one, jnp.zeros((2, 2))) == 1e4
    assert jax.grad(lambda g: balance(g, other))(one).max() == 0


def test_the_loss_is_the_sum_of_its_parts():
    """In NumPy, with the gradients for the last layer by hand."""
    value, metrics, after = loss(HIDDEN, KERNEL, CRITIC)
    hidden, kernel, x = (np.float64(each) for each in (HIDDEN, KERNEL[0, 0], X))
    copy = hidden @ kernel
    error = np.abs(x - copy).mean() + 0.5 * np.square(x - copy).mean()
    for_error = (np.sign(copy - x) + 0.5 * 2 * (copy - x)) / x.size * 32
    for_critic = -(1 - np.tanh(copy) ** 2) * CRITIC / (3 * 4 * 4)
    lengths = [np.linalg.norm(np.einsum("bhwd,bhwc->dc", hidden, each)) for each in (for_error, for_critic)]
    weight = 0.8 * lengths[0] / (lengths[1] + 1e-4)
    real, fake = np.tanh(x) @ CRITIC, np.tanh(copy) @ CRITIC
    critic = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    critic += 0.1 * (np.square(real + 0.7).mean() + np.square(fake - 0.4).mean())
    np.testing.assert_allclose(metrics["critic_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["critic_loss"], critic, rtol=1e-5)
    np.testing.assert_allclose(value, error - weight * fake.mean() / 32 + critic, rtol=1e-5)
    for name, said in (("real", real), ("fake", fake)):
        np.testing.assert_allclose(after[name], 0.99 * AVERAGES[name] + 0.01 * said.mean(), rtol=1e-5)


def test_what_the_critic_learns_has_no_gradient_for_the_painter_and_the_other_way_round():
    def gradient(weights: Weights) -> Any:
        return jax.grad(lambda *args: loss(*args, weights)[0], argnums=(0, 1, 2))(HIDDEN, KERNEL, CRITIC)

    *painter, critic = gradient(WEIGHTS)
    *alone, same = gradient(WEIGHTS._replace(adversarial=0.0))
    np.testing.assert_allclose(critic, same, rtol=1e-5)  # what the painter learns of it is not the critic's
    for hidden, kernel in (painter, alone):
        assert np.abs(hidden).max() > 0 and np.abs(kernel).max() > 0

    def error(hidden: Any, kernel: Any) -> Any:
        return error_of_copies(jnp.asarray(X), paint_of(hidden)(kernel), distance, 0.5)

    expected = jax.grad(error, argnums=(0, 1))(HIDDEN, KERNEL)
    for found, due in zip(alone, expected, strict=True):
        np.testing.assert_allclose(found, due, rtol=1e-4, atol=1e-7)
    assert np.abs(painter[1] - alone[1]).max() > 1e-4


@pytest.mark.parametrize("scale", [1.0, 32.0])
def test_at_the_last_layer_both_gradients_are_equally_long(scale: float):
    weights = WEIGHTS._replace(adversarial=1.0, scale=scale)
    whole = jax.grad(lambda kernel: loss(HIDDEN, kernel, CRITIC, weights)[0])(KERNEL)
    error = jax.grad(lambda kernel: loss(HIDDEN, kernel, CRITIC, weights._replace(adversarial=0.0))[0])(KERNEL)
    np.testing.assert_allclose(np.linalg.norm(whole - error), np.linalg.norm(error), rtol=5e-3)
