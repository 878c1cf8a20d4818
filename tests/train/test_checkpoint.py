"""Saving, keeping and restoring: bit for bit, on any mesh, or an error that says what differs."""

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.errors import UserError
from vlm_jax.train import checksums
from vlm_jax.train.checkpoint import Checkpoints

MESHES = {"1": (1, 1, 1), "8": (2, 2, 2), "2x4": (1, 2, 4)}


def make_mesh(name: str) -> Mesh:
    shape = MESHES[name]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def make_items(mesh: Mesh) -> dict[str, Any]:
    """A train state's items with random bit patterns, NaN and subnormal numbers among them."""
    random = np.random.default_rng(0)

    def array(dtype: Any, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
        host = random.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
        return jax.device_put(host, NamedSharding(mesh, PartitionSpec(*axes)))

    params = {
        "dense": {
            "kernel": array(np.float32, (8, 16), "fsdp", "tensor"),
            "bias": array(jnp.bfloat16, (16,), ("data", "tensor")),
        },
        "key": array(np.uint32, (2,)),
        "layers": [array(np.int32, (4, 3), "tensor"), array(np.float32, (3,))],
        "flag": jax.device_put(np.array(True), NamedSharding(mesh, PartitionSpec())),
    }
    live = {"dense": params["dense"]}
    optimizer = optax.multi_transform(
        {"train": optax.chain(optax.clip(1.0), optax.adamw(1e-3)), "freeze": optax.set_to_zero()},
        {"dense": {"kernel": "train", "bias": "freeze"}},
    )
    opt_state = jax.tree.map(lambda leaf: array(leaf.dtype, leaf.shape), jax.eval_shape(optimizer.init, live))
    return {"params": params, "opt_state": opt_state, "ema": {}, "state": {}, "step": array(np.int32, ())}


def abstract_of(items: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec)),
        items,
    )


def assert_identical(restored: Any, saved: Any, abstract: Any) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for found, leaf, wanted in zip(*map(jax.tree.leaves, (restored, saved, abstract)), strict=True):
        assert found.dtype == leaf.dtype
        assert found.sharding == wanted.sharding
        np.testing.assert_array_equal(np.atleast_1d(found).view(np.uint8), np.atleast_1d(leaf).view(np.uint8))


def small(step: int) -> dict[str, Any]:
    return {"params": {"kernel": np.full((2, 3), step, np.float32)}, "step": np.int32(step)}


def small_abstract() -> dict[str, Any]:
    sharding = NamedSharding(make_mesh("1"), PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), small(0))


def save_small(checkpoints: Checkpoints, losses: Mapping[int, float | None]) -> None:
    for step, loss in losses.items():
        checkpoints.save(step, small(step), validation_loss=loss)


@pytest.mark.parametrize(("source", "target"), [("8", "1"), ("8", "2x4"), ("1", "8"), ("2x4", "8")])
def test_a_state_is_restored_bit_for_bit_on_another_mesh(tmp_path: Path, source: str, target: str) -> None:
    items = make_items(make_mesh(source))
    abstract = abstract_of(items, make_mesh(target))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, items)
        step, restored = checkpoints.restore(abstract)
    assert step == 7
    assert_identical(restored, items, abstract)


def test_a_state_that_is_donated_right_after_its_save_is_saved_as_it_was(tmp_path: Path) -> None:
    mesh = make_mesh("8")
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    array = jax.device_put(np.arange(1 << 18, dtype=np.float32), sharding)
    overwrite = jax.jit(lambda array: array * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": array})
        for _ in range(5):
            array = overwrite(array)
        _, restored = checkpoints.restore({"params": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)})
    np.testing.assert_array_equal(restored["params"], np.arange(1 << 18, dtype=np.float32))


def test_a_reader_restores_some_items_and_opens_no_file_of_the_others(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, {1: None})
    shutil.rmtree(tmp_path / "1" / "params")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        _, restored = checkpoints.restore({"step": small_abstract()["step"]})
    assert restored == {"step": 1}


@pytest.mark.parametrize("read_only", [True, False])
def test_nothing_saved_restores_nothing(tmp_path: Path, read_only: bool) -> None:
    with Checkpoints(tmp_path / "checkpoints", read_only=read_only) as checkpoints:
        assert checkpoints.restore(small_abstract()) is None
        assert checkpoints.steps() == ()
        assert checkpoints.best_step() is None
        with pytest.raises(UserError, match=r"no checkpoint 3 in .*/checkpoints: nothing was saved there"):
            checkpoints.restore(small_abstract(), 3)


