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
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from experiments.presets import presets
from experiments.run import run
from tools.compute import complete, spent_flops, step_flops
from tools.evaluate import sentence, subject_of, tell
from tools.judging import load_judges
from vlm_jax.commandline import command, require_one_process
from vlm_jax.data import Data, Interleaved
from vlm_jax.errors import UserError, check_seed
from vlm_jax.evals import Judge, Subject, generation, likelihood, recognition
from vlm_jax.evals.captions import caption_nats, captioned
from vlm_jax.evals.likelihood import ratio_and_error
from vlm_jax.evals.vqa import exact, kind
from vlm_jax.evals.writing import texts
from vlm_jax.experiment import Experiment, from_record
from vlm_jax.files import check_writable, write_output
from vlm_jax.paths import local_path
from vlm_jax.sharding import MeshShape, make_mesh
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.workdir import CHECKPOINTS, has_checkpoints, load, read_record

READERS, TWO_STAGES, ONE_STAGE = ("reader", "encoder-free"), ("chameleon", "transfusion"), ("pixels", "coded-pixels")
ARMS = (*READERS, *TWO_STAGES, *ONE_STAGE)
QUESTIONS = {"easy_vqa": "test[:2000]", "mosaic": "test[:2000]"}
"""The data sets that are asked about, and how much of them."""
SHAPES = ("easy_vqa/captions", "test")
"""What is drawn beside emoji."""
DRAWN = "shapes_"
"""How the names of its items begin, where those of emoji have nothing in its place."""
FIRST = "transfusion"
"""The arm that tells by which of the two drawings are compared."""
RANK = 10
BATCH = 128
Items = dict[str, np.ndarray]
"""Of each test item, by name; what has one value an arm is an array of one."""


class Compared(NamedTuple):
    """The mean of what one arm has more than another, paired by item, and its standard error."""

    mean: float
    error: float


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
      out: Directory for tradeoff.md, tradeoff.png and the items of each arm; None: WORKDIR/tradeoff-SEED.
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
    failures: dict[str, Exception] = {}
    items: dict[str, Items] = {}
    mesh = make_mesh(MeshShape())
    with jax.set_mesh(mesh):
        judges = load_judges(judge, mesh)
    for name in ARMS:
        path, kept = workdir / f"tradeoff-{name}-{seed}", out / f"{name}.npz"
        try:
            if name in arms:
                train(f"tradeoff-{name}", known, path, workdir, data_dir, flops=flops, seed=seed)
                with jax.set_mesh(mesh):
                    measured = measure(path, judges or (), mesh, data_dir, seed=seed)
                write_output(kept, partial(save, measured))
            if kept.is_file():
                items[name] = dict(np.load(kept))
        except Exception as error:
            failures[name] = error
            tell(name, error)
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


# What is measured, item by item.


def measure(path: Path, judges: tuple[Judge, ...], mesh: Mesh, data_dir: str | None, *, seed: int) -> Items:
    """Of an arm: its captions, its answers with the image and without, and its drawings."""
    loaded = load(path, mesh=mesh)
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
    for name, split in QUESTIONS.items():
        data = replace(own, name=name, mixture=())
        asked = subject(data, split)
        assert asked.questions is not None
        for way, blind in (("", False), ("_blind", True)):
            answers = texts(asked, asked.questions, blind=blind)
            found[f"{name}{way}_right"] = exact(answers)
            found[f"{name}_open"] = np.array([kind(answer.truth) != "yes_no" for answer in answers])
    steps, own_flops = steps_of(path), step_flops(loaded.experiment)
    # Of one subject, so that what it does is compiled once.
    curve = (caption_nats(replace(emoji, variables=load(path, step=step, mesh=mesh).variables)) for step in steps)
    found["curve_flops"] = found["first_stage_flops"][0] + own_flops * np.array(steps, float)
    found["curve_nats"] = np.array([each.sum() / tokens.sum() for each, tokens in curve])
    draws = any(isinstance(field, Interleaved) for field in own.fields)
    if not draws:
        return found
    name, split = SHAPES
    return found | drawn_items(emoji, subject(replace(own, name=name, mixture=()), split), judges)


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


# What follows from it.


def recall(items: Items, name: str = "") -> Float[np.ndarray, " N"] | None:
    """Of each caption the share of the judges by whom its drawing finds it; None: nothing is drawn."""
    found = [value for key, value in items.items() if key.startswith(f"{name}found_by_")]
    return np.mean(found, axis=0) if found else None


def found(items: Items, name: str = "") -> Float[np.ndarray, " N"]:
    """`recall` of what draws."""
    shares = recall(items, name)
    assert shares is not None
    return shares


def mean_and_error(values: Float[np.ndarray, " N"] | Bool[np.ndarray, " N"]) -> Compared:
    return Compared(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))))


def nats_apart(one: Items, other: Items) -> Compared:
    """Nats a token that one arm needs more than another for the same captions."""
    mean, error = ratio_and_error(one["caption_nats"] - other["caption_nats"], other["caption_tokens"])
    return Compared(mean, error or 0.0)


def open_answers(items: Items) -> Float[np.ndarray, " N"]:
    return items["easy_vqa_right"][items["easy_vqa_open"]].astype(float)


