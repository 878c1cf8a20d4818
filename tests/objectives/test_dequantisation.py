"""Dequantisation: the constants of both scales, and noise that stays within its level."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.objectives.dequantisation import (
    from_logit,
    from_symmetric,
    squash,
    standard_normal_log_density,
    to_logit,
    to_symmetric,
)
from vlm_jax.objectives.likelihood import nats_to_bits_per_dim

KEY = jax.random.key(0)
IMAGE = jax.random.randint(KEY, (4, 4, 4, 3), 0, 256)
NOISE = jax.random.uniform(jax.random.key(1), IMAGE.shape)
SCALES = {
    "symmetric": (to_symmetric, from_symmetric),
    "logit": (partial(to_logit, margin=0.05), partial(from_logit, margin=0.05)),
}


def test_the_symmetric_scale_of_256_levels_adds_seven_bits():
    """math: with y = 2 (x + u) / 256 - 1 add log2 128; a uniform density on [-1, 1] then has 8 bits."""
    y, log_det = to_symmetric(IMAGE, NOISE, 256)
    np.testing.assert_allclose(nats_to_bits_per_dim(log_det, (4, 4, 3)), 7, rtol=1e-6)
    assert y.min() >= -1 and y.max() < 1
    uniform = log_det - 48 * math.log(2)
    np.testing.assert_allclose(nats_to_bits_per_dim(uniform, (4, 4, 3)), 8, rtol=1e-6)


def test_the_logit_scale_gives_a_logistic_density_the_bits_of_a_uniform_one():
    """A logistic density is that of the logit of a uniform variable on (0, 1), of which the margins hold a tenth."""
    y, log_det = to_logit(IMAGE, NOISE, 256, 0.05)
    logistic = jnp.sum(jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y), axis=(1, 2, 3))
    np.testing.assert_allclose(nats_to_bits_per_dim(logistic + log_det, (4, 4, 3)), 8 - math.log2(0.9), rtol=1e-5)


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_has_its_jacobian_and_every_point_of_a_bin_its_level(name: str):
    to, back = SCALES[name]
    image, noise = IMAGE[:1, :2, :2], NOISE[:1, :2, :2]
    _, log_det = to(image, noise, 256)
    jacobian = jax.jacfwd(lambda noise: to(image, noise, 256)[0].ravel())(noise).reshape(12, 12)
    np.testing.assert_allclose(log_det[0], np.linalg.slogdet(np.float64(jacobian))[1], rtol=1e-5)
    levels = jnp.arange(256).reshape(1, 16, 16, 1)
    for u in (1e-3, 0.5, 0.999):
        y, _ = to(levels, jnp.full(levels.shape, u), 256)
        np.testing.assert_array_equal(back(y, 256), levels)
    outside = jnp.full((1, 2, 2, 1), 50.0)
    assert back(outside, 256).max() == 255 and back(-outside, 256).min() == 0
    assert back(outside, 256).dtype == jnp.uint8


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda v: squash(v)[1], lambda v: np.sum(np.log(1 / (2 + np.exp(v) + np.exp(-v))), axis=(1, 2))),
        (standard_normal_log_density, lambda v: np.sum(-(v**2) / 2 - np.log(2 * np.pi) / 2, axis=(1, 2))),
    ],
    ids=["squash", "normal"],
)
def test_densities_against_their_formulas(function: Callable[[Any], Any], expected: Callable[[Any], Any]):
    v = np.random.default_rng(0).normal(size=(3, 2, 2))
    np.testing.assert_allclose(function(jnp.asarray(v, jnp.float32)), expected(v), rtol=1e-5)
