"""Bits per dimension of held-out images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vlm_jax.contract import Batch
from vlm_jax.evals.subject import Evaluation, Subject
from vlm_jax.objectives.likelihood import nats_to_bits_per_dim

NOISE_DRAWS = 4096
"""Draws of the noise that a bound is averaged over, at least, in all: few images need many each, many images one."""
IMPORTANCE_DRAWS = 64
"""Samples of the importance-weighted bound, for each image."""


def draws(subject: Subject, function: Callable[..., jax.Array], count: int) -> Float[np.ndarray, "draws N"]:
    """`function(variables, batch, key)` for every image of the split, `count` times with fresh noise."""
    key = jax.random.key(0) if subject.key is None else subject.key

    @jax.jit
    def repeat(batch: Batch, key: jax.Array) -> jax.Array:
        return jax.lax.map(lambda key: function(subject.variables, batch, key), jax.random.split(key, count))

    columns = []
    for index, (batch, valid) in enumerate(subject.batches()):
        columns.append(np.asarray(repeat(batch, jax.random.fold_in(key, index)))[:, :valid])
    return np.concatenate(columns, axis=1)


def mean_and_error(nats: Float[np.ndarray, " N"], image_shape: tuple[int, ...]) -> tuple[float, float | None]:
    """The mean over images and its standard error, in bits per dimension; one image alone says nothing of its error."""
    bits = np.asarray(nats_to_bits_per_dim(jnp.asarray(nats), image_shape), np.float64)
    return float(bits.mean()), float(bits.std(ddof=1) / np.sqrt(len(bits))) if len(bits) > 1 else None


def summary(nats: Float[np.ndarray, " N"], image_shape: tuple[int, ...]) -> dict[str, float | None]:
    mean, error = mean_and_error(nats, image_shape)
    return {"bits_per_dim": mean, "bits_per_dim_standard_error": error}


def run(subject: Subject) -> dict[str, float | None]:
    model = subject.model
    assert model.log_likelihood is not None
    values = draws(subject, model.log_likelihood, 1 if model.bound == "exact" else -(-NOISE_DRAWS // subject.examples))
    return summary(values.mean(axis=0), model.inputs["image"].shape)


def run_importance_weighted(subject: Subject) -> dict[str, float | None]:
    """log 1/K sum_k w_k, the bound of 1509.00519 with K = `IMPORTANCE_DRAWS`."""
    model = subject.model
    assert model.log_weight is not None
    weights = draws(subject, model.log_weight, IMPORTANCE_DRAWS)
    nats = jax.nn.logsumexp(jnp.asarray(weights), axis=0) - np.log(len(weights))
    return summary(np.asarray(nats), model.inputs["image"].shape)


EVALUATION = Evaluation("likelihood", ("log_likelihood", "sample"), run)
IMPORTANCE_WEIGHTED = Evaluation("importance_weighted", ("log_weight",), run_importance_weighted)
