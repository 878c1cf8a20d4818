"""Classes: dropped, drawn, and inferred from what is seen, at the rates that are stated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.nn.labels import check_classes, inferred_labels, label_input, sampling_labels, training_labels

KEY = jax.random.key(0)
LABEL = jnp.arange(30_000) % 3


def test_labels_are_dropped_at_the_stated_rate():
    labels = training_labels(KEY, LABEL, 3, 0.1)
    dropped = labels == 3
    assert abs(dropped.mean() - 0.1) < 0.01
    np.testing.assert_array_equal(jnp.where(dropped, LABEL, labels), LABEL)
    np.testing.assert_array_equal(training_labels(KEY, LABEL, 3, 0.0), LABEL)
    assert training_labels(KEY, LABEL, None, 0.1) is None


def test_labels_that_are_not_told_are_drawn_uniformly():
    drawn = sampling_labels(KEY, None, 3, 30_000)
    np.testing.assert_allclose(np.bincount(drawn) / 30_000, np.full(3, 1 / 3), atol=0.01)
    np.testing.assert_array_equal(sampling_labels(KEY, LABEL, 3, 30_000), LABEL)
    nothing = inferred_labels(KEY, lambda label: jnp.zeros(len(label)), 3, 30_000)
    np.testing.assert_array_equal(nothing, drawn)
    assert sampling_labels(KEY, None, None, 5) is None


def test_labels_are_inferred_by_bayes_rule():
    """Of likelihoods 1, 2 and 5, and of 5, 2 and 1."""
    likelihoods = jnp.array([[1.0, 2.0, 5.0], [5.0, 2.0, 1.0]])
    rows = jnp.arange(30_000) % 2
    drawn = np.asarray(inferred_labels(KEY, lambda label: jnp.log(likelihoods[rows, label]), 3, 30_000))
    for row in range(2):
        shares = np.bincount(drawn[np.asarray(rows) == row]) / 15_000
        np.testing.assert_allclose(shares, likelihoods[row] / 8, atol=0.015)
    assert inferred_labels(KEY, lambda label: label, None, 5) is None


def test_a_field_of_labels_is_there_where_there_are_classes():
    assert label_input(None) == {} and label_input(7)["label"].limit == 7
    with pytest.raises(UserError, match="classes is 0: it must be at least 1, or None"):
        check_classes(0)
