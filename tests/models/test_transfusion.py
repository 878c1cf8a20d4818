"""Transfusion: who sees whom against a double loop, what is drawn against everything read anew, losses by hand."""

import re
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from compiled import build, program
from reference import random_params
from smallest import AUTOENCODER, DECODER, VQVAE
from vlm_jax import models
from vlm_jax.contract import abstract_batch
from vlm_jax.data.fields import Tokens, left_padded, row
from vlm_jax.errors import UserError
from vlm_jax.models import language, transfusion
from vlm_jax.models.parts.mixed_network import MixedNetwork
from vlm_jax.models.parts.noised_images import CodedPixels, Latents, Pixels, masked_patches, noised
from vlm_jax.models.parts.own_codes import OwnCodes, balanced, moved, nearest, pooled
from vlm_jax.models.transfusion import Config, Sampling
from vlm_jax.nn.decoder import SeparateDecoderConfig
from vlm_jax.nn.image_patches import ConvolutionalPatches, LinearPatches, UNetPatches
from vlm_jax.nn.joint_vocabulary import guided
from vlm_jax.nn.sequence import attention_mask, image_numbers, place_images, positions
from vlm_jax.nn.vocabulary import token_logits
from vlm_jax.sampling.diffusion import SOLVERS, Denoised
from vlm_jax.trees import leaves_by_path, map_with_path

KEY = jax.random.key(0)
PAD, BOS, EOS, A, B, BEGIN, END = range(7)
VOCABULARY, LENGTH, CONTEXT = END + 1, 4, 20
CODE, CODES, UNTOLD = VOCABULARY, 3, VOCABULARY + 3
"""Tokens of codes, of the model that names them: four of three for each image."""
PIXELS = Pixels(
    image_size=4, channels=1, levels=3, patches=LinearPatches(patch_size=2, bottleneck=3), read_noise_share=0.0
)
SHALLOW = replace(DECODER, dropout=0.0, norm_eps=1e-5)
CONFIG = Config(
    image=PIXELS,
    language=language.Config(vocab_size=VOCABULARY, context_length=CONTEXT, eos_id=EOS, decoder=SHALLOW),
    bos_id=BOS,
    begin_id=BEGIN,
    end_id=END,
    images=2,
)
LATENTS = replace(
    CONFIG,
    image=Latents(
        first=replace(AUTOENCODER, image_size=8, channels=1),
        patches=UNetPatches(widths=(4, 8), blocks=1, groups=2),
        timesteps=20,
        described_timesteps=10,
    ),
    language=replace(CONFIG.language, decoder=SeparateDecoderConfig(**(vars(SHALLOW) | {"qk_norm": "rms"}))),
)
CODED = replace(
    CONFIG,
    image=CodedPixels(
        **{field.name: getattr(PIXELS, field.name) for field in fields(PIXELS)},
        codes=OwnCodes(code_at=CODE, size=CODES, pool=1),
    ),
    language=replace(CONFIG.language, vocab_size=UNTOLD + 1, context_length=28),
)
CONFIGS = {"pixels": CONFIG, "latents": LATENTS, "coded": CODED}
NAMED = {"pixels": 0, "latents": 0, "coded": 4}
"""Codes of an image."""
SPAN = {name: 2 + codes + LENGTH for name, codes in NAMED.items()}
MODELS = {name: build(config) for name, config in CONFIGS.items()}
PLAIN = {name: models.build(config) for name, config in CONFIGS.items()}
IMAGES = {
    name: np.random.default_rng(0).integers(0, 3, (4, *model.inputs["image"].shape[1:])).astype(np.uint8)
    for name, model in MODELS.items()
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def variables(kind: str) -> Any:
    model = PLAIN[kind]
    shapes = jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 1))
    params = jax.tree.map(jnp.asarray, random_params({"params": shapes["params"]}, scale=0.7))
    rest = {name: tree for name, tree in shapes.items() if name not in ("params", "teacher")}
    found = params | jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), rest)
    if "teacher" in shapes:
        found["teacher"] = jax.tree.map(jnp.asarray, random_params(shapes["teacher"], scale=0.7, seed=1))
    return found


def laid(kind: str, document: list[Any]) -> tuple[Tokens, list[np.ndarray]]:
    """Tokens and images, of which all is to be predicted but the first token."""
    tokens, places, images = list[int](), list[int](), list[np.ndarray]()
    for each in document:
        if isinstance(each, np.ndarray):
            places.append(len(tokens))
            images.append(each)
        tokens += [PAD] * SPAN[kind] if isinstance(each, np.ndarray) else [each]
    return Tokens(np.array(tokens, np.int32), np.arange(len(tokens)) > 0, np.array(places, np.int32)), images


