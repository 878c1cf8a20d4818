"""What every family owes in numbers: held for the smallest configuration of each (`smallest.py`)."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import random_params
from smallest import CONFIGS, DROPOUT, NORM_EPS, PARTS
from vlm_jax.contract import Model, abstract_batch
from vlm_jax.evals import Subject, likelihood
from vlm_jax.models import FAMILIES, build, family_of
from vlm_jax.nn import denoiser, spatial_transformer
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.unet import LatentUNet
from vlm_jax.sampling.diffusion import SOLVERS, Denoised

BATCH = 4
KEY = jax.random.key(0)
MODELS = {name: build(config) for name, config in CONFIGS.items()}
DENOISERS = [
    name
    for name, config in CONFIGS.items()
    if isinstance(getattr(config, "network", None), Network) and config.network.classes is not None
]
DROPOUTS: dict[str, set[tuple[float, bool]]] = {
    "gaussian process": set(),
    "kde": set(),
    "kde of densities": set(),
    "ladder vae": {(DROPOUT, True), (0.0, False)},  # the encoder has none
    "vae of a learned prior": {(DROPOUT, True), (DROPOUT, False)},  # the prior's pass through the encoder has none
    # Nor have first stages, readers of texts, and a slow copy of the model.
    **{
        name: {(DROPOUT, True), (DROPOUT, False)}
        for name, config in CONFIGS.items()
        if any(hasattr(config.image if hasattr(config, "image") else config, name) for name in ("first", "codes"))
        or (hasattr(config, "network") and getattr(config, "text", None) is not None)
    },
}
"""Rates in training and whether they are drawn, where not all are the config's."""


def random_batch(model: Model, size: int = BATCH) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    batch = {}
    for name, spec in model.inputs.items():
        values = random.integers(0, spec.limit, (size, *spec.shape))
        if spec.contains is not None:
            values[..., -1] = spec.contains
        if spec.span is not None:
            values[:] = spec.span * np.arange(*spec.shape)  # one after the other
        batch[name] = jnp.asarray(values, spec.dtype)
    return batch


def variables_of(model: Model) -> Any:
    """Random parameters, and the data that a family keeps."""
    variables = jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, BATCH))
    if "data" in variables:
        return model.init(KEY, random_batch(model))
    return jax.tree.map(jnp.asarray, random_params(variables, scale=0.1))


SEEN: list[tuple[jax.Array | None, bool]] = []
"""Labels, and whether it was training, of each call of a `Tower`."""


class Tower(nn.Module):
    """A network that says of each image what its label is, in place of a U-Net or a transformer."""

    config: Any
    channels: int
    classes: int | None = None

    def __call__(self, x: jax.Array, time: jax.Array, label: jax.Array | None = None, *, train: bool) -> jax.Array:
        SEEN.append((label, train))
        share = 0 if label is None else (1 + label)[:, None, None, None]
        return jnp.tile(0.1 * share * (x[..., :3] + 0.5), self.channels // 3)


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """For models that are built anew: what jax has traced of another is kept."""
    monkeypatch.setattr(denoiser, "UNetTower", Tower)
    monkeypatch.setattr(denoiser, "DiTTower", Tower)


def test_every_family_has_a_smallest_configuration():
    assert {family_of(config) for config in CONFIGS.values()} == set(FAMILIES)


ENCODERS = [name for name, model in MODELS.items() if model.embed_image is not None]


@pytest.mark.parametrize("name", ENCODERS)
def test_images_and_texts_are_unit_vectors_of_one_space_and_cost_as_much_as_chance_where_they_are_alike(name: str):
    """Of equal pairs InfoNCE is ln B, and the sigmoid loss that of a yes and B - 1 noes at one logit."""
    model, batch = MODELS[name], random_batch(MODELS[name])
    variables = variables_of(model)
    image = model.embed_image(variables, batch["image"])
    text = model.embed_text(variables, batch["tokens"])
    assert image.shape == text.shape
    for embedding in (image, text):
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)
    alike = {field: jnp.repeat(values[:1], BATCH, axis=0) for field, values in batch.items()}
    loss, _ = model.loss(variables, alike, KEY, 0, train=False)
    scale = math.exp(variables["params"]["log_scale"])
    if name == "clip":
        expected = math.log(BATCH)
    else:
        logit = scale * float(image[0] @ text[0]) + float(variables["params"]["logit_bias"])
        expected = np.log1p(np.exp(-logit)) + (BATCH - 1) * np.log1p(np.exp(logit))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


BOUNDS = [
    name
    for name, model in MODELS.items()
    if model.bound in ("exact", "lower") and "tokens" not in model.inputs and model.stage is None
]
"""Of two stages the loss is that of the second alone, in its own units."""


