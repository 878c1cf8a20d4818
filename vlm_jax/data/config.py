"""What a run reads: data sets, their splits, and what becomes of their records."""

import math
from dataclasses import dataclass

from vlm_jax.data.conversation import Dialogue, VisualCaption, VisualDialogue, VisualQuestion
from vlm_jax.data.fields import Caption, Document, Image, Label, Stage
from vlm_jax.data.interleaved import Interleaved
from vlm_jax.errors import UserError

Field = (
    Image
    | Caption
    | Label
    | Stage
    | Document
    | Dialogue
    | VisualQuestion
    | VisualDialogue
    | VisualCaption
    | Interleaved
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """How texts become token ids."""

    vocab_size: int
    """At most this many tokens in the BPE that is trained on the training texts; unused with a tokenizer given."""
    tokenizer: str | None = None
    """Path of a tokenizer.json; None: train one."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set and how its records become examples, of the size and length that the model reads."""

    name: str | None
    """One of ours, such as openmoji, easy_vqa/captions or digits, or a data set that TFDS has prepared; None: what the
    model was trained on is not here."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Other data sets to train on with it, and how many of their examples for one of its own."""
    train: str = "train"
    """Split to train on, or part of one, such as train[:90%]; of a mixture, of each."""
    validation: str | None = None
    """Split to watch during training; None: none."""
    test: str = "test"
    """Split to report on."""
    fields: tuple[Field, ...] = (Image(), Caption(), Label())
    """How what the model reads is made of a record: of those that make the same, by the first that the data set has."""
    pack: bool = False
    """Lay documents of text, with their images, one after the other in rows, each once an epoch; else a row holds
    one."""
    text: Text | None = None
    """How texts are tokenized; None: the model reads none."""

    def __post_init__(self) -> None:
        for name, weight in self.mixture:
            if not 0 < weight < math.inf:
                raise UserError(f"the weight of {name} in the mixture is {weight}: it must be a number above 0")
        names = [self.name, *(name for name, _ in self.mixture)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{repeated} is twice in the mixture: give it once, with the weight of both")


def named(data: Data) -> str:
    """The data set's name.

    Raises:
      UserError: there is none, for the model was trained elsewhere.
    """
    if data.name is None:
        raise UserError("the model was trained on no data set that is known here: give --data.name")
    return data.name