def rows(kind: str, *documents: list[Any]) -> dict[str, np.ndarray]:
    found = []
    for tokens, images in (laid(kind, each) for each in documents):
        image = np.zeros(MODELS[kind].inputs["image"].shape, np.uint8)
        image[: len(images)] = images if images else 0
        found.append(row([tokens], MODELS[kind].inputs, PAD) | {"image": image})
    return {name: np.stack([each[name] for each in found]) for name in found[0]}


def seen(kind: str, variables: Any, image: Any) -> jax.Array:
    """What is noised of images, the mean of latents."""
    images = noised(CONFIGS[kind].image)
    return images.drawn(images.stage(variables, image))


class Reader(MixedNetwork):
    """All that is said of a row, without a cache."""

    def everything(self, batch: Any, x: Any, time: Any) -> tuple[Any, Any]:
        _, output = self(batch, x, time)
        tokens, first = batch["tokens"], batch["image_at"] + 1 + self.codes
        read, _ = self.patches(x.reshape(-1, *x.shape[2:]), time.reshape(-1))
        inside = image_numbers(first, LENGTH, tokens.shape[1])
        y = place_images(self.embed(tokens), read.reshape(*first.shape, *read.shape[1:]), first)
        mask = attention_mask(batch["segment"], inside)
        y, _ = self.language.decoder(y, positions(batch["segment"]), mask, image=inside >= 0)
        return token_logits(y, self.language.outputs()), output


def network(kind: str, config: language.Config) -> Any:
    image = CONFIGS[kind].image
    return Reader(config, image.patches, noised(image).shape[-1], LENGTH, NAMED[kind])


READ = {
    name: program(partial(network(name, config.language).apply, method="everything"))
    for name, config in CONFIGS.items()
}


def still(kind: str, *shape: int) -> jax.Array:
    path = noised(CONFIGS[kind].image).path
    return jnp.full(shape, path.time(path.solved_times(1)[-1]), jnp.float32)


def marked(kind: str, batch: Any, told: Any = None) -> dict[str, Any]:
    """With what begins and ends each image, and its codes, or what stands for none."""
    tokens = np.array(batch["tokens"])
    for number, (each, places) in enumerate(zip(tokens, batch["image_at"], strict=True)):
        for image, place in enumerate(places):
            if place < len(each):
                own = [UNTOLD] * NAMED[kind] if told is None else [*told[number][image]]
                each[place : place + SPAN[kind]] = [BEGIN, *own, *[0] * LENGTH, END]
    return {**batch, "tokens": tokens}


def read(kind: str, variables: Any, batch: Any) -> jax.Array:
    x = seen(kind, variables, jnp.asarray(batch["image"]).reshape(-1, *batch["image"].shape[2:]))
    return x.reshape(*batch["image"].shape[:2], *x.shape[1:])


def test_who_sees_whom_is_as_a_double_loop_says(kind, variables):
    """Of one layer, through which a place says something of exactly those that it attends to. Two documents in a row,
    the first of two images with a text after them."""
    one, two = IMAGES[kind][:2]
    config = replace(CONFIGS[kind], language=replace(CONFIGS[kind].language, context_length=40))
    model = models.build(config)
    (first, images), (second, _) = laid(kind, [BOS, one, A, two, B, EOS]), laid(kind, [BOS, B, A, EOS])
    batch = {name: value[None] for name, value in row([first, second], model.inputs, PAD).items()}
    batch = marked(kind, batch | {"image": np.stack(images)[None]})
    # Queries of next to nothing attend to all that they see alike, and small patches do not drown what they see.
    small = r"query|reader/patch"
    variables = map_with_path(lambda path, leaf: 1e-4 * leaf if re.search(small, path) else leaf, variables)
    x, length = read(kind, variables, batch), 40
    module = network(kind, config.language)
    said = jax.jit(
        lambda tokens, x: module.apply(
            variables, {**batch, "tokens": tokens}, x, still(kind, 1, 2), method="everything"
        )[0][0]
    )
    patches = np.full(length, -1)
    for number, place in enumerate(batch["image_at"][0]):
        patches[place + SPAN[kind] - 1 - LENGTH : place + SPAN[kind] - 1] = number
    before = said(batch["tokens"], x)
    for j in range(length):
        if patches[j] >= 0:  # every patch of an image sees all of it, and its blocks may look over the edges
            moved = said(batch["tokens"], x.at[0, patches[j]].add(jax.random.normal(KEY, x.shape[2:])))
        else:
            tokens = batch["tokens"].copy()
            tokens[0, j] = (tokens[0, j] + 1) % VOCABULARY
            moved = said(tokens, x)
        changed = np.abs(moved - before).max(axis=1) > 1e-6
        for i in range(length):
            same = batch["segment"][0, i] == batch["segment"][0, j]
            source = [j] if patches[j] < 0 else np.flatnonzero(patches == patches[j])
            sees = any(same and (k <= i or (patches[k] >= 0 and patches[k] == patches[i])) for k in source)
            assert changed[i] == sees, (i, j)


