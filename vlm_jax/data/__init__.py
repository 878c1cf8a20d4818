"""Data sets by name, tokenizers, and the batches that models read."""

from vlm_jax.data.class_names import class_names, read_class_names
from vlm_jax.data.config import Data, Text, named
from vlm_jax.data.conversation import Dialogue, Message, VisualCaption, VisualDialogue, VisualQuestion, conversation
from vlm_jax.data.fields import Caption, Document, Image, Label, Stage, prompts
from vlm_jax.data.interleaved import Interleaved
from vlm_jax.data.loader import Records, evaluation_batches, example, train_batches
from vlm_jax.data.mixture import examples, make_tokenizer, open_data, open_training_data, rows_of, versions
from vlm_jax.data.packing import Packed
from vlm_jax.data.prepare import CACHE
from vlm_jax.data.redraw import Redraw
from vlm_jax.data.source import Source, Staged, open_source
from vlm_jax.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "CACHE",
    "Caption",
    "Data",
    "Dialogue",
    "Document",
    "Image",
    "Interleaved",
    "Label",
    "Message",
    "Packed",
    "Records",
    "Redraw",
    "Source",
    "Stage",
    "Staged",
    "Text",
    "Tokenizer",
    "VisualCaption",
    "VisualDialogue",
    "VisualQuestion",
    "check_tokenizer",
    "class_names",
    "conversation",
    "evaluation_batches",
    "example",
    "examples",
    "load_tokenizer",
    "make_tokenizer",
    "named",
    "open_data",
    "open_source",
    "open_training_data",
    "prompts",
    "read_class_names",
    "rows_of",
    "train_batches",
    "train_tokenizer",
    "versions",
]
