"""One ledger of likelihoods: `python -m tools.likelihood` trains or loads families and measures all on one split."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Float, Int
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from scipy.stats import multivariate_normal

from experiments.presets import presets, unknown_preset
from experiments.run import run
from tools.compute import complete, step_flops
from tools.evaluate import evaluate, sentence, tell
from vlm_jax.commandline import command, require_one_process
from vlm_jax.data import example, named, open_source
from vlm_jax.data.find import find_data_set, full_name
from vlm_jax.errors import UserError, check_seed
from vlm_jax.evals.likelihood import mean_and_error
from vlm_jax.experiment import Experiment, from_record
from vlm_jax.files import check_writable, write_output
from vlm_jax.models import build, family_of
from vlm_jax.paths import local_path
from vlm_jax.trees import count_parameters
from vlm_jax.workdir import Loaded, has_checkpoints, load, read_record

SHOWN = 8
"""Samples of each model in the figure."""
TIMED = 16
"""Images that are evaluated, and drawn, while the clock runs."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the ledger."""

    family: str
    variant: str
    bits_per_dim: float
    standard_error: float | None
    """None: there is one image."""
    bound: str
    given: str = ""
    """What the likelihood is conditional on: "class", or nothing; a class tells at most its own entropy."""
    dequantisation: str
    parameters: int | None = None
    training_flops: float | None = None
    """Of matrix products and convolutions, up to the checkpoint that is measured; a model may do without any."""
    evaluate_seconds: float | None = None
    """An image, the compilation not counted."""
    sample_seconds: float | None = None


def likelihood(
    presets: tuple[str, ...] = (),
    data: str = "digits",
    workdir: Path = Path("runs"),
    out: Path | None = None,
    data_dir: str | None = None,
    seed: int = 0,
) -> list[Row]:
    """Trains or loads presets that have a likelihood, and writes a table and a figure of them beside simple baselines.

    The table is written anew for each of them. Where one fails, the others go on; then the command says which and ends
    with status 2.

    Args:
      presets: Their names; none: all on --data that have a likelihood.
      data: The data set that all are measured on.
      workdir: Each preset's run is in WORKDIR/PRESET; where there is none it is trained, which may take long.
      out: Directory for ledger.md, ledger.json, ledger.png and each preset's results; None: WORKDIR/likelihood-DATA.
      data_dir: Where prepared data sets are; None: where the presets have them.
      seed: Of the samples and of the noise that bounds are averaged over.

    Raises:
      UserError: presets cannot be compared, a file cannot be written, or a preset failed.
    """
    require_one_process()
    workdir = local_path(workdir)
    chosen = begun(choose(presets, data), workdir, data_dir)
    first = next(iter(chosen.values()))
    directory = local_path(data_dir or first.data_dir)
    out = workdir / f"likelihood-{data}" if out is None else local_path(out)
    check_writable(out / "ledger.json")
    check_seed(seed)
    rows, sheets = baselines(first, directory), {}
    failures: dict[str, Exception] = {}
    for name, experiment in chosen.items():
        path = workdir / name
        try:
            if not complete(path, experiment):
                starts = tuple(
                    replace(each, workdir=str(workdir / Path(each.workdir).name)) for each in experiment.start
                )
                run(name, replace(experiment, workdir=str(path), data_dir=str(directory), start=starts))
            sheets[name], row = measure(path, load(path), directory, seed, out / f"{name}.json")
            rows.append(row)
            rows.sort(key=lambda row: -row.bits_per_dim)
            write(rows, out)
        except Exception as error:
            failures[name] = error
            tell(name, error)
    print(f"{table(rows)}\n\n{out}")
    if any(images is not None for images in sheets.values()):
        with rc_context({"text.parse_math": False, "text.usetex": False}):  # names are text, not formulae
            figure = draw(rows, sheets, data)
            write_output(out / "ledger.png", lambda path: figure.savefig(path, format="png", dpi=110))
    if failures:
        raise UserError("; ".join(f"{name}: {sentence(error)}" for name, error in failures.items()))
    return rows


def write(rows: list[Row], out: Path) -> None:
    """The ledger as it is so far, for other programs and for people."""
    record = json.dumps([vars(row) for row in rows], indent=2, allow_nan=False)
    write_output(out / "ledger.json", lambda path: path.write_text(record + "\n", encoding="utf-8"))
    write_output(out / "ledger.md", lambda path: path.write_text(table(rows) + "\n", encoding="utf-8"))


