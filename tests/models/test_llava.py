"""LLaVA: what an image stands for in a row, who sees it, and what follows from that for losses and continuations."""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from reference import ACTIVATIONS, dense, random_params
from vlm_jax.contract import Model, abstract_batch, check_batch
from vlm_jax.errors import UserError
from vlm_jax.models import build, clip, language, llava
from vlm_jax.models.language import Language, Sampling
from vlm_jax.nn.decoder import DecoderConfig
from vlm_jax.nn.text import TextTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.sharding import MeshShape, make_mesh, parameter_shardings, to_global
from vlm_jax.trees import leaves_by_path

VOCAB, LENGTH, EOS, IMAGES = 5, 16, 2, 2
CONFIG = llava.Config(
    vision=VisionTransformer(
        image_size=4, patch_size=2, features=1, transformer=Transformer(width=8, depth=2, heads=2, mlp=8)
    ),
    language=language.Config(
        vocab_size=VOCAB,
        context_length=LENGTH,
        eos_id=EOS,
        decoder=DecoderConfig(width=8, depth=1, heads=4, kv_heads=2, head_width=4, mlp=16, scan=False),
    ),
    images=IMAGES,
)
"""Images of four places."""
PREFIX = replace(CONFIG, attention="prefix")
SHUFFLED = replace(CONFIG, shuffle=2, projector="linear")
"""Images of one place."""
CONFIGS = {"causal": CONFIG, "prefix": PREFIX, "shuffled": SHUFFLED}
MODELS = {name: build(config) for name, config in CONFIGS.items()}
KEY = jax.random.key(0)
PICTURES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
TEXT = tuple[int, ...]
IMAGE = -1
"""Stands in a document for an image."""


def variables_of(model: Model) -> Any:
    """Large enough for what a token does to be seen."""
    return random_params(jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 1)), scale=0.6)


VARIABLES = {name: variables_of(model) for name, model in MODELS.items()}
LIKELIHOOD = {
    name: jax.jit(lambda batch, name=name: MODELS[name].log_likelihood(VARIABLES[name], batch, KEY)) for name in MODELS
}


def rows(name: str, packed: list[list[tuple[list[int], int]]], pictures: list[list[int]], left: int = 0) -> Any:
    """Documents in rows of `LENGTH`, from `left` on: their tokens, of which the last few are targets.

    Args:
      pictures: of each row, which of `PICTURES` its images are.
    """
    span, count = CONFIGS[name].image_tokens, len(packed)
    batch = {
        "tokens": np.ones((count, LENGTH), np.int32),
        "target": np.zeros((count, LENGTH), bool),
        "segment": np.zeros((count, LENGTH), np.int32),
        "image": np.zeros((count, IMAGES, 4, 4, 3), np.uint8),
        "image_at": np.full((count, IMAGES), LENGTH, np.int32),
    }
    for row, documents in enumerate(packed):
        place, image = left, 0
        for number, (document, targets) in enumerate(documents, 1):
            first = place
            for token in document:
                if token == IMAGE:
                    batch["image_at"][row, image], batch["image"][row, image] = place, PICTURES[pictures[row][image]]
                    place, image = place + span, image + 1
                else:
                    batch["tokens"][row, place] = token
                    place += 1
            batch["segment"][row, first:place] = number
            batch["target"][row, place - targets : place] = True
    return batch


DOCUMENTS = [([3, IMAGE, 1, 4, EOS], 2), ([IMAGE, 0, EOS], 1)]
PACKED = [[*DOCUMENTS], [DOCUMENTS[1], ([4, 4, 3, EOS], 3)]]


