"""What a model that sees writes where a record has a text: prompts out of examples, and how they go on.

An evaluation counts what is written, not what is likely: one pass over given answers would tell as much of a single
right one, and nothing of the others that people gave. Prompts are as short as they are, so that it takes no longer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from vlm_jax.chat import writer
from vlm_jax.contract import Batch, Input
from vlm_jax.data.fields import Tokens, left_padded
from vlm_jax.evals.likelihood import ratio_and_error
from vlm_jax.evals.subject import Subject

STEP = 16
"""Prompts are padded to a multiple of so many places, so that few programs are compiled."""
DRAWN = 4
"""And what is drawn to a multiple of so many."""


Metrics = dict[str, float | None]


class Text(NamedTuple):
    """Of one example."""

    written: str
    """One likeliest token after the other, to the end of the text, or as many as there is room for."""
    truth: str
    """What stands there."""
    picture: int
    """The number of its images; the same for examples that show the same."""


def texts(
    subject: Subject, batches: Callable[[], Iterator[tuple[Batch, int]]], *, blind: bool = False, room: int = 1
) -> list[Text]:
    """What the model writes in place of the targets of each example, by greedy decoding.

    Args:
      batches: each row one document of one record.
      blind: leave out the images and their places, as if none had been shown. A grey image in their place would be
        seen: "is there no circle?" is true of it.
      room: tokens that are drawn, for each that the longest of the examples has.
    """
    model, tokenizer = subject.model, subject.tokenizer
    assert tokenizer is not None and model.generate is not None
    found: list[Text] = []
    pictures: dict[bytes, int] = {}
    for batch, valid in batches():
        rows = {name: np.asarray(values) for name, values in batch.items()}
        lengths = rows["target"].sum(axis=1)
        prompts = prompts_of(rows, model.inputs, tokenizer.pad_id, room * int(lengths.max()), blind=blind)
        write = writer(model.generate, 0.0, replace(model.sampling, length=prompts.draw))
        written, given = write(subject.variables, jax.random.key(0), prompts.batch), prompts.batch["tokens"].shape[1]
        tokens, drawn = (np.asarray(written[name])[:, given:] for name in ("tokens", "target"))
        for row in range(valid):
            truth = tokenizer.decode(rows["tokens"][row][rows["target"][row]])
            picture = pictures.setdefault(rows["image"][row].tobytes(), len(pictures))
            found.append(Text(ended(tokenizer.decode(tokens[row][drawn[row]]), truth), truth.strip(), picture))
    return found


def ended(text: str, example: str) -> str:
    """A text up to where one ends that the model learned: the token of the end, or what white space `example` has."""
    end = example[len(example.rstrip()) :]
    return (text.partition(end)[0] if end else text).strip()


class Prompts(NamedTuple):
    """The beginnings of examples."""

    batch: dict[str, np.ndarray]
    """Padded on the left to one length."""
    draw: int
    """Tokens to draw, for which there is room."""


def prompts_of(
    rows: Mapping[str, np.ndarray], inputs: Mapping[str, Input], pad_id: int, more: int, *, blind: bool = False
) -> Prompts:
    """What stands before the first target of each row.

    Args:
      more: tokens to draw, at least where there is room.
      blind: leave out the images and their places.
    """
    (context,) = inputs["tokens"].shape
    span = inputs["image_at"].span
    documents = []
    for tokens, target, starts in zip(rows["tokens"], rows["target"], rows["image_at"], strict=True):
        places = np.arange(np.argmax(target))
        starts = starts[starts < len(places)]
        if blind:
            places = places[~((places >= starts[:, None]) & (places < starts[:, None] + span)).any(axis=0)]
            starts = starts[:0]
        documents.append(Tokens(tokens[places], np.zeros(len(places), bool), starts))
    length = max(len(document.tokens) for document in documents)
    draw = min(-(-more // DRAWN) * DRAWN, context - length)
    length = min(-(-length // STEP) * STEP, context - draw)
    return Prompts({**left_padded(documents, inputs, pad_id, length), "image": rows["image"]}, draw)


def by_group(
    name: str,
    values: Float[np.ndarray, " N"] | Bool[np.ndarray, " N"],
    groups: Sequence[str],
    pictures: Int[np.ndarray, " N"],
) -> Metrics:
    """The mean of the values, in all and in each group, and its standard error over pictures.

    For what is asked of one picture is no independent draw.

    Args:
      groups: which group each is of; none: they are all one.
    """
    found: Metrics = {}
    for group, those in members(groups, len(values)).items():
        numbers = np.unique(pictures[those], return_inverse=True)[1]
        mean, error = ratio_and_error(np.bincount(numbers, values[those]), np.bincount(numbers))
        found |= {f"{name}{group}": mean, f"{name}{group}_standard_error": error}
    return found


def members(groups: Sequence[str], count: int) -> dict[str, Bool[np.ndarray, " N"]]:
    """Which of so many are of all, and which of each group, by what is appended to the name of a metric of theirs."""
    apart = {f"_{each}": np.array(groups) == each for each in sorted(set(groups))}
    return {"": np.ones(count, bool)} | apart