def choose(names: tuple[str, ...], data: str) -> dict[str, Experiment]:
    """The presets to compare.

    Raises:
      UserError: one is unknown, is of other data, or has no likelihood; or there is none.
    """
    known = {name: experiment for name, (_, experiment) in presets().items()}
    if not names:
        names = tuple(name for name, experiment in known.items() if on_data(experiment, data))
    if not names:
        raise UserError(f"no preset that has a likelihood trains on {data}: choose another --data")
    for name in names:
        if name not in known:
            raise unknown_preset(name, known)
        own = known[name].data.name
        if own != data:
            raise UserError(f"{name} trains on {own}, not on {data}: leave it out, or change --data")
        if not has_likelihood(known[name]):
            raise UserError(f"{name} has no likelihood of images: leave it out")
    # Those that begin with others' runs after the others.
    return {name: known[name] for name in sorted(names, key=lambda name: len(known[name].start) > 0)}


def begun(chosen: dict[str, Experiment], workdir: Path, data_dir: str | None) -> dict[str, Experiment]:
    """The same, but where a run has begun with its own settings.

    Raises:
      UserError: they are of other images than the first preset's.
    """
    experiments = {
        name: from_record(read_record(workdir / name)) if has_checkpoints(workdir / name) else experiment
        for name, experiment in chosen.items()
    }
    first = next(iter(chosen))
    expected = held_out(chosen[first], data_dir)
    for name, experiment in experiments.items():
        if (found := held_out(experiment, data_dir)) != expected:
            raise UserError(
                f"{workdir / name} is measured on {found} and {first} on {expected}: "
                f"choose other --presets, or another --workdir"
            )
    return experiments


def held_out(experiment: Experiment, data_dir: str | None) -> str:
    """What two runs must share for their bits to be comparable."""
    data, image = experiment.data, build(experiment.model).inputs["image"]
    name, directory = named(data), local_path(data_dir or experiment.data_dir)
    if ":" not in name:  # a preset's; a run's record has the version
        name = full_name(find_data_set(name, directory), directory)
    return f"{name}, split {data.test}, shape {image.shape}, {image.limit} levels"


def on_data(experiment: Experiment, data: str) -> bool:
    """Whether a preset belongs in the ledger of a data set."""
    return experiment.data.name == data and has_likelihood(experiment)


def has_likelihood(experiment: Experiment) -> bool:
    """Whether a preset's model says how probable an image is."""
    model = build(experiment.model)
    return model.log_likelihood is not None and "image" in model.inputs and "tokens" not in model.inputs


def measure(
    path: Path, loaded: Loaded, data_dir: Path, seed: int, out: Path
) -> tuple[Int[np.ndarray, "n H W C"] | None, Row]:
    """A trained run's samples and its line; what was evaluated for it goes to `out`, for the run is only read."""
    model, experiment = loaded.model, loaded.experiment
    data = experiment.data
    results = evaluate(path, data_dir=str(data_dir), seed=seed, only=("likelihood",), out=out)
    bits, error = (results[f"likelihood/{metric}"] for metric in ("bits_per_dim", "bits_per_dim_standard_error"))
    if bits is None:
        raise UserError(f"the likelihood of {path} is not finite: train it anew, or leave it out of --presets")
    assert model.log_likelihood is not None and model.bound is not None
    source = open_source(named(data), data.test, data_dir)
    records = [example(source[i], data, model.inputs, None, None) for i in range(min(TIMED, len(source)))]
    batch = {field: jnp.stack([record[field] for record in records]) for field in model.inputs}
    key = jax.random.key(seed)
    log_likelihood = jax.jit(model.log_likelihood)
    images, sample_seconds = None, None
    if model.sample is not None:
        sample = jax.jit(partial(model.sample, num=TIMED, sampling=experiment.sampling))
        images, sample_seconds = timed(lambda: sample(loaded.variables, key, {}))
    _, evaluate_seconds = timed(lambda: log_likelihood(loaded.variables, batch, key))
    return images, Row(
        family=family_of(experiment.model),
        variant=path.name,
        bits_per_dim=float(bits),
        standard_error=None if error is None else float(error),
        bound={"exact": "exact", "lower": "lower bound", "estimate": "estimate"}[model.bound],
        given=str(results.get("given", "")),
        dequantisation=model.dequantisation or "none",
        parameters=count_parameters(loaded.variables["params"]),
        training_flops=loaded.step * step_flops(experiment),
        evaluate_seconds=evaluate_seconds / len(records),
        sample_seconds=None if sample_seconds is None else sample_seconds / TIMED,
    )


def timed(call: Callable[[], jax.Array]) -> tuple[np.ndarray, float]:
    """What it returns, and the seconds of a second call: the first one compiles."""
    value = np.asarray(call())
    since = time.perf_counter()
    jax.block_until_ready(call())
    return value, time.perf_counter() - since


