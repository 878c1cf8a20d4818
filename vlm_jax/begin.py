"""The beginning of a run that takes parts of others: what is looked up, compared and loaded of them, and when.

Before the directory is claimed the configurations are compared; when nothing is saved there yet the variables are
loaded. From the first checkpoint on nothing is asked of the others, which may be gone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vlm_jax.data import Tokenizer, load_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, from_record
from vlm_jax.lora import without_adapters
from vlm_jax.paths import local_path
from vlm_jax.start import check_configs, part_of, reads_tokens, taken
from vlm_jax.train.step import TrainState, eval_variables
from vlm_jax.train.terminal import say
from vlm_jax.workdir import has_checkpoints, load, read_record, read_tokenizer, taken_from


def facts_of_starts(experiment: Experiment, workdir: Path) -> list[dict[str, Any]]:
    """Of each of a run's starts, the step and the digest of what it gives, or gave where the run has begun.

    A run that has begun remembers them, and its source is looked at again only if it is said to be elsewhere.

    Raises:
      UserError: there is no such source, or it is no model to take that part of.
    """
    begun = has_checkpoints(workdir)
    record = read_record(workdir) if begun else {}
    remembered = dict(enumerate(zip(record.get("start", ()), record.get("taken", ()), strict=False)))
    facts = []
    for index, start in enumerate(experiment.start):
        before, fact = remembered.get(index, ({}, {}))
        step = fact.get("step") if start.step is None else start.step
        if begun and before.get("workdir") == start.workdir and fact.get("step") == step:
            facts.append(fact)
            continue
        source = local_path(start.workdir)
        check_configs(start, from_record(read_record(source)).model, experiment.model)
        facts.append(taken_from(source, step))
    return facts


def tokenizer_of_starts(experiment: Experiment) -> Tokenizer | None:
    """The tokenizer of what is taken and reads tokens, which would be worthless with another; None: there is no such.

    Its chat template is the last that there is: that of `data.text.tokenizer`, else of what is taken.

    Raises:
      UserError: there are two, or the data ask for another.
    """
    tokenizers = {}
    for start in experiment.start:
        workdir = local_path(start.workdir)
        source = from_record(read_record(workdir))
        if source.data.text is not None and reads_tokens(part_of(source.model, start.take)):
            tokenizers[start.workdir] = read_tokenizer(workdir)
    text = experiment.data.text
    if tokenizers and text is not None and text.tokenizer is not None:
        tokenizers[text.tokenizer] = load_tokenizer(local_path(text.tokenizer))
    first, *others = tokenizers or [""]
    for other in others:
        if not tokenizers[other].same(tokenizers[first]):
            raise UserError(
                f"the tokenizers of {first} and {other} differ, and what is taken knows its tokens by their ids: start "
                f"from runs of one tokenizer, and leave data.text.tokenizer out"
            )
    templates = [each.chat_template for each in tokenizers.values() if each.chat_template is not None]
    return replace(tokenizers[first], chat_template=templates[-1] if templates else None) if tokenizers else None


def beginning(
    experiment: Experiment, facts: Sequence[dict[str, Any]], mesh: Mesh
) -> Callable[[TrainState], dict[str, jax.Array]]:
    """What `fit` calls to begin: all that the starts give, a later one over the earlier."""

    def begin(abstract: TrainState) -> dict[str, jax.Array]:
        given: dict[str, jax.Array] = {}
        for start, fact in zip(experiment.start, facts, strict=True):
            loaded = load(start.workdir, step=fact["step"], mesh=mesh)
            places = without_adapters(eval_variables(abstract))
            values, told = taken(start, loaded.experiment.model, loaded.variables, experiment.model, places)
            what = f"{start.take or 'all'} of {start.workdir}, step {loaded.step}"
            say("; ".join([f"{start.into or 'the model'} begins as {what}", *told]))
            given |= values
        return given

    return begin
