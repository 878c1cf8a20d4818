import io
import itertools
import shutil

import numpy as np
import PIL.Image
import pytest

from vlm_jax.contract import Input
from vlm_jax.data import (
    Caption,
    Data,
    Image,
    Text,
    evaluation_batches,
    example,
    make_tokenizer,
    open_source,
    train_batches,
    train_tokenizer,
)
from vlm_jax.data.picture import Picture
from vlm_jax.errors import UserError

DIGITS = Data(name="digits")
PLAIN = Data(name="openmoji", text=Text(vocab_size=400))
AUGMENTED = Data(
    name="openmoji",
    train="train[:50]",
    fields=(Image(crop_min_area=0.5, flip=True), Caption()),
    text=Text(vocab_size=400),
)
GREY = {"image": Input((8, 8, 1), "uint8", 17), "label": Input((), "int32", 10)}
RGB = {"image": Input((16, 16, 3), "uint8", 256)}
CAPTIONED = RGB | {"tokens": Input((12,), "int32", 400)}


def _train(source, data, inputs, tokenizer=None, *, batch_size, start=0, stop, rows=None, seed=0):
    rows = np.arange(batch_size) if rows is None else rows
    span = {"rows": rows, "start": start, "stop": stop}
    return list(train_batches([source], data, inputs, tokenizer, batch_size=batch_size, seed=seed, **span))


def _assert_equal(one, other):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def _picture(image):
    encoded = io.BytesIO()
    PIL.Image.fromarray(image).save(encoded, "png")
    return Picture(encoded.getvalue(), "record 0")


def _stored(source):
    """The images of digits as the loader gives them."""
    return [record["image"].pixels(1).tobytes() for record in source]


def _images(batches):
    return [image.tobytes() for batch in batches for image in batch["image"]]


@pytest.fixture(scope="module")
def emoji(data_dir):
    return open_source("openmoji", AUGMENTED.train, data_dir)


@pytest.fixture(scope="module")
def tokenizer(data_dir):
    return make_tokenizer(AUGMENTED, [open_source("openmoji", AUGMENTED.train, data_dir)])


class Counted:
    """A source that writes down which records are read."""

    def __init__(self, source):
        self.source, self.keys, self.read = source, source.keys, []

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.read.append(index)
        return self.source[index]


def test_fields(data_dir, emoji, tokenizer):
    (batch,) = _train(emoji, AUGMENTED, CAPTIONED, tokenizer, batch_size=4, stop=1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "image": ((4, 16, 16, 3), np.uint8),
        "tokens": ((4, 12), np.int32),
    }
    (batch,) = _train(open_source("digits", "test", data_dir), DIGITS, GREY, batch_size=4, stop=1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "image": ((4, 8, 8, 1), np.uint8),
        "label": ((4,), np.int32),
    }


def test_any_step_can_be_the_first(emoji, tokenizer):
    whole = _train(emoji, AUGMENTED, CAPTIONED, tokenizer, batch_size=16, stop=8)
    for start in (1, 3, 7):
        later = _train(emoji, AUGMENTED, CAPTIONED, tokenizer, batch_size=16, start=start, stop=8)
        for one, other in zip(later, whole[start:], strict=True):
            _assert_equal(one, other)
    assert _train(emoji, AUGMENTED, CAPTIONED, tokenizer, batch_size=16, start=8, stop=8) == []


