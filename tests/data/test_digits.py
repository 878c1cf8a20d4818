import numpy as np
import pytest
from sklearn.datasets import load_digits

from vlm_jax.data import open_source

SIZES = {"train": 1257, "validation": 180, "test": 360}


@pytest.fixture(scope="module")
def records(data_dir):
    return {split: list(open_source("digits", split, data_dir)) for split in SIZES}


def test_sizes(records):
    assert {split: len(records[split]) for split in SIZES} == SIZES


def test_the_splits_part_the_images_of_scikit_learn(records):
    digits = load_digits()
    expected = sorted(
        (image.astype(np.uint8).tobytes(), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    ours = sorted(
        (record["image"].pixels(1).tobytes(), record["label"]) for split in SIZES for record in records[split]
    )
    assert ours == expected
    assert len({image for image, _ in ours}) == len(ours)


def test_images_keep_their_17_levels(records):
    images = np.stack([record["image"].pixels(1) for record in records["train"]])
    assert images.shape == (1257, 8, 8, 1)
    assert images.dtype == np.uint8
    assert set(np.unique(images)) == set(range(17))


def test_preparing_twice_gives_the_same_records(records, tmp_path):
    for split in SIZES:
        for one, other in zip(records[split], open_source("digits", split, tmp_path), strict=True):
            assert one["label"] == other["label"]
            np.testing.assert_array_equal(one["image"].pixels(1), other["image"].pixels(1))
