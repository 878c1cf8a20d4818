"""Public weights as a run, and a run as public weights.

In memory there are at most the parameters as they are saved, and two arrays beside them: of published weights one as it
was published, of a run the files that are being written, a shard of 5 GB at most.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import processors

from vlm_jax.contract import Input, Model
from vlm_jax.data import Data, Text, Tokenizer, check_tokenizer
from vlm_jax.data.fields import TextReader
from vlm_jax.data.tokenizer import SETTINGS
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, from_record, to_record
from vlm_jax.models import build, family_of
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.layout import Layout, named, recognised, written, written_keys
from vlm_jax.pretrained.source import open_source
from vlm_jax.pretrained.tensors import INDEX
from vlm_jax.pretrained.variables import read_variables, without_derived
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.frozen import save_frozen
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.trees import count_parameters, partition
from vlm_jax.workdir import (
    CHECKPOINTS,
    CONFIG,
    claimed_workdir,
    failure_told,
    has_checkpoints,
    load,
    read_identity,
    read_record,
    write_tokenizer,
)

SHARD = 5 * 10**9
"""Bytes of the largest file of weights."""
ALL = "."
"""The regular expression of every path."""


def is_run(path: Path) -> bool:
    """Whether a directory is a run's, and not one of published weights, which has a `config.json` too."""
    return (path / CONFIG).is_file() and {"model", "training"} <= read_record(path).keys()


def weights_to_run(path: Path, workdir: Path, layout: str | None = None) -> str:
    """Makes a run of published weights, of which all is known before anything is written.

    Weights in bfloat16 stay so: they are kept as parameters that do not train are, once and in bfloat16; a run that
    starts from this one trains them in float32. All others are kept in float32.

    Args:
      layout: the name of their layout; None: the one that recognises them.

    Returns:
      What became of what, in a sentence.

    Raises:
      UserError: they cannot be read, or are of no known layout, or have what the model cannot express; or `workdir` is
        a run already.
    """
    if has_checkpoints(workdir) or is_run(workdir):
        raise UserError(f"{workdir} is a run already: choose another directory")
    source = open_source(path)
    found = recognised(source, LAYOUTS, layout)
    config = found.config(source)
    tokens = build(config).inputs.get("tokens")
    tokenizer = None if tokens is None else found.tokenizer(source)
    if tokenizer is not None and tokens is not None:
        check_tokenizer(tokenizer, vocab_size=tokens.limit, eos_id=tokens.contains)
    variables, drawn = read_variables(found, config, source, tokenizer)
    dtype = next(iter(jax.tree.leaves(variables["params"]))).dtype
    fields = found.fields(source)
    experiment = Experiment(
        model=config,
        data=Data(
            name=None,
            fields=fields,
            pack=all(isinstance(field, TextReader) for field in fields),
            text=None if tokenizer is None else Text(vocab_size=tokenizer.vocab_size),
        ),
        # Of no meaning, since nothing trains here; what starts from this run has its own.
        training=Training(optimizer=Optimizer(learning_rate=1e-5), steps=1, batch_size=8),
        frozen=() if dtype == np.float32 else (ALL,),
        frozen_dtype=None if dtype == np.float32 else "bfloat16",
        sampling=found.sampling(config),
    )
    save(workdir, to_record(f"convert/{found.name}", experiment, {}), variables, experiment, tokenizer)
    count = count_parameters(variables["params"])
    told = f"{workdir} holds {count:,} parameters in {dtype}, of layout {found.name}"
    return f"{told}; {count_parameters(drawn):,} of them are drawn, which no such file holds" if drawn else told


def save(
    workdir: Path,
    record: dict[str, Any],
    variables: Mapping[str, Any],
    experiment: Experiment,
    tokenizer: Tokenizer | None,
) -> None:
    """Writes the directory of a run whose variables are these, at step 0."""
    # On the host, which may have room for what an accelerator has not, and where an array of NumPy is none of its own.
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices("cpu")[0], may_alias=True), dict(variables))
    params = placed.pop("params")
    with claimed_workdir(workdir, record):
        if tokenizer is not None:
            write_tokenizer(workdir, tokenizer)
        identity = read_identity(workdir)
        still, live = partition(params, experiment.frozen)
        save_frozen(workdir / CHECKPOINTS, still, identity)
        with Checkpoints(workdir / CHECKPOINTS, identity=identity) as checkpoints:
            checkpoints.save(0, {"params": live, "collections": placed})


