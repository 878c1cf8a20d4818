"""Chameleon: all images of four codes of three kinds are known, and what is drawn is drawn again without a cache."""

import itertools
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from compiled import build, program
from reference import random_params
from smallest import AUTOENCODER, DECODER, VQVAE
from vlm_jax import models
from vlm_jax.data.fields import Tokens, left_padded, row
from vlm_jax.errors import UserError
from vlm_jax.models import chameleon, language
from vlm_jax.models.chameleon import Config, Sampling
from vlm_jax.models.language import Language
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.joint_vocabulary import guided
from vlm_jax.nn.quantize import FSQ
from vlm_jax.nn.vocabulary import token_logits
from vlm_jax.trees import leaves_by_path, part

KEY = jax.random.key(0)
PAD, BOS, EOS, A, B, BEGIN, END, CODE = range(8)
VOCABULARY, SPAN, CONTEXT = CODE + 3, 6, 16
FIRST = replace(
    VQVAE, network=Pyramid(widths=(4,), blocks=1, groups=2), quantizer=FSQ(levels=(3,)), image_size=2, channels=1
)
CONFIG = Config(
    first=FIRST,
    language=language.Config(
        vocab_size=VOCABULARY, context_length=CONTEXT, eos_id=EOS, decoder=replace(DECODER, qk_norm="layer")
    ),
    bos_id=BOS,
    begin_id=BEGIN,
    end_id=END,
    code_at=CODE,
    images=2,
    z_loss=0.1,
)
MODEL, PLAIN = build(CONFIG), models.build(CONFIG)
IMAGES = np.array([*itertools.product(range(3), repeat=4)], np.uint8).reshape(81, 2, 2, 1)


@pytest.fixture(scope="module")
def variables() -> Any:
    batch = {name: jnp.zeros((1, *spec.shape), spec.dtype) for name, spec in MODEL.inputs.items()}
    shapes = jax.eval_shape(MODEL.init, KEY, batch)
    return jax.tree.map(jnp.asarray, random_params(shapes, scale=0.7))


def rows(*documents: list[Any]) -> dict[str, np.ndarray]:
    """Documents of tokens and images, one in each row, of which all is to be predicted but the first token."""
    return stacked([laid(each) for each in documents])


def laid(document: list[Any]) -> tuple[Tokens, list[np.ndarray]]:
    tokens, places, images = list[int](), list[int](), list[np.ndarray]()
    for each in document:
        if isinstance(each, np.ndarray):
            places.append(len(tokens))
            images.append(each)
            tokens += [PAD] * SPAN
        else:
            tokens.append(each)
    return Tokens(np.array(tokens, np.int32), np.arange(len(tokens)) > 0, np.array(places, np.int32)), images


def stacked(documents: list[tuple[Tokens, list[np.ndarray]]]) -> dict[str, np.ndarray]:
    found = []
    for tokens, images in documents:
        image = np.zeros(MODEL.inputs["image"].shape, np.uint8)
        for place, each in zip(image, images, strict=False):
            place[...] = each
        found.append(row([tokens], MODEL.inputs, PAD) | {"image": image})
    return {name: np.stack([each[name] for each in found]) for name in found[0]}


