"""The one checkpoint manager: named trees of arrays, saved in the background and restored onto any mesh.

Orbax writes a checkpoint into a temporary directory and renames that when it is complete, so that a crash leaves no
half of one. It does not notice a flipped bit or another dtype, and it stops at the first damaged file; what is here
verifies checksums, compares shapes and dtypes, and falls back to the newest checkpoint that is whole.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vlm_jax.errors import UserError
from vlm_jax.train import checksums
from vlm_jax.train.finite import not_finite
from vlm_jax.trees import leaves_by_path

PyTree = Any

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, each a directory `DIRECTORY/STEP` with the items that were saved.

    The newest `keep_last` are kept, and the `keep_best` of lowest validation loss. Every method first waits for the
    save in the background and raises what went wrong with it; after that they can only be read. A directory has one
    writer at a time, since a second one would delete what the first is writing. A reader changes nothing.
    """

    def __init__(self, directory: Path, *, keep_last: int = 3, keep_best: int = 1, read_only: bool = False) -> None:
        logging.getLogger("absl").addFilter(_worth_telling)
        self._directory = directory.absolute()
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._saving = 0
        self._losses: dict[int, float] = {}
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
        return _steps(self._directory)

    def best_step(self) -> int | None:
        """The step of lowest validation loss; None if none was saved with one."""
        losses = _validation_losses(self._directory, self.steps())
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
        # Within a dictionary a tree may be empty or a single array, which orbax refuses otherwise, and the path of
        # each leaf begins with its item.
        args = {name: ocp.args.StandardSave({name: tree}) for name, tree in items.items()}
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
        steps = [int(name) for name in _gather(" ".join(map(str, _steps(self._directory))))[0].split()]
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
        self._losses = _validation_losses(self._directory, _steps(self._directory))
        policies = (ocp.checkpoint_managers.LatestN(n=self._keep_last), _KeepBest(self._keep_best, self._losses))
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
        checksums.write_manifest(self._directory / f"{step}{ocp.utils.TMP_DIR_SUFFIX}", self._losses.get(step))

    def _check_room(self, step: int, items: Mapping[str, PyTree]) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(items)))
        free = shutil.disk_usage(self._directory).free
        # Processes look at different moments and must still decide alike.
        if _agreed("full" if free < needed else ""):
            problem = f"it needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; free space"
            raise UserError(self._unwritten(step, problem))

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
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
            with contextlib.suppress(OSError, ValueError):
                manager.close()

    def _unwritten(self, step: int, problem: str) -> str:
        complete = _steps(self._directory)
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


@dataclass(frozen=True)
class _KeepBest:
    """An orbax preservation policy that keeps the `count` checkpoints of lowest loss.

    Orbax's `BestN` reads losses from a file of its own in each step, and one damaged file keeps the manager from
    being created at all; ours are in the manifests.
    """

    count: int
    losses: Mapping[int, float]

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = sorted((step for step in steps if step in self.losses), key=self.losses.__getitem__)[: self.count]
        return [step in best for step in steps]


def _steps(directory: Path) -> tuple[int, ...]:
    return tuple(sorted(int(path.name) for path in directory.glob("[0-9]*") if path.name.isdecimal()))


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


def _validation_losses(directory: Path, steps: Sequence[int]) -> dict[int, float]:
    """Of the steps that were saved with one and whose manifest is whole."""
    losses = {}
    for step in steps:
        with contextlib.suppress(checksums.DamagedError):
            losses[step] = checksums.read_manifest(directory / str(step)).validation_loss
    return {step: loss for step, loss in losses.items() if loss is not None}


def _damage(checkpoint: Path, items: Mapping[str, PyTree]) -> str:
    """What is wrong with the files of these items, empty if nothing; each process reads its share, all agree.

    Raises:
      UserError: there is a symbolic link, through which orbax would read and delete things elsewhere.
    """
    link = next((str(path) for path in (checkpoint, *checkpoint.glob("**/*")) if path.is_symlink()), "")
    if link := _agreed(link):
        raise UserError(f"{link} is a symbolic link: a checkpoint holds none, put the file itself there")
    damage = ""
    try:
        checksums.verify(checkpoint, items, share=jax.process_index(), shares=jax.process_count())
    except checksums.DamagedError as error:
        damage = str(error)
    return _agreed(damage)


def _sound(checkpoint: Path, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The items, known to be what was written and finite.

    Raises:
      checksums.DamagedError: they are not.
    """
    if damage := _damage(checkpoint, abstract):
        raise checksums.DamagedError(damage)
    items = _restore(checkpoint, abstract)
    # Of a run that diverged, which would only do so again from there.
    if path := _agreed(not_finite(items)):
        raise checksums.DamagedError(f"{path}: holds nan or infinite values")
    return items


def _restore(checkpoint: Path, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The items, once all their leaves are known to be the expected ones."""
    with ocp.StandardCheckpointer() as reader:
        for name, tree in abstract.items():
            saved = {}
            if (checkpoint / name).is_dir():
                saved = leaves_by_path(reader.metadata(checkpoint / name).item_metadata.tree)
            _check_leaves(checkpoint, saved, leaves_by_path({name: tree}))
        return {
            name: reader.restore(checkpoint / name, {name: tree})[name] if jax.tree.leaves(tree) else tree
            for name, tree in abstract.items()
        }


def _check_leaves(checkpoint: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Orbax itself would cast another dtype silently."""
    for path in sorted(saved.keys() | expected.keys()):
        found, wanted = (
            f"{np.dtype(leaves[path].dtype)}{list(leaves[path].shape)}" if path in leaves else "nothing"
            for leaves in (saved, expected)
        )
        if found != wanted:
            raise UserError(
                f"{checkpoint} holds {found} for {path} where {wanted} is expected: use the settings that it was "
                f"saved with, or another directory"
            )


def _agreed(problem: str) -> str:
    """The first problem that a process sees, on all of them; empty if none sees any."""
    return next(filter(None, _gather(problem)), "")


def _gather(text: str) -> list[str]:
    """The text of each process."""
    if jax.process_count() == 1:
        return [text]
    characters = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(characters.size))
    padded = np.zeros(max(lengths) + 1, np.uint8)
    padded[: characters.size] = characters
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


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
