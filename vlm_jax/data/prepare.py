"""The data sets that come with the library: prepared on first use, in TFDS's format, from installed packages."""

import contextlib
import io
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from filelock import Timeout

from vlm_jax.data.digits import Digits
from vlm_jax.data.easy_vqa import EasyVqa
from vlm_jax.data.mosaic import Mosaic
from vlm_jax.data.openmoji import OpenMoji
from vlm_jax.errors import UserError
from vlm_jax.locks import exclusive
from vlm_jax.paths import local_path

CACHE = "~/.cache/vlm_jax/data"
"""Where prepared data sets are unless another directory is given, and ours if that one is read-only."""

BUILDERS = {builder.name: builder for builder in (OpenMoji, EasyVqa, Mosaic, Digits)}


def own_names() -> list[str]:
    """The names that `prepare` takes, such as "openmoji" and "easy_vqa/color"."""
    return [
        name if config is None else f"{name}/{config}"
        for name, builder in BUILDERS.items()
        for config in list(builder.builder_configs) or [None]
    ]


def prepare(name: str, data_dir: Path) -> Path:
    """The directory of a prepared data set of ours, which takes up to half a minute the first time.

    It is in `data_dir`, or in `CACHE` where it is not there yet and `data_dir` is read-only: one that is shared by many
    serves for what others have prepared.

    Any number of processes may call this at once: one prepares and the others wait. The directory appears by one
    rename when it is complete, so an interrupted preparation is done again.

    Args:
      name: one of `own_names()`.

    Raises:
      UserError: `data_dir` cannot be written.
    """
    base, _, config = name.partition("/")
    directory = data_dir / name / str(BUILDERS[base].VERSION)
    if not directory.exists() and _read_only(data_dir):
        data_dir = local_path(CACHE)
        directory = data_dir / name / str(BUILDERS[base].VERSION)
    try:
        if not directory.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            with exclusive(data_dir / f"{base}.lock", timeout=600), _quiet():
                _remove_interrupted(directory.parent)
                # Does nothing if another process has just done it.
                builder = BUILDERS[base](config=config or None, data_dir=data_dir)
                builder.download_and_prepare(file_format="array_record")
    except Timeout as error:
        raise UserError(
            f"another process has been preparing {base} in {data_dir} for ten minutes: if none does, delete "
            f"{error.lock_file}"
        ) from error
    except OSError as error:
        raise UserError(f"{name} cannot be prepared in {data_dir} ({error}): choose another data directory") from error
    return directory


def _read_only(directory: Path) -> bool:
    """Whether nobody is to write there; root, who can, is not to either."""
    if not directory.is_dir():
        return False
    return not directory.stat().st_mode & stat.S_IWUSR or not os.access(directory, os.W_OK)


def _remove_interrupted(parent: Path) -> None:
    """Removes what killed preparations left; the caller holds the lock, so none is under way."""
    for leftover in parent.glob("incomplete.*"):
        shutil.rmtree(leftover)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing its notices, and its progress bars below the builders' own."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
