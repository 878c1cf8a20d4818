"""Retrieval: how often one of an image's captions, or a caption's image, is among the nearest of all.

The protocol of Karpathy & Fei-Fei (1412.2306): an image may have several captions, and any of them finds it.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from vlm_jax.evals.subject import Evaluation, Subject

RANKS = (1, 5, 10)


class Items(NamedTuple):
    """The images or the texts of a split, in order."""

    vectors: Float[np.ndarray, "N D"]
    """Of unit length."""
    ids: Int[np.ndarray, " N"]
    """The same for items that the model reads alike."""


def items(subject: Subject) -> tuple[Items, Items]:
    """Every image and every text of the split, row i of one paired with row i of the other."""
    model = subject.model
    assert model.embed_image is not None and model.embed_text is not None
    encoders = {"image": jax.jit(model.embed_image), "tokens": jax.jit(model.embed_text)}
    vectors: dict[str, list[np.ndarray]] = {field: [] for field in encoders}
    numbers: dict[str, dict[bytes, int]] = {field: {} for field in encoders}
    ids: dict[str, list[int]] = {field: [] for field in encoders}
    for batch, valid in subject.batches():
        for field, encode in encoders.items():
            vectors[field].append(np.asarray(encode(subject.variables, batch[field]))[:valid])
            seen = numbers[field]
            ids[field] += [seen.setdefault(row.tobytes(), len(seen)) for row in np.asarray(batch[field])[:valid]]
    image, text = (Items(np.concatenate(vectors[field]), np.array(ids[field])) for field in encoders)
    return image, text


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


def recall_at(similarity: Float[np.ndarray, "N M"], belongs: Bool[np.ndarray, "N M"], k: int) -> float:
    """The share of rows of which a column that belongs to it is among the `k` most similar.

    A tie with a column that does not belong counts against the row, as does what cannot be compared.
    """
    best = np.max(similarity, axis=1, where=belongs, initial=-np.inf, keepdims=True)
    better = np.sum(~belongs & ~(similarity < best), axis=1)
    return float(np.mean(better < k))


def run(subject: Subject) -> dict[str, float]:
    images, texts = items(subject)
    belongs = belonging(np.arange(len(texts.ids)), images.ids, texts.ids)
    similarity = images.vectors @ texts.vectors.T
    metrics = {}
    for k in RANKS:
        metrics[f"text_to_image_recall@{k}"] = recall_at(similarity.T, belongs.T, k)
        metrics[f"image_to_text_recall@{k}"] = recall_at(similarity, belongs, k)
    return metrics


EVALUATION = Evaluation("retrieval", ("embed_image", "embed_text"), run)
