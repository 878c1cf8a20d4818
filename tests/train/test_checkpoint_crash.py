"""A write that fails and a process that is killed cost the checkpoint in hand and no other."""

import contextlib
import itertools
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.train.checkpoint import Checkpoints

SIZE = 1 << 18


def abstract() -> dict[str, jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {name: jax.ShapeDtypeStruct((SIZE,), np.float32, sharding=sharding) for name in ("params", "ema")}


def items(step: int) -> dict[str, np.ndarray]:
    """A megabyte an item, which does not compress."""
    noise = np.random.default_rng(step).random((2, SIZE), np.float32)
    return {"params": noise[0], "ema": noise[1]}


@pytest.mark.parametrize("limit", [SIZE, 16])
def test_a_write_that_fails_is_told_and_harms_no_earlier_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    """The limit on the size of a file fails the first write beyond it, of an array or of the smallest note."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(100, items(100))
        checkpoints.wait()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            message = (
                f"^checkpoint 200 could not be written to {tmp_path}: File too large; mend that and run the same "
                f"command again, the last good checkpoint is 100$"
            )
            checkpoints.save(200, items(200))
            with pytest.raises(UserError, match=message):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not any(record.exc_info for record in caplog.records)
        assert checkpoints.steps() == (100,)
        step, restored = checkpoints.restore(abstract())
        assert step == 100
        np.testing.assert_array_equal(restored["ema"], items(100)["ema"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(200, items(200))
        assert checkpoints.restore(abstract())[0] == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "200"]


def test_a_temporary_directory_that_still_grows_is_removed(tmp_path: Path) -> None:
    """As it does when one write of a save has failed and the others go on for a while."""
    dead = tmp_path / "200.orbax-checkpoint-tmp" / "d"
    dead.mkdir(parents=True)
    (dead / "0").touch()

    def grow() -> None:
        end = time.monotonic() + 0.3
        with contextlib.suppress(FileNotFoundError):
            for number in itertools.count():
                (dead / str(number)).touch()
                if time.monotonic() > end:
                    return

    writer = threading.Thread(target=grow)
    writer.start()
    with Checkpoints(tmp_path) as checkpoints:
        writer.join()
        assert checkpoints.steps() == ()
    assert list(tmp_path.iterdir()) == []


SAVE_UNTIL_KILLED = """
import os, signal, sys, threading
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
sys.path.insert(0, sys.argv[1])
from test_checkpoint_crash import abstract, items
from vlm_jax.train.checkpoint import Checkpoints

with Checkpoints(Path(sys.argv[2]), keep_last=2, keep_best=1) as checkpoints:
    found = checkpoints.restore(abstract())
    step = 0 if found is None else found[0]
    threading.Timer(float(sys.argv[3]), os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        step += 1
        checkpoints.save(step, items(step), validation_loss=abs(step - 3))
        checkpoints.wait()
        print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_loses_no_complete_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(0)
    complete = 0
    for _ in range(8):
        arguments = [str(Path(__file__).parent), str(tmp_path), str(moments.uniform(0.0, 0.6))]
        child = subprocess.run(
            [sys.executable, "-c", SAVE_UNTIL_KILLED, *arguments], capture_output=True, text=True, check=False
        )
        assert (child.returncode, child.stderr) == (-9, "")
        complete = max([complete, *map(int, child.stdout.split())])
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            found = checkpoints.restore(abstract())
            step, restored = (0, {}) if found is None else found
            assert complete <= step <= complete + 1
            complete = step
            for name, array in restored.items():
                np.testing.assert_array_equal(array, items(step)[name])
            if complete >= 3:
                assert checkpoints.best_step() == 3
                assert checkpoints.restore(abstract(), 3)[0] == 3
    assert complete > 0
