"""What evaluations of images are given: the runs that judge them, and pictures such as the model reads or draws."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from vlm_jax.contract import Input
from vlm_jax.data import Data, Image, Source, evaluation_batches, open_training_data
from vlm_jax.errors import UserError
from vlm_jax.evals import Judge, Pictures
from vlm_jax.models import build, inception
from vlm_jax.paths import local_path
from vlm_jax.workdir import Loaded, load


def load_judges(workdirs: Sequence[Path], mesh: Mesh, shown: Input | None = None) -> tuple[Judge, ...] | None:
    """Runs that can embed images, or have features of them; None: of none.

    Args:
      shown: an image that they will look at.

    Raises:
      UserError: one is no run, or cannot, or is there twice.
    """
    judges = []
    for workdir, name in zip(workdirs, names_of(workdirs), strict=True):
        loaded = load(workdir, mesh=mesh)
        model, config = loaded.model, loaded.experiment.model
        if model.embed_image is None and model.image_features is None:
            raise UserError(
                f"{workdir} holds a model that does not embed images: give another --judge, such as a clip's"
            )
        if isinstance(config, inception.Config) and shown is not None:
            # It scales images itself, and that is a part of what FID is: nobody else may have done it before.
            model = build(replace(config, image_size=shown.shape[0]))
        judges.append(Judge(model, loaded.variables, loaded.tokenizer, name, fid=inception.measures_fid(config)))
    return tuple(judges) or None


def names_of(workdirs: Sequence[Path]) -> list[str]:
    """What to call each directory: by its last part, or where these are alike by as many as tell them apart.

    Raises:
      UserError: one is there twice.
    """
    paths = [local_path(workdir).resolve() for workdir in workdirs]
    if repeated := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"--judge names {repeated} twice: give it once")
    for parts in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        names = ["-".join(path.parts[-parts:]).replace("/", "") for path in paths]
        if len(set(names)) == len(paths):
            return names
    return []


def pictures_of(loaded: Loaded, source: Source, data: Data, directory: Path, batch_size: int) -> Pictures | None:
    """The split's and the run's training images, as the run's model reads or draws them; None: it does neither.

    Args:
      source: the split.
      data: how its records are read.
      directory: where prepared data sets are.
    """
    spec = image_of(loaded)
    if spec is None or spec.limit is None or "image" not in source.keys:
        return None
    own, inputs = loaded.experiment.data, loaded.model.inputs

    def images(source: Source, data: Data) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
        # As the run crops; where it reads latents alone nothing says how.
        readers = (getattr(field, "image", field) for field in data.fields)
        reader = next((each for each in readers if isinstance(each, Image)), Image())
        read = replace(data, fields=(reader,), pack=False)
        for batch, valid in evaluation_batches(source, read, {"image": spec}, None, batch_size=batch_size):
            yield batch["image"][:valid]

    def training() -> Iterator[tuple[Mapping[str, Any], UInt8[np.ndarray, "H W C"]]]:
        for each in open_training_data(own, inputs, directory):
            if "image" in each.keys:
                yield from zip(each.strings(), (image for batch in images(each, own) for image in batch), strict=True)

    return Pictures(
        levels=spec.limit,
        held_out=partial(images, source, data),
        training=None if own.name is None else training,
    )


def image_of(loaded: Loaded) -> Input | None:
    """An image as the model reads it or, where it reads none, draws it; None: of pixels it does neither."""
    model, spec = loaded.model, loaded.model.inputs.get("image")
    if spec is None and model.sample is not None:
        one = jax.eval_shape(partial(model.sample, num=1), loaded.variables, jax.random.key(0), {})
        spec = Input(one.shape[1:], str(one.dtype), 256)
    if spec is None or spec.dtype != "uint8" or spec.limit is None:
        return None
    return Input(spec.shape[-3:], spec.dtype, spec.limit)
