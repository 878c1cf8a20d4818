"""Each kind of field: what it makes of a record for the model at hand, and what is refused before anything is read."""

from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from made import build
from vlm_jax.contract import Input
from vlm_jax.data import (
    Caption,
    Data,
    Dialogue,
    Document,
    Image,
    Label,
    Text,
    Tokenizer,
    example,
    open_data,
    open_training_data,
    prompts,
    train_tokenizer,
)
from vlm_jax.data.fields import Tokens, left_padded
from vlm_jax.errors import UserError

TEXT = {
    "tokens": Input((12,), "int32", 300),
    "target": Input((12,), "bool"),
    "segment": Input((12,), "int32", 13),
}
GREY = {"image": Input((8, 8, 1), "uint8", 17)}
LABEL = {"label": Input((), "int32", 10)}
QUESTION = {"record": "record 0", "text": ("is it red? no",), "question": "is it red?", "answer": "no"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["is it red? no", "a red dog"] * 9, 300)


def predicted(found: dict, tokenizer: Tokenizer) -> str:
    """The text that is to be predicted."""
    return tokenizer.decode(found["tokens"][found["target"]])


def read(field, record: dict, tokenizer: Tokenizer | None, rng=None, inputs=TEXT) -> dict:
    return example(record, Data(name="x", fields=(field,)), inputs, tokenizer, rng)


def test_of_a_document_all_is_predicted_but_the_beginning(tokenizer: Tokenizer) -> None:
    found = read(Document(), {"text": ("a red dog",)}, tokenizer)
    np.testing.assert_array_equal(found["tokens"], tokenizer.encode(["a red dog"], 12)[0])
    count = len(tokenizer.tokenizer.encode("a red dog").ids)
    np.testing.assert_array_equal(found["target"], [False, *[True] * (count + 1), *[False] * (10 - count)])
    np.testing.assert_array_equal(found["segment"], [*[1] * (count + 2), *[0] * (10 - count)])
    assert {name: array.dtype for name, array in found.items()} == {name: spec.dtype for name, spec in TEXT.items()}


def test_without_a_token_for_the_beginning_the_first_word_is_not_predicted(tokenizer: Tokenizer) -> None:
    found = read(Document(), {"text": ("a red dog",)}, replace(tokenizer, bos_id=None))
    assert not found["target"][0] and found["target"][1]
    assert predicted(found, tokenizer) == "red dog"


def test_of_a_dialogue_the_answer_and_the_end_are_predicted(tokenizer: Tokenizer) -> None:
    long = {name: Input((64,), spec.dtype, spec.limit) for name, spec in TEXT.items()}
    found = read(Dialogue(), QUESTION, tokenizer, inputs=long)
    assert predicted(found, tokenizer).strip() == "no"
    assert found["tokens"][found["target"]][-1] == tokenizer.eos_id
    np.testing.assert_array_equal(found["tokens"], tokenizer.encode(["is it red? no"], 64)[0])


def test_braces_in_a_question_are_text(tokenizer: Tokenizer) -> None:
    long = {name: Input((64,), spec.dtype, spec.limit) for name, spec in TEXT.items()}
    record = {"record": "record 0", "question": "{{ answer }}?", "answer": "{% question"}
    assert predicted(read(Dialogue(), record, tokenizer, inputs=long), tokenizer) == "{% question"


def test_what_cannot_be_predicted_within_the_length_is_an_error_that_names_the_record(tokenizer: Tokenizer) -> None:
    short = {name: Input((1,), spec.dtype, spec.limit) for name, spec in TEXT.items()}
    with pytest.raises(UserError, match="record 0 has nothing to predict within the 1 tokens"):
        read(Document(), QUESTION, tokenizer, inputs=short)


@pytest.mark.parametrize("field", [Caption(), Document()])
def test_training_takes_any_of_the_texts_and_evaluation_the_first(tokenizer: Tokenizer, field) -> None:
    record = {"record": "record 0", "text": ("red", "dog", "no")}
    rng = np.random.default_rng(0)
    chosen = [tokenizer.decode(read(field, record, tokenizer, rng)["tokens"]) for _ in range(60)]
    assert all(chosen.count(text) > 8 for text in record["text"])
    assert tokenizer.decode(read(field, record, tokenizer)["tokens"]) == "red"


def test_of_fields_that_give_the_same_the_first_that_a_record_has_is_taken(tokenizer: Tokenizer) -> None:
    data = Data(name="x", fields=(Dialogue(), Document()))
    assert predicted(example(QUESTION, data, TEXT, tokenizer, None), tokenizer) == "no"
    assert predicted(example({"text": ("a red dog",)}, data, TEXT, tokenizer, None), tokenizer) == "a red dog"
    swapped = Data(name="x", fields=(Document(), Dialogue()))
    assert predicted(example(QUESTION, swapped, TEXT, tokenizer, None), tokenizer) == "is it red? no"


def test_nothing_is_made_that_the_model_does_not_read() -> None:
    assert example({"text": (), "label": 3}, Data(name="x"), LABEL, None, None) == {"label": 3}


