"""The commands on a model that draws what it is told in words: prompts, and what judges find of the pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from smallest import CONFIGS
from tools.evaluate import evaluate
from tools.sample import Options, sample
from vlm_jax.contract import Input, Model
from vlm_jax.errors import UserError
from vlm_jax.models import build
from vlm_jax.workdir import Loaded

CONTEXT = 8


def paint(_: Any, key: Any, given: Any, *, num: int, temperature: float) -> jax.Array:
    """Of one colour for each text, and grey without."""
    tokens = given.get("tokens", jnp.zeros((num, CONTEXT), jnp.int32))
    colour = jnp.stack([tokens.sum(axis=1) * factor % 256 for factor in (1, 3, 7)], axis=-1)
    return jnp.broadcast_to(colour[:, None, None], (num, 32, 32, 3)).astype(jnp.uint8)


@pytest.fixture
def painting(clip_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """What the commands take any other directory for: a painter that was trained on what the CLIP was."""
    clip = vlm_jax.load(clip_run)
    spec = clip.model.inputs["tokens"]._replace(shape=(CONTEXT,))
    model = Model(
        inputs={"image": Input((32, 32, 3), "uint8", 256), "tokens": spec},
        init=lambda *_: {},
        loss=lambda *_, **__: None,
        rules=(),
        conditions={"tokens": spec},
        sample=paint,
    )
    loaded = replace(clip, model=model, variables={})

    def load(workdir: Path, **place: Any) -> Loaded:
        return vlm_jax.load(workdir, **place) if workdir == clip_run else loaded

    for command in ("evaluate", "sample"):
        monkeypatch.setattr(f"tools.{command}.load", load)
    return loaded


@pytest.fixture
def asked(painting: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows of the sheets that the command writes."""
    rows: list[Any] = []
    monkeypatch.setattr("tools.sample.write_sheet", lambda found, out, levels: rows.extend([*found, levels]))
    return rows


def test_prompts_are_drawn_in_turn_an_empty_one_too(painting: Loaded, asked: list[Any], tmp_path: Path) -> None:
    texts = ("red heart", "")
    sample(tmp_path, Options(prompt=texts, num=3, out=tmp_path / "sheet.png"))
    (_, cells), levels = asked
    assert [title for _, title in cells] == ["red heart", "", "red heart"] and levels == 256
    tokens = painting.tokenizer.encode(texts, CONTEXT)
    expected = paint(None, None, {"tokens": jnp.asarray(tokens)}, num=2, temperature=1.0)
    np.testing.assert_array_equal([image for image, _ in cells], np.asarray(expected)[[0, 1, 0]])


