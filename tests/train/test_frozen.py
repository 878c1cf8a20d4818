"""What a run does not train is saved once, is verified as a checkpoint is, and changes nothing about resuming."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.contract import Aux, Input, Model
from vlm_jax.errors import UserError
from vlm_jax.sharding import MeshShape
from vlm_jax.train import checkpoint
from vlm_jax.train.loop import fit
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.train.step import TrainState
from vlm_jax.trees import leaves_by_path

LIVE, STILL = 40, 400
"""Rows of 64 numbers: the frozen part is ten times the live one."""
VALUES = np.random.default_rng(0).normal(scale=0.05, size=(STILL, 64)).astype(np.float32)


def model() -> Model:
    """Learns to write each of its inputs as a sum of rows, some of which are given."""

    def init(key: jax.Array, batch: Any) -> Any:
        return {"params": {"live": 0.1 * jax.random.normal(key, (LIVE, 64)), "lm": {"still": jnp.zeros((STILL, 64))}}}

    def loss(variables: Any, batch: Any, key: jax.Array, step: jax.Array, *, train: bool) -> tuple[jax.Array, Aux]:
        params = variables["params"]
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        hidden = jnp.tanh(x @ params["lm"]["still"].T.astype(jnp.float32)) @ params["lm"]["still"].astype(jnp.float32)
        error = (x + hidden) @ params["live"].T @ params["live"] - batch["x"]
        return jnp.mean(jnp.square(error)), Aux({}, jnp.float32(len(error)))

    rules = (("live$", (None, None)), ("still$", ("embed", None)))
    return Model(inputs={"x": Input((64,), "float32")}, init=init, loss=loss, rules=rules)


def batches(rows: np.ndarray, start: int) -> Iterator[dict[str, np.ndarray]]:
    step = start
    while True:
        yield {"x": 0.1 * np.random.default_rng(step).normal(size=(8, 64)).astype(np.float32)[rows]}
        step += 1


def begin(state: TrainState) -> dict[str, jax.Array]:
    """On the mesh, as the state will lie there."""
    return {"params/lm/still": jax.device_put(VALUES, state.frozen["lm"]["still"].sharding)}


def nothing_to_take(state: TrainState) -> dict[str, jax.Array]:
    raise AssertionError("a run that has begun asks no other")


def run(workdir: Path, steps: int, start: Callable = begin, dtype: str | None = None, **mesh: int) -> TrainState:
    training = Training(
        optimizer=Optimizer(learning_rate=1e-3, decay_steps=6),
        steps=steps,
        batch_size=8,
        ema_decay=0.9,
        checkpoint_every=2,
        mesh=MeshShape(**mesh),
    )
    return fit(model(), training, workdir, batches, begin=start, frozen=("^lm/",), frozen_dtype=dtype)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The directory of six steps, saved thrice, and the last state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, values(run(workdir, 6))


def values(state: TrainState) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(state._asdict()).items()}


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("**/*") if path.is_file())


def test_what_is_frozen_is_on_the_disk_once_whatever_the_number_of_checkpoints(whole: tuple) -> None:
    """Of three checkpoints, each with the live part, its average and two moments; orbax compresses a little."""
    checkpoints = whole[0] / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4", "6", "frozen"]
    live, still = 4 * 64 * LIVE, 4 * 64 * STILL
    notes = 50_000  # orbax's own, more where its commits fall apart in time; half of what is frozen
    assert 0.8 * still < bytes_of(checkpoints / "frozen") < still + notes
    for step in ("2", "4", "6"):
        assert 0.8 * 4 * live < bytes_of(checkpoints / step) < 4 * live + notes
        assert not (checkpoints / step / "frozen").exists()


def test_moments_and_the_average_are_of_the_live_part_and_the_frozen_is_as_given(whole: tuple) -> None:
    np.testing.assert_array_equal(whole[1]["frozen/lm/still"], VALUES)
    paths = [path for path in whole[1] if path.startswith(("params", "ema", "opt_state"))]
    assert sum(path.endswith("live") for path in paths) == 4 and not any("still" in path for path in paths)


def test_a_resumed_run_is_the_same_run_on_another_mesh_too(whole: tuple, tmp_path: Path) -> None:
    """The steps in the middle are bit-equal; what lies elsewhere is summed in another order."""
    run(tmp_path / "same", 2)
    again = values(run(tmp_path / "same", 6, nothing_to_take))
    run(tmp_path / "moved", 2)
    moved = run(tmp_path / "moved", 6, nothing_to_take, data=1, fsdp=8)
    assert moved.frozen["lm"]["still"].sharding.shard_shape((STILL, 64)) == (STILL // 8, 64)
    for path, expected in whole[1].items():
        np.testing.assert_array_equal(again[path], expected, err_msg=path)
        np.testing.assert_allclose(values(moved)[path], expected, atol=1e-5, err_msg=path)


def test_the_rotation_of_checkpoints_leaves_what_is_frozen_alone(tmp_path: Path) -> None:
    before = run(tmp_path, 2)
    saved = (tmp_path / "checkpoints" / "frozen" / "0" / "CHECKSUMS").read_bytes()
    run(tmp_path, 12, nothing_to_take)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "12", "8", "frozen"]
    assert (tmp_path / "checkpoints" / "frozen" / "0" / "CHECKSUMS").read_bytes() == saved
    np.testing.assert_array_equal(run(tmp_path, 12).frozen["lm"]["still"], before.frozen["lm"]["still"])


def test_it_may_have_half_the_bits(tmp_path: Path) -> None:
    run(tmp_path, 2, dtype="bfloat16")
    assert bytes_of(tmp_path / "checkpoints" / "frozen") < 2 * 64 * STILL + 20_000
    state = run(tmp_path, 4, nothing_to_take, "bfloat16")
    assert state.frozen["lm"]["still"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.frozen["lm"]["still"], VALUES.astype(jnp.bfloat16))


def flip(directory: Path) -> None:
    path = max(directory.glob("**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip, r"every checkpoint in \S+/frozen is damaged: 0 \(frozen/\S+: checksum differs\); bring one back from"),
        (shutil.rmtree, r"\S+/checkpoints/frozen is not there, which holds .* not train: bring it back from a copy"),
    ],
    ids=["a flipped bit", "deleted"],
)
def test_harm_to_it_is_told_with_the_mend_and_nothing_is_moved(
    whole: tuple, tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    harm(workdir / "checkpoints" / "frozen")
    there = sorted(workdir.glob("checkpoints/**/*"))
    with pytest.raises(UserError, match=message):
        run(workdir, 8, nothing_to_take)
    assert sorted(workdir.glob("checkpoints/**/*")) == there


def test_a_failure_while_it_is_written_leaves_a_run_that_begins_again(
    whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.checksums, "write_manifest", fail)
        with pytest.raises(UserError, match=r"could not be written to \S+/frozen: Input/output error"):
            run(tmp_path, 6)
    assert not (tmp_path / "checkpoints" / "frozen" / "0").exists()
    for path, expected in whole[1].items():
        np.testing.assert_array_equal(values(run(tmp_path, 6))[path], expected, err_msg=path)


def test_a_frozen_parameter_that_nothing_fills_is_refused_before_anything_is_saved(tmp_path: Path) -> None:
    refused = "nothing fills lm/still, which is frozen and would stay random: begin from a run that has"
    with pytest.raises(UserError, match=re.escape(refused)):
        run(tmp_path, 2, lambda state: {})
    assert not list(tmp_path.glob("checkpoints/*"))
