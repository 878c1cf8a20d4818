"""Mosaics: their questions are true of the pixels, and blind guesses score what is stated."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from vlm_jax.data import Source, open_source
from vlm_jax.data.mosaic import CHANCE, COLORS, KINDS, PLACES, SHAPES, caption, drawn, turns

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
pytestmark = pytest.mark.slow  # all 22,000 are drawn first

KIND = {asked.question: kind for kind in KINDS for asked in kind()}


@pytest.fixture(scope="module")
def test_split(data_dir) -> Source:
    return open_source("mosaic", "test", data_dir)


def test_a_question_and_its_kind_tell_nothing_of_the_answer(test_split):
    """The best guess for each question is right as often as any: exactly what is stated of its kind, 34% in all."""
    answers = defaultdict(Counter)
    for record in test_split.strings():
        answers[record["question"]][record["answer"]] += 1
    assert sum(map(Counter.total, answers.values())) == 2000 == len(test_split)
    for kind, chance in CHANCE.items():
        counts = [found for question, found in answers.items() if KIND[question] is kind]
        assert {n for found in counts for n in found.values()} == {KINDS[kind]}
        assert sum(max(found.values()) for found in counts) / sum(map(Counter.total, counts)) == pytest.approx(chance)
    assert sum(max(found.values()) for found in answers.values()) / 2000 == 0.34


def test_what_is_asked_of_colours_is_true_of_the_pixels(test_split):
    """A quadrant has the colour whose pixels it has: averaged two by two, those inside a shape keep theirs."""
    checked = Counter()
    for index in range(0, 2000, 7):
        record = test_split[index]
        image, answer = record["image"].pixels(3), record["answer"]
        quadrants = [image[r : r + 32, c : c + 32] for r in (0, 32) for c in (0, 32)]
        seen = [{name for name, rgb in PALETTE.items() if (q == rgb).all(-1).any()} for q in quadrants]
        if any(len(found) != 1 for found in seen):
            continue
        there = [found.pop() for found in seen]
        words = record["question"].rstrip("?").split()
        kind = KIND[record["question"]].__name__
        if kind == "color_of_place":
            assert answer == there[PLACES.index(" ".join(words[4:6]))]
        elif kind == "number" and words[2] in PALETTE:
            assert int(answer) == there.count(words[2])
        elif kind == "relation":
            one, other = (divmod(there.index(color), 2) for color in (words[2], words[-2]))
            axis = 1 if "left" in words else 0
            assert (answer == "yes") == (one[axis] < other[axis])
            assert one[axis] != other[axis]
        elif kind == "presence" and answer == "yes":
            assert words[3] in there
        else:
            continue
        checked[kind] += 1
    assert all(checked[kind] > 10 for kind in ("color_of_place", "number", "relation", "presence"))


def test_an_answer_is_true_of_what_is_drawn_and_no_other_answer_is():
    """Of shapes too, for every question there is, by the predicates of its other answers."""
    rng = np.random.default_rng(0)
    for kind in KINDS:
        answers = defaultdict(list)
        for asked in kind():
            answers[asked.question].append(asked)
        for group in list(answers.values())[::5]:
            for asked in group:
                found = np.array([drawn(asked, rng)])
                assert [each.answer for each in group if each.fits(found)[0]] == [asked.answer]
    ask = {(each.question, each.answer): each for kind in KINDS for each in kind()}
    circle, triangle = SHAPES.index("circle"), SHAPES.index("triangle")
    red, blue = (COLORS.index(color) * len(SHAPES) for color in ("red", "blue"))
    # A red circle beside a blue triangle, above a red triangle and a blue one.
    here = np.array([[red + circle, blue + triangle, red + triangle, blue + triangle]])
    assert ask["how many triangles are there?", "3"].fits(here)
    assert ask["what is the top left shape?", "circle"].fits(here)
    assert ask["is there a red triangle?", "yes"].fits(here) and ask["is there a blue circle?", "no"].fits(here)
    assert not ask["is the red shape left of the blue one?", "yes"].fits(here)  # of each there are two


def test_dialogues_ask_of_what_is_drawn_in_different_ways_and_yes_is_as_frequent_as_no():
    rng = np.random.default_rng(0)
    found = rng.integers(len(COLORS) * len(SHAPES), size=(1000, 4))
    ask = {(each.question, each.answer): each for kind in KINDS for each in kind()}
    answers = defaultdict(Counter)
    for there, said in zip(found, turns(found, rng), strict=True):
        assert len(said) == 3 == len({KIND[turn["question"]] for turn in said})
        for turn in said:
            assert ask[turn["question"], turn["answer"]].fits(there[None])[0]
            answers[KIND[turn["question"]].__name__][turn["answer"]] += 1
    assert answers.keys() == {kind.__name__ for kind in KINDS}
    for kind in ("presence", "relation"):
        yes, total = answers[kind]["yes"], answers[kind].total()
        assert abs(yes - total / 2) < 4 * np.sqrt(total) / 2


def test_a_caption_names_what_lies_at_each_place_in_reading_order(data_dir):
    red, blue = (COLORS.index(color) * len(SHAPES) for color in ("red", "blue"))
    circle, triangle = SHAPES.index("circle"), SHAPES.index("triangle")
    told = caption(np.array([red + circle, blue + triangle, blue + circle, red + triangle]))
    assert told == "a red circle, a blue triangle, a blue circle, a red triangle"
    source = open_source("mosaic/captions", "test", data_dir)
    assert len(source) == 500
    pure = []  # where a shape is so small that averaging leaves it none of its colour, its caption is not checked
    for index in range(0, 500, 9):
        image, named = source[index]["image"].pixels(3), source[index]["text"][0].split(", ")
        for (r, c), thing in zip([(0, 0), (0, 32), (32, 0), (32, 32)], named, strict=True):
            there = {name for name, rgb in PALETTE.items() if (image[r : r + 32, c : c + 32] == rgb).all(-1).any()}
            pure.append(bool(there))
            assert there <= {thing.split()[1]}
    assert np.mean(pure) > 0.9


def test_dialogues_are_of_the_pictures_of_their_split(data_dir):
    test, other = (open_source(f"mosaic/{name}", "test", data_dir) for name in ("questions", "dialogues"))
    assert (len(other), len(open_source("mosaic/dialogues", "train", data_dir))) == (500, 20_000)
    quarters = [set(), set()]
    for kept, source in zip(quarters, (test, other), strict=True):
        for index in range(0, len(source), 2):
            image = source[index]["image"].pixels(3)
            kept |= {image[r : r + 32, c : c + 32].tobytes() for r in (0, 32) for c in (0, 32)}
    assert len(quarters[1] - quarters[0]) < 0.1 * len(quarters[1])  # those that no question happened to be drawn with


def test_no_picture_is_in_both_splits_and_training_is_balanced_too(data_dir):
    train, test = (open_source("mosaic", split, data_dir) for split in ("train", "test"))
    assert len(train) == 20000
    counts = Counter((record["question"], record["answer"]) for record in train.strings())
    assert all(count == 10 * KINDS[KIND[question]] for (question, _), count in counts.items())
    quarters = [set(), set()]
    for found, source in zip(quarters, (train, test), strict=True):
        for index in range(0, len(source), 5):
            image = source[index]["image"].pixels(3)
            found |= {image[r : r + 32, c : c + 32].tobytes() for r in (0, 32) for c in (0, 32)}
    assert not quarters[0] & quarters[1]
