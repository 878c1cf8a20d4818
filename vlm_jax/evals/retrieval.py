"""Retrieval: how often an image's caption, or a caption's image, is among the nearest of all."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlm_jax.evals.subject import Evaluation, Subject

RANKS = (1, 5, 10)


def embeddings(subject: Subject) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N D"]]:
    """Every image and every text of the split as unit vectors, row i of one paired with row i of the other."""
    model, images, texts = subject.model, [], []
    assert model.encode_image is not None and model.encode_text is not None
    encode_image, encode_text = jax.jit(model.encode_image), jax.jit(model.encode_text)
    for batch, valid in subject.batches():
        images.append(np.asarray(encode_image(subject.variables, batch["image"]))[:valid])
        texts.append(np.asarray(encode_text(subject.variables, batch["tokens"]))[:valid])
    return np.concatenate(images), np.concatenate(texts)


def recall_at(similarity: Float[Array, "N M"], k: int) -> float:
    """The share of rows i whose column i is among the `k` largest; a tie counts against the row."""
    paired = jnp.diagonal(similarity)[:, None]
    better = jnp.sum(similarity >= paired, axis=1) - 1
    return float(jnp.mean(better < k))


def run(subject: Subject) -> dict[str, float]:
    images, texts = embeddings(subject)
    similarity = jnp.asarray(texts @ images.T)
    metrics = {}
    for k in RANKS:
        metrics[f"text_to_image_recall@{k}"] = recall_at(similarity, k)
        metrics[f"image_to_text_recall@{k}"] = recall_at(similarity.T, k)
    return metrics


EVALUATION = Evaluation("retrieval", ("encode_image", "encode_text"), run)
