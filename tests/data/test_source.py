import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from made import build
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


def _images(source) -> list[np.ndarray]:
    return [record["image"].pixels(1) for record in source]


@pytest.mark.parametrize("name", ["a[0]", "*?", "%20%s", "{x}", "a b\\c"])
def test_the_directory_of_data_is_text(foreign: Path, tmp_path: Path, name: str) -> None:
    directory = shutil.copytree(foreign, tmp_path / name)
    here, there = (open_source("foreign", "nested", each) for each in (foreign, directory))
    assert list(there.strings()) == list(here.strings()) and len(there)


def test_keys_of_other_data_sets(foreign):
    source = open_source("foreign", "nested", foreign)
    assert source.label_names == ("cat", "dog")
    records = {record["label"]: record for record in source}
    assert records[1]["text"] == ("a dog", "ein Hündchen")
    assert records[0]["text"] == ()
    for record in records.values():
        assert set(record) == {"image", "text", "label", "record"}
        np.testing.assert_array_equal(record["image"].pixels(3), np.stack([GREY] * 3, axis=-1))
    assert sorted(source.texts()) == ["a dog", "ein Hündchen"]


def test_parts_of_splits(data_dir):
    whole = _images(open_source("digits", "test", data_dir))
    for split, indices in (("test[:90%]", range(324)), ("test[90%:]", range(324, 360)), ("test[5:7]", range(5, 7))):
        part = open_source("digits", split, data_dir)
        assert part.split == split
        assert len(part) == len(indices)
        np.testing.assert_array_equal(_images(part), [whole[i] for i in indices])
    assert len(open_source("digits", "train+test", data_dir)) == 1257 + 360


@pytest.mark.parametrize(
    "split", ["val", "test[:0%]", "test[:90%", "", "test[5:2]", "test[5:2]+train", "train+test[9:9]"]
)
def test_unknown_splits(data_dir, split):
    with pytest.raises(UserError, match=r"is not a split of digits, or an empty one: choose among \{.*'test': 360"):
        open_source("digits", split, data_dir)


def test_index_out_of_range(data_dir):
    source = open_source("digits", "test", data_dir)
    for index in (-1, 360):
        with pytest.raises(IndexError):
            source[index]


def test_a_flipped_bit_is_told_and_the_other_records_are_read(digits):
    before = _images(open_source("digits", "test", digits))
    (shard,) = (digits / "digits" / "1.0.0").glob("digits-test*")
    content = bytearray(shard.read_bytes())
    content[content.index(b"\x89PNG", 1000) + 40] ^= 1
    shard.write_bytes(content)

    source = open_source("digits", "test", digits)
    damaged = []
    for index, image in enumerate(before):
        try:
            np.testing.assert_array_equal(source[index]["image"].pixels(1), image)
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
    broken = [index for index in range(2) if source[index]["text"]]
    with pytest.raises(
        UserError, match=rf"record {broken[0]} of foreign, split broken, in .* has an image that cannot .*truncated.*"
    ):
        source[broken[0]]["image"].pixels(3)


IMAGE = tfds.features.Image(shape=(4, 5, 1))
TEXT = tfds.features.Text()


@pytest.mark.parametrize(
    ("features", "record", "has", "amiss"),
    [
        ({"text": TEXT}, {"text": "a"}, {"text"}, {}),
        (
            {"image": tfds.features.Image(shape=(4, 5, 1), dtype=np.uint16), "text": TEXT},
            {"image": _png(GREY.astype(np.uint16)), "text": "a"},
            {"text"},
            {"image": "its images are of uint16, not of 8 bits a channel"},
        ),
        ({"mask": tfds.features.LabeledImage(labels=2, shape=(4, 5, 1))}, {"mask": _png(GREY)}, set(), {}),
        (
            {"left": IMAGE, "right": IMAGE, "label": tfds.features.ClassLabel(num_classes=2)},
            {"left": _png(GREY), "right": _png(GREY), "label": 1},
            {"label"},
            {"image": "it has several images, left, right, none called 'image'"},
        ),
    ],
)
def test_what_has_no_images_is_read_for_the_rest(tmp_path, features, record, has, amiss):
    source = open_source("made", "train", build(tmp_path, features, record))
    assert (source.keys, source.amiss) == (has, amiss)
    assert set(source[0]) == {*has, "record"}
    assert source[0]["record"] == f"record 0 of made, split train, in {tmp_path}/made/1.0.0"


def test_the_strings_of_a_record_are_all_its_captions_its_question_and_answer_and_its_label_s_name(tmp_path, foreign):
    strings = list(open_source("foreign", "nested", foreign).strings())
    assert sorted(each["label"] for each in strings) == ["cat", "dog"]
    assert {"captions": ("a dog", "ein Hündchen"), "label": "dog"} in strings
    build(tmp_path, {"question": TEXT, "answer": TEXT}, {"question": "what?", "answer": "that"})
    (record,) = open_source("made", "train", tmp_path).strings()
    assert record == {"question": "what?", "answer": "that", "captions": ("what? that",)}


