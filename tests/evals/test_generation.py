"""Pictures drawn of captions: of painters that paint what they are told, what they like and what they have seen."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from judging import TOKENIZER, Sampling, judge, painter

from vlm_jax.contract import Input, Model
from vlm_jax.errors import UserError
from vlm_jax.evals import EVALUATIONS, Judge, Pictures, Subject, generation
from vlm_jax.evals.frechet import frechet_distance
from vlm_jax.evals.generation import images_of_nearest
from vlm_jax.evals.retrieval import chance

TRAINING = ["red dog", "green cat", "blue bird tree house", "moon"]
CAPTIONS = ["red cat", "green dog", "blue bird moon house", "red fish", "moon", "star"]
NEAREST = [0, 0, 2, 0, 3, 0]
"""Of the training captions to each of the others: the first of those that tie, and so the first to the last."""
GROUPS = {"new_combination": [0, 1], "near_duplicate": [2], "new_word": [3, 5], "seen": [4]}

RAMP = np.add(*np.mgrid[:16, :16])[:, :, None].astype(np.uint8)
REAL = RAMP + 32 * np.arange(6, dtype=np.uint8)[:, None, None, None]
"""Six images as far from another as 32 levels."""
LEARNED = REAL[:4] + np.uint8(8)
"""Those of training, of which none is nearer to a real one than 30 dB."""
SEEN = np.eye(6)[[0, 1, 2, 3, 4, 4, 0, 1, 2, 4]]
"""What the judge takes a real image for, the last wrongly, and what one of training."""


def records(captions: list[str]) -> Iterator[Mapping[str, Any]]:
    return ({"captions": (caption,)} for caption in captions)


def witness(more: Any = (), seen: Any = (), name: str = "judge") -> Judge:
    """One that knows all images, and others besides."""
    pictures = [REAL, LEARNED, more] if len(more) else [REAL, LEARNED]
    vectors = [SEEN, seen] if len(more) else [SEEN]
    return judge(np.concatenate(pictures), np.concatenate(vectors), CAPTIONS, np.eye(6), name)


def subject(model: Model, *judges: Judge, images: np.ndarray = REAL, **given: Any) -> Subject:
    """Four images at a time."""
    pictures = Pictures(
        levels=256,
        held_out=lambda: iter([images[:4], images[4:]]),
        training=lambda: zip(records(TRAINING), LEARNED, strict=True),
    )
    known: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "records": lambda: records(CAPTIONS),
        "training_texts": lambda: iter(TRAINING),
        "pictures": pictures,
        "judges": judges or (witness(),),
    }
    return Subject(model=model, variables={}, batches=lambda: iter(()), examples=len(images), **{**known, **given})


def recalls(found: Mapping[str, Any], name: str) -> dict[str, float]:
    """Those of one set of images."""
    return {metric[len(name) :]: value for metric, value in found.items() if metric.startswith(f"{name}recall@")}


def test_a_perfect_painter_reaches_what_the_real_images_do() -> None:
    """Five of six of them, whatever the judge says of the others."""
    found = generation.run(subject(painter(CAPTIONS, REAL)))
    assert recalls(found, "") == recalls(found, "real_")
    assert found["recall@1"] == pytest.approx(5 / 6) and found["recall@10"] == 1
    assert [found[f"recall@1_{group}"] for group in GROUPS] == [1, 1, 0.5, 1]
    assert found["captions"] == 6
    assert {group: found[f"captions_{group}"] for group in GROUPS} == {name: len(of) for name, of in GROUPS.items()}
    assert found["distance_of_embeddings"] == pytest.approx(0, abs=1e-6)
    assert (found["near_copies"], found["real_near_copies"]) == (0, 0)
    expected = 10 * math.log10(255**2 / 8**2)
    assert found["psnr_of_nearest"] == found["real_psnr_of_nearest"] == pytest.approx(expected, abs=1e-6)
    assert found["borders_of_4"] == found["real_borders_of_8"] == 1


def test_a_painter_that_ignores_what_it_is_told_reaches_chance() -> None:
    """Whatever it paints finds some captions before others, and each of those once."""
    grey, seen = np.full((1, 16, 16, 1), 77, np.uint8), np.arange(6, 0, -1)[None] / 10
    found = generation.run(subject(painter(CAPTIONS, grey.repeat(6, axis=0)), witness(grey, seen)))
    assert [found[f"recall@{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 6, 5 / 6, 1])
    assert [found[f"chance_recall@{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 6, 5 / 6, 1])
    assert found["recall@1_new_combination"] == 0.5 and found["recall@5_new_word"] == 0.5
    assert found["real_recall@1"] == pytest.approx(5 / 6)
    assert found["borders_of_4"] is None


def test_a_painter_that_copies_reaches_what_the_nearest_training_captions_do_and_is_caught() -> None:
    """Three of six: of the others it has no picture, or a judge takes that for another."""
    found = generation.run(subject(painter(CAPTIONS, LEARNED[NEAREST])))
    assert recalls(found, "") == recalls(found, "nearest_caption_")
    assert found["nearest_caption_recall@1"] == 0.5
    assert [found[f"nearest_caption_recall@1_{group}"] for group in GROUPS] == [0.5, 1, 0, 1]
    assert (found["near_copies"], found["real_near_copies"]) == (1, 0)
    assert found["psnr_of_nearest"] == math.inf


def test_a_near_copy_is_one_up_to_35_decibels() -> None:
    """That is 4.5 levels: of one of four images by 5 it is none."""
    near = LEARNED[NEAREST] + np.array([4, 4, 5, 4, 5, 4], np.uint8)[:, None, None, None]
    assert generation.run(subject(painter(CAPTIONS, near)))["near_copies"] == pytest.approx(4 / 6)
    beside = np.concatenate([LEARNED[:2] + np.uint8(4), REAL[2:]])
    found = generation.run(subject(painter(CAPTIONS, REAL), images=beside))
    assert found["real_near_copies"] == pytest.approx(2 / 6)
    median = 10 * math.log10(255**2 / 8**2)  # of errors of 4, 4, 8, 8, 24 and 56
    assert found["real_psnr_of_nearest"] == pytest.approx(median)


def test_patches_show_in_what_is_drawn_beside_what_is_real() -> None:
    """Of squares of 4 pixels all steps are alike: of the 15 along a line one is a border of 8, and two are within."""
    squares = REAL[:, ::4, ::4].repeat(4, axis=1).repeat(4, axis=2)
    found = generation.run(subject(painter(CAPTIONS, squares)))
    assert (found["borders_of_4"], found["borders_of_8"]) == (math.inf, pytest.approx(7))
    assert (found["real_borders_of_4"], found["real_borders_of_8"]) == (1, 1)


def test_each_judge_has_figures_of_its_own_and_pixels_have_one() -> None:
    """The second takes each real image for the next caption's."""
    pictures = np.concatenate([REAL, LEARNED])
    other = judge(pictures, np.roll(SEEN, 1, axis=1), CAPTIONS, np.eye(6), "b")
    found = generation.run(subject(painter(CAPTIONS, LEARNED[NEAREST]), witness(name="a"), other))
    assert found["real_recall@1_by_a"] == pytest.approx(5 / 6) and found["real_recall@1_by_b"] == pytest.approx(1 / 6)
    assert "recall@1" not in found and "near_copies" in found and "recall@1_new_word_by_b" in found
    expected = frechet_distance(SEEN[:6], SEEN[6:][NEAREST])
    assert found["distance_of_embeddings_by_a"] == pytest.approx(expected, rel=1e-5) and expected > 0.1


