"""Captions that a model writes: how many are right, by how new they are to it, and how near the others come."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from vlm_jax.evals.cider import Words, cider, words
from vlm_jax.evals.likelihood import ratio_and_error
from vlm_jax.evals.subject import Evaluation, Subject
from vlm_jax.evals.writing import Metrics, Text, by_group, texts

NEAR = 4
"""Words of a caption, at least, that is a near-duplicate where it is one of training but for one word."""
ROOM = 2
"""Tokens that are drawn, for each that the longest true caption has."""


def novelty(training: Iterable[str]) -> Callable[[str], str]:
    """How new a caption is beside the texts of training, as a function of it.

    `new_word`: none of them has one of its words; else `seen`: one has the same words; `near_duplicate`: it has four
    words at least and is one of them but for a word replaced, left out or put in; else `new_combination`.
    """
    known = {words(text) for text in training}
    vocabulary = {word for each in known for word in each}
    holed = {part for each in known for part in without_a_word(each)}
    shorter = {rest for _, rest in holed}

    def of(caption: str) -> str:
        mine = words(caption)
        if not vocabulary.issuperset(mine):
            return "new_word"
        if mine in known:
            return "seen"
        near = mine in shorter or any(part in holed or part[1] in known for part in without_a_word(mine))
        return "near_duplicate" if near and len(mine) >= NEAR else "new_combination"

    return of


def without_a_word(text: Words) -> Iterator[tuple[int, Words]]:
    """Each place, and what is left without the word there."""
    return ((place, text[:place] + text[place + 1 :]) for place in range(len(text)))


def caption_nats(subject: Subject) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """The negative log-likelihood of each record's first caption, and of how many tokens it is."""
    assert subject.captions is not None and subject.model.log_likelihood is not None
    assert subject.model.count is not None
    log_likelihood, count = jax.jit(subject.model.log_likelihood), jax.jit(subject.model.count)
    nats, counts = [], []
    for batch, valid in subject.captions():
        nats.append(-np.asarray(log_likelihood(subject.variables, batch, jax.random.key(0)), np.float64)[:valid])
        counts.append(np.asarray(count(batch))[:valid])
    return np.concatenate(nats), np.concatenate(counts)


class Captions(NamedTuple):
    """Of each record."""

    written: list[Text]
    references: list[Sequence[str]]
    right: Bool[np.ndarray, " N"]
    """Whether what is written is one of them, word for word."""
    groups: list[str]
    """How new the first of them is."""


def captioned(subject: Subject) -> Captions:
    """By greedy decoding."""
    assert subject.captions is not None and subject.records is not None and subject.training_texts is not None
    written = texts(subject, subject.captions, room=ROOM)
    references = [record["captions"] for record, _ in zip(subject.records(), written, strict=False)]
    right = [words(text.written) in map(words, each) for text, each in zip(written, references, strict=True)]
    new = novelty(subject.training_texts())
    return Captions(written, references, np.array(right), [new(each[0]) for each in references])


def run(subject: Subject) -> Metrics:
    """Of captions by greedy decoding: exact match with any of the image's, in all and by how new its first one is, and
    CIDEr-D with the captions of the whole split; and of the first captions the nats a token.
    """
    written, references, right, groups = captioned(subject)
    pictures = np.array([text.picture for text in written])
    scores = cider([text.written for text in written], references)
    mean, error = ratio_and_error(*caption_nats(subject))
    return {
        **by_group("exact_match", right, groups, pictures),
        "cider": float(scores.mean()),
        **{"nats_a_token": mean, "nats_a_token_standard_error": error},
        **{f"captions_{group}": float(groups.count(group)) for group in sorted(set(groups))},
    }


EVALUATION = Evaluation(
    "captions",
    ("generate", "log_likelihood", "count"),
    run,
    given=("tokenizer", "records", "captions", "training_texts"),
)