def test_texts_are_learned_by_their_likelihood_and_images_by_their_squared_error(kind, variables):
    """A mean over tokens and patches; what begins an image is a token, and what ends it is not."""
    one, two = IMAGES[kind][:2]
    batch = rows(kind, [BOS, A, one, EOS], [BOS, B, A, EOS], [BOS, two, B, EOS])
    batch["target"][2, 1 : 1 + SPAN[kind]] = False  # read, not drawn
    loss, aux = MODELS[kind].loss(variables, batch, KEY, 0, train=False)
    tokens = (2 + 1) + 3 + 2 + NAMED[kind]
    assert aux.weight == tokens + LENGTH
    np.testing.assert_allclose(aux.metrics["text_share"], tokens / (tokens + LENGTH), rtol=1e-6)
    np.testing.assert_allclose(loss, aux.metrics["text"] + aux.metrics["image"], rtol=1e-6)
    if kind == "latents":
        return  # the image that is read is a draw of its latents
    logits, _ = READ[kind](variables, marked(kind, batch), read(kind, variables, batch), still(kind, 3, 2))
    said = np.asarray(jax.nn.log_softmax(logits))
    known = said[0, 0, A] + said[0, 1, BEGIN] + said[1, 0, B] + said[1, 1, A] + said[1, 2, EOS]
    known += said[2, SPAN[kind], B] + said[2, SPAN[kind] + 1, EOS]
    if kind == "coded":
        return  # its codes are of an image that has noise after them: the likelihood tells them apart
    rest = -float(aux.metrics["text"]) * float(aux.weight) - known
    assert rest < 0  # the end of the first, after an image that has noise
    batch["target"][0, 2 + SPAN[kind] :] = False
    _, aux = MODELS[kind].loss(variables, batch, KEY, 0, train=False)
    np.testing.assert_allclose(-float(aux.metrics["text"]) * float(aux.weight), known, rtol=1e-5)


@pytest.mark.parametrize("kind", ["latents"], indirect=True)
def test_noise_that_is_not_predicted_at_all_costs_its_variance_times_its_weight(kind, variables):
    silent = map_with_path(lambda path, leaf: 0 * leaf if "writer/last" in path else leaf, variables)
    many = rows(kind, *[[BOS, IMAGES[kind][n % 4], EOS] for n in range(256)])
    _, aux = MODELS[kind].loss(silent, many, KEY, 0, train=False)
    assert aux.weight == 256 * (2 + LENGTH)
    found = float(aux.metrics["image"]) * (2 + LENGTH) / LENGTH
    assert found == pytest.approx(5.0, rel=4 * (2 / (256 * 32)) ** 0.5)


@pytest.mark.parametrize("kind", ["pixels"], indirect=True)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts_by_their_weights(kind, variables):
    """With unequal masks, of rows that have no noise."""
    one = IMAGES[kind][0]
    documents = [[BOS, A, B, A, EOS], [BOS, EOS], [BOS, one, B, EOS], [BOS, B, EOS]]
    batch = rows(kind, *documents)
    batch["target"][2, 1 : 1 + SPAN[kind]] = False
    whole, aux = MODELS[kind].loss(variables, batch, KEY, 0, train=False)
    parts = [
        MODELS[kind].loss(variables, {name: value[n : n + 1] for name, value in batch.items()}, KEY, 0, train=False)
        for n in range(4)
    ]
    weights = [float(part.weight) for _, part in parts]
    assert weights == [4, 1, 2, 2] and sum(weights) == aux.weight
    np.testing.assert_allclose(whole, np.average([value for value, _ in parts], weights=weights), rtol=1e-5)


