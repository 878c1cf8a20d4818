"""The masked cross-entropy: its value, its gradient, and the weight that makes accumulation exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.objectives import language
from vlm_jax.objectives.language import cross_entropy, sequence_scores, shares, token_log_probs, token_scores

RANDOM = np.random.default_rng(0)
LOGITS = (4 * RANDOM.normal(size=(3, 5, 7))).astype(np.float32)
TARGETS = RANDOM.integers(0, 7, (3, 5))
MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)


def loss_of(
    logits: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    return cross_entropy(token_scores(logits, targets), mask)


loss_and_rest = jax.jit(loss_of)
log_probs_of = jax.jit(token_log_probs)


def test_cross_entropy_is_the_mean_over_the_masked_tokens():
    logits = LOGITS.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    tokens = [(b, t) for b in range(3) for t in range(5) if MASK[b, t]]
    loss, metrics, weight = loss_and_rest(LOGITS, TARGETS, MASK)
    np.testing.assert_allclose(loss, -np.mean([log_probs[b, t, TARGETS[b, t]] for b, t in tokens]), rtol=1e-6)
    accuracy = np.mean([LOGITS[b, t].argmax() == TARGETS[b, t] for b, t in tokens])
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert weight == len(tokens) == 9


def test_no_target_at_all_costs_nothing_and_weighs_nothing():
    loss, metrics, weight = loss_and_rest(LOGITS, TARGETS, np.zeros_like(MASK))
    assert (loss, metrics["accuracy"], weight) == (0, 0, 0)


def test_only_masked_tokens_have_a_gradient():
    gradient = jax.jit(jax.grad(lambda logits: loss_of(logits, TARGETS, MASK)[0]))(LOGITS)
    reached = np.asarray(gradient != 0).any(axis=-1)
    np.testing.assert_array_equal(reached, MASK)


def test_the_weighted_mean_of_parts_is_the_whole():
    whole, _, weight = loss_and_rest(LOGITS, TARGETS, MASK)
    parts = [loss_and_rest(LOGITS[i : i + 1], TARGETS[i : i + 1], MASK[i : i + 1]) for i in range(3)]
    assert sum(part_weight for _, _, part_weight in parts) == weight
    np.testing.assert_allclose(sum(loss * w for loss, _, w in parts) / weight, whole, rtol=1e-6)


def test_shares_make_a_mean_over_documents_of_the_means_over_their_tokens():
    document = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 2, 3], [1, 2, 2, 2, 2]])
    log_probs = np.float64(log_probs_of(LOGITS, TARGETS))
    found = [log_probs[b][MASK[b] & (document[b] == n)] for b in range(3) for n in range(1, 4)]
    means = [values.mean() for values in found if len(values)]
    loss, _, weight = loss_and_rest(LOGITS, TARGETS, shares(MASK, document))
    np.testing.assert_allclose((loss, weight), (-np.mean(means), len(means)), rtol=1e-6)


def test_log_probs_of_bfloat16_logits_are_taken_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    np.testing.assert_array_equal(log_probs_of(logits, TARGETS), log_probs_of(np.float32(logits), TARGETS), strict=True)


def test_probabilities_of_all_tokens_sum_to_one():
    log_probs = log_probs_of(np.broadcast_to(LOGITS, (7, *LOGITS.shape)), np.arange(7)[:, None, None] + 0 * TARGETS)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=0), 1, rtol=1e-5)


@pytest.mark.parametrize("held", [1, 3 * 11, 6 * 11 - 1])
def test_a_part_of_the_places_at_a_time_is_all_of_them_and_so_is_the_gradient(
    held: int, monkeypatch: pytest.MonkeyPatch
):
    """Of six places and eleven tokens, one, three and three at a time."""
    x, table = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((2, 6, 4), (11, 4)))
    tokens, weights = RANDOM.integers(0, 11, (2, 6)), RANDOM.normal(size=(2, 6))

    def total(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        found = sequence_scores(lambda x: x @ table.T, x, tokens, 11)
        return jnp.sum(weights * found[0]), found

    def results() -> object:
        return jax.jit(jax.value_and_grad(lambda *args: total(*args), argnums=(0, 1), has_aux=True))(x, table)

    whole = results()
    np.testing.assert_allclose(whole[0][1][0], log_probs_of(x @ table.T, tokens), rtol=1e-5)
    np.testing.assert_array_equal(whole[0][1][1], (x @ table.T).argmax(axis=-1) == tokens)
    largest = []
    monkeypatch.setattr(language, "LOGITS", held)
    monkeypatch.setattr(language, "token_scores", lambda *args: largest.append(args[0].shape[1]) or token_scores(*args))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results(), whole)
    assert set(largest) == {1 if held == 1 else 3}
