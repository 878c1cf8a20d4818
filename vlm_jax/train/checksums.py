"""Manifests of checkpoints: what is in one and to what run it belongs, written when it is complete, compared before
a value of it is used.

The manifest is one file at the top of a checkpoint. Its first line is the checksum of the rest, which is JSON, so
that a manifest is either exactly what was written or known to be damaged.
"""

import hashlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vlm_jax.errors import UserError

MANIFEST = "CHECKSUMS"
VERSION = 2


class DamagedError(Exception):
    """A checkpoint is not what was written; the message names the file, relative to the checkpoint, and the damage."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete checkpoint holds."""

    version: int = VERSION
    step: int
    validation_loss: float | None
    identity: dict[str, str]
    """Facts of the run that give the arrays their meaning."""
    files: dict[str, tuple[int, str]]
    """The size in bytes and the checksum of each file, by its path relative to the checkpoint."""


def write_manifest(
    checkpoint: Path, *, step: int, validation_loss: float | None, identity: Mapping[str, str], items: Collection[str]
) -> None:
    """Writes the manifest of the files of the items of a checkpoint, that is of its subdirectories.

    Files at the top of the checkpoint are orbax's notes, such as the time of the last rename. It writes them after
    this, and nothing restored comes from them.
    """
    paths = [path for item in items for path in _files(checkpoint / item)]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_file_digest, paths)
        files = {
            path.relative_to(checkpoint).as_posix(): (path.stat().st_size, digest)
            for path, digest in zip(paths, digests, strict=True)
        }
    manifest = Manifest(step=step, validation_loss=validation_loss, identity=dict(identity), files=files)
    body = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
    (checkpoint / MANIFEST).write_bytes(_digest(body) + b"\n" + body)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
      DamagedError: it is missing or not what was written.
      UserError: another version of this library wrote it.
    """
    try:
        digest, _, body = (checkpoint / MANIFEST).read_bytes().partition(b"\n")
    except OSError as error:
        raise DamagedError(f"{MANIFEST}: {error.strerror}") from error
    if digest != _digest(body):
        raise DamagedError(f"{MANIFEST}: checksum differs")
    try:
        content: dict[str, Any] = msgspec.json.decode(body, type=dict)
        if content.get("version") == VERSION:
            return msgspec.convert(content, Manifest)
    except msgspec.DecodeError as error:
        raise DamagedError(f"{MANIFEST}: {error}") from error
    raise UserError(
        f"{checkpoint} was written by another version of vlm_jax (its manifest is of version "
        f"{content.get('version', 1)}, this one reads {VERSION}): use that version, or train anew elsewhere"
    )


def verify(checkpoint: Path, items: Collection[str], *, share: int = 0, shares: int = 1) -> None:
    """Reads every `shares`-th file of the given items, from the `share`-th on, and compares it with the manifest.

    Raises:
      DamagedError: the manifest or a file is missing, cannot be read, or differs; or the manifest does not know of a
        file, which then was never vouched for.
      UserError: another version of this library wrote the manifest.
    """
    manifest = read_manifest(checkpoint)
    there = [path.relative_to(checkpoint).as_posix() for item in items for path in _files(checkpoint / item)]
    if unknown := sorted(set(there) - manifest.files.keys()):
        raise DamagedError(f"{unknown[0]}: not in {MANIFEST}")
    paths = sorted(path for path in manifest.files if path.partition("/")[0] in items)
    with ThreadPoolExecutor() as pool:
        verdicts = pool.map(lambda path: _damage(checkpoint / path, *manifest.files[path]), paths[share::shares])
        for path, damage in zip(paths[share::shares], verdicts, strict=True):
            if damage is not None:
                raise DamagedError(f"{path}: {damage}")


def _files(directory: Path) -> list[Path]:
    """All but hidden ones, such as network file systems and desktops leave."""
    return [path for path in directory.glob("**/*") if not path.name.startswith(".") and path.is_file()]


def _damage(path: Path, size: int, digest: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{found} bytes instead of {size}"
        return None if _file_digest(path) == digest else "checksum differs"
    except OSError as error:
        return error.strerror


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body).hexdigest().encode()
