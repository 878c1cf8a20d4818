"""Documents of an image and its caption, in either order."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from experiments.presets import presets
from smallest import CHAMELEON
from vlm_jax.contract import Input
from vlm_jax.data import Image, Interleaved, open_source, train_tokenizer
from vlm_jax.data.fields import row
from vlm_jax.errors import UserError
from vlm_jax.models import build

SPAN, LENGTH = 6, 40
INPUTS = {
    "tokens": Input((LENGTH,), "int32", 300),
    "target": Input((LENGTH,), "bool", 2),
    "segment": Input((LENGTH,), "int32", LENGTH + 1),
    "image": Input((1, 4, 4, 1), "uint8", 17),
    "image_at": Input((1,), "int32", LENGTH + 1, span=SPAN),
}
TOKENIZER = train_tokenizer(["one", "two"], 300)
WORDS = {text: TOKENIZER.tokenizer.encode(text, add_special_tokens=False).ids for text in ("one", "two")}


@pytest.fixture(scope="module")
def record(data_dir) -> dict[str, Any]:
    return {**open_source("digits", "test", data_dir)[0], "text": ("one", "two")}


def parts_of(example: dict[str, np.ndarray]) -> list[Any]:
    """Of a row: its tokens, and None in the place of its image."""
    tokens = example["tokens"][example["segment"] > 0].tolist()
    at = int(example["image_at"][0])
    return [*tokens[:at], None, *tokens[at + SPAN :]]


def test_training_documents_have_any_caption_before_the_image_after_it_or_not_at_all(record):
    """In the shares that are asked for, to five standard errors of so many draws."""
    field, rng, draws = Interleaved(caption_first=0.8, caption_dropout=0.25), np.random.default_rng(0), 1000
    kinds: dict[tuple[Any, ...], int] = {}
    for _ in range(draws):
        example = field.read(record, INPUTS, TOKENIZER, rng)
        assert (example["target"] == (example["segment"] > 0) & (np.arange(LENGTH) > 0)).all()
        kind = tuple(parts_of(example))
        kinds[kind] = kinds.get(kind, 0) + 1
    shares = {
        **{(1, *ids, None, 2): 0.8 * 0.75 / 2 for ids in WORDS.values()},
        **{(1, None, *ids, 2): 0.2 / 2 for ids in WORDS.values()},
        (1, None, 2): 0.8 * 0.25,
    }
    assert kinds.keys() == shares.keys()
    for kind, share in shares.items():
        assert abs(kinds[kind] / draws - share) < 5 * np.sqrt(share * (1 - share) / draws)


def test_evaluation_documents_have_the_first_caption_and_an_image_to_predict(record):
    example = Interleaved().read(record, INPUTS, TOKENIZER, None)
    assert parts_of(example) == [1, *WORDS["one"], None, 2]
    at = int(example["image_at"][0])
    assert np.flatnonzero(example["target"]).tolist() == [*range(at, at + SPAN)]
    own = Image().read(record, {"image": Input((4, 4, 1), "uint8", 17)}, None, None)["image"]
    np.testing.assert_array_equal(example["image"][0], own)


def test_packed_rows_hold_a_document_of_each_caption_in_the_shares_that_are_asked_for(record):
    """Always the same of a record, whatever process reads it."""
    field, kinds, names = Interleaved(caption_first=0.8, caption_dropout=0.25), dict[str, int](), 1000
    for number in range(names):
        named = {**record, "record": f"record {number}"}
        documents = [parts_of(row([each], INPUTS, 0)) for each in field.documents(named, INPUTS, TOKENIZER)]
        assert documents == [parts_of(row([each], INPUTS, 0)) for each in field.documents(named, INPUTS, TOKENIZER)]
        assert len(documents) == 2
        for ids, kind in zip(WORDS.values(), documents, strict=True):
            assert kind in ([1, *ids, None, 2], [1, None, *ids, 2], [1, None, 2])
            order = "none" if len(kind) == 3 else "first" if kind[1] is not None else "after"
            kinds[order] = kinds.get(order, 0) + 1
    for order, share in {"none": 0.8 * 0.25, "first": 0.8 * 0.75, "after": 0.2}.items():
        assert abs(kinds[order] / (2 * names) - share) < 5 * np.sqrt(share * (1 - share) / (2 * names))


def test_what_the_smallest_model_reads_is_filled(record):
    inputs = {
        **build(CHAMELEON).inputs,
        "tokens": Input((20,), "int32", 300),
        "image": Input((2, 2, 2, 1), "uint8", 17),
    }
    example = Interleaved().read(record, inputs, TOKENIZER, None)
    assert example["image"].shape == (2, 2, 2, 1) and not example["image"][1].any()
    assert example["image_at"].tolist() == [1 + len(WORDS["one"]), 20]


def test_a_document_that_is_longer_than_a_row_is_refused_by_its_name(record):
    inputs = INPUTS | {"tokens": Input((SPAN + 2,), "int32", 300)}
    message = (
        rf"{re.escape(record['record'])} is a document of {SPAN + 2 + len(WORDS['one'])} tokens and the model reads 8"
    )
    with pytest.raises(UserError, match=message):
        Interleaved().read(record, inputs, TOKENIZER, None)


def test_a_model_that_reads_no_images_in_a_sequence_is_refused():
    with pytest.raises(UserError, match="Interleaved sets images into a sequence, and the model reads none there"):
        Interleaved().check({name: INPUTS[name] for name in ("tokens", "target", "segment")})


@pytest.mark.parametrize("name", ["caption_first", "caption_dropout"])
def test_shares_lie_between_0_and_1(name):
    with pytest.raises(UserError, match=rf"{name} is 1\.5: a share lies in \[0, 1\]"):
        Interleaved(**{name: 1.5})


PRESETS = {
    name: experiment
    for name, (_, experiment) in presets().items()
    if any(isinstance(field, Interleaved) for field in experiment.data.fields)
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_asked_in_the_words_of_the_documents_that_it_learns(name: str):
    """Of what stands otherwise, such as an image on a line of its own, it knows no answer."""
    text = "what colour is it? red"
    example = {"record": "a record", "question": "what colour is it?", "answer": "red", "text": (text,)}
    documents, *asked = PRESETS[name].data.fields
    inputs, tokenizer = build(PRESETS[name].model).inputs, train_tokenizer([text], 300)
    assert isinstance(documents, Interleaved) and asked
    image_first = replace(documents, caption_first=0.0).arranged(text, inputs, tokenizer, np.random.default_rng(0))
    for field in asked:
        (found,) = field.documents(example, inputs, tokenizer)
        np.testing.assert_array_equal(found.tokens, image_first.tokens)
        np.testing.assert_array_equal(found.image_at, image_first.image_at)
