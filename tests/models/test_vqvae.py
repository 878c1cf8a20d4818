"""Autoencoders of codes: on 2x2 images of 3 levels all codes and images are known, and every probability is checked."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from densities import IMAGES, check_copies
from reference import random_params
from vlm_jax.errors import UserError
from vlm_jax.models import vqvae
from vlm_jax.models.vqvae import VQVAE, Config
from vlm_jax.nn.adversary import Adversarial, onlookers
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.quantize import EMA, FSQ, LFQ, Learned, Residual
from vlm_jax.objectives.likelihood import to_unit_range
from vlm_jax.trees import count_parameters, part

NETWORK = Pyramid(widths=(8, 8), blocks=1, groups=1)
CONFIG = Config(image_size=2, channels=1, levels=3, network=NETWORK, hidden=4, quantizer=FSQ(levels=(3, 5)))
QUANTIZERS: dict[str, Any] = {
    "one book": FSQ(levels=(3, 5)),
    "two books": Residual(book=LFQ(width=2), books=2),
}
BATCH = {"image": IMAGES}
KEY = jax.random.key(0)


@pytest.fixture(scope="module", params=QUANTIZERS)
def config(request: pytest.FixtureRequest) -> Config:
    return replace(CONFIG, quantizer=QUANTIZERS[request.param])


@pytest.fixture(scope="module")
def variables(config: Config) -> Any:
    values = random_params(jax.eval_shape(vqvae.build(config).init, KEY, BATCH), 0.5)
    values["params"]["log_scale"] = np.float32([-0.7])
    values["params"]["features"] = {
        "kernel": 3 * values["params"]["features"]["kernel"],
        "bias": np.zeros(2, np.float32),
    }
    centre = jax.tree.map(jnp.asarray, values)
    features = VQVAE(config).apply(
        centre, IMAGES, method=lambda m, x: m.features(m.encoder(to_unit_range(x, config.levels)))
    )
    # Features around zero, of a deviation of one, so that many codes are met.
    deviation = features.std(axis=(0, 1, 2))
    dense = values["params"]["features"]
    dense["kernel"], dense["bias"] = dense["kernel"] / deviation, (dense["bias"] - features.mean((0, 1, 2))) / deviation
    return jax.tree.map(jnp.asarray, values)


def log_probs(config: Config, variables: Any, codes: np.ndarray) -> np.ndarray:
    """[codes, images], nats: by the logistic's distribution function."""
    mean = np.float64(VQVAE(config).apply(variables, codes, method="decode"))[:, None]
    scale = np.exp(np.float64(variables["params"]["log_scale"]))
    edges = (IMAGES[None] - 1.0)[..., None] + np.array([-0.5, 0.5])
    edges[..., 0] = np.where(IMAGES[None] == 0, -np.inf, edges[..., 0])
    edges[..., 1] = np.where(IMAGES[None] == 2, np.inf, edges[..., 1])
    low, high = np.moveaxis(scipy.special.expit((edges - mean[..., None]) / scale[..., None]), -1, 0)
    return np.log(high - low).sum(axis=(2, 3, 4))


def every_code(config: Config) -> np.ndarray:
    count, books = config.quantizer.size, config.quantizer.books
    codes = np.stack(np.meshgrid(*[np.arange(count)] * books, indexing="ij"), axis=-1).reshape(-1, books)
    return np.int32(codes).reshape(-1, *config.latents)


def test_the_bound_is_that_of_an_images_own_code_and_all_codes_together_sum_to_one(config: Config, variables: Any):
    """An error of 0.005 bits a dimension would be 0.014 nats of an image."""
    model, codes = vqvae.build(config), every_code(config)
    table = log_probs(config, variables, codes)
    np.testing.assert_allclose(np.exp(table).sum() / len(codes), 1, rtol=1e-9)
    own = np.asarray(model.encode(variables, IMAGES))
    assert own.shape == (81, *config.latents)
    place = np.array([np.flatnonzero((codes == code).reshape(len(codes), -1).all(axis=1))[0] for code in own])
    assert len(np.unique(place)) > 2
    expected = table[place, np.arange(81)] - np.log(len(codes))
    bound = np.float64(jax.jit(model.log_likelihood)(variables, BATCH, KEY))
    np.testing.assert_allclose(bound, expected, atol=1e-4)
    assert np.exp(bound).sum() < 1
    assert (bound < scipy.special.logsumexp(table, axis=0) - np.log(len(codes))).all()


