"""How much compute runs took, and whether they are whole."""

from pathlib import Path

import jax

from vlm_jax.contract import abstract_batch
from vlm_jax.experiment import Experiment, from_record
from vlm_jax.models import build
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.flops import model_flops
from vlm_jax.workdir import CHECKPOINTS, has_checkpoints, read_record


def complete(path: Path, experiment: Experiment) -> bool:
    """Whether the run's last checkpoint is there; such a run is as it is wherever it was trained."""
    if not has_checkpoints(path):
        return False
    with Checkpoints(path / CHECKPOINTS, read_only=True) as checkpoints:
        return max(checkpoints.steps()) >= experiment.training.steps


def step_flops(experiment: Experiment) -> float:
    """Of one step, with what is frozen in it."""
    model = build(experiment.model)
    batch = abstract_batch(model.inputs, experiment.training.batch_size)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    return float(model_flops(model, variables, batch, experiment.frozen))


def spent_flops(path: Path) -> float:
    """Of a run and of all that it began with."""
    experiment = from_record(read_record(path))
    with Checkpoints(path / CHECKPOINTS, read_only=True) as checkpoints:
        own = max(checkpoints.steps()) * step_flops(experiment)
    return own + sum(spent_flops(Path(each.workdir)) for each in experiment.start)
