"""Draws what a run has learned: `python -m tools.sample WORKDIR --num N --out FILE.png`."""

import math
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from vlm_jax.commandline import command, require_one_process
from vlm_jax.data import Source, example, open_source
from vlm_jax.errors import UserError, check_seed
from vlm_jax.files import check_writable
from vlm_jax.paths import local_path
from vlm_jax.sheets import Cell, write_sheet
from vlm_jax.workdir import Loaded, load

COLUMNS = 8
NEAREST = 5


def sample(
    workdir: Annotated[Path, tyro.conf.Positional],
    num: int = 16,
    prompt: tuple[str, ...] = (),
    out: Path | None = None,
    split: str | None = None,
    checkpoint_step: int | None = None,
    data_dir: str | None = None,
    seed: int = 0,
    temperature: float = 1.0,
) -> Path:
    """Writes a labelled contact sheet of samples, of reconstructions, or of the images nearest to captions.

    Args:
      workdir: The directory of a run.
      num: Samples to draw, or captions to find images for.
      prompt: Texts to find images for; none: the held-out captions.
      out: The PNG to write; None: WORKDIR/samples.png.
      split: Part of the run's data set to show; None: the run's test split.
      checkpoint_step: Step of a checkpoint; None: the best by validation loss, else the newest.
      data_dir: Where prepared data sets are; None: where the run had them.
      seed: Of the samples.
      temperature: 1: draw from the model; lower: with less noise, down to 0.

    Raises:
      UserError: the directory is no run, or what is asked for does not exist, is beyond the model or cannot be written.
    """
    require_one_process()
    if num < 1:
        raise UserError(f"--num is {num}: at least 1 must be drawn")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature is {temperature}: it must be a number, at least 0")
    check_seed(seed)
    out = workdir / "samples.png" if out is None else out
    if out.suffix != ".png":
        raise UserError(f"--out is {out}: it must end in .png")
    loaded = load(workdir, step=checkpoint_step)
    check_writable(out)
    model, data = loaded.model, loaded.experiment.data

    @cache
    def source() -> Source:  # samples alone need no data
        return open_source(data.name, split or data.test, local_path(data_dir or loaded.experiment.data_dir))

    rows: list[tuple[str, list[Cell]]] = []
    if model.sample is not None:
        if prompt:
            raise UserError(f"{workdir} holds a model that takes no texts: leave out --prompt")
        rows += samples(loaded, num, seed, temperature)
    if model.complete is not None:
        rows += completions(loaded, source(), min(num, COLUMNS), seed, temperature)
    if model.reconstruct is not None:
        rows += reconstructions(loaded, source(), min(num, COLUMNS))
    if model.embed_image is not None and model.embed_text is not None:
        rows += nearest_images(loaded, source(), prompt, num)
    if not rows:
        raise UserError(
            f"{workdir} holds a model that neither samples, completes, reconstructs nor compares images with texts"
        )
    write_sheet(rows, out, levels=model.inputs["image"].limit or 256)
    return out


def samples(loaded: Loaded, num: int, seed: int, temperature: float) -> list[tuple[str, list[Cell]]]:
    """`num` draws."""
    assert loaded.model.sample is not None
    key, steps = jax.random.key(seed), loaded.model.sampling_steps
    with tqdm(total=steps, desc="sampling", unit="step", disable=steps is None, leave=False) as bar:
        options: dict[str, Any] = {} if steps is None else {"on_step": lambda *_: bar.update()}
        draw = jax.jit(partial(loaded.model.sample, num=num, temperature=temperature, **options))
        images = np.asarray(draw(loaded.variables, key, {}))
        jax.effects_barrier()
    cells = [(image, str(index)) for index, image in enumerate(images)]
    return [(f"samples, step {loaded.step}", cells[i : i + COLUMNS]) for i in range(0, num, COLUMNS)]


def first_images(loaded: Loaded, source: Source, num: int) -> np.ndarray:
    """At most `num`, as many as there are."""
    records = [source[i] for i in range(min(num, len(source)))]
    inputs = {"image": loaded.model.inputs["image"]}
    return np.stack([example(record, loaded.experiment.data, inputs, None, None)["image"] for record in records])


def completions(
    loaded: Loaded, source: Source, num: int, seed: int, temperature: float
) -> list[tuple[str, list[Cell]]]:
    """Held-out images above draws of their lower halves given the upper ones."""
    assert loaded.model.complete is not None
    images = first_images(loaded, source, num)
    known = np.zeros(images.shape[1:3], bool)
    known[: images.shape[1] // 2] = True
    complete = jax.jit(partial(loaded.model.complete, known=known, temperature=temperature))
    completed = np.asarray(complete(loaded.variables, jax.random.key(seed), images))
    return [
        (f"{source.split} images", [(image, "") for image in images]),
        ("their lower halves drawn given the upper", [(image, "") for image in completed]),
    ]


def reconstructions(loaded: Loaded, source: Source, num: int) -> list[tuple[str, list[Cell]]]:
    """Held-out images above their reconstructions."""
    assert loaded.model.reconstruct is not None
    images = first_images(loaded, source, num)
    copies = np.asarray(jax.jit(loaded.model.reconstruct)(loaded.variables, images))
    return [
        (f"{source.split} images", [(image, "") for image in images]),
        ("reconstructions", [(image, "") for image in copies]),
    ]


def nearest_images(loaded: Loaded, source: Source, prompts: tuple[str, ...], num: int) -> list[tuple[str, list[Cell]]]:
    """Each caption with the images of the split nearest to it, the nearest first."""
    model, data, tokenizer = loaded.model, loaded.experiment.data, loaded.tokenizer
    assert model.embed_image is not None and model.embed_text is not None and tokenizer is not None
    records = [source[i] for i in range(len(source))]
    captions = [record["text"][0] for record in records]
    texts = list(prompts or captions[:num])
    inputs = {"image": model.inputs["image"]}
    images = np.stack([example(record, data, inputs, None, None)["image"] for record in records])
    embed_image, embed_text = jax.jit(model.embed_image), jax.jit(model.embed_text)
    parts = np.array_split(images, min(8, len(images)))
    vectors = jnp.concatenate([embed_image(loaded.variables, part) for part in parts])
    tokens = tokenizer.encode(texts, model.inputs["tokens"].shape[0])
    similarity = np.asarray(embed_text(loaded.variables, tokens) @ vectors.T)
    rows = []
    for text, line in zip(texts, similarity, strict=True):
        order = np.argsort(-line)[:NEAREST]
        rows.append((text, [(images[i], f"{captions[i]} ({line[i]:.2f})") for i in order]))
    return rows


if __name__ == "__main__":
    with command():
        print(tyro.cli(sample))
