"""Bits a dimension: of colour images, and of noise that every batch draws for itself."""

import math

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.contract import Input, Model
from vlm_jax.evals import Subject, likelihood
from vlm_jax.objectives.likelihood import subpixels

IMAGES, BATCHES = 2000, 8


def subject(log_likelihood: object) -> Subject:
    """Of 16,000 RGB images of 2x2 pixels, in batches that are all the same."""
    model = Model(
        inputs={"image": Input((2, 2, 3), "uint8", 256)},
        init=lambda *_: {},
        loss=lambda *_, **__: None,
        rules=(),
        log_likelihood=log_likelihood,
        count=subpixels,
        log_weight=log_likelihood,
        bound="lower",
    )
    batch = {"image": jnp.zeros((IMAGES, 2, 2, 3), jnp.uint8)}
    return Subject(
        model=model,
        variables={},
        batches=lambda: iter([(batch, IMAGES)] * BATCHES),
        examples=IMAGES * BATCHES,
    )


@pytest.mark.parametrize("run", [likelihood.run, likelihood.run_importance_weighted])
def test_a_uniform_model_of_colour_images_has_the_bits_of_its_levels(run: object):
    uniform = subject(lambda variables, batch, key: jnp.full(len(batch["image"]), -12 * math.log(256)))
    metrics = run(uniform)
    assert metrics["bits_per_dim"] == pytest.approx(8, rel=1e-6)
    assert metrics["bits_per_dim_standard_error"] == pytest.approx(0, abs=1e-5)


def test_equal_batches_draw_apart():
    """One draw a batch, the same for all of its images: the mean of eight has an eighth of the variance."""

    def draw(variables: object, batch: dict, key: jax.Array) -> jax.Array:
        return jnp.full(len(batch["image"]), jax.random.normal(key))

    nats = likelihood.draws(subject(draw), draw, 1).nats.reshape(BATCHES, IMAGES)
    assert (nats == nats[:, :1]).all()
    assert len({float(value) for value in nats[:, 0]}) == BATCHES


def test_each_draw_of_an_image_is_another():
    def draw(variables: object, batch: dict, key: jax.Array) -> jax.Array:
        return jnp.full(len(batch["image"]), jax.random.normal(key))

    assert len({float(value) for value in likelihood.draws(subject(draw), draw, 5).nats[:, 0]}) == 5