def test_the_likelihood_of_texts_is_exact_whatever_images_are_drawn_beside(kind, variables):
    one = IMAGES[kind][0]
    batch = rows(kind, [BOS, one, A, EOS], [BOS, B, A, EOS])
    batch["target"][0, 1 : 1 + SPAN[kind]] = False
    found = np.asarray(MODELS[kind].log_likelihood(variables, batch, KEY), np.float64)
    logits, _ = READ[kind](variables, marked(kind, batch), read(kind, variables, batch), still(kind, 2, 2))
    log_probs = np.asarray(logits, np.float64) - scipy.special.logsumexp(
        np.asarray(logits, np.float64), axis=-1, keepdims=True
    )
    np.testing.assert_allclose(found[0], log_probs[0, SPAN[kind], A] + log_probs[0, SPAN[kind] + 1, EOS], rtol=1e-4)
    np.testing.assert_allclose(found[1], log_probs[1, 0, B] + log_probs[1, 1, A] + log_probs[1, 2, EOS], rtol=1e-4)
    assert np.asarray(MODELS[kind].count(batch)).tolist() == [2, 3]
    batch["target"][0, 1 : 1 + SPAN[kind]] = True
    drawn = float(MODELS[kind].log_likelihood(variables, batch, KEY)[0])
    assert drawn < found[0]
    assert int(MODELS[kind].count(batch)[0]) == 2 + one.size


def test_images_are_noised_by_what_they_are_for():
    """Those that texts follow, little; those that are read, not at all."""
    target, described = (jnp.tile(jnp.array(each), 1000) for each in ([True, True, False], [False, True, True]))
    t, learned, counts = noised(LATENTS.image).times(KEY, target, described, train=True)
    t = np.asarray(t).reshape(1000, 3).T
    assert set(t[0]) <= {*range(1, 21)} and t[0].max() > 15
    assert set(t[1]) == {*range(1, 11)}
    assert not t[2].any() and np.array_equal(learned, target) and (np.asarray(counts) == 1).all()
    image = replace(PIXELS, read_noise_share=0.1, even_share=0.15)
    for train in (True, False):
        t, learned, counts = noised(image).times(KEY, target, described, train=train)
        even = np.asarray(counts) != 1
        assert abs(even.mean() - 0.15) < 0.03
        drawn = even & np.asarray(learned)
        np.testing.assert_allclose(np.asarray(counts)[drawn], np.maximum(np.asarray(t)[drawn], 0.05) ** 2, rtol=1e-6)
        t = np.asarray(t).reshape(1000, 3).T
        assert (t[0] > 0).all() and np.array_equal(learned, target & ~described)
        assert t[1:].max() <= 0.1
        assert abs((t[1:] > 0).mean() - 0.1 * train) < 0.035


def test_an_error_in_the_noise_at_the_end_of_the_chain_is_taken_for_no_latents_that_cannot_be():
    """There latents are 1/20,000 of what is seen: 1% of the noise would be hundreds of deviations."""
    path, eps = noised(replace(LATENTS.image, timesteps=1000)).path, jax.random.normal(KEY, (2, 4, 4, 1))
    x, t = jnp.clip(jax.random.normal(jax.random.key(1), eps.shape), -3, 3), jnp.array([1000, 500])
    x_t = path.noisy(x, t, eps)
    wrong = path.data(0.99 * eps, x_t, t)
    assert (
        float(jnp.abs(wrong[0]).max()) == 8
        and float(jnp.abs(path._replace(clip=None).data(0.99 * eps, x_t, t)).max()) > 100
    )
    np.testing.assert_allclose(path.data(eps, x_t, t)[1], x[1], atol=1e-5)
    path = noised(replace(LATENTS.image, timesteps=1000, predict="v")).path
    alpha, sigma = (each[:, None, None, None] for each in path.level(t))
    found = path.data(0.99 * (alpha * eps - sigma * x), x_t, t)
    assert 0 < float(jnp.abs(found - x).max()) < 0.01 * 5


def test_half_of_the_images_lose_up_to_half_of_their_patches():
    some = jnp.arange(4000).reshape(-1, 2) % 4 > 0
    masked = np.asarray(masked_patches(KEY, some, 64))
    assert not masked[~np.asarray(some)].any()
    shares = masked[np.asarray(some)].mean(axis=1)
    assert abs((shares > 0).mean() - 0.5) < 0.05 and shares.max() < 0.75
    assert abs(shares.mean() - 0.125) < 0.01