def decision(items: Mapping[str, Items]) -> str:
    """What the rule says, in a sentence or two."""
    missing = [name for name in ("reader", *TWO_STAGES, *ONE_STAGE) if name not in items]
    if missing:
        return f"Undecided: there is no {' and no '.join(missing)} yet."
    by, how = (f"R@{RANK}", "") if tells(items[FIRST]) else ("drawn shapes", DRAWN)
    best = max(TWO_STAGES, key=lambda name: float(np.mean(found(items[name], how))))
    closed = [name for name in ONE_STAGE if closes(items[name], items["reader"], items[best], how)]
    if closed:
        return (
            f"Closed, by {by}: {' and '.join(closed)} reads within a standard error of the reader, draws so of {best}."
        )
    return (
        f"Open, by {by}: no one-stage arm is within a standard error of the reader in reading and of {best} in drawing."
    )


def tells(items: Items) -> bool:
    """Whether the R@10 of an arm is more than chance and than the nearest caption's picture reaches."""
    own, nearest = found(items), found(items, "nearest_caption_")
    drawn, above = mean_and_error(own), mean_and_error(own - nearest)
    return drawn.mean > RANK / len(own) + 2 * drawn.error and above.mean > 2 * above.error


def closes(arm: Items, reader: Items, best: Items, how: str = "") -> bool:
    """
    Args:
      how: the items by which drawings are compared begin.
    """
    nats = nats_apart(arm, reader)
    answers = mean_and_error(open_answers(arm) - open_answers(reader))
    drawn = mean_and_error(found(arm, how) - found(best, how))
    return nats.mean <= nats.error and answers.mean >= -answers.error and drawn.mean >= -drawn.error


def reached(items: Items, nats: float) -> float | None:
    """The first FLOPs of a checkpoint at which captions take as few nats a token."""
    enough = items["curve_flops"][items["curve_nats"] <= nats]
    return float(enough.min()) if len(enough) else None


# Table and figure.

HEAD = (
    *("arm", "FLOPs: first stage", "in all", "captions: nats/token", "exact", "new combination"),
    *("easy_vqa open", "blind", "mosaic", "blind"),
    *(f"R@{RANK}", "new combination", "nearest caption's", "real", "shapes", "real", "near-copies", "bits/dim"),
    "FLOPs to the reader's nats",
)


def table(items: Mapping[str, Items]) -> str:
    """Markdown: what there is of each arm, and what the rule says."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    reader = items.get("reader")
    goal = None if reader is None else float(reader["caption_nats"].sum() / reader["caption_tokens"].sum())
    for name in ARMS:
        cells = ["not there"] + [""] * (len(HEAD) - 2) if name not in items else cells_of(items[name], goal)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", decision(items)])


def cells_of(items: Items, goal: float | None) -> list[str]:
    new = items["caption_group"] == "new_combination"
    opened = items["easy_vqa_open"]

    def share(values: np.ndarray | None) -> str:
        if values is None or not len(values):
            return ""
        mean, error = mean_and_error(values)
        return f"{100 * mean:.1f} ± {100 * error:.1f}%"

    nats = ratio_and_error(items["caption_nats"], items["caption_tokens"])
    drawn = recall(items)
    bits = items.get("bits_per_dim")
    to_goal = None if goal is None else reached(items, goal)
    return [
        f"{items['first_stage_flops'][0]:.1e}",
        f"{items['flops'][0]:.1e}",
        f"{nats[0]:.3f} ± {nats[1] or 0:.3f}",
        share(items["caption_right"]),
        share(items["caption_right"][new]),
        share(items["easy_vqa_right"][opened]),
        share(items["easy_vqa_blind_right"][opened]),
        share(items["mosaic_right"]),
        share(items["mosaic_blind_right"]),
        share(drawn),
        "" if drawn is None else share(drawn[new[: len(drawn)]]),
        share(recall(items, "nearest_caption_")),
        share(recall(items, "real_")),
        share(recall(items, DRAWN)),
        share(recall(items, f"real_{DRAWN}")),
        f"{100 * items['near_copies'][0]:.1f}%" if "near_copies" in items else "",
        "" if bits is None else f"{bits[0]:.3f} ± {bits[1]:.3f} ({items['bound'][0]})",
        "" if to_goal is None else f"{to_goal:.1e}",
    ]


def draw(items: Mapping[str, Items]) -> Figure:
    """How well each arm reads against how well it draws, and how its captions become likelier with compute."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    plane, curves = figure.subplots(1, 2)
    for name, own in items.items():
        nats, drawn = own["caption_nats"].sum() / own["caption_tokens"].sum(), recall(own)
        if drawn is not None:
            plane.errorbar(nats, 100 * drawn.mean(), yerr=100 * mean_and_error(drawn).error, fmt="o", label=name)
        else:
            plane.axvline(nats, label=name, linestyle="dotted", color="black" if name == "reader" else "grey")
        curves.plot(own["curve_flops"], own["curve_nats"], marker=".", label=name)
    plane.set_xlabel("nats a token of held-out captions")
    plane.set_ylabel(f"drawings that find their caption among {RANK}, %")
    plane.invert_xaxis()
    curves.set_xlabel("training FLOPs, first stages included")
    curves.set_ylabel("nats a token of held-out captions")
    for axes in (plane, curves):
        if items:
            axes.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    with command():
        tyro.cli(tradeoff)
