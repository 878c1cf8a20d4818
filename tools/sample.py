"""Draws what a run has learned: `python -m tools.sample WORKDIR --num N --out FILE.png`."""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from tools.asking import LINES, Asking, about, check_images, folder, held_out
from tools.data import OtherData, choose_data
from vlm_jax.chat import chats
from vlm_jax.commandline import command, gathered, require_one_process
from vlm_jax.contract import Model
from vlm_jax.data import Source, example, open_data, prompts
from vlm_jax.errors import UserError, check_seed
from vlm_jax.experiment import Experiment, from_record
from vlm_jax.files import check_writable
from vlm_jax.models import build
from vlm_jax.objectives.likelihood import from_unit_range
from vlm_jax.paths import local_path
from vlm_jax.sheets import Cell, write_sheet
from vlm_jax.workdir import Loaded, load, read_record

PROGRAM = "python -m tools.sample"
PURPOSE = "Writes a sheet of what the model of a run draws, completes, reconstructs or finds, or prints its texts."
COLUMNS = 8
NEAREST = 5

Row = tuple[str, list[Cell]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw, and how."""

    num: int | None = None
    """Samples to draw, or captions to find images for, or answers to each prompt; None: 16, and one answer."""
    prompt: tuple[str, ...] = ()
    """Texts to draw images of, in turn, to find images for, to go on from, or to answer; none: the held-out captions
    are found, and of images a caption is asked for."""
    image: tuple[Path, ...] = ()
    """Images that belong to every prompt, in order, in the places of <image> in it, or in front of it; or a directory,
    each of whose images is asked about alone."""
    label: tuple[str, ...] = ()
    """Classes to draw, by number or name, in turn; none: they are drawn too."""
    out: Path | None = None
    """The PNG to write; None: WORKDIR/samples.png. Of a directory's images a .jsonl, with a line for each."""
    data: OtherData = OtherData()
    split: str | None = None
    """Part of the data set to show; None: the run's test split."""
    checkpoint_step: int | None = None
    """Step of a checkpoint; None: the best by validation loss, else the newest."""
    data_dir: str | None = None
    """Where prepared data sets are; None: where the run had them."""
    seed: int = 0
    """Of the samples."""
    trajectory: bool = False
    """Show states between noise and image of each draw, too."""
    temperature: float = 1.0
    """1: draw from the model; lower: with less noise, down to 0."""
    sampling: Any = None
    """The settings of the run's own family; None: those that the run has."""

    def __post_init__(self) -> None:
        if self.num is not None and self.num < 1:
            raise UserError(f"--num is {self.num}: at least 1 must be drawn")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}: it must be a number, at least 0")
        check_seed(self.seed)
        if self.out is not None and self.out.suffix not in (".png", LINES):
            raise UserError(f"--out is {self.out}: it must end in .png")

    @property
    def count(self) -> int:
        """Of what is drawn."""
        return 16 if self.num is None else self.num


def main() -> None:
    """Reads the command line in two parts: what can be set follows from the run."""
    workdir, *flags = sys.argv[1:] or [""]
    default = Options()
    if workdir in ("-h", "--help"):
        flags, description = (
            [workdir],
            f"{PURPOSE} {PROGRAM} WORKDIR --help lists the run's own settings of sampling too.",
        )
        workdir = "WORKDIR"
    elif not workdir or workdir.startswith("-"):
        raise UserError(f"the first word after {PROGRAM} is the directory of a run: --help lists the options")
    else:
        description = PURPOSE
        experiment = from_record(read_record(local_path(workdir)))
        default = Options(sampling=settings(experiment, build(experiment.model)))
    options = tyro.cli(
        Options,
        default=default,
        prog=f"{PROGRAM} {workdir}",
        description=description,
        args=gathered(flags, "--prompt", "--image", "--label"),
        config=(tyro.conf.AvoidSubcommands,),
    )
    shown = sample(Path(workdir), options)
    print("\n".join(shown) if isinstance(shown, list) else shown)


def settings(experiment: Experiment, model: Model) -> Any:
    """Those by which the samples of a run are drawn."""
    return model.sampling if experiment.sampling is None else experiment.sampling


