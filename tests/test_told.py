"""What a model is told is looked at by every capability, off the training path too."""

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.presets import presets
from vlm_jax.contract import Input, Model
from vlm_jax.errors import UserError
from vlm_jax.models import autoregressive, build, diffusion, probability_flow, tarflow, vdm
from vlm_jax.nn.transformer import Transformer

CONFIGS = {name: experiment.model for name, (_, experiment) in presets().items()}
TOLD = [name for name, config in CONFIGS.items() if build(config).conditions]
KEY = jax.random.key(0)
CLASSES = 10


@dataclass(frozen=True)
class Sampling:
    added: int = 1


def of_label(
    _: Any, key: Any, given: Any, *, num: int, temperature: float = 1.0, sampling: Sampling = Sampling()
) -> jax.Array:
    """Each image is one more than its label, or as the settings say; without one, 100."""
    label = given.get("label", jnp.full(num, 99, jnp.int32))
    assert label.dtype == jnp.int32
    return jnp.broadcast_to(label[:, None, None, None] + sampling.added, (num, 2, 2, 1)).astype(jnp.uint8)


def of_tokens(_: Any, tokens: jax.Array) -> jax.Array:
    assert tokens.dtype == jnp.int32
    return jnp.sum(tokens, axis=1, keepdims=True).astype(jnp.float32)


MODEL = Model(
    inputs={
        "image": Input((2, 2, 1), "uint8", 17),
        "tokens": Input((3,), "int32", 50, contains=2),
        "label": Input((), "int32", CLASSES),
    },
    init=lambda *_: {},
    loss=lambda *_, **__: None,
    rules=(),
    embed_image=lambda _, image: image.reshape(len(image), -1).astype(jnp.float32),
    embed_text=of_tokens,
    text_features=lambda _, tokens: (jnp.ones((*tokens.shape, 1)), jnp.ones(tokens.shape, bool)),
    log_likelihood=lambda _, batch, key: batch["label"].astype(jnp.float32),
    latents=Input((4,), "float32"),
    encode=lambda _, image, key=None: image.reshape(len(image), 4).astype(jnp.float32) + (0 if key is None else 0.5),
    decode=lambda _, latents: latents.reshape(-1, 2, 2, 1).astype(jnp.uint8),
    conditions={"label": Input((), "int32", CLASSES)},
    sampling=Sampling(),
    sample=of_label,
    complete=lambda _, key, image, known, *, temperature=1.0: image,
    generate=lambda _, key, batch, *, order, temperature, sampling: {"tokens": batch["tokens"] + sampling.added},
)
BARE = replace(MODEL, sampling=None, sample=partial(of_label, sampling=Sampling()))
IMAGE = np.full((2, 2, 2, 1), 16, np.uint8)
TOKENS = np.array([[0, 2, 9], [2, 2, 1]])
BATCH = {"image": IMAGE, "tokens": TOKENS, "label": np.array([9, 0])}
KNOWN = np.ones((2, 2), bool)


@pytest.mark.parametrize("transform", [lambda function: function, jax.jit], ids=["as it is", "under jit"])
def test_what_fits_passes_in_any_width_of_integers(transform: Any) -> None:
    draw = transform(partial(MODEL.sample, {}, KEY, num=3))
    np.testing.assert_array_equal(draw({"label": [9, 0, 4]})[:, 0, 0, 0], [10, 1, 5])
    np.testing.assert_array_equal(draw({"label": np.array([9, 0, 4], np.int64)})[:, 0, 0, 0], [10, 1, 5])
    np.testing.assert_array_equal(draw({})[:, 0, 0, 0], [100] * 3)
    np.testing.assert_array_equal(transform(MODEL.embed_text)({}, TOKENS), [[11], [5]])
    np.testing.assert_array_equal(transform(MODEL.log_likelihood)({}, BATCH, KEY), [9, 0])
    np.testing.assert_array_equal(transform(MODEL.generate)({}, KEY, BATCH)["tokens"], TOKENS + 1)
    latents = transform(MODEL.encode)({}, IMAGE)
    np.testing.assert_array_equal(transform(MODEL.encode)({}, IMAGE, KEY), latents + 0.5)
    for y in (transform(MODEL.decode)({}, latents), MODEL.complete({}, KEY, IMAGE, KNOWN)):
        np.testing.assert_array_equal(y, IMAGE)


