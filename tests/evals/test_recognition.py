"""Drawings of captions that are classes: of painters of what they are told, of something else, or of what is unseen."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from judging import TOKENIZER, judge, painter, seeing

from vlm_jax.contract import Model
from vlm_jax.errors import UserError
from vlm_jax.evals import Judge, Pictures, Subject, recognition

NAMES = ["blue dog", "green cat", "red bird"]
SHADES = np.array([40, 120, 200], np.uint8)


def plain(shades: np.ndarray) -> np.ndarray:
    """Images of one grey each."""
    return np.broadcast_to(shades[:, None, None, None], (len(shades), 4, 4, 1)).copy()


def of_class(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """So many images, each of a class at random, of a shade near to that of the class."""
    rng = np.random.default_rng(seed)
    number = rng.permutation(np.arange(count) % 3)
    return plain(SHADES[number] + rng.integers(0, 9, count).astype(np.uint8)), [NAMES[each] for each in number]


HELD_OUT, ASKED = of_class(30, 1)
LEARNED, TAUGHT = of_class(60, 2)
DECOYS = plain(np.zeros(60, np.uint8))
"""Of another caption, which is not asked for."""


def bright(_: Any, image: jax.Array) -> jax.Array:
    """How bright an image is, as the one that is nearest of ten shades."""
    return jax.nn.one_hot(image[:, 0, 0, 0] // 26, 10)


def records(captions: list[str]) -> Iterator[Mapping[str, Any]]:
    return ({"captions": (caption, "moon")} for caption in captions)


def subject(
    model: Model, *judges: Judge, asked: list[str] = ASKED, taught: list[str] = TAUGHT, known: list[str] | None = None
) -> Subject:
    both = np.concatenate([DECOYS, LEARNED])
    pictures = Pictures(
        levels=256,
        held_out=lambda: iter([HELD_OUT[:16], HELD_OUT[16:]]),
        training=lambda: zip(records(["tree"] * len(DECOYS) + taught), both, strict=True),
    )
    return Subject(
        model=model,
        variables={},
        batches=lambda: iter(()),
        examples=len(HELD_OUT),
        tokenizer=TOKENIZER,
        records=lambda: records(asked),
        training_texts=lambda: iter(known or ["tree", *taught]),
        pictures=pictures,
        judges=judges or (seeing(4, 1, 256, bright),),
    )


def test_a_painter_of_what_it_is_told_is_recognised_always() -> None:
    found = recognition.run(subject(painter(NAMES, plain(SHADES))))
    assert (found["recognised"], found["real_recognised"]) == (1, 1)
    assert found["chance_recognised"] == pytest.approx(1 / 3)


def test_one_that_takes_one_caption_for_another_is_recognised_for_the_rest() -> None:
    """And one of a single picture by chance, with the error of as many draws, of each caption as many."""
    found = recognition.run(subject(painter(NAMES, plain(SHADES[[0, 2, 2]]))))
    assert found["recognised"] == pytest.approx(2 / 3) and found["real_recognised"] == 1
    found = recognition.run(subject(painter(NAMES, plain(SHADES[[1, 1, 1]]))))
    count = 3 * recognition.DRAWS
    assert found["recognised"] == pytest.approx(1 / 3)
    assert found["recognised_standard_error"] == pytest.approx(np.sqrt(2 / 9 / (count - 1)), rel=1e-3)


def test_drawings_are_in_the_order_of_the_captions_and_drawn_once_for_all_judges() -> None:
    calls = []
    plain_painter = painter(NAMES, plain(SHADES[[0, 2, 2]]))

    def counting(*args: Any, **how: Any) -> jax.Array:
        calls.append(how["num"])
        assert plain_painter.sample is not None
        return plain_painter.sample(*args, **how)

    both = subject(replace(plain_painter, sample=counting), *(seeing(4, 1, 256, bright, name) for name in "ab"))
    assert both.judges is not None
    for each in both.judges:
        found = recognition.recognised(both, each)
        drawn = found.recognised.reshape(3, recognition.DRAWS)
        np.testing.assert_array_equal(drawn, np.broadcast_to([[True], [False], [True]], drawn.shape))
        assert len(found.real_recognised) == len(HELD_OUT)
    assert calls == [3 * recognition.DRAWS]
    assert {"recognised_by_a", "real_recognised_standard_error_by_b"} <= recognition.run(both).keys()


def test_a_judge_that_sees_no_difference_recognises_by_the_shares_of_training() -> None:
    blind = judge(HELD_OUT, np.ones((len(HELD_OUT), 2)), NAMES, np.eye(3))
    found = recognition.run(subject(painter(NAMES, plain(SHADES)), replace(blind, tokenizer=None)))
    assert found["recognised"] == pytest.approx(1 / 3)


def test_what_is_somewhere_in_an_image_is_seen_by_a_judge_of_features() -> None:
    """The largest of a feature over the parts, where the mean of them is the same for all images."""
    shown = np.stack([HELD_OUT, HELD_OUT])

    def parts(_: Any, image: jax.Array) -> jax.Array:
        one = image[:, 0, 0].astype(np.float32)
        return jax.numpy.stack([-one, one, 0 * one], axis=1)

    watcher = seeing(4, 1, 256, features=True)
    watcher = replace(watcher, model=replace(watcher.model, image_features=parts))
    means = watcher.embeddings([HELD_OUT], 256)
    moments = watcher.statistics(shown, 256)
    np.testing.assert_array_equal(means, 0)
    levels = np.tile(HELD_OUT[:, 0, 0].astype(np.float32), (2, 1))
    np.testing.assert_allclose(
        moments, np.concatenate([0 * levels, levels, levels * np.sqrt(2 / 3)], axis=1), rtol=1e-6
    )


def test_captions_that_are_no_classes_define_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognition, "CAPTIONS", 2)
    silent = replace(painter(NAMES, plain(SHADES)), sample=lambda *_, **__: pytest.fail("drawn"))
    assert recognition.run(subject(silent)) == {"recognised": None}
    monkeypatch.undo()
    assert recognition.run(subject(silent, asked=["red bird"] * 30)) == {"recognised": None}
    untaught = [name for name in TAUGHT if name != NAMES[1]]
    assert recognition.run(subject(silent, known=untaught)) == {"recognised": None}


def test_captions_that_no_image_of_training_has_first_are_refused_before_anything_is_drawn() -> None:
    silent = replace(painter(NAMES, plain(SHADES)), sample=lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(
        UserError, match="no image of training has one of the captions of the split as its first, such as 'blue dog'"
    ):
        recognition.run(subject(silent, taught=["house"] * 60, known=TAUGHT))
