"""A model that sees, without parameters: what it writes hangs on the image alone, and is told beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.contract import Input, Model
from vlm_jax.data import train_tokenizer
from vlm_jax.evals import Subject

TOKENIZER = train_tokenizer(["what color is it? red yes no circle blue woman cat dark skin tone"], 320)
CONTEXT, SPAN = 32, 4
INPUTS = {
    "tokens": Input((CONTEXT,), "int32", 320),
    "target": Input((CONTEXT,), "bool", 2),
    "segment": Input((CONTEXT,), "int32", CONTEXT + 1),
    "image": Input((1, 2, 2, 1), "uint8", 256),
    "image_at": Input((1,), "int32", CONTEXT + 1, span=SPAN),
}


@dataclass(frozen=True)
class Sampling:
    """As a language model's."""

    length: int | None = None


def ids(text: str) -> list[int]:
    return TOKENIZER.tokenizer.encode(text, add_special_tokens=False).ids


def model(answers: Sequence[str], blindly: str) -> Model:
    """Of an image of value i it writes `answers[i]`, of none `blindly`; each token costs one nat.

    Where a text is over without the token of the end, what follows is padding, whatever stands there.
    """
    table = np.full((len(answers) + 1, CONTEXT), ids("x")[-1], np.int32)
    written = np.zeros(table.shape, bool)
    for row, target, text in zip(table, written, [*answers, blindly], strict=True):
        tokens = ids(text)
        row[: len(tokens)], target[: len(tokens)] = tokens, True

    def generate(variables: Any, key: Any, batch: Any, *, order: Any, temperature: float, sampling: Sampling) -> Any:
        assert temperature == 0 and sampling.length is not None
        sees = batch["image_at"][:, 0] < batch["tokens"].shape[1]
        which = jnp.where(sees, batch["image"][:, 0, 0, 0, 0], len(answers))
        drawn, target = (jnp.asarray(each)[which, : sampling.length] for each in (table, written))
        return {
            **batch,
            "tokens": jnp.concatenate([batch["tokens"], drawn], axis=1),
            "target": jnp.concatenate([jnp.zeros_like(batch["target"]), target], axis=1),
        }

    return Model(
        inputs=INPUTS,
        init=lambda *_: {},
        loss=lambda *_, **__: None,
        rules=(),
        sampling=Sampling(),
        generate=generate,
        log_likelihood=lambda variables, batch, key: -1.0 * jnp.sum(batch["target"], axis=1),
        count=lambda batch: jnp.sum(batch["target"], axis=1),
        bound="exact",
    )


def rows(*examples: tuple[int, str, str]) -> dict[str, np.ndarray]:
    """Examples of an image of one value, a question and its answer, in rows."""
    batch = {name: np.zeros((len(examples), *spec.shape), spec.dtype) for name, spec in INPUTS.items()}
    for row, (value, question, answer) in enumerate(examples):
        asked, told = [TOKENIZER.bos_id, *[0] * SPAN, *ids(question)], [*ids(answer), TOKENIZER.eos_id]
        end = len(asked) + len(told)
        batch["tokens"][row, :end] = [*asked, *told]
        batch["target"][row, len(asked) : end] = True
        batch["segment"][row, :end] = 1
        batch["image"][row], batch["image_at"][row] = value, 1
    return batch


def subject(examples: Sequence[tuple[int, str, str]], answers: Sequence[str], blindly: str, **given: Any) -> Subject:
    """Three rows at a time, the last of them filled up with copies of the last example."""
    parts = [list(examples[start : start + 3]) for start in range(0, len(examples), 3)]
    batches = [(rows(*(part + part[-1:] * 3)[:3]), len(part)) for part in parts]
    return Subject(
        model=model(answers, blindly),
        variables={},
        batches=lambda: iter(batches),
        examples=len(examples),
        tokenizer=TOKENIZER,
        **{name: (lambda: iter(batches)) for name in ("questions", "captions")},
        **given,
    )
