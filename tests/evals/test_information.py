"""What latents tell: exact where they are the pixels, the label, or neither."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judging import judge

from vlm_jax.contract import Input, Model
from vlm_jax.errors import UserError
from vlm_jax.evals import EVALUATIONS, Judge, Lessons, Subject, features, information
from vlm_jax.evals.writing import Metrics

RNG = np.random.default_rng(0)
NAMES = ("cat", "dog", "bird")
CAPTIONS = {"cat": "red cat", "dog": "green dog", "bird": "blue bird"}
PIXELS = Input((2, 2, 1), "float32")


def images_of(labels: np.ndarray) -> np.ndarray:
    """The first two pixels say which of three it is; the others are noise."""
    images = RNG.integers(0, 256, (len(labels), 2, 2, 1)).astype(np.uint8)
    bright = np.array([[200, 50], [50, 200], [50, 50]])[labels]
    images[:, 0, :, 0] = bright + RNG.integers(-20, 21, bright.shape)
    return images


LEARNED, ASKED = np.arange(100) % 10 // 4, np.arange(50) % 10 // 4
"""Four of ten are cats, four dogs, two birds."""
TRAINING, HELD_OUT = images_of(LEARNED), images_of(ASKED)


def records(labels: Sequence[int], *keys: str) -> list[Mapping[str, Any]]:
    """With labels and captions, or one of them."""
    everything = ({"label": NAMES[label], "captions": (CAPTIONS[NAMES[label]],)} for label in labels)
    return [{key: each[key] for key in keys or each} for each in everything]


def batches(images: np.ndarray) -> Callable[[], Iterator[tuple[dict[str, np.ndarray], int]]]:
    """Eight at a time, the last batch filled up with copies of the last."""

    def made() -> Iterator[tuple[dict[str, np.ndarray], int]]:
        for at in range(0, len(images), 8):
            part = images[at : at + 8]
            yield {"image": np.concatenate([part, np.repeat(images[-1:], 8 - len(part), axis=0)])}, len(part)

    return made


def subject(
    encode: Any = jnp.float32,
    decode: Any = lambda latents: jnp.uint8(latents),
    latents: Any = PIXELS,
    *,
    training: np.ndarray = TRAINING,
    learned: Sequence[Mapping[str, Any]] = (),
    asked: Sequence[Mapping[str, Any]] = (),
    **given: Any,
) -> Subject:
    """By default its latents are the pixels."""
    model = Model(
        inputs={"image": PIXELS._replace(dtype="uint8", limit=256)},
        init=lambda *_: {},
        loss=lambda *_, **__: None,
        rules=(),
        latents=latents,
        encode=lambda _, image, key=None: encode(image),
        decode=None if decode is None else lambda _, latents: decode(latents),
    )
    return Subject(
        model=model,
        variables={},
        batches=batches(HELD_OUT),
        examples=len(HELD_OUT),
        records=lambda: iter(asked or records(ASKED)),
        lessons=Lessons(batches(training), lambda: iter(learned or records(LEARNED))),
        **given,
    )


def grey(latents: Any) -> jax.Array:
    """What a decoder that knows nothing paints."""
    return jnp.full((len(jax.tree.leaves(latents)[0]), 2, 2, 1), 9, jnp.uint8)


READ = np.linalg.qr(RNG.normal(size=(3, 3)))[0] + 2
"""As a judge reads the three captions: far from the origin, as embeddings are."""


def reading(name: str = "judge", read: np.ndarray = READ) -> Judge:
    return judge(HELD_OUT[:1], np.zeros((1, 3)), list(CAPTIONS.values()), read, name)


def test_latents_that_are_the_pixels_tell_exactly_as_much() -> None:
    found = information.run(subject(judges=(reading(),)))
    assert found["label_accuracy_of_pixels"] == 1 and found["caption_recall@1_of_pixels"] == 1
    assert found["label_nats_of_pixels"] < 0.05 and found["word_nats_of_pixels"] < math.log(2) + 0.05
    for name, value in found.items():
        if "pixels" in name:
            for view in ("latents", "reconstructions"):
                assert found[name.replace("pixels", view)] == value
        if "lost" in name:
            assert value == 0
    assert {name for name in found if "lost" in name} == {
        f"{what}_nats_lost_by_{view}{error}"
        for what in ("label", "word")
        for view in ("latents", "reconstructions")
        for error in ("", "_standard_error")
    }


def test_what_is_told_without_looking_is_how_often_each_is_seen() -> None:
    """Of labels 40%, 40% and 20%, of words half as much: but for what is kept for those that are never seen."""
    found = information.run(subject())
    assert found["label_accuracy_chance"] == 0.4  # of cats and dogs, which are as many, one
    entropy = -0.8 * math.log(0.4) - 0.2 * math.log(0.2)
    assert 0 < found["label_nats_chance"] - entropy < 0.01
    assert 0 < found["word_nats_chance"] - entropy - math.log(2) < 0.01
    error = math.log(2) * math.sqrt(0.2 * 0.8 / 49)
    assert found["label_nats_chance_standard_error"] == pytest.approx(error, rel=0.02)
    assert (found["images"], found["training_images"]) == (50, 100)
    unseen = [{"label": "fish", "captions": ("fish",)}, *records(ASKED[1:])]
    told = information.run(subject(asked=unseen))
    assert math.isfinite(told["label_nats_of_pixels"]) and told["label_accuracy_of_pixels"] == 0.98


def test_an_encoder_that_throws_the_pixels_away_that_say_it_falls_to_chance() -> None:
    """Exactly where nothing is left, and about where noise is. Pixels tell as before; what is decoded is as poor."""
    blank = information.run(subject(lambda image: 0.0 * image, grey, judges=(reading(),)))
    for view in ("latents", "reconstructions"):
        assert blank[f"label_accuracy_of_{view}"] == blank["label_accuracy_chance"] == 0.4
        for what in ("label", "word"):
            assert blank[f"{what}_nats_of_{view}"] == blank[f"{what}_nats_chance"]
            lost = blank[f"{what}_nats_chance"] - blank[f"{what}_nats_of_pixels"]
            assert blank[f"{what}_nats_lost_by_{view}"] == pytest.approx(lost) and lost > 0.9
        assert blank[f"caption_recall@1_of_{view}"] == 0  # what is equally near is not found
    noisy = information.run(subject(lambda image: jnp.float32(image).at[:, 0].set(7), jnp.uint8))
    assert noisy["label_accuracy_of_latents"] < 0.6 and noisy["label_accuracy_of_pixels"] == 1
    assert noisy["label_nats_of_latents"] == pytest.approx(noisy["label_nats_chance"], abs=0.1)
    assert noisy["label_nats_lost_by_latents"] > 0.9
    assert noisy["label_nats_of_reconstructions"] == noisy["label_nats_of_latents"]


@pytest.mark.parametrize("mixing", ["permuted", "scaled", "mixed"])
def test_latents_that_are_mixed_tell_as_much(mixing: str) -> None:
    matrix = {
        "permuted": np.eye(4)[[2, 0, 3, 1]],
        "scaled": np.diag([3, -50, 0.01, 7]),
        "mixed": np.linalg.qr(RNG.normal(size=(4, 4)))[0] @ np.diag([1, 2, 0.5, 1]),
    }[mixing]

    def encode(image: jax.Array) -> jax.Array:
        return (image.reshape(-1, 4) @ matrix + 5).reshape(-1, 2, 2, 1).astype(jnp.float32)

    found = information.run(subject(encode, grey, judges=(reading(),)))
    assert found["label_accuracy_of_latents"] == found["caption_recall@1_of_latents"] == 1
    assert found["label_nats_of_latents"] == pytest.approx(found["label_nats_of_pixels"], abs=0.02)
    if mixing != "mixed":
        assert found["label_nats_lost_by_latents"] == pytest.approx(0, abs=2e-3)


def label_of(image: jax.Array) -> jax.Array:
    return jnp.where(image[:, 0, 0, 0] > 125, 0, jnp.where(image[:, 0, 1, 0] > 125, 1, 2))


@pytest.mark.parametrize(
    ("latents", "encode"),
    [
        (Input((1, 1), "int32", 3), lambda image: label_of(image)[:, None, None]),
        # Of two books the first is noise; of the other, codes far apart say the same, and neighbours do not.
        (
            Input((1, 1, 2), "int32", 12),
            lambda image: jnp.stack([image[:, 1, 1, 0] % 12, 3 * (image[:, 1, 0, 0] % 4) + label_of(image)], -1)[
                :, None, None
            ],
        ),
        # Of two maps the second is noise.
        (
            {"a": Input((1, 2, 1), "float32"), "b": Input((2,), "float32")},
            lambda image: {"a": jnp.float32(image[:, :1]), "b": jnp.float32(image[:, 1, :, 0])},
        ),
    ],
)
def test_latents_of_any_kind_that_say_it_tell_it(latents: Any, encode: Any) -> None:
    found = information.run(subject(encode, grey, latents, judges=(reading(),)))
    assert found["label_accuracy_of_latents"] == found["caption_recall@1_of_latents"] == 1
    assert found["label_nats_of_latents"] < 0.1


def test_the_error_of_what_is_lost_is_that_of_its_differences_and_of_a_ratio_over_images() -> None:
    """Images of one caption and of three: words are counted, and images drawn."""
    asked = np.array([[1, 0, 1.0], [2, 2, 2], [0, 1, 1], [0, 0, 0]])
    log_probs = {name: np.log(RNG.dirichlet([1, 1, 1], 4)) for name in ("of_latents", "of_pixels", "chance")}
    found = information.nats_of("word", log_probs, asked)
    nats = {name: -(asked * each).sum(axis=1) for name, each in log_probs.items()}
    assert found["word_nats_chance"] == pytest.approx(nats["chance"].sum() / 10)
    difference = nats["of_latents"] - nats["of_pixels"]
    lost = difference.sum() / 10
    assert found["word_nats_lost_by_latents"] == pytest.approx(lost)
    spread = difference - lost * asked.sum(axis=1)
    error = math.sqrt(4 * spread.var(ddof=1)) / 10
    assert found["word_nats_lost_by_latents_standard_error"] == pytest.approx(error)
    assert "word_nats_lost_by_pixels" not in found and "word_nats_lost_by_chance" not in found


def test_words_are_those_of_all_captions_and_rare_ones_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(information, "WORDS", 2)
    learned = [["Red cat!", "a red cat"], ["blue, dog"], ["blue-eyed dog"]]
    views = {"pixels": features.turned(np.zeros((3, 1), np.float32), np.zeros((2, 1), np.float32))}
    found = information.of_words(views, learned, [["a red dog"], ["cat cat mouse"]])
    # Twice red, cat and dog, of which the first two by the alphabet are known, and five others: of three images none
    # tells what to keep for the unseen, and each is counted once more.
    p = np.array([3, 3, 6]) / 12
    assert found["word_nats_chance"] == pytest.approx(-np.log([p[2], p[2], p[1], p[0], p[0], p[2]]).mean())
    assert information.of_words(views, learned, [["!"], ["?"]]) == {}


def measured(found: Metrics, *parts: str) -> set[str]:
    """Of all metrics the kinds."""
    return {name.split("_")[0] for name in found if all(part in name for part in parts)}


def test_what_the_data_have_is_measured_and_the_rest_left_out() -> None:
    def given(*keys: str, **more: Any) -> set[str]:
        return measured(information.run(subject(learned=records(LEARNED, *keys), asked=records(ASKED, *keys), **more)))

    assert given("label", judges=(reading(),)) == {"images", "training", "label"}
    assert given("captions") == {"images", "training", "word"}
    assert given("captions", judges=(reading(),)) == {"images", "training", "word", "caption"}
    some = [*records(ASKED, "captions")[:-1], {"captions": ()}]
    assert measured(information.run(subject(asked=some))) == {"images", "training"}
    assert measured(information.run(subject(decode=None)), "reconstructions") == set()
    assert measured(information.run(subject(decode=None)), "latents") == {"label", "word"}


def test_each_judge_speaks_for_itself_and_one_that_reads_nothing_tells_nothing() -> None:
    blind = replace(reading("blind"), tokenizer=None)
    found = information.run(subject(judges=(reading("a"), reading("same", np.ones((3, 3))), blind)))
    names = [f"caption_recall@{k}_{of}" for k in (1, 5, 10) for of in ("of_latents", "of_reconstructions", "chance")]
    assert [found[f"{name}_by_a"] for name in names if "chance" not in name] == [1] * 6
    assert [found[f"{name}_by_blind"] for name in names] == [None] * 9
    assert found["caption_recall@1_of_latents_by_same"] == 0  # all captions are one
    # Of 50 texts 20 are a cat's or a dog's own and 10 a bird's.
    assert found["caption_recall@1_chance_by_a"] == pytest.approx(0.8 * 20 / 50 + 0.2 * 10 / 50)
    assert not any(name in found for name in names)


def test_a_caption_is_found_in_the_space_without_what_all_captions_share() -> None:
    """Read along one line far from the origin, by direction alone a caption in the middle would be near to none."""
    read = np.array([[100, 0], [102, 0], [100, 2.0]])
    found = information.run(subject(judges=(reading(read=read),)))
    assert found["caption_recall@1_of_latents"] == 1


def test_images_of_the_split_are_not_learned_from() -> None:
    """Here with wrong labels. Where no others are there, there is nothing to learn from."""
    wrong = [{"label": "cat"}] * len(HELD_OUT)
    both, told = np.concatenate([HELD_OUT, TRAINING]), records(LEARNED, "label")
    asked = records(ASKED, "label")
    found = information.run(subject(training=both, learned=[*wrong, *told], asked=asked))
    alone = information.run(subject(learned=told, asked=asked))
    assert found == alone and found["training_images"] == 100
    nothing = information.run(subject(training=HELD_OUT, learned=wrong, asked=asked))
    assert nothing == {"images": 50, "training_images": 0}


def test_no_more_images_are_looked_at_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(information, "IMAGES", 20)
    found = information.run(subject())
    assert (found["images"], found["training_images"]) == (20, 20)
    cut = subject(training=TRAINING[:20], learned=records(LEARNED[:20]), asked=records(ASKED[:20]))
    assert information.run(replace(cut, batches=batches(HELD_OUT[:20]))) == found


def test_all_is_the_same_by_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "LARGEST", 2)
    found = [information.run(subject(key=jax.random.key(seed))) for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]
    assert found[0]["label_nats_lost_by_latents"] == 0


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"encodes images as what is no number: evaluate another --checkpoint-step"):
        information.run(subject(lambda image: jnp.log(jnp.float32(image) - 300)))


def test_it_applies_to_what_encodes_where_there_is_something_to_learn_from() -> None:
    (evaluation,) = (each for each in EVALUATIONS if each.name == "information")
    whole = subject()
    assert evaluation.applies_to(whole) and evaluation.applies_to(subject(decode=None))
    assert not evaluation.applies_to(replace(whole, lessons=None))
    assert not evaluation.applies_to(replace(whole, records=None))
    assert not evaluation.applies_to(replace(whole, model=replace(whole.model, encode=None)))
