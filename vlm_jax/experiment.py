"""All that one run is told, and the record of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec
import tyro

from vlm_jax.contract import Model
from vlm_jax.data import CACHE, Data
from vlm_jax.errors import UserError, pattern_fault
from vlm_jax.lora import BASE, LoRA, adapted
from vlm_jax.models import build
from vlm_jax.records import from_json, to_json
from vlm_jax.start import Start
from vlm_jax.train.plan import Training
from vlm_jax.trees import leaves_by_path
from vlm_jax.watch import Watch


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
    """A model, its data, and how it is trained on them."""

    model: Any
    """The `Config` of a family in `vlm_jax.models`."""
    data: Data
    training: Annotated[Training, tyro.conf.arg(name="")]
    """Its fields have no prefix on the command line: `--steps`, `--optimizer.learning-rate`."""
    start: tuple[Start, ...] = ()
    """What it begins with of other runs, a later one over the earlier; all else is drawn."""
    frozen: tuple[str, ...] = ()
    """Regular expressions of the paths of parameters that do not train, all of which a start gives."""
    frozen_dtype: Literal["bfloat16"] | None = None
    """Of these parameters; None: float32, as the others are."""
    sampling: Any = None
    """Settings by which samples are drawn, of the type of `Model.sampling`; None: the family's own."""
    cached: bool = False
    """What frozen parts make of the images is computed once and kept beside the data, in place of every time; it then
    is of each image as it is, without augmentation."""
    lora: LoRA = LoRA()
    """Adapters that train in place of the kernels; with them all else is frozen, unless `frozen` says what."""
    zero_shot: ZeroShot | None = None
    """What `tools.evaluate` classifies without training on it; None: nothing."""
    watch: Watch = Watch()
    """What is looked at at each checkpoint, beside the loss of the validation split."""
    workdir: str | None = None
    """Where the run is kept; None: runs/PRESET."""
    data_dir: str = CACHE
    """Where prepared data sets are."""
    distributed: Distributed = Distributed()

    def __post_init__(self) -> None:
        if self.lora.rank is not None and not self.frozen:
            object.__setattr__(self, "frozen", (BASE,))
        for pattern in self.frozen:
            if fault := pattern_fault(pattern):
                raise UserError(f"frozen is {pattern!r}, which is not a regular expression ({fault})")
        # Of every part: JSON has no such numbers, and with one of them nothing is computed but more of its kind.
        for path, value in leaves_by_path(msgspec.to_builtins(self)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{path.replace('/', '.')} is {value}: it must be a finite number")


def model_of(experiment: Experiment) -> Model:
    """What a run trains: its family's model, with adapters where it has them."""
    model = build(experiment.model)
    return model if experiment.lora.rank is None else adapted(model, experiment.lora)


def to_record(
    preset: str, experiment: Experiment, examples: Mapping[str, Any], taken: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The experiment as JSON values, with what its defaults stand for written out.

    Args:
      examples: in each split of its data sets, of which `experiment.data` should name the versions.
      taken: of each of `experiment.start`, the step and the digest of what it gave.
    """
    training = experiment.training
    if training.optimizer.schedule != "constant" and training.optimizer.decay_steps is None:
        optimizer = replace(training.optimizer, decay_steps=training.steps)
        experiment = replace(experiment, training=replace(training, optimizer=optimizer))
    found = {"examples": dict(examples), "taken": [*map(dict, taken)]}
    return {"preset": preset, **found, **to_json(experiment)}


def from_record(record: dict[str, Any]) -> Experiment:
    """The inverse of `to_record`.

    Raises:
      UserError: it does not describe an experiment of this version of the library.
    """
    fields = {name: value for name, value in record.items() if name not in ("preset", "examples", "taken")}
    return from_json(Experiment, fields)
