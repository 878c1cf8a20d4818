"""Data sets by name: ours and any that TFDS has prepared, as random-access records with the same few keys."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlm_jax.data.find import find_data_set, full_name, mend
from vlm_jax.data.picture import Picture
from vlm_jax.errors import UserError

TEXT_KEYS = ("captions", "caption", "text")
"""What data sets call the captions of an image; coco_captions nests the last in the first."""
INNER_KEYS = (*TEXT_KEYS, "answer")
"""And what they call texts within a list of them."""


@dataclass(frozen=True, eq=False)
class Source:
    """The records of one split. `source[i]` is a dictionary of those of these that the data set has:

    - `record`: what errors call it;
    - `image`: a `Picture`;
    - `text`: tuple of str, all captions of the image; where there are questions, the one line "question answer";
    - `question` and `answer`: str; `answers`: tuple of str, of several people, where `answer` is what most of them say;
    - `turns`: tuple of pairs of str, questions about the image with their answers, of a sequence of dictionaries that
      have both, in a field of this name;
    - `label`: int, an index into `label_names`.
    """

    name: str
    split: str
    directory: Path
    label_names: tuple[str, ...] | None
    label_fields: tuple[str, ...]
    """The fields of the data set that are labels; of several, none of which is called so, `label` is none."""
    full_name: str
    """With configuration and version, as `find_data_set` takes it: "coco_captions/2014:1.1.0"."""
    examples: dict[str, int]
    """In each split of the data set."""
    amiss: dict[str, str]
    """Of those of the keys that its records only seem to have: why they have not."""
    _records: Any = field(repr=False)
    _features: tfds.features.FeaturesDict = field(repr=False)
    _keys: dict[str, str] = field(repr=False)
    """Our names of the fields -> the data set's."""
    _mend: str = field(repr=False)
    """What to do about damage."""

    def __len__(self) -> int:
        return len(self._records)

    @property
    def keys(self) -> frozenset[str]:
        """What its records have."""
        found = {*self._keys, *(["answer"] if "answers" in self._keys else [])}
        return frozenset(found | ({"text"} if {"question", "answer"} <= found else set()))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one record; its image is decoded when it is looked at.

        Raises:
          UserError: the record is damaged, or lacks a field that the data set describes, or has a text that is not
            UTF-8.
          IndexError: `index` is outside `[0, len(source))`.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        record, called = self._read(index), self._called(index)
        if "image" in record:
            record["image"] = Picture(record["image"], called)
        record["record"] = called
        return record

    def strings(self) -> Iterator[dict[str, Any]]:
        """Of every record in order: `captions` and `answers` (tuples), `question`, `answer` and `label` (its name).

        Those it has.

        Raises:
          UserError: as reading a record.
        """
        for index in range(len(self)):
            record = self._read(index)
            strings: dict[str, Any] = {key: record[key] for key in ("question", "answer", "answers") if key in record}
            if "text" in record:
                strings["captions"] = record["text"]
            if "label" in record and self.label_names is not None:
                strings["label"] = self.label_names[record["label"]]
            yield strings

    def texts(self) -> Iterator[str]:
        """Every caption of every record in order.

        Raises:
          UserError: as reading a record, or what the data set calls text is not captions.
        """
        if "text" in self.amiss:
            raise UserError(
                f"{self.name} has no captions: {self.amiss['text']}; set text to None or choose a data set whose "
                f"captions are strings"
            )
        for index in range(len(self)):
            yield from self._read(index).get("text", ())

    def _read(self, index: int) -> dict[str, Any]:
        """A record with our keys and the image still encoded."""
        decoders = {self._keys["image"]: tfds.decode.SkipDecoding()} if "image" in self._keys else None
        try:
            values = self._features.deserialize_example_np(self._records[index], decoders=decoders)
        except Exception as error:  # of many kinds, from array_record, protocol buffers and TFDS
            raise UserError(f"{self._called(index)} cannot be read ({error}): {self._mend}") from error
        missing = [name for name in self._keys.values() if values[name] is None]
        if missing:
            raise UserError(
                f"{self._called(index)} lacks {missing}, which the description of the data set names: {self._mend}"
            )
        record = {key: values[name] for key, name in self._keys.items()}
        try:
            for key in record.keys() & {"question", "answer"}:
                record[key] = record[key].decode()
            for key in record.keys() & {"text", "answers"}:
                record[key] = tuple(_texts(record[key]))
            if "turns" in record:
                said = (tuple(_texts(record["turns"][side])) for side in ("question", "answer"))
                record["turns"] = tuple(zip(*said, strict=True))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._called(index)} has a text that is not UTF-8 ({error}): encode it where the data set is made, "
                f"or choose another data set"
            ) from error
        if "answers" in record and "answer" not in record:
            if not record["answers"]:
                raise UserError(
                    f"{self._called(index)} has a question and no answer: choose a split whose are answered"
                )
            record["answer"] = Counter(record["answers"]).most_common(1)[0][0]  # of as many the first
        if "text" not in record and "question" in record and "answer" in record:
            record["text"] = (f"{record['question']} {record['answer']}",)
        return record

    def _called(self, index: int) -> str:
        return f"record {index} of {self.name}, split {self.split}, in {self.directory}"


