"""What a model of images is told, class and text: how its batches say it, and how much of it training and drawing hear.

Texts are read by a part of the model, of any family that has `text_features`, whose variables lie under `TEXT`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vlm_jax.contract import Batch, Input, Model, Rule, Variables, abstract_batch
from vlm_jax.errors import UserError
from vlm_jax.nn.conditioning import Text, Told
from vlm_jax.nn.labels import label_input, sampling_labels
from vlm_jax.sharding import under
from vlm_jax.trees import assembled, part

TEXT = "text"
"""The field of a `Config` that holds the reader's, and the part of the variables that is its own."""


@dataclass(frozen=True)
class Conditions:
    """Of one model."""

    classes: int | None
    dropout: float
    """Share of training examples that are told nothing."""
    reader: Model | None
    """Of the texts; None: it is told none."""

    def __post_init__(self) -> None:
        if self.reader is not None and self.reader.text_features is None:
            raise UserError("the model that is to read texts has no text_features: choose another for `text`")

    @property
    def inputs(self) -> dict[str, Input]:
        """The fields of a batch that tell it."""
        tokens = {} if self.reader is None else {"tokens": self.reader.inputs["tokens"]}
        return {**label_input(self.classes), **tokens}

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Sharding rules of the reader."""
        return () if self.reader is None else under(TEXT, self.reader.rules)

    def drawn(self, key: Array) -> Variables:
        """The variables of the reader, before training."""
        if self.reader is None:
            return {}
        batch = {
            name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract_batch(self.reader.inputs, 1).items()
        }
        return assembled({TEXT: self.reader.init(key, batch)})

    def everything(self, variables: Variables, batch: Batch) -> Told:
        """What a batch says."""
        if self.reader is None:
            return Told(batch.get("label"))
        assert self.reader.text_features is not None
        features, inside = self.reader.text_features(part(variables, TEXT), batch["tokens"])
        return Told(batch.get("label"), Text(features, inside, jnp.ones(len(features), bool)))

    def in_training(self, variables: Variables, batch: Batch, key: Array) -> Told:
        """What a batch says, of a share of its examples nothing."""
        told = self.everything(variables, batch)
        if told.label is None and told.text is None:
            return told
        heard = ~jax.random.bernoulli(key, self.dropout, jax.tree.leaves(told)[0].shape[:1])
        label, text = told
        if label is not None and self.classes is not None:
            label = jnp.where(heard, label, self.classes)
        return Told(label, None if text is None else text._replace(known=heard))

    def check_guidance(self, guidance: float) -> None:
        """Refuses guidance away from a prediction that was never learned.

        Raises:
          UserError: the model is told nothing, or always was.
        """
        if guidance == 1:
            return
        if self.inputs == {}:
            raise UserError(
                f"guidance goes away from the prediction without a class or a text and this model is told none: leave "
                f"sampling.guidance at 1, not {guidance}"
            )
        if self.dropout == 0:
            raise UserError(
                f"guidance goes away from the prediction without a class or a text, which this model never had to make "
                f"(condition_dropout 0): leave sampling.guidance at 1, not {guidance}"
            )

    def in_drawing(self, variables: Variables, given: Batch, key: Array, num: int) -> Told:
        """What is given; a class that is not is drawn, and a text that is not is untold."""
        label = sampling_labels(key, given.get("label"), self.classes, num)
        if self.reader is None or "tokens" in given:
            told = self.everything(variables, given)
            return told._replace(label=label)
        spec = self.reader.inputs["tokens"]
        tokens = jax.ShapeDtypeStruct((num, *spec.shape), spec.dtype)
        read: Any = self.reader.text_features
        features, inside = jax.eval_shape(read, part(variables, TEXT), tokens)
        blank = Text(jnp.zeros(features.shape), jnp.ones(inside.shape, bool), jnp.zeros(num, bool))
        return Told(label, blank)
