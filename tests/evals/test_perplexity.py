"""Perplexity: its mean over tokens, its standard error over rows, its bytes, and the 3-gram beside it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.contract import Batch, Input, Model
from vlm_jax.data import Tokenizer, train_tokenizer
from vlm_jax.evals import Subject, perplexity
from vlm_jax.evals.ngram import Document, KneserNey

TOKENIZER = train_tokenizer(["red heart", "blue heart", "grün"], 300)
VOCAB, LENGTH = 300, 16


def batch_of(*packed: list[str]) -> dict[str, np.ndarray]:
    """Texts in rows, and a row of padding that does not count."""
    batch = {
        "tokens": np.zeros((len(packed) + 1, LENGTH), np.int32),
        "target": np.zeros((len(packed) + 1, LENGTH), bool),
        "segment": np.zeros((len(packed) + 1, LENGTH), np.int32),
    }
    for row, texts in enumerate(packed):
        start = 0
        for number, text in enumerate(texts, 1):
            tokens = [token for token in TOKENIZER.encode([text], LENGTH)[0].tolist() if token != TOKENIZER.pad_id]
            span = slice(start, start + len(tokens))
            batch["tokens"][row, span], batch["segment"][row, span] = tokens, number
            batch["target"][row, start + 1 : span.stop] = True
            start = span.stop
    return batch


BATCHES = [batch_of(["red heart", "grün"], ["heart"]), batch_of(["blue heart"])]


def subject(nats: Callable[[Batch], jax.Array], tokenizer: Tokenizer | None = TOKENIZER) -> Subject:
    """Of a model that says so many nats of each token."""
    model = Model(
        inputs={name: Input((LENGTH,), dtype, limit) for name, dtype, limit in FIELDS},
        init=lambda *_: {},
        loss=lambda *_, **__: None,
        rules=(),
        log_likelihood=lambda variables, batch, key: -jnp.sum(nats(batch) * batch["target"], axis=1),
        count=lambda batch: jnp.sum(batch["target"], axis=1),
        bound="exact",
        generate=lambda *_, **__: {},
    )
    valid = [len(batch["tokens"]) - 1 for batch in BATCHES]
    return Subject(
        model=model,
        variables={},
        batches=lambda: zip(BATCHES, valid, strict=True),
        examples=sum(valid),
        tokenizer=tokenizer,
        training=lambda: iter([(BATCHES[0], 2)]),
    )


FIELDS = (("tokens", "int32", VOCAB), ("target", "bool", 2), ("segment", "int32", LENGTH + 1))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary_without_an_error():
    found = perplexity.run(subject(lambda batch: jnp.full((1, 1), math.log(VOCAB))))
    assert found["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
    assert found["perplexity_standard_error"] == pytest.approx(0, abs=1e-3)
    texts = ["red heart", "grün", "heart", "blue heart"]
    tokens = sum(len(TOKENIZER.tokenizer.encode(text).ids) + 1 for text in texts)  # the end, too
    assert found["tokens"] == tokens
    letters = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(tokens * math.log2(VOCAB) / letters, rel=1e-5)
    assert "bits_per_byte" not in perplexity.run(subject(lambda batch: jnp.ones((1, 1)), tokenizer=None))


def test_it_is_a_mean_over_tokens_and_its_error_that_of_a_ratio_over_rows():
    """A token costs its id: by sums over the rows."""
    found = perplexity.run(subject(lambda batch: batch["tokens"] / 100))
    rows = [(batch, row) for batch in BATCHES for row in range(len(batch["tokens"]) - 1)]
    nats = np.array([(b["tokens"][i] * b["target"][i]).sum() / 100 for b, i in rows])
    counts = np.array([b["target"][i].sum() for b, i in rows])
    mean = nats.sum() / counts.sum()
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    error = math.sqrt(len(nats) * np.var(nats - mean * counts, ddof=1)) / counts.sum()
    assert found["perplexity_standard_error"] == pytest.approx(math.exp(mean) * error, rel=1e-4)


def test_the_three_gram_counts_the_training_texts_and_is_measured_on_the_same_tokens():
    found = perplexity.run_kneser_ney(subject(lambda batch: jnp.zeros((1, 1))))
    texts = [Document(tokens, [True] * len(tokens)) for tokens in map(ids, ["red heart", "grün", "heart"])]
    held_out = [*texts, Document(ids("blue heart"), [True] * len(ids("blue heart")))]
    model = KneserNey(texts, VOCAB)
    nats = [-value for text in held_out for value in model.log_probs(text)]
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-9)
    assert found["tokens"] == len(nats)
    assert found["bits_more_than_the_model"] == pytest.approx(
        np.mean(nats) / math.log(2), rel=1e-6
    )  # of one that knows
    assert found["training_tokens"] == sum(len(text.tokens) - 1 for text in texts)


def ids(text: str) -> list[int]:
    return [TOKENIZER.bos_id, *TOKENIZER.tokenizer.encode(text).ids, TOKENIZER.eos_id]


def test_a_split_without_targets_has_no_perplexity():
    rows = perplexity.Rows(np.zeros(2), np.zeros(2, int), np.zeros(2, int))
    assert perplexity.summary(rows) == {"perplexity": None, "perplexity_standard_error": None, "tokens": 0}


def test_the_model_scores_a_split_once_for_both_evaluations():
    given = subject(lambda batch: jnp.ones((1, 1)))
    read: list[int] = []

    def batches() -> Iterator[tuple[Batch, int]]:
        for batch, valid in given.batches():
            read.append(valid)
            yield batch, valid

    once = replace(given, batches=batches)
    perplexity.run_kneser_ney(once)
    before = len(read)
    assert perplexity.run(once) == perplexity.run(given)
    assert len(read) == before
    assert replace(once, variables={"params": {}}).shared == {}
