"""What a model reads of a record: each kind of field beside the function that makes it."""

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vlm_jax.contract import Input
from vlm_jax.data.redraw import AS_IT_IS, PAPER, Redraw
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.data.transforms import Box, Method, centre_box, random_box, random_flip, resample, square_box, whole_box
from vlm_jax.errors import UserError

Record = Mapping[str, Any]
"""As a `Source` gives it."""
Inputs = Mapping[str, Input]
"""What the model reads, which says of what size and length."""
Example = dict[str, np.ndarray]
Rng = np.random.Generator | None
"""For the augmentation of a training example and what is chosen in it; None: an evaluation example, always the same."""


class Reader(abc.ABC):
    """A kind of field."""

    takes: ClassVar[tuple[str, ...]]
    """What it needs of a record."""
    gives: ClassVar[tuple[str, ...]]
    """What it makes of that."""

    def check(self, inputs: Inputs) -> None:
        """Raises a `UserError` where the model reads another kind of what it gives."""
        del inputs

    @abc.abstractmethod
    def read(self, record: Record, inputs: Inputs, tokenizer: Tokenizer | None, rng: Rng) -> Example:
        """Makes it of one record, or raises a `UserError` that names the record."""


@dataclass(frozen=True, kw_only=True)
class Image(Reader):
    """`image` uint8 [S, S, C]: a square of the picture, in grey or RGB."""

    takes = ("image",)
    gives = ("image",)

    resize: Literal["crop", "squash", "pad"] = "crop"
    """Scale by the shorter side and crop at the centre, as CLIP does; give up the proportions, as SigLIP does; or scale
    by the longer side, with bars of one colour beside the picture, as LLaVA-1.5 does."""
    pad_colour: tuple[int, int, int] = (0, 0, 0)
    """Of the bars: red, green, blue."""
    method: Method = "bicubic"
    """By what filter to scale."""
    crop_min_area: float = 1.0
    """Random crops of training images keep at least this share of the area; 1.0: none."""
    flip: bool = False
    """Mirror half of the training images."""
    redraw: Redraw = AS_IT_IS
    """Draw training images in another style each time."""

    def __post_init__(self) -> None:
        if not 0.0 < self.crop_min_area <= 1.0:
            raise UserError(f"crop_min_area is {self.crop_min_area}: it must lie in (0, 1], and 1 means no crops")
        if self.crop_min_area < 1.0 and self.resize != "crop":
            raise UserError(
                f"crop_min_area is {self.crop_min_area} and resize {self.resize}, which crops nothing: choose one"
            )
        if self.redraw.smallest < 1.0 and self.crop_min_area < 1.0:
            raise UserError(
                f"crop_min_area is {self.crop_min_area} and redraw.smallest {self.redraw.smallest}, which shows all of "
                f"a drawing: choose one"
            )
        if not 0 <= min(self.pad_colour) <= max(self.pad_colour) <= 255:
            raise UserError(f"pad_colour is {list(self.pad_colour)}: each must lie in [0, 255]")

    @property
    def augments(self) -> bool:
        """Whether a training image is another one each time."""
        return self.flip or self.crop_min_area < 1.0 or self.redraw != AS_IT_IS

    def check(self, inputs: Inputs) -> None:
        spec = inputs["image"]
        if spec.dtype != "uint8" or spec.shape[:1] != spec.shape[1:2] or spec.shape[2:] not in ((1,), (3,)):
            raise UserError(
                f"the model reads images of {spec.dtype}{list(spec.shape)}, and data give squares of uint8 with 1 "
                f"channel (grey) or 3 (RGB): choose such a model"
            )
        if self.redraw != AS_IT_IS and (spec.limit or 256) != 256:
            raise UserError(f"redraw is for images of 256 levels and the model reads {spec.limit}: leave it out")

    def read(self, record: Record, inputs: Inputs, tokenizer: Tokenizer | None, rng: Rng) -> Example:
        size, _, channels = inputs["image"].shape
        boxes: dict[str, Callable[[int, int], Box]] = {
            "crop": partial(centre_box, size=size),
            "squash": whole_box,
            "pad": square_box,
        }
        choose, around = boxes[self.resize], self.pad_colour
        if rng is not None and self.crop_min_area < 1.0:
            choose = partial(random_box, min_area=self.crop_min_area, rng=rng)
        if rng is not None and self.redraw.smallest < 1.0:
            choose, around = partial(self.redraw.box, rng=rng), PAPER
        levels = inputs["image"].limit or 256
        scale = partial(resample, levels=levels, method=self.method, around=around)
        image = record["image"].view(size, channels, choose, scale)
        if rng is not None and self.redraw != AS_IT_IS:
            image = self.redraw.restyled(image, rng)
        return {"image": image if rng is None or not self.flip else random_flip(image, rng)}


