"""Questions about images: what is written is compared, by what is answered; people's consensus as VQAv2 counts it."""

import math

import numpy as np
import pytest
from seeing import CONTEXT, INPUTS, SPAN, TOKENIZER, ids, rows, subject

from vlm_jax.evals import vqa
from vlm_jax.evals.normalisation import consensus, normalised
from vlm_jax.evals.writing import by_group, ended, prompts_of


def test_a_prompt_is_what_stands_before_the_answer_and_its_image_moves_with_it() -> None:
    batch = rows((7, "what color is it?", "red"), (8, "what?", "no"))
    prompts, draw = prompts_of(batch, INPUTS, TOKENIZER.pad_id, 2)
    length = prompts["tokens"].shape[1]
    assert (length % 16, draw) == (0, 4)
    for row, question in enumerate(("what color is it?", "what?")):
        expected = [TOKENIZER.bos_id, *[0] * SPAN, *ids(question)]
        assert prompts["tokens"][row, prompts["segment"][row] > 0].tolist() == expected
        assert prompts["segment"][row, -1] == 1 and prompts["segment"][row].sum() == len(expected)
        assert prompts["image_at"][row, 0] == length - len(expected) + 1
    assert not prompts["target"].any()
    blind, _ = prompts_of(batch, INPUTS, TOKENIZER.pad_id, 2, blind=True)
    assert blind["tokens"][0, blind["segment"][0] > 0].tolist() == [TOKENIZER.bos_id, *ids("what color is it?")]
    assert (blind["image_at"] == blind["tokens"].shape[1]).all()


def test_a_prompt_leaves_room_for_what_is_drawn() -> None:
    """Though padding it to a whole number of steps would not."""
    long = " ".join(["what color is it?"] * 4)
    batch = rows((0, long, "red"))
    used = int(np.argmax(batch["target"][0]))
    prompts, draw = prompts_of(batch, INPUTS, TOKENIZER.pad_id, 2)
    assert used > 16 and used <= prompts["tokens"].shape[1] and prompts["tokens"].shape[1] + draw <= CONTEXT


def test_an_answer_ends_as_those_that_were_learned() -> None:
    """By the end token, where nothing is left to cut, or by the newline that a template sets."""
    assert ended("red heart", "blue") == "red heart"
    assert ended("red heart\nblue\n", "dark skin\n") == "red heart"


EXAMPLES = [
    (0, "what color is it?", "red"),
    (0, "is it?", "yes"),
    (1, "what?", "circle"),
    (1, "is it?", "no"),
    (2, "is it?", "yes"),
    (2, "how many?", "2"),
    (2, "what color is it?", "blue"),
]


def test_exact_match_is_by_what_is_answered_with_the_image_and_without() -> None:
    """Of picture 0 it says red, of 1 circle, of 2 yes, and without one yes: three, and of those two, are right."""
    found = vqa.run(subject(EXAMPLES, ["red", "circle", "yes"], "yes", records=lambda: iter([{}] * len(EXAMPLES))))
    assert found["exact_match"] == pytest.approx(3 / 7)
    assert found["exact_match_open"] == pytest.approx(2 / 4)
    assert found["exact_match_yes_no"] == pytest.approx(1 / 3)
    assert [found[f"exact_match_{kind}"] for kind in ("color", "shape", "number")] == [0.5, 1, 0]
    assert found["blind_exact_match"] == pytest.approx(2 / 7)
    assert (found["blind_exact_match_open"], found["blind_exact_match_yes_no"]) == (0, pytest.approx(2 / 3))
    assert (found["yes_rate"], found["yes_rate_of_the_truth"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert [found[f"questions_{kind}"] for kind in ("color", "shape", "number", "yes_no")] == [2, 1, 1, 3]
    assert not any("consensus" in name for name in found)
    # Of a ratio of means over the pictures, which have 1 of 2, 1 of 2 and 1 of 3.
    spread = np.array([1 - 6 / 7, 1 - 6 / 7, 1 - 9 / 7])
    assert found["exact_match_standard_error"] == pytest.approx(spread.std(ddof=1) / math.sqrt(3) / (7 / 3))


def test_questions_that_are_asked_again_of_the_same_pictures_make_no_surer() -> None:
    right, pictures = np.array([1, 0, 1, 1]), np.arange(4)
    once = by_group("x", right, (), pictures)
    twice = by_group("x", np.tile(right, 2), (), np.tile(pictures, 2))
    assert once == pytest.approx(twice) and once["x_standard_error"] == pytest.approx(0.25)


def test_people_who_answer_are_counted_where_records_have_them() -> None:
    people = [["red"] * 10, ["yes"] * 4 + ["no"] * 6, ["a circle"] * 2 + ["circle"] + ["ball"] * 7]
    found = vqa.run(subject(EXAMPLES[:3], ["red", "circle"], "", records=lambda: ({"answers": p} for p in people)))
    # Of "red" all ten; "red" is not "yes"; three say circle: each of the others sees three, each of these two.
    assert found["consensus"] == pytest.approx((1 + 0 + (7 * 1 + 3 * 2 / 3) / 10) / 3)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The Red  ball.", "red ball"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),  # digits that a comma parts lose all their marks
        ("3.5", "3.5"),
        ("end.", "end"),
        ("black-and-white", "black and white"),
        ("black, white", "black white"),
        ("what?!", "what"),
        ("an\napple", "apple"),
    ],
)
def test_answers_are_compared_in_the_normal_form_of_the_release(answer: str, form: str) -> None:
    assert normalised(answer) == form


@pytest.mark.parametrize(
    ("answer", "people", "accuracy"),
    [
        ("red", ["red"] * 10, 1),
        ("red", ["red"] * 1 + ["blue"] * 9, 0.3),  # nine see one of three, one sees none
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("red", ["red"] * 4 + ["blue"] * 6, 1),
        ("Red", ["a red"] * 4 + ["blue"] * 6, 1),
        ("Red", ["red"] * 10, 0),  # where all agree nothing is normalised, as in the release
        ("green", ["red"] * 4 + ["blue"] * 6, 0),
    ],
)
def test_consensus_by_hand(answer: str, people: list[str], accuracy: float) -> None:
    assert consensus(answer, people) == pytest.approx(accuracy)
