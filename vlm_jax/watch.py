"""What a run looks at as it trains, beside its validation loss: evaluations of a few held-out examples, and samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from vlm_jax.contract import Batch, Model
from vlm_jax.data import Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.evals import EVALUATIONS, Evaluation, Subject
from vlm_jax.train.terminal import say
from vlm_jax.train.watch import Interrupted, Moment, Watcher, harmless

DRAWS = 16
"""Samples on a sheet."""
SHEET_WIDTH = 512
"""Pixels, about: small images are enlarged without interpolation."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is looked at at each checkpoint; the numbers go where the loss goes, pictures to TensorBoard."""

    evaluations: tuple[str, ...] = ()
    """Names of evaluations, such as retrieval, of the first of the validation split."""
    examples: int = 256
    """Of the validation split, for the evaluations."""
    sheet: bool = False
    """Draw samples, with the same noise each time."""

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise UserError(f"watch.examples is {self.examples}: it must be at least 1")
        known = [evaluation.name for evaluation in EVALUATIONS]
        if unknown := [name for name in self.evaluations if name not in known]:
            raise UserError(f"watch.evaluations names {unknown[0]}, which is none: choose from {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The validation split, for evaluations."""

    batches: Callable[[], Iterator[tuple[Batch, int]]]
    """Batches of one size on the devices, each with its number of valid rows."""
    examples: int
    tokenizer: Tokenizer | None
    records: Callable[[], Iterator[Mapping[str, Any]]]
    """As `Subject.records`."""
    written: Mapping[str, Callable[[], Iterator[tuple[Batch, int]]]] = field(default_factory=dict)
    """`Subject.questions` or `Subject.captions`."""
    training_texts: Callable[[], Iterator[str]] | None = None
    """As `Subject.training_texts`."""


def watchers(watch: Watch, model: Model, held_out: HeldOut | None, sampling: Any = None) -> tuple[Watcher, ...]:
    """Those that `watch` asks for.

    In a run of several processes there are none, which is said: evaluations and samples are computed in one.

    Args:
      sampling: settings of the model's samples; None: its own.

    Raises:
      UserError: the model or its data have nothing for one of them to look at.
    """
    found: list[Watcher] = []
    if watch.evaluations:
        if held_out is None:
            raise UserError("watch.evaluations look at the validation split and there is none: set data.validation")
        found.append(harmless("watch.evaluations", evaluating(watch, model, held_out)))
    if watch.sheet:
        image = model.inputs.get("image")
        if model.sample is None or image is None or image.limit is None:
            raise UserError("watch.sheet shows images and the model draws none: leave it out")
        found.append(harmless("watch.sheet", drawing(model, sampling)))
    if found and jax.process_count() > 1:
        say("watch: in a run of several processes tools.evaluate and tools.sample do that, on its checkpoints")
        return ()
    return tuple(found)


def evaluating(watch: Watch, model: Model, held_out: HeldOut) -> Watcher:
    """Evaluations of the first examples.

    Raises:
      UserError: one of them does not apply to the model, or needs what a run has not, such as a judge.
    """
    count = min(watch.examples, held_out.examples)

    def subject(moment: Moment | None) -> Subject:
        def first(batches: Callable[[], Iterator[tuple[Batch, int]]]) -> Iterator[tuple[Batch, int]]:
            left = count
            for batch, valid in batches():
                if moment is not None and moment.stop():
                    raise Interrupted
                yield batch, min(valid, left)
                left -= valid
                if left <= 0:
                    return

        def records() -> Iterator[Mapping[str, Any]]:
            yield from (record for record, _ in zip(held_out.records(), range(count), strict=False))

        texts: dict[str, Any] = {name: partial(first, each) for name, each in held_out.written.items()}
        return Subject(
            model=model,
            variables={} if moment is None else moment.variables,
            batches=partial(first, held_out.batches),
            examples=count,
            key=jax.random.key(0) if moment is None else moment.key,
            tokenizer=held_out.tokenizer,
            records=records,
            training_texts=held_out.training_texts,
            **texts,
        )

    chosen: Sequence[Evaluation] = [each for each in EVALUATIONS if each.name in watch.evaluations]
    if unfit := [each.name for each in chosen if not each.applies_to(subject(None))]:
        raise UserError(f"watch.evaluations names {unfit[0]}, which has nothing to measure here: leave it out")

    def look(moment: Moment) -> dict[str, float | np.ndarray]:
        seen: dict[str, float | np.ndarray] = {}
        for evaluation in chosen:
            measured = evaluation.run(subject(moment))
            seen |= {f"{evaluation.name}/{name}": value for name, value in measured.items() if value is not None}
        return seen

    return look


def drawing(model: Model, sampling: Any = None) -> Watcher:
    """A sheet of samples."""
    assert model.sample is not None
    draw = jax.jit(partial(model.sample, num=DRAWS, **({} if sampling is None else {"sampling": sampling})))
    levels = model.inputs["image"].limit
    assert levels is not None

    def look(moment: Moment) -> dict[str, float | np.ndarray]:
        return {"samples": tiled(np.asarray(draw(moment.variables, moment.key, {})), levels)}

    return look


def tiled(images: UInt8[np.ndarray, "N H W C"], levels: int) -> UInt8[np.ndarray, "h w 3"]:
    """The images in a square, the first at the top left, with a white line between them; the highest level is white."""
    count, height, width, channels = images.shape
    side = math.ceil(math.sqrt(count))
    scale = max(1, SHEET_WIDTH // (side * (width + 1)))
    sheet = np.full((side * (height + 1), side * (width + 1), 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // side) * (height + 1), (index % side) * (width + 1)
        shown = np.round(image.astype(np.float32) * (255 / (levels - 1))).astype(np.uint8)
        sheet[top : top + height, left : left + width] = np.repeat(shown, 3 // channels, axis=-1)
    return sheet[:-1, :-1].repeat(scale, axis=0).repeat(scale, axis=1)
