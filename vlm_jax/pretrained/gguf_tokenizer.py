"""The tokenizer that a GGUF holds: a byte-level BPE, whose pieces of text are cut as its `tokenizer.ggml.pre` says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from vlm_jax.data import Tokenizer
from vlm_jax.errors import UserError

CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens (`tokenizer.ggml.token_type`) that no merge makes: marks, and words added as a whole."""


def bytes_of(pattern: str) -> list[Any]:
    """Pieces as a regular expression has them, and then their bytes."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of digits so many at a time."""
CUTS: dict[str, Callable[[], list[Any]]] = {
    "gpt-2": lambda: [GPT_2],
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), GPT_2],
    "llama-bpe": lambda: bytes_of(GPT_4 % 3),
    "qwen2": lambda: bytes_of(GPT_4 % 1),
}
"""By `tokenizer.ggml.pre`, how a text is cut before merges within a piece (llama.cpp's llama-vocab.cpp)."""


def tokenizer_of(told: Mapping[str, Any], path: Path) -> Tokenizer:
    """Of the metadata of a GGUF.

    Args:
      path: of the file, for messages.

    Raises:
      UserError: it is of a kind that is not known here, or damaged.
    """
    kind, pre = told.get("tokenizer.ggml.model"), told.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in CUTS:
        raise UserError(
            f"the tokenizer of {path} is of kind {kind!r} and cut {pre!r}, and what can be read here is gpt2 with one "
            f"of {', '.join(CUTS)}: give the weights as safetensors with a tokenizer.json"
        )
    try:
        tokens: list[str] = told["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in told["tokenizer.ggml.merges"]]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        # Of Llama 3, a piece that is a token stays one, whatever merges would make of it.
        bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
        tokenizer = tokenizers.Tokenizer(bpe)
        tokenizer.add_tokens(added(tokens, told.get("tokenizer.ggml.token_type", [1] * len(tokens))))
        eos_id = int(told["tokenizer.ggml.eos_token_id"])
        pad_id = int(told.get("tokenizer.ggml.padding_token_id", eos_id))
        bos_id = int(told["tokenizer.ggml.bos_token_id"]) if begins(told, pre) else None
        if len(vocabulary) < len(tokens) or not all(0 <= id < len(tokens) for id in (eos_id, pad_id, bos_id or 0)):
            raise ValueError("a token is there twice, or a mark is none of them")
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"the tokenizer of {path} is damaged ({error!r}): fetch the file again") from error
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(CUTS[pre]())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    return Tokenizer(tokenizer, pad_id, bos_id, eos_id, told.get("tokenizer.chat_template"))


def begins(told: Mapping[str, Any], pre: str) -> bool:
    """Whether texts begin with a token; of what does not say so, llama.cpp's Llama 3 does."""
    return bool(told.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"))


def added(tokens: list[str], kinds: list[int]) -> list[AddedToken]:
    """What is looked for in a text as a whole, the marks as special ones."""
    return [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
