"""A run's directory, as what it holds: a model, its variables, its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from vlm_jax.contract import Model, Variables, abstract_batch
from vlm_jax.data import Tokenizer, load_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, from_record, read_record
from vlm_jax.models import build
from vlm_jax.sharding import parameter_shardings, replicated
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.trees import merge, partition


@dataclass(frozen=True)
class Loaded:
    """A trained model and what belongs to it."""

    model: Model
    variables: Variables
    """With averaged parameters where the run kept an average."""
    tokenizer: Tokenizer | None
    experiment: Experiment
    step: int
    """Of the checkpoint that the variables come from."""


def load(workdir: str | Path, *, step: int | None = None, mesh: Mesh | None = None) -> Loaded:
    """Loads a run from its directory and the installed package alone.

    Args:
      step: of a checkpoint; None: the one of least validation loss where the run kept score, else the newest.
      mesh: where to lay out the variables, by the model's rules; None: on the first device.

    Raises:
      UserError: `workdir` is not the directory of a run, or has no such or no sound checkpoint, or has lost
        its tokenizer.
    """
    workdir = Path(workdir).expanduser()
    experiment = from_record(read_record(workdir))
    tokenizer = None
    if experiment.data.text is not None:
        if not (workdir / "tokenizer.json").exists():
            raise UserError(f"{workdir} has lost its tokenizer.json, by which its model reads: copy it back")
        tokenizer = load_tokenizer(workdir / "tokenizer.json")
    model = build(experiment.model)
    batch = abstract_batch(model.inputs, experiment.batch_size)
    collections = dict(jax.eval_shape(model.init, jax.random.key(0), batch))
    params = collections.pop("params")
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, (params, collections))
    else:
        everywhere = replicated(mesh)
        shardings = parameter_shardings(params, model.rules, mesh), jax.tree.map(lambda _: everywhere, collections)
    params, collections = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (params, collections),
        shardings,
    )
    frozen, live = partition(params, model.frozen)
    items = {"params": params, "state": collections}
    if experiment.ema_decay is not None:
        # The average covers the live parameters; the frozen ones stand among the parameters only.
        items = {"ema": live, "state": collections} if not frozen else {**items, "ema": live}

    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(items, checkpoints.best_step() if step is None else step)
    if restored is None:
        raise UserError(f"{workdir} has no checkpoint yet: let the run reach its first one")
    step, values = restored
    if "ema" in values:
        frozen, _ = partition(values.get("params", {}), model.frozen)
        values["params"] = merge(values["ema"], frozen)
    return Loaded(
        model=model,
        variables={"params": values["params"], **values["state"]},
        tokenizer=tokenizer,
        experiment=experiment,
        step=step,
    )
