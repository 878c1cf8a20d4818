"""What a run answers: prompts and pictures by its chat template, and what its model writes after them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax.contract import Batch, Model, Variables
from vlm_jax.data.config import Field
from vlm_jax.data.conversation import Dialogue, Message, VisualCaption, VisualQuestion, conversation, one_image
from vlm_jax.data.fields import Example, Image, Tokens, left_padded, prompt_of
from vlm_jax.data.picture import Picture, picture_of
from vlm_jax.data.template import ending
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import UserError

TOGETHER = 16
"""Prompts that are answered at once, at most."""
STEP = 16
"""Prompts are padded to a multiple of so many places, so that few programs are compiled."""
ROOM = 64
"""Tokens that an answer may need where `sampling.length` does not say."""


Shown = str | Path | Picture | np.ndarray
"""An image: a file, or pixels, uint8 [H, W, 3]."""


class Asked(NamedTuple):
    """A question about some pictures, in the places of `<image>` in it, or in front of it."""

    prompt: str
    """Empty: what the run's captions were asked for with."""
    images: tuple[Shown, ...] = ()
    """Opened when it is asked."""


class Speaker(NamedTuple):
    """A model that writes texts, and all that it takes to be asked."""

    model: Model
    variables: Variables
    tokenizer: Tokenizer | None
    fields: Sequence[Field] = ()
    """How its run reads images and conversations."""
    sampling: Any = None
    """How it draws; None: as its family does."""


def chat(
    speaker: Speaker,
    prompts: Sequence[str],
    images: Sequence[Shown] = (),
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The answer to each prompt, to all of which all images belong, in order.

    By the chat template that the run's fields have, else the tokenizer's own; of a language model without one it is how
    the text goes on.

    Raises:
      UserError: the model writes no texts or reads no images, or there are more or fewer marks `<image>` than images,
        or an image cannot be used, or a prompt is too long.
    """
    asked = [Asked(prompt, tuple(images)) for prompt in prompts]
    return list(answers(speaker, asked, temperature=temperature, seed=seed))


def answers(speaker: Speaker, asked: Sequence[Asked], *, temperature: float = 1.0, seed: int = 0) -> Iterator[str]:
    """The answer to each, in order, of so many at a time; as `chat`."""
    model, _, tokenizer, _, sampling = speaker
    if model.generate is None or tokenizer is None:
        raise UserError("the model writes no texts: choose a run of one that does")
    begun = [prompted(speaker, one) for one in asked]
    context, longest = model.inputs["tokens"].shape[0], max((len(document.tokens) for document, _ in begun), default=0)
    if longest >= context:
        raise UserError(f"a prompt has {longest} tokens and the model's context_length is {context}: shorten it")
    rounded = -(-longest // STEP) * STEP
    room = getattr(model.sampling if sampling is None else sampling, "length", None) or ROOM
    length = rounded if rounded + room <= context else longest
    write = writer(model.generate, temperature, sampling)
    for start in range(0, len(asked), TOGETHER):
        part = list(range(start, min(start + TOGETHER, len(asked))))
        filled = part + part[-1:] * (min(TOGETHER, len(asked)) - len(part))  # so that all have one shape
        batch = left_padded([begun[index][0] for index in filled], model.inputs, tokenizer.pad_id, length)
        if "image_at" in model.inputs:
            batch["image"] = np.stack([seen(speaker, asked[index].images) for index in filled])
        written = write(speaker.variables, jax.random.fold_in(jax.random.key(seed), start), batch)
        for row, index in enumerate(part):
            tokens, drawn = (np.asarray(written[name][row, length:]) for name in ("tokens", "target"))
            yield answer(tokens[drawn].tolist(), begun[index][1], tokenizer)


@functools.lru_cache(maxsize=16)
def writer(generate: Callable[..., Batch], temperature: float, sampling: Any) -> Callable[..., Batch]:
    """Compiled once for the prompts of a shape, in however many calls they come."""
    return jax.jit(partial(generate, temperature=temperature, sampling=sampling))


def prompted(speaker: Speaker, asked: Asked) -> tuple[Tokens, int | str]:
    """The tokens of a prompt, and what ends its answer."""
    tokenizer, places = speaker.tokenizer, speaker.model.inputs.get("image_at")
    assert tokenizer is not None
    most = 0 if places is None else places.shape[0]
    if len(asked.images) > most:
        reads = f"at most {most} in a conversation" if most else "none"
        raise UserError(f"there are {len(asked.images)} images and the model reads {reads}: leave the others out")
    template, prompt = spoken(speaker, asked)
    if template is None and most:
        raise UserError("the run has no chat template: put one beside its tokenizer, in tokenizer_config.json")
    if template is None:
        return prompt_of(prompt, tokenizer), tokenizer.eos_id
    images, span = (None, None) if places is None else (len(asked.images), places.span)
    document = conversation([Message("user", prompt)], template, tokenizer, images=images, span=span or 0)
    return document, ending(template, tokenizer)


def spoken(speaker: Speaker, asked: Asked) -> tuple[str | None, str]:
    """By what template a run is asked, and what."""
    kinds: tuple[type[Field], ...] = (VisualQuestion, VisualCaption, Dialogue)
    if not asked.images:
        kinds = (Dialogue, VisualQuestion, VisualCaption)
    elif not asked.prompt:
        kinds = (VisualCaption, VisualQuestion, Dialogue)
    field = next((field for kind in kinds for field in speaker.fields if isinstance(field, kind)), None)
    template = getattr(field, "template", None)
    prompt = asked.prompt
    if isinstance(field, VisualCaption) and not prompt:
        prompt = field.prompt
    elif isinstance(field, VisualQuestion) and len(asked.images) == 1:
        prompt = field.asked(prompt)
    assert speaker.tokenizer is not None
    return speaker.tokenizer.chat_template if template is None else template, prompt


def chats(speaker: Speaker) -> bool:
    """Whether a run is asked and answers, or only goes on with a text."""
    if speaker.model.generate is None or speaker.tokenizer is None:
        return False
    return "image_at" in speaker.model.inputs or spoken(speaker, Asked(""))[0] is not None


def seen(speaker: Speaker, images: Sequence[Shown]) -> np.ndarray:
    """uint8 [N, S, S, C]: pictures as the run's data say; the rest black."""
    inputs = speaker.model.inputs
    found = np.zeros(inputs["image"].shape, inputs["image"].dtype)
    field = next(
        (each for each in (getattr(field, "image", field) for field in speaker.fields) if isinstance(each, Image)),
        Image(),
    )
    for place, picture in zip(found, images, strict=False):
        read: Example = field.read({"image": picture_of(picture)}, one_image(inputs), None, None)
        place[...] = read["image"]
    return found


def answer(tokens: list[int], end: int | str, tokenizer: Tokenizer) -> str:
    """What was written before its end."""
    if end in tokens:
        tokens = tokens[: tokens.index(int(end))]
    text = tokenizer.decode(tokens)
    return (text.partition(end)[0] if isinstance(end, str) else text).strip()