def baselines(experiment: Experiment, data_dir: Path) -> list[Row]:
    """What needs no training but a look at this run's: a model that does not beat them has learned little."""
    data, image = experiment.data, build(experiment.model).inputs["image"]
    levels = image.limit
    assert levels is not None

    def images(split: str) -> Int[np.ndarray, "N D"]:
        source = open_source(named(data), split, data_dir)
        return np.stack(
            [example(source[i], data, {"image": image}, None, None)["image"].ravel() for i in range(len(source))]
        )

    train, test = images(data.train), images(data.test)
    measured = {
        ("uniform", "exact", "none"): np.full(len(test), -test.shape[1] * math.log(levels)),
        ("independent categorical", "exact", "none"): categorical(train, test, levels),
        ("full-covariance Gaussian", "lower bound", "uniform"): gaussian(train, test),
    }
    rows = []
    for (name, bound, dequantisation), nats in measured.items():
        bits_per_dim, standard_error = mean_and_error(nats, np.full(len(test), test.shape[1]))
        rows.append(
            Row(
                family="baseline",
                variant=name,
                bits_per_dim=bits_per_dim,
                standard_error=standard_error,
                bound=bound,
                dequantisation=dequantisation,
            )
        )
    return rows


def categorical(train: Int[np.ndarray, "N D"], test: Int[np.ndarray, "M D"], levels: int) -> Float[np.ndarray, " M"]:
    """Each sub-pixel by itself, its levels counted, with half a count for the unseen (Krichevsky & Trofimov 1981)."""
    counts = np.stack([np.bincount(column, minlength=levels) for column in train.T]) + 0.5
    log_probs = np.log(counts / counts.sum(axis=1, keepdims=True))
    return log_probs[np.arange(test.shape[1]), test].sum(axis=1)


def gaussian(train: Int[np.ndarray, "N D"], test: Int[np.ndarray, "M D"], draws: int = 8) -> Float[np.ndarray, " M"]:
    """The mean and covariance of dequantised images, averaged over draws of the noise: a lower bound."""
    rng = np.random.default_rng(0)
    # The variance of uniform noise is known, and added where a drawn one would have to be estimated.
    covariance = np.cov(train, rowvar=False) + np.eye(train.shape[1]) / 12
    normal = multivariate_normal(train.mean(axis=0) + 0.5, covariance)
    return np.mean([normal.logpdf(test + rng.random(test.shape)) for _ in range(draws)], axis=0)


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = "| family | variant | bits/dim | | given | dequantised | parameters | FLOPs | s/image: evaluate | sample |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = (
            row.family,
            row.variant,
            f"{row.bits_per_dim:.4f}" + ("" if row.standard_error is None else f" ± {row.standard_error:.4f}"),
            row.bound,
            row.given,
            row.dequantisation,
            "" if row.parameters is None else f"{row.parameters:,}",
            f"{row.training_flops:.1e}" if row.training_flops else "",
            "" if row.evaluate_seconds is None else f"{row.evaluate_seconds:.1e}",
            "" if row.sample_seconds is None else f"{row.sample_seconds:.1e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[Row], sheets: dict[str, Int[np.ndarray, "n H W C"] | None], data: str) -> Figure:
    """Bits per dimension against training compute, and samples of each model."""
    drawn = [row for row in reversed(rows) if sheets.get(row.variant) is not None]
    cell_size = 0.65 if len(drawn) > 6 else 1.0
    figure = Figure(figsize=(8 + SHOWN * cell_size, max(5, cell_size * len(drawn))), layout="constrained")
    sides: Any = figure.subfigures(1, 2, width_ratios=[8, SHOWN * cell_size + 2])
    left, right = sides
    axes = left.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
    for row in rows:
        if row.training_flops:
            label = f"{row.variant} {row.bits_per_dim:.2f}"
            axes.errorbar(row.training_flops, row.bits_per_dim, yerr=row.standard_error, fmt="o", label=label)
        else:
            axes.axhline(row.bits_per_dim, color="grey", linewidth=0.8, linestyle="dotted")
            axes.annotate(row.variant, (0.01, row.bits_per_dim), xycoords=("axes fraction", "data"), color="grey")
    left.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    axes.set_xscale("log")
    compute = [row.training_flops for row in rows if row.training_flops]
    if compute:  # a decade at least, in which the ticks have room
        axes.set_xlim(min(compute) / 3, max(compute) * 3)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("bits per dimension, held-out")
    axes.set_title(data)
    grid: Any = right.subplots(len(drawn), SHOWN + 1, squeeze=False, width_ratios=[3, *[1] * SHOWN])
    for line, row in zip(grid, drawn, strict=True):
        for cell in line:
            cell.axis("off")
        line[0].text(0, 0.5, f"{row.variant}\n{row.bits_per_dim:.2f}", va="center", fontsize=8)
        images = sheets[row.variant]
        assert images is not None
        for cell, image in zip(line[1:], images, strict=False):
            cell.imshow(image.astype(float) / max(images.max(), 1), cmap="gray", vmin=0, vmax=1)
    return figure


if __name__ == "__main__":
    with command():
        tyro.cli(likelihood)
