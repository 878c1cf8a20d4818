"""Each measurement against what is known in closed form."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.contract import Input, Model
from vlm_jax.data import train_tokenizer
from vlm_jax.evals import (
    EVALUATIONS,
    Judge,
    Labelled,
    Pictures,
    Subject,
    likelihood,
    retrieval,
    zero_shot,
)
from vlm_jax.evals.retrieval import belonging, recall_at
from vlm_jax.objectives.likelihood import subpixels

IMAGE = Input((8, 8, 1), "uint8", 17)


def model(inputs: dict[str, Input] | None = None, **capabilities: object) -> Model:
    """A model that can do just what a test gives it, of images of 8x8 pixels unless it says otherwise."""
    return Model(
        inputs=inputs or {"image": IMAGE},
        init=lambda *_: {},
        loss=lambda *_, **__: None,
        rules=(),
        **{"count": subpixels, **capabilities},
    )


def batches(*parts: tuple[dict, int]) -> Callable[[], Iterator[tuple[dict, int]]]:
    return lambda: iter(parts)


def test_recall_counts_ranks_and_holds_ties_against_the_model() -> None:
    similarity = np.array([[9.0, 1, 1, 1], [5, 4, 1, 1], [5, 5, 4, 1], [2, 2, 2, 2]])
    assert [recall_at(similarity, np.eye(4, dtype=bool), k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_an_encoder_that_tells_nothing_apart_retrieves_nothing(value: float) -> None:
    assert recall_at(np.full((20, 20), value), np.eye(20, dtype=bool), 10) == 0


def test_an_image_is_found_by_any_of_its_captions_and_each_caption_finds_its_image() -> None:
    """Two images with five captions each: of the first, only the last is nearer than all captions of the other."""
    similarity = np.array([[1, 1, 1, 1, 9, 8, 8, 8, 8, 8], [7, 7, 7, 7, 7, 1, 2, 3, 4, 6.0]])
    belongs = belonging(np.repeat([0, 1], 5), np.arange(2), np.arange(10))
    np.testing.assert_array_equal(belongs, np.repeat(np.eye(2, dtype=bool), 5, axis=1))
    # Of the second image's captions the nearest, 6, stands after five of 7.
    assert [recall_at(similarity, belongs, k) for k in (1, 5, 6)] == [0.5, 0.5, 1.0]
    # Captions 1 to 4 are nearer to the other image, the fifth is not, and all of the other's five are nearer to it.
    assert [recall_at(similarity.T, belongs.T, k) for k in (1, 2)] == [0.1, 1.0]


def test_what_is_equal_in_the_data_is_no_mistake_and_what_only_ties_is_one() -> None:
    """Texts 0 and 1 are one sentence, images 2 and 3 one picture; text 4 ties with text 0 and is another."""
    image_ids, text_ids = np.array([0, 1, 2, 2, 3]), np.array([0, 0, 1, 2, 3])
    belongs = belonging(np.arange(5), image_ids, text_ids)
    expected = np.array([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(belongs, expected)
    # Image 1 is nearer to the other copy of its sentence, image 2 to the caption of the other copy of itself.
    similarity = np.array([[9, 9, 0, 0, 9], [9, 5, 0, 0, 0], [0, 0, 3, 7, 0], [0, 0, 3, 7, 0], [0, 0, 0, 0, 9.0]])
    assert recall_at(similarity, belongs, 1) == 0.8
    assert recall_at(similarity, np.eye(5, dtype=bool), 1) == 0.4


WORDS = train_tokenizer([], 300)
LETTER = int(WORDS.encode(["a"], 4)[0, 2])
"""The id of the letter a; those of the next letters follow."""


def retrieving(vectors: np.ndarray, images: Any, captions: list[tuple[str, ...]]) -> Subject:
    """Image i is e_i; a caption is a letter, the n-th of which has the n-th of the vectors. Two images at a time."""
    count = len(vectors[0])
    parts = [images[start : start + 2] for start in range(0, len(images), 2)]
    return Subject(
        model=model(
            {"image": Input((), "int32", count), "tokens": Input((5,), "int32", 300)},
            embed_image=lambda _, image: jnp.eye(count)[image],
            embed_text=lambda _, tokens: jnp.asarray(vectors)[tokens[:, 2] - LETTER],
        ),
        variables={},
        batches=batches(*(({"image": jnp.array([*part, 0][:2])}, len(part)) for part in parts)),
        examples=len(images),
        tokenizer=WORDS,
        records=lambda: ({"captions": each} for each in captions),
    )


def test_retrieval_goes_both_ways_and_ignores_the_padding_of_the_last_batch() -> None:
    """Image i is e_i and text i is e_i, but texts 0 and 1 are both e_0: image 1 finds no text of its own."""
    subject = retrieving(np.eye(3)[[0, 0, 2]], [0, 1, 2], [("a",), ("b",), ("c",)])
    metrics = retrieval.run(subject)
    # Image 0 ties between texts 0 and 1; image 1 ties with all but text 2; image 2 is clear.
    assert metrics["image_to_text_recall@1"] == pytest.approx(1 / 3)
    assert metrics["text_to_image_recall@1"] == pytest.approx(2 / 3)
    assert metrics["text_to_image_recall@5"] == metrics["image_to_text_recall@10"] == 1


def test_retrieval_forgives_equal_captions_and_equal_images_of_the_split() -> None:
    """The first two images are one, and so are the last three captions."""
    metrics = retrieval.run(retrieving(np.eye(4)[[0, 1]], [0, 0, 1, 2], [("a",), ("b",), ("b",), ("b",)]))
    # The third image is nearest to its caption, which is that of the others too; the fourth is like nothing.
    assert metrics["image_to_text_recall@1"] == 0.75
    assert metrics["text_to_image_recall@1"] == 1


def test_retrieval_reads_every_caption_of_an_image() -> None:
    """The first of image 0's three captions is nearest to image 1, the last to its own."""
    metrics = retrieval.run(retrieving(np.eye(2)[[1, 1, 0, 1]], [0, 1], [("a", "b", "c"), ("d",)]))
    assert metrics["text_to_image_recall@1"] == 0.5  # the third and the fourth
    assert metrics["image_to_text_recall@1"] == 0.5  # image 1 ties with the captions of the other
    first = retrieval.run(retrieving(np.eye(2)[[1, 1, 0, 1]], [0, 1], [("a",), ("d",)]))
    assert first["image_to_text_recall@1"] == 0