def test_any_caption_of_an_image_is_its_own_and_equal_images_share_theirs() -> None:
    """The judge finds image 0 by its second caption alone, and image 5, which is 4 once more, by that of 4."""
    known = [(caption,) for caption in CAPTIONS]
    known[0] = ("red cat", "house")
    read = [*np.roll(np.eye(6), 3, axis=0)[:1], *np.eye(6)[1:], np.eye(6)[0]]
    images = REAL[[0, 1, 2, 3, 4, 4]]
    seer = judge(images[:5], np.eye(6)[:5], [*CAPTIONS, "house"], np.stack(read))
    given = {"records": lambda: ({"captions": each} for each in known), "images": images}
    found = generation.run(subject(painter(CAPTIONS, images), seer, **given))
    assert found["real_recall@1"] == found["recall@1"] == pytest.approx(5 / 6)  # 3 ties with "red cat"
    missed = [math.comb(7 - own, 1) / 7 for own in (2, 1, 1, 1, 2, 2)]
    assert found["chance_recall@1"] == pytest.approx(1 - np.mean(missed))


def test_settings_of_sampling_are_the_runs() -> None:
    found = generation.run(subject(painter(CAPTIONS, LEARNED[NEAREST]), sampling=Sampling(brighter=5)))
    assert found["near_copies"] == 0


