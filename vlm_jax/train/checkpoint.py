"""The one checkpoint manager: named trees of arrays, saved in the background and restored onto any mesh.

Orbax writes a checkpoint into a temporary directory and renames that when it is complete, so that a crash leaves no
half of one. It does not notice a flipped bit, and it stops at the first damaged file; what is here verifies checksums
and to what run a checkpoint belongs, and falls back to the newest checkpoint that is whole.

All processes of a run call the same methods in the same order, over one shared file system. What one of them finds
damaged is damaged for all.
"""

import contextlib
import errno
import itertools
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from vlm_jax.errors import UserError
from vlm_jax.train import checksums
from vlm_jax.train.agreement import agreed, gather
from vlm_jax.train.finite import not_finite
from vlm_jax.train.items import described, differences, opened, restore
from vlm_jax.train.saved import check_path, find_damage, misplaced, read_manifests, saved_steps, validation_losses

PyTree = Any

logger = logging.getLogger(__name__)

FILE_BYTES = 64 * 2**20
"""Of a file of arrays, which is compressed in memory before it is written; by default all of an item would be."""


class Checkpoints:
    """The checkpoints of one run, each a directory `DIRECTORY/STEP` with the items that were saved.

    The newest `keep_last` are kept, and the `keep_best` of lowest validation loss. Every method first waits for the
    save in the background and raises what went wrong with it; after that they can only be read. A directory has one
    writer at a time, since a second one would delete what the first is writing. A reader changes nothing.

    Args:
      identity: facts that give the arrays their meaning. They are written beside the arrays and compared with those
        of the checkpoints that are there; None, of a reader or of a process other than the first: not compared.

    Raises:
      UserError: a checkpoint there belongs elsewhere, is of another version of this library, or cannot be read; or
        the directory has a name that the libraries beneath would misread.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        read_only: bool = False,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        logging.getLogger("absl").addFilter(_worth_telling)
        check_path(directory, read_only=read_only)
        self._directory = directory.absolute()
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._identity = identity
        self._saving = 0
        self._items: dict[str, dict[str, str]] = {}
        self._losses: dict[int, float] = {}
        if wrong := agreed(misplaced(self._directory, identity)):
            raise UserError(wrong)
        self._manager = None if read_only else self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def steps(self) -> tuple[int, ...]:
        """The saved steps, ascending."""
        self.wait()
        return saved_steps(self._directory)

    def best_step(self) -> int | None:
        """The step of lowest validation loss; None if none was saved with one.

        Raises:
          UserError: the loss of a damaged one is not known, and may have been the lowest.
        """
        self.wait()
        manifests, damaged = read_manifests(self._directory)
        losses = validation_losses(manifests)
        if manifests and damaged:
            step, damage = next(iter(damaged.items()))
            raise UserError(
                f"which checkpoint in {self._directory} is the best cannot be known, since {step} is damaged "
                f"({step}/{damage}): bring it back from a copy, or choose one of {_listed(list(manifests))} yourself"
            )
        return min(losses, key=losses.__getitem__, default=None)

    def save(self, step: int, items: Mapping[str, PyTree], *, validation_loss: float | None = None) -> None:
        """Copies the items to the host and returns; they are written in the background.

        Args:
          step: names the checkpoint.
          items: trees of arrays, which may be empty or a single array.
          validation_loss: what `keep_best` goes by. One that is not finite counts as none.

        Raises:
          UserError: an earlier save failed, or the disk has no room for this one.
          ValueError: `step` is not above all saved steps, or the checkpoints can only be read.
        """
        saved = self.steps()
        if self._manager is None:
            raise ValueError(f"{self._directory} is open for reading only, or a save has failed")
        if saved and step <= saved[-1]:
            raise ValueError(f"checkpoint {step} would not be the newest in {self._directory}, {saved[-1]} is")
        self._check_room(step, items)
        if validation_loss is not None and math.isfinite(validation_loss):
            self._losses[step] = validation_loss
        self._saving = step
        self._items = {name: described({name: tree}) for name, tree in items.items()}
        # Within a dictionary a tree may be empty or a single array, which orbax refuses otherwise, and the path of
        # each leaf begins with its item.
        args = {
            name: ocp.args.PyTreeSave({name: tree}, ocdbt_target_data_file_size=FILE_BYTES)
            for name, tree in items.items()
        }
        with self._failure_told():
            # Without force, orbax would skip a step that it deems untimely and say nothing.
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def restore(self, abstract: Mapping[str, PyTree], step: int | None = None) -> tuple[int, dict[str, PyTree]] | None:
        """A step and its items, verified; None if nothing was ever saved.

        Args:
          abstract: the wanted items, as trees of `jax.ShapeDtypeStruct` with the shardings that the arrays will
            have. The files of other items are not read.
          step: None for the newest that is whole. Then each damaged one above it is reported as a warning and, by a
            writer, moved to `DIRECTORY/damaged`, so that training can come by that step again.

        Raises:
          UserError: the step does not exist; it, or every step, is damaged; it holds a symbolic link; its leaves
            are not those of `abstract`; or an earlier save failed.
        """
        self.wait()
        # Process 0's view decides, since a network file system may show a directory to some processes later.
        steps = [int(name) for name in gather(" ".join(map(str, saved_steps(self._directory))))[0].split()]
        if step is None:
            return self._restore_newest(abstract, steps)
        if step not in steps:
            there = f"choose one of {_listed(steps)}" if steps else "nothing was saved there"
            raise UserError(f"there is no checkpoint {step} in {self._directory}: {there}")
        try:
            return step, _sound(self._directory / str(step), abstract)
        except checksums.DamagedError as damage:
            others = _listed([other for other in steps if other != step])
            raise UserError(
                f"checkpoint {step} in {self._directory} is damaged ({damage}): "
                f"{f'choose another of {others}' if others else 'it is the only one, bring it back from a copy'}"
            ) from damage

    def wait(self) -> None:
        """Waits for the save in the background.

        Raises:
          UserError: it failed, for want of room on the disk or the like. Earlier checkpoints are not touched then.
        """
        if self._manager is not None:
            with self._failure_told():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, and ends the background threads."""
        if self._manager is not None:
            with self._failure_told():
                self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        # Orbax could do this too, but only in the background, to be waited for by the next save. No process passes
        # the barrier in the manager's constructor before it is done.
        if jax.process_index() == 0:
            for dead in self._directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}"):
                _remove(dead)
        manifests, damaged = read_manifests(self._directory)
        self._losses = validation_losses(manifests)
        keep_best = _KeepBest(self._keep_best, self._losses, damaged.keys())
        policies = (ocp.checkpoint_managers.LatestN(n=self._keep_last), keep_best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            # The manager then goes by the names of the steps alone and opens none of their files.
            lightweight_initialize=True,
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def _write_manifest(self) -> None:
        # Orbax calls this in its background thread on process 0, when all processes have written their files and
        # before the temporary directory gets its final name: what bears that name has a manifest.
        step = self._saving
        checkpoint = self._directory / f"{step}{ocp.utils.TMP_DIR_SUFFIX}"
        for name, expected in self._items.items():
            try:
                wrong = differences(opened(checkpoint, name), expected)
            except (OSError, ValueError) as error:
                raise _UnreadableError(f"what was written for {name} cannot be opened ({error})") from error
            if wrong:
                raise _UnreadableError(f"what was written holds {wrong[0]}")
        checksums.write_manifest(
            checkpoint,
            step=step,
            validation_loss=self._losses.get(step),
            identity=self._identity or {},
            items=self._items,
        )

    def _check_room(self, step: int, items: Mapping[str, PyTree]) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(items)))
        free = shutil.disk_usage(self._directory).free
        # Processes look at different moments and must still decide alike.
        if agreed("full" if free < needed else ""):
            problem = f"it needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; free space"
            raise UserError(self._unwritten(step, problem))

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except _UnreadableError as error:
            self._give_up()
            raise UserError(self._unwritten(self._saving, f"{error}; look at that file system")) from error
        except (OSError, ValueError) as error:
            self._give_up()
            number = _error_number(error)
            if number is None:
                raise
            mend = "free space" if number in (errno.ENOSPC, errno.EDQUOT) else "mend that"
            raise UserError(self._unwritten(self._saving, f"{os.strerror(number)}; {mend}")) from error

    def _give_up(self) -> None:
        # The first error may come while other files are still being written.
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with contextlib.suppress(OSError, ValueError, _UnreadableError):
                manager.close()

    def _unwritten(self, step: int, problem: str) -> str:
        complete = saved_steps(self._directory)
        last = f"the last good checkpoint is {complete[-1]}" if complete else "there is no checkpoint before it"
        return (
            f"checkpoint {step} could not be written to {self._directory}: {problem} and run the same command again, "
            f"{last}"
        )

    def _restore_newest(
        self, abstract: Mapping[str, PyTree], steps: Sequence[int]
    ) -> tuple[int, dict[str, PyTree]] | None:
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                restored = _sound(self._directory / str(step), abstract)
            except checksums.DamagedError as damage:
                damaged[step] = str(damage)
                continue
            if damaged:
                self._pass_over(damaged, step)
            return step, restored
        if not damaged:
            return None
        # They all stay where they are: were they moved away, the same command would start from nothing.
        every = ", ".join(f"{step} ({damage})" for step, damage in damaged.items())
        raise UserError(
            f"every checkpoint in {self._directory} is damaged: {every}; bring one back from a copy, or start anew in "
            f"another directory"
        )

    def _pass_over(self, damaged: Mapping[int, str], step: int) -> None:
        """Warns of the damaged checkpoints above `step`; a writer moves them aside."""
        aside = self._directory / "damaged"
        for bad, damage in damaged.items():
            told = f"checkpoint {bad} is damaged ({self._directory.name}/{bad}/{damage}): going on from {step}"
            if self._manager is not None and jax.process_index() == 0:
                aside.mkdir(exist_ok=True)
                names = itertools.chain([str(bad)], (f"{bad}-{number}" for number in itertools.count(2)))
                target = next(aside / name for name in names if not (aside / name).exists())
                (self._directory / str(bad)).rename(target)
                told += f", it is now {target}"
            if jax.process_index() == 0:
                logger.warning(told)
        if self._manager is not None:
            # A manager remembers the steps that it found at first.
            self._manager.close()
            self._manager = self._open()


