"""Conversations as a language model reads them: messages -> pieces -> tokens, and which of them are to be learned.

A chat template is rendered with a mark in the place of each text. What stands around the marks is the template's own,
where the names of special tokens are special tokens; in what a user or a data set says they are ordinary characters.
What is learned follows from the pieces: of each answer all that the template writes beyond the prompt for it, to the
token that ends it.
"""

import abc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from vlm_jax.data.fields import Example, Image, Inputs, Record, Rng, TextReader, Tokens
from vlm_jax.data.template import IMAGE, Piece, Slot, skeleton
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import UserError

V1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% if message.role == 'system' %}{{ message.content + ' ' }}"
    "{% elif message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Vicuna's, with which LLaVA-1.5 is tuned and asked (2310.03744; `conv_vicuna_v1` of its conversation.py)."""

PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.content }}{% if message.role == 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""Image, caption, newline: LLaVA's first stage, in which the newline is the end (`conv_llava_plain`)."""

ALONE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Image, caption, end: a document of `Interleaved`."""

LINE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ ' ' + message.content + eos_token }}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
"""Question, space, answer, end; after `<image>{}` a document of `Interleaved`."""


class Message(NamedTuple):
    """What one side says."""

    role: str
    """system, user or assistant."""
    content: str


def conversation(
    messages: Sequence[Message], template: str, tokenizer: Tokenizer, *, images: int | None = None, span: int = 0
) -> Tokens:
    """A conversation, all of whose answers are to be learned; where it does not end with one, the prompt for it.

    A prompt is exactly the first tokens of the conversation with its answer. The text between special tokens and images
    is encoded as a whole, for the tokens of a word depend on what stands before it; where the whole has other tokens
    than a prompt that ends in it, what follows the prompt is encoded by itself.

    Args:
      images: that belong to it, in the places of `IMAGE` in what users say, or, where there is no such mark, in front
        of the first question; None: the mark is text.
      span: places that an image takes.

    Raises:
      UserError: there are more or fewer marks than images, or the template cannot be used.
    """
    said = placed(messages, images)
    shape = tuple(
        (role, tuple(part is None for part in parts)) for (role, _), parts in zip(messages, said, strict=True)
    )
    stretches = skeleton(template, shape, tokenizer)
    atoms = [(atom, stretch.learned) for stretch in stretches for atom in filled(stretch.pieces, said)]
    shown = sum(atom is None for atom, _ in atoms)
    if shown != (images or 0):
        raise UserError(f"the chat template shows {shown} of {images or 0} images: choose another")
    tokens: list[int] = []
    target: list[bool] = []
    image_at: list[int] = []
    for is_text, group in itertools.groupby(atoms, key=lambda atom: isinstance(atom[0], str)):
        if is_text:
            for token, learned in encoded([(str(text), learned) for text, learned in group], tokenizer):
                tokens.append(token)
                target.append(learned)
            continue
        for atom, learned in group:
            if atom is None:
                image_at.append(len(tokens))
                tokens += [tokenizer.pad_id] * span
                target += [False] * span
            else:
                tokens.append(int(atom))
                target.append(learned)
    target[:1] = [False] * len(target[:1])  # nothing stands before it that could predict it
    return Tokens(np.array(tokens, np.int32), np.array(target, bool), np.array(image_at, np.int32))


def placed(messages: Sequence[Message], images: int | None) -> list[tuple[str | None, ...]]:
    """Each message's texts and, as None, its images, in order."""
    if images is None:
        return [(message.content,) for message in messages]
    contents = [message.content for message in messages]
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    marks = sum(contents[index].count(IMAGE) for index in users)
    if images and users and not marks:
        # As LLaVA sets them: each on a line of its own, before the question.
        contents[users[0]] = "\n".join([*[IMAGE] * images, *filter(None, [contents[users[0]]])])
        marks = images
    if marks != images:
        raise UserError(
            f"there are {marks} marks {IMAGE} and {images} images: give one for each, or leave all marks out"
        )
    said: list[tuple[str | None, ...]] = []
    for index, content in enumerate(contents):
        texts = content.split(IMAGE) if index in users else [content]
        parts: list[str | None] = [part for text in texts for part in (text, None)][:-1]
        said.append(tuple(part for part in parts if part != "" or len(parts) == 1))
    return said


def filled(pieces: Sequence[Piece], said: Sequence[tuple[str | None, ...]]) -> Iterator[str | int | None]:
    """The pieces with what is said in its places."""
    for piece in pieces:
        if not isinstance(piece, Slot):
            yield piece
            continue
        parts = list(said[piece.message]) if piece.part is None else [said[piece.message][piece.part]]
        if piece.left and parts[0] is not None:
            parts[0] = parts[0].lstrip()
        if piece.right and parts[-1] is not None:
            parts[-1] = parts[-1].rstrip()
        yield from parts


def encoded(run: Sequence[tuple[str, bool]], tokenizer: Tokenizer) -> list[tuple[int, bool]]:
    """The tokens of consecutive texts, and whether each is to be learned, as its text is."""
    done: list[tuple[int, bool]] = []
    before, found = "", list[tuple[int, bool]]()
    for learned, group in itertools.groupby(run, key=lambda part: part[1]):
        text = "".join(part for part, _ in group)
        ids = tokenizer.tokenizer.encode(before + text, add_special_tokens=False).ids
        if ids[: len(found)] != [token for token, _ in found]:
            done, before, found = done + found, "", []
            ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        before += text
        found += [(token, learned) for token in ids[len(found) :]]
    return done + found


class ConversationReader(TextReader):
    """`tokens`, `target` and `segment` [T] of conversations, and of a model that sees `image` and `image_at`."""

    gives: ClassVar[tuple[str, ...]] = ("tokens", "target", "segment", "image", "image_at")

    template: str | None
    """The chat template; None: the tokenizer's own."""

    @abc.abstractmethod
    def conversations(self, record: Record) -> list[list[Message]]:
        """All that there are in a record."""

    def documents(self, record: Record, inputs: Inputs, tokenizer: Tokenizer) -> list[Tokens]:
        images = 1 if "image" in self.takes else None
        span = inputs["image_at"].span if "image_at" in inputs else None
        template = template_of(self.template, tokenizer)
        try:
            return [
                conversation(each, template, tokenizer, images=images, span=span or 0)
                for each in self.conversations(record)
            ]
        except UserError as error:
            raise UserError(f"{record['record']}: {error}") from error

    def images(self, records: Sequence[Record], inputs: Inputs, rng: Rng) -> Example:
        return {"image": np.zeros(inputs["image"].shape, inputs["image"].dtype)} if "image" in inputs else {}

    def parts(self, document: Tokens, length: int, record: Record) -> list[Tokens]:
        """The whole of it: what is cut off an answer would be learned, or judged, as if it ended there."""
        if len(document.tokens) > length:
            raise UserError(
                f"{record['record']} is a conversation of {len(document.tokens)} tokens and the model reads {length}: "
                f"leave it out, or choose a longer context_length"
            )
        return [document]


@dataclass(frozen=True, kw_only=True)
class Dialogue(ConversationReader):
    """A question and its answer, of which the answer and its end are predicted."""

    takes = ("question", "answer")

    template: str | None = LINE
    """The chat template, in Jinja; None: the tokenizer's own."""

    def conversations(self, record: Record) -> list[list[Message]]:
        return [[Message("user", record["question"]), Message("assistant", record["answer"])]]


class ImageReader(TextReader):
    """Documents with an image each in their places, or with what a frozen part of the model made of it (`stage`)."""

    gives: ClassVar[tuple[str, ...]] = (*ConversationReader.gives, "stage")

    image: Image

    def check(self, inputs: Inputs) -> None:
        if "image" not in inputs or inputs.get("image_at", inputs["image"]).span is None:
            raise UserError(
                f"{type(self).__name__} sets images into a sequence, and the model reads none there: choose Dialogue "
                f"or Document, or a model that sees"
            )
        self.image.check(one_image(inputs))

    def images(self, records: Sequence[Record], inputs: Inputs, rng: Rng) -> Example:
        name = "stage" if "stage" in inputs else "image"
        found = np.zeros(inputs[name].shape, inputs[name].dtype)
        for place, record in zip(found, records, strict=False):
            made = (
                record["stage"] if name == "stage" else self.image.read(record, one_image(inputs), None, rng)["image"]
            )
            place[...] = made
        return {name: found}


class VisualReader(ImageReader, ConversationReader):
    """Conversations about one image each."""

    gives = ImageReader.gives


def one_image(inputs: Inputs) -> Inputs:
    """What is read of each of a row's images."""
    return {"image": inputs["image"]._replace(shape=inputs["image"].shape[1:])}


@dataclass(frozen=True, kw_only=True)
class VisualQuestion(VisualReader):
    """A question about an image; the answer and its end are predicted."""

    takes = ("image", "question", "answer")

    template: str | None = None
    """The chat template, in Jinja; None: the tokenizer's own."""
    prompt: str = "{}"
    """What is asked, the question in the place of {}, and the image in that of `<image>`, or, where neither this nor
    the question says so, on a line of its own before it, as LLaVA has it. A question that says `<image>` is asked as it
    stands."""
    image: Image = Image()
    """How the image is read."""

    def __post_init__(self) -> None:
        if "{}" not in self.prompt:
            raise UserError(f"the prompt {self.prompt!r} has no place for the question: write {{}} there")

    def conversations(self, record: Record) -> list[list[Message]]:
        return [[Message("user", self.asked(record["question"])), Message("assistant", record["answer"])]]

    def asked(self, question: str) -> str:
        """The question as it is asked."""
        return question if IMAGE in question else self.prompt.replace("{}", question)


@dataclass(frozen=True, kw_only=True)
class VisualDialogue(VisualReader):
    """Questions about an image, one after the other, as LLaVA-1.5 puts together those of one (2310.03744, appendix A):
    all answers and their ends are predicted."""

    takes = ("image", "turns")

    template: str | None = None
    """The chat template, in Jinja; None: the tokenizer's own."""
    image: Image = Image()
    """How the image is read."""

    def conversations(self, record: Record) -> list[list[Message]]:
        return [[Message(*said) for turn in record["turns"] for said in zip(("user", "assistant"), turn, strict=True)]]


@dataclass(frozen=True, kw_only=True)
class VisualCaption(VisualReader):
    """An image and its caption, in training any of them, in packed rows each; the caption and its end are predicted."""

    takes = ("image", "text")

    template: str | None = None
    """The chat template, in Jinja; None: the tokenizer's own."""
    prompt: str = ""
    """What asks for the caption."""
    image: Image = Image()
    """How the image is read."""

    def conversations(self, record: Record) -> list[list[Message]]:
        return [[Message("user", self.prompt), Message("assistant", text)] for text in record["text"]]


def template_of(template: str | None, tokenizer: Tokenizer) -> str:
    """This template, or the tokenizer's own.

    Raises:
      UserError: there is none.
    """
    found = tokenizer.chat_template if template is None else template
    if found is None:
        raise UserError("the tokenizer has no chat template: give the field one, such as vlm_jax.data.conversation.V1")
    return found
