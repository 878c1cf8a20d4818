"""The held-out images, as many that the model draws, and what judges see in both.

They are drawn once, and seen once, for all evaluations of a subject that ask. A model that can be told texts is told
the first caption of each held-out image, where all of them have some; another one is told nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from vlm_jax.contract import check_batch
from vlm_jax.errors import UserError
from vlm_jax.evals.judge import Judge
from vlm_jax.evals.retrieval import captions_of
from vlm_jax.evals.subject import Subject


class Beside(NamedTuple):
    """Images of a split, and those that were drawn in their place."""

    real: UInt8[np.ndarray, "B H W C"]
    drawn: UInt8[np.ndarray, "B H W C"]


class Seen(NamedTuple):
    """What a judge sees in them."""

    real: Float[np.ndarray, "N D"]
    drawn: Float[np.ndarray, "N D"]


def parts(subject: Subject, most: int | None = None) -> list[Beside]:
    """The images in order, as many at a time as they are read and drawn, each time with other noise.

    Args:
      most: so many images or more, where there are as many; None: all.

    Raises:
      UserError: there is one alone, or the tokenizer makes ids that the model cannot be told.
    """
    assert subject.pictures is not None
    kept: list[Beside] = subject.shared.setdefault("parts", [])
    if "whole" not in subject.shared and (most is None or sum(len(part.real) for part in kept) < most):
        real = first(subject.pictures.held_out(), most)
        if sum(map(len, real)) < 2:
            raise UserError("one image has no covariance: choose a larger split")
        captions = captions_of(subject)
        draw = painter(subject, None if captions is None else [each[0] for each in captions], len(real[0]))
        missing = tqdm(range(len(kept), len(real)), "drawing", leave=False, disable=None)
        kept.extend(Beside(real[index], draw(index)[: len(real[index])]) for index in missing)
        if most is None:
            subject.shared["whole"] = True
    return kept[: len(first((part.real for part in kept), most))]


def first(batches: Iterable[UInt8[np.ndarray, "B H W C"]], most: int | None) -> list[UInt8[np.ndarray, "B H W C"]]:
    """So many images of them or more, where there are as many; None: all."""
    found, count = [], 0
    for images in batches:
        found.append(images)
        count += len(images)
        if most is not None and count >= most:
            break
    return found


def painter(
    subject: Subject, captions: Sequence[str] | None, together: int
) -> Callable[[int], UInt8[np.ndarray, "B H W C"]]:
    """What draws the images of a number, so many at a time, of as many captions in order; None: of nothing.

    Raises:
      UserError: the tokenizer makes ids that the model cannot be told.
    """
    assert subject.model.sample is not None
    sample = jax.jit(partial(subject.model.sample, num=together, sampling=subject.sampling))
    told = told_of(subject, captions, together)

    def draw(index: int) -> UInt8[np.ndarray, "B H W C"]:
        given = {} if told is None else told[index]
        return np.asarray(sample(subject.variables, jax.random.fold_in(subject.key, index), given))

    return draw


def told_of(subject: Subject, captions: Sequence[str] | None, together: int) -> list[dict[str, np.ndarray]] | None:
    """What the model is told, for so many images at a time; None: nothing."""
    if "tokens" not in subject.model.conditions or subject.tokenizer is None or captions is None:
        return None
    spec = subject.model.conditions["tokens"]
    tokens = subject.tokenizer.encode(captions, spec.shape[0])
    # Under `jax.jit` the model would not see what it cannot read.
    tokens = check_batch({"tokens": spec}, {"tokens": tokens})["tokens"]
    filled = np.pad(tokens, ((0, -len(tokens) % together), (0, 0)), mode="edge")  # so that all parts have one shape
    return [{"tokens": part} for part in np.split(filled, len(filled) // together)]


def captions_due(subject: Subject) -> list[Sequence[str]]:
    """Those of each held-out image, of which it is drawn by the first.

    Raises:
      UserError: one has none.
    """
    captions = captions_of(subject)
    if captions is None:
        raise UserError("an image of the split has no caption to draw: choose a split whose images have some")
    return captions


def seen(subject: Subject, judge: Judge, most: int | None = None) -> Seen:
    """By a judge.

    Args:
      most: images; None: all.

    Raises:
      UserError: as `parts`.
    """
    assert subject.pictures is not None
    kept: list[Seen] = subject.shared.setdefault(f"seen by {judge.name}", [])
    if new := parts(subject, most)[len(kept) :]:
        batches = [part.real for part in new] + [part.drawn for part in new]
        ends = np.cumsum([len(part) for part in batches])
        vectors = np.split(judge.embeddings(batches, subject.pictures.levels), ends[:-1])
        kept += map(Seen, vectors[: len(new)], vectors[len(new) :])
    real, drawn = (np.concatenate(vectors)[:most] for vectors in zip(*kept, strict=True))
    return Seen(real, drawn)
