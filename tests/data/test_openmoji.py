import hashlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vlm_jax.data import open_source
from vlm_jax.data.openmoji import caption
from vlm_jax.data.prepare import prepare

SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def records(data_dir):
    return {split: list(open_source("openmoji", split, data_dir)) for split in SPLITS}


def _codepoints(data_dir: Path, split: str) -> list[list[str]]:
    source = tfds.builder_from_directory(prepare("openmoji", data_dir)).as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return [[stem.decode() for stem in record["codepoints"]] for record in source]


def test_sizes(records):
    assert {split: len(records[split]) for split in SPLITS} == {"train": 3331, "test": 400}
    assert sum(len(record["text"]) for split in SPLITS for record in records[split]) == 3953


def test_no_drawing_is_there_twice(records):
    drawings = [record["image"].pixels(3).tobytes() for split in SPLITS for record in records[split]]
    assert len(set(drawings)) == len(drawings)


def test_a_caption_belongs_to_one_drawing(records):
    captions = [text.lower() for split in SPLITS for record in records[split] for text in record["text"]]
    assert len(set(captions)) == len(captions)


def test_emoji_that_are_drawn_alike_are_one_record(records):
    both = [record for split in SPLITS for record in records[split] if "man farmer" in record["text"]]
    assert [record["text"] for record in both] == [("man farmer", "farmer")]


def test_images_are_rgb_on_white(records):
    for split in SPLITS:
        for record in records[split]:
            image = record["image"].pixels(3)
            assert image.shape == (64, 64, 3)
            np.testing.assert_array_equal(image[0, 0], 255)


def test_the_split_is_by_the_hash_of_the_first_codepoints(data_dir):
    ranks = {
        split: [hashlib.sha256(stems[0].encode()).digest() for stems in _codepoints(data_dir, split)]
        for split in SPLITS
    }
    assert max(ranks["test"]) < min(ranks["train"])


def test_codepoints_and_captions_go_together(data_dir, records):
    for split in SPLITS:
        for stems, record in zip(_codepoints(data_dir, split), records[split], strict=True):
            assert tuple(caption(stem) for stem in stems) == record["text"]


def test_captions_read_as_english():
    assert caption("1F469-1F3FB-200D-1F4BB") == "woman technologist light skin tone"
    assert caption("1F1FA-1F1F8") == "United States"
    assert caption("E2CC") is None


@pytest.mark.slow
def test_preparing_twice_gives_the_same_records(data_dir, tmp_path):
    for split in SPLITS:
        for one, other in zip(
            open_source("openmoji", split, data_dir), open_source("openmoji", split, tmp_path), strict=True
        ):
            assert one["text"] == other["text"]
            np.testing.assert_array_equal(one["image"].pixels(3), other["image"].pixels(3))
