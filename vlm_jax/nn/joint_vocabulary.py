"""A vocabulary of texts and of images' codes, and what can be drawn of it where in an interleaved sequence."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Batch
from vlm_jax.errors import UserError
from vlm_jax.nn.sequence import check_continued, documents, image_numbers, up_to_end


class JointVocabulary(NamedTuple):
    """Which tokens mean what; all others are of texts."""

    size: int
    code_at: int
    """The token of the first code, which those of the others follow."""
    codes: int
    bos_id: int
    eos_id: int
    begin_id: int
    """The token that begins an image."""
    end_id: int
    """The token that ends an image."""

    def check(self) -> None:
        """Refuses tokens that would mean two things, or nothing.

        Raises:
          UserError: a code or a mark is outside the vocabulary, or a mark is one of the codes or another mark.
        """
        if self.code_at + self.codes > self.size:
            raise UserError(
                f"the {self.codes} codes are the tokens from {self.code_at} on, and vocab_size is {self.size}: make it "
                f"at least {self.code_at + self.codes}"
            )
        marks = {name: getattr(self, name) for name in ("bos_id", "begin_id", "end_id", "eos_id")}
        for name, token in marks.items():
            if token >= self.size:
                raise UserError(f"{name} is {token}: it must be below vocab_size, which is {self.size}")
            if self.code_at <= token < self.code_at + self.codes:
                raise UserError(f"{name} is {token}, which is one of the codes: choose another")
            if list(marks.values()).count(token) > 1:
                raise UserError(f"{name} is {token}, which another mark is as well: choose another")

    def legal(self) -> Bool[Array, "5 V"]:
        """Which tokens can stand in a place of each kind."""
        token = jnp.arange(self.size)
        code = (token >= self.code_at) & (token < self.code_at + self.codes)
        begin, end, eos = (token == mark for mark in (self.begin_id, self.end_id, self.eos_id))
        word = ~(code | begin | end | eos | (token == self.bos_id))
        return jnp.stack([word | begin, word | begin | eos, begin, code, end])


TEXT, LAST_TEXT, BEGIN, CODE, END = range(5)
"""Kinds of places to draw: of a text before an image and of the last, which ends where an image would begin too; and of
an image."""


class Plan(NamedTuple):
    """Of the places to draw, in order, the same in all rows."""

    kind: tuple[int, ...]
    segment: tuple[int, ...]
    """Which of the order's segments each is in."""

    @property
    def images(self) -> list[int]:
        """The places where they begin."""
        return [place for place, kind in enumerate(self.kind) if kind == BEGIN]


def planned(batch: Batch, order: tuple[str, ...], *, context: int, length: int | None, codes: int) -> Plan:
    """The places of the order's segments.

    Args:
      context: tokens of a row, at most.
      length: of each text, at most; None: 64, or as many as there is room for.
      codes: of an image.

    Raises:
      UserError: a text follows a text, there is no room in the context, or, where values are known, a row ends in
        padding.
    """
    given = batch["tokens"].shape[1]
    if ("text", "text") in itertools.pairwise(order):
        raise UserError(f"`order` is {order}, and two texts in a row are one: name it once")
    images, texts = order.count("image") * (codes + 2), order.count("text")
    left = (context - given - images) // max(texts, 1)
    length = max(1, min(64, left)) if length is None else length
    if given + images + texts * length > context:
        raise UserError(
            f"{given} tokens, {images} of images and {texts * length} of texts are {given + images + texts * length}, "
            f"and the model's context_length is {context}: shorten the prompts, or sampling.length"
        )
    check_continued(batch["segment"])
    kinds = [
        [BEGIN, *[CODE] * codes, END] if each == "image" else [LAST_TEXT if last else TEXT] * length
        for each, last in zip(order, [*[False] * (len(order) - 1), True], strict=True)
    ]
    places = [(kind, number) for number, each in enumerate(kinds) for kind in each]
    return Plan(*zip(*places, strict=True))


def prompted(tokens: Int[Array, "B T"], eos_id: int, *, images: tuple[int, ...]) -> dict[str, Array]:
    """Texts that are padded on the right, up to their ends, as rows that can be continued, without images.

    Args:
      images: the shape of a row's images.
    """
    batch, length = tokens.shape
    real = up_to_end(tokens, eos_id) & (tokens != eos_id)
    ahead = length - jnp.sum(real, axis=1, keepdims=True)
    moved = jnp.take_along_axis(tokens, (jnp.arange(length) - ahead) % length, axis=1)
    return {
        "tokens": moved,
        "target": jnp.zeros_like(moved, bool),
        "segment": (jnp.arange(length) >= ahead).astype(jnp.int32),
        "image": jnp.zeros((batch, *images), jnp.uint8),
        "image_at": jnp.full((batch, images[0]), length, jnp.int32),
    }


def streams(batch: Batch, span: int, guidance: float, image_guidance: float | None) -> list[Bool[Array, "B T"]]:
    """What of a prompt is attended to: all of the last document; for guidance its beginning alone; and its images.

    Args:
      span: places that an image takes.
    """
    numbers = documents(batch["segment"])
    whole = (numbers == numbers[:, -1:]) & (batch["segment"] > 0)
    if guidance == 1 and image_guidance in (None, 1):
        return [whole]
    begins = whole & (jnp.cumsum(whole, axis=1) == 1)
    if image_guidance is None:
        return [whole, begins]
    image = image_numbers(batch["image_at"], span, whole.shape[1])
    return [whole, begins, begins | (whole & (image >= 0))]


def guided(
    outputs: Sequence[Float[Array, "B ..."]], guidance: float | Array, image_guidance: float | Array | None
) -> Float[Array, "B ..."]:
    """From what is told nothing, by way of what is told images, to what is told all, of outputs as `streams` has them.

    2207.12598; of both, 2211.09800, section 3.2.1.
    """
    match outputs:
        case [told]:
            return told
        case [told, nothing]:
            return nothing + guidance * (told - nothing)
        case [told, nothing, images]:
            assert image_guidance is not None
            return nothing + image_guidance * (images - nothing) + guidance * (told - images)
    raise AssertionError(len(outputs))
