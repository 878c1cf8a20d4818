"""How far the samples of a model are from held-out images, in the eyes of a judge."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from jaxtyping import Float

from vlm_jax.errors import UserError
from vlm_jax.evals.subject import Evaluation, Subject


def frechet_distance(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)) of the means m, n and covariances A, B (Dowson & Landau 1982).

    It is that between Gaussians of these moments, and never negative.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), whose roots are real.
    values, vectors = np.linalg.eigh(np.atleast_2d(a))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ np.atleast_2d(b) @ root), 0)).sum()
    difference = x.mean(axis=0) - y.mean(axis=0)
    return max(0.0, float(difference @ difference + np.trace(root @ root) + np.trace(np.atleast_2d(b)) - 2 * shared))


def run(subject: Subject) -> dict[str, float]:
    """Of as many samples as there are held-out images; FID is this distance of one network's features (1706.08500).

    Of few images for the dimensions of the embedding it is too large, by what hangs on their number: compare like
    with like.
    """
    model, judge = subject.model, subject.judge
    levels = model.inputs["image"].limit if "image" in model.inputs else None
    assert model.sample is not None and judge is not None
    if levels is None:
        raise UserError("the model samples no images that a judge could look at: leave out --judge")
    if subject.examples < 2:
        raise UserError("one image has no covariance: choose a larger split")
    key = jax.random.key(0) if subject.key is None else subject.key
    draws: list[np.ndarray] = []

    def held_out() -> Iterator[np.ndarray]:
        assert model.sample is not None
        draw = None
        for index, (batch, valid) in enumerate(subject.batches()):
            images = np.asarray(batch["image"])
            draw = draw or jax.jit(partial(model.sample, num=len(images), sampling=subject.sampling))
            draws.append(np.asarray(draw(subject.variables, jax.random.fold_in(key, index), {}))[:valid])
            yield images[:valid]

    real = judge.embeddings(held_out(), levels)
    distance = frechet_distance(real, judge.embeddings(draws, levels))
    return {"distance_of_embeddings": distance, "samples": float(sum(map(len, draws)))}


EVALUATION = Evaluation("frechet", ("sample",), run, given=("judge",))
