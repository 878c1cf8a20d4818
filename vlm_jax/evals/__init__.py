"""Measurements of whatever a model can do: each names the capabilities that it needs."""

from vlm_jax.evals import (
    captions,
    clip_score,
    frechet,
    generation,
    information,
    kid,
    likelihood,
    perplexity,
    recognition,
    reconstruction,
    retrieval,
    vqa,
    zero_shot,
)
from vlm_jax.evals.judge import Judge
from vlm_jax.evals.subject import Evaluation, Labelled, Lessons, Pictures, Subject, written

EVALUATIONS: tuple[Evaluation, ...] = (
    retrieval.EVALUATION,
    zero_shot.EVALUATION,
    likelihood.EVALUATION,
    likelihood.IMPORTANCE_WEIGHTED,
    reconstruction.EVALUATION,
    information.EVALUATION,
    perplexity.EVALUATION,
    perplexity.KNESER_NEY,
    vqa.EVALUATION,
    captions.EVALUATION,
    frechet.EVALUATION,
    kid.EVALUATION,
    clip_score.EVALUATION,
    generation.EVALUATION,
    recognition.EVALUATION,
)

__all__ = ["EVALUATIONS", "Evaluation", "Judge", "Labelled", "Lessons", "Pictures", "Subject", "written"]
