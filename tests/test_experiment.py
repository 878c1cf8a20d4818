"""The record of a run: JSON and back, and what may change."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from experiments.presets import presets
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, ZeroShot, from_record, to_record
from vlm_jax.identity import changes, identity
from vlm_jax.sharding import MeshShape
from vlm_jax.train.optim import Adafactor

PRESETS = {name: experiment for name, (_, experiment) in presets().items()}
EXAMPLES = {"train": 100, "test": 10}


def record_of(name: str, experiment: Experiment) -> dict[str, Any]:
    return to_record(name, experiment, EXAMPLES)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return changes(identity(old), identity(new))


@pytest.mark.parametrize("name", PRESETS)
def test_records_read_back_as_the_same_experiment(name: str) -> None:
    """With the end of the schedule, where it has one."""
    experiment = PRESETS[name]
    record = json.loads(json.dumps(record_of(name, experiment)))
    training = experiment.training
    end = None if training.optimizer.schedule == "constant" else training.steps
    ended = replace(training, optimizer=replace(training.optimizer, decay_steps=end))
    assert from_record(record) == replace(experiment, training=ended)


def test_the_seed_the_data_and_the_model_make_another_run_and_the_mesh_does_not() -> None:
    experiment = PRESETS["clip-tiny"]
    record = record_of("clip-tiny", experiment)
    kept = replace(experiment.training, mesh=MeshShape(fsdp=8), log_every=1, checkpoint_every=7, keep_last=1)
    same = replace(experiment, training=kept, workdir="elsewhere")
    assert differences(record, record_of("clip-tiny", same)) == []
    seeded = replace(experiment, training=replace(experiment.training, seed=1))
    assert differences(record, record_of("clip-tiny", seeded)) == ["training.seed: 0 -> 1"]
    grown = to_record("clip-tiny", experiment, EXAMPLES | {"train": 101})
    assert differences(record, grown) == ["examples.train: 100 -> 101"]
    narrow = replace(experiment, model=replace(experiment.model, embedding=64))
    assert differences(record, record_of("clip-tiny", narrow)) == ["model.embedding: 128 -> 64"]


def test_settings_of_sampling_come_back_and_make_no_other_run() -> None:
    experiment = PRESETS["diffusion-tiny-ddpm"]
    record = record_of("diffusion-tiny-ddpm", experiment)
    assert record["sampling"] == {
        "is": "models.diffusion.Sampling",
        "solver": "ancestral",
        "steps": 100,
        "guidance": 1.5,
        "guidance_from": 0.0,
        "guidance_to": 1.0,
        "guidance_rescale": 0.0,
    }
    assert from_record(record).sampling == experiment.sampling
    for sampling in (None, replace(experiment.sampling, guidance=3.0, solver="ddim")):
        assert differences(record, record_of("diffusion-tiny-ddpm", replace(experiment, sampling=sampling))) == []


def test_other_steps_are_another_schedule_unless_its_end_is_stated() -> None:
    """Half of one cosine and half of another is no run that anyone meant."""
    experiment = PRESETS["clip-tiny"]
    training = experiment.training
    longer = replace(training, steps=2 * training.steps)
    record = record_of("clip-tiny", experiment)
    other = record_of("clip-tiny", replace(experiment, training=longer))
    assert differences(record, other) == ["training.optimizer.decay_steps: 400 -> 800"]
    stated = replace(longer, optimizer=replace(training.optimizer, decay_steps=training.steps))
    assert differences(record, record_of("clip-tiny", replace(experiment, training=stated))) == []


def test_a_record_of_another_version_is_refused_by_its_field() -> None:
    record = record_of("vae-tiny", PRESETS["vae-tiny"])
    with pytest.raises(UserError, match=r"model\.is is 'models\.vea\.Config': this version of vlm_jax has no such"):
        from_record(record | {"model": record["model"] | {"is": "models.vea.Config"}})
    with pytest.raises(UserError, match=r"the record lacks the field model\.latent"):
        from_record(record | {"model": {key: value for key, value in record["model"].items() if key != "latent"}})


def test_either_optimizer_is_read_back_as_itself() -> None:
    training = replace(PRESETS["vae-tiny"].training, optimizer=Adafactor(learning_rate=0.1, schedule="constant"))
    experiment = replace(PRESETS["vae-tiny"], training=training)
    record = json.loads(json.dumps(record_of("vae-tiny", experiment)))
    assert record["training"]["optimizer"]["is"] == "train.optim.Adafactor"
    assert from_record(record) == experiment


@pytest.mark.parametrize("path", [("rope",), ("model", "rope"), ("model", "image", "rope"), ("data", "rope")])
def test_a_field_that_is_not_known_is_refused(path: tuple[str, ...]) -> None:
    """What a later version writes may change what the numbers mean."""
    record = branch = record_of("clip-tiny", PRESETS["clip-tiny"])
    for name in path[:-1]:
        branch = branch[name]
    branch[path[-1]] = 1
    with pytest.raises(UserError, match=rf"the record has the field {'.'.join(path)}, which this version"):
        from_record(record)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"steps": 10**19}, r"steps is 1(0){19}: .* less than 2\^31"),
        ({"batch_size": 2**31}, "batch_size is 2147483648: .* less than"),
        ({"seed": 2**32}, r"seed is 4294967296: it must lie in \[0, 2\^32\)"),
        ({"seed": -1}, "seed is -1"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0: .*\[0, 1\)"),
    ],
)
def test_refuses_impossible_settings(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(PRESETS["vae-tiny"].training, **fields)


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
