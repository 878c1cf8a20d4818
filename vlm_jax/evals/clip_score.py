"""CLIPScore (2104.08718): how well a picture fits the caption that it was drawn of, in the eyes of judges that read.

The paper's judge is CLIP's ViT-B/32, which it tells "A photo depicts" before each caption; here each judge is told the
caption alone. Scores of different judges do not compare: what does is that of the real images beside.
"""

import numpy as np
from jaxtyping import Float

from vlm_jax.evals.drawn import captions_due, seen
from vlm_jax.evals.judge import Judge, by_each
from vlm_jax.evals.retrieval import texts_of
from vlm_jax.evals.subject import Evaluation, Subject
from vlm_jax.evals.writing import Metrics

WEIGHT = 2.5
"""For scores to fill [0, 1] (section 3)."""


def clip_score(images: Float[np.ndarray, "N D"], texts: Float[np.ndarray, "N D"]) -> float:
    """The mean of w max(cos, 0), each image beside its text; vectors of unit length."""
    cosines = np.einsum("nd,nd->n", images, texts, dtype=np.float64)
    return float(np.mean(WEIGHT * np.maximum(cosines, 0)))


def run(subject: Subject) -> Metrics:
    """Of the drawn images, and of the real ones with the same captions."""
    EVALUATION.check(subject)
    asked = [captions[0] for captions in captions_due(subject)]
    assert subject.judges is not None

    def score(judge: Judge) -> Metrics:
        if not judge.reads:
            return {}
        vectors, texts = seen(subject, judge), texts_of(judge, asked).vectors
        return {"score": clip_score(vectors.drawn, texts), "real_score": clip_score(vectors.real, texts)}

    return {**by_each(subject.judges, score), "captions": float(len(asked))}


EVALUATION = Evaluation(
    "clip_score",
    ("sample",),
    run,
    given=("tokenizer", "records", "pictures", "judges"),
    conditions=("tokens",),
    judges_read=True,
)