@pytest.mark.parametrize("kind", ["coded"], indirect=True)
def test_the_likelihood_of_an_image_is_of_its_codes_and_of_its_pixels_given_them(kind, variables):
    one, two = IMAGES[kind][:2]
    batch = rows(kind, [BOS, A, one, EOS], [BOS, two, B, EOS])
    found = np.asarray(MODELS[kind].log_likelihood(variables, batch, KEY), np.float64)
    x, images = read(kind, variables, batch), noised(CONFIGS[kind].image)
    teacher = network(kind, CODED.language).apply(
        {"params": variables["teacher"]["params"]}, x[:, 0], still(kind, 2), method="look"
    )
    codes = CODE + np.asarray(nearest(pooled(teacher, 1), variables["teacher"]["prototypes"]))
    told = np.stack([codes, np.full_like(codes, UNTOLD)], axis=1)

    def likely(batch: dict[str, Any]) -> np.ndarray:
        """Of the token after each place."""
        logits, _ = READ[kind](variables, batch, x, still(kind, 2, 2))
        log_probs = jax.nn.log_softmax(logits)
        return np.asarray(jnp.take_along_axis(log_probs, jnp.roll(batch["tokens"], -1, axis=1)[..., None], axis=-1))[
            ..., 0
        ]

    def output(x_t: Any, t: Any) -> Any:
        time = still(kind, 2, 2).at[:, 0].set(images.path.time(t))
        return READ[kind](variables, marked(kind, batch, told), x.at[:, 0].set(x_t), time)[1][:, 0]

    plain, named = likely(marked(kind, batch)), likely(marked(kind, batch, told))
    pixels = images.log_likelihood(variables, batch["image"][:, 0], output, jax.random.fold_in(KEY, 0))
    texts = [plain[0, [0, 1, 1 + SPAN[kind]]].sum(), plain[1, [0, SPAN[kind], 1 + SPAN[kind]]].sum()]
    own = [named[0, 2 : 2 + NAMED[kind]].sum(), named[1, 1 : 1 + NAMED[kind]].sum()]
    np.testing.assert_allclose(found, np.array(texts) + np.array(own) + np.asarray(pixels), rtol=1e-4)


@pytest.mark.parametrize("kind", ["coded"], indirect=True)
def test_the_copy_and_the_prototypes_move_in_training_alone_and_have_no_gradient(kind, variables):
    batch = rows(kind, [BOS, A, IMAGES[kind][0], EOS], [BOS, IMAGES[kind][1], B, EOS])
    _, trained = MODELS[kind].loss(variables, batch, KEY, 0, train=True)
    _, evaluated = MODELS[kind].loss(variables, batch, KEY, 0, train=False)
    before = leaves_by_path(variables["teacher"])
    after, still_there = (leaves_by_path(aux.state["teacher"]) for aux in (trained, evaluated))
    own = leaves_by_path({"params": variables["params"]})
    for path, leaf in before.items():
        np.testing.assert_array_equal(still_there[path], leaf)
        if path != "prototypes":
            np.testing.assert_allclose(after[path], 0.996 * leaf + 0.004 * own[path], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(after["prototypes"], axis=1), 1, rtol=1e-5)


def test_prototypes_have_equal_shares_and_follow_what_is_theirs():
    similarity = jax.random.uniform(KEY, (600, 4), minval=-0.2, maxval=0.2)
    similarity = similarity.at[:, 0].add(0.1)  # which without balance would take most
    real = jnp.arange(600) < 400
    shares = np.asarray(balanced(similarity, real))
    np.testing.assert_allclose(shares.sum(axis=1), np.where(real, 1, 0), rtol=1e-4)
    np.testing.assert_allclose(shares.sum(axis=0), 100, rtol=0.1)
    config = OwnCodes(code_at=0, size=2, prototype_decay=0.5)
    params = {"reader": jnp.ones(1), "language": {"decoder": jnp.ones(1)}}
    teacher = {"params": params, "prototypes": jnp.float32([[1, 0], [0, 1]])}
    features = jnp.float32([[[0.8, 0.6]], [[0.6, 0.8]]])
    near = moved(teacher, params, features, jnp.array([True, True]), config)["prototypes"]
    share = float(balanced(features[:, 0] @ teacher["prototypes"].T, jnp.array([True, True]))[0, 0])
    mean = np.float32([0.8, 0.6]) * share + np.float32([0.6, 0.8]) * (1 - share)
    expected = np.float32([1, 0]) + mean / np.linalg.norm(mean)
    np.testing.assert_allclose(near[0], expected / np.linalg.norm(expected), rtol=1e-4)


def prompt(kind: str, documents: list[list[Any]]) -> dict[str, np.ndarray]:
    tokens, images = zip(*(laid(kind, each) for each in documents), strict=True)
    stated = [each._replace(target=np.zeros(len(each.tokens), bool)) for each in tokens]
    image = np.zeros((len(documents), *MODELS[kind].inputs["image"].shape), np.uint8)
    for place, each in zip(image, images, strict=True):
        place[: len(each)] = each if each else 0
    return left_padded(stated, MODELS[kind].inputs, PAD) | {"image": image}


