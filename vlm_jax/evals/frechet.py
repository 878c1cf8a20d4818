"""How far the samples of a model are from held-out images, in the eyes of judges."""

from functools import partial

import jax
import numpy as np
from jaxtyping import Float

from vlm_jax.errors import UserError
from vlm_jax.evals.judge import Judge, by_each
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


def run(subject: Subject) -> dict[str, float | None]:
    """Of as many samples as there are held-out images; FID is this distance of one network's features (1706.08500).

    Of few images for the dimensions of the embedding it is too large, by what hangs on their number: compare like
    with like.
    """
    model, pictures = subject.model, subject.pictures
    assert model.sample is not None and pictures is not None and subject.judges is not None
    key = jax.random.key(0) if subject.key is None else subject.key
    real = list(pictures.held_out())
    if sum(map(len, real)) < 2:
        raise UserError("one image has no covariance: choose a larger split")
    draw = jax.jit(partial(model.sample, num=len(real[0]), sampling=subject.sampling))
    draws = [
        np.asarray(draw(subject.variables, jax.random.fold_in(key, index), {}))[: len(images)]
        for index, images in enumerate(real)
    ]

    def distance(judge: Judge) -> dict[str, float]:
        seen, drawn = (judge.embeddings(images, pictures.levels) for images in (real, draws))
        return {"distance_of_embeddings": frechet_distance(seen, drawn)}

    return {**by_each(subject.judges, distance), "samples": float(sum(map(len, draws)))}


EVALUATION = Evaluation("frechet", ("sample",), run, given=("judges", "pictures"))