def test_settings_of_sampling_are_the_models_own_unless_others_of_their_type_are_given():
    draw = partial(MODEL.sample, {}, KEY, {"label": [3]}, num=1)
    assert [draw()[0, 0, 0, 0], draw(sampling=Sampling(5))[0, 0, 0, 0]] == [4, 8]
    continued = MODEL.generate({}, KEY, BATCH, sampling=Sampling(5))["tokens"]
    np.testing.assert_array_equal(continued, TOKENS + 5)
    assert BARE.sample({}, KEY, {"label": [3]}, num=1)[0, 0, 0, 0] == 4


def test_latents_of_several_parts_are_read_by_their_names():
    parts = {"fine": Input((2,), "float32"), "coarse": Input((1,), "float32")}
    model = replace(MODEL, latents=parts, decode=lambda _, latents: latents["fine"] + latents["coarse"])
    given = {"coarse": np.ones((3, 1)), "fine": np.full((3, 2), 2.0)}
    np.testing.assert_array_equal(model.decode({}, given), np.full((3, 2), 3))
    with pytest.raises(UserError, match="reads the field 'coarse' and is given \\['fine'\\]"):
        model.decode({}, {"fine": given["fine"]})
    with pytest.raises(UserError, match="'coarse' holds 2 examples and 3 are due"):
        model.decode({}, given | {"coarse": np.ones((2, 1))})


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (partial(MODEL.sample, {}, KEY, num=3), {"labels": [1, 2, 3]}, "is told 'labels' and can be told label: leave"),
        (partial(MODEL.sample, {}, KEY, num=2), {"label": [1, 2, 3]}, "'label' holds 3 examples and 2 are due"),
        (partial(MODEL.sample, {}, KEY, num=1), {"label": [1.0]}, "'label' holds float"),
        (partial(MODEL.sample, {}, KEY, num=2), {"label": [[1], [2]]}, "holds int"),
        (partial(MODEL.embed_text, {}), TOKENS[:, :2], "[2] an example and the model expects int32[3]"),
        (
            partial(MODEL.embed_image, {}),
            IMAGE / 16,
            "float64[2, 2, 1] an example and the model expects uint8",
        ),
        (
            partial(MODEL.encode, {}),
            IMAGE[:, :1],
            "uint8[1, 2, 1] an example and the model expects uint8[2, 2, 1]",
        ),
        (partial(MODEL.decode, {}), np.zeros((2, 3)), "float64[3] an example and the model expects float32[4]"),
        (partial(MODEL.decode, {}), IMAGE.reshape(2, 4), "uint8[4] an example and the model expects float32[4]"),
        (partial(MODEL.complete, {}, KEY, known=KNOWN), IMAGE[:, :1], "'image' holds uint8[1, 2, 1] an example"),
        (partial(MODEL.complete, {}, KEY, known=KNOWN[:1]), IMAGE, "`known` holds bool[1, 2] and must say of each"),
        (partial(MODEL.complete, {}, KEY, known=KNOWN.astype(int)), IMAGE, "`known` holds int64[2, 2]"),
        (
            partial(MODEL.log_likelihood, {}, key=KEY),
            {"image": IMAGE, "tokens": TOKENS},
            "reads the field 'label'",
        ),
        (partial(MODEL.log_likelihood, {}, key=KEY), BATCH | {"label": [1]}, "'label' holds 1 examples and 2 are due"),
    ],
)
def test_names_shapes_and_kinds_are_refused(traced: bool, call: Any, given: Any, message: str) -> None:
    if traced:
        given = jax.tree.map(jnp.asarray, given, is_leaf=lambda leaf: isinstance(leaf, list))
        message = message.replace("float64", "float32")
        call = partial(jax.eval_shape, call)
    with pytest.raises(UserError, match=re.escape(message)):
        call(given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(MODEL.sample, {}, KEY, {"label": [10, 99, -1]}, num=3), "'label' holds the value -1, outside [0, 10)"),
        (partial(MODEL.sample, {}, KEY, {"label": [10, 9]}, num=2), "'label' holds the value 10, outside [0, 10)"),
        (partial(MODEL.embed_text, {}, np.array([[0, 2, 50]])), "'tokens' holds the value 50, outside [0, 50)"),
        (partial(MODEL.embed_text, {}, np.array([[0, 1, 5]])), "field 'tokens' lacks the value 2"),
        (partial(MODEL.embed_image, {}, IMAGE + 1), "'image' holds the value 17, outside [0, 17)"),
        (partial(MODEL.encode, {}, jnp.asarray(IMAGE + 1)), "'image' holds the value 17, outside [0, 17)"),
        (partial(MODEL.complete, {}, KEY, IMAGE + 1, KNOWN), "'image' holds the value 17, outside [0, 17)"),
        (partial(MODEL.log_likelihood, {}, BATCH | {"image": IMAGE + 1}, KEY), "'image' holds the value 17"),
        (partial(MODEL.generate, {}, KEY, BATCH | {"label": np.array([0, 10])}), "'label' holds the value 10"),
        (partial(MODEL.sample, {}, KEY, {}, num=1, temperature=math.nan), "the temperature is nan: it must be"),
        (partial(MODEL.sample, {}, KEY, {}, num=1, temperature=-0.1), "the temperature is -0.1"),
        (partial(MODEL.generate, {}, KEY, BATCH, temperature=-0.1), "the temperature is -0.1"),
        (partial(MODEL.generate, {}, KEY, BATCH, order=()), "`order` is (): it must name segments to generate"),
        (partial(MODEL.generate, {}, KEY, BATCH, order=("txt",)), "`order` is ('txt',): it must name segments"),
        (
            partial(MODEL.sample, {}, KEY, {}, num=1, sampling=vdm.Sampling()),
            "are vlm_jax.models.vdm.Sampling and the model has test_told.Sampling: give it its own, or None",
        ),
        (
            partial(MODEL.generate, {}, KEY, BATCH, sampling={"added": 2}),
            "are builtins.dict and the model has test_told.Sampling",
        ),
        (partial(BARE.sample, {}, KEY, {}, num=1, sampling=Sampling()), "test_told.Sampling and the model has none"),
        (partial(MODEL.sample, {}, KEY, {}, num=1, on_step=print), "draws in no steps that `on_step` could be told of"),
        (partial(MODEL.complete, {}, KEY, IMAGE, KNOWN, temperature=math.inf), "the temperature is inf"),
    ],
)
def test_values_are_refused_where_they_are_known(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call()


def test_under_jit_what_is_told_wrongly_is_no_draw_of_something_else() -> None:
    """Values are not known there: the rows that do not fit come out empty, and the others as they would alone."""
    images = jax.jit(partial(MODEL.sample, {}, KEY, num=4))({"label": jnp.array([10, 9, -1, 99])})
    np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 10, 0, 0])
    vectors = jax.jit(MODEL.embed_text)({}, jnp.array([[0, 2, 9], [0, 2, 50], [0, 1, 5], [-1, 2, 0]]))
    np.testing.assert_array_equal(vectors[:, 0], [11, np.nan, np.nan, np.nan])
    features, mask = jax.jit(MODEL.text_features)({}, jnp.array([[0, 2, 9], [0, 2, 50]]))
    np.testing.assert_array_equal(features[..., 0], [[1, 1, 1], [np.nan] * 3])
    np.testing.assert_array_equal(mask, [[True] * 3, [False] * 3])
    values = jax.jit(MODEL.log_likelihood)({}, BATCH | {"label": np.array([10, 3])}, KEY)
    np.testing.assert_array_equal(values, [np.nan, 3])
    levels = jax.jit(MODEL.log_likelihood)({}, BATCH | {"image": IMAGE + np.array([[[[0]]], [[[1]]]], np.uint8)}, KEY)
    np.testing.assert_array_equal(levels, [9, np.nan])


