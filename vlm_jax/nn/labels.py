"""Classes that a model may be told: how they are read, dropped in training, and drawn where they are not told.

Of `classes` there are 0 ... classes - 1; one label more, `classes`, tells nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Input
from vlm_jax.errors import UserError


def check_classes(classes: int | None) -> None:
    """Refuses a number of classes that is none."""
    if classes is not None and classes < 1:
        raise UserError(f"classes is {classes}: it must be at least 1, or None")


def label_input(classes: int | None) -> dict[str, Input]:
    """The field that tells classes; none of a model without."""
    return {} if classes is None else {"label": Input((), "int32", classes)}


def training_labels(
    key: Array, label: Int[Array, " B"] | None, classes: int | None, dropout: float
) -> Int[Array, " B"] | None:
    """The labels, a random share of them replaced by the one that tells nothing, for guidance (2207.12598)."""
    if label is None or classes is None:
        return None
    return jnp.where(jax.random.bernoulli(key, dropout, label.shape), classes, label)


def sampling_labels(
    key: Array, label: Int[Array, " N"] | None, classes: int | None, num: int
) -> Int[Array, " N"] | None:
    """The labels to draw images of: those asked for, else uniform ones; None of a model that is told no class."""
    if classes is None or label is not None:
        return None if classes is None else label
    # As those inferred from nothing, so that to complete an image of which nothing is known is to draw one.
    return jax.random.categorical(key, jnp.zeros((num, classes)))


def inferred_labels(
    key: Array, log_likelihood: Callable[[Int[Array, " B"]], Float[Array, " B"]], classes: int | None, num: int
) -> Int[Array, " B"] | None:
    """Labels drawn from their probabilities given what `log_likelihood` of a label is of, in nats.

    Beforehand all are alike. None of a model that is told no class.
    """
    if classes is None:
        return None
    evidence = jax.lax.map(lambda label: log_likelihood(jnp.full(num, label)), jnp.arange(classes))
    return jax.random.categorical(key, evidence.T)
