"""Evaluates a run: `python -m tools.evaluate WORKDIR`. Runs all that the model can do; writes WORKDIR/eval.json."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh
from tqdm import tqdm

from tools.data import OtherData, choose_data
from tools.judging import image_of, load_judges, pictures_of
from vlm_jax.commandline import command, require_one_process
from vlm_jax.contract import Batch, Input, check_batch
from vlm_jax.data import (
    Data,
    Interleaved,
    Label,
    Records,
    Source,
    class_names,
    evaluation_batches,
    open_data,
    open_source,
    open_training_data,
    read_class_names,
    rows_of,
)
from vlm_jax.data.fields import Inputs
from vlm_jax.errors import UserError, check_seed
from vlm_jax.evals import EVALUATIONS, Evaluation, Judge, Labelled, Lessons, Subject, written
from vlm_jax.experiment import ZeroShot
from vlm_jax.files import check_writable, parse_json, write_output
from vlm_jax.paths import local_path
from vlm_jax.sharding import MeshShape, batch_sharding, make_mesh
from vlm_jax.workdir import Loaded, load

Results = dict[str, float | int | str | None]
"""By name: facts of the evaluation, and EVALUATION/METRIC; None: not defined, or not finite."""


def evaluate(
    workdir: Annotated[Path, tyro.conf.Positional],
    data: OtherData = OtherData(),
    split: str | None = None,
    checkpoint_step: int | None = None,
    data_dir: str | None = None,
    judge: tuple[Path, ...] = (),
    zero_shot: str | None = None,
    zero_shot_split: str | None = None,
    zero_shot_label: str | None = None,
    zero_shot_names: str | None = None,
    prompts: tuple[str, ...] = (),
    batch_size: int = 128,
    seed: int = 0,
    only: tuple[str, ...] = (),
    out: Path | None = None,
) -> Results:
    """Runs every evaluation that the model's capabilities allow, prints what it finds and writes WORKDIR/eval.json.

    Each result is printed, then written, when it is there. Where an evaluation fails, the others go on; then the
    command says which and ends with status 2.

    Args:
      workdir: The directory of a run.
      split: Part of the data set to evaluate on; None: the run's test split.
      checkpoint_step: Step of a checkpoint; None: the best by validation loss, else the newest.
      data_dir: Where prepared data sets are; None: where the run had them.
      judge: The directories of runs that can embed images, or of the network of FID, by which those that the model
        makes are measured. Each of several has metrics of its own, METRIC_by_NAME, where NAME is the end of its
        directory.
      zero_shot: A labelled data set to classify; None: the one that the run names, if any.
      zero_shot_split: The part of it to classify; None: test, or the run's.
      zero_shot_label: Its field to classify by, where it has several labels.
      zero_shot_names: A file with the name of each class, one a line or JSON; None: the data set's own names.
      prompts: Sentences whose mean describes a class, {} stands for its name; none: the run's, or the usual ones.
      batch_size: Examples at a time, rounded up to a multiple of the devices.
      seed: Of the noise that bounds are averaged over.
      only: Names of evaluations; none: all that the model's capabilities allow.
      out: The file to write; None: WORKDIR/eval.json, of another data set WORKDIR/eval-NAME-SPLIT.json.

    Raises:
      UserError: the directory is no run, what is asked for does not exist or is beyond the model, there are several
        processes, or an evaluation failed.
    """
    require_one_process()
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}: it must be at least 1")
    check_seed(seed)
    workdir, out = local_path(workdir), None if out is None else local_path(out)
    if out is not None:
        check_writable(out)
    mesh = make_mesh(MeshShape())
    batch_size = -(-batch_size // mesh.size) * mesh.size
    changes = {"split": zero_shot_split, "label": zero_shot_label, "names": zero_shot_names, "prompts": prompts}
    failures: dict[str, Exception] = {}
    with jax.set_mesh(mesh):
        loaded = load(workdir, step=checkpoint_step, mesh=mesh)
        read = choose_data(loaded, data)
        split = split or read.test
        directory = local_path(data_dir or loaded.experiment.data_dir)
        out = out or workdir / results_name(data.name, split)
        task = choose_task(workdir, loaded, zero_shot, changes)
        judges = load_judges(judge, mesh, image_of(loaded) if judge else None)
        wanted: dict[str, Any] = {"seed": seed, "judges": judges, "probed": not only or "information" in only}
        subject, source = subject_of(loaded, read, split, directory, mesh, batch_size, **wanted)
        if task is not None and (not only or "zero_shot" in only):
            try:
                subject = replace(subject, labelled=labelled(loaded, task, read, directory, mesh, batch_size))
            except UserError as error:
                if only or zero_shot or any(changes.values()):
                    raise
                failures["zero_shot"] = error  # asked for by the run, not by the command: the rest is worth having
                tell("zero_shot", error)
        chosen = choose(subject, only)
        facts: Results = {"step": loaded.step, "split": split, "examples": subject.examples, "seed": seed}
        if data.name is not None:
            facts = {"data": source.full_name, **facts}
        if loaded.model.bound is not None:
            facts["bound"] = loaded.model.bound
            if "label" in loaded.model.inputs:
                facts["given"] = "class"
        print_table(facts)
        results = dict(facts)
        for evaluation in chosen:
            try:
                measured = dict(evaluation.run(subject))
            except Exception as error:
                failures[evaluation.name] = error
                tell(evaluation.name, error)
                continue
            found: Results = {f"{evaluation.name}/{metric}": value for metric, value in measured.items()}
            if "labelled" in evaluation.given and task is not None:
                found |= describe(task)
            if judge and "judges" in (*evaluation.given, *evaluation.if_given):
                found[f"{evaluation.name}_judge"] = ", ".join(map(str, judge))
            print_table(found)
            results |= {name: finite(value) for name, value in found.items()}
            try:
                keep(out, facts, results)
            except UserError as error:
                failures["the file of results"] = error
    if failures:
        told = "; ".join(f"{name}: {sentence(error)}" for name, error in failures.items())
        raise UserError(f"{told} (what is printed above holds)" if len(results) > len(facts) else told)
    return results


def subject_of(
    loaded: Loaded,
    data: Data,
    split: str,
    data_dir: Path,
    mesh: Mesh,
    batch_size: int,
    *,
    seed: int = 0,
    judges: tuple[Judge, ...] | None = None,
    probed: bool = False,
) -> tuple[Subject, Source]:
    """What evaluations look at of a run on a split, and the split's records.

    Args:
      probed: with the training split of the same data, for probes of what the model makes of images.
    """
    model, own = loaded.model, loaded.experiment.data
    inputs = model.inputs
    source = open_data(data, split, inputs, data_dir)
    rows = rows_of(source, data, inputs, loaded.tokenizer)
    reading = partial(reader, loaded, batch_size, batch_sharding(mesh))

    def training() -> Iterator[tuple[Batch, int]]:
        for each in open_training_data(own, inputs, data_dir):
            yield from reading(rows_of(each, own, inputs, loaded.tokenizer), own, inputs)()

    def training_texts() -> Iterator[str]:
        for each in open_training_data(own, inputs, data_dir):
            yield from each.texts()

    asking = tuple(field for field in data.fields if not isinstance(field, Interleaved))
    one_by_one = reading(source, replace(data, pack=False, fields=asking), inputs)
    lessons = None
    if probed and model.encode is not None:
        with suppress(UserError):  # of data that opened as they should: they have no such split
            taught = open_data(data, data.train, inputs, data_dir)
            images = replace(data, pack=False)
            lessons = Lessons(reading(taught, images, {"image": inputs["image"]}), taught.strings)
    told: dict[str, Any] = dict(written(source.keys, inputs, one_by_one))
    found = Subject(
        model=model,
        variables=loaded.variables,
        batches=reading(rows, data, inputs),
        examples=len(rows),
        key=jax.random.key(seed),
        tokenizer=loaded.tokenizer,
        records=source.strings,
        **told,
        training_texts=None if own.name is None else training_texts,
        training=None if own.name is None else training,
        lessons=lessons,
        sampling=loaded.experiment.sampling,
        pictures=pictures_of(loaded, source, data, data_dir, batch_size),
        judges=judges,
    )
    return found, source


def reader(
    loaded: Loaded,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    rows: Records,
    data: Data,
    inputs: Inputs,
) -> Callable[[], Iterator[tuple[Batch, int]]]:
    """As `Subject.batches`."""
    return lambda: on_device(rows, data, loaded, batch_size, inputs, sharding)


def labelled(loaded: Loaded, task: ZeroShot, data: Data, data_dir: Path, mesh: Mesh, batch_size: int) -> Labelled:
    """What is classified without training on it."""
    classes = open_source(task.name, task.split, data_dir, label=task.label)
    names = name_classes(classes, task)
    seen = {"image": loaded.model.inputs["image"], "label": Input((), "int32", len(names))}
    images = replace(data, fields=(*data.fields, Label()), pack=False)
    return Labelled(reader(loaded, batch_size, batch_sharding(mesh), classes, images, seen), names, task.prompts)


def results_name(name: str | None, split: str) -> str:
    """The file of results; the run's own data need no name."""
    return "eval.json" if name is None else f"eval-{name}-{split}.json".replace("/", "-")