def zero_shot_subject(vector_of: Callable[[str], list[float]], names: tuple[str, ...], prompts: tuple[str, ...]) -> Any:
    """A text of one line has the direction that `vector_of` gives it; images stand for themselves."""
    tokenizer = train_tokenizer([], 300)

    def read(tokens: np.ndarray) -> np.ndarray:
        raw = np.array([vector_of(tokenizer.decode(row)) for row in np.asarray(tokens)], np.float32)
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)

    def embed_text(_: object, tokens: jax.Array) -> jax.Array:
        return jax.pure_callback(read, jax.ShapeDtypeStruct((len(tokens), 2), jnp.float32), tokens)

    shown = ({"image": jnp.array([[1.0, 0.6], [1, 0.7], [0.6, 1], [0, 1.0]]), "label": jnp.array([0, 0, 0, 1])}, 3)
    return Subject(
        model=model(
            {"image": Input((2,), "float32"), "tokens": Input((32,), "int32", 300)},
            embed_image=lambda _, image: image,
            embed_text=embed_text,
        ),
        variables={},
        batches=batches(),
        examples=0,
        tokenizer=tokenizer,
        labelled=Labelled(batches(shown), names, prompts),
    )


def test_a_class_is_the_mean_of_its_prompts_unit_vectors_however_they_disagree() -> None:
    """Of "a", two prompts say e_0 and one, which is long, e_1: the mean direction is (2, 1), no prompt's own."""
    vectors = {"a": [1, 0], "a x": [3, 0], "y a": [0, 100], "b": [0, 1], "b x": [0, 7], "y b": [0, 1]}
    subject = zero_shot_subject(vectors.__getitem__, ("a", "b"), ("{}", "{} x", "y {}"))
    directions = zero_shot.class_embeddings(subject)
    np.testing.assert_allclose(directions, [[2 / 5**0.5, 1 / 5**0.5], [0, 1]], rtol=1e-6)
    # (0.6, 1) is nearer to (0, 1) than to (2, 1); by (1, 0) alone (1, 0.7) would be too near to tell.
    assert zero_shot.run(subject) == {"accuracy": pytest.approx(2 / 3), "chance": 0.5, "examples": 3}


def test_prompts_and_names_are_text_in_which_nothing_is_a_sign() -> None:
    seen: list[str] = []
    subject = zero_shot_subject(lambda text: seen.append(text) or [1.0, 0], ("{0}", "%s {}"), ("{} {x} {0!r", "{{}}"))
    zero_shot.class_embeddings(subject)
    assert seen == ["{0} {x} {0!r", "{{0}}", "%s {} {x} {0!r", "{%s {}}"]


def test_bits_per_dim_of_a_uniform_model_is_the_logarithm_of_its_levels() -> None:
    uniform = -64 * math.log(17)
    subject = Subject(
        model=model(log_likelihood=lambda _, batch, key: jnp.full(len(batch["image"]), uniform), bound="exact"),
        variables={},
        batches=batches(
            ({"image": jnp.zeros((4, 8, 8, 1), jnp.uint8)}, 4), ({"image": jnp.zeros((4, 8, 8, 1), jnp.uint8)}, 1)
        ),
        examples=5,
    )
    metrics = likelihood.run(subject)
    assert metrics["bits_per_dim"] == pytest.approx(math.log2(17), rel=1e-6)
    assert metrics["bits_per_dim_standard_error"] == pytest.approx(0, abs=1e-6)


