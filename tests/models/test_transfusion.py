"""Transfusion: who sees whom against a double loop, what is drawn against everything read anew, losses by hand."""

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
from vlm_jax.contract import abstract_batch
from vlm_jax.data.fields import Tokens, left_padded, row
from vlm_jax.errors import UserError
from vlm_jax.models import language, transfusion
from vlm_jax.models.parts.noised_images import Latents, Pixels, masked_patches, noised
from vlm_jax.models.transfusion import Config, Sampling, Transfusion
from vlm_jax.nn.decoder import SeparateDecoderConfig
from vlm_jax.nn.image_patches import ConvolutionalPatches, LinearPatches
from vlm_jax.nn.joint_vocabulary import guided
from vlm_jax.nn.sequence import attention_mask, image_numbers, place_images, positions
from vlm_jax.nn.vocabulary import token_logits
from vlm_jax.sampling.diffusion import SOLVERS, Denoised
from vlm_jax.trees import leaves_by_path, map_with_path

KEY = jax.random.key(0)
PAD, BOS, EOS, A, B, BEGIN, END = range(7)
VOCABULARY, LENGTH, SPAN, CONTEXT = END + 1, 4, 6, 16
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
        patches=ConvolutionalPatches(widths=(4, 8), blocks=1, groups=2),
        timesteps=20,
        described_timesteps=10,
    ),
    language=replace(CONFIG.language, decoder=SeparateDecoderConfig(**(vars(SHALLOW) | {"qk_norm": "rms"}))),
)
CONFIGS = {"pixels": CONFIG, "latents": LATENTS}
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
    rest = {name: tree for name, tree in shapes.items() if name != "params"}
    return params | jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), rest)


def laid(document: list[Any]) -> tuple[Tokens, list[np.ndarray]]:
    """Tokens and images, of which all is to be predicted but the first token."""
    tokens, places, images = list[int](), list[int](), list[np.ndarray]()
    for each in document:
        if isinstance(each, np.ndarray):
            places.append(len(tokens))
            images.append(each)
        tokens += [PAD] * SPAN if isinstance(each, np.ndarray) else [each]
    return Tokens(np.array(tokens, np.int32), np.arange(len(tokens)) > 0, np.array(places, np.int32)), images


def rows(kind: str, *documents: list[Any]) -> dict[str, np.ndarray]:
    found = []
    for tokens, images in map(laid, documents):
        image = np.zeros(MODELS[kind].inputs["image"].shape, np.uint8)
        image[: len(images)] = images if images else 0
        found.append(row([tokens], MODELS[kind].inputs, PAD) | {"image": image})
    return {name: np.stack([each[name] for each in found]) for name in found[0]}


class Reader(Transfusion):
    """All that is said of a row, without a cache."""

    def everything(self, batch: Any, x: Any, time: Any) -> tuple[Any, Any]:
        _, output = self(batch, x, time)
        tokens, first = batch["tokens"], batch["image_at"] + 1
        read, _ = self.patches(x.reshape(-1, *x.shape[2:]), time.reshape(-1))
        inside = image_numbers(first, LENGTH, tokens.shape[1])
        y = place_images(self.embed(tokens), read.reshape(*first.shape, *read.shape[1:]), first)
        mask = attention_mask(batch["segment"], inside)
        y, _ = self.language.decoder(y, positions(batch["segment"]), mask, image=inside >= 0)
        return token_logits(y, self.language.outputs()), output


READ = {
    name: program(partial(Reader(config, noised(config.image).shape[-1], LENGTH).apply, method="everything"))
    for name, config in CONFIGS.items()
}


def still(kind: str, *shape: int) -> jax.Array:
    path = noised(CONFIGS[kind].image).path
    return jnp.full(shape, path.time(path.solved_times(1)[-1]), jnp.float32)


def marked(batch: Any) -> dict[str, Any]:
    """With what begins and ends each image."""
    tokens = np.array(batch["tokens"])
    for each, places in zip(tokens, batch["image_at"], strict=True):
        for place in places:
            if place < len(each):
                each[place], each[place + 1 : place + 1 + LENGTH], each[place + SPAN - 1] = BEGIN, 0, END
    return {**batch, "tokens": tokens}


def read(kind: str, variables: Any, batch: Any) -> jax.Array:
    images = noised(CONFIGS[kind].image)
    flat = jnp.asarray(batch["image"]).reshape(-1, *batch["image"].shape[2:])
    x = images.read(variables, flat)
    return x.reshape(*batch["image"].shape[:2], *x.shape[1:])


