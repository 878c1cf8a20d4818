"""Images are drawn once and seen once, whichever evaluations ask, and of captions where there are some."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from judging import TOKENIZER, judge, painter

from vlm_jax.contract import Model
from vlm_jax.evals import Judge, Pictures, Subject, clip_score, drawn, frechet, generation, kid
from vlm_jax.evals.drawn import parts, seen

CAPTIONS = ["red cat", "green dog", "blue bird", "house", "moon"]
REAL = np.arange(0, 160, 32, dtype=np.uint8)[:, None, None, None] + np.zeros((5, 4, 4, 1), np.uint8)
WITNESS = judge(REAL, np.eye(5), CAPTIONS, np.eye(5))


def subject(model: Model | None = None, captions: list[tuple[str, ...]] | None = None, **given: Any) -> Subject:
    """Two images at a time."""

    def records() -> Iterator[Mapping[str, Any]]:
        return ({"captions": each} for each in captions or [(caption,) for caption in CAPTIONS])

    pictures = Pictures(
        levels=256,
        held_out=lambda: iter([REAL[:2], REAL[2:4], REAL[4:]]),
        training=lambda: zip(records(), REAL, strict=True),
    )
    known: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "records": records,
        "training_texts": lambda: iter(CAPTIONS),
        "pictures": pictures,
        "judges": (WITNESS,),
    }
    model = painter(CAPTIONS, REAL) if model is None else model
    return Subject(model=model, variables={}, batches=lambda: iter(()), examples=5, **{**known, **given})


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of what is drawn, in order."""
    found: list[int] = []
    plain = drawn.painter

    def counting(subject: Subject, captions: Any, together: int) -> Callable[[int], np.ndarray]:
        draw = plain(subject, captions, together)
        return lambda index: found.append(index) or draw(index)  # type: ignore[func-returns-value]

    monkeypatch.setattr(drawn, "painter", counting)
    return found


def test_all_evaluations_look_at_the_same_images_which_each_judge_sees_once(
    draws: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    plain = Judge.embeddings

    def counting(judge: Judge, batches: Any, levels: int) -> np.ndarray:
        batches = list(batches)
        looks.append(sum(map(len, batches)))
        return plain(judge, batches, levels)

    monkeypatch.setattr(Judge, "embeddings", counting)
    whole = subject()
    for evaluation in (frechet, kid, clip_score):
        evaluation.run(whole)
    assert draws == [0, 1, 2] and looks == [10]
    found = generation.run(whole)
    assert draws == [0, 1, 2] and looks == [10, 5]  # those of the nearest captions
    assert found == generation.run(subject())


def test_more_are_drawn_when_more_are_asked_for_and_are_the_same(draws: list[int]) -> None:
    step_by_step, at_once = subject(), subject()
    assert [len(part.drawn) for part in parts(step_by_step, 1)] == [2] and draws == [0]
    assert [len(part.drawn) for part in parts(step_by_step, 3)] == [2, 2] and draws == [0, 1]
    assert len(parts(step_by_step)) == 3 and draws == [0, 1, 2]
    assert len(parts(step_by_step, 2)) == 1 and len(parts(step_by_step, 9)) == 3 and draws == [0, 1, 2]
    for one, other in zip(parts(step_by_step), parts(at_once), strict=True):
        np.testing.assert_array_equal(one.drawn, other.drawn)
    few, all_of_them = seen(step_by_step, WITNESS, 3), seen(step_by_step, WITNESS)
    assert len(few.real) == len(few.drawn) == 3 and len(all_of_them.drawn) == 5
    np.testing.assert_array_equal(all_of_them.real, np.eye(5))
    np.testing.assert_array_equal(all_of_them.drawn, np.eye(5))


def test_what_failed_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, plain = subject(), drawn.painter

    def failing(subject: Subject, captions: Any, together: int) -> Callable[[int], np.ndarray]:
        draw = plain(subject, captions, together)
        return lambda index: draw(index) if index < 2 else 1 / 0  # type: ignore[return-value]

    with monkeypatch.context() as context:
        context.setattr(drawn, "painter", failing)
        with pytest.raises(ZeroDivisionError):
            frechet.run(broken)
    assert frechet.run(broken) == frechet.run(subject())


def test_an_image_is_drawn_of_the_first_caption_of_the_held_out_one_where_all_have_some() -> None:
    """Else of nothing, which the painter would paint black, had it not to be told."""
    found = frechet.run(subject(captions=[(caption, "tree") for caption in CAPTIONS]))
    assert found["distance_of_embeddings"] == pytest.approx(0, abs=1e-6)

    def untold(_: Any, key: Any, given: Any, *, num: int, temperature: float, sampling: Any) -> jax.Array:
        assert given == {}
        return jax.numpy.zeros((num, 4, 4, 1), "uint8")

    silent = replace(painter(CAPTIONS, REAL), sample=untold)
    bare = [(caption,) if caption != "moon" else () for caption in CAPTIONS]
    for given in ({"captions": bare}, {"tokenizer": None}, {"records": None}):
        assert frechet.run(subject(silent, **given))["samples"] == 5


def test_each_part_is_drawn_with_noise_of_its_own_and_the_same_again() -> None:
    def noise(_: Any, key: Any, given: Any, *, num: int, temperature: float, sampling: Any) -> jax.Array:
        return jax.random.bits(key, (num, 4, 4, 1), "uint8")

    model = replace(painter(CAPTIONS, REAL), sample=noise)

    def images(**given: Any) -> np.ndarray:
        return np.concatenate([part.drawn for part in parts(subject(model, **given))])

    one = images()
    np.testing.assert_array_equal(one, images())
    assert len(np.unique(one.reshape(5, -1), axis=0)) == 5
    assert not (one == images(key=jax.random.key(1))).all(axis=(1, 2, 3)).any()
    key = jax.random.fold_in(jax.random.key(0), 1)
    np.testing.assert_array_equal(one[2:4], jax.random.bits(key, (2, 4, 4, 1), "uint8"))