def choose_task(workdir: Path, loaded: Loaded, name: str | None, changes: dict[str, Any]) -> ZeroShot | None:
    """What to classify: what is asked for, else what the run names, with its fields changed to what is given.

    Raises:
      UserError: the model takes no texts, or changes are of nothing.
    """
    changes = {field: value for field, value in changes.items() if value}
    if loaded.model.embed_text is None:
        if name or changes:
            raise UserError(f"{workdir} holds a model that takes no texts: leave out --zero-shot and --prompts")
        return None
    task = ZeroShot(name=name) if name else loaded.experiment.zero_shot
    if not changes:
        return task
    if task is None:
        flag = "--prompts" if "prompts" in changes else f"--zero-shot-{next(iter(changes))}"
        raise UserError(f"{workdir} names nothing to classify by {flag}: add --zero-shot")
    return replace(task, **changes)


def name_classes(classes: Source, task: ZeroShot) -> tuple[str, ...]:
    """What the classes of a data set are called.

    Raises:
      UserError: it has no labels, or several, or they have no names.
    """
    if classes.label_names is None:
        if classes.label_fields:
            raise UserError(
                f"{task.name} has several labels: choose one of {', '.join(classes.label_fields)} for --zero-shot-label"
            )
        raise UserError(f"{task.name} has no labels to classify: choose another data set for --zero-shot")
    if task.names is not None:
        return read_class_names(local_path(task.names), classes.label_names)
    return class_names(classes.label_names)


