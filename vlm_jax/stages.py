"""What a model's loss reads of images that no training changes, such as a first stage's latents, made once and kept.

The files lie beside the data, under names that tell of what they are made: another first stage, split or way of cutting
images has another file. What is kept is what `loss` would make of the image, so that the steps are the same steps.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vlm_jax.contract import Input, Model, Variables, abstract_batch
from vlm_jax.data import Data, Image, Source, Stage, Staged, evaluation_batches
from vlm_jax.data.fields import chosen
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.records import to_json
from vlm_jax.sharding import make_mesh
from vlm_jax.train.layout import programs
from vlm_jax.train.step import TrainState
from vlm_jax.train.terminal import say
from vlm_jax.trees import assembled, map_with_path, part

BATCH = 256
"""Images that are encoded at once."""
STAGES = "stages"
"""The directory of the files, in that of the data sets."""
FIRST = "first"
"""The part of a model that makes them, and the field of its `Config`."""


def staged(model: Model) -> Model:
    """What trains as `model` does and reads `stage` in the place of `image`.

    Raises:
      UserError: the loss reads the image itself.
    """
    if model.stage is None:
        raise UserError("cached is for models whose loss reads what a frozen part makes of an image: leave it out")
    batch = abstract_batch(model.inputs, 1)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    spec = jax.eval_shape(model.stage, variables, batch["image"])
    image = model.inputs["image"]

    def init(key: jax.Array, batch: Mapping[str, jax.Array]) -> Variables:
        blank = jnp.zeros((len(batch["stage"]), *image.shape), image.dtype)
        return model.init(key, {**batch, "image": blank})

    told = {name: each for name, each in model.inputs.items() if name != "image"}
    return Model(
        inputs={"stage": Input(spec.shape[1:], spec.dtype.name), **told},
        init=init,
        loss=model.loss,
        rules=model.rules,
    )


def with_stages(
    experiment: Experiment,
    model: Model,
    sources: Sequence[Source],
    data_dir: Path,
    facts: Sequence[Mapping[str, Any]],
    begin: Callable[[TrainState], Mapping[str, jax.Array]],
) -> tuple[tuple[Staged, ...], Data]:
    """The records of splits with their stages, which are made where no run has made them yet; and how they are read.

    Args:
      facts: of each of the run's starts, the step and the digest of what it gives.
      begin: as `fit` takes it, to load what makes them.

    Raises:
      UserError: images are augmented, or are encoded by what trains, or there are several processes and no file.
    """
    data = experiment.data
    starts = zip(experiment.start, facts, strict=True)
    taken = [{"take": start.take, **fact} for start, fact in starts if start.into in ("", FIRST)]
    told = {"first": to_json(experiment)["model"].get(FIRST), "taken": taken}
    found = []
    for source in sources:
        (field,) = (each for each in chosen(data.fields, source.keys, {"image": model.inputs["image"]}))
        assert isinstance(field, Image)
        if field.augments:
            raise UserError(
                "cached stages are of each image as it is: set flip to False, crop_min_area to 1.0 and no redraw"
            )
        what = {**told, "source": source.full_name, "split": source.split, "image": to_json(field)}
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        path = data_dir / STAGES / f"{name}.npy"
        if not path.is_file():
            if jax.process_count() > 1:
                raise UserError(f"{path} is not there: begin the run in one process, which makes it, and then in all")
            write(path, model, held(experiment, model, begin), source, data)
        found.append(Staged(source, np.load(path, mmap_mode="r")))
    return tuple(found), replace(data, fields=(*data.fields, Stage()))


def held(
    experiment: Experiment, model: Model, begin: Callable[[TrainState], Mapping[str, jax.Array]]
) -> dict[str, Any]:
    """The variables of the part that makes stages, those that do not train."""
    training, mesh = experiment.training, make_mesh(experiment.training.mesh)
    settings: dict[str, Any] = {"frozen": experiment.frozen, "frozen_dtype": experiment.frozen_dtype}
    abstract, _, _ = programs(model, training, mesh, **settings)
    given = begin(abstract)
    first = assembled({FIRST: part({"params": abstract.frozen, **abstract.collections}, FIRST)})
    return map_with_path(lambda path, _: given[path], first)


def write(path: Path, model: Model, variables: Variables, source: Source, data: Data) -> None:
    """The stages of all records, into a file that is there when all of it is."""
    assert model.stage is not None
    image = {"image": model.inputs["image"]}
    size = min(BATCH, len(source))
    try:
        spec = jax.eval_shape(model.stage, variables, abstract_batch(image, size)["image"])
    except Exception as error:  # linen's and Python's own, of a part that is not there
        raise UserError("cached stages are made by parts that do not train: freeze all that encodes images") from error
    encode = jax.jit(model.stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    array = np.lib.format.open_memmap(temporary, "w+", spec.dtype, (len(source), *spec.shape[1:]))
    say(f"encoding {len(source)} images of {source.full_name}, {source.split}, once: {path}")
    batches = evaluation_batches(source, data, image, None, batch_size=size)
    for index, (batch, valid) in enumerate(tqdm(batches, total=-(-len(source) // size), unit="batch", leave=False)):
        array[index * size : index * size + valid] = encode(variables, batch["image"])[:valid]
    array.flush()
    temporary.replace(path)