@pytest.mark.parametrize("name", TOLD)
def test_every_family_with_classes_refuses_what_is_no_class_before_it_computes(name: str) -> None:
    model = build(CONFIGS[name])
    ((field, spec),) = model.conditions.items()
    assert model.inputs[field] == spec or "segment" in model.inputs  # of a row the prompt is a part
    for given in ({field: [spec.limit]}, {field: [-1]}, {"labels": [0]}, {field: [0, 0]}):
        with pytest.raises(UserError):
            model.sample(None, KEY, given, num=1)


def test_a_family_with_classes_is_no_less_told_under_jit() -> None:
    transformer = Transformer(width=8, depth=1, heads=1, mlp=8)
    config = autoregressive.Config(image_size=2, channels=1, levels=3, classes=2, transformer=transformer)
    model, batch = build(config), {"image": np.zeros((4, 2, 2, 1), np.uint8), "label": np.array([0, 1, 2, -1])}
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(model.init, KEY, batch))
    values = jax.jit(model.log_likelihood)(variables, batch, KEY)
    np.testing.assert_array_equal(np.isfinite(values), [True, True, False, False])


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("family", [diffusion, probability_flow, tarflow, vdm])
def test_guidance_is_a_share(family: Any, guidance: float) -> None:
    with pytest.raises(UserError, match=f"guidance is {guidance}: it must be a number, at least 0"):
        family.Sampling(guidance=guidance)
