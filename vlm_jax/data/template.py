"""Chat templates in Jinja, as transformers renders them, taken apart: their own text, and the places of what is said.

They are rendered with a mark in the place of each text. What stands around the marks is the template's own, where the
names of special tokens are special tokens; what is said goes into its places afterwards, as ordinary characters.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import UserError

IMAGE = "<image>"
"""In a template's text, and in what a user says: here is the next image."""


class Slot(NamedTuple):
    """Where a template shows what is said."""

    message: int
    part: int | None
    """Which of its texts, where the template sets the images itself; None: all, with the images."""
    left: bool
    """Whether the template strips it, as `strip` does, at the beginning."""
    right: bool
    """And at the end."""


Piece = str | int | None | Slot
"""A text, a special token, an image, or where one side's words go."""


class Stretch(NamedTuple):
    """Consecutive pieces, all or none of which are to be learned."""

    pieces: tuple[Piece, ...]
    learned: bool


Shape = tuple[tuple[str, tuple[bool, ...]], ...]
"""Of a conversation: of each message the role, and of each of its parts whether it is an image."""


@functools.lru_cache(maxsize=512)
def skeleton(template: str, shape: Shape, tokenizer: Tokenizer) -> tuple[Stretch, ...]:
    """A template around the places of what is said in conversations of a shape, cut where what is to be learned begins
    and ends.

    Raises:
      UserError: the template cannot be used.
    """
    bos, eos = ("" if token is None else name_of(token, tokenizer) for token in (tokenizer.bos_id, tokenizer.eos_id))

    def render(slots: Sequence[tuple[int, int | None]], count: int, *, prompt: bool) -> str:
        marks = {slot: f"\x1c\ue000{number}\ue001\x1d" for number, slot in enumerate(slots)}
        messages = []
        for index, (role, images) in enumerate(shape[:count]):
            parts = [
                {"type": "image"} if image else {"type": "text", "text": marks.get((index, part))}
                for part, image in enumerate(images)
            ]
            messages.append({"role": role, "content": marks.get((index, None), parts)})
        return rendered(template, messages, bos, eos, prompt=prompt)

    # Templates of language models show a text; those of models that see go through its texts and images.
    whole_texts = [(index, None) for index in range(len(shape))]
    parts = [(index, part) for index, (_, images) in enumerate(shape) for part, image in enumerate(images) if not image]
    prompt = shape[-1][0] != "assistant"
    for slots in (whole_texts, parts):
        whole = render(slots, len(shape), prompt=prompt)
        if [int(mark[2]) for mark in _MARK.finditer(whole)] == list(range(len(slots))):
            break
    else:
        raise UserError("the chat template does not show what is said, each once and in order: choose another")
    bounds = [0]
    for index in [index for index, (role, _) in enumerate(shape) if role == "assistant"]:
        start = render(slots, index, prompt=True) if index else ""
        answered = render(slots, index + 1, prompt=False)
        rest = max(mark.end() for mark in _MARK.finditer(answered))
        special = specials(tokenizer)[0].search(answered, rest)
        end = answered if special is None else answered[: special.end()]
        if len(end) == rest:
            raise UserError("the chat template sets nothing after an answer that could end it: choose another")
        if not (whole.startswith(start) and whole.startswith(end)):
            raise UserError(
                "the chat template writes a prompt otherwise once it is answered: choose another to train with"
            )
        bounds += [len(start), len(end)]
    stretches = itertools.pairwise([*bounds, len(whole)])
    return tuple(
        Stretch(tuple(pieces(whole[a:b], slots, tokenizer)), learned=number % 2 == 1)
        for number, (a, b) in enumerate(stretches)
    )


_MARK = re.compile("(\x1c?)\ue000([0-9]+)\ue001(\x1d?)")
"""Between two characters that `strip` takes away: what is left of them tells whether the template strips."""


def pieces(text: str, slots: Sequence[tuple[int, int | None]], tokenizer: Tokenizer) -> Iterator[Piece]:
    """What a part of a rendered template consists of."""
    start = 0
    for mark in _MARK.finditer(text):
        yield from own(text[start : mark.start()], tokenizer)
        yield Slot(*slots[int(mark[2])], left=not mark[1], right=not mark[3])
        start = mark.end()
    yield from own(text[start:], tokenizer)


def own(text: str, tokenizer: Tokenizer) -> Iterator[str | int | None]:
    """What a template's own text consists of."""
    pattern, ids = specials(tokenizer)
    start = 0
    for found in pattern.finditer(text):
        if found.start() > start:
            yield text[start : found.start()]
        yield ids[found[found.lastindex or 0]]
        start = found.end()
    if text[start:]:
        yield text[start:]


@functools.lru_cache(maxsize=16)
def specials(tokenizer: Tokenizer) -> tuple[re.Pattern[str], dict[str, int | None]]:
    """What finds the names of special tokens and of images, with the space that some take up, and their ids."""
    added = {token: each for token, each in tokenizer.tokenizer.get_added_tokens_decoder().items() if each.special}
    ids: dict[str, int | None] = {each.content: token for token, each in added.items()}
    named = [token for token in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) if token is not None]
    ids |= {name_of(token, tokenizer): token for token in named}
    space = {each.content: (r"\s*" * each.lstrip, r"\s*" * each.rstrip) for each in added.values()}
    ids[IMAGE] = None
    found = [
        f"{a}({re.escape(name)}){b}"
        for name in sorted(ids, key=len, reverse=True)
        for a, b in [space.get(name, ("", ""))]
    ]
    return re.compile("|".join(found)), ids


def name_of(token: int, tokenizer: Tokenizer) -> str:
    """How a token is written."""
    name = tokenizer.tokenizer.id_to_token(token)
    assert name is not None
    return name


def ending(template: str, tokenizer: Tokenizer) -> int | str:
    """What ends an answer: a special token, or a text such as a newline.

    Raises:
      UserError: the template cannot be used.
    """
    last = skeleton(template, (("user", (False,)), ("assistant", (False,))), tokenizer)[1].pieces[-1]
    assert isinstance(last, int | str)
    return last


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, by which some templates say what is an answer: here its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def rendered(template: str, messages: Sequence[Mapping[str, Any]], bos: str, eos: str, *, prompt: bool) -> str:
    """The text of messages, each with `role` and `content`.

    Args:
      bos: the token that begins a text, empty where there is none.
      eos: the token that ends it.
      prompt: whether an answer is to follow.

    Raises:
      UserError: the template is none, or refuses the messages.
    """
    try:
        return compiled(template).render(
            messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=prompt, tools=None, documents=None
        )
    except Exception as error:  # a template is a program: of any kind
        raise UserError(f"the chat template cannot be used ({error}): correct it, or choose another") from error


@functools.lru_cache(maxsize=64)
def compiled(template: str) -> jinja2.Template:
    """A template is anybody's: it runs in a sandbox, and changes nothing that it is given."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def refuse(message: str) -> None:
    """How a template refuses what it is given."""
    raise jinja2.TemplateError(message)
