"""Packed rows: every document once, whole, in little room; and mixtures of data sets that any host reads alike."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from made import build
from vlm_jax.contract import Input
from vlm_jax.data import (
    Data,
    Dialogue,
    Document,
    Image,
    Text,
    VisualCaption,
    VisualQuestion,
    evaluation_batches,
    examples,
    make_tokenizer,
    open_data,
    open_training_data,
    rows_of,
    train_batches,
    versions,
)
from vlm_jax.data.conversation import LINE, V1
from vlm_jax.data.packing import plan
from vlm_jax.errors import UserError

LENGTH = 48
INPUTS = {
    "tokens": Input((LENGTH,), "int32", 400),
    "target": Input((LENGTH,), "bool"),
    "segment": Input((LENGTH,), "int32", LENGTH + 1),
}
WEIGHT = 0.5
DATA = Data(
    name="openmoji",
    mixture=(("easy_vqa", WEIGHT),),
    train="train[:600]",
    fields=(Dialogue(), Document()),
    pack=True,
    text=Text(vocab_size=400),
)
LENGTHS = np.random.default_rng(0).geometric(0.1, 5000).clip(2, LENGTH)


@pytest.fixture(scope="module")
def sources(data_dir):
    return open_training_data(DATA, INPUTS, data_dir)


@pytest.fixture(scope="module")
def tokenizer(sources):
    return make_tokenizer(DATA, sources)


@pytest.fixture(scope="module")
def sets(sources, tokenizer):
    return [rows_of(source, DATA, INPUTS, tokenizer, seed=3) for source in sources]


def train(sets, data=DATA, *, start=0, stop, rows=None, batch_size=16) -> list[dict]:
    span = {"rows": np.arange(batch_size) if rows is None else rows, "start": start, "stop": stop}
    return list(train_batches(sets, data, INPUTS, None, batch_size=batch_size, seed=5, **span))


def documents(batches) -> list[bytes]:
    """The tokens of each document of each row."""
    return [
        tokens[segment == number].tobytes()
        for batch in batches
        for tokens, segment in zip(batch["tokens"], batch["segment"], strict=True)
        for number in range(1, segment.max() + 1)
    ]


@pytest.mark.parametrize("window", [1, 7, 4096, 10_000])
def test_a_plan_holds_every_document_once_and_no_row_more_than_fits(window: int) -> None:
    rows = plan(LENGTHS, LENGTH, seed=0, window=window)
    assert sorted(document for row in rows for document in row) == list(range(len(LENGTHS)))
    assert max(LENGTHS[row].sum() for row in rows) <= LENGTH


def test_a_plan_wastes_hardly_anything() -> None:
    rows = plan(LENGTHS, LENGTH, seed=0)
    assert 1 <= len(rows) * LENGTH / LENGTHS.sum() < 1.01


def test_of_the_rows_with_room_the_fullest_is_taken() -> None:
    """Three tokens fit both beside seven and beside six of ten."""
    rows = plan(np.array([7, 6, 3]), 10, seed=0)
    assert sorted(map(sorted, rows)) == [[0, 2], [1]]


@pytest.mark.parametrize("window", [7, 10_000])
def test_a_plan_keeps_to_the_images_that_a_row_takes(window: int) -> None:
    """Of documents with one image or two, beside some without, which fill what is left."""
    images = np.random.default_rng(1).choice([0, 1, 2], len(LENGTHS))
    rows = plan(LENGTHS, LENGTH, seed=0, window=window, images=images, most=3)
    assert sorted(document for row in rows for document in row) == list(range(len(LENGTHS)))
    assert max(LENGTHS[row].sum() for row in rows) <= LENGTH
    assert max(images[row].sum() for row in rows) == 3
    assert len(rows) < (1.15 if window > 4096 else 1.6) * images.sum() / 3  # few fit beside few


def test_a_plan_follows_from_its_seed() -> None:
    assert plan(LENGTHS, LENGTH, seed=1) == plan(LENGTHS, LENGTH, seed=1) != plan(LENGTHS, LENGTH, seed=2)


def test_rows_hold_the_documents_of_the_records_one_after_the_other(sources, sets, tokenizer) -> None:
    captions, questions = sets
    expected = Counter(
        bytes(tokenizer.encode([text], LENGTH)[0][: len(tokenizer.tokenizer.encode(text).ids) + 2].tobytes())
        for text in sources[0].texts()
    )
    rows = [captions[index] for index in range(len(captions))]
    stacked = {name: np.stack([row[name] for row in rows]) for name in INPUTS}
    assert Counter(documents([stacked])) == expected
    assert (stacked["tokens"][stacked["segment"] == 0] == tokenizer.pad_id).all()
    assert not stacked["target"][stacked["segment"] == 0].any()
    assert captions.waste == pytest.approx((stacked["segment"] == 0).mean()) and captions.waste < 0.05
    summary = f"{sum(expected.values()):,} documents of openmoji, train[:600]: {len(captions)} rows of 48 tokens, "
    assert str(captions).startswith(summary) and str(captions).endswith("% of them padding")
    # Of a question nothing is predicted; the answer and the end are.
    row = questions[0]
    answers = {tokenizer.decode(row["tokens"][(row["segment"] == n) & row["target"]]) for n in row["segment"] if n}
    assert answers <= {strings["answer"] for strings in sources[1].strings()}


def test_the_rows_follow_from_the_seed(sources, sets, tokenizer) -> None:
    again, other = (rows_of(sources[0], DATA, INPUTS, tokenizer, seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(again[0]["tokens"], sets[0][0]["tokens"])
    assert (other[0]["tokens"] != sets[0][0]["tokens"]).any()


def test_an_epoch_has_each_document_once(sets) -> None:
    """The first data set alone, whose rows fill no whole number of batches."""
    rows, alone = len(sets[0]), Data(name="openmoji", pack=True)
    batches = train(sets[:1], alone, stop=2 * -(-rows // 16))
    flat = {name: np.concatenate([batch[name] for batch in batches]) for name in INPUTS}
    stored = Counter(documents([{name: np.stack([sets[0][i][name] for i in range(rows)]) for name in INPUTS}]))
    first, second = ({name: array[rows * i : rows * (i + 1)] for name, array in flat.items()} for i in (0, 1))
    assert Counter(documents([first])) == Counter(documents([second])) == stored
    assert (first["tokens"] != second["tokens"]).any()


def test_any_number_of_hosts_and_any_start_see_the_same_mixture(sets) -> None:
    whole = train(sets, stop=6)
    for hosts in (np.arange(16).reshape(2, 8), np.arange(16).reshape(4, 4).T):
        for rows in hosts:
            for mine, batch in zip(train(sets, start=2, stop=6, rows=rows), whole[2:], strict=True):
                for name in INPUTS:
                    np.testing.assert_array_equal(mine[name], batch[name][rows])


def test_a_mixture_has_the_proportions_of_its_weights_all_along(sets) -> None:
    """Of easy_vqa half as many rows as of openmoji, however many each has."""
    dialogues = {sets[1][index]["tokens"].tobytes() for index in range(len(sets[1]))}
    batches = train(sets, stop=60)
    shares = [np.mean([tokens.tobytes() in dialogues for tokens in batch["tokens"]]) for batch in batches]
    expected = WEIGHT / (1 + WEIGHT)
    assert np.mean(shares) == pytest.approx(expected, abs=0.01)
    assert np.ptp(shares) <= 2 / 16


def test_the_tokenizer_is_trained_on_all(tokenizer) -> None:
    for word in ("woman", "rectangle"):  # of openmoji and of easy_vqa alone
        assert len(tokenizer.tokenizer.encode(word).ids) < len(word) / 2


def test_a_record_names_the_version_and_counts_the_examples_of_each(sources) -> None:
    named = versions(DATA, sources)
    assert (named.name, named.mixture) == ("openmoji:1.0.0", (("easy_vqa/questions:1.0.0", WEIGHT),))
    counts = {"train": 3331, "test": 400, "easy_vqa/questions:1.0.0": {"train": 38575, "test": 9673}}
    assert examples(sources) == counts


def test_evaluation_has_each_row_once_in_order(data_dir, tokenizer) -> None:
    source = open_data(DATA, "test", INPUTS, data_dir)
    rows = rows_of(source, DATA, INPUTS, tokenizer)
    batches = list(evaluation_batches(rows, DATA, INPUTS, None, batch_size=32))
    flat = np.concatenate([batch["tokens"][:valid] for batch, valid in batches])
    np.testing.assert_array_equal(flat, np.stack([rows[index]["tokens"] for index in range(len(rows))]))


def test_a_document_longer_than_a_row_becomes_several_whose_firsts_are_not_predicted(tmp_path) -> None:
    text = " ".join(str(number) for number in range(60))
    build(tmp_path, {"text": tfds.features.Text()}, {"text": text})
    data = Data(name="made", fields=(Document(),), pack=True, text=Text(vocab_size=300))
    source = open_data(data, "train", INPUTS, tmp_path)
    tokenizer = make_tokenizer(data, [source])
    rows = rows_of(source, data, INPUTS, tokenizer)
    ids = [tokenizer.bos_id, *tokenizer.tokenizer.encode(text).ids, tokenizer.eos_id]
    found = sorted((rows[index] for index in range(len(rows))), key=lambda row: ids.index(row["tokens"][5]))
    assert len(rows) == -(-len(ids) // LENGTH) > 1
    held = [token for row in rows for token in row["tokens"][row["segment"] > 0].tolist()]
    assert sorted(held) == sorted(ids) and found
    for row in (rows[index] for index in range(len(rows))):
        assert row["target"].sum() == (row["segment"] > 0).sum() - 1 and not row["target"][0]


SEES = {**INPUTS, "image": Input((3, 4, 4, 3), "uint8", 256), "image_at": Input((3,), "int32", LENGTH + 1, span=5)}
VISUAL = Data(
    name="openmoji",
    mixture=(("easy_vqa", 1.0),),
    train="train[:40]",
    fields=(VisualQuestion(template=LINE), VisualCaption(template=LINE, image=Image(flip=True))),
    pack=True,
)


@pytest.fixture(scope="module")
def visual(data_dir, tokenizer):
    sources = open_training_data(VISUAL, SEES, data_dir)
    return sources, [rows_of(source, VISUAL, SEES, tokenizer) for source in sources]


def test_packed_rows_hold_what_rows_of_their_own_do(visual, tokenizer) -> None:
    """Of questions about images and of captions: the same tokens and targets, and each its own copy of its image."""
    for source, rows in zip(*visual, strict=True):
        field = VISUAL.fields["question" not in source.keys]
        captions = [len(record.get("text", ())) for record in (source[index] for index in range(len(source)))]
        found = []
        for batch, valid in evaluation_batches(rows, VISUAL, SEES, None, batch_size=4):
            for row in ({name: array[index] for name, array in batch.items()} for index in range(valid)):
                assert row.keys() == SEES.keys()
                for number, place in enumerate(row["image_at"]):
                    if place < LENGTH:
                        inside = row["segment"] == row["segment"][place]
                        start = int(np.argmax(inside))
                        parts = (row["tokens"][inside], row["target"][inside], row["image"][number])
                        found.append((place - start, *(part.tobytes() for part in parts)))
        expected = []
        for index in range(len(source)):
            record = source[index]
            for text in record["text"]:
                one = field.read({**record, "text": (text,)}, SEES, tokenizer, None)
                inside = one["segment"] == 1
                parts = (one["tokens"][inside], one["target"][inside], one["image"][0])
                expected.append((one["image_at"][0], *(part.tobytes() for part in parts)))
        assert len(found) == sum(captions) and Counter(found) == Counter(expected)
        assert rows.records.tolist() == [index for index, count in enumerate(captions) for _ in range(count)]


def test_images_of_packed_rows_are_augmented_anew_at_each_visit_and_alike_on_any_host(visual) -> None:
    span = {"batch_size": 4, "seed": 5, "start": 0, "stop": 12}
    whole, again = (list(train_batches(visual[1], VISUAL, SEES, None, rows=np.arange(4), **span)) for _ in range(2))
    half = list(train_batches(visual[1], VISUAL, SEES, None, rows=np.array([3, 1]), **span))
    seen: dict[bytes, set[bytes]] = {}
    for batch, same, mine in zip(whole, again, half, strict=True):
        for name in SEES:
            np.testing.assert_array_equal(batch[name], same[name])
            np.testing.assert_array_equal(batch[name][[3, 1]], mine[name])
        for tokens, images in zip(batch["tokens"], batch["image"], strict=True):
            seen.setdefault(tokens.tobytes(), set()).add(images.tobytes())
    assert max(map(len, seen.values())) > 1


def test_a_packed_conversation_that_does_not_fit_is_refused_by_name(data_dir, tokenizer) -> None:
    source = open_data(VISUAL, "train[:5]", SEES, data_dir)
    with pytest.raises(
        UserError, match=r"record 0 of openmoji.* is a conversation of \d+ tokens and the model reads 48"
    ):
        rows_of(source, replace(VISUAL, fields=(VisualCaption(template=V1),)), SEES, tokenizer)


def test_what_is_no_text_is_not_packed(data_dir) -> None:
    inputs = {"image": Input((8, 8, 1), "uint8", 17)}
    with pytest.raises(UserError, match=r"data\.pack lays text and its images in rows, and the model reads image"):
        open_data(Data(name="digits", pack=True), "test", inputs, data_dir)
