"""Documents of images and texts that a model reads and writes alike."""

import zlib
from dataclasses import dataclass

import numpy as np

from vlm_jax.data.conversation import ImageReader
from vlm_jax.data.fields import Example, Image, Inputs, Record, Rng, Tokens, known, one_of, row
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Interleaved(ImageReader):
    """An image and its caption as one document, in either order, all of which is to be predicted.

    In rows of their own, training examples have one of the captions, in an order that is drawn; evaluation examples the
    first, and after it the image, which alone is to be predicted there. Packed rows (`Data.pack`) hold a document of
    each caption, whose order is drawn once for all epochs.
    """

    takes = ("image", "text")

    caption_first: float = 0.5
    """Share of the training documents in which the caption stands before the image."""
    caption_dropout: float = 0.1
    """Share of those in which it is left out all the same: the model then draws what it is not told, for guidance."""
    image: Image = Image()
    """How the image is read."""

    def __post_init__(self) -> None:
        for name in ("caption_first", "caption_dropout"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise UserError(f"{name} is {share}: a share lies in [0, 1]")

    def documents(self, record: Record, inputs: Inputs, tokenizer: Tokenizer) -> list[Tokens]:
        """Of each caption, by its record's name and number."""
        names = (f"{record['record']}/{number}".encode() for number in range(len(record["text"])))
        draws = (np.random.default_rng(zlib.crc32(name)) for name in names)
        return [self.arranged(text, inputs, tokenizer, rng) for text, rng in zip(record["text"], draws, strict=True)]

    def arranged(self, text: str, inputs: Inputs, tokenizer: Tokenizer, rng: Rng) -> Tokens:
        """In an order that is drawn, perhaps without the caption; without `rng` the caption first."""
        first = rng is None or rng.random() < self.caption_first
        dropped = first and rng is not None and rng.random() < self.caption_dropout
        return document(None if dropped else text, caption_first=first, span=span_of(inputs), tokenizer=tokenizer)

    def parts(self, document: Tokens, length: int, record: Record) -> list[Tokens]:
        """The whole of it: half an image is none."""
        if len(document.tokens) > length:
            raise UserError(
                f"{record['record']} is a document of {len(document.tokens)} tokens and the model reads {length}: "
                f"leave it out, or choose a longer context_length"
            )
        return [document]

    def read(self, record: Record, inputs: Inputs, tokenizer: Tokenizer | None, rng: Rng) -> Example:
        tokenizer = known(tokenizer)
        found = self.arranged(one_of(record["text"], record, rng), inputs, tokenizer, rng)
        if rng is None:
            places = np.arange(len(found.tokens)) - found.image_at
            found = found._replace(target=found.target & (places >= 0) & (places < span_of(inputs)))
        self.parts(found, inputs["tokens"].shape[0], record)
        return row([found], inputs, tokenizer.pad_id) | self.images([record], inputs, rng)


def document(text: str | None, *, caption_first: bool, span: int, tokenizer: Tokenizer) -> Tokens:
    """The tokenizer's beginning if it has one, image and text, the end: all to be predicted but the first.

    Args:
      text: None: there is the image alone.
      span: places that the image takes.
    """
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [] if text is None else tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    image = [tokenizer.pad_id] * span
    before, after = (ids, image) if caption_first else (image, ids)
    tokens = np.array([*first, *before, *after, tokenizer.eos_id], np.int32)
    at = len(first) + (len(before) if caption_first else 0)
    return Tokens(tokens, np.arange(len(tokens)) > 0, np.array([at], np.int32))


def span_of(inputs: Inputs) -> int:
    """Places that an image takes."""
    span = inputs["image_at"].span
    assert span is not None  # `check` has looked
    return span
