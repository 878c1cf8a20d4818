"""Trains a preset: `python -m experiments.run PRESET [--field.subfield VALUE ...]`."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import jax
import numpy as np
import tyro

from experiments.presets import from_command_line
from vlm_jax.begin import beginning, facts_of_starts, tokenizer_of_starts
from vlm_jax.commandline import command
from vlm_jax.contract import Batch, check_batch, check_sampling
from vlm_jax.data import (
    Packed,
    Source,
    Staged,
    Tokenizer,
    check_tokenizer,
    evaluation_batches,
    examples,
    make_tokenizer,
    open_data,
    open_training_data,
    rows_of,
    train_batches,
    versions,
)
from vlm_jax.errors import UserError
from vlm_jax.evals import written
from vlm_jax.experiment import Distributed, Experiment, model_of, to_record
from vlm_jax.paths import local_path
from vlm_jax.sharding import batch_shards, check_batch_size, make_mesh, process_rows, to_global
from vlm_jax.stages import staged, with_stages
from vlm_jax.start import Start
from vlm_jax.train.loop import Rows, Validation, fit
from vlm_jax.train.terminal import say
from vlm_jax.watch import HeldOut, watchers
from vlm_jax.workdir import claimed_workdir, has_checkpoints, read_identity, read_tokenizer, write_tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """A preset, and a run to begin from."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    init_from: str | None = None
    """Directory of a run whose whole model is the beginning, in place of the preset's starts; None: those."""


def main() -> None:
    purpose = "Trains a preset; the same command again goes on where it stopped."
    preset, options = from_command_line("python -m experiments.run", purpose, lambda preset: Options(experiment=preset))
    experiment = options.experiment
    if options.init_from is not None:
        experiment = replace(experiment, start=(Start(workdir=options.init_from),))
    join(experiment.distributed)
    run(preset, experiment)


def join(distributed: Distributed) -> None:
    """Connects this process with the others of its run.

    Raises:
      UserError: neither the command nor the machine says who they are.
    """
    if distributed.coordinator is None:
        return
    address = None if distributed.coordinator == "auto" else distributed.coordinator
    try:
        jax.distributed.initialize(address, distributed.num_processes, distributed.process_id)
    except ValueError as error:
        raise UserError(
            f"the processes of the run cannot find each other ({error}): give each --distributed.coordinator "
            f"HOST:PORT, --distributed.num-processes and --distributed.process-id"
        ) from error


def run(preset: str, experiment: Experiment) -> None:
    """Trains `experiment` in its directory, from where it stopped if it has begun."""
    training = experiment.training
    mesh = make_mesh(training.mesh)
    check_batch_size(training.batch_size, mesh, training.micro_steps)
    workdir, data_dir = (local_path(path) for path in (experiment.workdir or f"runs/{preset}", experiment.data_dir))
    model, data = model_of(experiment), experiment.data
    trained = staged(model) if experiment.cached else model
    check_sampling(model, experiment.sampling)
    sources = open_training_data(data, model.inputs, data_dir)
    held_out = None if data.validation is None else open_data(data, data.validation, model.inputs, data_dir)
    # The first process alone claims the directory; where it is refused, it ends and the others with it.
    first = jax.process_index() == 0
    # A run belongs to one version of its data, whatever is prepared beside it later.
    found = replace(experiment, data=versions(data, sources))
    facts = facts_of_starts(experiment, workdir)
    record = to_record(preset, found, examples(sources), facts)
    with claimed_workdir(workdir, record) if first else contextlib.nullcontext():
        tokenizer: Tokenizer | None = None
        if data.text is not None:
            # A run keeps the tokenizer that it began with, whatever another version would make of the captions.
            begun = has_checkpoints(workdir)
            if begun:
                tokenizer = read_tokenizer(workdir)
            else:
                tokenizer = tokenizer_of_starts(experiment) or make_tokenizer(data, sources)
            if tokenizer is not None and "tokens" in model.inputs:
                tokens = model.inputs["tokens"]
                check_tokenizer(tokenizer, vocab_size=tokens.limit, eos_id=tokens.contains)
            if first and not begun and tokenizer is not None:
                write_tokenizer(workdir, tokenizer)

        begin = beginning(experiment, facts, mesh)
        splits = (*sources, *(() if held_out is None else (held_out,)))
        kept: Sequence[Source | Staged] = splits
        read = data
        if experiment.cached:
            kept, read = with_stages(experiment, model, splits, data_dir, facts, begin)
        own, others = kept[: len(sources)], kept[len(sources) :]
        sets = [rows_of(each, read, trained.inputs, tokenizer, seed=training.seed) for each in own]
        for each in sets:
            if first and isinstance(each, Packed):
                say(str(each))
        scored = None if held_out is None else rows_of(held_out, data, model.inputs, tokenizer)
        validated = scored
        if experiment.cached:
            validated = next((rows_of(each, read, trained.inputs, tokenizer) for each in others), None)

        def batches(rows: Rows, start: int) -> Iterator[dict[str, np.ndarray]]:
            return train_batches(
                sets,
                read,
                trained.inputs,
                tokenizer,
                batch_size=training.batch_size,
                rows=rows,
                seed=training.seed,
                start=start,
                stop=training.steps,
            )

        validation, seen = None, None
        if held_out is not None and scored is not None and validated is not None:
            # A step's part at most; of a smaller split all of it at once, filled up to what the mesh can split.
            shards = batch_shards(mesh)
            size = min(training.batch_size // training.micro_steps, -(-len(scored) // shards) * shards)

            def held_out_batches(rows: Rows) -> Iterator[tuple[dict[str, np.ndarray], int]]:
                return evaluation_batches(validated, read, trained.inputs, tokenizer, batch_size=size, rows=rows)

            def seen_batches(one_by_one: bool = False) -> Iterator[tuple[Batch, int]]:
                source, how = (held_out, replace(data, pack=False)) if one_by_one else (scored, data)
                rows = process_rows(size, mesh)
                found = evaluation_batches(source, how, model.inputs, tokenizer, batch_size=size, rows=rows)
                for batch, valid in found:
                    yield to_global(check_batch(model.inputs, batch), size, mesh), valid

            validation = Validation(held_out_batches, size)
            seen = HeldOut(
                batches=seen_batches,
                examples=len(scored),
                tokenizer=tokenizer,
                records=held_out.strings,
                written=written(held_out.keys, model.inputs, partial(seen_batches, one_by_one=True)),
                training_texts=lambda: itertools.chain.from_iterable(source.texts() for source in sources),
            )

        fit(
            trained,
            training,
            workdir,
            batches,
            validation,
            watchers(experiment.watch, model, seen, experiment.sampling),
            begin=begin,
            frozen=experiment.frozen,
            frozen_dtype=experiment.frozen_dtype,
            identity=read_identity(workdir) if first else None,
        )


if __name__ == "__main__":
    with command():
        main()
