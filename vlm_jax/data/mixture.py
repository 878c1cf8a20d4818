"""The data sets of a run: opened, compared with what its model reads, tokenized, packed where it is asked for."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_jax.data.config import Data, named
from vlm_jax.data.fields import Inputs, Label, TextReader, chosen, known
from vlm_jax.data.packing import Packed, packed
from vlm_jax.data.source import Source, Staged, open_source
from vlm_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.paths import local_path


def open_data(data: Data, split: str, inputs: Inputs, data_dir: Path, *, name: str | None = None) -> Source:
    """Opens a split of one data set, of which a model can be given what it reads.

    Args:
      inputs: what the model reads.
      name: one of the mixture; None: the data set itself.

    Raises:
      UserError: as `named` and `open_source`; or no field gives what the model reads, or the data set has nothing to
        make it of.
    """
    label = next((field.name for field in data.fields if isinstance(field, Label)), None)
    source = open_source(name or named(data), split, data_dir, label=label if "label" in inputs else None)
    check_fields(data, source, inputs)
    return source


def open_training_data(data: Data, inputs: Inputs, data_dir: Path) -> tuple[Source, ...]:
    """Opens the training split of a data set and of each that is mixed with it.

    Raises:
      UserError: as `open_data`; or the labels of two of them mean different things.
    """
    names = [named(data), *(name for name, _ in data.mixture)]
    sources = tuple(open_data(data, data.train, inputs, data_dir, name=name) for name in names)
    for source in sources:
        if "label" in inputs and source.label_names != sources[0].label_names:
            raise UserError(
                f"the labels of {source.name} are not those of {sources[0].name}: a model that reads labels cannot be "
                f"trained on both"
            )
    return sources


def versions(data: Data, sources: Sequence[Source]) -> Data:
    """The same with the names by which the versions that were opened, and no others, are found again."""
    names = [source.full_name for source in sources]
    mixture = tuple((name, weight) for name, (_, weight) in zip(names[1:], data.mixture, strict=True))
    return replace(data, name=names[0], mixture=mixture)


def examples(sources: Sequence[Source]) -> dict[str, Any]:
    """How many there are in each split of the first, and under its name in each of another."""
    return {**sources[0].examples, **{source.full_name: source.examples for source in sources[1:]}}


def check_fields(data: Data, source: Source, inputs: Inputs) -> None:
    """Refuses, before anything is read, what a model could not be given.

    Raises:
      UserError: no field gives what the model reads, or the data set has nothing to make it of.
    """
    found = chosen(data.fields, source.keys, inputs)
    given = {name for field in found for name in field.gives}
    for name in inputs:
        if name in given:
            continue
        giving = [field for field in data.fields if name in field.gives]
        if not giving:
            gives = sorted({name for field in data.fields for name in field.gives})
            raise UserError(
                f"the model reads {name!r} and data.fields give {', '.join(gives) or 'nothing'}: add a field that "
                f"gives it, or choose another model"
            )
        if late := next((field for field in giving if source.keys >= set(field.takes)), None):
            raise UserError(
                f"the model reads {name!r}, which {type(late).__name__} gives after another field: put it first among "
                f"data.fields, for both give {' and '.join(sorted(given & set(late.gives)))}"
            )
        takes = " or ".join(" and ".join(field.takes) for field in giving)
        amiss = [source.amiss[key] for field in giving for key in field.takes if key in source.amiss]
        raise UserError(
            f"the model reads {name!r}, which is made of {takes}, and {source.name} has "
            f"{', '.join(sorted(source.keys)) or 'nothing of the kind'}{f' ({amiss[0]})' if amiss else ''}: choose a "
            f"data set that has it, or another model"
        )
    for field in found:
        field.check(inputs)
    if data.pack and not (len(found) == 1 and isinstance(found[0], TextReader)):
        raise UserError(
            f"data.pack lays text and its images in rows, and the model reads {', '.join(inputs)}: set it to False, or "
            f"choose a model that reads tokens, target and segment"
        )


def make_tokenizer(data: Data, sources: Sequence[Source]) -> Tokenizer | None:
    """The tokenizer that `data.text` asks for: read from its file, or trained on the texts of the training data.

    Raises:
      UserError: the file cannot be used, or the data sets have no texts.
    """
    if data.text is None:
        return None
    if data.text.tokenizer is not None:
        return load_tokenizer(local_path(data.text.tokenizer))
    texts = itertools.chain.from_iterable(source.texts() for source in sources)
    first = next(texts, None)
    if first is None:
        raise UserError(f"{data.name} has no captions to train a tokenizer on: set text to None or use other data")
    return train_tokenizer(itertools.chain([first], texts), data.text.vocab_size)


def rows_of(
    source: Source | Staged, data: Data, inputs: Inputs, tokenizer: Tokenizer | None, *, seed: int = 0
) -> Source | Staged | Packed:
    """What the examples of a split are made of: its records, or rows of its texts, which are read and planned here.

    Args:
      seed: of the plan.

    Raises:
      UserError: a record is damaged, or there is no tokenizer for its texts.
    """
    if not data.pack:
        return source
    (reader,) = chosen(data.fields, source.keys, inputs)
    assert isinstance(reader, TextReader)
    return packed(source, reader, known(tokenizer), inputs, seed)