def test_who_sees_whom_is_as_a_double_loop_says(kind, variables):
    """Of one layer, through which a place says something of exactly those that it attends to. Two documents in a row,
    the first of two images with a text after them."""
    one, two = IMAGES[kind][:2]
    config = replace(CONFIGS[kind], language=replace(CONFIGS[kind].language, context_length=24))
    model = models.build(config)
    (first, images), (second, _) = laid([BOS, one, A, two, B, EOS]), laid([BOS, B, A, EOS])
    batch = {name: value[None] for name, value in row([first, second], model.inputs, PAD).items()}
    batch = marked(batch | {"image": np.stack(images)[None]})
    # Queries of next to nothing attend to all that they see alike, and small patches do not drown what they see.
    small = r"query|reader/patch"
    variables = map_with_path(lambda path, leaf: 1e-4 * leaf if re.search(small, path) else leaf, variables)
    x, length = read(kind, variables, batch), 24
    module: Any = Reader(config, x.shape[-1], LENGTH)
    said = jax.jit(
        lambda tokens, x: module.apply(
            variables, {**batch, "tokens": tokens}, x, still(kind, 1, 2), method="everything"
        )[0][0]
    )
    patches = np.full(length, -1)
    for number, place in enumerate(batch["image_at"][0]):
        patches[place + 1 : place + 1 + LENGTH] = number
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
    batch["target"][2, 1 : 1 + SPAN] = False  # read, not drawn
    loss, aux = MODELS[kind].loss(variables, batch, KEY, 0, train=False)
    tokens = (2 + 1) + 3 + 2
    assert aux.weight == tokens + LENGTH
    np.testing.assert_allclose(aux.metrics["text_share"], tokens / (tokens + LENGTH), rtol=1e-6)
    np.testing.assert_allclose(loss, aux.metrics["text"] + aux.metrics["image"], rtol=1e-6)
    if kind == "latents":
        return  # the image that is read is a draw of its latents
    logits, _ = READ[kind](variables, marked(batch), read(kind, variables, batch), still(kind, 3, 2))
    said = np.asarray(jax.nn.log_softmax(logits))
    known = said[0, 0, A] + said[0, 1, BEGIN] + said[1, 0, B] + said[1, 1, A] + said[1, 2, EOS]
    known += said[2, SPAN, B] + said[2, SPAN + 1, EOS]
    rest = -float(aux.metrics["text"]) * float(aux.weight) - known
    assert rest < 0  # the end of the first, after an image that has noise
    batch["target"][0, 2 + SPAN :] = False
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
    batch["target"][2, 1 : 1 + SPAN] = False
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
    batch["target"][0, 1 : 1 + SPAN] = False
    found = np.asarray(MODELS[kind].log_likelihood(variables, batch, KEY), np.float64)
    logits, _ = READ[kind](variables, marked(batch), read(kind, variables, batch), still(kind, 2, 2))
    log_probs = np.asarray(logits, np.float64) - scipy.special.logsumexp(
        np.asarray(logits, np.float64), axis=-1, keepdims=True
    )
    np.testing.assert_allclose(found[0], log_probs[0, SPAN, A] + log_probs[0, SPAN + 1, EOS], rtol=1e-4)
    np.testing.assert_allclose(found[1], log_probs[1, 0, B] + log_probs[1, 1, A] + log_probs[1, 2, EOS], rtol=1e-4)
    assert np.asarray(MODELS[kind].count(batch)).tolist() == [2, 3]
    batch["target"][0, 1 : 1 + SPAN] = True
    drawn = float(MODELS[kind].log_likelihood(variables, batch, KEY)[0])
    assert drawn < found[0]
    assert int(MODELS[kind].count(batch)[0]) == 2 + one.size


def test_images_are_noised_by_what_they_are_for():
    """Those that texts follow, little; those that are read, not at all."""
    target, described = (jnp.tile(jnp.array(each), 1000) for each in ([True, True, False], [False, True, True]))
    t, learned = noised(LATENTS.image).times(KEY, target, described, train=True)
    t = np.asarray(t).reshape(1000, 3).T
    assert set(t[0]) <= {*range(1, 21)} and t[0].max() > 15
    assert set(t[1]) == {*range(1, 11)}
    assert not t[2].any() and np.array_equal(learned, target)
    image = replace(PIXELS, read_noise_share=0.1, even_share=0.15)
    for train in (True, False):
        t, learned = noised(image).times(KEY, target, described, train=train)
        t = np.asarray(t).reshape(1000, 3).T
        assert (t[0] > 0).all() and np.array_equal(learned, target & ~described)
        assert t[1:].max() <= 0.1
        assert abs((t[1:] > 0).mean() - 0.1 * train) < 0.035


def test_half_of_the_images_lose_up_to_half_of_their_patches():
    some = jnp.arange(4000).reshape(-1, 2) % 4 > 0
    masked = np.asarray(masked_patches(KEY, some, 64))
    assert not masked[~np.asarray(some)].any()
    shares = masked[np.asarray(some)].mean(axis=1)
    assert abs((shares > 0).mean() - 0.5) < 0.05 and shares.max() < 0.75
    assert abs(shares.mean() - 0.125) < 0.01


def prompt(kind: str, documents: list[list[Any]]) -> dict[str, np.ndarray]:
    tokens, images = zip(*map(laid, documents), strict=True)
    stated = [each._replace(target=np.zeros(len(each.tokens), bool)) for each in tokens]
    image = np.zeros((len(documents), *MODELS[kind].inputs["image"].shape), np.uint8)
    for place, each in zip(image, images, strict=True):
        place[: len(each)] = each if each else 0
    return left_padded(stated, MODELS[kind].inputs, PAD) | {"image": image}


