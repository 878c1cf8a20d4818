"""Asks a run: prompts about pictures and without, answers on a sheet or as lines, and captions of a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import PIL.Image
from tqdm import tqdm

from vlm_jax.chat import Asked, Speaker, answers, seen
from vlm_jax.data import Source
from vlm_jax.data.picture import picture_of
from vlm_jax.errors import UserError
from vlm_jax.files import write_output
from vlm_jax.sheets import write_sheet

COLUMNS = 6
"""Pictures in a row of a sheet."""
LINES = ".jsonl"
"""How the name of a file of captions ends."""


def check_images(images: Sequence[Path], prompts: Sequence[str], out: Path | None) -> None:
    """Refuses what is no image, a folder beside others, and a file that is not of the kind that is written.

    Raises:
      UserError: which it is.
    """
    folders = [path for path in images if path.is_dir()]
    if folders and (len(images) > 1 or len(prompts) > 1):
        raise UserError(f"--image {folders[0]} is a directory: give it alone, with one --prompt at most")
    if folders and (out is None or out.suffix != LINES):
        raise UserError(f"--image {folders[0]} is a directory: its answers go to --out FILE{LINES}")
    for path in set(images) - set(folders):
        picture_of(path).pixels(3)
    if not folders and out is not None and out.suffix == LINES:
        raise UserError(f"--out is {out}, which holds the answers to --image DIRECTORY: end it in .png")


class Asking(NamedTuple):
    """How answers are drawn."""

    temperature: float
    seed: int


def about(
    speaker: Speaker, prompts: Sequence[str], images: Sequence[Path], num: int, out: Path, asking: Asking
) -> list[str]:
    """`num` answers to each prompt, to all of which all images belong, and a sheet of them where there are any."""
    asked = [Asked(prompt, tuple(images)) for prompt in prompts or ("",) for _ in range(num)]
    found = list(tqdm(answers(speaker, asked, **asking._asdict()), "answering", len(asked), leave=False, disable=None))
    if images:
        shown = seen(speaker, images)[: len(images)]
        rows = [
            (one.prompt, [(image, "" if index else text) for index, image in enumerate(shown)])
            for one, text in zip(asked, found, strict=True)
        ]
        write_sheet(rows, out, levels=speaker.model.inputs["image"].limit or 256)
    return found


def held_out(speaker: Speaker, source: Source, num: int, out: Path, asking: Asking) -> Path:
    """A sheet of the first pictures, above each what is asked, what is answered and, where that is another, the truth.

    Where the data do not ask, a caption is asked for; any of the picture's is true.
    """
    records = [source[index] for index in range(min(num, len(source)))]
    asks = {"question", "answer"} <= source.keys
    asked = [Asked(record["question"] if asks else "", (record["image"],)) for record in records]
    found = tqdm(answers(speaker, asked, **asking._asdict()), "answering", len(asked), leave=False, disable=None)
    cells = []
    for record, one, text in zip(records, asked, found, strict=True):
        truths = (record["answer"],) if asks else record["text"]
        told = f"{one.prompt} {text}" if text in truths else f"{one.prompt} {text} ({truths[0]})"
        cells.append((seen(speaker, one.images)[0], told.strip()))
    rows = [(f"{source.split} images", cells[start : start + COLUMNS]) for start in range(0, len(cells), COLUMNS)]
    write_sheet(rows, out, levels=speaker.model.inputs["image"].limit or 256)
    return out


def folder(speaker: Speaker, prompt: str, directory: Path, out: Path, asking: Asking) -> Path:
    """A line for each picture in a directory, in the order of their names: `{"image", "prompt", "answer"}`.

    All are looked at before the first is asked about: a damaged one is told then, not after hours.

    Raises:
      UserError: there are none, or one cannot be used, or the file cannot be written.
    """
    known = PIL.Image.registered_extensions()
    paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in known)
    if not paths:
        raise UserError(f"{directory} has no pictures: give a directory that has some")
    for path in tqdm(paths, "looking at the pictures", leave=False, disable=None):
        picture_of(path).pixels(3)
    asked = [Asked(prompt, (path,)) for path in paths]

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as lines:
            found = tqdm(
                answers(speaker, asked, **asking._asdict()), "answering", len(asked), leave=False, disable=None
            )
            for image, text in zip(paths, found, strict=True):
                line = {"image": image.name, "prompt": prompt, "answer": text}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    write_output(out, write)
    return out
