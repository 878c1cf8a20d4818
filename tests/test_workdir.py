"""A run's directory gives back the model that was trained there, and belongs to one run."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from experiments.presets import presets
from vlm_jax.data import train_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import from_record, to_record
from vlm_jax.sharding import MeshShape, make_mesh
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.trees import leaves_by_path
from vlm_jax.workdir import claimed_workdir, read_identity, read_record, write_tokenizer

PRESET = presets()["vae-tiny"][1]
RECORD = to_record("vae-tiny", PRESET, {"train": 4})
OTHER = to_record("vae-tiny", replace(PRESET, training=replace(PRESET.training, seed=1)), {"train": 4})


def saved(workdir: Path, item: str, step: int) -> dict[str, np.ndarray]:
    """An item as the checkpoint holds it."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        vlm_jax.load(workdir).variables["params"],
    )
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return {
            path: np.asarray(leaf)
            for path, leaf in leaves_by_path(checkpoints.restore({item: shapes}, step)[1]).items()
        }


def test_averaged_parameters_are_loaded_where_the_run_kept_an_average(vae_run: Path) -> None:
    loaded = vlm_jax.load(vae_run, step=4)
    actual = {f"ema/{path}": leaf for path, leaf in leaves_by_path(loaded.variables["params"]).items()}
    expected = saved(vae_run, "ema", 4)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def test_the_step_of_least_validation_loss_is_the_default(vae_run: Path) -> None:
    with Checkpoints(vae_run / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best_step() is not None
        assert vlm_jax.load(vae_run).step == checkpoints.best_step()
    assert vlm_jax.load(vae_run, step=2).step == 2


def test_the_newest_is_the_default_where_no_score_was_kept(clip_run: Path) -> None:
    assert vlm_jax.load(clip_run).step == 3


def test_a_mesh_changes_the_layout_and_no_value(clip_run: Path) -> None:
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2))
    one, spread = vlm_jax.load(clip_run).variables, vlm_jax.load(clip_run, mesh=mesh).variables
    jax.tree.map(np.testing.assert_array_equal, one, spread)
    kernel = spread["params"]["image"]["transformer"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16)
    assert len(one["params"]["log_scale"].devices()) == 1