@dataclass(frozen=True, eq=False)
class Staged:
    """The records of a split, each with its `stage`: what a frozen part of a model made of the image."""

    source: Source
    arrays: np.ndarray
    """A stage for each record, in their order."""

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def split(self) -> str:
        return self.source.split

    def __len__(self) -> int:
        return len(self.source)

    @property
    def keys(self) -> frozenset[str]:
        return self.source.keys | {"stage"}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.source[index], "stage": np.array(self.arrays[index])}


def open_source(name: str, split: str, data_dir: Path, *, label: str | None = None) -> Source:
    """Opens one split of a data set; ours are prepared on first use.

    Args:
      name: as `find_data_set` takes it.
      split: a split or part of one in TFDS's notation, such as "train[:90%]" or "train+validation".
      label: the data set's field that is the label; None: the one called so, or the only one that is.

    Raises:
      UserError: there is no such data set, split or label, or it is not prepared as array_record.
    """
    directory = find_data_set(name, data_dir)
    try:
        builder = tfds.builder_from_directory(directory)
        features = builder.info.features
        if not _examples(builder) or not isinstance(features, tfds.features.FeaturesDict):
            raise ValueError("it names no splits or no features")
    except Exception as error:  # of many kinds, from TFDS and protocol buffers
        raise UserError(
            f"the description of {name} in {directory} cannot be read ({' '.join(str(error).split())}): "
            f"{mend(name, data_dir)}"
        ) from error
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise UserError(
            f"{name} in {directory} is stored as {builder.info.file_format.value}, which has no random access: "
            f"{mend(name, data_dir)}"
        )
    keys = _keys(features)
    labels = _labels(features)
    if label is not None:
        if label not in labels:
            raise UserError(f"{name} has no label {label!r}: choose among {', '.join(labels) or 'none'}")
        keys["label"] = label
    return Source(
        name=name,
        split=split,
        directory=directory,
        label_names=tuple(features[keys["label"]].names) if "label" in keys else None,
        label_fields=labels,
        full_name=full_name(directory, data_dir),
        examples=_examples(builder),
        amiss=_amiss(features, keys),
        _records=_open_split(builder, name, split),
        _features=tfds.features.FeaturesDict({key: features[key] for key in keys.values()}),
        _keys=keys,
        _mend=mend(name, data_dir),
    )


