"""Pictures that a model draws of captions: whether their captions are found by them, and whether they are copies.

A picture is drawn of the first caption of each held-out image, and finds that image's, or does not, among the captions
of all, in the eyes of each judge. Beside it stand the same of the images themselves (`real_`), which is all that the
judge can tell, and of the image that training has of the nearest caption (`nearest_caption_`), which is what is to be
had without drawing; all of them in all, and by how new the first caption is to training (`captions.novelty`).
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from vlm_jax.evals.captions import novelty
from vlm_jax.evals.cider import words
from vlm_jax.evals.drawn import captions_due, parts, seen
from vlm_jax.evals.frechet import frechet_distance
from vlm_jax.evals.judge import Judge, by_each
from vlm_jax.evals.pixels import border_contrast, psnr_of_nearest
from vlm_jax.evals.retrieval import RANKS, alike, chance, gallery, ranks
from vlm_jax.evals.subject import Evaluation, Subject
from vlm_jax.evals.writing import Metrics, members

IMAGES = 400
"""Held-out images, at most: the first of the split."""
NEAR_COPY = 35.0
"""PSNR in dB above which an image is a near-copy of one of training.

Emoji lie on white and come in variants: two that differ by one shade of a skin are 20 to 33 dB apart. Of the held-out
ones of `openmoji` a fifth is as near as 30 dB to one of training, a fiftieth as 35 dB. What a first stage has blurred
may stay below: so the median of the PSNR is told too, and both beside those of the real images."""
GRIDS = (4, 8)
"""Pixels of the sides of patches whose borders are looked for."""


def run(subject: Subject) -> Metrics:
    """By each judge recall of captions and the Fréchet distance of drawn from real images; of the pixels the share of
    near-copies of training images, the median PSNR of the nearest, and how much borders of patches show.
    """
    EVALUATION.check(subject)
    pictures = subject.pictures
    assert pictures is not None and pictures.training is not None
    assert subject.judges is not None and subject.training_texts is not None
    looked_at = shown(subject)
    real, drawn = looked_at.real, looked_at.drawn
    new = novelty(subject.training_texts())
    groups = [new(caption) for caption in looked_at.asked]

    def judged(judge: Judge) -> Metrics:
        if not judge.reads:
            return {}
        looked = ranked(subject, judge)
        found: Metrics = {}
        for name, each in looked.ranks.items():
            for k, (group, those) in itertools.product(RANKS, members(groups, len(groups)).items()):
                found[f"{name}recall@{k}{group}"] = float(np.mean(each[those] < k))
        found |= {f"chance_recall@{k}": chance(looked.belongs, k) for k in RANKS}
        both = seen(subject, judge, IMAGES)
        return found | {"distance_of_embeddings": frechet_distance(both.real, both.drawn)}

    found = by_each(subject.judges, judged)
    both = np.concatenate([drawn, real])
    decibels = psnr_of_nearest(both, (image for _, image in pictures.training()), pictures.levels)
    for name, images, nearest in zip(("", "real_"), (drawn, real), np.split(decibels, 2), strict=True):
        found[f"{name}near_copies"] = float(np.mean(nearest > NEAR_COPY))
        found[f"{name}psnr_of_nearest"] = float(np.median(nearest))
        found |= {f"{name}borders_of_{side}": border_contrast(images, side) for side in GRIDS}
    counts = {f"captions_{group}": float(groups.count(group)) for group in sorted(set(groups))}
    return {**found, "captions": float(len(groups)), **counts}


class Shown(NamedTuple):
    """What is looked at."""

    captions: list[Sequence[str]]
    """Of each image, of which the first is asked for."""
    real: UInt8[np.ndarray, "N H W C"]
    drawn: UInt8[np.ndarray, "N H W C"]

    @property
    def asked(self) -> list[str]:
        return [each[0] for each in self.captions]


class Ranked(NamedTuple):
    """What a judge makes of pictures."""

    ranks: dict[str, Int[np.ndarray, " N"]]
    """`retrieval.ranks` of what was drawn (""), of the images themselves ("real_") and of the image that training has
    of the nearest caption ("nearest_caption_")."""
    belongs: Bool[np.ndarray, "N M"]


def shown(subject: Subject) -> Shown:
    """The images, and what is drawn of their captions."""

    def show() -> Shown:
        captions = captions_due(subject)[:IMAGES]
        images = zip(*parts(subject, IMAGES), strict=True)
        return Shown(captions, *(np.concatenate(each)[:IMAGES] for each in images))

    return subject.once("shown", show)


def ranked(subject: Subject, judge: Judge) -> Ranked:
    """By one judge that reads."""
    pictures, looked = subject.pictures, shown(subject)
    assert pictures is not None and pictures.training is not None
    training = pictures.training
    nearest = subject.once("nearest", lambda: images_of_nearest(looked.asked, training()))

    def rank() -> Ranked:
        together = len(parts(subject, IMAGES)[0].real)
        batches = np.split(nearest, range(together, len(looked.real), together))
        texts, belongs = gallery(judge, looked.captions, alike(image.tobytes() for image in looked.real))
        both = seen(subject, judge, IMAGES)
        vectors = {"": both.drawn, "real_": both.real, "nearest_caption_": judge.embeddings(batches, pictures.levels)}
        return Ranked({kind: ranks(each @ texts.vectors.T, belongs) for kind, each in vectors.items()}, belongs)

    return subject.once(f"ranked by {judge.name}", rank)


def images_of_nearest(
    captions: Sequence[str], training: Iterable[tuple[Mapping[str, Any], UInt8[np.ndarray, "H W C"]]]
) -> UInt8[np.ndarray, "N H W C"]:
    """For each caption the training image with the one nearest to it, whatever a judge would say.

    By the words that both have, as a share of those that one of them has (Jaccard 1912), in no order and counted once;
    of those that tie the first.
    """
    sought = [set(words(caption)) for caption in captions]
    holding = defaultdict(list)
    for index, mine in enumerate(sought):
        for word in mine:
            holding[word].append(index)
    shares, found = np.zeros(len(sought)), dict[int, np.ndarray]()
    first: np.ndarray | None = None  # nothing is nearer to a caption that shares no word with any
    for record, image in training:
        for theirs in map(set, map(words, record.get("captions", ()))):
            first = image if first is None else first
            for index in {each for word in theirs for each in holding.get(word, ())}:
                share = len(sought[index] & theirs) / len(sought[index] | theirs)
                if share > shares[index]:
                    shares[index], found[index] = share, image
    assert first is not None
    return np.stack([found.get(index, first) for index in range(len(sought))])


EVALUATION = Evaluation(
    "generation",
    ("sample",),
    run,
    given=("tokenizer", "records", "training_texts", "pictures", "judges"),
    conditions=("tokens",),
    judges_read=True,
)