@pytest.mark.parametrize(
    ("name", "feature", "value", "message"),
    [
        ("text", tfds.features.Sequence(np.int64), [3, 4], r"its 'text' holds Tensor of int64"),
        (
            "caption",
            tfds.features.Translation(["de", "en"]),
            {"de": "Hund", "en": "dog"},
            r"its 'caption' holds dictionaries of \['de', 'en'\]",
        ),
        (
            "captions",
            tfds.features.Sequence({"text": np.int64, "id": np.int64}),
            [{"text": 3, "id": 1}],
            r"its 'captions' holds Tensor of int64",
        ),
    ],
)
def test_texts_that_are_no_captions_are_told_as_such_and_the_images_are_read(tmp_path, name, feature, value, message):
    record = {"image": _png(GREY), name: value}
    source = open_source("made", "train", build(tmp_path, {"image": IMAGE, name: feature}, record))
    assert set(source[0]) == {"image", "record"}
    with pytest.raises(UserError, match=rf"^made has no captions: {message}; .*choose a data set whose captions"):
        list(source.texts())


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        (TEXT, "dog"),
        (tfds.features.Tensor(shape=(2,), dtype=np.str_), ["dog", "cat"]),
        (tfds.features.Sequence(TEXT), ["dog", "cat", "cow"]),
    ],
)
def test_captions_are_strings_in_any_arrangement(tmp_path, feature, value):
    data_dir = build(tmp_path, {"image": IMAGE, "captions": feature}, {"image": _png(GREY), "captions": value})
    source = open_source("made", "train", data_dir)
    assert source[0]["text"] == ((value,) if isinstance(value, str) else tuple(value))


@pytest.mark.parametrize("field", ["caption", "question"])
def test_a_text_that_is_not_utf_8_is_told_as_such(tmp_path, field):
    texts = {"question": "Größe?".encode(), "answer": b"no"} if field == "question" else {}
    texts[field] = "Größe".encode("latin-1")
    features = {"image": IMAGE} | dict.fromkeys(texts, TEXT)
    source = open_source("made", "train", build(tmp_path, features, {"image": _png(GREY)} | texts))
    for read in (lambda: source[0], lambda: list(source.texts())):
        with pytest.raises(
            UserError, match=r"record 0 of made, split train, in .* has a text that is not UTF-8"
        ) as told:
            read()
        assert "delete" not in str(told.value)


def test_questions_and_answers_of_other_kinds_are_left_out(tmp_path):
    features = {"image": IMAGE, "question": TEXT, "answer": tfds.features.Sequence(TEXT)}
    record = {"image": _png(GREY), "question": "what?", "answer": ["a", "b"]}
    assert set(open_source("made", "train", build(tmp_path, features, record))[0]) == {"image", "question", "record"}


def _edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _rename(features: dict, old: str, new: str) -> None:
    fields = features["featuresDict"]["features"]
    fields[new] = fields.pop(old)


@pytest.mark.parametrize("nested", [False, True])
def test_of_several_people_s_answers_the_most_frequent_is_the_answer(tmp_path, nested):
    """As VQAv2 is prepared: a list of texts, or of dictionaries with them."""
    said = ["red", "blue", "blue", "red", "green"]
    people = [{"answer": each, "number": i} for i, each in enumerate(said)] if nested else said
    feature = {"answer": tfds.features.Text(), "number": np.int64} if nested else tfds.features.Text()
    features = {"question": tfds.features.Text(), "answers": tfds.features.Sequence(feature)}
    build(tmp_path, features, {"question": "what?", "answers": people}, {"question": "who?", "answers": []})
    source = open_source("made", "train", tmp_path)
    assert source.keys == {"question", "answer", "answers", "text"}
    expected = {"question": "what?", "answer": "red", "answers": tuple(said)}  # of as many the first
    assert source[0] == expected | {"text": ("what? red",), "record": source[0]["record"]}
    assert next(source.strings()) == expected | {"captions": ("what? red",)}
    with pytest.raises(UserError, match=r"record 1 of made, .* has a question and no answer: choose a split"):
        source[1]


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [b"", b"null", b"3", b"[]", b"{}", b"{", b'{"a": 1}', b"\xff\xfe", None])
def test_a_damaged_description_of_our_own_data_is_made_anew(digits, file, content):
    path = digits / "digits" / "1.0.0" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=rf"the description of digits in {digits}/digits/1\.0\.0 cannot be read \(.*\): "
        r"delete that directory and run this again, which prepares it anew$",
    ):
        open_source("digits", "test", digits)


def test_a_description_without_splits_is_told(digits):
    _edit(digits / "digits" / "1.0.0" / "dataset_info.json", lambda info: info.pop("splits"))
    with pytest.raises(UserError, match=r"the description of digits in .* cannot be read \(it names no splits"):
        open_source("digits", "test", digits)


@pytest.mark.parametrize("field", ["image", "label"])
def test_a_description_that_does_not_fit_the_records_is_told(digits, field):
    _edit(digits / "digits" / "1.0.0" / "features.json", lambda features: _rename(features, field, "renamed"))
    source = open_source("digits", "test", digits)
    with pytest.raises(UserError, match=r"record 5 of digits, split test, in .* lacks \['renamed'\], .*: delete that"):
        source[5]


def test_a_data_set_in_another_format(foreign, tmp_path):
    copy = tmp_path / "foreign" / "1.0.0"
    shutil.copytree(foreign / "foreign" / "1.0.0", copy)
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    for shard in copy.glob("*array_record*"):
        shard.rename(copy / shard.name.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"foreign in .* is stored as tfrecord, .*: move .* --file_format=array_record"):
        open_source("foreign", "nested", tmp_path)


def test_of_several_images_the_one_called_image_is_taken(tmp_path: Path) -> None:
    picture = tfds.features.Image(shape=(None, None, 1))
    dark, light = _png(np.zeros((2, 2), np.uint8)), _png(np.full((2, 2), 9, np.uint8))
    build(tmp_path, {"a": picture, "image": picture}, {"a": dark, "image": light})
    assert open_source("made", "train", tmp_path)[0]["image"].pixels(1).max() == 9