def _open_split(builder: tfds.core.DatasetBuilder, name: str, split: str) -> Any:
    with contextlib.suppress(KeyError, ValueError):
        # TFDS takes train[5:2] for -3 examples, and train[5:2]+test for three fewer than test has.
        if all(builder.info.splits[part].num_examples > 0 for part in split.split("+")):
            return builder.as_data_source(
                split, file_format="array_record", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
    splits = _examples(builder)
    raise UserError(
        f"{split!r} is not a split of {name}, or an empty one: choose among {splits} or a part such as "
        f"{next(iter(splits))}[:90%]"
    )


def _examples(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    return {split: info.num_examples for split, info in builder.info.splits.items()}


def _keys(features: tfds.features.FeaturesDict) -> dict[str, str]:
    """Our names of the fields -> the data set's, for the fields it has."""
    image, label = _meant("image", _images(features)), _meant("label", _labels(features))
    found = {
        "image": [image] if image is not None and features[image].np_dtype == np.uint8 else [],
        "label": [] if label is None else [label],
        "text": [key for key in TEXT_KEYS if key in features and _unlike_text(features[key]) is None],
    }
    found |= {key: [key] for key in ("question", "answer") if key in features and _is_string(features[key])}
    found["answers"] = ["answers"] if "answers" in features and _unlike_text(features["answers"]) is None else []
    found["turns"] = ["turns"] if "turns" in features and _is_turns(features["turns"]) else []
    return {ours: ours if ours in theirs else theirs[0] for ours, theirs in found.items() if theirs}


def _amiss(features: tfds.features.FeaturesDict, keys: dict[str, str]) -> dict[str, str]:
    """Of our names of the fields, those that the data set seems to have: why it has not."""
    why = {}
    for key, fields in (("image", _images(features)), ("label", _labels(features))):
        if fields and _meant(key, fields) is None:
            why[key] = f"it has several {key}s, {', '.join(fields)}, none called {key!r}"
    image = _meant("image", _images(features))
    if image is not None and "image" not in keys:
        why["image"] = f"its images are of {np.dtype(features[image].np_dtype)}, not of 8 bits a channel"
    unlike = next((key for key in TEXT_KEYS if key in features and "text" not in keys), None)
    if unlike is not None and not {"question", "answer"} <= keys.keys():
        why["text"] = f"its {unlike!r} holds {_unlike_text(features[unlike])}"
    return why


def _meant(name: str, fields: tuple[str, ...]) -> str | None:
    """The field of this name, or the only one; which of several is meant, nobody said."""
    return name if name in fields else fields[0] if len(fields) == 1 else None


def _images(features: tfds.features.FeaturesDict) -> tuple[str, ...]:
    """The fields that are images; a mask is none."""
    images = {key: value for key, value in features.items() if isinstance(value, tfds.features.Image)}
    return tuple(sorted(key for key, value in images.items() if not isinstance(value, tfds.features.LabeledImage)))


def _labels(features: tfds.features.FeaturesDict) -> tuple[str, ...]:
    """The fields that are labels. TFDS allows one of which not even the number of classes is known."""
    labels = {key: value for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)}
    return tuple(sorted(key for key, value in labels.items() if value.num_classes))  # stored in no order


def _unlike_text(feature: Any) -> str | None:
    """What a field holds; None: a text, a sequence of texts, or a sequence of dictionaries with texts."""
    if isinstance(feature, tfds.features.Sequence):
        return _unlike_text(feature.feature)
    if isinstance(feature, tfds.features.FeaturesDict):
        inner = next((key for key in INNER_KEYS if key in feature), None)
        return f"dictionaries of {sorted(feature)}" if inner is None else _unlike_text(feature[inner])
    return None if _is_text(feature) else f"{type(feature).__name__} of {feature.np_dtype}"


def _is_text(feature: Any) -> bool:
    """Whether a field is a string or an array of strings."""
    return isinstance(feature, tfds.features.Tensor) and feature.np_dtype == np.object_


def _is_string(feature: Any) -> bool:
    return _is_text(feature) and feature.shape == ()


def _is_turns(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, tfds.features.Sequence) else None
    both = ("question", "answer")
    return isinstance(inner, tfds.features.FeaturesDict) and all(
        key in inner and _is_string(inner[key]) for key in both
    )


def _texts(value: Any) -> Iterator[str]:
    """The strings in one text, a sequence of them, or a sequence of dictionaries with them."""
    if isinstance(value, bytes):
        yield value.decode()
    elif isinstance(value, dict):
        yield from _texts(next(value[key] for key in INNER_KEYS if key in value))
    else:
        for item in value:
            yield from _texts(item)
