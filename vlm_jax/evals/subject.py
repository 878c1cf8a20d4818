"""What an evaluation is, and what it sees."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax

from vlm_jax.contract import Batch, Model, Variables
from vlm_jax.data import Tokenizer


@dataclass(frozen=True)
class Labelled:
    """A labelled data set and the sentences that describe each of its classes."""

    batches: Callable[[], Iterator[tuple[Batch, int]]]
    label_names: tuple[str, ...]
    prompts: tuple[str, ...]
    """Templates in which {} stands for a label's name."""


@dataclass(frozen=True)
class Subject:
    """A model and the held-out data that it is evaluated on."""

    model: Model
    variables: Variables
    batches: Callable[[], Iterator[tuple[Batch, int]]]
    """The split in order: batches of one size on the model's devices, each with its number of valid rows."""
    tokenizer: Tokenizer | None = None
    labelled: Labelled | None = None
    """For zero-shot classification."""
    key: jax.Array | None = None
    """For evaluations that draw noise; None: key 0."""


class Evaluation(NamedTuple):
    """A measurement of whatever has the capabilities that it needs."""

    name: str
    needs: tuple[str, ...]
    """Capabilities: names of functions of `Model`."""
    run: Callable[[Subject], Mapping[str, float | None]]
    """Its metrics by name, without the evaluation's; None: not defined on these data."""
    labelled: bool = False
    """It needs a labelled data set and a tokenizer as well."""

    def applies_to(self, subject: Subject) -> bool:
        if self.labelled and (subject.labelled is None or subject.tokenizer is None):
            return False
        return all(getattr(subject.model, need) is not None for need in self.needs)