@dataclass(frozen=True, kw_only=True)
class Caption(Reader):
    """`tokens` int32 [T]: one of the record's texts, in training any of them, else the first."""

    takes = ("text",)
    gives = ("tokens",)

    def check(self, inputs: Inputs) -> None:
        (length,) = inputs["tokens"].shape
        if length < 3:
            raise UserError(f"the model's context_length is {length}: at least 3 leaves room for a token")

    def read(self, record: Record, inputs: Inputs, tokenizer: Tokenizer | None, rng: Rng) -> Example:
        text = one_of(record["text"], record, rng)
        return {"tokens": known(tokenizer).encode([text], inputs["tokens"].shape[0])[0]}


@dataclass(frozen=True, kw_only=True)
class Label(Reader):
    """`label` int32 []: the class of the record."""

    takes = ("label",)
    gives = ("label",)

    name: str | None = None
    """The data set's field, where it has several labels; None: the one called label, or the only one."""

    def read(self, record: Record, inputs: Inputs, tokenizer: Tokenizer | None, rng: Rng) -> Example:
        return {"label": np.asarray(record["label"], np.int32)}


@dataclass(frozen=True, kw_only=True)
class Stage(Reader):
    """`stage`: what a frozen part of the model made of the image, once for all epochs."""

    takes = ("stage",)
    gives = ("stage",)

    def read(self, record: Record, inputs: Inputs, tokenizer: Tokenizer | None, rng: Rng) -> Example:
        return {"stage": record["stage"]}


class Tokens(NamedTuple):
    """A document as a language model reads it."""

    tokens: Int[np.ndarray, " T"]
    target: Bool[np.ndarray, " T"]
    """Tokens to predict from those before them; never the first, which has none before it."""
    image_at: Int[np.ndarray, " N"] = np.zeros(0, np.int32)
    """The place of each image's first token, in order."""


class TextReader(Reader):
    """`tokens` int32, `target` bool and `segment` int32 [T] of text: documents in a row.

    In rows of their own, one of a record's documents, in training any of them, else the first; in packed rows
    (`Data.pack`) all of them.
    """

    gives: ClassVar[tuple[str, ...]] = ("tokens", "target", "segment")

    @abc.abstractmethod
    def documents(self, record: Record, inputs: Inputs, tokenizer: Tokenizer) -> list[Tokens]:
        """All that there are in a record."""

    @abc.abstractmethod
    def parts(self, document: Tokens, length: int, record: Record) -> list[Tokens]:
        """What rows of a length take of a document, or a `UserError` that names the record."""

    def images(self, records: Sequence[Record], inputs: Inputs, rng: Rng) -> Example:
        """The images of a row, each of one of the records; of a model that reads none, nothing."""
        return {}

    def read(self, record: Record, inputs: Inputs, tokenizer: Tokenizer | None, rng: Rng) -> Example:
        tokenizer, length = known(tokenizer), inputs["tokens"].shape[0]
        document = one_of(self.documents(record, inputs, tokenizer), record, rng)
        part = self.parts(document, length, record)[0]
        if not part.target.any():
            raise UserError(
                f"{record['record']} has nothing to predict within the {length} tokens that the model reads: leave it "
                f"out, or choose a longer context_length"
            )
        pictures = self.images([record] * len(part.image_at), inputs, rng)
        return row([part], inputs, tokenizer.pad_id) | pictures