@pytest.mark.usefixtures("towers")
@pytest.mark.parametrize("name", BOUNDS)
def test_bits_a_dimension_are_those_of_the_mean_likelihood_over_height_width_and_channels(name: str):
    """Of the loss of held-out images, in expectation."""
    model = build(CONFIGS[name])
    variables, batch = variables_of(model), random_batch(model)

    def values(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        loss_key, key = jax.random.split(key)
        loss, aux = model.loss(variables, batch, loss_key, 0, train=False)
        terms = [value for metric, value in aux.metrics.items() if metric.endswith("bits_per_dim")]
        return loss, sum(terms, jnp.zeros(())), jnp.mean(model.log_likelihood(variables, batch, key))

    loss, terms, nats = np.float64(jax.jit(lambda keys: jax.lax.map(values, keys))(jax.random.split(KEY, 256)))
    if name == "diffusion":  # whose loss is a squared error and a share of the bound, but whose metrics are the bound
        loss = terms
    elif terms.any():
        np.testing.assert_allclose(terms, loss, rtol=1e-5)
    expected = -nats / (2 * 2 * 3 * math.log(2))
    error = math.hypot(loss.std(), expected.std()) / math.sqrt(len(loss))
    assert error < 0.03 * abs(expected.mean())
    assert abs(loss.mean() - expected.mean()) < 4 * error + 1e-4 * abs(expected.mean())


@pytest.mark.parametrize("name", ["autoregressive", "pixelcnn"])
def test_a_uniform_model_evaluates_to_the_logarithm_of_its_levels(name: str):
    """One whose parameters are all zero."""
    model = MODELS[name]
    variables = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, BATCH)),
    )
    batch = random_batch(model)
    parts = [(batch, BATCH), (batch, 1)]
    subject = Subject(model=model, variables=variables, batches=lambda: iter(parts), examples=BATCH + 1)
    assert likelihood.run(subject)["bits_per_dim"] == pytest.approx(math.log2(3), rel=1e-6)


@dataclass
class Seen:
    """The layers that were called while a model was traced."""

    dropouts: list[tuple[float, bool]]
    """Of each, its rate, and whether it drew."""
    epsilons: list[float]
    """Of the norms of layers."""


@contextmanager
def watched() -> Iterator[Seen]:
    """Records the layers, and refuses a key that two draws are made with."""
    seen = Seen([], [])

    def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, nn.Dropout):
            deterministic = kwargs.get("deterministic", layer.deterministic)
            seen.dropouts.append((layer.rate, not deterministic))
        if context.method_name == "__call__" and isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            seen.epsilons.append(layer.epsilon)
        return call(*args, **kwargs)

    with nn.intercept_methods(record), jax.debug_key_reuse(True):
        yield seen


def trace(function: Callable[..., Any], *args: Any) -> None:
    """With a key made within, so that all of its uses are seen."""
    jax.eval_shape(lambda *args: function(jax.random.key(0), *args), *args)


TRAINED = [name for name, config in CONFIGS.items() if family_of(config) not in PARTS]


@pytest.mark.parametrize("name", TRAINED)
def test_dropout_is_for_the_loss_of_training_norms_have_their_epsilon_and_no_key_draws_twice(name: str):
    model = MODELS[name]
    abstract = abstract_batch(model.inputs, BATCH)
    variables = jax.eval_shape(model.init, KEY, abstract)
    with watched() as training:
        trace(lambda key, v, batch: model.loss(v, batch, key, 0, train=True)[0], variables, abstract)
    assert set(training.dropouts) == DROPOUTS.get(name, {(DROPOUT, True)})
    with watched() as evaluation:
        trace(lambda key, v, batch: model.loss(v, batch, key, 0, train=False)[0], variables, abstract)
    assert len(evaluation.dropouts) == len(training.dropouts)
    assert not any(drew for _, drew in evaluation.dropouts)
    check_epsilons(CONFIGS[name], training, evaluation)