def test_the_loss_is_the_negative_bound_and_in_training_has_the_penalty_in_place_of_the_rate(
    config: Config, variables: Any
):
    model = vqvae.build(replace(config, penalty_weight=3.0))
    bound = jax.jit(model.log_likelihood)(variables, BATCH, KEY)
    loss = jax.jit(lambda train: model.loss(variables, BATCH, KEY, 0, train=train), static_argnums=0)
    value, aux = loss(False)
    np.testing.assert_allclose(value, -bound.mean() / (4 * np.log(2)), rtol=1e-5)
    bits = np.log2(len(every_code(config))) / 4
    np.testing.assert_allclose(aux.metrics["rate_bits_per_dim"], bits, rtol=1e-6)
    training, aux = loss(True)
    np.testing.assert_allclose(training, value - bits + 3 * aux.metrics["penalty"], rtol=1e-5)
    assert 0 < aux.metrics["code_use"] <= 1 < aux.metrics["code_perplexity"]


def test_samples_are_of_codes_that_are_all_alike(config: Config, variables: Any):
    count, model = 20_000, vqvae.build(config)
    samples = np.asarray(jax.jit(lambda key: model.sample(variables, key, {}, num=count))(KEY))
    observed = np.bincount(samples.reshape(count, 4) @ [27, 9, 3, 1], minlength=81) / count
    expected = np.exp(log_probs(config, variables, every_code(config))).mean(axis=0)
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected / count) + 1e-6).all()


def test_codes_become_the_means_of_their_pixels(config: Config, variables: Any):
    model, codes = vqvae.build(config), every_code(config)
    mean = np.asarray(VQVAE(config).apply(variables, codes, method="decode"))
    np.testing.assert_array_equal(model.decode(variables, codes), np.clip(np.round(mean + 1), 0, 2))
    np.testing.assert_array_equal(model.encode(variables, IMAGES, KEY), model.encode(variables, IMAGES))


@pytest.mark.slow
def test_reconstructions_become_their_originals():
    check_copies(vqvae.build(replace(CONFIG, quantizer=Learned(size=4, width=2))))


@pytest.mark.slow
def test_the_age_of_codes_counts_in_training_alone():
    model = vqvae.build(replace(CONFIG, quantizer=EMA(size=6, width=2)))
    variables = jax.jit(model.init)(KEY, BATCH)
    loss = jax.jit(lambda v, train: model.loss(v, BATCH, KEY, 0, train=train)[1].state, static_argnums=1)
    jax.tree.map(np.testing.assert_array_equal, loss(variables, False), {k: variables[k] for k in ("codebook", "use")})
    state = loss(variables, True)
    seen = np.unique(model.encode(variables, IMAGES))
    assert set(np.flatnonzero(np.asarray(state["use"]["age"]) == 0)) == set(seen)
    assert (np.asarray(state["codebook"]["quantizer"]["clusters"]["count"]) > 0).all()


CRITIC = replace(
    CONFIG,
    image_size=8,
    channels=3,
    levels=256,
    quantizer=Learned(size=6, width=2),
    penalty_weight=0.25,
    objective=Adversarial(widths=(4, 8), groups=2, start=10),
)


@pytest.fixture(scope="module")
def criticised() -> tuple[Any, Any]:
    """Variables of a model whose copies a critic looks at, and a batch."""
    batch = {"image": np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)}
    variables = jax.jit(vqvae.build(CRITIC).init)(KEY, batch)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), variables["params"])
    return {**variables, "params": params}, batch


