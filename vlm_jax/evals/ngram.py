"""Interpolated Kneser-Ney n-grams with modified discounts (Chen & Goodman 1999, section 4.1): a baseline of text."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

History = tuple[int, ...]


class Document(NamedTuple):
    """A text as a model reads it."""

    tokens: Sequence[int]
    target: Sequence[bool]
    """Which of them are to be predicted; the first never is."""


class Following(NamedTuple):
    """What followed one history."""

    counts: Counter[int]
    """Of the longest histories and of those that begin a document, how often a token did; of the others, after how many
    different tokens before them."""
    total: int
    taken: float
    """What the discounts take from the counts, for the shorter history to share out."""


class KneserNey:
    """p(token | the `order` - 1 tokens before it in its document), over a whole vocabulary."""

    def __init__(self, documents: Iterable[Document], vocab_size: int, order: int = 3) -> None:
        counts: list[defaultdict[History, Counter[int]]] = [defaultdict(Counter) for _ in range(order)]
        for document in documents:
            for history, token in predictions(document, order):
                counts[len(history)][history][token] += 1
        for length in range(order - 1, 0, -1):
            for history, following in counts[length].items():
                counts[length - 1][history[1:]].update(following.keys())
        self.vocab_size, self.order = vocab_size, order
        self.discounts = [estimate_discounts(found.values()) for found in counts]
        self.following: dict[History, Following] = {}
        for length, found in enumerate(counts):
            for history, tokens in found.items():
                taken = sum(self.discount(length, count) for count in tokens.values())
                self.following[history] = Following(tokens, tokens.total(), taken)

    def discount(self, length: int, count: int) -> float:
        """What is taken from a count of what followed a history of this length."""
        return self.discounts[length][min(count, 3) - 1] if count else 0.0

    def prob(self, history: History, token: int) -> float:
        lower = self.prob(history[1:], token) if history else 1 / self.vocab_size
        if history not in self.following:
            return lower
        counts, total, taken = self.following[history]
        kept = counts[token] - self.discount(len(history), counts[token])
        return (kept + taken * lower) / total

    def log_probs(self, document: Document) -> list[float]:
        """log p of each target, nats."""
        return [math.log(self.prob(history, token)) for history, token in predictions(document, self.order)]


def predictions(document: Document, order: int) -> Iterator[tuple[History, int]]:
    """Each target, and of the tokens before it the `order` - 1 nearest."""
    tokens = tuple(document.tokens)
    for place in range(1, len(tokens)):
        if document.target[place]:
            yield tokens[max(0, place - order + 1) : place], tokens[place]


def estimate_discounts(counts: Iterable[Mapping[int, int]]) -> tuple[float, float, float]:
    """By how many counts are 1, 2, 3 and 4 (equation 26); where these are too few to tell, the same for all counts."""
    n = Counter(count for following in counts for count in following.values())
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
    one, two, more = (k - (k + 1) * y * n[k + 1] / max(n[k], 1) for k in (1, 2, 3))
    if all(n[k] for k in (1, 2, 3)) and 0 < one < 1 and 0 < two < 2 and 0 < more < 3:
        return one, two, more
    return y, y, y
