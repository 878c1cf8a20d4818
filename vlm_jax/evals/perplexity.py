"""Perplexity of held-out text, of a model and of a 3-gram that has counted the same training texts.

Standard errors are over rows: the tokens of a document are no independent draws, and a row holds whole documents.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from vlm_jax.contract import Batch
from vlm_jax.evals.likelihood import mean_and_error
from vlm_jax.evals.ngram import Document, KneserNey
from vlm_jax.evals.subject import Evaluation, Subject

TRAINING_TOKENS = 5_000_000
"""Targets that the 3-gram counts, at most: beyond that it is slow and large."""


class Rows(NamedTuple):
    """Of each row of a split, its log-likelihood, and of what."""

    log_likelihood: Float[np.ndarray, " N"]
    """Nats."""
    tokens: Int[np.ndarray, " N"]
    """Targets."""
    bytes: Int[np.ndarray, " N"]
    """Of the targets as UTF-8, in which the end of a text is none."""


def row_documents(batch: Batch, valid: int) -> Iterator[list[Document]]:
    """The documents of each row that counts."""
    for tokens, target, segment in zip(*(np.asarray(batch[name])[:valid] for name in FIELDS), strict=True):
        ends = [0, *(np.flatnonzero(np.diff(segment)) + 1).tolist(), len(segment)]
        spans = [slice(a, b) for a, b in itertools.pairwise(ends) if segment[a] > 0]
        yield [Document(tokens[span].tolist(), target[span].tolist()) for span in spans]


FIELDS = ("tokens", "target", "segment")


def targets(document: Document) -> list[int]:
    return [token for token, target in zip(document.tokens[1:], document.target[1:], strict=True) if target]


def text_bytes(documents: Iterable[Document], subject: Subject) -> int:
    """Of what is to be predicted, without a tokenizer 0."""
    if subject.tokenizer is None:
        return 0
    return sum(len(subject.tokenizer.decode(targets(document)).encode()) for document in documents)


def summary(rows: Rows) -> dict[str, float | None]:
    """Of a split without targets, nothing is defined."""
    if not rows.tokens.sum():
        return {"perplexity": None, "perplexity_standard_error": None, "tokens": 0}
    bits, error = mean_and_error(rows.log_likelihood, rows.tokens)
    found: dict[str, float | None] = {
        "perplexity": 2**bits,
        "perplexity_standard_error": None if error is None else 2**bits * error * math.log(2),
        "tokens": int(rows.tokens.sum()),
    }
    if rows.bytes.sum():
        bits, error = mean_and_error(rows.log_likelihood, rows.bytes)
        found |= {"bits_per_byte": bits, "bits_per_byte_standard_error": error}
    return found


def model_rows(subject: Subject) -> Rows:
    """Computed once, for both evaluations."""
    return subject.once("rows", lambda: Rows(*map(np.concatenate, zip(*scored(subject), strict=True))))


def scored(subject: Subject) -> Iterator[Rows]:
    """Batch by batch."""
    assert subject.model.log_likelihood is not None and subject.model.count is not None
    log_likelihood, count = jax.jit(subject.model.log_likelihood), jax.jit(subject.model.count)
    for batch, valid in subject.batches():
        values = log_likelihood(subject.variables, batch, jax.random.key(0))
        sizes = [text_bytes(documents, subject) for documents in row_documents(batch, valid)]
        yield Rows(np.asarray(values)[:valid], np.asarray(count(batch))[:valid], np.array(sizes))


def kneser_ney_log_likelihood(subject: Subject, model: KneserNey) -> Float[np.ndarray, " N"]:
    """Of each row."""
    rows = (documents for batch, valid in subject.batches() for documents in row_documents(batch, valid))
    return np.array([math.fsum(value for document in row for value in model.log_probs(document)) for row in rows])


def run(subject: Subject) -> dict[str, float | None]:
    """2 to the bits a target token, and bits a byte of the text, to which the end of a text adds bits alone."""
    return summary(model_rows(subject))


def run_kneser_ney(subject: Subject) -> dict[str, float | None]:
    """The same of the 3-gram, with the model's vocabulary and tokens, and the bits a token that it needs more.

    The standard error of these is that of their difference row by row, far smaller than that of either.
    """
    assert subject.training is not None
    training, counted = [], 0
    for batch, valid in subject.training():
        rows = list(row_documents(batch, valid))
        training += [document for documents in rows for document in documents]
        counted += sum(len(targets(document)) for documents in rows for document in documents)
        if counted >= TRAINING_TOKENS:
            break
    vocab_size = subject.model.inputs["tokens"].limit
    assert vocab_size is not None
    model = model_rows(subject)
    baseline = model._replace(log_likelihood=kneser_ney_log_likelihood(subject, KneserNey(training, vocab_size)))
    more: dict[str, float | None] = {}
    if model.tokens.sum():
        bits, error = mean_and_error(baseline.log_likelihood - model.log_likelihood, model.tokens)
        more = {"bits_more_than_the_model": bits, "bits_more_than_the_model_standard_error": error}
    return {**summary(baseline), **more, "training_tokens": counted}


# What is likely of a model that draws images too, and counted, is not of tokens alone.
EVALUATION = Evaluation("perplexity", ("log_likelihood", "count", "generate"), run, without=("sample",))
KNESER_NEY = Evaluation(
    "kneser_ney",
    ("log_likelihood", "count", "generate"),
    run_kneser_ney,
    given=("training",),
    without=("sample",),
)