def sample(workdir: Path, options: Options = Options()) -> Path | list[str]:
    """Writes a labelled contact sheet of samples, of reconstructions, of the images nearest to captions, or of answers.

    Returns:
      The sheet, or the file of a directory's captions; of a model of texts, those.

    Raises:
      UserError: the directory is no run, or what is asked for does not exist, is beyond the model or cannot be written.
    """
    require_one_process()
    options = replace(options, image=tuple(map(local_path, options.image)))
    check_images(options.image, options.prompt, options.out)
    workdir = local_path(workdir)
    out = workdir / "samples.png" if options.out is None else local_path(options.out)
    loaded = load(workdir, step=options.checkpoint_step)
    check_writable(out)
    model = loaded.model
    compares = model.embed_image is not None and model.embed_text is not None
    if options.data.name is not None:
        other = replace(loaded.experiment, data=choose_data(loaded, options.data))
        loaded = replace(loaded, experiment=other)

    @cache
    def source() -> Source:  # samples alone need no data
        data = choose_data(loaded, options.data)
        sees = "image_at" in model.inputs
        read = tuple(model.inputs) if sees else ("image", "tokens") if compares else ("image",)
        shown = {name: spec for name, spec in model.inputs.items() if name in read}
        directory = local_path(options.data_dir or loaded.experiment.data_dir)
        return open_data(data, options.split or data.test, shown, directory)

    check_told(workdir, model, options, compares)
    if model.generate is not None and (model.sample is None or options.image):
        return written(loaded, options, out, source)
    rows: list[Row] = []
    if model.sample is not None:
        rows += samples(loaded, options, source)
    if model.complete is not None:
        rows += completions(loaded, source(), options)
    # What was trained elsewhere knows of no data, and its draws need none.
    knows = loaded.experiment.data.name is not None or not rows
    if model.encode is not None and model.decode is not None and knows and not options.prompt:
        rows += reconstructions(loaded, source(), min(options.count, COLUMNS))
    if compares and not (options.prompt and "tokens" in model.conditions):
        rows += nearest_images(loaded, source(), options.prompt, options.count)
    if not rows:
        raise UserError(
            f"{workdir} holds a model that neither samples, completes, reconstructs nor compares images with texts"
        )
    image = model.inputs.get("image")  # one that reads latents draws 8 bits
    write_sheet(rows, out, levels=(image.limit if image else None) or 256)
    return out


def check_told(workdir: Path, model: Model, options: Options, compares: bool) -> None:
    """Refuses to tell a model what it cannot be told."""
    flags = {"tokens": "--prompt", "label": "--label"}
    reads = compares or model.generate is not None
    if options.image and "image_at" not in model.inputs:
        raise UserError(f"{workdir} holds a model that takes no --image: leave it out")
    can = [flag for field, flag in flags.items() if field in model.conditions or (field == "tokens" and reads)]
    for flag, value in (("--prompt", options.prompt), ("--label", options.label)):
        if value and flag not in can:
            rest = f"it can be told {can[0]}" if can else "it can be told nothing"
            raise UserError(f"{workdir} holds a model that takes no {flag}: leave it out ({rest})")


def samples(loaded: Loaded, options: Options, source: Callable[[], Source]) -> list[Row]:
    """`num` draws, above each what it was told."""
    model, num = loaded.model, options.count
    assert model.sample is not None
    sampling = settings(loaded.experiment, model) if options.sampling is None else options.sampling
    titles, given = told(loaded, options, source)
    draw = partial(model.sample, given=given, num=num, temperature=options.temperature, sampling=sampling)
    steps = getattr(sampling, "steps", None)
    shown: set[int] = set()
    if options.trajectory:
        if steps is None:
            raise UserError("--trajectory shows the steps of a solver, and this model draws in none: leave it out")
        shown = {round(steps * (i + 1) / COLUMNS) for i in range(COLUMNS - 1)} - {0, steps}
    states: dict[int, np.ndarray] = {}
    with tqdm(total=steps, desc="sampling", unit="step", disable=steps is None, leave=False) as bar:

        def stepped(done: np.ndarray, state: np.ndarray) -> None:
            bar.update()
            if int(done) in shown:
                states[int(done)] = np.asarray(state)

        if steps is not None:
            draw = partial(draw, on_step=stepped)
        images = np.asarray(jax.jit(draw)(loaded.variables, jax.random.key(options.seed)))
        jax.effects_barrier()
    if options.trajectory:
        seen = {done: painted(loaded, state, images) for done, state in sorted(states.items())}
        return [
            (title, [*((each[i], f"step {done}") for done, each in seen.items()), (image, f"step {steps}")])
            for i, (image, title) in enumerate(zip(images, titles, strict=True))
        ]
    cells = list(zip(images, titles, strict=True))
    return [(f"samples, step {loaded.step}", cells[i : i + COLUMNS]) for i in range(0, num, COLUMNS)]


def painted(loaded: Loaded, state: np.ndarray, images: np.ndarray) -> np.ndarray:
    """States of a solver as images: those of latents decoded, those of pixels cut off at their range, [-1, 1]."""
    model = loaded.model
    if state.shape == images.shape:
        image = model.inputs["image"]
        return np.asarray(from_unit_range(jnp.asarray(state), image.limit or 256))
    assert model.decode is not None
    return np.asarray(jax.jit(model.decode)(loaded.variables, state))


