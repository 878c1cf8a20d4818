"""What a directory of checkpoints holds: the steps, their manifests, and what is wrong with them."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import jax

from vlm_jax.errors import UserError
from vlm_jax.identity import changes, listed
from vlm_jax.train import checksums
from vlm_jax.train.agreement import agreed


def saved_steps(directory: Path) -> tuple[int, ...]:
    """The steps in a directory of checkpoints, ascending; none if there is no such directory.

    Raises:
      UserError: it cannot be read.
    """
    try:
        names = [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise UserError(f"{directory} cannot be read ({error.strerror}): mend that") from error
    return tuple(sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)))


def check_path(directory: Path, *, read_only: bool) -> None:
    """Refuses a directory of checkpoints that could not be read, or be written and never read again.

    Tensorstore takes a backslash for a slash, etils a first name such as s3 for the address of a bucket, and so does
    orbax with gs: further on. Orbax, when it writes, also finds files by patterns that begin with the directory, which
    then finds nothing or another run's.

    Raises:
      UserError: a part of the path would be read as something else.
    """
    path = f"{directory.absolute()}/"
    parts = ("\\", "gs:/") if read_only else ("\\", "gs:/", "*", "?", "[")
    misread = [part for part in parts if part in path]
    misread += [part for part in ("/gs/", "/s3/", "/az/", "/hf/") if path.startswith(part)]
    if misread:
        raise UserError(
            f"{directory} holds {misread[0]} in its path, which the libraries that keep checkpoints take for something "
            f"else: choose another directory, or one of another name that is a link to it"
        )


def read_manifests(directory: Path) -> tuple[dict[int, checksums.Manifest], dict[int, str]]:
    """The manifests of the saved steps, and what is wrong with those that are damaged."""
    manifests, damaged = {}, {}
    for step in saved_steps(directory):
        try:
            manifests[step] = checksums.read_manifest(directory / str(step))
        except checksums.DamagedError as error:
            if (directory / str(step)).exists():  # else a writer has just deleted it
                damaged[step] = str(error)
    return manifests, damaged


def misplaced(directory: Path, identity: Mapping[str, str] | None) -> str:
    """What is wrong with the first of the checkpoints that is not what its place says it is; empty if all are."""
    try:
        manifests, _ = read_manifests(directory)
    except UserError as error:
        return str(error)
    for step, manifest in manifests.items():
        if manifest.step != step:
            return f"{directory / str(step)} is checkpoint {manifest.step} under another name: give it that name back"
        if identity is not None and (found := changes(manifest.identity, identity)):
            return (
                f"{directory / str(step)} was not written with the config.json and tokenizer.json that are there "
                f"({listed(found)}): bring back those that it was written with, or move it elsewhere"
            )
    return ""


def validation_losses(manifests: Mapping[int, checksums.Manifest]) -> dict[int, float]:
    """Of the steps that were saved with one."""
    losses = {step: manifest.validation_loss for step, manifest in manifests.items()}
    return {step: loss for step, loss in losses.items() if loss is not None}


def find_damage(checkpoint: Path, items: Collection[str]) -> str:
    """What is wrong with the files of these items, empty if nothing; each process reads its share, all agree.

    Raises:
      UserError: there is a symbolic link, through which orbax would read and delete things elsewhere.
    """
    link = next((str(path) for path in (checkpoint, *checkpoint.glob("**/*")) if path.is_symlink()), "")
    if link := agreed(link):
        raise UserError(f"{link} is a symbolic link: a checkpoint holds none, put the file itself there")
    damage = ""
    try:
        checksums.verify(checkpoint, items, share=jax.process_index(), shares=jax.process_count())
    except checksums.DamagedError as error:
        damage = str(error)
    return agreed(damage)
