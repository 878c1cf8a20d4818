"""Probes: beside closed forms in float64, another library, and what they say where there is nothing to tell."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vlm_jax.evals import probe
from vlm_jax.evals.features import turned
from vlm_jax.evals.probe import PENALTIES, minimised, multinomial, ridge

RNG = np.random.default_rng(0)
COUNT = 60
FEATURES = turned(*(np.float32(RNG.normal(size=(count, 5))) for count in (COUNT, 4)))
X, VARIANCES = FEATURES.training.astype(np.float64), FEATURES.variances
COUNTS = RNG.poisson(np.exp(2 * X @ RNG.normal(size=(5, 4))) * [1, 2, 3, 0.1]).astype(float)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until nothing is left to gain."""
    monkeypatch.setattr(probe, "TOLERANCE", 1e-13)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_counts_are_told_as_well_as_the_penalty_allows(penalty: float) -> None:
    """It is convex: where the gradient of the objective, as it is written, is 0, it is least."""
    found = minimised(X, VARIANCES, COUNTS, penalty)
    shares = np.log((COUNTS.sum(axis=0) + 1) / (COUNTS.sum() + 4))
    np.testing.assert_allclose(found.shares, shares)

    def objective(weights: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(jnp.asarray(X) @ weights[:-1] + weights[-1] + shares)
        return -jnp.sum(COUNTS * log_probs) / COUNTS.sum() + penalty / 2 * jnp.sum(weights**2)

    with jax.enable_x64(True):
        gradient, at_none = (jax.grad(objective)(jnp.asarray(each)) for each in (found.weights, 0 * found.weights))
        assert np.abs(gradient).max() < 1e-4 * np.abs(at_none).max()
    np.testing.assert_allclose(np.exp(found.log_probs(X)).sum(axis=1), 1)
    assert found.nats(X, COUNTS).sum() == pytest.approx(-np.sum(COUNTS * found.log_probs(X)))


@pytest.mark.usefixtures("exact")
def test_of_labels_it_is_the_logistic_regression_of_another_library() -> None:
    """Which has no shares: of as many examples of each class these are nothing."""
    labels = np.tile([0, 1, 2], COUNT // 3)
    reference = LogisticRegression(C=1 / (1e-2 * COUNT), fit_intercept=False, tol=1e-10, max_iter=10_000)
    reference.fit(np.column_stack([X, np.ones(COUNT)]), labels)
    found = minimised(X, VARIANCES, np.eye(3)[labels], 1e-2)
    np.testing.assert_allclose(found.weights, reference.coef_.T, atol=1e-3)


@pytest.mark.usefixtures("exact")
def test_it_begins_anywhere_and_the_scale_of_its_steps_changes_nothing_that_it_finds() -> None:
    plain = minimised(X, VARIANCES, COUNTS, 1e-2)
    start = minimised(X, VARIANCES, COUNTS, 1.0)
    for other in (minimised(X, VARIANCES, COUNTS, 1e-2, start), minimised(X, np.ones(5), COUNTS, 1e-2)):
        np.testing.assert_allclose(other.log_probs(X), plain.log_probs(X), atol=1e-3)


@pytest.mark.usefixtures("exact")
def test_the_penalty_is_the_best_for_the_last_fifth_and_then_all_are_learned_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = COUNT - COUNT // 5
    nats = [
        minimised(X[:kept], VARIANCES, COUNTS[:kept], each).nats(X[kept:], COUNTS[kept:]).sum() for each in PENALTIES
    ]
    best = PENALTIES[int(np.argmin(nats))]
    assert 1e-6 < best < 1
    expected = minimised(X, VARIANCES, COUNTS, best)
    np.testing.assert_allclose(multinomial(X, VARIANCES, COUNTS).log_probs(X), expected.log_probs(X), atol=1e-3)
    tried = []
    real = minimised
    monkeypatch.setattr(probe, "minimised", lambda *given: tried.append((len(given[0]), given[3])) or real(*given))
    multinomial(X, VARIANCES, COUNTS)
    after = PENALTIES[PENALTIES.index(best) + 1]
    assert tried == [*((kept, each) for each in PENALTIES if each >= after), (COUNT, best)]


def test_what_tells_nothing_is_not_heard() -> None:
    """A probe of no features, or of one that misleads, says the shares, in which nothing is impossible."""
    counts = np.eye(3)[[0] * 6 + [1] * 4]
    for x in (np.zeros((10, 0)), np.where(np.arange(10) < 8, 1.0, -1.0)[:, None] * np.where(counts[:, :1] > 0, 1, -1)):
        found = multinomial(x, np.ones(x.shape[1]), counts)
        np.testing.assert_array_equal(found.weights, 0)
        np.testing.assert_allclose(np.exp(found.log_probs(x)), np.tile([7 / 13, 5 / 13, 1 / 13], (10, 1)))


TRUE = RNG.normal(size=(5, 3))
Y = X @ TRUE + 0.1 * RNG.normal(size=(COUNT, 3)) + [1, 2, 3]


@pytest.mark.parametrize("penalty", [1.0, 1e-3, 1e-6])
def test_vectors_are_told_by_the_least_squares_of_more_rows(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PENALTIES", (penalty,))
    rows = np.concatenate([X, math.sqrt(COUNT * penalty) * np.eye(5)])
    expected = np.linalg.lstsq(rows, np.concatenate([Y - Y.mean(axis=0), np.zeros((5, 3))]), rcond=None)[0]
    np.testing.assert_allclose(ridge(X, VARIANCES, Y), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("count", [COUNT, 7])
def test_the_penalty_is_the_best_where_each_example_is_left_out_in_turn(noise: float, count: int) -> None:
    """Of few examples, each of which tells much of itself, too; and of vectors that are far from the origin."""
    rng = np.random.default_rng(count)
    few = turned(*(np.float32(rng.normal(size=(count, 5))) for _ in range(2)))
    X, variances = few.training.astype(np.float64), few.variances
    y = X @ TRUE + noise * rng.normal(size=(count, 3)) + [10, 20, 30]

    def missed(penalty: float) -> float:
        found = 0.0
        for one in range(count):
            x, z = (np.delete(each, one, axis=0) for each in (X, y))
            centred = x - x.mean(axis=0)
            gram = centred.T @ centred + count * min(penalty, 1e12) * np.eye(5)
            weights = np.linalg.solve(gram, centred.T @ (z - z.mean(axis=0)))
            told = z.mean(axis=0) + (X[one] - x.mean(axis=0)) @ weights
            found += np.sum((y[one] - told) ** 2)
        return found

    best = min(PENALTIES, key=missed)
    expected = X.T @ (y - y.mean(axis=0)) / count / (variances + best)[:, None]
    np.testing.assert_allclose(ridge(X, variances, y), expected, rtol=1e-4, atol=1e-6)


def test_of_noise_no_vector_is_learned() -> None:
    shuffled = np.concatenate([Y[::2], Y[1::2]])[::-1]
    assert np.abs(ridge(np.zeros((COUNT, 0)), np.zeros(0), Y)).sum() == 0
    assert np.abs(ridge(X, VARIANCES, shuffled)).max() < 0.2 * np.abs(ridge(X, VARIANCES, Y)).max()
