"""The record of a run: JSON and back, what may change, who may write."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from experiments.presets import presets
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, ZeroShot, claimed_workdir, differences, from_record, read_record, to_record
from vlm_jax.sharding import MeshShape

PRESETS = {name: experiment for name, (_, experiment) in presets().items()}


@pytest.mark.parametrize("name", PRESETS)
def test_records_read_back_as_the_same_experiment(name: str) -> None:
    """With the end of the schedule, where it has one."""
    experiment = PRESETS[name]
    record = json.loads(json.dumps(to_record(name, experiment)))
    end = None if experiment.optimizer.schedule == "constant" else experiment.steps
    assert from_record(record) == replace(experiment, optimizer=replace(experiment.optimizer, decay_steps=end))


def test_the_seed_the_data_and_the_model_make_another_run_and_the_mesh_does_not() -> None:
    experiment = PRESETS["clip-tiny"]
    record = to_record("clip-tiny", experiment)
    same = replace(experiment, mesh=MeshShape(fsdp=8), workdir="elsewhere", log_every=1, checkpoint_every=7)
    assert differences(record, to_record("clip-tiny", same)) == []
    assert differences(record, to_record("clip-tiny", replace(experiment, seed=1))) == ["seed: 0 -> 1"]
    narrow = replace(experiment, model=replace(experiment.model, embedding=64))
    assert differences(record, to_record("clip-tiny", narrow)) == ["model.embedding: 128 -> 64"]


def test_other_steps_are_another_schedule_unless_its_end_is_stated() -> None:
    """Half of one cosine and half of another is no run that anyone meant."""
    experiment = PRESETS["clip-tiny"]
    longer = replace(experiment, steps=2 * experiment.steps)
    record = to_record("clip-tiny", experiment)
    assert differences(record, to_record("clip-tiny", longer)) == ["optimizer.decay_steps: 400 -> 800"]
    stated = replace(longer, optimizer=replace(experiment.optimizer, decay_steps=experiment.steps))
    assert differences(record, to_record("clip-tiny", stated)) == []


def test_a_directory_belongs_to_a_configuration_from_its_first_checkpoint_on(tmp_path: Path) -> None:
    record = to_record("clip-tiny", PRESETS["clip-tiny"])
    other = to_record("clip-tiny", replace(PRESETS["clip-tiny"], seed=1))
    for claim in (record, other, record):
        with claimed_workdir(tmp_path, claim):
            assert read_record(tmp_path) == claim
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    belongs = r"belongs to another configuration \(seed: 0 -> 1\).*another --workdir"
    with pytest.raises(UserError, match=belongs), claimed_workdir(tmp_path, other):
        pass
    assert read_record(tmp_path) == record
    with claimed_workdir(tmp_path, record):  # the refusal left no lock behind
        pass


def test_a_run_of_an_older_version_that_chose_remat_by_yes_or_no_goes_on(tmp_path: Path) -> None:
    for name, before, now in (("diffusion-tiny-flow", False, "none"), ("autoregressive-igpt-s", True, "all")):
        record = to_record(name, presets()[name][1])
        text = json.dumps(record)
        assert f'"remat": "{now}"' in text
        (tmp_path / "config.json").write_text(text.replace(f'"remat": "{now}"', f'"remat": {json.dumps(before)}'))
        assert read_record(tmp_path) == json.loads(text)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    """Locks are the operating system's, so that they end with a killed process."""
    record = to_record("vae-tiny", PRESETS["vae-tiny"])
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout.readline() == "\n"
        with (
            pytest.raises(UserError, match=f"another process is writing to {tmp_path}"),
            claimed_workdir(tmp_path, record),
        ):
            pass
        holder.kill()
    with claimed_workdir(tmp_path, record):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not the directory of a run: it has no config.json"),
        ("{", "config.json is damaged"),
    ],
)
def test_refuses_what_is_not_the_directory_of_a_run(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_record(tmp_path)


def test_a_record_of_another_version_is_refused_by_its_field() -> None:
    record = to_record("vae-tiny", PRESETS["vae-tiny"])
    with pytest.raises(UserError, match=r"there is no model family 'vea': there are .*vae"):
        from_record(record | {"family": "vea"})
    with pytest.raises(UserError, match="latent"):
        from_record(record | {"model": {key: value for key, value in record["model"].items() if key != "latent"}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"steps": 10**19}, r"steps is 1(0){19}: .* less than 2\^31"),
        ({"batch_size": 2**31}, "batch_size is 2147483648: .* less than"),
        ({"seed": 2**32}, r"seed is 4294967296: it must be at least 0 and less than 2\^32"),
        ({"seed": -1}, "seed is -1"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0: .*\[0, 1\)"),
    ],
)
def test_refuses_impossible_settings(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(PRESETS["vae-tiny"], **fields)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_of_any_part_of_an_experiment_is_nan_or_infinite(value: float) -> None:
    """In JSON they become null, which means something else."""

    @dataclass(frozen=True)
    class Config:
        layers: tuple[dict, ...] = ({"rate": 0.5}, {"rate": value})

    with pytest.raises(UserError, match=rf"model\.layers\.1\.rate is {value}: it must be a finite number"):
        replace(PRESETS["vae-tiny"], model=Config())


def test_prompts_need_a_place_for_the_class() -> None:
    with pytest.raises(UserError, match=r"must each hold \{\}"):
        ZeroShot(name="easy_vqa/color", prompts=("a photo",))


def test_every_preset_is_described() -> None:
    assert all(description.strip() for description, _ in presets().values())
    assert all(isinstance(experiment, Experiment) for experiment in PRESETS.values())
