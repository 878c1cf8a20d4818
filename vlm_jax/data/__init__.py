"""Data sets by name, tokenizers, and the batches that models read."""

from vlm_jax.data.class_names import class_names, read_class_names
from vlm_jax.data.config import Data, Text
from vlm_jax.data.loader import evaluation_batches, example, make_tokenizer, train_batches
from vlm_jax.data.source import Source, open_source
from vlm_jax.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Data",
    "Source",
    "Text",
    "Tokenizer",
    "check_tokenizer",
    "class_names",
    "evaluation_batches",
    "example",
    "load_tokenizer",
    "make_tokenizer",
    "open_source",
    "read_class_names",
    "train_batches",
    "train_tokenizer",
]
