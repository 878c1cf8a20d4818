"""Trains a preset: `python -m experiments.run PRESET [--field.subfield VALUE ...]`."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tyro

from experiments.presets import check_preset, presets
from vlm_jax.commandline import command
from vlm_jax.data import Tokenizer, evaluation_batches, load_tokenizer, make_tokenizer, open_source, train_batches
from vlm_jax.experiment import Distributed, Experiment, claimed_workdir, has_checkpoints, to_record
from vlm_jax.models import build
from vlm_jax.sharding import check_batch_size, make_mesh
from vlm_jax.train.loop import fit


def main() -> None:
    known = presets()
    check_preset(sys.argv[1:], known)
    experiment = tyro.extras.overridable_config_cli(known)
    join(experiment.distributed)
    run(sys.argv[1], experiment)


def join(distributed: Distributed) -> None:
    """Connects this process with the others of its run."""
    if distributed.coordinator == "auto":
        jax.distributed.initialize()
    elif distributed.coordinator is not None:
        jax.distributed.initialize(distributed.coordinator, distributed.num_processes, distributed.process_id)


def run(preset: str, experiment: Experiment) -> None:
    """Trains `experiment` in its directory, from where it stopped if it has begun."""
    check_batch_size(experiment.batch_size, make_mesh(experiment.mesh), experiment.micro_steps)
    workdir, data_dir = (
        Path(path).expanduser() for path in (experiment.workdir or f"runs/{preset}", experiment.data_dir)
    )
    model, data = build(experiment.model), experiment.data
    source = open_source(data.name, data.train, data_dir)
    # The first process alone claims the directory; where it is refused, it ends and the others with it.
    first = jax.process_index() == 0
    with claimed_workdir(workdir, to_record(preset, experiment)) if first else contextlib.nullcontext():
        tokenizer: Tokenizer | None = None
        if data.text is not None:
            # A run keeps the tokenizer that it began with, whatever another version would make of the captions.
            saved = workdir / "tokenizer.json"
            tokenizer = load_tokenizer(saved) if has_checkpoints(workdir) else make_tokenizer(data, data_dir)
            if first and tokenizer is not None:
                tokenizer.save(saved)

        def batches(rows: slice, start: int) -> Iterator[dict[str, np.ndarray]]:
            return train_batches(
                source,
                data,
                tokenizer,
                batch_size=experiment.batch_size,
                rows=rows,
                seed=experiment.seed,
                start=start,
                stop=experiment.steps,
            )

        validation = None
        if data.validation is not None:
            held_out = open_source(data.name, data.validation, data_dir)

            def validation(batch_size: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
                return evaluation_batches(held_out, data, tokenizer, batch_size=batch_size)

        fit(model, experiment, workdir, batches, validation)


if __name__ == "__main__":
    with command():
        main()
