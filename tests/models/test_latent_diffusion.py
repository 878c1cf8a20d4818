"""Latent diffusion: a prior of what a first stage makes, exactly as the two are alone."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from compiled import build
from reference import random_params
from smallest import AUTOENCODER, CLIP, CONFIGS, LATENTS, READERS, VAE, VQVAE
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models import diffusion, latent_diffusion, probability_flow
from vlm_jax.sampling.diffusion import Denoised
from vlm_jax.trees import leaves_by_path, part

KEY = jax.random.key(0)
CONFIG = CONFIGS["latent diffusion"]
MODEL, FIRST, PRIOR = build(CONFIG), build(CONFIG.first), build(CONFIG.prior)
BATCH = {
    "image": np.random.default_rng(0).integers(0, 3, (4, 2, 2, 3)).astype(np.uint8),
    "label": np.int32([0, 1, 1, 0]),
}
SHIFT, SCALE = np.float32([0.3, -1.0]), np.float32([2.0, 0.5])


@pytest.fixture(scope="module")
def variables() -> Any:
    """None as initialised; the latents have the moments `SHIFT` and `SCALE`."""
    params = random_params(jax.eval_shape(MODEL.init, KEY, BATCH)["params"], scale=0.3)
    moments = {"mean": SHIFT, "square": SHIFT**2 + SCALE**2}
    return jax.tree.map(jnp.asarray, {"params": params, "moments": {"first": moments}})


def test_the_bound_is_that_of_the_first_stage_with_the_priors_density_in_its_place(variables):
    """log p(x | z) - log q(z | x) + log p(z), of z as the decoder reads them: of the prior's y = (z - b) / a the
    density is that of y over a."""
    latent_key, prior_key = jax.random.split(KEY)
    first, prior = part(variables, "first"), part(variables, "prior")
    y = FIRST.encode(first, BATCH["image"], latent_key)
    z = np.float64(y) * SCALE + SHIFT
    weight = FIRST.log_weight(first, BATCH, latent_key)  # with the standard normal as prior
    of_prior = PRIOR.log_likelihood(prior, {"image": y, "label": BATCH["label"]}, prior_key)
    expected = weight - scipy.stats.norm.logpdf(z).sum(axis=(1, 2, 3)) + of_prior - np.log(SCALE).sum()
    np.testing.assert_allclose(MODEL.log_likelihood(variables, BATCH, KEY), expected, rtol=1e-4)
    assert MODEL.bound == "estimate" and (MODEL.count(BATCH) == 12).all()


def test_cached_latents_give_the_same_loss(variables):
    """And the loss is the prior's, of latents drawn by the key; each key draws others."""
    stage = MODEL.stage(variables, BATCH["image"])
    cached = {"stage": stage, "label": BATCH["label"]}
    for key in jax.random.split(KEY, 2):
        loss, aux = MODEL.loss(variables, BATCH, key, 0, train=True)
        again, _ = MODEL.loss(variables, cached, key, 0, train=True)
        np.testing.assert_allclose(again, loss, rtol=1e-5)
        latent_key, prior_key = jax.random.split(key)
        y = FIRST.encode(part(variables, "first"), BATCH["image"], latent_key)
        batch = {"image": y, "label": BATCH["label"]}
        expected, _ = PRIOR.loss(part(variables, "prior"), batch, prior_key, 0, train=True)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
        assert jax.tree.map(np.shape, aux.state) == jax.tree.map(np.shape, {"moments": variables["moments"]})


def test_the_first_stage_is_held(variables):
    """No gradient reaches it, and its moments stay."""
    gradient, aux = jax.grad(
        lambda params: MODEL.loss({**variables, "params": params}, BATCH, KEY, 0, train=True), has_aux=True
    )(variables["params"])
    for path, leaf in leaves_by_path(gradient).items():
        # One position attends to itself whatever its query and its key are.
        moves = path.startswith("prior/") and not re.search(r"attention/(query|key)/", path)
        assert (np.abs(leaf).max() > 0) == moves, path
    jax.tree.map(np.testing.assert_array_equal, aux.state, {"moments": variables["moments"]})


def test_samples_are_the_priors_decoded(variables):
    given = {"label": jnp.array([0, 1, 1])}
    drawn = MODEL.sample(variables, KEY, given, num=3)
    latents = PRIOR.sample(part(variables, "prior"), KEY, given, num=3)
    np.testing.assert_array_equal(drawn, FIRST.decode(part(variables, "first"), latents))
    assert MODEL.sampling == PRIOR.sampling and MODEL.conditions == PRIOR.conditions
    np.testing.assert_array_equal(
        MODEL.encode(variables, BATCH["image"]), FIRST.encode(part(variables, "first"), BATCH["image"])
    )


@pytest.mark.slow
def test_a_prompt_changes_what_is_drawn_and_no_prompt_is_untold():
    model = models.build(CONFIGS["latent diffusion of texts"])  # not compiled: what is asked is looked at
    tokens = np.int32([[1, 2, 0], [3, 4, 2]])
    batch = {"image": BATCH["image"][:2], "tokens": tokens}
    params = random_params(jax.eval_shape(model.init, KEY, batch)["params"], scale=0.3)
    moments = {"first": {"mean": SHIFT, "square": SHIFT**2 + SCALE**2}}
    variables = jax.tree.map(jnp.asarray, {"params": params, "moments": moments})
    asked: list[Denoised] = []

    def ask(denoise: Any, schedule: Any, times: Any, x: jax.Array, key: jax.Array, **_: Any) -> jax.Array:
        asked.append(denoise(x, times[0]))
        return x

    sampling = replace(model.sampling, solver="ddim", guidance=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(diffusion.SOLVERS, "ddim", ask)
        for given in ({"tokens": tokens}, {"tokens": tokens[::-1]}, {}):
            model.sample(variables, KEY, given, num=2, sampling=sampling)
    told, other, untold = (np.asarray(each.data) for each in asked)
    assert np.abs(told - other).max() > 1e-3 and np.abs(told - untold).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prior": replace(CONFIG.prior, image_size=2)},
            "the first stage makes latents float32[1, 1, 2] and the prior models float32[2, 2, 2]: set prior.",
        ),
        ({"prior": replace(CONFIG.prior, levels=3)}, "and the prior models uint8[1, 1, 2]"),
        ({"first": VAE}, "the first stage makes latents float32[2]"),
        ({"first": VQVAE}, "the first stage does not encode images as one array of real numbers and decode it"),
        ({"first": CLIP}, "the first stage does not encode images as one array of real numbers and decode it"),
    ],
)
def test_stages_that_do_not_fit_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        build(replace(CONFIG, **change))


def test_a_first_stage_without_a_likelihood_leaves_none():
    model = build(replace(CONFIG, first=replace(CONFIGS["autoencoder of a critic"], image_size=4), prior=of_side(2)))
    assert model.log_likelihood is None and model.sample is not None


def of_side(side: int) -> probability_flow.Config:
    return replace(CONFIG.prior, image_size=side)


def test_every_family_of_diffusion_is_a_prior():
    for name in ("diffusion", "vdm", "edm"):
        prior = replace(CONFIGS[name], **LATENTS)
        model = build(latent_diffusion.Config(first=AUTOENCODER, prior=prior))
        assert model.bound == ("estimate" if name == "edm" else "lower")
    assert READERS.keys() == {"unet", "pixart"}
