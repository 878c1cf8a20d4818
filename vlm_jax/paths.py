"""What a person writes for a path, as a path: text, in which only a leading ~ stands for something else."""

import os
import re
from pathlib import Path

from vlm_jax.errors import UserError


def local_path(text: str | Path) -> Path:
    """A path of this machine, with the home directory for a leading ~.

    Raises:
      UserError: it is the address of something elsewhere or would be taken for one, or it is not UTF-8, or there is no
        home directory.
    """
    text = str(text)
    if re.match(r"\w[\w+.-]+:/", text):
        raise UserError(f"{text} is not a directory or file of this machine: mount it, and give the path of the mount")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the path {text!a} is not UTF-8: choose another name") from error
    path = os.path.expanduser(text)
    if path.startswith("~/") or path == "~":
        raise UserError(f"there is no home directory for {text}: set HOME, or give a path without ~")
    if bucket := re.match("/(gs|s3|az|hf)/", path):
        # So etils reads it, by which orbax and TFDS reach their files.
        raise UserError(f"{path} would be taken for the address of a bucket, for its {bucket[0]}: give a link to it")
    return Path(path)


def cache_directory() -> Path | None:
    """Where this machine's user keeps what can be made again (XDG Base Directory Specification); None: nowhere."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    path = Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache"))
    return path if path.is_absolute() else None