def test_a_prompt_that_is_too_long_is_cut_with_a_word(
    painting: Loaded, asked: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "flag " * 9
    sample(tmp_path, Options(prompt=(long, "red heart"), num=4, out=tmp_path / "sheet.png"))
    count = len(painting.tokenizer.tokenizer.encode(long, add_special_tokens=False).ids)
    cut = f"the prompt {long!r} has {count} tokens and the model reads {CONTEXT - 2}: the rest is cut off"
    assert caplog.messages == [cut]
    assert len(asked[0][1]) == 4


def test_so_is_one_that_is_to_find_images_but_no_caption(
    clip_run: Path, asked: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 16 tokens that the CLIP reads, one begins a text and one ends it."""
    options = Options(num=20, split="test[:20]", out=tmp_path / "sheet.png")
    sample(clip_run, options)
    assert not caplog.messages
    sample(clip_run, replace(options, prompt=(" ".join(["flag"] * 15),)))
    (message,) = caplog.messages
    assert message.endswith("has 15 tokens and the model reads 14: the rest is cut off")


def test_a_sheet_of_a_model_that_reads_latents_is_of_what_it_draws(
    painting: Loaded, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"latent": Input((4, 4, 2), "float32"), "tokens": painting.model.inputs["tokens"]}
    latent = replace(painting, model=replace(painting.model, inputs=inputs))
    monkeypatch.setattr("tools.sample.load", lambda workdir, **_: latent)
    sample(tmp_path, Options(prompt=("red heart",), num=1, out=tmp_path / "sheet.png"))
    assert len(asked[0][1]) == 1 and asked[-1] == 256


@pytest.mark.slow
def test_pictures_of_captions_are_measured_by_a_judge(painting: Loaded, clip_run: Path, tmp_path: Path) -> None:
    """The real images find what the judge itself retrieves, and what is drawn of one colour is no emoji."""
    out = tmp_path / "eval.json"
    results = evaluate(tmp_path, split="test[:40]", judge=(clip_run,), only=("generation",), batch_size=16, out=out)
    assert results == json.loads(out.read_text()) and results["generation_judge"] == str(clip_run)
    own = evaluate(clip_run, split="test[:40]", only=("retrieval",), out=tmp_path / "own.json")
    for k in (1, 5, 10):
        assert results[f"generation/real_recall@{k}"] == own[f"retrieval/image_to_text_recall@{k}"]
        assert k / 41 <= results[f"generation/chance_recall@{k}"] < (k + 1) / 40
    assert results["generation/captions"] == 40
    assert sum(value for name, value in results.items() if name.startswith("generation/captions_")) == 40
    assert results["generation/near_copies"] == 0 and results["generation/borders_of_4"] is None
    assert results["generation/real_borders_of_4"] == pytest.approx(1, abs=0.2)
    assert results["generation/distance_of_embeddings"] > 0


def test_a_judge_that_reads_nothing_says_what_it_can(
    painting: Loaded, clip_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mute(workdir: Path, **place: Any) -> Loaded:
        loaded = vlm_jax.load(workdir, **place)
        return replace(loaded, model=replace(loaded.model, embed_text=None))

    monkeypatch.setattr("tools.judging.load", mute)
    options: dict[str, Any] = {"split": "test[:8]", "judge": (clip_run,), "out": tmp_path / "eval.json"}
    results = evaluate(tmp_path, **options)
    assert results["frechet/samples"] == 8 and not any("generation" in name for name in results)
    with pytest.raises(UserError, match="generation"):
        evaluate(tmp_path, **options, only=("generation",))


@pytest.mark.slow
def test_a_trajectory_goes_from_noise_to_the_picture_and_a_prompt_draws_the_same_whatever_is_beside_it(
    painting: Loaded, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model of latents, whose states are decoded."""
    model = build(CONFIGS["latent diffusion of texts"])
    spec = model.conditions["tokens"]
    variables = model.init(
        jax.random.key(0), {"image": np.zeros((1, 2, 2, 3), np.uint8), "tokens": np.int32([[1, 2, 0]])}
    )
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    latent = replace(painting, model=model, variables=variables)
    words = {"a": [1, 2, 0], "b": [3, 4, 2]}
    monkeypatch.setattr(
        type(painting.tokenizer),
        "encode_prompts",
        lambda self, texts, length: np.int32([words[text] for text in texts]).reshape(-1, *spec.shape),
    )
    monkeypatch.setattr("tools.sample.load", lambda workdir, **_: latent)
    options = Options(prompt=("a", "b"), num=2, trajectory=True, out=tmp_path / "sheet.png")
    sample(tmp_path, options)
    *rows, levels = asked
    assert [title for title, _ in rows] == ["a", "b"] and levels == 3
    assert [label for _, label in rows[0][1]] == ["step 0", "step 1", "step 2", "step 3", "step 4"][-len(rows[0][1]) :]
    whole = [cells[-1][0] for _, cells in rows]
    asked.clear()
    sample(tmp_path, replace(options, num=5, trajectory=False))
    ((_, cells), _) = asked
    for mine, (again, _) in zip(whole, cells, strict=False):
        assert np.abs(mine.astype(int) - again).max() <= 1


def test_a_trajectory_of_what_draws_in_no_steps_is_refused(painting: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--trajectory shows the steps of a solver, and this model draws in none"):
        sample(tmp_path, Options(trajectory=True, num=1, out=tmp_path / "sheet.png"))
