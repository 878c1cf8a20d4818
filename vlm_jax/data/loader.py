"""Records to batches: random access, so that the number of the step is the position in the data."""

import os
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int

from vlm_jax.data.config import Data
from vlm_jax.data.fields import Example, Inputs, Reader, Record, Rng, chosen
from vlm_jax.data.packing import Packed
from vlm_jax.data.source import Source, Staged
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import check_seed

# A thread makes whole batches. Half the cores are left to the model; and of small images a second thread on two cores
# makes none more, since both wait for Python's lock.
_THREADS = max(1, (os.cpu_count() or 1) // 2)
_READ_OPTIONS = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS + 1)


Records = Source | Staged | Packed
"""What examples are made of: records, or rows of packed text."""


def example(record: Record, data: Data, inputs: Inputs, tokenizer: Tokenizer | None, rng: Rng) -> Example:
    """What a model reads of one record, as the fields of the data make it.

    Args:
      record: as a `Source` gives it.
      inputs: what the model reads, and of what size and length.
      rng: for a training example; None: an evaluation example.

    Raises:
      UserError: its image cannot be used, or it has no text.
    """
    return _read(chosen(data.fields, record, inputs), record, inputs, tokenizer, rng)


def _read(fields: Sequence[Reader], record: Record, inputs: Inputs, tokenizer: Tokenizer | None, rng: Rng) -> Example:
    found: Example = {}
    for field in fields:
        found |= field.read(record, inputs, tokenizer, rng)
    return found


def train_batches(
    sources: Sequence[Records],
    data: Data,
    inputs: Inputs,
    tokenizer: Tokenizer | None,
    *,
    batch_size: int,
    rows: Int[np.ndarray, " rows"],
    seed: int,
    start: int,
    stop: int,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's part of the batches of the steps `start` to `stop - 1`; nothing before `start` is read.

    The records of each data set are shuffled anew every epoch and laid end to end, each with its own augmentation, and
    those of several taken in turn by their weights: a fixed sequence for a seed. The global batch of step `s` is the
    stretch of it from `s * batch_size`, on any number of hosts and wherever the run started.

    Args:
      sources: the data set's split and, in this order, those of its mixture; records, or rows of packed text.
      inputs: what the model reads.
      batch_size: examples of the global batch.
      rows: which of them this host reads, in this order.
      seed: in `[0, 2**32)`.

    Returns:
      Dictionaries of the arrays that `example` gives, with an axis of the rows in front. Threads make them ahead.

    Raises:
      UserError: a record is damaged, or the seed is out of range.
    """
    check_seed(seed)
    seeds = [seed, *np.random.SeedSequence(seed).generate_state(len(sources) - 1).tolist()]
    examples = [
        grain.MapDataset.source(source).seed(one).shuffle().repeat().random_map(_maker(source, data, inputs, tokenizer))
        for source, one in zip(sources, seeds, strict=True)
    ]
    weights = [1.0, *(weight for _, weight in data.mixture)]
    mixed = examples[0] if len(examples) == 1 else grain.MapDataset.mix(examples, weights)

    def local(index: int) -> dict[str, np.ndarray]:
        step, row = divmod(index, len(rows))
        return mixed[(start + step) * batch_size + int(rows[row])]

    return iter(_batches(local, (stop - start) * len(rows), len(rows)))


def evaluation_batches(
    source: Records,
    data: Data,
    inputs: Inputs,
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
    make = _maker(source, data, inputs, tokenizer)

    def padded(index: int) -> dict[str, np.ndarray]:
        step, row = divmod(index, len(rows))
        return make(source[min(step * batch_size + int(rows[row]), len(source) - 1)], None)

    steps = -(-len(source) // batch_size)
    for step, batch in enumerate(_batches(padded, steps * len(rows), len(rows))):
        yield batch, min(batch_size, len(source) - step * batch_size)


def _maker(
    source: Records, data: Data, inputs: Inputs, tokenizer: Tokenizer | None
) -> Callable[[Record, Rng], Example]:
    """What makes an example of what the source holds, of which all has the same keys."""
    if isinstance(source, Packed):
        return source.example
    fields = chosen(data.fields, source.keys, inputs)
    return lambda record, rng: _read(fields, record, inputs, tokenizer, rng)


def _batches(make: Callable[[int], dict[str, np.ndarray]], count: int, batch_size: int) -> grain.IterDataset:
    """`make(0), ..., make(count - 1)` in batches, made by background threads."""
    return grain.MapDataset.range(count).map(make).batch(batch_size).to_iter_dataset(_READ_OPTIONS)