@pytest.mark.parametrize("name", CONFIGS)
def test_use_draws_no_dropout_norms_have_their_epsilon_and_no_key_draws_twice(name: str):
    """Nor does initialisation draw with a key twice."""
    model = MODELS[name]
    batch, abstract = random_batch(model), abstract_batch(model.inputs, BATCH)
    with watched():
        trace(lambda key, batch: model.init(key, batch), abstract)
    variables = jax.eval_shape(model.init, KEY, abstract)
    with watched() as use:
        for function in (model.log_likelihood, model.log_weight):
            if function is not None:
                trace(lambda key, v, batch, f=function: f(v, batch, key), variables, abstract)
        for field, functions in (
            ("image", (model.embed_image, model.image_features)),
            ("tokens", (model.embed_text, model.text_features)),
        ):
            for function in functions:
                if function is not None:
                    trace(lambda key, v, x, f=function: f(v, x), variables, abstract[field])
        if model.encode is not None:
            trace(lambda key, v, x: model.decode(v, model.encode(v, x, key)), variables, abstract["image"])
        if model.sample is not None:
            trace(lambda key, v: model.sample(v, key, {}, num=2), variables)
        if model.complete is not None:
            known = np.array([[True, True], [False, False]])
            if getattr(CONFIGS[name], "patch_size", 1) > 1:
                known[:] = True
            trace(lambda key, v: model.complete(v, key, batch["image"], known), variables)
    assert not any(drew for _, drew in use.dropouts)
    check_epsilons(CONFIGS[name], use)


def check_epsilons(config: Any, *seen: Seen) -> None:
    """Where a config holds the epsilon of its norms, no norm has another; a spatial transformer's is the release's."""
    epsilons = {epsilon for each in seen for epsilon in each.epsilons}
    reads = isinstance(getattr(getattr(config, "network", None), "backbone", None), LatentUNet)
    fixed = {spatial_transformer.NORM_EPS} if reads else set()
    assert epsilons == {NORM_EPS} | fixed or "norm_eps" not in setting_names(config)


def setting_names(config: Any) -> set[str]:
    """The names of the fields of a config and of the configs within it."""
    names = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        names |= {field.name} | (setting_names(value) if is_dataclass(value) else set())
    return names


def with_network(config: Any, **changes: Any) -> Any:
    return replace(config, network=replace(config.network, **changes))


@pytest.mark.usefixtures("towers")
@pytest.mark.parametrize("name", DENOISERS)
def test_guidance_goes_from_the_untold_mean_past_the_told_one_and_keeps_the_told_variance(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """What each family hands to its solver: of real vectors where it can, which are not clipped."""
    config = CONFIGS[name] if family_of(CONFIGS[name]) == "vdm" else replace(CONFIGS[name], levels=None)
    x = jnp.asarray(0.3 * np.random.default_rng(1).normal(size=(3, 2, 2, 3)), jnp.float32)
    asked: list[Denoised] = []

    def ask(denoise: Any, schedule: Any, times: jax.Array, state: jax.Array, key: jax.Array, **_: Any) -> jax.Array:
        asked.append(denoise(x, times[0]))
        return state

    monkeypatch.setitem(SOLVERS, "ddim", ask)
    variables = variables_of(build(config)) if name == "vdm" else {}

    def hand_over(guidance: float, label: jax.Array) -> Denoised:
        model = build(config)
        sampling = replace(model.sampling, guidance=guidance, solver="ddim")
        model.sample(variables, KEY, {"label": label}, num=3, sampling=sampling)
        return asked.pop()

    label = jnp.array([0, 1, 1])
    told, guided = hand_over(1.0, label), hand_over(2.5, label)
    untold, other = hand_over(0.0, label), hand_over(0.0, 1 - label)
    np.testing.assert_allclose(untold.data, other.data, atol=1e-6)
    assert np.abs(told.data - untold.data).max() > 1e-2
    np.testing.assert_allclose(guided.data, untold.data + 2.5 * (told.data - untold.data), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(guided.mix, told.mix, atol=1e-6)
    if getattr(config, "variance", None) == "learned":
        assert np.abs(untold.mix - other.mix).max() > 1e-2
    else:
        assert told.mix == 0


@pytest.mark.usefixtures("towers")
@pytest.mark.parametrize("name", DENOISERS)
def test_labels_are_dropped_in_training_alone(name: str):
    config = CONFIGS[name]
    batch, variables = random_batch(MODELS[name]), variables_of(build(config)) if name == "vdm" else {}

    def heard(condition_dropout: float, train: bool | None) -> np.ndarray:
        """By the network: in the loss, or in the likelihood."""
        model = build(replace(config, network=replace(config.network, condition_dropout=condition_dropout)))
        SEEN.clear()
        if train is None:
            model.log_likelihood(variables, batch, KEY)
        else:
            model.loss(variables, batch, KEY, 0, train=train)
        labels, training = zip(*SEEN, strict=True)
        assert set(training) == {bool(train)}
        return np.stack(labels)

    label = np.asarray(batch["label"])
    assert (heard(1 - 1e-6, True) == 2).all()
    for condition_dropout, train in ((0.0, True), (1 - 1e-6, False), (1 - 1e-6, None)):
        assert (heard(condition_dropout, train) == label).all()
