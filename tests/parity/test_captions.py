"""CIDEr-D beside that of its authors, as the package pycocoevalcap has it."""

import random

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from vlm_jax.evals.cider import cider

WORDS = ["red", "heart", "dark", "skin", "tone", "woman", "cat", "face"]


@pytest.mark.parametrize("images", [2, 7, 40])
def test_scores_are_those_of_the_authors(images: int) -> None:
    """Of right captions, of others, and of such with a word that no reference has; of one to four references."""
    draw = random.Random(images)

    def text(vocabulary: list[str]) -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(1, 7)))

    references = {image: [text(WORDS) for _ in range(draw.randint(1, 4))] for image in range(images)}
    said = {i: [draw.choice(known) if i % 3 else text([*WORDS, "new"])] for i, known in references.items()}
    _, theirs = Cider().compute_score(references, said)
    ours = cider([said[image][0] for image in range(images)], list(references.values()))
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert theirs.max() > 0
