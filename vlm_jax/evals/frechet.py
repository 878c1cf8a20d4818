"""How far the samples of a model are from held-out images, in the eyes of judges."""

import numpy as np
from jaxtyping import Float

from vlm_jax.evals.drawn import parts, seen
from vlm_jax.evals.judge import Judge, by_each
from vlm_jax.evals.subject import Evaluation, Subject
from vlm_jax.evals.writing import Metrics


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


def run(subject: Subject) -> Metrics:
    """Of as many samples as there are held-out images; in the eyes of one network it is FID (1706.08500).

    Of few images for the dimensions of the vectors it is too large, by what hangs on their number: compare like with
    like.
    """
    assert subject.judges is not None

    def distance(judge: Judge) -> Metrics:
        vectors = seen(subject, judge)
        name = "fid" if judge.fid else f"distance_of_{judge.sees}"
        return {name: frechet_distance(vectors.real, vectors.drawn)}

    found = by_each(subject.judges, distance)
    return {**found, "samples": float(sum(len(part.drawn) for part in parts(subject)))}


EVALUATION = Evaluation("frechet", ("sample",), run, given=("judges", "pictures"), if_given=("tokenizer", "records"))
