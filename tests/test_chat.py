"""What is asked of a run, and what is made of what its model writes, with models that write what is known."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest
from chat_templates import CHATML
from PIL import Image as Pillow

from vlm_jax.chat import Asked, Speaker, answers, chat, chats
from vlm_jax.contract import Input, Model
from vlm_jax.data import Dialogue, Document, Image, Tokenizer, VisualCaption, VisualQuestion, train_tokenizer
from vlm_jax.data.conversation import LINE, PLAIN
from vlm_jax.data.picture import picture_of
from vlm_jax.errors import UserError

LENGTH, SPAN = 120, 2
TEXT = {
    "tokens": Input((LENGTH,), "int32", 400),
    "target": Input((LENGTH,), "bool"),
    "segment": Input((LENGTH,), "int32", LENGTH + 1),
}
SEES = {**TEXT, "image": Input((2, 4, 4, 3), "uint8", 256), "image_at": Input((2,), "int32", LENGTH + 1, span=SPAN)}


@dataclass(frozen=True)
class Sampling:
    """How it is drawn."""

    length: int | None = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    trained = train_tokenizer(["what colour is it? red", "a red dog. no", "user\nassistant\n"] * 9, 400)
    trained.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return trained


def writing(text: str, tokenizer: Tokenizer, inputs: dict, seen: list) -> Model:
    """A model that answers everything with one text, which is followed by others, and shows what it was given."""
    ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids

    def generate(variables, key, batch, *, order=("text",), temperature=1.0, sampling=None):
        written = jnp.broadcast_to(jnp.array(ids, jnp.int32), (len(batch["tokens"]), len(ids)))
        seen.append({name: jnp.shape(value) for name, value in batch.items()} | {"sampling": sampling})
        ones = jnp.ones_like(written)
        return {
            "tokens": jnp.concatenate([batch["tokens"], written + variables], axis=1),
            "target": jnp.concatenate([batch["target"], ones > 0], axis=1),
            "segment": jnp.concatenate([batch["segment"], ones], axis=1),
        }

    return Model(inputs=inputs, init=None, loss=None, rules=(), sampling=Sampling(), generate=generate)


def speaker(text, tokenizer, *, inputs=SEES, fields=(), seen=None) -> Speaker:
    return Speaker(writing(text, tokenizer, inputs, [] if seen is None else seen), 0, tokenizer, fields)


def asked_tokens(tokenizer, fields, asked, inputs=SEES) -> list[str]:
    """The prompts as a model gets them, read back."""
    got = []
    model = writing("red", tokenizer, inputs, [])

    def generate(variables, key, batch, **rest):
        for tokens, segment in zip(batch["tokens"], batch["segment"], strict=True):
            got.append(tokenizer.tokenizer.decode(np.asarray(tokens)[np.asarray(segment) > 0].tolist()))
        return {name: jnp.pad(batch[name], ((0, 0), (0, 1))) for name in TEXT}

    spying = Speaker(replace(model, generate=generate), 0, tokenizer, fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.jit", lambda function: function)
        list(answers(spying, asked))
    return got


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for number in range(2):
        Pillow.new("RGB", (8, 6), (number * 100, 20, 30)).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    return paths


@pytest.mark.parametrize(
    ("template", "written", "expected"),
    [
        (LINE, " red<eos> dog", "red"),
        (CHATML, "red<|im_end|> dog", "red"),  # another end than the tokenizer's
        (PLAIN, "red\ndog", "red"),  # no token at all
        (LINE, "a red dog", "a red dog"),  # it did not come to its end
    ],
)
def test_an_answer_ends_where_the_template_ends_it(tokenizer, template, written, expected) -> None:
    tokenizer.tokenizer.encode_special_tokens = False
    try:
        run = speaker(written, tokenizer, inputs=TEXT, fields=(Dialogue(template=template),))
    finally:
        tokenizer.tokenizer.encode_special_tokens = True
    assert chat(run, ["what colour is it?"] * 3) == [expected] * 3


def test_every_prompt_has_all_images_in_order_as_the_runs_data_read_them(tokenizer, pictures) -> None:
    shown = []
    model = writing("red", tokenizer, SEES, [])

    def generate(variables, key, batch, **rest):
        shown.append(batch)
        return {name: jnp.pad(batch[name], ((0, 0), (0, 1))) for name in TEXT}

    field = VisualQuestion(template=LINE, image=Image())
    run = Speaker(replace(model, generate=generate), 0, tokenizer, (field,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.jit", lambda function: function)
        chat(run, ["what colour is it?", "no <image> red <image>"], pictures)
    (batch,) = shown
    one = {"image": SEES["image"]._replace(shape=(4, 4, 3))}
    expected = [field.image.read({"image": picture_of(path)}, one, None, None)["image"] for path in pictures]
    for row in range(2):
        np.testing.assert_array_equal(batch["image"][row], np.stack(expected))
        assert (np.diff(batch["image_at"][row]) >= SPAN).all() and (
            batch["image_at"][row] < batch["tokens"].shape[1]
        ).all()
    assert batch["tokens"].shape[1] % 16 == 0 and not batch["target"].any()
    assert batch["segment"][:, -1].all() and not batch["segment"][:, 0].any()


def test_without_images_there_is_none(tokenizer) -> None:
    run = speaker("red", tokenizer, fields=(VisualQuestion(template=LINE),))
    assert chat(run, ["what colour?"]) == ["red"]
    assert asked_tokens(tokenizer, run.fields, [Asked("what colour?")]) == ["what colour?"]


def test_a_run_is_asked_as_it_was_trained(tokenizer, pictures) -> None:
    """A question as its questions were, a text without images as its dialogues, and for a caption as its captions."""
    images = tuple(map(picture_of, pictures[:1]))
    fields = (VisualCaption(template=PLAIN, prompt="a red"), VisualQuestion(template=LINE), Dialogue(template=CHATML))
    asked = [Asked("dog?", images), Asked("dog?"), Asked("", images)]
    assert asked_tokens(tokenizer, fields, asked) == ["\ndog?", "user\ndog? \n assistant\n", "\na red"]
    fields = (VisualQuestion(template=LINE, prompt="<image>{}"),)
    assert asked_tokens(tokenizer, fields, [*asked[:2], Asked("a <image>dog?", images)]) == ["dog?", "dog?", "a  dog?"]


def test_a_language_model_without_a_template_goes_on_with_the_text(tokenizer) -> None:
    fields = (Document(),)
    assert not chats(speaker("red", tokenizer, inputs=TEXT, fields=fields))
    assert asked_tokens(tokenizer, fields, [Asked("what colour")], TEXT) == ["what colour"]
    own = replace(tokenizer, chat_template=LINE)
    assert chats(speaker("red", own, inputs=TEXT, fields=fields))
    with pytest.raises(UserError, match="a prompt is empty, and the tokenizer has no token to begin a text with"):
        chat(speaker("red", replace(tokenizer, bos_id=None), inputs=TEXT), [""])


def test_many_are_asked_in_parts_of_one_shape(tokenizer) -> None:
    seen: list = []
    run = speaker("red", tokenizer, inputs=TEXT, fields=(Dialogue(),), seen=seen)
    asked = [Asked("a " * (index % 5 + 1)) for index in range(35)]
    assert list(answers(run, asked)) == ["red"] * 35
    assert len(seen) == 1 and seen[0]["tokens"] == (16, 16)  # traced once


@pytest.mark.parametrize(
    ("prompt", "count", "inputs", "message"),
    [
        ("<image> red?", 2, SEES, "there are 1 marks <image> and 2 images"),
        ("<image> red?", 0, SEES, "there are 1 marks <image> and 0 images"),
        ("red?", 3, SEES, "there are 3 images and the model reads at most 2 in a conversation"),
        ("red?", 1, TEXT, "there are 1 images and the model reads none"),
        ("red " * LENGTH, 0, TEXT, rf"a prompt has \d+ tokens and the model's context_length is {LENGTH}: shorten it"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(tokenizer, pictures, prompt, count, inputs, message) -> None:
    run = speaker("red", tokenizer, inputs=inputs, fields=(VisualQuestion(template=LINE), Dialogue()))
    with pytest.raises(UserError, match=message):
        chat(run, [prompt], [pictures[0]] * count)


def test_a_model_that_sees_needs_a_template_and_one_that_writes_nothing_answers_nothing(tokenizer) -> None:
    with pytest.raises(UserError, match="the run has no chat template: put one beside its tokenizer"):
        chat(speaker("red", tokenizer), ["red?"])
    silent = Model(inputs=TEXT, init=None, loss=None, rules=())
    with pytest.raises(UserError, match="the model writes no texts"):
        chat(Speaker(silent, 0, tokenizer), ["red?"])


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "note.txt").write_text("a note")
    with pytest.raises(UserError, match=r"note\.txt is no image of a kind that Pillow knows: give a PNG"):
        picture_of(tmp_path / "note.txt")
    with pytest.raises(UserError, match=r"the image .*none\.png cannot be read \(No such file"):
        picture_of(tmp_path / "none.png")
    with pytest.raises(UserError, match=r"an image is float32\[4, 4, 3\]: give uint8"):
        picture_of(np.zeros((4, 4, 3), np.float32))
    Pillow.effect_noise((40, 40), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    cut = picture_of(tmp_path / "cut.png")
    with pytest.raises(UserError, match=r"cut\.png has an image that cannot be used .*: give another picture"):
        cut.pixels(3)


def test_an_array_is_an_image_as_a_file_is(pictures) -> None:
    pixels = picture_of(pictures[1]).pixels(3)
    np.testing.assert_array_equal(picture_of(pixels).pixels(3), pixels)
    np.testing.assert_array_equal(picture_of(pixels[:, :, :1]).pixels(1), pixels[:, :, :1])
