"""What a run looks at as it trains: evaluations of a few examples, samples on a sheet, and what it refuses."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeing

from experiments.presets import presets
from experiments.run import run
from vlm_jax.contract import Input, Model
from vlm_jax.errors import UserError
from vlm_jax.evals import EVALUATIONS, Subject
from vlm_jax.train.watch import Interrupted, Moment
from vlm_jax.watch import HeldOut, Watch, evaluating, tiled, watchers

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 1, 4, 1), np.uint8)
TOKENS = np.where(np.arange(10)[:, None] % 2, 255, IMAGES[:, 0, :, 0]).astype(np.int32)
"""Every second text is its image's, and the others are of none."""


def embed(variables: Any, value: jax.Array) -> jax.Array:
    vectors = jnp.float32(value.reshape(len(value), -1)) @ variables["params"]["kernel"]
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)


INPUTS = {"image": Input((1, 4, 1), "uint8", 256), "tokens": Input((4,), "int32", 256)}
MODEL = Model(inputs=INPUTS, init=lambda *_: {}, loss=lambda *_: None, rules=(), embed_image=embed, embed_text=embed)


def batches(size: int = 4) -> Iterator[tuple[dict[str, jax.Array], int]]:
    for first in range(0, 10, size):
        rows = np.minimum(np.arange(first, first + size), 9)
        yield {"image": jnp.asarray(IMAGES[rows]), "tokens": jnp.asarray(TOKENS[rows])}, min(size, 10 - first)


class Numbers:
    """A tokenizer whose texts are the numbers of rows."""

    def encode(self, texts: list[str], length: int) -> np.ndarray:
        return TOKENS[[int(text) for text in texts], :length]


def records(count: int = 10) -> Iterator[dict[str, Any]]:
    return iter([{"captions": (str(index),)} for index in range(count)])


HELD_OUT: Any = HeldOut(batches=batches, examples=10, tokenizer=Numbers(), records=records)
MOMENT = Moment({"params": {"kernel": jnp.eye(4)}}, jax.random.key(0), lambda: False)


@pytest.mark.parametrize("examples", [3, 4, 7, 10, 256])
def test_evaluations_are_of_the_first_examples(examples: int) -> None:
    """As the evaluation itself finds of these alone, wherever a batch ends."""
    (retrieval,) = (each for each in EVALUATIONS if each.name == "retrieval")
    count = min(examples, 10)
    few = ({"image": jnp.asarray(IMAGES[:count]), "tokens": jnp.asarray(TOKENS[:count])}, count)
    alone: Any = Subject(
        model=MODEL,
        variables=MOMENT.variables,
        batches=lambda: iter([few]),
        examples=count,
        tokenizer=Numbers(),
        records=lambda: records(count),
    )
    seen = evaluating(Watch(evaluations=("retrieval",), examples=examples), MODEL, HELD_OUT)(MOMENT)
    assert seen == {f"retrieval/{name}": value for name, value in retrieval.run(alone).items()}
    assert 0 < seen["retrieval/image_to_text_recall@1"] < 1 or count < 7


def test_what_a_model_that_sees_writes_is_of_the_first_examples_too() -> None:
    """Two of a batch of three, though the split has five: of picture 0 it says red, of picture 1 no."""
    examples = [(0, "what?", "red"), (1, "what?", "blue"), *[(1, "what?", "no")] * 3]
    whole = seeing.subject(examples, ["red", "no"], "no", records=lambda: iter([{}] * 5))
    held_out: Any = HeldOut(
        batches=whole.batches,
        examples=5,
        tokenizer=whole.tokenizer,
        records=whole.records,
        written={"questions": whole.questions},
    )
    seen = evaluating(Watch(evaluations=("vqa",), examples=2), whole.model, held_out)(MOMENT)
    assert (seen["vqa/exact_match"], seen["vqa/blind_exact_match"], seen["vqa/questions_color"]) == (0.5, 0, 2)
    with pytest.raises(UserError, match="names captions, which has nothing to measure here"):
        evaluating(Watch(evaluations=("captions",)), whole.model, held_out)


