"""What follows from what was measured of the arms of `tools.tradeoff`: its rule's answer, its table and its figure."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from vlm_jax.evals import recognition
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


def nats_a_token(items: Items) -> float:
    """Of held-out captions."""
    return float(items["caption_nats"].sum() / items["caption_tokens"].sum())


def nats_apart(one: Items, other: Items) -> Compared:
    """Nats a token that one arm needs more than another for the same captions."""
    mean, error = ratio_and_error(one["caption_nats"] - other["caption_nats"], other["caption_tokens"])
    return Compared(mean, error or 0.0)


def open_answers(items: Items) -> Float[np.ndarray, " N"]:
    return items["easy_vqa_right"][items["easy_vqa_open"]].astype(float)


def missing(items: Mapping[str, Items]) -> list[str]:
    """Arms that the rule compares and that are not there."""
    return [name for name in ("reader", *TWO_STAGES, *ONE_STAGE) if name not in items]


def decision(items: Mapping[str, Items]) -> str:
    """What the rule says, in a sentence or two."""
    if names := missing(items):
        return f"Undecided: there is no {' and no '.join(names)} yet."
    how, best = compared(items)
    by = f"R@{RANK}" if how == "" else "drawn shapes"
    closed = [name for name in ONE_STAGE if closes(items[name], items["reader"], items[best], how)]
    if closed:
        return (
            f"Closed, by {by}: {' and '.join(closed)} reads within a standard error of the reader, draws so of {best}."
        )
    return (
        f"Open, by {by}: no one-stage arm is within a standard error of the reader in reading and of {best} in drawing."
    )


def compared(items: Mapping[str, Items]) -> tuple[str, str]:
    """How the items begin by which drawings are compared, and the two-stage arm that is the best by them."""
    how = "" if tells(items[FIRST]) else DRAWN
    return how, max(TWO_STAGES, key=lambda name: float(np.mean(found(items[name], how))))


def tells(items: Items) -> bool:
    """Whether the R@10 of an arm is more than chance and than the nearest caption's picture reaches."""
    own, nearest = found(items), found(items, "nearest_caption_")
    drawn, above = mean_and_error(own), mean_and_error(own - nearest)
    return drawn.mean > RANK / len(own) + 2 * drawn.error and above.mean > 2 * above.error


def apart(arm: Items, reader: Items, best: Items, how: str) -> tuple[Compared, Compared, Compared]:
    """What an arm has more than the reader of nats and of right answers, and than the best two-stage arm of drawings.

    Args:
      how: the items by which drawings are compared begin.
    """
    answers, drawn = open_answers(arm) - open_answers(reader), found(arm, how) - found(best, how)
    return nats_apart(arm, reader), mean_and_error(answers), mean_and_error(drawn)


def closes(arm: Items, reader: Items, best: Items, how: str) -> bool:
    """Whether an arm is within a standard error of both, or better; arguments as `apart`."""
    nats, answers, drawn = apart(arm, reader, best, how)
    return nats.mean <= nats.error and answers.mean >= -answers.error and drawn.mean >= -drawn.error


def reached(items: Items, nats: float) -> float | None:
    """The first FLOPs of a checkpoint at which captions take as few nats a token."""
    enough = items["curve_flops"][items["curve_nats"] <= nats]
    return float(enough.min()) if len(enough) else None


# Table and figure.

READS = (
    *("reads", "FLOPs of the first stage", "in all", "captions: nats/token", "exact", "of new combinations"),
    *("easy_vqa, open", "blind", "mosaic", "blind", "FLOPs to the reader's nats"),
)
DRAWS = ("draws", f"R@{RANK}", "of new combinations", "shapes", "near-copies", "bits/dim")
BESIDE = {"the nearest caption's image": "nearest_caption_", "the real image": "real_"}
"""What stands beside drawings, and how the names of its items begin."""


def table(items: Mapping[str, Items]) -> str:
    """Markdown: how each arm reads, how it draws, how far apart are those that the rule compares, and what it says."""
    reader = items.get("reader")
    goal = None if reader is None else nats_a_token(reader)
    read = [(name, reading(items[name], goal) if name in items else None) for name in ARMS]
    drawn = [(name, drawing(items[name]) if name in items else None) for name in (*TWO_STAGES, *ONE_STAGE)]
    return "\n\n".join(
        [lines(READS, read), lines(DRAWS, [*drawn, *beside(items)]), *differences(items), decision(items)]
    )


