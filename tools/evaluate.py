"""Evaluates a run: `python -m tools.evaluate WORKDIR`. Runs all that the model can do; writes WORKDIR/eval.json."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import jax
import tyro
from tqdm import tqdm

from vlm_jax.commandline import command
from vlm_jax.contract import Batch, check_batch
from vlm_jax.data import Data, Source, evaluation_batches, open_source
from vlm_jax.errors import UserError
from vlm_jax.evals import EVALUATIONS, Evaluation, Labelled, Subject
from vlm_jax.experiment import ZeroShot
from vlm_jax.sharding import MeshShape, batch_sharding, make_mesh
from vlm_jax.workdir import Loaded, load


def evaluate(
    workdir: Annotated[Path, tyro.conf.Positional],
    split: str | None = None,
    checkpoint_step: int | None = None,
    data_dir: str | None = None,
    zero_shot: str | None = None,
    prompts: tuple[str, ...] = ZeroShot.prompts,
    batch_size: int = 128,
    seed: int = 0,
    only: tuple[str, ...] = (),
) -> dict[str, float | int | str]:
    """Runs every evaluation that the model's capabilities allow, prints a table and writes WORKDIR/eval.json.

    Args:
      workdir: The directory of a run.
      split: Part of the run's data set to evaluate on; None: the run's test split.
      checkpoint_step: Step of a checkpoint; None: the best by validation loss, else the newest.
      data_dir: Where prepared data sets are; None: where the run had them.
      zero_shot: A labelled data set to classify; None: the one that the run names, if any.
      prompts: With --zero-shot: sentences whose mean describes a class; {} stands for its name.
      batch_size: Examples at a time, rounded up to a multiple of the devices.
      seed: Of the noise that bounds are averaged over.
      only: Names of evaluations; none: all that the model's capabilities allow.

    Raises:
      UserError: the directory is no run, or what is asked for does not exist or is beyond the model.
    """
    mesh = make_mesh(MeshShape())
    batch_size = -(-batch_size // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        loaded = load(workdir, step=checkpoint_step, mesh=mesh)
        data = loaded.experiment.data
        split = split or data.test
        directory = Path(data_dir or loaded.experiment.data_dir).expanduser()
        source = open_source(data.name, split, directory)
        task = ZeroShot(name=zero_shot, prompts=prompts) if zero_shot else loaded.experiment.zero_shot

        def batches(source: Source, data: Data, fields: tuple[str, ...]) -> Callable[[], Iterator[tuple[Batch, int]]]:
            return lambda: on_device(source, data, loaded, batch_size, fields, batch_sharding(mesh))

        labelled = None
        if task is not None and loaded.model.encode_text is not None:
            classes = open_source(task.name, task.split, directory)
            if classes.label_names is None:
                raise UserError(f"{task.name} has no labels to classify: choose another data set for --zero-shot")
            shown = batches(classes, replace(data, text=None), ("image", "label"))
            labelled = Labelled(shown, classes.label_names, task.prompts)
        subject = Subject(
            model=loaded.model,
            variables=loaded.variables,
            batches=batches(source, data, tuple(loaded.model.inputs)),
            tokenizer=loaded.tokenizer,
            labelled=labelled,
            key=jax.random.key(seed),
        )
        results: dict[str, float | int | str] = {"step": loaded.step, "split": split, "examples": len(source)}
        if loaded.model.bound is not None:
            results["bound"] = loaded.model.bound
        for evaluation in choose(subject, only):
            for metric, value in evaluation.run(subject).items():
                results[f"{evaluation.name}/{metric}"] = value
    (workdir / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def choose(subject: Subject, names: tuple[str, ...]) -> list[Evaluation]:
    """The evaluations of these names; of none: all that apply.

    Raises:
      UserError: one does not apply.
    """
    able = {evaluation.name: evaluation for evaluation in EVALUATIONS if evaluation.applies_to(subject)}
    for name in names:
        if name not in able:
            raise UserError(f"there is no evaluation {name} of this model: choose from {', '.join(able)} for --only")
    return [able[name] for name in names or able]


def on_device(
    source: Source,
    data: Data,
    loaded: Loaded,
    batch_size: int,
    fields: tuple[str, ...],
    sharding: jax.sharding.Sharding,
) -> Iterator[tuple[Batch, int]]:
    """The source's examples in order, on the devices, with a progress bar."""
    inputs = {name: spec for name, spec in loaded.model.inputs.items() if name in fields}
    batches = evaluation_batches(source, data, loaded.tokenizer, batch_size=batch_size)
    for batch, valid in tqdm(batches, total=-(-len(source) // batch_size), desc=source.name, leave=False):
        check_batch(inputs, batch)
        yield {name: jax.device_put(batch[name], sharding) for name in fields}, valid


def print_table(results: dict[str, float | int | str]) -> None:
    """One result a line."""
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


if __name__ == "__main__":
    with command():
        print_table(tyro.cli(evaluate))