def test_an_evaluation_ends_where_a_signal_comes() -> None:
    look = evaluating(Watch(evaluations=("retrieval",)), MODEL, HELD_OUT)
    with pytest.raises(Interrupted):
        look(MOMENT._replace(stop=lambda: True))


def test_a_sheet_shows_each_image_in_its_place_the_highest_level_white() -> None:
    images = np.zeros((3, 2, 2, 1), np.uint8)
    images[1, 0, 1], images[2] = 3, 1
    sheet = tiled(images, levels=4)
    scale = len(sheet) // 5
    assert sheet.shape == (5 * scale, 5 * scale, 3) and scale > 50
    grid = sheet[::scale, ::scale]
    np.testing.assert_array_equal(sheet, grid.repeat(scale, axis=0).repeat(scale, axis=1))
    line = np.full(5, 255)
    expected = [[0, 0, 255, 0, 255], [0, 0, 255, 0, 0], line, [85, 85, 255, 255, 255], [85, 85, 255, 255, 255]]
    for channel in range(3):
        np.testing.assert_array_equal(grid[..., channel], expected)


def test_samples_are_drawn_with_the_same_noise_each_time() -> None:
    def sample(variables: Any, key: jax.Array, given: Any, *, num: int, temperature: Any) -> jax.Array:
        noise = jax.random.randint(key, (num, 1, 4, 1), 0, 256)
        return jnp.uint8(variables["params"]["kernel"][0, 0] * noise)

    (look,) = watchers(Watch(sheet=True), replace(MODEL, sample=sample), None)
    first, second = look(MOMENT)["samples"], look(MOMENT)["samples"]
    np.testing.assert_array_equal(first, second)
    drawn = jax.random.randint(MOMENT.key, (16, 1, 4, 1), 0, 256)
    np.testing.assert_array_equal(first, tiled(np.uint8(drawn), 256))


@pytest.mark.parametrize(
    ("watch", "held_out", "message"),
    [
        (Watch(evaluations=("retrieval",)), None, "look at the validation split and there is none: set data.valid"),
        (
            Watch(evaluations=("likelihood",)),
            HELD_OUT,
            "names likelihood, which has nothing to measure here: leave it out",
        ),
        (Watch(evaluations=("zero_shot",)), HELD_OUT, "names zero_shot, which has nothing to measure here"),
        (Watch(sheet=True), HELD_OUT, "watch.sheet shows images and the model draws none: leave it out"),
    ],
)
def test_what_there_is_nothing_to_look_at_for_is_refused(watch: Watch, held_out: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        watchers(watch, MODEL, held_out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"examples": 0}, "watch.examples is 0: it must be at least 1"),
        ({"evaluations": ("retreival",)}, "names retreival, which is none: choose from retrieval, "),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Watch(**fields)


def test_several_processes_are_told_that_they_watch_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert watchers(Watch(evaluations=("retrieval",)), MODEL, HELD_OUT) == ()
    assert "in a run of several processes tools.evaluate and tools.sample do that" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_watches_what_it_is_told(data_dir: Path, tmp_path: Path) -> None:
    preset = presets()["vae-tiny"][1]
    model = replace(preset.model, latent=4, widths=(16,), mixtures=2)
    training = replace(preset.training, steps=4, batch_size=16, checkpoint_every=2)
    watch = Watch(evaluations=("reconstruction",), examples=20, sheet=True)
    data = replace(preset.data, validation="test[:24]")
    experiment = replace(preset, model=model, data=data, training=training, watch=watch)
    run("vae-tiny", replace(experiment, workdir=str(tmp_path), data_dir=str(data_dir)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if any(name.startswith("reconstruction/") for name in line)] == [2, 4]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"\x89PNG") == 2
