import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vlm_jax.data import open_source
from vlm_jax.errors import UserError


def _png(image: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "png")
    return encoded.getvalue()


GREY = np.arange(20, dtype=np.uint8).reshape(4, 5)
RECORDS = {
    "nested": [
        {"photo": _png(GREY), "captions": [{"id": 1, "text": "a dog"}, {"id": 2, "text": "ein Hündchen"}], "kind": 1},
        {"photo": _png(GREY), "captions": [], "kind": 0},
    ],
    "broken": [
        {"photo": _png(GREY), "captions": [], "kind": 0},
        {"photo": _png(np.zeros((64, 64), np.uint8))[:-30], "captions": [{"id": 1, "text": "whole"}], "kind": 0},
    ],
}


class Foreign(tfds.core.GeneratorBasedBuilder):
    """A data set with the features of coco_captions."""

    name = "foreign"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        captions = tfds.features.Sequence({"id": np.int64, "text": np.str_})
        features = {
            "photo": tfds.features.Image(shape=(None, None, 3)),
            "captions": captions,
            "kind": tfds.features.ClassLabel(names=["cat", "dog"]),
            "file": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(records) for split, records in RECORDS.items()}

    def _generate_examples(self, records):
        yield from enumerate({**record, "file": "a.png"} for record in records)


class Imageless(tfds.core.GeneratorBasedBuilder):
    """A data set without images."""

    name = "imageless"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": "a"}


class Deep(tfds.core.GeneratorBasedBuilder):
    """A data set of 16-bit images."""

    name = "deep"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(4, 5, 1), dtype=np.uint16)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"image": image}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": _png(GREY.astype(np.uint16))}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("foreign")
    Foreign(data_dir=data_dir).download_and_prepare(file_format="array_record")
    return data_dir


@pytest.fixture
def digits(data_dir, tmp_path) -> Path:
    """A data directory with a copy of the digits to damage."""
    shutil.copytree(open_source("digits", "test", data_dir).directory, tmp_path / "digits" / "1.0.0")
    return tmp_path


def test_keys_of_other_data_sets(foreign):
    source = open_source("foreign", "nested", foreign)
    assert source.label_names == ("cat", "dog")
    records = {record["label"]: record for record in source}
    assert records[1]["text"] == ("a dog", "ein Hündchen")
    assert records[0]["text"] == ()
    for record in records.values():
        assert set(record) == {"image", "text", "label"}
        np.testing.assert_array_equal(record["image"], np.stack([GREY] * 3, axis=-1))
    assert sorted(source.texts()) == ["a dog", "ein Hündchen"]


def test_parts_of_splits(data_dir):
    whole = open_source("digits", "test", data_dir)
    for split, indices in (("test[:90%]", range(324)), ("test[90%:]", range(324, 360)), ("test[5:7]", range(5, 7))):
        part = open_source("digits", split, data_dir)
        assert part.split == split
        assert len(part) == len(indices)
        np.testing.assert_array_equal([record["image"] for record in part], [whole[i]["image"] for i in indices])
    assert len(open_source("digits", "train+test", data_dir)) == 1257 + 360


@pytest.mark.parametrize("split", ["val", "test[:0%]", "test[:90%", ""])
def test_unknown_splits(data_dir, split):
    with pytest.raises(UserError, match=r"is not a split of digits, or an empty one: choose among \{.*'test': 360"):
        open_source("digits", split, data_dir)


def test_index_out_of_range(data_dir):
    source = open_source("digits", "test", data_dir)
    for index in (-1, 360):
        with pytest.raises(IndexError):
            source[index]


def test_a_flipped_bit_is_told_and_the_other_records_are_read(digits):
    before = [record["image"] for record in open_source("digits", "test", digits)]
    (shard,) = (digits / "digits" / "1.0.0").glob("digits-test*")
    content = bytearray(shard.read_bytes())
    content[content.index(b"\x89PNG", 1000) + 40] ^= 1
    shard.write_bytes(content)

    source = open_source("digits", "test", digits)
    damaged = []
    for index, image in enumerate(before):
        try:
            np.testing.assert_array_equal(source[index]["image"], image)
        except UserError:
            damaged.append(index)
    assert len(damaged) == 1
    with pytest.raises(
        UserError,
        match=rf"record {damaged[0]} of digits, split test, in {digits}/digits/1\.0\.0 cannot be read \(.*\): "
        r"delete that directory and run this again, which prepares it anew",
    ):
        source[damaged[0]]


@pytest.mark.parametrize("kept", [0, 1000, 70_000])
def test_a_truncated_file_is_told(digits, kept):
    (shard,) = (digits / "digits" / "1.0.0").glob("digits-test*")
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"record 359 of digits, split test"):
        open_source("digits", "test", digits)[359]


def test_a_missing_file_is_told(digits):
    for shard in (digits / "digits" / "1.0.0").glob("digits-test*"):
        shard.unlink()
    with pytest.raises(UserError, match=r"record 0 of digits, split test.*No such file"):
        open_source("digits", "test", digits)[0]


def test_a_broken_image_is_told(foreign):
    source = open_source("foreign", "broken", foreign)
    assert list(source.texts()) == ["whole"]
    broken = [index for index in range(2) if source._read(index)["text"]]
    with pytest.raises(
        UserError,
        match=rf"record {broken[0]} of foreign, split broken, in .*truncated.*: delete .*`tfds build foreign ",
    ):
        source[broken[0]]


def test_a_data_set_without_images(tmp_path):
    Imageless(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    with pytest.raises(UserError, match=r"imageless has no images but \['text'\]"):
        open_source("imageless", "train", tmp_path)


def test_a_data_set_of_16_bit_images(tmp_path):
    Deep(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    with pytest.raises(UserError, match="deep has images of uint16"):
        open_source("deep", "train", tmp_path)


def test_a_data_set_in_another_format(foreign, tmp_path):
    copy = tmp_path / "foreign" / "1.0.0"
    shutil.copytree(foreign / "foreign" / "1.0.0", copy)
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    for shard in copy.glob("*array_record*"):
        shard.rename(copy / shard.name.replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError, match=r"foreign in .* is stored as tfrecord, .*: delete .* --file_format=array_record"
    ):
        open_source("foreign", "nested", tmp_path)
