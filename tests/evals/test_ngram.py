"""Kneser-Ney: beside the formula by counting in loops, over a vocabulary that every distribution sums to one over."""

import functools
import itertools
import math

import numpy as np
import pytest

from vlm_jax.evals.ngram import Document, KneserNey, estimate_discounts

VOCAB = 16
"""0 begins a document, 1 ends it, the last never occurs."""
RANDOM = np.random.default_rng(1)
SHARES = 1 / np.arange(1, VOCAB - 2) ** 1.2
TEXTS = [
    [0, *(2 + RANDOM.choice(VOCAB - 3, RANDOM.integers(1, 8), p=SHARES / SHARES.sum())).tolist(), 1] for _ in range(30)
]
DOCUMENTS = [Document(text, [True] * len(text)) for text in TEXTS]
MODEL = KneserNey(DOCUMENTS, VOCAB)
HISTORIES = [*itertools.product(range(VOCAB), repeat=2), *((token,) for token in range(VOCAB)), ()]


def test_every_distribution_sums_to_one_and_leaves_no_token_out():
    for history in HISTORIES:
        probs = [MODEL.prob(history, token) for token in range(VOCAB)]
        assert min(probs) > 0
        assert sum(probs) == pytest.approx(1, abs=1e-12)


@functools.cache
def counts(history: tuple[int, ...]) -> tuple[int, ...]:
    """Of each token: how often it follows two others, or what begins a text; else, after how many different ones."""
    if len(history) == 2 or history == (0,):
        size = len(history)
        found = [text[i] for text in TEXTS for i in range(size, len(text)) if tuple(text[i - size : i]) == history]
        return tuple(found.count(token) for token in range(VOCAB))
    if len(history) == 1:
        triples = {tuple(text[i - 2 : i + 1]) for text in TEXTS for i in range(2, len(text))}
        return tuple(sum(triple[1:] == (*history, token) for triple in triples) for token in range(VOCAB))
    pairs = {tuple(text[i - 1 : i + 1]) for text in TEXTS for i in range(1, len(text))}
    return tuple(sum(pair[1] == token for pair in pairs) for token in range(VOCAB))


@functools.cache
def discounts(length: int) -> list[float]:
    rows = [counts(history) for history in itertools.product(range(VOCAB), repeat=length)]
    n1, n2, n3, n4 = (sum(row.count(k) for row in rows) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    return [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]


def test_it_is_chen_and_goodmans_formula():
    def prob(history: tuple[int, ...]) -> np.ndarray:
        lower = prob(history[1:]) if history else np.full(VOCAB, 1 / VOCAB)
        found = np.array(counts(history))
        if not found.any():
            return lower
        taken = np.array([discounts(len(history))[min(count, 3)] for count in found])
        return (found - taken + taken.sum() * lower) / found.sum()

    for length in range(3):
        assert all(0 < discounts(length)[k] < k for k in (1, 2, 3))  # none stands in for another
    for history in HISTORIES:
        np.testing.assert_allclose([MODEL.prob(history, token) for token in range(VOCAB)], prob(history), rtol=1e-9)


def test_a_document_is_scored_target_by_target_each_given_the_two_tokens_before_it():
    target = [True, True, False, True]
    expected = [math.log(MODEL.prob(history, token)) for history, token in (((0,), 2), ((2, 3), 5))]
    assert MODEL.log_probs(Document([0, 2, 3, 5], target)) == pytest.approx(expected)
    assert KneserNey([Document([0, 2, 3, 5], target)], VOCAB).following.keys() == {(), (0,), (3,), (2, 3)}


def test_discounts_are_estimated_from_how_many_counts_are_small():
    """Of 1, 2, 3 and 4 there are 6, 3, 2 and 1: Y is 1/2."""
    rows = [dict(enumerate([1] * 6 + [2] * 3 + [3] * 2 + [4, 9]))]
    assert estimate_discounts(rows) == pytest.approx((1 - 2 / 2 * 3 / 6, 2 - 3 / 2 * 2 / 3, 3 - 4 / 2 * 1 / 2))
    assert estimate_discounts([{0: 1, 1: 1, 2: 2}]) == (0.5, 0.5, 0.5)