def features_of(config: llava.Config, params: Any, image: np.ndarray) -> np.ndarray:
    """[L, D] of an image: the CLIP of the same tower, and the projector in NumPy."""
    text = TextTransformer(vocab_size=4, context_length=3, eos_id=2, transformer=config.vision.transformer)
    model = build(clip.Config(image=config.vision, text=text, embedding=8))
    variables = {"params": {"image": params["vision"], "log_scale": np.float32(0)}}
    x = np.float64(model.image_features(variables, image[None])[0])
    side, factor = config.vision.image_size // config.vision.patch_size, config.shuffle
    squares = range(side // factor)
    order = [
        [(row * factor + i) * side + column * factor + j for i in range(factor) for j in range(factor)]
        for row in squares
        for column in squares
    ]
    x = np.stack([np.concatenate([x[patch] for patch in square]) for square in order])
    if config.projector == "mlp2x_gelu":
        x = ACTIVATIONS["gelu"](dense(params["projector"]["hidden"], x))
    return dense(params["projector"]["out"], x)


def documents_of(batch: Any, row: int) -> list[tuple[int, int]]:
    numbers = batch["segment"][row]
    return [(int(places[0]), int(places[-1])) for number in (1, 2) if len(places := np.flatnonzero(numbers == number))]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_image_is_the_projection_of_the_towers_features_and_is_seen_by_what_the_recipe_says(name: str):
    """Beside the language model of embeddings, positions and a mask that are made here, place by place."""
    config, params = CONFIGS[name], VARIABLES[name]["params"]
    batch = rows(name, PACKED, [[0, 1], [2]])
    embeddings = params["language"]["token"]["embedding"][batch["tokens"]]
    position, mask = np.zeros((2, LENGTH), np.int32), np.tile(np.eye(LENGTH, dtype=bool), (2, 1, 1, 1))
    for row in range(2):
        for image, at in zip(batch["image"][row], batch["image_at"][row], strict=True):
            if at < LENGTH:
                embeddings[row, at : at + config.image_tokens] = features_of(config, params, image)
        for first, last in documents_of(batch, row):
            prefix = first + int(np.argmax(batch["target"][row, first : last + 1]))
            for place in range(first, last + 1):
                position[row, place] = place - first
                both = name == "prefix" and place < prefix
                mask[row, 0, place, first : (prefix if both else place + 1)] = True
    following = np.roll(batch["tokens"], -1, axis=1)
    network: Any = Language(config.language)
    found = network.apply({"params": params["language"]}, embeddings, position, mask, following, method="scores")
    expected = np.where(np.roll(batch["target"], -1, axis=1), found.log_prob, 0).sum(axis=1)
    np.testing.assert_allclose(LIKELIHOOD[name](batch), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["causal", pytest.param("prefix", marks=pytest.mark.slow)])
def test_packed_documents_have_the_loss_and_the_gradient_that_they_have_alone(name: str):
    model = MODELS[name]
    loss = jax.jit(jax.value_and_grad(lambda v, batch: model.loss(v, batch, KEY, 0, train=False), has_aux=True))
    (packed, aux), gradient = loss(VARIABLES[name], rows(name, PACKED, [[0, 1], [2]]))
    alone = rows(name, [[document] for row in PACKED for document in row], [[0], [1], [2], []], left=2)
    (apart, other), expected = loss(VARIABLES[name], alone)
    np.testing.assert_allclose(packed, apart, rtol=1e-5)
    assert aux.weight == pytest.approx(7 if name == "causal" else 4) and other.weight == pytest.approx(aux.weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)
    sums, counts = LIKELIHOOD[name](alone), np.array([2, 1, 1, 3])
    np.testing.assert_array_equal(model.count(alone), counts)
    mean = sums.sum() / counts.sum() if name == "causal" else (sums / counts).mean()
    np.testing.assert_allclose(apart, -mean, rtol=1e-5)
    # Nothing is learnt of what features do not reach, and all else is.
    still = {path for path, leaf in leaves_by_path(gradient).items() if not np.any(leaf)}
    assert still == {f"params/vision/transformer/final_norm/{leaf}" for leaf in ("scale", "bias")}
    last = [leaf[-1] for path, leaf in leaves_by_path(gradient).items() if "vision/transformer/blocks" in path]
    assert not any(np.any(leaf) for leaf in last)


def each(name: str, batch: Any) -> np.ndarray:
    """log p of each token of the first row, one target at a time."""
    repeated = {field: np.repeat(values[:1], LENGTH, axis=0) for field, values in batch.items()}
    return np.asarray(LIKELIHOOD[name]({**repeated, "target": np.eye(LENGTH, dtype=bool)}))


def test_a_token_or_an_image_changes_what_comes_after_it_in_its_document_alone():
    """The documents have the places 0 to 7 and 8 to 13, their images the places 1 to 4 and 8 to 11."""
    before = each("causal", rows("causal", PACKED, [[0, 1], [2]]))
    assert (before == 0).nonzero()[0].tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 14, 15]  # what nothing predicts

    def moved(batch: Any) -> list[int]:
        return (np.abs(each("causal", batch) - before) > 1e-6).nonzero()[0].tolist()

    assert moved(rows("causal", PACKED, [[3, 1], [2]])) == [5, 6, 7]
    assert moved(rows("causal", PACKED, [[0, 3], [2]])) == [12, 13]
    later = rows("causal", PACKED, [[0, 1], [2]])
    later["tokens"][0, 6] = 0
    assert moved(later) == [6, 7]
    anything = rows("causal", PACKED, [[0, 1], [2]])
    anything["tokens"][0, 1:5] = anything["tokens"][0, 8:12] = 3
    anything["target"][0, 1:5] = True
    assert moved(anything) == []  # tokens in the places of an image are not read
    np.testing.assert_array_equal(MODELS["causal"].count(anything), [3, 4])


PROMPTS = [([3, IMAGE, 1, IMAGE], [0, 1]), ([0, IMAGE], [2]), ([4, 1], [])]
"""Two of them end in an image."""
NEW = 4


def prompts(name: str, chosen: list[int], places: int) -> Any:
    """Padded on the left."""
    found = []
    for number in chosen:
        document, pictures = PROMPTS[number]
        used = sum(CONFIGS[name].image_tokens if token == IMAGE else 1 for token in document)
        one = rows(name, [[(document, 0)]], [pictures], left=places - used)
        sequence = {field: one[field][:, :places] for field in ("tokens", "target", "segment")}
        found.append({**one, **sequence, "image_at": np.minimum(one["image_at"], places)})
    return {field: np.concatenate([one[field] for one in found]) for field in found[0]}


