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
    zero_shot_split: str = ZeroShot.split,
    prompts: tuple[str, ...] = (),
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
      zero_shot_split: With --zero-shot: the part of it to classify.
      prompts: Sentences whose mean describes a class, {} stands for its name; none: the run's, or the usual ones.
      batch_size: Examples at a time, rounded up to a multiple of the devices.
      seed: Of the noise that bounds are averaged over.
      only: Names of evaluations; none: all that the model's capabilities allow.

    Raises:
      UserError: the directory is no run, or what is asked for does not exist or is beyond the model.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}: it must be at least 1")
    mesh = make_mesh(MeshShape())
    batch_size = -(-batch_size // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        loaded = load(workdir, step=checkpoint_step, mesh=mesh)
        data = loaded.experiment.data
        split = split or data.test
        directory = Path(data_dir or loaded.experiment.data_dir).expanduser()
        source = open_source(data.name, split, directory)
        asked = ZeroShot(name=zero_shot, split=zero_shot_split) if zero_shot else None
        task = choose_task(workdir, loaded, asked, prompts)

        def batches(source: Source, data: Data, fields: tuple[str, ...]) -> Callable[[], Iterator[tuple[Batch, int]]]:
            return lambda: on_device(source, data, loaded, batch_size, fields, batch_sharding(mesh))

        labelled = None
        if task is not None and (not only or "zero_shot" in only):
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
        results: dict[str, float | int | str] = {"step": loaded.step, "split": split}
        results |= {"examples": len(source), "seed": seed}
        if loaded.model.bound is not None:
            results["bound"] = loaded.model.bound
            if "label" in loaded.model.inputs:
                results["given"] = "class"
        for evaluation in choose(subject, only):
            for metric, value in evaluation.run(subject).items():
                results[f"{evaluation.name}/{metric}"] = value
    keep(workdir / "eval.json", results)
    return results


def choose_task(workdir: Path, loaded: Loaded, asked: ZeroShot | None, prompts: tuple[str, ...]) -> ZeroShot | None:
    """What to classify: what is asked for, else what the run names.

    Raises:
      UserError: the model takes no texts, or prompts describe nothing.
    """
    if loaded.model.encode_text is None:
        if asked or prompts:
            raise UserError(f"{workdir} holds a model that takes no texts: leave out --zero-shot and --prompts")
        return None
    task = asked or loaded.experiment.zero_shot
    if not prompts:
        return task
    if task is None:
        raise UserError(f"{workdir} names nothing to classify by --prompts: add --zero-shot")
    return replace(task, prompts=prompts)


def keep(path: Path, results: dict[str, float | int | str]) -> None:
    """Writes results, beside those of other evaluations where these are there of the same checkpoint and images."""
    try:
        old = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        old = {}
    same = all(old.get(name) == value for name, value in results.items() if "/" not in name)
    path.write_text(json.dumps((old if same else {}) | results, indent=2) + "\n")


def choose(subject: Subject, names: tuple[str, ...]) -> list[Evaluation]:
    """The evaluations of these names; of none: all that apply.

    Raises:
      UserError: there is none of a name, or it does not apply.
    """
    known = {evaluation.name: evaluation for evaluation in EVALUATIONS}
    for name in names:
        if name not in known:
            raise UserError(f"there is no evaluation {name}: choose from {', '.join(known)} for --only")
        if not known[name].applies_to(subject):
            raise UserError(f"the model has nothing for the evaluation {name} to measure: leave it out of --only")
    return [known[name] for name in names] or [each for each in EVALUATIONS if each.applies_to(subject)]


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
