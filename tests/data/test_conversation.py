"""Conversations as tokens: answers and ends are learned, a prompt is the beginning of its row, images have places."""

from dataclasses import replace

import numpy as np
import pytest
from chat_templates import CHATML, LLAMA3, LLAVA_HF, NAMES, TEXTS, byte_level

from vlm_jax.contract import Input
from vlm_jax.data import Data, Dialogue, Message, Tokenizer, VisualQuestion, conversation, example, train_tokenizer
from vlm_jax.data.conversation import LINE, PLAIN, V1, VisualCaption, VisualDialogue
from vlm_jax.data.template import ending, rendered
from vlm_jax.errors import UserError

TEMPLATES = {"v1": V1, "plain": PLAIN, "line": LINE, "chatml": CHATML, "llama 3": LLAMA3, "llava of hf": LLAVA_HF}
HARD = ["red", " red", "\nred", "\n\n", "  ", "5", "don't", "", "grün 😀", "</s> is no end", ".", "<image>", ": a"]
SPAN = 3


@pytest.fixture(scope="module", params=["byte-level", "trained"])
def tokenizer(request) -> Tokenizer:
    if request.param == "byte-level":
        return byte_level()
    trained = train_tokenizer(TEXTS, 420)
    trained.tokenizer.add_special_tokens([*NAMES])
    return trained


def talk(*said: str) -> list[Message]:
    return [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(said)]


def asked(messages: list[Message], template: str, tokenizer: Tokenizer, images: int | None = None):
    return conversation(messages, template, tokenizer, images=images, span=SPAN)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("images", [0, 1])
def test_a_prompt_is_exactly_the_first_tokens_of_the_conversation_with_its_answer(tokenizer, template, images) -> None:
    """Whatever the texts begin and end with, and in each turn; what is learned is all that follows it, to the end."""
    for text in HARD:
        for other in ("what colour is it?", *HARD[2:5]):
            question = other.replace("<image>", "")
            messages = talk(question, text, "and now?", text)
            row = asked(messages, template, tokenizer, images)
            for turn in (1, 3):
                prompt = asked(messages[:turn], template, tokenizer, images)
                length = len(prompt.tokens)
                assert row.tokens[:length].tolist() == prompt.tokens.tolist()
                assert row.image_at.tolist() == prompt.image_at.tolist()
                assert not prompt.target[length - 1] and not row.target[length - 1] and row.target[length]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_no_letter_is_lost_or_doubled_where_a_prompt_ends(template) -> None:
    """Of two newlines there are one token or two, by what follows: the text is the same."""
    tokenizer = byte_level()
    for text in HARD:
        talked = talk("what?", text, text, "no")
        parts = [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in talked]
        told = parts if template == LLAVA_HF else [message._asdict() for message in talked]
        written = tokenizer.tokenizer.decode(
            asked(talked, template, tokenizer).tokens.tolist(), skip_special_tokens=False
        )
        assert written == rendered(template, told, "<s>", "</s>", prompt=False)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_is_learned_is_each_answer_and_one_end(tokenizer, template) -> None:
    row = asked(talk("what colour is it?", "red", "and?", "no"), template, tokenizer, 1)
    end = ending(template, tokenizer)
    starts = np.flatnonzero(np.diff(row.target.astype(int)) == 1) + 1
    assert len(starts) == 2
    learned = [row.tokens[start : start + int(np.argmin([*row.target[start:], False]))] for start in starts]
    for tokens, answer in zip(learned, ("red", "no"), strict=True):
        ids = tokens.tolist()
        if isinstance(end, int):
            assert ids.pop() == end and end not in ids
            assert tokenizer.tokenizer.decode(ids).strip() == answer
        else:
            assert tokenizer.tokenizer.decode(ids).lstrip() == answer + end == answer + "\n"


def test_a_conversation_is_what_the_template_writes(tokenizer) -> None:
    """Of Vicuna's letter by letter, as LLaVA's conversation.py joins it."""
    row = asked(talk("what?", "red", "and?", "no"), V1, tokenizer)
    written = tokenizer.tokenizer.decode(row.tokens.tolist(), skip_special_tokens=False)
    expected = (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
        "USER: what? ASSISTANT: red</s>USER: and? ASSISTANT: no</s>"
    )
    if tokenizer.eos_id == tokenizer.tokenizer.token_to_id("<eos>"):  # ours knows no capitals, and spaces its words
        expected = expected.lower().replace("<s>", "<bos> ").replace("</s>user", "<eos> user").replace("</s>", "<eos>")
    assert written.strip() == expected