def test_with_a_critic_training_costs_the_error_the_codes_and_what_the_critic_says(criticised: Any):
    """Means over sub-pixels, whose gradients for the last layer are compared as they are (2012.09841, equation 7)."""
    variables, batch = criticised
    module: Any = VQVAE(CRITIC)
    model, x = vqvae.build(CRITIC), batch["image"] / 127.5 - 1
    params, last = variables["params"], variables["params"]["decoder"]["last"]
    distance, _, says = onlookers(CRITIC.objective, part(variables, "objective"))

    def copy(kernel: Any) -> Any:
        decoder = {**params["decoder"], "last": {**last, "kernel": kernel}}
        changed = {**variables, "params": {**params, "decoder": decoder}}
        return module.apply(changed, batch["image"], train=False, method="copied")[0]

    terms = (lambda kernel: jnp.mean(jnp.abs(x - copy(kernel))), lambda kernel: -jnp.mean(says(copy(kernel))))
    (error, of_error), (criticism, of_criticism) = (jax.value_and_grad(term)(last["kernel"]) for term in terms)
    weight = 0.5 * np.linalg.norm(of_error) / (np.linalg.norm(of_criticism) + 1e-4)
    loss = jax.jit(lambda step, train: model.loss(variables, batch, KEY, step, train=train), static_argnames="train")
    for step, entered in ((9, 0.0), (10, weight)):
        value, aux = loss(step, True)
        np.testing.assert_allclose(aux.metrics["critic_weight"], entered, rtol=1e-3)
        due = error + entered * criticism + aux.metrics["critic_loss"] + 0.25 * aux.metrics["penalty"]
        np.testing.assert_allclose(value, due, rtol=1e-4)
        assert aux.weight is None and aux.metrics["penalty"] > 0 and aux.state["said"]["objective"]["real"] != 0
    value, aux = loss(10, False)
    np.testing.assert_allclose(value, error, rtol=1e-5)
    assert aux.weight == 4 and model.log_likelihood is None and model.sample is None
    jax.tree.map(np.testing.assert_array_equal, aux.state, {name: variables[name] for name in ("use", "said")})
    assert (distance(x, x) == 0).all()


def test_a_critic_that_sees_no_whole_patch_is_refused():
    with pytest.raises(UserError, match=r"a critic of widths \[4, 8, 8\] sees no whole patch: choose fewer widths"):
        replace(CRITIC, objective=Adversarial(widths=(4, 8, 8)))


@pytest.mark.parametrize(
    ("config", "parameters", "codes"),
    [
        # Of diffusers' VQModel of these settings; LlamaGen's README says 72M and 70M.
        (vqvae.VQGAN_F16, 72_141_699, (16, 16)),
        (vqvae.LLAMAGEN_F16, 71_883_403, (16, 16)),
        (vqvae.LLAMAGEN_F8, 70_109_835, (32, 32)),
    ],
)
def test_the_networks_are_the_published_ones(config: Config, parameters: int, codes: tuple[int, int]):
    """And three scales of pixels."""
    model = vqvae.build(config)
    batch = {"image": jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.uint8)}
    params = jax.eval_shape(model.init, KEY, batch)["params"]
    assert count_parameters(params) == parameters + 3
    assert model.latents.shape == codes


def test_vqgan_s_release_weights_the_codes_and_llamagen_s_the_features():
    """taming-transformers' `quantize.py` (see its note on beta), LlamaGen's `vq_model.py`: of the distance of the codes
    to the features, and of the features to the codes."""
    weights = {
        name: (config.penalty_weight, config.penalty_weight * config.quantizer.commitment)
        for name, config in (("vqgan", vqvae.VQGAN_F16), ("llamagen", vqvae.LLAMAGEN_F16))
    }
    assert weights == {"vqgan": (0.25, 1.0), "llamagen": (1.0, 0.25)}
    assert (vqvae.LLAMAGEN_F16.quantizer.unit, vqvae.VQGAN_F16.quantizer.unit) == (True, False)