class Document:
    """Of one row: tokens and, at the places of images, what is noised."""

    def __init__(self, kind: str, variables: Any, parts: list[Any]) -> None:
        self.kind, self.variables = kind, variables
        tokens, images = laid(kind, parts)
        self.tokens, self.at = tokens.tokens.tolist(), tokens.image_at.tolist()
        self.x = [np.asarray(seen(kind, variables, each[None])[0]) for each in images]

    def said(
        self, x: list[Any], places: list[int], tokens: list[int], times: list[Any], told: Any = None
    ) -> tuple[Any, Any]:
        """Of which the last image is told codes, as far as there are some."""
        room = 60
        batch: dict[str, Any] = {
            "tokens": np.int32([tokens + [0] * (room - len(tokens))]),
            "segment": np.int32([[1] * len(tokens) + [0] * (room - len(tokens))]),
            "image_at": np.int32([places + [room] * (4 - len(places))]),
        }
        blank = np.zeros(noised(CONFIGS[self.kind].image).shape, np.float32)
        images = jnp.stack([*map(jnp.asarray, x), *[blank] * (4 - len(x))])[None]
        time = jnp.concatenate([*(jnp.reshape(each, 1) for each in times), still(self.kind, 4 - len(x))])[None]
        batch = marked(self.kind, batch)
        if told is not None:
            batch["tokens"][0, places[-1] + 1 : places[-1] + 1 + len(told)] = told
        return READ[self.kind](self.variables, batch, images, time)

    def next_logits(self) -> np.ndarray:
        logits, _ = self.said(self.x, self.at, self.tokens, [still(self.kind)] * len(self.x))
        return np.asarray(logits[0, len(self.tokens) - 1])

    def next_image(self, x_t: Any, time: Any, shown: str, told: Any) -> tuple[Any, Any, int]:
        """What is said where an image comes next, told all, images alone or nothing of what is before it."""
        tokens, at, x = list(self.tokens), list(self.at), list(self.x)
        if shown != "all":
            x, span = x if shown == "images" else [], SPAN[self.kind]
            tokens, at = [BOS, *[PAD] * (span * len(x))], [1 + span * n for n in range(len(x))]
        at, tokens = [*at, len(tokens)], [*tokens, *[PAD] * SPAN[self.kind]]
        logits, output = self.said([*x, x_t], at, tokens, [*[still(self.kind)] * len(x), time], told)
        return logits[0], output[0, len(x)], at[-1]

    def codes(self, ways: list[str], sampling: Sampling) -> list[int]:
        """The likeliest, one after the other."""
        found: list[int] = []
        blank = np.zeros(noised(CONFIGS[self.kind].image).shape, np.float32)
        for _ in range(NAMED[self.kind]):
            said = []
            for each in ways:
                logits, _, at = self.next_image(blank, still(self.kind), each, found)
                said.append(logits[at + len(found)][None])
            mixed = guided(said, sampling.code_guidance, sampling.image_guidance)[0]
            found.append(CODE + int(jnp.argmax(mixed[CODE : CODE + CODES])))
        return found

    def draw(self, noise: Any, sampling: Sampling) -> np.ndarray:
        images = noised(CONFIGS[self.kind].image)
        path = images.path

        ways = ["all", "nothing"][: 1 if sampling.guidance == 1 and self.kind != "coded" else 2]
        ways += ["images"] if sampling.image_guidance is not None else []
        named = self.codes(ways, sampling)

        def denoise(x: Any, t: Any) -> Denoised:
            time = path.time(t).astype(jnp.float32)
            told = [named if each == "all" else [] for each in ways]
            outputs = [self.next_image(x[0], time, *each)[1][None] for each in zip(ways, told, strict=True)]
            data = [path.data(each, x, jnp.reshape(t, 1)) for each in outputs]
            return Denoised(guided(data, sampling.guidance, sampling.image_guidance))

        solve = SOLVERS[sampling.solver]
        x = solve(denoise, path.level, path.solved_times(sampling.steps), noise[None], KEY)
        image = images.show(self.variables, x)
        self.at.append(len(self.tokens))
        self.tokens += [PAD] * SPAN[self.kind]
        self.x.append(np.asarray((x if self.kind == "latents" else seen(self.kind, self.variables, image))[0]))
        return np.asarray(image[0])


