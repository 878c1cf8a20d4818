"""Data sets by name: ours and any that TFDS has prepared, as random-access records with the same few keys."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError
from PIL import Image

from vlm_jax.data.find import find_data_set, mend
from vlm_jax.errors import UserError

TEXT_KEYS = ("captions", "caption", "text")
"""What data sets call the captions of an image; coco_captions nests the last in the first."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What array_record, protocol buffers and Pillow raise when they are given damaged bytes.
_DAMAGE = (RuntimeError, DecodeError, OSError, SyntaxError, ValueError)


@dataclass(frozen=True, eq=False)
class Source:
    """The records of one split. `source[i]` is a dictionary of those of these that the data set has:

    - `image`: uint8 [H, W, C], not writable;
    - `text`: tuple of str, all captions of the image; where there are questions, the one line "question answer";
    - `question` and `answer`: str;
    - `label`: int, an index into `label_names`.
    """

    name: str
    split: str
    directory: Path
    label_names: tuple[str, ...] | None
    _records: Any = field(repr=False)
    _features: tfds.features.FeaturesDict = field(repr=False)
    _keys: dict[str, str] = field(repr=False)
    """Our names of the fields -> the data set's."""
    _mend: str = field(repr=False)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads and decodes one record.

        Raises:
          UserError: the bytes of the record, or of its image, are damaged.
          IndexError: `index` is outside `[0, len(source))`.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = self._read(index)
            record["image"] = _decode_image(record["image"], self._features[self._keys["image"]].shape[-1])
        except _DAMAGE as error:
            raise self._damaged(index, error) from error
        return record

    def texts(self) -> Iterator[str]:
        """Every caption of every record in order; images are not decoded.

        Raises:
          UserError: the bytes of a record are damaged.
        """
        for index in range(len(self)):
            try:
                yield from self._read(index).get("text", ())
            except _DAMAGE as error:
                raise self._damaged(index, error) from error

    def _read(self, index: int) -> dict[str, Any]:
        """A record with our keys and the image still encoded."""
        decoders = {self._keys["image"]: tfds.decode.SkipDecoding()}
        values = self._features.deserialize_example_np(self._records[index], decoders=decoders)
        record = {key: values[name] for key, name in self._keys.items()}
        for key in record.keys() & {"question", "answer"}:
            record[key] = record[key].decode()
        if "text" in record:
            record["text"] = tuple(_texts(record["text"]))
        elif "question" in record and "answer" in record:
            record["text"] = (f"{record['question']} {record['answer']}",)
        return record

    def _damaged(self, index: int, error: Exception) -> UserError:
        return UserError(
            f"record {index} of {self.name}, split {self.split}, in {self.directory} cannot be read ({error}): "
            f"delete that directory and {self._mend}"
        )


def open_source(name: str, split: str, data_dir: Path) -> Source:
    """Opens one split of a data set; ours are prepared on first use.

    Args:
      name: as `find_data_set` takes it.
      split: a split or part of one in TFDS's notation, such as "train[:90%]" or "train+validation".

    Raises:
      UserError: there is no such data set or split, or it is not prepared as array_record, or it has no 8-bit images.
    """
    directory = find_data_set(name, data_dir)
    try:
        builder = tfds.builder_from_directory(directory)
    except (OSError, ValueError, ParseError) as error:
        raise UserError(
            f"the description of {name} in {directory} cannot be read ({error}): delete that directory and "
            f"{mend(name, data_dir)}"
        ) from error
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise UserError(
            f"{name} in {directory} is stored as {builder.info.file_format.value}, which has no random access: delete "
            f"that directory and {mend(name, data_dir)}"
        )
    features = builder.info.features
    keys = _keys(features)
    if "image" not in keys:
        raise UserError(f"{name} has no images but {sorted(features)}: choose a data set that has")
    dtype = features[keys["image"]].np_dtype
    if dtype != np.uint8:
        raise UserError(f"{name} has images of {np.dtype(dtype)}: choose a data set with images of 8 bits a channel")
    return Source(
        name=name,
        split=split,
        directory=directory,
        label_names=tuple(features[keys["label"]].names) if "label" in keys else None,
        _records=_open_split(builder, name, split),
        _features=tfds.features.FeaturesDict({key: features[key] for key in keys.values()}),
        _keys=keys,
        _mend=mend(name, data_dir),
    )


def _open_split(builder: tfds.core.DatasetBuilder, name: str, split: str) -> Any:
    try:
        return builder.as_data_source(
            split, file_format="array_record", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
    except ValueError as error:
        splits = {key: info.num_examples for key, info in builder.info.splits.items()}
        raise UserError(
            f"{split!r} is not a split of {name}, or an empty one: choose among {splits} or a part such as "
            f"{next(iter(splits))}[:90%]"
        ) from error


def _keys(features: tfds.features.FeaturesDict) -> dict[str, str]:
    """Our names of the fields -> the data set's, for the fields it has."""
    candidates = {
        "image": [key for key in features if isinstance(features[key], tfds.features.Image)],
        "label": [key for key in features if isinstance(features[key], tfds.features.ClassLabel)],
        "text": [key for key in TEXT_KEYS if key in features],
        "question": [key for key in features if key == "question"],
        "answer": [key for key in features if key == "answer"],
    }
    return {ours: ours if ours in found else found[0] for ours, found in candidates.items() if found}


def _texts(value: Any) -> Iterator[str]:
    """The strings in one text, a sequence of them, or a sequence of dictionaries with them."""
    if isinstance(value, bytes):
        yield value.decode()
    elif isinstance(value, dict):
        yield from _texts(next(value[key] for key in TEXT_KEYS if key in value))
    else:
        for item in value:
            yield from _texts(item)


def _decode_image(encoded: bytes, channels: int | None) -> np.ndarray:
    """uint8 [H, W, C] of PNG or JPEG bytes, with the channels that the data set declares."""
    with Image.open(io.BytesIO(encoded)) as image:
        mode = image.mode if channels is None else _MODES[channels]
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]
