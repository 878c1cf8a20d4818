from collections import Counter, defaultdict

import numpy as np
import pytest

from vlm_jax.data import open_source

PALETTE = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.mark.parametrize(("split", "size"), [pytest.param("train", 38575, marks=pytest.mark.slow), ("test", 9673)])
def test_questions(data_dir, split, size):
    source = open_source("easy_vqa", split, data_dir)
    assert len(source) == size
    assert source.directory == open_source("easy_vqa/questions", split, data_dir).directory
    for index in range(0, size, 97):
        record = source[index]
        assert record["image"].pixels(3).shape == (64, 64, 3)
        assert record["question"].endswith("?")
        assert record["answer"] in {*PALETTE, "circle", "rectangle", "triangle", "yes", "no"}
        assert record["text"] == (f"{record['question']} {record['answer']}",)
        assert "label" not in record


@pytest.mark.parametrize(("config", "train", "test"), [("color", 3710, 920), ("shape", 3793, 944)])
def test_sizes(data_dir, config, train, test):
    assert len(open_source(f"easy_vqa/{config}", "train", data_dir)) == train
    assert len(open_source(f"easy_vqa/{config}", "test", data_dir)) == test


def test_captions_name_the_color_and_the_shape_that_the_labels_are(data_dir):
    for split, size in (("train", 3542), ("test", 880)):
        assert len(open_source("easy_vqa/captions", split, data_dir)) == size
    labels = []
    for name in ("color", "shape"):
        source = open_source(f"easy_vqa/{name}", "test[:20%]", data_dir)
        labels.append({record["image"].pixels(3).tobytes(): source.label_names[record["label"]] for record in source})
    captioned = open_source("easy_vqa/captions", "test[:20%]", data_dir)
    told = {record["image"].pixels(3).tobytes(): record["text"] for record in captioned}
    both = told.keys() & labels[0].keys() & labels[1].keys()
    assert len(both) > 100
    assert all(told[image] == (f"a {labels[0][image]} {labels[1][image]}",) for image in both)


def test_no_image_is_in_both_splits(data_dir):
    train, test = (
        {record["image"].pixels(3).tobytes() for record in open_source("easy_vqa/shape", split, data_dir)}
        for split in ("train", "test")
    )
    assert (len(train), len(test)) == (3793, 944)
    assert not train & test


def test_color_labels_are_the_color_of_the_shape(tmp_path):
    source = open_source("easy_vqa/color", "train[:5%]+test[:20%]", tmp_path)
    assert source.label_names == tuple(PALETTE)
    for record in source:
        image = record["image"].pixels(3)
        present = {name for name, color in PALETTE.items() if (image == color).all(-1).any()}
        assert present == {source.label_names[record["label"]]}


def test_shape_labels_are_the_shape(tmp_path):
    """A rectangle fills its bounding box, a circle pi/4 of it, a triangle half; those cut by the border are skipped."""
    source = open_source("easy_vqa/shape", "train[:5%]+test[:20%]", tmp_path)
    assert source.label_names == ("circle", "rectangle", "triangle")
    whole = 0
    for record in source:
        image = record["image"].pixels(3)
        mask = np.any([(image == color).all(-1) for color in PALETTE.values()], axis=0)
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        if min(rows[0], columns[0]) == 0 or max(rows[-1], columns[-1]) == 63:
            continue
        filled = mask.sum() / ((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1))
        expected = "triangle" if filled < 0.7 else "circle" if filled < 0.9 else "rectangle"
        assert source.label_names[record["label"]] == expected
        whole += 1
    assert whole > 0.9 * len(source)


@pytest.mark.slow
def test_dialogues_ask_every_question_once_of_its_image(data_dir):
    questions, dialogues = (open_source(f"easy_vqa/{name}", "test", data_dir) for name in ("questions", "dialogues"))
    asked = Counter((record["question"], record["answer"]) for record in questions.strings())
    turns = [record["turns"] for record in dialogues]
    assert Counter(turn for each in turns for turn in each) == asked
    assert {len(each) for each in turns} == {1, 2, 3}
    of_image = defaultdict(set)
    for index in range(0, len(questions), 3):
        record = questions[index]
        of_image[record["image"].pixels(3).tobytes()].add((record["question"], record["answer"]))
    told = defaultdict(set)
    for index in range(len(dialogues)):
        told[dialogues[index]["image"].pixels(3).tobytes()] |= set(turns[index])
    assert all(found <= told[image] for image, found in of_image.items())


@pytest.mark.slow
def test_preparing_twice_gives_the_same_questions(data_dir, tmp_path):
    for split in ("train[:5%]", "test[:5%]"):
        for one, other in zip(
            open_source("easy_vqa", split, data_dir), open_source("easy_vqa", split, tmp_path), strict=True
        ):
            assert one["text"] == other["text"]
            np.testing.assert_array_equal(one["image"].pixels(3), other["image"].pixels(3))
