"""CLIP's tokenizer as OpenAI published it and pipelines keep it: `vocab.json` and `merges.txt`.

A byte-level BPE of lower-case words, whose last piece is marked (2103.00020, section 2.4), as transformers' fast reader
has it: OpenAI's own mends broken characters before.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from vlm_jax.data import Tokenizer
from vlm_jax.data.tokenizer import SETTINGS
from vlm_jax.errors import UserError
from vlm_jax.pretrained.source import read_json

VOCABULARY, MERGES = "vocab.json", "merges.txt"
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""Of a text: endings, words, digits, and what else stands together."""
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def read_clip_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of two files in a directory; None: they are not there.

    Raises:
      UserError: they are damaged, or lack the tokens that begin and end a text.
    """
    vocabulary, path = dict(read_json(directory / VOCABULARY)), directory / MERGES
    if not vocabulary or not path.is_file():
        return None
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        merges: list[Any] = [tuple(line.split()) for line in lines if not line.startswith("#version")]
        bpe = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END)
        tokenizer = tokenizers.Tokenizer(bpe)
        begin, end = vocabulary[BEGIN], vocabulary[END]
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path} and {VOCABULARY} beside it are no tokenizer ({error!r}): fetch both again") from error
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    cut = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    around = (END, end), (BEGIN, begin)
    tokenizer.post_processor = processors.RobertaProcessing(*around, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.encode_special_tokens = True
    return Tokenizer(tokenizer, padding(directory, vocabulary, end), begin, end)


def padding(directory: Path, vocabulary: dict[str, int], end: int) -> int:
    """The token that fills texts up: the end, as OpenAI's has it, unless another one is named."""
    name = read_json(directory / SETTINGS).get("pad_token")
    if isinstance(name, dict):  # as transformers writes an AddedToken
        name = name.get("content")
    if name is None:
        return end
    if name not in [*vocabulary]:
        raise UserError(f"pad_token in {directory / SETTINGS} is {name!r}, which {VOCABULARY} lacks: make them agree")
    return vocabulary[name]