def test_standard_error_is_that_of_the_mean_over_images() -> None:
    nats = np.array([-100.0, -120, -90, -110])
    bits = -nats / (64 * math.log(2))
    metrics = likelihood.summary(nats, np.full(4, 64))
    assert metrics["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-6)
    assert metrics["bits_per_dim_standard_error"] == pytest.approx(bits.std(ddof=1) / 2, rel=1e-5)


def test_examples_of_unequal_counts_are_weighed_by_them() -> None:
    """A mean over all tokens, not over texts: with the error of a ratio, which the bootstrap has too."""
    rng = np.random.default_rng(0)
    count = rng.integers(1, 30, 4000)
    nats = -count * (2.0 + 0.3 * rng.normal(size=4000)) - rng.exponential(size=4000)
    metrics = likelihood.summary(nats, count)
    assert metrics["bits_per_dim"] == pytest.approx(-nats.sum() / count.sum() / math.log(2), rel=1e-9)
    draws = rng.integers(0, 4000, (2000, 4000))
    ratios = -nats[draws].sum(axis=1) / count[draws].sum(axis=1) / math.log(2)
    assert metrics["bits_per_dim_standard_error"] == pytest.approx(ratios.std(), rel=0.1)


def test_one_image_says_nothing_of_the_error() -> None:
    assert likelihood.summary(np.array([-100.0]), np.array([64]))["bits_per_dim_standard_error"] is None


def test_importance_weights_are_averaged_inside_the_logarithm() -> None:
    """For log-normal weights of mean one the estimate tends to 0, and the mean of the logarithms to -s^2 / 2."""
    scale = 0.7

    def log_weight(_: object, batch: dict, key: jax.Array) -> jax.Array:
        return scale * jax.random.normal(key, (len(batch["image"]),)) - scale**2 / 2

    subject = Subject(
        model=model(log_weight=log_weight, log_likelihood=log_weight, bound="lower"),
        variables={},
        batches=batches(({"image": jnp.zeros((2000, 8, 8, 1), jnp.uint8)}, 2000)),
        examples=2000,
    )
    to_nats = -64 * math.log(2)
    tight = likelihood.run_importance_weighted(subject)["bits_per_dim"] * to_nats
    loose = likelihood.run(subject)["bits_per_dim"] * to_nats
    assert loose == pytest.approx(-(scale**2) / 2, abs=0.03)
    # The bias of log(mean of K) is -var(w) / 2K.
    assert tight == pytest.approx(-(math.exp(scale**2) - 1) / (2 * likelihood.IMPORTANCE_DRAWS), abs=0.01)


@pytest.mark.parametrize("images", [2, 5000])
def test_noise_is_averaged_over_thousands_of_draws_however_few_the_images_are(images: int) -> None:
    subject = Subject(
        model=model(log_likelihood=lambda _, batch, key: jax.random.normal(key, (len(batch["image"]),)), bound="lower"),
        variables={},
        batches=batches(({"image": jnp.zeros((images, 8, 8, 1), jnp.uint8)}, images)),
        examples=images,
    )
    nats = likelihood.run(subject)["bits_per_dim"] * 64 * math.log(2)
    assert 0 < abs(nats) < 4 / math.sqrt(max(images, likelihood.NOISE_DRAWS))


def test_evaluations_run_where_their_capabilities_are_and_nowhere_else() -> None:
    def applicable(subject: Subject) -> set[str]:
        return {evaluation.name for evaluation in EVALUATIONS if evaluation.applies_to(subject)}

    def known(*_: object) -> None:
        return None

    def subject(model: Model, **given: Any) -> Subject:
        return Subject(model=model, variables={}, batches=batches(), examples=0, **given)

    assert applicable(subject(model())) == set()
    assert applicable(subject(model(log_likelihood=known))) == set()
    assert applicable(subject(model(log_likelihood=known, sample=known))) == {"likelihood"}
    texts = model(log_likelihood=known, count=known, generate=known)
    assert applicable(subject(texts)) == {"perplexity"}
    draws_too = model(log_likelihood=known, count=known, generate=known, sample=known)
    assert applicable(subject(draws_too, training=batches())) == {"likelihood"}
    assert applicable(subject(texts, training=batches())) == {"perplexity", "kneser_ney"}
    both = model(embed_image=known, embed_text=known)
    text: dict[str, Any] = {"tokenizer": WORDS, "records": lambda: iter(())}
    assert applicable(subject(model(embed_image=known), **text)) == set()
    assert applicable(subject(both)) == applicable(subject(both, tokenizer=WORDS)) == set()
    assert applicable(subject(both, **text)) == {"retrieval"}
    labelled = Labelled(batches(), ("a",), ("{}",))
    assert applicable(subject(both, **text, labelled=labelled)) == {"retrieval", "zero_shot"}
    looked: dict[str, Any] = {"judges": (Judge(both, {}),), "pictures": Pictures(levels=2, held_out=lambda: iter(()))}
    assert applicable(subject(model(sample=known))) == applicable(subject(model(), **looked)) == set()
    assert applicable(subject(model(sample=known), **looked)) == {"frechet", "kid"}