HOSTS = {
    "2, one after the other": np.arange(16).reshape(2, 8),
    "2, interleaved": np.arange(16).reshape(4, 2, 2).swapaxes(0, 1).reshape(2, 8),
    "4, with gaps": np.arange(16).reshape(4, 4).T,
}


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
def test_hosts_read_their_rows_of_the_same_batch(emoji, tokenizer, hosts):
    whole = _train(emoji, AUGMENTED, CAPTIONED, tokenizer, batch_size=16, start=2, stop=5)
    for rows in hosts:
        part = _train(emoji, AUGMENTED, CAPTIONED, tokenizer, batch_size=16, start=2, stop=5, rows=rows)
        for mine, batch in zip(part, whole, strict=True):
            _assert_equal(mine, {name: array[rows] for name, array in batch.items()})


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
def test_hosts_read_their_rows_of_an_evaluation_and_no_others(data_dir, hosts):
    """The last of two batches has 4 examples: a host all of whose rows lie behind them reads the last one."""
    source = open_source("digits", "test[:20]", data_dir)
    whole = list(evaluation_batches(source, DIGITS, GREY, None, batch_size=16))
    assert [valid for _, valid in whole] == [16, 4]
    for rows in hosts:
        counted = Counted(source)
        part = list(evaluation_batches(counted, DIGITS, GREY, None, batch_size=16, rows=rows))
        assert [valid for _, valid in part] == [16, 4]
        for (mine, _), (batch, _) in zip(part, whole, strict=True):
            _assert_equal(mine, {name: array[rows] for name, array in batch.items()})
        assert set(counted.read) == {*rows, *np.minimum(rows + 16, 19)}


def test_nothing_but_the_rows_is_read(data_dir):
    source = Counted(open_source("digits", "train", data_dir))
    _train(source, DIGITS, GREY, batch_size=64, rows=np.array([3, 16, 17, 60]), start=1000, stop=1001)
    assert len(source.read) == 4


def test_an_epoch_is_a_permutation_and_the_next_is_another(data_dir):
    source = open_source("digits", "train[:50]", data_dir)
    images = _images(_train(source, DIGITS, GREY, batch_size=8, stop=19))  # 152 examples: batches straddle the epochs
    epochs = [images[:50], images[50:100], images[100:150]]
    stored = set(_stored(source))
    for epoch in epochs:
        assert len(epoch) == 50
        assert set(epoch) == stored
    for one, other in itertools.combinations([*epochs, _stored(source)], 2):
        assert one != other


def test_images_and_labels_stay_together(data_dir):
    source = open_source("digits", "test", data_dir)
    labels = {record["image"].pixels(1).tobytes(): record["label"] for record in source}
    for batch in _train(source, DIGITS, GREY, batch_size=32, stop=3):
        assert [labels[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()


def test_a_batch_larger_than_the_data_set(data_dir):
    images = _images(_train(open_source("digits", "train[:10]", data_dir), DIGITS, GREY, batch_size=64, stop=1))
    assert sorted(images.count(image) for image in set(images)) == [6] * 6 + [7] * 4


def test_seeds_differ(data_dir):
    source = open_source("digits", "train", data_dir)
    batches = [_images(_train(source, DIGITS, GREY, batch_size=32, stop=1, seed=seed)) for seed in (0, 1, 2**32 - 1)]
    for one, other in itertools.combinations(batches, 2):
        assert one != other
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"the seed is {seed}: it must lie in"):
            _train(source, DIGITS, GREY, batch_size=32, stop=1, seed=seed)


def test_each_visit_of_an_image_has_its_own_augmentation(data_dir):
    source = open_source("openmoji", "train[:1]", data_dir)
    crops = Data(name="openmoji", fields=(Image(crop_min_area=0.5),))
    assert len(set(_images(_train(source, crops, RGB, batch_size=16, stop=1)))) == 16
    flips = Data(name="openmoji", fields=(Image(flip=True),))
    assert len(set(_images(_train(source, flips, RGB, batch_size=16, stop=1)))) == 2
    assert len(set(_images(_train(source, PLAIN, RGB, batch_size=16, stop=1)))) == 1


def test_without_crops_training_sees_the_centre_too():
    record = {"image": _picture(np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8))}
    rng = np.random.default_rng(0)
    _assert_equal(example(record, PLAIN, RGB, None, rng), example(record, PLAIN, RGB, None, None))


def test_training_chooses_among_the_captions_and_evaluation_takes_the_first(tokenizer):
    record = {"image": _picture(np.zeros((16, 16, 3), np.uint8)), "text": ("dog", "cat", "horse")}
    rng = np.random.default_rng(0)
    chosen = [tokenizer.decode(example(record, AUGMENTED, CAPTIONED, tokenizer, rng)["tokens"]) for _ in range(600)]
    assert all(160 < chosen.count(caption) < 240 for caption in ("dog", "cat", "horse"))
    assert tokenizer.decode(example(record, AUGMENTED, CAPTIONED, tokenizer, None)["tokens"]) == "dog"


