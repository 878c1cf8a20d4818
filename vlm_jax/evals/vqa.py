"""Questions about images: how many are answered as they should be, by what is answered, with the image and without."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from vlm_jax.data.easy_vqa import LABELS
from vlm_jax.evals.normalisation import consensus
from vlm_jax.evals.subject import Evaluation, Subject
from vlm_jax.evals.writing import Metrics, Text, by_group, texts

BINARY = ("yes", "no")


def kind(answer: str) -> str:
    """What is answered: `yes_no`, `color`, `shape`, `number` or `other`."""
    if answer in BINARY:
        return "yes_no"
    if answer.isdecimal():
        return "number"
    return next((name for name, words in LABELS.items() if answer in words), "other")


def run(subject: Subject) -> Metrics:
    """Exact match of what the model writes by greedy decoding, and of what it writes without the image.

    In all, by what is answered, and of the open questions, which are those of neither yes nor no. Where records have
    the answers of several people, their consensus too. Of yes-or-no questions the share that the model answers with
    yes (POPE, 2305.10355), and the share that it should.
    """
    assert subject.questions is not None and subject.records is not None
    seen, blind = (texts(subject, subject.questions, blind=without) for without in (False, True))
    kinds = [kind(text.truth) for text in seen]
    pictures = np.array([text.picture for text in seen])

    def measured(name: str, right: np.ndarray) -> Metrics:
        is_open = np.array([each != "yes_no" for each in kinds])
        found = by_group(name, right, kinds, pictures)
        return found | (by_group(f"{name}_open", right[is_open], (), pictures[is_open]) if is_open.any() else {})

    found = measured("exact_match", exact(seen))
    blindly = measured("blind_exact_match", exact(blind))
    found |= {name: value for name, value in blindly.items() if not name.endswith("_standard_error")}
    if binary := [text for text in seen if kind(text.truth) == "yes_no"]:
        found["yes_rate"] = float(np.mean([text.written == "yes" for text in binary]))
        found["yes_rate_of_the_truth"] = float(np.mean([text.truth == "yes" for text in binary]))
    answers: list[Sequence[str]] = [
        record.get("answers", ()) for record, _ in zip(subject.records(), seen, strict=False)
    ]
    if all(answers):
        scores = [consensus(text.written, each) for text, each in zip(seen, answers, strict=True)]
        found |= measured("consensus", np.array(scores))
    return found | {f"questions_{each}": float(kinds.count(each)) for each in sorted(set(kinds))}


def exact(found: Sequence[Text]) -> Bool[np.ndarray, " N"]:
    return np.array([text.written == text.truth for text in found])


EVALUATION = Evaluation("vqa", ("generate",), run, given=("tokenizer", "records", "questions"))