@pytest.mark.parametrize(
    ("documents", "order", "sampling"),
    [
        ([[BOS, A], [BOS, B, A, A]], ("image",), Sampling(guidance=3.0)),
        ([[BOS, "one"], [BOS, A, "two"]], ("image",), Sampling(guidance=3.0, image_guidance=1.5)),
        ([[BOS, "one"], [BOS, A, "two"]], ("text",), Sampling(length=3)),
        ([[BOS, A], [BOS, B, A, A]], ("text", "image"), Sampling(length=3, guidance=2.0)),
        ([[BOS, A], [BOS, B, A, A]], ("image", "text"), Sampling(length=3)),
        ([[BOS, "one"], [BOS, A, "two"]], ("text", "image", "text"), Sampling(length=2, guidance=2.0)),
    ],
)
def test_the_cache_draws_what_everything_read_anew_says(kind, variables, documents, order, sampling):
    """Of prompts of two lengths, padded on the left, the likeliest tokens and images of known noise."""
    named = {"one": IMAGES[kind][0], "two": IMAGES[kind][1]}
    documents = [[named.get(part, part) if isinstance(part, str) else part for part in each] for each in documents]
    sampling = replace(sampling, solver="ddim", steps=3)
    room = replace(CONFIGS[kind], language=replace(CONFIGS[kind].language, context_length=60))
    generate = jax.jit(partial(models.build(room).generate, order=order, temperature=0.0, sampling=sampling))
    # Without noise there would be no image: the temperature is that of the tokens alone.
    found = jax.tree.map(np.asarray, generate(variables, KEY, prompt(kind, documents)))
    shape = noised(CONFIGS[kind].image).shape
    for number, parts in enumerate(documents):
        document, drawn = Document(kind, variables, parts), []
        start = len(document.tokens)
        for place, each in enumerate(order):
            if each == "image":
                drawn.append(document.draw(jnp.zeros(shape), sampling))
                continue
            last = place == len(order) - 1
            for _ in range(sampling.length or 0):
                logits = document.next_logits()
                token = max([PAD, A, B, BEGIN, *[EOS] * last], key=lambda one: logits[one])
                if token != BEGIN:
                    document.tokens.append(token)
                if token in (BEGIN, EOS):
                    break
        segment = found["segment"][number] > 0
        assert (
            found["tokens"][number][segment].tolist()
            == marked(kind, {"tokens": np.int32([document.tokens]), "image_at": np.int32([document.at])})["tokens"][
                0
            ].tolist()
        )
        assert found["target"][number].sum() == len(document.tokens) - start
        for one, other in zip(drawn, found["image"][number, 2:], strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_an_image_is_sampled_of_its_text_and_without_one(kind, variables):
    sampling = Sampling(guidance=2.0, solver="ddim", steps=2)
    model, length = PLAIN[kind], MODELS[kind].conditions["tokens"].shape[0]
    tokens = np.pad(np.int32([[BOS, A, EOS, PAD, PAD], [BOS, B, A, A, EOS]]), ((0, 0), (0, length - 5)))
    steps = []
    found = model.sample(
        variables, KEY, {"tokens": tokens}, num=2, sampling=sampling, on_step=lambda step, x: steps.append(int(step))
    )
    expected = model.generate(
        variables, KEY, prompt(kind, [[BOS, A], [BOS, B, A, A]]), order=("image",), sampling=sampling
    )
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected["image"][:, -1]).astype(int)).max() <= 1
    jax.effects_barrier()
    assert steps == [1, 2]
    assert model.sample(variables, KEY, {}, num=3, sampling=sampling).shape == (3, *IMAGES[kind].shape[1:])


def test_gradients_reach_all_but_the_first_stage(kind, variables):
    batch = rows(kind, [BOS, A, IMAGES[kind][0], EOS], [BOS, IMAGES[kind][1], B, EOS])
    gradient = jax.jit(jax.grad(lambda p: PLAIN[kind].loss({**variables, "params": p}, batch, KEY, 0, train=True)[0]))(
        variables["params"]
    )
    still = {path for path, leaf in leaves_by_path(gradient).items() if not np.abs(leaf).any()}
    assert still == {path for path in leaves_by_path(gradient) if path.startswith("image/first/")}