@dataclass(frozen=True, kw_only=True)
class Document(TextReader):
    """Each of the record's texts as a document of which every token is predicted: `tokens`, `target`, `segment` [T].

    One that is longer than a row is cut: a row of its own keeps the beginning, and packed rows hold all parts.
    """

    takes = ("text",)

    def documents(self, record: Record, inputs: Inputs, tokenizer: Tokenizer) -> list[Tokens]:
        return [tokens_of(text, tokenizer) for text in record["text"]]

    def parts(self, document: Tokens, length: int, record: Record) -> list[Tokens]:
        tokens, target, _ = document
        target = target & (np.arange(len(target)) % length > 0)  # before the first of a row there is nothing
        cuts = range(0, len(tokens), length)
        return [Tokens(tokens[start : start + length], target[start : start + length]) for start in cuts]


def tokens_of(text: str, tokenizer: Tokenizer) -> Tokens:
    """A text, all to be predicted: the tokenizer's beginning if it has one, the text, the end."""
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    tokens = np.array([*first, *ids, tokenizer.eos_id], np.int32)
    return Tokens(tokens, np.arange(len(tokens)) > 0)


def prompts(texts: Sequence[str], tokenizer: Tokenizer) -> Example:
    """The beginnings of documents, padded on the left to one length, with nothing to predict: for `generate`."""
    return left_padded([prompt_of(text, tokenizer) for text in texts], {}, tokenizer.pad_id)


def prompt_of(text: str, tokenizer: Tokenizer) -> Tokens:
    """A text that has no end yet, with nothing to predict.

    Raises:
      UserError: nothing stands in it.
    """
    tokens = tokens_of(text, tokenizer).tokens[:-1]
    if not len(tokens):
        raise UserError("a prompt is empty, and the tokenizer has no token to begin a text with: give a word at least")
    return Tokens(tokens, np.zeros(len(tokens), bool))


def left_padded(documents: Sequence[Tokens], inputs: Inputs, pad_id: int, length: int | None = None) -> Example:
    """A row for each document, at its end: `tokens`, `target`, `segment` and, where the model reads it, `image_at`.

    Args:
      length: of the rows; None: of the longest.
    """
    length = max(len(document.tokens) for document in documents) if length is None else length
    fields = {"tokens": Input((length,), "int32"), **{name: inputs[name] for name in inputs if name == "image_at"}}
    rows = []
    for document in documents:
        found, padding = row([document], fields, pad_id), length - len(document.tokens)
        moved = {name: np.roll(found[name], padding) for name in ("tokens", "target", "segment")}
        at = {name: np.minimum(found[name] + padding, length) for name in found.keys() - moved.keys()}
        rows.append(moved | at)
    return {name: np.stack([each[name] for each in rows]) for name in rows[0]}


def row(documents: Sequence[Tokens], inputs: Inputs, pad_id: int) -> Example:
    """Documents one after the other, numbered in `segment` from 1; then padding, whose segment is 0.

    And `image_at` [N], where the model reads it: the row's length stands for none.
    """
    length = inputs["tokens"].shape[0]
    tokens, target = np.full(length, pad_id, np.int32), np.zeros(length, bool)
    segment = np.zeros(length, np.int32)
    start, places = 0, []
    for number, each in enumerate(documents, 1):
        end = start + len(each.tokens)
        tokens[start:end], target[start:end], segment[start:end] = each.tokens, each.target, number
        places += (start + each.image_at).tolist()
        start = end
    found = {"tokens": tokens, "target": target, "segment": segment}
    if "image_at" in inputs:
        found["image_at"] = np.full(inputs["image_at"].shape, length, np.int32)
        found["image_at"][: len(places)] = places
    return found


def one_of(texts: Sequence[Any], record: Record, rng: Rng) -> Any:
    if not texts:
        raise UserError(f"{record['record']} has no text: leave it out, or choose a model that reads none")
    return texts[0 if rng is None else int(rng.integers(len(texts)))]


def known(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UserError("the model reads texts, and the data's `text` is None: say there how they become tokens")
    return tokenizer


def chosen(fields: Sequence[Reader], has: Collection[str], inputs: Inputs) -> list[Reader]:
    """The fields by which a model reads a data set: of those that give the same, the first that it has."""
    found: list[Reader] = []
    given: set[str] = set()
    for field in fields:
        gives = set(field.gives)
        if gives & inputs.keys() and not gives & given and set(field.takes) <= set(has):
            found.append(field)
            given |= gives
    return found