@pytest.mark.parametrize(
    ("name", "fields", "inputs", "message"),
    [
        ("digits", (Image(),), GREY | LABEL, "the model reads 'label' and data.fields give image: add a field"),
        ("digits", (), GREY, "the model reads 'image' and data.fields give nothing"),
        (
            "openmoji",
            (Image(), Label()),
            GREY | LABEL,
            "'label', .* made of label, and openmoji has image, text:",
        ),
        ("digits", (Caption(),), {"tokens": TEXT["tokens"]}, "reads 'tokens', .* made of text, and digits has image"),
        ("digits", (Dialogue(), Document()), TEXT, "made of question and answer or text, and digits has image, label"),
        ("openmoji", (Caption(), Document()), TEXT, "reads 'target', which Document gives after another field: put it"),
        (
            "digits",
            (Image(),),
            {"image": Input((32, 32, 4), "float32")},
            r"float32\[32, 32, 4\], and data give",
        ),
        ("digits", (Image(),), {"image": Input((8, 9, 1), "uint8", 17)}, r"images of uint8\[8, 9, 1\]"),
        ("digits", (Image(),), {"image": Input((8, 8, 2), "uint8", 17)}, r"images of uint8\[8, 8, 2\]"),
        ("openmoji", (Caption(),), {"tokens": Input((2,), "int32")}, "context_length is 2: at least 3"),
    ],
)
def test_what_a_model_reads_and_no_field_gives_is_refused_before_anything_is_read(
    data_dir, name, fields, inputs, message
) -> None:
    with pytest.raises(UserError, match=message):
        open_data(Data(name=name, fields=fields), "test", inputs, data_dir)


def test_of_several_labels_one_is_chosen_by_name(tmp_path) -> None:
    label = tfds.features.ClassLabel(num_classes=3)
    build(tmp_path, {"colour": label, "shape": label}, {"colour": 1, "shape": 2})
    with pytest.raises(UserError, match=r"made has nothing of the kind \(it has several labels, colour, shape, none"):
        open_data(Data(name="made"), "train", LABEL, tmp_path)
    data = Data(name="made", fields=(Label(name="shape"),))
    assert example(open_data(data, "train", LABEL, tmp_path)[0], data, LABEL, None, None) == {"label": 2}
    with pytest.raises(UserError, match="made has no label 'size': choose among colour, shape"):
        open_data(Data(name="made", fields=(Label(name="size"),)), "train", LABEL, tmp_path)


def test_a_model_of_texts_without_a_tokenizer_is_told_so() -> None:
    with pytest.raises(UserError, match="the model reads texts, and the data's `text` is None"):
        read(Caption(), {"text": ("a",), "record": "record 0"}, None)


def test_labels_that_mean_different_things_are_not_mixed(data_dir) -> None:
    data = Data(name="digits", mixture=(("easy_vqa/color", 1.0),), text=Text(vocab_size=300))
    inputs = {"image": Input((8, 8, 1), "uint8"), **LABEL}
    with pytest.raises(UserError, match="the labels of easy_vqa/color are not those of digits"):
        open_training_data(data, inputs, data_dir)


def test_prompts_are_padded_on_the_left_and_wait_for_what_follows(tokenizer: Tokenizer):
    texts = ["a red dog", "is"]
    batch = prompts(texts, tokenizer)
    for row, text in enumerate(texts):
        whole = tokenizer.encode([text], 32)[0].tolist()
        begun = whole[: whole.index(tokenizer.eos_id)]
        real = batch["segment"][row] == 1
        assert batch["tokens"][row][real].tolist() == begun
        assert real.tolist() == sorted(real.tolist()) and set(batch["tokens"][row][~real]) <= {tokenizer.pad_id}
    assert batch["segment"].all(axis=1).tolist() == [True, False]
    assert not batch["target"].any()


def test_images_move_with_what_is_padded_on_the_left_and_none_stays_none(tokenizer: Tokenizer):
    documents = [
        Tokens(np.arange(n, dtype=np.int32), np.zeros(n, bool), np.array(at)) for n, at in ((6, [1, 3]), (4, [0]))
    ]
    inputs = {"image_at": Input((3,), "int32", 13, span=2)}
    batch = left_padded(documents, inputs, tokenizer.pad_id, 8)
    assert batch["image_at"].tolist() == [[3, 5, 8], [4, 8, 8]]
    assert batch["tokens"][1].tolist() == [tokenizer.pad_id] * 4 + [0, 1, 2, 3]
    assert batch["segment"].tolist() == [[0] * 2 + [1] * 6, [0] * 4 + [1] * 4]


def test_an_empty_prompt_needs_a_token_that_begins_a_text(tokenizer: Tokenizer):
    assert prompts([""], tokenizer)["tokens"].tolist() == [[tokenizer.bos_id]]
    with pytest.raises(UserError, match="a prompt is empty, and the tokenizer has no token to begin a text with"):
        prompts(["red", ""], replace(tokenizer, bos_id=None))