def test_a_directory_can_be_moved(clip_run: Path, tmp_path: Path) -> None:
    """Model, variables and tokenizer come from the directory and the installed package alone."""
    moved = shutil.copytree(clip_run, tmp_path / "moved")
    loaded = vlm_jax.load(str(moved))
    tokens = loaded.tokenizer.encode(["red circle"], 16)
    vectors = loaded.model.embed_text(loaded.variables, jnp.asarray(tokens))
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_refuses_a_run_without_checkpoints(clip_run: Path, tmp_path: Path) -> None:
    shutil.copy(clip_run / "config.json", tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} has no checkpoint yet"):
        vlm_jax.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_refuses_a_step_that_is_not_there(clip_run: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint 7 in"):
        vlm_jax.load(clip_run, step=7)


def edited(run: Path, to: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a run with another config.json."""
    workdir = shutil.copytree(run, to / "run")
    record = json.loads((workdir / "config.json").read_text())
    edit(record)
    (workdir / "config.json").write_text(json.dumps(record))
    return workdir


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record["model"].update(levels=25), r"config\.json .*\(model\.levels: 17 -> 25\): bring back"),
        (lambda record: record["model"].update(latent=0), r"model\.latent: 4 -> 0"),
        (lambda record: record["data"].update(name="digits"), r'data\.name: "digits:1\.0\.0" -> "digits"'),
        (lambda record: record["examples"].update(train=3), r"examples\.train: 1257 -> 3"),
        (lambda record: record["model"].update(rope=True), r"has the field model\.rope, which this version"),
        (lambda record: record.pop("preset"), r"preset: \"vae-tiny\" -> absent"),
    ],
)
def test_an_edited_record_is_refused_by_the_field(
    vae_run: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        vlm_jax.load(edited(vae_run, tmp_path, edit))


def test_what_changes_no_value_may_be_edited(vae_run: Path, tmp_path: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["training"]["log_every"] = 7
        record["data_dir"] = "elsewhere"

    workdir = edited(vae_run, tmp_path, edit)
    assert vlm_jax.load(workdir).step == vlm_jax.load(vae_run).step


def test_another_tokenizer_is_refused(clip_run: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(clip_run, tmp_path / "run")
    text = (workdir / "tokenizer.json").read_text()
    (workdir / "tokenizer.json").write_text(text.replace('"<bos>": 1', '"<bos>": 4'))
    with pytest.raises(UserError, match=r"not written with .*that are there \(tokenizer\.json: \w+ -> \w+\)"):
        vlm_jax.load(workdir)
    (workdir / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has lost its tokenizer\.json, which .*: copy it back"):
        vlm_jax.load(workdir)


def test_another_chat_template_is_refused(clip_run: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(clip_run, tmp_path / "run")
    (workdir / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    with pytest.raises(UserError, match=r"not written with .*that are there \(tokenizer\.json: \w+ -> \w+\)"):
        vlm_jax.load(workdir)


def test_a_checkpoint_of_another_run_is_not_loaded(vae_run: Path, clip_run: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(vae_run, tmp_path / "run")
    shutil.copytree(clip_run / "checkpoints" / "3", workdir / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"/3 was not written with .*data\.name: .openmoji:1\.0\.0. -> .digits"):
        vlm_jax.load(workdir, step=2)


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run"), "https://a.b/c"])
def test_an_address_elsewhere_is_no_directory(address: str | Path) -> None:
    with pytest.raises(UserError, match=r":/+\S+ is not a directory or file of this machine: mount it"):
        vlm_jax.load(address)


def test_a_directory_belongs_to_a_configuration_from_its_first_checkpoint_on(tmp_path: Path) -> None:
    for claim in (RECORD, OTHER, RECORD):
        with claimed_workdir(tmp_path, claim):
            assert read_record(tmp_path) == claim
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    belongs = r"belongs to another configuration \(training\.seed: 0 -> 1\).*another --workdir"
    with pytest.raises(UserError, match=belongs), claimed_workdir(tmp_path, OTHER):
        pass
    assert read_record(tmp_path) == RECORD
    with claimed_workdir(tmp_path, RECORD):  # the refusal left no lock behind
        pass


def test_a_run_of_a_version_without_a_field_goes_on_where_that_has_its_default(tmp_path: Path) -> None:
    """Its checkpoints name the facts that it knew, and those that are saved from now on name the same."""
    before = json.loads(json.dumps(RECORD))
    del before["training"]["optimizer"]["final_share"], before["lora"]
    begun, arrays = {"params": {"w": np.zeros(2, np.float32)}}, tmp_path / "checkpoints"
    for step, claim in enumerate((before, RECORD, RECORD)):
        with claimed_workdir(tmp_path, claim), Checkpoints(arrays, identity=read_identity(tmp_path)) as checkpoints:
            checkpoints.save(step, begun)
    assert read_record(tmp_path) == before
    assert from_record(before) == from_record(RECORD)
    optimizer = replace(PRESET.training.optimizer, final_share=0.1)
    other = to_record("vae-tiny", replace(PRESET, training=replace(PRESET.training, optimizer=optimizer)), {"train": 4})
    belongs = r"another configuration \(training\.optimizer\.final_share: 0\.0 -> 0\.1\)"
    with pytest.raises(UserError, match=belongs), claimed_workdir(tmp_path, other):
        pass


def assert_taken(workdir: Path) -> None:
    with pytest.raises(UserError, match=f"another process is writing to {workdir}"), claimed_workdir(workdir, RECORD):
        pass


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    """Locks are the operating system's, so that they end with a killed process."""
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout.readline() == "\n"
        assert_taken(tmp_path)
        holder.kill()
    with claimed_workdir(tmp_path, RECORD):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_of_the_file_system_a_file_keeps_the_second_writer_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def lockless(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", lockless)
    with claimed_workdir(tmp_path, RECORD):
        assert caplog.messages == [
            f"the file system of {tmp_path}/.lock has no locks ({os.strerror(number)}): {tmp_path}/.lock.soft stands "
            f"for one"
        ]
        assert_taken(tmp_path)
    with claimed_workdir(tmp_path, RECORD):  # it is gone with its holder
        pass
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    with claimed_workdir(tmp_path, RECORD):
        holder = (tmp_path / ".lock.soft").read_text()
    assert str(os.getpid()) in holder
    (tmp_path / ".lock.soft").write_text(holder.replace(str(os.getpid()), dead.stdout.strip(), 1))
    with claimed_workdir(tmp_path, RECORD):  # nor does one killed on this machine hold it
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not the directory of a run: it has no config.json"),
        (b"{", "config.json is damaged"),
        (b"[]", r"config.json is damaged \(it is no JSON object\): restore it from a copy"),
        (b"null", "config.json is damaged"),
        (b'{"preset": "\xff"}', "config.json is damaged .*can't decode byte 0xff"),
        (b"[" * 100_000, "config.json is damaged"),
        (b'{"a":' * 100_000, "config.json is damaged"),
    ],
    ids=["none", "cut off", "list", "null", "not UTF-8", "deep list", "deep object"],
)
def test_refuses_what_is_not_the_directory_of_a_run(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        vlm_jax.load(tmp_path)


def test_a_run_of_before_is_refused_as_one(tmp_path: Path) -> None:
    """Its record is flat: the seed and the optimizer stand beside the model."""
    record = RECORD | {"optimizer": {"learning_rate": 1e-3}, "steps": 1, "batch_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    refused = r"config\.json was written by an earlier version of vlm_jax, .*: use that version, or train anew"
    with pytest.raises(UserError, match=refused):
        vlm_jax.load(tmp_path)
    with pytest.raises(UserError, match=refused), claimed_workdir(tmp_path, RECORD):
        pass
    assert json.loads((tmp_path / "config.json").read_text()) == record


def test_a_record_that_is_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config.json cannot be read \(Is a directory\)"):
        vlm_jax.load(tmp_path)


def test_a_tokenizer_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be written \(Is a directory\): mend that"):
        write_tokenizer(tmp_path, train_tokenizer(["a"], 300))


@pytest.mark.parametrize("name", ["config.json", ".lock", "checkpoints"])
def test_a_part_of_the_wrong_kind_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch() if name == "checkpoints" else (tmp_path / name).mkdir()
    with (
        pytest.raises(
            UserError, match=rf"{tmp_path}/{name} cannot be (written|read) \((Is|Not) a directory\): mend that"
        ),
        claimed_workdir(tmp_path, RECORD),
    ):
        pass


def test_a_left_temporary_file_of_any_kind_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "config.json.tmp").mkdir()
    with claimed_workdir(tmp_path, RECORD):
        assert read_record(tmp_path) == RECORD


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(workdir: Path, message: str) -> None:
        message = rf"cannot be written \({message}\): mend that, or choose another --workdir"
        with pytest.raises(UserError, match=message), claimed_workdir(workdir, RECORD):
            pass

    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "File exists")
    refused(tmp_path / "file" / "run", "Not a directory")
    assert (tmp_path / "file").read_text() == "mine"
    with monkeypatch.context() as patch:

        def forbidden(path: Path, **_: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        patch.setattr(Path, "mkdir", forbidden)
        refused(tmp_path / "run", "Permission denied")


def test_a_disk_that_is_full_costs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with claimed_workdir(tmp_path, RECORD):
        pass
    monkeypatch.setattr(os, "fsync", full)
    message = rf"^{tmp_path} cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=message), claimed_workdir(tmp_path, OTHER):
        pass
    assert read_record(tmp_path) == RECORD
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]


@pytest.mark.parametrize("name", ["seed[0]", "back\\slash"])
def test_a_name_that_checkpoints_cannot_have_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="choose another directory"), claimed_workdir(tmp_path / name, RECORD):
        pass
    assert not list(tmp_path.iterdir())
