"""What a model draws of a few captions, such as "a teal circle": whether they are taken for what they are to be.

Where the held-out images have few captions, all of which training's images have too, a caption is a class. A linear
probe (`probe`) of what a judge's features tell of training's images learns which, whatever captions the judge itself
has read, and is shown as many drawings of each. Beside them stands what it makes of the held-out images (`real_`): all
that it can tell.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8
from tqdm import tqdm

from vlm_jax.errors import UserError
from vlm_jax.evals.drawn import captions_due, painter
from vlm_jax.evals.features import turned
from vlm_jax.evals.judge import Judge, by_each
from vlm_jax.evals.likelihood import ratio_and_error
from vlm_jax.evals.probe import multinomial
from vlm_jax.evals.subject import Evaluation, Pictures, Subject
from vlm_jax.evals.writing import Metrics

CAPTIONS = 64
"""Of a data set, at most, for them to be classes."""
DRAWS = 20
"""Of each caption."""
LESSONS = 4096
"""Images of training that a probe learns from, at most."""
TOGETHER = 120
"""Images that are drawn, and that a judge is shown, at a time."""


def run(subject: Subject) -> Metrics:
    """By each judge the shares of drawings and of held-out images that its probe takes for what their captions say,
    with standard errors, and what would be right by chance; of captions that are no classes nothing is defined.
    """
    EVALUATION.check(subject)
    assert subject.judges is not None
    names = classes(subject)
    if names is None:
        return {"recognised": None}

    def judged(judge: Judge) -> Metrics:
        found: Metrics = {}
        for name, right in recognised(subject, judge)._asdict().items():
            share, error = ratio_and_error(right.astype(float), np.ones(len(right)))
            found |= {name: share, f"{name}_standard_error": error}
        return found

    return {**by_each(subject.judges, judged), "chance_recognised": 1 / len(names)}


class Recognised(NamedTuple):
    """Whether images are taken for what they shall be."""

    recognised: Bool[np.ndarray, " N"]
    """`DRAWS` drawings of each caption, which are in order of the alphabet."""
    real_recognised: Bool[np.ndarray, " M"]
    """The held-out images."""


def recognised(subject: Subject, judge: Judge) -> Recognised:
    """By the probe of one judge.

    Raises:
      UserError: training has no image of any of the captions.
    """
    names, pictures = classes(subject), subject.pictures
    assert names is not None and pictures is not None
    looked = subject.once("of classes", lambda: shown(subject, names))
    images = np.concatenate([looked.learned, looked.drawn, looked.held_out])
    seen = judge.statistics(np.split(images, range(TOGETHER, len(images), TOGETHER)), pictures.levels)
    views = turned(*np.split(seen, [len(looked.learned)]))
    probe = multinomial(views.training, views.variances, np.eye(len(names))[numbers(names, looked.captions)])
    told = probe.log_probs(views.held_out).argmax(axis=1)
    right = told == numbers(names, [*np.repeat(names, DRAWS), *(each[0] for each in captions_due(subject))])
    return Recognised(*np.split(right, [len(looked.drawn)]))


class Shown(NamedTuple):
    """What all judges look at."""

    learned: UInt8[np.ndarray, "L H W C"]
    """Images of training."""
    captions: list[str]
    """Of these."""
    drawn: UInt8[np.ndarray, "N H W C"]
    held_out: UInt8[np.ndarray, "M H W C"]


def shown(subject: Subject, names: Sequence[str]) -> Shown:
    assert subject.pictures is not None
    learned = lessons(subject.pictures, names)  # before anything is drawn: there may be none
    return Shown(*learned, drawings(subject, names), np.concatenate(list(subject.pictures.held_out())))


def numbers(names: Sequence[str], captions: Iterable[str]) -> Int[np.ndarray, " N"]:
    """The place of each caption among those that there are."""
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[caption] for caption in captions])


def classes(subject: Subject) -> list[str] | None:
    """The captions, in order of the alphabet; None: there are too many, or one alone, or training lacks one."""
    return subject.once("classes", lambda: names_taught(subject))


def names_taught(subject: Subject) -> list[str] | None:
    assert subject.training_texts is not None
    names = sorted({each[0] for each in captions_due(subject)})
    if not 1 < len(names) <= CAPTIONS:
        return None
    untaught = set(names)
    for text in subject.training_texts():
        untaught.discard(text)
        if not untaught:
            return names
    return None


def lessons(pictures: Pictures, names: Sequence[str]) -> tuple[UInt8[np.ndarray, "N H W C"], list[str]]:
    """The first images of training that have one of these captions, each with that.

    Raises:
      UserError: none has, or has it as another of several.
    """
    assert pictures.training is not None
    known = set(names)
    of_them = (
        (image, caption)
        for record, image in pictures.training()
        for caption in record.get("captions", ())[:1]
        if caption in known
    )
    found = list(itertools.islice(of_them, LESSONS))
    if not found:
        raise UserError(f"no image of training has one of the captions of the split as its first, such as {names[0]!r}")
    return np.stack([image for image, _ in found]), [caption for _, caption in found]


def drawings(subject: Subject, names: Sequence[str]) -> UInt8[np.ndarray, "N H W C"]:
    """`DRAWS` of each, each of other noise."""
    asked = [str(name) for name in np.repeat(names, DRAWS)]
    together = min(TOGETHER, len(asked))
    draw = painter(subject, asked, together)
    parts = tqdm(range(-(-len(asked) // together)), "drawing", leave=False, disable=None)
    return np.concatenate([draw(part) for part in parts])[: len(asked)]


EVALUATION = Evaluation(
    "recognition",
    ("sample",),
    run,
    given=("tokenizer", "records", "training_texts", "pictures", "judges"),
    conditions=("tokens",),
)