@pytest.mark.slow
def test_of_wide_patches_it_is_the_image_that_a_narrow_model_can_predict():
    """Of 256 pixels with a width of 8, images of two dimensions: noise has too many, and so has what holds noise
    (2511.13720, figure 2). The twins differ in what is predicted alone: the loss is one error of the velocity."""
    place = 2 * np.pi * np.random.default_rng(0).uniform(size=(16, 16, 1))
    directions = np.stack([np.cos(place), np.sin(place)]).reshape(2, -1)
    count, span = 64, 3
    blank = {
        "tokens": np.full((count, 8), PAD, np.int32),
        "target": np.tile(np.arange(8) < 1 + span, (count, 1)) & (np.arange(8) > 0),
        "segment": np.tile(np.int32(np.arange(8) < 1 + span), (count, 1)),
        "image_at": np.ones((count, 1), np.int32),
    }
    blank["tokens"][:, 0] = BOS

    def unlike_images(predict: Any) -> float:
        """The root mean square of what of drawings lies at a right angle to all images, of 256 levels."""
        patches = LinearPatches(patch_size=16)
        pixels = Pixels(image_size=16, channels=1, patches=patches, predict=predict, read_noise_share=0.0)
        model = models.build(
            replace(CONFIG, image=pixels, images=1, language=replace(CONFIG.language, context_length=8))
        )
        params = model.init(KEY, {**blank, "image": np.zeros((count, 1, 16, 16, 1), np.uint8)})["params"]
        optimizer = optax.adam(3e-3)

        @jax.jit
        def step(params: Any, state: Any, image: Any, key: Any) -> tuple[Any, Any]:
            def loss(params: Any) -> Any:
                return model.loss({"params": params}, {**blank, "image": image}, key, jnp.zeros((), int), train=True)[0]

            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        state, random = optimizer.init(params), np.random.default_rng(1)
        for index in range(300):
            angle = 2 * np.pi * random.uniform(size=(count, 1))
            image = 127.5 + 80 * (np.cos(angle) * directions[0] + np.sin(angle) * directions[1])
            image = np.round(image).astype(np.uint8).reshape(count, 1, 16, 16, 1)
            params, state = step(params, state, image, jax.random.fold_in(KEY, index))
        drawn = model.sample({"params": params}, KEY, {}, num=count, sampling=Sampling(steps=10, solver="heun"))
        drawn = np.asarray(drawn, float).reshape(count, -1) - 127.5
        within = drawn @ np.linalg.pinv(directions) @ directions
        return float(np.sqrt(np.mean(np.square(drawn - within))))

    assert unlike_images("x") < 2
    assert unlike_images("velocity") > 40 and unlike_images("eps") > 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": replace(LATENTS.image, first=VQVAE)}, "does not encode images as one array of real numbers"),
        (
            {"image": replace(PIXELS, patches=LinearPatches(patch_size=3))},
            "4 pixels a side cannot be cut into patches of 3",
        ),
        ({"begin_id": EOS}, "begin_id is 2, which another mark is as well: choose another"),
        ({"end_id": 7}, "end_id is 7: it must be below vocab_size, which is 7"),
        (
            {"language": replace(CONFIG.language, context_length=7)},
            "an image takes 6 places and the context_length is 7",
        ),
    ],
)
def test_a_model_that_cannot_be_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        transfusion.build(replace(CONFIG, **change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(CONFIG, images=0), "images is 0: a row must have room for 1 at least"),
        (lambda: replace(LATENTS.image, clip=0.0), "clip is 0.0: it must be above 0"),
        (lambda: replace(CONFIG, image_weight=0.0), "image_weight is 0.0: it must be a number above 0"),
        (lambda: replace(PIXELS, even_share=1.5), "even_share is 1.5: a share lies in [0, 1]"),
        (lambda: replace(PIXELS, shift=0.0), "shift is 0.0: it must be above 0"),
        (
            lambda: replace(LATENTS.image, described_timesteps=21),
            "described_timesteps is 21: it must be above 1 and at most",
        ),
        (lambda: Sampling(image_guidance=-1.0), "sampling.image_guidance is -1.0: it must be a number, at least 0"),
        (lambda: OwnCodes(code_at=0, size=2, pool=0), "codes.pool is 0: it must be at least 1"),
        (lambda: OwnCodes(code_at=0, size=2, decay=1.0), "codes.decay is 1.0: it must be at least 0 and less than 1"),
        (lambda: OwnCodes(code_at=0, size=2, pool=3).of(16), "4 patches a side cannot be pooled in squares of 3"),
        (lambda: Sampling(code_guidance=-1.0), "sampling.code_guidance is -1.0: it must be a number, at least 0"),
        (lambda: Sampling(steps=0), "sampling.steps is 0: it must be at least 1"),
        (lambda: Sampling(length=0), "sampling.length is 0: at least 1 token must be drawn"),
        (
            lambda: UNetPatches(widths=(4,), groups=2, attention=(2,)),
            "attention is [2]: that of patches is the decoder's",
        ),
        (lambda: ConvolutionalPatches(patch_size=2, channels=0), "channels is 0: convolutions need at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("sampling", "order", "message"),
    [
        (
            Sampling(solver="heun", steps=2),
            ("image",),
            "sampling.solver is heun, which moves along a slope that a chain",
        ),
        (Sampling(steps=21), ("image",), "sampling.steps is 21 and the model's chain has timesteps=20"),
        (Sampling(steps=2), ("text", "text"), "two texts in a row are one: name it once"),
        (
            Sampling(steps=2),
            ("image",) * 4,
            "the model's context_length is 20: shorten the prompts, or sampling.length",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(sampling: Sampling, order: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        jax.eval_shape(
            lambda: PLAIN["latents"].generate({}, KEY, prompt("latents", [[BOS, A]]), order=order, sampling=sampling)
        )