def describe(task: ZeroShot) -> Results:
    """What was classified, and how."""
    described = {"data": task.name, "split": task.split, "label": task.label, "names": task.names}
    described["prompts"] = " | ".join(task.prompts)
    return {f"zero_shot_{field}": value for field, value in described.items() if value is not None}


def finite(value: float | int | str | None) -> float | int | str | None:
    """None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep(path: Path, facts: Results, results: Results) -> None:
    """Writes results, beside those of other evaluations where these are there of the same checkpoint and images.

    What was measured before by the same evaluation, such as by other judges, is gone.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        old = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        old = None
    if not isinstance(old, dict) or any(old.get(name) != value for name, value in facts.items()):
        old = {}
    anew = tuple(f"{name.split('/')[0]}{mark}" for name in results if "/" in name for mark in "/_")
    others = {name: value for name, value in old.items() if not name.startswith(anew)}
    text = json.dumps(others | results, indent=2, allow_nan=False) + "\n"
    write_output(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sentence(error: Exception) -> str:
    """One line of an error."""
    line = " ".join(str(error).split())
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def tell(name: str, error: Exception) -> None:
    """At once, so that nobody waits for what will not come."""
    print(f"{name} failed: {sentence(error)}", file=sys.stderr, flush=True)


def choose(subject: Subject, names: tuple[str, ...]) -> list[Evaluation]:
    """The evaluations of these names; of none: all that apply.

    Raises:
      UserError: there is none of a name, it does not apply, none does, or no judge can do what one is needed for.
    """
    known = {evaluation.name: evaluation for evaluation in EVALUATIONS}
    for name in names:
        if name not in known:
            raise UserError(f"there is no evaluation {name}: choose from {', '.join(known)} for --only")
        known[name].check(subject)
        if not known[name].applies_to(subject):
            raise UserError(f"the model has nothing for the evaluation {name} to measure: leave it out of --only")
    chosen = [known[name] for name in names] or [each for each in EVALUATIONS if each.applies_to(subject)]
    if not chosen:
        raise UserError("the model does nothing that an evaluation measures: give a run of what it is a part of")
    return chosen


def on_device(
    rows: Records,
    data: Data,
    loaded: Loaded,
    batch_size: int,
    inputs: Inputs,
    sharding: jax.sharding.Sharding,
) -> Iterator[tuple[Batch, int]]:
    """Examples in order, on the devices, with a progress bar."""
    batches = evaluation_batches(rows, data, inputs, loaded.tokenizer, batch_size=batch_size)
    for batch, valid in tqdm(batches, total=-(-len(rows) // batch_size), desc=data.name, leave=False, disable=None):
        fields = check_batch(inputs, batch)
        yield {name: jax.device_put(values, sharding) for name, values in fields.items()}, valid


def print_table(results: Results) -> None:
    """One result a line."""
    width = max(map(len, results), default=0)
    for name, value in results.items():
        shown = "undefined" if value is None else f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name:<{width}}  {shown}", flush=True)


if __name__ == "__main__":
    with command():
        tyro.cli(evaluate)
