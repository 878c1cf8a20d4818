"""What an evaluation is, and what it sees."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import UInt8

from vlm_jax.contract import Batch, Input, Model, Variables
from vlm_jax.data import Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.evals.judge import Judge

T = TypeVar("T")


@dataclass(frozen=True)
class Labelled:
    """A labelled data set and the sentences that describe each of its classes."""

    batches: Callable[[], Iterator[tuple[Batch, int]]]
    label_names: tuple[str, ...]
    prompts: tuple[str, ...]
    """Templates in which {} stands for a label's name."""


@dataclass(frozen=True)
class Lessons:
    """The training split of the data set that is evaluated, whatever the model was trained on."""

    batches: Callable[[], Iterator[tuple[Batch, int]]]
    """As `Subject.batches`, of the images alone."""
    records: Callable[[], Iterator[Mapping[str, Any]]]
    """As `Subject.records`."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images of the size, colours and levels that a model reads or draws, uint8."""

    levels: int
    """Their values are in `[0, levels)`."""
    held_out: Callable[[], Iterator[UInt8[np.ndarray, "B H W C"]]]
    """The split in order, as many at a time, and the last fewer."""
    training: Callable[[], Iterator[tuple[Mapping[str, Any], UInt8[np.ndarray, "H W C"]]]] | None = None
    """Of each record that the model was trained on its strings, as `Subject.records`, and its image."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the held-out data that it is evaluated on, and what else an evaluation may be given."""

    model: Model
    variables: Variables
    batches: Callable[[], Iterator[tuple[Batch, int]]]
    """The split in order: batches of one size on the model's devices, each with its number of valid rows."""
    examples: int
    """In the split."""
    key: jax.Array = field(default_factory=lambda: jax.random.key(0))
    """For evaluations that draw noise."""
    tokenizer: Tokenizer | None = None
    records: Callable[[], Iterator[Mapping[str, Any]]] | None = None
    """The strings of each record in order, those it has: `captions`, all of them, `question`, `answer`, `answers` of
    several people, and `label`."""
    questions: Callable[[], Iterator[tuple[Batch, int]]] | None = None
    """For a model that sees, of data that ask: as `batches`, each row of one record, in their order."""
    captions: Callable[[], Iterator[tuple[Batch, int]]] | None = None
    """For a model that sees, of data that have captions: likewise."""
    training_texts: Callable[[], Iterator[str]] | None = None
    """All texts of what the model was trained on."""
    training: Callable[[], Iterator[tuple[Batch, int]]] | None = None
    """What the model was trained on, all of it once, as `batches`."""
    labelled: Labelled | None = None
    """For zero-shot classification."""
    lessons: Lessons | None = None
    """For probes of what a model makes of images; None: there is nothing to learn from."""
    sampling: Any = None
    """The settings by which the model samples; None: its family's."""
    pictures: Pictures | None = None
    """For evaluations that look at what is drawn; None: the model draws none, or the data have none."""
    judges: tuple[Judge, ...] | None = None
    """For evaluations of images by what other models see in them; None: there are none."""
    shared: dict[str, Any] = field(default_factory=dict, init=False)
    """What one evaluation of this subject has computed that another needs as well, by name."""

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, which is kept under its name for who asks next."""
        if name not in self.shared:
            self.shared[name] = make()
        kept: T = self.shared[name]
        return kept


Batches = Callable[[], Iterator[tuple[Batch, int]]]


def written(keys: Collection[str], inputs: Mapping[str, Input], one_by_one: Batches) -> dict[str, Batches]:
    """`questions` or `captions` of a `Subject`, which a model that sees has of data with the keys of their records.

    Args:
      one_by_one: as `batches`, each row of one record.
    """
    if all(spec.span is None for spec in inputs.values()):
        return {}
    if {"question", "answer"} <= set(keys):
        return {"questions": one_by_one}
    return {"captions": one_by_one} if "text" in keys else {}


class Evaluation(NamedTuple):
    """A measurement of whatever has the capabilities that it needs, where it is given what else it needs."""

    name: str
    capabilities: tuple[str, ...]
    """Names of functions of `Model`."""
    run: Callable[[Subject], Mapping[str, float | None]]
    """Its metrics by name, without the evaluation's; None: not defined on these data."""
    given: tuple[str, ...] = ()
    """Names of fields of `Subject`."""
    if_given: tuple[str, ...] = ()
    """Of those by which it measures more where they are there."""
    conditions: tuple[str, ...] = ()
    """Names of what `sample` can be told."""
    without: tuple[str, ...] = ()
    """Names of functions of `Model` that it must lack."""
    judges_read: bool = False
    """Whether one of the judges must embed texts; the others say nothing."""

    def applies_to(self, subject: Subject) -> bool:
        able = all(getattr(subject.model, name) is not None for name in self.capabilities)
        able &= all(getattr(subject.model, name) is None for name in self.without)
        told = all(name in subject.model.conditions for name in self.conditions)
        read = not self.judges_read or any(judge.reads for judge in subject.judges or ())
        return able and told and read and all(getattr(subject, name) is not None for name in self.given)

    def check(self, subject: Subject) -> None:
        """Before anything is computed.

        Raises:
          UserError: no judge can do what one is needed for.
        """
        if self.judges_read and subject.judges and not any(judge.reads for judge in subject.judges):
            raise UserError(
                f"{', '.join(judge.name for judge in subject.judges)}: no judge embeds texts, by which {self.name} "
                f"could tell what an image shows: give another --judge, such as a clip's"
            )