def test_a_step_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, {1: None, 2: None})
        assert checkpoints.restore(small_abstract(), 1)[1]["step"] == 1
        with pytest.raises(UserError, match=r"no checkpoint 3 in .*: choose one of 1, 2$"):
            checkpoints.restore(small_abstract(), 3)


def test_the_newest_and_the_best_are_kept_across_restarts(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        save_small(checkpoints, {1: float("-inf"), 2: 1.0, 3: 2.0, 4: 3.0, 5: None})
        assert checkpoints.steps() == (2, 4, 5)
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        assert checkpoints.best_step() == 2
        save_small(checkpoints, {6: 4.0})
        assert checkpoints.steps() == (2, 5, 6)
        save_small(checkpoints, {7: 0.5})
        assert checkpoints.steps() == (6, 7)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 7


@pytest.mark.parametrize("step", [4, 5])
def test_a_step_that_would_not_be_the_newest_is_a_programming_error(tmp_path: Path, step: int) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, {5: None})
        with pytest.raises(ValueError, match=f"checkpoint {step} would not be the newest in .*, 5 is"):
            checkpoints.save(step, small(step))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=f"checkpoint {step} would not be the newest in .*, 5 is"):
            checkpoints.save(step, small(step))
        save_small(checkpoints, {6: None})
        assert checkpoints.steps() == (5, 6)


def test_orbax_skips_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocp.CheckpointManager, "should_save", lambda *_: False)
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, {1: None})
        assert checkpoints.steps() == (1,)


def test_a_reader_cannot_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="open for reading only"), Checkpoints(tmp_path, read_only=True) as checkpoints:
        checkpoints.save(1, small(1))


STRUCT = jax.ShapeDtypeStruct
MISMATCHES = {
    "shape": (
        {"params": {"kernel": STRUCT((3, 2), np.float32)}},
        r"float32\[2, 3\] for params/kernel where float32\[3, 2\]",
    ),
    "dtype": (
        {"params": {"kernel": STRUCT((2, 3), jnp.bfloat16)}},
        r"float32\[2, 3\] for params/kernel where bfloat16\[2, 3\]",
    ),
    "lacking": (
        {"params": {"kernel": STRUCT((2, 3), np.float32), "bias": STRUCT((3,), np.float32)}},
        r"nothing for params/bias where float32\[3\]",
    ),
    "superfluous": ({"params": {}}, r"float32\[2, 3\] for params/kernel where nothing"),
    "item": ({"ema": {"kernel": STRUCT((2, 3), np.float32)}}, r"nothing for ema/kernel where float32\[2, 3\]"),
}


@pytest.mark.parametrize(("abstract", "message"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_other_leaves_than_the_expected_are_refused(tmp_path: Path, abstract: Any, message: str) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, {1: None, 2: None})
        with pytest.raises(UserError, match=rf"/2 holds {message} is expected: use the settings"):
            checkpoints.restore(abstract)
        assert checkpoints.steps() == (1, 2)


def test_an_item_that_was_not_saved_is_restored_if_it_is_empty(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, {1: None})
        assert checkpoints.restore({"ema": {}, "state": {"batch_stats": {}}}) == (
            1,
            {"ema": {}, "state": {"batch_stats": {}}},
        )


def test_no_room_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = 2 * 3 * 4 + 4
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        save_small(checkpoints, {1: None})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(
            UserError, match=r"checkpoint 2 could not be written .* free space .* good checkpoint is 1$"
        ):
            save_small(checkpoints, {2: None})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_an_error_of_the_background_is_raised_by_the_next_call_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, {1: None})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "write_manifest", full)
            checkpoints.save(2, small(2))
            message = (
                rf"^checkpoint 2 could not be written to {tmp_path}: No space left on device; free space and run the "
                r"same command again, the last good checkpoint is 1$"
            )
            with pytest.raises(UserError, match=message):
                checkpoints.save(3, small(3))
        assert checkpoints.restore(small_abstract())[0] == 1
        with pytest.raises(ValueError, match="a save has failed"):
            checkpoints.save(3, small(3))
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, {3: None})
        assert checkpoints.steps() == (1, 3)


