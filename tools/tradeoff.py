"""What a frozen first stage costs and what it brings: `python -m tools.tradeoff` trains the arms and draws one table.

The question: does a model without a frozen autoencoder read as well as one with an encoder of images, and draw as well
as those of two stages, of equal compute? All arms (`experiments/tradeoff.py`) have one decoder and one set of records,
and each as many FLOPs in all, those of its first stage and of all frozen parts counted: what a first stage takes, its
decoder does not get.

The rule, written before the runs. The gap is *closed* where a one-stage arm that draws is within one standard error of
the reader with an encoder, or better, on the nats a token of captions and on the open questions of easy_vqa, *and*
within one standard error of the best two-stage arm, or better, on the share of drawings that find their caption among
ten (R@10, the mean of the judges). Standard errors are over test items, of the paired differences. Where the R@10 of
`transfusion`, the arm to run first, is not two standard errors above chance and above the nearest-caption retriever's,
R@10 decides nothing: then, for all arms, decides the share of drawn shapes, 20 of each of the 24 captions of easy_vqa,
that a probe of each judge takes for what their captions say (`vlm_jax.evals.recognition`).

Written down after seed 0 of `transfusion` was trained, before another arm that draws was: by R@10 its drawings are no
better than chance, so that drawn shapes decide.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from experiments.presets import presets
from experiments.run import run
from tools.compute import complete, spent_flops, step_flops
from tools.evaluate import sentence, subject_of, tell
from tools.judging import load_judges
from tools.verdict import ARMS, DRAWN, RANK, Items, draw, table
from vlm_jax.commandline import command, require_one_process
from vlm_jax.data import Data, Interleaved
from vlm_jax.errors import UserError, check_seed
from vlm_jax.evals import Judge, Subject, generation, likelihood, recognition
from vlm_jax.evals.captions import caption_nats, captioned
from vlm_jax.evals.vqa import exact, kind
from vlm_jax.evals.writing import texts
from vlm_jax.experiment import Experiment, from_record
from vlm_jax.files import check_writable, write_output
from vlm_jax.paths import local_path
from vlm_jax.sharding import MeshShape, make_mesh
from vlm_jax.sheets import Cell, write_sheet
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.workdir import CHECKPOINTS, has_checkpoints, load, read_record

QUESTIONS = {"easy_vqa": "test[:2000]", "mosaic": "test[:2000]"}
"""The data sets that are asked about, and how much of them."""
SHAPES = ("easy_vqa/captions", "test")
"""What is drawn beside emoji."""
BATCH = 128
COLUMNS = 8
"""Of the sheet of an arm."""


def tradeoff(
    arms: tuple[str, ...] = ARMS,
    seed: int = 0,
    flops: float = 1e14,
    workdir: Path = Path("runs"),
    judge: tuple[Path, ...] = (Path("runs/clip-judge-a"), Path("runs/clip-judge-b")),
    out: Path | None = None,
    data_dir: str | None = None,
) -> str:
    """Trains or loads the arms at equal compute, and writes a table and a figure of them.

    Each arm is a run of its own, WORKDIR/tradeoff-ARM-SEED, and resumes; what it begins with is trained where it is not
    there. The table is drawn of the arms that there are, and marks the others; where one fails, the others go on.

    Args:
      arms: Those to train; those that have been trained stand in the table all the same.
      seed: Of the arms' training.
      flops: Of each arm in all: a gradient's matrix products and convolutions at every step, first stages included.
      workdir: Where the runs are, those that arms begin with among them.
      judge: The directories of runs that judge the drawings.
      out: Directory for tradeoff.md, tradeoff.png and the items and a sheet of each arm; None: WORKDIR/tradeoff-SEED.
      data_dir: Where prepared data sets are; None: where the presets have them.

    Raises:
      UserError: an arm is unknown, its first stage takes all the compute, a judge is missing, or an arm failed.
    """
    require_one_process()
    check_seed(seed)
    if unknown := [name for name in arms if name not in ARMS]:
        raise UserError(f"there is no arm {unknown[0]}: choose from {', '.join(ARMS)}")
    workdir = local_path(workdir)
    out = workdir / f"tradeoff-{seed}" if out is None else local_path(out)
    check_writable(out / "tradeoff.md")
    known = {name: experiment for name, (_, experiment) in presets().items()}
    kept = {name: out / f"{name}.npz" for name in ARMS}
    items = {name: dict(np.load(path)) for name, path in kept.items() if path.is_file()}
    failures: dict[str, Exception] = {}
    mesh = make_mesh(MeshShape())
    with jax.set_mesh(mesh):
        judges = load_judges(judge, mesh)
    for name in (name for name in ARMS if name in arms):
        path = workdir / f"tradeoff-{name}-{seed}"
        try:
            train(f"tradeoff-{name}", known, path, workdir, data_dir, flops=flops, seed=seed)
            with jax.set_mesh(mesh):
                items[name] = measure(path, judges or (), mesh, data_dir, seed=seed, sheet=out / f"{name}.png")
            write_output(kept[name], partial(save, items[name]))
        except Exception as error:
            failures[name] = error
            tell(name, error)
        write_output(out / "tradeoff.md", partial(tell_all, table(items)))
    written = table(items)
    write_output(out / "tradeoff.md", partial(tell_all, written))
    figure = draw(items)
    write_output(out / "tradeoff.png", lambda place: figure.savefig(place, format="png", dpi=110))
    print(f"{written}\n\n{out}")
    if failures:
        raise UserError("; ".join(f"{name}: {sentence(error)}" for name, error in failures.items()))
    return written


def save(items: Items, path: Path) -> None:
    told: dict[str, Any] = dict(items)
    with path.open("wb") as file:
        np.savez(file, **told)


def tell_all(text: str, path: Path) -> None:
    path.write_text(text + "\n", encoding="utf-8")


# Training, of equal compute.


def train(
    preset: str,
    known: Mapping[str, Experiment],
    path: Path,
    workdir: Path,
    data_dir: str | None,
    *,
    flops: float | None = None,
    seed: int | None = None,
) -> None:
    """Trains a preset, and before it what it begins with; goes on where a run has begun, and leaves a whole one.

    Args:
      flops: in all; None: the preset's steps.
    """
    experiment = known[preset]
    starts = []
    for each in experiment.start:
        begun = workdir / Path(each.workdir).name
        train(begun.name, known, begun, workdir, data_dir)
        starts.append(replace(each, workdir=str(begun)))
    experiment = replace(experiment, start=tuple(starts), workdir=str(path))
    if data_dir is not None:
        experiment = replace(experiment, data_dir=data_dir)
    if has_checkpoints(path):
        experiment = replace(from_record(read_record(path)), data_dir=experiment.data_dir, workdir=str(path))
    elif flops is not None:
        spent = sum(spent_flops(Path(each.workdir)) for each in starts)
        steps = int((flops - spent) // step_flops(experiment))
        if steps < 1:
            raise UserError(
                f"{flops:.1e} FLOPs leave {preset} no step beside the {spent:.1e} of what it begins with: ask for more "
                f"--flops"
            )
        training = replace(experiment.training, steps=steps, checkpoint_every=max(1, -(-steps // 6)))
        experiment = replace(experiment, training=replace(training, seed=seed or 0))
    if not complete(path, experiment):
        run(preset, experiment)


def measure(
    path: Path, judges: tuple[Judge, ...], mesh: Mesh, data_dir: str | None, *, seed: int, sheet: Path
) -> Items:
    """Of an arm: its captions, its answers with the image and without, and its drawings; a few of them on a sheet.

    Of its last checkpoint, which has had all the compute. By validation an earlier one of `coded-pixels` is the best:
    in its loss are codes that it makes itself and that change with it.
    """
    steps = steps_of(path)
    loaded = load(path, step=steps[-1], mesh=mesh)
    own, together = loaded.experiment.data, -(-BATCH // mesh.size) * mesh.size
    directory = local_path(data_dir or loaded.experiment.data_dir)

    def subject(data: Data, split: str) -> Subject:
        return subject_of(loaded, data, split, directory, mesh, together, seed=seed, judges=judges or None)[0]

    emoji = subject(own, "test")
    nats, counts = caption_nats(emoji)
    written = captioned(emoji)
    found: Items = {
        "flops": np.array([spent_flops(path)]),
        "first_stage_flops": np.array([sum(spent_flops(Path(each.workdir)) for each in loaded.experiment.start)]),
        "caption_nats": nats,
        "caption_tokens": counts,
        "caption_right": written.right,
        "caption_group": np.array(written.groups),
    }
    lines = {"writes": cells(emoji, [text.written for text in written.written])}
    for name, split in QUESTIONS.items():
        data = replace(own, name=name, mixture=())
        asked = subject(data, split)
        assert asked.questions is not None
        for way, blind in (("", False), ("_blind", True)):
            answers = texts(asked, asked.questions, blind=blind)
            found[f"{name}{way}_right"] = exact(answers)
            found[f"{name}_open"] = np.array([kind(answer.truth) != "yes_no" for answer in answers])
            if not blind:
                lines[f"answers {name}"] = cells(asked, [answer.written for answer in answers])
    own_flops = step_flops(loaded.experiment)
    # Of one subject, so that what it does is compiled once.
    curve = (caption_nats(replace(emoji, variables=load(path, step=step, mesh=mesh).variables)) for step in steps)
    found["curve_flops"] = found["first_stage_flops"][0] + own_flops * np.array(steps, float)
    found["curve_nats"] = np.array([each.sum() / tokens.sum() for each, tokens in curve])
    draws = any(isinstance(field, Interleaved) for field in own.fields)
    if draws:
        name, split = SHAPES
        found |= drawn_items(emoji, subject(replace(own, name=name, mixture=()), split), judges)
        drawn = generation.shown(emoji)
        lines = {"draws": list(zip(drawn.drawn, drawn.asked, strict=True))[:COLUMNS]} | lines
    write_sheet(list(lines.items()), sheet)
    return found


def cells(subject: Subject, said: Sequence[str]) -> list[Cell]:
    """The first images of a split, each with what is asked of it and what was said."""
    assert subject.pictures is not None and subject.records is not None
    images = itertools.chain.from_iterable(subject.pictures.held_out())
    asked = (record.get("question", "") for record in subject.records())
    return [(image, f"{ask} {text}".strip()) for image, ask, text in zip(images, asked, said[:COLUMNS], strict=False)]


def drawn_items(subject: Subject, shapes: Subject, judges: tuple[Judge, ...]) -> Items:
    """Of an arm that draws."""
    found: Items = {}
    for judge in judges:
        taken = recognition.recognised(shapes, judge)
        found[f"{DRAWN}found_by_{judge.name}"] = taken.recognised
        found[f"real_{DRAWN}found_by_{judge.name}"] = taken.real_recognised
        looked = generation.ranked(subject, judge)
        found |= {f"{name}found_by_{judge.name}": each < RANK for name, each in looked.ranks.items()}
    measured = generation.run(subject)
    found["near_copies"] = np.array([measured["near_copies"]], np.float64)
    if subject.model.log_likelihood is not None and subject.model.bound is not None:
        bits = likelihood.run(subject)
        found["bits_per_dim"] = np.array([bits["bits_per_dim"], bits["bits_per_dim_standard_error"]], np.float64)
        found["bound"] = np.array([subject.model.bound])
    return found


def steps_of(path: Path) -> list[int]:
    with Checkpoints(path / CHECKPOINTS, read_only=True) as checkpoints:
        return sorted(checkpoints.steps())


if __name__ == "__main__":
    with command():
        tyro.cli(tradeoff)
