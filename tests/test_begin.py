"""A run that begins with another's variables: from the command to the checkpoint, and on when the other is gone."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlm_jax
from experiments import run
from experiments.clip import clip_tiny
from experiments.presets import from_command_line
from vlm_jax.begin import facts_of_starts, tokenizer_of_starts
from vlm_jax.data import train_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, from_record
from vlm_jax.sharding import MeshShape
from vlm_jax.start import Start
from vlm_jax.trees import leaves_by_path
from vlm_jax.workdir import read_record, read_tokenizer, write_tokenizer


def settings(source: Path, workdir: Path, start: Start | None, **changes: Any) -> Experiment:
    """Of a run like the source's that changes nothing: its learning rate is zero."""
    old = from_record(read_record(source))
    optimizer = replace(old.training.optimizer, learning_rate=0.0, weight_decay=0.0)
    training = replace(old.training, optimizer=optimizer, steps=1, seed=5, **changes.pop("training", {}))
    starts = () if start is None else (start,)
    data = replace(old.data, name=old.data.name.partition(":")[0], validation=None)
    return replace(old, training=training, start=starts, workdir=str(workdir), data=data, **changes)


def params(workdir: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(vlm_jax.load(workdir).variables["params"]).items()}


@pytest.fixture(scope="module")
def tuned(clip_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Experiment]:
    """A run begun with both towers of another on a mesh of another shape, one of them frozen."""
    directory = tmp_path_factory.mktemp("tuned")
    source = shutil.copytree(clip_run, directory / "source")
    mesh = {"mesh": MeshShape(data=2, fsdp=2, tensor=2)}
    start = Start(workdir=str(source))
    experiment = settings(source, directory / "run", start, frozen=("^image/",), training=mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_tokenizer", None)  # none is trained
        run.run("clip-tiny", experiment)
    return source, directory / "run", experiment


def test_values_are_bit_equal_on_another_mesh(tuned: tuple) -> None:
    source, workdir, _ = tuned
    expected, found = params(source), params(workdir)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_the_tokenizer_is_the_others(tuned: tuple) -> None:
    source, workdir, _ = tuned
    assert (workdir / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_the_same_command_goes_on_when_the_other_is_gone(tuned: tuple, tmp_path: Path) -> None:
    """And what another directory gave is a fact of the run: the place may change, not what was there."""
    source, _, experiment = tuned
    moved = source.rename(tmp_path / "moved")
    try:
        run.run("clip-tiny", experiment)
        run.run("clip-tiny", replace(experiment, start=(Start(workdir=str(moved)),)))
        for start, message in (
            (Start(workdir=str(tmp_path / "nowhere")), r"nowhere is not the directory of a run"),
            (Start(workdir=str(moved), leave=("log_scale",)), r'another .*start\.0\.leave: \[\] -> \["log_scale"\]'),
            (Start(workdir=str(moved), step=2), r"another .*taken\.0\.digest: \S+ -> \S+; taken\.0\.step: 3 -> 2"),
        ):
            with pytest.raises(UserError, match=message):
                run.run("clip-tiny", replace(experiment, start=(start,)))
    finally:
        moved.rename(source)


@pytest.mark.slow
def test_averages_are_taken_where_they_were_kept(vae_run: Path, tmp_path: Path) -> None:
    start = Start(workdir=str(vae_run), step=4)
    run.run("vae-tiny", settings(vae_run, tmp_path / "run", start, training={"ema_decay": None}))
    expected = leaves_by_path(vlm_jax.load(vae_run, step=4).variables["params"])
    for path, value in params(tmp_path / "run").items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_a_source_of_other_settings_is_refused_and_leaves_no_directory(clip_run: Path, tmp_path: Path) -> None:
    experiment = settings(clip_run, tmp_path / "run", Start(workdir=str(clip_run)))
    tower = replace(experiment.model.image.transformer, norm_eps=1e-5)
    model = replace(experiment.model, image=replace(experiment.model.image, transformer=tower))
    with pytest.raises(UserError, match=r"\(image\.transformer\.norm_eps: 1e-06 -> 1e-05\)"):
        run.run("clip-tiny", replace(experiment, model=model))
    assert not (tmp_path / "run").exists()


def test_a_frozen_tower_that_no_start_fills_is_refused(clip_run: Path, tmp_path: Path) -> None:
    experiment = settings(clip_run, tmp_path / "run", None, frozen=("^image/",))
    with pytest.raises(UserError, match=r"nothing fills image/\S+; .* and \d+ more, which are frozen"):
        run.run("clip-tiny", experiment)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_another_tokenizer_than_that_of_the_text_tower_is_refused(clip_run: Path, tmp_path: Path) -> None:
    train_tokenizer(["a red circle"], 300).save(tmp_path / "tokenizer.json")
    whole = settings(clip_run, tmp_path / "run", Start(workdir=str(clip_run)))
    text = replace(whole.data.text, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"the tokenizers of \S+ and \S+tokenizer\.json differ, and"):
        run.run("clip-tiny", replace(whole, data=replace(whole.data, text=text)))


def test_a_chat_template_comes_with_the_tokenizer_or_from_one_of_the_same_tokens(
    clip_run: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(clip_run, tmp_path / "source")
    plain = read_tokenizer(source)
    write_tokenizer(source, replace(plain, chat_template="theirs"))
    begun = settings(source, tmp_path / "run", Start(workdir=str(source)))
    found = tokenizer_of_starts(begun)
    assert found is not None and found.same(plain) and found.chat_template == "theirs"
    write_tokenizer(tmp_path, found)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    replace(plain, chat_template="ours").save(tmp_path / "tokenizer.json")
    text = replace(begun.data.text, tokenizer=str(tmp_path / "tokenizer.json"))
    found = tokenizer_of_starts(replace(begun, data=replace(begun.data, text=text)))
    assert found is not None and found.chat_template == "ours"
    replace(plain, bos_id=None).save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json differ, and"):
        tokenizer_of_starts(replace(begun, data=replace(begun.data, text=text)))


def test_the_image_tower_knows_no_tokens(clip_run: Path, tmp_path: Path) -> None:
    image = Start(workdir=str(clip_run), take="image", into="image")
    experiment = settings(clip_run, tmp_path / "run", image)
    assert run.tokenizer_of_starts(experiment) is None
    assert run.tokenizer_of_starts(replace(experiment, start=(replace(image, take="text", into="text"),))) is not None


def test_a_source_without_a_checkpoint_is_refused(clip_run: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    shutil.copy(clip_run / "config.json", tmp_path / "source")
    experiment = settings(clip_run, tmp_path / "run", Start(workdir=str(tmp_path / "source")))
    with pytest.raises(UserError, match="source has no checkpoint yet"):
        facts_of_starts(experiment, tmp_path / "run")


def test_the_command_line_names_what_to_begin_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """One flag for the whole model of any preset; one for each start of a preset that has some."""
    started = []
    monkeypatch.setattr(run, "run", lambda preset, experiment: started.append(experiment))
    monkeypatch.setattr(sys, "argv", ["run", "vae-tiny", "--init-from", "runs/old", "--steps", "3"])
    run.main()
    assert started[0].start == (Start(workdir="runs/old"),) and started[0].training.steps == 3

    def preset() -> Experiment:
        starts = (Start(workdir=f"runs/{name}", take=name, into=name) for name in ("image", "text"))
        return replace(clip_tiny(), start=tuple(starts))

    monkeypatch.setattr("experiments.presets.functions", lambda _="": iter([("mine", preset)]))
    monkeypatch.setattr(sys, "argv", ["run", "mine", "--start.1.workdir", "runs/c", "--optimizer.learning-rate", "1.0"])
    _, options = from_command_line("run", "Trains.", lambda preset: run.Options(experiment=preset))
    assert [start.workdir for start in options.experiment.start] == ["runs/image", "runs/c"]
    assert options.experiment.training.optimizer.learning_rate == 1.0
