"""The benchmark's figures agree with each other and with the model, on any mesh, with and without data."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.presets import presets
from tools import benchmark
from vlm_jax.contract import Input, check_batch
from vlm_jax.errors import UserError
from vlm_jax.train.optim import learning_rate_schedule


def figures(monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> dict[str, float]:
    """What `python -m tools.benchmark vae-tiny` writes."""
    small = ("--steps", "2", "--batch-size", "16", "--model.widths", "8")
    monkeypatch.setattr("sys.argv", ["benchmark", "vae-tiny", *small, *options, "--json", str(path)])
    benchmark.main()
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_figures_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = figures(monkeypatch, tmp_path / "new" / "results.json", "--data-dir", str(data_dir))
    assert (results["preset"], results["device"], results["devices"], results["batch_size"]) == (
        "vae-tiny",
        "cpu",
        8,
        16,
    )
    seconds = results["step/seconds"]
    assert results["step/seconds_min"] <= seconds <= results["step/seconds_max"]
    assert results["step/examples_per_second"] == 16 / seconds
    assert results["step/model_flops_per_second"] == results["step/model_flops"] / seconds
    assert results["step/model_flops"] == results["step/hardware_flops"]
    assert results["step/mfu"] is None
    assert results["pipeline/rate_over_step_rate"] == (
        results["pipeline/examples_per_second"] / results["step/examples_per_second"]
    )
    assert results["memory/parameters"] == 4 * results["parameters"]
    counters = 2 * 4  # AdamW's and the schedule's
    assert results["memory/optimizer"] == 2 * results["memory/parameters"] + counters
    assert results["memory/step"] > results["memory/parameters"] + results["memory/optimizer"]
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed.keys() == results.keys()
    assert printed["parameters"] == f"{results['parameters']:,}"
    assert printed["step/mfu"] == "unknown"


@pytest.mark.slow
def test_on_a_split_mesh_a_device_holds_its_share_and_the_flops_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = figures(monkeypatch, tmp_path / "whole.json", "--no-pipeline")
    split = figures(monkeypatch, tmp_path / "split.json", "--no-pipeline", "--mesh.data", "1", "--mesh.fsdp", "8")
    assert not any(name.startswith("pipeline/") for name in whole)
    for name in ("parameters", "step/model_flops", "step/hardware_flops"):
        assert split[name] == whole[name]
    assert split["memory/parameters"] < whole["memory/parameters"] / 4


def test_where_the_device_is_known_utilisation_is_of_all_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(benchmark.PEAK_FLOPS, "cpu", 1e12)
    results = figures(monkeypatch, tmp_path / "results.json", "--no-pipeline")
    assert results["step/mfu"] == results["step/model_flops_per_second"] / (8 * 1e12)


def test_a_batch_that_the_mesh_cannot_split_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the batch size 12 cannot be split over 8 devices"):
        figures(monkeypatch, tmp_path / "results.json", "--batch-size", "12")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "benchmark", None)
    with pytest.raises(UserError, match="is a directory: name a file in it"):
        figures(monkeypatch, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"results\.json cannot be written"):
        figures(monkeypatch, tmp_path / "file" / "results.json")
    with pytest.raises(UserError, match="is not a directory or file of this machine"):
        figures(monkeypatch, Path("gs://bucket/results.json"))


def test_random_batches_are_what_the_model_accepts() -> None:
    inputs = {
        "image": Input((4, 4, 3), "uint8", 256),
        "tokens": Input((6,), "int32", 9, contains=2),
        "mask": Input((6,), "bool"),
        "latent": Input((5,), "bfloat16"),
        "image_at": Input((3,), "int32", 7, span=3),
    }
    batch = check_batch(inputs, benchmark.random_batch(inputs, 64, seed=0))
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        "image": ((64, 4, 4, 3), np.uint8),
        "tokens": ((64, 6), np.int32),
        "mask": ((64, 6), np.bool_),
        "latent": ((64, 5), jnp.bfloat16),
        "image_at": ((64, 3), np.int32),
    }
    assert batch["image_at"][0].tolist() == [0, 3, 6]
    assert batch["tokens"].max() == 8 and batch["image"].max() == 255
    assert np.std(batch["latent"].astype(np.float32)) > 0.5


def test_fewer_steps_leave_the_schedule_as_it_is() -> None:
    for _, preset in presets().values():
        brief, whole = benchmark.brief(preset).training, preset.training
        few, all_steps = (learning_rate_schedule(each.optimizer, each.steps) for each in (brief, whole))
        assert brief.steps == benchmark.STEPS
        assert replace(brief, steps=whole.steps, optimizer=whole.optimizer) == whole
        assert jax.tree.map(float, (few(0), few(10))) == jax.tree.map(float, (all_steps(0), all_steps(10)))