def codes_of(variables: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(build(FIRST).encode(part(variables, "first"), images)).reshape(len(images), 4)


def in_tokens(variables: Any, image: np.ndarray) -> list[int]:
    return [BEGIN, *(CODE + codes_of(variables, image[None])[0]).tolist(), END]


class Reader(Language):
    """All logits of a row."""

    def logits(self, tokens: Any) -> Any:
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, _ = self.decoder(self.embed(tokens), position, causal=True)
        return token_logits(x, self.outputs())


READ = program(partial(Reader(CONFIG.language).apply, method="logits"))


def next_logits(variables: Any, documents: list[list[int]]) -> np.ndarray:
    """Of what follows each, read whole."""
    tokens = np.zeros((len(documents), CONTEXT), np.int32)
    for each, document in zip(tokens, documents, strict=True):
        each[: len(document)] = document
    logits = np.asarray(READ(part(variables, "language"), tokens), np.float64)
    return np.stack([each[len(document) - 1] for each, document in zip(logits, documents, strict=True)])


def log_prob(variables: Any, document: list[int]) -> float:
    logits = np.asarray(READ(part(variables, "language"), np.int32([document])), np.float64)[0, :-1]
    chosen = logits[np.arange(len(logits)), document[1:]]
    return float((chosen - scipy.special.logsumexp(logits, axis=1)).sum())


def test_an_image_is_its_codes_between_two_marks_wherever_it_stands(variables):
    one, two = IMAGES[5], IMAGES[70]
    batch = rows([BOS, A, one, EOS], [BOS, one, B, EOS], [BOS, one, two, A, EOS])
    found = np.asarray(MODEL.log_likelihood(variables, batch, KEY), np.float64)
    first = build(FIRST)
    given = np.asarray(
        first.log_likelihood_given(part(variables, "first"), IMAGES, codes_of(variables, IMAGES).reshape(-1, 2, 2))
    )
    tokens = [in_tokens(variables, each) for each in (one, two)]
    expected = [
        log_prob(variables, [BOS, A, *tokens[0], EOS]) + given[5],
        log_prob(variables, [BOS, *tokens[0], B, EOS]) + given[5],
        log_prob(variables, [BOS, *tokens[0], *tokens[1], A, EOS]) + given[5] + given[70],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_probabilities_of_all_images_sum_to_at_most_one(variables):
    """And those of all rows of four tokens after the mark that begins one to one, of which theirs are a part."""
    batch = rows(*([BOS, A, image, EOS] for image in IMAGES))
    after = np.arange(CONTEXT) > 2  # what begins it is given
    batch["target"] = batch["target"] & after & (np.arange(CONTEXT) < 7)
    found = np.asarray(MODEL.log_likelihood(variables, batch, KEY), np.float64)
    total = scipy.special.logsumexp(found)
    assert total < 0
    everything = np.array([*itertools.product(range(VOCABULARY), repeat=4)], np.int32)
    tokens = np.concatenate([np.tile(np.int32([BOS, A, BEGIN]), (len(everything), 1)), everything], axis=1)
    logits = np.asarray(READ(part(variables, "language"), tokens), np.float64)[:, 2:-1]
    log_probs = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    rows_of = np.take_along_axis(log_probs, everything[..., None], axis=-1).sum(axis=(1, 2))
    np.testing.assert_allclose(np.exp(rows_of).sum(), 1, rtol=1e-5)
    assert total < scipy.special.logsumexp(rows_of[(everything >= CODE).all(axis=1)])


def test_what_is_counted_are_tokens_of_texts_and_sub_pixels_of_images():
    batch = rows([BOS, A, IMAGES[0], EOS], [BOS, IMAGES[0], B, A, EOS], [BOS, A, EOS])
    assert np.asarray(MODEL.count(batch)).tolist() == [2 + 4, 3 + 4, 2]
    batch["target"][1, :7] = False  # read, not drawn
    assert np.asarray(MODEL.count(batch)).tolist()[1] == 3


def test_the_loss_is_nats_a_target_token_and_the_square_of_log_z(variables):
    batch = rows([BOS, A, IMAGES[5], EOS], [BOS, B, EOS])
    loss, aux = MODEL.loss(variables, batch, KEY, 0, train=False)
    tokens = [BOS, A, *in_tokens(variables, IMAGES[5]), EOS], [BOS, B, EOS]
    nats = -sum(log_prob(variables, each) for each in tokens)
    weight = sum(len(each) - 1 for each in tokens)
    squares = sum(
        (
            scipy.special.logsumexp(np.asarray(READ(part(variables, "language"), np.int32([each])))[0, :-1], axis=1)
            ** 2
        ).sum()
        for each in tokens
    )
    assert aux.weight == weight
    np.testing.assert_allclose(aux.metrics["cross_entropy"], nats / weight, rtol=1e-5)
    np.testing.assert_allclose(loss, (nats + 0.1 * squares) / weight, rtol=1e-5)
    gradient = jax.grad(lambda p: MODEL.loss({**variables, "params": p}, batch, KEY, 0, train=True)[0])(
        variables["params"]
    )
    still = {path for path, leaf in leaves_by_path(gradient).items() if not np.abs(leaf).any()}
    assert still == {path for path in leaves_by_path(gradient) if path.startswith("first/")}


def test_nothing_depends_on_what_comes_later_or_on_another_document(variables):
    first = (laid([BOS, A, IMAGES[5], EOS]), laid([BOS, B, EOS]))
    other = (laid([BOS, A, IMAGES[5], B]), laid([BOS, A, A, EOS]))

    def packed(documents: Any) -> dict[str, np.ndarray]:
        image = np.stack([*(each for _, images in documents for each in images), np.zeros((2, 2, 1), np.uint8)])
        found = row([tokens for tokens, _ in documents], MODEL.inputs, PAD) | {"image": image}
        return {name: value[None] for name, value in found.items()}

    def likelihood(batch: dict[str, np.ndarray], last: int) -> float:
        batch = {**batch, "target": batch["target"] & (np.arange(CONTEXT) < last)}
        return float(MODEL.log_likelihood(variables, batch, KEY)[0])

    one, two = packed(first), packed(other)
    assert likelihood(one, 8) == pytest.approx(likelihood(two, 8), rel=1e-5)
    alone = rows([BOS, A, IMAGES[5], EOS])
    assert likelihood(one, 9) == pytest.approx(float(MODEL.log_likelihood(variables, alone, KEY)[0]), rel=1e-5)


PROMPTS: dict[str, list[list[Any]]] = {
    "texts": [[BOS, A], [BOS, B, A, A]],
    "images": [[BOS, IMAGES[5]], [BOS, A, IMAGES[40]]],
}


def prompt(documents: list[list[Any]]) -> dict[str, np.ndarray]:
    tokens, images = zip(*(laid(each) for each in documents), strict=True)
    stated = [each._replace(target=np.zeros(len(each.tokens), bool)) for each in tokens]
    fields = left_padded(stated, MODEL.inputs, PAD)
    image = np.zeros((len(documents), *MODEL.inputs["image"].shape), np.uint8)
    for place, each in zip(image, images, strict=True):
        place[: len(each)] = each if each else 0
    return fields | {"image": image}


def drawn_again(
    variables: Any, documents: list[list[Any]], order: tuple[str, ...], length: int, sampling: Sampling
) -> list[list[int]]:
    """The likeliest token after the other, each of everything read anew; of the first step, in plain words."""
    codes = range(CODE, CODE + 3)
    texts = [PAD, A, B]
    found = []
    for document in documents:
        flat, images = [], []
        for each in document:
            images += [*range(len(flat), len(flat) + SPAN)] if isinstance(each, np.ndarray) else []
            flat += in_tokens(variables, each) if isinstance(each, np.ndarray) else [each]
        own = list(flat)
        shown = [token for place, token in enumerate(flat) if place in images]
        for number, kind in enumerate(order):
            if kind == "text":
                last = number == len(order) - 1
                for _ in range(length):
                    logits = next_logits(variables, [own])[0]
                    token = max([*texts, BEGIN, *[EOS] * last], key=lambda each: logits[each])
                    if token == BEGIN:
                        break
                    own.append(token)
                    if token == EOS:
                        break
                continue
            image = [BEGIN]
            for _ in range(4):
                ways = [own + image, [BOS, *image], [BOS, *shown, *image]]
                told, nothing, seen = next_logits(variables, ways)
                middle = (
                    nothing if sampling.image_guidance is None else nothing + sampling.image_guidance * (seen - nothing)
                )
                base = nothing if sampling.image_guidance is None else seen
                logits = middle + sampling.guidance * (told - base)
                image.append(max(codes, key=lambda each: logits[each]))
            own += [*image, END]
            shown += [*image, END]
        found.append(own)
    return found


@pytest.mark.parametrize(
    ("given", "order", "sampling"),
    [
        ("texts", ("image",), Sampling()),
        ("texts", ("image",), Sampling(guidance=3.0)),
        ("images", ("image",), Sampling(guidance=3.0, image_guidance=1.5)),
        ("images", ("text",), Sampling(length=3)),
        ("texts", ("text", "image"), Sampling(length=3, guidance=2.0)),
        ("texts", ("image", "text"), Sampling(length=3)),
        ("images", ("text", "image"), Sampling(length=2, guidance=5.0, image_guidance=2.0)),
    ],
)
def test_the_cache_draws_what_the_whole_document_says_in_every_order(variables, given, order, sampling):
    """Of prompts of two lengths, padded on the left; codes alone within an image, and none of them in a text."""
    documents = PROMPTS[given]
    generate = jax.jit(partial(PLAIN.generate, order=order, temperature=0.0, sampling=sampling))
    found = generate(variables, KEY, prompt(documents))
    again = drawn_again(variables, documents, order, sampling.length or 0, sampling)
    tokens, segment, target = (np.asarray(found[name]) for name in ("tokens", "segment", "target"))
    lengths = [sum(SPAN if isinstance(part, np.ndarray) else 1 for part in each) for each in documents]
    for place, expected in enumerate(again):
        assert tokens[place][segment[place] > 0].tolist() == expected
        assert target[place].sum() == len(expected) - lengths[place]
    if "image" in order:
        number = MODEL.inputs["image"].shape[0]
        at = np.asarray(found["image_at"])[:, number]
        codes = np.stack([each[start + 1 : start + 5] for each, start in zip(tokens, at, strict=True)]) - CODE
        decoded = build(FIRST).decode(part(variables, "first"), codes.reshape(-1, 2, 2))
        np.testing.assert_array_equal(np.asarray(found["image"])[:, number], decoded)


def test_guidance_goes_from_nothing_by_way_of_images_to_all():
    """2211.09800, equation 3, by hand: of weights that sum to one."""
    told, nothing, images = (jnp.float32([[value]]) for value in (7.0, 1.0, 3.0))
    np.testing.assert_allclose(guided([told], 3.0, None), [[7.0]])
    np.testing.assert_allclose(guided([told, nothing], 3.0, None), [[1 + 3 * 6]])
    np.testing.assert_allclose(guided([told, nothing, images], 3.0, 1.5), [[1 + 1.5 * 2 + 3 * 4]])


def test_an_image_is_sampled_of_its_text_and_without_one(variables):
    sampling = Sampling(guidance=2.0)
    tokens = np.int32([[BOS, A, EOS, PAD, PAD], [BOS, B, A, A, EOS]])
    length = MODEL.conditions["tokens"].shape[0]
    tokens = np.pad(tokens, ((0, 0), (0, length - 5)))
    draw = jax.jit(partial(PLAIN.sample, temperature=0.0, sampling=sampling), static_argnames="num")
    found = draw(variables, KEY, {"tokens": tokens}, num=2)
    generate = partial(PLAIN.generate, order=("image",), temperature=0.0, sampling=sampling)
    expected = generate(variables, KEY, prompt(PROMPTS["texts"]))
    np.testing.assert_array_equal(found, expected["image"][:, -1])
    nothing = generate(variables, KEY, prompt([[BOS], [BOS]]))
    np.testing.assert_array_equal(draw(variables, KEY, {}, num=2), nothing["image"][:, -1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": AUTOENCODER}, "does not encode images as codes and decode them"),
        ({"code_at": CODE + 1}, "the 3 codes are the tokens from 8 on, and vocab_size is 10: make it at least 11"),
        ({"end_id": CODE + 2}, "end_id is 9, which is one of the codes: choose another"),
        ({"end_id": BEGIN}, "begin_id is 5, which another mark is as well: choose another"),
        ({"begin_id": VOCABULARY}, "begin_id is 10: it must be below vocab_size, which is 10"),
        ({"images": 0}, "images is 0: a row must have room for 1 at least"),
        ({"z_loss": -1.0}, "z_loss is -1.0: it must be a number, at least 0"),
        (
            {"language": replace(CONFIG.language, context_length=8)},
            "an image takes 6 places and the context_length is 8",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        chameleon.build(replace(CONFIG, **change))


@pytest.mark.parametrize(
    ("order", "sampling", "message"),
    [
        (("text", "text"), Sampling(length=2), "two texts in a row are one: name it once"),
        (
            ("image", "image", "image"),
            Sampling(),
            "4 tokens, 18 of images and 0 of texts are 22, and the model's context",
        ),
        (("text", "image"), Sampling(length=9), "4 tokens, 6 of images and 9 of texts are 19"),
    ],
)
def test_orders_that_do_not_fit_are_refused(variables, order, sampling, message):
    with pytest.raises(UserError, match=re.escape(message)):
        PLAIN.generate(variables, KEY, prompt(PROMPTS["texts"]), order=order, sampling=sampling)


def test_a_row_that_ends_in_padding_is_refused(variables):
    batch = prompt(PROMPTS["texts"])
    batch["segment"][0, -1] = 0
    with pytest.raises(UserError, match=r"ends in padding \(segment 0\): pad on the left"):
        PLAIN.generate(variables, KEY, batch, order=("image",))


@pytest.mark.parametrize("name", ["guidance", "image_guidance"])
def test_guidance_is_a_number(name: str):
    with pytest.raises(UserError, match=rf"sampling\.{name} is -1\.0: it must be a number, at least 0"):
        Sampling(**{name: -1.0})
