"""What follows from what was measured of the arms of `tools.tradeoff`: its rule's answer, its table and its figure."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from vlm_jax.evals.likelihood import ratio_and_error

READERS, TWO_STAGES, ONE_STAGE = ("reader", "encoder-free"), ("chameleon", "transfusion"), ("pixels", "coded-pixels")
ARMS = (*READERS, *TWO_STAGES, *ONE_STAGE)
DRAWN = "shapes_"
"""How the names of its items begin, where those of emoji have nothing in its place."""
FIRST = "transfusion"
"""The arm that tells by which of the two drawings are compared."""
RANK = 10
Items = dict[str, np.ndarray]
"""Of each test item, by name; what has one value an arm is an array of one."""


class Compared(NamedTuple):
    """The mean of what one arm has more than another, paired by item, and its standard error."""

    mean: float
    error: float


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
