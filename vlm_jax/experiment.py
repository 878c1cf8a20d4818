"""All that one run is told, and its record in the run's directory."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from vlm_jax.data import Data
from vlm_jax.errors import UserError
from vlm_jax.models import family_of, read_config
from vlm_jax.sharding import MeshShape
from vlm_jax.train.optim import Optimizer
from vlm_jax.trees import leaves_by_path

RUN_FIELDS = (
    "workdir",
    "data_dir",
    "mesh",
    "distributed",
    "zero_shot",
    "steps",
    "log_every",
    "checkpoint_every",
    "keep_last",
)
"""What may change between one start of a run and the next: none of it changes the value of any step."""


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Zero-shot classification of a labelled data set, as one of the run's evaluations."""

    name: str
    """A data set with labels."""
    split: str = "test"
    prompts: tuple[str, ...] = ("{}", "a photo of a {}.", "a drawing of a {}.")
    """Sentences whose mean describes a class; {} stands for its name."""
    names: str | None = None
    """Path of a file with a name for each class, one a line or JSON; None: those that the data set has."""
    label: str | None = None
    """The field of the data set to classify by, where it has several; None: the one called label, or the only one."""

    def __post_init__(self) -> None:
        wrong = [prompt for prompt in self.prompts if "{}" not in prompt]
        if wrong or not self.prompts:
            raise UserError(f"zero_shot.prompts {list(self.prompts)} must each hold {{}}, where the class's name goes")


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """How the processes of one run find each other; each runs the same command."""

    coordinator: str | None = None
    """HOST:PORT of process 0; auto: a TPU pod, SLURM or Open MPI tells; None: there is one process."""
    num_processes: int | None = None
    """Not needed with auto."""
    process_id: int | None = None
    """0, 1, ...; not needed with auto."""

    def __post_init__(self) -> None:
        if self.coordinator is None and (self.num_processes, self.process_id) != (None, None):
            raise UserError(
                "distributed.num_processes and distributed.process_id need distributed.coordinator, without which each "
                "process would train alone"
            )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model, its data, its optimizer and how long to train."""

    model: Any
    """The `Config` of a family in `vlm_jax.models`."""
    data: Data
    optimizer: Optimizer
    steps: int
    """Optimizer steps in all."""
    batch_size: int
    """Examples a step, over all devices."""
    micro_steps: int = 1
    """Compute each batch in this many parts, for its gradient to fit in memory."""
    ema_decay: float | None = None
    """Decay of an average of the parameters, which evaluations then use; None: no average."""
    seed: int = 0
    """Of the initialisation, the order of the data, augmentation, dropout and noise."""
    zero_shot: ZeroShot | None = None
    """What `tools.evaluate` classifies without training on it; None: nothing."""
    mesh: MeshShape = MeshShape()
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; with a validation split, each is scored and the best one kept."""
    keep_last: int = 3
    """Newest checkpoints to keep."""
    workdir: str | None = None
    """Where the run is kept; None: runs/PRESET."""
    data_dir: str = "~/.cache/vlm_jax/data"
    """Where prepared data sets are."""
    distributed: Distributed = Distributed()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_steps", "log_every", "checkpoint_every", "keep_last"):
            if not 1 <= getattr(self, name) < 2**31:  # on the devices they are int32
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1 and less than 2^31")
        if not 0 <= self.seed < 2**32:  # of a larger one JAX would take the lower 32 bits
            raise UserError(f"seed is {self.seed}: it must be at least 0 and less than 2^32")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}: it must lie in [0, 1)")
        # Of every part: JSON has no such numbers, and with one of them nothing is computed but more of its kind.
        for path, value in leaves_by_path(msgspec.to_builtins(self)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{path.replace('/', '.')} is {value}: it must be a finite number")


def to_record(preset: str, experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON values, with what its defaults stand for written out."""
    optimizer = experiment.optimizer
    if optimizer.schedule != "constant" and optimizer.decay_steps is None:
        experiment = replace(experiment, optimizer=replace(optimizer, decay_steps=experiment.steps))
    fields = msgspec.json.decode(msgspec.json.encode(experiment))
    return {"preset": preset, "family": family_of(experiment.model), **fields}


def from_record(record: dict[str, Any]) -> Experiment:
    """The inverse of `to_record`.

    Raises:
      UserError: it does not describe an experiment of this version of the library.
    """
    fields = {name: value for name, value in record.items() if name not in ("preset", "family")}
    try:
        experiment = msgspec.convert(fields, Experiment)
        return replace(experiment, model=read_config(record["family"], fields["model"]))
    except (msgspec.ValidationError, KeyError) as error:
        raise UserError(f"the record does not describe an experiment of this version: {error}") from error


def read_record(workdir: Path) -> dict[str, Any]:
    """`config.json` of a run.

    Raises:
      UserError: `workdir` is not the directory of a run.
    """
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text(), object_hook=modern)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{workdir} is not the directory of a run: it has no config.json") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a copy, or train anew elsewhere") from error


def modern(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a record that an older version may have written, as this one writes it."""
    if isinstance(part.get("remat"), bool):  # up to 0.1.0
        part["remat"] = "all" if part["remat"] else "none"
    return part


@contextlib.contextmanager
def claimed_workdir(workdir: Path, record: dict[str, Any]) -> Iterator[None]:
    """Makes `workdir` this run's for as long as the context lasts, and writes the record into it.

    The directory belongs to a configuration from the first checkpoint on: before it there is nothing to lose.

    Raises:
      UserError: another process is writing there, or the directory belongs to another configuration; the message
        shows the difference.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(workdir / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another process is writing to {workdir}: wait for it, stop it, or choose another --workdir"
        ) from error
    try:
        changes = differences(read_record(workdir), record) if has_checkpoints(workdir) else []
        if changes:
            raise UserError(
                f"{workdir} belongs to another configuration ({'; '.join(changes)}): "
                f"choose another --workdir, or run the command that began it"
            )
        temporary = workdir / "config.json.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(workdir / "config.json")
        yield
    finally:
        lock.release()


def has_checkpoints(workdir: Path) -> bool:
    """Whether anything was saved in the directory of a run."""
    return any(path.name.isdigit() for path in workdir.glob("checkpoints/*"))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields of two records that make them different runs, as "path: old -> new"."""
    old_leaves, new_leaves = flatten(old), flatten(new)
    return [
        f"{path}: {old_leaves.get(path, 'absent')} -> {new_leaves.get(path, 'absent')}"
        for path in sorted(old_leaves.keys() | new_leaves.keys())
        if path.split(".")[0] not in RUN_FIELDS and old_leaves.get(path, ...) != new_leaves.get(path, ...)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """JSON objects as dotted paths to JSON texts."""
    if not isinstance(value, dict):
        return {prefix: json.dumps(value)}
    leaves: dict[str, str] = {}
    for name, branch in value.items():
        leaves |= flatten(branch, f"{prefix}.{name}" if prefix else name)
    return leaves
