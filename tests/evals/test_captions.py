"""Captions: CIDEr-D in closed form, how new a caption is, and both of what a model writes."""

import math

import numpy as np
import pytest
from seeing import TOKENIZER, ids, subject

from vlm_jax.evals import captions
from vlm_jax.evals.captions import novelty
from vlm_jax.evals.cider import cider, words

OTHERS = [["a cat sits on a mat"], ["the sun"], ["rain falls all day"]]


def test_words_have_no_marks_and_keep_their_hyphens() -> None:
    assert words("Woman: medium-light skin tone, don't!") == ("woman", "medium-light", "skin", "tone", "don't")


def test_the_same_words_score_ten_two_words_five_and_other_words_nothing() -> None:
    """Of two words there are n-grams of two of the four lengths."""
    said = ["red heart on fire now", "the moon", "snow lies all night"]
    found = cider([said[0], "the sun", "snow"], [[said[0]], *OTHERS[1:]])
    np.testing.assert_allclose(found, [10, 5, 0], atol=1e-9)


def test_of_several_references_it_is_the_mean_and_of_one_image_nothing_is_rare() -> None:
    both = cider(["red heart on fire"], [["red heart on fire"]])
    assert both == 0
    found = cider(["red heart on fire", *["x"] * 3], [["red heart on fire", "blue moon"], *OTHERS])
    assert found[0] == pytest.approx(5)


def test_a_repeated_word_counts_once_and_another_length_is_held_back() -> None:
    """One word against itself thrice: a cosine of 3 w w clipped to w w, over |3 w| |w|, of one of four lengths."""
    found = cider(["red red red", "x"], [["red"], ["blue"]])
    assert found[0] == pytest.approx(10 / 4 * (1 / 3) * math.exp(-(2**2) / (2 * 6**2)))


def test_what_every_image_is_called_tells_nothing() -> None:
    found = cider(["a red", "a blue"], [["a green"], ["a brown"]])
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize(
    ("caption", "how"),
    [
        ("Red heart", "seen"),
        ("red broccoli", "new_word"),
        ("heart red", "new_combination"),
        ("blue heart", "new_combination"),  # of two words, one says nothing of the other
        ("man technologist dark skin tone", "near_duplicate"),  # a word replaced
        ("woman dark skin tone", "near_duplicate"),  # left out
        ("woman technologist blue dark skin tone", "near_duplicate"),  # put in
        ("man technologist light skin tone", "new_combination"),  # two words are others
        ("technologist woman dark skin tone", "new_combination"),
    ],
)
def test_how_new_a_caption_is(caption: str, how: str) -> None:
    training = ["red heart", "blue moon", "woman technologist dark skin tone", "man", "light"]
    assert novelty(training)(caption) == how


def test_what_is_written_counts_where_it_is_any_of_the_captions() -> None:
    """Of picture 0 the second of its captions is written, of 1 its only one, of 2 another."""
    examples = [(0, "", "red cat"), (1, "", "dark skin tone"), (2, "", "blue woman")]
    known = [{"captions": ("red cat", "Cat")}, {"captions": ("dark skin tone",)}, {"captions": ("blue woman",)}]
    training = ["dark skin tone", "red", "woman", "blue"]
    said = ["cat", "dark skin tone", "blue cat"]
    given = {"records": lambda: iter(known), "training_texts": lambda: iter(training)}
    found = captions.run(subject(examples, said, "", **given))
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert (found["exact_match_new_word"], found["exact_match_seen"], found["exact_match_new_combination"]) == (1, 1, 0)
    assert (found["captions_new_word"], found["captions_seen"], found["captions_new_combination"]) == (1, 1, 1)
    assert found["cider"] == pytest.approx(np.mean(cider(said, [each["captions"] for each in known])))
    assert (found["nats_a_token"], found["nats_a_token_standard_error"]) == (pytest.approx(1), pytest.approx(0))


def test_a_caption_may_be_longer_than_the_true_one() -> None:
    said = "woman cat dark skin tone"
    given = {"records": lambda: iter([{"captions": (said,)}]), "training_texts": lambda: iter(["x"])}
    room = 2 * (len(ids("dark skin tone")) + 1)
    assert len(ids(said)) <= room
    assert captions.run(subject([(0, "", "dark skin tone")], [said], "", **given))["exact_match"] == 1
    assert TOKENIZER.eos_id not in ids(said)