def test_an_image_without_captions(tokenizer):
    record = {"image": _picture(np.zeros((16, 16, 3), np.uint8)), "text": (), "record": "record 7 of birds"}
    assert set(example(record, AUGMENTED, RGB, None, None)) == {"image"}
    with pytest.raises(UserError, match="record 7 of birds has no text: leave it out"):
        example(record, AUGMENTED, CAPTIONED, tokenizer, None)


@pytest.mark.parametrize("batch_size", [7, 30, 64])
def test_evaluation_covers_all_examples_in_order(data_dir, batch_size):
    source = open_source("digits", "test[:30]", data_dir)
    stored = _stored(source)
    images, sizes = [], []
    for batch, valid in evaluation_batches(source, DIGITS, GREY, None, batch_size=batch_size):
        rows = _images([batch])
        assert len(rows) == batch_size
        assert set(rows[valid:]) <= {stored[-1]}
        images += rows[:valid]
        sizes.append(valid)
    assert images == stored
    assert len(sizes) == -(-30 // batch_size)


def test_evaluation_does_not_augment(emoji, tokenizer):
    ((batch, _),) = evaluation_batches(emoji, AUGMENTED, CAPTIONED, tokenizer, batch_size=50)
    for index, record in enumerate(emoji):
        plain = example(record, PLAIN, CAPTIONED, tokenizer, None)
        _assert_equal({name: array[index] for name, array in batch.items()}, plain)


def test_a_damaged_record_stops_training_with_its_message(data_dir, tmp_path):
    shutil.copytree(open_source("digits", "test", data_dir).directory, tmp_path / "digits" / "1.0.0")
    (shard,) = (tmp_path / "digits" / "1.0.0").glob("digits-test*")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"record \d+ of digits, split test"):
        _train(open_source("digits", "test", tmp_path), DIGITS, GREY, batch_size=4, stop=1)


def test_an_image_that_cannot_be_used_stops_training_with_its_message():
    record = {"image": Picture(b"", "record 3 of birds")}
    with pytest.raises(UserError, match=r"^record 3 of birds has an image that cannot be used \("):
        example(record, DIGITS, GREY, None, None)


def test_scaled_digits_have_the_levels_of_digits(data_dir):
    larger = {"image": Input((12, 12, 1), "uint8", 17)}
    source = open_source("digits", "test[:50]", data_dir)
    ((batch, _),) = evaluation_batches(source, DIGITS, larger, None, batch_size=50)
    assert batch["image"].max() == 16


def test_make_tokenizer(data_dir, tokenizer, tmp_path):
    digits, emoji = (open_source(name, "train", data_dir) for name in ("digits", "openmoji"))
    assert make_tokenizer(DIGITS, [digits]) is None
    assert tokenizer.vocab_size == 400

    tokenizer.save(tmp_path / "tokenizer.json")
    text = Text(vocab_size=400, tokenizer=str(tmp_path / "tokenizer.json"))
    loaded = make_tokenizer(Data(name="openmoji", text=text), [emoji])
    np.testing.assert_array_equal(loaded.encode(["woman"], 8), tokenizer.encode(["woman"], 8))

    wordless = Data(name="digits", text=Text(vocab_size=400))
    with pytest.raises(UserError, match="digits has no captions to train a tokenizer on"):
        make_tokenizer(wordless, [digits])


@pytest.mark.parametrize("train", ["train[:1]", "train[7:20]"])
def test_the_tokenizer_is_trained_on_the_training_captions(data_dir, train):
    data = Data(name="openmoji", train=train, text=Text(vocab_size=300))
    source = open_source("openmoji", train, data_dir)
    captions = [text for record in source for text in record["text"]]
    expected = train_tokenizer(captions, 300)
    assert expected.vocab_size > 259
    assert make_tokenizer(data, [source]).tokenizer.to_str() == expected.tokenizer.to_str()
