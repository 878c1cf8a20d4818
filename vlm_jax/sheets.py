"""Contact sheets: rows of labelled images in one PNG."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vlm_jax.files import write_output

Cell = tuple[np.ndarray, str]
"""An image, uint8 [H, W, C], and the label above it."""
LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}
"""Captions are text, not formulae, wherever the figure is rendered."""


def write_sheet(rows: Sequence[tuple[str, Sequence[Cell]]], path: Path, *, levels: int = 256) -> None:
    """Draws rows of images, each row with its title at the left, enlarged without interpolation.

    Args:
      levels: values of a sub-pixel; the highest is drawn white.

    Raises:
      UserError: the file cannot be written.
    """
    figure = draw(rows, levels)
    write_output(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def draw(rows: Sequence[tuple[str, Sequence[Cell]]], levels: int) -> Figure:
    """The figure of a sheet, for a notebook to show; arguments as `write_sheet`."""
    columns = max(len(cells) for _, cells in rows)
    figure = Figure(figsize=(1.2 * columns + 1.8, 1.3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=[1.5, *[1] * columns])
    for axes in grid.flat:
        axes.axis("off")
    for line, (title, cells) in zip(grid, rows, strict=True):
        line[0].text(0, 0.5, textwrap.fill(shown(title), 18), va="center", fontsize=8, **LITERAL)
        for axes, (image, label) in zip(line[1:], cells, strict=False):
            grey = image.shape[-1] == 1
            pixels = np.repeat(image, 3, axis=-1) if grey else image
            axes.imshow(pixels.astype(float) / (levels - 1), interpolation="nearest")
            axes.set_title(textwrap.fill(shown(label), 20), fontsize=6, **LITERAL)
    return figure


def shown(label: str) -> str:
    """With a mark in the place of what has no glyph, such as the control characters that an untrained model writes."""
    return "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in label)
