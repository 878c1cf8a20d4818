"""Bits per dimension of held-out images: for each sub-pixel, or whatever else `count` counts."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vlm_jax.contract import Batch, Variables
from vlm_jax.evals.subject import Evaluation, Subject

NOISE_DRAWS = 4096
"""Draws of the noise that a bound is averaged over, at least, in all: few images need many each, many images one."""
IMPORTANCE_DRAWS = 64
"""Samples of the importance-weighted bound, for each image."""


class Draws(NamedTuple):
    """A number for each example of a split, many times."""

    nats: Float[np.ndarray, "draws N"]
    counts: Int[np.ndarray, " N"]
    """Of how many sub-pixels or tokens."""


def draws(subject: Subject, function: Callable[..., jax.Array], repeats: int) -> Draws:
    """`function(variables, batch, key)` for every example of the split, `repeats` times with fresh noise."""
    assert subject.model.count is not None

    @jax.jit
    def repeat(variables: Variables, batch: Batch, key: jax.Array) -> jax.Array:
        return jax.lax.map(lambda key: function(variables, batch, key), jax.random.split(key, repeats))

    columns, counts = [], []
    for index, (batch, valid) in enumerate(subject.batches()):
        columns.append(np.asarray(repeat(subject.variables, batch, jax.random.fold_in(subject.key, index)))[:, :valid])
        counts.append(np.asarray(subject.model.count(batch))[:valid])
    return Draws(np.concatenate(columns, axis=1), np.concatenate(counts))


def mean_and_error(nats: Float[np.ndarray, " N"], count: Int[np.ndarray, " N"]) -> tuple[float, float | None]:
    """Bits for each of what all log-likelihoods together are of, and the standard error over examples."""
    return ratio_and_error(-np.asarray(nats, np.float64) / math.log(2), count)


def ratio_and_error(totals: Float[np.ndarray, " N"], counts: Int[np.ndarray, " N"]) -> tuple[float, float | None]:
    """The mean of what is counted in N draws, of which each has a total, and its standard error, that of a ratio of
    means; one draw alone says nothing of it."""
    size = float(np.mean(counts))
    mean = float(np.mean(totals)) / size
    spread = totals - mean * counts
    return mean, float(spread.std(ddof=1) / math.sqrt(len(spread)) / size) if len(spread) > 1 else None


def summary(nats: Float[np.ndarray, " N"], count: Int[np.ndarray, " N"]) -> dict[str, float | None]:
    mean, error = mean_and_error(nats, count)
    return {"bits_per_dim": mean, "bits_per_dim_standard_error": error}


def run(subject: Subject) -> dict[str, float | None]:
    model = subject.model
    assert model.log_likelihood is not None
    found = draws(subject, model.log_likelihood, 1 if model.bound == "exact" else -(-NOISE_DRAWS // subject.examples))
    return summary(found.nats.mean(axis=0), found.counts)


def run_importance_weighted(subject: Subject) -> dict[str, float | None]:
    """log 1/K sum_k w_k, the bound of 1509.00519 with K = `IMPORTANCE_DRAWS`."""
    assert subject.model.log_weight is not None
    weights = draws(subject, subject.model.log_weight, IMPORTANCE_DRAWS)
    nats = jax.nn.logsumexp(jnp.asarray(weights.nats), axis=0) - np.log(len(weights.nats))
    return summary(np.asarray(nats), weights.counts)


EVALUATION = Evaluation("likelihood", ("log_likelihood", "sample"), run)
IMPORTANCE_WEIGHTED = Evaluation("importance_weighted", ("log_weight",), run_importance_weighted)
