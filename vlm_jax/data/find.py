"""From the name of a data set to the directory that holds it."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from vlm_jax.data.prepare import BUILDERS, CACHE, own_names, prepare
from vlm_jax.errors import UserError
from vlm_jax.paths import local_path


class _Prepared(NamedTuple):
    """What TFDS has prepared in one directory."""

    name: str
    """With the configuration, if there are several: "coco_captions/2014"."""
    version: str
    directory: Path


def find_data_set(name: str, data_dir: Path) -> Path:
    """The directory of a data set; ours are prepared on first use.

    Args:
      name: "openmoji", "easy_vqa" (its questions), "easy_vqa/dialogues", "easy_vqa/captions", "easy_vqa/color",
        "easy_vqa/shape", "mosaic" (questions), "mosaic/dialogues", "mosaic/captions", "digits", or any data set that
        TFDS has prepared under `data_dir`: "fashion_mnist", "coco_captions:1.1.0", "imagenet_resized/32x32". Of several
        prepared versions the newest is meant, of ours the one that this library makes.

    Raises:
      UserError: there is no such data set, or it is not prepared, or the name fits several.
    """
    base = _base(name)
    wanted, _, version = name.partition(":")
    if base in BUILDERS and version in ("", str(BUILDERS[base].VERSION)):
        ours = [own for own in own_names() if _base(own) == base]
        if wanted not in (base, *ours):
            raise UserError(f"there is no data set {name!r}: those that start with {base} are {ours}")
        return prepare(ours[0] if wanted == base else wanted, data_dir)
    prepared = list(_prepared(data_dir))
    fitting = [
        found for found in prepared if wanted in (found.name, _base(found.name)) and version in ("", found.version)
    ]
    configurations = sorted({found.name for found in fitting})
    if not fitting:
        raise UserError(_why_not_found(name, data_dir, prepared))
    if len(configurations) > 1:
        raise UserError(f"{name} has several configurations in {data_dir}: choose one of {configurations}")
    return max(fitting, key=lambda found: [int(number) for number in found.version.split(".")]).directory


def full_name(directory: Path, data_dir: Path) -> str:
    """By which `find_data_set` finds this directory and no other: "coco_captions/2014:1.1.0", "digits:1.0.0"."""
    cache = local_path(CACHE)
    inside = cache if not directory.is_relative_to(data_dir) and directory.is_relative_to(cache) else data_dir
    return f"{Path(os.path.relpath(directory.parent, inside)).as_posix()}:{directory.name}"


def mend(name: str, data_dir: Path) -> str:
    """What to do about the directory of a data set that cannot be used; only what we make ourselves is deleted."""
    if _base(name) in BUILDERS:
        return "delete that directory and run this again, which prepares it anew"
    return f"move that directory away and {_build(name, data_dir)}"


def _build(name: str, data_dir: Path) -> str:
    return f"run `pip install -e '.[prepare]'` and `tfds build {name} --data_dir={data_dir} --file_format=array_record`"


def _base(name: str) -> str:
    return re.split("[/:]", name)[0]


def _prepared(data_dir: Path) -> Iterator[_Prepared]:
    for depth in ("*/*", "*/*/*"):
        for info in data_dir.glob(f"{depth}/dataset_info.json"):
            # TFDS prepares in a directory of another name and renames it when it is complete.
            if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name):
                name = info.parent.parent.relative_to(data_dir).as_posix()
                yield _Prepared(name, info.parent.name, info.parent)


def _why_not_found(name: str, data_dir: Path, prepared: list[_Prepared]) -> str:
    base = _base(name)
    there = sorted(f"{found.name}:{found.version}" for found in prepared)
    if base in BUILDERS:
        made = f"{base}:{BUILDERS[base].VERSION}"
        return f"{name} is not prepared in {data_dir}, which has {there}, and this vlm_jax makes {made}: choose that"
    known = {*tfds.list_builders(with_community_datasets=False), *(_base(found.name) for found in prepared)}
    if base in known:
        return f"{name} is not prepared in {data_dir}, which has {there}: {_build(name, data_dir)}"
    near = difflib.get_close_matches(base, {*known, *own_names()}, n=3)
    return f"there is no data set {name!r}: did you mean one of {near or own_names() + there}?"