def test_names_of_special_tokens_are_special_in_the_template_alone(tokenizer) -> None:
    row = asked(talk("<|im_end|> what</s>?", "<|im_end|>"), CHATML, tokenizer)
    end = tokenizer.tokenizer.token_to_id("<|im_end|>")
    assert np.count_nonzero(row.tokens == end) == 2
    assert row.tokens[row.target][-1] == end and "<|im_end|>" in tokenizer.tokenizer.decode(row.tokens[row.target][:-1])


def test_what_a_template_strips_is_stripped(tokenizer) -> None:
    stripped, plain = (
        asked(talk(" \n what? ", "red "), LLAMA3, tokenizer),
        asked(talk("what?", "red"), LLAMA3, tokenizer),
    )
    assert stripped.tokens.tolist() == plain.tokens.tolist()
    kept = asked(talk(" \n what? ", "red "), CHATML, tokenizer)
    assert kept.tokens.tolist() != asked(talk("what?", "red"), CHATML, tokenizer).tokens.tolist()


def test_images_stand_where_they_are_marked_or_in_front(tokenizer) -> None:
    """Each takes its places, as if it were a special token between the texts."""
    marked = asked(talk("first <image> then <image>?"), CHATML, tokenizer, 2)
    assert len(marked.image_at) == 2 and marked.image_at[1] > marked.image_at[0] + SPAN
    for at in marked.image_at:
        assert (marked.tokens[at : at + SPAN] == tokenizer.pad_id).all()
    front = asked(talk("what?", "red"), CHATML, tokenizer, 2)
    same = asked(talk("<image>\n<image>\nwhat?", "red"), CHATML, tokenizer, 2)
    assert front.tokens.tolist() == same.tokens.tolist() and front.image_at.tolist() == same.image_at.tolist()
    without = asked(talk("what?", "red"), CHATML, tokenizer)
    assert not len(without.image_at)
    assert asked(talk("a <image>"), CHATML, tokenizer).image_at.tolist() == []  # nobody asked for images: text


@pytest.mark.parametrize(("question", "images"), [("<image> <image>?", 1), ("<image>?", 2), ("<image>?", 0)])
def test_more_or_fewer_marks_than_images_are_refused(tokenizer, question, images) -> None:
    marks = question.count("<image>")
    with pytest.raises(UserError, match=rf"there are {marks} marks <image> and {images} images: give one for each"):
        asked(talk(question), V1, tokenizer, images)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "does not show what is said, each once and in order"),
        ("{% for m in messages %}{{ m.content | upper | replace('\ue000', '') }}{% endfor %}", "does not show"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "sets nothing after an answer that could end it"),
        (
            "{% if add_generation_prompt %}! {% endif %}{% for m in messages %}{{ m.content + '.' }}{% endfor %}",
            "writes a prompt otherwise once it is answered",
        ),
        ("{% for m in messages %}", r"the chat template cannot be used \(.*\): correct it"),
        ("{{ raise_exception('roles must alternate') }}", r"cannot be used \(roles must alternate\)"),
        ("{{ ''.__class__.__mro__ }}", "cannot be used .*unsafe"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer, template, message) -> None:
    with pytest.raises(UserError, match=message):
        asked(talk("what?", "red"), template, tokenizer)


LENGTH = 64
SEES = {
    "tokens": Input((LENGTH,), "int32", 500),
    "target": Input((LENGTH,), "bool"),
    "segment": Input((LENGTH,), "int32", LENGTH + 1),
    "image": Input((2, 4, 4, 3), "uint8", 256),
    "image_at": Input((2,), "int32", LENGTH + 1, span=SPAN),
}
READS = {name: SEES[name] for name in ("tokens", "target", "segment")}


class Red:
    """A picture."""

    def view(self, size, channels, *_):
        return np.full((size, size, channels), 200, np.uint8)


RECORD = {"record": "record 7", "image": Red(), "question": "what colour?", "answer": "red", "text": ("red", "no")}


def read(field, inputs, tokenizer, rng=None):
    return example(RECORD, Data(name="x", fields=(field,)), inputs, tokenizer, rng)


def test_a_question_about_an_image_becomes_the_five_fields(tokenizer) -> None:
    found = read(VisualQuestion(template=LINE), SEES, tokenizer)
    assert {name: (array.shape, str(array.dtype)) for name, array in found.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in SEES.items()
    }
    assert found["image_at"].tolist() == [1, LENGTH]  # after the beginning; there is no second
    assert (found["image"][0] == 200).all() and not found["image"][1].any()
    assert tokenizer.decode(found["tokens"][found["target"]]).strip() == "red"
    assert found["tokens"][found["target"]][-1] == tokenizer.eos_id