class _UnreadableError(Exception):
    """A save left what the next start of the run could not restore."""


@dataclass(frozen=True)
class _KeepBest:
    """An orbax preservation policy that keeps the `count` checkpoints of lowest loss, and those that lost theirs.

    Orbax's `BestN` reads losses from a file of its own in each step, and one damaged file keeps the manager from
    being created at all; ours are in the manifests.
    """

    count: int
    losses: Mapping[int, float]
    damaged: Collection[int]
    """Without a manifest, so that the best may be among them."""

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = sorted((step for step in steps if step in self.losses), key=self.losses.__getitem__)[: self.count]
        return [step in best or step in self.damaged for step in steps]


def _remove(directory: Path) -> None:
    """Deletes it, though it may still grow: other writes go on for a while when one of a save has failed."""
    for seconds in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4):
        try:
            return shutil.rmtree(directory)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        time.sleep(seconds)
    shutil.rmtree(directory)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _sound(checkpoint: Path, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The items, known to be what was written and finite.

    Raises:
      checksums.DamagedError: they are not.
    """
    if damage := find_damage(checkpoint, abstract):
        raise checksums.DamagedError(damage)
    items = restore(checkpoint, abstract)
    # Of a run that diverged, which would only do so again from there.
    if path := agreed(not_finite(items)):
        raise checksums.DamagedError(f"{path}: holds nan or infinite values")
    return items


def _error_number(error: OSError | ValueError) -> int | None:
    """The `errno` of a system error; tensorstore hands it on as text in a `ValueError`."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match[1]) if match else None


def _worth_telling(record: logging.LogRecord) -> bool:
    """False for what orbax tells of its progress, and for tracebacks of errors that it raises as well.

    With several processes it raises them when all have come to a barrier or time is up, many minutes later.
    """
    if "orbax" not in Path(record.pathname).parts:
        return True
    return record.levelno >= logging.ERROR and (not record.exc_info or jax.process_count() > 1)
