"""Retrieval: how often one of an image's captions, or a caption's image, is among the nearest of all.

The protocol of Karpathy & Fei-Fei (1412.2306): an image may have several captions, and any of them finds it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from vlm_jax.evals.judge import Judge
from vlm_jax.evals.subject import Evaluation, Subject

RANKS = (1, 5, 10)
TOGETHER = 128
"""Captions that are read at a time, where nothing else says how many."""


class Items(NamedTuple):
    """The images or the texts of a split, in order."""

    vectors: Float[np.ndarray, "N D"]
    """Of unit length."""
    ids: Int[np.ndarray, " N"]
    """The same for items that the model reads alike."""


def images_of(subject: Subject) -> tuple[Items, int]:
    """Every image of the split, and how many of them were read at a time."""
    assert subject.model.embed_image is not None
    embed, size = jax.jit(subject.model.embed_image), 1
    vectors: list[np.ndarray] = []
    contents: list[bytes] = []
    for batch, valid in subject.batches():
        images, size = np.asarray(batch["image"])[:valid], len(batch["image"])
        vectors.append(np.asarray(embed(subject.variables, batch["image"]))[:valid])
        contents += [image.tobytes() for image in images]
    return Items(np.concatenate(vectors), alike(contents)), size


def alike(contents: Iterable[bytes]) -> Int[np.ndarray, " N"]:
    """A number for each, the same for those that are equal."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(each, len(numbers)) for each in contents])


def texts_of(reader: Subject | Judge, captions: Sequence[str], size: int = TOGETHER) -> Items:
    """Every caption, `size` of them at a time."""
    assert reader.model.embed_text is not None and reader.tokenizer is not None
    embed = jax.jit(reader.model.embed_text)
    tokens = reader.tokenizer.encode(captions, reader.model.inputs["tokens"].shape[0])
    filled = np.pad(tokens, ((0, -len(tokens) % size), (0, 0)), mode="edge")  # so that all parts have one shape
    parts = np.split(filled, len(filled) // size)
    vectors = np.concatenate([np.asarray(embed(reader.variables, part)) for part in parts])
    return Items(vectors[: len(tokens)], np.unique(tokens, axis=0, return_inverse=True)[1].reshape(-1))


def belonging(
    image_of: Int[np.ndarray, " M"], image_ids: Int[np.ndarray, " N"], text_ids: Int[np.ndarray, " M"]
) -> Bool[np.ndarray, "N M"]:
    """Which texts are captions of which images.

    Args:
      image_of: the image that each text was written for.
      image_ids, text_ids: items with one number are equal, and what belongs to one of them belongs to all.
    """
    pairs = np.zeros((image_ids.max() + 1, text_ids.max() + 1), bool)
    pairs[image_ids[image_of], text_ids] = True
    return pairs[image_ids[:, None], text_ids]


def captions_of(subject: Subject) -> list[Sequence[str]] | None:
    """Those of each image of the split; None: an image has none."""
    captions = [record.get("captions", ()) for record in subject.records()] if subject.records is not None else []
    return captions if captions and all(captions) else None


def gallery(
    reader: Subject | Judge, captions: Sequence[Sequence[str]], image_ids: Int[np.ndarray, " N"], size: int = TOGETHER
) -> tuple[Items, Bool[np.ndarray, "N M"]]:
    """All captions of N images, as a model reads them, and which of them belong to which of the images."""
    texts = texts_of(reader, [text for each in captions for text in each], size)
    image_of = np.repeat(np.arange(len(captions)), [len(each) for each in captions])
    return texts, belonging(image_of, image_ids, texts.ids)


def ranks(similarity: Float[np.ndarray, "N M"], belongs: Bool[np.ndarray, "N M"]) -> Int[np.ndarray, " N"]:
    """How many columns that do not belong to a row are more similar to it than all that do.

    A tie with a column that does not belong counts against the row, as does what cannot be compared.
    """
    best = np.max(similarity, axis=1, where=belongs, initial=-np.inf, keepdims=True)
    return np.sum(~belongs & ~(similarity < best), axis=1)


def recall_at(similarity: Float[np.ndarray, "N M"], belongs: Bool[np.ndarray, "N M"], k: int) -> float:
    """The share of rows of which a column that belongs to it is among the `k` most similar, by `ranks`."""
    return float(np.mean(ranks(similarity, belongs) < k))


def chance(belongs: Bool[np.ndarray, "N M"], k: int) -> float:
    """The recall of texts in random order: k / M where each of the images has one of the M for its own."""
    count = belongs.shape[1]
    if k >= count:
        return 1.0
    return 1 - float(np.mean([math.comb(count - own, k) / math.comb(count, k) for own in belongs.sum(axis=1).tolist()]))


def run(subject: Subject) -> dict[str, float]:
    """Of all images and all of their captions."""
    assert subject.records is not None
    captions = [record["captions"] for record in subject.records()]
    images, size = images_of(subject)
    texts, belongs = gallery(subject, captions, images.ids, size)
    similarity = images.vectors @ texts.vectors.T
    metrics = {}
    for k in RANKS:
        metrics[f"text_to_image_recall@{k}"] = recall_at(similarity.T, belongs.T, k)
        metrics[f"image_to_text_recall@{k}"] = recall_at(similarity, belongs, k)
    return metrics


EVALUATION = Evaluation("retrieval", ("embed_image", "embed_text"), run, given=("tokenizer", "records"))