def test_an_error_in_the_code_is_not_taken_for_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(checksums, "write_manifest", broken)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1))
        with pytest.raises(ValueError, match="a mistake"):
            checkpoints.wait()


ODD = (
    *("plain", "sp ace ~ -dash #x @ +x = a:b,c;d|e&f <g> (h) {0} {x $HOME !y^ `z`", "50% %20 %s", "~", "-", "s3:"),
    *("'a' \"b\"", "new\nline\ttab", "ünïcødé 日本", ".hidden", "8", "x.orbax-checkpoint-tmp"),
)


def test_the_name_of_a_directory_is_text(tmp_path: Path) -> None:
    """Whatever the libraries beneath could read into it."""
    directory = tmp_path.joinpath(*ODD)
    with Checkpoints(directory) as checkpoints:
        save_small(checkpoints, {1: None})
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.restore(small_abstract())[1]["step"] == 1
    assert [path for path in tmp_path.rglob("*") if path.name.isdigit()] == [
        tmp_path / Path(*ODD[:11]),
        directory / "1",
    ]


@pytest.mark.parametrize("name", ["seed[0]", "a*b", "a?b", "back\\slash", "logs:"])
def test_a_directory_that_could_not_be_read_again_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^{re.escape(str(tmp_path / name))} holds .* in its path, which the libraries"
    ):
        Checkpoints(tmp_path / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"^/s3/bucket/run holds /s3/ in its path"):
        Checkpoints(Path("/s3/bucket/run"))


def test_a_run_that_was_moved_to_such_a_name_is_read_or_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "plain") as checkpoints:
        save_small(checkpoints, {1: None})
    for name in ("seed[0]", "a*b?"):
        shutil.copytree(tmp_path / "plain", tmp_path / name)
        with Checkpoints(tmp_path / name, read_only=True) as checkpoints:
            assert checkpoints.restore(small_abstract())[1]["step"] == 1
    with pytest.raises(UserError, match=r"holds \\ in its path"):
        Checkpoints(tmp_path / "back\\slash", read_only=True)


def test_a_save_that_cannot_be_opened_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here orbax finds nothing where it has just written, since it takes the name for a pattern."""
    monkeypatch.setattr("vlm_jax.train.checkpoint.check_path", lambda *_, **__: None)
    directory = tmp_path / "seed[0]"
    message = (
        r"^checkpoint 1 could not be written to .*: what was written for params cannot be opened \(.*\); look at that "
        r"file system and run the same command again, there is no checkpoint before it$"
    )
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, small(1))
        with pytest.raises(UserError, match=f"(?s){message}"):
            checkpoints.wait()
        assert checkpoints.steps() == ()


def test_a_save_that_holds_other_arrays_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"params/kernel": "float32[2, 3]", "params/bias": "float32[3]"}
    monkeypatch.setattr("vlm_jax.train.checkpoint.opened", lambda checkpoint, name: found)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1))
        with pytest.raises(UserError, match=r"could not be written .*holds float32\[3\] for params/bias where nothing"):
            checkpoints.wait()
        assert checkpoints.steps() == ()


def test_names_that_are_no_steps_are_left_alone(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, {1: None})
    for name in ("007", "²", "٣", "notes", "2.bak"):
        (tmp_path / name).mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == (1,)
        save_small(checkpoints, {2: None})
        assert checkpoints.restore(small_abstract())[0] == 2


def test_a_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be read \(Not a directory\)"):
        Checkpoints(tmp_path / "file", read_only=True)

    def forbidden(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        Checkpoints(tmp_path, read_only=True)


def test_a_writer_deletes_what_a_dead_save_left_and_a_reader_does_not(tmp_path: Path) -> None:
    left = tmp_path / "2.orbax-checkpoint-tmp" / "params.orbax-checkpoint-tmp" / "d"
    left.mkdir(parents=True)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore(small_abstract()) is None
    assert left.exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(small_abstract()) is None
        assert list(tmp_path.iterdir()) == []


def test_orbax_tells_nothing_of_its_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "absl"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1) | {"ema": {}})
        checkpoints.restore(small_abstract())
    assert [record for record in caplog.records if record.name == "absl"] == []


def test_other_users_of_its_log_are_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpoints(tmp_path):
        logging.getLogger("absl").warning("not from orbax")
    assert caplog.messages == ["not from orbax"]
