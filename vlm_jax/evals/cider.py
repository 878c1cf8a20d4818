"""CIDEr-D (Vedantam, Zitnick & Parikh 2015, 1411.5726, section 8): how much a caption says of what references say.

A caption is its n-grams of 1 to 4 words, each weighed by how few images have it in their references. The score is ten
times the mean over n of the cosines, where no n-gram counts more often than the reference has it and captions of
another length than the reference are held back. A text of fewer than four words has no 4-grams and so stays below ten,
as in the authors' code: two words that are right score five.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

LONGEST = 4
"""Words of the longest n-grams."""
SIGMA = 6.0
"""Words by which a caption may differ in length from the reference before it counts much less."""

Words = tuple[str, ...]
Vector = list[dict[Words, float]]
"""For each n: weight of each n-gram."""


def words(text: str) -> Words:
    """In lower case and without punctuation; hyphens and apostrophes within a word belong to it.

    The Penn Treebank's tokenizer, which the authors use, splits "don't" into two besides.
    """
    return tuple(re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", text.lower()))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " N"]:
    """From 0 to 10 for each image.

    Args:
      captions: one of each image.
      references: of each image one at least; those of all images say how rare an n-gram is.
    """
    known = [[counts_of(words(text)) for text in each] for each in references]
    images = Counter(gram for each in known for gram in {gram for counts in each for gram in counts})
    scale = math.log(max(len(references), 1))

    def vector(counts: Counter[Words]) -> Vector:
        found: Vector = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            found[len(gram) - 1][gram] = count * (scale - math.log(max(1, images[gram])))
        return found

    scores = []
    for text, each in zip(captions, known, strict=True):
        counts = counts_of(words(text))
        mine, length = vector(counts), words_in(counts)
        scores.append(10 * np.mean([similarity(mine, vector(other), length - words_in(other)) for other in each]))
    return np.array(scores)


def counts_of(text: Words) -> Counter[Words]:
    return Counter(text[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(text) - n + 1))


def words_in(counts: Counter[Words]) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 1)


def similarity(caption: Vector, reference: Vector, longer: int) -> float:
    """The mean over n of the clipped cosines (equation 5)."""
    cosines = []
    for mine, its in zip(caption, reference, strict=True):
        norms = math.hypot(*mine.values()) * math.hypot(*its.values())
        shared = sum(min(weight, its[gram]) * its[gram] for gram, weight in mine.items() if gram in its)
        cosines.append(shared / norms if norms else 0.0)
    return math.exp(-(longer**2) / (2 * SIGMA**2)) * sum(cosines) / LONGEST
