"""CLIPScore by hand: of drawn images and of real ones, of judges that read."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from judging import TOKENIZER, judge, painter

from vlm_jax.errors import UserError
from vlm_jax.evals import EVALUATIONS, Judge, Pictures, Subject, clip_score
from vlm_jax.evals.clip_score import clip_score as score

CAPTIONS = ["red cat", "green dog", "blue bird"]
REAL = np.arange(0, 96, 32, dtype=np.uint8)[:, None, None, None] + np.zeros((3, 4, 4, 1), np.uint8)
DRAWN = REAL + np.uint8(8)
ANGLES = np.array([0.3, 1.0, 2.0]), np.array([0.0, 1.2, 3.0])
"""Of what the judge sees in real images, and in drawn ones, from what it reads of their captions."""


def turned(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def witness(name: str = "judge") -> Judge:
    """To whom all captions are one direction."""
    seen = np.concatenate([turned(angles) for angles in ANGLES])
    return judge(np.concatenate([REAL, DRAWN]), seen, CAPTIONS, np.tile([[1.0, 0.0]], (3, 1)), name)


def subject(*judges: Judge, captions: Any = tuple((caption, "moon") for caption in CAPTIONS)) -> Subject:
    def records() -> Iterator[Mapping[str, Any]]:
        return ({"captions": each} for each in captions)

    return Subject(
        model=painter(CAPTIONS, DRAWN),
        variables={},
        batches=lambda: iter(()),
        examples=3,
        tokenizer=TOKENIZER,
        records=records,
        pictures=Pictures(levels=256, held_out=lambda: iter([REAL[:2], REAL[2:]])),
        judges=judges or (witness(),),
    )


def test_it_is_the_mean_of_two_and_a_half_cosines_where_they_are_positive() -> None:
    """2104.08718, equation 1, in a loop."""
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 50, 7)).astype(np.float32)
    images, texts = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, texts))
    expected = []
    for image, text in zip(images.tolist(), texts.tolist(), strict=True):
        cosine = sum(a * b for a, b in zip(image, text, strict=True))
        expected.append(2.5 * max(cosine, 0.0))
    assert 0 in expected and score(images, texts) == pytest.approx(sum(expected) / 50, rel=1e-6)


def test_drawn_images_are_scored_with_their_captions_and_real_ones_beside() -> None:
    """The angle of 2 and that of 3 are no likeness at all."""
    found = clip_score.run(subject())
    expected = {"score": np.cos([0.0, 1.2]), "real_score": np.cos([0.3, 1.0])}
    sums = {name: pytest.approx(2.5 * cosines.sum() / 3, rel=1e-5) for name, cosines in expected.items()}
    assert found == {**sums, "captions": 3}


def test_judges_that_read_nothing_say_nothing() -> None:
    blind = Judge(replace(witness().model, embed_text=None), {}, None, "blind")
    found = clip_score.run(subject(witness("a"), blind))
    assert found.keys() == {"score_by_a", "real_score_by_a", "captions"}
    with pytest.raises(UserError, match="blind: no judge embeds texts, by which clip_score could tell"):
        clip_score.run(subject(blind))


def test_it_is_of_models_that_are_told_captions() -> None:
    (evaluation,) = (each for each in EVALUATIONS if each.name == "clip_score")
    whole = subject()
    assert evaluation.applies_to(whole)
    assert not evaluation.applies_to(replace(whole, model=replace(whole.model, conditions={})))
    assert not evaluation.applies_to(subject(Judge(witness().model, {}, None, "mute")))
    with pytest.raises(UserError, match="an image of the split has no caption to draw"):
        clip_score.run(subject(captions=(("red cat",), (), ("moon",))))
