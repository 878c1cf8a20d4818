"""What a model's loss reads of images that no training changes, such as a first stage's latents, made once and kept.

The files lie beside the data, under names that tell of what they are made: another first stage, split or way of cutting
images has another file. What is kept is what `loss` would make of the image, so that the steps are the same steps.
"""

import hashlib
import json
import math
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
PLACES = ("first", "image/first")
"""Where models have the part that makes them: its place among the variables, and that of its `Config` in theirs."""


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
    place, first = first_of(experiment)
    starts = zip(experiment.start, facts, strict=True)
    taken = [{"take": start.take, **fact} for start, fact in starts if start.into in ("", place)]
    told = {"first": first, "taken": taken}
    found = []
    for source in sources:
        field = image_of(data, source, model)
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
            write(path, model, held(experiment, model, begin, place), source, field)
        found.append(Staged(source, np.load(path, mmap_mode="r")))
    return tuple(found), replace(data, fields=(*data.fields, Stage()))


def first_of(experiment: Experiment) -> tuple[str, Any]:
    """Of the part that makes stages its place and its `Config`, as JSON values."""
    model = to_json(experiment)["model"]
    for place in PLACES:
        config = model
        for name in place.split("/"):
            config = config.get(name) if isinstance(config, Mapping) else None
        if config is not None:
            return place, config
    raise AssertionError("a model with `stage` has a part that makes it")


def image_of(data: Data, source: Source, model: Model) -> Image:
    """How the images of a split are read, alone or in their places in rows.

    Raises:
      UserError: it has none.
    """
    for field in chosen(data.fields, source.keys, model.inputs):
        reader = getattr(field, "image", field)
        if isinstance(reader, Image):
            return reader
    raise UserError(f"{source.name} has no images to make stages of: set cached to False, or leave it out")


def held(
    experiment: Experiment, model: Model, begin: Callable[[TrainState], Mapping[str, jax.Array]], place: str
) -> dict[str, Any]:
    """The variables of the part that makes stages, at its place, those that do not train."""
    training, mesh = experiment.training, make_mesh(experiment.training.mesh)
    settings: dict[str, Any] = {"frozen": experiment.frozen, "frozen_dtype": experiment.frozen_dtype}
    abstract, _, _ = programs(model, training, mesh, **settings)
    given = begin(abstract)
    first = assembled({place: part({"params": abstract.frozen, **abstract.collections}, place)})
    return map_with_path(lambda path, _: given[path], first)


def write(path: Path, model: Model, variables: Variables, source: Source, field: Image) -> None:
    """The stages of all records, into a file that is there when all of it is."""
    make, spec = model.stage, model.inputs["image"]
    assert make is not None
    one = spec._replace(shape=spec.shape[-3:])

    def stage(variables: Variables, image: jax.Array) -> jax.Array:
        """Of images one by one, of which the model reads rows."""
        made: jax.Array = make(variables, image.reshape(-1, *spec.shape))
        return made.reshape(len(image), *made.shape[len(spec.shape) - 2 :])

    together = math.prod(spec.shape[:-3])
    image, size = {"image": one}, -(-min(BATCH, len(source)) // together) * together
    try:
        kept = jax.eval_shape(stage, variables, abstract_batch(image, size)["image"])
    except Exception as error:  # linen's and Python's own, of a part that is not there
        raise UserError("cached stages are made by parts that do not train: freeze all that encodes images") from error
    encode = jax.jit(stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    array = np.lib.format.open_memmap(temporary, "w+", kept.dtype, (len(source), *kept.shape[1:]))
    say(f"encoding {len(source)} images of {source.full_name}, {source.split}, once: {path}")
    batches = evaluation_batches(source, Data(name=source.name, fields=(field,)), image, None, batch_size=size)
    for index, (batch, valid) in enumerate(tqdm(batches, total=-(-len(source) // size), unit="batch", leave=False)):
        array[index * size : index * size + valid] = encode(variables, batch["image"])[:valid]
    array.flush()
    temporary.replace(path)