def run_to_weights(workdir: Path, directory: Path, layout: str) -> str:
    """Writes a run's model as published weights are, into a directory that appears when all of it is there.

    Returns:
      What became of what, in a sentence.

    Raises:
      UserError: there is no such layout, or it cannot express the model; or the directory is not empty or cannot be
        written.
    """
    found = named(LAYOUTS, layout)
    if found.export is None:
        raise UserError(f"the layout {layout} is read and not written: choose another")
    check_family(found, family_of(from_record(read_record(workdir)).model), workdir)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is there already: choose a directory that is empty or not there")
    loaded = load(workdir)
    config, tokenizer = loaded.experiment.model, loaded.tokenizer
    told = {**found.export(loaded.experiment, tokenizer)}
    collections = {name: tree for name, tree in loaded.variables.items() if name != "params"}
    for name, settings in found.told(collections).items():
        told[name] = {**told[name], **settings}
    params = without_derived(found, config, loaded.variables["params"], tokenizer)
    files, indexes = files_of(found.weights, written_keys(found, config, params))
    with failure_told(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", dir=directory.parent))
        try:
            for place in {*found.weights, found.tokenizer_directory, *(str(Path(name).parent) for name in told)}:
                (temporary / place).mkdir(parents=True, exist_ok=True)
            for file in files:
                arrays = dict(written(found, config, params, file.keys))
                arrays = {key.removeprefix(file.directory): array for key, array in arrays.items()}
                write_arrays(temporary / file.directory / file.name, arrays)
            for name, content in (told | indexes).items():
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
            if tokenizer is not None:
                beside = temporary / found.tokenizer_directory
                published_tokenizer(tokenizer, loaded.model).save(beside / "tokenizer.json")
                settings = tokenizer_settings(tokenizer, loaded.model.inputs["tokens"])
                settings |= told.get(f"{found.tokenizer_directory}{SETTINGS}", {})
                (beside / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
            temporary.chmod(0o755)
            temporary.replace(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return f"{directory} holds step {loaded.step} of {workdir}, of layout {layout}"


def check_family(layout: Layout, family: str, workdir: Path) -> None:
    """Refuses a run whose family is not the one that a layout is of."""
    if family != layout.family:
        others = [each.name for each in LAYOUTS if each.family == family and each.export is not None]
        mend = f"choose one of {', '.join(others)}" if others else "no layout is written of that family, it stays a run"
        raise UserError(f"{workdir} is a run of {family} and the layout {layout.name} is of {layout.family}: {mend}")


class File(NamedTuple):
    """Of weights, as they are written."""

    directory: str
    """With which the keys of the layout begin, and those in the file do not."""
    name: str
    keys: list[str]
    """The layout's."""


def files_of(weights: Mapping[str, str], sizes: Mapping[str, int]) -> tuple[list[File], dict[str, dict[str, Any]]]:
    """The files of weights, and by their paths the indexes of directories where there are several.

    Args:
      weights: of a layout.
      sizes: bytes of the arrays by the layout's keys.
    """
    files: list[File] = []
    indexes = {}
    # A directory within another has the longer name.
    places = {key: max((each for each in weights if key.startswith(each)), key=len) for key in sizes}
    for directory, name in weights.items():
        shards = shards_of({key: size for key, size in sizes.items() if places[key] == directory})
        here = [File(directory, shard_name(name, i, len(shards)), keys) for i, keys in enumerate(shards, 1)]
        if len(here) > 1:
            weight_map = {key.removeprefix(directory): file.name for file in here for key in file.keys}
            indexes[directory + Path(name).stem + INDEX] = {"metadata": {}, "weight_map": weight_map}
        files += here
    return files, indexes


def shards_of(sizes: Mapping[str, int]) -> list[list[str]]:
    """Keys in their order, in files of at most `SHARD` bytes; a larger array has one of its own."""
    shards: list[list[str]] = [[]]
    room = SHARD
    for key, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(key)
        room -= size
    return shards


def published_tokenizer(tokenizer: Tokenizer, model: Model) -> Tokenizer:
    """Of a model that finds the end of a text the tokenizer whose file says what stands around one: ours need not."""
    if model.inputs["tokens"].contains is None:
        return tokenizer
    inner = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
    around = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None]
    if inner.encode("", add_special_tokens=True).ids == around:
        return tokenizer
    names = [str(inner.id_to_token(token)) for token in around]
    inner.post_processor = processors.TemplateProcessing(
        single=[*names[:-1], "$A", names[-1]], special_tokens=[*zip(names, around, strict=True)]
    )
    inner.encode_special_tokens = True
    return replace(tokenizer, tokenizer=inner)


def tokenizer_settings(tokenizer: Tokenizer, tokens: Input) -> dict[str, Any]:
    """Beside a `tokenizer.json`, what transformers would else guess by the name of the model.

    Args:
      tokens: as the model reads them.
    """
    ids = {"pad_token": tokenizer.pad_id, "bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {
        **{name: None if token is None else tokenizer.tokenizer.id_to_token(token) for name, token in ids.items()},
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": tokens.contains is not None,
        "chat_template": tokenizer.chat_template,
        "model_max_length": tokens.shape[-1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def shard_name(weights: str, number: int, shards: int) -> str:
    """Of the file of that number, from 1 on, as Hugging Face numbers them."""
    stem, suffix = Path(weights).stem, Path(weights).suffix
    return weights if shards == 1 else f"{stem}-{number:05}-of-{shards:05}{suffix}"


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Into one file, of the kind that its name says."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]  # a key may be called as an option is
    else:
        save_file(arrays, path, metadata={"format": "pt"})