def continued(name: str, batch: Any, temperature: float = 0.0, **settings: Any) -> Any:
    sampling = Sampling(**{"length": NEW, **settings})
    model, variables = MODELS[name], VARIABLES[name]
    generate = jax.jit(lambda b: model.generate(variables, KEY, b, temperature=temperature, sampling=sampling))
    return {field: np.asarray(values) for field, values in generate(batch).items()}


@pytest.mark.parametrize("name", ["causal", pytest.param("prefix", marks=pytest.mark.slow)])
def test_left_padded_prompts_are_continued_as_each_alone_by_the_likeliest_token(name: str):
    """Which is asked of the whole probability of each text; what is returned is a batch again."""
    together = continued(name, prompts(name, [0, 1, 2], 11))
    check_batch(
        {
            field: spec._replace(
                shape=(11 + NEW,) if spec.shape == (LENGTH,) else spec.shape,
                limit=12 + NEW if field == "image_at" else spec.limit,
            )
            for field, spec in MODELS[name].inputs.items()
        },
        together,
    )
    np.testing.assert_array_equal(together["image_at"], [[2, 7], [7, 15], [15, 15]])
    alone = continued(name, prompts(name, [1], 5))
    np.testing.assert_array_equal(alone["tokens"][0, 5:], together["tokens"][1, 11:])
    for row in range(3):
        for place in range(11, 11 + NEW):
            if together["segment"][row, place] == 0:
                assert (together["tokens"][row, place:] == EOS).all()
                break
            texts = {field: np.repeat(values[row : row + 1], VOCAB, axis=0) for field, values in together.items()}
            texts = {
                field: np.pad(values, ((0, 0), (0, 1))) if field in ("tokens", "target", "segment") else values
                for field, values in texts.items()
            }
            texts["image_at"] = np.where(texts["image_at"] == 15, LENGTH, texts["image_at"])
            texts["tokens"][:, place] = np.arange(VOCAB)
            texts["segment"][:, place + 1 :] = 0
            texts["target"][:, place + 1 :] = False
            assert np.argmax(LIKELIHOOD[name](texts)) == together["tokens"][row, place]


def test_training_the_projector_keeps_nothing_of_the_tower():
    """What the backward pass reads is the same of a deeper tower: frozen, it is not differentiated."""

    def kept(config: llava.Config) -> int:
        model = build(config)
        variables = jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 2))
        params, batch = variables["params"], abstract_batch(model.inputs, 2)

        def backward(projector: Any, params: Any, batch: Any) -> Any:
            def loss(projector: Any) -> jax.Array:
                variables = {"params": {**params, "projector": projector}}
                return model.loss(variables, batch, KEY, 0, train=True)[0]

            return jax.vjp(loss, projector)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, params["projector"], params, batch))
        return sum(math.prod(leaf.shape) for leaf in residuals)

    deeper = replace(CONFIG.vision, transformer=replace(CONFIG.vision.transformer, depth=8))
    assert kept(replace(CONFIG, vision=deeper)) == kept(CONFIG) > 0


def test_the_loss_and_its_gradient_are_the_same_on_eight_devices():
    decoder = replace(CONFIG.language.decoder, kv_heads=4)
    config = replace(CONFIG, language=replace(CONFIG.language, vocab_size=8, decoder=decoder))
    model, batch = build(config), rows("causal", [*PACKED] * 4, [[0, 1], [2]] * 4)
    variables = variables_of(model)

    def gradient(variables: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda v: model.loss(v, batch, KEY, 0, train=True)[0])(variables)

    expected = jax.jit(gradient)(variables, batch)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = {
            "params": jax.device_put(variables["params"], parameter_shardings(variables["params"], model.rules, mesh))
        }
        actual = jax.jit(gradient)(placed, to_global(batch, 8, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle": 3}, "2 patches a side cannot be put together in squares of 3: choose a shuffle that divides 2"),
        ({"images": 0}, "images is 0: a row must have room for 1 at least"),
        (
            {"language": replace(CONFIG.language, context_length=4)},
            "an image takes 4 places and the context_length is 4: choose a longer one, or a shuffle",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)


def test_images_that_share_a_place_or_are_cut_off_are_refused_before_anything_is_computed():
    batch = prompts("causal", [0], 11)
    for places in ([2, 5], [8, 11]):
        wrong = {**batch, "image_at": np.array([places], np.int32)}
        with pytest.raises(
            UserError, match=rf"'image_at' holds \[{places[0]}, {places[1]}\], where each image takes 4"
        ):
            MODELS["causal"].generate(None, KEY, wrong)
    with pytest.raises(UserError, match="11 tokens and 9 more are 20, and the model's context_length is 16: shorten"):
        MODELS["causal"].generate(VARIABLES["causal"], KEY, batch, sampling=Sampling(length=9))