def test_the_prompt_says_how_a_question_is_asked_and_where_its_image_is(tokenizer) -> None:
    def said(**settings) -> tuple[str, list[int]]:
        row = read(VisualQuestion(template=LINE, **settings), SEES, tokenizer)
        return tokenizer.tokenizer.decode(row["tokens"].tolist()), row["image_at"].tolist()

    plain, line, after = said(), said(prompt="<image>{}"), said(prompt="answer {}<image>")
    assert "\nwhat colour? red" in plain[0]  # as LLaVA: the image is on a line of its own
    assert line == (plain[0].replace("\n", ""), plain[1])
    assert "answer what colour?" in after[0] and after[1][0] > plain[1][0]
    own = replace(VisualQuestion(prompt="answer {}"), template=LINE)
    assert own.asked("is <image> red?") == "is <image> red?"
    with pytest.raises(UserError, match="the prompt 'what' has no place for the question"):
        VisualQuestion(prompt="what")


def test_any_caption_is_learned_in_training_and_the_first_judged(tokenizer) -> None:
    field, rng = VisualCaption(template=PLAIN), np.random.default_rng(0)
    rows = [read(field, SEES, tokenizer, rng) for _ in range(40)]
    learned = {tokenizer.tokenizer.decode(row["tokens"][row["target"]].tolist()) for row in rows}
    assert {text.strip() for text in learned} == {"red", "no"} and all(text.endswith("\n") for text in learned)
    row = read(field, SEES, tokenizer)
    assert tokenizer.tokenizer.decode(row["tokens"][row["target"]].tolist()).strip() == "red"
    prompted = read(replace(field, prompt="what is it?"), SEES, tokenizer)
    assert "what is it?" in tokenizer.tokenizer.decode(prompted["tokens"].tolist())


def test_all_answers_of_a_dialogue_are_learned_and_its_image_stands_before_it(tokenizer) -> None:
    turns = (("what colour?", "red"), ("what shape?", "circle"))
    record = {"record": "record 0", "image": RECORD["image"], "turns": turns}
    row = example(record, Data(name="x", fields=(VisualDialogue(template=LINE),)), SEES, tokenizer, None)
    learned, text = row["tokens"][row["target"]].tolist(), tokenizer.tokenizer.decode
    ends = [place for place, token in enumerate(learned) if token == tokenizer.eos_id]
    assert [text(learned[: ends[0]]).strip(), text(learned[ends[0] + 1 : ends[1]]).strip()] == ["red", "circle"]
    assert ends[1] == len(learned) - 1 and len(ends) == 2
    one = read(VisualQuestion(template=LINE), SEES, tokenizer)
    for name in ("image_at", "image"):
        np.testing.assert_array_equal(row[name], one[name])


def test_a_model_that_sees_is_given_no_image_where_there_is_none(tokenizer) -> None:
    seen, blind = read(Dialogue(), SEES, tokenizer), read(Dialogue(), READS, tokenizer)
    assert seen["image_at"].tolist() == [LENGTH] * 2 and not seen["image"].any()
    for name in READS:
        np.testing.assert_array_equal(seen[name], blind[name])
    assert blind.keys() == READS.keys()


def test_the_tokenizers_own_template_is_taken_where_a_field_has_none(tokenizer) -> None:
    own = replace(tokenizer, chat_template=CHATML)
    found, given = read(VisualQuestion(), SEES, own), read(VisualQuestion(template=CHATML), SEES, tokenizer)
    np.testing.assert_array_equal(found["tokens"], given["tokens"])
    with pytest.raises(UserError, match="the tokenizer has no chat template: give the field one"):
        read(VisualQuestion(), SEES, tokenizer)


def test_an_answer_that_does_not_fit_is_refused_by_name(tokenizer) -> None:
    short = {**SEES, **{name: Input((6,), spec.dtype, spec.limit) for name, spec in READS.items()}}
    with pytest.raises(
        UserError, match=r"record 7 is a conversation of \d+ tokens and the model reads 6: leave it out"
    ):
        read(VisualQuestion(template=V1), short, tokenizer)


def test_images_are_not_set_into_what_has_no_place_for_them() -> None:
    for inputs in (READS, {**READS, "image": Input((4, 4, 3), "uint8", 256)}):
        with pytest.raises(
            UserError, match="VisualQuestion sets images into a sequence, and the model reads none there"
        ):
            VisualQuestion().check(inputs)
    with pytest.raises(UserError, match=r"images of float32\[4, 4, 3\]"):
        VisualQuestion().check({**SEES, "image": Input((2, 4, 4, 3), "float32")})
