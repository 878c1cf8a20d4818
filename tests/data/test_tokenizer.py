import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from vlm_jax.data import check_tokenizer, load_tokenizer, train_tokenizer
from vlm_jax.errors import UserError

TEXTS = ["Woman technologist, light skin tone", "woman running", "light bulb", "skin tone"] * 5
UNSEEN = [
    "",
    " ",
    "  two  spaces ",
    "Ünïcode Ωμέγα 日本 😀",
    "tab\tand\nline",
    "<pad> is no <eos>",
    "\x00\x7f",
    "don't!?",
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 290)


def _other(tmp_path, specials, declared=True):
    vocabulary = {token: index for index, token in enumerate([*specials, "a", "b", "[UNK]"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    if declared:
        tokenizer.add_special_tokens(list(specials))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_the_same_texts_give_the_same_file(trained, tmp_path):
    trained.save(tmp_path / "one.json")
    train_tokenizer(iter(TEXTS), 290).save(tmp_path / "other.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()


def test_special_ids_and_vocabulary(trained):
    assert (trained.pad_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
    assert trained.vocab_size == 290
    assert train_tokenizer([], 300).vocab_size == 259
    assert trained.encode(TEXTS + UNSEEN, 64).max() < 290


def test_of_a_prompt_that_is_too_long_a_line_says_what_is_cut(trained, caplog):
    """Once, however often it is asked for; what fits to the last token is whole, and nothing is nothing."""
    fits, long = "woman " * 5, "woman\n" * 6
    texts = [fits.strip(), long, "", long, "x" * 99]
    encoded = trained.encode_prompts(texts, 7)
    np.testing.assert_array_equal(encoded, trained.encode(texts, 7))
    np.testing.assert_array_equal(encoded[2], [trained.bos_id, trained.eos_id, *[trained.pad_id] * 5])
    count = len(trained.tokenizer.encode(long, add_special_tokens=False).ids)
    letters = len(trained.tokenizer.encode("x" * 99, add_special_tokens=False).ids)
    assert caplog.messages == [
        f"the prompt {long!r} has {count} tokens and the model reads 5: the rest is cut off",
        f"the prompt '{'x' * 60}...' has {letters} tokens and the model reads 5: the rest is cut off",
    ]
    assert all("\n" not in message for message in caplog.messages)


def test_without_a_token_to_begin_with_a_prompt_has_room_for_one_more(tmp_path, caplog):
    loaded = load_tokenizer(_other(tmp_path, ["[PAD]", "</s>"]))
    loaded.encode_prompts(["a b a"], 4)
    assert not caplog.messages
    loaded.encode_prompts(["a b a b"], 4)
    assert caplog.messages == ["the prompt 'a b a b' has 4 tokens and the model reads 3: the rest is cut off"]


def test_the_vocabulary_ends_after_the_highest_id_whatever_is_left_out(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "[UNK]": 100}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == 101
    assert loaded.encode(["a never seen"], 4).max() == 100
    check_tokenizer(loaded, vocab_size=101, eos_id=0)
    check_tokenizer(loaded, vocab_size=None, eos_id=None)
    with pytest.raises(UserError, match=r"ids up to 100 and the model's vocab_size is 100: .* at least 101"):
        check_tokenizer(loaded, vocab_size=100, eos_id=0)
    with pytest.raises(UserError, match=r"ends a text with the id 0 and the model's eos_id is 2"):
        check_tokenizer(loaded, vocab_size=101, eos_id=2)


@pytest.mark.parametrize("text", TEXTS[:2] + UNSEEN)
def test_any_text_comes_back_in_lower_case(trained, text):
    assert trained.decode(trained.encode([text], 64)[0]) == text.lower()


def test_a_saved_tokenizer_is_the_same(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(loaded.encode(TEXTS + UNSEEN, 32), trained.encode(TEXTS + UNSEEN, 32))
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 1, 2)


def test_layout(trained):
    long, short, empty = trained.encode(["woman woman woman woman", "woman", ""], 4)
    woman = short[1]
    assert woman > 258  # a merge: the word is one token, also at the beginning of a text
    assert long.tolist() == [1, woman, woman, 2]
    assert short.tolist() == [1, woman, 2, 0]
    assert empty.tolist() == [1, 2, 0, 0]
    assert long.dtype == np.int32
    assert trained.encode([], 4).shape == (0, 4)


def test_decoding_stops_at_the_end(trained):
    tokens = trained.encode(["woman", "light"], 3)
    assert trained.decode(np.concatenate(tokens)) == "woman"


@pytest.mark.parametrize(
    "specials",
    [
        ("<pad>", "<s>", "</s>"),
        ("[PAD]", "[CLS]", "[SEP]"),
        ("<pad>", "<|startoftext|>", "<|endoftext|>"),
        ("<pad>", "<bos>", "<eos>"),
    ],
)
def test_other_tokenizers(tmp_path, specials):
    path = _other(tmp_path, specials)
    file = tokenizers.Tokenizer.from_file(str(path))
    file.enable_truncation(1)
    file.enable_padding(length=20)
    file.post_processor = processors.TemplateProcessing(single="$A b", special_tokens=[("b", 4)])
    file.save(str(path))

    tokenizer = load_tokenizer(path)
    assert tokenizer.encode(["a b a"], 8).tolist() == [[1, 3, 4, 3, 2, 0, 0, 0]]


@pytest.mark.parametrize("declared", [False, True])
def test_decoding_leaves_special_tokens_out(tmp_path, declared):
    tokenizer = load_tokenizer(_other(tmp_path, ("<pad>", "<s>", "</s>"), declared))
    assert tokenizer.decode([0, 1, 3, 0, 4, 2, 3]) == "a b"


def test_without_padding_the_end_is_repeated(tmp_path):
    """As in CLIP's tokenizer."""
    tokenizer = load_tokenizer(_other(tmp_path, ("<s>", "</s>")))
    start, end = tokenizer.bos_id, tokenizer.eos_id
    assert tokenizer.encode(["a"], 5).tolist() == [[start, tokenizer.tokenizer.token_to_id("a"), end, end, end]]
    assert tokenizer.decode(tokenizer.encode(["a b"], 6)[0]) == "a b"


def test_without_a_beginning_there_is_none(tmp_path):
    """As in T5's tokenizer. The end stays when the text is cut."""
    tokenizer = load_tokenizer(_other(tmp_path, ("<pad>", "</s>")))
    a, b = (tokenizer.tokenizer.token_to_id(token) for token in "ab")
    assert tokenizer.encode(["a b a b"], 3).tolist() == [[a, b, tokenizer.eos_id]]


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    missing = r"<eos>, <\|endoftext\|>, </s>, \[SEP\]"
    with pytest.raises(UserError, match=rf"tokenizer\.json has none of the tokens {missing} to end a text"):
        load_tokenizer(_other(tmp_path, ("<pad>", "<s>")))


def test_unusable_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read \(No such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")


def test_a_vocabulary_below_the_bytes():
    with pytest.raises(UserError, match="a vocabulary of 258 tokens is too small: 259"):
        train_tokenizer(TEXTS, 258)


SPECIALS = ("<|unk|>", "<|im_start|>", "<|im_end|>", "<eos>")


def beside(tmp_path, settings, specials=SPECIALS):
    path = _other(tmp_path, specials)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_what_lies_beside_the_file_names_the_special_tokens_and_the_chat_template(tmp_path):
    """A string or as transformers writes an AddedToken; without it the usual names decide."""
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<|unk|>",
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
        "model_max_length": 2048,
    }
    tokenizer = load_tokenizer(beside(tmp_path, settings))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (
        0,
        1,
        2,
        "{{ messages }}",
    )
    assert load_tokenizer(beside(tmp_path, settings | {"add_bos_token": False})).bos_id is None
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 3


@pytest.mark.parametrize("adds", [False, True])
def test_where_nobody_says_whether_the_beginning_is_added_the_post_processor_does(tmp_path, adds):
    path = beside(tmp_path, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": None})
    if adds:
        file = tokenizers.Tokenizer.from_file(str(path))
        start = ("<|im_start|>", 1)
        file.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[start])
        file.save(str(path))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (2, 1 if adds else None, 2)


def test_a_template_may_stand_in_a_file_of_its_own_or_be_one_of_several(tmp_path):
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    path = beside(tmp_path, {"chat_template": several})
    assert load_tokenizer(path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert load_tokenizer(path).chat_template == "j"


def test_a_saved_tokenizer_keeps_what_its_file_cannot_say_and_nothing_else(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    changed = replace(trained, bos_id=None, eos_id=5, chat_template="{{ 'grün' }}")
    changed.save(path)
    assert load_tokenizer(path).same(changed) and not load_tokenizer(path).same(trained)
    assert load_tokenizer(path).chat_template == changed.chat_template
    trained.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert load_tokenizer(path).same(trained)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tokenizer_config\.json is damaged"),
        ("[]", r"tokenizer_config\.json is damaged"),
        ('{"eos_token": "<none>"}', r"the eos_token of tokenizer_config\.json is '<none>', which .* does not have"),
        ('{"chat_template": 3}', r"the chat_template of .*tokenizer_config\.json is 3: it must be a str"),
    ],
)
def test_what_lies_beside_the_file_is_refused_by_name(trained, tmp_path, content, message):
    trained.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "tokenizer.json")