def written(loaded: Loaded, options: Options, out: Path, source: Callable[[], Source]) -> Path | list[str]:
    """What a model of texts answers, or, where it is not asked, how it goes on."""
    speaker = loaded.speaker(options.sampling)
    asking = Asking(options.temperature, options.seed)
    if any(path.is_dir() for path in options.image):
        return folder(speaker, "".join(options.prompt), options.image[0], out, asking)
    if options.image or (options.prompt and chats(speaker)):
        return about(speaker, options.prompt, options.image, options.num or 1, out, asking)
    if "image_at" in loaded.model.inputs:
        return held_out(speaker, source(), options.count, out, asking)
    return continuations(loaded, options)


def continuations(loaded: Loaded, options: Options) -> list[str]:
    """`num` texts that begin with each prompt; without one, with anything."""
    model, tokenizer = loaded.model, loaded.tokenizer
    assert model.generate is not None and tokenizer is not None
    sampling = settings(loaded.experiment, model) if options.sampling is None else options.sampling
    beginnings = [prompt for prompt in options.prompt or ("",) for _ in range(options.count)]
    generate = jax.jit(partial(model.generate, temperature=options.temperature, sampling=sampling))
    batch = generate(loaded.variables, jax.random.key(options.seed), prompts(beginnings, tokenizer))
    texts = zip(np.asarray(batch["tokens"]), np.asarray(batch["segment"]), strict=True)
    return [tokenizer.decode(tokens[segment > 0]) for tokens, segment in texts]


def told(loaded: Loaded, options: Options, source: Callable[[], Source]) -> tuple[list[str], dict[str, np.ndarray]]:
    """A title for each draw, and what they are given, as values that are known, and so looked at, before any is drawn.

    Args:
      source: what knows the names of classes, asked where one is named.
    """
    titles, given = [str(index) for index in range(options.count)], {}
    if options.label:
        titles = list(itertools.islice(itertools.cycle(options.label), options.count))
        given["label"] = np.array([class_number(label, source) for label in titles], np.int32)
    if options.prompt:
        titles = list(itertools.islice(itertools.cycle(options.prompt), options.count))
        assert loaded.tokenizer is not None
        given["tokens"] = loaded.tokenizer.encode_prompts(titles, loaded.model.conditions["tokens"].shape[0])
    return titles, given


def class_number(label: str, source: Callable[[], Source]) -> int:
    """Of a class by its number, or by the name that the run's data set has for it.

    Raises:
      UserError: the data set has no such name.
    """
    if label.isdecimal():
        return int(label)
    names = source().label_names or ()
    if label not in names:
        known = f"{', '.join(names[:5])} ... or a number" if names else "its number"
        raise UserError(f"--label {label} is none of the classes of {source().name}: choose {known}")
    return names.index(label)


def first_images(loaded: Loaded, source: Source, num: int) -> np.ndarray:
    """At most `num`, as many as there are."""
    records = [source[i] for i in range(min(num, len(source)))]
    inputs = {"image": loaded.model.inputs["image"]}
    return np.stack([example(record, loaded.experiment.data, inputs, None, None)["image"] for record in records])


def completions(loaded: Loaded, source: Source, options: Options) -> list[Row]:
    """Held-out images above draws of their lower halves given the upper ones."""
    assert loaded.model.complete is not None
    images = first_images(loaded, source, min(options.count, COLUMNS))
    known = np.zeros(images.shape[1:3], bool)
    known[: images.shape[1] // 2] = True
    complete = jax.jit(partial(loaded.model.complete, known=known, temperature=options.temperature))
    completed = np.asarray(complete(loaded.variables, jax.random.key(options.seed), images))
    return [
        (f"{source.split} images", [(image, "") for image in images]),
        ("their lower halves drawn given the upper", [(image, "") for image in completed]),
    ]


def reconstructions(loaded: Loaded, source: Source, num: int) -> list[Row]:
    """Held-out images above what is decoded of their mean latents."""
    encode, decode = loaded.model.encode, loaded.model.decode
    assert encode is not None and decode is not None
    images = first_images(loaded, source, num)
    reconstruct = jax.jit(lambda variables, image: decode(variables, encode(variables, image)))
    copies = np.asarray(reconstruct(loaded.variables, images))
    return [
        (f"{source.split} images", [(image, "") for image in images]),
        ("reconstructions", [(image, "") for image in copies]),
    ]


def nearest_images(loaded: Loaded, source: Source, prompts: tuple[str, ...], num: int) -> list[Row]:
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
    encode = tokenizer.encode_prompts if prompts else tokenizer.encode
    tokens = encode(texts, model.inputs["tokens"].shape[0])
    similarity = np.asarray(embed_text(loaded.variables, tokens) @ vectors.T)
    rows = []
    for text, line in zip(texts, similarity, strict=True):
        order = np.argsort(-line)[:NEAREST]
        rows.append((text, [(images[i], f"{captions[i]} ({line[i]:.2f})") for i in order]))
    return rows


if __name__ == "__main__":
    with command():
        main()
