"""Damaged files are noticed, named and passed over; nothing silently wrong is ever restored."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.train import checksums
from vlm_jax.train.checkpoint import Checkpoints


def items(step: int) -> dict[str, Any]:
    return {"params": {"kernel": np.full((8, 8), step, np.float32)}, "ema": {}, "step": np.int32(step)}


def abstract() -> dict[str, Any]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), items(0))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (100, 200, 300):
            checkpoints.save(step, items(step), validation_loss=1.0 / step)
    return directory


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    """Checkpoints 100, 200 and 300, to be damaged."""
    return shutil.copytree(template, tmp_path / "checkpoints")


def data_file(checkpoint: Path) -> Path:
    """The file that holds the values of the parameters."""
    return max(checkpoint.glob("params/**/d/*"), key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rewrite(checkpoint: Path, **fields: Any) -> None:
    """The manifest with other fields, and whole."""
    manifest = msgspec.to_builtins(checksums.read_manifest(checkpoint)) | fields
    body = msgspec.json.encode({name: value for name, value in manifest.items() if value is not None})
    (checkpoint / checksums.MANIFEST).write_bytes(hashlib.blake2b(body).hexdigest().encode() + b"\n" + body)


def contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in directory.glob("**/*") if p.is_file()}


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda step: flip_a_bit(data_file(step)), r"params/.*: checksum differs"),
    "truncated file": (lambda step: truncate(data_file(step)), r"params/.*: \d+ bytes instead of \d+"),
    "missing file": (lambda step: data_file(step).unlink(), r"params/.*: No such file or directory"),
    "missing item": (lambda step: shutil.rmtree(step / "step"), r"step/.*: No such file or directory"),
    "no manifest": (lambda step: (step / checksums.MANIFEST).unlink(), "CHECKSUMS: No such file or directory"),
    "manifest flipped": (lambda step: flip_a_bit(step / checksums.MANIFEST), "CHECKSUMS: checksum differs"),
    "manifest truncated": (lambda step: truncate(step / checksums.MANIFEST), "CHECKSUMS: checksum differs"),
    "manifest empty": (lambda step: (step / checksums.MANIFEST).write_bytes(b""), "CHECKSUMS: checksum differs"),
    "manifest without files": (lambda step: rewrite(step, files={}), r"ema/_METADATA: not in CHECKSUMS"),
    "file that nobody wrote": (lambda step: (step / "params" / "d" / "0").touch(), r"params/d/0: not in CHECKSUMS"),
    "half deleted": (lambda step: [shutil.rmtree(step), step.mkdir()], "CHECKSUMS: No such file or directory"),
    "not a directory": (lambda step: [shutil.rmtree(step), step.touch()], "CHECKSUMS: Not a directory"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over_named_and_moved_aside(
    directory: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], reason: str
) -> None:
    damage(directory / "300")
    with Checkpoints(directory) as checkpoints:
        step, restored = checkpoints.restore(abstract())
        assert step == 200
        assert (restored["params"]["kernel"] == 200).all()
        (message,) = caplog.messages
        assert re.fullmatch(
            rf"checkpoint 300 is damaged \(checkpoints/300/{reason}\): going on from 200, it is now .*/damaged/300",
            message,
        )
        assert (directory / "damaged" / "300").exists()
        assert checkpoints.steps() == (100, 200)
        checkpoints.save(300, items(300))
        assert checkpoints.restore(abstract())[0] == 300


def test_any_flipped_bit_in_any_file_of_an_item_is_noticed(directory: Path) -> None:
    checkpoint = directory / "300"
    paths = [path for item in ("params", "step", "ema") for path in (checkpoint / item).glob("**/*") if path.is_file()]
    assert len(paths) > 10
    for path in paths:
        intact = path.read_bytes()
        flip_a_bit(path)
        with pytest.raises(checksums.DamagedError, match=f"^{path.relative_to(checkpoint)}: checksum differs$"):
            checksums.verify(checkpoint, items(0))
        path.write_bytes(intact)
    checksums.verify(checkpoint, items(0))


def test_the_shares_of_all_processes_cover_every_file(directory: Path) -> None:
    checkpoint = directory / "300"
    for path in checkpoint.glob("params/**/*"):
        if path.is_file():
            intact = path.read_bytes()
            flip_a_bit(path)
            found = 0
            for share in range(3):
                try:
                    checksums.verify(checkpoint, ["params"], share=share, shares=3)
                except checksums.DamagedError:
                    found += 1
            assert found == 1
            path.write_bytes(intact)


def test_damage_to_an_item_that_is_not_restored_does_not_matter(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip_a_bit(data_file(directory / "300"))
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.restore({"step": abstract()["step"]}) == (300, {"step": 300})
    assert caplog.messages == []


def test_a_reader_passes_over_damage_and_changes_nothing(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_a_bit(data_file(directory / "300"))
    before = contents(directory)
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 200
        assert checkpoints.steps() == (100, 200, 300)
    assert caplog.messages[0].endswith("checksum differs): going on from 200")
    assert contents(directory) == before


def test_what_was_moved_aside_before_is_not_overwritten(directory: Path) -> None:
    for expected in ("300", "300-2", "300-3"):
        flip_a_bit(data_file(directory / "300"))
        with Checkpoints(directory) as checkpoints:
            assert checkpoints.restore(abstract())[0] == 200
            checkpoints.save(300, items(300))
        assert (directory / "damaged" / expected / checksums.MANIFEST).exists()


def test_two_damaged_checkpoints_are_both_passed_over(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_a_bit(data_file(directory / "300"))
    truncate(data_file(directory / "200"))
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 100
        assert checkpoints.steps() == (100,)
    assert [message.partition(" is damaged")[0] for message in caplog.messages] == ["checkpoint 300", "checkpoint 200"]
    assert all("going on from 100" in message for message in caplog.messages)


def test_if_all_are_damaged_nothing_is_restored_or_moved(directory: Path) -> None:
    for step in ("100", "200", "300"):
        flip_a_bit(data_file(directory / step))
    before = contents(directory)
    for _ in range(2):  # The second run must not start from nothing either.
        with (
            Checkpoints(directory) as checkpoints,
            pytest.raises(UserError, match=r"every checkpoint in .*: 300 \(params/.*\), 200 \(.*\), 100 \(.*differs\)"),
        ):
            checkpoints.restore(abstract())
    assert contents(directory) == before


def test_a_damaged_step_that_was_asked_for_is_refused(directory: Path) -> None:
    flip_a_bit(data_file(directory / "200"))
    before = contents(directory)
    with Checkpoints(directory) as checkpoints:
        message = r"checkpoint 200 in .* is damaged \(params/.*: checksum differs\): choose another of 100, 300"
        with pytest.raises(UserError, match=message):
            checkpoints.restore(abstract(), 200)
        assert checkpoints.restore(abstract(), 100)[0] == 100
    assert contents(directory) == before


def test_the_only_step_that_was_asked_for_and_is_damaged_is_refused(directory: Path) -> None:
    for step in ("100", "200"):
        shutil.rmtree(directory / step)
    flip_a_bit(data_file(directory / "300"))
    with Checkpoints(directory) as checkpoints, pytest.raises(UserError, match=r"damaged .* it is the only one"):
        checkpoints.restore(abstract(), 300)


@pytest.mark.parametrize("link", ["file", "item", "checkpoint"])
@pytest.mark.parametrize("step", [None, 300])
def test_a_symbolic_link_is_refused(directory: Path, tmp_path: Path, link: str, step: int | None) -> None:
    checkpoint = directory / "300"
    path = {"file": data_file(checkpoint), "item": checkpoint / "step", "checkpoint": checkpoint}[link]
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    with (
        Checkpoints(directory) as checkpoints,
        pytest.raises(UserError, match=f"^{path} is a symbolic link"),
    ):
        checkpoints.restore(abstract(), step)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
def test_without_its_manifest_a_checkpoint_may_be_the_best_and_no_other_is_taken_for_it(
    directory: Path, damage: Callable[[Path], None]
) -> None:
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 300
        damage(directory / "300" / checksums.MANIFEST)
        message = r"the best cannot be known, since 300 is damaged \(300/CHECKSUMS: .*choose one of 100, 200 yourself$"
        with pytest.raises(UserError, match=message):
            checkpoints.best_step()
        assert checkpoints.restore(abstract(), 200)[0] == 200


def test_a_checkpoint_without_its_manifest_is_not_deleted(directory: Path) -> None:
    """It may be the best, and its manifest may be brought back."""
    (directory / "100" / checksums.MANIFEST).unlink()
    with Checkpoints(directory, keep_last=1, keep_best=1) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 300
        checkpoints.save(400, items(400))
        assert checkpoints.steps() == (100, 300, 400)


def test_files_that_systems_leave_in_a_directory_do_no_harm(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".nfs000000001", ".DS_Store"):
        (directory / "300" / "params" / name).touch()
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 300
    assert caplog.messages == []


@pytest.mark.parametrize(("version", "told"), [(None, 1), (3, 3)])
def test_a_manifest_of_another_version_is_refused_and_its_checkpoint_left_alone(
    directory: Path, version: int | None, told: int
) -> None:
    rewrite(directory / "300", version=version)
    before = contents(directory)
    for read_only in (True, False):
        with pytest.raises(UserError, match=rf"/300 was written by another version .*version {told}, this one reads 2"):
            Checkpoints(directory, read_only=read_only)
    assert contents(directory) == before


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
@pytest.mark.parametrize("content", [None, b"", b'{"commit_timestamp_nsecs": 1e99}', b"\xff\0"])
def test_orbaxs_own_notes_are_not_needed(
    directory: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes | None
) -> None:
    for step in ("100", "200", "300"):
        path = directory / step / name
        path.unlink() if content is None else path.write_bytes(content)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 300
        checkpoints.save(400, items(400))
        assert checkpoints.steps() == (200, 300, 400)
    assert caplog.messages == []


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_not_restored_though_it_is_what_was_written(
    directory: Path, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    """A state that diverged: whoever evaluates it or goes on from it has nothing."""
    spoiled = items(400)
    spoiled["params"]["kernel"][3, 5] = value
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(400, spoiled)
    damage = r"damaged \(params/kernel: holds nan or infinite values\): choose another of 200, 300"
    with Checkpoints(directory, read_only=True) as checkpoints, pytest.raises(UserError, match=damage):
        checkpoints.restore(abstract(), 400)
    with Checkpoints(directory) as checkpoints:
        step, restored = checkpoints.restore(abstract())
        assert (step, restored["params"]["kernel"][0, 0]) == (300, 300)
        assert checkpoints.steps() == (200, 300)
    assert "checkpoint 400 is damaged (checkpoints/400/params/kernel: holds nan or infinite values)" in caplog.text