def lines(head: tuple[str, ...], rows: Sequence[tuple[str, Sequence[str] | None]]) -> str:
    """Markdown of a table, in which rows of None are marked as missing."""
    told = [(name, ["not there"] + [""] * (len(head) - 2) if cells is None else cells) for name, cells in rows]
    body = (f"| {' | '.join([name, *cells])} |" for name, cells in told)
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body])


def share(values: np.ndarray | None) -> str:
    """In percent, with its standard error."""
    if values is None or not len(values):
        return ""
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f} ± {100 * error:.1f}%"


def reading(items: Items, goal: float | None) -> list[str]:
    """The cells of an arm in `READS`."""
    opened = items["easy_vqa_open"]
    nats, error = ratio_and_error(items["caption_nats"], items["caption_tokens"])
    to_goal = None if goal is None else reached(items, goal)
    return [
        f"{items['first_stage_flops'][0]:.1e}",
        f"{items['flops'][0]:.1e}",
        f"{nats:.3f} ± {error or 0:.3f}",
        share(items["caption_right"]),
        share(items["caption_right"][items["caption_group"] == "new_combination"]),
        share(items["easy_vqa_right"][opened]),
        share(items["easy_vqa_blind_right"][opened]),
        share(items["mosaic_right"]),
        share(items["mosaic_blind_right"]),
        "" if to_goal is None else f"{to_goal:.1e}",
    ]


def drawing(items: Items, name: str = "") -> list[str]:
    """The cells in `DRAWS` of an arm, or of what stands beside its drawings."""
    new, drawn = items["caption_group"] == "new_combination", recall(items, name)
    bits = None if name else items.get("bits_per_dim")
    copies = items.get(f"{name}near_copies")
    return [
        share(drawn),
        "" if drawn is None else share(drawn[new[: len(drawn)]]),
        share(recall(items, f"{name}{DRAWN}")),
        "" if copies is None else f"{100 * copies[0]:.1f}%",
        "" if bits is None else f"{bits[0]:.3f} ± {bits[1]:.3f} ({items['bound'][0]})",
    ]


def beside(items: Mapping[str, Items]) -> list[tuple[str, list[str]]]:
    """The rows of what any arm's drawings are compared with, which are the same for all."""
    arm = next((own for own in items.values() if recall(own) is not None), None)
    if arm is None:
        return []
    guessed = RANK / len(found(arm)), recognition.DRAWS / len(found(arm, DRAWN))
    chance = [f"{100 * guessed[0]:.1f}%", "", f"{100 * guessed[1]:.1f}%", "", ""]
    return [("chance", chance), *((name, drawing(arm, kind)) for name, kind in BESIDE.items())]


def differences(items: Mapping[str, Items]) -> list[str]:
    """In words, how far each one-stage arm is from what the rule compares it with."""
    if missing(items):
        return []
    how, best = compared(items)
    what = f"R@{RANK}" if how == "" else "shapes"
    told = []
    for name in ONE_STAGE:
        nats, answers, drawn = apart(items[name], items["reader"], items[best], how)
        told.append(
            f"{name}: {nats.mean:+.3f} ± {nats.error:.3f} nats and {percent(answers)} of open answers beside the "
            f"reader's, {percent(drawn)} of {what} beside {best}'s."
        )
    return ["\n".join(f"- {each}" for each in told)]


def percent(difference: Compared) -> str:
    return f"{100 * difference.mean:+.1f} ± {100 * difference.error:.1f}%"


def draw(items: Mapping[str, Items]) -> Figure:
    """How well each arm reads against how well it draws, and how its captions become likelier with compute."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    emoji, shapes, curves = figure.subplots(1, 3)
    for name, own in items.items():
        told = {"label": name, "color": f"C{ARMS.index(name)}"}
        nats = nats_a_token(own)
        for plane, kind in ((emoji, ""), (shapes, DRAWN)):
            drawn = recall(own, kind)
            if drawn is not None:
                plane.errorbar(nats, 100 * drawn.mean(), yerr=100 * mean_and_error(drawn).error, fmt="o", **told)
            else:
                plane.axvline(nats, linestyle="dotted", **told)
        curves.plot(own["curve_flops"], own["curve_nats"], marker=".", **told)
    emoji.set_ylabel(f"drawings that find their caption among {RANK}, %")
    shapes.set_ylabel("drawn shapes that are what their captions say, %")
    curves.set_ylabel("nats a token of held-out captions")
    curves.set_xlabel("training FLOPs, first stages included")
    for plane in (emoji, shapes):
        plane.set_xlabel("nats a token of held-out captions")
        plane.invert_xaxis()
        plane.set_ylim(bottom=0)
    if items:
        for axes in (emoji, shapes, curves):
            axes.legend(frameon=False, fontsize="small")
    return figure
