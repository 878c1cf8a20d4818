"""The kernel distance of a model's samples from held-out images, in the eyes of judges: KID in those of Inception.

Demystifying MMD GANs (1801.01401): the squared maximum mean discrepancy under a cubic kernel, estimated without bias,
so that of few images it errs to either side and is not too large, as Fréchet's distance is.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vlm_jax.evals.drawn import parts, seen
from vlm_jax.evals.judge import Judge, by_each
from vlm_jax.evals.subject import Evaluation, Subject
from vlm_jax.evals.writing import Metrics

SUBSETS = 100
"""Over which the mean is taken."""
SUBSET = 1000
"""Images of a subset, at most. Both are the release's (`compute_scores.py` of MMD-GAN)."""


class KernelDistance(NamedTuple):
    """Over random subsets."""

    mean: float
    """Of two samples of one distribution it is 0 in expectation, and so may be negative."""
    deviation: float | None
    """Of subsets from their mean; None: there is one alone."""


def kernel(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "N M"]:
    """(x y / D + 1)^3."""
    linear = x @ y.T / x.shape[1] + 1
    return linear * linear * linear  # NumPy's power takes ten times as long


def squared_discrepancy(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """MMD^2 without bias (Gretton et al. 2012, lemma 6): no vector is paired with itself."""
    xx, yy = kernel(x, x), kernel(y, y)
    within = sum((each.sum() - each.trace()) / (len(each) * (len(each) - 1)) for each in (xx, yy))
    return float(within - 2 * kernel(x, y).mean())


def subset_size(count: int) -> int:
    """Images of a subset of so many: half of them at most, for subsets of nearly all would hardly differ."""
    return max(2, min(SUBSET, count // 2))


def kernel_distance(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> KernelDistance:
    """Of subsets that are drawn without replacement, the same each time it is asked."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = subset_size(min(len(x), len(y)))
    if len(x) == len(y) == size:
        return KernelDistance(squared_discrepancy(x, y), None)
    rng = np.random.default_rng(0)
    values = [
        squared_discrepancy(*(each[rng.choice(len(each), size, replace=False)] for each in (x, y)))
        for _ in range(SUBSETS)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def run(subject: Subject) -> Metrics:
    """Of as many samples as there are held-out images; in the eyes of one network alone it is KID."""
    assert subject.judges is not None

    def distance(judge: Judge) -> Metrics:
        vectors = seen(subject, judge)
        name = "kid" if judge.fid else f"kid_of_{judge.sees}"
        mean, deviation = kernel_distance(vectors.real, vectors.drawn)
        return {name: mean, f"{name}_deviation": deviation}

    found = by_each(subject.judges, distance)
    samples = sum(len(part.drawn) for part in parts(subject))
    return {**found, "samples": float(samples), "subset_size": float(subset_size(samples))}


EVALUATION = Evaluation("kid", ("sample",), run, given=("judges", "pictures"), if_given=("tokenizer", "records"))