class Document:
    """Of one row: tokens and, at the places of images, what is noised."""

    def __init__(self, kind: str, variables: Any, parts: list[Any]) -> None:
        self.kind, self.variables = kind, variables
        tokens, images = laid(parts)
        self.tokens, self.at = tokens.tokens.tolist(), tokens.image_at.tolist()
        self.x = [np.asarray(noised(CONFIGS[kind].image).read(variables, each[None])[0]) for each in images]

    def said(self, x: list[Any], places: list[int], tokens: list[int], times: list[Any]) -> tuple[Any, Any]:
        room = 40
        batch = {
            "tokens": np.int32([tokens + [0] * (room - len(tokens))]),
            "segment": np.int32([[1] * len(tokens) + [0] * (room - len(tokens))]),
            "image_at": np.int32([places + [room] * (4 - len(places))]),
        }
        blank = np.zeros(noised(CONFIGS[self.kind].image).shape, np.float32)
        images = jnp.stack([*map(jnp.asarray, x), *[blank] * (4 - len(x))])[None]
        time = jnp.concatenate([*(jnp.reshape(each, 1) for each in times), still(self.kind, 4 - len(x))])[None]
        return READ[self.kind](self.variables, marked(batch), images, time)

    def next_logits(self) -> np.ndarray:
        logits, _ = self.said(self.x, self.at, self.tokens, [still(self.kind)] * len(self.x))
        return np.asarray(logits[0, len(self.tokens) - 1])

    def output(self, x_t: Any, time: Any, shown: str) -> Any:
        """Of an image that comes next, told all, images alone or nothing of what is before it."""
        tokens, at = list(self.tokens), list(self.at)
        x = list(self.x)
        if shown != "all":
            x = x if shown == "images" else []
            tokens, at = [BOS, *[PAD] * (SPAN * len(x))], [1 + SPAN * n for n in range(len(x))]
        at, tokens = [*at, len(tokens)], [*tokens, *[PAD] * SPAN]
        _, output = self.said([*x, x_t], at, tokens, [*[still(self.kind)] * len(x), time])
        return output[0, len(x)]

    def draw(self, noise: Any, sampling: Sampling) -> np.ndarray:
        images = noised(CONFIGS[self.kind].image)
        path = images.path

        def denoise(x: Any, t: Any) -> Denoised:
            shown = ["all", "nothing"][: 1 if sampling.guidance == 1 else 2]
            shown += ["images"] if sampling.image_guidance is not None else []
            outputs = [self.output(x[0], path.time(t).astype(jnp.float32), each)[None] for each in shown]
            data = [path.data(each, x, jnp.reshape(t, 1)) for each in outputs]
            return Denoised(guided(data, sampling.guidance, sampling.image_guidance))

        solve = SOLVERS[sampling.solver]
        x = solve(denoise, path.level, path.solved_times(sampling.steps), noise[None], KEY)
        image = images.show(self.variables, x)
        self.at.append(len(self.tokens))
        self.tokens += [BEGIN, *[0] * LENGTH, END]
        self.x.append(np.asarray((images.read(self.variables, image) if self.kind == "pixels" else x)[0]))
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
    room = replace(CONFIGS[kind], language=replace(CONFIGS[kind].language, context_length=40))
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
                token = max([PAD, A, B, EOS if last else BEGIN], key=lambda one: logits[one])
                if token != BEGIN:
                    document.tokens.append(token)
                if token in (BEGIN, EOS):
                    break
        segment = found["segment"][number] > 0
        assert (
            found["tokens"][number][segment].tolist()
            == marked({"tokens": np.int32([document.tokens]), "image_at": np.int32([document.at])})["tokens"][
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
        (lambda: replace(CONFIG, image_weight=0.0), "image_weight is 0.0: it must be a number above 0"),
        (lambda: replace(PIXELS, even_share=1.5), "even_share is 1.5: a share lies in [0, 1]"),
        (lambda: replace(PIXELS, shift=0.0), "shift is 0.0: it must be above 0"),
        (
            lambda: replace(LATENTS.image, described_timesteps=21),
            "described_timesteps is 21: it must be above 1 and at most",
        ),
        (lambda: Sampling(image_guidance=-1.0), "sampling.image_guidance is -1.0: it must be a number, at least 0"),
        (lambda: Sampling(steps=0), "sampling.steps is 0: it must be at least 1"),
        (lambda: Sampling(length=0), "sampling.length is 0: at least 1 token must be drawn"),
        (
            lambda: ConvolutionalPatches(widths=(4,), groups=2, attention=(2,)),
            "attention is [2]: that of patches is the decoder's",
        ),
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
            ("image",) * 3,
            "the model's context_length is 16: shorten the prompts, or sampling.length",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(sampling: Sampling, order: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        jax.eval_shape(
            lambda: PLAIN["latents"].generate({}, KEY, prompt("latents", [[BOS, A]]), order=order, sampling=sampling)
        )
