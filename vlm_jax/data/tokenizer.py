"""Text to token ids and back, over the `tokenizers` library."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vlm_jax.errors import UserError
from vlm_jax.files import parse_json, replace_file

logger = logging.getLogger(__name__)

PAD, BOS, EOS = (
    ("<pad>", "[PAD]"),
    ("<bos>", "<|startoftext|>", "<s>", "[CLS]"),
    ("<eos>", "<|endoftext|>", "</s>", "[SEP]"),
)
"""The usual names of the special tokens; the first of each are those of the tokenizers that we train."""

SETTINGS = "tokenizer_config.json"
"""Beside a `tokenizer.json`, and says what it does not: which tokens are special, and how a chat is written."""
TEMPLATE = "chat_template.jinja"
"""Where newer versions of transformers keep the template instead."""

SHOWN = 60
"""Characters of a text that a warning quotes."""

_KEYS = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of the `tokenizers` library and the ids of its special tokens."""

    tokenizer: tokenizers.Tokenizer
    pad_id: int
    bos_id: int | None
    eos_id: int
    chat_template: str | None = None
    """How a conversation is written, in Jinja, as transformers has it; None: nobody said."""

    @property
    def vocab_size(self) -> int:
        """The highest id and one: more than there are tokens, where ids are left out."""
        return 1 + max(self.tokenizer.get_vocab().values())

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        """int32 [N, length]: for each text `bos` if there is one, its tokens, `eos`, then `pad` up to the length.

        A text that is too long loses its last tokens, never the `eos`. The names of special tokens
        in a text are ordinary characters.
        """
        encoded = np.full((len(texts), length), self.pad_id, np.int32)
        for row, text in zip(encoded, texts, strict=True):
            start = [] if self.bos_id is None else [self.bos_id]
            tokens = self.tokenizer.encode(text, add_special_tokens=False).ids[: length - len(start) - 1]
            row[: len(start) + len(tokens) + 1] = [*start, *tokens, self.eos_id]
        return encoded

    def encode_prompts(self, texts: Sequence[str], length: int) -> np.ndarray:
        """As `encode`, of what somebody asks for: of each text that is too long a line of warning says so.

        An empty text is none of them: it tells a model nothing.
        """
        room = length - (1 if self.bos_id is None else 2)
        for text in dict.fromkeys(texts):
            count = len(self.tokenizer.encode(text, add_special_tokens=False).ids)
            if count > room:
                shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
                logger.warning(
                    f"the prompt {shown!r} has {count} tokens and the model reads {room}: the rest is cut off"
                )
        return self.encode(texts, length)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids [T] up to the first `eos`, without special tokens.

        For a tokenizer that we trained, `decode(encode([text], length)[0])` is the text in lower case, if it fits
        in the length.
        """
        tokens = np.asarray(ids).tolist()
        if self.eos_id in tokens:
            tokens = tokens[: tokens.index(self.eos_id)]
        return self.tokenizer.decode([token for token in tokens if token not in (self.pad_id, self.bos_id)])

    def same(self, other: "Tokenizer") -> bool:
        """Whether another makes the same tokens of every text, however it writes a chat.

        What its file has others set around a text is no part of that.
        """
        ids = [(each.pad_id, each.bos_id, each.eos_id) for each in (self, other)]
        files = [json.loads(each.tokenizer.to_str()) | {"post_processor": None} for each in (self, other)]
        return ids[0] == ids[1] and files[0] == files[1]

    def save(self, path: Path) -> None:
        """Writes a `tokenizer.json`; `load_tokenizer` reads it, as does the `tokenizers` library.

        What does not follow from it, other special tokens than the usual and a chat template, is written beside it,
        under the names and keys that transformers has for that.
        """
        text = self.tokenizer.to_str(pretty=True)
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        for stale in files_of(path)[1:]:
            stale.unlink()
        ids = (self.pad_id, self.bos_id, self.eos_id)
        if self.chat_template is None and ids == _special_ids(self.tokenizer, {}):
            return
        names = [None if token is None else self.tokenizer.id_to_token(token) for token in ids]
        settings = {**dict(zip(_KEYS, names, strict=True)), "add_bos_token": self.bos_id is not None}
        settings_text = json.dumps({**settings, "chat_template": self.chat_template}, indent=2) + "\n"
        replace_file(path.with_name(SETTINGS), lambda temporary: temporary.write_text(settings_text))


def files_of(path: Path) -> list[Path]:
    """The files that make the tokenizer of a `tokenizer.json`: this first, and those beside it that there are."""
    beside = [path.with_name(name) for name in (SETTINGS, TEMPLATE)]
    return [path, *(each for each in beside if each.exists())]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of lower-case text, split at words and punctuation.

    The ids 0, 1 and 2 are `<pad>`, `<bos>` and `<eos>`; the 256 bytes follow, so that any text can be encoded, and
    then the merges. The same texts give the same tokenizer.

    Args:
      vocab_size: at most this many tokens, and fewer if the texts are soon used up; at least 259.

    Raises:
      UserError: `vocab_size` is too small.
    """
    smallest = 3 + len(_BYTES)
    if vocab_size < smallest:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is too small: {smallest} is the least that holds all bytes"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # With a space before the first word, a word is the same tokens wherever it stands.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD[0], BOS[0], EOS[0]], initial_alphabet=_BYTES, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, "the trained tokenizer")


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`; its special tokens are those that are named beside it, else by the usual names.

    Without a token for padding, the end of the text is repeated; without one for the beginning, there is none.

    Raises:
      UserError: a file cannot be read, or is none, or there is no token that ends a text.
    """
    settings = _read_settings(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"the tokenizer {path} cannot be read ({error.strerror}): give the path of a tokenizer.json"
        ) from error
    except Exception as error:  # the library raises nothing more specific
        raise UserError(
            f"{path} is not a tokenizer.json ({error}): give one that the tokenizers library wrote"
        ) from error
    # Length and special tokens are our caller's business, whatever the file says of them.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _wrap(tokenizer, str(path), settings)


def check_tokenizer(tokenizer: Tokenizer, *, vocab_size: int | None, eos_id: int | None) -> None:
    """Refuses a tokenizer whose ids a model does not read, before one of them turns up in some batch.

    Args:
      vocab_size: the model reads ids below it; None: any.
      eos_id: the id by which the model finds the end of a text; None: it does not.

    Raises:
      UserError: an id is outside the model's vocabulary, or texts end otherwise.
    """
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1} and the model's vocab_size is {vocab_size}: use a "
            f"tokenizer that fits, or a vocab_size of at least {tokenizer.vocab_size}"
        )
    if eos_id is not None and tokenizer.eos_id != eos_id:
        raise UserError(
            f"the tokenizer ends a text with the id {tokenizer.eos_id} and the model's eos_id is {eos_id}: "
            f"make them agree"
        )


def _wrap(tokenizer: tokenizers.Tokenizer, where: str, settings: dict[str, Any] | None = None) -> Tokenizer:
    settings = settings or {}
    tokenizer.encode_special_tokens = True
    for key, name in settings.items():
        if key in _KEYS and name is not None and tokenizer.token_to_id(name) is None:
            raise UserError(f"the {key} of {SETTINGS} is {name!r}, which {where} does not have: make them agree")
    pad, bos, eos = _special_ids(tokenizer, settings)
    if pad is None or eos is None:
        raise UserError(f"{where} has none of the tokens {', '.join(EOS)} to end a text: use a tokenizer that has one")
    return Tokenizer(tokenizer, pad, bos, eos, settings.get("chat_template"))


def _special_ids(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]) -> tuple[int | None, ...]:
    """Of padding, beginning and end: as the settings name them, else by their usual names."""
    names = {key: (settings[key],) if settings.get(key) else usual for key, usual in _KEYS.items()}
    pad, bos, eos = (_special(tokenizer, found) for found in names.values())
    if settings.get("add_bos_token", settings.get("bos_token", "")) in (False, None):
        bos = None
    elif "bos_token" in settings and "add_bos_token" not in settings:
        # transformers sets it before a text where the post-processor does.
        bos = bos if bos in tokenizer.encode("", add_special_tokens=True).ids[:1] else None
    # CLIP's tokenizer has no token for padding and repeats the end; SigLIP's and T5's have none for the beginning.
    return eos if pad is None else pad, bos, eos


def _special(tokenizer: tokenizers.Tokenizer, names: tuple[str, ...]) -> int | None:
    return next((found for name in names if (found := tokenizer.token_to_id(name)) is not None), None)


def _read_settings(path: Path) -> dict[str, Any]:
    """What stands beside a `tokenizer.json`: of these keys those that are there; special tokens by their names."""
    found: dict[str, Any] = {}
    beside = path.with_name(SETTINGS)
    try:
        if beside.exists():
            settings = parse_json(beside.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError("it is no JSON object")
            found = {key: settings[key] for key in (*_KEYS, "add_bos_token", "chat_template") if key in settings}
        if path.with_name(TEMPLATE).exists():
            beside = path.with_name(TEMPLATE)
            found["chat_template"] = beside.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{beside} cannot be read ({error.strerror}): mend that") from error
    except ValueError as error:
        raise UserError(f"{beside} is damaged ({error}): restore it from a copy") from error
    for key in _KEYS.keys() & found.keys():
        if isinstance(found[key], dict):  # as transformers writes an AddedToken
            found[key] = found[key].get("content")
    template = found.get("chat_template")
    if isinstance(template, list):  # of several, as transformers once kept them
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        found["chat_template"] = named.get("default")
    for key, value in found.items():
        kind = bool if key == "add_bos_token" else str
        if value is not None and not isinstance(value, kind):
            raise UserError(f"the {key} of {beside} is {value!r}: it must be a {kind.__name__}")
    return found