def test_so_many_images_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert generation.IMAGES == 400
    for count in (3, 5):
        monkeypatch.setattr(generation, "IMAGES", count)
        found = generation.run(subject(painter(CAPTIONS, REAL)))
        assert found["captions"] == count and found["chance_recall@1"] == pytest.approx(1 / count)


def test_the_nearest_caption_has_the_most_words_in_common_of_all() -> None:
    """Not the most: a long one says much besides. Neither order nor case nor repetition counts."""
    training = [("moon", "a"), ("red cat on a mat",), ("Cat, red!",), ("cat",), ("blue red cat dog",)]
    images = np.arange(5, dtype=np.uint8)[:, None, None, None]
    pairs = [({"captions": each}, image) for each, image in zip(training, images, strict=True)]
    sought = ["red cat", "cat cat cat", "red cat on mat", "a moon", "zebra", "?"]
    # "a moon" is half of either caption of the first image; nothing has a zebra.
    found = images_of_nearest(sought, [({}, images[4]), *pairs])
    np.testing.assert_array_equal(found[:, 0, 0, 0], [2, 3, 1, 0, 0, 0])
    tied = images_of_nearest(CAPTIONS, zip(records(TRAINING), LEARNED, strict=True))
    np.testing.assert_array_equal(tied, LEARNED[NEAREST])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9])
def test_chance_is_the_mean_over_all_orders(k: int) -> None:
    belongs = np.array([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], bool)
    orders = itertools.permutations(range(5))
    expected = np.mean([row[list(order[:k])].any() for order in orders for row in belongs])
    assert chance(belongs, k) == pytest.approx(expected)
    assert chance(np.eye(10, dtype=bool), k) == pytest.approx(min(k, 10) / 10)


def test_it_is_of_models_that_are_told_texts_alone() -> None:
    (evaluation,) = (each for each in EVALUATIONS if each.name == "generation")
    whole = subject(painter(CAPTIONS, REAL))
    assert evaluation.applies_to(whole)
    untold = replace(whole, model=replace(whole.model, conditions={"label": Input((), "int32", 3)}))
    assert not evaluation.applies_to(untold)
    for name in ("tokenizer", "records", "training_texts", "pictures", "judges"):
        assert not evaluation.applies_to(replace(whole, **{name: None}))


def test_judges_that_all_read_nothing_are_refused_before_anything_is_drawn() -> None:
    model = replace(painter(CAPTIONS, REAL), sample=lambda *_, **__: pytest.fail("drawn"))
    blind = replace(witness().model, embed_text=None)
    for mute in (Judge(blind, {}, TOKENIZER, "mute"), Judge(witness().model, {}, None, "mute")):
        alone = subject(model, mute)
        assert not generation.EVALUATION.applies_to(alone)
        with pytest.raises(UserError, match=r"^mute: no judge embeds texts, by which generation could tell"):
            generation.run(alone)


def test_a_judge_that_reads_nothing_beside_one_that_reads_says_nothing() -> None:
    mute = Judge(replace(witness().model, embed_text=None), {}, TOKENIZER, "mute")
    both = subject(painter(CAPTIONS, REAL), witness(name="a"), mute)
    assert generation.EVALUATION.applies_to(both)
    found = generation.run(both)
    assert found["recall@1_by_a"] == pytest.approx(5 / 6) and not any("mute" in metric for metric in found)


def test_what_cannot_be_measured_is_refused_before_anything_is_drawn() -> None:
    model = replace(painter(CAPTIONS, REAL), sample=lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(UserError, match="one image has no covariance"):
        generation.run(subject(model, records=lambda: records(CAPTIONS[:1]), images=REAL[:1]))
    bare = [{"captions": (caption,) if caption != "star" else ()} for caption in CAPTIONS]
    with pytest.raises(UserError, match="an image of the split has no caption to draw"):
        generation.run(subject(model, records=lambda: iter(bare)))
    small = {"tokens": model.conditions["tokens"]._replace(limit=100)}
    with pytest.raises(UserError, match=r"the field 'tokens' holds the value \d+, outside \[0, 100\)"):
        generation.run(subject(replace(model, conditions=small)))
