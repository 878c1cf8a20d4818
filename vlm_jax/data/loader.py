"""Records to batches: random access, so that the number of the step is the position in the data."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from vlm_jax.data.config import Data
from vlm_jax.data.source import Source, open_source
from vlm_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from vlm_jax.data.transforms import Box, centre_box, random_box, random_flip
from vlm_jax.errors import UserError, check_seed
from vlm_jax.paths import local_path

# A thread makes whole batches. Half the cores are left to the model; and of small images a second thread on two cores
# makes none more, since both wait for Python's lock.
_THREADS = max(1, (os.cpu_count() or 1) // 2)
_READ_OPTIONS = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS + 1)


def make_tokenizer(data: Data, data_dir: Path) -> Tokenizer | None:
    """The tokenizer that `data.text` asks for: read from its file, or trained on the captions of `data.train`.

    Raises:
      UserError: the file cannot be used, or the data set has no captions.
    """
    if data.text is None:
        return None
    if data.text.tokenizer is not None:
        return load_tokenizer(local_path(data.text.tokenizer))
    texts = open_source(data.name, data.train, data_dir).texts()
    first = next(texts, None)
    if first is None:
        raise UserError(f"{data.name} has no captions to train a tokenizer on: set text to None or use other data")
    return train_tokenizer(itertools.chain([first], texts), data.text.vocab_size)


def example(
    record: Mapping[str, Any], data: Data, tokenizer: Tokenizer | None, rng: np.random.Generator | None
) -> dict[str, np.ndarray]:
    """What a model reads of one record.

    Args:
      record: as a `Source` gives it.
      rng: for the augmentation of a training example and the choice among its captions; None: an evaluation
        example, which is the whole image and the first caption.

    Returns:
      Of these what the record has: `image` uint8 [S, S, C], `tokens` int32 [T], `label` int32 [].

    Raises:
      UserError: its image cannot be used, or it has an empty list of captions.
    """
    choose: Callable[[int, int], Box] = centre_box
    if rng is not None and data.crop_min_area < 1.0:
        choose = partial(random_box, min_area=data.crop_min_area, rng=rng)
    image = record["image"].view(data.image_size, data.channels, choose)
    fields = {"image": image if rng is None or not data.flip else random_flip(image, rng)}
    if data.text is not None and tokenizer is not None and "text" in record:
        captions = record["text"]
        if not captions:
            raise UserError(f"{data.name} has an image without captions: set text to None or use other data")
        choice = 0 if rng is None else rng.integers(len(captions))
        fields["tokens"] = tokenizer.encode([captions[choice]], data.text.context_length)[0]
    if "label" in record:
        fields["label"] = np.asarray(record["label"], np.int32)
    return fields


def train_batches(
    source: Source,
    data: Data,
    tokenizer: Tokenizer | None,
    *,
    batch_size: int,
    rows: Int[np.ndarray, " rows"],
    seed: int,
    start: int,
    stop: int,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's part of the batches of the steps `start` to `stop - 1`; nothing before `start` is read.

    The records are shuffled anew every epoch and laid end to end, each with its own augmentation: a fixed sequence
    for a seed. The global batch of step `s` is the stretch of it from `s * batch_size`, on any number of hosts and
    wherever the run started.

    Args:
      batch_size: examples of the global batch.
      rows: which of them this host reads, in this order.
      seed: in `[0, 2**32)`.

    Returns:
      Dictionaries of the arrays that `example` gives, with an axis of the rows in front. Threads make them ahead.

    Raises:
      UserError: a record is damaged, or the seed is out of range.
    """
    check_seed(seed)
    examples = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(lambda record, rng: example(record, data, tokenizer, rng))
    )

    def local(index: int) -> dict[str, np.ndarray]:
        step, row = divmod(index, len(rows))
        return examples[(start + step) * batch_size + int(rows[row])]

    return iter(_batches(local, (stop - start) * len(rows), len(rows)))


def evaluation_batches(
    source: Source,
    data: Data,
    tokenizer: Tokenizer | None,
    *,
    batch_size: int,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """All examples in order, and how many of each global batch count.

    The last batch is filled up with copies of the last example, so that all have one shape.

    Args:
      batch_size: examples of the global batch.
      rows: which of them this host reads, in this order; None: all.

    Raises:
      UserError: a record is damaged.
    """
    rows = np.arange(batch_size) if rows is None else rows

    def padded(index: int) -> dict[str, np.ndarray]:
        step, row = divmod(index, len(rows))
        return example(source[min(step * batch_size + int(rows[row]), len(source) - 1)], data, tokenizer, None)

    steps = -(-len(source) // batch_size)
    for step, batch in enumerate(_batches(padded, steps * len(rows), len(rows))):
        yield batch, min(batch_size, len(source) - step * batch_size)


def _batches(make: Callable[[int], dict[str, np.ndarray]], count: int, batch_size: int) -> grain.IterDataset:
    """`make(0), ..., make(count - 1)` in batches, made by background threads."""
    return grain.MapDataset.range(count).map(make).batch(batch_size).to_iter_dataset(_READ_OPTIONS)
